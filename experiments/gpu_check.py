"""Check on a GPU everything that no CPU can run, in at most ten minutes and without a download.

Question: does this code work on this GPU, how fast is it, and how much memory does it take?
Command:  python -m experiments.gpu_check
          python -m experiments.gpu_check --only attention,cache
Time:     at most --minutes (10). What has not been run by then is listed as skipped. On a CPU, with
          tiny shapes: 4 minutes on 2 cores.
Output:   runs/gpu-check: log.txt, results.json, and the models.
Answer:   it has not been run on a GPU.

part       what it does
host       names machine, driver and libraries
attention  packed_attention, forward and backward, against float32
logprob    token_logprob on bf16 against float32, at 151,936 words
engine     starts vLLM
cache      samples, drains, releases the cache, takes it back, samples the same again
weights    alters the weights, reloads them into vLLM, compares ln pi with the policy's
scripts    the three stages, four steps of training
resume     goes on from step 2
step       seconds of a step by part, and memory, at 1.5B
mfu        the update's share of what the GPU can do, at 1.5B
methods    seconds of a step and memory of A*-PO, GRPO, REBEL and PPO at equal prompts

Each part reports ok and its figures, or its traceback, and the next one goes on. Parts run in
processes of their own (gpu_parts.py), so that a crash costs only the parts of that process. Where
torch is older or vllm is missing, what is needed is replaced or skipped, and named.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

# The parts that share a process, in their order. This file imports nothing of them, so that it goes
# on whatever is broken.
GROUPS = (
    ("host", "attention", "logprob"),
    ("engine", "cache", "weights"),
    ("scripts", "resume", "step"),
    ("mfu", "methods"),
)
NAMES = [name for group in GROUPS for name in group]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--only", help=f"parts, separated by commas: {', '.join(NAMES)}")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder")
    parser.add_argument("--minutes", type=float, default=10.0, help="when to stop")
    args = parser.parse_args()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out} cannot be written: {error.strerror}")
    args.only = NAMES if args.only is None else args.only.split(",")
    for name in args.only:
        if name not in NAMES:
            parser.error(f"there is no part {name}: choose from {', '.join(NAMES)}")
    return args


def child_environment() -> dict[str, str]:
    """Show a child one GPU alone, and no hub."""
    environment = dict(os.environ)
    first_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment["CUDA_VISIBLE_DEVICES"] = first_gpu
    environment["HF_HUB_OFFLINE"] = "1"
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def run_group(names: list[str], folder: Path, log: TextIO, seconds: float) -> list[dict[str, Any]]:
    """Run parts in one process for at most so many seconds; return a record for each."""
    results = folder / "parts.jsonl"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "experiments.gpu_parts", ",".join(names), str(results)]
    process = subprocess.Popen(
        command,
        env=child_environment(),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that it can be ended together with all that it has started
    )
    try:
        ending = f"its process ended with {process.wait(seconds)}, see log.txt"
    except subprocess.TimeoutExpired:
        ending = f"it was stopped after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    records = []
    if results.exists():
        for line in results.read_text("utf-8").splitlines():
            records.append(json.loads(line))
    # The part at which it ended, and those after it.
    for name in names[len(records) :]:
        records.append({"part": name, "ok": False, "error": ending})
        ending = "the part before it ended the process"
    return records


def describe(record: dict[str, Any]) -> str:
    """Write a record for the terminal and the log."""
    if record["ok"]:
        head = f"{record['part']:10} ok, {record['seconds']} s"
        lines = [f"           {name}: {shorten(f)}" for name, f in record["figures"].items()]
        return "\n".join([head, *lines])
    if record["ok"] is None:
        return f"{record['part']:10} skipped: {record['skipped']}"
    return f"{record['part']:10} FAILED\n{record['error']}"


def shorten(figure: Any) -> str:
    """Write a figure with four digits."""
    if isinstance(figure, float):
        return f"{figure:.4g}"
    if isinstance(figure, list):
        return ", ".join(shorten(item) for item in figure)
    if isinstance(figure, dict):
        return ", ".join(f"{name} {shorten(item)}" for name, item in figure.items())
    return str(figure)


def main() -> None:
    """Run all groups, tell each result at once, and keep them."""
    args = parse_args()
    end = time.monotonic() + 60 * args.minutes
    records = []
    with open(args.out / "log.txt", "w", encoding="utf-8") as log:
        command = shlex.join(["python", "-m", "experiments.gpu_check", *sys.argv[1:]])
        print(f"$ {command}", file=log, flush=True)
        for group in GROUPS:
            names = [name for name in group if name in args.only]
            seconds = end - time.monotonic()
            if not names:
                continue
            if seconds > 0:
                new = run_group(names, args.out, log, seconds)
            else:
                new = [{"part": name, "ok": None, "skipped": "no time left"} for name in names]
            for record in new:
                for place in (sys.stdout, log):
                    print(describe(record), file=place, flush=True)
            records += new
            results = {"command": command, "parts": records}
            text = json.dumps(results, indent=1) + "\n"
            (args.out / "results.json").write_text(text, "utf-8")
    sys.exit(1 if any(record["ok"] is False for record in records) else 0)


if __name__ == "__main__":
    main()
