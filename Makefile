# make train   set up .venv, build the kernels, train a Glow on photographs that ship inside a dependency
# make test    set up what is missing, run the tests        make test-long   the long sweeps as well
# make bench   the benchmark tables, JSON under RESULTS     make gpu         install, test and measure on a GPU machine
#
# TORCH and TRITON choose the builds; PIP_ARGS goes to pip (an index of CPU wheels, for instance).
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.*
PIP_ARGS ?=
RESULTS ?= benchmarks/results
RECIPE ?= glow-photos
OUT ?=

VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
WORKERS := 2
# One thread per worker: two workers fill two cores. Where a test asks for more, they wait for each other without spinning
# on the other worker's core. Compiled modules are kept, for the many processes that tests start.
PYTEST = env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -p no:cacheprovider -p no:benchmark

.PHONY: train test test-long bench gpu clean

train: $(VENV)/.train $(VENV)/.built
	$(BIN)/fastflow train $(RECIPE) $(if $(OUT),--out "$(OUT)")

test: $(VENV)/.test $(VENV)/.built
	TRITON_INTERPRET=1 $(PYTEST) -n $(WORKERS) -m "not slow" tests/interpreter
	$(PYTEST) -n $(WORKERS) -m "not slow" tests --ignore=tests/interpreter

test-long: $(VENV)/.long $(VENV)/.built
	TRITON_INTERPRET=1 $(PYTEST) -n $(WORKERS) -m "slow or not slow" tests/interpreter
	$(PYTEST) -n $(WORKERS) -m "slow or not slow" tests --ignore=tests/interpreter

bench: $(VENV)/.test $(VENV)/.built
	$(BIN)/fastflow bench all --results $(RESULTS)
	$(BIN)/fastflow bench compiled --results $(RESULTS)
	$(BIN)/python -m benchmarks.peer_launches --results $(RESULTS)
	$(BIN)/python -m benchmarks.equal_time --results $(RESULTS)

# On a GPU machine: that Python's own torch as found, no network, no isolation. GPU_WORKERS processes share the GPU. What
# fails is said at the end, by make's status: machine time is short, so the rest runs all the same.
GPU_WORKERS ?= 8
gpu:
	FASTFLOW_BUILD=1 $(PYTHON) -m pip install --no-deps --no-build-isolation -e .
	status=0; \
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(PYTHON) -m pytest -p no:cacheprovider -n $(GPU_WORKERS) -m gpu tests --ignore=tests/interpreter || status=$$?; \
	$(PYTHON) -m benchmarks.bandwidth --results $(RESULTS) || status=$$?; \
	$(PYTHON) -m benchmarks.gpu_models --results $(RESULTS) || status=$$?; \
	$(PYTHON) -m fastflow.cli bench all --device cuda --results $(RESULTS) || status=$$?; \
	exit $$status

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) "$(TORCH)" "$(TRITON)"
	touch $@

$(VENV)/.train: $(VENV)/.torch requirements/train.txt
	$(BIN)/python -m pip install $(PIP_ARGS) -r requirements/train.txt
	touch $@

$(VENV)/.test: $(VENV)/.torch requirements/train.txt requirements/test.txt
	$(BIN)/python -m pip install $(PIP_ARGS) --no-build-isolation -r requirements/train.txt
	$(BIN)/python -m pip install $(PIP_ARGS) --no-build-isolation -r requirements/test.txt
	touch $@ $(VENV)/.train

$(VENV)/.long: $(VENV)/.test requirements/long.txt
	$(BIN)/python -m pip install $(PIP_ARGS) --no-build-isolation -r requirements/long.txt
	touch $@

$(VENV)/.built: $(SOURCES) | $(VENV)/.torch
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf build fastflow/_C_*.so $(VENV)/.built
