#!/usr/bin/env bash
# The committed certificates and fault tables: every catalogued model through the ladder, in both precisions. Hours on 2 cores.
#   benchmarks/certify.sh [MODEL...]        (all of the catalogue when none is named)
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin/triptych
results=benchmarks/results
models=("$@")
[ ${#models[@]} -gt 0 ] || mapfile -t models < <($bin list --json | sed -n 's/.*"name": "\(.*\)",/\1/p')
put() { "${@:2}" > "$1.partial" && mv "$1.partial" "$1"; }
for model in "${models[@]}"; do
  put "$results/certificates/$model.json" $bin parity "$model" --json
done
