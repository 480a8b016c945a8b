# `make run` sets everything up and runs the demo; `make test` sets everything up and runs the tests.
# Needs Python >= 3.11 (another one: make run PYTHON=python3.12), a C++ compiler and a package index.

PYTHON ?= python3
VENV ?= .venv
# What Snakemake makes, and further flags for it: make run TARGET=all ARGS="--configfile config/voc.yaml"
TARGET ?= results/voc_val_miou.txt
ARGS ?=

BIN := $(VENV)/bin
# Snakemake's rules call `cosa-fast`, so the environment comes first on the path.
ACTIVATED := PATH="$(abspath $(BIN)):$$PATH"

.PHONY: run test lint bench bench-loader bench-store clean help
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

run: $(VENV)/.pipeline ## install, then run the pipeline (the demo: MiniVOC on the CPU)
	@echo "== running: snakemake --cores all $(TARGET) $(ARGS)"
	@$(ACTIVATED) snakemake --cores all $(TARGET) $(ARGS)

test: $(VENV)/.dev ## install, then run the tests
	@echo "== testing: pytest $(ARGS)"
	@$(ACTIVATED) pytest $(ARGS)

lint: $(VENV)/.dev ## formatting, lints and types of Python and Snakemake code
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== mypy"
	@$(BIN)/mypy
	@echo "== snakefmt, snakemake --lint"
	@$(BIN)/snakefmt --check Snakefile workflow
	@$(ACTIVATED) snakemake --lint

bench: $(VENV)/.pipeline ## measure time and memory of the losses on this machine
	@$(ACTIVATED) python -m benchmarks.kernels $(ARGS)

bench-loader: $(VENV)/.pipeline ## measure the data loaders on this machine
	@$(ACTIVATED) python -m benchmarks.loader $(ARGS)

bench-store: $(VENV)/.pipeline ## measure the pseudo-label store against PNG and npz files
	@$(ACTIVATED) python -m benchmarks.store $(ARGS)

clean: ## remove results, generated data and Snakemake's records; downloads and .venv stay
	rm -rf results data/minivoc* .snakemake

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: no $(PYTHON) here; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $$($(PYTHON) --version) is too old, cosa-fast needs Python >= 3.11: make PYTHON=python3.12" >&2; exit 1; }
	@echo "== creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: no venv module; on Debian: apt install python3-venv" >&2; exit 1; }

# pydensecrf2's own build takes a Cython that knows no Python after 3.12.
DENSE_CRF = $(BIN)/python -c 'import pydensecrf.densecrf' 2>/dev/null || { echo "== building pydensecrf2" && \
	$(BIN)/python -m pip install setuptools 'cython>=3' && $(BIN)/python -m pip install --no-build-isolation pydensecrf2; } || { \
	echo "error: pydensecrf2 (the dense CRF) was not built: it needs a C++ compiler; on Debian: apt install g++" >&2; exit 1; }

$(VENV)/.pipeline: pyproject.toml | $(BIN)/python
	@echo "== installing cosa-fast[pipeline] into $(VENV) (several GB; minutes, once)"
	@$(BIN)/python -m pip install --editable '.[pipeline]'
	@$(DENSE_CRF)
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "== installing cosa-fast[pipeline,slurm,dev] into $(VENV) (several GB; minutes, once)"
	@$(BIN)/python -m pip install --editable '.[pipeline,slurm,dev]'
	@$(DENSE_CRF)
	@touch $@ $(VENV)/.pipeline
