# `make` alone lists the targets. Needs python3 (3.11 or newer), make and git; uses uv when it is on the PATH.
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format test-slow test-gpu clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?= python3
WORKERS ?= 2

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with the package (editable) and every tool, in the exact versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@echo "installing s4audio and its tools in $(VENV); PyTorch with its CUDA libraries is a large download"
	@if command -v uv >/dev/null; then \
		uv venv --quiet --allow-existing $(VENV) && \
		uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'; \
	else \
		$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("s4audio needs Python 3.11 or newer, and $(PYTHON) is %d.%d; set PYTHON=" % v[:2])' && \
		$(PYTHON) -m venv $(VENV) && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'; \
	fi
	@touch $@

demo: $(STAMP)  ## train a small model on samples/, and write demo/report.html to see and hear
	$(BIN)/s4audio demo

lint: $(STAMP)  ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff sort the imports, mend what it can and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint  ## lint, then every test but those marked slow or gpu
	$(BIN)/pytest -q -n $(WORKERS)

test-slow: $(STAMP)  ## the tests marked slow
	$(BIN)/pytest -q -n $(WORKERS) -m "slow and not gpu"

test-gpu: $(STAMP)  ## the tests marked gpu, on a machine with a CUDA device
	$(BIN)/pytest -q -m gpu

clean:  ## remove .venv, caches and build outputs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find s4audio tests evaluation -name __pycache__ -type d -prune -exec rm -rf {} +
