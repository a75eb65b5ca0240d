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

# NIXL's metadata asks for torch, which it does not import for memory of the host. Where there is no
# build of it, its tests are skipped.
"$venv/bin/pip" install --quiet --no-deps --only-binary :all: nixl-cu12==1.5.1 ||
    echo "NIXL has no build for this machine: its tests will be skipped"
