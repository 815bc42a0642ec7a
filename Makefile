# What a person types. Everything lives in $(VENV); a stamp file remembers what was installed.
PYTHON ?= python3
VENV ?= .venv
# Pinned: the newest torch from an index without CPU wheels would bring gigabytes of CUDA libraries.
TORCH ?= torch==2.13.0
MODEL ?=
# Processes that run tests side by side, each with one torch thread.
WORKERS ?= auto
BIN := $(VENV)/bin
NATIVE := $(wildcard setup.py pyproject.toml CMakeLists.txt csrc/*.* csrc/*/*.*)
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

.PHONY: demo test lint format bench plot info clean

demo: $(VENV)/.installed
	$(BIN)/vilt-fast demo $(if $(MODEL),--model "$(MODEL)")

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.run model $(ARGS)

plot: $(VENV)/.installed
	$(BIN)/python -m benchmarks.plot --readme README.md

info: $(VENV)/.installed
	$(BIN)/vilt-fast info

# Installed again whenever native sources or metadata change; Python files are used where they lie.
$(VENV)/.installed: $(NATIVE) | $(BIN)/python
	@echo "Installing vilt_fast, torch and the rest into $(VENV): a few minutes the first time"
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[dev,demo]"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "vilt_fast needs Python >= 3.10; run: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf build dist *.egg-info demo vilt_fast/_C*.so .pytest_cache .ruff_cache $(VENV)/.installed
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
