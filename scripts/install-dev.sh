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

"$venv/bin/pip" install --quiet --editable '.[dev]'
