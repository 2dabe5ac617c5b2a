.DEFAULT_GOAL := help
.PHONY: help run test test-full serve dashboard lab export readme lint lock clean

VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
UV     := $(shell command -v uv 2>/dev/null)
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c 'import venv' 2>/dev/null && echo $$p && break; done)

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else f"amhs needs Python 3.11 or newer, found {v[0]}.{v[1]}; name one with make PYTHON=...")'
ifneq ($(UV),)
	$(UV) venv --quiet --clear --python $(PYTHON) $(VENV)
	$(UV) pip sync --quiet --compile-bytecode --require-hashes --python $(BIN)/python requirements.lock
	$(UV) pip install --quiet --no-deps --no-build-isolation --python $(BIN)/python -e .
else
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
endif
	@touch $(READY)

run: $(READY)  ## the whole development pipeline, demo size, then the report to open
	$(BIN)/amhs run develop --profile demo

test: $(READY)  ## all tests but the long ones (at most 15 minutes on 2 cores)
	@bash scripts/system-packages.sh
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m "not full"

test-full: $(READY)  ## the long tests too
	@bash scripts/system-packages.sh
	$(BIN)/python -m pytest -n auto --maxprocesses 4

serve: $(READY)  ## the service on port 3000 (more for it: make serve ARGS="--port 8080")
	$(BIN)/amhs serve $(ARGS)

dashboard: $(READY)  ## the live page on port 5006 (more for it: make dashboard ARGS="--port 8081")
	$(BIN)/amhs dashboard $(ARGS)

lab: $(READY)  ## JupyterLab, saving notebooks clean (more for it: make lab ARGS="--port=9000")
	$(BIN)/amhs lab -- $(ARGS)

export: $(READY)  ## nbs/lib -> amhs, notebooks cleaned
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean --fname nbs

readme: $(READY)  ## nbs/index.ipynb -> README.md
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown --no-input --output-dir . --output README nbs/index.ipynb

lint: $(READY)  ## ruff over what is written by hand
	$(BIN)/ruff check .

lock:  ## pin every dependency again (needs uv)
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-strip-extras --upgrade -o requirements.lock

clean:  ## remove the environment and every run
	rm -rf $(VENV) runs/[0-9]* runs/scratch
