"""Stage 3: score a model on benchmarks, mean@n and pass@k with standard errors.

As in the paper, each problem of the large sets gets one answer, and each of AMC, AIME and HMMT gets
32 samples, since 30 or 40 answers would tell little. The single answer is greedy, and the 32 are
drawn at temperature 1: this we chose ourselves. What is printed:

- mean: the mean reward in percent, with its standard error over the problems. With rewards of 0 and
  1 it is the accuracy. A response that does not end within --max-tokens counts as wrong, as in
  training.
- any end: the same mean if truncated responses are graded, too. Base models often go on after the
  answer.
- truncated: the fraction of responses that did not end.
- pass@k: the chance that at least one of k samples is right, estimated without bias from all n.

OUT/NAME.jsonl has every sample, OUT/summary.json the scores. If this is killed and started again
with the same flags, it continues. A model that train_online.py made gets prompts as in its
training, by its run's config.json.
"""

from apo import environment  # noqa: F401 - it ends with a sentence if no environment is active

# isort: split
import argparse
import dataclasses
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch

from apo import command_line, engine, files, math_reward, problems, self_check
from apo.command_line import fraction, positive_integer, temperature, whole_number
from apo.files import UserError
from apo.problems import Prompt, PromptStyle
from apo.values import check_settings, is_number
from losses import pass_at_k

EXAMPLES = """examples:
  python evaluate.py                                          the trained model of the MATH run
  python evaluate.py --model Qwen/Qwen2.5-1.5B --out results/base
  python evaluate.py --model runs/math/final --benchmarks amc23,aime24 --out results/aime
  python evaluate.py --grade results/math/math500.jsonl       score saved outputs again, no model
"""
# Sets of 30 or 40 problems.
SMALL_BENCHMARKS = ("amc23", "aime24", "aime25", "hmmt_feb_2024", "hmmt_feb_2025")
SAMPLES_OF_SMALL = 32
LONGEST_PROMPT = 32_768  # tokens


def make_parser() -> argparse.ArgumentParser:
    """Describe the flags. The defaults are the published evaluation of the MATH run."""
    parser = command_line.new_parser(__doc__.splitlines()[0], EXAMPLES)
    add = parser.add_argument_group("what to score").add_argument
    add("--model", default="runs/math/final", help="a folder or a hub id")
    add(
        "--benchmarks",
        default="math500,minerva,olympiadbench,amc23",
        help="with commas between them; each is one of " + problems.describe("test"),
    )
    add(
        "--limit",
        type=whole_number,
        default=0,
        help="use only this many problems, the first ones; 0 uses all",
    )
    add(
        "--num-samples",
        type=whole_number,
        default=0,
        help="samples per problem; 0 takes 32 for AMC, AIME and HMMT, and 1 for the others, or for "
        "all with --temperature 0",
    )
    add(
        "--temperature",
        type=temperature,
        help="sampling temperature, 0 is greedy; by default 0 for one sample and 1 for more",
    )
    add("--top-p", type=fraction, default=1.0, help="share of the probability to sample from")
    add(
        "--max-tokens",
        type=positive_integer,
        help="longest response, in tokens; by default what the model was trained with, else 1024",
    )
    add("--out", default="results/math", help="folder of the samples and of summary.json")
    add(
        "--grade",
        metavar="FILE",
        help="score the mathematics in this file of saved outputs; no model is needed",
    )
    command_line.add_prompt_flags(parser)
    command_line.add_engine_flags(parser, gpu_share=0.9)
    return parser


# ---------------------------------------------------------------------------------------------
# Scores


def score(records: list[dict]) -> dict:
    """Sum up one benchmark's records {"id", "reward", "answer", "output", "finished", "tokens"}.

    `mean` is the mean reward and `stderr` its standard error, both over problems. pass@k is a mean
    over problems, too; a response with a reward above 0 passes. `mean_any_end` is `mean` without
    the rule that a response without EOS earns 0, since base models ramble on after the answer. The
    rest is over samples.
    """
    # Samples of one problem are alike, so the standard error is over problems, not over samples.
    rewards_of = by_problem(records, [record["reward"] for record in records])
    problem_means = [statistics.mean(rewards) for rewards in rewards_of.values()]
    stderr = 0.0
    if len(problem_means) > 1:
        stderr = statistics.stdev(problem_means) / len(problem_means) ** 0.5
    # A file given to --grade may have fewer samples of some problems than of others.
    num_samples = min(len(rewards) for rewards in rewards_of.values())

    # What did not finish was never scored, so it is scored here.
    unfinished = [record for record in records if not record["finished"]]
    finished = [record for record in records if record["finished"]]
    rewards_any_end = [record["reward"] for record in finished] + grade_outputs(unfinished)
    any_end_of = by_problem(finished + unfinished, rewards_any_end)
    any_end_means = [statistics.mean(rewards) for rewards in any_end_of.values()]
    return {
        "num_problems": len(rewards_of),
        "num_samples": num_samples,
        "mean": statistics.mean(problem_means),
        "stderr": stderr,
        "pass_at_k": pass_at_powers(list(rewards_of.values()), num_samples),
        "tokens": statistics.mean(record["tokens"] for record in records),
        "truncated": len(unfinished) / len(records),
        "mean_any_end": statistics.mean(any_end_means),
    }


def by_problem(records: list[dict], rewards: list[float]) -> dict[str, list[float]]:
    """Return the rewards of these records by the problem's id."""
    rewards_of = {}
    for record, reward in zip(records, rewards, strict=True):
        rewards_of.setdefault(record["id"], []).append(reward)
    return rewards_of


def pass_at_powers(rewards: list[list[float]], num_samples: int) -> dict[str, float]:
    """Return pass@k, the mean over problems, for k = 1, 2, 4, ... and num_samples.

    Example: n = 8 -> k = 1, 2, 4, 8. The keys are texts, as in JSON.
    """
    # k doubles, since what matters is how fast pass@k grows. The last one is n itself.
    powers = {2**i for i in range(num_samples.bit_length())}
    table = {}
    for k in sorted(powers | {num_samples}):
        values = []
        for samples in rewards:
            num_correct = sum(reward > 0 for reward in samples)
            values.append(pass_at_k(len(samples), num_correct, k))
        table[str(k)] = statistics.mean(values)
    return table


def grade_outputs(records: list[dict]) -> list[float]:
    """Score outputs, whether they finished or not.

    A record has its dataset row under "row"; without one its answer is graded as mathematics.
    """
    # All are submitted before the first result is asked for, so that the workers grade in parallel.
    futures = []
    for record in records:
        row = record.get("row") or {"id": record["id"], "answer": record["answer"]}
        futures.append(problems.submit_reward(record["output"], row))
    return [future.result() for future in futures]


# What print_table prints of a benchmark's scores, beside pass@k.
SCORES = ("num_problems", "num_samples", "mean", "stderr", "mean_any_end", "truncated", "tokens")


def print_table(benchmarks: dict[str, dict]) -> None:
    """Print one line for each benchmark.

    Everything but the counts and the tokens is in percent. `any end` and `truncated` tell whether a
    low accuracy comes from wrong answers or from responses that do not end.
    """
    print("benchmark        problems   n    mean ±  s.e.  any end  truncated  tokens  pass@k")
    for name, scores in benchmarks.items():
        pass_at = "  ".join(f"@{k} {value:.1%}" for k, value in scores["pass_at_k"].items())
        print(
            f"{name:<16} {scores['num_problems']:>8} {scores['num_samples']:>3} "
            f"{scores['mean']:>7.1%} ± {scores['stderr']:>5.1%} {scores['mean_any_end']:>8.1%} "
            f"{scores['truncated']:>10.1%} {scores['tokens']:>7.0f}  {pass_at}"
        )


def grade_file(path: Path) -> dict:
    """Score saved outputs again, ours or anyone's, as mathematics.

    Every row needs "answer" and "output". "finished" is true, "tokens" 0 and "id" the row's number
    if they are missing. Raises UserError that names the first row with something wrong.
    """
    records = []
    for number, row in enumerate(problems.read_rows(path), start=1):
        where = f"{path}, row {number}"
        if not isinstance(row.get("output"), str):
            raise UserError(f'{where} has no text "output": {row!r:.60}')
        if "answer" not in row:
            raise UserError(f'{where} has no "answer": {row!r:.60}')
        # Only these columns count; others, ours or not, play no part.
        record = {"output": row["output"], "_task": "math"}
        record["answer"] = row["answer"]
        record["id"] = row.get("id")
        record["finished"] = row.get("finished", True)
        record["tokens"] = row.get("tokens", 0)
        if record["id"] is None:
            record["id"] = f"row {number}"
        if not isinstance(record["id"], str | int | float):
            raise UserError(f'{where}: "id" is neither a text nor a number')
        if not isinstance(record["finished"], bool):
            raise UserError(f'{where}: "finished" is neither true nor false')
        if not is_number(record["tokens"]):
            raise UserError(f'{where}: "tokens" is not a number')
        records.append(problems.as_json(record, where))
    if not records:
        raise UserError(f"{path} has no rows")
    # Rows that cannot be graded are named. They stay in the score, as wrong.
    _, reasons = problems.keep_gradable(str(path), records)
    for reason in reasons:
        print(f"counted as wrong: {reason}")
    # A response that did not finish earns 0, as in all stages.
    finished = [record for record in records if record["finished"]]
    for record in records:
        record["reward"] = 0.0
    for record, reward in zip(finished, grade_outputs(finished), strict=True):
        record["reward"] = reward
    return score(records)


# ---------------------------------------------------------------------------------------------
# Settings


def settings_of_run(model: str) -> dict:
    """Return the config of the training run that made a model; {} for any other model.

    The model is RUN/final or RUN/checkpoints/step-N, and RUN has config.json. Raises UserError if
    somebody has edited that into something else.
    """
    if not os.path.isdir(model):  # a hub id
        return {}
    # RUN is the first parent of final, and the second one of step-N.
    # A checkpoint may be a link to another disk, and any name may be a link to a run's model.
    as_named = Path(model).absolute().parents[:2]
    as_linked = Path(model).resolve().parents[:2]
    for folder in (*as_named, *as_linked):
        path = folder / "config.json"
        if not path.exists():
            continue
        try:
            config = files.read_json(path)
        except UserError:
            if (Path(model) / "manifest.json").exists():  # a model that stage 2 has saved
                raise
            continue  # some other program's file, of another form
        if "values_digest" not in config:
            continue  # not of a run: a model's own config.json, or some other program's
        check_settings(config, str(path))
        max_tokens = config.get("max_tokens", 1)
        if type(max_tokens) is not int or max_tokens < 1:
            raise UserError(f'{path}: "max_tokens" is {max_tokens!r}, not a number of tokens')
        return config
    return {}


def base_style(args: argparse.Namespace, trained_with: dict) -> PromptStyle:
    """Decide on the prompt: as the model was trained, except for what a flag says."""
    trained = PromptStyle.from_settings(trained_with)
    style = problems.prompt_style(
        trained.template,
        args.chat_template or trained.chat_template,
        args.system_prompt,
        args.chat_template_kwargs,
    )
    if args.system_prompt is None:
        style = dataclasses.replace(style, system_prompt=trained.system_prompt)
    if args.chat_template_kwargs is None:
        style = dataclasses.replace(style, chat_template_kwargs=trained.chat_template_kwargs)
    return style


def make_header(args: argparse.Namespace, style: PromptStyle) -> dict:
    """Collect all that decides what is sampled, except the benchmark itself.

    A second start with another header is refused, so that no table mixes two settings. `style` is
    the same for all benchmarks. A benchmark's own template is saved with its scores instead; see
    Benchmark.identity.
    """
    return {
        "model": args.model,
        "model_fingerprint": files.model_fingerprint(files.model_folder(args.model)),
        "limit": args.limit,
        "num_samples": args.num_samples,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_tokens": args.max_tokens,
        "seed": args.seed,
        **style.settings(),
    }


@dataclasses.dataclass
class Benchmark:
    """One benchmark: its rows, and the prompts for this model."""

    rows: list[dict]
    prompts: list[Prompt]
    num_samples: int  # of each problem
    temperature: float
    identity: dict  # what its scores depend on, beside the header
    remarks: list[str]  # sentences about its rows for the user


def make_benchmark(
    name: str,
    rows: list[dict],
    args: argparse.Namespace,
    trained_with: dict,
    tokenizer: Any,
) -> Benchmark:
    """Make the prompts of a benchmark's rows."""
    # All rows stay in the score. One whose answer cannot be graded counts as wrong.
    _, reasons = problems.keep_gradable(name, rows)
    remarks = [f"counted as wrong: {reason}" for reason in reasons]

    # A task with the reward function of the training gets the template of the training.
    task = problems.find_task(name)
    style = problems.style_of_task(
        base_style(args, trained_with), task, trained_reward=trained_with.get("reward")
    )
    prompts = []
    for row in rows:
        prompts.append(problems.make_prompt(row, style, tokenizer))
    cut = problems.cut_prompts(name, prompts, room_for_prompt(args), tokenizer)
    if cut is not None:
        remarks.append(cut)
    identity = {
        "rows_digest": files.content_digest(rows),
        "prompt_template": style.template,
        "reward": problems.reward_name(task),
    }
    num_samples, sampling_temperature = how_to_sample(task, args)
    return Benchmark(rows, prompts, num_samples, sampling_temperature, identity, remarks)


def how_to_sample(task: str, args: argparse.Namespace) -> tuple[int, float]:
    """Return how many responses each problem of a task gets, and at which temperature."""
    num_samples = args.num_samples
    if num_samples == 0:
        # As in the paper. Greedy responses would all be equal. A local file has the task "math",
        # whatever its name.
        draws = args.temperature != 0
        num_samples = SAMPLES_OF_SMALL if task in SMALL_BENCHMARKS and draws else 1
    sampling_temperature = args.temperature
    if sampling_temperature is None:
        sampling_temperature = 0.0 if num_samples == 1 else 1.0
    return num_samples, sampling_temperature


def load_benchmarks(args: argparse.Namespace, trained_with: dict) -> dict[str, Benchmark]:
    """Load the benchmarks of --benchmarks, by the names under which their results are saved."""
    # The rows of all come first: a wrong name should not wait for a tokenizer.
    name_of = {}  # by the name under which its results are saved
    rows_of = {}
    for name in args.benchmarks.split(","):
        short_name = Path(name).stem if problems.is_file(name) else name
        if short_name in name_of:
            raise UserError(
                f"two benchmarks are called {short_name}: score them apart, each with its own --out"
            )
        results = Path(args.out, f"{short_name}.jsonl")
        files.check_writable(results)
        if results.resolve() == Path(name).resolve():
            raise UserError(f"the results of {name} would replace it: give another --out")
        name_of[short_name] = name
        rows_of[short_name] = problems.load_problems(name, "test")[: args.limit or None]

    folder = files.model_folder(args.model)
    tokenizer = problems.load_tokenizer(folder)
    vocabulary_size = self_check.vocabulary_size(folder)
    benchmarks = {}
    for short_name, name in name_of.items():
        benchmark = make_benchmark(name, rows_of[short_name], args, trained_with, tokenizer)
        problems.check_prompts(benchmark.prompts, vocabulary_size, tokenizer)
        benchmarks[short_name] = benchmark
    return benchmarks


def room_for_prompt(args: argparse.Namespace) -> int:
    """Return how many tokens a prompt can have, beside a response of --max-tokens.

    Raises UserError if there is no room at all.
    """
    folder = files.model_folder(args.model)
    room = files.context_length(folder) - args.max_tokens
    # With longrope or dynamic rope scaling, vLLM computes all positions in another way as soon as
    # texts longer than exact_length are possible. Training stayed within exact_length, so
    # evaluation does too. Only if --max-tokens alone is more than that, the whole context is used.
    room_as_trained = self_check.exact_length(self_check.read_config(folder)) - args.max_tokens
    if room_as_trained >= 1:
        room = min(room, room_as_trained)
    if room < 1:
        raise UserError(f"--max-tokens {args.max_tokens} leaves {args.model} no room for a prompt")
    # A model may name a far larger limit, or none.
    return int(min(room, LONGEST_PROMPT))


def read_summary(out: Path, header: dict, benchmarks: dict[str, Benchmark]) -> dict[str, dict]:
    """Read the scores that an earlier run left in OUT; UserError if it was another run.

    Only the model's path may be another one.
    """
    path = out / "summary.json"
    if not path.exists():
        return {}
    summary = files.read_json(path)
    done = summary.get("benchmarks")
    if not isinstance(summary.get("header"), dict) or not isinstance(done, dict):
        raise UserError(f"{path} is not a summary: give another --out")
    for name, scores in done.items():
        check_scores(scores, f"{path}, {name}")
    what = f"{path} (give another --out)"
    files.refuse_difference(what, summary["header"], without_path(header))
    for name in benchmarks.keys() & done.keys():
        files.refuse_difference(f"{name} in {what}", done[name], benchmarks[name].identity)
    return done


def check_results(out: Path, names: list[str]) -> None:
    """Raise UserError if a user's file has a name under which samples are to be saved.

    `names` are benchmarks that summary.json does not list. A file with such a name is ours only if
    a kill has left its partial folder.
    """
    for name in names:
        path = out / f"{name}.jsonl"
        if path.exists() and not engine.partial_folder(path).exists():
            raise UserError(
                f"{path} would be replaced, but no summary.json names it: give another --out"
            )


def check_scores(scores: Any, where: str) -> None:
    """Raise UserError for scores that print_table could not have printed."""
    if not isinstance(scores, dict):
        raise UserError(f"{where} has no scores: give another --out")
    pass_at = scores.get("pass_at_k")
    if not isinstance(pass_at, dict):
        raise UserError(f'{where} has no "pass_at_k": give another --out')
    numbers = {f"pass@{k}": value for k, value in pass_at.items()}
    for name in SCORES:
        numbers[name] = scores.get(name)
    for name, value in numbers.items():
        if not is_number(value):
            raise UserError(f"{where}: {name} is {value!r}, not a number")


def without_path(header: dict) -> dict:
    """Leave out the model's path: its fingerprint says which model it was."""
    return {name: value for name, value in header.items() if name != "model"}


# ---------------------------------------------------------------------------------------------
# The command


def start_engine(args: argparse.Namespace, benchmarks: list[Benchmark]) -> Any:
    """Start the engine, with room for the longest prompt of these benchmarks and its response."""
    prompts = []
    for benchmark in benchmarks:
        prompts += benchmark.prompts
    longest_prompt = max(len(prompt.ids) for prompt in prompts)
    return engine.start_engine(
        args.model,
        longest_prompt + args.max_tokens,
        args.seed,
        args.gpu_memory_utilization,
        args.tensor_parallel_size,
    )


def sample_benchmark(
    llm: Any, benchmark: Benchmark, path: Path, identity: dict, args: argparse.Namespace
) -> list[dict]:
    """Sample a benchmark and score the responses."""
    return engine.sample_all(
        llm,
        benchmark.prompts,
        [benchmark.num_samples] * len(benchmark.prompts),
        path,
        identity,
        seed=args.seed,
        temperature=benchmark.temperature,
        max_tokens=args.max_tokens,
        top_p=args.top_p,
    )


def save_benchmark(path: Path, records: list[dict], rows: list[dict]) -> dict:
    """Save a benchmark's samples, and return its scores.

    A record on the disk has no row. The row is added for scoring alone, since a reward function may
    want any of its columns.
    """
    lines = [json.dumps(record, default=str) + "\n" for record in records]
    files.write_text(path, "".join(lines))
    row_of = {row["id"]: row for row in rows}
    return score([record | {"row": row_of[record["id"]]} for record in records])


def sample_missing(
    args: argparse.Namespace, header: dict, benchmarks: dict[str, Benchmark]
) -> dict[str, dict]:
    """Sample and score the benchmarks that OUT lacks; rank 0 returns the scores of all.

    All ranks call it together.
    """
    out = Path(args.out)
    # What an earlier run has scored is not sampled again.
    done = engine.on_rank_0(read_summary, out, header, benchmarks)
    if torch.distributed.get_rank() == 0:
        # Left there if a kill came just before their removal.
        for name in benchmarks.keys() & done.keys():
            engine.remove_partial(out / f"{name}.jsonl")
    missing = [name for name in benchmarks if name not in done]
    if not missing:
        return done
    engine.on_rank_0(check_results, out, missing)

    llm = start_engine(args, [benchmarks[name] for name in missing])
    for name in missing:
        # Another run may have scored it while this one started its engine.
        done = engine.on_rank_0(read_summary, out, header, benchmarks)
        if name in done:
            continue
        benchmark = benchmarks[name]
        path = out / f"{name}.jsonl"
        identity = without_path(header) | benchmark.identity
        records = sample_benchmark(llm, benchmark, path, identity, args)
        if torch.distributed.get_rank() == 0:
            # The samples come first: a summary never names samples that are not there.
            scores = save_benchmark(path, records, benchmark.rows) | benchmark.identity
            # Read again: another run may have added its scores while this one sampled.
            done = read_summary(out, header, benchmarks) | {name: scores}
            files.write_json(out / "summary.json", {"header": header, "benchmarks": done})
            engine.remove_partial(path)
    engine.stop_engine(llm)
    return done


def main() -> None:
    """Check, sample, score, save, print."""
    args = make_parser().parse_args()
    if args.grade is not None:
        print_table({Path(args.grade).stem: grade_file(Path(args.grade))})
        return
    # What needs no engine is checked before it starts.
    if args.temperature == 0 and args.num_samples > 1:
        raise UserError(
            f"--temperature 0 is greedy: all {args.num_samples} samples of a problem would be equal"
        )
    files.check_writable(args.out, is_folder=True)
    trained_with = settings_of_run(args.model)
    if args.max_tokens is None:
        args.max_tokens = trained_with.get("max_tokens", 1024)
    benchmarks = load_benchmarks(args, trained_with)
    if args.top_p < 1 and all(b.temperature == 0 for b in benchmarks.values()):
        raise UserError("--top-p does nothing in greedy decoding: give a --temperature too")
    header = make_header(args, base_style(args, trained_with))

    # With several GPUs, torchrun now starts this script again, once for each. Each of these ranks
    # runs from the top and reaches this line, too. From here on they work together.
    engine.launch(args.tensor_parallel_size)
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        for benchmark in benchmarks.values():
            for remark in benchmark.remarks:
                print(remark)
    scores = sample_missing(args, header, benchmarks)
    if is_first:
        print_table({name: scores[name] for name in benchmarks})
        print(f"grading: {math_reward.counts}")


if __name__ == "__main__":
    command_line.run(main)
