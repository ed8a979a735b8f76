# make demo [SEED=1]   all three stages on a toy, under toy/
# make test            lint and the tests, one sample of each fault among them
# make test-faults     every fault: kills, damage, full disks, bad input (an hour)
# make results         theory, and the comparison with GRPO, REBEL and PPO (55 minutes)
# make ablations       the ablations, 3 seeds (75 minutes)
# make clean           forget toy/ and the environment
#
# Each makes the environment in .venv/ when it is missing or older than its requirements files.
# It is the GPU's if nvidia-smi lists one. Another interpreter: make demo PYTHON=python3.12

SHELL := /bin/bash
PYTHON ?= python3
SEED ?= 0
KIND := $(if $(shell nvidia-smi -L 2>/dev/null | grep '^GPU'),gpu,cpu)
REQUIREMENTS := $(if $(filter gpu,$(KIND)),requirements.txt,requirements-cpu.txt)
ENVIRONMENT := .venv/made-for-$(KIND)
RUN := .venv/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check --quiet

# What is built here comes from here: neither demo nor tests may reach for the hub.
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
export PYTHONWARNINGS := ignore::FutureWarning
export PYTHONUNBUFFERED := 1

.PHONY: demo test test-faults results ablations lint pytest clean

demo: $(ENVIRONMENT)
	rm -rf toy && mkdir toy && touch toy/started
	$(RUN) -m experiments.toy --out toy --seed $(SEED)
	$(RUN) offline_value.py --model toy/reference --dataset toy/train.jsonl --max-tokens 128 \
	    --seed $(SEED) --out toy/values.json
	$(RUN) evaluate.py --model toy/reference --benchmarks toy/test.jsonl --num-samples 8 \
	    --max-tokens 128 --seed $(SEED) --out toy/before
	$(RUN) train_online.py --values toy/values.json --lr 1e-4 --batch-size 128 --num-steps 50 \
	    --save-every 20 --eval-dataset toy/test.jsonl --eval-every 5 --seed $(SEED) --out toy/run
	$(RUN) evaluate.py --model toy/run/final --benchmarks toy/test.jsonl --num-samples 8 \
	    --max-tokens 128 --seed $(SEED) --out toy/after
	$(RUN) -m experiments.report --folder toy

test: lint pytest

lint: $(ENVIRONMENT)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

pytest: $(ENVIRONMENT)
	$(RUN) -m pytest -m "not faults"

FAULTS := -m "faults or not faults" tests/test_faults.py tests/test_bad_input.py
test-faults: $(ENVIRONMENT)
	set -o pipefail; $(RUN) -m pytest -v -rP $(FAULTS) 2>&1 | tee experiments/results/faults.txt

# One thread: on so small a model a second hardly helps, and threads that spin cost the graders.
results ablations: export OMP_NUM_THREADS := 1

results: $(ENVIRONMENT) toy/values.json
	$(RUN) -m experiments.theory
	$(RUN) -m experiments.compare --passk 32

ablations: $(ENVIRONMENT) toy/values.json
	$(RUN) -m experiments.ablate --seeds 3

toy/values.json: | $(ENVIRONMENT)
	$(RUN) -m experiments.toy --out toy --seed $(SEED)
	$(RUN) offline_value.py --model toy/reference --dataset toy/train.jsonl --max-tokens 128 \
	    --seed $(SEED) --out toy/values.json

clean:
	rm -rf toy .venv .pytest_cache .ruff_cache .hypothesis

# Without a GPU, torch alone is asked of PyTorch's CPU index (requirements-cpu.txt says why), and quickly
# elsewhere if that cannot be reached.
$(ENVIRONMENT): $(REQUIREMENTS) requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	    "error: $(PYTHON) is not Python 3.11 or newer: try again with PYTHON=/path/to/python3.12" >&2; exit 2; }
	@echo "Making the environment in .venv from $(REQUIREMENTS): some minutes"
	$(PYTHON) -m venv .venv
ifeq ($(KIND),cpu)
	$(PIP) install --no-deps --retries 1 --timeout 15 \
	    --extra-index-url https://download.pytorch.org/whl/cpu $$(grep -o '^torch==[^ ]*' $<)
	$(PIP) install -r $< -r requirements-dev.txt
	$(PIP) uninstall --yes torchvision torchaudio torchcodec
else
	$(PIP) install -r $< -r requirements-dev.txt
endif
	touch $@
