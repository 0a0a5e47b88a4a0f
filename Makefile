# make demo     the whole graph at the preset of config.yaml, its report and a summary
#               (a second call has nothing to do and ends in seconds)
# make test     the tests, in two processes
# make check    spelling, lint, format and types; `make quick` leaves out the slow two
# make docs     the documentation as a site in site/; a broken link or a warning is an error
# make bench    the hot paths against their textbook versions, into benchmarks/results
# make lock     envs/ anew from the packages of .venv, with the checksums of their files
#
# Each of them first makes .venv from envs/requirements.txt; all it needs is Python 3.11 or newer.
# Variables:
#   PRESET=ci               make demo at another scale
#   PYTHON=/path/to/python  when make does not find the right one
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu
#                           on Linux without a GPU: the small build of torch

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; \
    done)
BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)
READY := .venv/ready
CONFIG := $(PRESET:%=--config preset=%)
REPORT := results/report.html

.PHONY: demo test check quick docs lock bench

demo: $(READY)
	@$(BIN)/snakemake --logger halfstep $(CONFIG)
	@test $(REPORT) -nt results/mlflow.synced || \
	    $(BIN)/snakemake --report $(REPORT) --logger halfstep $(CONFIG)
	@$(BIN)/halfstep summary --results results

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: quick
	$(BIN)/snakemake --lint
	$(BIN)/mypy

quick: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/snakefmt --check .

$(READY): envs/requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { \
	    echo "make: halfstep needs Python 3.11 or newer, and none was found;" \
	        "install one, or name it: make demo PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(TORCH_INDEX:%=--index-url %) \
	    "$$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' envs/requirements.txt)"
	$(BIN)/python -m pip install --no-deps --require-hashes -r envs/requirements.txt
	$(BIN)/python -m pip install --no-deps -e .
	touch $@

docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open site/index.html, or with search: $(BIN)/python -m http.server -d site"

lock: $(READY)
	$(BIN)/python -m pip install uv
	$(BIN)/python envs/lock.py

bench: $(READY)
	$(BIN)/python benchmarks/run.py
