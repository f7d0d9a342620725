#!/usr/bin/env bash
# Whether a broken line turns a test red: each line of tests/sabotage/*.yaml is broken in a copy, and its tests are run.
#   bash scripts/sabotage.sh                       all of them: half an hour on two CPU cores
#   bash scripts/sabotage.sh --only train/ --jobs 1 --json caught.json
#   bash scripts/sabotage.sh --check               only whether the lines are still there, a second
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

split_venv "$@"
case ${rest[0]-} in --help | -h) sed -n '2,5p' "$0"; exit 0 ;; esac
[ -x "$venv/bin/python" ] || make_venv "$venv" dev
exec "$venv/bin/python" tests/sabotage/run.py ${rest[@]+"${rest[@]}"}
