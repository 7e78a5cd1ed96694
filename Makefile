# Python 3.11+ and make are all that is needed; everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install demo test test-distributed test-faults test-eval test-browser lint clean

help:
	@echo "make demo   the paper in miniature: base, sa, cascaded and hive side by side (CPU, offline)"
	@echo "make test   ruff, mypy and the whole test suite"
	@echo "make test-distributed  two processes end where one ends: DDP, FSDP2, torchrun, accelerate"
	@echo "make test-faults  runs killed at 25 random times end with the same weights"
	@echo "make test-eval  VLM benchmarks through lmms-eval, in an environment of its own"
	@echo "make test-browser  the report in a browser, as wide as a screen and as a telephone"
	@echo "make clean  remove both environments and the demo's runs (not runs/miniature)"

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

# Every test starts two processes, so one test at a time.
test-distributed: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:xdist tests/distributed

# Longer than make test allows: 25 kills at random times, every run to the same bytes.
test-faults: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:xdist tests/faults

# lmms-eval wants another protobuf than the tokenizer that mobilellm needs.
.venv-eval/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-eval
	grep -v -e '^protobuf==' -e '^sentencepiece==' constraints.txt > .venv-eval/constraints.txt
	.venv-eval/bin/python -m pip install --quiet --constraint .venv-eval/constraints.txt \
		--editable ".[eval]" pytest
	@touch $@

# The previous major version, which exports are read with too.
.venv-eval/transformers-4/installed: .venv-eval/installed Makefile
	rm -rf $(@D)
	.venv-eval/bin/python -m pip install --quiet --no-deps --target $(@D) transformers==4.57.6 \
		tokenizers==0.22.1 huggingface-hub==0.36.0 requests urllib3 charset-normalizer idna certifi
	@touch $@

test-eval: .venv-eval/transformers-4/installed
	OMP_NUM_THREADS=1 .venv-eval/bin/python -m pytest tests/harness

# Skips where there is no Chromium on the PATH.
test-browser: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/browser

clean:
	rm -rf .venv .venv-eval runs/demo
