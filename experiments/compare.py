"""Compare A*-PO with other algorithms, and with itself under other settings.

Question: which algorithm reaches a given reward with the fewest tokens, and in the least time? What
          do V*, N and off-policy data do for A*-PO?
Command:  python -m experiments.countdown make           the task and its reference
          python -m experiments.compare
          python -m experiments.compare --rows long --num-steps 200 --seeds 3 \
              --goals .35 .4 --tuned experiments/results/compare.json --work runs/long
          python -m experiments.compare --rows controls --seeds 3
          python -m experiments.compare --rows ablations --rates 1e-4 --seeds 3
          python -m experiments.compare --rows off-policy --rates 1e-4 --seeds 3
Time:     hours on 2 cores. Two runs go at a time, with one thread each. Finished runs are kept, so
          an interrupted comparison continues when you start it again. After a change of code, give
          another --work.
Output:   NAME.json and NAME.txt in experiments/results, after each seed, where NAME is the value of
          --rows. `compare` also draws compare.png and costs.png, `long` long.png, `off-policy`
          off-policy.png.
Answer:   for each method the tokens and the seconds to each goal, stage 1 included, and what it has
          in the end: reward, pass@k, distance from the reference.

All methods sample the same number of responses in a step, so a row with 8 responses per prompt has
an eighth of the prompts. Each row of the comparison has its own learning rate and weight of the KL
term. Four runs try two rates with two weights. If the best rate is the lowest or the highest of
these, a fifth run tries half or twice that rate. The run that ends with the highest reward wins.
The seed of these runs is used for nothing else. The other tables take rate and weight from the row
that `tuned_as` names. With a single one in --rates nothing is tuned, and the weight is the
published one. With --tuned, rate and weight come from an earlier comparison.

compare_results.py sums the runs up, and says what is in the results.
"""

import argparse
import importlib
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from apo import command_line, files, problems
from apo.files import UserError
from experiments.compare_results import (
    SMOOTHING,
    Run,
    describe_stage_1,
    draw_comparison,
    draw_costs,
    draw_off_policy,
    find_budgets,
    make_table,
    read_run,
    read_scores,
    sum_up,
    table_of_seeds,
)

RUNS_AT_ONCE = 2
TUNING_SEED = 1000  # of the runs that choose the learning rate; no result is from it

# ---------------------------------------------------------------------------------------------
# What is compared


class KlWeight(NamedTuple):
    """The weight of a loss's KL term: its flag, and the two numbers that are tried.

    A loss without a KL term has KlWeight("--kl-weight", 0, 0), and 0 in baselines.METHODS.
    """

    flag: str
    published: float
    alternative: float


# The alternative is for A*-PO ten times the published weight, and for the others A*-PO's published
# weight, 0.001. In GRPO the same number means something else, because its advantages are divided by
# their standard deviation.
BETA2 = KlWeight("--beta2", published=1e-3, alternative=1e-2)
GRPO_KL_WEIGHT = KlWeight("--kl-weight", published=0.04, alternative=1e-3)
REWARD_KL_WEIGHT = KlWeight("--kl-weight", published=0.05, alternative=1e-3)  # REBEL and PPO


class Setting(NamedTuple):
    """One row of the results."""

    method: str  # its name in the results
    command: str = "train_online"  # the stage or `baselines`, and its flags
    num_value_samples: int = 8  # N of stage 1; 0: no stage 1, and V* is 0
    samples_per_prompt: int = 1  # in stage 2
    kl_weight: KlWeight = BETA2
    rate_scale: float = 1.0  # a factor on the tuned learning rate
    tuned_as: str | None = None  # the row whose learning rate and KL weight it takes; None: its own

    @property
    def tuned_row(self) -> str:
        """The row that is tuned for this one."""
        return self.method if self.tuned_as is None else self.tuned_as


class Tuned(NamedTuple):
    """The learning rate and the KL weight of a row."""

    rate: float
    kl_weight: float


class TuningReward(NamedTuple):
    """The reward of a tuning run."""

    mean: float  # over the run
    end: float  # over its last SMOOTHING steps: near 0 if it has collapsed


def best_of(rewards: dict[Tuned, TuningReward]) -> Tuned:
    """Choose what ends highest. The highest mean may belong to a fast start before a collapse."""
    return max(rewards, key=lambda tuned: rewards[tuned].end)


BASELINE = "baselines --method"
MEAN = "train_online --beta1 inf"

GRPO = Setting("grpo", f"{BASELINE} grpo", 0, kl_weight=GRPO_KL_WEIGHT)
REBEL = Setting("rebel", f"{BASELINE} rebel", 0, samples_per_prompt=2, kl_weight=REWARD_KL_WEIGHT)
PPO = Setting("ppo", f"{BASELINE} ppo", 0, kl_weight=REWARD_KL_WEIGHT)

# Each of these is tuned by itself.
COMPARISON = [
    Setting("a_star_po_n8"),
    Setting("a_star_po_n2", num_value_samples=2),
    Setting("a_star_po_n1", num_value_samples=1),
    Setting("mean", MEAN),
    Setting("zero", num_value_samples=0),
    Setting("running", f"{BASELINE} running", num_value_samples=0),
    GRPO._replace(method="grpo_8", samples_per_prompt=8),
    GRPO._replace(method="grpo_4", samples_per_prompt=4),
    REBEL,
    PPO,
]

# After 100 steps the reward of most rows still rises. These four go on.
LONG = [
    setting for setting in COMPARISON if setting.method in ("a_star_po_n8", "zero", "grpo_8", "ppo")
]


def as_tuned_for(row: str, settings: list[Setting]) -> list[Setting]:
    """Give settings the learning rate and the KL weight that are tuned for a row of COMPARISON."""
    return [setting._replace(tuned_as=row) for setting in settings]


A_STAR_PO_ABLATIONS = [
    Setting("published"),  # N = 8, beta1 = 0.5, 2 updates, 1 response
    # At beta1 = inf, V* is the mean of the N rewards; at 1e-6 it is the best of them.
    Setting("mean", MEAN),
    Setting("beta1_10", "train_online --beta1 10"),
    Setting("beta1_1", "train_online --beta1 1"),
    Setting("beta1_0.1", "train_online --beta1 0.1"),
    Setting("best_of_n", "train_online --beta1 1e-6"),
    Setting("n_4", num_value_samples=4),
    Setting("n_32", num_value_samples=32),
    Setting("responses_2", samples_per_prompt=2),
    Setting("responses_4", samples_per_prompt=4),
]


def off_policy_settings(
    data: str, command: str, num_updates: int, share: float = 1.0
) -> list[Setting]:
    """Put V*, the mean reward and 0 in V*'s place, all on the same kind of data.

    The rate was tuned with 2 updates per step. With n updates, each has another share of the
    batch, so the rate is scaled by the square root of 2 / n, the rule for Adam (Malladi et al.
    2022, arXiv 2205.10287). Only this `share` of that rate is used.
    """
    scale = share * math.sqrt(2 / num_updates)
    return [
        Setting(f"{data}_v_star", command, rate_scale=scale),
        Setting(f"{data}_mean", f"{command} --beta1 inf", rate_scale=scale),
        Setting(f"{data}_zero", command, num_value_samples=0, rate_scale=scale),
    ]


# Two factors: how old the data is, and what stands in V*'s place. `replay` makes 4 updates, each on
# a whole rollout. By the rule above it would have the rate of 1 update. It gets that of 4 updates,
# because it uses each response 4 times. With V* and the mean all runs collapse at that rate. So a
# quarter of it is tried as well.
REPLAY = f"{BASELINE} replay --updates-per-batch 1"
OFF_POLICY = [
    *off_policy_settings("updates_1", "train_online --updates-per-batch 1", 1),
    *off_policy_settings("updates_4", "train_online --updates-per-batch 4", 4),
    *off_policy_settings("updates_16", "train_online --updates-per-batch 16", 16),
    *off_policy_settings("replay", REPLAY, 4),
    *off_policy_settings("replay_quarter", REPLAY, 4, share=0.25),
]
# Why do the methods differ? Against V* the advantages sum to less than 0, against the mean reward
# to about 0, and against 0 to more. The rows of A*-PO have the rate and the KL weight of `mean`, so
# that nothing but V* and clipping differs.
# The gradient of A*-PO is proportional to beta2, so that clipping at norm 1 acts only when a run
# has already collapsed. 0.003 is about half of its norm in early steps at beta2 = 0.001, and 0.05
# is less than half of GRPO's. REBEL's norm is above 10, so that clipping at 1 acts in every update.
# PPO's lambda is 1 in verl.
CLIPPED = "train_online --max-grad-norm 0.003"
A_STAR_PO_CONTROLS = [
    Setting("a_star_po_2x_rate", rate_scale=2.0),
    Setting("mean_2x_rate", MEAN, rate_scale=2.0),
    Setting("zero_2x_rate", num_value_samples=0, rate_scale=2.0),
    Setting("a_star_po_2x_rate_clipped", CLIPPED, rate_scale=2.0),
    Setting("zero_2x_rate_clipped", CLIPPED, num_value_samples=0, rate_scale=2.0),
]
GRPO_CLIPPED = GRPO._replace(
    method="grpo_8_clipped",
    command=f"{BASELINE} grpo --max-grad-norm 0.05",
    samples_per_prompt=8,
    tuned_as="grpo_8",
)
REBEL_UNCLIPPED = REBEL._replace(
    method="rebel_unclipped",
    command=f"{BASELINE} rebel --max-grad-norm inf",
    tuned_as="rebel",
)
PPO_LAMBDA_1 = PPO._replace(
    method="ppo_lambda_1", command=f"{BASELINE} ppo --gae-lambda 1", tuned_as="ppo"
)
PROCESS = [
    Setting("response"),
    Setting("lines_2", "process --continuations 2"),
    Setting("lines_8", "process --continuations 8"),
]
ROWS = {
    "compare": COMPARISON,
    "long": LONG,
    "controls": [
        *as_tuned_for("mean", A_STAR_PO_CONTROLS),
        *(GRPO_CLIPPED, REBEL_UNCLIPPED, PPO_LAMBDA_1),
    ],
    "ablations": as_tuned_for("a_star_po_n8", A_STAR_PO_ABLATIONS),
    "off-policy": as_tuned_for("a_star_po_n8", OFF_POLICY),
    "process": as_tuned_for("a_star_po_n8", PROCESS),  # process.py has the command
}

# ---------------------------------------------------------------------------------------------
# Running it


class Job(NamedTuple):
    """A command that fills a folder; it is finished when the folder holds the product."""

    command: list[str]
    folder: Path
    product: str


def run_job(job: Job) -> None:
    """Run a job unless it is finished; one that was interrupted starts again.

    The output goes to FOLDER.log, the command to FOLDER.json. Raises UserError if the command does
    not take its flags, if another command made the folder, or if another comparison is running the
    same job: the log is locked as long as the job has it open, also if its own comparison has been
    killed.
    """
    note = Path(f"{job.folder}.json")
    if (job.folder / job.product).exists():
        subject = f"{job.folder} (remove it, or give another --work)"
        files.refuse_difference(subject, files.read_json(note), {"command": job.command})
        return
    start = time.perf_counter()
    log = Path(f"{job.folder}.log")
    with files.open_locked(log) as output:
        output.truncate(0)
        shutil.rmtree(job.folder, ignore_errors=True)
        files.write_json(note, {"command": job.command})
        process = subprocess.run(
            [sys.executable, *job.command],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    if process.returncode == 2:  # a mistake in the flags or files, in one sentence
        sentences = re.findall(r"error: (.+)", files.read_text(log))
        raise UserError(f"{' '.join(sentences)} (see {log}: python {' '.join(job.command)})")
    if process.returncode != 0 or not (job.folder / job.product).exists():
        command = " ".join(job.command)
        raise ChildProcessError(f"exit code {process.returncode}, see {log}: python {command}")
    shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)  # the final model is enough
    print(f"{time.perf_counter() - start:6.0f} s  {job.folder}", flush=True)


def run_jobs(jobs: list[Job]) -> None:
    """Run jobs, two at a time, and equal ones once."""
    unique = {job.folder: job for job in jobs}
    for _ in run_chains([[job] for job in unique.values()]):
        pass


def run_chains(chains: list[list[Job]]) -> Iterator[None]:
    """Run the jobs of each chain in order, two chains at a time.

    Yield once for each finished chain, in the order of `chains`. A failure is raised when its
    chain's turn comes. No further chain starts after that.
    """
    pool = ThreadPoolExecutor(RUNS_AT_ONCE)
    try:
        yield from pool.map(run_chain, chains)
    finally:
        pool.shutdown(cancel_futures=True)


def run_chain(chain: list[Job]) -> None:
    """Run jobs one after another."""
    for job in chain:
        run_job(job)


def stage_command(args: argparse.Namespace, command: str) -> list[str]:
    """Return python's arguments for a stage, baselines.py or process.py on the task."""
    stage, *flags = command.split()
    if args.task != "none":
        return ["-m", args.task, stage, *flags]
    if stage in ("baselines", "process"):
        return ["-m", f"experiments.{stage}", *flags]
    return [f"{stage}.py", *flags]


def stage1_job(args: argparse.Namespace, num_samples: int) -> Job:
    """Sample N responses per prompt from the reference."""
    values = values_file(args, num_samples)
    command = stage_command(args, "offline_value")
    command += ["--model", args.model, "--dataset", args.dataset]
    command += ["--max-tokens", str(args.max_tokens), "--num-value-samples", str(num_samples)]
    return Job([*command, "--out", str(values)], values.parent, values.name)


def values_file(args: argparse.Namespace, num_samples: int) -> Path:
    """Return the path of the values file with N responses per prompt; for N = 0, V* is 0 in it."""
    return args.work / f"values-{num_samples}" / "values.json"


def write_zero_values(source: Path, target: Path) -> None:
    """Write a values file in which V* is 0, for methods that need its prompts alone."""
    values = files.read_json(source)
    for entry in values["prompts"]:
        entry |= {"rewards": [0.0], "lengths": [], "v_star": 0.0}
    values["header"]["seconds"] = 0.0
    files.write_json(target, values)


def train_job(args: argparse.Namespace, setting: Setting, tuned: Tuned, seed: int) -> Job:
    """Train with one setting and seed. The folder's name says which."""
    rate = tuned.rate * setting.rate_scale
    name = re.sub(r"[^\w.]+", "-", setting.command).strip("-")
    name += f"-n{setting.num_value_samples}-x{setting.samples_per_prompt}-lr{rate:g}"
    name += f"-kl{tuned.kl_weight:g}-seed{seed}"
    folder = args.work / name
    command = stage_command(args, setting.command)
    command += ["--values", str(values_file(args, setting.num_value_samples)), "--out", str(folder)]
    command += ["--lr", f"{rate:g}", "--seed", str(seed), "--num-steps", str(args.num_steps)]
    command += ["--batch-size", str(args.rollout_size // setting.samples_per_prompt)]
    command += ["--samples-per-prompt", str(setting.samples_per_prompt)]
    command += [setting.kl_weight.flag, f"{tuned.kl_weight:g}"]
    command += ["--save-every", str(args.num_steps), "--eval-dataset", "none"]
    return Job(command, folder, "final/manifest.json")


def evaluate_job(args: argparse.Namespace, model: Path, folder: Path) -> Job:
    """Sample a model's answers to the test problems."""
    command = stage_command(args, "evaluate")
    command += ["--model", str(model), "--benchmarks", args.test, "--temperature", "1"]
    command += ["--max-tokens", str(args.max_tokens), "--num-samples", str(args.eval_samples)]
    return Job([*command, "--out", str(folder)], folder, "summary.json")


def other_job(args: argparse.Namespace, model: Path, folder: Path) -> Job:
    """Measure a model of Countdown on problems of another size."""
    command = ["-m", "experiments.forgetting", "--model", str(model), "--reference", args.model]
    return Job([*command, "--out", str(folder / "other.json")], folder, "other.json")


def measuring_jobs(args: argparse.Namespace, model: Path, folder: Path) -> list[Job]:
    """Measure a model in all ways. The folder's name gets an ending for each."""
    jobs = [evaluate_job(args, model, Path(f"{folder}-eval"))]
    if args.task == "experiments.countdown":
        jobs.append(other_job(args, model, Path(f"{folder}-other")))
    return jobs


# ---------------------------------------------------------------------------------------------
# The command


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=command_line.HelpFormatter
    )
    add = parser.add_argument
    number = command_line.positive_integer
    add("--rows", choices=ROWS, default="compare", help="what is compared")
    add(
        "--only",
        nargs="+",
        metavar="METHOD",
        help="make these rows alone; they replace all that is in --out",
    )
    task_help = "module of a task, which runs the stages on it; none: the stages alone"
    add("--task", metavar="MODULE", default="experiments.countdown", help=task_help)
    add("--model", default="countdown/reference", help="the reference")
    add("--dataset", default="countdown", help="training problems")
    add("--test", default="countdown", help="test problems")
    add("--max-tokens", type=number, default=160, help="longest response")
    add("--seeds", type=number, default=5, help="number of runs of each row, each with a seed")
    add("--first-seed", type=command_line.seed, default=0, help="the others count up from it")
    tuned_help = "take learning rates and KL weights from this compare.json, and tune nothing"
    add("--tuned", type=Path, metavar="FILE", help=tuned_help)
    add(
        "--rates",
        type=command_line.positive_number,
        nargs="+",
        default=[1e-4, 2e-4],
        help="learning rates to try; a single one is used as it is, with the published KL weight",
    )
    add("--goals", type=float, nargs="+", default=[0.25, 0.3, 0.35], help="rewards to be reached")
    no_seconds = "leave them out of table and picture, if other work ran beside some of the runs"
    add("--no-seconds", action="store_true", help=no_seconds)
    add("--num-steps", type=number, default=100, help="rollouts of a run")
    add("--rollout-size", type=number, default=128, help="responses of a rollout")
    add("--eval-samples", type=number, default=64, help="responses to a test problem")
    add("--work", type=Path, default=Path("runs/compare"), help="folder of all runs, kept")
    add("--out", type=Path, default=Path("experiments/results"), help="folder of the results")
    return parser.parse_args()


def load_task(name: str) -> None:
    """Import the module of a task, which adds it to problems.DATASETS. UserError if missing."""
    missing = f"--task {name}: there is no such module"
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(missing)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A library that the module itself imports may be missing, which is another mistake.
        if not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UserError(missing) from error


def choose_settings(args: argparse.Namespace) -> list[Setting]:
    """Return the rows that the command line asks for; UserError if it cannot have them."""
    settings = {setting.method: setting for setting in ROWS[args.rows]}
    for name in args.only or []:
        if name not in settings:
            raise UserError(f"--only {name}: choose from {', '.join(settings)}")
    if args.rows == "process" and args.task != "none":
        raise UserError("--rows process needs --task none, see experiments/process.py")
    chosen = [settings[name] for name in dict.fromkeys(args.only or settings)]
    for setting in chosen:
        samples = setting.samples_per_prompt
        if args.rollout_size % samples != 0:
            raise UserError(
                f"--rollout-size {args.rollout_size} is no multiple of the {samples} responses per "
                f"prompt of {setting.method}"
            )
    return chosen


def tune(args: argparse.Namespace, names: list[str]) -> tuple[dict[str, Tuned], list[str]]:
    """Find the learning rate and the KL weight of rows of COMPARISON; return lines about it, too.

    All pairs of a rate and a weight are tried. If the best rate is the lowest or the highest of
    them, half or twice that rate is tried as well, with the same weight. With a single rate,
    nothing is tried, and the weight is the published one.
    """
    weights_of = {setting.method: setting.kl_weight for setting in COMPARISON}
    if len(args.rates) == 1:
        chosen = {}
        for name in names:
            chosen[name] = Tuned(args.rates[0], weights_of[name].published)
        return chosen, []
    candidates = []
    for rate in args.rates:
        for name in names:
            candidates.append((name, Tuned(rate, weights_of[name].published)))
            candidates.append((name, Tuned(rate, weights_of[name].alternative)))
    rewards = run_candidates(args, candidates)
    candidates = []
    for name in names:
        best = best_of(rewards[name])
        if best.rate == min(args.rates):
            candidates.append((name, best._replace(rate=best.rate / 2)))
        elif best.rate == max(args.rates):
            candidates.append((name, best._replace(rate=best.rate * 2)))
    for name, more in run_candidates(args, candidates).items():
        rewards[name] |= more

    chosen = {}
    lines = []
    for name in names:
        chosen[name] = best_of(rewards[name])
        for tuned, reward in sorted(rewards[name].items()):
            pair = f"rate {tuned.rate:<8.3g}  KL weight {tuned.kl_weight:<6g}"
            mark = "  chosen" if tuned == chosen[name] else ""
            numbers = f"mean reward {reward.mean:.3f}  at the end {reward.end:.3f}"
            lines.append(f"{name:12} {pair} {numbers}{mark}")
    return chosen, lines


def read_tuned(path: Path, names: list[str]) -> dict[str, Tuned]:
    """Read what rows of an earlier comparison were run with; UserError if one is missing."""
    found = {}
    try:
        for row in json.loads(files.read_text(path)):
            found[row["method"]] = Tuned(float(row["learning_rate"]), float(row["kl_weight"]))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} has no results of a comparison") from error
    for name in names:
        if name not in found:
            raise UserError(f"{path} has no row {name}")
    return {name: found[name] for name in names}


def run_candidates(
    args: argparse.Namespace, candidates: list[tuple[str, Tuned]]
) -> dict[str, dict[Tuned, TuningReward]]:
    """Train rows of COMPARISON, which are named, and return the rewards of the runs."""
    rows = {setting.method: setting for setting in COMPARISON}
    jobs = {}
    for name, tuned in candidates:
        jobs[name, tuned] = train_job(args, rows[name], tuned, TUNING_SEED)
    run_jobs(list(jobs.values()))
    rewards = {}
    for (name, tuned), job in jobs.items():
        steps = files.read_jsonl(job.folder / "metrics.jsonl")
        each = [step["reward"] for step in steps]
        reward = TuningReward(statistics.mean(each), statistics.mean(each[-SMOOTHING:]))
        rewards.setdefault(name, {})[tuned] = reward
    return rewards


def write_results(
    args: argparse.Namespace,
    tuned: dict[str, Tuned],
    tuning_lines: list[str],
    settings: list[Setting],
    jobs: list[tuple[Setting, Job]],
) -> None:
    """Sum up the runs of each row, write the results, and draw them. `jobs` are those that ran."""
    runs_of = {setting.method: [] for setting in settings}
    for setting, job in jobs:
        values = values_file(args, setting.num_value_samples)
        runs_of[setting.method].append(read_run(job.folder, values, args.rollout_size))
    budgets = find_budgets(list(itertools.chain(*runs_of.values())))
    results = []
    for setting in settings:
        runs = runs_of[setting.method]
        row = {
            "method": setting.method,
            "seeds": len(runs),
            "learning_rate": tuned[setting.tuned_row].rate * setting.rate_scale,
            "kl_weight": tuned[setting.tuned_row].kl_weight,
            "rollouts": args.num_steps,
        }
        results.append(row | sum_up(runs, args.goals, budgets))
    files.write_text(args.out / f"{args.rows}.json", json.dumps(results, indent=1) + "\n")
    costs = ["tokens"] if args.no_seconds else ["tokens", "seconds"]
    table = make_table(results, read_scores(args.work / "reference"), costs, budgets)
    table += ["", "pass@1 of each seed", "", *table_of_seeds(runs_of), ""]
    for count in sorted({setting.num_value_samples for setting in settings} - {0}):
        table.append(describe_stage_1(values_file(args, count)))
    if tuning_lines:
        table += ["", f"Tuning, seed {TUNING_SEED}", "", *tuning_lines]
    text = "\n".join(line.rstrip() for line in table) + "\n"
    files.write_text(args.out / f"{args.rows}.txt", text)
    draw_pictures(args, results, runs_of, costs)


def draw_pictures(
    args: argparse.Namespace, results: list[dict], runs_of: dict[str, list[Run]], costs: list[str]
) -> None:
    """Draw what there is to draw of the rows. `costs` are the names of UNITS that are wanted."""
    if args.rows in ("compare", "long"):
        goal = f"{max(args.goals):g}"
        draw_comparison(runs_of, results, costs, goal, args.out / f"{args.rows}.png")
    if args.rows == "compare":
        draw_costs(runs_of, costs, args.out / "costs.png")
    elif args.rows == "off-policy" and not args.only:
        draw_off_policy(results, args.out / "off-policy.png")


def main() -> None:
    """Run what is missing, and write the results after each seed."""
    args = parse_args()
    settings = choose_settings(args)
    names = list(dict.fromkeys(setting.tuned_row for setting in settings))
    files.check_writable(args.out, is_folder=True)
    files.check_writable(args.work, is_folder=True, flag="--work")
    if args.tuned is not None:
        if args.tuned.resolve() == (args.out / f"{args.rows}.json").resolve():
            raise UserError(f"{args.tuned} would be replaced: give another --out, or a copy of it")
        tuned = read_tuned(args.tuned, names)
        tuning_lines = [f"as in {args.tuned}"]
    if args.task != "none":
        load_task(args.task)
    train_rows = problems.load_problems(args.dataset, "train")
    test_rows = problems.load_problems(args.test, "test")
    fingerprint = files.model_fingerprint(files.model_folder(args.model))
    # Runs on another model or other problems are other runs.
    args.work = args.work / files.content_digest([train_rows, test_rows, fingerprint])

    counts = {setting.num_value_samples for setting in settings}
    run_jobs([stage1_job(args, n) for n in sorted(counts | {8}) if n > 0])
    write_zero_values(values_file(args, 8), values_file(args, 0))
    run_jobs(measuring_jobs(args, Path(args.model), args.work / "reference"))
    if args.tuned is None:
        tuned, tuning_lines = tune(args, names)
    print("\n".join(tuning_lines), flush=True)
    jobs = []
    chains = []
    # Seed by seed, so that a busy hour of the machine slows all methods and not one.
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for setting in settings:
            job = train_job(args, setting, tuned[setting.tuned_row], seed)
            jobs.append((setting, job))
            chains.append([job, *measuring_jobs(args, job.folder / "final", job.folder)])
    for num_finished, _ in enumerate(run_chains(chains), start=1):
        if num_finished % len(settings) == 0:
            write_results(args, tuned, tuning_lines, settings, jobs[:num_finished])


if __name__ == "__main__":
    command_line.run(main)
