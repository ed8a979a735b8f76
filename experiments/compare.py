"""Compare A*-PO with other algorithms, and with itself under other settings.

Question: which algorithm reaches a given reward with the fewest tokens, and in the least time? What
          do V*, N, beta2, the filter and off-policy updates do for it (--ablations)?
Command:  python -m experiments.compare                  after `make demo`, which makes the toy
          python -m experiments.compare --ablations
          python -m experiments.compare --task experiments.countdown --model countdown/reference \
              --dataset countdown --test countdown --max-tokens 160 --num-steps 300 \
              --goals .3 .4 .5 --work runs/compare-countdown
Time:     hours on 2 cores. Runs go two at a time, with one thread each. An interrupted comparison
          continues with the runs that are missing.
Output:   experiments/results/compare.json and compare.png, or ablations.json.
Answer:   for each method the tokens and the seconds to each goal, stage 1 included, and what it has
          in the end: reward, pass@k, distance from the reference.

All methods sample the same number of responses in a step: with 8 responses per prompt, there are an
eighth of the prompts. Each method first tries all learning rates with a seed that is not reported,
and keeps the rate with the highest mean reward over the run. The ablations have one rate.

The results are a list with one entry for each method. Pairs are the mean over the seeds and its
standard error:

tokens_total, seconds_total  sampled tokens, and the log's seconds_total, stage 1 included. The time
                             of stage 1 is measured here, with the start-up of its engine.
reward_final                 reward of the training responses, the mean of the last SMOOTHING steps
pass_at_1, pass_at_64        of the trained model on the test problems, at temperature 1
kl                           ln(pi / pi_ref) of a response, in nats, over the same steps
tokens_to, seconds_to        by goal: what was spent when the reward, smoothed over SMOOTHING steps,
                             reached it; null unless every run reached it
"""

import argparse
import importlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # there may be no display
import numpy
from cycler import cycler
from matplotlib import pyplot

from apo import command_line, files, problems
from apo.files import UserError
from experiments.plot import COLOURS, smooth, spread

RUNS_AT_ONCE = 2
TUNING_SEED = 1000  # of the runs that choose the learning rate; no result is from it
SMOOTHING = 5  # steps

# ---------------------------------------------------------------------------------------------
# What is compared


class Setting(NamedTuple):
    """One row of the results."""

    method: str  # its name in the results
    command: str = "train_online"  # and the flags that differ
    value_samples: int = 8  # N of stage 1; 0: no stage 1, and V* is 0
    responses: int = 1  # per prompt
    rate_scale: float = 1.0  # of the learning rate


BASELINE = "baselines --method"
MEAN = "train_online --beta1 inf"
ONE_UPDATE = "train_online --updates-per-batch 1"
FOUR_UPDATES = "train_online --updates-per-batch 4"

COMPARISON = [
    Setting("a_star_po_n8"),
    Setting("a_star_po_n2", value_samples=2),
    Setting("a_star_po_n1", value_samples=1),
    Setting("mean", MEAN),
    Setting("zero", value_samples=0),
    Setting("running", f"{BASELINE} running", value_samples=0),
    Setting("grpo_8", f"{BASELINE} grpo", value_samples=0, responses=8),
    Setting("grpo_4", f"{BASELINE} grpo", value_samples=0, responses=4),
    Setting("rebel", f"{BASELINE} rebel", value_samples=0, responses=2),
    Setting("ppo", f"{BASELINE} ppo", value_samples=0),
]
ABLATIONS = [
    Setting("published"),  # N = 8, beta1 = 0.5, beta2 = 1e-3, 2 updates, 1 response
    # What stands in V*'s place. At beta1 = 1e-6 it is the best of the N.
    Setting("zero", value_samples=0),
    Setting("mean", MEAN),
    Setting("beta1_10", "train_online --beta1 10"),
    Setting("beta1_1", "train_online --beta1 1"),
    Setting("beta1_0.1", "train_online --beta1 0.1"),
    Setting("best_of_n", "train_online --beta1 1e-6"),
    Setting("running", f"{BASELINE} running", value_samples=0),
    Setting("n_1", value_samples=1),
    Setting("n_2", value_samples=2),
    Setting("n_4", value_samples=4),
    Setting("n_32", value_samples=32),
    Setting("beta2_1e-4", "train_online --beta2 1e-4"),
    Setting("beta2_1e-2", "train_online --beta2 1e-2"),
    Setting("beta2_1e-1", "train_online --beta2 1e-1"),
    Setting("filter_unsolved", "train_online --filter-unsolved"),
    # With one learning rate, more updates move the policy further. The scaled rows divide it by the
    # number of updates. They differ in how far off-policy the later updates are, where V* is a
    # target and not only a baseline.
    Setting("updates_1", ONE_UPDATE),
    Setting("updates_4", FOUR_UPDATES),
    Setting("updates_1_scaled", ONE_UPDATE, rate_scale=2),
    Setting("updates_4_scaled", FOUR_UPDATES, rate_scale=0.5),
    Setting("updates_4_scaled_mean", f"{FOUR_UPDATES} --beta1 inf", rate_scale=0.5),
    Setting("updates_4_scaled_zero", FOUR_UPDATES, value_samples=0, rate_scale=0.5),
    Setting("responses_2", responses=2),
    Setting("responses_4", responses=4),
]

# ---------------------------------------------------------------------------------------------
# Running it


class Job(NamedTuple):
    """A command that fills a folder; it is finished when the folder holds the product."""

    command: list[str]
    folder: Path
    product: str


def run_job(job: Job) -> None:
    """Run a job unless it is finished; one that was interrupted starts again.

    The output goes to FOLDER.log, the command to FOLDER.json. Raises UserError if another command
    made the folder.
    """
    note = Path(f"{job.folder}.json")
    if (job.folder / job.product).exists():
        what = f"{job.folder} (remove it, or give another --work)"
        files.refuse_difference(what, files.read_json(note), {"command": job.command})
        return
    shutil.rmtree(job.folder, ignore_errors=True)
    files.write_json(note, {"command": job.command})
    start = time.perf_counter()
    log = Path(f"{job.folder}.log")
    with open(log, "w") as output:
        process = subprocess.run(
            [sys.executable, *job.command],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if process.returncode != 0 or not (job.folder / job.product).exists():
        command = " ".join(job.command)
        raise ChildProcessError(f"exit code {process.returncode}, see {log}: python {command}")
    shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)  # the final model is enough
    print(f"{time.perf_counter() - start:6.0f} s  {job.folder}", flush=True)


def run_jobs(jobs: list[Job]) -> None:
    """Run jobs, two at a time, and equal ones once. After a failure no further job is started."""
    unique = {job.folder: job for job in jobs}
    pool = ThreadPoolExecutor(RUNS_AT_ONCE)
    try:
        list(pool.map(run_job, unique.values()))
    finally:
        pool.shutdown(cancel_futures=True)


def stage_command(args: argparse.Namespace, command: str) -> list[str]:
    """Write how python is to be called for a stage, or for the baselines, on the task."""
    stage, *flags = command.split()
    if args.task is not None:
        return ["-m", args.task, stage, *flags]
    if stage == "baselines":
        return ["-m", "experiments.baselines", *flags]
    return [f"{stage}.py", *flags]


def stage1_job(args: argparse.Namespace, num_samples: int) -> Job:
    """Sample N responses per prompt from the reference."""
    folder = args.work / f"values-{num_samples}"
    command = stage_command(args, "offline_value")
    command += ["--model", args.model, "--dataset", args.dataset]
    command += ["--max-tokens", str(args.max_tokens), "--num-value-samples", str(num_samples)]
    command += ["--out", str(folder / "values.json")]
    return Job(command, folder, "values.json")


def write_zero_values(source: Path, target: Path) -> None:
    """Write a values file in which V* is 0, for methods that need its prompts alone."""
    values = files.read_json(source)
    for entry in values["prompts"]:
        entry |= {"rewards": [0.0], "lengths": [], "v_star": 0.0}
    values["header"]["seconds"] = 0.0
    files.write_json(target, values)


def train_job(args: argparse.Namespace, setting: Setting, rate: float, seed: int) -> Job:
    """Train with one setting, learning rate and seed. The folder's name says which."""
    rate *= setting.rate_scale
    name = re.sub(r"[^\w.]+", "-", setting.command).strip("-")
    name += f"-n{setting.value_samples}-x{setting.responses}-lr{rate:g}-seed{seed}"
    folder = args.work / name
    values = args.work / f"values-{setting.value_samples}" / "values.json"
    command = stage_command(args, setting.command)
    command += ["--values", str(values), "--out", str(folder)]
    command += ["--lr", f"{rate:g}", "--seed", str(seed), "--num-steps", str(args.num_steps)]
    command += ["--batch-size", str(args.rollout_size // setting.responses)]
    command += ["--samples-per-prompt", str(setting.responses)]
    command += ["--save-every", str(args.num_steps), "--eval-dataset", "none"]
    return Job(command, folder, "final/manifest.json")


def evaluate_job(args: argparse.Namespace, trained: Path) -> Job:
    """Sample the trained model's answers to the test problems."""
    folder = Path(f"{trained}-eval")
    command = stage_command(args, "evaluate")
    command += ["--model", str(trained / "final"), "--benchmarks", args.test]
    command += ["--temperature", "1", "--num-samples", str(args.eval_samples)]
    return Job([*command, "--out", str(folder)], folder, "summary.json")


# ---------------------------------------------------------------------------------------------
# Reading it


class Run(NamedTuple):
    """The log of a training run, with what was spent, stage 1 included, before each step."""

    reward: list[float]  # of each step, smoothed
    tokens: list[float]  # sampled before each step; and one more, the total
    seconds: list[float]  # the same
    reward_final: float
    kl: float


def read_run(args: argparse.Namespace, setting: Setting, folder: Path) -> Run:
    """Read the log of a training run."""
    values = files.read_json(args.work / f"values-{setting.value_samples}" / "values.json")
    tokens = [sum(sum(entry["lengths"]) for entry in values["prompts"])]
    seconds = [values["header"]["seconds"]]
    steps = files.read_jsonl(folder / "metrics.jsonl")
    for step in steps:
        tokens.append(tokens[-1] + step["response_tokens"] * args.rollout_size)
        seconds.append(seconds[-1] + step["seconds_total"])
    rewards = [step["reward"] for step in steps]
    return Run(
        reward=smooth(rewards, SMOOTHING),
        tokens=tokens,
        seconds=seconds,
        reward_final=statistics.mean(rewards[-SMOOTHING:]),
        kl=statistics.mean(step["logratio"] for step in steps[-SMOOTHING:]),
    )


def read_pass_at_k(folder: Path) -> dict[str, float]:
    """Read pass@k of a trained model, by k."""
    [scores] = files.read_json(Path(f"{folder}-eval/summary.json"))["benchmarks"].values()
    return scores["pass_at_k"]


def reach(reward: Sequence[float], spent: Sequence[float], goal: float) -> float | None:
    """Return what was spent when the reward first reached the goal, linear between steps."""
    if reward[0] >= goal:
        return spent[0]
    for i in range(1, len(reward)):
        if reward[i] >= goal:
            part = (goal - reward[i - 1]) / (reward[i] - reward[i - 1])
            return spent[i - 1] + part * (spent[i] - spent[i - 1])
    return None


def mean_and_error(values: Sequence[float | None]) -> list[float] | None:
    """Return the mean and its standard error, 0 for a single value; None if one is missing."""
    if None in values:
        return None
    error = 0.0
    if len(values) > 1:
        error = statistics.stdev(values) / math.sqrt(len(values))
    return [statistics.mean(values), error]


def make_row(
    args: argparse.Namespace, setting: Setting, rate: float, runs: list[Run], passes: list[dict]
) -> dict:
    """Sum up the runs of a setting. `passes` has pass@k by k for each of them."""
    row = {
        "method": setting.method,
        "seeds": len(runs),
        "learning_rate": rate * setting.rate_scale,
        "rollouts": args.num_steps,
        "tokens_total": mean_and_error([run.tokens[-1] for run in runs]),
        "seconds_total": mean_and_error([run.seconds[-1] for run in runs]),
        "reward_final": mean_and_error([run.reward_final for run in runs]),
    }
    for k in (1, args.eval_samples):
        row[f"pass_at_{k}"] = mean_and_error([pass_at_k[str(k)] for pass_at_k in passes])
    row["kl"] = mean_and_error([run.kl for run in runs])
    for what in ("tokens", "seconds"):
        row[f"{what}_to"] = {}
        for goal in args.goals:
            spent = [reach(run.reward, getattr(run, what), goal) for run in runs]
            row[f"{what}_to"][f"{goal:g}"] = mean_and_error(spent)
    return row


def draw(runs_of: dict[str, list[Run]], results: list[dict], goal: str, out: Path) -> None:
    """Draw the reward of all methods, with a band of one standard error, against what was spent."""
    styles = cycler(linestyle=["-", "--"]) * cycler(color=COLOURS)
    figure, panels = pyplot.subplots(1, 2, figsize=(8.2, 4), sharey=True, layout="constrained")
    for axes, what in zip(panels, ("tokens", "seconds"), strict=True):
        axes.set_prop_cycle(styles)
        for runs in runs_of.values():
            rewards = numpy.array([run.reward for run in runs])
            spent = numpy.mean([getattr(run, what)[:-1] for run in runs], axis=0)
            mean = rewards.mean(axis=0)
            error = rewards.std(axis=0) / math.sqrt(max(1, len(runs) - 1))
            [line] = axes.plot(spent, mean, linewidth=1.5)
            axes.fill_between(spent, mean - error, mean + error, color=line.get_color(), alpha=0.15)
        spent_by = {}
        for row in results:
            if row[f"{what}_to"][goal] is not None:
                spent_by[row["method"]] = row[f"{what}_to"][goal]
        best = min(spent_by, key=spent_by.get, default="no method")
        axes.set_title(f"Reward {goal} with the fewest {what}: {best}", fontsize=9, loc="left")
        axes.set_xlabel(f"{what}, stage 1 included", fontsize=8.5)
        axes.tick_params(labelsize=8)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("reward of the training responses", fontsize=8.5)
    # Write the name of each line at its end.
    lines = panels[1].lines
    bottom, top = panels[1].get_ylim()
    ends = [(line.get_ydata()[-1] - bottom) / (top - bottom) for line in lines]
    for line, name, end in zip(lines, runs_of, spread(ends, gap=0.06), strict=True):
        style = {"color": line.get_color(), "fontsize": 8}
        dashes = "- - " if line.get_linestyle() == "--" else ""
        panels[1].annotate(dashes + name, (1.02, end), xycoords="axes fraction", **style)
    figure.savefig(out, dpi=200)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------
# The command


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=command_line.HelpFormatter
    )
    add = parser.add_argument
    number = command_line.positive_integer
    add("--ablations", action="store_true", help="vary A*-PO: 3 seeds, lr 1e-4, 8 test samples")
    add("--only", nargs="+", metavar="METHOD", help="make these rows alone")
    add("--task", metavar="MODULE", help="module of a task, which runs the stages on it")
    add("--model", default="toy/reference", help="the reference")
    add("--dataset", default="toy/train.jsonl", help="training problems")
    add("--test", default="toy/test.jsonl", help="test problems")
    add("--max-tokens", type=number, default=128, help="longest response")
    add("--seeds", type=number, default=5, help="runs of each row")
    add("--rates", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4, 8e-4], help="learning rates")
    add("--goals", type=float, nargs="+", default=[0.7, 0.8, 0.9], help="rewards to be reached")
    add("--num-steps", type=number, default=32, help="rollouts of a run")
    add("--rollout-size", type=number, default=128, help="responses of a rollout")
    add("--eval-samples", type=number, default=64, help="responses to a test problem")
    add("--work", type=Path, default=Path("runs/compare"), help="folder of all runs, kept")
    add("--out", type=Path, default=Path("experiments/results"), help="folder of the results")
    if parser.parse_args().ablations:
        parser.set_defaults(seeds=3, rates=[1e-4], eval_samples=8)
    return parser.parse_args()


def choose_settings(args: argparse.Namespace) -> list[Setting]:
    """Return the rows that the command line asks for; UserError for a name that is none."""
    rows = ABLATIONS if args.ablations else COMPARISON
    settings = {setting.method: setting for setting in rows}
    for name in args.only or []:
        if name not in settings:
            raise UserError(f"--only {name}: choose from {', '.join(settings)}")
    return [settings[name] for name in args.only or settings]


def choose_rate(args: argparse.Namespace, setting: Setting) -> float:
    """Return the learning rate with the highest mean reward over the tuning run."""
    rewards = {}
    for rate in args.rates:
        folder = train_job(args, setting, rate, TUNING_SEED).folder
        rewards[rate] = statistics.mean(read_run(args, setting, folder).reward)
    best = max(rewards, key=rewards.get)
    print(f"{setting.method}: lr {best:g}; mean reward by lr: {rewards}")
    return best


def main() -> None:
    """Run what is missing, then write the results."""
    args = parse_args()
    settings = choose_settings(args)
    if args.task is not None:
        importlib.import_module(args.task)  # which adds the task to problems.DATASETS
    rows = problems.load_problems(args.dataset, "train")
    fingerprint = files.model_fingerprint(files.model_folder(args.model))
    # Runs on another model or other problems are other runs.
    args.work = args.work / files.content_digest([rows, fingerprint])

    counts = {setting.value_samples for setting in settings}
    run_jobs([stage1_job(args, n) for n in sorted(counts | {8}) if n > 0])
    write_zero_values(args.work / "values-8/values.json", args.work / "values-0/values.json")
    rates = dict.fromkeys(settings, args.rates[0])
    if len(args.rates) > 1:
        run_jobs([train_job(args, s, rate, TUNING_SEED) for rate in args.rates for s in settings])
        rates = {setting: choose_rate(args, setting) for setting in settings}
    jobs = {}
    # Seed by seed, so that a busy hour of the machine slows all methods down.
    for seed in range(args.seeds):
        for setting in settings:
            jobs[setting, seed] = train_job(args, setting, rates[setting], seed)
    run_jobs(list(jobs.values()))
    run_jobs([evaluate_job(args, job.folder) for job in jobs.values()])

    results = []
    runs_of = {}
    for setting in settings:
        folders = [jobs[setting, seed].folder for seed in range(args.seeds)]
        runs = [read_run(args, setting, folder) for folder in folders]
        passes = [read_pass_at_k(folder) for folder in folders]
        results.append(make_row(args, setting, rates[setting], runs, passes))
        runs_of[setting.method] = runs
        print(json.dumps(results[-1]))
    name = "ablations" if args.ablations else "compare"
    files.write_text(args.out / f"{name}.json", json.dumps(results, indent=1) + "\n")
    if not args.ablations:
        draw(runs_of, results, f"{max(args.goals):g}", args.out / "compare.png")


if __name__ == "__main__":
    command_line.run(main)
