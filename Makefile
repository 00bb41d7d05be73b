# `make demo` and `make test` do all the set-up they need; `make help` lists the rest.
PYTHON ?= python3
BIN := .venv/bin
# The other supported version, for `make test-vllm`.
VLLM ?= 0.31.0
# Two files at a time, most of them busy on one core; those with Ray clusters, which count on both
# cores, one by one. PYTHONFAULTHANDLER: pytest's own handler is gone before the interpreter ends,
# which can crash too.
define run-tests
	PYTHONFAULTHANDLER=1 $(1)/pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/serving $(2)
	PYTHONFAULTHANDLER=1 $(1)/pytest $(2) tests/serving
endef

.PHONY: help setup demo test test-full test-gpu test-vllm lint format clean

help:  ## list the commands
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  ##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 10

setup:  ## make .venv, with the CUDA or the CPU build of vLLM
	@$(PYTHON) tools/setup_env.py

demo: setup  ## train an adapter, serve it, search and chat with it: about 12 minutes on 2 cores
	$(BIN)/gem-vllm demo

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_types.py

test: lint  ## lint, then the tests
	$(call run-tests,$(BIN))

test-full: lint  ## lint, then all tests, those too that take minutes each
	$(call run-tests,$(BIN),-m "not gpu")

test-gpu: setup  ## the tests that need a CUDA device; without one they are skipped
	$(BIN)/pytest -m gpu tests/gpu

test-vllm:  ## the tests on the oldest vLLM that is supported, or on VLLM=VERSION
	@$(PYTHON) tools/setup_env.py --vllm $(VLLM)
	$(call run-tests,.venv-vllm-$(VLLM)/bin)

format: setup  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built; keep the environments, models and runs
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*/*' -not -path './runs/*' -prune -exec rm -rf {} +
