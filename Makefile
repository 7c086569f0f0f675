# Everything that people and CI do. `make demo` and `make test` need only Python 3.11.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SECONDS ?= 600
SOURCES := $(shell find src -name '*.py')

.PHONY: demo test chaos fuzz soak lint format bench clean

$(VENV)/.tools: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --group dev
	touch $@

$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	rm -rf dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/pip install --quiet --force-reinstall dist/zmqpush-*.whl
	touch $@

demo: $(VENV)/.installed  ## Ship a log through a real pipeline and show what arrives.
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh bench/demo.sh

test: $(VENV)/.installed  ## Run all tests, against the built and installed package.
	$(BIN)/python -I -m pytest

chaos: $(VENV)/.installed  ## Run the fault matrix in its long form: some 40 minutes.
	ZMQPUSH_CHAOS=long $(BIN)/python -I -m pytest -o timeout=3600 tests/model tests/test_faults.py tests/test_faults_link.py tests/test_omprog.py tests/test_rsyslog.py tests/test_kafka.py tests/test_nats.py $(ARGS)

fuzz: $(VENV)/.installed  ## Fuzz each target, for ten minutes unless SECONDS says otherwise; two at a time.
	$(BIN)/python fuzz/run.py --seconds $(SECONDS) $(ARGS)

soak: $(VENV)/.installed  ## Kill both ends for ten minutes and count what arrived.
	$(BIN)/python bench/soak.py --seconds 600 $(ARGS)

lint: $(VENV)/.installed  ## Check style, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.tools  ## Mend style and format.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed  ## Measure, next to the C yardstick and the peers. ARGS=--smoke is quick.
	$(BIN)/python bench/run.py $(ARGS)
	$(BIN)/python bench/backlog.py $(if $(findstring --smoke,$(ARGS)),--smoke)
	$(BIN)/python bench/senders.py $(if $(findstring --smoke,$(ARGS)),--smoke)
	$(BIN)/python bench/fleet.py $(if $(findstring --smoke,$(ARGS)),--smoke)
	$(BIN)/python bench/rsyslog.py $(if $(findstring --smoke,$(ARGS)),--smoke)
	$(BIN)/python bench/sinks.py $(if $(findstring --smoke,$(ARGS)),--smoke)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
