# Each target makes .venv and installs what it needs: nothing has to come before it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-programs test-fast test-fuzz test-floor test-newest test-tpu lint format hooks doctest docs docs-check dist bench bench-curvature bench-stability bench-precision bench-planning bench-language bench-gpu bench-accelerators bench-fits reproduce clean

help:
	@echo "make demo     train on real digits with SGD, SAM, LPF-SGD and NSO (4 minutes)"
	@echo "make test     run the library's tests; make test T='tests/test_kernels.py -k signs' runs some"
	@echo "make test-programs  run the examples, studies and notebooks at a small size"
	@echo "make test-fast    run the heart of every module: 2 minutes"
	@echo "make test-fuzz    try 500 random uses of the links against NumPy"
	@echo "make test-floor   run those that meet JAX's inner parts on the oldest versions allowed"
	@echo "make test-newest  the same on the newest Python that is found and the newest JAX"
	@echo "make test-tpu    what a TPU's compiler makes of a few programs; no TPU is needed"
	@echo "make lint     check style, formatting and types"
	@echo "make format   sort imports and format"
	@echo "make hooks    have git check the style of every commit"
	@echo "make doctest  run every example in the docstrings"
	@echo "make docs     build the documentation into docs/_build/html"
	@echo "make docs-check  check its links, and how it looks in a Chromium if there is one"
	@echo "make dist     build the archives of a release into dist, and test from the sdist"
	@echo "make bench    measure speed and memory against peers"
	@echo "make bench-curvature  measure curvature products against peers, and many small problems"
	@echo "make bench-stability  measure the tracker and the exact threshold"
	@echo "make bench-precision  measure what bfloat16 parameters keep of the noise"
	@echo "make bench-planning   plan steps of 1 and 7 billion parameters on 16 and 256 TPU chips, from shapes"
	@echo "                  alone (half an hour); no TPU is needed"
	@echo "make bench-language   plan the curvature of a language model for a TPU; no TPU is needed"
	@echo "make bench-accelerators  compile for a TPU and read the programs (an hour); no TPU is needed;"
	@echo "                  with TARGET=h100 for a GPU, which downloads 4 GB; no GPU is needed"
	@echo "make bench-fits  whether the examples' training steps fit a TPU of 16 GB (half an hour); no TPU is needed"
	@echo "make bench-gpu    measure on a GPU, in at most 8 minutes; DATA=FOLDER trains on CIFAR-10 too"
	@echo "make reproduce    rerun the evidence: every command of examples/reproduce (three hours);"
	@echo "                  with CIFAR10=FOLDER, SHAKESPEARE=FOLDER those of CIFAR-10 and of text too"
	@echo "make clean    remove the environments and what was built"

# One stamp an extra: .venv/.examples holds the packages of flatopt[examples].
$(VENV)/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

demo: $(VENV)/.examples
	$(BIN)/python examples/digits.py

T ?=
test: $(VENV)/.dev
	$(BIN)/python -m pytest $(or $(T),-n 2 --dist worksteal -m 'not program')

# What meets JAX's inner parts on other versions: the heart of every module, and these files
# test_NAME.py, anywhere below tests, whole.
INNER := curvature export jaxprs sharding
find_tests = $(or $(shell find tests -name test_$(1).py),\
	$(error there are no tests named $(1)))
INNER_TESTS = $(foreach name,$(INNER),$(call find_tests,$(name)))
test_inner = $(1) -m pytest -n 2 --dist worksteal -q -m heart && \
	$(1) -m pytest -n 2 --dist worksteal -q -m 'not heart' $(INNER_TESTS)

test-programs: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m program

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -q -m heart

test-fuzz: $(VENV)/.dev
	FLATOPT_FUZZ=500 $(BIN)/python -m pytest -q tests/test_fuzz.py

FLOOR := $(VENV)-floor

test-floor: floor.txt pyproject.toml
	test -x $(FLOOR)/bin/python || $(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c floor.txt
	$(call test_inner,$(FLOOR)/bin/python)

NEWEST := $(VENV)-newest

# The environment is made again when a newer Python has come.
test-newest: pyproject.toml
	@python=$$(.ci/newest-python) || { \
		echo "make test-newest: no CPython from 3.12 to 3.14 is found: nothing is run"; exit 0; }; \
	set -ex; \
	test "$$($(NEWEST)/bin/python -V 2>&1)" = "$$($$python -V)" || $$python -m venv --clear $(NEWEST); \
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check \
		--upgrade --upgrade-strategy eager -e '.[dev]'; \
	$(call test_inner,$(NEWEST)/bin/python)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

hooks: $(VENV)/.dev
	$(BIN)/pre-commit install

# Compiled with all passes, as users do, but in one piece: two processes share the cores.
doctest docs: export XLA_FLAGS := --xla_cpu_parallel_codegen_split_count=1 $(XLA_FLAGS)

doctest: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal --doctest-modules -q flatopt

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -j 2 -W --keep-going -b html docs docs/_build/html

# Of what `make docs` has built.
docs-check:
	$(PYTHON) docs/check.py docs/_build/html

# With TAG=vX.Y.Z the archives must be of that version. Tests that read files run once more,
# from the unpacked sdist and with its package.
SDIST := build/sdist
READING_TESTS = $(foreach name,package release examples reproduce,$(call find_tests,$(name)))

dist: $(VENV)/.dev $(VENV)/.release
	rm -rf dist $(SDIST)
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	test -z "$(TAG)" || test -e "dist/flatopt-$(TAG:v%=%).tar.gz"
	mkdir -p $(SDIST)
	tar -xzf dist/*.tar.gz -C $(SDIST) --strip-components 1
	cd $(SDIST) && PYTHONPATH=$(abspath $(SDIST)) $(abspath $(BIN))/python -m pytest -q $(READING_TESTS) \
		-k 'test_package or test_release or format or notebook_is or notebook_has or number'

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.samplers

bench-curvature: $(VENV)/.bench
	$(BIN)/python -m benchmarks.curvature
	$(BIN)/python -m benchmarks.small
	$(BIN)/python -m benchmarks.differences

bench-stability: $(VENV)/.bench
	$(BIN)/python -m benchmarks.stability

bench-precision: $(VENV)/.bench
	$(BIN)/python -m benchmarks.precision

TPU := $(VENV)-tpu
GPU := $(VENV)-gpu
TARGET ?= tpu
ROWS ?=
LANGUAGE_ARGS ?=
PLANNING_ARGS ?=

# Python of an environment with one extra: jax[tpu] and jax[cuda13] compile without a device;
# they need Python 3.12. Nothing is run where there is none.
define with_compiler
	@python=$$(.ci/newest-python) || { \
		echo "make $@: no CPython from 3.12 to 3.14 is found: nothing is run"; exit 0; }; \
	set -ex; \
	test "$$($(1)/bin/python -V 2>&1)" = "$$($$python -V)" || $$python -m venv --clear $(1); \
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[$(2)]'; \
	TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu $(1)/bin/python
endef
with_tpu_compiler = $(call with_compiler,$(TPU),tpu)
with_gpu_compiler = $(call with_compiler,$(GPU),gpu)

test-tpu: pyproject.toml
	$(with_tpu_compiler) -m pytest -q --noconftest -W default tests/tpu_programs.py

bench-accelerators: pyproject.toml
	$(if $(filter h100,$(TARGET)),$(with_gpu_compiler),$(with_tpu_compiler)) \
		-m benchmarks.accelerators --target $(TARGET) $(ROWS)

bench-fits: pyproject.toml
	$(with_tpu_compiler) -m benchmarks.fits

bench-planning: pyproject.toml
	$(with_tpu_compiler) $(TPU)/bin/python -m benchmarks.planning $(PLANNING_ARGS)

bench-language: pyproject.toml
	$(with_tpu_compiler) -m benchmarks.language $(LANGUAGE_ARGS)

DATA ?=
GPU_ARGS ?=

# The Python at hand if its JAX sees a GPU and it has the rest; else an environment with CUDA.
bench-gpu:
	@set -e; python="$(PYTHON)"; \
	$$python -c 'import flax, jax, optax, scipy, tqdm; assert jax.default_backend() == "gpu"' \
		2>/dev/null || { \
		python=$(GPU)/bin/python; \
		test -x $$python || $$(.ci/newest-python || echo $(PYTHON)) -m venv $(GPU); \
		$$python -m pip install --quiet --disable-pip-version-check -e '.[gpu]'; }; \
	set -x; $$python -m benchmarks.gpu $(if $(DATA),--data-dir $(DATA)) $(GPU_ARGS)

REPRODUCE := $(filter-out %/cifar10 %_cifar %_text %/radius,$(basename $(wildcard examples/reproduce/*.py)))

reproduce: $(VENV)/.examples
	set -e; for name in $(REPRODUCE); do $(BIN)/python $$name.py; done
	$(BIN)/python examples/reproduce/radius.py $(if $(CIFAR10),--data-dir $(CIFAR10)) \
		$(if $(SHAKESPEARE),--text-dir $(SHAKESPEARE))
ifdef CIFAR10
	set -e; for name in cifar10 rounding_cifar forgetting_cifar; do \
		$(BIN)/python examples/reproduce/$$name.py --data-dir $(CIFAR10); done
endif
ifdef SHAKESPEARE
	set -e; for name in rounding_text forgetting_text; do \
		$(BIN)/python examples/reproduce/$$name.py --data-dir $(SHAKESPEARE); done
endif

clean:
	rm -rf $(VENV) $(FLOOR) $(NEWEST) $(GPU) $(TPU) docs/_build docs/jupyter_execute jupyter_execute build dist
	rm -rf *.egg-info .hypothesis .jax_cache .mypy_cache .pytest_cache .ruff_cache
	find benchmarks docs examples flatopt tests -name __pycache__ -prune -exec rm -rf {} +
