# Every target sets up .venv by itself. TORCH_BACKEND=cpu (or cu130, …) picks torch's build, for instance for a laptop
# that should not download CUDA.
PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/uv
TORCH_FLAG := $(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND))
COMPILE := VIRTUAL_ENV=.venv $(UV) pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	--no-emit-index-url --no-annotate --no-header --quiet

.PHONY: demo test test-all soak lint bench lock

demo: .venv/.installed
	$(BIN)/python pipelines/demo.py

test: .venv/.installed
	$(BIN)/python -m pytest -q

test-all: .venv/.installed
	$(BIN)/python -m pytest -q -m ""

soak: .venv/.installed
	$(BIN)/python -m pytest -q -m soak tests/pipelines/test_soak.py

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.tables

# torch pins its CUDA packages itself; a lock without them serves TORCH_BACKEND=cpu as well.
lock: .venv/.installed
	$(COMPILE) --upgrade -o requirements.lock \
		$$($(COMPILE) | sed -nE 's/^(nvidia-[a-z0-9-]+|cuda-[a-z-]+|triton)==.*/--no-emit-package \1/p')

# Compiled once here: where PYTHONDONTWRITEBYTECODE is set, as in many containers, each Ray worker would compile torch
# and all the rest anew, and start in three times the time. The first picture compiles everything mode's kernels.
.venv/.installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(UV) || $(BIN)/python -m pip install --quiet uv
	VIRTUAL_ENV=.venv $(UV) pip install --quiet --compile-bytecode $(TORCH_FLAG) --requirement requirements.lock
	VIRTUAL_ENV=.venv $(UV) pip install --quiet --no-deps --editable .
	$(BIN)/tinysam everything docs/overlay.jpg --points-per-side 8 --out .venv/overlay.png
	touch $@
