# Two commands do everything: `make demo` and `make test`.
# A machine with its own torch (CUDA): pip install -e . instead, see docs/gpu.md.

PYTHON ?= python3
BIN := .venv/bin
# Taken when make starts, so that the demo's time holds the installation.
START := $(shell date +%s)
export DS_ACCELERATOR ?= cpu
export PATH := $(CURDIR)/$(BIN):$(PATH)
CODE := megagpt tools launch tests benchmarks
FAST_TESTS := $(wildcard tests/unit tests/fake_cuda tests/distributed tests/parity tests/cases)

.PHONY: help venv ops demo test test-slow gpu-test parity parity-machine mutation faults house lint format clean

help:
	@echo "make demo       train a small GPT on Shakespeare on two CPU processes, from nothing"
	@echo "make test       lint and the fast tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make gpu-test   on a machine with a GPU: parity, resume, fp16, offload, generation there"
	@echo "make parity     every layout against the oracle: build/parity.json, docs/parity.md"
	@echo "make parity-machine   the same with each set of vector instructions, 1 and 2 threads"
	@echo "make mutation   break invariants, and see the parity suite fail: build/mutation.json"
	@echo "make faults     real faults to real runs: build/faults.json, docs/faults.md"
	@echo "make lint       ruff, mypy, import-linter; make format rewrites"
	@echo "make house      the rooms and who may import whom, from the contracts: CONTRIBUTING.md"
	@echo "make ops        compile DeepSpeed's CPU ops"
	@echo "make clean      remove caches and build folders; data, runs and .venv stay"

venv: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python is %s, needed is 3.10 or newer; run make PYTHON=python3.11" % sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

ops: venv
	$(BIN)/python tools/prebuild_ops.py

demo: venv
	$(BIN)/python tools/demo.py --start_time $(START)

test: lint ops
	$(BIN)/python -m pytest -q -m "not slow" $(FAST_TESTS)

test-slow: ops
	$(BIN)/python -m pytest -q -m slow tests

# With the Python that has the machine's own torch, not the CPU's of .venv.
gpu-test:
	DS_ACCELERATOR=cuda $(PYTHON) -m pytest -q tests/gpu

parity: ops
	$(BIN)/python tests/parity/suite.py --json build/parity.json --docs docs/parity.md

parity-machine: ops
	$(BIN)/python tests/parity/suite.py --machine --json build/parity-machine.json --docs docs/parity.md

mutation: ops
	$(BIN)/python tests/mutation/mutate.py --json build/mutation.json

faults: ops
	$(BIN)/python tests/faults/fault_suite.py --json build/faults.json --docs docs/faults.md

house: venv
	$(BIN)/python tests/house.py

lint: venv
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
