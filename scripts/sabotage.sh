#!/usr/bin/env bash
# Whether a broken line turns a test red: each line of tests/sabotage/*.yaml is broken in a copy, and its tests are run.
#   bash scripts/sabotage.sh                       all of them: half an hour on two CPU cores
#   bash scripts/sabotage.sh --only train/ --jobs 1 --json caught.json
#   bash scripts/sabotage.sh --check               only whether the lines are still there, a second
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

venv=.venv
rest=()
while [ $# -gt 0 ]; do
    case $1 in
        --venv) venv=$2; shift 2 ;;
        --help | -h) sed -n '2,5p' "$0"; exit 0 ;;
        *) rest+=("$1"); shift ;;
    esac
done
[ -x "$venv/bin/python" ] || make_venv "$venv" dev
exec "$venv/bin/python" tests/sabotage/run.py ${rest[@]+"${rest[@]}"}
