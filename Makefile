# Every target does its own set-up: a virtual environment in .venv with the versions that constraints.txt pins.
# PYTHON chooses the interpreter (3.11 or later). Only CPU wheels of torch are wanted? Name an index that has them in
# pip's own variable PIP_EXTRA_INDEX_URL. WORKERS is how many tests run at once; 0 runs them in one process.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/installed
MEASURED := .venv/measured
PEERS := .venv-peers
CLIENTS := .venv-clients
WORKERS ?= 2
PYTEST := -m pytest --numprocesses $(WORKERS) --dist worksteal
GPU := .venv-gpu
QUICK := not cuda and not long and not soak and not engine and not peers and not clients

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-engine test-peers test-clients test-gpu soak check bench compare format clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable '.[service,trainer,dev]'
	@touch $@

demo: $(INSTALLED) ## trainer and service together on real data, for about a minute
	$(BIN)/python demo.py

test: $(INSTALLED) ## the tests; COVERAGE=1 also measures the branch coverage that `make check` looks at
ifeq ($(COVERAGE),)
	$(BIN)/python $(PYTEST) -m '$(QUICK)'
else
	$(BIN)/coverage erase
	$(BIN)/coverage run $(PYTEST) -m '$(QUICK)'
	@$(BIN)/coverage combine --quiet
	@touch $(MEASURED)
endif

test-long: $(INSTALLED) ## the tests that take minutes, and a twentieth of what `make soak` does
	$(BIN)/python $(PYTEST) -m 'long or soak'

soak: $(INSTALLED) ## the tests that count in thousands, whole, in about eight minutes: writes benchmarks/results/soak.json
	SOAK=1 $(BIN)/python -m pytest -m soak

test-engine: $(INSTALLED) ## the tests in a Docker engine, which they start themselves if none runs
	$(BIN)/python -m pytest -m engine

test-peers: $(PEERS)/installed ## the tests against the averages and training frameworks of others
	$(PEERS)/bin/python -m pytest -m peers

test-clients: $(INSTALLED) $(CLIENTS)/installed ## the tests with the clients of others, against a service of ours
	$(BIN)/python -m pytest -m clients

# With the interpreter and the torch that are there; WHEELS names a folder with the other packages, where there is no index.
test-gpu: ## the tests and figures that need a CUDA device: writes benchmarks/results/gpu.json
	$(PYTHON) -m venv --system-site-packages $(GPU)
	$(GPU)/bin/python -m pip install --quiet --disable-pip-version-check \
		$(if $(WHEELS),--no-index --find-links $(WHEELS)) --editable '.[service,trainer,dev]'
	$(GPU)/bin/python -m pytest -m cuda
	$(GPU)/bin/python -m benchmarks gpu

$(CLIENTS)/installed: constraints-clients.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-clients.txt \
		'tritonclient[http]' kserve schemathesis
	@touch $@

$(PEERS)/installed: pyproject.toml constraints.txt constraints-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-peers.txt \
		--editable '.[service,trainer,dev,peers]'
	@touch $@

# Newer than all that was measured: then the tests need not run again.
$(MEASURED): $(shell git ls-files '*.py' '*.md' pyproject.toml constraints.txt 2>/dev/null)
	$(MAKE) test COVERAGE=1

check: $(INSTALLED) $(MEASURED) ## lint, types, coverage; and the tests, unless `COVERAGE=1 make test` has passed since
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/coverage report

bench: $(PEERS)/installed ## the benchmarks, beside the averages of others; ends with the bars that do not hold
	$(PEERS)/bin/python -m benchmarks

compare: $(INSTALLED) ## EMA against raw weights over five seeds, for about 15 minutes: writes docs/ema-vs-raw.md
	$(BIN)/python -m trainer.compare

format: $(INSTALLED) ## format the code
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean: ## remove what the other targets made
	rm -rf .venv .venv-peers .venv-clients build *.egg-info .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
