#!/usr/bin/env bash
# Block 2 of the GPU checks, SuperViT: its twelve settings, measured in turns, eager and compiled. About ten minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
python -m pip install --quiet --no-deps -e . && python -m pip install --quiet tyro rich xxhash safetensors scikit-learn scipy matplotlib
out=${OUT:-docs/results/gpu}/supervit
mkdir -p "$out"
python -c "import manyscale as ms; ms.save(ms.create_model('supervit_deit_small'), 'runs/supervit_deit_small')"
for compile in --no-compile --compile; do
  manyscale plan cost runs/supervit_deit_small --batch 1 8 32 256 --precision bfloat16 "$compile" --out "$out/${compile#--}"
done
