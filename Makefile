# `make demo` and `make test` do all the set-up themselves: a virtual environment, pinned packages, this package.
# PYTHON chooses the interpreter (3.10 to 3.13), OUT the folder that the demo replaces.
PYTHON ?= python3
OUT ?= runs/demo
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check golden clean

help:
	@echo "make demo    train a head on the embedded model, judge, run Best-of-N; the report goes to $(OUT)"
	@echo "make test    lint, format, types, arrows and tests"
	@echo "make check   lint, format, types and the arrows between rooms alone"
	@echo "make golden  write tests/golden.json anew, after a change of results that is meant"
	@echo "make clean   remove the virtual environment and caches"

demo: $(VENV)/installed
	$(BIN)/prism demo --out $(OUT) --overwrite

test: check
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

golden: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.golden

# torch comes first and alone, so that nothing else decides which of its builds is taken.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info < (3, 14); sys.exit(0 if ok else f"Python 3.10 to 3.13 is needed, and $(PYTHON) is {sys.version.split()[0]}; name another one: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
