# make setup    an environment in .venv, with everything that the other targets need
# make demo     verify, train, compare; writes report/index.html
# make test     the tests, but for the slow ones; `make test-all` runs those too
# make test-isa        the tests of the C++ kernels on each smaller instruction set
# make sanitize        calls of every C++ kernel under the sanitizers of addresses and of undefined behaviour
# make test-emulation  the CUDA kernels, run on the CPU
# make cuda     manual_ops._C_cuda, wherever there is nvcc: with a torch without CUDA it is built and cannot be used
# make cuda-report     registers, shared memory and spills of each CUDA kernel; writes benchmarks/results/
# make lint     ruff, clang-format, mypy
# make bench    the full benchmarks; writes benchmarks/results/cpu/ and README's tables
# make test-gpu        builds for this machine's GPU and runs the tests on it; FLAGS go to pytest
# make sanitize-gpu    the kernels' tests under compute-sanitizer
# make bench-gpu       builds, tests, measures on this machine's GPU in under 9 minutes; OUT=folder gets a copy
# make clean    what a build leaves behind
#
# PYTHON names the interpreter that .venv is made with. One that has torch already is used as it is: manual_ops is
# installed into its own environment, and its torch stays. The targets for a GPU install nothing into it and need no
# network: they build in place, and leave out by name the tests whose packages it lacks.

PYTHON ?= python3
TORCH ?= torch==2.13.0

ifneq ($(filter command line environment,$(origin PYTHON)),)
HAS_TORCH := $(shell $(PYTHON) -c 'import importlib.util as u; print(u.find_spec("torch") and "yes" or "")')
endif

ifeq ($(HAS_TORCH),yes)
RUN := $(PYTHON)
READY := build/ready$(subst /,-,$(PYTHON))
else
VENV := .venv/bin/python
RUN := $(VENV)
READY := build/ready
endif

# What the targets for a GPU wait for.
GPU_READY := $(if $(VENV),$(READY))

SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

.DELETE_ON_ERROR:
.PHONY: setup demo test test-all test-isa sanitize test-emulation cuda cuda-report lint bench \
	build-gpu test-gpu sanitize-gpu bench-gpu clean

setup: $(READY)

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install "$(TORCH)"

# The build runs in this environment: against the torch that will load the library.
$(READY): $(SOURCES) | $(VENV)
	$(RUN) -m pip install "setuptools>=77.0.3,<82" wheel ninja
	$(RUN) -m pip install -e ".[tools,dev]" --no-build-isolation
	@mkdir -p build
	@touch $@

demo: $(READY)
	$(RUN) -m manual_ops demo

test: $(READY)
	$(RUN) -m pytest -n auto -m "not slow" --ignore=tests/cuda_emulation

test-all: $(READY)
	$(RUN) -m pytest -n auto --ignore=tests/cuda_emulation
	$(RUN) -m pytest tests/cuda_emulation

# The files that run native kernels for what they compute, rather than for the features around them.
KERNEL_TESTS := $(addprefix tests/test_,$(addsuffix .py,activation average_pool batch_norm convolution cross_entropy \
	determinism kernel kernel_calls linear loss max_pool softmax))

test-isa: $(READY)
	MANUAL_OPS_ISA=avx2 $(RUN) -m pytest -n auto -m "not slow" $(KERNEL_TESTS)
	MANUAL_OPS_ISA=plain $(RUN) -m pytest -n auto -m "not slow" $(KERNEL_TESTS)

SANITIZE := -fsanitize=address,undefined -fno-omit-frame-pointer
sanitize: $(READY)
	MANUAL_OPS_CUDA=0 MANUAL_OPS_CXXFLAGS="-O1 $(SANITIZE)" MANUAL_OPS_LDFLAGS="$(SANITIZE)" \
		$(RUN) setup.py build_ext --build-lib build/sanitized --build-temp build/sanitized-objects
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		MANUAL_OPS_LIBRARY=build/sanitized/manual_ops/_C.so \
		$(RUN) -m pytest -n auto -m "not slow" tests/test_kernel_calls.py

test-emulation: $(READY)
	$(RUN) -m pytest tests/cuda_emulation

cuda: $(READY)
	MANUAL_OPS_CUDA=1 $(RUN) setup.py build_ext --inplace
	$(RUN) tests/check_cuda_library.py

cuda-report: $(READY)
	$(RUN) benchmarks/cuda_report.py

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -c 'import clang_format as c; c.clang_format()' --dry-run -Werror $(shell find csrc tests/cuda_emulation -name "*.h" -o -name "*.cpp" -o -name "*.cu")
	$(RUN) -m mypy

BATCH_16 := resnet18 resnet50 mobilenet_v2 vgg11 --batch 16 --rounds 3
bench: $(READY)
	$(RUN) benchmarks/run.py
	$(RUN) benchmarks/networks.py
	$(RUN) benchmarks/networks.py --channels-last
	$(RUN) benchmarks/networks.py $(BATCH_16)
	$(RUN) benchmarks/networks.py $(BATCH_16) --channels-last
	$(RUN) benchmarks/accuracy.py
	$(RUN) benchmarks/readme.py

build-gpu: $(GPU_READY)
	$(RUN) benchmarks/gpu.py --build

test-gpu: build-gpu
	MANUAL_OPS_TEST_DEVICES=cuda PYTHONPATH=. $(RUN) -m pytest -m "not slow" --ignore=tests/cuda_emulation $(FLAGS)

sanitize-gpu: build-gpu
	PYTHONPATH=. $(RUN) tests/sanitize_gpu.py

bench-gpu: $(GPU_READY)
	$(RUN) benchmarks/gpu.py $(if $(OUT),--also-to "$(OUT)")

clean:
	rm -rf build dist report *.egg-info manual_ops/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
