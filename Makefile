# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
BIN = $(VENV)/bin
WORKDIR ?= runs
AOT_PYTHON ?= python3.12
AOT_VENV ?= .venv-aot

.PHONY: demo test test-slow test-all lint bench aot-env clean

demo: $(VENV)/.demo
	$(BIN)/python -m experiments.compare --flagfile=experiments/demo.flags --workdir=$(WORKDIR)/demo

test: $(VENV)/.test lint
	$(BIN)/python -m pytest

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest --slow -m slow $(if $(MINUTES),--minutes=$(MINUTES))

test-all: $(VENV)/.test lint
	$(BIN)/python -m pytest --slow

lint: $(VENV)/.test
	$(BIN)/ruff check .

bench: $(VENV)/.demo
	$(BIN)/python -m experiments.bench --suite=cpu

# Compilers for devices that are not here: python -m experiments.compile
aot-env: $(AOT_VENV)/.aot

$(AOT_VENV)/.aot: setup.cfg pyproject.toml
	$(AOT_PYTHON) -m venv $(AOT_VENV)
	$(AOT_VENV)/bin/python -m pip install --quiet --editable '.[aot]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.test: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(AOT_VENV) build *.egg-info
