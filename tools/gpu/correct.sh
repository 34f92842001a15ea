#!/usr/bin/env bash
# Block 1 of the GPU checks: correctness. Needs torch >= 2.11 with a GPU; about five minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
python -m pip install --quiet --no-deps -e . && python -m pip install --quiet tyro rich xxhash safetensors scikit-learn scipy matplotlib
out=${OUT:-docs/results/gpu}
python tools/gpu/correct.py --device cuda --out "$out"
manyscale doctor
manyscale train digits --device cuda --precision bfloat16 --epochs 20 --out "$out/digits"
