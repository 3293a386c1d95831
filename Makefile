# Everything sets itself up: a fresh checkout needs python3 and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint bench clean help

help:
	@echo "make demo    kill a training replica and watch it heal (under a minute)"
	@echo "make test    lint, types, and all tests (under ten minutes)"
	@echo "make lint    ruff and mypy --strict alone"
	@echo "make bench   side by side with torchft's and torch's transports; ARGS='...' is passed on"
	@echo "make clean   remove the virtual environment and what the targets above write"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test]'
	@touch $@

demo: $(READY)
	$(BIN)/python examples/recover.py $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m ft_transport.bench $(ARGS)

clean:
	rm -rf $(VENV) *.egg-info build dist recovery bench-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
