# The same targets at a desk and in CI. Every one sets up what it needs first.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
# Where this is set, each of the hundreds of processes that the tests start compiles all that it imports.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: help setup check test test-slow test-gpu demo bench bench-gpu bench-fleet bench-simulate compose clean

VENV := .venv
BIN := $(VENV)/bin
# The first interpreter that is new enough.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Set-up is done once for each content of these files.
STAMP := $(VENV)/set-up-$(shell cat requirements.lock pyproject.toml | cksum | tr ' ' -)
# More options for pytest: make test ARGS="-k sweep"
ARGS ?=
# Machines with a GPU often have torch and no network: an interpreter that is named is used as it is,
# make test-gpu PYTHON=python3, with this tree on its path. Otherwise the virtual environment's.
PYTHON_IS_GIVEN := $(filter command environment,$(firstword $(origin PYTHON)))
GPU_SETUP := $(if $(PYTHON_IS_GIVEN),,$(STAMP))
GPU_PYTHON := PYTHONPATH=app:workers:.$${PYTHONPATH:+:$$PYTHONPATH} $(if $(PYTHON_IS_GIVEN),$(PYTHON),$(BIN)/python)
# What bench-gpu measures: kernels, lora, step, kernel_times, chunks, workload, adapters, sleep or tensor_parallel.
PART ?= lora

help: ## Show the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## Make the virtual environment from the lock: exact versions, once.

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or later found; set PYTHON=/path/to/python3" >&2; exit 1; }
	@# Debian's python3 may come without ensurepip; its pip can then fill the environment from outside.
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) 2>/dev/null || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
		&& $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --requirement requirements.lock
	@# The lock holds setuptools too: nothing is fetched to build this package.
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/set-up-*
	@touch $@

check: $(STAMP) ## Formatting, lint, types, import rules.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread of torch a test process. Four of them keep two cores busy: much of the service's tests is waiting. Files run
# in the order of their folders, so that the longest, which have few tests, do not come last.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 4 --dist loadfile --no-loadscope-reorder

test: $(STAMP) ## All tests but the slow ones, on four processes: make test ARGS="-k sweep"
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(STAMP) ## The tests that CI has no time for: faults over whole services and fleets, in ten minutes
	$(PYTEST) -m slow $(ARGS)

# Other warnings come from the libraries there, and differ from version to version.
test-gpu: $(GPU_SETUP) ## All tests that need a GPU: make test-gpu PYTHON=python3 runs them without an environment
	$(GPU_PYTHON) -m pytest -m gpu -W default tests/kernels $(ARGS)

demo: $(STAMP) ## Run the bulk evaluation over the demo's adapters, servers included.
	$(BIN)/medley demo

bench: $(STAMP) ## Measure; writes benchmarks/results/<machine>-<what>.json
	for figure in engine_cpu service api migration fleet_scale; do $(BIN)/python -m "benchmarks.$$figure"; done

bench-gpu: $(GPU_SETUP) ## Measure on a GPU: make bench-gpu PART=kernels|lora|step|kernel_times|chunks|workload|adapters|sleep|tensor_parallel ARGS=--again
	$(GPU_PYTHON) -m benchmarks.gpu.$(PART) $(ARGS)

bench-fleet: $(GPU_SETUP) ## The whole fleet under a load that rises and falls: make bench-fleet ARGS="--device cpu" needs no GPU
	$(GPU_PYTHON) -m benchmarks.fleet $(ARGS)

bench-simulate: $(STAMP) ## Run the policy's traces; writes benchmarks/results/simulate-*.json and, with the extra plot, pictures
	$(BIN)/python -m benchmarks.simulate

compose: $(STAMP) ## Write compose.yaml anew from the table of processes.
	$(BIN)/python -m medley.local.compose > compose.yaml

clean: ## Remove the environment, caches and local data.
	rm -rf $(VENV) .medley build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
