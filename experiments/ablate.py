"""A*-PO's choices, one at a time on the toy: V*, N, beta2, the filter, off-policy updates.

    python -m experiments.ablate --seeds 3       # about 75 minutes on a core
    python -m experiments.ablate --quick         # one seed, two settings, two small steps: a test

One values file with N = 32 is made, and everything comes from it: a smaller N takes the first N
rewards of each prompt (the file is signed anew, and says so), another beta1 is train_online.py's
--beta1. `SETTINGS` are the published ones but for what its row says: N = 8, beta1 = 0.5,
beta2 = 1e-3, no filter, two updates a step, one response per prompt; 128 responses a step.

The baseline value, what stands in V*'s place:
  zero, running mean   put into the rollout before train_online.least_squares sees it; the running
                       mean is of the rewards of earlier steps, 0.9 old and 0.1 new, and starts with
                       the stage-1 rewards of the first step's prompts
  mean, best of N      --beta1 inf and --beta1 1e-6

Updates a step: with one learning rate, more updates are more movement; with lr / updates they are
not, and what is left is how far off-policy the later ones are, where V* is a target.

Columns, mean ± standard error over the seeds (of data order and sampling):
  greedy    accuracy on the test set, the mean of the last three evaluations
  reward    on training prompts at temperature 1, the mean of the last five steps: greedy saturates
  step 90   the step at which greedy accuracy is 90 %, linear between evaluations, of the seeds
            that got there
  KL        ln(pi / pi_ref) of a response, nats, the mean of the last five steps
  noise     variance of the gradient over that with V* (N = 8, beta1 = 0.5), both on the same
            responses of the same policy: of a run of its own that trains with that V*, every third
            step, all seeds; the median, and the quartiles. Variance is the trace of the covariance
            of g, with g the gradient of the loss on a whole rollout, divided by 2 beta2, before any
            clip. From 16 parts of the rollout, with gradients g_i (g is their mean):
            sum_i |g_i - g|^2 / (15 * 16)

Writes OUT/ablate.json and .txt. Finished runs in --work are used again.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import problems
from experiments.compare import all_seconds, cell, finish, first_reach, grid_of, read_run, spread

NUM_SAMPLES = 32  # of the one values file
PROBE_EVERY, PARTS = 3, 16  # steps between probes of the gradient, and parts of a rollout
BASELINES = ("v_star", "zero", "running", "probe")


class Setting(NamedTuple):
    """A row: what it is about, what it says, and how it differs from the published settings."""

    table: str
    says: str
    flags: str = ""
    num_samples: int = 8
    baseline: str = "v_star"
    responses: int = 1


SETTINGS = [
    Setting("baseline value", "0", baseline="zero"),
    Setting("baseline value", "mean reward", "--beta1 inf"),
    Setting("baseline value", "V*, beta1 0.1", "--beta1 0.1"),
    Setting("baseline value", "V*, beta1 0.5"),
    Setting("baseline value", "V*, beta1 1", "--beta1 1"),
    Setting("baseline value", "V*, beta1 10", "--beta1 10"),
    Setting("baseline value", "best of N", "--beta1 1e-6"),
    Setting("baseline value", "running mean", baseline="running"),
    *(Setting("N", str(n), num_samples=n) for n in (1, 2, 4, 8, 32)),
    Setting("beta2", "1e-4", "--beta2 1e-4"),
    Setting("beta2", "1e-3"),
    Setting("beta2", "1e-2", "--beta2 1e-2"),
    Setting("beta2", "1e-1", "--beta2 1e-1"),
    Setting("filter", "off"),
    Setting("filter", "on", "--filter-unsolved"),
    Setting("updates a step", "1", "--updates-per-batch 1"),
    Setting("updates a step", "2"),
    Setting("updates a step", "4", "--updates-per-batch 4"),
    Setting("with lr / updates", "1", "--updates-per-batch 1 --lr 2e-4"),
    Setting("with lr / updates", "2"),
    Setting("with lr / updates", "4", "--updates-per-batch 4 --lr 5e-5"),
    Setting("with lr / updates", "4, mean", "--updates-per-batch 4 --lr 5e-5 --beta1 inf"),
    Setting("with lr / updates", "4, 0", "--updates-per-batch 4 --lr 5e-5", baseline="zero"),
    *(Setting("responses per prompt", str(n), responses=n) for n in (1, 2, 4)),
]  # what several rows have in common is run once


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=style)
    add = parser.add_argument
    add("--model", default="toy/reference", help="the reference")
    add("--dataset", default="toy/train.jsonl", help="training problems")
    add("--test", default="toy/test.jsonl", help="what accuracy is measured on")
    add("--max-tokens", type=int, default=128, help="longest response, in tokens")
    add("--seeds", type=int, default=3, help="runs of each setting")
    add("--num-steps", type=int, default=30, help="steps of a run")
    add("--batch-size", type=int, default=128, help="responses per step")
    add("--eval-every", type=int, default=3, help="steps between evaluations")
    add("--lr", default="1e-4", help="AdamW's learning rate")
    add("--limit", type=int, default=0, help="use only the first so many problems; 0: all")
    add("--only", default="", help="only the tables with this in their names")
    add("--quick", action="store_true", help="a test: two settings, two steps, --out in --work")
    add("--work", type=Path, default=Path("runs/ablate"), help="folder of the runs, kept")
    add("--out", type=Path, default=Path("experiments/results"), help="folder of the results")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------
# A run: `python -m experiments.ablate --worker BASELINE`, then train_online.py's own flags


def gradient_noise(policy: Any, ref: Any, responses: list[dict], args: Any) -> dict[str, float]:
    """Noise and signal of the rollout's gradient, as above; leaves no gradient behind.

    A gradient of each part in turn, of which only the sum and the sum of squares are kept.
    """
    import torch
    import torch.distributed as dist

    import losses
    import train_online

    size, total, squares = len(responses) // PARTS, 0.0, 0.0
    for start in range(0, size * PARTS, size):
        part = responses[start : start + size]
        for batch in train_online.micro_batches(part, args):
            with torch.no_grad():
                ref_logp = losses.sequence_logprob(ref(**batch.inputs), batch.lengths)
            logp = losses.sequence_logprob(policy(**batch.inputs), batch.lengths)
            goal = (ref_logp, batch.rewards, batch.v_star, args.beta2)
            loss = losses.a_star_po_loss(logp, *goal) / (2 * args.beta2)
            (loss * batch.share * dist.get_world_size()).backward()
        grads = [p.grad.full_tensor().flatten().double() for p in policy.parameters()]
        policy.zero_grad()
        gradient = torch.cat(grads)
        total, squares = total + gradient, squares + gradient.square().sum().item()
    mean_square = (total / PARTS).square().sum().item()
    noise = (squares - PARTS * mean_square) / (PARTS - 1) / PARTS
    return {"noise": noise, "signal": mean_square - noise}


PUBLISHED = "V*, beta1 0.5"


def other_values(offline: Any, running: float) -> dict[str, list[float]]:
    """What may stand in V*'s place, from the stage-1 rewards (R, 32) of a rollout's prompts."""
    import torch

    import losses

    first = offline[:, :8]
    told = {"0": torch.zeros(len(first)), "mean reward": first.mean(dim=1)}
    for beta1 in (0.1, 0.5, 1, 10):
        told[f"V*, beta1 {beta1}"] = losses.optimal_value(first, beta1)
    told |= {"best of N": first.amax(dim=1), "running mean": torch.full((len(first),), running)}
    told |= {f"N = {n}": losses.optimal_value(offline[:, :n], 0.5) for n in (1, 2, 4, 32)}
    return {says: values.tolist() for says, values in told.items()}


def put(responses: list[dict], values: list[float]) -> None:
    """Put values in V*'s place, in the rollout itself, so that the log shows them."""
    for response, value in zip(responses, values, strict=True):
        response["v_star"] = value


def with_baseline(baseline: str) -> Callable:
    """Make a `learn` for train_online.train: least squares with another number for V*.

    "probe" trains with V* of the first 8 rewards, and tells the gradient's noise with all others.
    """
    import torch
    import torch.distributed as dist

    import train_online

    state = {"step": 0, "running": None}

    def learn(policy: Any, ref: Any, optimizer: Any, responses: list[dict], args: Any, lap: Any):
        state["step"] += 1
        rewards = [response["reward"] for response in responses]
        if state["running"] is None:
            offline = (statistics.fmean(r["rewards"]) for r in responses)
            state["running"] = statistics.fmean(offline)
        if baseline == "probe":
            offline = torch.tensor([r["rewards"] for r in responses], dtype=torch.float64)
            values_of = other_values(offline, state["running"])
            if state["step"] % PROBE_EVERY == 1 and len(responses) >= PARTS:
                told = {"step": state["step"]}
                for says, values in values_of.items():
                    put(responses, values)
                    told[says] = gradient_noise(policy, ref, responses, args)
                if dist.get_rank() == 0:
                    with open(Path(args.out, "probes.jsonl"), "a") as file:
                        file.write(json.dumps(told) + "\n")
            put(responses, values_of[PUBLISHED])
        elif baseline != "v_star":
            value = 0.0 if baseline == "zero" else state["running"]
            put(responses, [value] * len(responses))
        state["running"] = 0.9 * state["running"] + 0.1 * statistics.fmean(rewards)
        return train_online.least_squares(policy, ref, optimizer, responses, args, lap)

    return learn


def work(words: list[str]) -> None:
    """Be a run."""
    from experiments import baselines

    if not words or words[0] not in BASELINES:
        raise problems.UserError(f"--worker wants one of {', '.join(BASELINES)}")
    if "--resume" in words:
        raise problems.UserError("such a run cannot --resume: its state is in no checkpoint")
    learn = with_baseline(words[0])
    baselines.train_with(learn, words[1:], "experiments.ablate", baseline=words[0])


# ---------------------------------------------------------------------------------------------
# The values files


def fewer_samples(path: Path, to: Path, num_samples: int) -> None:
    """Write a values file with the first N rewards of each prompt, V* of those, signed anew."""
    import torch

    import losses

    values = problems.read_json(path, ours=True)
    with problems.explain(f"{path} is no values file"):
        header, prompts, kept = values["header"], values["prompts"], slice(num_samples)
    rewards = torch.tensor([p["rewards"][kept] for p in prompts], dtype=torch.float64)
    v_star = losses.optimal_value(rewards, header["beta1"]).tolist()
    prompts = [p | {"rewards": p["rewards"][kept], "lengths": p["lengths"][kept], "v_star": value}
               for p, value in zip(prompts, v_star, strict=True)]  # fmt: skip
    header |= {"num_value_samples": num_samples, "subsampled_from": values["sha256"]}
    header |= {"mean_v_star": statistics.fmean(v_star)}
    header |= {"pass_at_1": (rewards > 0).double().mean().item()}
    header |= {"pass_at_n": (rewards > 0).any(dim=1).double().mean().item()}
    problems.write_json(to, {"header": header, "prompts": prompts})


def values_files(args: argparse.Namespace, counts: set[int]) -> dict[int, Path]:
    """Make the values file with N = 32, if there is none, and those with fewer samples."""
    folder = args.work / "values"
    command = ["offline_value.py", "--model", args.model, "--dataset", args.dataset]
    command += ["--num-value-samples", NUM_SAMPLES, "--max-tokens", args.max_tokens]
    command += ["--limit", args.limit, "--out", folder / "values.json"]
    finish(command, folder, "values.json")
    files = {NUM_SAMPLES: folder / "values.json"}
    for n in sorted(counts - {NUM_SAMPLES}):
        files[n] = args.work / f"values-{n}.json"
        fewer_samples(folder / "values.json", files[n], n)
    return files


# ---------------------------------------------------------------------------------------------
# The table


def measure(args: argparse.Namespace, setting: Setting, seed: int, values: Path) -> dict:
    """Make a run, if there is none yet, and tell its numbers."""
    flags, n = setting.flags.split(), setting.responses
    what = [word.removeprefix("--") for word in flags]
    name = [setting.baseline, f"N{setting.num_samples}", f"x{n}", *what, f"seed{seed}"]
    folder = args.work / "_".join(name)
    command = ["-m", "experiments.ablate", "--worker", setting.baseline, "--values", values]
    command += ["--lr", args.lr, "--seed", seed, "--num-steps", args.num_steps, "--beta1", 0.5]
    command += ["--save-every", args.num_steps, "--eval-every", args.eval_every]
    command += ["--samples-per-prompt", n, "--batch-size", args.batch_size // n]
    command += ["--eval-dataset", args.test, *flags]
    finish([*command, "--out", folder], folder, "final/manifest.json")
    steps, mean = read_run(folder), statistics.fmean
    seen = [step["eval_accuracy"] for step in steps if "eval_accuracy" in step]
    told = {"accuracy": mean(seen[-3:]), "reward": mean(step["reward"] for step in steps[-5:])}
    told |= {"step_90": first_reach(steps, "step")}
    return told | {"kl": mean(step["logratio"] for step in steps[-5:])}


def noises(args: argparse.Namespace, values: Path) -> dict[str, list[float]]:
    """Quartiles, over probed steps and seeds, of the noise with each value over that with V*."""
    ratios = defaultdict(list)
    for seed in range(args.seeds):
        folder = args.work / f"probe_seed{seed}"
        command = ["-m", "experiments.ablate", "--worker", "probe", "--values", values]
        command += ["--lr", args.lr, "--seed", seed, "--num-steps", args.num_steps]
        command += ["--save-every", args.num_steps, "--batch-size", args.batch_size]
        finish([*command, "--out", folder], folder, "final/manifest.json")
        for row in problems.read_rows(folder / "probes.jsonl"):
            for says, told in row.items():
                if says != "step":
                    ratios[says].append(told["noise"] / row[PUBLISHED]["noise"])
    return {says: statistics.quantiles(x, n=4, method="inclusive") if len(x) > 1 else 3 * x
            for says, x in ratios.items()}  # fmt: skip


COLUMNS: dict[str, Callable[[dict], str]] = {
    "": lambda row: row["table"],
    "setting": lambda row: row["setting"],
    "greedy %": lambda row: cell(row["accuracy"], ".1f", 100),
    "reward %": lambda row: cell(row["reward"], ".1f", 100),
    "step 90": lambda row: cell(row["step_90"], ".1f"),
    "reached": lambda row: f"{row['reached']}/{row['seeds']}",
    "KL": lambda row: cell(row["kl"], ".2f"),
    "noise / that of V*": lambda row: (
        "{1:.2f} [{0:.2f}, {2:.2f}]".format(*row["noise"]) if "noise" in row else ""
    ),
}


def run_setting(args: argparse.Namespace, setting: Setting, files: dict[int, Path]) -> dict:
    """All seeds of a setting; its row."""
    values = files[setting.num_samples]
    told = [measure(args, setting, seed, values) for seed in range(args.seeds)]
    row = {"table": setting.table, "setting": setting.says, "seeds": args.seeds}
    row |= {"num_value_samples": setting.num_samples, "baseline": setting.baseline}
    row |= {"flags": setting.flags, "samples_per_prompt": setting.responses}
    told_of = {key: [run[key] for run in told if run[key] is not None] for key in told[0]}
    row["reached"] = len(told_of["step_90"])
    return row | {key: spread(values) for key, values in told_of.items()}


def main() -> None:
    """Make what is missing, then write the table."""
    if sys.argv[1:2] == ["--worker"]:
        return work(sys.argv[2:])
    args = parse_args()
    problems.check_args(args, "limit")
    problems.load_problems(args.test, "test")
    made_of = {"rows": problems.load_problems(args.dataset, "train")}
    made_of |= {"model": problems.folder_hashes(problems.model_folder(args.model))}
    # Runs on another model or other problems are other runs.
    args.work = args.work / problems.content_sha256(made_of)[:8]
    settings = [setting for setting in SETTINGS if args.only in setting.table]
    if not settings:
        raise problems.UserError(f"no table is called {args.only}")
    if args.quick:
        args.seeds, args.num_steps, args.batch_size, args.eval_every = 1, 2, 16, 1
        args.limit, args.work = 32, args.work.parent / "quick"
        args.out = args.work / "results"
        shutil.rmtree(args.work, ignore_errors=True)
        settings = [settings[0], settings[-1]]
    files = values_files(args, {setting.num_samples for setting in settings})
    rows = [run_setting(args, setting, files) for setting in settings]
    noise = noises(args, files[NUM_SAMPLES])
    for row in rows:
        says = row["setting"] if row["table"] == "baseline value" else f"N = {row['setting']}"
        says = PUBLISHED if says == "N = 8" else says
        if row["table"] in ("baseline value", "N") and says in noise:
            row["noise"] = noise[says]
    lines = [f"python -m experiments.ablate {shlex.join(sys.argv[1:])}".rstrip(),
             f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}; "
             f"all runs took {all_seconds(args.work):.0f} s; {args.seeds} seeds, mean ± s.e.",
             f"{args.num_steps} steps of {args.batch_size} responses, lr {args.lr}, {args.model}",
             "", grid_of(rows, COLUMNS)]  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    problems.write_whole(args.out / "ablate.json", json.dumps(rows, indent=1) + "\n")
    problems.write_whole(args.out / "ablate.txt", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    problems.run(main)
