# Every target sets up its own environment in .venv first: all a machine needs is Python 3.11 or newer and make.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo reproduce test check format bench docs clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /  make \1\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: longmem needs Python 3.11 or newer, this is %d.%d; name another one: make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "setting up $(VENV) (some minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## a model of 135M remembers a text and ten facts: perplexity, answers, what was read; 93 MB once
	$(BIN)/longmem demo $(TEXTS)

reproduce: $(READY) ## train the shipped pair again, with its controls, and measure everything: about ten hours
	PATH="$(abspath $(BIN)):$$PATH" recipes/reproduce.sh

test: $(READY) ## the whole test suite
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

check: $(READY) ## format, lint, strict types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

format: $(READY) ## write the format, repair what lint can repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) ## speed and memory of a training step, ratios in one run; JSON into results/
	$(BIN)/python -m benchmarks.bench $(BENCH_ARGS)

docs: $(READY) ## write the reference pages and result tables of docs/
	$(BIN)/python docs/make_pages.py

clean: ## remove caches; keeps .venv and runs/
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
