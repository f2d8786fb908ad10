# Each target sets up .venv by itself. PYTHON picks the interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# Compiling every module of every package to bytecode takes two thirds of the whole set-up.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
PROMPT := Name the seven days of the week and the twelve months of the year.

.PHONY: help demo test test-sglang fuzz lint bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## set up, then generate text with AR and I-DLM and compare them
	@echo "== demo: the same prompt with the plain model and with I-DLM (the first run fetches the model)"
	@$(BIN)/idlm generate --compare --stride 4 --layout linear "$(PROMPT)"

test: $(VENV)/.dev  ## set up, then run the tests
	@echo "== test: pytest in two processes, without the tests that need a GPU"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

test-sglang: .venv-sglang/.done  ## set up SGLang (5 GB, Python 3.12), then run the tests of our plug-in
	@echo "== test-sglang: pytest with SGLang's own server, on the CPU"
	@.venv-sglang/bin/python -m pytest -m sglang tests/integrations/sglang

fuzz: $(VENV)/.dev  ## set up, then send the server 2,000 requests made from its schema
	@echo "== fuzz: schemathesis against the default model"
	@IDLM_FUZZ=1 $(BIN)/python -m pytest -s tests/server/test_schema.py

lint: $(VENV)/.dev  ## set up, then check style and types
	@echo "== lint: ruff and mypy"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

bench: $(VENV)/.dev  ## set up, then run the benchmarks of this machine's CPU
	@echo "== bench: linear layers by rows, then decoding speed (the other scripts need data or a GPU)"
	@$(BIN)/python benchmarks/cpu_linear.py
	@$(BIN)/python benchmarks/decode_speed.py

clean:  ## remove the environment and all caches
	@echo "== clean: removing $(VENV) and the caches"
	@rm -rf $(VENV) .venv-sglang build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache

# torch goes first and pinned: an unpinned torch may pick a build with gigabytes of CUDA libraries.
# The pip that comes with Python 3.11 takes twice as long to find out which versions fit together.
$(VENV)/.torch:
	@echo "== setup: $(VENV) with $(TORCH)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: idlm needs Python 3.11 or newer and '$(PYTHON)' is not; name another one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip
	@$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.torch
	@echo "== setup: idlm and what the demo needs"
	@$(PIP) "$(TORCH)" -e ".[demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.torch
	@echo "== setup: idlm and what development needs"
	@$(PIP) "$(TORCH)" -e ".[demo,dev,train,server]"
	@touch $@

# SGLang pins its torch, which the package index has with CUDA's libraries only.
SGLANG_PYTHON ?= python3.12
SGLANG_TESTS := tests/integrations/sglang
.venv-sglang/.done: $(SGLANG_TESTS)/requirements.txt pyproject.toml
	@echo "== setup: .venv-sglang"
	@$(SGLANG_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || { \
	  echo "error: these tests need Python 3.12 and '$(SGLANG_PYTHON)' is not; name one: make test-sglang SGLANG_PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(SGLANG_PYTHON) -m venv .venv-sglang
	@.venv-sglang/bin/python -m pip install --quiet --no-compile -r $(SGLANG_TESTS)/requirements.txt
	@.venv-sglang/bin/python -m pip install --quiet --no-compile --no-deps sglang==0.5.17 -e .
	@touch $@
