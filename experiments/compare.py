"""A*-PO, PPO, GRPO and REBEL like for like: the paper's Table 1 on the toy, with error bars.

    python -m experiments.compare --passk 32     # 50 minutes on one core, after `make demo`
    python -m experiments.compare --quick        # three minutes: that it runs, no result

Every run is a process of experiments.baselines: the same loop, engine, reward, prompts a step,
updates a step and evaluations, its own steps (`PLANS`: enough for a plateau). First the learning
rate: each method runs every rate of the grid with the first seed, and takes the one that is first
at 90 % test accuracy among those that end within two points of the best; then all seeds with it, in
turns, so that a busy hour of the machine is no method's own. A seed is one of data order and
sampling; reference, problems and values file are the same for all. Finished runs are kept in --work
and used again, so that an interrupted comparison goes on.

What the numbers are, a mean over seeds ± its standard error:

to 90 %     seconds and generated tokens until greedy accuracy on the test set is 90 %, linear
            between evaluations. Seconds are the log's `seconds_total`: it stands still in start-up,
            evaluations and checkpoints, and counts the engine's warm-up in step 1 (seconds).
sampled     the same for reward at temperature 1 on the training prompts, three steps' mean: a
            harder goal, as greedy decoding hides most of what this reference does wrong.
stage 1     what A*-PO needs before: seconds of a stage 1 run here beside the others, start-up of
            the engine INCLUDED, and its tokens. Counted in both goals and shown apart as well.
pass@1, @8  of the final model on the test set, 8 samples at temperature 1 (evaluate.py).
KL          ln(pi / pi_ref) of a step's own responses, the mean of the last three steps: per
            response, and per token.
memory      `peak_gib`: without a GPU the whole process's, engine and libraries included.
seconds     of a step, by part: generation (with grading) and training (the rest).

Writes OUT/compare.json (a list, a method each), compare.txt, compare.jsonl (the log of all runs),
compare.png (reward against seconds, ± s.e.) and with --passk N passk.json and .png: pass@k of the
first seed's models and the reference, from N samples of every test problem.
"""

import argparse
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # there may be no display
import numpy
from matplotlib import pyplot

import problems

NAMES = {"a_star_po": "A*-PO", "ppo": "PPO", "grpo": "GRPO", "rebel": "REBEL"}
GOAL = 0.9  # the test accuracy that is waited for


class Plan(NamedTuple):
    """How long a method runs, and how often it is evaluated, in steps."""

    steps: int
    eval_every: int


# On the toy: enough for a plateau. What a step costs differs by 8, so GRPO gets fewer of them.
PLANS = {"a_star_po": Plan(32, 1), "ppo": Plan(32, 1), "grpo": Plan(12, 1), "rebel": Plan(24, 1)}
GRID = "1e-4,2e-4,4e-4,8e-4"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=style)
    add = parser.add_argument
    add("--model", help="the reference (default: the values file's)")
    add("--values", default="toy/values.json", help="stage 1's file")
    add("--test", default="toy/test.jsonl", help="what accuracy is measured on")
    add("--methods", default=",".join(NAMES), help="which, with commas")
    add("--seeds", type=int, default=5, help="runs of each method at its learning rate")
    add("--learning-rates", default=GRID, help="the grid, with commas; one: nothing is tuned")
    add("--batch-size", type=int, default=128, help="prompts per step")
    add("--num-steps", type=int, help="steps of every method (default: each its own)")
    add("--eval-every", type=int, help="steps between evaluations (default: each its own)")
    add("--flags", default="", help="more flags for every run, as '--gradient-checkpointing'")
    add("--passk", type=int, default=0, help="samples per problem for pass@k curves; 0: none")
    add("--quick", action="store_true", help="a test: one seed, three small steps, --out in --work")
    add("--work", type=Path, default=Path("runs/compare"), help="folder of the runs, kept")
    add("--out", type=Path, default=Path("experiments/results"), help="folder of the results")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------
# Runs


def finish(command: Sequence, folder: Path, product: str) -> None:
    """Run `python *command`, which fills FOLDER, unless it has.

    It is finished when FOLDER/PRODUCT exists. What was half done is started anew. The output goes
    to FOLDER.log, command, code and seconds to FOLDER.json: made by others, it is refused.
    """
    words, job = [str(word) for word in command], Path(f"{folder}.json")
    files = [*sorted(Path().glob("*.py")), Path("experiments/baselines.py")]
    made_by = {"command": words, "code": {str(f): problems.file_sha256(f)[:16] for f in files}}
    if (folder / product).exists():
        problems.refuse_difference(f"{folder} (remove it, or give another --work)",
                                   problems.read_json(job), made_by)  # fmt: skip
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    problems.write_whole(job, json.dumps(made_by | {"seconds": 0.0}))
    start = time.perf_counter()
    with open(f"{folder}.log", "w") as log:
        options = {"stdout": log, "stderr": subprocess.STDOUT}
        code = subprocess.run([sys.executable, *words], **options).returncode
    if code or not (folder / product).exists():
        raise ChildProcessError(f"exit code {code}, see {folder}.log: python {shlex.join(words)}")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # the final model is enough
    seconds = time.perf_counter() - start
    problems.write_whole(job, json.dumps(made_by | {"seconds": seconds}))
    print(f"{seconds:6.0f} s  {folder}", flush=True)


def all_seconds(folder: Path) -> float:
    """What the finished commands in a folder took together, in this call and in earlier ones."""
    return sum(problems.read_json(job)["seconds"] for job in folder.glob("*.json")
               if job.with_suffix(".log").exists())  # fmt: skip


def time_stage1(args: argparse.Namespace) -> float:
    """Run stage 1 as the values file's header says, if not yet done here; its seconds."""
    told, folder = args.header, args.work / "stage1"
    command = ["offline_value.py", *["--chat-template"] * told["chat_template"]]
    for name in ("model", "dataset", "num_value_samples", "beta1", "temperature",
                 "max_prompt_tokens", "max_tokens", "limit", "seed"):  # fmt: skip
        command += [f"--{name.replace('_', '-')}", told[name]]
    finish([*command, "--out", folder / "values.json"], folder, "values.json")
    return problems.read_json(folder / "values.json")["header"]["seconds"]


def plan_of(args: argparse.Namespace, method: str) -> Plan:
    """The method's own plan but for what the command line says."""
    if args.quick:
        return Plan(3, 1)
    plan = PLANS[method]
    return Plan(args.num_steps or plan.steps, args.eval_every or plan.eval_every)


def train(args: argparse.Namespace, method: str, lr: str, seed: int) -> Path:
    """Make a run, if there is none yet; its folder."""
    plan, folder = plan_of(args, method), args.work / f"{method}-{lr}-{seed}"
    command = ["-m", "experiments.baselines", "--method", method, "--values", args.values]
    command += ["--lr", lr, "--seed", seed, "--num-steps", plan.steps, "--save-every", plan.steps]
    command += ["--batch-size", args.batch_size, "--eval-dataset", args.test]
    command += ["--eval-every", plan.eval_every, *shlex.split(args.flags), "--out", folder]
    finish(command, folder, "final/manifest.json")
    return folder


def evaluate(args: argparse.Namespace, model: str | Path, folder: Path, num_samples: int) -> dict:
    """Score a model on the test set at temperature 1: evaluate.py's summary of it."""
    command = ["evaluate.py", "--model", model, "--benchmarks", args.test, "--temperature", 1]
    command += ["--num-samples", num_samples, "--max-tokens", args.header["max_tokens"]]
    finish([*command, "--out", folder], folder, "summary.json")
    [scores] = problems.read_json(folder / "summary.json")["benchmarks"].values()
    return scores


# ---------------------------------------------------------------------------------------------
# Numbers


def read_run(folder: Path) -> list[dict]:
    """Read a run's log; each step with `seconds` and `tokens` from the start to its end."""
    steps = problems.read_rows(folder / "metrics.jsonl")
    config = problems.read_json(folder / "config.json")
    responses = config["batch_size"] * config["samples_per_prompt"]
    seconds = tokens = 0.0
    for step in steps:
        seconds += step["seconds_total"]
        tokens += step["response_tokens"] * responses
        step |= {"seconds": seconds, "tokens": tokens}
    return steps


def first_reach(steps: list[dict], what: str, goal: float = GOAL) -> float | None:
    """How much of `what` ("seconds", "tokens", "step") it took to `goal`; None if it never did.

    Linear between evaluations; before the first one nothing is known, and that one's is taken.
    """
    seen = [step for step in steps if "eval_accuracy" in step]
    for before, after in itertools.pairwise([None, *seen]):
        if after["eval_accuracy"] >= goal:
            if before is None:
                return after[what]
            low, high = before["eval_accuracy"], after["eval_accuracy"]
            return before[what] + (after[what] - before[what]) * (goal - low) / (high - low)
    return None


def sampled_reach(steps: list[dict], what: str, goal: float = GOAL) -> float | None:
    """How much of `what` it took until `reward`, the mean of three steps, is `goal`; None: never.

    A step's reward is that of the policy before its updates, so that a mean belongs to what was
    spent when the middle one of the three began; linear between means.
    """
    spent, mean = 0.0, 0.0
    for three in zip(steps, steps[1:], steps[2:], strict=False):
        before, spent = (spent, mean), three[0][what]
        mean = statistics.fmean(step["reward"] for step in three)
        if mean >= goal:
            return before[0] + (spent - before[0]) * (goal - before[1]) / (mean - before[1])
    return None


def measure(args: argparse.Namespace, method: str, folder: Path) -> dict:
    """One run's numbers; stage 1 is counted in `seconds_to_90` and `tokens_to_90` of A*-PO."""
    steps, config = read_run(folder), problems.read_json(folder / "config.json")
    mean = statistics.fmean
    seen = [step["eval_accuracy"] for step in steps if "eval_accuracy" in step]
    told = {"accuracy": mean(seen[-3:]), "peak_gib": steps[-1]["peak_gib"]}
    for what in ("seconds", "tokens"):
        reached, before = first_reach(steps, what), args.stage1[what] * (method == "a_star_po")
        told[f"{what}_to_90_stage2"] = reached
        told[f"{what}_to_90"] = None if reached is None else reached + before
        sampled = sampled_reach(steps, what)
        told[f"{what}_to_90_sampled"] = None if sampled is None else sampled + before
        told[f"{what}_all"] = steps[-1][what] + before
    told["kl_response"] = mean(step["logratio"] for step in steps[-3:])
    told["kl"] = mean(step["kl_per_token"] for step in steps[-3:])
    told["reward"] = mean(step["reward"] for step in steps[-3:])
    later = steps[1:] or steps  # the first has the engine's warm-up in it
    parts = {"generation": ("generate", "grade"), "training": ("ref", "update", "sync")}
    for name, keys in parts.items():
        whole = (sum(step[f"seconds_{key}"] for key in keys) for step in later)
        told[f"{name}_seconds"] = mean(whole)
    return told | {key: config[key] for key in ("updates_per_batch", "samples_per_prompt")}


def spread(values: Sequence[float | None]) -> list[float] | None:
    """Mean and standard error; None where a run has no value."""
    if not values or None in values:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return [statistics.fmean(values), error]


def tune(args: argparse.Namespace, method: str) -> tuple[str, list[dict]]:
    """Run the grid with the first seed; the learning rate taken, and a row for each."""
    rates, grid = args.learning_rates.split(","), []
    for lr in rates if len(rates) > 1 else []:
        told = measure(args, method, train(args, method, lr, 0))
        keys = ("seconds_to_90_stage2", "accuracy", "reward", "kl_response")
        grid.append({"learning_rate": float(lr), "lr": lr} | {key: told[key] for key in keys})
    if not grid:
        return rates[0], grid
    best = max(row["accuracy"] for row in grid)
    good = [row for row in grid if row["accuracy"] >= best - 0.02]
    taken = min(good, key=lambda row: (row["seconds_to_90_stage2"] or math.inf, -row["accuracy"]))
    return taken["lr"], grid


def run_method(args: argparse.Namespace, method: str) -> tuple[dict, list[list[dict]]]:
    """Tune, run all seeds, evaluate; the method's row of compare.json, and its runs' logs."""
    lr, grid = tune(args, method)
    told, runs = [], []
    for seed in range(args.seeds):
        folder = train(args, method, lr, seed)
        scores = evaluate(args, folder / "final", args.work / f"{folder.name}-eval", 8)
        passes = {f"pass_at_{k}": scores["pass_at_k"][str(k)] for k in (1, 8)}
        told.append(measure(args, method, folder) | passes)
        runs.append(read_run(folder))
    plan = plan_of(args, method)
    row = {"method": method, "seeds": args.seeds, "learning_rate": float(lr), "grid": grid}
    row |= {"steps": plan.steps, "eval_every": plan.eval_every, "batch_size": args.batch_size}
    row |= {key: told[0].pop(key) for key in ("updates_per_batch", "samples_per_prompt")}
    row |= {key: spread([run[key] for run in told]) for key in told[0]}
    row["runs_that_reached_90"] = sum(run["seconds_to_90"] is not None for run in told)
    row["stage1_seconds"] = args.stage1["seconds"] * (method == "a_star_po")
    row["stage1_tokens"] = args.stage1["tokens"] * (method == "a_star_po")
    if args.passk:
        curve = args.work / f"{method}-{lr}-0-passk"
        scores = evaluate(args, args.work / f"{method}-{lr}-0" / "final", curve, args.passk)
        row["pass_at_k"] = scores["pass_at_k"]
    return row, runs


# ---------------------------------------------------------------------------------------------
# Table and figures


def cell(value: Sequence[float] | None, form: str, scale: float = 1.0) -> str:
    """A mean ± its standard error; "-" for none."""
    if value is None:
        return "-"
    mean, error = (format(x * scale, form) for x in value)
    return f"{mean} ± {error}"


COLUMNS: dict[str, Callable[[dict], str]] = {
    "method": lambda row: NAMES[row["method"]],
    "lr": lambda row: f"{row['learning_rate']:.0e}",
    "s to 90 %": lambda row: cell(row["seconds_to_90"], ".1f"),
    "stage 1": lambda row: f"{row['stage1_seconds']:.1f}",
    "after it": lambda row: cell(row["seconds_to_90_stage2"], ".1f"),
    "ktok to 90 %": lambda row: cell(row["tokens_to_90"], ".0f", 1e-3),
    "after stage 1": lambda row: cell(row["tokens_to_90_stage2"], ".0f", 1e-3),
    "sampled s": lambda row: cell(row["seconds_to_90_sampled"], ".1f"),
    "sampled ktok": lambda row: cell(row["tokens_to_90_sampled"], ".0f", 1e-3),
    "reached": lambda row: f"{row['runs_that_reached_90']}/{row['seeds']}",
    "greedy %": lambda row: cell(row["accuracy"], ".1f", 100),
    "pass@1 %": lambda row: cell(row["pass_at_1"], ".1f", 100),
    "pass@8 %": lambda row: cell(row["pass_at_8"], ".1f", 100),
    "KL/response": lambda row: cell(row["kl_response"], ".2f"),
    "KL/token": lambda row: cell(row["kl"], ".4f"),
    "peak GiB": lambda row: cell(row["peak_gib"], ".2f"),
    "gen s/step": lambda row: cell(row["generation_seconds"], ".2f"),
    "train s/step": lambda row: cell(row["training_seconds"], ".2f"),
    "all s": lambda row: cell(row["seconds_all"], ".0f"),
}


def grid_of(rows: list[dict], columns: dict[str, Callable[[dict], str]]) -> str:
    """Lay rows out in columns as wide as they need."""
    cells = [list(columns), *([tell(row) for tell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in cells)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def tuning_text(rows: list[dict]) -> str:
    """What the learning rates did, each method's taken one marked; the edge of the grid is told."""
    lines = ["learning rates, first seed: seconds to 90 % after stage 1, greedy accuracy at last"]
    for row in rows:
        told, rates = [], [tried["learning_rate"] for tried in row["grid"]]
        for tried in row["grid"]:
            mark = "*" if tried["learning_rate"] == row["learning_rate"] else ""
            to_90 = tried["seconds_to_90_stage2"]
            seconds = "never" if to_90 is None else f"{to_90:.1f} s"
            told.append(f"{tried['lr']}{mark} {seconds}, {tried['accuracy']:.1%}")
        edge = len(rates) > 1 and row["learning_rate"] in (min(rates), max(rates))
        told += ["the edge of the grid"] * edge
        lines.append(f"  {NAMES[row['method']]:<6} {' | '.join(told) or 'not tuned'}")
    return "\n".join(lines)


def report(args: argparse.Namespace, rows: list[dict], base: dict, seconds: float) -> str:
    """The text for a person."""
    command = shlex.join(sys.argv[1:])
    plans = ", ".join(f"{NAMES[row['method']]} {row['steps']} (x {row['samples_per_prompt']})"
                      for row in rows)  # fmt: skip
    updates = rows[0]["updates_per_batch"]
    lines = [f"python -m experiments.compare {command}".rstrip(),
             f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}; "
             f"all runs took {seconds:.0f} s; {args.seeds} seeds, mean ± s.e. over them",
             f"{args.values}; steps of {args.batch_size} prompts (x responses): {plans}; "
             f"{updates} updates a step", "",
             f"base: pass@1 {base['pass_at_k']['1']:.1%} ± {base['stderr']:.1%} over problems, "
             f"pass@8 {base['pass_at_k']['8']:.1%}", grid_of(rows, COLUMNS), "", tuning_text(rows),
             "", "s to 90 %: with stage 1, timed here, the start of its engine included",
             "sampled: until reward at temperature 1, three steps' mean, is 90 %; with stage 1",
             "KL: nats, of the last three steps' own responses"]  # fmt: skip
    return "\n".join(lines) + "\n"


def draw_runs(args: argparse.Namespace, logs: dict[str, list[list[dict]]], out: Path) -> None:
    """Draw reward against seconds, the mean of the seeds ± its standard error."""
    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
    for number, (method, runs) in enumerate(logs.items()):
        color, offset = f"C{number}", args.stage1["seconds"] * (method == "a_star_po")
        # A step's reward is that of the policy before its updates: it stands where the step starts.
        starts = [[0.0, *(step["seconds"] for step in run[:-1])] for run in runs]
        clock = numpy.linspace(0, min(s[-1] for s in starts), 200)
        each = [numpy.interp(clock, s, [step["reward"] for step in run])
                for s, run in zip(starts, runs, strict=True)]  # fmt: skip
        mean, count = numpy.mean(each, axis=0), len(each)
        error = numpy.std(each, axis=0, ddof=1) / math.sqrt(count) if count > 1 else 0 * mean
        label = NAMES[method] + (", after stage 1" if offset else "")
        axes.plot(clock + offset, mean, color=color, label=label)
        axes.fill_between(clock + offset, mean - error, mean + error, color=color, alpha=0.25)
        if offset:
            axes.plot([0, offset], [mean[0]] * 2, color=color, linestyle=":", label="its stage 1")
    axes.set(xlabel="seconds", ylabel="reward (temperature 1, training prompts)", ylim=(None, 1.01))
    axes.set_title(f"{args.batch_size} prompts a step; mean of {args.seeds} seeds ± s.e.")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    figure.savefig(out, dpi=150)


def draw_passk(curves: dict[str, dict], args: argparse.Namespace, out: Path) -> None:
    """Draw pass@k of the reference and of the trained models."""
    figure, axes = pyplot.subplots(figsize=(6.0, 4.0), layout="constrained")
    for method, curve in curves.items():
        style = {"color": "black", "linestyle": "--"} if method == "base" else {}
        ks, passes = [int(k) for k in curve], list(curve.values())
        axes.plot(ks, passes, marker="o", markersize=4, label=NAMES.get(method, "base"), **style)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="k", ylabel=f"pass@k on {Path(args.test).name}", ylim=(None, 1.005))
    axes.set_title(f"{args.passk} samples at temperature 1, first seed")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    figure.savefig(out, dpi=150)


LOGGED = ("step", "reward", "eval_accuracy", "loss", "logratio", "kl_per_token", "grad_norm",
          "seconds", "tokens", "seconds_generate", "seconds_grade", "seconds_ref", "seconds_update",
          "seconds_sync", "peak_gib")  # fmt: skip


def write(args: argparse.Namespace, rows: list[dict], logs: dict, base: dict, text: str) -> None:
    """Write everything into --out."""
    args.out.mkdir(parents=True, exist_ok=True)
    problems.write_whole(args.out / "compare.json", json.dumps(rows, indent=1) + "\n")
    problems.write_whole(args.out / "compare.txt", text)
    lines = []
    for method, runs in logs.items():
        for seed, steps in enumerate(runs):
            for step in steps:
                kept = {key: float(f"{step[key]:.5g}") for key in LOGGED if key in step}
                lines.append(json.dumps({"method": method, "seed": seed} | kept) + "\n")
    problems.write_whole(args.out / "compare.jsonl", "".join(lines))
    draw_runs(args, logs, args.out / "compare.png")
    if args.passk:
        curves = {"base": base["pass_at_k"]} | {row["method"]: row["pass_at_k"] for row in rows}
        problems.write_whole(args.out / "passk.json", json.dumps(curves, indent=1) + "\n")
        draw_passk(curves, args, args.out / "passk.png")


def prepare(args: argparse.Namespace) -> None:
    """Check what is given before the first run; the header, stage 1's costs, the work folder."""
    problems.check_args(args, "passk")
    if unknown := set(args.methods.split(",")) - set(NAMES):
        raise problems.UserError(f"no method {', '.join(unknown)}: choose from {', '.join(NAMES)}")
    for rate in args.learning_rates.split(","):
        with problems.explain(f"--learning-rates {args.learning_rates}"):
            float(rate)
    if not Path(args.values).exists():
        raise problems.UserError(f"there is no {args.values}: `make demo` makes it, or stage 1")
    values = problems.read_json(args.values, ours=True)
    with problems.explain(f"{args.values} is no values file"):
        args.header, prompts = values["header"], values["prompts"]
    problems.load_problems(args.test, "test")
    if args.model and args.model != args.header["model"]:
        problems.refuse_difference(args.values, args.header, {"model": args.model})
    tokens = sum(sum(prompt["lengths"]) for prompt in prompts)
    args.stage1 = {"seconds": 0.0, "tokens": tokens}  # seconds: time_stage1
    # Runs on another values file are other runs.
    args.work = args.work / ("quick" if args.quick else values["sha256"][:8])
    if args.quick:
        args.seeds, args.batch_size, args.learning_rates = 1, 16, "1e-4"
        args.out = args.work / "results"
        shutil.rmtree(args.work, ignore_errors=True)


def main() -> None:
    """Run all methods, then write the table and the figures."""
    args = parse_args()
    prepare(args)
    rows, logs, model = [], {}, args.header["model"]
    args.stage1["seconds"] = time_stage1(args)
    base = evaluate(args, model, args.work / "base-eval", max(args.passk, 8))
    methods = args.methods.split(",")
    # In turns; what follows finds them finished.
    for lr, method in itertools.product(args.learning_rates.split(","), methods):
        train(args, method, lr, 0)
    taken = {method: tune(args, method)[0] for method in methods}
    for seed, method in itertools.product(range(args.seeds), methods):
        train(args, method, taken[method], seed)
    for method in methods:
        row, logs[method] = run_method(args, method)
        rows.append(row | {"base_pass_at_1": base["mean"]})
    text = report(args, rows, base, all_seconds(args.work))
    write(args, rows, logs, base, text)
    print(f"\n{text}\n{args.out}/compare.json, .txt, .jsonl, .png")


if __name__ == "__main__":
    problems.run(main)
