# spellq. `make demo` shows it, `make test` proves it; both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-user test-faults lint bench simulate simulate-long setup clean help

help:
	@echo "make demo   set up .venv and run examples/hello.py as a workflow"
	@echo "make test   set up what the tests need; lint, types, layers, tests (as root: e2e twice)"
	@echo "make test-faults   everything dies, at every point and at random (15 minutes)"
	@echo "make lint   ruff, mypy --strict, import-linter"
	@echo "make simulate SEED=n   replay one simulated history; simulate-long: 100,000 of them"
	@echo "make bench  throughput and latency on this machine"
	@echo "make clean  remove .venv and caches"

demo: $(VENV)/.installed
	cd examples && ../$(BIN)/spellq workflow "python hello.py"

test: lint
	$(BIN)/python -m pytest $(ARGS)
	@test "$$(id -u)" != 0 || $(MAKE) --no-print-directory test-user

# As root the tests of real runs are run once more, as the ordinary user spellq-test.
test-user: $(VENV)/.tested
	$(BIN)/python -m tests.as_user $(BIN)/python -m pytest -p no:cacheprovider -m "not large" tests/e2e $(ARGS) || \
		test $$? = 5 -a -n "$(ARGS)"  # none of them was asked for

test-faults: $(VENV)/.tested
	$(BIN)/python -m tests.faults $(if $(RECORD),--record)

lint: $(VENV)/.tested
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed
	$(BIN)/python -m tests.benchmarks.embedded
	$(BIN)/python -m tests.benchmarks.logs

simulate: $(VENV)/.tested
	@$(BIN)/python -m tests.simulation $(or $(SEED),1)

simulate-long: $(VENV)/.tested
	@$(BIN)/python -m tests.simulation 1 --count 100000

setup: $(VENV)/.tested

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "spellq needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) -V 2>&1). Say which: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@command -v git >/dev/null || \
		{ echo "spellq needs git: apt-get install git" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "Python's venv is missing: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[all]"
	@touch $@

$(VENV)/.tested: pyproject.toml tests/services.py | $(VENV)/.python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	$(BIN)/python -m tests.services
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
