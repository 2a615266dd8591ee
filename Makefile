# make quickstart   profile, place and run the shipped model on 4 local ranks; writes quickstart/report.html
# make test         the quick test suite               (ARGS="-k engine -x" is passed on to pytest; WORKERS= : one by one)
# make lint types   ruff; mypy
# make test-newest  the suite with today's newest releases of everything, in an environment of its own (.newest)
# make test-oldest  the suite with the oldest releases that pyproject.toml allows (.oldest)
# make test-engines  our plug-ins inside the engines' own classes: fetches their wheels (0.4 GB) into .engines
# make lock         writes lock.txt: the releases in .newest, for when make test-newest has passed
# make clean        remove everything that make has made
#
# Needs a bare Debian with Python >= 3.11. Everything is installed into .venv, in the releases that lock.txt names, only
# when it is missing or when pyproject.toml or lock.txt changed. PYTHON=/path/to/python3 chooses another interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := quickstart
.PHONY: quickstart test lint types test-newest test-oldest test-engines lock clean FORCE

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WARM := $(VENV)/.warm
TYPES := $(VENV)/types
# Two workers: while one waits for ranks to start, the other computes. WORKERS= runs all tests one after another.
WORKERS ?= -n 2 --dist loadscope
FOLDERS := profiling placement runtime launch
QUICK := -m "not soak and not gpu" $(WORKERS)
INSTALL := -m pip install -qq --disable-pip-version-check
KERNELS := $(shell find profiling placement -name '*.py')

# An editable install points at this folder: one that was moved or copied is installed again.
ifneq ($(shell cat $(INSTALLED) 2>/dev/null),$(CURDIR))
$(INSTALLED): FORCE
endif

quickstart: $(WARM)
	@$(BIN)/python -m moeplace.launch.cli quickstart $(ARGS)

test: $(WARM)
	@$(BIN)/python -m pytest $(QUICK) $(ARGS)

# constraints.txt holds the one pin that is not about what was tested: torch as the CPU build.
test-newest:
	@echo "make: installing the newest releases into .newest"
	@$(PYTHON) -m venv --clear .newest
	@.newest/bin/python $(INSTALL) -U -c constraints.txt -e '.[dev]'
	@.newest/bin/python -m moeplace.placement.warm_up
	@.newest/bin/python -m pytest $(QUICK) $(ARGS)

test-oldest:
	@echo "make: installing the oldest releases that pyproject.toml allows into .oldest"
	@$(PYTHON) -m venv --clear .oldest
	@$(PYTHON) .ci/pins.py oldest > .oldest/pins.txt
	@.oldest/bin/python $(INSTALL) -c constraints.txt -c .oldest/pins.txt -e '.[dev]'
	@.oldest/bin/python -m moeplace.placement.warm_up
	@.oldest/bin/python -m pytest $(QUICK) $(ARGS)

test-engines: $(WARM)
	@test -d .engines/vllm || $(BIN)/python .ci/engines.py .engines
	@MOEPLACE_ENGINES=.engines $(BIN)/python -m pytest tests/policy $(ARGS)

lock:
	@test -x .newest/bin/python || { echo "make: nothing to lock; first run make test-newest" >&2; exit 1; }
	@.newest/bin/python .ci/pins.py lock > lock.tmp && mv lock.tmp lock.txt

lint: $(INSTALLED)
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .

# mypy does not see an editable install: it gets a folder that looks like a normal one.
types: $(INSTALLED)
	@mkdir -p $(TYPES)/moeplace
	@for folder in $(FOLDERS); do ln -sfn "$(CURDIR)/$$folder" "$(TYPES)/moeplace/$$folder"; done
	@for name in placement/names/*/; do ln -sfn "$(CURDIR)/$$name" "$(TYPES)/moeplace/$$(basename $$name)"; done
	@MYPYPATH=$(TYPES) $(BIN)/python -m mypy --config-file pyproject.toml --namespace-packages \
	    --explicit-package-bases $(foreach folder,$(FOLDERS),-p moeplace.$(folder)) | sed 's#^$(TYPES)/moeplace/##'

clean:
	rm -rf $(VENV) .newest .oldest .engines lock.tmp build dist *.egg-info quickstart .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml lock.txt
	@command -v $(PYTHON) >/dev/null || \
	    { echo "make: $(PYTHON) was not found; install Python 3.11 or newer (apt-get install python3 python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "make: moeplace needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V); try PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo "make: $(PYTHON) cannot make virtual environments; install python3-venv (apt-get install python3-venv)" >&2; exit 1; }
	@echo "make: installing into $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python && $(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python $(INSTALL) -c lock.txt -e '.[dev]'
	@printf '%s' "$(CURDIR)" > $@

# Numba compiles the kernels once and keeps the machine code beside the sources. Who does not use make has them compiled
# by the first `solve`, before its clock starts.
$(WARM): $(INSTALLED) $(KERNELS)
	@echo "make: compiling kernels"
	@$(BIN)/python -m moeplace.placement.warm_up
	@touch $@
