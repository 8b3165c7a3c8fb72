# The same verbs here and in CI. `make` prints them.
SHELL := bash
PY := .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help setup lock fmt lint types contracts generate verify test test-fast test-cluster cluster-up cluster-down try demo bench soak docs release clean

help: ## print this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: ## make .venv from the hashed requirements (quick when nothing changed)
	@hack/setup.sh

lock: ## compile requirements/*.txt anew
	hack/lock.sh

fmt: setup ## sort imports, and mend what else ruff can
	$(PY) -m ruff check --fix -q .

lint: setup ## ruff
	$(PY) -m ruff check .

types: setup ## mypy strict
	$(PY) -m mypy api/rlhf_api operator/rlhf_operator worker/rlhf_worker cli/rlhf_client cli/rlhf_cli hack tests

contracts: setup ## import contracts (who may import whom)
	.venv/bin/lint-imports --no-cache

generate: setup ## CRD, RBAC, manifests and reference pages from their one source
	$(PY) -m hack.generate

verify: lint types contracts generate ## everything that needs no test run; fails on any diff of generated files
	git diff --exit-code

test-fast: setup ## pure tests: seconds
	$(PY) -m pytest -q tests/api tests/control tests/charts tests/cli tests/worker -m "not ray and not vllm and not cluster"

test-cluster: setup ## the real API server and kubelet, tiny jobs to Succeeded
	$(PY) -m pytest -q tests/cluster

test: setup ## everything, from nothing
	@$(PY) -m hack.cluster.binaries --give-way >/dev/null 2>&1 & # beside what does without; who needs them waits, and says what is wrong
	@$(MAKE) --no-print-directory verify
	$(PY) -m pytest -q tests --durations=40 --durations-min=10

cluster-up: setup ## a single-node Kubernetes on this machine (CLUSTER=embedded|kind|current)
	$(PY) -m hack.cluster up

cluster-down: ## and away with it
	$(PY) -m hack.cluster down

try: setup ## a rising reward in minutes, on this machine, without a cluster (JOB=tiny-ppo: another sample)
	$(PY) -m hack.first_run $(JOB)

demo: ## from nothing to Succeeded: SmolLM2 learns arithmetic, watched live (JOB=tiny-ppo: another sample)
	@hack/setup.sh hack.cluster.binaries
	$(PY) -m hack.demo $(JOB)

bench: setup ## what the operator costs; hack.bench.scale, .heartbeats, .handover and others: docs/benchmarks.md
	$(PY) -m hack.bench

soak: setup ## faults at random over tiny jobs on the running cluster (ARGS="--faults 200 --seed 1")
	$(PY) -m hack.soak $(ARGS)

docs: setup ## the site of docs/ into site/; a broken link is a failure
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

release: setup ## wheels, chart, manifest, bills of materials and checksums into dist/ (ARGS="--sign KEY"); docs/release.md
	$(PY) -m hack.release build dist $(ARGS)

clean: cluster-down ## remove the environment too
	rm -rf .venv .venv-uv
