# `make demo` is all a newcomer needs: every target sets .venv up first, once.

PY := .venv/bin/python
READY := .venv/.ready
NATIVE := src/paley/kernels/libpaley

.PHONY: setup demo test lint types clean

setup: $(READY)

# Without the native kernels each `make setup` tries again: a C++ compiler may be there by now.
ifeq ($(MAKECMDGOALS)$(wildcard $(NATIVE).*),setup)
.PHONY: $(READY)
endif

$(READY): pyproject.toml setup.py constraints-cpu.txt scripts/setup.sh $(wildcard csrc/*)
	@bash scripts/setup.sh
	@touch $@

demo: $(READY)
	@$(PY) -m examples.demo

# One process a core, each with one thread: tests are too small to share.
test: $(READY)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --dist worksteal

lint: $(READY)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

# Without the variable pyright asks the registry for a newer release at every run.
types: $(READY)
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PY) -m pyright

clean:
	rm -rf .venv build demo-out .pytest_cache .ruff_cache src/paley.egg-info $(NATIVE).*
	find src tests bench studies tools examples scripts -name __pycache__ -type d -prune -exec rm -rf {} +
