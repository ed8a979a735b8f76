"""Draw training runs: reward, test accuracy, distance from the reference, length and time.

Question: is a run learning, how far has the policy moved, and what does a step cost?
Command:  python -m experiments.plot RUN [RUN ...] [--out FILE]
Time:     5 seconds.
Output:   RUN/curve.png of the first run, or FILE (.png, .svg or .pdf).

RUN is the --out folder of a training run, finished or not, or a .jsonl file of metrics. Several
runs are drawn into the same panels, and the last panel lists the settings in which they differ.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # there may be no display
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from apo import command_line
from apo.files import UserError, check_writable, read_json, read_jsonl

# Okabe and Ito's colours, which colour-blind readers can tell apart. Their yellow is left out,
# because it is hard to see on white. The eighth run starts again with dashed lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Of the settings in config.json, what a single run is described by.
MAIN_SETTINGS = ("model", "values", "lr", "batch_size", "updates_per_batch", "beta2", "seed")
# Places and hardware. Runs that differ only in these are the same experiment.
NOT_COMPARED = ("out", "resume", "gpu_memory_utilization", "tensor_parallel_size", "tracker")
SMOOTH_FROM = 20  # runs with fewer steps are drawn as they are


class Run(NamedTuple):
    """One training run: a short name, the lines of its metrics file, and its settings."""

    name: str
    metrics: list[dict]
    settings: dict


class Panel(NamedTuple):
    """One panel: what it shows, and how."""

    key: str  # in metrics.jsonl
    words: str  # for the title
    axis: str  # the label of the vertical axis
    unit: str = ""
    scale: float = 1.0  # what is drawn is the logged number times this
    digits: int = 2  # in the title
    smooth: bool = True
    from_zero: bool = False  # the vertical axis begins at 0


# The picture grows with this list: it has a place for each panel, and one for the key.
PANELS = (
    Panel("reward", "Reward", "mean reward"),
    Panel(
        "eval_accuracy",
        "Test accuracy",
        "test problems solved (%)",
        unit=" %",
        scale=100,
        digits=1,
        smooth=False,
    ),
    Panel("logratio", "Log-ratio", "ln(π / π_ref) (nats per response)", unit=" nats"),
    Panel("response_tokens", "Length", "tokens per response", " tokens", digits=0, from_zero=True),
    Panel("seconds_total", "Time per step", "seconds per step", " s", digits=1, from_zero=True),
)


class Line(NamedTuple):
    """What one run has for one panel: steps and values, in the unit of the axis."""

    steps: list[int]
    values: list[float]


# ---------------------------------------------------------------------------------------------
# 1. Reading


def metrics_file(path: Path) -> Path:
    """Find the metrics of a run folder. A .jsonl file stands for itself. UserError if missing."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist: name a run folder or a .jsonl file of metrics.")
    file = path / "metrics.jsonl"
    if not file.is_file():
        raise UserError(
            f"{path} has no metrics.jsonl: it is not the --out folder of a training run, "
            "or the first step of the run has not ended."
        )
    return file


def short_names(paths: list[Path]) -> list[str]:
    """Name runs by as few trailing parts of their paths as tell them apart.

    Example: toy/run alone -> run; a/run and b/run -> a/run and b/run.
    """
    parts = [Path(str(path.resolve()).removesuffix(".jsonl")).parts for path in paths]
    longest = max(len(each) for each in parts)
    for count in range(1, longest + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"the same run is named twice: {', '.join(str(path) for path in paths)}")


def load_runs(paths: list[Path]) -> list[Run]:
    """Read each run's metrics and, if it lies in the same folder, its config.json."""
    runs = []
    for path, name in zip(paths, short_names(paths), strict=True):
        file = metrics_file(path)
        metrics = []
        for row in read_jsonl(file):
            if isinstance(row.get("step"), int):
                metrics.append(row)
        if not metrics:
            raise UserError(f'{file} has no line with a "step": it is not a metrics file.')
        config = file.parent / "config.json"
        settings = read_json(config) if config.is_file() else {}
        runs.append(Run(name, metrics, settings))
    return runs


def read_line(run: Run, panel: Panel) -> Line:
    """Take one panel's numbers out of a run's metrics. Steps that lack the number are left out."""
    line = Line([], [])
    for row in run.metrics:
        value = row.get(panel.key)
        if isinstance(value, int | float) and math.isfinite(value):
            line.steps.append(row["step"])
            line.values.append(panel.scale * value)
    return line


# ---------------------------------------------------------------------------------------------
# 2. Words


def ends(line: Line, panel: Panel) -> tuple[float, float]:
    """Return where a line starts and ends. For noisy numbers, the mean of a tenth of the steps."""
    count = 1
    if panel.smooth:
        count = max(1, len(line.values) // 10)
    return statistics.mean(line.values[:count]), statistics.mean(line.values[-count:])


def shorten(text: str, width: int) -> str:
    """Keep the end of a text that is too long. The end is what tells two runs apart."""
    if len(text) <= width:
        return text
    return "…" + text[-width + 1 :]


def make_title(panel: Panel, lines: list[Line]) -> str:
    """State what the panel shows, with its numbers."""
    drawn = [line for line in lines if line.values]
    if not drawn:
        return f"{panel.words}: not in the log"
    starts_and_ends = [ends(line, panel) for line in drawn]
    if len(lines) > 1:
        finals = [end for _, end in starts_and_ends]
        lowest = f"{min(finals):.{panel.digits}f}"
        highest = f"{max(finals):.{panel.digits}f}"
        if lowest == highest:
            return f"{panel.words} ends at {highest}{panel.unit}"
        return f"{panel.words} ends at {lowest} to {highest}{panel.unit}"
    first = f"{starts_and_ends[0][0]:.{panel.digits}f}"
    last = f"{starts_and_ends[0][1]:.{panel.digits}f}"
    if len(drawn[0].values) == 1:
        return f"{panel.words} is {last}{panel.unit}"
    if first == last:
        return f"{panel.words} stays at {last}{panel.unit}"
    verb = "rises" if float(last) > float(first) else "falls"
    return f"{panel.words} {verb} from {first} to {last}{panel.unit}"


def describe_runs(runs: list[Run]) -> list[str]:
    """Describe each run by its main settings, or several runs by the settings that differ."""
    names = list(MAIN_SETTINGS)
    if len(runs) > 1:
        names = differing_settings(runs)
    descriptions = []
    for run in runs:
        last_step = run.metrics[-1]["step"]
        plural = "" if last_step == 1 else "s"
        lines = [f"{run.name}: {last_step} step{plural}"]
        for name in names:
            if name in run.settings:
                lines.append(f"{name} {shorten(str(run.settings[name]), 34)}")
        descriptions.append("\n   ".join(lines))
    return descriptions


def differing_settings(runs: list[Run], at_most: int = 4) -> list[str]:
    """List the settings with short values that are not the same in all runs."""
    differing = []
    for name, value in runs[0].settings.items():
        if name in NOT_COMPARED or not isinstance(value, str | int | float):
            continue
        if any(run.settings.get(name) != value for run in runs):
            differing.append(name)
    return differing[:at_most]


# ---------------------------------------------------------------------------------------------
# 3. Drawing


def smooth(values: list[float], window: int) -> list[float]:
    """Average each value with those around it; the window is cut at both ends of the run."""
    half = window // 2
    means = []
    for i in range(len(values)):
        means.append(statistics.mean(values[max(0, i - half) : i + half + 1]))
    return means


def draw_line(axes: Axes, line: Line, panel: Panel, number: int) -> None:
    """Draw the line of run `number`: each step thin, and the average of the steps around it."""
    colour = COLOURS[number % len(COLOURS)]
    style = "-" if number < len(COLOURS) else "--"
    if not panel.smooth or len(line.values) < 2:
        axes.plot(line.steps, line.values, style, color=colour, marker="o", markersize=3.5)
    elif len(line.values) < SMOOTH_FROM:
        axes.plot(line.steps, line.values, style, color=colour)
    else:
        means = smooth(line.values, window=len(line.values) // 10)
        axes.plot(line.steps, line.values, style, color=colour, linewidth=0.7, alpha=0.35)
        axes.plot(line.steps, means, style, color=colour, linewidth=1.7)


def spread(heights: list[float], gap: float) -> list[float]:
    """Move labels apart so that none covers another. Heights and gap are shares of the panel."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    lowest = -math.inf
    for i in order:  # upwards, each at least a gap above the one below it
        placed[i] = max(heights[i], lowest + gap)
        lowest = placed[i]
    highest = 1 + gap
    for i in reversed(order):  # and down again, so that none is above the panel
        placed[i] = min(placed[i], highest - gap)
        highest = placed[i]
    return placed


class Label(NamedTuple):
    """The name of a line, the value at which the line ends, and its colour."""

    text: str
    value: float
    colour: str


def label_lines(axes: Axes, labels: list[Label]) -> None:
    """Write names at the right of the panel, at the heights at which the lines end.

    The limits of the axes must be final. It works on linear and on logarithmic axes.
    """
    bottom, top = axes.get_ylim()
    heights = []
    for label in labels:
        value = min(max(label.value, bottom), top)
        pixel = axes.transData.transform((axes.get_xlim()[0], value))
        heights.append(axes.transAxes.inverted().transform(pixel)[1])
    # A line of text in points, as a share of the height of the panel.
    gap = 9.5 / (axes.get_window_extent().height * 72 / axes.figure.dpi)
    for label, height in zip(labels, spread(heights, gap), strict=True):
        axes.annotate(
            label.text,
            (1.02, height),
            xycoords="axes fraction",
            color=label.colour,
            fontsize=8,
            va="center",
            annotation_clip=False,
        )


def finish(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Give a panel the title, the labels and the grid that all our pictures have."""
    axes.set_title(title, fontsize=9.5, loc="left", fontweight="bold")
    axes.set_xlabel(x_label, fontsize=8.5)
    axes.set_ylabel(y_label, fontsize=8.5)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: pyplot.Figure, out: Path) -> None:
    """Write a picture at twice the resolution of a screen."""
    figure.savefig(out, dpi=200)
    pyplot.close(figure)


def draw_panel(axes: Axes, panel: Panel, runs: list[Run]) -> None:
    """Draw one quantity of all runs."""
    lines = [read_line(run, panel) for run in runs]
    for number, line in enumerate(lines):
        draw_line(axes, line, panel, number)
    if panel.key == "reward" and len(runs) == 1:
        draw_v_star(axes, runs[0])
    finish(axes, make_title(panel, lines), "training step", panel.axis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    last_step = max(1, *(run.metrics[-1]["step"] for run in runs))
    axes.set_xlim(-0.02 * last_step, 1.02 * last_step)
    if not any(line.values for line in lines):
        axes.set_yticks([])
    # Without room below, lines near zero would look steeper than they are.
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    if len(runs) > 1:
        labels = []
        for number, line in enumerate(lines):
            if line.values:
                colour = COLOURS[number % len(COLOURS)]
                end = ends(line, panel)[1]
                labels.append(Label(shorten(runs[number].name, 18), end, colour))
        label_lines(axes, labels)


def draw_v_star(axes: Axes, run: Run) -> None:
    """Add V* of the same prompts to the panel of the reward, if the algorithm has a V*."""
    line = read_line(run, Panel("v_star", "V*", ""))
    if len(line.values) < 2:
        return
    values = line.values
    if len(values) >= SMOOTH_FROM:
        values = smooth(values, window=len(values) // 10)
    axes.plot(line.steps, values, "--", color="0.4", linewidth=1.2)
    # The text is about half as wide as the panel: it goes below the lowest value of that half.
    lowest = min(values[len(values) // 2 :])
    axes.annotate(
        "V* of the same prompts",
        (line.steps[-1], lowest),
        xytext=(0, -4),
        textcoords="offset points",
        color="0.3",
        fontsize=8,
        ha="right",
        va="top",
    )


def draw_key(axes: Axes, runs: list[Run]) -> None:
    """Write in a place of its own what the runs are and how to read the lines."""
    axes.axis("off")
    height = 1.0
    for number, text in enumerate(describe_runs(runs)):
        colour = COLOURS[number % len(COLOURS)]
        axes.text(0, height, text, color=colour, fontsize=8, va="top", linespacing=1.25)
        height -= 0.075 * (text.count("\n") + 1) + 0.03
    if max(len(run.metrics) for run in runs) >= SMOOTH_FROM:
        note = "thin: each step. thick: mean over a tenth of the steps"
        axes.text(0, 0, note, color="0.4", fontsize=7.5, va="bottom")


def draw(runs: list[Run], out: Path) -> None:
    """Draw all panels into one picture of page width."""
    num_rows = math.ceil((len(PANELS) + 1) / 2)
    size = (8.2, 2.4 * num_rows)
    figure, grid = pyplot.subplots(num_rows, 2, figsize=size, layout="constrained")
    *places, last_place = grid.flat
    for axes in places[len(PANELS) :]:
        axes.axis("off")
    for axes, panel in zip(places, PANELS, strict=False):
        draw_panel(axes, panel, runs)
    draw_key(last_place, runs)
    save(figure, out)


def default_out(path: Path) -> Path:
    """Choose the name of the picture: RUN/curve.png, and NAME.png for a file NAME.jsonl."""
    if path.is_dir():
        return path / "curve.png"
    if path.name == "metrics.jsonl":
        return path.with_name("curve.png")
    return path.with_suffix(".png")


def main() -> None:
    """Read the runs that the command line names, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="a run folder or a .jsonl file")
    add("--out", type=Path, help="the picture (default: RUN/curve.png of the first run)")
    args = parser.parse_args()
    out = args.out or default_out(args.runs[0])
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out {out} must end in .png, .svg or .pdf.")
    runs = load_runs(args.runs)
    check_writable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, out)
    print(f"curves: {out}")


if __name__ == "__main__":
    command_line.run(main)
