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
# The copy of the package that `make sanitize` tests, and the sources of its harness for races: every native op, one level.
SANITIZED := build/sanitize
RACES = $(patsubst %,csrc/cpu/%.cpp,$(shell sed -n 's/^VF_OP.\([a-z_]*\).*/\1/p' csrc/cpu/ops.def) dispatch table)
# What goes through the native library, but for what only ordinary PyTorch or Triton computes.
NATIVE_TESTS := tests/fuzz $(wildcard tests/csrc/test_*native.py) tests/ops tests/engine
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')

# Releases of transformers that `make core` adds to the one in $(VENV): the oldest that installs on this Python, one in the middle.
OLD = $$($(BIN)/python -c 'import sys; print({10: "4.30.2", 11: "4.30.2", 12: "4.38.2"}.get(sys.version_info[1], "4.46.3"))') 4.57.6
CORE = -m pytest -n $(WORKERS) -q -m core

# Triton besides the one in $(VENV) that `make fake-gpu` compiles with, and what says whether anything is left to.
OLD_TRITON = 3.6.0
PASSED = PYTHONPATH=tests $(BIN)/python -m support.fake_gpu.passed
PLAY = $(BIN)/python -m pytest -n $(WORKERS) -q tests/fake_gpu/whole.py $(ARGS)

.PHONY: demo train-demo test core fake-gpu wheel types sanitize races hf-suite lint format bench plot info clean

demo: $(VENV)/.installed
	$(BIN)/vilt-fast demo $(if $(MODEL),--model "$(MODEL)")

train-demo: $(VENV)/.installed
	$(BIN)/vilt-fast train-demo $(ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

# The tests marked `core` with each of these releases, torch shared.
core: $(VENV)/.installed
	for release in $(OLD); do $(MAKE) --no-print-directory core-$$release || exit 1; done

core-%: $(VENV)/transformers-%/.installed
	PYTHONPATH=$(VENV)/transformers-$* $(BIN)/python $(CORE) tests/models tests/engine tests/ops tests/images tests/test_packaging.py

.PRECIOUS: $(VENV)/transformers-%/.installed $(VENV)/triton-%/.installed
$(VENV)/transformers-%/.installed: | $(VENV)/.installed
	rm -rf $(@D)  # pip adds to a folder that is there
	$(BIN)/python -m pip install --quiet --target $(@D) "transformers==$*"
	@touch $@

# Every kernel, compiled from real arguments for a GPU that is played; nothing where tests/fake_gpu/passed.csv says that it has been.
fake-gpu: $(VENV)/.installed
	$(PASSED) "$$($(BIN)/python -c 'import triton; print(triton.__version__)')" || $(PLAY)
	$(PASSED) $(OLD_TRITON) || $(MAKE) --no-print-directory fake-gpu-$(OLD_TRITON)

fake-gpu-%: $(VENV)/triton-%/.installed
	PYTHONPATH=$(VENV)/triton-$* $(PLAY)

$(VENV)/triton-%/.installed: | $(VENV)/.installed
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) "triton==$*"
	@touch $@

# What somebody without a clone gets: a wheel made from the sdist, put somewhere else, its native way tested there.
wheel: $(VENV)/.installed
	rm -rf build/wheel
	$(BIN)/python setup.py --quiet sdist --dist-dir build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel build/wheel/vilt_fast-*.tar.gz
	$(BIN)/python -m pip install --quiet --no-deps --target build/wheel/installed build/wheel/vilt_fast-*.whl
	cd build/wheel && export PYTHONPATH=installed && \
		"$(abspath $(BIN))/python" -c 'import vilt_fast; assert "installed" in vilt_fast.__file__, vilt_fast.__file__' && \
		"$(abspath $(BIN))/python" $(CORE) -o pythonpath="$(CURDIR)/tests" "$(CURDIR)/tests/test_packaging.py" \
			"$(CURDIR)/tests/engine/test_ways.py"

types: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet pyright
	mkdir -p build && $(BIN)/python tests/support/readme.py > build/readme.py
	$(BIN)/pyright --pythonpath $(BIN)/python build/readme.py

# AddressSanitizer and UndefinedBehaviorSanitizer over the native tests and a long fuzz (GCC). The instrumented library lies
# in a copy of the package, found first; memory that nobody has written yet is filled with NaN. GCC's UBSan writes to the
# terminal alone, which pytest must not capture.
sanitize: $(VENV)/.installed races
	rm -rf $(SANITIZED)/lib $(SANITIZED)/report.*
	VILT_FAST_SANITIZE=1 VILT_FAST_CUDA=0 $(BIN)/python setup.py --quiet build --build-lib $(SANITIZED)/lib --build-temp $(SANITIZED)/objects
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:max_malloc_fill_size=1000000000:malloc_fill_byte=255:log_path=$(CURDIR)/$(SANITIZED)/report \
	UBSAN_OPTIONS=print_stacktrace=1 \
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup --max-worker-restart=0 --capture=sys -o pythonpath="tests $(SANITIZED)/lib" -k "not triton and not graphs" \
		--hypothesis-profile=large $(NATIVE_TESTS) $(ARGS) || { cat $(SANITIZED)/report.* 2>/dev/null; exit 1; }

# ThreadSanitizer over every native op, with OpenMP on std::thread: it takes all that libgomp does for races.
races:
	@mkdir -p $(SANITIZED)
	$(CXX) -std=c++17 -O1 -g -fsanitize=thread -fopenmp -DVF_ISA=generic -DVF_LEVEL=0 -DVF_LEVELS=1 -Icsrc/cpu \
		$(RACES) $(wildcard tests/csrc/races/*.cpp) -o $(SANITIZED)/races
	$(SANITIZED)/races

# HuggingFace's own tests of ViLT on accelerated models; HF is a checkout of transformers at the installed version.
hf-suite: $(VENV)/.installed
	cd "$(HF)" && PYTHONPATH="$(CURDIR)/tests/hf_suite:$(CURDIR)" $(CURDIR)/$(BIN)/python -m pytest -p accelerated \
		tests/models/vilt/test_modeling_vilt.py $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# A new file; the committed figures, on a quiet machine: make bench ARGS="--memory --update" && make plot
bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python -m benchmarks.run model --peers $(ARGS)

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
	rm -rf build dist *.egg-info demo bench vilt_fast/_C*.so .pytest_cache .ruff_cache .hypothesis $(VENV)/.installed
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
