# make repro            build everything: nine experts, the mixture, two baselines, the evaluation; then show the results
# make repro PROFILE=x  the same after laying profiles/x.yaml over params.yaml (smoke, digits, cifar10-cpu, cifar10, svhn)
# make test, make lint, make clean
PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
# DVC runs `python -m advmoe`: the environment's python must be the first on PATH
export PATH := $(BIN):$(PATH)
.DEFAULT_GOAL := repro
.PHONY: repro test lint clean

repro: $(VENV)/.installed
	@git rev-parse --git-dir >/dev/null 2>&1 || dvc config --local --quiet core.no_scm true
	$(if $(PROFILE),python -m advmoe use $(PROFILE))
	@python -m advmoe check
	dvc repro
	@python -m advmoe results

test: $(VENV)/.installed-test
	python -m pytest

lint: $(VENV)/.installed-test
	ruff format --check .
	ruff check .
	mypy

clean:
	rm -rf $(VENV) artifacts runs .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find advmoe stages tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11 or newer" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is older than 3.11; try make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: cannot make $(VENV); on Debian: apt install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@
