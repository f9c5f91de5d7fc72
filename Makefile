# make repro            build everything: experts, mixture, comparators, evaluation, poisoning, extraction, membership, report; then show the results
# make repro JOBS=1     one stage after another, as `dvc repro` does; default: as many at a time as there are cores
# make repro PROFILE=x  the same after laying profiles/x.yaml over params.yaml (smoke, digits, digits-full, cifar10-cpu, cifar10, svhn)
# make test, make lint
# make clean            remove environments, caches, artifacts/ and runs/, paid queries among them; DVC's cache stays
# make fuzz            the fuzz tests at length: a thousand random cases for each, other ones every time; SEED=n repeats, CASES=n as many
# make bench            our attacks and poison against others', and how fast, in .venv-bench: their libraries do not get along with DVC's
# make gpu-check        does this GPU do what the CPU does, and how fast? nine full-width experts on images of CIFAR-10's shape; minutes
PYTHON ?= python3
CORES := $(shell getconf _NPROCESSORS_ONLN)
# on a GPU (ADVMOE_DEVICE) choose what its memory holds
JOBS ?= $(CORES)
CASES ?= 1000
SEED := $(or $(SEED),$(shell date +%s))
VENV := .venv
BIN := $(abspath $(VENV))/bin
# DVC runs `python -m advmoe`: the environment's python must be the first on PATH
export PATH := $(BIN):$(PATH)
# the mixture, then the comparators, which are listed by size, from the dearest down: no core waits for one of them in the end
dearest_first = | awk '{line[NR] = $$0} END {print line[1]; while (NR > 1) print line[NR--]}'
# evaluation and, listed last, membership take longest: nobody should wait for one of them alone
longest_first = | awk '{line[NR] = $$0} END {print line[1]; print line[NR]; for (i = 2; i < NR; i++) print line[i]}'
# the stages whose names match, which do not need each other; the cores are shared out, for threads beside others wait for each other
side_by_side = stages=$$(dvc stage list --name-only | grep -E '$(1)' $(2)); \
	jobs=$$(printf '%s\n' "$$stages" | awk 'END {print NR < $(JOBS) ? NR : $(JOBS)}'); \
	threads=$${ADVMOE_THREADS:-$$(($(CORES) > jobs ? $(CORES) / jobs : 1))}; \
	printf '%s\n' $$stages | ADVMOE_THREADS=$$threads OMP_NUM_THREADS=$$threads xargs -r -P $$jobs -n 1 dvc --wait-for-lock repro --single-item
.DEFAULT_GOAL := repro
.PHONY: repro test fuzz lint bench gpu-check clean

repro: $(VENV)/.installed
	@git rev-parse --git-dir >/dev/null 2>&1 || dvc config --local --quiet core.no_scm true
	$(if $(PROFILE),python -m advmoe use $(PROFILE))
	@python -m advmoe check
	dvc repro code inputs prepare
	@$(call side_by_side,^pretrain@)
	dvc repro --single-item experts
	@$(call side_by_side,^(train|baseline@.*)$$,| grep -v ^baseline@distilled $(dearest_first))
	@$(call side_by_side,^baseline@distilled)
	@$(call side_by_side,^(evaluate|poison@.*|extract@.*|membership)$$,$(longest_first))
	dvc repro
	@python -m advmoe results

test: $(VENV)/.installed-test
	python -m pytest

fuzz: $(VENV)/.installed-test
	FUZZ_CASES=$(CASES) python -m pytest tests/test_fuzz_*.py --hypothesis-seed=$(SEED) --hypothesis-show-statistics

lint: $(VENV)/.installed-test
	ruff format --check .
	ruff check .
	mypy

bench: .venv-bench/.installed
	.venv-bench/bin/python -m benchmarks.agreement
	.venv-bench/bin/python -m benchmarks.poisoning
	ADVMOE_THREADS=1 .venv-bench/bin/python -m benchmarks.speed

gpu-check: $(VENV)/.installed
	@python -m benchmarks.gpu_check

clean:
	rm -rf $(VENV) .venv-bench artifacts runs .pytest_cache .mypy_cache .ruff_cache *.egg-info
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

.venv-bench/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --editable '.[bench]'
	@touch $@
