#!/usr/bin/env bash
# A longer run than the quickstart's: up to an hour on two CPU cores, then the evaluation. Run again, it continues.
#   bash scripts/train_nano.sh                         nano/llava into runs/nano
#   bash scripts/train_nano.sh --seed 1 --out runs/nano-1
#   bash scripts/train_nano.sh --recipe nano/video_chatgpt --out runs/means stages.instruct.steps=2000
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

recipe=nano/llava out=runs/nano seed=0 venv=.venv world=runs/world-nano
overrides=()
while [ $# -gt 0 ]; do
    case $1 in
        --recipe) recipe=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        --seed) seed=$2; shift 2 ;;
        --venv) venv=$2; shift 2 ;;
        --world) world=$2; shift 2 ;;
        --help | -h) sed -n '2,5p' "$0"; exit 0 ;;
        *=*) overrides+=("$1"); shift ;;
        *) echo "error: $1: unknown flag. Try: --help" >&2; exit 2 ;;
    esac
done
make_venv "$venv" ""
"$venv/bin/mmllm" world make --out "$world" --level nano > /dev/null
"$venv/bin/mmllm" train "$recipe" --out "$out" --seed "$seed" "roots.world=$world" \
    stages.letters.steps=500 stages.text.steps=2000 \
    stages.caption.steps=2000 stages.instruct.steps=2300 ${overrides[@]+"${overrides[@]}"} > /dev/null
"$venv/bin/mmllm" eval --model "$out" --tasks mvbench,mlvu
