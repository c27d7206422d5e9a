# `make demo` and `make test` do all the set-up themselves: a virtual environment, pinned packages, this package.
# PYTHON chooses the interpreter (3.10 to 3.13), OUT the folder that the demo replaces.
PYTHON ?= python3
OUT ?= runs/demo
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
# A file's tests run in one process, which makes their fixtures once; tests/conftest.py puts long files first.
XDIST := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# glibc gives freed tensors back to the system, and each page that it takes anew costs time: kept, tests take less of it.
KEEP := MALLOC_TRIM_THRESHOLD_=268435456 MALLOC_TOP_PAD_=67108864 MALLOC_MMAP_THRESHOLD_=268435456
QUICK := tests/test_golden.py tests/test_files.py tests/test_clips.py tests/test_clip_files.py tests/judge tests/preference tests/evaluation tests/sampling/test_exactness.py
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test check golden lowest dist upstream clean

help:
	@echo "make demo    what a budget buys, Best-of-8 and a judge by noise level on the embedded model; the report goes to $(OUT)"
	@echo "make test    lint, format, types, arrows and tests"
	@echo "make check   lint, format, types and the arrows between rooms alone"
	@echo "make golden  write tests/golden.json anew, after a change of results that is meant"
	@echo "make lowest  install the lowest versions that pyproject.toml allows into $(LOWEST), and run a quick part of the tests"
	@echo "make dist    build the wheel and the source distribution into dist/"
	@echo "make upstream  run the tests with the main branch of diffusers, in this virtual environment"
	@echo "make clean   remove the virtual environment and caches"

demo: $(VENV)/installed
	$(BIN)/prism demo --out $(OUT) --overwrite

test: check
	$(KEEP) PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(XDIST)

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

golden: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.golden

# Each "name>=version" of pyproject.toml that the tests import becomes "name==version".
lowest:
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	sed -n '/^dependencies/,/^]/s/^ *"\([a-z0-9_]*\)>=\([0-9.]*\).*/\1==\2/p' pyproject.toml > $(LOWEST)/lowest.txt
	grep --only-matching --extended-regexp '"(peft|jaxtyping|docstring-parser)>=[0-9.]*' pyproject.toml | tr --delete '"' | sed 's/>=/==/' >> $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(LOWEST)/lowest.txt torch
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $(LOWEST)/lowest.txt --editable . pytest hypothesis
	HF_HUB_OFFLINE=1 $(LOWEST)/bin/python -m pytest $(QUICK)

dist:
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	rm -rf dist
	$(BIN)/python -m build --outdir dist

# constraints.txt does not hold here: diffusers brings what it asks for.
upstream: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --upgrade 'diffusers @ git+https://github.com/huggingface/diffusers'
	$(KEEP) PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(XDIST)

# torch comes first and alone, so that nothing else decides which of its builds is taken.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info < (3, 14); sys.exit(0 if ok else f"Python 3.10 to 3.13 is needed, and $(PYTHON) is {sys.version.split()[0]}; name another one: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks docs integrations recipes -name __pycache__ -prune -exec rm -rf {} +
