# Every target makes the environment it needs; a fresh machine needs Python >= 3.11 and make, nothing else.
#   make demo DATA=my.txt      train on your own text instead of Python's standard library
#   make demo SMOKE=1          the same path in a minute
#   make test PYTHON=python3.12

PYTHON ?= python3
SMOKE ?=
DATA ?=

PY := .venv/bin/python
PY_MIN := .venv-min/bin/python
ENV := .venv/.installed
ENV_MIN := .venv-min/.installed

MIN_TESTS := $(wildcard tests/test_config*.py tests/test_model*.py tests/test_cache*.py tests/test_generat*.py \
	tests/test_bad_input.py tests/test_long_context.py tests/test_bidirectional.py tests/test_heads.py tests/test_ecosystem.py)
BENCHES := $(sort $(patsubst benchmarks/%.py,%,$(wildcard benchmarks/bench_*.py)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env demo test test-min check gpu bench

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

env: $(ENV)  ## make .venv with everything pinned in constraints.txt

demo: $(ENV)  ## train a byte-level Hyena beside GPT-2 and Llama, distil it, generate, report in runs/demo
	$(PY) -m training.demo $(if $(filter-out 0,$(SMOKE)),--smoke) $(if $(DATA),--data "$(DATA)")

test: $(ENV)  ## the default test suite
	$(PY) -m pytest

test-min: $(ENV_MIN)  ## model and cache tests on the oldest supported transformers
	$(PY_MIN) -m pytest $(MIN_TESTS)

check: $(ENV)  ## formatting, lint, types, import contracts, spelling
	$(PY) -m ruff format --check
	$(PY) -m ruff check
	$(PY) -m pyright
	.venv/bin/lint-imports
	$(PY) -m codespell_lib

gpu: $(ENV)  ## the tests that need an accelerator, then its benchmarks
	$(PY) -m pytest -m gpu
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(PY) -m benchmarks.bench_fftconv --only gpu && $(PY) -m benchmarks.bench_linear_kernel; \
		else echo "make gpu: torch sees no CUDA device"; fi

bench: $(ENV)  ## every benchmarks/bench_*.py; results go to benchmarks/results
	@set -e; for bench in $(BENCHES); do echo "$(PY) -m benchmarks.$$bench"; $(PY) -m benchmarks.$$bench; done

# pip brings torch first, so that its own settings choose the build (CPU or GPU); uv resolves the rest in seconds
# around the torch that is there.
$(ENV): pyproject.toml constraints.txt
	$(call new_venv,.venv)
	$(PY) -m pip install -c constraints.txt torch uv
	$(PY) -m uv pip install --python $(PY) -c constraints.txt -e '.[train,genomes,eval,dev]'
	@touch $@

$(ENV_MIN): pyproject.toml constraints-min.txt
	$(call new_venv,.venv-min)
	$(PY_MIN) -m pip install -c constraints-min.txt torch uv
	$(PY_MIN) -m uv pip install --python $(PY_MIN) -c constraints-min.txt -e . accelerate peft pytest pytest-cov scipy
	@touch $@

define new_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {sys.version.split()[0]}: name another, make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
endef
