# make train   from a bare machine: create .venv, install, train the quickstart
# make test    from a bare machine: create .venv, install, the whole suite
# make product products of cases: meshes, back ends, routers, families; killed processes; notebooks (minutes)
# make bench   the benchmarks as one table (benchmarks/README.md), against torch where .venv-parity is there
# make parity  from a bare machine: create .venv-parity with torch and transformers, compare every model
#              family with its original implementation
# make chaos   hours: kills, damaged files, odd text and random configs (tests/chaos); SHARE=0.01 runs a hundredth
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# XLA frees and reallocates large buffers every step; keep them mapped instead of faulting them in again
# (see benchmarks/common.py).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1:glibc.malloc.trim_threshold=1099511627776

# On Python 3.11 the pinned torch is the CPU wheel; on others it may bring gigabytes of CUDA.
PARITY_VENV := .venv-parity

.PHONY: train test product chaos parity bench lint clean

train: $(VENV)/installed
	$(BIN)/moejax train --config=experiments/quickstart.py --workdir=runs/quickstart

# Compiling is most of a test, and uses one core. TESTS: further arguments of pytest.
JOBS ?= 2
TESTS ?=
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TESTS)

product: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m product

# The counts of docs/chaos.md, each at least 1. The kills last: they take longest.
SHARE ?= 1
chaos: $(VENV)/installed-dev
	@failed=""; for campaign in hostile_corpora:100 mutate_checkpoint:1000 mutate_hf:5000 random_configs:1000 kills:200; do \
		count=$$($(BIN)/python -c "print(max(1, round($(SHARE) * $${campaign#*:})))"); \
		echo "$${campaign%:*} --count=$$count"; \
		$(BIN)/python tests/chaos/$${campaign%:*}.py --count=$$count || failed="$$failed $${campaign%:*}"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

parity: $(PARITY_VENV)/installed
	$(PARITY_VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal tests/parity

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.all --torch_python=$(wildcard $(PARITY_VENV)/bin/python)

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -e .
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/pip install --quiet -r requirements-dev.txt
	touch $@

$(PARITY_VENV)/installed: requirements-parity.txt requirements-dev.txt requirements.txt pyproject.toml
	@python=$(PYTHON); \
	is_311() { "$$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; }; \
	if ! is_311 $$python; then \
		if is_311 python3.11; then python=python3.11; \
		else echo "make parity: $$python is not Python 3.11 and there is no python3.11 on PATH:" \
			"pip may download a CUDA build of torch" >&2; fi; \
	fi; \
	echo "make parity: $(PARITY_VENV) from $$python ($$($$python --version))"; \
	$$python -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/pip install --quiet --upgrade pip
	$(PARITY_VENV)/bin/pip install --quiet -r requirements.txt -r requirements-dev.txt -r requirements-parity.txt
	$(PARITY_VENV)/bin/pip install --quiet --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) .venv-* .jax_cache .pytest_cache .ruff_cache .hypothesis
