#!/usr/bin/env bash
# From a fresh clone to a trained, evaluated model that answers, on two CPU cores. Run again, it continues.
#   bash scripts/quickstart.sh                    about 20 minutes
#   bash scripts/quickstart.sh --level tiny       a few minutes, learns nothing: only to see that all works
#   bash scripts/quickstart.sh --seed 1 --out runs/second
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

level=nano out= seed=0 venv=.venv
while [ $# -gt 0 ]; do
    case $1 in
        --level) level=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        --seed) seed=$2; shift 2 ;;
        --venv) venv=$2; shift 2 ;;
        --help | -h) sed -n '2,5p' "$0"; exit 0 ;;
        *) echo "error: $1: unknown flag. Try: --help" >&2; exit 2 ;;
    esac
done
world=runs/world-$level
default=runs/quickstart
[ "$level" = nano ] || default+=-$level
out=${out:-$default}
overrides=("roots.world=$world")
if [ "$level" = tiny ]; then
    overrides+=(stages.{letters,text,caption,instruct}.steps=4)
    left=(3 2 2 2 1 1)
else
    left=(18 17 16 13 1 1)
fi

# step NUMBER NAME TITLE: say what comes and how long is left; time it from here.
step() {
    began=$(date +%s)
    name=$2
    echo "[$1/6] $3  (about ${left[$(($1 - 1))]} min left)" >&2
}
# finish: keep the seconds of a step the first time it really ran.
finish() {
    mkdir -p "$out/seconds"
    [ -f "$out/seconds/$name" ] || echo $(($(date +%s) - began)) > "$out/seconds/$name"
}

step 1 install "virtual environment and installation"
make_venv "$venv" ""
finish
mmllm="$venv/bin/mmllm"

step 2 world "NanoWorld: videos with known truth"
"$mmllm" world make --out "$world" --level "$level" > /dev/null
finish

step 3 text "learn letters, then the language as text"
"$mmllm" train nano/llava --out "$out" --seed "$seed" --stages letters,text "${overrides[@]}" > /dev/null

step 4 see "learn to see: descriptions, then questions"
"$mmllm" train nano/llava --out "$out" --seed "$seed" --stages caption,instruct "${overrides[@]}" > /dev/null

step 5 evaluate "evaluate on mini MVBench and mini MLVU, with blind and single-frame floors"
"$mmllm" eval --model "$out" --tasks mvbench,mlvu

step 6 ask "ask about a clip of NanoWorld and about a real one"
clip=$(find "$world/mvbench/video" -name '*.mp4' | sort | sed -n 1p)
"$mmllm" ask --model "$out" --video "$clip" "Describe the video."
"$mmllm" ask --model "$out" --video tests/assets/tablet_drawing.mp4 "Describe the video."
echo "next: $mmllm ask --model $out/model --video $clip \"What color is the moving object?\"" >&2
