# Each target makes .venv and installs what it needs: nothing has to come before it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-floor lint doctest docs bench bench-curvature bench-stability bench-precision bench-planning reproduce clean

help:
	@echo "make demo     train on real digits with SGD, SAM, LPF-SGD and NSO (3 minutes)"
	@echo "make test     run the tests"
	@echo "make test-floor  run those that meet JAX's inner parts on the oldest versions allowed"
	@echo "make lint     check style and formatting"
	@echo "make doctest  run every example in the docstrings"
	@echo "make docs     build the documentation into docs/_build/html"
	@echo "make bench    measure speed and memory against peers"
	@echo "make bench-curvature  measure curvature products against peers"
	@echo "make bench-stability  measure the tracker and the exact threshold"
	@echo "make bench-precision  measure what bfloat16 parameters keep of the noise"
	@echo "make bench-planning   plan a step on 256 chips, from shapes alone"
	@echo "make reproduce    rerun the evidence: every command of examples/reproduce (two hours);"
	@echo "                  with CIFAR10=FOLDER that of CIFAR-10 too"
	@echo "make clean    remove .venv and what was built"

# One stamp an extra: .venv/.examples holds the packages of flatopt[examples].
$(VENV)/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

demo: $(VENV)/.examples
	$(BIN)/python examples/digits.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

FLOOR := $(VENV)-floor
FLOOR_TESTS := $(addprefix tests/test_,convolutions.py errors.py export.py flax.py \
	kernels.py optimizers.py schedules.py tracking.py transforms.py)

test-floor: floor.txt pyproject.toml
	test -x $(FLOOR)/bin/python || $(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c floor.txt
	$(FLOOR)/bin/python -m pytest -n 2 --dist worksteal -q $(FLOOR_TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

doctest: $(VENV)/.dev
	$(BIN)/python -m pytest --doctest-modules -q flatopt

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

bench-curvature: $(VENV)/.bench
	$(BIN)/python -m benchmarks.curvature

bench-stability: $(VENV)/.bench
	$(BIN)/python -m benchmarks.stability

bench-precision: $(VENV)/.bench
	$(BIN)/python -m benchmarks.precision

bench-planning: $(VENV)/.bench
	$(BIN)/python -m benchmarks.planning

REPRODUCE := $(filter-out %/cifar10,$(basename $(wildcard examples/reproduce/*.py)))

reproduce: $(VENV)/.examples
	set -e; for name in $(REPRODUCE); do $(BIN)/python $$name.py; done
ifdef CIFAR10
	$(BIN)/python examples/reproduce/cifar10.py --data-dir $(CIFAR10)
endif

clean:
	rm -rf $(VENV) $(FLOOR) docs/_build build dist .pytest_cache .ruff_cache
