#!/usr/bin/env bash
# A recipe on the GPUs of one machine: checked first by a dry run, then launched by torchrun.
#   bash scripts/train_8gpu.sh llava --out runs/llava stages.instruct.data=mix.jsonl
#   GPUS=4 bash scripts/train_8gpu.sh llava --deepspeed zero2 --out runs/llava
# The same command continues. DeepSpeed serves one stage per process, so with it each stage is launched by itself.
set -euo pipefail
if [ $# -eq 0 ] || [ "$1" = --help ]; then
    sed -n '2,5p' "$0"
    exit 0
fi
facts=$(python -P -m mmllm train "$@" --dry-run --processes "${GPUS:-8}" --json)
launches=1
case " $* " in
    *" --deepspeed"*) launches=$(python -c 'import json, sys; print(sum(k.startswith("stage ") for k in json.load(sys.stdin)))' <<< "$facts") ;;
esac
for _ in $(seq "$launches"); do
    torchrun --shutdown-timeout 600 --standalone --nproc-per-node "${GPUS:-8}" -m mmllm train "$@"
done
