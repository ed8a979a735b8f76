"""Sum up the runs of compare.py: rows, tables and pictures.

The results are a list with one entry for each method. Pairs are the mean over the seeds and its
standard error:

tokens_total, seconds_total  sampled tokens, and the log's seconds_total, stage 1 included. Its time
                             is that of its values file, with the start-up of its engine.
reward_final                 reward of the training responses, the mean of the last SMOOTHING steps
pass_at_1, pass_at_64        of the trained model on the test problems, at temperature 1
kl                           ln(pi / pi_ref) of a response, in nats, over the same steps
kl_other, reward_other       on problems with two numbers, which training has not seen
tokens_to, seconds_to        by goal: what was spent when the reward reached it; null unless every
                             run did. The reward is the mean of the SMOOTHING steps around each. It
                             is noisier for methods with fewer prompts in a step, which therefore
                             touch a goal earlier. pass_at_1 has no such fault.
"""

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # there may be no display
import numpy
from cycler import cycler
from matplotlib import pyplot

from apo import files
from experiments.plot import COLOURS, smooth, spread

SMOOTHING = 9  # steps
NAMES_IN_TABLE = "reward_final|pass_at_.*|kl|.*_other"

# ---------------------------------------------------------------------------------------------
# Reading


class Scores(NamedTuple):
    """What a model can do."""

    pass_at_k: dict[str, float]  # by k
    other: dict[str, float]  # reward and KL on problems of another size; empty if not measured


class Run(NamedTuple):
    """The log of a training run, with what was spent, stage 1 included, before each step."""

    reward: list[float]  # of each step, smoothed
    tokens: list[float]  # sampled before each step; and one more, the total
    seconds: list[float]  # the same
    reward_final: float
    kl: float
    scores: Scores  # of the trained model


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
        # process.py samples from the reference as well.
        tokens_of_each = step["response_tokens"] + step.get("ref_tokens", 0.0)
        tokens.append(tokens[-1] + tokens_of_each * rollout_size)
        seconds.append(seconds[-1] + step["seconds_total"])
    rewards = [step["reward"] for step in steps]
    return Run(
        reward=smooth(rewards, SMOOTHING),
        tokens=tokens,
        seconds=seconds,
        reward_final=statistics.mean(rewards[-SMOOTHING:]),
        kl=statistics.mean(step["logratio"] for step in steps[-SMOOTHING:]),
        scores=read_scores(folder),
    )


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


def sum_up(runs: list[Run], goals: list[float], eval_samples: int) -> dict:
    """Sum up the runs of one row. The keys are explained above."""
    row = {
        "tokens_total": mean_and_error([run.tokens[-1] for run in runs]),
        "seconds_total": mean_and_error([run.seconds[-1] for run in runs]),
        "reward_final": mean_and_error([run.reward_final for run in runs]),
    }
    for k in (1, eval_samples):
        row[f"pass_at_{k}"] = mean_and_error([run.scores.pass_at_k[str(k)] for run in runs])
    row["kl"] = mean_and_error([run.kl for run in runs])
    for name in runs[0].scores.other:
        row[f"{name}_other"] = mean_and_error([run.scores.other[name] for run in runs])
    for what in ("tokens", "seconds"):
        row[f"{what}_to"] = {}
        for goal in goals:
            spent = [reach(run.reward, getattr(run, what), goal) for run in runs]
            row[f"{what}_to"][f"{goal:g}"] = mean_and_error(spent)
    return row


def make_table(results: list[dict], reference: Scores) -> list[str]:
    """Write the results as text: what each method has in the end, and what each goal took."""
    names = [name for name in results[0] if re.fullmatch(NAMES_IN_TABLE, name)]
    lines = ["In the end (mean ± standard error over the seeds)", ""]
    header = f"{'method':22} seeds  rate      KL weight"
    lines.append(header + "".join(f"{name:>18}" for name in names))
    line = f"{'reference':49}"
    for name in names:
        value = value_of_reference(name, reference)
        line += " " * 18 if value is None else f"{value:>10.3f}        "
    lines.append(line)
    for row in results:
        line = f"{row['method']:22} {row['seeds']:5}  {row['learning_rate']:<10.3g}"
        line += f"{row['kl_weight']:<10g}"
        lines.append(line + "".join(f"{format_pair(row[name]):>18}" for name in names))
    for what, unit in (("tokens", 1e6), ("seconds", 1.0)):
        title = f"{'millions of ' if unit > 1 else ''}{what}, stage 1 included"
        lines += ["", f"{title}: in all, and to each reward (- unless every run reached it)", ""]
        goals = results[0][f"{what}_to"]
        lines.append(f"{'method':22}{'total':>18}" + "".join(f"{goal:>18}" for goal in goals))
        for row in results:
            spent = [row[f"{what}_total"], *row[f"{what}_to"].values()]
            cells = [format_pair(pair, unit) for pair in spent]
            lines.append(f"{row['method']:22}" + "".join(f"{cell:>18}" for cell in cells))
    return lines


def value_of_reference(name: str, reference: Scores) -> float | None:
    """Return what the reference has in a column of the table; None for its training reward."""
    if name.startswith("pass_at_"):
        return reference.pass_at_k[name.removeprefix("pass_at_")]
    if name.endswith("_other"):
        return reference.other[name.removesuffix("_other")]
    return 0.0 if name == "kl" else None


def format_pair(pair: list[float] | None, unit: float = 1.0) -> str:
    """Write a mean and its standard error."""
    if pair is None:
        return "-"
    digits = 0 if pair[0] / unit >= 100 else 3
    return f"{pair[0] / unit:.{digits}f} ± {pair[1] / unit:.{digits}f}"


# ---------------------------------------------------------------------------------------------
# Pictures


def best_methods(results: list[dict], key: str, goal: str) -> list[str]:
    """Return the methods that reached a goal with the least, and those not clearly behind.

    A difference of less than two standard errors is none. With fewer than three seeds the errors
    say nothing, and no method is returned.
    """
    pairs = {row["method"]: row[key][goal] for row in results if row[key][goal] is not None}
    if not pairs or results[0]["seeds"] < 3:
        return []
    best, error = min(pairs.values())
    names = []
    for name, (mean, own_error) in sorted(pairs.items(), key=lambda item: item[1]):
        if mean - best <= 2 * math.hypot(error, own_error):
            names.append(name)
    return names


def draw_comparison(
    runs_of: dict[str, list[Run]], results: list[dict], goal: str, out: Path
) -> None:
    """Draw the reward of all methods, with a band of one standard error, against what was spent."""
    styles = cycler(linestyle=["-", "--"]) * cycler(color=COLOURS)
    figure, panels = pyplot.subplots(1, 2, figsize=(8.2, 4), sharey=True, layout="constrained")
    for axes, what, unit in zip(panels, ("tokens", "seconds"), (1e6, 1.0), strict=True):
        axes.set_prop_cycle(styles)
        for runs in runs_of.values():
            rewards = numpy.array([run.reward for run in runs])
            spent = numpy.mean([getattr(run, what)[:-1] for run in runs], axis=0) / unit
            mean = rewards.mean(axis=0)
            error = rewards.std(axis=0) / math.sqrt(max(1, len(runs) - 1))
            [line] = axes.plot(spent, mean, linewidth=1.5)
            axes.fill_between(spent, mean - error, mean + error, color=line.get_color(), alpha=0.15)
        best = best_methods(results, f"{what}_to", goal)
        told = f"{len(best)} methods" if len(best) > 2 else " and ".join(best)
        title = f"Fewest {what} to reward {goal}: {told}" if best else f"Reward by {what}"
        axes.set_title(title, fontsize=9, loc="left")
        label = f"millions of {what}" if unit > 1 else what
        axes.set_xlabel(f"{label}, stage 1 included", fontsize=8.5)
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


def draw_off_policy(results: list[dict], out: Path) -> None:
    """Draw the final reward against how far off-policy the data is, for V*, the mean and 0."""
    rows = {row["method"]: row for row in results}
    ticks = {"updates_1": "1 update", "updates_4": "4 updates", "updates_16": "16 updates"}
    ticks["replay"] = "replay of\n4 rollouts"
    figure, axes = pyplot.subplots(figsize=(5.6, 3.6), layout="constrained")
    for shift, (baseline, label) in enumerate(
        (("v_star", "V*"), ("mean", "mean reward"), ("zero", "0"))
    ):
        pairs = [rows[f"{data}_{baseline}"]["reward_final"] for data in ticks]
        places = [number + 0.06 * (shift - 1) for number in range(len(ticks))]
        means = [mean for mean, _ in pairs]
        errors = [error for _, error in pairs]
        axes.errorbar(places, means, errors, marker="o", markersize=4, capsize=3, label=label)
    axes.set_xticks(range(len(ticks)), ticks.values(), fontsize=8.5)
    axes.set_xlabel("updates from each rollout: further off-policy to the right", fontsize=8.5)
    axes.set_ylabel("reward at the end", fontsize=8.5)
    axes.legend(title="in V*'s place", fontsize=8.5, title_fontsize=8.5, frameon=False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=200)
    pyplot.close(figure)
