"""Does a long run grow? Memory, open files and seconds a step of stage 2, early and late.

    python -m experiments.steady --values toy/values.json --num-steps 500     # after `make demo`

Runs train_online.py in a scratch folder and looks at its process after each line of metrics.jsonl:
resident memory (its own, and with its graders), and open files. Told are medians over the second
fifth of the steps, when all is warm, and over the last: of 500 steps the second and the last
hundred. The run evaluates and saves now and then, as real ones do; seconds_total has neither.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "experiments" / "results" / "steady.txt"
MEBI = 2**20
# name, unit, how it is printed; what a run may grow by is 5 % (issue: Nothing is lost)
COLUMNS = [("rss", "MiB", ".1f"), ("rss_with_graders", "MiB", ".1f"), ("open_files", "", ".0f")]
COLUMNS += [("seconds_total", "s", ".3f")]
MOST_GROWTH = 1.05


def resident(pid: int) -> int:
    """Bytes of a process in memory; 0 if it is gone."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def children(pid: int) -> list[int]:
    """Processes that `pid` has started, and theirs."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:  # the name, in brackets, may hold anything
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    found = [pid]
    for parent in found:  # grows while it is read
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]


def look(pid: int) -> dict[str, float]:
    """Measure a process as it is now."""
    own = resident(pid)
    family = own + sum(map(resident, children(pid)))
    open_files = len(os.listdir(f"/proc/{pid}/fd"))
    return {"rss": own / MEBI, "rss_with_graders": family / MEBI, "open_files": open_files}


def watch(command: list[str], out: Path, log: Path) -> list[dict]:
    """Run stage 2; its metrics, a row a step, each with what the process was just after."""
    metrics, seen = out / "metrics.jsonl", {}
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                step = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
                if step and step not in seen:
                    try:
                        seen[step] = look(process.pid)
                    except OSError:  # it has just ended
                        break
                time.sleep(0.05)
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)
    if process.returncode:
        sys.exit(f"error: train_online.py ended with code {process.returncode}: {log.read_text()}")
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [row | seen.get(row["step"], {}) for row in rows]


def report(rows: list[dict], what: str) -> str:
    """Lay medians early and late side by side."""
    fifth = len(rows) // 5
    early, late = rows[fifth : 2 * fifth], rows[-fifth:]
    names = [f"steps {part[0]['step']}-{part[-1]['step']}" for part in (early, late)]
    line = "{:<24} {:>16} {:>16} {:>8}  {}".format
    lines = [what, "", line("median", *names, "ratio", "")]
    for name, unit, spec in COLUMNS:
        # a step too short to be seen has no memory of its own
        a, b = (statistics.median(r[name] for r in part if name in r) for part in (early, late))
        verdict = "grew" if b / a > MOST_GROWTH else "steady"
        values = (f"{a:{spec}}", f"{b:{spec}}", f"{b / a:.3f}")
        lines.append(line(f"{name} {unit and f'({unit})'}", *values, verdict))
    peak = max(row.get("open_files", 0) for row in rows)
    lines.append(f"\nmost open files at once {peak}, peak RSS {rows[-1]['peak_gib']:.3f} GiB")
    return "\n".join(lines)


def main() -> None:
    """Run, measure, report."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=style)
    add = parser.add_argument
    add("--values", default="toy/values.json", help="stage 1's file")
    add("--model", help="reference pi_ref (default: the values file's)")
    add("--num-steps", type=int, default=500, help="rollouts, at least 10")
    add("--batch-size", type=int, default=64, help="prompts per rollout")
    add("--lr", type=float, default=1e-4, help="AdamW's learning rate")
    add("--eval-dataset", help="measure accuracy on it every fiftieth step")
    add("--out", default=str(RESULT), help="the report")
    args = parser.parse_args()
    if args.num_steps < 10:
        sys.exit("error: --num-steps must be at least 10, two steps for each fifth")
    with tempfile.TemporaryDirectory(prefix="steady-") as scratch:
        out = Path(scratch, "run")
        command = [sys.executable, "train_online.py", "--values", args.values, "--out", str(out)]
        command += ["--num-steps", str(args.num_steps), "--batch-size", str(args.batch_size)]
        command += ["--lr", str(args.lr), "--save-every", "50"]
        for name in ("model", "eval_dataset"):
            if value := getattr(args, name):
                command += [f"--{name.replace('_', '-')}", value]
        start = time.perf_counter()
        rows = watch(command, out, Path(scratch, "log"))
        minutes = (time.perf_counter() - start) / 60
    told = " ".join(["python", *command[1:]]).replace(str(out), "OUT")
    where = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    text = report(rows, f"{told}\n{where}; {minutes:.1f} minutes")
    print(text)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
