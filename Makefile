# make demo    the whole graph at the preset of config.yaml, its report and a summary; a second call does nothing, in seconds
# make test    the tests                          make check    ruff, snakefmt, snakemake --lint
#
# make bench   the hot paths against their textbook versions, into benchmarks/results
#
# All of them first make .venv from envs/requirements.txt; all they need is Python 3.11 or newer. Variables:
#   PRESET=ci                                             make demo at another scale
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu      on Linux without a GPU: the small CPU build of torch
#   PYTHON=/path/to/python                                when the right one is not found

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
export PATH := $(CURDIR)/.venv/bin:$(PATH)
READY := .venv/ready
CONFIG := $(PRESET:%=--config preset=%)

.PHONY: demo test check bench

demo: $(READY)
	$(BIN)/snakemake $(CONFIG)
	@test results/report.html -nt results/mlflow.synced || $(BIN)/snakemake --report results/report.html $(CONFIG)
	@$(BIN)/halfstep summary --results results

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/snakefmt --check .
	$(BIN)/snakemake --lint

$(READY): envs/requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: halfstep needs Python 3.11 or newer, and none was found; install one, or name it: make demo PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(TORCH_INDEX:%=--index-url %) "$$(grep '^torch==' envs/requirements.txt)"
	$(BIN)/python -m pip install -r envs/requirements.txt
	$(BIN)/python -m pip install --no-deps -e .
	touch $@

bench: $(READY)
	$(BIN)/python benchmarks/run.py
