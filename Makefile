# The two commands of the README are `make demo` and `make test`; every target creates .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OUT ?= runs/digits
# Test processes: one has all tests that need Ray, which mostly wait, and the other the rest, which compute.
PROCESSES ?= 2
# SLOW=1 also runs the tests marked `slow`.
MARKS := $(if $(SLOW),,-m "not slow")

# Ray starts many processes that all import torch: without cached bytecode that takes twice as long.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format bench clean docs

help:  ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(INSTALLED)  ## Create .venv and install the package with its development tools

# uv goes into the venv first: it installs the torch stack several times faster than pip.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev,vision]'
	@touch $@

demo: $(INSTALLED)  ## The main job on real digits: images to report (OUT=DIR chooses the place)
	$(BIN)/codec-dist demo --out "$(OUT)"

test: lint  ## Lint, types, import contracts and tests (SLOW=1: the slow ones too)
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(MARKS)

lint: $(INSTALLED)  ## Format and lint checks, types, and the borders between packages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)  ## Rewrite the code as the formatter likes it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED)  ## Measurements against a floor taken in the same run
	$(BIN)/python -m benchmarks.attribution
	$(BIN)/python -m benchmarks.store

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

docs: $(INSTALLED)  ## The docs site in site/, from docs/ and docstrings; a warning is an error
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
