# Everything a person needs: `make demo` runs the main job, `make test` runs the tests. See `make help`.
#
# Variables: PYTHON (3.11 or later), VENV (where the environment is made), TORCH (pip requirement of torch, and options),
# MEGATRON and MEGATRON_BRIDGE (pip requirements), MAX_JOBS (parallel compilations). Paths are relative: the folder's
# name may hold spaces.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
MEGATRON ?= megatron-core==0.19.2
MEGATRON_BRIDGE ?= megatron-bridge==0.6.2
MAX_JOBS ?= 2
CXX ?= g++
DEMO_ARGS ?=
CHECK_ARGS ?=
BENCH_ARGS ?= --quick
CASES ?=
SOAK_SECONDS ?= 600
PROPERTIES_ARGS ?=
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
EXAMPLE := examples/vlm_digits/train.py
SOURCES := $(shell find csrc mimo_ext -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.py' -o -name '*.pyi')
CXX_FILES := $(shell find csrc tests/cpp tests/properties -name '*.cpp' -o -name '*.h' -o -name '*.cu')

export CXX
export MAX_JOBS
export OMP_NUM_THREADS ?= 1

.PHONY: help
help:
	@echo "make demo      set up (first time), then train the example: a vision-language model that reads handwriting"
	@echo "make check     the example's parallel layouts against one process, loss by loss"
	@echo "make check-api every documented name and every known defect has its test, and is what the tables say"
	@echo "make check-grad weights after training, over many layouts and losses, against one process"
	@echo "make check-colocated    the same for layouts whose modules share their ranks"
	@echo "make check-install       a Megatron script that knows nothing of us, on Megatron's classes and on ours"
	@echo "make check-sanitize      ASan, UBSan and TSan over the C++ tests and over the extension in Python"
	@echo "make soak      ten minutes (SOAK_SECONDS) of random shapes, delays and layouts: is everything flat?"
	@echo "make check-cuda          the CUDA kernels compile, link and load (skipped, and said so, without a toolkit)"
	@echo "make check-properties   100,000 random layouts and 10,000 schedules: every property of plans, no deadlock"
	@echo "make check-faults        ranks are killed, frozen or raise in every operation and role; the others must notice, twice"
	@echo "make test      all tests: lint, C++, Python, distributed, Megatron"
	@echo "make fuzz      headers, plans and row shards of any numbers, millions of them (needs clang with libFuzzer)"
	@echo "make bench     the bridge against Megatron's own, on an emulated cluster (needs root): benchmarks/README.md"
	@echo "make bench-telemetry     what telemetry costs, against a build that has none"
	@echo "make figures   the figures, tables and picture of README and docs, made of benchmarks/results"
	@echo "make build     set up and install the extension into $(VENV)"
	@echo "make lint      formatting, lint and types; make format mends the formatting"
	@echo "make clean     removes $(VENV) and build/"

# --- Set-up: three steps, each redone only when what it depends on has changed.

.PHONY: preflight
preflight:
	@PYTHON="$(PYTHON)" CXX="$(CXX)" sh scripts/preflight.sh

$(VENV)/.torch: requirements/build.txt Makefile
	@$(MAKE) --no-print-directory preflight
	@echo "== making the environment in $(VENV) with $(TORCH)"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(TORCH) -r requirements/build.txt
	@touch $@

$(VENV)/.example: $(VENV)/.torch requirements/example.txt requirements/megatron.txt
	@echo "== installing $(MEGATRON) and what the example needs"
	$(PIP) install -q -r requirements/example.txt -r requirements/megatron.txt
	$(PIP) install -q --no-deps --ignore-requires-python $(MEGATRON)
	@touch $@

$(VENV)/.test: $(VENV)/.example requirements/test.txt
	$(PIP) install -q -r requirements/test.txt
	@touch $@

# Megatron-Bridge's sources, in a folder of their own: the tests of what replaces them put it on their path, no others.
$(VENV)/.bridge: $(VENV)/.torch
	@echo "== fetching the sources of $(MEGATRON_BRIDGE)"
	rm -rf "$(VENV)/megatron-bridge"
	$(PIP) install -q --no-deps --ignore-requires-python --target "$(VENV)/megatron-bridge" $(MEGATRON_BRIDGE)
	@touch $@

$(VENV)/.built: $(VENV)/.torch setup.py pyproject.toml $(SOURCES)
	@$(MAKE) --no-print-directory preflight
	@echo "== building the extension"
	$(PIP) install -q --no-build-isolation --no-deps --force-reinstall .
	@touch $@

.PHONY: build
build: $(VENV)/.built

# --- The main job

.PHONY: demo
demo: $(VENV)/.example $(VENV)/.built
	$(PY) -P $(EXAMPLE) $(DEMO_ARGS)

.PHONY: check
check: $(VENV)/.example $(VENV)/.built
	$(PY) -P $(EXAMPLE) --check $(CHECK_ARGS)

.PHONY: check-colocated
check-colocated: $(VENV)/.example $(VENV)/.built
	$(PY) -P $(EXAMPLE) --check colocated $(CHECK_ARGS)

.PHONY: check-api
check-api: $(VENV)/.example $(VENV)/.built
	$(PY) -P scripts/check_api.py

# CASES: parts of the names of the cases to run, e.g. CASES="cp sp". All by default.
.PHONY: check-grad
check-grad: $(VENV)/.test $(VENV)/.built
	PYTHONPATH=tests:tests/megatron $(PY) -P -W ignore tests/megatron/grad_check.py $(CASES)

.PHONY: check-install
check-install: $(VENV)/.test $(VENV)/.built
	$(PY) -P tests/megatron/install_program_ranks.py

# C++ tests and the extension in Python under the sanitizers; builds of their own below build/. Only what names our
# sources counts. Status 77: the compiler has no such sanitizer.
.PHONY: check-sanitize
check-sanitize: $(VENV)/.test
	@sh scripts/require_gtest.sh
	$(MAKE) -j$(MAX_JOBS) -C tests/cpp test
	$(MAKE) -j$(MAX_JOBS) -C tests/cpp test SANITIZE=-fsanitize=thread BUILD=../../build/cpp-thread
	MIMO_EXT_SANITIZE=address,undefined $(PY) setup.py -q build --build-base build/address --build-lib build/address/lib
	$(PY) tests/sanitize/run.py address build/address/lib || test $$? -eq 77
	MIMO_EXT_SANITIZE=thread $(PY) setup.py -q build --build-base build/thread --build-lib build/thread/lib
	$(PY) tests/sanitize/run.py thread build/thread/lib || test $$? -eq 77

# Values, memory, threads, descriptors and throughput over many microbatches of random shapes.
.PHONY: soak
soak: $(VENV)/.test $(VENV)/.built
	PYTHONPATH=tests:tests/soak $(PY) -P -W ignore tests/soak/soak.py --seconds $(SOAK_SECONDS) --json out/soak.json

# CASES: parts of the names of the cases to run, e.g. CASES="killed recv_forward". FAULTS_ARGS: see the program's --help.
FAULTS_ARGS ?= --times 2
.PHONY: check-faults
check-faults: $(VENV)/.test $(VENV)/.built
	PYTHONPATH=tests/faults $(PY) -P tests/faults/matrix.py --json out/faults/matrix.json $(FAULTS_ARGS) $(CASES)

# PROPERTIES_ARGS: of tests/properties/main.cpp, e.g. PROPERTIES_ARGS="--cases 1000000 --seed 2".
.PHONY: check-properties
check-properties:
	$(MAKE) -C tests/properties check ARGS="$(PROPERTIES_ARGS)"

# --- Benchmarks, in under five minutes. Status 77: this machine cannot emulate a cluster, and has said why.
# bench_rescale comes last: it ends with status 1 where a limit is missed.

QUIET_ARGS := $(filter --quick --ignore-busy,$(BENCH_ARGS))
BENCH := $(PY) -P -W ignore benchmarks

.PHONY: bench
bench: $(VENV)/.example $(VENV)/.built
	$(BENCH)/bench_bridge.py --json out/bench/bridge.json --png out/bench/bridge.png $(BENCH_ARGS) || test $$? -eq 77
	$(BENCH)/bench_training.py --json out/bench/training.json $(QUIET_ARGS) || test $$? -eq 77
	$(BENCH)/bench_host.py --json out/bench/host.json $(QUIET_ARGS)
	$(PY) -W ignore benchmarks/bench_plan.py --json out/bench/plan.json --details out/bench/plan_details.json \
		$(filter --quick,$(BENCH_ARGS))
	$(BENCH)/bench_rescale.py --json out/bench/rescale.json $(QUIET_ARGS)

# What telemetry costs: against a build without it, below build/.
.PHONY: bench-telemetry
bench-telemetry: $(VENV)/.example $(VENV)/.built
	MIMO_EXT_TELEMETRY=0 $(PY) setup.py -q build --build-base build/bare --build-lib build/bare/lib
	$(BENCH)/bench_telemetry.py --bare build/bare/lib --json out/bench/telemetry.json $(QUIET_ARGS)

.PHONY: figures
figures: $(VENV)/.example $(VENV)/.built
	$(PY) -P scripts/figures.py --write
	$(PY) -W ignore benchmarks/bench_plan.py --from benchmarks/results/plan_details.json \
		--measured benchmarks/results/bridge.json --tables docs/scale.md

# --- Tests. -P keeps the source folder off the path: what is tested is the installed package.

.PHONY: test
test: export MIMO_EXT_WERROR = 1
test: export MIMO_EXT_MEGATRON_BRIDGE = $(VENV)/megatron-bridge
test: $(VENV)/.test $(VENV)/.bridge $(VENV)/.built
	@$(MAKE) --no-print-directory lint test-cpp fuzz-smoke check-cuda
	$(PY) -P -m pytest tests $(PYTEST_ARGS)

# Objects that `make build` has left in build/ are used again: a minute or less.
.PHONY: check-cuda
check-cuda: $(VENV)/.built
	$(PY) -P scripts/check_cuda.py

.PHONY: test-cpp
test-cpp:
	@sh scripts/require_gtest.sh
	$(MAKE) -j$(MAX_JOBS) -C tests/cpp test

# What comes from users and peers, under libFuzzer with ASan and UBSan: RUNS inputs for each target. The short form is
# a part of the tests wherever there is a clang with libFuzzer; there each target must also find planted bugs.
RUNS ?= 5000000

.PHONY: fuzz
fuzz:
	$(MAKE) -j$(MAX_JOBS) -C tests/cpp/fuzz build
	$(MAKE) -C tests/cpp/fuzz long RUNS_EACH=$(RUNS)

.PHONY: fuzz-smoke
fuzz-smoke:
	@if $(MAKE) -s -C tests/cpp/fuzz available; then \
		$(MAKE) -s -j$(MAX_JOBS) -C tests/cpp/fuzz build && $(MAKE) -C tests/cpp/fuzz smoke planted PYTHON="$(PYTHON)"; \
	else \
		echo "SKIPPED: fuzzing; needs clang++ with libFuzzer (Debian: apt-get install clang libclang-rt-14-dev)"; \
	fi

.PHONY: lint
lint: $(VENV)/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(PY) -m mypy

.PHONY: format
format: $(VENV)/.test
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

.PHONY: clean
clean:
	rm -rf $(VENV) build *.egg-info out
