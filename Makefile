# demo, test, walk, soak, bench, docs, lint: each prepares .venv when it is missing or its requirements have changed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers

.PHONY: demo test walk soak bench docs lint

demo: $(READY)
	$(BIN)/prism demo

test: $(READY)
	$(BIN)/python -m pytest -n 2

walk: $(READY)
	$(BIN)/python -m pytest -m walk tests/test_written_commands.py

soak: $(READY)
	$(BIN)/python tests/faults/soak.py

bench: $(PEERS)
	$(BIN)/python -m benchmarks

docs: $(READY)
	$(BIN)/python docs/pages.py

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

$(PEERS): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision # a peer's peer asks for it; made for another torch it breaks transformers
	touch $@
