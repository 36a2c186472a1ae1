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

.PHONY: help install book pdf links lab test faults sweep lint types pairs notebooks results cifar-k1 cifar-k4 lock clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: .venv/installed  ## create .venv with the pinned requirements and the package

.venv/installed: requirements.txt pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --require-hashes -r requirements.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

# A build that warned must warn again: forget the parsed pages, which Sphinx would not read a second time.
book: .venv/installed  ## run the chapters and render _build/html/index.html
	@start=$$SECONDS
	$(BIN)/python book/_ext/stale.py
	$(BIN)/jupyter-book build -W -n --keep-going . || { rm -rf _build/.doctrees; exit 1; }
	echo "The book is at $(CURDIR)/_build/html/index.html ($$((SECONDS - start)) s)"

pdf: book  ## print the whole book into _build/book.pdf (needs Chromium)
	@$(BIN)/jupyter-book build -W -n --keep-going --builder singlehtml .
	$(BIN)/python book/_ext/paper.py

links: book  ## ask every external address of the book whether it still answers; no part of the tests
	@$(BIN)/python book/_ext/links.py

# From the checkout, not from notebooks/: jupytext writes no text outside the folder that the server shows.
lab: .venv/installed  ## open the chapters as notebooks in JupyterLab; what you save is in their text, too
	@$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks

test: lint types pairs book  ## everything that CI checks
	$(BIN)/python -m pytest -n 2 --dist loadfile -rs --nbval-lax --nbval-cell-timeout=300 \
	  --deselect tests/test_sweep.py::test_200_runs_survive_a_worker_and_two_clients tests notebooks

faults: .venv/installed  ## kill workers, clients and disks under real sweeps, ten times over
	@for i in 1 2 3 4 5 6 7 8 9 10; do $(BIN)/python -m pytest -x tests/test_sweep.py; done

sweep: .venv/installed  ## execute a grid of runs: make sweep GRID=notebooks/grids/digits.toml
	@$(BIN)/python -m geodesic sweep $(or $(GRID),$(error say which: make sweep GRID=notebooks/grids/digits.toml))

lint: .venv/installed  ## style, formatting and common misspellings
	@$(BIN)/ruff check . && $(BIN)/ruff format --check -q . && $(BIN)/codespell book/*.md lib tests benchmarks *.md

types: .venv/installed  ## pyright finds no more errors in a module than it did
	@$(BIN)/python tests/check_types.py

pairs: .venv/installed  ## each chapter's notebook says what its text says
	@$(BIN)/python book/_ext/pairs.py --check

FROM ?=

notebooks: .venv/installed  ## write what was edited, a chapter's text or its notebook, into the other
	@$(BIN)/python book/_ext/pairs.py $(addprefix --prefer ,$(FROM))

# Each can be stopped at any time: the same command continues where it stopped.
GRIDS := notebooks/grids
DATASET ?= cifar10
DEVICE ?= cuda
DOWNLOAD ?=

results: .venv/installed  ## make the records that are missing of MNIST and CIFAR-10 with K = 1 (DEVICE=cpu without a GPU)
	@failed=0
	for grid in mnist cifar10-k1; do
	  $(BIN)/python -m geodesic sweep $(GRIDS)/$$grid.toml --device $(DEVICE) || failed=1
	done
	exit $$failed

cifar-k1: .venv/installed  ## the paper's size, K = 1 (DATASET=cifar100 for CIFAR-100, DOWNLOAD=--download, DEVICE=cuda)
	@$(BIN)/python -m geodesic sweep $(GRIDS)/$(DATASET)-k1.toml --device $(DEVICE) $(DOWNLOAD)

cifar-k4: .venv/installed  ## the paper's size, K = 4
	@$(BIN)/python -m geodesic sweep $(GRIDS)/$(DATASET)-k4.toml --device $(DEVICE) $(DOWNLOAD)

lock: .venv/installed  ## compile pyproject.toml and requirements.in into requirements.txt
	$(BIN)/python -m pip install -q uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-header --index-strategy first-index -q pyproject.toml --extra test requirements.in -o requirements.txt

clean:  ## remove what the build made; keep .venv
	rm -rf _build .ruff_cache
