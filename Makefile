# `make run` and `make test` install everything they need: programs with apt-get, Python packages in .venv.

export PYTHON ?= python3
VENV := .venv
IN_VENV := $(VENV)/bin/python -m
RUNNABLE := $(VENV)/.runnable
INSTALLED := $(VENV)/.installed

# How many test files run at a time. They wait for other programs most of the time.
JOBS ?= 2

# The version that writes app/realtime.d.ts from app/realtime.js.
TYPESCRIPT_VERSION := 5.9.3
TYPESCRIPT := .cache/typescript-$(TYPESCRIPT_VERSION)

.PHONY: help run test conformance attack fuzz soak jitter avalanche upgrades bench lint format types check clean php browser systemd compiler
.NOTPARALLEL:

help:
	@echo 'make run      run the daemon, PHP, Caddy and the demo page, until Ctrl-C'
	@echo 'make test     run all tests; some of them: make test ARGS="-k origins"'
	@echo 'make conformance   run the Autobahn test suite, directly and through Caddy; some of it: ARGS="6.* 7.*"'
	@echo 'make attack   attack a daemon in every way: does another client notice, is memory bounded? ARGS="handshakes"'
	@echo 'make fuzz     fuzz every reader of what peers send, each for a minute; one of them, longer: ARGS="wire --seconds 600"'
	@echo 'make soak     let clients and publishers of all kinds come and go: does anything stay behind? ARGS="--minutes 20"'
	@echo 'make jitter   cut the connections of 1,000 clients for a minute: does each get every message, in order, once?'
	@echo 'make avalanche   restart the daemon under 5,000 clients: do all come back, and when? ARGS="--kill --caddy"'
	@echo 'make upgrades    upgrade the daemon under 10,000 clients of all kinds: does anybody notice?'
	@echo 'make bench    compare with other servers; some of it: make bench ARGS="one-channel --servers realtimed ws"'
	@echo 'make lint     check style and types'
	@echo 'make format   format the Python files'
	@echo 'make types    write app/realtime.d.ts from app/realtime.js'
	@echo 'make check    lint and test'
	@echo 'make clean    remove .venv and all caches'
	@echo
	@echo 'Another address: make run SERVER_ADDRESS=:9000'
	@echo 'Another Python:  make run PYTHON=python3.12'

run: php $(RUNNABLE)
	@exec $(IN_VENV) tests.kit.stack

test: php $(INSTALLED) browser systemd compiler $(TYPESCRIPT)
	$(IN_VENV) pytest -n $(JOBS) --dist loadfile $(ARGS)

conformance: $(INSTALLED)
	@$(IN_VENV) tests.system.conformance $(ARGS)

soak jitter avalanche upgrades: $(INSTALLED)
	@$(IN_VENV) tests.load.$@ $(ARGS)

attack: $(INSTALLED)
	@$(IN_VENV) tests.load.attacks $(ARGS)

# Without atheris, which not every Python has, the fuzzers use a loop of their own.
fuzz: $(INSTALLED)
	@$(IN_VENV) pip install --quiet --disable-pip-version-check atheris || echo 'Continuing without atheris.'
	@$(IN_VENV) tests.fuzz $(ARGS)

bench: php $(INSTALLED)
	@$(IN_VENV) benchmarks $(ARGS)

lint: $(INSTALLED)
	$(IN_VENV) ruff check
	$(IN_VENV) ruff format --check
	$(IN_VENV) mypy

format: $(INSTALLED)
	$(IN_VENV) ruff check --fix
	$(IN_VENV) ruff format

types: $(INSTALLED) $(TYPESCRIPT)
	@$(IN_VENV) tests.js.typescript

check: lint test

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Less than a third of the packages that tests need.
$(RUNNABLE): pyproject.toml
	@.ci/system-packages python
	@.ci/python-packages caddy
	@touch $@

$(INSTALLED): pyproject.toml
	@.ci/system-packages python
	@.ci/python-packages dev
	@touch $(RUNNABLE) $@

# Without a lock file, which would name the registry of its author.
$(TYPESCRIPT):
	@.ci/system-packages npm
	@npm install --prefix $(@D) --no-save --no-package-lock --no-audit --no-fund --loglevel error typescript@$(TYPESCRIPT_VERSION)
	@touch $@

php:
	@.ci/system-packages php

browser:
	@.ci/system-packages browser
	@command -v chromium >/dev/null || $(IN_VENV) playwright install --with-deps chromium

systemd:
	@.ci/system-packages systemd

compiler:
	@.ci/system-packages compiler
