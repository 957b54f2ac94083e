# make help lists the targets. Everything lives in .venv; delete that folder to start over.

PYTHON ?= python3
BIN := .venv/bin
# Debian packages: a compiler for the C++ kernels, the sandbox of code rewards, databases of proofs and the program that
# ours is compared with, a browser for the tests of the pages.
SYSTEM := g++ bubblewrap metamath metamath-databases chromium chromium-driver

# Two test processes with one thread each: torch's own threads would fight over the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup system demo check test bench lint

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 16

setup: system .venv/.stamp  ## create .venv with the locked versions (again only when pyproject.toml or the lock changed)

.venv/.stamp: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "strop needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another one: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0 -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

system:  ## install the system packages (as root on Debian; prints the line to run otherwise)
	@missing=""; for name in $(SYSTEM); do dpkg -s $$name >/dev/null 2>&1 || missing="$$missing $$name"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		(apt-get update -qq; apt-get install -y -qq --no-install-recommends $$missing) >/dev/null && exit 0; fi; \
	echo "Some features need system packages. To install them, run as root: apt-get install$$missing" >&2

demo: setup  ## raw text -> pretrain -> SFT -> GRPO, PPO and DPO -> frozen generation, with a report
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
