"""Parts of the GPU check that train: the scripts, resuming, and what steps and methods cost.

As in gpu_parts.py, a part returns its figures by name.
"""

from experiments.gpu_libraries import MISSING, need_vllm  # first: apo needs it on some machines

# isort: split
import gc
import shutil
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any, NamedTuple

import torch

import train_online
from apo import engine, policy
from apo.engine import Request, Response
from apo.files import read_json, read_jsonl, read_whole_lines, write_json
from apo.policy import COMPUTE_DTYPE, DEVICE, ON_GPU, MicroBatch, Policy
from apo.problems import Prompt
from experiments import baselines
from experiments.gpu_models import (
    MAX_TOKENS,
    choose_large_shape,
    made_up_prompts,
    make_up_responses,
    model_at,
    start_process_group,
    started_engine,
    write_toy_problems,
)
from experiments.speed import forward_flops

# Dense bf16 operations per second, as the maker states them.
FASTEST = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}

# ---------------------------------------------------------------------------------------------
# The scripts, as a user starts them

TRAIN = ("--batch-size", 8, "--num-steps", 4, "--save-every", 2, "--lr", 1e-4)


def run_script(*command: object) -> float:
    """Run a script; return its seconds. RuntimeError has the end of what it printed."""
    need_vllm()
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return time.perf_counter() - begin


def scripts(work: Path) -> dict[str, Any]:
    """Run the three stages: 16 problems, four steps, the same problems again."""
    need_vllm()
    folder = model_at(work, "qwen2.5-0.5b")
    write_toy_problems(work / "problems.jsonl")
    for name in ("values.json", "run", "results"):
        remove(work / name)
    # The default of 0.9 would not start beside a desktop.
    share = ("--gpu-memory-utilization", 0.8)
    sampling = ("--max-tokens", MAX_TOKENS, "--num-value-samples", 4, *share)
    values = ("--dataset", work / "problems.jsonl", "--out", work / "values.json")
    figures = {}
    figures["seconds_stage1"] = run_script(
        "offline_value.py", "--model", folder, *values, *sampling
    )
    reward_half(work / "values.json")
    train = ("--values", work / "values.json", "--out", work / "run", *TRAIN)
    figures["seconds_stage2"] = run_script("train_online.py", *train)
    evaluation = ("--benchmarks", work / "problems.jsonl", "--out", work / "results")
    figures["seconds_stage3"] = run_script(
        "evaluate.py", "--model", work / "run" / "final", *evaluation, "--num-samples", 2, *share
    )
    metrics = read_jsonl(work / "run" / "metrics.jsonl")
    steps = [line for line in metrics if "loss" in line]
    for name in ("logratio", "logprob_gap", "grad_norm", "peak_gib"):
        figures[name] = [line[name] for line in steps]
    assert len(steps) == 4 and abs(figures["logratio"][0]) < 1e-3, figures
    return figures


def reward_half(path: Path) -> None:
    """Let every second response in a values file be right, as if stage 1 had found it so.

    A random model solves nothing. V* would be 0, and there would be no gradient.
    """
    values = read_json(path)
    for entry in values["prompts"]:
        entry["rewards"] = [number % 2 for number in range(len(entry["rewards"]))]
    write_json(path, values)


def resume(work: Path) -> dict[str, Any]:
    """Go on from step 2 of the run of `scripts`, and compare steps 3 and 4 with the unbroken run.

    Equal losses show that the same responses were sampled, from the same weights.
    """
    need_vllm()
    if not (work / "run" / "final").is_dir():
        scripts(work)
    run = work / "run"
    unbroken = read_jsonl(run / "metrics.jsonl")
    remove(run / "final")
    remove(run / "checkpoints" / "step-4")
    train = ("--values", work / "values.json", "--out", run, *TRAIN)
    figures = {"seconds": run_script("train_online.py", *train, "--resume")}
    resumed = read_jsonl(run / "metrics.jsonl")
    for name in ("step", "loss", "logratio", "logprob_gap"):
        figures[name] = [line[name] for line in resumed[-2:]]
        figures[f"{name}_unbroken"] = [line[name] for line in unbroken[-2:]]
    assert figures["step"] == figures["step_unbroken"] == [3, 4], figures
    for loss, unbroken_loss in zip(figures["loss"], figures["loss_unbroken"], strict=True):
        assert abs(loss - unbroken_loss) < 0.02 * unbroken_loss, figures
    return figures


def remove(path: Path) -> None:
    """Remove what an earlier run left."""
    for found in (path, path.with_name(f"{path.name}.partial")):
        if found.is_dir():
            shutil.rmtree(found)
        else:
            found.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------
# Speed and memory


def step(work: Path) -> dict[str, Any]:
    """Train four steps of the large shape, and read where the time of a step goes.

    The run is killed then, as its checkpoint would have 18 GB.
    """
    need_vllm()
    shape = choose_large_shape()
    values = model_at(work, shape) / "values.json"
    remove(work / "speed")
    size = ("--batch-size", 32 if ON_GPU else 4, "--num-steps", 99, "--save-every", 99)
    flags = ("--values", values, "--out", work / "speed", "--eval-dataset", "none", *size)
    command = [sys.executable, "train_online.py", *map(str, flags), "--gradient-checkpointing"]
    begin = time.perf_counter()
    with subprocess.Popen(command) as process:
        metrics = []
        while process.poll() is None and len(metrics) < 4:
            time.sleep(0.2)
            if (work / "speed" / "metrics.jsonl").exists():
                metrics = read_whole_lines(work / "speed" / "metrics.jsonl")
        process.kill()
    if len(metrics) < 4:
        raise RuntimeError(f"train_online.py ended with {process.returncode}, see the log")
    figures = {"shape": shape if ON_GPU else "tiny", "seconds": time.perf_counter() - begin}
    for name in metrics[0]:
        if name.startswith("seconds_") or name in ("peak_gib", "response_tokens"):
            # The first step warms up.
            figures[name] = statistics.median(line[name] for line in metrics[1:4])
    remove(work / "speed")
    return figures


class Trainer(NamedTuple):
    """What stage 2 trains with, without its engine."""

    policy: Policy
    ref: Policy
    optimizer: torch.optim.Optimizer


def load_trainer(folder: Path) -> Trainer:
    """Load the models of a run, as stage 2 does."""
    start_process_group()
    mesh = policy.make_mesh()
    trained = policy.load_policy(folder, mesh, torch.float32, gradient_checkpointing=True)
    ref = policy.load_policy(folder, mesh, COMPUTE_DTYPE)
    ref.requires_grad_(False)
    return Trainer(trained, ref, torch.optim.AdamW(trained.parameters(), 1e-6, fused=True))


def mfu(work: Path) -> dict[str, Any]:
    """Time the update of the large shape, and compare it with what the GPU can do.

    A forward and a backward pass are three forward passes of useful work. What checkpointing
    computes again does not count.
    """
    shape = choose_large_shape()
    trainer = load_trainer(model_at(work, shape))
    responses = make_up_responses(made_up_prompts(32 if ON_GPU else 4), 1, 2 * MAX_TOKENS)
    batches = policy.make_micro_batches(responses, 1.0, 8192)
    policy.add_ref_logp(trainer.ref, [batches])
    loss = train_online.a_star_po(1e-3).loss
    seconds: dict[str, float] = {}
    times = []
    for _ in range(4):
        with train_online.timed(seconds, "update"):
            train_online.update(trainer.policy, trainer.optimizer, [batches], loss)
        times.append(seconds["update"])
    flops = 3 * forward_flops(trainer.policy.lm, responses)
    per_second = flops / statistics.median(times[1:])
    figures = {
        "shape": shape if ON_GPU else "tiny",
        "seconds_update": statistics.median(times[1:]),
        "teraflops": per_second / 1e12,
        "mfu": "skipped: needs a GPU",
        "peak_gib": train_online.used_memory(),
    }
    if ON_GPU:
        name = torch.cuda.get_device_name()
        figures["mfu"] = f"unknown for {name}"
        for known, fastest in FASTEST.items():
            if known in name:
                figures["mfu"] = per_second / fastest
    return figures


def methods(work: Path) -> dict[str, Any]:
    """Time a step of A*-PO, GRPO, REBEL and PPO for the same prompts, and see its memory.

    Without vllm, responses are made up, and the seconds are those of the trainer alone.
    """
    folder = model_at(work, "qwen2.5-0.5b")
    llm = None if MISSING else started_engine(folder, sleep_mode=False)
    trainer = load_trainer(folder)
    prompts = made_up_prompts(32 if ON_GPU else 4)
    figures = {"generates": llm is not None, "prompts": len(prompts)}
    for name in ("a_star_po", "grpo", "rebel", "ppo"):
        number = 1 if name == "a_star_po" else baselines.METHODS[name].samples_per_prompt
        algorithm = make_algorithm(name, folder)
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            responses = one_step(trainer, algorithm, llm, prompts, number)
            torch.get_device_module(DEVICE).synchronize()
            times.append(time.perf_counter() - begin)
        figures[name] = {
            "responses": len(responses),
            "seconds": statistics.median(times[1:]),
            "peak_gib": train_online.used_memory(),
        }
        # The next method starts with an empty allocator, and without PPO's critic.
        del algorithm
        gc.collect()
        torch.cuda.empty_cache()
    return figures


def make_algorithm(name: str, folder: Path) -> train_online.Algorithm:
    """Make what the training loop needs of a method."""
    if name == "a_star_po":
        return train_online.a_star_po(1e-3)
    # From the parser itself, so that the arguments are those of a real run.
    flags = ("--method", name, "--values", "unused", "--gradient-checkpointing")
    args = baselines.make_parser().parse_args(flags)
    baselines.check_method(args)
    # PPO's critic starts as the reference.
    values = types.SimpleNamespace(header={"model": str(folder)})
    data = types.SimpleNamespace(values=values)
    return baselines.METHODS[name].make(args, data)


def one_step(
    trainer: Trainer,
    algorithm: train_online.Algorithm,
    llm: Any,
    prompts: list[Prompt],
    num_samples: int,
) -> list[Response]:
    """Do the parts of a step that take time or memory; return its responses."""
    responses = make_up_responses(prompts, num_samples, MAX_TOKENS)
    if llm is not None:
        requests = [Request(r.prompt, r.sample, seed=r.index) for r in responses]
        for response in engine.generate(llm, requests, 1.0, MAX_TOKENS):
            responses[response.index].ids = response.ids
    if algorithm.credit is not None:
        algorithm.credit(responses)
    updates: list[list[MicroBatch]] = []
    half = len(responses) // 2
    for part in (responses[:half], responses[half:]):
        updates.append(policy.make_micro_batches(part, 1.0, 8192, algorithm.group_size))
    policy.add_ref_logp(trainer.ref, updates)
    if algorithm.prepare is not None:
        algorithm.prepare(trainer.policy, updates)
    train_online.update(trainer.policy, trainer.optimizer, updates, algorithm.loss)
    if llm is not None:
        trainer.policy.load_into(llm)
    return responses
