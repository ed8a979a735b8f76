r"""How truly and how fast the mathematical reward grades.

    python -m experiments.reward_speed check PATH.jsonl ...
    python -m experiments.reward_speed speed PATH.jsonl
    python -m experiments.reward_speed load

check   For rows with `answer`, and any of `id`, `solution`, `output` with `label`: prints each
        failure and the rates.
        boxed: the answer accepts itself in a box. solution: it accepts the reference solution, to
        which GSM8K's box is added. next: it rejects the next row's answer. label: the reward of
        the output equals the label.
speed   `grade` and math-verify as its README uses it, a process for each core, take turns. They
        grade reference solutions, half of them with the answer of another row. `again` is `grade`
        on the same responses once more, since it remembers how it spelled and parsed them. Then
        two batches of 1,000 pairs, 20 of which cannot be computed.
load    100 right answers that take algebra, beside 0, 2 and 4 processes that keep a core busy.
"""

import multiprocessing
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from apo import command_line, files
from apo.math_reward import check_answer, counts, grade, last_box

# How often `grade` and math-verify take turns.
ROUNDS = 3
# Boxes that a reward without limits would compute for ever.
DEEP = "(" * 3000 + "5" + ")" * 3000
HUGE = r"\binom{1000000000}{500000000}"
PATHOLOGICAL = [r"9^{9^{9^9}}", "10000000!", DEEP, HUGE, r"\sin(10^{10^{7}})"]


# Rows and cases -----------------------------------------------------------------------------------


def load_rows(path: str) -> list[dict]:
    """Read the rows whose answer can be graded, each with an id and a solution that has a box."""
    rows = []
    for number, row in enumerate(files.read_jsonl(path), start=1):
        row = {"id": f"{path}:{number}"} | row
        try:
            check_answer(row.get("answer", ""))
        except ValueError as error:
            print(f"{row['id']}: {error}")
            continue
        if "solution" in row and last_box(row["solution"]) is None:
            row["solution"] += rf" \boxed{{{row['answer']}}}"
        rows.append(row)
    return rows


class Case(NamedTuple):
    """A response to grade and the reward that it should get."""

    name: str
    row: dict
    response: str
    label: bool


def check_file(path: str) -> None:
    """Grade every case that the rows have the columns for; print the failures and the rates."""
    rows = load_rows(path)
    cases = []
    for row, next_row in zip(rows, rows[1:] + rows[:1], strict=True):
        cases.append(Case("boxed", row, rf"\boxed{{{row['answer']}}}", True))
        if "solution" in row:
            cases.append(Case("solution", row, row["solution"], True))
        if row["answer"] != next_row["answer"]:
            cases.append(Case("next", row, rf"\boxed{{{next_row['answer']}}}", False))
        if "output" in row:
            cases.append(Case("label", row, row["output"], row["label"]))
    rewards = grade([case.response for case in cases], [case.row["answer"] for case in cases])
    total = Counter()
    right = Counter()
    for case, reward in zip(cases, rewards, strict=True):
        total[case.name] += 1
        if reward == case.label:
            right[case.name] += 1
        else:
            answer = case.row["answer"]
            box = last_box(case.response)
            print(f"{case.row['id']} {case.name}: answer {answer!r}, box {box!r}")
    for name in total:
        print(f"{path} {name}: {right[name]} of {total[name]} as they should be", flush=True)


# Speed --------------------------------------------------------------------------------------------


def responses_to(rows: list[dict], rng: random.Random) -> list[str]:
    """Return the solutions, half of them with the answer of another row in the box."""
    responses = []
    for row in rows:
        shown = row
        if rng.random() >= 0.5:
            shown = rng.choice(rows)
        # The box is spelled as models spell it, so that text alone does not decide.
        body = row["solution"].replace(r"\boxed", "")
        box = shown["answer"].replace(r"\frac", r"\dfrac")
        box = box.replace("(", r"\left(").replace(")", r"\right)")
        responses.append(rf"{body} The answer is $\boxed{{{box}}}$.")
    return responses


def with_math_verify(response: str, answer: str) -> float:
    """Grade as math-verify's README says."""
    from math_verify import parse, verify

    return float(verify(parse(f"${answer}$"), parse(response)))


def time_it(name: str, work: Callable[..., list[float]], *args: Any) -> None:
    """Print how many responses a second are graded, and the mean reward."""
    start = time.perf_counter()
    rewards = work(*args)
    rate = len(rewards) / (time.perf_counter() - start)
    mean = sum(rewards) / len(rewards)
    print(f"{name:12} {rate:7.0f} responses/s, mean reward {mean:.4f}", flush=True)


def measure_speed(path: str) -> None:
    """Let `grade` and math-verify take turns, then grade two batches with pathological boxes."""
    rng = random.Random(0)
    rows = load_rows(path)
    answers = [row["answer"] for row in rows]
    with multiprocessing.get_context("spawn").Pool() as pool:
        # The processes start and learn their grammar before the clock runs.
        warm_up = [(rf"\boxed{{x + {n}}}", f"{n} + x") for n in range(100)]
        pool.starmap(with_math_verify, warm_up, 5)
        grade(*zip(*warm_up, strict=True))
        for _ in range(ROUNDS):
            responses = responses_to(rows, rng)
            pairs = list(zip(responses, answers, strict=True))
            time_it("grade", grade, responses, answers)
            time_it("again", grade, responses, answers)
            time_it("math-verify", pool.starmap, with_math_verify, pairs, 20)
    for batch in ("first", "second"):
        boxes = [str(n) for n in range(1000)]
        boxes[::50] = PATHOLOGICAL * 4  # one in 50
        responses = [rf"\boxed{{{box}}}" for box in boxes]
        time_it(f"{batch} batch", grade, responses, [str(n) for n in range(1000)])


# A busy machine -----------------------------------------------------------------------------------


def lost(busy: int) -> int:
    """Count the right symbolic answers of 100 that get no reward beside busy processes."""
    answers = []
    responses = []
    # Other answers each time, so that no worker remembers them.
    for n in range(100 * busy + 2, 100 * busy + 102):
        answers.append(rf"\frac{{x^{{{n}}}+{n}}}{{\sqrt{{{n}}}}}")
        responses.append(rf"\boxed{{({n}+x^{{{n}}})\cdot {n}^{{-1/2}}}}")
    spinning = []
    for _ in range(busy):
        spinning.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
    try:
        return 100 - int(sum(grade(responses, answers)))
    finally:
        for process in spinning:
            process.kill()


def main() -> None:
    """Run the command that the command line names on each file."""
    command, *paths = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
        return
    if command == "load":
        for busy in (0, 2, 4):
            print(f"100 symbolic answers beside {busy} busy processes: {lost(busy)} lost")
    elif command == "check" and paths:
        for path in paths:
            check_file(path)
    elif command == "speed" and paths:
        for path in paths:
            measure_speed(path)
    else:
        raise files.UserError("give `check` or `speed` with files, or `load`")
    print(counts)


if __name__ == "__main__":
    command_line.run(main)
