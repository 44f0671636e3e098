#!/usr/bin/env bash
# The recorded runs on CIFAR-10: resnet20 by one recipe in three frameworks, resnet18_cifar in PyTorch (Lab 1 of the chapter). An hour or
# more each on 2 cores. Interrupted (Ctrl-C, kill, power), start it again: a run goes on from its newest checkpoint, a finished one stays.
#   TRIPTYCH_DATA=DIR benchmarks/cifar10.sh [RUN...]      DIR holds cifar10/ (Parquet, as on the Hub)
# RUN is resnet20-pytorch, resnet20-tensorflow, resnet20-jax, resnet18_cifar-pytorch or evaluate; all of them when none is named.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${TRIPTYCH_DATA:?name the folder that holds cifar10/}/cifar10
results=benchmarks/results
checkpoints=$results/cifar10/checkpoints
wanted=("$@")
[ ${#wanted[@]} -gt 0 ] || wanted=(resnet20-pytorch resnet20-tensorflow resnet20-jax resnet18_cifar-pytorch evaluate)

train() { # RECIPE MODEL FRAMEWORK [options of cifar10_record.py...]
  local run=runs/cifar10/$2 arguments
  arguments=(train "$1" --framework "$3" --out "$run" --resume auto)
  [ -f "$run/$3/result.json" ] || .venv/bin/triptych "${arguments[@]}" --data "$data"
  .venv/bin/python benchmarks/cifar10_record.py "$run/$3" "$results/cifar10/$2-$3.json" --data "$data" \
    --command "triptych ${arguments[*]} --data PATH/TO/cifar10" "${@:4}"
}

evaluate() { # FRAMEWORK OUT: what was trained in one framework, evaluated in all of them
  .venv/bin/triptych evaluate --data "$data" --weights "$checkpoints/resnet20-$1" --framework all --batch-size 250 --json > "$2.partial"
  mv "$2.partial" "$2"
}

for name in "${wanted[@]}"; do
  case $name in
    resnet20-*) train cifar10_resnet20 resnet20 "${name#*-}" --checkpoint "$checkpoints/$name" ;;
    resnet18_cifar-pytorch) train cifar10_resnet18 resnet18_cifar pytorch ;;
    evaluate)
      evaluate pytorch $results/evaluate/cifar10-resnet20.json
      evaluate tensorflow $results/evaluate/cifar10-resnet20-tensorflow.json
      evaluate jax $results/evaluate/cifar10-resnet20-jax.json
      ;;
    *) echo "unknown run $name; see the head of $0" >&2 && exit 2 ;;
  esac
done
