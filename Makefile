# make quickstart   trains the tiny agent through every stage on the CPU
# make smoke        the same stages, shrunk to a minute
# make test         the default tests             make lint   ruff and pyright
# make test-browser the report in Chromium        make base   rebuilds the shipped tiny base model
# make test-postgres the log on PostgreSQL        make test-faults  kill -9 at named points
# make test-sglang  a real SGLang server          make test-kills N=200  the same, at random points
# make test-runs    whole small runs and the README   make test-mesh  eight devices, two processes
# make test-aot     the 4B steps for TPU slices       make aot-table  all of them, into a table
#
# Every target sets up what it needs in $(VENV). PYTHON=python3.12 chooses the interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
SGLANG_VENV ?= .venv-sglang
BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -qq
PYTEST_ARGS ?=

VERSION_OF := import sys; sys.version_info >= (3, 11) or sys.exit(1); print("%d.%d" % sys.version_info[:2])

# Without PYTHON=, the interpreter of the environment that is there, else the first one that is new enough.
ifeq ($(origin PYTHON),undefined)
ifneq ($(wildcard $(VENV)/.python-*),)
PYTHON := $(BIN)/python
else
PYTHON := $(shell for p in python3 python3.11 python3.12; do $$p -c '$(VERSION_OF)' >/dev/null 2>&1 && echo $$p && break; done)
endif
endif
VERSION := $(shell $(PYTHON) -c '$(VERSION_OF)' 2>/dev/null)
# The interpreter that made the environment, so that an environment can be remade by its own python.
MAKER := $(shell $(PYTHON) -c 'import sys; print(sys._base_executable)' 2>/dev/null)

.PHONY: help quickstart smoke test lint base

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

quickstart: $(VENV)/.runtime
	$(BIN)/python launch/train.py --config=configs/quickstart.py

smoke: $(VENV)/.runtime
	$(BIN)/python launch/train.py --config=configs/quickstart.py:smoke

base: $(VENV)/.runtime
	$(BIN)/python experiments/make_base.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

# Needs the PostgreSQL server's binaries (apt-get install postgresql); fails without them.
.PHONY: test-browser test-postgres test-runs test-mesh test-aot aot-table test-faults test-kills test-sglang
test-postgres: $(VENV)/.test
	$(BIN)/python -m pytest -m postgres $(PYTEST_ARGS)

test-browser: $(VENV)/.test
	$(BIN)/python -m pytest -m browser $(PYTEST_ARGS)

test-runs: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m runs $(PYTEST_ARGS)

test-mesh: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m mesh $(PYTEST_ARGS)

# The TPU compiler runs on any Linux machine (libtpu is a wheel); no TPU is needed.
test-aot: $(VENV)/.aot
	$(BIN)/python experiments/aot.py --check

aot-table: $(VENV)/.aot
	$(BIN)/python experiments/aot.py

test-faults: $(VENV)/.test
	$(BIN)/python -m pytest -m faults $(PYTEST_ARGS)

N ?= 200
test-kills: $(VENV)/.test
	$(BIN)/python experiments/kill_points.py --kills=$(N) --seed=1

test-sglang: $(VENV)/.test $(SGLANG_VENV)/.ready
	SGLANG_PYTHON=$(abspath $(SGLANG_VENV))/bin/python $(BIN)/python -m pytest -m sglang $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/.python-$(VERSION):
	@if [ -z "$(VERSION)" ]; then \
	  echo "'$(PYTHON)' is no Python 3.11 or newer; name one: make PYTHON=python3.11 ..." >&2; exit 2; fi
	@if [ -e $(VENV) ]; then \
	  echo "$(VENV) was not made for Python $(VERSION): making it anew"; rm -rf $(VENV); fi
	$(MAKER) -m venv $(VENV)
	touch $@

$(VENV)/.runtime: requirements.txt $(VENV)/.python-$(VERSION)
	@echo "installing the requirements into $(VENV); this takes a few minutes"
	$(PIP_INSTALL) -r requirements.txt
	touch $@

# PyTorch first and by its exact version, so that no other package can ask for another build of it. It is the oracle of
# the parity tests and pinned for Python 3.11 alone; on newer Pythons pytest names the files that it leaves out.
$(VENV)/.test: pyproject.toml requirements.txt $(VENV)/.python-$(VERSION)
	@echo "installing the requirements and the test tools into $(VENV); this takes a few minutes"
ifeq ($(VERSION),3.11)
	$(PIP_INSTALL) torch==2.13.0
endif
	$(PIP_INSTALL) --editable '.[test]'
	touch $@ $(VENV)/.runtime

$(VENV)/.aot: $(VENV)/.runtime
	$(PIP_INSTALL) --editable '.[tpu]'
	touch $@

# SGLang's own metadata asks for CUDA builds; its CPU server runs without them (see the requirements).
$(SGLANG_VENV)/.ready: tests/pool/sglang_requirements.txt
	@echo "installing SGLang for the CPU into $(SGLANG_VENV); this takes a few minutes"
	$(MAKER) -m venv $(SGLANG_VENV)
	$(SGLANG_VENV)/bin/python -m pip install --disable-pip-version-check -qq torch==2.13.0
	$(SGLANG_VENV)/bin/python -m pip install --disable-pip-version-check -qq -r tests/pool/sglang_requirements.txt
	$(SGLANG_VENV)/bin/python -m pip install --disable-pip-version-check -qq --no-deps \
	  sglang==0.5.23 torchvision==0.28.0 sglang-router==0.3.2
	touch $@
