"""Sum up the runs of compare.py: rows, tables and pictures.

The results are a list with one entry for each method. A pair is a mean over the seeds and its
standard error, which is null if there is one seed:

tokens_total, seconds_total  sampled tokens, and the log's seconds_total, stage 1 included. The
                             seconds of stage 1 come from the values file, and include starting the
                             engine.
reward_final                 reward of the training responses, the mean of the last SMOOTHING steps
pass_at_1, ..., pass_at_64   of the trained model on the test problems, at temperature 1
kl                           ln(pi / pi_ref) of a response, in nats, over the same steps; null if
                             the loss does not return it as "logratio"
grad_norm                    L2 norm of the gradient before clipping, the mean of the first
                             SMOOTHING steps: later it depends on how the run went
kl_other, reward_other       on problems with two numbers, which training has not seen
tokens_to, seconds_to        by goal: what was spent when the reward reached it; null unless every
                             run did. The reward is the mean of the SMOOTHING steps around each. It
                             is noisier for methods with fewer prompts in a step, which therefore
                             touch a goal earlier. pass_at_1 is not affected.
reward_at_equal_tokens,      reward_final if each run had stopped when the cheapest of all runs
reward_at_equal_seconds      ended; null if stage 1 and one step take more in any run
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # there may be no display
import numpy
from cycler import cycler
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from apo import files
from experiments.plot import COLOURS, Label, finish, label_lines, save, smooth, spread

SMOOTHING = 9  # steps
# What a row is called in a picture, if not by its name in the results.
LABELS = {
    "a_star_po_n8": "A*-PO, N = 8",
    "a_star_po_n2": "A*-PO, N = 2",
    "a_star_po_n1": "A*-PO, N = 1",
    "mean": "A*-PO, mean for V*",
    "zero": "A*-PO, 0 for V*",
    "running": "A*-PO, running means",
    "grpo_8": "GRPO, groups of 8",
    "grpo_4": "GRPO, groups of 4",
    "rebel": "REBEL",
    "ppo": "PPO",
}


class Unit(NamedTuple):
    """A unit of cost, for tables and pictures."""

    name: str
    size: float


UNITS = {"tokens": Unit("million tokens", 1e6), "seconds": Unit("seconds", 1.0)}

# ---------------------------------------------------------------------------------------------
# Reading


class Scores(NamedTuple):
    """What a model can do."""

    pass_at_k: dict[str, float]  # by k
    other: dict[str, float]  # reward and KL on problems with two numbers; empty if not measured


class Run(NamedTuple):
    """The log of a training run."""

    rewards: list[float]  # of each step
    # By UNITS: what was spent before each step, stage 1 included; and one more, the total.
    spent: dict[str, list[float]]
    kl: float | None  # None: its loss does not return the log-ratio
    grad_norm: float
    scores: Scores  # of the trained model

    @property
    def smooth_rewards(self) -> list[float]:
        """The reward of each step, as a mean over the steps around it."""
        return smooth(self.rewards, SMOOTHING)


def read_scores(folder: Path) -> Scores:
    """Read how the model of a folder did in its tests; see `measuring_jobs` in compare.py."""
    [scores] = files.read_json(Path(f"{folder}-eval/summary.json"))["benchmarks"].values()
    other = Path(f"{folder}-other/other.json")
    return Scores(scores["pass_at_k"], files.read_json(other) if other.exists() else {})


def read_run(folder: Path, values_file: Path, rollout_size: int) -> Run:
    """Read the log of a training run, and the scores of its model."""
    values = files.read_json(values_file)
    tokens = [sum(sum(entry["lengths"]) for entry in values["prompts"])]
    seconds = [values["header"]["seconds"]]
    steps = files.read_jsonl(folder / "metrics.jsonl")
    for step in steps:
        # process.py samples from the reference as well. It logs a mean over the responses of the
        # first update, which stands for all of the step.
        tokens_of_each = step["response_tokens"] + step.get("ref_tokens", 0.0)
        tokens.append(tokens[-1] + tokens_of_each * rollout_size)
        seconds.append(seconds[-1] + step["seconds_total"])
    kl = None
    if "logratio" in steps[-1]:
        kl = statistics.mean(step["logratio"] for step in steps[-SMOOTHING:])
    return Run(
        rewards=[step["reward"] for step in steps],
        spent={"tokens": tokens, "seconds": seconds},
        kl=kl,
        grad_norm=statistics.mean(step["grad_norm"] for step in steps[:SMOOTHING]),
        scores=read_scores(folder),
    )


def describe_stage_1(values_file: Path) -> str:
    """Say what stage 1 cost."""
    values = files.read_json(values_file)
    count = len(values["prompts"][0]["rewards"])
    tokens = sum(sum(entry["lengths"]) for entry in values["prompts"])
    seconds = values["header"]["seconds"]
    return f"stage 1, N = {count}: {tokens / 1e6:.3f} million tokens, {seconds:.0f} seconds"


def reach(reward: Sequence[float], spent: Sequence[float], goal: float) -> float | None:
    """Return what was spent when the reward first reached the goal, interpolated between steps."""
    if reward[0] >= goal:
        return spent[0]
    for i in range(1, len(reward)):
        if reward[i] >= goal:
            part = (goal - reward[i - 1]) / (reward[i] - reward[i - 1])
            return spent[i - 1] + part * (spent[i] - spent[i - 1])
    return None


def reward_within(run: Run, cost: str, budget: float) -> float | None:
    """Return the reward of the last SMOOTHING steps that a budget of tokens or seconds allows.

    None if it does not allow one step after stage 1.
    """
    finished = sum(spent_after <= budget for spent_after in run.spent[cost][1:])
    if finished == 0:
        return None
    return statistics.mean(run.rewards[max(0, finished - SMOOTHING) : finished])


def find_budgets(runs: list[Run]) -> dict[str, float]:
    """Return what the cheapest of all runs took, in each of UNITS."""
    return {cost: min(run.spent[cost][-1] for run in runs) for cost in UNITS}


class Estimate(NamedTuple):
    """A mean over the seeds; in JSON it is a list of two."""

    mean: float
    error: float | None  # its standard error; None if there is one seed


def mean_and_error(values: Sequence[float | None]) -> Estimate | None:
    """Estimate the mean; None if a value is missing."""
    if None in values:
        return None
    mean = statistics.mean(values)
    if len(values) == 1:
        return Estimate(mean, None)
    return Estimate(mean, statistics.stdev(values) / math.sqrt(len(values)))


def sum_up(runs: list[Run], goals: list[float], budgets: dict[str, float]) -> dict:
    """Sum up the runs of one row, under the keys explained above. `budgets` is by UNITS."""
    row = {
        "tokens_total": mean_and_error([run.spent["tokens"][-1] for run in runs]),
        "seconds_total": mean_and_error([run.spent["seconds"][-1] for run in runs]),
        "reward_final": mean_and_error([statistics.mean(run.rewards[-SMOOTHING:]) for run in runs]),
    }
    for k in runs[0].scores.pass_at_k:
        row[f"pass_at_{k}"] = mean_and_error([run.scores.pass_at_k[k] for run in runs])
    row["kl"] = mean_and_error([run.kl for run in runs])
    row["grad_norm"] = mean_and_error([run.grad_norm for run in runs])
    for name in runs[0].scores.other:
        row[f"{name}_other"] = mean_and_error([run.scores.other[name] for run in runs])
    row["tokens_to"] = {}
    row["seconds_to"] = {}
    for goal in goals:
        for cost in UNITS:
            spent = [reach(run.smooth_rewards, run.spent[cost], goal) for run in runs]
            row[f"{cost}_to"][f"{goal:g}"] = mean_and_error(spent)
    for cost, budget in budgets.items():
        rewards = [reward_within(run, cost, budget) for run in runs]
        row[f"reward_at_equal_{cost}"] = mean_and_error(rewards)
    return row


def make_table(
    results: list[dict], reference: Scores, costs: Sequence[str], budgets: dict[str, float]
) -> list[str]:
    """Write the results as text: what each method has in the end, and what each goal took.

    `costs` are the names of UNITS that are wanted. `budgets` are those of equal cost.
    """
    lines = ["In the end (mean ± standard error over the seeds)", ""]
    lines += table_of_scores(results, reference)
    for cost in costs:
        unit = UNITS[cost]
        budget = f"{budgets[cost] / unit.size:.3g}"
        title = "stage 1 included: in all, and to each reward (- unless every run reached it)"
        lines += ["", f"{unit.name}, {title};", f"and the reward after {budget} {unit.name}", ""]
        lines += table_of_costs(results, cost, unit.size, f"reward at {budget}")
    return lines


def table_of_scores(results: list[dict], reference: Scores) -> list[str]:
    """Write a line for the reference and for each method, with all scores."""
    names = names_in_table(results[0])
    header = f"{'method':26} seeds  rate      KL weight"
    of_reference = f"{'reference':53}"
    for name in names:
        header += f"{name:>18}"
        value = value_of_reference(name, reference)
        if value is None:
            of_reference += " " * 18
        else:
            of_reference += f"{value:>10.3f}        "
    lines = [header, of_reference]
    for row in results:
        line = f"{row['method']:26} {row['seeds']:5}  {row['learning_rate']:<10.3g}"
        line += f"{row['kl_weight']:<10g}"
        for name in names:
            line += f"{format_estimate(row[name]):>18}"
        lines.append(line)
    return lines


def names_in_table(row: dict) -> list[str]:
    """Choose the columns: of pass@k those of k = 1, 8 and the largest k."""
    pass_at_k = [name for name in row if name.startswith("pass_at_")]
    names = [name for name in ("pass_at_1", "pass_at_8") if name in pass_at_k]
    if pass_at_k[-1] not in names:
        names.append(pass_at_k[-1])
    others = [name for name in row if name.endswith("_other")]
    return ["reward_final", *names, "kl", "grad_norm", *others]


def table_of_costs(results: list[dict], cost: str, unit_size: float, last_title: str) -> list[str]:
    """Write a line for each method: the cost in all and to each goal, and reward at equal cost."""
    header = f"{'method':26}{'total':>18}"
    for goal in results[0][f"{cost}_to"]:
        header += f"{goal:>18}"
    lines = [f"{header}{last_title:>18}"]
    for row in results:
        line = f"{row['method']:26}"
        for estimate in (row[f"{cost}_total"], *row[f"{cost}_to"].values()):
            line += f"{format_estimate(estimate, unit_size):>18}"
        lines.append(f"{line}{format_estimate(row[f'reward_at_equal_{cost}']):>18}")
    return lines


def table_of_seeds(runs_of: dict[str, list[Run]]) -> list[str]:
    """Write pass@1 of each run: a mean hides that some runs have collapsed."""
    lines = []
    for method, runs in runs_of.items():
        scores = "".join(f"{run.scores.pass_at_k['1']:>8.3f}" for run in runs)
        lines.append(f"{method:26}{scores}")
    return lines


def value_of_reference(name: str, reference: Scores) -> float | None:
    """Return what the reference has in a column of the table; None for its training reward."""
    if name.startswith("pass_at_"):
        return reference.pass_at_k[name.removeprefix("pass_at_")]
    if name.endswith("_other"):
        return reference.other[name.removesuffix("_other")]
    if name == "kl":
        return 0.0
    return None


def format_estimate(estimate: Estimate | None, unit_size: float = 1.0) -> str:
    """Write a mean and its standard error, if there is one."""
    if estimate is None:
        return "-"
    mean = estimate.mean / unit_size
    decimals = 0 if mean >= 100 else 3
    text = f"{mean:.{decimals}f}"
    if estimate.error is not None:
        text += f" ± {estimate.error / unit_size:.{decimals}f}"
    return text


# ---------------------------------------------------------------------------------------------
# Pictures


def best_methods(results: list[dict], key: str, goal: str) -> list[str]:
    """Return the methods that reached a goal at the least cost, and those not clearly behind.

    A difference of less than two standard errors does not count. With fewer than three seeds the
    errors say nothing, and no method is returned.
    """
    costs = {}
    for row in results:
        if row[key][goal] is not None:
            costs[row["method"]] = row[key][goal]
    if not costs or results[0]["seeds"] < 3:
        return []
    best = min(costs.values())
    names = []
    for name, cost in sorted(costs.items(), key=lambda item: item[1]):
        if cost.mean - best.mean <= 2 * math.hypot(best.error, cost.error):
            names.append(name)
    return names


def draw_comparison(
    runs_of: dict[str, list[Run]],
    results: list[dict],
    costs: Sequence[str],
    goal: str,
    out: Path,
) -> None:
    """Draw the reward of all methods, with a band of one standard error, against what was spent.

    There is a panel for each of `costs`, which are names of UNITS.
    """
    figure, panels = make_panels(len(costs), width=2.6 + 2.8 * len(costs), height=4)
    for axes, cost in zip(panels, costs, strict=True):
        draw_rewards(axes, runs_of, cost)
        x_label = f"{UNITS[cost].name}, stage 1 included"
        finish(axes, title_of(results, cost, goal), x_label, "")
    note = "band: ± 1 s.e." if results[0]["seeds"] > 1 else "one run each"
    panels[0].set_ylabel(f"reward of the training responses ({note})", fontsize=8.5)
    name_lines(panels[-1], list(runs_of))
    save(figure, out)


def make_panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Make a figure with panels side by side, which share their vertical axis."""
    figure, panels = pyplot.subplots(
        1, count, figsize=(width, height), sharey=True, squeeze=False, layout="constrained"
    )
    return figure, list(panels[0])


def draw_rewards(axes: Axes, runs_of: dict[str, list[Run]], cost: str) -> None:
    """Draw one line for each method, with its band if there are several seeds."""
    axes.set_prop_cycle(cycler(linestyle=["-", "--"]) * cycler(color=COLOURS))
    for runs in runs_of.values():
        rewards = numpy.array([run.smooth_rewards for run in runs])
        spent = numpy.mean([run.spent[cost][:-1] for run in runs], axis=0) / UNITS[cost].size
        mean = rewards.mean(axis=0)
        [line] = axes.plot(spent, mean, linewidth=1.5)
        if len(runs) > 1:
            error = rewards.std(axis=0, ddof=1) / math.sqrt(len(runs))
            axes.fill_between(spent, mean - error, mean + error, color=line.get_color(), alpha=0.15)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlim(left=0)


def title_of(results: list[dict], cost: str, goal: str) -> str:
    """Say in a picture's title which method reached the goal first, and if that is not clear."""
    best = [label_of(method) for method in best_methods(results, f"{cost}_to", goal)]
    if not best:
        return f"Reward by {cost}"
    if len(best) > 2:
        return f"In {cost} to reward {goal},\nno method is clearly first"
    title = f"Fewest {cost} to reward {goal}: {best[0]}"
    if len(best) == 2:
        title += f",\nnot clearly fewer than {best[1]}"
    return title


def label_of(method: str) -> str:
    """Return what a row is called in a picture."""
    return LABELS.get(method, method)


def name_lines(axes: Axes, methods: list[str]) -> None:
    """Write the name of each line at its end, in the line's colour."""
    bottom, top = axes.get_ylim()
    ends = []
    for line in axes.lines:
        ends.append((line.get_ydata()[-1] - bottom) / (top - bottom))
    for line, method, end in zip(axes.lines, methods, spread(ends, gap=0.06), strict=True):
        text = label_of(method)
        if line.get_linestyle() == "--":
            text = "- - " + text
        place = (1.02, end)
        axes.annotate(text, place, xycoords="axes fraction", color=line.get_color(), fontsize=8)


def draw_costs(runs_of: dict[str, list[Run]], costs: Sequence[str], out: Path) -> None:
    """Draw what a run of each method costs, as a bar whose hatched part is stage 1."""
    names = [label_of(method) for method in runs_of]
    width = 2.0 + 3.1 * len(costs)
    figure, panels = make_panels(len(costs), width, height=0.8 + 0.3 * len(names))
    for axes, cost in zip(panels, costs, strict=True):
        unit = UNITS[cost]
        totals = []
        stage_1 = []
        for runs in runs_of.values():
            totals.append(statistics.mean(run.spent[cost][-1] for run in runs) / unit.size)
            stage_1.append(statistics.mean(run.spent[cost][0] for run in runs) / unit.size)
        axes.barh(names, totals, color=COLOURS[0])
        axes.barh(
            names, stage_1, color="white", edgecolor=COLOURS[0], hatch="////", label="stage 1"
        )
        finish(axes, title_of_costs(names, totals, cost), f"{unit.name} of one run", "")
    panels[0].invert_yaxis()  # the first method on top
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", fontsize=8)
    save(figure, out)


def title_of_costs(names: list[str], totals: list[float], cost: str) -> str:
    """Say in a picture's title which method costs the most, and which the least."""
    most = names[totals.index(max(totals))]
    least = names[totals.index(min(totals))]
    return f"{cost.capitalize()}: most with {most},\nfewest with {least}"


def draw_off_policy(results: list[dict], out: Path) -> None:
    """Draw the final reward against how old the data is in an update, for V*, the mean and 0."""
    rows = {row["method"]: row for row in results}
    ticks = {
        "updates_1": "1 update",
        "updates_4": "4 updates",
        "updates_16": "16 updates",
        "replay": "replay of\n4 rollouts",
        "replay_quarter": "replay at a quarter\nof the rate",
    }
    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    has_errors = results[0]["seeds"] > 1
    labels = []
    for shift, (baseline, label) in enumerate(
        (("v_star", "V*"), ("mean", "mean reward"), ("zero", "0"))
    ):
        places = []
        means = []
        errors = []
        for number, data in enumerate(ticks):
            reward = rows[f"{data}_{baseline}"]["reward_final"]
            places.append(number + 0.06 * (shift - 1))
            means.append(reward.mean)
            errors.append(reward.error)
        colour = COLOURS[shift]
        bars = errors if has_errors else None
        axes.errorbar(places, means, bars, marker="o", markersize=4, capsize=3, color=colour)
        labels.append(Label(f"with {label}", means[-1], colour))
    axes.set_xticks(range(len(ticks)), ticks.values())
    note = "bar: ± 1 s.e." if has_errors else "one run each"
    title = "The reward at the end, by the age of the data"
    if has_errors:
        leads = []
        for data, label in ticks.items():
            if v_star_leads(rows, data):
                leads.append(label.replace("\n", " "))
        title = "V* is ahead on none of this data"
        if leads:
            title = f"V* is ahead with {', '.join(leads)}"
    finish(axes, title, "updates on each rollout, and replay", f"reward at the end ({note})")
    label_lines(axes, labels)
    save(figure, out)


def v_star_leads(rows: dict[str, dict], data: str) -> bool:
    """Say whether V* ends above both the mean and 0, by more than two standard errors each."""
    v_star = rows[f"{data}_v_star"]["reward_final"]
    for baseline in ("mean", "zero"):
        other = rows[f"{data}_{baseline}"]["reward_final"]
        if v_star.mean - other.mean <= 2 * math.hypot(v_star.error, other.error):
            return False
    return True
