# make demo    the main job, on this machine, in namespaces of its own      (root)
# make test    lint, then every test                                        (root for all but the first stages)
# Each target does the set-up that it needs; see README.md.

SHELL := /bin/sh
PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest
# Where one test starts dozens of processes, and another stage runs beside it.
PATIENT := --timeout=400
ARTIFACTS := artifacts

# Hundreds of processes start here, on the emulated machine each for seconds, if every one has to compile our modules.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-pure test-properties test-root test-box test-api test-api-versions test-vm test-vm-matrix lint bench vm clean

help:
	@printf 'make setup  install what the machine lacks, make .venv\nmake demo   a small cluster on this machine, served by ebpflb\n'
	@printf 'make test   static checks and all tests\nmake lint   static checks\nmake bench  benchmarks\nmake vm     a node in an emulated machine with another kernel (VM=6.1)\nmake clean  remove what make made\n'

setup:
	@scripts/setup

demo: setup
	@.venv/bin/ebpflb demo $(DEMO)

# Two stages at once, since most of what they do is to wait; told one after the other. Every one runs, also after one
# that failed, so that one run tells everything. AT_ONCE=1 for one after the other. The box, which takes as long as all
# the others together, begins early: only who touches the kernel and ends last can tell what was left behind there.
test: setup
	@$(PYTHON) -m tests.stages $(if $(AT_ONCE),--at-once $(AT_ONCE)) \
		lint test-pure test-box test-api test-root test-properties test-vm

test-pure: setup
	@echo '== pure tests: no root, no kernel'
	@mkdir -p $(ARTIFACTS)
	@$(PYTEST) --junitxml=$(ARTIFACTS)/pure.xml

test-properties: setup
	@echo '== properties, with many more examples than pytest alone tries'
	@mkdir -p $(ARTIFACTS)
	@EBPFLB_FUZZ=$${EBPFLB_FUZZ:-150000} $(PYTEST) $(PATIENT) tests/property tests/plan -m 'not root and not bpf_load' \
		--junitxml=$(ARTIFACTS)/properties.xml

test-root: setup
	@echo '== tests that load programs, send packets and run daemons (root)'
	@[ "$$(id -u)" = 0 ] || { echo 'make test: these need root; run it with sudo' >&2; exit 1; }
	@mkdir -p $(ARTIFACTS)
	@$(PYTEST) $(PATIENT) -m '(root or bpf_load or slow or fuzz) and not box and not vm and not api' \
		--ignore=tests/property --ignore=tests/plan --junitxml=$(ARTIFACTS)/root.xml

test-box: setup
	@echo '== tests with clusters of namespaces, in every proxy mode (root)'
	@[ "$$(id -u)" = 0 ] || { echo 'make test: these need root; run it with sudo' >&2; exit 1; }
	@mkdir -p $(ARTIFACTS)
	@$(PYTEST) $(PATIENT) -m 'box and not vm and not api' --junitxml=$(ARTIFACTS)/box.xml

# IPVS, and whatever needs another kernel than this machine's: emulated, so that no hypervisor is needed.
test-vm: setup
	@echo '== tests on another kernel, in an emulated machine (root)'
	@[ "$$(id -u)" = 0 ] || { echo 'make test: these need root; run it with sudo' >&2; exit 1; }
	@mkdir -p $(ARTIFACTS)
	@$(PYTHON) -m tests.vm.kernels
	@status=0; $(PYTEST) $(PATIENT) -m vm tests/machines --junitxml=$(ARTIFACTS)/machines.xml || status=1; \
		$(PYTHON) -m tests.vm.stage || status=1; exit $$status

# Every kernel of the matrix (MATRIX='5.10 6.1' for some), and more on each: hours.
test-vm-matrix: setup
	@mkdir -p $(ARTIFACTS)
	@$(PYTHON) -m tests.vm.stage --matrix $(MATRIX)

test-api: setup
	@echo '== tests with a real kube-apiserver, etcd and kube-controller-manager (root)'
	@[ "$$(id -u)" = 0 ] || { echo 'make test: these need root; run it with sudo' >&2; exit 1; }
	@mkdir -p $(ARTIFACTS)
	@nice $(PYTHON) -m tests.api.binaries >/dev/null
	@$(PYTEST) $(PATIENT) -m api --junitxml=$(ARTIFACTS)/api.xml

# The lists and watches with older API servers too: each takes minutes to build, once.
test-api-versions: setup
	@mkdir -p $(ARTIFACTS)
	@$(PYTHON) -m tests.api.binaries --all >/dev/null
	@EBPFLB_API_VERSIONS=all $(PYTEST) -m api tests/api/test_versions.py --junitxml=$(ARTIFACTS)/api-versions.xml

lint: setup
	@scripts/lint

bench: setup
	@$(PYTHON) -m bench $(BENCH)

# What Vagrant does with one node, where there is no hypervisor: docs/vagrant.md.
vm: setup
	@[ "$$(id -u)" = 0 ] || { echo 'make vm: needs root; run it with sudo' >&2; exit 1; }
	@$(PYTHON) -m tests.vm.machine --kernel $(or $(VM),6.12) -- deploy/vagrant/light.sh

clean:
	rm -rf .venv build artifacts .pytest_cache .mypy_cache .ruff_cache .hypothesis ebpflb.egg-info
	rm -f ebpflb/dataplane/bpf/_maglev*.so
	find ebpflb tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
