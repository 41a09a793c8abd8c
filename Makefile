# make demo and make test do everything on a fresh machine with Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
SETUP := setup.cfg pyproject.toml constraints.txt constraints-oldest.txt

.PHONY: demo test test-all test-oldest lint benchmark clean

demo: $(VENV)/.installed  ## six methods on digits, a table and a report
	$(VENV)/bin/python -m experiments.compare --out_dir=runs/demo

test: lint  ## what has to pass before a commit
	$(VENV)/bin/python -m pytest -n 2 -m "not full"

test-all: lint  ## also the full product of methods, optimizers and wrappers
	$(VENV)/bin/python -m pytest -n auto

test-oldest: $(OLDEST)/.installed  ## the library on the oldest supported JAX
	$(OLDEST)/bin/python -m pytest -n 2 tests/selection_test.py tests/trees_test.py \
		tests/distributions_test.py tests/schedules_test.py tests/masks_test.py \
		tests/reference_test.py tests/errors_test.py tests/rules_test.py tests/flops_test.py

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

benchmark: $(VENV)/.installed  ## what sparsity and the input cost, into docs/benchmarks.md
	$(VENV)/bin/python -m experiments.benchmarks

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info

$(VENV)/.installed: $(SETUP)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[experiments,test]'
	touch $@

$(OLDEST)/.installed: $(SETUP)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable . \
		chex hypothesis pytest pytest-xdist
	touch $@
