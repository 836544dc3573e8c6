# `make help` says what there is.
PYTHON ?= python3
VENV := .venv
WORKERS ?= 2
# Activated, so that the stages' `python` and DVC's own helpers are the environment's.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export NO_ALBUMENTATIONS_UPDATE := 1

.DEFAULT_GOAL := help
.PHONY: help setup repro quick test test-all check format lock docs bench

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-8s %s\n", $$1, $$2}'

setup: $(VENV)/.ready  ## create .venv from requirements.lock

# An environment that was left half made, or whose Python is gone, is made again.
SUPPORTED := (3, 11) <= sys.version_info < (3, 15)
ifneq ($(shell $(VENV)/bin/python -c 'import sys, pip; print($(SUPPORTED))' 2> /dev/null),True)
.PHONY: $(VENV)/.ready
endif

$(VENV)/.ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not $(SUPPORTED) and "Python 3.11 to 3.14 is needed, such as: make PYTHON=python3.12")'
	$(VENV)/bin/python -c 'import sys, pip; sys.exit(not $(SUPPORTED))' 2> /dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

repro: setup  ## the whole pipeline, from data to submission
	$(VENV)/bin/carvana repro

# Each file's tests run in one process, so that what they share is built once.
PYTEST := $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

quick: setup  ## the fast tests (2 minutes)
	$(PYTEST) -m "not slow"

test: setup  ## all but the longest tests (12 minutes)
	$(PYTEST) -m "not long"

test-all: setup  ## all tests, with long simulations and every kind of kill (40 minutes)
	$(PYTEST)

check: setup  ## format, lint, types and import rules
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: setup  ## format the code
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

lock: setup  ## pin the newest versions that pyproject.toml allows
	$(VENV)/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-header --no-annotate --no-emit-index-url --upgrade --output-file requirements.lock

docs: setup  ## write the generated parts of the docs, and their pictures (after make repro)
	$(VENV)/bin/python docs/make_reference.py
	$(VENV)/bin/carvana results --out docs/results.md
	$(VENV)/bin/python docs/make_pictures.py

bench: setup  ## benchmarks, against the usual approaches
	$(VENV)/bin/python -m benchmarks
