"""Simulate the peak memory of a GPU in stage 2, without owning one.

Question: on which cards can Qwen2.5 of 0.5B to 32B be trained, and with which flags?
Command:  python -m experiments.memory
          python -m experiments.memory --shapes 7b --gpus 8 --card 48 --gradient-checkpointing
          with --shapes: one set-up, with any flags of train_online.py.
Time:     6 minutes on 2 cores, 20 beside other work.
Output:   memory.txt and memory.json in experiments/results.
Answer:   on one 80 GB GPU up to 3B, 7B on four, 14B on eight with --offload-ref, all with
          --gradient-checkpointing. With all weights 32B fits on no machine of eight, and more
          machines do not help, since weights are sharded inside one machine only. Smaller
          cards: docs/hardware.md.

A micro-batch goes forward and backward through the trainer's own code (apo.policy) at true depth.
Its tensors have shapes but no storage (FakeTensorMode), and its process group sends nothing.
torch's FSDPMemTracker adds up what is alive. The master weights are float32 shards, computation is
in bf16, and gradients are reduced in float32. The gradients of an earlier micro-batch are there
already. All tokens are response tokens, which is the most that the head can cost.

The rest is arithmetic, by the same code with which stage 2 plans (apo/memory_budget.py): AdamW's
moments, the reference, the engine's weights, its cache, and a reserve for what nothing here counts.
(The tracker miscounts the optimizer's step.) The last column compares that plan, which computes the
activations by a formula, with the simulation.

Where the code for GPUs differs from that for CPUs, the simulation takes the former. Machines beyond
the first hold replicas. They save nothing and may need up to 4 bytes more for each parameter of a
shard, since torch holds each layer's reduced gradient until the backward pass ends.

Not simulated: fragmentation of the allocator, the CUDA context, buffers of NCCL, workspaces of
kernels, the engine's CUDA graphs and activations, and the short moments in which weights go to the
engine or to a checkpoint. A card of 80 GB counts as 80e9 bytes (74.5 GiB) where an H100 shows 79.6.
The check at the end compares the simulation with a real run on a CPU.
"""

import argparse
import contextlib
import functools
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
from transformers import AutoModelForCausalLM, Qwen2Config

import train_online
from apo import command_line, engine, lora, memory_budget, policy
from apo.files import UserError, check_writable, write_json, write_text
from apo.memory_budget import GIB, Budget

GPUS_PER_MACHINE = 8
GB = 10**9  # of which the makers of cards speak
LONGEST = 1280  # tokens of the longest prompt and response of the published run
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


def make_policy(
    config: Qwen2Config, mesh: DeviceMesh, checkpointing: bool, lora_rank: int = 0
) -> policy.Policy:
    """Shard a policy of random weights, with the gradients of an earlier micro-batch."""
    policy.register_packed_attention()
    dtype = policy.COMPUTE_DTYPE if lora_rank > 0 else torch.float32
    lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="packed")
    if checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    if lora_rank > 0:
        # peft moves each adapter to the device of its layer, where a fake one is already.
        with mock.patch.object(torch.nn.Module, "to", lambda module, *_, **__: module):
            lora.add_adapters(lm, lora_rank, seed=0)
        model = lora.LoraPolicy(lm)
    else:
        model = policy.Policy(lm)
    policy.shard([*lm.base_model.layers, model], mesh)
    model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
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
    lora_rank: int = 0,
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
        model = make_policy(make_config(name, **changes), mesh, checkpointing, lora_rank)
        inputs = make_inputs(num_tokens)
        tracker = PeakTracker(model)
        tracker.track_inputs((inputs,))
        with tracker:
            model(**inputs).mean().backward()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


class Command(NamedTuple):
    """A run of stage 2: a model, so many cards, and the flags of train_online.py."""

    shape: str
    gpus: int
    card_gb: int
    flags: str


class Case(NamedTuple):
    """A command, and where the memory of each of its GPUs goes."""

    command: Command
    parameters: int
    budget: Budget  # its activations are simulated
    computed: Budget  # as stage 2 computes and prints it

    @property
    def fits(self) -> bool:
        """Say whether a card is large enough, reserve included."""
        return self.budget.peak <= self.budget.card


# The table of peaks has these models on so many cards of 80 GB.
PEAK_SHAPES = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b", "qwen2.5-14b")
PEAK_GPUS = (1, 2, 4, 8)
# The largest model of each card: with all weights trained, and with LoRA.
PLAIN = "--gradient-checkpointing"
LORA = "--gradient-checkpointing --lora-rank 16"
CARDS = (
    Command("qwen2.5-0.5b", 1, 16, PLAIN),
    Command("qwen2.5-1.5b", 1, 16, LORA),
    Command("qwen2.5-1.5b", 8, 16, PLAIN),
    Command("qwen2.5-3b", 8, 16, LORA),
    Command("qwen2.5-0.5b", 1, 24, PLAIN),
    Command("qwen2.5-3b", 1, 24, LORA),
    Command("qwen2.5-3b", 8, 24, PLAIN),
    Command("qwen2.5-1.5b", 1, 40, PLAIN),
    Command("qwen2.5-3b", 1, 40, LORA),
    Command("qwen2.5-3b", 8, 40, PLAIN),
    Command("qwen2.5-7b", 8, 40, LORA),
    Command("qwen2.5-1.5b", 1, 48, PLAIN),
    Command("qwen2.5-7b", 1, 48, LORA),
    Command("qwen2.5-7b", 8, 48, PLAIN),
    Command("qwen2.5-3b", 1, 80, PLAIN),
    Command("qwen2.5-14b", 1, 80, LORA),
    Command("qwen2.5-1.5b", 8, 80, ""),
    Command("qwen2.5-7b", 8, 80, PLAIN),
    Command("qwen2.5-14b", 8, 80, PLAIN + " --offload-ref"),
)


@functools.cache
def simulate_once(
    name: str, num_gpus: int, num_tokens: int, checkpointing: bool, lora_rank: int
) -> int:
    """Call `simulate` once for the same arguments, and say how long it took."""
    start = time.perf_counter()
    peak = simulate(name, num_gpus, num_tokens, checkpointing, lora_rank)
    seconds = time.perf_counter() - start
    print(f"{name} {num_gpus} {num_tokens}: {peak / GIB:.2f} GiB, {seconds:.0f} s", file=sys.stderr)
    return peak


def simulate_command(command: Command) -> Case:
    """Simulate what is not arithmetic, and make the budget of a command with it."""
    args = train_online.make_parser().parse_args(shlex.split(command.flags))
    lora.check(args.lora_rank, args.offload_ref)
    per_machine = min(command.gpus, GPUS_PER_MACHINE)
    num_machines = command.gpus // per_machine
    setup = memory_budget.make_setup(args, per_machine, num_machines, LONGEST)
    size = memory_budget.model_size(make_config(command.shape))
    computed = memory_budget.make_budget(size, setup, command.card_gb * GB)
    # A third machine changes no byte of a GPU, so two stand for all (a test shows it).
    num_gpus = min(command.gpus, 2 * GPUS_PER_MACHINE)
    tokens = args.micro_batch_tokens
    peak = simulate_once(
        command.shape, num_gpus, tokens, args.gradient_checkpointing, args.lora_rank
    )
    activations = peak - computed.weights - computed.gradients
    budget = computed._replace(activations=activations)
    return Case(command, size.parameters, budget, computed)


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
            compute_dtype=torch.float32,
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
    """Write the peak while training; it is marked if the run does not fit."""
    mark = "" if case.fits else "✗ "
    return f"{mark}{case.budget.training / GIB:.1f}"


def describe_peaks(cases: dict[Command, Case]) -> list[str]:
    """Write the table of peaks: models and numbers of GPUs of 80 GB."""
    rows = []
    for name in PEAK_SHAPES:
        row = [cases[Command(name, num_gpus, 80, PLAIN)] for num_gpus in PEAK_GPUS]
        row.append(cases[Command(name, GPUS_PER_MACHINE, 80, "")])
        rows.append([name, *map(format_peak, row)])
    head = ["model", *map(str, PEAK_GPUS), f"{GPUS_PER_MACHINE}, without checkpointing"]
    return [
        "Peak while training, GiB of each GPU, simulated, 8,192 tokens a micro-batch, with "
        "checkpointing",
        f"Columns: GPUs, {GPUS_PER_MACHINE} a machine. ✗: does not fit on cards of 80 GB, with a "
        "reserve",
        "",
        *format_table(head, rows),
    ]


def describe_cases(cases: list[Case]) -> list[str]:
    """Write a row for each command, with its parts."""
    rows = []
    for case in cases:
        budget = case.budget
        states = budget.weights + budget.gradients + budget.optimizer
        parts = (states, budget.reference, budget.activations, budget.engine, budget.cache)
        numbers = (*parts, budget.training, budget.peak)
        rows.append(
            [
                f"{case.command.gpus} x {case.command.card_gb} GB",
                case.command.shape,
                case.command.flags,
                *(f"{number / GIB:.1f}" for number in numbers),
                "yes" if budget.sleep_mode else "no",
                "yes" if case.fits else "✗",
                f"{case.computed.training / budget.training:.3f}",
            ]
        )
    head = ["cards", "model", "flags", "weights, gradients, AdamW", "reference", "activations"]
    head += ["engine", "cache", "training", "peak with reserve", "sleep mode", "fits"]
    head.append("computed / simulated")
    return ["GiB of each GPU, for these flags of train_online.py", "", *format_table(head, rows)]


def describe_checks(checks: list[Check]) -> list[str]:
    """Write the table of the check, if it was made."""
    if not checks:
        return []
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


def parse_args() -> tuple[argparse.Namespace, str]:
    """Read this experiment's flags; return them, and the rest, which are train_online.py's."""
    parser = command_line.new_parser(__doc__.splitlines()[0], "")
    add = parser.add_argument
    positive_integer = command_line.positive_integer
    add("--shapes", help="models, separated by commas; 7b will do; by default all tables")
    add("--gpus", default="1", help="with --shapes: numbers of GPUs, separated by commas")
    add("--card", type=positive_integer, default=80, help="with --shapes: GB of a card")
    add("--no-check", action="store_true", help="leave out the run on the CPU")
    add("--results", type=Path, help="folder; with --shapes nothing is written unless it is given")
    args, flags = parser.parse_known_args()
    tensor_parallel_size = train_online.make_parser().parse_args(flags).tensor_parallel_size
    try:
        args.gpus = [int(number) for number in args.gpus.split(",")]
    except ValueError as error:
        raise UserError(f"--gpus {args.gpus} is not a list of numbers") from error
    for number in args.gpus:
        if number < 1 or (number > GPUS_PER_MACHINE and number % GPUS_PER_MACHINE != 0):
            raise UserError(f"{number} GPUs are not whole machines of {GPUS_PER_MACHINE}")
        engine.check_tensor_parallel_size(tensor_parallel_size, number)
    if args.shapes is None:
        args.results = args.results or Path("experiments/results")
    else:
        args.shapes = [full_name(name) for name in args.shapes.split(",")]
    return args, shlex.join(flags)


def main() -> None:
    """Simulate, check, print, and keep the log and the numbers."""
    args, flags = parse_args()
    if args.results is not None:
        check_writable(args.results, is_folder=True, flag="--results")
    start = time.perf_counter()
    command = shlex.join(["python", "-m", "experiments.memory", *sys.argv[1:]])
    log = [f"$ {command}", ""]
    if args.shapes is None:
        wanted = [Command(name, n, 80, PLAIN) for name in PEAK_SHAPES for n in PEAK_GPUS]
        wanted += [Command(name, GPUS_PER_MACHINE, 80, "") for name in PEAK_SHAPES]
        cases = {wish: simulate_command(wish) for wish in (*CARDS, *wanted)}
        log += describe_peaks(cases)
        log += ["", *describe_cases([cases[wish] for wish in CARDS])]
    else:
        wanted = [Command(name, n, args.card, flags) for name in args.shapes for n in args.gpus]
        cases = {wish: simulate_command(wish) for wish in wanted}
        log += describe_cases(list(cases.values()))
    checks = [] if args.no_check else check_simulation()
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
        "cases": [as_json(case) for case in cases.values()],
        "check": [row._asdict() for row in checks],
    }
    if args.results is not None:
        write_text(args.results / "memory.txt", "\n".join(log) + "\n")
        write_json(args.results / "memory.json", data)


def as_json(case: Case) -> dict[str, Any]:
    """Write a case with its budgets in bytes."""
    budget = case.budget
    return {
        **case.command._asdict(),
        "parameters": case.parameters,
        "simulated": budget._asdict() | {"training": budget.training, "peak": budget.peak},
        "computed": case.computed._asdict() | {"training": case.computed.training},
        "fits": case.fits,
    }


if __name__ == "__main__":
    command_line.run(main)
