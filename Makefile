# Two commands: `make demo` and `make test`. Each makes .venv when it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two workers with one thread each: fast on 2 cores, and results do not depend on the machine.
WORKERS ?= 2

.PHONY: demo test lint types imports wheel check clean help

help:  ## show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mmc needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Set PYTHON=python3.11 (or newer).")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing mmc and what it needs into $(VENV) (torch is large: about 5 GB on disk)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.ready  ## the main job, end to end, on a set made from handwritten digits
	$(BIN)/mmc demo demo

test: $(VENV)/.ready  ## the whole suite
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(WORKERS) --dist worksteal

lint: $(VENV)/.ready  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready  ## mypy, strict on store/
	@mkdir -p build/typing && ln -sfn ../.. build/typing/mmc
	MYPYPATH=build/typing $(BIN)/mypy -p mmc.store -p mmc.extract -p mmc.heads -p mmc.cli

imports: $(VENV)/.ready  ## the import rule between the packages
	$(BIN)/lint-imports --no-logo

wheel: $(VENV)/.ready  ## build the wheel and run it from another folder
	bash .ci/wheel

check: test lint types imports wheel  ## everything that CI runs

clean:  ## remove what the other targets made, except .venv
	rm -rf build dist *.egg-info demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
