PY ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup demo test lint clean
setup: $(VENV)/.installed

$(BIN)/python:
	$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "symgeo needs Python 3.11 or newer")'
	$(PY) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/symgeo demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) symgeo-demo .pytest_cache .mypy_cache .ruff_cache
