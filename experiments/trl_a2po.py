r"""The peer: TRL's A2POTrainer on a local model and problems, on the CPU, as fast as it can be set.

TRL stays out of the project's environment. Its own is made by

    python3.11 -m venv /path/to/trl-env
    /path/to/trl-env/bin/pip install --index-url https://download.pytorch.org/whl/cpu torch==2.13.0
    /path/to/trl-env/bin/pip install 'transformers>=5.16.1,<5.20' 'trl==1.16.*' accelerate \
        datasets math-verify

(no torchvision, which expects CUDA beside a CPU torch) and used from the root of this repository:

    /path/to/trl-env/bin/python -m experiments.trl_a2po --model toy/reference \
        --dataset toy/train.jsonl --test toy/test.jsonl --max-tokens 128 --lr 1e-4 --out toy/trl

saves the trained model in OUT/final, for evaluate.py, and prints one line of JSON: seconds and
greedy accuracy. Prompts, reward and the numbers of the run are ours. Where TRL would differ:

1. A2POConfig(top_k=None), documented as "disabled", samples from the 50 likeliest tokens, because
   transformers 5 fills the gap with its own default: 0 turns it off.
2. Prompts that the reference never solved are dropped unless filter_all_incorrect=False.
3. bf16 and gradient checkpointing are on by default, the learning rate falls linearly: all off.
4. The reward sees text alone, not whether EOS came. Here text as long as the limit earns 0.
5. One size of batch serves both stages, and each micro-batch is sampled by itself. Here stage 1 has
   a size of its own (--stage1-batch-size), since it is most of the time.
6. One optimiser step per rollout: there is no equivalent of --updates-per-batch 2.
"""

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is on the hub; no telemetry either

import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.a2po import A2POConfig, A2POTrainer

import problems


def parse_args() -> argparse.Namespace:
    """Read the command line; names and defaults are those of our own stages."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=style)
    add = parser.add_argument
    add("--model", required=True, help="reference pi_ref: a folder")
    add("--dataset", required=True, help="training problems, .jsonl")
    add("--test", help="problems for the greedy accuracy at the end, .jsonl")
    add("--out", type=Path, required=True, help="folder for the trained model")
    add("--num-value-samples", type=int, default=8, help="N, responses per prompt")
    add("--beta1", type=float, default=0.5, help="beta1 of V*")
    add("--beta2", type=float, default=1e-3, help="strength of the KL term")
    add("--lr", type=float, default=1e-6, help="AdamW's learning rate, constant")
    add("--batch-size", type=int, default=128, help="prompts per step")
    add("--num-steps", type=int, default=40, help="steps of stage 2")
    add("--max-prompt-tokens", type=int, default=256, help="longer prompts are cut")
    add("--max-tokens", type=int, default=128, help="longest response, in tokens")
    add("--limit", type=int, default=0, help="use only the first so many problems; 0: all")
    add("--seed", type=int, default=0, help="of data order and sampling")
    add("--stage1-batch-size", type=int, default=128, help="prompts at once in stage 1")
    add("--micro-batch-size", type=int, default=128, help="prompts at once in stage 2")
    add("--attention", default="sdpa", help="transformers' attn_implementation")
    add("--threads", type=int, default=2, help="torch's threads")
    add("--sort", action="store_true", help="stage 1 takes prompts by length: less padding")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------
# What TRL is given


def read_prompts(path: str, tokenizer: AutoTokenizer, limit: int, by_length: bool) -> Dataset:
    """Problems as TRL wants them, in our words: columns prompt and answer.

    The order matters to stage 1 alone, which pads each batch to its longest; training shuffles.
    """
    rows = problems.load_problems(path)[: limit or None]
    rows = [
        {"prompt": problems.format_prompt(row["question"]), "answer": row["answer"]} for row in rows
    ]
    if by_length:
        rows.sort(key=lambda row: len(tokenizer(row["prompt"]).input_ids))
    return Dataset.from_list(rows)


def make_reward(tokenizer: AutoTokenizer, max_tokens: int) -> Callable:
    """Our reward, and 0 for a response that did not finish, as in our stages.

    TRL hands over text without EOS: one that finished has at most max_tokens - 1 tokens left.
    """

    def reward(completions: list[str], answer: list[str], **_: object) -> list[float]:
        lengths = map(len, tokenizer(completions).input_ids)
        graded = zip(completions, answer, lengths, strict=True)
        return [problems.reward(text, gold) if n < max_tokens else 0.0 for text, gold, n in graded]

    return reward


def make_config(args: argparse.Namespace) -> A2POConfig:
    """The algorithm's settings as ours, all else off that costs time."""
    return A2POConfig(
        output_dir=str(args.out / "trainer"),
        num_value_samples=args.num_value_samples,
        beta1=args.beta1,
        beta2=args.beta2,
        filter_all_incorrect=False,
        max_prompt_length=args.max_prompt_tokens,
        max_completion_length=args.max_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        per_device_train_batch_size=args.micro_batch_size,
        gradient_accumulation_steps=args.batch_size // args.micro_batch_size,
        max_steps=args.num_steps,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        seed=args.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


# ---------------------------------------------------------------------------------------------
# Measuring


class Clock(TrainerCallback):
    """The time after each optimiser step."""

    def __init__(self):
        self.laps = []

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        """Training proper starts here."""
        self.laps.append(time.perf_counter())

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        """One rollout and its update are done."""
        self.laps.append(time.perf_counter())


def timed(work: Callable, name: str, spent: Counter) -> Callable:
    """Wrap a function so that its seconds add up in `spent`: the profile of TRL's time."""

    def wrapped(*args: object, **kwargs: object) -> object:
        start = time.perf_counter()
        result = work(*args, **kwargs)
        spent[name] += time.perf_counter() - start
        return result

    return wrapped


def counting(generate: Callable, eos: int, spent: Counter) -> Callable:
    """Wrap `generate` so that the tokens it decoded, and those of them that are real, add up."""

    def wrapped(*args: object, **kwargs: object) -> torch.Tensor:
        ids = generate(*args, **kwargs)
        response = ids[:, kwargs["input_ids"].shape[1] :]
        spent["tokens_decoded"] += response.numel()
        before_eos = (response == eos).cumsum(dim=1) == 0
        spent["tokens_real"] += int(before_eos.sum()) + int((~before_eos).any(dim=1).sum())
        return ids

    return wrapped


@torch.no_grad()
def greedy_accuracy(
    model: AutoModelForCausalLM, tokenizer: AutoTokenizer, rows: Dataset, max_tokens: int
) -> float:
    """Mean reward of one greedy answer to each problem."""
    model.eval()
    inputs = tokenizer(list(rows["prompt"]), return_tensors="pt", padding=True)
    ids = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    rewards = make_reward(tokenizer, max_tokens)(texts, rows["answer"])
    return sum(rewards) / len(rewards)


def stage1(trainer: A2POTrainer, batch_size: int) -> None:
    """Estimate V* with a batch of its own: `train` would use the micro-batch of stage 2."""
    size = trainer.args.per_device_train_batch_size
    trainer.args.per_device_train_batch_size = batch_size
    trainer._estimate_optimal_values()
    trainer.args.per_device_train_batch_size = size


def main() -> None:
    """Run both stages, save, score, print."""
    args, began = parse_args(), time.perf_counter()
    if args.batch_size % args.micro_batch_size:
        raise problems.UserError("--batch-size is not divisible by --micro-batch-size")
    disable_progress_bar()
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation=args.attention)
    prompts = read_prompts(args.dataset, tokenizer, args.limit, args.sort)
    clock, spent = Clock(), Counter()
    trainer = A2POTrainer(
        model=model,
        reward_funcs=timed(make_reward(tokenizer, args.max_tokens), "grade", spent),
        args=make_config(args),
        train_dataset=prompts,
        processing_class=tokenizer,
        callbacks=[clock],
    )
    for one in (trainer.model, trainer.ref_model):
        one.generate = timed(
            counting(one.generate, tokenizer.eos_token_id, spent), "generate", spent
        )
    forward, backward = trainer._get_sequence_logps, trainer.accelerator.backward
    trainer._get_sequence_logps = timed(forward, "forward, pi and pi_ref", spent)
    trainer.accelerator.backward = timed(backward, "backward", spent)
    start, cpu = time.perf_counter(), time.process_time()
    stage1(trainer, args.stage1_batch_size)
    after_stage1, cpu1, in_stage1 = time.perf_counter(), time.process_time(), dict(spent)
    v_star = list(trainer._optimal_values.values())
    spent.clear()
    trainer.train()
    end, cpu2 = time.perf_counter(), time.process_time()
    del model.generate  # the plain one again
    trainer.save_model(str(args.out / "final"))
    accuracy = None
    if args.test:
        test = read_prompts(args.test, tokenizer, 0, False)
        accuracy = greedy_accuracy(model, tokenizer, test, args.max_tokens)
    steps = [b - a for a, b in zip(clock.laps, clock.laps[1:], strict=False)]
    result = {
        "seconds_load": start - began,
        "seconds_stage1": after_stage1 - start,
        "seconds_training": end - after_stage1,
        "seconds_steps": steps,
        "cpu_seconds_stage1": cpu1 - cpu,
        "cpu_seconds_training": cpu2 - cpu1,
        "stage1": in_stage1,
        "training": dict(spent),
        "mean_v_star": sum(v_star) / len(v_star),
        "greedy_accuracy": accuracy,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    problems.run(main)
