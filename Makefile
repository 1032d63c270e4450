PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# The accessibility checker runs in tests alone and is 640 kB of another licence (MPL-2.0), so it is
# fetched at this version and not kept here.
AXE := axe-core@4.14.1
AXE_FILE := $(VENV)/npm/node_modules/axe-core/axe.min.js

.PHONY: setup compare example test test-browser lint

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

compare: setup
	$(RUN) scripts/compare_embeddings.py --offline --output-dir runs/offline

# The page that is committed: of digits, because a page holds its images.
example: compare
	cp runs/offline/report.html comparison_results/digits.html

test: setup
	$(RUN) -m pytest -q

test-browser: setup $(VENV)/browser $(AXE_FILE)
	$(RUN) -m pytest -q -rs -m browser tests/test_browser.py

$(VENV)/browser: pyproject.toml constraints.txt
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[browser]"
	touch $@

$(AXE_FILE):
	npm install --prefix $(VENV)/npm --no-save --ignore-scripts --silent --fetch-retries=1 $(AXE) \
		|| echo "npm cannot fetch $(AXE): the accessibility test will be skipped"

lint: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
