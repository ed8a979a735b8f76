"""Sum up the demo: a table of before and after, and the picture of the learning curve.

    python -m experiments.report --folder toy       # the last command of `make demo`

The table has test pass@1 with its standard error over problems and pass@8, both from evaluate.py's
samples at temperature 1, and the seconds of each part, start-up included, from the times at which
the demo's files were written. FOLDER/curve.png has the reward and test accuracy against the seconds
of training: the clock of metrics.jsonl, which stands still in evaluation, checkpoints and start-up.
"""

import argparse
import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # there may be no display
from matplotlib import pyplot

import problems

# What `make demo` did, in order, and the file whose time tells when it was done.
PARTS = {
    "reference": "train.jsonl",
    "stage 1": "values.json",
    "evaluate before": "before/summary.json",
    "stage 2": "run/final/manifest.json",
    "evaluate after": "after/summary.json",
}


def part_seconds(folder: Path) -> dict[str, float]:
    """Tell how long each part took, and all of them; FOLDER/started is written before the first."""
    times = [(folder / name).stat().st_mtime for name in ("started", *PARTS.values())]
    seconds = [end - start for start, end in itertools.pairwise(times)]
    return dict(zip(PARTS, seconds, strict=True)) | {"total": times[-1] - times[0]}


def table(before: dict, after: dict) -> str:
    """Lay out two of evaluate.py's summaries of one benchmark."""
    n = before["num_samples"]
    row = "{:<10} {:>18} {:>9} {:>10} {:>8}".format
    lines = [row("", "pass@1 ± s.e.", f"pass@{n}", "truncated", "tokens")]
    for name, s in ("reference", before), ("trained", after):
        mean, best = f"{s['mean']:.1%} ± {s['stderr']:.1%}", f"{s['pass_at_k'][str(n)]:.1%}"
        lines.append(row(name, mean, best, f"{s['truncated']:.1%}", f"{s['tokens']:.1f}"))
    title = f"{before['num_problems']} test problems, {n} samples each at temperature 1"
    return "\n".join([title, *lines])


def draw(steps: list[dict], before: dict, after: dict, out: Path) -> None:
    """Draw reward and test accuracy against the seconds of training, as a PNG."""
    ends = list(itertools.accumulate(step["seconds_total"] for step in steps))
    starts = [0.0, *ends[:-1]]  # a step's reward is that of the policy before its updates
    both = zip(ends, steps, strict=True)
    greedy = [(end, s["eval_accuracy"]) for end, s in both if "eval_accuracy" in s]
    figure, axes = pyplot.subplots(figsize=(7.2, 4.0), layout="constrained")
    axes.plot(starts, [s["reward"] for s in steps], color="tab:blue", linewidth=1.2, alpha=0.6,
              label="reward on the step's training prompts")  # fmt: skip
    axes.plot(starts, [s["v_star"] for s in steps], color="grey", linewidth=1, linestyle="--",
              label="V* of the same prompts")  # fmt: skip
    axes.plot(*zip(*greedy, strict=True), color="tab:orange", marker="o", markersize=4,
              label="test accuracy, greedy")  # fmt: skip
    means, errors = [s["mean"] for s in (before, after)], [s["stderr"] for s in (before, after)]
    axes.errorbar([0, ends[-1]], means, errors, color="tab:red", linestyle="none", marker="D",
                  markersize=5, capsize=4, zorder=3,
                  label=f"test pass@1 ± s.e., {before['num_samples']} samples")  # fmt: skip
    axes.set(xlabel="seconds of training", ylabel="share right")
    axes.set(ylim=(0, 1.02), title=f"A*-PO on the toy: {len(steps)} steps")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    figure.savefig(out, dpi=150)


def main() -> None:
    """Read what the demo wrote; print the table, draw the curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("toy"), help="what `make demo` wrote")
    folder = parser.parse_args().folder
    summaries = [
        problems.read_json(folder / f"{when}/summary.json") for when in ("before", "after")
    ]
    before, after = (summary["benchmarks"]["test"] for summary in summaries)
    draw(problems.read_rows(folder / "run/metrics.jsonl"), before, after, folder / "curve.png")
    seconds = part_seconds(folder).items()
    print(f"\n{table(before, after)}\n")
    print("seconds:", ", ".join(f"{name} {value:.0f}" for name, value in seconds))
    print(f"learning curve: {folder / 'curve.png'}")


if __name__ == "__main__":
    problems.run(main)
