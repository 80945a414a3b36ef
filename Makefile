# Each target creates the virtual environment if needed. PYTHON is the interpreter to create it with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
TABLES ?= schedules tradeoff generality ablations

.PHONY: train test test-all test-gpu reproduce bench docs lint format clean
.DEFAULT_GOAL := train

train: $(READY)  ## train the default run: Motion, small SlowFast, long + short multigrid
	$(BIN)/python tools/run_net.py

test: $(READY)  ## run the tests except slow ones: minutes on 2 cores; ARGS is passed to pytest
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(READY)  ## run all tests, also slow ones: every network on every grid, SLURM, several nodes
	$(PYTEST) $(ARGS)

test-gpu: $(READY)  ## run tests/gpu; requires a GPU
	MGVIDEO_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/gpu $(ARGS)

reproduce: $(READY)  ## run the paper's tables on Motion: hours on 2 cores; TABLES selects some, ARGS is passed to tools/reproduce.py
	failed=0; for table in $(TABLES); do $(BIN)/python tools/reproduce.py table=$$table $(ARGS) || failed=1; done; exit $$failed

bench: $(READY)  ## time a step at each grid of the default plan, then the trainer: minutes on an otherwise idle machine
	$(BIN)/python tools/benchmark.py step
	$(BIN)/python tools/benchmark.py train

docs: $(READY)  ## write docs/configuration.md and docs/pyslowfast.md from the schema, the YAML files and the rules
	$(BIN)/python -m mgvideo.cli.configuration_page
	$(BIN)/python -m mgvideo.cli.pyslowfast_page

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info runs data/motion .mypy_cache .ruff_cache .pytest_cache

$(READY): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "mgvideo requires Python 3.10 or newer: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,export,torchcodec,slurm]'
	@touch $@
