# Everything here needs Python 3.11 or later and installs the rest into $(VENV).
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= all,docs,test
BIN := $(VENV)/bin

.PHONY: help demo benchmark test test-slow lint docs
help:
	@echo "make demo       train a small LLaMA with AdamW, Muon and GaLore, each tuned, and compare them"
	@echo "make benchmark  measure what fits the device at hand, and write a page to send"
	@echo "make test       run the tests, but for the slow ones"
	@echo "make test-slow  run the slow tests: processes, disks, minutes"
	@echo "make lint       check format, lint, types, import contracts, and widths of pages"
	@echo "make docs       build the documentation into site/"

demo: $(VENV)/installed
	$(BIN)/python scripts/compare.py --config configs/demo.toml

# On a GPU or a TPU: make benchmark VENV=.venv-cuda EXTRAS=train,cuda
benchmark: $(VENV)/installed
	$(BIN)/python scripts/benchmark.py all

test: $(VENV)/installed
	$(BIN)/pytest

test-slow: $(VENV)/installed
	$(BIN)/pytest -m slow

lint: $(VENV)/installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	@# Lines of more than 100 columns: none in the README, only tables elsewhere.
	! LC_ALL=C.UTF-8 grep -HnE '.{101}' README.md
	! LC_ALL=C.UTF-8 grep -nE '^[^|].{100}' CHANGELOG.md CONTRIBUTING.md docs/*.md docs/api/*.md

docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict

# Made anew whenever the dependencies may have changed.
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: galore_jax needs Python 3.11 or later, and $(PYTHON) is not:" \
	    "name another one, as in make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[$(EXTRAS)]"
	@touch $@
