# Every target sets up what it needs: a virtual environment in .venv with orthax installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
BENCHMARKS := $(filter-out benchmarks/record.py,$(wildcard benchmarks/*.py))

.PHONY: demo test lint bench compare examples test-oldest test-newest clean

demo: $(VENV)/.examples  ## Train a small GPT with AdamW, Muon and NorMuon; writes comparison.png
	$(BIN)/python examples/gpt_compare.py

test: $(VENV)/.test  ## The whole test suite
	$(BIN)/python -m pytest -n $(JOBS)

lint: $(VENV)/.test  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

examples: $(VENV)/.examples  ## Every example and benchmark with tiny settings
	for script in examples/gpt.py examples/gpt_compare.py examples/finetune_low_rank.py examples/compatible_representations.py examples/orthogonal_cnn.py; do $(BIN)/python $$script --smoke || exit 1; done
	$(BIN)/python examples/gpt_compare.py --full --smoke
	for script in $(BENCHMARKS); do $(BIN)/python $$script --smoke || exit 1; done

bench: $(VENV)/.examples  ## Every benchmark; tables on screen, data and pictures in benchmarks/results
	for script in $(BENCHMARKS); do $(BIN)/python $$script || exit 1; done

FULL := $(BIN)/python examples/gpt_compare.py --full

compare: $(VENV)/.examples  ## Learning-rate sweeps and three seeds per optimizer (three hours on two cores)
	$(FULL) --optimizers adamw muon normuon root auon_paper auon_code auon_rms hybrid_auon
	$(FULL) --name exactness --optimizers adamw muon_three_steps muon_polynomial muon_rational muon_exact
	$(FULL) --name outliers --outliers 0.001 --optimizers adamw muon root

# The oldest versions that pyproject.toml admits, pinned; and the newest on another Python.
test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest -n $(JOBS) -p no:cacheprovider --ignore=tests/examples --ignore=tests/notebooks

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
