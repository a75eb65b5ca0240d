#!/usr/bin/env bash
# Make the virtual environment with KVStrata and its development tools; no engine.
#
#   scripts/install-dev.sh [VENV]        VENV defaults to .venv; PYTHON names the interpreter
#
# Running it again changes only what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}

if [ ! -x "$venv/bin/pip" ]; then
    "${PYTHON:-python3}" scripts/check_system.py --for venv
    "${PYTHON:-python3}" -m venv --clear "$venv"
fi

# torch goes first and by its exact version, the one vLLM was built with: whatever depends on torch
# later finds it and draws in no other build. Where pip's configured index also offers 2.13.0+cpu,
# pip prefers that, which is enough here and much smaller.
"$venv/bin/pip" install --quiet torch==2.13.0
"$venv/bin/pip" install --quiet --editable '.[dev]'
