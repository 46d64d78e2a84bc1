PY ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SIZE ?= small

.PHONY: setup demo figures test lint docs clean
setup: $(VENV)/.installed

$(BIN)/python:
	$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "symgeo needs Python 3.11 or newer")'
	$(PY) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/symgeo demo

figures: $(VENV)/.installed
	for script in paper_figs/[!_]*.py; do \
		OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python $$script --size $(SIZE) --out paper_figs/out/$(SIZE) || exit 1; \
	done

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) symgeo-demo docs/_build docs/_gallery docs/_pictures docs/gallery .pytest_cache .mypy_cache .ruff_cache
