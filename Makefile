# Everything runs in .venv, which `make install` makes once and again when pyproject.toml or a proto changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := dure.wire dure.definitions dure.scaling dure.client dure.manager dure.agent dure.appproxy

.PHONY: install demo test lint format proto bench clean

install: $(STAMP)

$(STAMP): pyproject.toml protos/build.py $(shell find protos -name '*.proto')
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Dure needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "cannot make a virtual environment; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[demo,dev]'
	@touch $(STAMP)

# The main job, end to end; ARGS=--once leaves when it is done.
demo: install
	$(BIN)/dure demo $(ARGS)

# ARGS is passed on, as in: make test ARGS='tests/unit -k placement'. Most tests wait for real processes most of
# the time, so more of them run side by side than there are cores.
JOBS ?= 3
test: install
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	set -e; for package in $(PACKAGES); do $(BIN)/mypy --package $$package; done
	$(BIN)/lint-imports --no-cache

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/buf format --write

# The generated code, again, after a change of a proto.
proto: install
	$(BIN)/python protos/build.py

bench: install
	$(BIN)/python -m bench $(ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find client -name '*_pb2*' -delete
