# fewstep: `make serve` serves the bundled students, `make test` proves that it works.
.DEFAULT_GOAL := help
PYTHON ?= python3
PRECISION ?= bf16
BIN := .venv/bin
INSTALL_CHROMIUM = as=; test "$$(id -u)" = 0 || as=sudo; \
	$$as apt-get update -qq && $$as apt-get install -qq -y --no-install-recommends chromium

help:            ## show this list
	@grep -E '^[a-z]+: .*##|^[a-z]+:  *##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 12

venv: .venv/dev.installed    ## environment for development: everything, in .venv

serve: .venv/serve.installed ## serve the bundled students on http://127.0.0.1:8000 (installs neither torch nor diffusers)
	$(BIN)/fewstep serve

aiperf: .venv/aiperf.installed ## NVIDIA AIPerf, the load generator, in an environment of its own (140 packages)

# Two files of tests at once, for most of a test is one core at work or waiting; all of a file in one process, which then
# starts the file's servers once.
test: venv chromium aiperf ## run all tests
	$(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile

chromium:        ## the browser that tests drive, from Debian's packages if it is not here (as root or through sudo)
	@command -v chromium >/dev/null || sh -c '$(INSTALL_CHROMIUM)' \
		|| { echo "the playground's tests need chromium; install it: apt-get install --no-install-recommends chromium" >&2; exit 1; }

check: venv      ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy server export

train: runs/scenes_tdm/student ## distil the bundled student of pictures again: three seeds, their mean, and both again from there (PRECISION=no: without AVX-512)

runs/scenes_tdm/student: $(foreach seed,7 8 9,runs/scenes_tdm_$(seed)/student)
	$(BIN)/fewstep average $^ --out $@

runs/scenes_tdm_%/student: | runs/scenes_first/student
	$(BIN)/fewstep train scenes_tdm --out runs/scenes_tdm_$* --processes 1 --resume --set seed=$* --set precision=$(PRECISION) \
		--set start=runs/scenes_first/student --set 'shares=(6.0, 1.0, 1.0, 2.0)' --set iterations=1000

runs/scenes_first/student: $(foreach seed,4 5 6,runs/scenes_first_$(seed)/student)
	$(BIN)/fewstep average $^ --out $@

runs/scenes_first_%/student: | venv
	$(BIN)/fewstep train scenes_tdm --out runs/scenes_first_$* --processes 1 --resume --set seed=$* --set precision=$(PRECISION)

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

.venv/aiperf.installed: pyproject.toml
	test -x .venv/aiperf/bin/python || $(PYTHON) -m venv .venv/aiperf
	.venv/aiperf/bin/pip install --quiet --upgrade pip
	.venv/aiperf/bin/pip install --quiet --group aiperf
	touch $@

.PHONY: help venv serve aiperf test chromium check train export
