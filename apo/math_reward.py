r"""The mathematical reward: does the answer in a response equal the reference answer?

    reward(r"Half of them, so $\boxed{\frac{1}{2}}$.", "0.5")  ->  1.0
    reward(r"Half of them, so 0.5.", "0.5")                    ->  0.0, since there is no box

The answer in a response is what its last box contains. Five files share the work:

    math_reward.py     finds the box, and compares many pairs at once
    math_algebra.py    compares two expressions with sympy
    math_equality.py   says what equal means: read this one first
    math_units.py      splits a unit off
    math_spelling.py   reads LaTeX: spellings that mean the same, lists, intervals

The calling process compares text and plain numbers itself, and imports nothing heavy. Algebra may
hang or take all memory, so a pair that takes algebra goes to a worker process. The kernel kills a
worker that needs too long for a pair.
"""

import contextlib
import functools
import json
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import threading
import traceback
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from apo.math_algebra import by_algebra
from apo.math_equality import decide, leave_open

# The limits for the algebra of one pair. The first counts the CPU time of the worker, which does
# not pass while other processes have the CPU: a common pair takes a tenth of a second, and twenty
# times as long on the slowest machine that we have seen. The second ends a worker that sleeps.
CPU_SECONDS = 10
WALL_SECONDS = 600
MEMORY_BYTES = 4 * 2**30
# How models mark a thought, which is no part of the answer: its beginning and its end.
THOUGHTS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
)
# How many pairs took too long, how many could not be computed for another reason, and how many
# answers could not be graded.
counts = {"timeouts": 0, "failures": 0, "ungradable": 0}


# The contract -------------------------------------------------------------------------------------


def reward(response: str, answer: Any) -> float:
    """Return 1.0 if the last box equals the answer, else 0.0.

    Raises ValueError for an answer that cannot be graded, see `check_answer`.
    """
    check_answer(answer)
    return submit(response, answer).result()


def grade(responses: list[str], answers: list[Any]) -> list[float]:
    """Grade many responses at once, in order; an answer that cannot be graded gives 0.0."""
    futures = []
    for response, answer in zip(responses, answers, strict=True):
        futures.append(submit(response, answer))
    return [future.result() for future in futures]


def submit(response: str, answer: Any) -> Future:
    """Return a future that will hold the reward, so that many pairs are graded at once.

    An answer that cannot be graded gives 0.0 and is counted.
    """
    future = Future()
    try:
        gold = check_answer(answer)
    except ValueError:
        counts["ungradable"] += 1
        future.set_result(0.0)
        return future
    box = last_box(after_thinking(response))
    if box is None:
        future.set_result(0.0)
        return future
    # Text and plain numbers are compared here. `leave_open` declines algebra: that is for a worker.
    verdict = decide(gold, box, leave_open)
    if verdict is None:
        waiting_jobs().put((future, json.dumps([gold, box])))
    else:
        future.set_result(float(verdict))
    return future


def check_answer(answer: Any) -> str:
    """Return the answer as text, without a box around it.

    Raises ValueError if it is neither text nor number, if it is empty, nan or infinite, if its
    braces do not match, since no box could hold it then, or if it is a whole solution of GSM8K.
    """
    if "####" in str(answer):
        raise ValueError(f"a solution of GSM8K (keep what follows ####): {answer!r:.60}")
    # Python writes 1e+16 for a float, which in mathematics is the number e plus 16.
    written = str(answer).replace("e+", "e") if isinstance(answer, float) else str(answer)
    text = last_box(written) or written
    is_empty = text.strip(" \t\r\n$.") in ("", "nan", "inf", "-inf")
    is_broken = last_box(rf"\boxed{{{text}}}") != text
    if type(answer) not in (str, int, float) or is_empty or is_broken:
        reason = "neither text nor a number, or empty, or with unbalanced braces"
        raise ValueError(f"{reason}: {answer!r:.60}")
    return text


def after_thinking(response: str) -> str:
    """Return what follows the last thought, and nothing if one stays open."""
    for opening, closing in THOUGHTS:
        response = response.rpartition(closing)[2]
        if opening in response:
            return ""
    return response


def last_box(text: str) -> str | None:
    """Return the content of the closed \\boxed{} or \\fbox{} that starts last, or None."""
    open_braces = []  # for each, where the content of its box starts; 0 if it opens no box
    content = None
    content_start = 0
    # The opening of a box, a brace, or an escaped character: \{ is not a brace.
    for token in re.finditer(r"(\\(?:boxed|fbox)\s*)?\{|\\.|\}", text, re.DOTALL):
        if token[1]:
            open_braces.append(token.end())
        elif token[0] == "{":
            open_braces.append(0)
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            # In \boxed{x = \boxed{5}} the inner box closes first but starts last: it counts.
            if start > content_start:
                content_start = start
                content = text[start : token.start()]
    return content


# Workers, in the calling process ------------------------------------------------------------------


class Worker:
    """A process that does algebra on one pair at a time; it starts when the first pair comes.

    It is this module as a program: multiprocessing would import the main script again, with torch
    and vLLM. It ends when its stdin closes, which happens however the calling process ends. It has
    a process group of its own, so that Ctrl-C does not reach it. Its errors appear on stderr.
    """

    process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the process."""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "apo.math_reward", "--worker"],
            cwd=Path(__file__).parents[1],  # where Python finds apo, wherever the caller is
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )

    def ask(self, pair: str) -> float:
        """Return 1.0 or 0.0 for a pair; if the worker is killed from outside, ask another once."""
        for _ in range(2):
            if self.process is None:
                self.start()
            with contextlib.suppress(BrokenPipeError):  # a worker that has ended: no reply comes
                print(pair, file=self.process.stdin, flush=True)
            reply = self.process.stdout.readline()
            if reply == "error\n":
                break
            if reply:
                return float(reply)
            self.process.communicate()  # the process has ended: close its pipes
            status = self.process.returncode  # -9 after signal 9
            self.process = None
            if status in (-signal.SIGPROF, -signal.SIGALRM):
                counts["timeouts"] += 1
                return 0.0
            if status > 0:
                raise RuntimeError("the grading worker does not start; its error is printed above")
        counts["failures"] += 1
        return 0.0


@functools.cache
def waiting_jobs() -> queue.SimpleQueue:
    """Return the queue of the pairs that wait for a worker; the first call starts the threads."""
    jobs = queue.SimpleQueue()
    for _ in range(min(8, os.cpu_count() or 1)):
        # Daemons, since the interpreter waits for other threads before it exits.
        threading.Thread(target=serve, args=(jobs,), daemon=True).start()
    return jobs


# A forked process has none of the threads, so it starts its own.
os.register_at_fork(after_in_child=waiting_jobs.cache_clear)


def serve(jobs: queue.SimpleQueue) -> None:
    """Take pairs from the queue and give them to the worker of this thread."""
    worker = Worker()
    while True:
        future, pair = jobs.get()
        try:
            future.set_result(worker.ask(pair))
        except Exception as error:  # raised again where the result is asked for
            future.set_exception(error)


# A worker, in its own process ---------------------------------------------------------------------


def work() -> None:
    """Run as a worker: read pairs from stdin, write a reward for each, until stdin closes."""
    # What a library prints must not be taken for a reward, so it goes to stderr.
    replies = sys.stdout
    sys.stdout = sys.stderr
    # More memory raises MemoryError here, before the machine runs out.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # The parser is slow until it has seen most of its grammar, and sympy until its first numbers.
    # That must not count against the first pair.
    by_algebra(r"\frac{x^{2}}{\sqrt[3]{8}}-\frac{2\pi}{3}=1", r"(x-1)(x+1)=\frac{4\pi}{3}+\sin x")
    by_algebra(r"\frac{x^{2}+2}{\sqrt{2}}", r"(2+x^{2})\cdot 2^{-1/2}")
    for line in sys.stdin:
        gold, box = json.loads(line)
        # The signals of these timers end this process.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.alarm(WALL_SECONDS)
        try:
            reply = float(decide(gold, box, by_algebra))
        except Exception:
            reply = "error"
            with contextlib.suppress(MemoryError):
                traceback.print_exc()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        with contextlib.suppress(BrokenPipeError):  # the calling process has ended meanwhile
            print(reply, file=replies, flush=True)


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    work()
