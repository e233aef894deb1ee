# `make demo` and `make test` do all their own set-up in .venv; nothing else on the machine is changed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo coverage check types gates test test-slow test-deepspeed test-all test-exhaustive test-gpu matrix bench clean

SUPPORTED := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && exit; done; echo python3)
BIN := .venv/bin
# One process per core, each with one thread: models this small gain nothing from more.
# Tests that share what is slow to make (a group of processes, reports) go to one of them: loadgroup.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadgroup
STAMP := .venv/setup.stamp
DEEPSPEED := deepspeed einops hjson msgpack ninja py-cpuinfo
DEEPSPEED_STAMP := build/deepspeed/setup.stamp
WITH_DEEPSPEED := PATH="$(CURDIR)/build/deepspeed/bin:$$PATH" PYTHONPATH=$(CURDIR)/build/deepspeed TORCH_EXTENSIONS_DIR=$(CURDIR)/build/deepspeed/torch_extensions
GATES := tests/test_architecture.py tests/test_packaging.py tests/test_public_api.py tests/test_docs.py tests/test_naming.py

help: ## Show the targets
	@sed -nE 's/^([a-z-]+):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(STAMP) ## Make .venv with fxopt (editable) and its test tools, versions pinned

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c '$(SUPPORTED)' || { \
	  echo "make setup: fxopt needs Python 3.11 or 3.12, got $$($(PYTHON) --version 2>&1 | sed -n 1p)" >&2; \
	  echo "install one of them and name it: make setup PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "make setup: installing fxopt and its test tools into .venv with $$($(PYTHON) --version)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on -c constraints.txt -e '.[dev]'
	@touch $@

# Beside the other tools and not among them: where it can be imported, accelerate and transformers do so.
# With the op that its processes would each build otherwise.
$(DEEPSPEED_STAMP): constraints.txt | $(STAMP)
	rm -rf build/deepspeed
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --disable-pip-version-check --no-deps -c $< --target build/deepspeed $(DEEPSPEED)
	$(WITH_DEEPSPEED) $(BIN)/python -c "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as op; op().is_compatible() and op().load()"
	@touch $@

demo: setup ## Train a 10 M parameter Llama on real English, stock and optimized, and compare
	@$(BIN)/fxopt demo $(ARGS)

coverage: setup ## Optimize a tiny model of every architecture, and write docs/coverage.json and .md
	@OMP_NUM_THREADS=1 $(BIN)/fxopt coverage --out docs/coverage.json $(ARGS)

check: setup ## Lint, format, types, and the tests of the house's own rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory --jobs 2 types gates  # pyright runs on one core

types: setup
	$(BIN)/pyright --pythonpath $(BIN)/python

gates: setup
	$(PYTEST) -q -m "not slow and not gpu" $(GATES)

test: check ## check, and every test that is not slow and needs no GPU
	$(PYTEST) -m "not slow and not gpu" $(GATES:%=--ignore=%) $(ARGS)

test-slow: setup
	$(PYTEST) -m "slow and not exhaustive and not gpu and not deepspeed" $(ARGS)

test-deepspeed: setup $(DEEPSPEED_STAMP) ## The slow tests of DeepSpeed, which is at hand for them alone
	$(WITH_DEEPSPEED) $(PYTEST) -m "deepspeed and not exhaustive and not gpu" tests/distributed $(ARGS)

test-all: test test-slow test-deepspeed ## test, and the slow tests

test-exhaustive: setup $(DEEPSPEED_STAMP) ## What is too long for every change: combinations of what the slow tests hold apart
	$(WITH_DEEPSPEED) $(PYTEST) -m "exhaustive and not gpu" $(ARGS)

test-gpu: setup ## The tests that need a CUDA device
	$(BIN)/pytest -m gpu $(ARGS)

matrix: setup ## The fast tests under each supported pair of torch and transformers, in venvs below build/matrix
	$(BIN)/python tests/matrix.py $(ARGS)

bench: setup ## Run each kernel's tests on a CUDA device, and time those that pass
	$(BIN)/python -m benchmarks.kernels $(ARGS)

clean: ## Remove .venv and all that was built
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis fxopt-demo.png
