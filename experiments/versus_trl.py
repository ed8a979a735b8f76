"""Ours against TRL's A2POTrainer, in turns: stage 1 and 40 steps on two toys, on the CPU.

    python -m experiments.versus_trl --trl-python /path/to/trl-env/bin/python

The environment is made as experiments/trl_a2po.py says; both toys are made first if --folder has
none. The same on both sides: reference, prompts, reward, N, beta1, beta2, batch, learning rate,
AdamW and its clip, response limit, float32, and one optimiser step per rollout (TRL has no other).
TRL gets its fastest settings: those of `CHOICES` are tried on each toy in short runs, and stage 1
has its prompts sorted by length, which wastes less on padding.

Two times are told, both the sum of the two stages:

whole   wall-clock of the processes, from start to exit: imports, loading, ours starting its engine
        twice, and saving the trained model; TRL has one process
bare    start-up excluded. Ours: stage 1 from the moment its folder of partial results appears
        until the file of the values, and `seconds_total` of all steps in metrics.jsonl. TRL: its
        stage 1, and its steps. Neither has loading, saving or evaluation in it.

Accuracy is evaluate.py's, 8 samples to each test problem, for both and for the reference. Rounds
have seeds of their own and alternate who goes first. Ratios are ours / TRL's, of times summed over
rounds; below 1, ours is faster. Writes experiments/results/versus-trl.json and .txt.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import problems

# name: (the module that makes it, the longest response in tokens)
TOYS = {"uniform": ("experiments.toy", 128), "long_tail": ("experiments.long_tail", 256)}
# What TRL may choose of: attention, and (prompts at once in stage 1, in stage 2).
CHOICES = tuple(itertools.product(("sdpa", "eager"), ((32, 32), (64, 64), (128, 128), (256, 128))))
RESULTS = Path("experiments/results")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=style)
    add = parser.add_argument
    add("--trl-python", required=True, help="the python of TRL's environment")
    add("--folder", type=Path, default=Path("runs/versus-trl"), help="toys, runs and logs")
    add("--out", type=Path, default=RESULTS / "versus-trl.json", help="the results; .txt beside it")
    add("--toys", default="uniform,long_tail", help="which, with commas")
    add("--rounds", type=int, default=2, help="runs of each side")
    add("--num-steps", type=int, default=40, help="steps of stage 2")
    add("--batch-size", type=int, default=128, help="prompts per step")
    add("--num-value-samples", type=int, default=8, help="N, responses per prompt in stage 1")
    add("--lr", type=float, default=1e-4, help="AdamW's learning rate")
    add("--num-samples", type=int, default=8, help="responses per test problem")
    add("--limit", type=int, default=0, help="use only the first so many problems; 0: all")
    add("--seed", type=int, default=0, help="of the first round, and of the toys")
    add("--trl-flags", help="instead of trying: flags for trl_a2po, as '--attention eager'")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------
# Processes


def run(command: list, log: Path, awaited: Path | None = None) -> dict[str, float]:
    """Run a command to its end, its output to a log; wall and CPU seconds, and the load before.

    `awaited`, if given, is a path whose first appearance is told too, as `appeared` (epoch).
    UserError with the log's end if it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    told = {"load_before": os.getloadavg()[0]}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with open(log, "w") as file:
        child = subprocess.Popen(
            [str(part) for part in command], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while awaited and child.poll() is None and "appeared" not in told:
                if awaited.exists():
                    told["appeared"] = time.time()
                time.sleep(0.02)
            child.wait()
        finally:
            if child.poll() is None:  # we were interrupted
                child.terminate()
                child.wait()
    told["seconds"] = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    told["cpu_seconds"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if child.returncode:
        raise problems.UserError(f"failed, see {log}: {' '.join(map(str, command))}")
    return told


def common_flags(args: argparse.Namespace, seed: int, max_tokens: int) -> dict[str, list]:
    """The flags that must be the same on both sides, by stage."""
    stage1 = ["--num-value-samples", args.num_value_samples, "--max-tokens", max_tokens]
    stage1 += ["--beta1", 0.5, "--limit", args.limit]
    stage2 = ["--batch-size", args.batch_size, "--num-steps", args.num_steps]
    stage2 += ["--lr", args.lr, "--beta2", 1e-3, "--seed", seed]
    return {"stage1": stage1, "stage2": stage2}


def run_ours(args: argparse.Namespace, toy: Path, out: Path, seed: int, max_tokens: int) -> dict:
    """Both stages as a user starts them."""
    flags, values = common_flags(args, seed, max_tokens), out / "values.json"
    command = [sys.executable, "offline_value.py", "--model", toy / "reference", "--dataset"]
    command += [toy / "train.jsonl", *flags["stage1"], "--seed", seed, "--out", values]
    stage1 = run(command, out / "stage1.log", out / "values.json.partial")
    command = [sys.executable, "train_online.py", "--values", values, *flags["stage2"]]
    command += ["--updates-per-batch", 1, "--save-every", args.num_steps, "--out", out / "run"]
    stage2 = run(command, out / "stage2.log")
    steps = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    header = problems.read_json(values)["header"]
    parts = ("generate", "grade", "ref", "update", "sync")
    return {
        "whole": stage1["seconds"] + stage2["seconds"],
        "stage1": values.stat().st_mtime - stage1["appeared"],
        "steps": sum(step["seconds_total"] for step in steps),
        "cpu_seconds": stage1["cpu_seconds"] + stage2["cpu_seconds"],
        "load_before": [stage1["load_before"], stage2["load_before"]],
        "stage1_header_seconds": header["seconds"],
        "profile": {part: sum(step[f"seconds_{part}"] for step in steps) for part in parts},
        "mean_v_star": header["mean_v_star"],
        "model": str(out / "run/final"),
    }


def run_trl(
    args: argparse.Namespace, toy: Path, out: Path, seed: int, max_tokens: int, tuned: list
) -> dict:
    """Both stages in TRL's one process."""
    flags = common_flags(args, seed, max_tokens)
    command = [args.trl_python, "-m", "experiments.trl_a2po", "--model", toy / "reference"]
    command += ["--dataset", toy / "train.jsonl", *flags["stage1"], *flags["stage2"], "--sort"]
    told = run([*command, *tuned, "--out", out], out / "log")
    printed = [x for x in (out / "log").read_text().splitlines() if x.startswith("{")]
    printed = json.loads(printed[-1])  # a warning may stand below it
    return {
        "whole": told["seconds"],
        "stage1": printed["seconds_stage1"],
        "steps": sum(printed["seconds_steps"]),
        "cpu_seconds": told["cpu_seconds"],
        "load_before": [told["load_before"]],
        "profile_stage1": printed["stage1"],
        "profile": printed["training"],
        "mean_v_star": printed["mean_v_star"],
        "model": str(out / "final"),
    }


def score(args: argparse.Namespace, model: str | Path, toy: Path, out: Path, tokens: int) -> dict:
    """Accuracy of a model by our evaluator; `mean` and `stderr`."""
    command = [sys.executable, "evaluate.py", "--model", model, "--benchmarks", toy / "test.jsonl"]
    command += ["--num-samples", args.num_samples, "--temperature", 1.0, "--max-tokens", tokens]
    command += ["--seed", args.seed, "--out", out]
    run(command, out.with_suffix(".log"))
    [benchmark] = problems.read_json(out / "summary.json")["benchmarks"].values()
    return {key: benchmark[key] for key in ("mean", "stderr", "truncated", "tokens")}


# ---------------------------------------------------------------------------------------------
# The comparison


def tune(args: argparse.Namespace, toy: Path, out: Path, max_tokens: int) -> tuple[list, list]:
    """Find TRL's fastest flags in short runs; the flags, and a row of (flags, seconds) for each.

    A candidate's seconds are what it would need for all of stage 1 and of stage 2.
    """
    if args.trl_flags is not None:
        return args.trl_flags.split(), []
    tried, whole = [], len(problems.load_problems(str(toy / "train.jsonl"))[: args.limit or None])
    short = argparse.Namespace(**vars(args) | {"limit": min(256, whole), "num_steps": 4})
    for i, (attention, (first, second)) in enumerate(CHOICES):
        if args.batch_size % second:
            continue
        flags = ["--attention", attention, "--stage1-batch-size", str(first)]
        flags += ["--micro-batch-size", str(second)]
        told = run_trl(short, toy, out / str(i), args.seed, max_tokens, flags)
        seconds = told["stage1"] * whole / short.limit + told["steps"] * args.num_steps / 4
        tried.append((flags, seconds))
        print(f"  TRL would take {seconds:6.1f} s with {' '.join(flags)}", flush=True)
    return min(tried, key=lambda row: row[1])[0], tried


def compare(args: argparse.Namespace, name: str) -> dict:
    """All rounds on one toy; times, accuracies and their ratios."""
    module, max_tokens = TOYS[name]
    toy, out = args.folder / name, args.folder / f"{name}-runs"
    shutil.rmtree(out, ignore_errors=True)
    if not (toy / "reference").exists():
        run([sys.executable, "-m", module, "--out", toy, "--seed", args.seed], toy / "toy.log")
    print(f"{name}: the reference", flush=True)
    result = {"reference": score(args, toy / "reference", toy, out / "reference", max_tokens)}
    tuned, tried = tune(args, toy, out / "tune", max_tokens)
    result |= {"trl_flags": tuned, "trl_flags_tried": tried, "ours": [], "trl": []}
    for number in range(args.rounds):
        seed = args.seed + number
        for side in ("ours", "trl") if number % 2 == 0 else ("trl", "ours"):
            folder = out / f"{side}-{number}"
            job = (args, toy, folder, seed, max_tokens)
            told = run_ours(*job) if side == "ours" else run_trl(*job, tuned)
            told["bare"] = told["stage1"] + told["steps"]
            told["accuracy"] = score(args, told["model"], toy, folder / "score", max_tokens)
            result[side].append(told)
            print(line(f"{name} {side} {number}", told), flush=True)
    for key in ("whole", "bare", "stage1", "steps", "cpu_seconds"):
        sums = [sum(told[key] for told in result[side]) for side in ("ours", "trl")]
        result[f"ratio_{key}"] = sums[0] / sums[1]
    return result


# ---------------------------------------------------------------------------------------------
# The report

COLUMNS = ("whole", "bare", "stage1", "steps", "cpu_seconds")


def line(label: str, told: dict) -> str:
    """One run, or the head of the table if there is none."""
    if not told:
        return f"{label:<20}" + "".join(f"{x:>12}" for x in (*COLUMNS, "accuracy", "load"))
    accuracy = f"{told['accuracy']['mean']:.1%} ± {told['accuracy']['stderr']:.1%}"
    seconds = "".join(f"{told[key]:12.1f}" for key in COLUMNS)
    return f"{label:<20}{seconds}  {accuracy}  {max(told['load_before']):.1f}"


def profile(told: dict, name: str) -> str:
    """Where one run's steps went, in seconds."""
    parts = {key: x for key, x in told["profile"].items() if not key.startswith("tokens")}
    parts["rest"] = told["steps"] - sum(parts.values())
    return f"{name} steps: " + ", ".join(f"{key} {x:.1f}" for key, x in parts.items())


def text(results: dict) -> str:
    """The report for a person."""
    lines = [results["command"], results["machine"], "", line("seconds", {})]
    for name, toy in results["toys"].items():
        for side in ("ours", "trl"):
            lines += [line(f"{name} {side} {i}", told) for i, told in enumerate(toy[side])]
        ratios = "".join(f"{toy[f'ratio_{key}']:12.2f}" for key in COLUMNS)
        before, used = toy["reference"], toy["trl"][0]
        useful = [
            used[key]["tokens_real"] / used[key]["tokens_decoded"]
            for key in ("profile_stage1", "profile")
        ]
        lines += [f"{name + ' ours/TRL':<20}{ratios}", profile(toy["ours"][0], "  ours'")]
        lines += [profile(used, "  TRL's"), f"  TRL: {' '.join(toy['trl_flags'])}; of the tokens it"
                  f" decoded {useful[0]:.0%} were real in stage 1, {useful[1]:.0%} in stage 2",
                  f"  reference {before['mean']:.1%} ± {before['stderr']:.1%}, "
                  f"{before['tokens']:.0f} tokens a response", ""]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Compare on each toy and write the results."""
    args = parse_args()
    names = args.toys.split(",")
    if unknown := set(names) - set(TOYS):
        raise problems.UserError(f"--toys {', '.join(unknown)}: there are {', '.join(TOYS)}")
    asked = "import torch, transformers, trl; print(torch.__version__, transformers.__version__,"
    asked += " trl.__version__)"
    try:
        versions = subprocess.check_output([args.trl_python, "-c", asked], text=True).split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise problems.UserError(f"--trl-python {args.trl_python}: {error}") from error
    results = {
        "command": "python -m experiments.versus_trl " + " ".join(sys.argv[1:]),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}; TRL's: "
        "torch {}, transformers {}, trl {}".format(*versions),
        "settings": {key: str(value) for key, value in vars(args).items()},
        "toys": {},
    }
    for name in names:
        toy = results["toys"][name] = compare(args, name)
        results[f"trl_ratio_{name}"] = toy["ratio_bare"]
        results[f"trl_ratio_{name}_whole"] = toy["ratio_whole"]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        problems.write_whole(args.out, json.dumps(results, indent=1) + "\n")
        problems.write_whole(args.out.with_suffix(".txt"), text(results) + "\n")
    print(text(results))


if __name__ == "__main__":
    problems.run(main)
