# Everything runs in .venv, which `make setup` builds and every other target brings up to date.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.paceline-installed
ARGS   ?=
# How many tests run side by side: most wait for processes, so one more than two cores.
JOBS   ?= 3

.DEFAULT_GOAL := help

help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## make the virtual environment and install everything into it

# The stamp is touched last, so an interrupted install is done again and a finished one never is.
$(STAMP): pyproject.toml
	@echo "setting up $(VENV) (once, about a minute)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[llama,dev]'
	@touch $(STAMP)

serve: $(STAMP) ## serve Gemma 3 270M over two ranks; flags by ARGS="--port 8001 -dp 4"
	@exec $(BIN)/paceline serve $(ARGS)

test: $(STAMP) ## lint, types, dead code, and all tests, the slow ones included
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/vulture
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(or $(ARGS),-m "not alone")
	@$(if $(ARGS),true,$(BIN)/python -m pytest -m alone)

test-fast: $(STAMP) ## the tests that start no process and load no model, properties with fewer examples
	@HYPOTHESIS_PROFILE=fast $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(ARGS)

# vLLM has an environment of its own, .vllm/VERSION: 3.4 GB, made once. ARGS="--vllm-full" runs all of it.
VLLM ?= 0.32.0
test-vllm: $(STAMP) ## real vLLM on Paceline's coordinator, on CPU (installs vLLM); another version by VLLM=0.20.2
	@$(BIN)/python tests/vllm/environment.py $(VLLM)
	@VLLM=$(VLLM) $(BIN)/python -m pytest tests/vllm $(ARGS)

soak: $(STAMP) ## simulate seed after seed until stopped; a failing seed is printed with the command that replays it
	@exec $(BIN)/paceline simulate --seeds 0.. $(ARGS)

SEED   ?= 1
MINUTES ?= 2
ENGINE ?= timed
chaos: $(STAMP) ## kill and stop processes under streams: SEED=n MINUTES=m ENGINE=timed|moe|llama
	@exec $(BIN)/python -m bench.chaos --seed $(SEED) --minutes $(MINUTES) --engine $(ENGINE) $(ARGS)

fuzz: $(STAMP) ## garbage for every decoder and the machine behind it; ARGS="--inputs 1000000 [TARGET ...]"
	@exec $(BIN)/python -m tests.fuzz $(ARGS)

TARGET ?= coordinator-ranks
fuzz-guided: $(STAMP) ## one target of fuzz, led by atheris to new code (installs it); TARGET=NAME ARGS="--inputs 1000000"
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet 'atheris>=3,<4'
	@exec $(BIN)/python -m tests.fuzz.guided $(TARGET) $(ARGS)

format: $(STAMP) ## format and fix what ruff can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(STAMP) ## write the generated parts of docs/PROTOCOL.md and docs/WAVES.md anew
	@$(BIN)/python tools/protocol_reference.py docs/PROTOCOL.md
	@$(BIN)/python tools/waves_document.py docs/WAVES.md

bench-serve: $(STAMP) ## what the front-end costs per request and per streamed token
	@$(BIN)/python bench/serve.py $(ARGS)

# torch is large and only the peer here; its CPU build is enough.
bench-collective: $(STAMP) ## an all-reduce among local ranks, ours against gloo's (installs torch)
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet torch==2.13.0
	@$(BIN)/python bench/collective.py $(ARGS)

bench-freshness: $(STAMP) ## how fresh the published loads are, idle and under as many reports as there can be
	@$(BIN)/python bench/freshness.py $(ARGS)

bench-quota: $(STAMP) ## the common prefill quota of lockstep ranks against none, saturated; --trace FILE by ARGS
	@$(BIN)/python bench/quota.py $(ARGS)

# matplotlib draws the plots and is needed for nothing else. The traces are in ../shared/data, or --data FOLDER.
bench-routing: $(STAMP) ## our routing against other systems' and a bound, on real traces in virtual time; --quick for a part
	@$(BIN)/python -c 'import matplotlib' 2>/dev/null || $(BIN)/python -m pip install --quiet 'matplotlib>=3.8'
	@$(BIN)/python -m bench.routing $(ARGS)

bench-honest: $(STAMP) ## the same requests on real processes and in the simulator
	@$(BIN)/python -m bench.honest $(ARGS)

bench-vllm: $(STAMP) ## vLLM's own coordinator and ours, side by side (installs vLLM)
	@$(BIN)/python tests/vllm/environment.py $(VLLM)
	@$(BIN)/python -m bench.vllm_coordinators $(ARGS)

bench-broker: $(STAMP) ## what the broker's queue costs the coordinator, and an idle request (both alternating with arrival)
	@$(BIN)/python bench/broker_cost.py $(ARGS)
	@$(BIN)/python -m bench.broker_idle

bench-overload: $(STAMP) ## four times the work that the ranks can do, for two minutes, with each --bind (six minutes)
	@$(BIN)/python -m bench.overload $(ARGS)

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help setup serve test test-fast test-vllm soak chaos fuzz fuzz-guided format docs bench-serve bench-collective \
	bench-freshness bench-broker bench-quota bench-routing bench-honest bench-overload bench-vllm clean
