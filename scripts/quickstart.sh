#!/usr/bin/env bash
# From a fresh clone to a trained, evaluated model that answers, on two CPU cores. Run again, it continues.
#   bash scripts/quickstart.sh                    about 20 minutes
#   bash scripts/quickstart.sh --level tiny       a few minutes, learns nothing: only to see that all works
#   bash scripts/quickstart.sh --full             about 40 minutes: then distils a small model from it, and aligns that
#   bash scripts/quickstart.sh --seed 1 --out runs/second
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

level=nano out= seed=0 venv=.venv full=
while [ $# -gt 0 ]; do
    case $1 in
        --level) level=$2; shift 2 ;;
        --out) out=$2; shift 2 ;;
        --seed) seed=$2; shift 2 ;;
        --venv) venv=$2; shift 2 ;;
        --full) full=1; shift ;;
        --help | -h) sed -n '2,6p' "$0"; exit 0 ;;
        *) echo "error: $1: unknown flag. Try: --help" >&2; exit 2 ;;
    esac
done
world=runs/world-$level
default=runs/quickstart
[ "$level" = nano ] || default+=-$level
out=${out:-$default}
overrides=("roots.world=$world")
short=()  # of the stages that --full adds
fewer=()  # of those that its small models have in common with the large one
if [ "$level" = tiny ]; then
    overrides+=(stages.{letters,text,caption,instruct}.steps=4)
    left=(3 2 2 2 1 1)
    short=(4 4)
else
    left=(18 17 16 13 1 1)
    short=(250 150)
    fewer=(stages.{caption,instruct}.steps=400)
fi
steps=6
if [ -n "$full" ]; then
    steps=9
    [ "$level" = tiny ] && left=(5 4 4 4 3 3 2 2 1) || left=(39 38 37 33 20 20 19 14 3)
fi

# step NUMBER NAME TITLE: say what comes and how long is left; time it from here.
step() {
    began=$(date +%s)
    name=$2
    echo "[$1/$steps] $3  (about ${left[$(($1 - 1))]} min left)" >&2
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
if [ -n "$full" ]; then
    small="roots.world=$world --seed $seed"

    step 7 small "a small model learns by itself, then questions once more"
    "$mmllm" train nano/small_twice --out "$out-small" $small "${overrides[@]}" ${fewer[@]+"${fewer[@]}"} \
        "stages.again.steps=${short[0]}" > /dev/null

    step 8 distil "the same small model learns from the large one for as many steps"
    "$mmllm" train nano/llava_kd --out "$out-distilled" $small "roots.teacher=$out" \
        "${overrides[@]}" ${fewer[@]+"${fewer[@]}"} "stages.distil.steps=${short[0]}" > /dev/null

    step 9 align "preferences, then all of them beside each other"
    held=()
    [ "$level" = nano ] || held=(stages.dpo.validation=10)
    "$mmllm" train nano/small_dpo --out "$out-dpo" $small "roots.start=$out-distilled" \
        "stages.dpo.steps=${short[1]}" ${held[@]+"${held[@]}"} > /dev/null
    "$mmllm" eval --model "$out-small" --model "$out-distilled" --model "$out-dpo" --tasks mvbench,mlvu \
        --out "$out/full"
fi
echo "next: $mmllm ask --model $out/model --video $clip \"What color is the moving object?\"" >&2
