#!/usr/bin/env bash
# DPO on the GPUs of one machine, from a finished run; checked by a dry run first.
#   bash scripts/train_dpo.sh --start runs/ppllava --out runs/ppllava_dpo stages.dpo.data=pairs.jsonl
#   bash scripts/train_dpo.sh --recipe my_dpo.yaml --start runs/mine --out runs/mine_dpo
#   GPUS=4 bash scripts/train_dpo.sh --start runs/ppllava --out runs/ppllava_dpo --deepspeed zero2
set -euo pipefail
here=$(dirname "$0")
recipe=ppllava_dpo start=runs/ppllava
rest=()
while [ $# -gt 0 ]; do
    case $1 in
        --recipe) recipe=$2; shift 2 ;;
        --start) start=$2; shift 2 ;;
        --help | -h) sed -n '2,5p' "$0"; exit 0 ;;
        *) rest+=("$1"); shift ;;
    esac
done
bash "$here/train_8gpu.sh" "$recipe" "roots.start=$start" ${rest[@]+"${rest[@]}"}
