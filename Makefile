# Every target sets up what it needs: a virtual environment in .venv with orthax installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
BENCHMARKS := $(filter-out benchmarks/record.py benchmarks/hlo.py,$(wildcard benchmarks/*.py))

EXAMPLES := gpt.py gpt_compare.py finetune_low_rank.py compatible_representations.py orthogonal_cnn.py

.PHONY: demo test test-as-users lint bench compare examples smoke test-oldest test-newest clean

demo: $(VENV)/.examples  ## Train a small GPT with AdamW, Muon and NorMuon; writes comparison.png
	$(BIN)/python examples/gpt_compare.py

test: $(VENV)/.test  ## The whole test suite
	$(BIN)/python -m pytest -n $(JOBS)

test-as-users: $(VENV)/.test  ## The tests of accuracy, compiled as users compile; `test` compiles faster
	ORTHAX_TESTS_AS_USERS_COMPILE=1 $(BIN)/python -m pytest -n $(JOBS) -m accuracy tests/linalg

lint: $(VENV)/.test  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Runs every line of its input as the arguments of Python, $(JOBS) at a time.
IN_PARALLEL = xargs -P $(JOBS) -I{} sh -c '$(BIN)/python {} || { echo "failed: {}"; exit 255; }'

examples: $(VENV)/.examples  ## Every example and benchmark with tiny settings
	printf '%s --smoke\n' $(EXAMPLES:%=examples/%) 'examples/gpt_compare.py --full' \
		'examples/launch_local.py 2 -- examples/gpt.py --mesh fsdp=2' $(BENCHMARKS) | $(IN_PARALLEL)

smoke: $(VENV)/.examples  ## Those of them that no test runs
	printf '%s --smoke\n' examples/gpt.py $(BENCHMARKS) | $(IN_PARALLEL)

# benchmarks/accelerator.py runs where there is one; --smoke rehearses it anywhere.
bench: $(VENV)/.examples  ## Every benchmark; tables on screen, data and pictures in benchmarks/results
	for script in $(filter-out benchmarks/accelerator.py,$(BENCHMARKS)); do $(BIN)/python $$script || exit 1; done

FULL := $(BIN)/python examples/gpt_compare.py --full

compare: $(VENV)/.examples  ## Learning-rate sweeps and three seeds per optimizer (three hours on two cores)
	$(FULL) --optimizers adamw muon normuon root auon_paper auon_code auon_rms hybrid_auon
	$(FULL) --name exactness --optimizers adamw muon_three_steps muon_polynomial muon_rational muon_exact
	$(FULL) --name outliers --outliers 0.001 --optimizers adamw muon root

# The oldest versions that pyproject.toml admits, pinned, of which PART=8 runs about one test in eight
# (tests/part.py); and the newest on another Python.
PART ?= 1
test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest -n $(JOBS) --part=$(PART) -p no:cacheprovider \
		--ignore=tests/examples --ignore=tests/notebooks --ignore=orthax/eqx.py

.venv-oldest/.ready: pyproject.toml oldest-requirements.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --upgrade pip
	.venv-oldest/bin/python -m pip install --quiet -r oldest-requirements.txt
	.venv-oldest/bin/python -m pip install --quiet --no-deps -e .
	touch $@

NEWEST_PYTHON ?= python3.13
test-newest:
	$(MAKE) test PYTHON=$(NEWEST_PYTHON) VENV=.venv-newest

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "orthax needs Python 3.11 or newer; name one with PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.examples: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[examples]'
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@ $(VENV)/.examples

clean:
	rm -rf .venv .venv-oldest .venv-newest comparison.png
