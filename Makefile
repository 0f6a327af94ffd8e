.DEFAULT_GOAL := help
.PHONY: help setup demo clients test coverage check format serve bench proto lock licences clean

BIN := .venv/bin
CONFIG ?= deployments/local.yaml
# Most tests wait most of the time; tests/lanes.py says who runs beside whom. ARGS="-n 0" runs them in one process.
# The fast ones wait for more of their time than those that start clusters.
WORKERS ?= $(if $(findstring not slow,$(ARGS)),3,2)
ARGS ?=

help:  ## what there is
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup:  ## make .venv from the lock (PYTHON=... chooses the interpreter)
	@scripts/setup.sh

demo: setup  ## serve the embedded model and summarize a corpus, end to end
	@$(BIN)/python scripts/demo.py $(ARGS)

test: setup  ## run every test (ARGS="-m 'not slow'" for the fast ones)
	@# Thousands of processes are started; where nothing may be cached each would compile hycluster anew.
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --durations=20 --durations-min=1 $(ARGS)

clients: setup  ## install LangChain, LiteLLM, Vercel's AI SDK, ..., which tests/clients calls the service with
	@scripts/clients.sh

coverage: setup  ## line coverage, of subprocesses and Ray's actors too, without the tests that start clusters
	@scripts/coverage.sh $(ARGS)

check: setup  ## lint, format, names, types, and who imports whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python scripts/names.py
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --no-cache

format: setup  ## format the code, and fix what ruff can fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

serve: setup  ## run the cluster in the foreground (CONFIG=deployments/local.yaml)
	@$(BIN)/hycluster serve $(CONFIG) $(ARGS)

bench: setup  ## side-by-side benchmarks
	@$(BIN)/python -m bench.gateway $(ARGS)
	@$(BIN)/python -m bench.batch $(ARGS)
	@$(BIN)/python -m bench.batch_commit --engine simulated $(ARGS)
	@$(BIN)/python -m bench.batch_commit --engine real $(ARGS)

proto: setup  ## generate the gRPC code from the .proto
	@scripts/gen_proto.sh

lock: setup  ## resolve requirements/*.lock anew (UPGRADE=1 moves every version)
	@scripts/lock.sh

licences: setup  ## write requirements/licences.md from the locks (ARGS="--gpu FOLDER" after a change of gpu.lock)
	@$(BIN)/python scripts/licences.py $(ARGS)

clean:  ## remove what runs leave behind (not .venv)
	rm -rf out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find hycluster tests scripts bench -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
