# Each target sets up what it needs: a virtual environment in .venv, installed again only when pyproject.toml changes.
PYTHON ?= python3
JOBS   ?= 2
ARGS   ?=
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help demo test lint clean distclean
.DEFAULT_GOAL := help

help:
	@echo "make demo       two alignment algorithms on a small video model; writes runs/demo/report.html"
	@echo "make test       lint, type check and all tests (JOBS=$(JOBS) processes, ARGS for pytest)"
	@echo "make lint       lint and type check only"
	@echo "make clean      remove caches and build output (runs/ and $(VENV) stay)"
	@echo "make distclean  the same, and remove $(VENV)"

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) cannot make virtual environments. On Debian or Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Setting up $(VENV) (once; torch and its libraries take about 6 GB on Linux)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -m benchmarks.demo $(ARGS)

# All three checks run even when one of them fails, so one call shows everything; pytest's closing line stands last.
# One thread per process: the processes share the cores, and results do not depend on the number of cores.
test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	@status=0; \
	$(BIN)/ruff check . || status=1; \
	$(BIN)/mypy vdm_env algos benchmarks || status=1; \
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS) || status=1; \
	exit $$status

lint: $(STAMP)
	@status=0; \
	$(BIN)/ruff check . || status=1; \
	$(BIN)/mypy vdm_env algos benchmarks || status=1; \
	exit $$status

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find vdm_env algos benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
