# make help lists the targets. Everything lives in .venv; delete that folder to start over.

PYTHON ?= python3
BIN := .venv/bin

# Two test processes with one thread each: torch's own threads would fight over the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo check test bench lint

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

setup: .venv/.stamp  ## create .venv with the locked versions (again only when pyproject.toml or the lock changed)

.venv/.stamp: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "strop needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another one: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0 -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

demo: setup  ## raw text -> pretrain -> SFT -> GRPO -> frozen generation, with a report
	$(BIN)/python recipes/demo/run.py

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

check: lint  ## format, lint, types, unit and oracle tests: under two minutes
	$(PYTEST) tests/unit tests/oracle

test: lint  ## the checks above and every test, the learning tests too
	$(PYTEST)

bench: setup  ## speed and memory against TRL, transformers and llama.cpp, which it installs first (short form)
	$(BIN)/python -m pip install --quiet -c requirements.lock -e '.[bench]'
	-$(BIN)/python -m pip install --quiet -c requirements.lock -e '.[llama]'
	test -f models/smollm2/config.json || $(BIN)/strop models get smollm2
	$(BIN)/python -m benchmarks
