"""Draw the pictures that explain the method.

Question: what do the two stages do, what is V*, how hard are the problems, where does time go?
Command:  python -m experiments.pictures --toy toy      (after `make demo`)
Time:     5 seconds.
Output:   stages.png, v-star.png, stage-1.png and step-time.png in experiments/results/.

- stages.png: which script reads and writes what.
- v-star.png: V* of 8 rewards against how many of them are right, for four values of beta1.
- stage-1.png: how many of a problem's responses are right, over the problems of stage 1, and the V*
  that each count gives.
- step-time.png: how a training step divides its time, by metrics.jsonl.

Without --toy only the first two are drawn. The background is white, so that the pictures can be
read on dark pages as well.
"""

import argparse
import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # there may be no display
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from apo import command_line, files
from experiments.plot import COLOURS
from losses import optimal_value

RESULTS = Path(__file__).parent / "results"
NUM_SAMPLES = 8
BETA1 = 0.5  # the published one
# The parts of a step, in the order in which they happen, and the words for each.
PARTS = {
    "seconds_generate": "sample",
    "seconds_grade": "wait for grades",
    "seconds_ref": "ln π_ref",
    "seconds_update": "update",
    "seconds_sync": "weights to the engine",
}


def save(figure: pyplot.Figure, name: str) -> None:
    """Save a picture at twice the size of the page."""
    figure.savefig(RESULTS / name, dpi=200, bbox_inches="tight", facecolor="white")
    pyplot.close(figure)
    print(f"{RESULTS / name}")


def strip(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Label a panel, and leave out what carries no information."""
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


# ---------------------------------------------------------------------------------------------
# The two stages


def draw_box(axes: Axes, centre: tuple[float, float], text: str, colour: str) -> None:
    """Draw a box of fixed size with a text in it."""
    x, y = centre
    box = FancyBboxPatch(
        (x - 1.6, y - 0.5), 3.2, 1.0, boxstyle="round,pad=0.02", fc="white", ec=colour, lw=1.8
    )
    axes.add_patch(box)
    axes.text(x, y, text, ha="center", va="center", fontsize=8.5)


def draw_arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str, above: bool = True
) -> None:
    """Draw an arrow with a text at its middle."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#444444", "lw": 1.4})
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + (0.1 if above else -0.1))
    axes.text(*middle, text, ha="center", va="bottom" if above else "top", fontsize=8)


def draw_stages() -> None:
    """Draw the three scripts, the files between them, and the loop inside of stage 2."""
    figure, axes = pyplot.subplots(figsize=(10, 3.2))
    axes.set_xlim(0, 13.4)
    axes.set_ylim(0, 3.8)
    axes.axis("off")
    axes.set_title(
        "V* is estimated once; training then needs one response per prompt",
        loc="left",
        fontweight="bold",
    )
    stage1 = "offline_value.py\nstage 1: V* from 8 responses\nof the reference per prompt"
    stage2 = "train_online.py\nstage 2: one response per\nprompt; fit to reward − V*"
    stage3 = "evaluate.py\nstage 3: accuracy\non benchmarks"
    draw_box(axes, (1.7, 2.9), stage1, COLOURS[0])
    draw_box(axes, (6.7, 2.9), stage2, COLOURS[1])
    draw_box(axes, (11.7, 2.9), stage3, COLOURS[2])
    draw_arrow(axes, (3.4, 2.9), (5.0, 2.9), "values.json")
    draw_arrow(axes, (8.4, 2.9), (10.0, 2.9), "runs/…/final")

    # The loop of stage 2: the engine samples, the trainer updates.
    engine = "engine (vLLM): samples\nresponses from the policy,\nscores them"
    trainer = "trainer (FSDP): fits\nβ2 ln(policy / reference)\nto reward − V*"
    draw_box(axes, (4.0, 0.7), engine, COLOURS[1])
    draw_box(axes, (9.4, 0.7), trainer, COLOURS[1])
    draw_arrow(axes, (5.7, 0.85), (7.7, 0.85), "responses, rewards")
    draw_arrow(axes, (7.7, 0.55), (5.7, 0.55), "weights", above=False)
    for x in (4.0, 9.4):
        axes.plot([x, 6.7], [1.25, 2.35], color="#bbbbbb", lw=1, ls="--")
    axes.text(6.7, 1.5, "in every step", ha="center", fontsize=8, color="#666666")
    save(figure, "stages.png")


# ---------------------------------------------------------------------------------------------
# V*


def values_by_count(beta1: float) -> list[float]:
    """Return V* of 8 rewards of which k are 1 and the others 0, for k = 0, ..., 8."""
    rewards = torch.zeros(NUM_SAMPLES + 1, NUM_SAMPLES, dtype=torch.float64)
    for k in range(NUM_SAMPLES + 1):
        rewards[k, :k] = 1
    return optimal_value(rewards, beta1).tolist()


def draw_v_star() -> None:
    """Draw V* against the number right, from near the best reward down to the mean."""
    figure, axes = pyplot.subplots(figsize=(6.4, 4))
    counts = range(NUM_SAMPLES + 1)
    for beta1, colour in zip((0.1, 0.5, 1.0, math.inf), COLOURS, strict=False):
        values = values_by_count(beta1)
        label = "β1 = ∞: the mean" if beta1 == math.inf else f"β1 = {beta1:g}"
        axes.plot(counts, values, "o-", color=colour, markersize=4)
        # Along the line between three and five right responses, just above it.
        axes.text(
            4,
            values[4] + 0.02,
            label,
            ha="center",
            color=colour,
            fontsize=9,
            rotation=math.degrees(math.atan2(values[5] - values[3], 2)),
            rotation_mode="anchor",
            transform_rotates_text=True,
        )
    strip(
        axes,
        "The smaller β1, the more a single success counts",
        f"right responses of {NUM_SAMPLES}",
        "V*",
    )
    save(figure, "v-star.png")


# ---------------------------------------------------------------------------------------------
# What a run has measured


def draw_stage_1(values: dict) -> None:
    """Draw how many problems have k right responses, and V* for each k."""
    num_problems = len(values["prompts"])
    if any(len(prompt["rewards"]) != NUM_SAMPLES for prompt in values["prompts"]):
        raise files.UserError(f"the picture is of {NUM_SAMPLES} responses to each problem")
    counts = [0] * (NUM_SAMPLES + 1)
    for prompt in values["prompts"]:
        counts[sum(reward > 0 for reward in prompt["rewards"])] += 1
    useless = (counts[0] + counts[-1]) / num_problems

    figure, axes = pyplot.subplots(figsize=(6.4, 4))
    shares = [100 * count / num_problems for count in counts]
    axes.bar(range(NUM_SAMPLES + 1), shares, color=COLOURS[5])
    strip(
        axes,
        f"{100 * (1 - useless):.0f} % of the toy's problems are solved sometimes",
        f"right responses of {NUM_SAMPLES}",
        "problems (%)",
    )
    axes.set_xticks(range(NUM_SAMPLES + 1))
    right = axes.twinx()
    right.plot(range(NUM_SAMPLES + 1), values_by_count(BETA1), "o-", color=COLOURS[1])
    right.set_ylabel(f"V* at β1 = {BETA1}", color=COLOURS[1])
    right.set_ylim(0, 1.05)
    right.spines["top"].set_visible(False)
    save(figure, "stage-1.png")


def draw_step_time(metrics: list[dict]) -> None:
    """Draw the median seconds of each part of a step."""
    steps = [row for row in metrics if row["step"] > 1]  # the first one warms up
    seconds = {key: statistics.median(row[key] for row in steps) for key in PARTS}
    total = sum(seconds.values())
    largest = max(seconds, key=seconds.get)

    figure, axes = pyplot.subplots(figsize=(8, 2.3))
    axes.barh([PARTS[key] for key in seconds], list(seconds.values()), color=COLOURS[0])
    for row, value in enumerate(seconds.values()):
        axes.text(value + 0.01 * total, row, f"{value:.3f} s, {value / total:.0%}", va="center")
    axes.invert_yaxis()  # the first part on top
    axes.set_xlim(right=1.25 * seconds[largest])
    title = f"On the toy, the largest part of a step is: {PARTS[largest]}"
    strip(axes, title, "seconds per step (median, CPU)", "")
    save(figure, "step-time.png")


def main() -> None:
    """Draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", type=Path, help="the folder of `make demo`")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    draw_stages()
    draw_v_star()
    if args.toy is not None:
        draw_stage_1(files.read_json(args.toy / "values.json"))
        draw_step_time(files.read_jsonl(args.toy / "run" / "metrics.jsonl")[1:])


if __name__ == "__main__":
    command_line.run(main)
