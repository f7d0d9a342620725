#!/usr/bin/env bash
# Give mmllm damaged files, wrong recipes and flags, hostile models, and kills, and count what comes of it.
#   bash scripts/attack.sh                            1,500 inputs and 60 kills
#   bash scripts/attack.sh --inputs 200 --kills 4 --only media,kills
#   bash scripts/attack.sh --case media-0017 --seed 3    one of them again
#   bash scripts/attack.sh --venv DIR                 another environment; --help tells the rest
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

split_venv "$@"
[ -x "$venv/bin/python" ] || make_venv "$venv" dev
export OMP_NUM_THREADS=1 PYTHONPATH=.:tests TOKENIZERS_PARALLELISM=false
exec "$venv/bin/python" -m attack ${rest[@]+"${rest[@]}"}
