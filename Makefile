# Everything runs in .venv, made on first use. `make help` lists the commands.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
CSRC := $(wildcard csrc/*/*)
export HF_HUB_OFFLINE = 1

help:            ## this list
	@grep -E '^[a-z-]+: .*##' Makefile | sed 's/:.*##/\t/'

$(VENV)/ready: pyproject.toml constraints.txt
	@echo "== making $(VENV): torch first, by its exact version (a CPU build)"
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt setuptools wheel
	$(PIP) install -q torch==2.13.0
	$(PIP) install -q -c constraints.txt numpy
	@touch $@

$(VENV)/installed: $(VENV)/ready setup.py $(CSRC)
	@echo "== building and installing qkernels"
	$(PIP) install -q --no-build-isolation -c constraints.txt -e ".[test,demo,bench]"
	@touch $@

venv: $(VENV)/ready         ## the virtual environment with torch
build: $(VENV)/installed    ## the package, compiled, with what tests and demo need

demo: build      ## MiniLM and a 1 B decoder before and after replace_linear
	$(BIN)/python -m demo

test: build      ## lint, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

bench: build     ## the benchmark (see python -m benchmarks --help)
	$(BIN)/python -m benchmarks

peers: build     ## other libraries, for the benchmark to compare with
	$(PIP) install -q --no-deps zentorch==2.13.0.2
	$(PIP) install -q -c constraints.txt deprecated onnxruntime==1.32.0 onnx openvino==2026.4.1 bitsandbytes==0.50.2

sanitize: $(VENV)/installed ## the C++ kernels under ASan and UBSan
	tools/sanitize $(BIN)/python

clean:           ## remove what was built
	rm -rf build *.egg-info qkernels/_C*.so qkernels/_build_info.json $(VENV)

.PHONY: help venv build demo test bench peers sanitize clean
