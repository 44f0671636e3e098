#!/usr/bin/env bash
# A ResNet-20 trained on CIFAR-10 in one framework and evaluated in all three. Needs the data: TRIPTYCH_DATA/cifar10 (Parquet, as on the Hub).
#   TRIPTYCH_DATA=DIR benchmarks/cifar10.sh [RUN]      (runs/cifar10 when no run directory is named)
set -euo pipefail
cd "$(dirname "$0")/.."
run=${1:-runs/cifar10}
data=${TRIPTYCH_DATA:?name the folder that holds cifar10/}/cifar10
.venv/bin/triptych train resnet20 --framework pytorch --data "$data" --epochs 3 --warmup-epochs 0.5 --batch-size 128 --learning-rate 0.1 --out "$run"
.venv/bin/triptych evaluate --data "$data" --weights "$run/pytorch/checkpoint" --framework all --batch-size 250 --json \
  > benchmarks/results/evaluate/cifar10-resnet20.json
