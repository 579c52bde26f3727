.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON ?= python3.11
PORT ?= 8008
SECONDS ?= 600
# Only asked when pip's own configuration has no CPU build of torch; PyPI has none.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin

.PHONY: help setup run check test chaos bench lint image-test

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | while IFS='|' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

setup: ## install everything into .venv; quick when nothing changed
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" sh requirements/setup.sh

run: setup ## a local Runpod endpoint with a real worker and the bundled model; PORT= to change
	@unset PORT; MODE_TO_RUN=serverless MODEL=models/tiny CONCURRENCY_MODIFIER=auto \
		exec $(BIN)/python -m emulator --port $(PORT) -- $(BIN)/python -m worker

check: lint ## the linters, types, and every test that needs no engine; for the inner loop
	@$(BIN)/python -m pytest -m "not engine" -n 4 --dist loadfile

test: setup ## the whole test suite
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

chaos: setup ## ten minutes of faults on purpose, and a balance; SECONDS= and SEED= to change
	@$(BIN)/python -m tests.faults.chaos --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

image-test: setup ## build the images and run them in every mode; needs root, and podman or Debian
	@TORCH_INDEX="$(TORCH_INDEX)" sh tests/image/setup.sh
	@$(BIN)/python -m pytest -o addopts="-ra --strict-markers" tests/image

bench: setup ## measures, and refreshes the figures in docs/; WORKER_VLLM= a checkout to compare with
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r requirements/bench.txt
	@$(BIN)/python -m benchmarks.job_path $(if $(WORKER_VLLM),--worker-vllm "$(WORKER_VLLM)")
	@$(BIN)/python -m benchmarks.engines
	@$(BIN)/python -m benchmarks.readme

lint: setup ## ruff, mypy, the imports between the packages, the workflows
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/actionlint
