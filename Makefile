# The few words anyone needs. `make` alone lists them.

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= kdpipe.yaml
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The pinned versions need Python 3.11; with 3.10 pip chooses what fits.
PINS := $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(STAMP) ## virtual environment and editable install, versions from constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PINS) -e '.[train,dev]'
	@touch $@

demo: install ## the whole pipeline on bundled real data with the emulator
	$(BIN)/kdpipe run -c examples/landsat/kdpipe.yaml

test: install ## everything that needs neither SDK nor card, in minutes
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow and not sdk and not card"

test-all: install ## also the slow ones; those for SDK and card where they are present
	$(BIN)/pytest

check: install ## format, lint, types, import rules; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=deploy $(BIN)/mypy deploy/*.py  # no package: they run where kdpipe is not
	$(BIN)/lint-imports

format: install ## put the code into its form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

metis: install ## CONFIG=my.yaml: compile for Metis with the Voyager SDK and benchmark on the card
	$(BIN)/kdpipe run -c $(CONFIG) --set compile.backend=voyager

.PHONY: help install demo test test-all check format metis
