# Every target sets up .venv by itself. TORCH_BACKEND=cpu (or cu130, …) picks torch's build, for instance
# on a laptop that should not download CUDA.
PYTHON ?= python3
BIN := .venv/bin
UV := $(BIN)/uv
TORCH_FLAG := $(if $(TORCH_BACKEND),--torch-backend $(TORCH_BACKEND))
# torch pins its own CUDA packages; leaving them out of the lock is what lets TORCH_BACKEND=cpu do without them.
CUDA_PACKAGES := $(shell sed -n 's/^\(nvidia-[a-z0-9-]*\|cuda-[a-z-]*\|triton\)$$/\1/p' cluster/cuda-packages.txt 2>/dev/null)

.PHONY: demo test test-all lint bench lock clean

.venv/.installed: requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(UV) || $(BIN)/python -m pip install --quiet uv
	VIRTUAL_ENV=.venv $(UV) pip install --quiet $(TORCH_FLAG) -r requirements.lock
	VIRTUAL_ENV=.venv $(UV) pip install --quiet --no-deps --editable .
	touch $@
