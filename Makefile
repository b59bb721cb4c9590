# Every target creates the environment it needs in .venv; `make help` lists them.

PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
READY := .venv/.ready
CONSTRAINTS := .ci/constraints.txt
CODE := exporter targets devices tests
PROMPT := The capital of France is
# llama.cpp's AMX kernels crash: compilers drop the tile configuration, and only one thread asks for the permission
# (ggml-org/llama.cpp, pull request 26954). Compilers that know no AMX do not know this option either.
WITHOUT_AMX := $(if $(shell cc -march=native -dM -E -x c /dev/null 2>/dev/null | grep __AMX_INT8__),-mno-amx-int8)

.DEFAULT_GOAL := help
.PHONY: help demo test quick fuzz golden check format format-check lint types wheel benchmark headline clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(READY) ## build, run and verify a phone's and a laptop's bundle of the embedded model
	mkdir -p out
	rm -rf out/demo-phone out/demo-laptop
	$(BIN)/edge-exporter build demo --device galaxy-s24-ultra --target gguf --effort fast -o out/demo-phone
	$(BIN)/edge-exporter build demo --device core-ultra-200v --target onnx --effort fast -o out/demo-laptop
	$(BIN)/edge-exporter run out/demo-phone -p "$(PROMPT)"
	$(BIN)/edge-exporter run out/demo-laptop -p "$(PROMPT)"
	$(BIN)/edge-exporter verify out/demo-phone
	$(BIN)/edge-exporter verify out/demo-laptop

test: $(READY) ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not alone'
	$(BIN)/python -m pytest -m alone

quick: $(READY) ## run the tests of a minute: unit, property and contract
	$(BIN)/python -m pytest -n 2 --dist load -m 'not alone and not slow' tests/unit tests/property tests/contract

golden: $(READY) ## compare what BASE=COMMIT and the working tree build, byte by byte
	$(BIN)/python tests/golden.py $(BASE) --only '$(ONLY)'

# Once more, what a run has found: make fuzz ONLY=gguf SEED=1 FIRST=1234 COUNT=1
fuzz: $(READY) ## try 3,000 mutations of each kind of input
	$(BIN)/python -m tests.fuzz $(if $(ONLY),--only $(ONLY)) \
		--seed $(or $(SEED),1) --first $(or $(FIRST),0) --count $(or $(COUNT),3000)

check: format-check lint types test wheel ## all that must pass before a commit

format: $(READY) ## rewrite the code in the house format
	$(BIN)/python -m ruff format $(CODE)
	$(BIN)/python -m ruff check --select I --fix $(CODE)

format-check: $(READY)
	$(BIN)/python -m ruff format --check $(CODE)

lint: $(READY) ## look for mistakes and for breaches of style
	$(BIN)/python -m ruff check $(CODE)

# mypy reads the file system, not package-dir: it is shown a copy laid out as in the wheel.
types: $(READY) ## check the types of the product code
	rm -rf build/types
	mkdir -p build/types
	cp -Rp exporter build/types/
	cp -Rp targets devices build/types/exporter/
	cd build/types && ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p exporter

# setuptools would add what an earlier build left behind.
wheel: $(READY) ## build the wheel into dist/
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m build --wheel --no-isolation

benchmark: $(READY) ## measure accuracy, speed and memory, and write the docs' tables
	$(BIN)/python -m pytest tests/benchmarks --timeout=0 -s
	$(BIN)/python -m tests.benchmarks.tables

# make headline MODEL=FOLDER RIVAL=FILE.gguf CALIBRATION=TEXT EVALUATION=TEXT; only MODEL must be given
headline: $(READY) ## compare ours, llama.cpp's mixes and a rival's file at equal bytes on MODEL
	$(BIN)/python -m tests.benchmarks.headline $(MODEL) $(if $(RIVAL),--rival $(RIVAL)) \
		$(if $(CALIBRATION),--calibration $(CALIBRATION)) $(if $(EVALUATION),--evaluation $(EVALUATION))

clean: ## remove everything that was made, the environment too
	rm -rf .venv build dist out *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# One call to pip for everything, so that torch is resolved once, under its pin.
$(READY): pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; name it with: make PYTHON=..." >&2; exit 1; }
	@echo "Installing into .venv. llama-cpp-python compiles llama.cpp: about 8 minutes on 2 cores, the first time only."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) pip
	CFLAGS="$(CFLAGS) $(WITHOUT_AMX)" CXXFLAGS="$(CXXFLAGS) $(WITHOUT_AMX)" \
	$(BIN)/python -m pip install --constraint $(CONSTRAINTS) --build-constraint $(CONSTRAINTS) --editable '.[demo,dev]'
	@touch $@
