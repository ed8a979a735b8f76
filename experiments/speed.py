"""Measure what a step costs next to its floors: the least work that could give the same result.

Question: how much slower is a step than the bare engine and the bare model?
Command:  python -m experiments.speed --values toy/values.json             (after `make demo`)
          python -m experiments.speed --shape qwen2.5-1.5b --gradient-checkpointing    (for GPUs)
Time:     4 minutes on 2 cores.
Output:   speed-cpu.txt and speed-cpu.json in experiments/results; speed-gpu.* on GPUs.
Answer:   on 2 CPU cores and the toy, a step takes 1.12 times its floor: the update 1.12 times,
          sampling 1.08 and ln pi_ref 1.04. On a GPU it was not measured.

The steps are real ones: they are made of the functions of train_online.py, and this takes its flags
(those for files, logs and --resume have no effect). A step has six parts. A floor does the least
work for the same prompts, tokens and weights. In one step it runs before the part,
in the next one after it, and so on.

part      what train_online.py does                floor
generate  samples, with log-probs                  llm.generate: same seeds, so same responses
grade     waits for the last grades                none: grading runs beside the sampling
pack      makes micro-batches                      none
ref       ln pi_ref                                forward pass of the plain transformers model
update    loss, backward pass, clipping, AdamW     forward and backward pass of that model
sync      sends the weights to the engine          a copy of the weights

`pack` is part of seconds_ref in metrics.jsonl. A part takes as long as on the slowest rank. Seconds
are medians over the steps but the first. A ratio is the median of the ratios of each step, so a
busy minute does not count.

With --shape, a model of that size gets random weights, in runs/speed-SHAPE. It never says EOS, so
every response has --max-tokens tokens. To compare two commits, run this in a checkout of each,
several times in turns.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Qwen2Config

import losses
import train_online
from apo import command_line, engine
from apo.engine import Request, Response
from apo.files import check_writable, model_folder, write_json, write_text
from apo.policy import COMPUTE_DTYPE, DEVICE, ON_GPU, MicroBatch, assign_to_ranks
from experiments.memory import SHAPES, full_name
from experiments.toy import make_tokenizer
from train_online import timed

PARTS = ("generate", "grade", "pack", "ref", "update", "sync")
RESULTS = Path("experiments/results")
GIB = 2**30
MOST_LOGITS = 2**28  # the bare model's logits are plain up to here, and in chunks beyond


def parse_args() -> argparse.Namespace:
    """Read train_online.py's flags, and those of this experiment."""
    parser = train_online.make_parser()
    parser.description = __doc__.splitlines()[0]
    parser.set_defaults(num_steps=40, lr=1e-4, eval_dataset="none")
    whole_number = command_line.whole_number
    group = parser.add_argument_group("this experiment")
    group.add_argument("--shape", help=f"make a random model: {', '.join(SHAPES)}")
    group.add_argument(
        "--max-tokens", type=whole_number, default=384, help="with --shape: tokens of a response"
    )
    group.add_argument(
        "--stage1-prompts", type=whole_number, default=256, help="prompts of stage 1; 0: none"
    )
    group.add_argument(
        "--logprob-tokens", type=whole_number, default=4096, help="tokens of ln pi; 0: none"
    )
    name = "speed-gpu" if ON_GPU else "speed-cpu"
    group.add_argument("--results", type=Path, default=RESULTS / name, help="without suffix")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------
# A model of random weights, for --shape


def make_random_model(config: Qwen2Config, num_prompts: int, max_tokens: int, folder: Path) -> Path:
    """Write a model, its tokenizer, and a values file of made-up prompts; return the latter."""
    tokenizer = make_tokenizer()
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    config.bos_token_id = None
    lm = AutoModelForCausalLM.from_config(config, dtype=COMPUTE_DTYPE)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    header = {
        "model": str(folder),
        "beta1": 0.5,
        "temperature": 1.0,
        "max_prompt_tokens": 256,
        "max_tokens": max_tokens,
    }
    rng = random.Random(0)
    entries = []
    for number in range(num_prompts):
        prompt = "".join(rng.choices("abcdefgh", k=rng.randint(50, 150)))
        entry = {"id": f"made-up-{number}", "prompt": prompt, "answer": "1", "rewards": [0, 1]}
        entries.append(entry)
    values = folder / "values.json"
    write_json(values, {"header": header, "prompts": entries})
    return values


# ---------------------------------------------------------------------------------------------
# Steps and their floors


def bare_logprob(lm: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Return ln pi of packed tokens, (R,) float32, by a plain model and plain logits."""
    model_inputs = {}
    for name, value in inputs.items():
        model_inputs[name] = value.to(lm.device) if isinstance(value, torch.Tensor) else value
    rows = model_inputs.pop("rows")
    targets = model_inputs.pop("targets")
    temperature = model_inputs.pop("temperature")
    hidden = lm.base_model(use_cache=False, **model_inputs).last_hidden_state[0][rows]
    weight = lm.get_output_embeddings().weight
    if len(targets) * len(weight) > MOST_LOGITS:
        return losses.token_logprob(hidden, weight, targets, temperature)
    logits = (hidden @ weight.t()).float() / temperature
    return -cross_entropy(logits, targets, reduction="none")


def in_turns(number: int, *works: Callable[[], None]) -> None:
    """Do all works, in the opposite order when `number` is odd."""
    order = reversed(works) if number % 2 == 1 else works
    for work in order:
        work()


class Bench:
    """The engine and the trainer of a run, and a plain model beside them."""

    def __init__(self, args: argparse.Namespace, data: train_online.TrainingData) -> None:
        self.args = args
        self.data = data
        self.run = train_online.set_up(args, data, train_online.a_star_po(args.beta2))
        self.temperature = data.values.header["temperature"]
        self.max_tokens = data.values.header["max_tokens"]
        # set_up has registered the packed attention.
        folder = model_folder(data.values.header["model"])
        self.bare = AutoModelForCausalLM.from_pretrained(
            folder, dtype=COMPUTE_DTYPE, attn_implementation="packed"
        )
        self.bare.to(DEVICE).train()
        if args.gradient_checkpointing:
            self.bare.gradient_checkpointing_enable({"use_reentrant": False})
        # Of the present step: seconds of each part and of its floor, and what the parts hand on.
        self.real: dict[str, float] = {}
        self.floor: dict[str, float] = {}
        self.requests: list[Request] = []
        self.responses: list[Response] = []
        self.updates: list[list[MicroBatch]] = []

    def step(self, number: int) -> None:
        """Do one step and its floors."""
        args = self.args
        prompts = train_online.next_batch(self.run.prompts, args.batch_size, args.seed, number)
        self.requests = train_online.make_requests(prompts, args, number)
        in_turns(number, self.bare_generate, self.generate)
        with timed(self.real, "grade"):
            self.responses = engine.gather(self.responses)
            engine.release_cache(self.run.llm)
        for response in self.responses:
            response.numbers["v_star"] = self.data.v_star[response.prompt.row["id"]]
        with timed(self.real, "pack"):
            self.updates = train_online.split_into_updates(
                self.responses, args, self.temperature, group_size=1
            )
        in_turns(number, self.bare_ref, self.ref)
        in_turns(number, self.bare_update, self.update)
        in_turns(number, self.bare_sync, self.sync)

    def generate(self) -> None:
        """Sample this rank's share of the requests, as the trainer does."""
        with timed(self.real, "generate"):
            sampling = (self.temperature, self.max_tokens)
            self.responses = list(engine.sample(self.run.llm, self.requests, *sampling))

    def bare_generate(self) -> None:
        """Put the same requests through the engine as it comes."""
        from vllm import SamplingParams

        with timed(self.floor, "generate"):
            prompts = []
            params = []
            for i in engine.share_of_requests(self.run.llm, len(self.requests)):
                prompts.append({"prompt_token_ids": self.requests[i].prompt.ids})
                seed = self.requests[i].seed
                limits = {"temperature": self.temperature, "max_tokens": self.max_tokens}
                params.append(SamplingParams(seed=seed, **limits))
            self.run.llm.generate(prompts, params, use_tqdm=False)

    def ref(self) -> None:
        """Compute ln pi_ref, as the trainer does."""
        with timed(self.real, "ref"):
            train_online.add_ref_logp(self.run.ref, self.updates)

    def bare_ref(self) -> None:
        """Run the plain model forward."""
        with timed(self.floor, "ref"), torch.no_grad():
            for batches in self.updates:
                for batch in batches:
                    bare_logprob(self.bare, batch.inputs)

    def update(self) -> None:
        """Update the policy, as the trainer does."""
        with timed(self.real, "update"):
            loss = train_online.a_star_po(self.args.beta2).loss
            train_online.update(
                self.run.policy,
                self.run.optimizer,
                self.updates,
                loss,
                self.args.max_grad_norm,
            )

    def bare_update(self) -> None:
        """Run the plain model forward and backward."""
        with timed(self.floor, "update"):
            for batches in self.updates:
                for batch in batches:
                    bare_logprob(self.bare, batch.inputs).sum().backward()
                self.bare.zero_grad()

    def sync(self) -> None:
        """Send the weights to the engine, as the trainer does."""
        with timed(self.real, "sync"):
            self.run.policy.load_into(self.run.llm)
            engine.restore_cache(self.run.llm)

    def bare_sync(self) -> None:
        """Copy every weight once."""
        with timed(self.floor, "sync"):
            for weight in self.bare.parameters():
                weight.detach().clone()

    def stage1(self, number: int, num_prompts: int) -> None:
        """Sample 8 responses of each prompt, as stage 1 does, and with the bare engine."""
        prompts = self.run.prompts[:num_prompts]
        self.requests = []
        for prompt in prompts:
            for sample in range(8):
                seed = engine.response_seed(number, 0, prompt.row["id"], sample)
                self.requests.append(Request(prompt, sample, seed))

        def sample_all() -> None:
            out = Path(self.args.out, f"stage1-{number}.json")
            counts = [8] * len(prompts)
            sampling = (number, self.temperature, self.max_tokens)
            with timed(self.real, "generate"):
                engine.sample_all(self.run.llm, prompts, counts, out, {}, *sampling)

        in_turns(number, self.bare_generate, sample_all)


def slowest(seconds: dict[str, float]) -> dict[str, float]:
    """Return each part's seconds on the rank where they are most; all ranks call it together."""
    values = torch.tensor([seconds.get(part, 0.0) for part in PARTS], dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return dict(zip(PARTS, values.tolist(), strict=True))


# ---------------------------------------------------------------------------------------------
# What the seconds say


class Row(NamedTuple):
    """One part of a step: medians over the steps."""

    seconds: float
    floor: float
    ratio: float | None  # None without a floor


def make_rows(real: list[dict[str, float]], floor: list[dict[str, float]]) -> dict[str, Row]:
    """Compare each part, and the total, to its floor; a ratio is of the same step."""
    for seconds in [*real, *floor]:
        seconds["total"] = sum(seconds[part] for part in PARTS)
    rows = {}
    for part in (*PARTS, "total"):
        measured = [seconds[part] for seconds in real]
        least = [seconds[part] for seconds in floor]
        ratio = None
        if min(least) > 0:
            ratios = [m / f for m, f in zip(measured, least, strict=True)]
            ratio = statistics.median(ratios)
        rows[part] = Row(statistics.median(measured), statistics.median(least), ratio)
    return rows


def forward_flops(lm: torch.nn.Module, responses: list[Response]) -> int:
    """Count the floating point operations of a forward pass over responses.

    They are 2 for each weight and token, 2 for each weight of the head and response token, and
    those of causal attention, which is half of a square.
    """
    layers = lm.base_model.layers
    weights = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
    head = lm.get_output_embeddings().weight.numel()
    width = layers[0].self_attn.q_proj.out_features * len(layers)
    flops = 0
    for response in responses:
        length = len(response.prompt.ids) + len(response.ids) - 1
        flops += 2 * weights * length + 2 * head * len(response.ids) + 2 * width * length**2
    return flops


def measure_steps(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    """Run the steps; return numbers for the JSON file and lines for the table."""
    real = []
    floor = []
    responses = []
    for number in range(1, bench.args.num_steps + 2):
        bench.step(number)
        if number > 1:  # the first one warms up
            real.append(slowest(bench.real))
            floor.append(slowest(bench.floor))
            responses += bench.responses
    rows = make_rows(real, floor)
    num_steps = len(real)
    num_tokens = sum(len(response.ids) for response in responses) / num_steps
    # A backward pass costs two forward passes.
    flops = 4 * forward_flops(bench.bare, responses) / num_steps / dist.get_world_size()
    teraflops = flops / (rows["ref"].seconds + rows["update"].seconds) / 1e12
    lines = [
        "",
        f"A step, median of {num_steps}: {len(responses) // num_steps} responses, "
        f"{num_tokens:.0f} response tokens; ref and update run at {teraflops:.3f} TFLOP/s a rank",
        f"{'part':10}{'seconds':>10}{'floor':>10}{'ratio':>8}",
    ]
    for part, row in rows.items():
        floor_cell = f"{row.floor:.4f}" if row.floor else ""
        ratio_cell = f"{row.ratio:.3f}" if row.ratio else ""
        lines.append(f"{part:10}{row.seconds:10.4f}{floor_cell:>10}{ratio_cell:>8}".rstrip())
    data = {
        "step_over_floor": rows["total"].ratio,
        "tokens_per_second": num_tokens / rows["total"].seconds,
        "teraflops": teraflops,
        "parts": {part: row._asdict() for part, row in rows.items()},
    }
    return data, lines


def measure_stage1(bench: Bench) -> tuple[dict[str, Any], list[str]]:
    """Compare three rounds of stage 1 with the bare engine, after a short one to warm up."""
    num_prompts = min(bench.args.stage1_prompts, len(bench.run.prompts))
    bench.stage1(0, max(1, num_prompts // 8))
    rounds = []
    for number in (1, 2, 3):
        bench.stage1(number, num_prompts)
        rounds.append((slowest(bench.real)["generate"], slowest(bench.floor)["generate"]))
    ratio = statistics.median(real / bare for real, bare in rounds)
    seconds = ", ".join(f"{real:.2f} ({bare:.2f})" for real, bare in rounds)
    lines = [
        "",
        f"Stage 1, {num_prompts} prompts, 8 samples each, seconds (bare engine): {seconds}; "
        f"ratio {ratio:.3f}",
    ]
    return {"stage1_over_engine": ratio, "stage1_seconds": rounds}, lines


# ---------------------------------------------------------------------------------------------
# Padding, and the memory of ln pi


def padding(lengths: list[int], num_ranks: int, budget: int) -> float:
    """Return tokens that pass through the model over tokens that have to.

    Nothing is padded, but a rank without a sequence computes a copy of the first one.
    """
    computed = sum(lengths)
    for batches in assign_to_ranks(lengths, num_ranks, budget):
        computed += lengths[0] * batches.count([])
    return computed / sum(lengths)


def measure_padding(budget: int) -> tuple[dict[str, Any], list[str]]:
    """Count the padding of 256 sequences of log-normal lengths, on 1 and on 8 ranks."""
    rng = random.Random(0)
    lengths = [100 + min(1024, int(rng.lognormvariate(5.3, 1))) for _ in range(256)]
    ratios = {num_ranks: padding(lengths, num_ranks, budget) for num_ranks in (1, 8)}
    line = (
        f"Padding, 256 sequences of {min(lengths)} to {max(lengths)} tokens: {ratios[1]:.4f} of "
        f"the real tokens are computed on 1 rank, {ratios[8]:.4f} on 8 ranks"
    )
    return {"padding": ratios}, ["", line]


def memory_of_process(field: str) -> int:
    """Return the bytes of this process in memory now (VmRSS) or at its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


class LogprobCost(NamedTuple):
    """What ln pi with its backward pass takes, and what it gives."""

    peak_bytes: int
    seconds: float
    results: list[torch.Tensor]  # ln pi, and the gradients of hidden states and weights


def logprob_cost(plain: bool, num_tokens: int, num_words: int) -> LogprobCost:
    """Measure ln pi with its backward pass; call it in a process of its own."""
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, 256, requires_grad=True)
    weight = (torch.randn(num_words, 256) / 8).requires_grad_()
    targets = torch.randint(num_words, (num_tokens,))
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed leaves memory at once
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = memory_of_process("VmRSS")
    start = time.perf_counter()
    if plain:
        logp = -cross_entropy(hidden @ weight.t(), targets, reduction="none")
    else:
        logp = losses.token_logprob(hidden, weight, targets)
    logp.square().sum().backward()
    seconds = time.perf_counter() - start
    peak = memory_of_process("VmHWM") - before
    # The first rows are enough to see a mistake, and soon sent.
    results = [tensor[:256].clone() for tensor in (logp.detach(), hidden.grad, weight.grad)]
    return LogprobCost(peak, seconds, results)


def measure_logprob(num_tokens: int, num_words: int) -> tuple[dict[str, Any], list[str]]:
    """Compare ln pi to plain logits: memory, seconds and the largest relative error."""
    costs = []
    for plain in (True, False):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            costs.append(pool.submit(logprob_cost, plain, num_tokens, num_words).result())
    plain_cost, ours = costs
    error = 0.0
    for a, b in zip(ours.results, plain_cost.results, strict=True):
        error = max(error, ((a - b).abs().max() / b.abs().max()).item())
    ratio = ours.peak_bytes / plain_cost.peak_bytes
    lines = ["", f"ln pi with its backward pass, {num_tokens:,} tokens, {num_words:,} words"]
    for name, cost in (("plain logits", plain_cost), ("token_logprob", ours)):
        lines.append(f"{name:14} {cost.peak_bytes / GIB:6.2f} GiB {cost.seconds:6.1f} s")
    lines.append(f"{ratio:.3f} of the memory, largest relative error {error:.0e}")
    return {"logprob_memory_ratio": ratio, "logprob_error": error}, lines


# ---------------------------------------------------------------------------------------------


def describe_machine() -> str:
    """Say on what machine this runs, and how busy it is."""
    device = torch.cuda.get_device_name() if ON_GPU else platform.machine()
    return (
        f"{dist.get_world_size()} ranks, {device}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, "
        f"torch {torch.__version__}"
    )


def measure(args: argparse.Namespace, data: train_online.TrainingData) -> None:
    """Measure everything and write the results; all ranks call it together."""
    command = shlex.join(["python", "-m", "experiments.speed", *sys.argv[1:]])
    log = [f"$ {command}", describe_machine()]
    results = {"command": command, "machine": log[1]}
    parts = [measure_padding(args.micro_batch_tokens)]
    if args.logprob_tokens > 0 and not ON_GPU and dist.get_rank() == 0:
        parts.append(measure_logprob(args.logprob_tokens, num_words=151_936))
    bench = Bench(args, data)
    if args.stage1_prompts > 0:
        parts.append(measure_stage1(bench))
    parts.append(measure_steps(bench))
    for numbers, lines in parts:
        results |= numbers
        log += lines
    if dist.get_rank() == 0:
        print("\n".join(log))
        write_text(f"{args.results}.txt", "\n".join(log) + "\n")
        write_text(f"{args.results}.json", json.dumps(results, indent=1) + "\n")
    engine.stop_engine(bench.run.llm)


def main() -> None:
    """Check, launch, measure."""
    args = parse_args()
    check_writable(f"{args.results}.txt", flag="--results")
    if args.shape is not None:
        name = full_name(args.shape)
        folder = Path("runs", f"speed-{name}")
        args.values = str(folder / "values.json")
        # Ranks that torchrun has started find it there.
        if "RANK" not in os.environ:
            config = Qwen2Config(**SHAPES[name]._asdict())
            make_random_model(config, 2 * args.batch_size, args.max_tokens, folder)
    with tempfile.TemporaryDirectory() as scratch:
        args.out = scratch
        data = train_online.check(args)
        engine.launch(args.tensor_parallel_size)
        measure(args, data)


if __name__ == "__main__":
    command_line.run(main)
