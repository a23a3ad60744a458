# make            what there is
# PYTHON=...      the interpreter that .venv is made with (3.11 or newer)
# PYTEST_ARGS=... added to pytest's command line
# GPU_ARGS=...    added to that of benchmarks.gpu: --dry, --only PART, --minutes N, --output FOLDER, --rehearse

SHELL := /bin/bash
VENV := .venv
STAMP := $(VENV)/.installed
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check format drills faults slurm-quick slurm gpu site wheel clean

help:
	@echo "make setup       create .venv with everything that is needed (once)"
	@echo "make quickstart  train, convert and prompt a small model on this machine"
	@echo "make test        the test suite"
	@echo "make check       ruff, ruff format and mypy"
	@echo "make format      apply ruff's fixes and formatting"
	@echo "make drills      the slow tests"
	@echo "make faults      fault drills: kills, full disks, damage, signals, stale starts; ends with a table"
	@echo "make slurm-quick the SLURM tests that take seconds each, on a real cluster of namespaces (root)"
	@echo "make slurm       these and SLURM drills on a real cluster of namespaces (root): preemption, dead nodes; half an hour"
	@echo "make gpu         prove and time everything on this machine's GPU, 8 minutes; sets nothing up"
	@echo "make site        the documents as a site in build/site, with its links checked"
	@echo "make wheel       wheels in dist/ with the C++ operation compiled, for machines without a compiler"
	@echo "make clean       remove .venv, caches and runs/quickstart"

# pip's hundreds of lines: a line that is rewritten on a terminal, and the two parts that take time.
define PIP_IN_FEW_WORDS
/^Collecting/ { packages++; if (terminal) printf "\r\033[K[setup] fetching package %d: %s", packages, $$2 }
/^Installing collected/ { printf "%s[setup] unpacking %d packages\n", terminal ? "\r\033[K" : "", packages }
{ fflush() }
endef
export PIP_IN_FEW_WORDS

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@python=; for candidate in $(CANDIDATES); do \
		if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "No Python 3.11 or newer among: $(CANDIDATES). Install one, or say where: make setup PYTHON=/path/to/python" >&2; exit 1; \
	fi; \
	if ! $$python -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "$$python has no venv module (on Debian and Ubuntu: apt-get install python3-venv)." >&2; exit 1; \
	fi; \
	echo "[setup] creating $(VENV) with $$($$python --version)"; \
	$$python -m venv $(VENV)
	@echo "[setup] installing into $(VENV): torch, deepspeed, megatron-core and the rest (1 to 10 minutes)"
	@set -o pipefail; \
	$(VENV)/bin/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev]' | \
		awk -v terminal="$$([ -t 2 ] && echo 1)" "$$PIP_IN_FEW_WORDS"
	@touch $@
	@echo "[setup] done: $(VENV)/bin/memoryformer"

quickstart: $(STAMP)
	@$(VENV)/bin/python -m mf_train quickstart

# One thread each: tests of threads set their number, and where threads wait for one another they sleep, since spinning
# takes a processor from the others.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest
# Tests of one file stay on one worker. More workers than processors: some tests mostly wait.
WORKERS := $(if $(findstring no:xdist,$(PYTEST_ARGS)),,-n $(shell expr $$(nproc) + 1) --dist loadfile --no-loadscope-reorder)
test: $(STAMP)
	$(PYTEST) $(WORKERS) $(PYTEST_ARGS)

drills: $(STAMP)
	$(PYTEST) $(WORKERS) -m "(slow or hypothesis) and not faults and not slurm" --hypothesis-profile=full $(PYTEST_ARGS)

faults: $(STAMP)
	$(PYTEST) -m faults tests/faults $(PYTEST_ARGS)

# Jobs of the cluster take their threads from its nodes' processors.
slurm-quick: $(STAMP)
	$(VENV)/bin/python -m pytest -m "slurm and not slow" tests/launch tests/study $(PYTEST_ARGS)

slurm: $(STAMP)
	$(VENV)/bin/python -m pytest -m slurm tests/launch tests/study $(PYTEST_ARGS)

# Without set-up: a machine with a GPU may have no network. The project's environment where there is one.
gpu:
	@$(or $(PYTHON),$(wildcard $(VENV)/bin/python),python3) -m benchmarks.gpu $(GPU_ARGS)

$(VENV)/.docs: $(STAMP)
	$(VENV)/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

site: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict
	@echo "Open build/site/index.html in a browser."

check: $(STAMP)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

wheel: $(STAMP)
	@$(VENV)/bin/python -m mf_train.kernels.wheel

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache runs/quickstart
	find mf_train tests -name __pycache__ -type d -prune -exec rm -rf {} +
