#!/usr/bin/env bash
# Write the hash-pinned locks anew (Linux x86-64, Python 3.11) from pyproject.toml. Needs uv; install the result with pip.
set -euo pipefail
cd "$(dirname "$0")/.."
lock() { uv pip compile --quiet --generate-hashes --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
  --custom-compile-command requirements/lock.sh --extra "$1" --output-file "requirements/$1.txt" pyproject.toml "${@:2}"; }
lock dev --constraint requirements/pins.in
# The narrower locks take the versions of the widest, so that every image runs what was proven.
for name in all pytorch tensorflow jax report tensorflow-gpu jax-gpu; do lock "$name" --constraint requirements/dev.txt; done
