PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: setup compare test lint

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

compare: setup
	$(RUN) scripts/compare_embeddings.py --offline --output-dir runs/offline

test: setup
	$(RUN) -m pytest -q

lint: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
