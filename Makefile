# Everything a newcomer or a check needs. `make demo` and `make test` work as the first command of a fresh clone.
# PYTHON=python3.12 chooses the interpreter for the virtual environment, JOBS=4 the processes of the tests.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.coterie-installed
DEMO_OUT ?= demo-out
BENCH_OUT ?= bench-out
JOBS ?= auto
PYTEST_ARGS ?=

# One thread a process: the tests run side by side, and numbers do not depend on the number of cores.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest
BENCHMARKS = $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-gpu lint format bench constraints clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## Create the virtual environment with the pinned packages and the coterie command.

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "coterie needs Python 3.11 or later, and $(PYTHON) is older: try 'make $(MAKECMDGOALS) PYTHON=python3.12'." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## Train three owners' experts, compose them, opt one out (about six minutes on two cores).
	$(BIN)/coterie demo --out $(DEMO_OUT)

test: $(STAMP) ## Run the default tests (five to six minutes on two cores).
	$(PYTEST) -n $(JOBS) --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

test-slow: $(STAMP) ## Run the tests that take longer than a minute each.
	$(PYTEST) -m 'slow and not gpu' --timeout 1800 $(PYTEST_ARGS)

test-gpu: $(STAMP) ## Run the tests that need an accelerator.
	$(PYTEST) -m gpu $(PYTEST_ARGS)

lint: $(STAMP) ## Check style, types and the direction of imports.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP) ## Rewrite the code in the project's style.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP) ## Run every benchmark; each writes its figures to $(BENCH_OUT).
	@mkdir -p $(BENCH_OUT)
	@set -e; for script in $(BENCHMARKS); do \
	  echo "== $$script"; $(BIN)/python $$script --out $(BENCH_OUT)/$$(basename $$script .py).json; done

constraints: ## Write the versions installed in the virtual environment into constraints.txt.
	@{ sed -n '/^#/p' constraints.txt; \
	  { $(BIN)/python -m pip freeze --disable-pip-version-check --exclude-editable --exclude coterie \
	  | sed -E '/ @ /d; s/\+[a-z0-9.]+$$//'; sed -nE '/^(faiss-cpu|haystack-ai|langchain-core|llama-index-core|lm-eval|mteb)==/p' constraints.txt; } \
	  | LC_ALL=C sort -fu; } > constraints.new # the extras need not be installed
	@mv constraints.new constraints.txt

clean: ## Remove the virtual environment and everything that was generated.
	rm -rf $(VENV) $(DEMO_OUT) $(BENCH_OUT) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
