# Everything sets itself up: a fresh checkout needs python3 and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FUZZ_READY := $(VENV)/.ready-fuzz
UPSTREAM_READY := $(VENV)/.ready-upstream
FABRIC := $(VENV)-fabric
DOCS_READY := $(VENV)/.ready-docs
SECONDS ?= 600
MINUTES ?= 10

.PHONY: demo test thorough lint bench compare chaos fuzz mutants simulated fabric upstream matrix docs clean help

help:
	@echo "make demo    kill a training replica and watch it heal (under a minute)"
	@echo "make test    lint, types, and all tests (under ten minutes on two slow cores)"
	@echo "make thorough  make test, and tests that differ little from others (a quarter of an hour)"
	@echo "make lint    ruff and mypy --strict alone"
	@echo "make bench   side by side with torchft's and torch's transports; ARGS='...' is passed on"
	@echo "make compare BASE=commit  heal with that commit and with this checkout, turn by turn; ARGS='--states small' for some"
	@echo "make chaos   kill, stop and cut off replicas while they heal, for ten minutes; MINUTES=30, SEED=1 replays one"
	@echo "make fuzz    attack what reads the wire, guided by coverage, for ten minutes; SECONDS=60 for one"
	@echo "make mutants break one promise of the code after the other and see that a test notices; ARGS='lanes' for some"
	@echo "make simulated what needs an accelerator, on one that a C++ extension plays (needs a compiler; three minutes)"
	@echo "make fabric  lanes over NIXL, on torch 2.15, in an environment of its own (gigabytes; five minutes)"
	@echo "make upstream torchft's own integration tests over its transport and over ours (a few minutes)"
	@echo "make docs    the documentation as a site, into site/; a link that leads nowhere fails it"
	@echo "make matrix  the tests with other versions of Python, torch and torchft (hours, gigabytes); ARGS='py3.11 torch2.15' for some"
	@echo "make clean   remove the virtual environment and what the targets above write"

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test,torchft]'
	@touch $@

demo: $(READY)
	$(BIN)/python examples/recover.py $(ARGS)

# By file, since what a file sets up (groups, processes) is shared by its tests. Those with several processes are begun
# first (tests/conftest.py), for they wait for most of their time.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

thorough: export FT_TRANSPORT_THOROUGH = 1
thorough: test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m ft_transport.bench $(ARGS)

compare: $(READY)
	$(BIN)/python tests/compare.py $(BASE) $(ARGS)

chaos: $(READY)
	$(BIN)/python -m tests.chaos --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(ARGS)

$(FUZZ_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	@touch $@

simulated: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ninja setuptools
	PATH="$(abspath $(BIN)):$$PATH" FT_TRANSPORT_DEVICE=sim $(BIN)/python -m pytest tests/gpu tests/multiproc/test_lanes.py \
		tests/multiproc/test_lane_peers.py tests/multiproc/test_torn_lanes.py tests/multiproc/test_rewrite_lanes.py $(ARGS)

# The release of torch that has one-sided transports, and NIXL for the CUDA that its wheel is of; it needs no GPU.
$(FABRIC)/.ready: pyproject.toml
	$(PYTHON) -m venv $(FABRIC)
	$(FABRIC)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[demo,test,torchft]' torch==2.15.0
	$(FABRIC)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps nixl==1.5.1 nixl-cu13==1.5.1
	@touch $@

fabric: $(FABRIC)/.ready
	$(FABRIC)/bin/python -m pytest -s tests/fabric $(ARGS)
	FT_TRANSPORT_FABRIC=nixl $(FABRIC)/bin/python -m pytest tests/multiproc/test_manager.py -k 'over_lanes and 2' $(ARGS)

fuzz: $(FUZZ_READY)
	FT_TRANSPORT_ALL_MUTATIONS=1 $(BIN)/python -m pytest -q --timeout 600 tests/test_hostile.py
	$(BIN)/python tests/fuzz/fuzz_wire.py --seconds $(SECONDS) $(ARGS)

mutants: $(READY)
	$(BIN)/python tests/mutants.py $(ARGS)

$(UPSTREAM_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[upstream]'
	@touch $@

upstream: $(UPSTREAM_READY)
	$(BIN)/python -m tests.upstream $(ARGS)

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

# With the environment's programs at hand, of which ruff breaks long signatures into lines; without the theme's notice
# about MkDocs 2.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m mkdocs build --strict $(ARGS)

# Makes environments of its own, and needs nothing of ours.
matrix:
	$(PYTHON) -m tests.matrix $(ARGS)

clean:
	rm -rf $(VENV) $(FABRIC) *.egg-info build dist recovery bench-output chaos-output fuzz-output matrix-output site .pytest_cache .mypy_cache .ruff_cache .hypothesis
