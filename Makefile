# `make demo` and `make test` each work on a fresh machine with Python >= 3.11: they create .venv and install what they need,
# the former only what it runs on; the latter completes the same environment.
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
VENV_MIN := .venv-min
VENV_NEWEST := .venv-newest
STAMP_DEMO := $(VENV)/.specdec-demo
STAMP := $(VENV)/.specdec-installed
STAMP_MIN := $(VENV_MIN)/.specdec-installed
BIN := $(VENV)/bin

# Each pytest worker computes with one thread, so that two workers do not fight over two cores.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-min smoke lint format bench docs clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

# CUDA builds of torch bring the Triton they were built with; beside a CPU build the kernels are tested with a pinned one.
define TRITON
$(1) -c 'import triton' 2>/dev/null || \
	$(1) -m pip install --quiet $(PIP_ARGS) --constraint constraints-kernels.txt --editable '.[kernels]'
endef

# Linux wheels of torch on the package index carry CUDA, gigabytes that are of use only beside an NVIDIA GPU. The build for CPUs is
# taken from where pip looks anyway, else from torch's own index; if neither has it, pip takes what it finds.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := $(shell grep '^torch==' constraints.txt)
define LIGHT_TORCH
if test "$$(uname)" = Linux && ! command -v nvidia-smi >/dev/null; then \
	$(1) -m pip install --no-compile $(PIP_ARGS) --constraint constraints.txt '$(TORCH)+cpu' 2>/dev/null || \
	$(1) -m pip install --no-compile $(PIP_ARGS) --constraint constraints.txt \
		--extra-index-url $(CPU_INDEX) '$(TORCH)+cpu' || true; \
fi
endef

# No bytecode: Python writes that of the few modules it imports, pip would write that of all.
$(STAMP_DEMO): pyproject.toml constraints.txt
	@echo "setting up $(VENV): torch, transformers and the library (about 300 MB to download)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(call LIGHT_TORCH,$(BIN)/python)
	$(BIN)/python -m pip install --no-compile $(PIP_ARGS) --constraint constraints.txt --editable .
	@touch $@

# An environment that is already there is brought up to date, not thrown away.
$(STAMP): $(STAMP_DEMO) constraints-kernels.txt
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[dev]'
	@$(call TRITON,$(BIN)/python)
	@touch $@

$(STAMP_MIN): pyproject.toml constraints-min.txt constraints-kernels.txt
	@test -x $(VENV_MIN)/bin/python || $(PYTHON) -m venv $(VENV_MIN)
	$(VENV_MIN)/bin/python -m pip install --quiet $(PIP_ARGS) --constraint constraints-min.txt --editable '.[dev]'
	@$(call TRITON,$(VENV_MIN)/bin/python)
	@touch $@

demo: $(STAMP_DEMO)  ## set up, then generate speculatively from the pair that ships with the library
	$(BIN)/specdec generate --pair stdlib-python --prompt 'def parse_args(argv=None):' --max-new-tokens 160 --show-draft

test: $(STAMP) lint  ## format check, lint, types, every test
	$(ONE_THREAD) $(OFFLINE) $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

test-min: $(STAMP_MIN)  ## every test with the oldest supported transformers
	$(ONE_THREAD) $(OFFLINE) $(VENV_MIN)/bin/python -m pytest -n 2 $(PYTEST_ARGS)

# What a newcomer gets today: the wheel, and the newest of everything it allows. Only torch is held where `make test` has it: it is
# transformers that renames things, while another torch would be gigabytes for CUDA that pip does not have in its cache yet.
NEWEST := $(VENV_NEWEST)/bin/python -m pip
UNREACHED := { echo "make smoke: pip got no current packages (above: what failed). Is the package index reachable?" >&2; exit 1; }

smoke:  ## build the wheel, install it with the newest of everything it allows, try the basics
	@test -x $(VENV_NEWEST)/bin/python || $(PYTHON) -m venv $(VENV_NEWEST)
	@rm -rf build $(VENV_NEWEST)/wheel
	@grep '^torch==' constraints.txt > $(VENV_NEWEST)/torch.txt
	$(NEWEST) wheel --quiet $(PIP_ARGS) --no-deps --wheel-dir $(VENV_NEWEST)/wheel . || $(UNREACHED)
	$(NEWEST) install --quiet $(PIP_ARGS) --upgrade --upgrade-strategy eager --constraint $(VENV_NEWEST)/torch.txt \
		pytest $(VENV_NEWEST)/wheel/*.whl || $(UNREACHED)
	@# The line above keeps a wheel of the same version that an earlier run has installed.
	$(NEWEST) install --quiet --no-deps --no-index --force-reinstall $(VENV_NEWEST)/wheel/*.whl
	$(NEWEST) check
	$(ONE_THREAD) $(OFFLINE) SPECDEC_SMOKE_WHEEL=1 $(VENV_NEWEST)/bin/pytest -c tests/smoke/pytest.ini tests/smoke

lint: $(STAMP)  ## format check, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the sources in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## compare with transformers' generation on this machine: greedy, sampled, and in a batch
	$(BIN)/specdec bench
	$(BIN)/specdec bench --temperature 1 --no-memory
	$(BIN)/specdec bench --batch 8 --num-prompts 16 --no-memory

docs: $(STAMP)  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:  ## remove caches and builds; the environments stay
	rm -rf build dist site ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
