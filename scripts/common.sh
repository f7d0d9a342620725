# Sourced by the scripts: the virtual environment, and nothing else.

# make_venv DIR EXTRAS: a virtual environment with mmllm installed from this folder; done once.
make_venv() {
    local venv=$1 extras=$2
    if [ ! -x "$venv/bin/python" ]; then
        "${PYTHON:-python3}" -m venv "$venv"
    fi
    local wanted
    wanted="$extras $(cat setup.py pyproject.toml | cksum)"
    if [ "$(cat "$venv/.mmllm-installed" 2>/dev/null)" != "$wanted" ]; then
        "$venv/bin/python" -m pip install --quiet --editable ".[$extras]"
        echo "$wanted" > "$venv/.mmllm-installed"
    fi
}
