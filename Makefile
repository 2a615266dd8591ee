# make quickstart   profile, place and run the shipped model on 4 local ranks; writes quickstart/report.html
# make test         the quick test suite               (ARGS="-k engine -x" is passed on to pytest)
# make lint types   ruff; mypy
# make clean        remove everything that make has made
#
# Needs a bare Debian with Python >= 3.11. Everything is installed into .venv, only when it is missing or when
# pyproject.toml or constraints.txt changed. PYTHON=/path/to/python3 chooses another interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := quickstart
.PHONY: quickstart test lint types clean FORCE

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WARM := $(VENV)/.warm
TYPES := $(VENV)/types
FOLDERS := profiling placement runtime launch
KERNELS := $(shell find profiling placement -name '*.py')

# An editable install points at this folder: one that was moved or copied is installed again.
ifneq ($(shell cat $(INSTALLED) 2>/dev/null),$(CURDIR))
$(INSTALLED): FORCE
endif

quickstart: $(WARM)
	@$(BIN)/python -m moeplace.launch.cli quickstart $(ARGS)

test: $(WARM)
	@$(BIN)/python -m pytest -m "not soak and not gpu" $(ARGS)

lint: $(INSTALLED)
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .

# mypy does not see an editable install: it gets a folder that looks like a normal one.
types: $(INSTALLED)
	@mkdir -p $(TYPES)/moeplace
	@for folder in $(FOLDERS); do ln -sfn "$(CURDIR)/$$folder" "$(TYPES)/moeplace/$$folder"; done
	@MYPYPATH=$(TYPES) $(BIN)/python -m mypy --config-file pyproject.toml --namespace-packages \
	    --explicit-package-bases $(foreach folder,$(FOLDERS),-p moeplace.$(folder)) | sed 's#^$(TYPES)/moeplace/##'

clean:
	rm -rf $(VENV) build dist *.egg-info quickstart .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || \
	    { echo "make: $(PYTHON) was not found; install Python 3.11 or newer (apt-get install python3 python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "make: moeplace needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V); try PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo "make: $(PYTHON) cannot make virtual environments; install python3-venv (apt-get install python3-venv)" >&2; exit 1; }
	@echo "make: installing into $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python && $(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@printf '%s' "$(CURDIR)" > $@

# Numba compiles the kernels once and keeps the machine code beside the sources.
$(WARM): $(INSTALLED) $(KERNELS)
	@if [ -f placement/warm_up.py ]; then echo "make: compiling kernels"; $(BIN)/python -m moeplace.placement.warm_up; fi
	@touch $@
