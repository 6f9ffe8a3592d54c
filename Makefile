# Everything a developer runs. `make demo` and `make test` set up .venv by themselves; `make help` lists the targets.

VENV := .venv
BASE_PYTHON ?= python3
PYTHON ?= $(VENV)/bin/python
JOBS ?= 2

ifeq ($(PYTHON),$(VENV)/bin/python)
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
else
# Another interpreter (`make gpu-test PYTHON=python3`) is used as it is: nothing is installed, not even Tersor.
export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))
endif

# An NVIDIA GPU shows as a device file, under WSL only through nvidia-smi.
GPU := $(shell { test -e /dev/nvidia0 || nvidia-smi -L; } >/dev/null 2>&1 && echo yes)

# Where there is no GPU, torch comes first, pinned, as its build for CPUs: a plain `torch` from PyPI is the CUDA build
# and pulls gigabytes of NVIDIA libraries that nothing here could use. The index holds 2.13.0+cpu, which pip prefers
# to 2.13.0; where it cannot be reached pip goes on without it, quickly thanks to the two limits.
TORCH := torch==2.13.0
TORCH_CPU := $(TORCH) --extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 20

.PHONY: help demo test rules lint vllm-wheels vllm-interfaces gpu-test bench clean

help:
	@echo 'make demo      compress the bundled model to five formats, compare them, continue a prompt with each'
	@echo 'make test      lint, type check, and every test that needs no GPU'
	@echo 'make lint      ruff (rules and format) and mypy'
	@echo 'make vllm-interfaces  releases of vLLM against what the plug-in asks of them, by their wheels (300 MB each)'
	@echo 'make gpu-test  tests on a GPU; a summary goes to bench/results/gpu_tests.json'
	@echo 'make bench     measurements on a GPU; numbers go to bench/results'
	@echo 'make clean     remove .venv and caches'
	@echo 'PYTHON=python3 uses that interpreter, as it is, instead of .venv; BASE_PYTHON=... makes .venv from another one'

demo: $(READY)
	$(PYTHON) -m tersor demo

# A test process computes on one core, since there are JOBS of them. They take modules in a row, so what the tests of a
# module share is made once. The type check is one of the tests (tests/unit/test_types.py): it keeps one core busy for
# half a minute, which the others use.
test: rules
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(PYTHON) -m pytest -n $(JOBS) --dist worksteal tests/unit tests/golden tests/compile

rules: $(READY_DEV)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

lint: rules
	$(PYTHON) -m mypy

# Wheels are read, not installed: their Python files are kept in build/. The newest release is what pip finds.
VLLM := vllm==0.26.0 vllm
WHEEL := --no-deps --only-binary=:all: --implementation cp --python-version 3.12 \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_31_x86_64 --platform manylinux2014_x86_64
UNPACK := import sys, zipfile; wheel = zipfile.ZipFile(sys.argv[1]); \
  wheel.extractall(sys.argv[2], [name for name in wheel.namelist() if name.endswith((".py", "METADATA"))])

vllm-wheels: $(READY_DEV)
	@set -e; for release in $(VLLM); do \
	  folder=build/wheels/$$release; rm -rf $$folder.made; \
	  if [ ! -d $$folder ]; then \
	    $(PYTHON) -m pip download -q $(WHEEL) -d $$folder.made "$$release"; \
	    $(PYTHON) -c '$(UNPACK)' $$folder.made/*.whl $$folder.made/files; \
	    mv $$folder.made/files $$folder; rm -rf $$folder.made; \
	  fi; \
	done

vllm-interfaces: vllm-wheels
	@set -e; for release in $(VLLM); do \
	  folder=build/wheels/$$release; \
	  echo "$$release: $$(ls $$folder | grep '^vllm-')"; \
	  PYTHONPATH=$$folder$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) -m pytest -q tests/unit/test_vllm_interfaces.py; \
	done

gpu-test: $(READY_DEV)
	$(PYTHON) bench/gpu_tests.py

# What the README's tables of linears and experts show, and the rest of Llama-2-70B and Llama-3-8B; then other formats,
# bfloat16, and more experts.
MEASURED := llama-2-70b llama-3-8b --n 1,16,32,64,128,256,1024,4096 --activations 16bit,fp8
FORMATS := fp6_e3m2 fp6_e2m3 fp6_e3m2:g128 fp5_e2m2 fp4_e2m1 int4:g128 uint4:g128 int4 int8
OTHERS := 8192x8192 57344x8192 --against none --chain pdl
MORE := $(OTHERS) --n 1,16 $(FORMATS:%=--format %)
BF16 := $(OTHERS) --n 1,16,128,1024 --dtype bfloat16
EXPERTS := qwen3-30b-a3b --n 1,8,32,64,512,2048 --against torch,humming
MODELS := qwen3-30b-a3b mixtral-8x7b gpt-oss-20b gpt-oss-120b olmoe deepseek-v3
MORE_EXPERTS := $(MODELS) --n 1,8,32,64,512,2048,8192 --against torch
# The README's picture, drawn from the first of these results; it needs no GPU.
PICTURE := 8192x8192 57344x8192 --n 1,16,32,64,128,256,1024 --chain pdl

bench: $(READY_DEV)
	$(PYTHON) -m tersor bench linear $(MEASURED) --output bench/results/linear_h200.json
	$(PYTHON) -m tersor bench linear --from bench/results/linear_h200.json $(PICTURE) --plot docs/linear_h200.svg
	$(PYTHON) -m tersor bench linear $(MORE) --output bench/results/linear_h200_more.json
	$(PYTHON) -m tersor bench linear $(BF16) --output bench/results/linear_h200_bf16.json
	$(PYTHON) -m tersor bench experts $(EXPERTS) --output bench/results/experts_h200.json
	$(PYTHON) -m tersor bench experts $(MORE_EXPERTS) --output bench/results/experts_h200_more.json
	$(PYTHON) bench/host.py
	$(PYTHON) bench/generate.py --eager
	$(PYTHON) bench/generate.py --geometry qwen3-30b-a3b --batch 1,8,32,64

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist

PROBLEM = { echo "tersor: $(1)" >&2; exit 1; }
, := ,
NAME_ONE := name one with make BASE_PYTHON=/path/to/python3

$(VENV)/.made:
	@command -v $(BASE_PYTHON) >/dev/null || \
	  $(call PROBLEM,$(BASE_PYTHON) is not on the PATH: install Python 3.10 or newer$(,) or $(NAME_ONE))
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  $(call PROBLEM,$$($(BASE_PYTHON) --version 2>&1) is too old: Python 3.10 or newer is needed$(,) $(NAME_ONE))
	@$(BASE_PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  $(call PROBLEM,$(BASE_PYTHON) has no venv or no ensurepip: install them (Debian and Ubuntu: apt install python3-venv))
	$(BASE_PYTHON) -m venv --clear $(VENV)
	@# pip before 23 does not install every pyproject.toml in place.
	@$(VENV)/bin/python -c 'import pip, sys; sys.exit(int(pip.__version__.split(".")[0]) < 23)' || \
	  $(VENV)/bin/python -m pip install --upgrade pip
	$(if $(GPU),,$(VENV)/bin/python -m pip install $(TORCH_CPU) || $(VENV)/bin/python -m pip install $(TORCH))
	@touch $@

$(VENV)/.ready: $(VENV)/.made pyproject.toml
	$(VENV)/bin/python -m pip install -e '.$(if $(GPU),[cuda])'
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.made pyproject.toml
	$(VENV)/bin/python -m pip install -e '.[dev]'
	@touch $(VENV)/.ready $@
