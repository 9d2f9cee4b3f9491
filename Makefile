# `make train` and `make test` need Python 3.10 to 3.13 and a compiler; each makes its environment in .venv.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
TRAIN_ARGS ?= --preset tiny --nproc 4
TEST_ARGS ?=
BENCH_ARGS ?= --backend collective --nproc 2

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c requirements/constraints.txt
CSRC := $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cu' -o -name '*.cpp')

.DELETE_ON_ERROR:
.PHONY: help train test bench doctor lint format clean

help:
	@echo "make train   train the tiny preset on 4 CPU processes     (TRAIN_ARGS=$(TRAIN_ARGS))"
	@echo "make test    run the tests                                (TEST_ARGS=$(TEST_ARGS))"
	@echo "make bench   time dispatch and combine                    (BENCH_ARGS=$(BENCH_ARGS))"
	@echo "make doctor  say what this machine can run"
	@echo "make lint    check style;  make format  mend it;  make clean  remove what make made"
	@echo "PYTHON=$(PYTHON) makes the environment $(VENV); PIP_ARGS are added to every pip install"

train: $(VENV)/.package $(VENV)/.train
	$(BIN)/moe-ep train $(TRAIN_ARGS)

test: $(VENV)/.package $(VENV)/.test $(VENV)/.megatron
	$(BIN)/python -m pytest $(TEST_ARGS)

bench: $(VENV)/.package $(VENV)/.train
	$(BIN)/moe-ep bench $(BENCH_ARGS)

doctor: $(VENV)/.package
	$(BIN)/moe-ep doctor

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

clean:
	rm -rf $(VENV) build dist *.egg-info moe_ep/_C.*.so moe_ep/_cpu.*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp file stands for each set of installed packages; it is older than its list when the list has changed.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "moe_ep needs Python 3.10 or newer; choose one with: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "making the environment $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

STAMPS := $(addprefix $(VENV)/.,build train test megatron lint)
$(VENV)/.megatron: PIP_OPTIONS := --no-deps --ignore-requires-python
$(STAMPS): $(VENV)/.%: requirements/%.txt requirements/constraints.txt $(VENV)/.made
	@echo "installing requirements/$*.txt"
	@$(PIP_INSTALL) $(PIP_OPTIONS) -r $<
	@touch $@

# Editable, so that only a change of the build or of csrc asks for this again.
$(VENV)/.package: setup.py pyproject.toml $(CSRC) $(VENV)/.build $(VENV)/.train
	@echo "installing moe_ep"
	@$(PIP_INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@
