"""Peak memory of a GPU, simulated: Qwen2.5 of 0.5B to 32B on 1 to 64 GPUs, without owning one.

    python -m experiments.memory               # about four minutes of CPU time, true depths
    python -m experiments.memory --shapes 7b --gpus 8 --tokens 16384 --offload-ref

How. A micro-batch goes forward and backward through the trainer's own code (train_online.shard and
Policy, losses.token_logprob) at true depth, with tensors that have a shape and no storage
(FakeTensorMode) and a process group that sends nothing, while torch's FSDPMemTracker adds up what
is alive. The master weights are float32 shards, computation is bf16, gradients meet in float32; the
gradient shards of an earlier micro-batch are there already. All tokens lie in one packed row, and
every one of them is a response token: the most that the head can cost.

Added by hand: AdamW's two float32 moments (8 bytes a parameter; the tracker miscounts the
optimiser's step), the frozen bf16 reference (2 bytes, sharded as the policy; none with
--offload-ref) and the engine's bf16 weights (2 bytes, whole on every GPU at tensor parallel 1). The
engine's KV cache is released while the trainer works; a table of its own says how many tokens of it
fit while the engine samples, at most (--gpu-memory-utilization sets what the engine really takes).

Where the GPU's path differs from the CPU's, the simulation takes the GPU's: attention is the op
behind varlen_attn (its shape function: the output, and a float32 normaliser for each token and
head; neither padding nor a (T, T) mask), and the head multiplies bf16 into float32 without copies.
More than NODE GPUs are replicas of a sharded node. They save nothing and may need up to 4 bytes for
each parameter of a shard more: torch holds each layer's reduced gradient until backward ends.

Not in it: fragmentation of the allocator, CUDA context and NCCL buffers, workspaces of kernels, the
engine's CUDA graphs and activations, the short moments when weights go to the engine or to a
checkpoint. An 80 GB card is taken as 80e9 bytes, 74.5 GiB, where an H100 shows 79.6: the rest is
for these. The check at the end runs a small model for real on the CPU.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen2Config

import losses
import problems
import train_online

FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "vocab_size", "tie_word_embeddings")  # fmt: skip
SHAPES = {  # the published config.json's
    "qwen2.5-0.5b": dict(zip(FIELDS, (896, 4864, 24, 14, 2, 151_936, True), strict=True)),
    "qwen2.5-1.5b": dict(zip(FIELDS, (1536, 8960, 28, 12, 2, 151_936, True), strict=True)),
    "qwen2.5-3b": dict(zip(FIELDS, (2048, 11_008, 36, 16, 2, 151_936, True), strict=True)),
    "qwen2.5-7b": dict(zip(FIELDS, (3584, 18_944, 28, 28, 4, 152_064, False), strict=True)),
    "qwen2.5-14b": dict(zip(FIELDS, (5120, 13_824, 48, 40, 8, 152_064, False), strict=True)),
    "qwen2.5-32b": dict(zip(FIELDS, (5120, 27_648, 64, 40, 8, 152_064, False), strict=True)),
}
NODE = 8  # GPUs of a node: the trainer shards inside it and replicates across
CARD, GIB = 80e9, 2**30
SEQUENCE = 1024  # tokens of each sequence of the packed row


# ---------------------------------------------------------------------------------------------
# The model


def full_name(name: str) -> str:
    """The key in SHAPES of "qwen2.5-7b" or just "7b"; UserError where there is none."""
    for known in SHAPES:
        if name.lower() in (known, known.removeprefix("qwen2.5-")):
            return known
    raise problems.UserError(f"no shape {name}: choose from {', '.join(SHAPES)}")


def config(name: str, **changes: Any) -> Qwen2Config:
    """The configuration of a shape, with changes such as num_hidden_layers=2."""
    return Qwen2Config(**SHAPES[full_name(name)] | changes)


def num_parameters(shape: Qwen2Config) -> int:
    """Count the parameters, a head tied to the embedding once."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(shape).parameters())


def build(
    shape: Qwen2Config, mesh: DeviceMesh, compute: torch.dtype, checkpointing: bool
) -> train_online.Policy:
    """Shard a float32 policy, with a gradient already there, as in all micro-batches but one."""
    AttentionInterface.register("packed", losses.packed_attention)
    options = {"dtype": torch.float32, "attn_implementation": "packed"}
    lm = AutoModelForCausalLM.from_config(shape, **options)
    policy = train_online.shard(lm, mesh, compute)
    if checkpointing:
        policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    for shard in policy.parameters():
        shard.grad = torch.zeros_like(shard)
    return policy


def micro_batch(tokens: int) -> dict[str, Any]:
    """Pack sequences of SEQUENCE tokens, all of them predicted from one of the prompt."""
    sizes = [min(SEQUENCE, tokens - start) for start in range(0, tokens, SEQUENCE)]
    inputs, _ = losses.pack([[0]] * len(sizes), [[0] * size for size in sizes])
    return inputs | {"temperature": 1.0}


# ---------------------------------------------------------------------------------------------
# The simulation


class PeakTracker(FSDPMemTracker):
    """FSDPMemTracker without the peak of every module, whose cost is quadratic in depth."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, now in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < now["Total"]:
                self._peak_mem[device], self._peak_mem_snap[device] = now["Total"], dict(now)


@contextlib.contextmanager
def fake_mesh(gpus: int) -> Iterator[DeviceMesh]:
    """The trainer's mesh over GPUs that do not exist; the process must have no group yet."""
    shape = (gpus // NODE, NODE) if gpus > NODE else (gpus,)
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        names = ("replicate", "shard")[-len(shape) :]
        yield init_device_mesh("cpu", shape, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def simulate(
    name: str, gpus: int, tokens: int = 8192, checkpointing: bool = True,
    compute: torch.dtype = torch.bfloat16, **changes: Any,
) -> int:  # fmt: skip
    """Peak bytes of one GPU in forward and backward: weights, gradients, activations, buffers.

    Without AdamW, reference and engine. `changes` are to the shape, such as num_hidden_layers=2.
    """
    # There is no GPU to put them on, but tensors that claim to be there take the GPU's branches.
    claim = mock.patch.object(torch.Tensor, "is_cuda", True)
    with fake_mesh(gpus) as mesh, claim, FakeTensorMode():
        shape = config(name, **changes)
        policy = build(shape, mesh, compute, checkpointing)
        inputs = micro_batch(tokens)
        tracker = PeakTracker(policy)
        tracker.track_inputs((inputs,))
        with tracker:
            policy(**inputs).mean().backward()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def account(
    name: str, gpus: int, trainer: int, offload_ref: bool, tensor_parallel: int
) -> dict[str, Any]:
    """Add to the trainer's simulated peak what is known without a simulation; GiB of one GPU.

    `kv_tokens` is how many tokens' keys and values (bf16, all layers) an engine has room for while
    it samples: then there are no gradients and no activations. Negative room is 0.
    """
    shape, parts = config(name), min(gpus, NODE)
    count = num_parameters(shape)
    adamw, ref = 8 * count / parts, 0 if offload_ref else 2 * count / parts
    engine = 2 * count / tensor_parallel
    head_size = shape.hidden_size // shape.num_attention_heads
    kv_token = 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * head_size
    room = CARD - 4 * count / parts - adamw - ref - engine
    peak = trainer + adamw + ref + engine
    cell = {"shape": name, "parameters": count, "gpus": gpus, "simulated": True}
    cell |= {"trainer_gib": trainer / GIB, "adamw_gib": adamw / GIB, "ref_gib": ref / GIB}
    cell |= {"engine_gib": engine / GIB, "peak_gib": peak / GIB, "fits": peak <= CARD}
    return cell | {"kv_tokens": max(0, int(room * tensor_parallel / kv_token))}


# ---------------------------------------------------------------------------------------------
# The check: a real model on the CPU

CHECK = {"name": "qwen2.5-0.5b", "tokens": 1024, "num_hidden_layers": 4}


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(checkpointing: bool) -> int:
    """Peak bytes that a real micro-batch, beside AdamW's moments, adds to this process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    options = (mesh, torch.float32, checkpointing)
    small = build(config("0.5b", vocab_size=64, num_hidden_layers=1), *options)
    small(**micro_batch(64)).mean().backward()  # what the libraries take, once, is not the model's
    del small
    before = resident()
    shape = config(CHECK["name"], num_hidden_layers=CHECK["num_hidden_layers"])
    policy = build(shape, *options)
    optimizer = torch.optim.AdamW(policy.parameters(), fused=True)
    optimizer.step()
    policy(**micro_batch(CHECK["tokens"])).mean().backward()
    dist.destroy_process_group()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def check() -> list[dict[str, Any]]:
    """Compare simulated and measured peaks of a small float32 model on one CPU rank."""
    rows = []
    for checkpointing in (True, False):
        case = CHECK | {"checkpointing": checkpointing, "compute": torch.float32}
        shape = config(CHECK["name"], num_hidden_layers=CHECK["num_hidden_layers"])
        simulated = simulate(gpus=1, **case) + 8 * num_parameters(shape)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            measured = pool.submit(measure, checkpointing).result()
        row = {"simulated_gib": simulated / GIB, "measured_gib": measured / GIB}
        row |= {"ratio": simulated / measured, "checkpointing": checkpointing} | CHECK
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------
# Tables


def cells(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Simulate every shape on every number of GPUs, and once without checkpointing (`detail`).

    A third replica changes no byte of a GPU (a test compares 16 with 64): two stand for all.
    Progress goes to stderr.
    """
    found, simulated = [], {}
    cases = [(name, gpus, True) for name in args.shapes for gpus in args.gpus]
    for name, gpus, on in cases + [(name, detail(args), False) for name in args.shapes]:
        start, case = time.perf_counter(), (name, min(gpus, 2 * NODE), on)
        if case not in simulated:
            simulated[case] = simulate(name, case[1], args.tokens, on)
            seconds = time.perf_counter() - start
            print(f"{case}: {simulated[case] / GIB:.2f} GiB, {seconds:.0f} s", file=sys.stderr)
        cell = account(name, gpus, simulated[case], args.offload_ref, args.tensor_parallel_size)
        found.append(cell | {"checkpointing": on, "tokens": args.tokens})
    return found


def detail(args: argparse.Namespace) -> int:
    """How many GPUs the table of parts is for: one node's, if it is asked for."""
    return max((n for n in args.gpus if n <= NODE), default=args.gpus[0])


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a markdown table, numbers to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def gib(cell: dict[str, Any]) -> str:
    """A cell's peak; what does not fit the card is marked."""
    return f"{'' if cell['fits'] else '✗ '}{cell['peak_gib']:.1f}"


def tables(found: list[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    """Three tables: peaks by GPUs, tokens of KV cache by GPUs, and the parts of a peak."""
    on = {(c["shape"], c["gpus"]): c for c in found if c["checkpointing"]}
    off = {c["shape"]: c for c in found if not c["checkpointing"]}
    head, peaks, caches, parts = ["model", *map(str, args.gpus)], [], [], []
    for name in args.shapes:
        row, cell = [on[name, gpus] for gpus in args.gpus], on[name, detail(args)]
        peaks.append([name, *map(gib, row)])
        caches.append([name, *(f"{c['kv_tokens'] / 1e3:,.0f}k" if c["fits"] else "✗" for c in row)])
        states = 16 * cell["parameters"] / min(cell["gpus"], NODE) / GIB
        rest = cell["trainer_gib"] + cell["adamw_gib"] - states
        numbers = [cell["parameters"] / 1e9, states, cell["ref_gib"], cell["engine_gib"], rest]
        parts.append([name, *(f"{x:.2f}" for x in numbers), gib(cell), gib(off[name])])
    title = f"GiB of each GPU, simulated, {args.tokens:,} tokens a micro-batch"
    lines = [f"Peak while training, {title}, checkpointing on, engines of"]
    lines[0] += f" {args.tensor_parallel_size} GPU, the reference on the "
    lines[0] += "CPU" if args.offload_ref else "GPU"
    lines += [f"Columns: GPUs, {NODE} a node. ✗: not on a card of 80 GB ({CARD / GIB:.1f} GiB)", ""]
    lines += [*markdown(head, peaks), ""]
    lines += ["Tokens of KV cache that fit beside it while an engine samples, thousands", ""]
    lines += [*markdown(head, caches), "", f"The parts on {detail(args)} GPUs, {title}", ""]
    head = ["model", "parameters (10⁹)", "weights, gradients, AdamW", "reference", "engine"]
    head += ["activations, buffers", "peak", "peak without checkpointing"]
    return lines + markdown(head, parts)


def report(rows: list[dict[str, Any]]) -> list[str]:
    """Lines for the check."""
    lines = ["The check: simulated against measured (rise of the resident set of a process), one"]
    lines += [f"CPU rank, float32, {CHECK['num_hidden_layers']} layers of {CHECK['name']},"]
    lines[-1] += f" {CHECK['tokens']:,} tokens, AdamW's moments included"
    head = ["checkpointing", "simulated GiB", "measured GiB", "simulated / measured"]
    numbers = ("simulated_gib", "measured_gib", "ratio")
    body = [
        ["on" if r["checkpointing"] else "off", *(f"{r[n]:.2f}" for n in numbers)] for r in rows
    ]
    return [*lines, "", *markdown(head, body)]


def parse_args() -> argparse.Namespace:
    """Read the command line; UserError for a shape or a number of GPUs that cannot be."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=style)
    add = parser.add_argument
    add("--shapes", default=",".join(SHAPES), help="models, separated by commas; 7b will do")
    add("--gpus", default="1,2,4,8,16,64", help="numbers of GPUs, separated by commas")
    add("--tokens", type=int, default=8192, help="tokens per forward and GPU")
    add("--offload-ref", action="store_true", help="pi_ref in CPU memory: 0 on the GPU")
    add("--tensor-parallel-size", type=int, default=1, help="GPUs per engine")
    add("--no-check", action="store_true", help="leave out the real run on the CPU")
    add("--out", type=Path, default=Path("experiments/results"), help="folder")
    args = parser.parse_args()
    with problems.explain(f"--gpus {args.gpus} is not a list of numbers"):
        args.gpus = [int(number) for number in args.gpus.split(",")]
    if wrong := [n for n in args.gpus if n < 1 or (n > NODE and n % NODE)]:
        raise problems.UserError(f"{wrong[0]} GPUs are not whole nodes of {NODE}")
    if args.tokens < 1 or args.tensor_parallel_size < 1:
        raise problems.UserError("--tokens and --tensor-parallel-size must be at least 1")
    args.shapes = [full_name(name) for name in args.shapes.split(",")]
    return args


def main() -> None:
    """Simulate, check, print, and keep the log and the numbers."""
    args, start = parse_args(), time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    found = cells(args)
    rows = [] if args.no_check else check()
    log = [f"$ python -m experiments.memory {' '.join(sys.argv[1:])}".rstrip(), ""]
    log += [*tables(found, args), "", *(report(rows) if rows else [])]
    seconds = f"{time.perf_counter() - start:.0f} s on {os.cpu_count()} shared cores"
    log += ["", f"torch {torch.__version__}; {seconds}, {sum(os.times()[:4]):.0f} s of CPU time"]
    print("\n".join(log))
    data = {"command": log[0][2:], "card_gib": CARD / GIB, "cells": found, "check": rows}
    problems.write_whole(args.out / "memory.txt", "\n".join(log) + "\n")
    problems.write_whole(args.out / "memory.json", json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    problems.run(main)
