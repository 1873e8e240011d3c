# Every target does its own set-up, inside this folder: .venv* and build/. `make help` lists them.

PYTHON ?= python3
HOST   ?= 127.0.0.1
PORT   ?= 6380
# More options for pytest: make test-py ARGS="-k reader -x"
ARGS   ?=
# What is measured: make bench WORKLOADS=tls
WORKLOADS ?=
# The interpreters for `make test-pythons`; if empty, all that are found.
PYTHONS ?=
# How many processes build and test at a time.
JOBS   ?= $(shell nproc)

export PYTHON PYTHONS CC JOBS
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
export PIP_NO_INPUT := 1
# Warnings of pip (not its errors) are about the machine's set-up, not ours.
PIP := .venv/bin/python -m pip -qq

# What the compiled core is made of; `csrc` itself notices files that went away.
CORE := pyproject.toml CMakeLists.txt csrc csrc/python $(wildcard csrc/*.[ch] csrc/python/*.[ch])
C_FILES = $(shell find csrc tests/c benchmarks -name '*.[ch]')
PY_FILES = $(shell find anypoll -name '*.py' -o -name '*.pyi')

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

.PHONY: help
help:
	@echo 'make serve         start the example key-value server on $(HOST):$(PORT)'
	@echo 'make test          what a commit needs, in minutes; its parts:'
	@echo '  make lint            ruff, mypy, pyright, import-linter, clang-format'
	@echo '  make docs            the documentation, into build/docs; a warning is an error'
	@echo '  make test-dist       the sdist and the wheel: contents, build, import'
	@echo '  make test-c-plain    the C tests'
	@echo '  make test-py         pytest on asyncio, uvloop and trio (ARGS="-k name")'
	@echo 'make test-sanitizers  the C tests and pytest with sanitizers; its parts:'
	@echo '  make test-c-asan     the C tests with ASan+UBSan'
	@echo '  make test-c-tsan     the C tests with TSan'
	@echo '  make test-asan       pytest with ASan+UBSan, each test on one loop (LOOPS=all: on all)'
	@echo '  make test-tsan       pytest with TSan, the same'
	@echo 'make test-everything  both, the sanitizers on all loops too'
	@echo 'make soak          minutes of churn on the three loops (SECONDS=180 SEED=...)'
	@echo 'make soak-asan     the same with ASan+UBSan'
	@echo 'make soak-tsan     the same with TSan'
	@echo 'make test-pythons  one wheel, tested on every CPython >= 3.11 found here (PYTHONS=...)'
	@echo 'make bench         a short comparison with others (WORKLOADS=tls, ARGS="--help")'
	@echo 'make bench-instructions  instructions per request, by valgrind, however busy the machine is'
	@echo 'make bench-check   whether the committed ratios hold, in minutes'
	@echo 'make bench-all     everything, in hours, and from it the charts and tables of the docs'
	@echo 'make charts        the charts and tables alone, from benchmarks/results.json'
	@echo 'make format        rewrite the sources as `make lint` wants them'
	@echo 'make clean         remove all that was built'

# --- set-up --------------------------------------------------------------------------------------

.PHONY: check-c
check-c:
	@scripts/check-machine c

.venv/.base: pyproject.toml
	@scripts/check-machine python
	@echo 'Setting up .venv'
	@test -x .venv/bin/python || "$(PYTHON)" -m venv .venv
	@$(PIP) install -U 'pip>=25.1'
	@$(PIP) install --group build
	@touch $@

# The package itself, editable: enough for `make serve` and `make bench`.
.venv/.core: .venv/.base $(CORE)
	@scripts/check-machine c
	@echo 'Building anypoll'
	@$(PIP) install --no-build-isolation -e '.[trio,uvloop]'
	@touch $@

.venv/.dev: .venv/.base
	@echo 'Installing the development tools'
	@$(PIP) install --group test --group lint
	@touch $@

.venv/.docs: .venv/.base
	@echo 'Installing what the documentation is built with'
	@$(PIP) install --group docs
	@touch $@

.venv/.bench: .venv/.base
	@echo 'Installing what the charts and all peers of the benchmarks need'
	@$(PIP) install --group bench
	@touch $@

# A sanitizer's build needs an environment of its own, for the editable finder beats PYTHONPATH;
# all else comes from .venv. The stem is asan or tsan.
SANITIZE_asan := address,undefined
SANITIZE_tsan := thread
.venv-%/.core: .venv/.core .venv/.dev
	@echo 'Building anypoll for $(SANITIZE_$*)'
	@rm -rf .venv-$*
	@.venv/bin/python -m venv --without-pip .venv-$*
	@.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    >"$$(.venv-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
	@$(PIP) --python .venv-$*/bin/python install --no-build-isolation --no-deps -e . \
	    -Ccmake.define.ANYPOLL_SANITIZE=$(SANITIZE_$*) -Ccmake.define.ANYPOLL_DEBUG=ON \
	    -Ccmake.build-type=RelWithDebInfo -Cinstall.strip=false -Cbuild-dir=build/$*
	@touch $@

# --- run -----------------------------------------------------------------------------------------

.PHONY: serve bench bench-instructions bench-check bench-all charts
serve: .venv/.core
	@echo 'Talk to it:  redis-cli -p $(PORT)      or:  nc $(HOST) $(PORT)   and type   PING'
	@echo 'Stop it:     Ctrl-C'
	@exec .venv/bin/anypoll serve examples/kv.py:handler --host $(HOST) --port $(PORT)

# TLS needs a package for its certificate, and a peer that is one.
CHOSEN = $(if $(WORKLOADS),--workloads $(WORKLOADS))
bench: .venv/.core $(if $(WORKLOADS),.venv/.bench)
	@exec .venv/bin/python benchmarks/run.py $(CHOSEN) $(ARGS)

bench-instructions: .venv/.core $(if $(WORKLOADS),.venv/.bench)
	@exec .venv/bin/python benchmarks/instructions.py $(CHOSEN) $(ARGS)

bench-check: .venv/.core
	@exec .venv/bin/python benchmarks/check.py $(ARGS)

# The results are replaced when all have been measured.
bench-all: .venv/.core .venv/.bench
	@.venv/bin/python benchmarks/run.py --workloads all --servers all --rounds 5 \
	    --json build/benchmarks/results.json $(ARGS)
	@cp build/benchmarks/results.json benchmarks/results.json
	@$(MAKE) --no-print-directory charts

charts: .venv/.core .venv/.bench
	@.venv/bin/python benchmarks/publish.py

# --- test ----------------------------------------------------------------------------------------

include tests/c/rules.mk

# What the C core does depends on no event loop, so under a sanitizer each test runs on one.
LOOPS ?= one
PYTEST_PARALLEL  := -q -n $(JOBS) --dist worksteal
PYTEST_SANITIZED  = $(PYTEST_PARALLEL) --capture=sys $(if $(filter one,$(LOOPS)),--one-loop) \
                    -m 'not slow and not redis and not unsanitized'

.PHONY: test test-sanitizers test-everything test-py test-asan test-tsan test-dist test-pythons \
        redis-tools
# test-py comes last, so that its summary does.
test: lint docs test-dist test-c-plain test-py
	@echo 'make test: all parts passed (lint, docs, wheel, C tests, pytest)'

test-sanitizers: test-c-asan test-c-tsan test-asan test-tsan
	@echo 'make test-sanitizers: all parts passed (C tests and pytest with ASan+UBSan and with TSan)'

test-everything: test
	@$(MAKE) --no-print-directory test-sanitizers LOOPS=all

# Tests that need the machine to themselves come when the others have ended.
test-py: .venv/.core .venv/.dev | redis-tools
	@echo 'pytest'
	@timeout --kill-after=10 3600 .venv/bin/pytest $(PYTEST_PARALLEL) -m 'not alone' $(ARGS)
	@timeout --kill-after=10 3600 .venv/bin/pytest -q -m alone $(ARGS) || \
	    [ $$? -eq 5 ] # none of these was asked for

test-asan: .venv-asan/.core
	@echo 'pytest, with ASan+UBSan'
	@scripts/sanitized-python asan -m pytest $(PYTEST_SANITIZED) $(ARGS)

test-tsan: .venv-tsan/.core
	@echo 'pytest, with TSan'
	@scripts/sanitized-python tsan -m pytest $(PYTEST_SANITIZED) $(ARGS)

# Not a part of `make test`. SEED=... takes the decisions of another run again.
.PHONY: soak soak-asan soak-tsan
SECONDS ?= 180
SOAK = tests/soak.py --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(ARGS)
soak: .venv/.core .venv/.dev
	@.venv/bin/python $(SOAK)

soak-asan soak-tsan: soak-%: .venv-%/.core
	@scripts/sanitized-python $* $(SOAK)

test-dist: build/site/.done
	@.venv/bin/python scripts/check-dist.py build/dist build/site

test-pythons:
	@scripts/test-pythons $(ARGS)

redis-tools:
	@scripts/redis-tools

# sdist, the wheel built from that sdist, and the wheel unpacked.
build/site/.done: .venv/.core .venv/.dev README.md LICENSE CHANGELOG.md $(PY_FILES) anypoll/py.typed
	@echo 'Building the sdist and the wheel'
	@rm -rf build/dist build/site
	@.venv/bin/python -m build --no-isolation --outdir build/dist . >build/dist.log 2>&1 || \
	    { cat build/dist.log; exit 1; }
	@$(PIP) install --no-deps --target build/site build/dist/*.whl
	@touch $@

# --- documentation --------------------------------------------------------------------------------

.PHONY: docs
docs: .venv/.core .venv/.docs
	@echo 'Sphinx'
	@.venv/bin/sphinx-build -q -n -W --keep-going -d build/cache/sphinx docs build/docs
	@echo 'build/docs/index.html'

# --- lint ----------------------------------------------------------------------------------------

.PHONY: lint lint-ruff lint-mypy lint-types lint-imports lint-c format
lint: lint-ruff lint-mypy lint-types lint-imports lint-c

lint-ruff: .venv/.dev
	@echo 'ruff'
	@.venv/bin/ruff check --quiet
	@.venv/bin/ruff format --check --quiet || { .venv/bin/ruff format --diff; exit 1; }

lint-mypy: .venv/.core .venv/.dev
	@echo 'mypy'
	@.venv/bin/mypy --no-error-summary

# pyright sees nothing in an editable install, hence build/site.
lint-types: build/site/.done
	@echo 'pyright --verifytypes'
	@.venv/bin/python scripts/verify-types.py build/site

lint-imports: .venv/.core .venv/.dev
	@echo 'import-linter'
	@.venv/bin/lint-imports --cache-dir build/cache/import-linter >build/import-linter.log || \
	    { cat build/import-linter.log; exit 1; }

lint-c: .venv/.dev
	@.venv/bin/python scripts/check-includes.py
	@echo 'clang-format'
	@.venv/bin/clang-format --dry-run -Werror $(C_FILES) 2>/dev/null || { \
	    for file in $(C_FILES); do .venv/bin/clang-format $$file | diff -u $$file -; done; \
	    echo 'make format rewrites them'; exit 1; }

format: .venv/.dev
	@.venv/bin/ruff check --quiet --fix-only || true
	@.venv/bin/ruff format --quiet
	@.venv/bin/clang-format -i $(C_FILES)

# -------------------------------------------------------------------------------------------------

.PHONY: clean
clean:
	rm -rf build .venv .venv-*
	find anypoll tests examples benchmarks scripts -name __pycache__ -prune -exec rm -rf {} +
