# Python 3.11+ and make are all that is needed; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test test-faults lint clean

help:
	@echo "make demo   the paper in miniature: base, sa, cascaded and hive side by side (CPU, offline)"
	@echo "make test   ruff, mypy and the whole test suite"
	@echo "make test-faults  runs killed at 25 random times end with the same weights"
	@echo "make clean  remove .venv and the demo's runs"

# Exact versions (constraints.txt) so that everyone runs what was tested.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

install: .venv/installed

demo: install
	$(BIN)/hive-vision demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

# Longer than make test allows: 25 kills at random times, every run to the same bytes.
test-faults: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:xdist tests/faults

clean:
	rm -rf .venv runs/demo
