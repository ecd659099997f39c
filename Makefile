# The project's commands. All of them run in .venv, which is made on first use; `make` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# pip shows progress only together with all that it says: in a terminal, not in a log.
QUIET := $(if $(MAKE_TERMOUT),,--quiet)
INSTALL := $(BIN)/python -m pip install $(QUIET) --disable-pip-version-check --constraint constraints.txt
export HF_HUB_OFFLINE = 1

.PHONY: help demo test lint bench venv build peers ggml cuda emulate sanitize sweep fuzz tritons clean

help:  ## list the commands
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 12

demo: build  ## two models before and after replace_linear
	$(BIN)/python -m demo

test: lint  ## lint, then the tests
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: build  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: build  ## the benchmark, against torch and those of the peers that are installed
	$(BIN)/python -m benchmarks

# ---- setting up: each step leaves a stamp in .venv, and is taken again when what it was made from changes

venv: $(VENV)/torch.stamp  ## the virtual environment, with torch
build: $(VENV)/qkernels.stamp  ## the package in it, its C++ compiled
peers: $(VENV)/peers.stamp  ## the libraries that the benchmark compares with

# torch by itself and before all else, as compiling qkernels needs it; nothing that comes later may bring another.
$(VENV)/torch.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "qkernels needs Python 3.10: make PYTHON=python3.12, say")'
	@echo "== $(VENV): Python, setuptools, torch and numpy (the download is some 200 MB, more where torch comes with CUDA)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --upgrade pip setuptools wheel
	$(INSTALL) torch numpy
	@touch $@

# An install without the kernels is an install, but it leaves no stamp: the next `make` tries again.
$(VENV)/qkernels.stamp: $(VENV)/torch.stamp pyproject.toml setup.py $(wildcard csrc/*/*)
	@echo "== qkernels: compiling its kernels; installing it with what tests, demo and benchmark need"
	$(INSTALL) --no-build-isolation --editable '.[test,demo,bench]'
	@reason=$$($(BIN)/python -c 'import json; print(json.load(open("qkernels/_build_info.json"))["reason"] or "")'); \
	cuda=$$($(BIN)/python -c 'import json; print(json.load(open("qkernels/_build_info.json"))["cuda_reason"] or "")'); \
	if [ -z "$$cuda" ]; then echo "== the CUDA kernels are compiled"; else echo "== no CUDA kernels: $$cuda"; fi; \
	if [ -z "$$reason" ]; then echo "== the CPU kernels are compiled" && touch $@; else echo "== WARNING: no CPU kernels: $$reason"; fi

# zentorch would bring a torch of its own choice, hence --no-deps.
$(VENV)/peers.stamp: $(VENV)/qkernels.stamp
	@echo "== the benchmark's peers"
	$(INSTALL) --no-deps zentorch
	$(INSTALL) deprecated onnxruntime onnx openvino bitsandbytes
	@$(MAKE) --no-print-directory ggml || echo "== WARNING: ggml was not compiled; the benchmark goes without it"
	@touch $@

# Of llama-cpp-python's source package llama.cpp's kernels alone, for this CPU, as llama.cpp compiles them by default. Two changes, both for
# AMX: GCC before 13 drops the stores to a tile configuration, and torch, on the same threads, releases the one that ggml loads once.
GGML := build/ggml
GGML_SOURCE := $(GGML)/llama_cpp_python-*/vendor/llama.cpp/ggml
ggml:
	@command -v cmake >/dev/null || { echo "== ggml needs cmake"; exit 1; }
	mkdir -p $(GGML) && rm -rf $(GGML)/llama_cpp_python-*
	$(BIN)/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(GGML) --constraint constraints.txt llama-cpp-python
	tar xzf $(GGML)/llama_cpp_python-*.tar.gz -C $(GGML)
	touch $$(echo $(GGML_SOURCE))/ggml.pc.in
	sed -i 's/static thread_local bool done/bool done/' $(GGML_SOURCE)/src/ggml-cpu/amx/mmq.cpp
	cmake -S $(GGML_SOURCE) -B $(GGML)/made -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_LLAMAFILE=ON -DGGML_BUILD_TESTS=OFF \
	-DGGML_BUILD_EXAMPLES=OFF -DCMAKE_CXX_FLAGS="-fno-dse -fno-tree-dse"
	cmake --build $(GGML)/made --parallel 2 --target ggml-cpu
	mkdir -p $(VENV)/lib/ggml && cp -L $(GGML)/made/src/libggml-base.so $(GGML)/made/src/libggml-cpu.so $(VENV)/lib/ggml

cuda: build  ## the CUDA kernels compiled, no GPU needed, and what became of each
	QKERNELS_CUDA=1 $(BIN)/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m benchmarks.gpu.static_cuda

# The level is looked for beforehand: the tests would skip one that is missing.
EMULATED := build/emulated
emulate: build  ## the kernels' tests with AVX-512 emulated, for machines without it
	@echo "== a copy of the tree in $(EMULATED), compiled with csrc/emulated in place of AVX-512"
	mkdir -p $(EMULATED) && rm -rf $(EMULATED)/csrc $(EMULATED)/qkernels $(EMULATED)/tests
	cp -rp csrc qkernels tests setup.py pyproject.toml README.md LICENSE $(EMULATED)
	cd $(EMULATED) && QKERNELS_CPU=1 QKERNELS_CUDA=0 QKERNELS_EMULATE=1 $(BIN)/python setup.py --quiet build_ext --inplace
	cd $(EMULATED) && $(BIN)/python -c 'from qkernels.kernels.cpu import library; print("level:", library.level())' | grep amx
	cd $(EMULATED) && $(BIN)/python -m pytest -q tests/test_kernels.py tests/test_quantizers.py tests/test_golden.py

sweep: build  ## all cases of the GPU kernels' tests, of which `make test` takes a part
	QKERNELS_SWEEP=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/test_triton.py tests/test_cuda_s8.py tests/test_cuda_gemv.py

FUZZ_SECONDS := 60
fuzz: $(VENV)/fuzz.stamp  ## broken files for the parsers of files from outside, a minute each
	for target in gguf index; do $(BIN)/python tests/fuzz_gguf.py $$target -max_total_time=$(FUZZ_SECONDS) || exit 1; done

$(VENV)/fuzz.stamp: $(VENV)/qkernels.stamp
	@echo "== the fuzzer"
	$(INSTALL) atheris
	@touch $@

# One version lies in .venv; the others go beside it, and before it on the path.
TRITONS := 3.4.0 3.5.1 3.6.0 3.7.1 3.8.0
tritons: build  ## what other versions of Triton make of the GPU kernels
	for version in $(TRITONS); do \
		$(INSTALL) --no-deps --upgrade --target build/triton-$$version triton==$$version || exit 1; \
		echo "== Triton $$version"; \
		PYTHONPATH=build/triton-$$version $(BIN)/python -m pytest -q tests/test_triton.py -k machine_code || exit 1; \
	done

# Python itself is not instrumented: libasan must be loaded before it (and libstdc++, whose throw libasan wraps), and leaks are
# not looked for, as Python never frees all. A finding ends the process: pytest must not capture its report (--capture=sys), and
# has to name the test beforehand (-v). The copy keeps file times, so that only what changed is compiled again.
SANITIZED := build/sanitized
sanitize: build  ## the kernels' tests under address and undefined-behaviour sanitizers (GCC)
	@echo "== a copy of the tree in $(SANITIZED), compiled with the sanitizers"
	mkdir -p $(SANITIZED) && rm -rf $(SANITIZED)/csrc $(SANITIZED)/qkernels $(SANITIZED)/tests
	cp -rp csrc qkernels tests setup.py pyproject.toml README.md LICENSE $(SANITIZED)
	cd $(SANITIZED) && QKERNELS_CPU=1 QKERNELS_CUDA=0 \
	QKERNELS_CXXFLAGS="-DQKERNELS_SMALL_TILES -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -fno-var-tracking -O1 -g -w" \
	$(BIN)/python setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 $(BIN)/python -m pytest -v --capture=sys tests/test_kernels.py tests/test_quantizers.py tests/test_golden.py

clean:  ## remove what was made, .venv included
	rm -rf build dist *.egg-info qkernels/_C* qkernels/_build_info.json $(VENV)
