# Two commands do everything: `make repro` runs the pipeline, `make test` the tests. Both set up .venv first.
# TORCH_INDEX=https://download.pytorch.org/whl/cpu (or .../cu130) names where else to look for torch.

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
TORCH := 2.13.0
TORCH_INDEX ?=

export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1
export MLFLOW_DISABLE_TELEMETRY := true
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help repro test test-slow test-long check lint format up down status deploy clean lock

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

repro: .venv/.installed ## run the whole pipeline (dvc repro), as params.yaml says
	@git rev-parse --git-dir >/dev/null 2>&1 || { echo "make repro: this folder is in no git repository, and DVC needs one: git init && git add -A && git commit -m begin" >&2; exit 2; }
	@$(BIN)/python -m dvc repro

test: .venv/.installed ## run the tests (under 8 minutes on two cores)
	@$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-slow: .venv/.installed ## run the tests that take longer
	@$(BIN)/python -m pytest -m "slow and not long" -n logical --maxprocesses 2 --dist loadfile --no-loadscope-reorder

test-long: .venv/.installed ## run the few tests that take minutes each
	@$(BIN)/python -m pytest -m long

check: .venv/.installed ## validate params.yaml for every stage at once
	@$(BIN)/python -m dit.cli check && echo "params.yaml is valid"

lint: .venv/.installed ## ruff: lint and formatting
	@$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .

format: .venv/.installed ## ruff: repair what it can
	@$(BIN)/python -m ruff check --fix . && $(BIN)/python -m ruff format .

up: .venv/.installed ## start local Prefect and MLflow servers and workers (or reuse them)
	@$(BIN)/python -m dit.cli up

down: .venv/.installed ## end the servers and workers of this checkout
	@$(BIN)/python -m dit.cli down

status: .venv/.installed ## what runs of them, and its health
	@$(BIN)/python -m dit.cli status

deploy: .venv/.installed ## make all deployments on the Prefect server that is configured (dit deploy)
	@$(BIN)/python -m dit.cli deploy

clean: .venv/.installed ## delete the states of earlier trainings (results stay)
	@$(BIN)/python -m dit.cli clean

lock: ## pin every package anew (needs uv)
	@uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --no-header --no-annotate -q -o /dev/stdout \
		| grep -vE '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z-]+)==' > requirements.tmp
	@{ echo "# Every package of the project and its tests, pinned; made by 'make lock'."; \
		echo "# torch is installed first and by itself (see the Makefile): its CUDA packages stay out of this list."; \
		cat requirements.tmp; } > requirements.lock && rm requirements.tmp

# The marker is made last: an installation that was interrupted is taken up again.
.venv/.installed: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: Python 3.11, 3.12 or 3.13 is needed: install one, or name it with PYTHON=..." >&2; exit 2; }
	@echo "setting up .venv with $$($(PYTHON) --version), a few minutes the first time"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c requirements.lock torch==$(TORCH)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements.lock
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
