# fewstep: `make serve` serves the bundled student, `make test` proves that it works.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin

help:            ## show this list
	@grep -E '^[a-z]+: .*##|^[a-z]+:  *##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 12

venv: .venv/dev.installed    ## environment for development: everything, in .venv

serve: .venv/serve.installed ## serve the bundled student on http://127.0.0.1:8000 (installs neither torch nor diffusers)
	$(BIN)/fewstep serve

test: venv       ## run all tests
	$(BIN)/python -m pytest -q

check: venv      ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy server export

train: venv      ## distil the bundled student again, from the bundled teacher
	$(BIN)/fewstep train scenes_tdm --out runs/scenes_tdm

export: venv     ## export what `make train` made into model_repository
	$(BIN)/fewstep export runs/scenes_tdm/student --to model_repository

.venv/serve.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[triton]'
	touch $@

# torch first and alone: a range that some other package asks for would fetch its CUDA build instead.
.venv/dev.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ .venv/serve.installed

.PHONY: help venv serve test check train export
