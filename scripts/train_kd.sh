#!/usr/bin/env bash
# LLaVA-KD on the GPUs of one machine: the teacher if there is none yet, then the student. Each is checked by a dry run.
#   bash scripts/train_kd.sh --out runs/kd                        teacher into runs/llava_kd_teacher, student into runs/kd
#   bash scripts/train_kd.sh --teacher runs/mine --out runs/kd stages.align.data=captions.json
#   GPUS=4 bash scripts/train_kd.sh --out runs/kd --deepspeed zero2
set -euo pipefail
here=$(dirname "$0")
teacher=runs/llava_kd_teacher
rest=()
while [ $# -gt 0 ]; do
    case $1 in
        --teacher) teacher=$2; shift 2 ;;
        --help | -h) sed -n '2,5p' "$0"; exit 0 ;;
        *) rest+=("$1"); shift ;;
    esac
done
[ -d "$teacher/model" ] || [ -f "$teacher/config.json" ] ||
    bash "$here/train_8gpu.sh" llava_kd_teacher --out "$teacher"
bash "$here/train_8gpu.sh" llava_kd "roots.teacher=$teacher" ${rest[@]+"${rest[@]}"}
