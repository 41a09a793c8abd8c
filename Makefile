# make demo and make test do everything on a fresh machine with Python 3.11, 3.12 or 3.13.

PYTHON ?= python3
NEWEST_PYTHON ?= python3.13
VENV := .venv
OLDEST := .venv-oldest
NEWEST := .venv-newest
SETUP := setup.py $(wildcard granet_jax/compact/*.cc granet_jax/compact/*.h) setup.cfg pyproject.toml constraints.txt constraints-oldest.txt

DOCS := .venv-docs

.PHONY: demo test test-all test-oldest test-newest docs lint benchmark clean

demo: $(VENV)/.installed  ## six methods on digits, a table and a report
	$(VENV)/bin/python -m experiments.compare --out_dir=runs/demo

test: lint  ## what has to pass before a commit
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not full"

test-all: lint  ## also the full product of methods, optimizers and wrappers
	$(VENV)/bin/python -m pytest -n auto --dist worksteal

tests = $(patsubst %,tests/%_test.py,$(1))
LIBRARY := selection trees distributions schedules masks reference errors rules flops products pitfalls \
	compact_native compact_conv compact_trace one_shot scores

test-oldest: $(OLDEST)/.installed  ## the library on the oldest supported JAX
	$(OLDEST)/bin/python -m pytest -n 2 -m "not full" $(call tests,$(LIBRARY))

test-newest: $(NEWEST)/.installed  ## the library and the language model on the newest JAX
	$(NEWEST)/bin/python -m pytest -n 2 -m "not full" $(call tests,$(LIBRARY) \
		house acceptance optimizers x64 structures compact compact_states compact_blocks export kernels models lm)

docs: $(DOCS)/.installed  ## the site, into docs/_build; every page is run
	JAX_PLATFORMS=cpu $(DOCS)/bin/python -m sphinx --fail-on-warning --keep-going -b html docs docs/_build/html

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

benchmark: $(VENV)/.installed  ## what sparsity and the input cost, into docs/benchmarks.md
	$(VENV)/bin/python -m experiments.benchmarks

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(DOCS) build dist docs/_build *.egg-info

$(NEWEST)/.installed: PYTHON = $(NEWEST_PYTHON)
$(VENV)/.installed $(NEWEST)/.installed: $(SETUP)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[experiments,test]'
	touch $@

$(DOCS)/.installed: $(SETUP)
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --upgrade pip
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

$(OLDEST)/.installed: $(SETUP)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable . \
		chex hypothesis pytest pytest-xdist
	touch $@
