# Sourced by the scripts beside it: a virtual environment with the project in it, and a fast BLAS on Linux.
# Leaves the shell in the project's root with .venv/bin first in PATH.

set -eu
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; }

find_python() {
    for name in python3 python3.13 python3.12 python3.11 python3.10; do
        if command -v "$name" >/dev/null 2>&1 &&
            "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
    say "This needs Python 3.10 or later with its venv module; python3 here is: $(python3 --version 2>/dev/null || echo none)"
    say "Install one (macOS: brew install python; Debian, Ubuntu: apt-get install python3 python3-venv) and run this again."
    return 1
}

make_environment() {
    if [ ! -x .venv/bin/python ] || [ ! -x .venv/bin/pip ]; then
        python=$(find_python) || exit 1
        say "Making .venv with $("$python" --version) ..."
        "$python" -m venv .venv
    fi
    # what is installed follows pyproject.toml; the stamp says which one that was
    wanted=$(cksum <pyproject.toml)
    if [ "$(cat .venv/installed-for 2>/dev/null || true)" != "$wanted" ]; then
        say "Installing the project and its tools into .venv (some minutes the first time) ..."
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' >&2
        printf '%s\n' "$wanted" >.venv/installed-for
    fi
    PATH=$PWD/.venv/bin:$PATH
    export PATH
}

find_openblas() {
    for file in /usr/lib/*/openblas-pthread/libopenblas.so.0 /usr/lib64/libopenblasp.so.0 /usr/lib/libopenblas.so.0; do
        if [ -e "$file" ]; then
            printf '%s\n' "$file"
            return
        fi
    done
}

# On Linux MLX's wheel computes with the reference BLAS; with OpenBLAS loaded before it the same wheel is some 20 times
# faster. On macOS there is nothing to do.
use_openblas() {
    if [ "$(uname -s)" != Linux ]; then return; fi
    openblas=$(find_openblas)
    if [ -z "$openblas" ] && command -v apt-get >/dev/null 2>&1; then
        if [ "$(id -u)" = 0 ]; then
            as_root=
        elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
            as_root='sudo -n'
        else
            as_root=no
        fi
        if [ "$as_root" != no ]; then
            say "Installing OpenBLAS ..."
            apt="$as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq"
            {
                $apt install -y libopenblas0-pthread || { $apt update && $apt install -y libopenblas0-pthread; }
            } >/dev/null 2>&1 || say "apt-get could not install it."
            openblas=$(find_openblas)
        fi
    fi
    if [ -n "$openblas" ]; then
        LD_PRELOAD=$openblas${LD_PRELOAD:+:$LD_PRELOAD}
        export LD_PRELOAD
    else
        say "OpenBLAS is missing, so this is some 20 times slower than it could be: apt-get install libopenblas0-pthread"
    fi
}
