# Everything a newcomer or CI runs.  PYTHON picks the interpreter (3.10 or newer).
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check bench format clean

demo: $(VENV)/.installed        ## quantize the bundled model to a ladder of types and let each file write
	$(BIN)/dither demo

test: $(VENV)/.tested           ## everything
	$(BIN)/python -m pytest

check: $(VENV)/.tested          ## lint, types, layers, fast tests: under a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m "not slow"

bench: $(VENV)/.tested          ## the measurements behind the documentation's numbers
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/end_to_end.py

format: $(VENV)/.tested
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) .
	touch $@

$(VENV)/.tested: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) demo-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
