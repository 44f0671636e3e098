#!/usr/bin/env bash
# Write the hash-pinned locks anew (Linux x86-64, Python 3.11) from pyproject.toml. Needs uv; install the result with pip.
set -euo pipefail
cd "$(dirname "$0")/.."
pinned() { uv pip compile --quiet --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
  --custom-compile-command requirements/lock.sh --output-file "requirements/$1.txt" "${@:2}"; }
lock() { pinned "$1" --extra "$1" pyproject.toml "${@:2}"; }
lock dev --constraint requirements/pins.in
# The narrower locks take the versions of the widest, so that every image runs what was proven.
for name in all pytorch tensorflow jax report tensorflow-gpu jax-gpu; do lock "$name" --constraint requirements/dev.txt; done
# Nothing is shared with the environment of a converter.
pinned onnx2tf requirements/onnx2tf.in
