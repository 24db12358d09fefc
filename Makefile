# `make serve` runs Pomelo, `make test` checks everything that CI checks. Both need Python 3.11 or later
# and make, and install the rest into .venv: what uv.lock pins, by its hashes, with uv where it is there.

PYTHON ?= python3
BIN := .venv/bin
# Only what is pinned, and only if its hash is right; then Pomelo itself, built with what was installed. Modules are
# compiled when they are imported: most of those of the tests' clients never are.
PIP = $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --no-deps
INSTALL = $(PYTHON) -m venv .venv && $(PIP) --require-hashes --requirement $(1) && \
	$(PIP) --no-build-isolation --editable .
# How many processes run the tests that do not measure.
TEST_PROCESSES ?= 4
MEASURING := tests/load tests/unit/bench/test_calls.py tests/faults/test_floods.py tests/faults/test_unauthenticated.py
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Tests start hundreds of processes, which take three times as long if Python compiles every module again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: serve test lint proto breaking unit browser generators nginx load image-check crash bench bench-peers gen lock clean

serve: .venv/.serve
	@exec pomelo serve

test: lint proto unit

lint: .venv/.dev
	ruff check .
	ruff format --check .
	mypy --num-workers=2
	lint-imports

proto: .venv/.dev breaking
	buf lint
	buf format --diff --exit-code

# Compares the protobuf files with the last release, the last tag v*. Before the first one they may change.
breaking: .venv/.dev
	@if tag=$$(git describe --tags --abbrev=0 --match 'v*' 2>/dev/null); then \
	  echo "buf breaking --against $$tag"; buf breaking --against ".git#tag=$$tag"; fi

# By default four test processes, because many tests wait. The tests that measure times and memory then run alone.
unit: .venv/.dev browser generators nginx
	tests/run.sh --numprocesses=$(TEST_PROCESSES) --dist=loadfile --no-loadscope-reorder $(addprefix --ignore=,$(MEASURING))
	tests/run.sh $(MEASURING)

# Installs Chromium where there is no browser and this user is root.
browser:
	@tests/browser/install.sh

# Installs Debian's protoc, its plugins for Go, and Go where they are missing and this user is root.
generators:
	@tests/protobuf/install.sh

# Installs Debian's nginx where it is missing and this user is root.
nginx:
	@tests/deploy/install.sh

# The full size of what `unit` does small: about 450 crashes, for some 30 minutes, errors at every call of a store,
# 10,000 random steps of each ledger beside its model, 100 simulations of processes with faults, 6,000 random tasks over
# all front ends, more requests of the OpenAPI description, and every fault of a vendor in every mode of a call while
# the server's output is searched for secrets.
crash: .venv/.dev
	CRASH=full POMELO_LEDGER_STEPS=10000 POMELO_SIMULATIONS=100 POMELO_RANDOM_TASKS=2000 pytest \
	  tests/faults/test_crash.py tests/faults/test_secret_leaks.py tests/faults/test_store_faults.py \
	  tests/faults/test_simulation.py tests/faults/test_openapi.py tests/contract/test_ledger_machine.py \
	  tests/parity/test_random_parity.py --log-cli-level=INFO

load: .venv/.dev
	LOAD_CALLS=100 LOAD_TASKS=10000 LOAD_STREAMS=100 LOAD_RESETS=500 LOAD_ACCOUNTS=100000 pytest -s tests/load \
	  tests/faults/test_unauthenticated.py tests/faults/test_floods.py tests/integration/test_books.py

# Builds the images without Docker, in a bare Debian, and runs them: as root, with Debian's debootstrap.
image-check: .venv/.dev
	POMELO_IMAGE_CHECK=1 pytest tests/deploy/test_image_build.py --log-cli-level=INFO

# What Pomelo adds to a call, beside bare proxies: about seven minutes, on a machine that does nothing else.
bench: .venv/.dev
	python -m bench

# The same beside LiteLLM and Portkey, where they are installed.
bench-peers: .venv/.dev
	python -m bench --peers

gen: .venv/.dev
	python proto/generate.py

# After a change of dependencies in pyproject.toml. Without uv, only the files for pip are made anew.
lock:
	@if command -v uv >/dev/null; then uv lock; fi
	$(PYTHON) deploy/export.py

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache .schemathesis

.venv/.serve: pyproject.toml uv.lock deploy/requirements.txt
	@if command -v uv >/dev/null; then uv sync --quiet --frozen --no-dev --extra sandbox --inexact; else \
	  $(call INSTALL,deploy/requirements.txt); fi
	@touch $@

.venv/.dev: pyproject.toml uv.lock deploy/requirements-dev.txt
	@if command -v uv >/dev/null; then uv sync --quiet --frozen; else \
	  $(call INSTALL,deploy/requirements-dev.txt); fi
	@touch $@ .venv/.serve
