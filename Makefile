# Two commands on a bare machine with python3 (3.11 or newer) and make:
#   make demo    installs into .venv, trains, transfers, writes runs/demo/report.html
#   make test    installs the dev extra too and runs the tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint slow crash soak clean

demo: .venv/installed
	$(BIN)/manyscale demo

test: .venv/installed-dev
	$(BIN)/python -m pytest -n 2

slow: .venv/installed-dev
	$(BIN)/python -m pytest -m slow

crash: .venv/installed-dev
	$(BIN)/python -m pytest -m crash

STEPS ?= 10000
soak: .venv/installed-dev
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m tests.crash.soak --steps $(STEPS)

lint: .venv/installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "manyscale needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
