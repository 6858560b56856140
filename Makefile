# Every target first sees to it that .venv holds what pyproject.toml and constraints.txt ask for.
PYTHON ?= python3
READY  := .venv/.installed
ENGINES := .venv-engines/bin/python
DOCS   := .venv/.docs-installed
TRITON := .venv-triton/.installed
NATIVE := cmake/CMakeLists.txt $(wildcard src/lowbit/kernels/native/*.[ch])
# The tests start hundreds of processes; each would compile the package and the tests anew.
unexport PYTHONDONTWRITEBYTECODE
HOOKS   = $$(git rev-parse --git-path hooks)

.PHONY: demo quick test test-families test-kernels test-exhaustive test-strict test-engines test-docs lint bench hooks mutants fuzz docs

demo:  $(READY) ; OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} .venv/bin/python examples/demo.py
quick: $(READY) ; OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 -q --ignore tests/engines -m "not slow and not families and not exhaustive and not docs"
test:  $(READY) ; OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 -q --ignore tests/engines -m "not families and not exhaustive and not docs"
test-families: $(READY) ; OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 -q --ignore tests/engines -m families
test-kernels: $(READY) $(TRITON)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 PYTHONPATH=.venv-triton .venv/bin/python -m pytest -n 2 -q tests/kernels/triton
# The strict device gives autograd a thread, after which no forked process can compute gradients; other tests fork.
test-exhaustive: $(READY) ; OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 -q --ignore tests/engines --ignore tests/strict -m exhaustive
test-strict: $(READY) ; OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 -q tests/strict -m exhaustive
test-docs: $(READY) $(DOCS) ; OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 -q tests/docs -m docs
test-engines: $(READY) $(ENGINES)
	OMP_NUM_THREADS=1 LOWBIT_ENGINES=$(ENGINES) .venv/bin/python -m pytest -n 2 -q tests/engines
lint:  $(READY) ; .venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy
docs:  $(READY) $(DOCS) ; NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
bench: $(READY) ; .venv/bin/python benchmarks/frontier.py $(ARGS)
fuzz:  $(READY) ; OMP_NUM_THREADS=1 .venv/bin/python tests/fuzz/run.py --seconds $(or $(SECONDS),600) --seed $(or $(SEED),0)
mutants: $(READY)
	.venv/bin/pip install -q -e '.[mutants]' -c constraints.txt
	OMP_NUM_THREADS=1 .venv/bin/python benchmarks/mutants.py $(ARGS)
hooks: $(READY) ; @mkdir -p $(HOOKS) && printf '#!/bin/sh\nmake lint && .venv/bin/python -m pytest -q tests/test_layers.py\n' > $(HOOKS)/pre-commit && chmod +x $(HOOKS)/pre-commit

# torch comes first and alone: which build it is decides what else is downloaded.
$(READY): pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lowbit needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q torch==2.13.0 -c constraints.txt
	.venv/bin/pip install -q -e '.[dev]' -c constraints.txt
	@.venv/bin/python -c 'from lowbit.kernels.native import why_not; reason = why_not(); reason and print(reason)'
	@touch $@

# What builds the site of the documentation, beside the rest.
$(DOCS): $(READY)
	.venv/bin/pip install -q -e '.[docs]' -c constraints.txt
	@touch $@

# Triton lies in a folder of its own, which only its tests see: the others show that lowbit needs none.
$(TRITON): $(READY) tests/kernels/triton/requirements.txt
	.venv/bin/pip install -q --no-deps --upgrade --target .venv-triton -r tests/kernels/triton/requirements.txt
	@touch $@

# The programs that read exported folders, in an environment without lowbit.
$(ENGINES): tests/engines/requirements.txt tests/engines/requirements-alone.txt constraints.txt
	$(PYTHON) -m venv .venv-engines
	.venv-engines/bin/pip install -q torch==2.13.0 -c constraints.txt
	.venv-engines/bin/pip install -q -r tests/engines/requirements.txt -c constraints.txt
	.venv-engines/bin/pip install -q --no-deps -r tests/engines/requirements-alone.txt
	@touch $@
