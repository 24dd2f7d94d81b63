# Set-up, checks and the demo. `make demo` and `make test` do everything on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD := build/dev
# CUDA kernels and TensorRT plugins: for this machine's GPU; without one for the H100. ARCH="80;89" names others.
CUDA_BUILD := build/trt
GPU := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -x '[0-9.]*' | head -n 1 | tr -d .)
ARCH ?= $(patsubst 90,90a,$(or $(GPU),90))-real
# nvcc of a toolkit if there is one, else of requirements/cuda.txt.
CUDACXX ?= $(or $(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
export CUDACXX
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help setup build plugins demo test lint format bench clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: $(VENV)/.ready ## Make .venv with the pinned packages and the hqmq-trt command

$(VENV)/.ready: requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 10) <= sys.version_info[:2] <= (3, 12); \
	  sys.exit(0 if ok else "Python 3.10-3.12 is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	@command -v c++ >/dev/null || { echo 'a C++17 compiler is needed: apt-get install g++'; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet uv
	uv pip install --quiet -r requirements/dev.txt
	uv pip install --quiet --no-deps --no-build-isolation -C wheel.cmake=false -e .
	touch $@

build: setup ## Compile the C++ libraries into hqmq_trt/_lib
	test -f $(BUILD)/build.ninja || cmake --preset dev
	cmake --build $(BUILD)
	cmake --install $(BUILD) --prefix . >/dev/null

$(VENV)/cuda/.ready: requirements/cuda.txt $(VENV)/.ready
	test -x $(VENV)/cuda/bin/python || uv venv --quiet --python $(BIN)/python $(VENV)/cuda
	$(if $(CUDACXX),grep kernel-lens,cat) requirements/cuda.txt >$(VENV)/cuda/wanted.txt
	uv pip install --quiet --no-deps --python $(VENV)/cuda/bin/python -r $(VENV)/cuda/wanted.txt
	touch $@

UNOPTIMISED ?= OFF
plugins: setup $(VENV)/cuda/.ready ## All of build, and the CUDA kernels and TensorRT plugins (no GPU needed)
	VIRTUAL_ENV=$(CURDIR)/$(VENV)/cuda PATH="$(CURDIR)/$(VENV)/cuda/bin:$$PATH" cmake --preset trt \
	  -DCMAKE_CUDA_ARCHITECTURES="$(ARCH)" -DHQMQ_PIP_CUDA=$(if $(CUDACXX),OFF,ON) -DHQMQ_CUDA_UNOPTIMISED=$(UNOPTIMISED)
	cmake --build $(CUDA_BUILD)
	cmake --install $(CUDA_BUILD) --prefix . >/dev/null

$(VENV)/.tensorrt: $(VENV)/.ready # pycuda is compiled on the spot and needs the CUDA toolkit
	uv pip install --quiet -r requirements/dev.txt tensorrt pycuda
	touch $@

demo: $(if $(GPU),plugins $(VENV)/.tensorrt,build) ## SmolLM2-135M: fp16 cache beside hq4 and hq3; TensorRT if there is a GPU
	$(BIN)/python samples/demo.py

# Tests of the GPU measure its memory, so they run one by one; worksteal keeps neighbours together, which share exports.
# Without a GPU the kernels are only compiled, linked and loaded, so compiling them in half the time is enough; `make
# plugins` then makes them fast again.
test: UNOPTIMISED := $(if $(GPU),OFF,ON)
test: plugins lint ## All tests that this machine can run
	$(BIN)/python -m pytest tests/gpu
	$(BIN)/python -m pytest --ignore=tests/gpu -n logical --maxprocesses=8 --dist=worksteal

lint: setup ## ruff, mypy, clang-format
	ruff check .
	ruff format --check .
	mypy
	find plugins tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs clang-format --dry-run --Werror

format: setup ## Apply ruff and clang-format
	ruff check --fix .
	ruff format .
	find plugins tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs clang-format -i

bench: build ## Encoding and decode attention against their baselines
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/attention.py

clean: ## Remove what was built (keeps .venv and models)
	rm -rf build hqmq_trt/_lib dist
