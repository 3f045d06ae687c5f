# Needs Python 3.11, g++, cmake and make. The first verb sets up one virtual environment with
# everything else; later runs set up again only after a change of what the native library is
# built from. To use another Python, another torch, or an environment that you have:
#
#     make test PYTHON=python3.12
#     make test TORCH="torch==2.12.*"
#     make test VENV=~/envs/mine TORCH=torch

PYTHON ?= python3.11
# Beside a torch without CUDA, the Triton that the same torch with CUDA brings.
TORCH ?= torch==2.13.0 triton==3.7.1
VENV ?= .venv

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-examples sanitize sanitize-threads cuda gpu-check build wheel lint bench clean

bin := $(VENV)/bin
# One stamp per way to build, so that a change of OSS_NATIVE or OSS_CUDA builds again.
ready := $(VENV)/.environment
built := $(VENV)/.built-native-$(or $(OSS_NATIVE),1)-cuda-$(or $(OSS_CUDA),auto)

# Modules are compiled once, also where the environment says otherwise: every process that the tests
# start would spend seconds on those of torch.
export PYTHONDONTWRITEBYTECODE :=

help:  ## list these verbs
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 24

demo: $(built)  ## search schedules for the bundled digits model and show what they are worth
	$(bin)/oss search --model digits --samples 16 --teacher-steps 200 --steps 5,10 --out out/demo
	$(bin)/oss compare out/demo/digits-5.json out/demo/digits-10.json --samples 64 \
	  --picture out/demo/digits.png

# As many processes as cores, which threads that wait by spinning would take from one another.
pytest := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(bin)/pytest -q -n auto --dist worksteal

test: $(built)  ## run the tests that take seconds
	@$(pytest) -m "not slow"

test-all: $(built) sanitize-threads  ## run all tests
	@$(pytest)

test-examples: $(built)  ## run the examples; fetches a network from the package index
	@$(bin)/pytest -q python_tests/test_examples.py

# $(call sanitized,sanitizers,targets) builds what runs under them in build/sanitizers. MAKEFLAGS
# would have ninja look for a job server that make does not share.
sanitized = PATH=$(abspath $(bin)):$$PATH cmake -S . -B build/$(1) -G Ninja \
	  -DOSS_SANITIZE=$(subst +,$(comma),$(1)) -DPython_EXECUTABLE=$(abspath $(bin)/python) \
	  --log-level=WARNING > /dev/null && \
	  MAKEFLAGS= PATH=$(abspath $(bin)):$$PATH cmake --build build/$(1) --target $(2) -- --quiet
comma := ,

sanitize: $(built)  ## run the CPU and CUDA kernels on the CPU under the sanitizers
	@$(call sanitized,address+undefined,kernels_test cuda_test)
	@build/address+undefined/kernels_test & kernels=$$!; trap "kill $$kernels 2> /dev/null || :" EXIT; \
	  build/address+undefined/cuda_test; wait $$kernels

sanitize-threads: $(built)  ## run the CPU kernels' threads under the thread sanitizer
	@$(call sanitized,thread,threads_test)
	@build/thread/threads_test

cuda: $(built)  ## compile the CUDA kernels for every architecture and list what they need
	@$(bin)/python csrc/tests/cuda_resources.py

gpu-check:  ## build, prove and measure on this machine's GPU, with the Python on PATH
	@python3 bench/gpu_check.py

build: $(built)  ## build and install the package, editable, and say what was built
	@$(bin)/python -c "from oss_ext.ops import native; print(native.describe())"

wheel: $(built)  ## build sdist and wheels (native, pure Python) in dist/ and try them elsewhere
	@rm -rf dist
	@for native in 1 0; do OSS_NATIVE=$$native $(bin)/python -m build --no-isolation -q; done
	@$(bin)/python python_tests/try_wheel.py dist/*.whl

lint: $(built)  ## check style, format and types
	@$(bin)/ruff check -q
	@$(bin)/ruff format -q --check
	@$(bin)/mypy --no-error-summary

bench: $(built)  ## time the fused step against its alternatives
	@$(bin)/python bench/bench_dp_step.py

clean:  ## remove what was built; the environment stays
	@rm -rf build dist *.egg-info oss_ext/_C.*.so $(VENV)/.built-*
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -r {} +

$(ready): pyproject.toml
	@echo "Setting up $(VENV) with $(TORCH)"
	@test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	@$(bin)/pip install -qq --no-compile $(TORCH)  # most of its files are never imported
	@$(bin)/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print(*project['optional-dependencies']['build'], sep='\n')" \
	  | $(bin)/pip install -qq -r /dev/stdin
	@command -v cmake > /dev/null || $(bin)/pip install -qq cmake
	@touch $@

$(built): $(ready) pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
	@echo "Building oss_ext"
	@rm -f $(VENV)/.built-* oss_ext/_C.*.so
	@$(bin)/pip install -qq --no-build-isolation -e ".[test]"
	@touch $@
