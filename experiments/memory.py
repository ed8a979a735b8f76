"""Simulate the peak memory of a GPU while training, without owning one.

Question: on how many 80 GB GPUs can Qwen2.5 of 0.5B to 32B be trained?
Command:  python -m experiments.memory
          python -m experiments.memory --shapes 7b --gpus 8 --tokens 16384 --offload-ref
Time:     3 minutes on 2 cores.
Output:   memory.txt and memory.json in experiments/results.
Answer:   up to 3B on one, 7B on four, 14B on eight. 32B fits on none, since the weights are sharded
          inside one machine only. All this is with --gradient-checkpointing.

A micro-batch goes forward and backward through the trainer's own code (apo.policy) at true depth.
Its tensors have shapes but no storage (FakeTensorMode), and its process group sends nothing.
torch's FSDPMemTracker adds up what is alive. The master weights are float32 shards, computation is
in bf16, and gradients are reduced in float32. The gradients of an earlier micro-batch are there
already. All tokens are response tokens, which is the most that the head can cost.

Added by hand, for each parameter: AdamW's two float32 moments (8 bytes, sharded; the tracker
miscounts the optimizer's step), the bf16 reference (2 bytes, sharded; none with --offload-ref) and
the engine's bf16 weights (2 bytes, on every GPU). The engine's KV cache is released while the
trainer works. The second table says how many tokens of it fit while the engine samples, at most.

Where the code for GPUs differs from that for CPUs, the simulation takes the former. Machines beyond
the first hold replicas. They save nothing and may need up to 4 bytes more for each parameter of a
shard, since torch holds each layer's reduced gradient until the backward pass ends.

Not counted: fragmentation of the allocator, the CUDA context, buffers of NCCL, workspaces of
kernels, the engine's CUDA graphs and activations, and the short moments in which weights go to the
engine or to a checkpoint. An 80 GB card counts as 80e9 bytes (74.5 GiB) where an H100 shows 79.6:
the difference is for these. The check at the end compares the simulation with a real run on a CPU.
"""

import argparse
import contextlib
import multiprocessing
import os
import resource
import shlex
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen2Config

from apo import command_line, policy
from apo.files import UserError, write_json, write_text

GPUS_PER_MACHINE = 8
CARD = 80e9  # bytes
GIB = 2**30
SEQUENCE = 1024  # tokens of each packed sequence


class Shape(NamedTuple):
    """What decides the size of a Qwen2 model; the fields are those of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool


# As published.
SHAPES = {
    "qwen2.5-0.5b": Shape(896, 4864, 24, 14, 2, 151_936, True),
    "qwen2.5-1.5b": Shape(1536, 8960, 28, 12, 2, 151_936, True),
    "qwen2.5-3b": Shape(2048, 11_008, 36, 16, 2, 151_936, True),
    "qwen2.5-7b": Shape(3584, 18_944, 28, 28, 4, 152_064, False),
    "qwen2.5-14b": Shape(5120, 13_824, 48, 40, 8, 152_064, False),
    "qwen2.5-32b": Shape(5120, 27_648, 64, 40, 8, 152_064, False),
}


def full_name(name: str) -> str:
    """Return the key in SHAPES of "qwen2.5-7b" or just "7b"; UserError if there is none."""
    for known in SHAPES:
        if name.lower() in (known, known.removeprefix("qwen2.5-")):
            return known
    raise UserError(f"there is no shape {name}: choose from {', '.join(SHAPES)}")


def make_config(name: str, **changes: int) -> Qwen2Config:
    """Make the config of a shape, with changes such as num_hidden_layers=2."""
    shape = SHAPES[full_name(name)]._replace(**changes)
    return Qwen2Config(**shape._asdict())


def count_parameters(config: Qwen2Config) -> int:
    """Count the parameters; a head that is tied to the embedding counts once."""
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in lm.parameters())


def make_policy(config: Qwen2Config, mesh: DeviceMesh, checkpointing: bool) -> policy.Policy:
    """Shard a float32 policy of random weights, with the gradients of an earlier micro-batch."""
    AttentionInterface.register("packed", policy.packed_attention)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="packed")
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    model = policy.Policy(lm)
    policy.shard([*lm.base_model.layers, model], mesh)
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def make_inputs(num_tokens: int) -> dict[str, Any]:
    """Pack sequences of SEQUENCE tokens. Each has one prompt token, and is all response."""
    responses = []
    for start in range(0, num_tokens, SEQUENCE):
        length = min(SEQUENCE, num_tokens - start)
        responses.append([0] * length)
    inputs, _ = policy.pack([[0]] * len(responses), responses)
    inputs["temperature"] = 1.0
    return inputs


# ---------------------------------------------------------------------------------------------
# The simulation


class PeakTracker(FSDPMemTracker):
    """FSDPMemTracker without the peak of every module, whose cost is quadratic in depth."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        for device, now in self._curr_mem_snap.items():
            if self._peak_mem.get(device, 0) < now["Total"]:
                self._peak_mem[device] = now["Total"]
                self._peak_mem_snap[device] = dict(now)


@contextlib.contextmanager
def fake_mesh(num_gpus: int) -> Iterator[DeviceMesh]:
    """Make the trainer's mesh over GPUs that do not exist; there must be no process group yet."""
    per_machine = min(num_gpus, GPUS_PER_MACHINE)
    dist.init_process_group("fake", rank=0, world_size=num_gpus, store=FakeStore())
    try:
        with mock.patch.dict(os.environ, LOCAL_WORLD_SIZE=str(per_machine)):
            yield policy.make_mesh()
    finally:
        dist.destroy_process_group()


def simulate(
    name: str,
    num_gpus: int,
    num_tokens: int = 8192,
    checkpointing: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    **changes: int,
) -> int:
    """Return the peak bytes of one GPU in a forward and backward pass.

    These are weights, gradients, activations and buffers, without AdamW, reference and engine.
    """
    with contextlib.ExitStack() as stack:
        # There is no GPU, but tensors that claim to be on one make the code take its branches.
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cuda", True))
        stack.enter_context(mock.patch.object(policy, "COMPUTE_DTYPE", compute_dtype))
        on_gpu = compute_dtype != torch.float32
        stack.enter_context(mock.patch.object(policy, "ON_GPU", on_gpu))
        mesh = stack.enter_context(fake_mesh(num_gpus))
        stack.enter_context(FakeTensorMode())
        model = make_policy(make_config(name, **changes), mesh, checkpointing)
        inputs = make_inputs(num_tokens)
        tracker = PeakTracker(model)
        tracker.track_inputs((inputs,))
        with tracker:
            model(**inputs).mean().backward()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


class Case(NamedTuple):
    """One training set-up, and where the memory of each of its GPUs goes, in GiB."""

    shape: str
    parameters: int
    gpus: int
    tokens: int  # of a micro-batch
    checkpointing: bool
    trainer_gib: float  # simulated: weights, gradients, activations, buffers
    adamw_gib: float
    ref_gib: float
    engine_gib: float
    peak_gib: float
    fits: bool
    kv_tokens: int  # how many tokens of KV cache (bf16, all layers) fit while the engine samples


def make_case(
    name: str,
    num_gpus: int,
    num_tokens: int,
    checkpointing: bool,
    trainer: int,
    offload_ref: bool,
    tensor_parallel: int,
) -> Case:
    """Add to the trainer's simulated peak, in bytes, what is known without a simulation."""
    config = make_config(name)
    num_shards = min(num_gpus, GPUS_PER_MACHINE)
    count = count_parameters(config)
    weights = 4 * count / num_shards
    adamw = 8 * count / num_shards
    ref = 0 if offload_ref else 2 * count / num_shards
    engine = 2 * count / tensor_parallel
    peak = trainer + adamw + ref + engine

    # While the engine samples, there are no gradients and no activations.
    room = CARD - weights - adamw - ref - engine
    head_size = config.hidden_size // config.num_attention_heads
    keys_per_token = config.num_hidden_layers * config.num_key_value_heads * head_size
    bytes_per_token = 2 * 2 * keys_per_token  # keys and values, 2 bytes each
    kv_tokens = max(0, int(room * tensor_parallel / bytes_per_token))
    return Case(
        shape=name,
        parameters=count,
        gpus=num_gpus,
        tokens=num_tokens,
        checkpointing=checkpointing,
        trainer_gib=trainer / GIB,
        adamw_gib=adamw / GIB,
        ref_gib=ref / GIB,
        engine_gib=engine / GIB,
        peak_gib=peak / GIB,
        fits=peak <= CARD,
        kv_tokens=kv_tokens,
    )


def simulate_all(args: argparse.Namespace) -> list[Case]:
    """Simulate every shape on every number of GPUs, and once without checkpointing."""
    wanted = []
    for name in args.shapes:
        wanted += [(name, num_gpus, True) for num_gpus in args.gpus]
        wanted.append((name, detailed_gpus(args.gpus), False))
    cases = []
    simulated = {}
    for name, num_gpus, checkpointing in wanted:
        # A third replica changes no byte of a GPU, so two stand for all (a test shows it).
        key = (name, min(num_gpus, 2 * GPUS_PER_MACHINE), checkpointing)
        if key not in simulated:
            start = time.perf_counter()
            simulated[key] = simulate(key[0], key[1], args.tokens, checkpointing)
            seconds = time.perf_counter() - start
            print(f"{key}: {simulated[key] / GIB:.2f} GiB, {seconds:.0f} s", file=sys.stderr)
        case = make_case(
            name,
            num_gpus,
            args.tokens,
            checkpointing,
            simulated[key],
            args.offload_ref,
            args.tensor_parallel_size,
        )
        cases.append(case)
    return cases


def detailed_gpus(gpus: list[int]) -> int:
    """Choose the number of GPUs whose parts are shown: a whole machine, if it is asked for."""
    return max((n for n in gpus if n <= GPUS_PER_MACHINE), default=gpus[0])


# ---------------------------------------------------------------------------------------------
# The check: a real model on the CPU

CHECKED = "qwen2.5-0.5b"
CHECKED_LAYERS = 4
CHECKED_TOKENS = 1024


class Check(NamedTuple):
    """The simulated and the measured peak of a small model."""

    checkpointing: bool
    simulated_gib: float
    measured_gib: float
    ratio: float


def resident_bytes() -> int:
    """Return the bytes of this process that are in memory now."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def measure(checkpointing: bool) -> int:
    """Return the peak bytes that a real micro-batch and AdamW add to this process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    # What the libraries take once is not the model's, so a tiny model goes first.
    tiny = make_policy(make_config(CHECKED, vocab_size=64, num_hidden_layers=1), mesh, True)
    tiny(**make_inputs(64)).mean().backward()
    del tiny
    before = resident_bytes()
    config = make_config(CHECKED, num_hidden_layers=CHECKED_LAYERS)
    model = make_policy(config, mesh, checkpointing)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer.step()
    model(**make_inputs(CHECKED_TOKENS)).mean().backward()
    dist.destroy_process_group()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def check_simulation() -> list[Check]:
    """Compare simulated and measured peaks of a small float32 model on one CPU rank."""
    checks = []
    config = make_config(CHECKED, num_hidden_layers=CHECKED_LAYERS)
    adamw = 8 * count_parameters(config)
    for checkpointing in (True, False):
        trainer = simulate(
            CHECKED,
            1,
            CHECKED_TOKENS,
            checkpointing,
            torch.float32,
            num_hidden_layers=CHECKED_LAYERS,
        )
        simulated = trainer + adamw
        # In a process of its own, since its peak is of its whole life.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            measured = pool.submit(measure, checkpointing).result()
        checks.append(Check(checkpointing, simulated / GIB, measured / GIB, simulated / measured))
    return checks


# ---------------------------------------------------------------------------------------------
# Tables


def format_table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lay out a markdown table, numbers to the right."""
    alignment = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in [head, alignment, *rows]]


def format_peak(case: Case) -> str:
    """Write a peak; one that does not fit the card is marked."""
    mark = "" if case.fits else "✗ "
    return f"{mark}{case.peak_gib:.1f}"


def format_cache(case: Case) -> str:
    """Write the tokens of KV cache, in thousands."""
    return f"{case.kv_tokens / 1e3:,.0f}k" if case.fits else "✗"


def format_parts(case: Case, without_checkpointing: Case) -> list[str]:
    """Write the parts of a peak, as the third table has them."""
    states = 16 * case.parameters / min(case.gpus, GPUS_PER_MACHINE) / GIB
    rest = case.trainer_gib + case.adamw_gib - states
    numbers = [case.parameters / 1e9, states, case.ref_gib, case.engine_gib, rest]
    cells = [f"{number:.2f}" for number in numbers]
    return [case.shape, *cells, format_peak(case), format_peak(without_checkpointing)]


def describe(cases: list[Case], args: argparse.Namespace) -> list[str]:
    """Write three tables: peaks, KV caches, and the parts of a peak."""
    peaks = []
    caches = []
    parts = []
    detailed = detailed_gpus(args.gpus)
    for name in args.shapes:
        of_shape = [case for case in cases if case.shape == name]
        row = [case for case in of_shape if case.checkpointing]
        (plain,) = [case for case in of_shape if not case.checkpointing]
        peaks.append([name, *map(format_peak, row)])
        caches.append([name, *map(format_cache, row)])
        for case in row:
            if case.gpus == detailed:
                parts.append(format_parts(case, plain))
    head = ["model", *map(str, args.gpus)]
    title = f"GiB of each GPU, simulated, {args.tokens:,} tokens a micro-batch"
    ref_place = "CPU" if args.offload_ref else "GPU"
    return [
        f"Peak while training, {title}, checkpointing on, engines of {args.tensor_parallel_size} "
        f"GPU, the reference on the {ref_place}",
        f"Columns: GPUs, {GPUS_PER_MACHINE} a machine. ✗: not on a card of 80 GB "
        f"({CARD / GIB:.1f} GiB)",
        "",
        *format_table(head, peaks),
        "",
        "Tokens of KV cache that fit beside it while an engine samples, thousands",
        "",
        *format_table(head, caches),
        "",
        f"The parts on {detailed} GPUs, {title}",
        "",
        *format_table(
            [
                "model",
                "parameters (10⁹)",
                "weights, gradients, AdamW",
                "reference",
                "engine",
                "activations, buffers",
                "peak",
                "peak without checkpointing",
            ],
            parts,
        ),
    ]


def describe_checks(checks: list[Check]) -> list[str]:
    """Write the table of the check."""
    rows = []
    for row in checks:
        setting = "on" if row.checkpointing else "off"
        numbers = (row.simulated_gib, row.measured_gib, row.ratio)
        rows.append([setting, *(f"{number:.2f}" for number in numbers)])
    head = ["checkpointing", "simulated GiB", "measured GiB", "simulated / measured"]
    return [
        "",
        f"The check: the simulation against a process, one CPU rank, float32, {CHECKED_LAYERS} "
        f"layers of {CHECKED}, {CHECKED_TOKENS:,} tokens, with AdamW",
        "",
        *format_table(head, rows),
    ]


# ---------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    """Read the command line; UserError for a shape or a number of GPUs that cannot be."""
    parser = command_line.new_parser(__doc__.splitlines()[0], "")
    parser.add_argument(
        "--shapes", default=",".join(SHAPES), help="models, separated by commas; 7b will do"
    )
    parser.add_argument(
        "--gpus", default="1,2,4,8,16,64", help="numbers of GPUs, separated by commas"
    )
    parser.add_argument(
        "--tokens",
        type=command_line.positive_integer,
        default=8192,
        help="tokens per forward pass and GPU",
    )
    parser.add_argument("--offload-ref", action="store_true", help="the reference in CPU memory")
    parser.add_argument(
        "--tensor-parallel-size",
        type=command_line.positive_integer,
        default=1,
        help="GPUs per engine",
    )
    parser.add_argument("--no-check", action="store_true", help="leave out the run on the CPU")
    parser.add_argument("--out", type=Path, default=Path("experiments/results"), help="folder")
    args = parser.parse_args()
    try:
        args.gpus = [int(number) for number in args.gpus.split(",")]
    except ValueError as error:
        raise UserError(f"--gpus {args.gpus} is not a list of numbers") from error
    for number in args.gpus:
        if number < 1 or (number > GPUS_PER_MACHINE and number % GPUS_PER_MACHINE != 0):
            raise UserError(f"{number} GPUs are not whole machines of {GPUS_PER_MACHINE}")
    args.shapes = [full_name(name) for name in args.shapes.split(",")]
    return args


def main() -> None:
    """Simulate, check, print, and keep the log and the numbers."""
    args = parse_args()
    start = time.perf_counter()
    cases = simulate_all(args)
    checks = [] if args.no_check else check_simulation()
    command = shlex.join(["python", "-m", "experiments.memory", *sys.argv[1:]])
    log = [f"$ {command}", "", *describe(cases, args)]
    if checks:
        log += describe_checks(checks)
    seconds = time.perf_counter() - start
    cpu_seconds = sum(os.times()[:4])
    log += [
        "",
        f"torch {torch.__version__}; {seconds:.0f} s on {os.cpu_count()} shared cores, "
        f"{cpu_seconds:.0f} s of CPU time",
    ]
    print("\n".join(log))
    data = {
        "command": command,
        "card_gib": CARD / GIB,
        "cases": [case._asdict() for case in cases],
        "check": [row._asdict() for row in checks],
    }
    write_text(args.out / "memory.txt", "\n".join(log) + "\n")
    write_json(args.out / "memory.json", data)


if __name__ == "__main__":
    command_line.run(main)
