# Vigil. `make` alone lists the targets. Everything installs itself: uv, Python packages, servers.
SHELL := /bin/bash
.DEFAULT_GOAL := help

CACHE := $(if $(XDG_CACHE_HOME),$(XDG_CACHE_HOME),$(HOME)/.cache)/vigil
UV_VERSION := 0.13.9
UV := $(shell command -v uv || echo $(CACHE)/uv-$(UV_VERSION)/bin/uv)
REDUCTSTORE_VERSION := 1.21.5
REDUCTSTORE := $(CACHE)/reductstore-$(REDUCTSTORE_VERSION)/bin/reductstore
RUN := $(UV) run --frozen

.PHONY: help demo demo-loop demo-shadow test check bench bench-operator protos fuzz faults soak reductstore images e2e kind bench-peers bench-scale profile

help: ## This list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.synced ## Train, publish, stream 300 real solar cells through every service, and count
	$(RUN) vigil demo

demo-loop: .venv/.synced ## Train, review what is hard, export, train on that: is the next version better?
	$(RUN) vigil demo-loop

demo-shadow: .venv/.synced ## A good, a broken and a hardly seen candidate beside live: what the gates say
	$(RUN) vigil demo-shadow

test: .venv/.synced $(REDUCTSTORE) ## Unit, contract and integration tests against real Valkey and ReductStore
	VIGIL_REDUCT_BINARY=$(REDUCTSTORE) $(RUN) pytest $(ARGS)

check: .venv/.synced ## Lint (bandit's rules too), format, types, import contracts, secrets, generated code, lock
	$(UV) lock --check
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(RUN) lint-imports
	$(RUN) python -m tests.support.secrets_scan
	$(RUN) python protos/generate.py --check
	$(RUN) python charts/generate.py --check
	$(RUN) python -m vigil_operator.crd --check

bench: .venv/.synced $(REDUCTSTORE) ## The whole path beside the bare model, in one run
	VIGIL_REDUCT_BINARY=$(REDUCTSTORE) $(RUN) python -m tests.bench.bench $(ARGS)

bench-peers: .venv/.synced $(REDUCTSTORE) ## Beside MLServer, LitServe, BentoML and Ray Serve, each alone in turn
	VIGIL_REDUCT_BINARY=$(REDUCTSTORE) $(RUN) python -m tests.bench.peers.bench $(ARGS)

bench-scale: .venv/.synced $(REDUCTSTORE) ## 1, 2 and 4 workers whose model sleeps, beside what the costs foretell
	VIGIL_REDUCT_BINARY=$(REDUCTSTORE) $(RUN) python -m tests.bench.scale $(ARGS)

profile: .venv/.synced $(REDUCTSTORE) ## Flame graph per process, and CPU per frame by step
	VIGIL_REDUCT_BINARY=$(REDUCTSTORE) $(RUN) python -m tests.bench.profile $(ARGS)

bench-operator: .venv/.synced ## 200 AnomalyModels against a real API server
	$(RUN) python -m tests.bench.operator $(ARGS)

fuzz: .venv/.synced ## Hostile bytes to all that reads strangers' bytes: SECONDS=300 SEED=random
	$(RUN) python -m tests.fuzz --seconds $(or $(SECONDS),300) $(if $(SEED),--seed $(SEED))

faults: .venv/.synced $(REDUCTSTORE) ## Kills, freezes, cuts and full disks under a steady stream: SECONDS=600 SEED=random
	VIGIL_REDUCT_BINARY=$(REDUCTSTORE) $(RUN) python -m tests.faults --seconds $(or $(SECONDS),600) $(if $(SEED),--seed $(SEED))

soak: .venv/.synced $(REDUCTSTORE) ## Memory, descriptors and threads over a long stream: MINUTES=30
	VIGIL_REDUCT_BINARY=$(REDUCTSTORE) $(RUN) python -m tests.soak --minutes $(or $(MINUTES),30)

images: .venv/.synced ## Every image, by Docker or on a bare Debian machine by buildah: sizes, and what is in each
	$(RUN) python images/build.py $(ARGS)

e2e: .venv/.synced $(REDUCTSTORE) ## The platform on a real cluster: KUBECONFIG's, else a node of its own on this machine (root)
	VIGIL_E2E=1 VIGIL_REDUCT_BINARY=$(REDUCTSTORE) $(RUN) pytest tests/e2e -s $(ARGS)

KIND_CONFIG := out/kind.kubeconfig
KIND_IMAGES := ingest storage shadow review inference operator cli

kind: .venv/.synced ## The same on kind, where there is Docker
	@command -v kind >/dev/null || { echo "install kind first: https://kind.sigs.k8s.io"; exit 1; }
	mkdir -p out && kind create cluster --name vigil-e2e --kubeconfig $(KIND_CONFIG)
	$(RUN) python images/build.py --builder docker --tag e2e $(KIND_IMAGES)
	for name in $(KIND_IMAGES); do docker tag localhost/vigil/$$name:e2e localhost/vigil/$$name:e2e-next; done
	kind load docker-image --name vigil-e2e $(foreach name,$(KIND_IMAGES),localhost/vigil/$(name):e2e localhost/vigil/$(name):e2e-next)
	KUBECONFIG=$(CURDIR)/$(KIND_CONFIG) VIGIL_E2E=1 $(RUN) pytest tests/e2e -s $(ARGS); code=$$?; kind delete cluster --name vigil-e2e; exit $$code

protos: .venv/.synced ## Generate protos/gen anew
	$(RUN) python protos/generate.py

reductstore: $(REDUCTSTORE) ## Build ReductStore with cargo (about 6 minutes, once)

# Without --locked: the crate's lock file names a version that has been withdrawn.
$(REDUCTSTORE):
	@command -v cargo >/dev/null || { echo "ReductStore is built with cargo: install Rust (https://rustup.rs), then run this again"; exit 1; }
	@echo "building ReductStore $(REDUCTSTORE_VERSION) once, about 6 minutes on 2 cores"
	cargo install reductstore --version $(REDUCTSTORE_VERSION) --no-default-features --features fs-backend --root $(CACHE)/reductstore-$(REDUCTSTORE_VERSION)

$(CACHE)/uv-$(UV_VERSION)/bin/uv:
	python3 -m venv $(CACHE)/uv-$(UV_VERSION)
	$(CACHE)/uv-$(UV_VERSION)/bin/pip install --quiet uv==$(UV_VERSION)

.venv/.synced: $(UV) uv.lock pyproject.toml protos/pyproject.toml $(wildcard services/*/pyproject.toml) operator/pyproject.toml
	$(UV) sync --frozen
	@touch $@
