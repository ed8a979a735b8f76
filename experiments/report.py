"""Sum up the demo: a table of before and after, one problem worked twice, and the learning curve.

Question: what did the three stages do to the toy's reference model, and how long did they take?
Command:  python -m experiments.report --folder toy       (the last command of `make demo`)
Time:     5 seconds.
Output:   the table on the terminal, and toy/curve.png (drawn by experiments/plot.py).
Answer:   the share of test problems solved rises from about 51 to 97 % (seed 0).

pass@1 and pass@8 come from evaluate.py's samples at temperature 1. The standard error is taken over
problems. The seconds of each part come from the times at which the files of the demo were written,
and contain the start-up of the part.
"""

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

from apo import command_line
from apo.files import UserError, read_json, read_jsonl
from experiments import plot

# The parts of `make demo` in order, and what each of them writes last.
PARTS = {
    "reference": "settings.json",
    "stage 1": "values.json",
    "evaluate before": "before/summary.json",
    "stage 2": "run/final",
    "evaluate after": "after/summary.json",
}
WIDTH = 36  # columns of the terminal for each of the two responses


class Pair(NamedTuple):
    """A sample of the reference and a sample of the trained policy, for the same problem."""

    before: dict
    after: dict


def part_seconds(folder: Path) -> dict[str, float | None]:
    """Return the seconds of each part of the demo. None is a part that an earlier demo had made.

    `make demo` writes FOLDER/started first. What is older than that file was kept.
    """
    for name in ("started", *PARTS.values()):
        if not (folder / name).exists():
            raise UserError(f"{folder}/{name} is missing: run `make demo` to the end first.")
    previous_end = (folder / "started").stat().st_mtime
    seconds = {}
    for part, name in PARTS.items():
        end = (folder / name).stat().st_mtime
        if end < previous_end:
            seconds[part] = None
        else:
            seconds[part] = end - previous_end
            previous_end = end
    return seconds


def format_seconds(seconds: dict[str, float | None]) -> str:
    """Write the seconds of each part, and their sum, on one line."""
    cells = []
    total = 0.0
    for part, value in seconds.items():
        if value is None:
            cells.append(f"{part} kept")
        else:
            cells.append(f"{part} {value:.0f}")
            total += value
    return f"seconds: {', '.join(cells)}, total {total:.0f}"


def format_table(before: dict, after: dict) -> str:
    """Lay out two of evaluate.py's summaries of one benchmark, one line each."""
    num_samples = before["num_samples"]
    row = "{:<10} {:>18} {:>9} {:>10} {:>8}"
    lines = [
        f"{before['num_problems']} test problems, {num_samples} samples each at temperature 1",
        row.format("", "pass@1 ± s.e.", f"pass@{num_samples}", "truncated", "tokens"),
    ]
    for name, summary in (("reference", before), ("trained", after)):
        mean = f"{summary['mean']:.1%} ± {summary['stderr']:.1%}"
        best = f"{summary['pass_at_k'][str(num_samples)]:.1%}"
        truncated = f"{summary['truncated']:.1%}"
        tokens = f"{summary['tokens']:.1f}"
        lines.append(row.format(name, mean, best, truncated, tokens))
    return "\n".join(lines)


def find_improved(before: list[dict], after: list[dict]) -> Pair | None:
    """Find the first sample that the reference got wrong and the trained policy right."""
    trained = {}
    for record in after:
        trained[record["id"], record["sample"]] = record
    for record in before:
        other = trained.get((record["id"], record["sample"]))
        if other is not None and record["reward"] == 0 and other["reward"] == 1:
            return Pair(record, other)
    return None


def count_right(records: list[dict], problem_id: str) -> str:
    """Count the right samples of one problem. Example: 2 of 8."""
    rewards = [record["reward"] for record in records if record["id"] == problem_id]
    return f"{rewards.count(1)} of {len(rewards)}"


def format_transcript(before: list[dict], after: list[dict]) -> str:
    """Show one problem with the responses before and after training, side by side."""
    pair = find_improved(before, after)
    if pair is None:
        return "No sample was wrong before training and right after it."
    question = pair.before["prompt"].splitlines()[0]
    problem_id = pair.before["id"]
    lines = [
        f"{question}  (answer: {pair.before['answer']})",
        f"{'reference: wrong':<{WIDTH}}trained: right",
    ]
    columns = (pair.before["output"].splitlines(), pair.after["output"].splitlines())
    for left, right in itertools.zip_longest(*columns, fillvalue=""):
        lines.append(f"{'  ' + left:<{WIDTH}}  {right}".rstrip())
    right_before = f"({count_right(before, problem_id)} samples right)"
    right_after = f"({count_right(after, problem_id)} samples right)"
    lines.append(f"{right_before:<{WIDTH}}{right_after}")
    return "\n".join(lines)


def main() -> None:
    """Read what the demo wrote, draw the curve, and print the rest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("toy"), help="what `make demo` wrote")
    folder = parser.parse_args().folder
    seconds = part_seconds(folder)
    before = read_json(folder / "before/summary.json")["benchmarks"]["test"]
    after = read_json(folder / "after/summary.json")["benchmarks"]["test"]
    samples_before = read_jsonl(folder / "before/test.jsonl")
    samples_after = read_jsonl(folder / "after/test.jsonl")
    plot.draw(plot.load_runs([folder / "run"]), folder / "curve.png")
    print(f"\n{format_table(before, after)}\n")
    print(f"{format_transcript(samples_before, samples_after)}\n")
    print(format_seconds(seconds))
    print(f"learning curve: {folder / 'curve.png'}")


if __name__ == "__main__":
    command_line.run(main)
