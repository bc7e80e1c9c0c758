# What is done to this repository, one target each. `make` alone lists them.
# PYTHON=python3.12 make .venv takes another interpreter than the system's python3 (3.11 or newer).

PYTHON ?= python3
WORKERS ?= 2

# Said once, in pyproject.toml.
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
FLOOR := $(shell sed -n 's/^ *"onnxruntime>=\([^"]*\)".*/\1/p' pyproject.toml)

BIN := .venv/bin
ENVIRONMENT := .venv/made-for-pyproject
ORT_FLOOR := .ort-floor/onnxruntime-$(FLOOR)

DEMO := demo/smolvlm-tiny.lorg
DEMO_CHECKPOINT := tests/zoo/checkpoints/smolvlm-tiny
DEMO_IMAGE := tests/zoo/pictures/demo.png
DEMO_QUESTION := What does the text say?

# No telemetry, no network, no threads beside the ones asked for.
export ORT_DISABLE_TELEMETRY := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Another checkout on the path would be tested instead of this one.
unexport PYTHONPATH

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help .venv ort-floor lint format types test test-slow demo clean distclean

help: ## lists the targets
	@sed -n 's/^\([a-z.-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

.venv: $(ENVIRONMENT) ## the environment, from pyproject.toml's `dev`

# torch comes first and alone, so that nothing later chooses another version of it.
$(ENVIRONMENT): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

ort-floor: $(ORT_FLOOR) ## the oldest onnxruntime supported, beside the environment's

# Only the package: what it imports is in the environment.
$(ORT_FLOOR): $(ENVIRONMENT)
	rm -rf .ort-floor
	$(BIN)/python -m pip install --quiet --no-deps --target .ort-floor onnxruntime==$(FLOOR)
	@touch $@

lint: $(ENVIRONMENT) ## linter and formatter, changing nothing
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet

format: $(ENVIRONMENT) ## formats, and mends what the linter can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(ENVIRONMENT) ## type checker; tests/unit/test_types.py checks that it sees every folder
	$(BIN)/mypy --no-error-summary -p lorgnette

# One thread a worker; a file stays on one worker, since its fixtures may be dear.
test: export OMP_NUM_THREADS := 1
test: $(ENVIRONMENT) $(ORT_FLOOR) lint types ## everything that must pass, but for slow tests
	$(BIN)/pytest -q -n $(WORKERS) --dist loadfile

test-slow: $(ENVIRONMENT) $(ORT_FLOOR) ## the tests marked slow
	$(BIN)/pytest -q -m slow

demo: $(ENVIRONMENT) ## exports the zoo's checkpoint and asks it about a picture
	mkdir -p $(dir $(DEMO))
	$(BIN)/lorgnette export $(DEMO_CHECKPOINT) --target onnx-cpu --quant int4 --out $(DEMO) --force
	$(BIN)/lorgnette run $(DEMO) --image $(DEMO_IMAGE) --prompt "$(DEMO_QUESTION)" --stats

clean: ## removes what was built, but for the environments
	rm -rf build dist demo lorgnette.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -not -path './.ort-floor/*' -prune \
		-exec rm -rf {} +

distclean: clean ## removes the environments too
	rm -rf .venv .ort-floor
