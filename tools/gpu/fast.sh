#!/usr/bin/env bash
# Block 2 of the GPU checks: speed, beside timm, transformers and torchvision with the same weights. Two calls of about ten minutes: `fast.sh
# inference`, `fast.sh training`; without a word both.
set -euo pipefail
cd "$(dirname "$0")/../.."
python -m pip install --quiet --no-deps -e .
python -m pip install --quiet tyro rich xxhash safetensors scikit-learn scipy matplotlib timm transformers
out=${OUT:-docs/results/gpu}/fast
bench() { # name, options
  local name=$1
  shift
  manyscale bench "$@" --dtype bfloat16 --out "$out/$name" | tee -a "$out/tables.txt" || echo "$name failed" | tee -a "$out/tables.txt"
}
mkdir -p "$out"
peers=timm,transformers,torchvision
for what in ${@:-inference training}; do
  flag=$([ "$what" = training ] && echo --train || echo --no-train)
  for net in tiny base; do
    for size in 256/8 256/16 $([ $net = base ] && echo 384/24); do
      for batch in $([ "$what" = training ] && echo 64 || echo 1 32 256); do
        compile=$([ "$batch" -ge 32 ] && echo --compile || echo --no-compile)
        bench "$what-swinv2_$net-${size/\//-}-$batch" "swinv2_$net" --image-size "${size%/*}" --window "${size#*/}" --batch "$batch" \
          --against $peers --attention auto fused kernel "$flag" "$compile"
      done
    done
  done
  for net in small base large; do
    for batch in $([ "$what" = training ] && echo 64 || echo 1 256); do
      bench "$what-vit_$net-$batch" "vit_${net}_patch16" --batch "$batch" --against timm,transformers "$flag" --no-compile
    done
  done
done
[ $# -gt 0 ] || tools/gpu/supervit.sh
