# make demo and make test do everything on a fresh machine with Python 3.11, 3.12 or 3.13.

PYTHON ?= python3
NEWEST_PYTHON ?= python3.13
VENV := .venv
OLDEST := .venv-oldest
NEWEST := .venv-newest
WHEEL := .venv-wheel
DOCS := .venv-docs
TOOLS := chex hypothesis pytest pytest-xdist
SETUP := setup.py $(wildcard granet_jax/compact/*.cc granet_jax/compact/*.h) setup.cfg pyproject.toml constraints.txt constraints-oldest.txt
SOURCES := $(shell find granet_jax experiments -name '*.py' -o -name '*.html' -o -name '*.flags') README.md

.PHONY: demo test test-all test-wheel test-oldest test-newest dist docs lint benchmark clean

demo: $(VENV)/.installed  ## six methods on digits, a table and a report
	$(VENV)/bin/python -m experiments.compare --out_dir=runs/demo

test: lint  ## what has to pass before a commit
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not full"

test-all: lint  ## also the full product of methods, optimizers and wrappers
	$(VENV)/bin/python -m pytest -n auto --dist worksteal

tests = $(patsubst %,tests/%_test.py,$(1))
CORE := selection trees distributions schedules masks reference errors rules
KERNELS := products compact_conv

# Installs the wheel into an environment and runs tests where the checkout cannot be imported.
define with_wheel
	$(1)/bin/python -m pip install --quiet --no-deps --force-reinstall dist/*.whl
	folder=$$(mktemp -d) && tar cf - tests pyproject.toml docs/optimizers.md | tar xf - -C "$$folder" && cd "$$folder" \
		&& $(CURDIR)/$(1)/bin/python -m pytest -n 2 -m "not full" $(call tests,$(2)) && rm -r "$$folder"
endef

test-wheel: $(WHEEL)/.installed dist/.built  ## the core of the library as the wheel installs it
	$(call with_wheel,$(WHEEL),$(CORE))

test-oldest: $(OLDEST)/.installed dist/.built  ## core and kernels on the oldest supported JAX, from the wheel
	$(call with_wheel,$(OLDEST),$(CORE) $(KERNELS) compact_native)

test-newest: $(NEWEST)/.installed dist/.built  ## core, kernels and every method on the newest JAX, from the wheel
	$(call with_wheel,$(NEWEST),$(CORE) $(KERNELS) acceptance models)

dist: dist/.built  ## the wheel and the source distribution, checked

docs: $(DOCS)/.installed  ## the site, into docs/_build; every page is run
	JAX_PLATFORMS=cpu $(DOCS)/bin/python -m sphinx --fail-on-warning --keep-going -b html docs docs/_build/html

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

benchmark: $(VENV)/.installed  ## what sparsity and the input cost, into docs/benchmarks.md
	$(VENV)/bin/python -m experiments.benchmarks

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(WHEEL) $(DOCS) build dist docs/_build *.egg-info

dist/.built: $(VENV)/.installed $(SETUP) $(SOURCES)
	rm -rf dist build
	$(VENV)/bin/python -m build --quiet --outdir dist
	$(VENV)/bin/python -m twine check --strict dist/*
	touch $@

define new_environment
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
endef

$(VENV)/.installed: $(SETUP)
	$(new_environment)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[experiments,test]'
	touch $@

$(DOCS)/.installed: $(SETUP)
	$(new_environment)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

$(WHEEL)/.installed: $(SETUP) | dist/.built
	$(new_environment)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl $(TOOLS)
	touch $@

$(OLDEST)/.installed: $(SETUP) | dist/.built
	$(new_environment)
	$(@D)/bin/python -m pip install --quiet --constraint constraints-oldest.txt dist/*.whl $(TOOLS)
	touch $@

$(NEWEST)/.installed: PYTHON = $(NEWEST_PYTHON)
$(NEWEST)/.installed: $(SETUP) | dist/.built
	$(new_environment)
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt \
		"$$(ls dist/*.whl)[experiments]" $(TOOLS) cloudpickle equinox
	touch $@
