# hvsnap. `make` alone lists what there is.
# Every target sets up what it needs first (scripts/setup.sh, a stamp in .venv).
# The tests start a private libvirtd, QEMU and namespaces: they need root, and go through sudo if you are not root.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PYTHON := $(VENV)/bin/python
SOURCES := hvsnap tests bench
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env=PYTHONUNBUFFERED,HVSNAP_TEST_CACHE,HVSNAP_TEST_ALL,HVSNAP_BENCH_CACHE,E2E_SEED,ROUNDS,HYPOTHESIS_PROFILE,CI)
export PYTHONUNBUFFERED := 1

# A few more words for pytest: make test ARGS="-k rollback"
ARGS ?=
# Where: make test TESTS=tests/unit
TESTS ?= tests
# How many test files at once: guests boot and agents answer in their own time, so that two fit onto two processors.
JOBS ?= $(shell nproc)

.PHONY: help setup check test demo bench clean

help: ## this list
	@echo "hvsnap: incremental disk snapshots for KVM guests"
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  make test TESTS=tests/unit ARGS='-k chain'   a part of the tests"
	@echo "  make test TESTS='tests/faults tests/e2e_bare' ROUNDS=500   a longer kill loop (0: kill at every point)"

setup: ## install what is needed from Debian and PyPI (again: under a second)
	@scripts/setup.sh demo test
	@touch $(VENV)/.ready-demo $(VENV)/.ready-test

$(VENV)/.ready-%: pyproject.toml scripts/setup.sh
	@scripts/setup.sh $*
	@touch $@

check: $(VENV)/.ready-demo ## style, types, layers, documents: a few seconds
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/mypy
	$(PYTHON) -m pytest tests/unit/test_layers.py tests/unit/test_house.py

test: $(VENV)/.ready-test ## every test, with real QEMU, libvirt, broker and Ceph; as root or through sudo
	$(if $(AS_ROOT),@echo "the tests start a private libvirtd: using sudo")
	$(AS_ROOT) $(PYTHON) -m pytest -n $(JOBS) --dist loadfile $(TESTS) $(ARGS)

demo: $(VENV)/.ready-demo ## a real guest, snapshots under load, back again; disturbs nothing that runs already
	$(if $(AS_ROOT),@echo "the demo starts a private libvirtd: using sudo")
	$(AS_ROOT) $(PYTHON) -m tests.demo

bench: $(VENV)/.ready-bench ## speed and guest impact beside other tools, as ratios in one run
	$(if $(AS_ROOT),@echo "the bench starts a private libvirtd: using sudo")
	$(AS_ROOT) $(PYTHON) -m bench

clean: ## remove the environment, caches and what tests left
	$(AS_ROOT) rm -rf $(VENV) .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	$(AS_ROOT) find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
