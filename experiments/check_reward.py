"""What the reward does on reference answers, reference solutions and labelled outputs.

    python -m experiments.check_reward PATH.jsonl ...

For every row of each file (`answer`, and any of `id`, `solution`, `output` with `label`):

- boxed      the answer accepts itself in a box
- solution   the answer accepts the reference solution; one without a box (GSM8K) gets the answer
- next       the answer rejects the answer of the next row whose text differs
- label      the reward of the output agrees with the label

Prints each failure with the row's id, then the rates of the file, all from `apo.math_reward.grade`.
"""

import json
import sys
import time
from pathlib import Path

from apo.math_reward import check_answer, counts, grade, last_box


def load(path: Path) -> list[dict]:
    """Read the rows, each with an id."""
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
    return [{"id": f"{path.stem}/{number}"} | row for number, row in enumerate(rows)]


def is_gradable(row: dict) -> bool:
    """Whether the row's answer can be graded; prints why not."""
    try:
        check_answer(row["answer"])
    except ValueError as error:
        print(f"{row['id']}: ungradable, {error}")
        return False
    return True


def with_box(row: dict) -> str:
    """The reference solution, its answer boxed at the end where the dataset has no boxes."""
    solution = row["solution"]
    return solution if last_box(solution) else rf"{solution} \boxed{{{row['answer']}}}"


def checks(rows: list[dict]) -> dict[str, list[tuple[dict, str, float]]]:
    """(row, response, reward it should get) for each check that the rows have the columns for."""
    other = rows[1:] + rows[:1]
    pairs = [
        (row, after)
        for row, after in zip(rows, other, strict=True)
        if row["answer"] != after["answer"]
    ]
    return {
        "boxed": [(row, rf"\boxed{{{row['answer']}}}", 1.0) for row in rows],
        "solution": [(row, with_box(row), 1.0) for row in rows if "solution" in row],
        "next": [(row, rf"\boxed{{{after['answer']}}}", 0.0) for row, after in pairs],
        "label": [(row, row["output"], float(row["label"])) for row in rows if "label" in row],
    }


def main() -> None:
    """Print the failures and the rates of each file."""
    for path in map(Path, sys.argv[1:]):
        rows = [row for row in load(path) if is_gradable(row)]
        rates = []
        start = time.perf_counter()
        for name, cases in checks(rows).items():
            if not cases:
                continue
            rewards = grade([text for _, text, _ in cases], [row["answer"] for row, _, _ in cases])
            wrong = [case for case, got in zip(cases, rewards, strict=True) if got != case[2]]
            for row, response, _ in wrong:
                print(f"{row['id']} {name}: answer {row['answer']!r}, box {last_box(response)!r}")
            rates.append(
                f"{name} {len(cases) - len(wrong)}/{len(cases)} {1 - len(wrong) / len(cases):.2%}"
            )
        seconds = time.perf_counter() - start
        print(f"{path.name}: {', '.join(rates)} ({seconds:.1f} s)\n")
    print(counts)


if __name__ == "__main__":
    main()
