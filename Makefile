# make demo    everything from nothing: environment, model, served answers (under two minutes after the installs)
# make test    the whole test suite; make lint: style and types
#
# On Linux, the ordinary torch wheel is the CUDA build. On a machine without a GPU point pip at PyTorch's CPU wheels, in
# its own configuration or with PIP_ARGS="--extra-index-url ...", and nothing of CUDA is installed.

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo install wheel test test-ray test-rest on-prem on-prem-from-nothing lint format protos observability clean

demo: $(VENV)/.runtime
	scripts/loopback $(BIN)/quire demo

install: $(VENV)/.runtime

wheel: $(VENV)/.runtime
	rm -rf dist
	$(BIN)/pip wheel -q --no-deps -w dist .

# Two halves beside each other, each on a network of its own: what starts Ray, and the rest, which mostly waits, by two
# processes of one thread: a cluster that gets no core in time loses its deadlines.
test: $(VENV)/.dev
	$(MAKE) -j 2 --output-sync=target test-ray test-rest

test-ray: $(VENV)/.dev
	scripts/loopback $(BIN)/pytest $(PYTEST_ARGS) -m ray

test-rest: $(VENV)/.dev
	OMP_NUM_THREADS=1 scripts/loopback $(BIN)/pytest -n 2 --dist loadfile $(PYTEST_ARGS) -m "not ray"

# Hosts in namespaces of their own, which must not lie in those of scripts/loopback: sshd wants to be root for real.
# Where that cannot be, this fails and says what is missing.
on-prem: $(VENV)/.dev
	PYTHONPATH=tests/support $(BIN)/python -c "import hosts, sys; sys.exit(hosts.why_not())"
	$(BIN)/pytest $(PYTEST_ARGS) tests/cluster/test_on_prem.py

# The same on hosts that have no Python package: about 3 GB of downloads, and four installations of 1.5 GB each.
WHEELS := $(CURDIR)/build/wheels
on-prem-from-nothing: $(VENV)/.dev
	PYTHONPATH=tests/support $(BIN)/python -c "import hosts, sys; sys.exit(hosts.why_not())"
	$(BIN)/pip wheel -q $(PIP_ARGS) -c constraints.txt -w $(WHEELS) torch ".[serve]" "setuptools>=80"
	rm $(WHEELS)/quire-*
	$(BIN)/pytest $(PYTEST_ARGS) tests/cluster/test_on_prem.py --wheels $(WHEELS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/.dev
	$(BIN)/python scripts/protos.py

observability: $(VENV)/.dev
	PYTHONPATH=deploy $(BIN)/python -m observability.generate

$(VENV)/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/pip install -q $(PIP_ARGS) -c constraints.txt -e ".[serve]"
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/pip install -q $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
