PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# The accessibility checker runs in tests alone and is 640 kB of another license (MPL-2.0), so it is
# fetched at this version and not kept here.
AXE := axe-core@4.14.1
AXE_FILE := $(VENV)/npm/node_modules/axe-core/axe.min.js

CHROMIUM ?= chromium

# How long `make fuzz` takes.
MINUTES ?= 10

.PHONY: setup compare example test test-types test-browser test-gpu lint fuzz campaigns audit

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

compare: setup
	$(RUN) scripts/compare_embeddings.py --offline --output-dir runs/offline

# The page and its picture that are committed: of digits, because a page holds its images.
example: compare
	cp runs/offline/report.html comparison_results/digits.html
	$(CHROMIUM) --headless --no-sandbox --hide-scrollbars --window-size=1280,1010 \
		--screenshot=comparison_results/page.png comparison_results/digits.html

# One process per core, at most four, each with one thread: more would compete for the cores.
TEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test: setup
	$(TEST)

# The same and the slow ones with the shape and type of every argument and result checked.
test-types: setup
	$(TEST) -m "not gpu and not browser" --jaxtyping-packages=ijepa,beartype.beartype

test-browser: setup $(VENV)/browser $(AXE_FILE)
	$(RUN) -m pytest -q -rs -m browser tests/test_browser.py

test-gpu: setup
	$(RUN) -m pytest -q -m gpu tests/test_gpu.py -o filterwarnings=default

$(VENV)/browser: pyproject.toml constraints.txt
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[browser]"
	touch $@

$(AXE_FILE):
	npm install --prefix $(VENV)/npm --no-save --ignore-scripts --silent --fetch-retries=1 $(AXE) \
		|| echo "npm cannot fetch $(AXE): the accessibility test will be skipped"

lint: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

fuzz: setup
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[fuzz]"
	$(RUN) benchmarks/fuzz.py --minutes $(MINUTES)
	$(RUN) benchmarks/fuzz.py --flips 200

# Kills and hostile files: about an hour on two cores.
campaigns: setup
	$(RUN) benchmarks/kills.py compare --kills 60
	$(RUN) benchmarks/kills.py train --kills 60
	$(RUN) benchmarks/hostile_files.py

# Known vulnerabilities of the pinned packages; --strict fails if one cannot be looked up.
audit: setup
	$(VENV)/bin/pip install --quiet pip-audit
	$(VENV)/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt
