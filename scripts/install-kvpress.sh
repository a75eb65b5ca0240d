#!/usr/bin/env bash
# Make a virtual environment with kvpress, whose presses `kvstrata quality --selection` measures
# beside our own methods. It needs other versions of transformers and its like than engines do, so
# it has an environment, and KVStrata runs it as a process, of its own.
#
#   scripts/install-kvpress.sh [VENV]   VENV defaults to .venv-kvpress; PYTHON names the interpreter
#
# Running it again changes only what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv-kvpress}
pip=("$venv/bin/pip" install --quiet)

if [ ! -x "$venv/bin/pip" ]; then
    "${PYTHON:-python3}" -m venv --clear "$venv"
fi

# 1. torch, before anything draws in another: the version of the other environments, so that one
#    download serves all. Where pip's configured index offers 2.13.0+cpu, pip prefers that.
"${pip[@]}" torch==2.13.0

# 2. kvpress with all that it asks for; of transformers the newest that it takes.
"${pip[@]}" kvpress==0.5.5

"$venv/bin/python" -c 'import kvpress, transformers; print("kvpress with transformers", transformers.__version__)'
