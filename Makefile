# `make report` and `make test` do everything, set-up included: each builds .venv from the lock when it is missing or stale.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3.11
LOCK := requirements/dev.txt
BIN := .venv/bin

# Real images next to the checkout, when there are any; set TRIPTYCH_DATA to use others.
ifneq ($(wildcard ../shared/data),)
export TRIPTYCH_DATA ?= $(CURDIR)/../shared/data
endif

# A stamp's name is the hash of what it was made from, and it is written last: an interrupted installation is not a finished one.
# The lock's stamp holds the folder too, because a virtual environment does not survive being moved.
digest = $(shell { cat $(1); printf '%s' '$(2)'; } | sha256sum | cut -c1-16)
LOCKED := .venv/locked-$(call digest,$(LOCK),$(CURDIR))
CONVERTER := .venv-onnx2tf/locked-$(call digest,requirements/onnx2tf.txt,$(CURDIR))
INSTALLED := .venv/installed-$(call digest,$(LOCK) pyproject.toml,$(CURDIR))

.PHONY: help report test lint format types walls check environment converters lock clean

help:  ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 20

report: $(INSTALLED)  ## Prove, train, compare; write report.md and report.html
	$(BIN)/triptych report

test: $(INSTALLED)  ## Run the test suite
	$(BIN)/pytest

lint: $(INSTALLED)  ## Lint, and check the formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(INSTALLED)  ## Rewrite the sources in the project's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(INSTALLED)  ## Check the types
	$(BIN)/mypy

walls: $(INSTALLED)  ## Check who imports whom
	$(BIN)/lint-imports

check: lint types walls test  ## Everything a change must pass

environment: $(INSTALLED)  ## Build .venv from the lock, if it is missing or stale

converters: $(CONVERTER)  ## Build .venv-onnx2tf, with which PyTorch's models become SavedModels

lock:  ## Pin every dependency anew (needs uv)
	requirements/lock.sh

clean:  ## Remove the environments, caches and build products; runs/ stays
	rm -rf .venv .venv-onnx2tf build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): $(LOCKED)
	@rm -f .venv/installed-*
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m compileall -q src  # where Python writes no bytecode, the command line would compile itself at every call
	@touch $@

$(LOCKED):
	@requirements/platform.sh '$(PYTHON)'
	@echo 'building .venv from $(LOCK): some 8 GB, a few minutes' >&2
	@test ! -L .venv || rm .venv  # else the environment that a link leads to would be cleared
	'$(PYTHON)' -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: --requirement $(LOCK)
	@touch $@

$(CONVERTER):
	@requirements/platform.sh '$(PYTHON)'
	@echo 'building .venv-onnx2tf from requirements/onnx2tf.txt: some 3 GB, a few minutes' >&2
	@test ! -L .venv-onnx2tf || rm .venv-onnx2tf
	'$(PYTHON)' -m venv --clear .venv-onnx2tf
	.venv-onnx2tf/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: --requirement requirements/onnx2tf.txt
	@touch $@
