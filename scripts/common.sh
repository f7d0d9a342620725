# Sourced by the scripts: the virtual environment, and how memory is kept.

# glibc hands large blocks back to the system after each training step and asks for them again in the next one. Keeping
# them makes training on a CPU about a tenth faster; other C libraries ignore these.
export MALLOC_MMAP_THRESHOLD_=2147483648 MALLOC_TRIM_THRESHOLD_=8589934592

# make_venv DIR EXTRAS: a virtual environment with mmllm installed from this folder; done once for each EXTRAS.
make_venv() {
    local venv=$1 extras=$2 what=. wanted
    [ -z "$extras" ] || what=".[$extras]"
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    wanted=$(cat setup.py pyproject.toml | cksum)
    if [ "$(cat "$venv/.installed-$extras" 2>/dev/null)" != "$wanted" ]; then
        "$venv/bin/python" -m pip install --quiet --editable "$what"
        echo "$wanted" > "$venv/.installed-$extras"
    fi
}

# split_venv "$@": sets `venv` (what --venv says, else .venv) and `rest`, the other arguments.
split_venv() {
    venv=.venv rest=()
    while [ $# -gt 0 ]; do
        case $1 in
            --venv) venv=$2; shift 2 ;;
            *) rest+=("$1"); shift ;;
        esac
    done
}
