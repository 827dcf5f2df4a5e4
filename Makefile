# What to install and where; override on the command line: make test TORCH=torch==2.13.0
PYTHON ?= python3
TORCH  ?= torch
VENV   ?= .venv
# Of make gpu: how long it may take, where its results go, and REHEARSE=1 to try it without a GPU
MINUTES  ?= 9
OUT      ?= runs/gpu
REHEARSE ?=
# Passed on: make train ARGS="--steps 100", make test ARGS="-k muon"
ARGS   ?=
# Processes of the test suite
JOBS   ?= 2
# Versions of Triton that test-versions takes beside the installed one
TRITONS ?= 3.5.1 3.6.0 3.9.0

BIN   := $(VENV)/bin
STAMP := $(VENV)/installed
# Tests beside the suite: they take packages, processes or builds of their own.
INTEGRATION := $(wildcard tests/integration tests/distributed)
PACKAGES    := $(wildcard tests/packages)

.PHONY: train checkpoint test test-integration test-packages test-sanitized test-versions smoke gpu docs lint \
        format dist clean

train: $(STAMP)
	$(BIN)/python -m deepopt.hope.train $(ARGS)

# The model that comes with the package
checkpoint: $(STAMP)
	$(BIN)/python -m deepopt.hope.train --threads 1 --out runs/checkpoint $(ARGS)
	cp $(addprefix runs/checkpoint/,config.json model.safetensors training.json) deepopt/hope/pretrained

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) $(addprefix --ignore=,$(INTEGRATION) $(PACKAGES)) $(ARGS)

test-integration: $(STAMP)-trainers
	$(BIN)/python -m pytest $(INTEGRATION) tests/test_pages.py $(ARGS)

# What users install, built and used outside of the checkout
test-packages: $(STAMP)
	$(BIN)/python -m pytest $(PACKAGES) $(ARGS)

# Kernels for the CPU under the address and undefined-behavior sanitizers
test-sanitized: $(STAMP)
	tests/sanitized/run $(abspath $(BIN))/python

# Kernels under other versions of Triton, extensions against the oldest torch's headers
test-versions: $(STAMP)
	JOBS=$(JOBS) tests/versions/run $(abspath $(BIN))/python '$(TRITONS)'

# A tuned comparison of two optimizers in miniature: runs, page and plots, in runs/
smoke: $(STAMP)
	$(BIN)/python -m benchmarks quality --tier smoke --fresh $(ARGS)

# All that a GPU has to show. It takes the python3 that holds torch, as a bare machine has it.
gpu: $(if $(REHEARSE),$(STAMP))
	$(if $(REHEARSE),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu --minutes $(MINUTES) --out '$(OUT)' \
		$(if $(REHEARSE),--rehearse) $(ARGS)

# The site, in build/site; any warning, such as a link that leads nowhere, fails it.
docs: $(STAMP)-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict $(ARGS)
	@echo 'written: build/site/index.html'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A source distribution and a wheel, in dist/
dist: $(STAMP)
	$(BIN)/python -c "from setuptools import build_meta as b; b.build_sdist('dist')"
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps -w dist .

clean:
	rm -rf '$(VENV)' build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find deepopt benchmarks csrc tests docs -name __pycache__ -prune -exec rm -rf {} +
	rm -f deepopt/_C_*.so

# The stamp holds the TORCH it was made with; another one makes the set-up run again. It is removed
# first and written last, so that an interrupted installation starts over.
ifneq ($(shell cat '$(STAMP)' 2>/dev/null),$(TORCH))
.PHONY: $(STAMP)
endif

$(STAMP): pyproject.toml setup.py $(wildcard csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*/*.cuh)
	rm -f '$@'
	$(PYTHON) -m venv '$(VENV)'
	$(BIN)/python -m pip install --disable-pip-version-check $(foreach package,$(TORCH),'$(package)')
	$(BIN)/python -m pip install --disable-pip-version-check 'setuptools>=77' wheel ninja
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation -e '.[dev,hope,meta]'
	echo '$(TORCH)' > '$@'

$(STAMP)-trainers: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation -e '.[trainers]' \
		$(foreach package,$(TORCH),'$(package)')
	touch '$@'

# DEEPOPT_EXT=0: the extensions are built already and stay.
$(STAMP)-docs: $(STAMP)
	DEEPOPT_EXT=0 $(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation -e '.[docs]' \
		$(foreach package,$(TORCH),'$(package)')
	touch '$@'
