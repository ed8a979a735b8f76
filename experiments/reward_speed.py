"""How many responses a second are graded, beside plain math-verify in the same run.

    python -m experiments.reward_speed [PATH.jsonl]   # rows with answer and solution; else made up

Ordinary outputs: half right, half with the answer of another row, each after a worked solution.
`grade` and plain math-verify (as its README says: parse, parse, verify; a process for each core)
take turns, three times, after both have been warmed up, each time with other wrong answers; `again`
is `grade` on the same outputs once more, as it then remembers. Then two batches of 1,000 pairs of
which 20 are pathological, and 100 right answers that take algebra, beside no other process, two and
four that keep the cores busy: none may be lost.
"""

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from apo.math_reward import counts, grade

COUNT, ROUNDS = 4000, 3
SOLUTION = "Let $x$ be so that $\\frac{x}{2} + 3^{k} = \\sqrt{x^2 - {%d}}$ for all $k$, see (%d). "
PATHOLOGICAL = [
    r"9^{9^{9^9}}",
    "10000000!",
    "(" * 3000 + "5" + ")" * 3000,
    r"\binom{1000000000}{500000000}",
    r"\sin(10^{10^{7}})",
]


def made_up(rng: random.Random) -> list[tuple[str, str]]:
    """Solutions and answers like MATH's: two thirds integers, then fractions, roots and points."""
    kinds = [
        lambda a, b: str(a),
        lambda a, b: rf"\frac{{{a}}}{{{b}}}",
        lambda a, b: rf"{a}\sqrt{{{b}}}",
        lambda a, b: rf"({a}, {b})",
        lambda a, b: rf"{a}x^2 + {b}",
    ]
    rows = []
    for _ in range(COUNT):
        a, b = rng.randint(2, 99), rng.randint(2, 9)
        [kind] = rng.choices(kinds, [65, 15, 8, 8, 4])
        rows.append((SOLUTION % (a, b) * 12, kind(a, b)))
    return rows


def outputs(rows: list[tuple[str, str]], rng: random.Random) -> tuple[list[str], list[str]]:
    """Responses, half of them with another row's answer, and answers."""
    responses, answers = [], []
    for solution, answer in rows:
        shown = answer if rng.random() < 0.5 else rng.choice(rows)[1]
        shown = shown.replace(r"\frac", r"\dfrac").replace("(", r"\left(").replace(")", r"\right)")
        body = solution.replace(r"\boxed", "")
        responses.append(rf"{body} The answer is $\boxed{{{shown}}}$.")
        answers.append(answer)
    return responses, answers


def plain(pair: tuple[str, str]) -> float:
    """Grade as math-verify's README says."""
    from math_verify import parse, verify

    response, answer = pair
    return float(verify(parse(f"${answer}$"), parse(response)))


def rate(work: Callable[..., list[float]], *args: Any) -> tuple[float, float]:
    """Responses a second, and the mean reward."""
    start = time.perf_counter()
    rewards = work(*args)
    return len(rewards) / (time.perf_counter() - start), sum(rewards) / len(rewards)


def lost(busy: int) -> int:
    """Count the right symbolic answers of 100 that get no reward beside busy processes."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    # Other answers each time, so that no worker remembers them.
    numbers = range(100 * busy + 2, 100 * busy + 102)
    answers = [rf"\frac{{x^{{{n}}}+{n}}}{{\sqrt{{{n}}}}}" for n in numbers]
    responses = [rf"\boxed{{({n}+x^{{{n}}})\cdot {n}^{{-1/2}}}}" for n in numbers]
    try:
        return 100 - int(sum(grade(responses, answers)))
    finally:
        for process in spinning:
            process.kill()


def main() -> None:
    """Print the rates in turns, then the times of the batches with pathological boxes."""
    rng = random.Random(0)
    rows = made_up(rng)
    if sys.argv[1:]:
        lines = Path(sys.argv[1]).read_text("utf-8").splitlines()
        rows = [(row["solution"], row["answer"]) for row in map(json.loads, lines) if row["answer"]]
        rows = rng.sample(rows, min(COUNT, len(rows)))
    print(f"{len(rows)} ordinary outputs, {sys.argv[1:] or 'made up'}, {os.cpu_count()} cores")
    with multiprocessing.get_context("spawn").Pool() as pool:
        warm = [(rf"\boxed{{x + {n}}}", f"{n} + x") for n in range(100)]
        pool.map(plain, warm, 5)
        grade(*zip(*warm, strict=True))
        for _ in range(ROUNDS):
            responses, answers = outputs(rows, rng)
            pairs = list(zip(responses, answers, strict=True))
            ours, mean = rate(grade, responses, answers)
            print(f"grade {ours:7.0f} responses/s, mean reward {mean:.4f}", flush=True)
            again, mean = rate(grade, responses, answers)
            print(f"again {again:7.0f} responses/s, mean reward {mean:.4f}", flush=True)
            theirs, mean = rate(pool.map, plain, pairs, 20)
            print(f"plain {theirs:7.0f} responses/s, mean reward {mean:.4f}", flush=True)
    for batch in ("first", "second"):
        responses = [rf"\boxed{{{n}}}" for n in range(1000)]
        for n in range(20):
            responses[n * 50] = rf"\boxed{{{PATHOLOGICAL[n % 5]}}}"
        start = time.perf_counter()
        rewards = grade(responses, [str(n) for n in range(1000)])
        seconds = time.perf_counter() - start
        print(f"1,000 pairs, 20 pathological, {batch}: {seconds:.1f} s, {sum(rewards):.0f} right")
    for busy in (0, 2, 4):
        print(f"100 symbolic answers beside {busy} busy processes: {lost(busy)} lost")
    print(counts)


if __name__ == "__main__":
    main()
