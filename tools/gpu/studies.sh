#!/usr/bin/env bash
# Block 4 of the GPU checks: the studies in full, three seeds, on cifar10 and tiny-imagenet under $MANYSCALE_DATA. Name some to run only those.
set -euo pipefail
cd "$(dirname "$0")/../.."
python -m pip install --quiet --no-deps -e . && python -m pip install --quiet tyro rich xxhash safetensors scikit-learn scipy matplotlib
out=${OUT:-docs/results/gpu}/studies
[ $# -gt 0 ] || set -- position-bias norms amplitudes simmim scaling weight-decay heads supervit
for study in "$@"; do
  manyscale study "$study" --seeds 3 --compile --out "runs/studies/$study"
  mkdir -p "$out/$study"
  cp runs/studies/"$study"/{table.md,table.json,picture.png} "$out/$study"
done
