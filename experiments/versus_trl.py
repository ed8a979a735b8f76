"""Compare the speed of our two stages with that of TRL's A2POTrainer, on the toy and a CPU.

Question: how fast is this code compared with TRL's implementation of the same algorithm?
Command:  pip install --target runs/trl --no-deps trl==1.16.0 accelerate==1.15.0
          python -m experiments.versus_trl                                    (after `make demo`)
Time:     10 minutes on 2 cores.
Output:   versus-trl.txt and versus-trl.json in experiments/results.
Answer:   it is printed; no full run of it has been made yet, so nothing is claimed

Both sides have the same reference, prompts, reward, N, beta1, beta2, batch, learning rate, AdamW,
clipping, response limit and float32, and one optimizer step per batch (TRL has no other). TRL runs
with each of --trl-batch-sizes, and its fastest run counts. Where TRL would differ:

1. A2POConfig(top_k=None), documented as "disabled", samples from the 50 likeliest tokens, because
   transformers fills the gap with its own default. 0 turns it off.
2. Prompts that the reference never solved are dropped, unless filter_all_incorrect is False.
3. bf16, gradient checkpointing and a falling learning rate are on by default.
4. The reward sees text alone, not whether EOS came. Text as long as the limit earns 0 here.

Two times are compared: `whole` processes, with imports, start-up and saving (we have two processes
and an engine, TRL has one process), and `bare`: sampling and grading of stage 1, and the steps.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from apo import command_line, problems
from apo.files import UserError, check_writable, read_json, read_jsonl, write_json, write_text

RESULTS = Path("experiments/results")
BETA1 = 0.5
BETA2 = 1e-3


class Times(NamedTuple):
    """What one run of one side took, in seconds, and the accuracy of the model that it trained."""

    whole: float
    bare: float
    stage1: float
    steps: float
    cpu: float  # CPU time of the whole processes, which other load hardly changes
    accuracy: float


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = command_line.new_parser(__doc__.splitlines()[0], "")
    positive_integer = command_line.positive_integer
    parser.add_argument("--trl", type=Path, default=Path("runs/trl"), help="where TRL is installed")
    parser.add_argument("--toy", type=Path, default=Path("toy"), help="the folder of make demo")
    parser.add_argument("--out", type=Path, default=Path("runs/versus-trl"), help="runs and logs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--rounds", type=positive_integer, default=2, help="runs of each side")
    parser.add_argument("--num-steps", type=positive_integer, default=40, help="steps of stage 2")
    parser.add_argument("--batch-size", type=positive_integer, default=128, help="prompts a step")
    parser.add_argument(
        "--num-value-samples", type=positive_integer, default=8, help="N, responses per prompt"
    )
    parser.add_argument(
        "--max-tokens", type=positive_integer, default=128, help="longest response, in tokens"
    )
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument(
        "--trl-batch-sizes", default="32,64,128", help="what TRL may take at once, with commas"
    )
    # The process of TRL's side runs this module with this flag.
    parser.add_argument("--trl-batch-size", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------
# TRL's side, in a process of its own


def make_trl_config(args: argparse.Namespace) -> Any:
    """Set TRL as we are set, and turn off all else that costs time."""
    from trl.experimental.a2po import A2POConfig

    return A2POConfig(
        output_dir=str(args.out / "trainer"),
        num_value_samples=args.num_value_samples,
        beta1=BETA1,
        beta2=BETA2,
        filter_all_incorrect=False,
        max_prompt_length=256,
        max_completion_length=args.max_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        per_device_train_batch_size=args.trl_batch_size,
        gradient_accumulation_steps=args.batch_size // args.trl_batch_size,
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
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def make_trl_reward(tokenizer: Any, max_tokens: int) -> Callable:
    """Return our reward as TRL calls it, with 0 for a response that did not finish."""

    def reward(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        rewards = []
        for text, right, ids in zip(
            completions, answer, tokenizer(completions).input_ids, strict=True
        ):
            # The text has no EOS, so one that finished has at most max_tokens - 1 tokens.
            finished = len(ids) < max_tokens
            rewards.append(problems.reward(text, right) if finished else 0.0)
        return rewards

    return reward


def train_with_trl(args: argparse.Namespace) -> None:
    """Run both of TRL's stages; save the model, and the times in times.json."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.a2po import A2POTrainer

    reference = args.toy / "reference"
    tokenizer = AutoTokenizer.from_pretrained(reference, padding_side="left")
    rows = []
    for row in problems.load_problems(str(args.toy / "train.jsonl")):
        rows.append({"prompt": problems.format_prompt(row["question"]), "answer": row["answer"]})
    # Stage 1 pads each batch to its longest prompt. Training shuffles in any case.
    rows.sort(key=lambda row: len(tokenizer(row["prompt"]).input_ids))
    trainer = A2POTrainer(
        model=AutoModelForCausalLM.from_pretrained(reference),
        reward_funcs=make_trl_reward(tokenizer, args.max_tokens),
        args=make_trl_config(args),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    start = time.perf_counter()
    trainer._estimate_optimal_values()
    middle = time.perf_counter()
    trainer.train()
    end = time.perf_counter()
    trainer.save_model(str(args.out / "final"))
    write_json(args.out / "times.json", {"stage1": middle - start, "steps": end - middle})


# ---------------------------------------------------------------------------------------------
# Both sides as processes


class Process(NamedTuple):
    """What a process took."""

    seconds: float
    cpu: float
    started_work: float  # the time at which the awaited path was there


def run(
    arguments: list[Any], log: Path, awaited: Path | None = None, trl: Path | None = None
) -> Process:
    """Run Python with these arguments, and its output in a log. UserError if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if trl is not None:
        environment |= {"PYTHONPATH": str(trl), "TRL_EXPERIMENTAL_SILENCE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    started_work = 0.0
    words = [sys.executable, *(str(argument) for argument in arguments)]
    with open(log, "w") as file:
        child = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            while child.poll() is None:
                if awaited is not None and not started_work and awaited.exists():
                    started_work = time.time()
                time.sleep(0.02)
        finally:
            child.terminate()  # after an interruption
            child.wait()
    seconds = time.perf_counter() - start
    if child.returncode != 0:
        raise UserError(f"exit code {child.returncode}, see {log}: {' '.join(words)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Process(seconds, cpu, started_work)


def accuracy(args: argparse.Namespace, model: Path, out: Path) -> float:
    """Return the accuracy of a model by our evaluation, 8 samples per test problem."""
    command = ["evaluate.py", "--model", model, "--out", out]
    command += ["--benchmarks", args.toy / "test.jsonl", "--num-samples", 8]
    command += ["--max-tokens", args.max_tokens]
    run(command, out.with_suffix(".log"))
    (benchmark,) = read_json(out / "summary.json")["benchmarks"].values()
    return benchmark["mean"]


def run_ours(args: argparse.Namespace, seed: int, out: Path) -> Times:
    """Run both stages as a user starts them."""
    values = out / "values.json"
    command = ["offline_value.py", "--model", args.toy / "reference"]
    command += ["--dataset", args.toy / "train.jsonl", "--beta1", BETA1, "--out", values]
    command += ["--num-value-samples", args.num_value_samples, "--max-tokens", args.max_tokens]
    command += ["--seed", seed]
    first = run(command, out / "stage1.log", out / "values.json.partial")
    command = ["train_online.py", "--values", values, "--out", out / "run"]
    command += ["--updates-per-batch", 1, "--batch-size", args.batch_size, "--beta2", BETA2]
    command += ["--num-steps", args.num_steps, "--save-every", args.num_steps, "--lr", args.lr]
    command += ["--seed", seed, "--eval-dataset", "none"]
    second = run(command, out / "stage2.log")
    metrics = read_jsonl(out / "run" / "metrics.jsonl")
    stage1 = values.stat().st_mtime - first.started_work
    steps = sum(line["seconds_total"] for line in metrics)
    return Times(
        whole=first.seconds + second.seconds,
        bare=stage1 + steps,
        stage1=stage1,
        steps=steps,
        cpu=first.cpu + second.cpu,
        accuracy=accuracy(args, out / "run" / "final", out / "score"),
    )


def run_trl(args: argparse.Namespace, seed: int, size: int, out: Path) -> Times:
    """Run both stages in TRL's one process."""
    command = ["-m", "experiments.versus_trl", "--trl-batch-size", size]
    command += ["--toy", args.toy, "--out", out, "--batch-size", args.batch_size, "--seed", seed]
    command += ["--num-steps", args.num_steps, "--lr", args.lr, "--max-tokens", args.max_tokens]
    command += ["--num-value-samples", args.num_value_samples]
    process = run(command, out / "trl.log", trl=args.trl)
    times = read_json(out / "times.json")
    return Times(
        whole=process.seconds,
        bare=times["stage1"] + times["steps"],
        stage1=times["stage1"],
        steps=times["steps"],
        cpu=process.cpu,
        accuracy=accuracy(args, out / "final", out / "score"),
    )


# ---------------------------------------------------------------------------------------------
# The comparison


def compare(ours: list[Times], trl: list[Times]) -> dict[str, float]:
    """Return ours / TRL's, of times summed over the rounds; below 1, ours is faster."""
    ratios = {}
    for name in ("whole", "bare", "stage1", "steps", "cpu"):
        ratios[name] = sum(getattr(t, name) for t in ours) / sum(getattr(t, name) for t in trl)
    return ratios


def format_times(label: str, times: Times) -> str:
    """Write one run as a line of the table."""
    seconds = "".join(f"{value:10.1f}" for value in times[:-1])
    return f"{label:16}{seconds}{times.accuracy:10.1%}"


def main() -> None:
    """Run the rounds, print the table, keep the numbers."""
    args = parse_args()
    if args.trl_batch_size is not None:
        train_with_trl(args)
        return
    if not (args.trl / "trl").exists():
        raise UserError(
            f"{args.trl} has no trl; the first lines of this file say how to install it"
        )
    check_writable(args.results, is_folder=True, flag="--results")
    if any(args.out.glob("*")):
        raise UserError(f"{args.out} is not empty: remove it, or give another --out")
    try:
        sizes = [int(size) for size in args.trl_batch_sizes.split(",")]
    except ValueError as error:
        raise UserError(f"--trl-batch-sizes {args.trl_batch_sizes}: give numbers") from error
    if any(size < 1 or args.batch_size % size != 0 for size in sizes):
        raise UserError(f"--trl-batch-sizes: each must divide --batch-size {args.batch_size}")
    head = "".join(f"{name:>10}" for name in Times._fields)
    lines = [f"$ {' '.join(['python -m experiments.versus_trl', *sys.argv[1:]])}"]
    lines += [f"{os.cpu_count()} cores, {platform.machine()}, seconds", f"{'':16}{head}"]
    ours = []
    fastest = []
    for number in range(args.rounds):
        seed = args.seed + number
        ours.append(run_ours(args, seed, args.out / f"ours-{number}"))
        lines.append(format_times(f"ours {number}", ours[-1]))
        candidates = []
        for size in sizes:
            times = run_trl(args, seed, size, args.out / f"trl-{number}-{size}")
            candidates.append(times)
            lines.append(format_times(f"TRL {number}, {size}", times))
        fastest.append(min(candidates, key=lambda times: times.bare))
    ratios = compare(ours, fastest)
    cells = "".join(f"{value:10.2f}" for value in ratios.values())
    lines.append(f"{'ours / TRL':16}{cells}")
    print("\n".join(lines))
    data = {
        "command": lines[0],
        "ratios": ratios,
        "ours": [times._asdict() for times in ours],
        "trl": [times._asdict() for times in fastest],
    }
    write_text(args.results / "versus-trl.txt", "\n".join(lines) + "\n")
    write_json(args.results / "versus-trl.json", data)


if __name__ == "__main__":
    command_line.run(main)
