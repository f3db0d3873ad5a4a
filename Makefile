# Everything a newcomer, a developer and CI run. `make` alone lists the targets.
SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-full test-nfs chaos lint format bench clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
CODE := platform jobs serving tests infra

# DeepSpeed compiles no kernels here, and tests and small CPU runs want one thread per process.
export DS_BUILD_OPS := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Byte code is kept, and kept out of the source tree: without it every worker process compiles its imports anew, for ten
# seconds of CPU time each. Some machines and container images switch it off.
unexport PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX := $(CURDIR)/$(VENV)/bytecode
# The quickstart's report counts from here, installation included.
export LATENTRAY_MAKE_STARTED := $(shell date +%s.%N)
INSTALL := $(BIN)/python infra/install.py

QUICKSTART_OVERRIDES = $(if $(SCALE),scale=$(SCALE)) $(if $(OUT),out=$(OUT)) $(if $(PORT),serve.port=$(PORT)) $(if $(filter 1 true yes,$(KEEP_SERVING)),keep_serving=true)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(VENV)/.installed ## raw pictures to a served model, eight to twelve minutes (SCALE=mini, PORT=8000, KEEP_SERVING=1, OUT=folder)
	$(BIN)/python -m jobs.quickstart $(QUICKSTART_OVERRIDES)

test: lint ## lint, then every test that is quick and needs no GPU
	$(PYTEST) -m "not slow and not gpu and not chaos and not libaio and not nfs"

test-full: lint ## lint, then every test that needs no GPU, for an hour and a half; benchmarks are `make bench`
	$(PYTEST) -m "not gpu and not chaos and not libaio and not nfs" --ignore=tests/benchmarks

chaos: $(VENV)/.installed-dev ## a quarter of an hour of faults at random times, and what they cost
	$(PYTEST) -m chaos -s tests/integration/test_chaos.py

test-nfs: $(VENV)/.installed-dev ## two nodes and an NFS server, in a machine of its own that Linux in user mode makes (NFS_VERSION=3)
	tests/nfs/machine.sh $(PYTEST) -m nfs -s -p no:cacheprovider tests/nfs

lint: $(VENV)/.installed-dev ## style, types, spelling, YAML and import rules
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/yamllint --strict .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## rewrite the code in the project's format and mend what can be mended
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

bench: $(VENV)/.installed-dev ## the benchmarks in tests/benchmarks, with their figures
	$(PYTEST) -m "not gpu" --timeout 1800 -s tests/benchmarks

clean: ## remove caches and builds; .venv and runs/ stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find platform jobs serving tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are newer than what they were made from, so a second run installs nothing.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || { \
	  echo "error: latentray needs Python 3.11 or 3.12, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)."; \
	  echo "  mend:  name another one, for example: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 2; } >&2
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (once; a minute or two)"
	$(INSTALL) ".[train]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) with the development tools (once; a minute or two)"
	$(INSTALL) ".[dev]"
	@touch $(VENV)/.installed $@
