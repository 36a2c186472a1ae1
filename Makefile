# `make book` and `make test` are all a newcomer needs; `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Several processes share the cores: one thread each, or they fight.
test: export OMP_NUM_THREADS := 1
# The code that a chapter's output depends on besides its own cells.
LIBRARY := $(wildcard lib/geodesic/*.py) requirements.txt
RECORDS := $(shell find results -name '*.json' 2>/dev/null)

.PHONY: help install book test faults lint pairs notebooks lock clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: .venv/installed  ## create .venv with the pinned requirements and the package

.venv/installed: requirements.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --require-hashes -r requirements.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

book: .venv/installed _build/inputs  ## run the chapters and render _build/html/index.html
	@start=$$SECONDS
	$(BIN)/jupyter-book build -W -n --keep-going --all .
	echo "The book is at $(CURDIR)/_build/html/index.html ($$((SECONDS - start)) s)"

# The notebook cache knows the cells only; drop it when the library or the records changed.
_build/inputs: $(LIBRARY) $(RECORDS)
	@mkdir -p _build && rm -rf _build/.jupyter_cache && touch $@

test: lint pairs book  ## everything that CI checks
	$(BIN)/python -m pytest -n 2 --dist loadfile -rs --nbval-lax --nbval-cell-timeout=300 \
	  --ignore=tests/test_sweep.py tests notebooks

faults: .venv/installed  ## kill workers, clients and disks under real sweeps (minutes, on an idle machine)
	$(BIN)/python -m pytest tests/test_sweep.py

lint: .venv/installed  ## style and formatting
	@$(BIN)/ruff check . && $(BIN)/ruff format --check -q .

pairs: .venv/installed  ## each chapter's notebook says what its text says
	@$(BIN)/python tests/check_pairs.py

notebooks: .venv/installed  ## write the notebooks from the chapters' text
	@touch book/*.md && $(BIN)/jupytext --sync -q $$(sed -n "s|.*\(book/[a-z_0-9]*\)$$|\1.md|p" _toc.yml | xargs grep -l "^jupytext:")

lock: .venv/installed  ## compile requirements.in into requirements.txt
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --index-strategy first-index -q requirements.in -o requirements.txt

clean:  ## remove what the build made; keep .venv
	rm -rf _build .ruff_cache
