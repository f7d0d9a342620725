#!/usr/bin/env bash
# A recipe on the GPUs of one machine: checked first by a dry run, then launched by torchrun.
#   bash scripts/train_8gpu.sh llava --out runs/llava stages.instruct.data=mix.jsonl
#   GPUS=4 bash scripts/train_8gpu.sh llava --deepspeed zero2 --out runs/llava
set -euo pipefail
if [ $# -eq 0 ] || [ "$1" = --help ]; then
    sed -n '2,4p' "$0"
    exit 0
fi
python -m mmllm train "$@" --dry-run
exec torchrun --shutdown-timeout 600 --standalone --nproc-per-node "${GPUS:-8}" -m mmllm train "$@"
