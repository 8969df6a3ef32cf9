# Everything a developer or CI runs; `make help` lists it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ROOT := $(if $(filter 0,$(shell id -u)),,sudo)

PACKAGES := clang llvm libbpf-dev libbpf1 linux-libc-dev python3-venv
IMAGE_PACKAGES := buildah debootstrap
TEST_PACKAGES := python3-bpfcc tcpdump iproute2 ethtool nftables iptables tmux libclang-rt-dev clang-19 zsh fish \
	mandoc man-db $(IMAGE_PACKAGES)
BACKEND_TESTS := $(addprefix tests/integration/test_integration_,collectors.py queries.py dashboards.py)
# Who has a runtime already, from Docker's packages say, keeps it.
NODE_PACKAGES := $(if $(shell command -v containerd),,containerd runc) containernetworking-plugins busybox-static
MATRIX_PACKAGES := qemu-system-x86 busybox-static kmod e2fsprogs

SOURCES := $(wildcard bpf/*.h bpf/*.c tcpio_otel/*.h tcpio_otel/*/*.c tcpio_otel/*/*.h)
# What `run` is given, as in `make run ARGS="--port 443"`.
ARGS ?=
BUILDER ?=
IMAGE ?= tcpio-otel:$(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' tcpio_otel/__init__.py)

.DEFAULT_GOAL := help

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(VENV)/.ready ## Install system packages, the virtual environment and the probe; leaves .venv/bin/tcpio-otel

# Installs those of the packages that are missing, and says so; a machine without apt is left as it is.
define install
	@missing=""; for package in $(1); do \
		dpkg-query -W -f '$${db:Status-Abbrev}' $$package 2>/dev/null | grep -q '^ii' || missing="$$missing $$package"; \
	done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
		echo "This is no Debian or Ubuntu: please install what answers to:$$missing"; exit 0; \
	fi; \
	echo "Installing system packages:$$missing"; \
	$(ROOT) apt-get update -q >/dev/null && \
	DEBIAN_FRONTEND=noninteractive $(ROOT) apt-get install -yq --no-install-recommends $$missing >/dev/null
endef

$(VENV)/.ready: pyproject.toml hatch_build.py docs/tcpio-otel.1 $(SOURCES)
	$(call install,$(PACKAGES))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; name it: make setup PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV): Python packages, and the probe by clang"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install -q --editable . --group dev
	@touch $@

# Make dies of the Ctrl-C that stops what it runs. So the agent takes the terminal for itself, and make sees how it ended.
define TAKE_TERMINAL
import os, signal, sys
if os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp():
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.tcsetpgrp(0, os.getpgrp())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
endef
export TAKE_TERMINAL

.PHONY: run
run: setup ## Run the agent (as root); the first time, set everything up
	@exec $(BIN)/python -c "$$TAKE_TERMINAL" $(ROOT) $(BIN)/tcpio-otel run $(ARGS)

.PHONY: test
test: setup ## Run every test that this machine can run; each that is skipped says why
	$(call install,$(TEST_PACKAGES))
	@$(BIN)/python -m pytest $(ARGS)

.PHONY: test-kernel
test-kernel: setup ## As root: what the probe records on this kernel, segment by segment against tcpdump
	$(call install,$(TEST_PACKAGES))
	@$(ROOT) $(BIN)/python -m pytest tests/kernel $(ARGS)

.PHONY: test-kernels
test-kernels: setup ## The same under Debian's kernels 5.10, 6.1, 6.12 and 7.2, each in a virtual machine
	$(call install,$(TEST_PACKAGES) $(MATRIX_PACKAGES))
	@$(BIN)/python -m tests.matrix $(ARGS)

.PHONY: demo-trace
demo-trace: setup ## As root: two services, a packet lost between them, and the trace that tells whose it was
	$(call install,iproute2)
	@$(BIN)/python -m tests.demo --build
	@$(ROOT) env TCPIO_CACHE="$${TCPIO_CACHE:-$$HOME/.cache/tcpio-otel}" $(BIN)/python -m tests.demo $(ARGS)

.PHONY: test-backends
test-backends: setup ## What the examples for Collectors and backends say, run with these; builds them, some forty minutes once
	$(call install,$(TEST_PACKAGES))
	@BUILD_BACKENDS=1 $(BIN)/python -m pytest $(BACKEND_TESTS) $(ARGS)

.PHONY: e2e-kubernetes
e2e-kubernetes: setup ## As root: a cluster of one node with the chart in it; runtime, kubelet and image are real
	$(call install,$(TEST_PACKAGES) $(NODE_PACKAGES))
	@$(ROOT) $(BIN)/python -m pytest tests/integration/test_integration_node.py \
		tests/kernel/test_kernel_container.py $(ARGS)

.PHONY: lint
lint: setup ## Check style, types, import direction and the layout of the C code
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/clang-format --dry-run --Werror $(SOURCES)

.PHONY: format
format: setup ## Lay out Python and C as `lint` wants it
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(SOURCES)

.PHONY: bench
bench: setup ## Measure the stages, in one run, against the OpenTelemetry SDK's own path
	@$(BIN)/python -m tests.bench $(ARGS)

# IMAGE names it, ARGS="--target bcc" gives the one with BCC, BUILDER says by what. Behind an index of packages of one's own:
# ARGS="--secret id=pip.conf,src=/etc/pip.conf --secret id=certificates,src=/etc/ssl/certs/ca-certificates.crt"
.PHONY: image
image: ## Build the container image by docker, podman or buildah
	@builder="$(BUILDER)"; \
	for found in docker podman buildah; do \
		test -z "$$builder" && $$found info >/dev/null 2>&1 && builder=$$found; \
	done; \
	test -n "$$builder" || { echo "None of docker, podman and buildah works here: please install one"; exit 1; }; \
	echo "Building $(IMAGE) by $$builder"; \
	$$builder build --tag $(IMAGE) $(ARGS) .

.PHONY: bench-image
bench-image: setup ## As root: measure the images and how long they take to start
	$(call install,$(IMAGE_PACKAGES))
	@$(ROOT) env TCPIO_CACHE="$${TCPIO_CACHE:-$$HOME/.cache/tcpio-otel}" $(BIN)/python -m tests.bench.image

.PHONY: bench-scale
bench-scale: setup ## As root: measure what docs/scale.md is worked out from, with an API server, a Collector and ClickHouse
	$(call install,iproute2)
	@$(ROOT) env TCPIO_CACHE="$${TCPIO_CACHE:-$$HOME/.cache/tcpio-otel}" $(BIN)/python -m tests.bench.scale $(ARGS)

.PHONY: clean
clean: ## Remove what setup made
	rm -rf $(VENV) tcpio_otel/capture/tcpio.bpf.o tcpio_otel/capture/tcpio.bcc tcpio_otel/libtcpio*.so build dist
