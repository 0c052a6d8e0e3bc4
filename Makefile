# `make demo` and `make test` are all that a new machine needs: they make .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
unexport PYTHONDONTWRITEBYTECODE  # hundreds of processes would each compile every module

.PHONY: demo test durations lint bench bench-encode bench-cost bench-alignment bench-precision chaos kills base-model clean

demo: $(READY)
	$(BIN)/mapo demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The same, and keep how long each file took: the longest begin first.
durations: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --write-durations

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/complexity.py

# What `make test` leaves out or has a short form of: faults of every kind in every stage (some hours on 2 cores).
chaos: $(READY)
	$(BIN)/python -m pytest -m slow

# Twenty kills of a training, which must end with the bits of an undisturbed one: OPTIMIZER=prodigy, or adafactor, adamw
# (an hour for all on 2 cores).
OPTIMIZER ?=
kills: $(READY)
	$(BIN)/python -m pytest -m slow tests/training/test_resume.py -k "kill_matrix$(if $(OPTIMIZER), and $(OPTIMIZER))"

bench: $(READY)
	$(BIN)/python -m benchmarks.floors

# Encode beside a bare loop and the usual Ray chain (about ten minutes on 2 cores).
bench-encode: $(READY)
	PYTHONPATH=tests/support $(BIN)/python -m benchmarks.encode --pairs 576 --rounds 1

# MaPO beside DPO on the product's engine: time, operations, memory (about five minutes of CPU).
bench-cost: $(READY)
	$(BIN)/python -m benchmarks.cost

# How much of a bf16 training the forward pass sees (about ten minutes of CPU).
bench-precision: $(READY)
	$(BIN)/python -m benchmarks.precision

# SFT, DPO and both MaPO losses over three levels of mismatch (20 minutes of one core).
bench-alignment: $(READY)
	$(BIN)/python -m benchmarks.alignment

# Train the demo's base model anew (about half an hour on 2 cores); it is shipped, so nobody needs to.
base-model: $(READY)
	$(BIN)/python -m orchestration.demo.base orchestration/demo/base_model

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
