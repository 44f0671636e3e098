#!/usr/bin/env bash
# The committed fault tables: every fault of the table planted in every framework, on the tiny twins of four models.
set -euo pipefail
cd "$(dirname "$0")/.."
for model in resnet20 resnet50 vit_tiny_patch16_224 transformer_block; do
  .venv/bin/triptych parity "$model" --fault all --json > benchmarks/results/faults/$model.json.partial
  mv benchmarks/results/faults/$model.json.partial benchmarks/results/faults/$model.json
done
