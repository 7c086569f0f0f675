# Everything that people and CI do. `make demo` and `make test` need only Python 3.11.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable . build mypy ruff hypothesis pytest pytest-timeout
	touch $@

demo: $(VENV)/.installed  ## Ship a log through a real pipeline and show what arrives.
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh bench/demo.sh

test: $(VENV)/.installed  ## Run all tests.
	$(BIN)/pytest

lint: $(VENV)/.installed  ## Check style, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
