# Two commands do all set-up: `make demo` and `make test`. PYTHON may name any interpreter >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test lint types bench gpu gpu-kernels gpu-instructions newest clean

# torch first and exactly: a range would pull gigabytes of CUDA packages.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/kvist demo

test: $(VENV)/ready lint
	$(BIN)/python -m pytest -n $(JOBS)

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

# One layer's decode attention against others', alone; and warp instructions from machine code, which needs no GPU.
gpu-kernels:
	PYTHONPATH=src $(PYTHON) -m benchmarks kernels --out runs/kernels.json

gpu-instructions:
	PYTHONPATH=src $(PYTHON) -m benchmarks instructions --out runs/instructions.json

# The kernel tests with the newest Triton and numpy, whatever the constraints say.
newest:
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade -e '.[dev]' triton numpy
	$(VENV)-newest/bin/python -m pytest tests/kernels -n $(JOBS)

clean:
	rm -rf $(VENV) $(VENV)-newest out
