PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast mutants audit lint format clean
.DELETE_ON_ERROR:

# The environment, made once and again when what it installs changes.
$(BIN)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(BIN)/.installed  ## Reinforce the bundled 4-step model on this machine and show before and after
	$(BIN)/tdm-r1 mini demo

test: $(BIN)/.installed lint  ## Lint, type-check and run every test
	$(BIN)/python -m pytest

test-fast: $(BIN)/.installed  ## The tests that are not marked slow
	$(BIN)/python -m pytest -m "not slow"

mutants: $(BIN)/.installed  ## Change core/ and algorithms/ line by line and see which changes no fast test notices
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[mutants]'
	$(BIN)/python benchmarks/mutants.py --run

audit: $(BIN)/.installed  ## Licences of what users install, known vulnerabilities of the pinned versions
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip-audit pip-licenses
	$(BIN)/python benchmarks/audit.py

lint: $(BIN)/.installed
	$(BIN)/ruff format --check src tests benchmarks scorers
	$(BIN)/ruff check src tests benchmarks scorers
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(BIN)/.installed
	$(BIN)/ruff format src tests benchmarks scorers
	$(BIN)/ruff check --fix src tests benchmarks scorers

clean:
	rm -rf .venv build dist mutants .pytest_cache .mypy_cache .ruff_cache
