# make train   from a bare machine: create .venv, install, train the quickstart
# make test    from a bare machine: create .venv, install, the whole suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# XLA frees and reallocates large buffers every step; keep them mapped instead of faulting them in again.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=1099511627776

.PHONY: train test lint clean

train: $(VENV)/installed
	$(BIN)/moejax train --config=experiments/quickstart.py --workdir=runs/quickstart

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -e .
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .jax_cache .pytest_cache .ruff_cache .hypothesis
