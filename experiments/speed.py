"""What a step costs beside what it must cost: each phase of the plain loop next to its floor.

    python -m experiments.speed --model toy/reference --values toy/values.json        # CPU or GPUs
    python -m experiments.speed --shape qwen2.5-1.5b --batch-size 256 [...]            # no download

Runs real steps, by train_online's own functions, and in the same run, on the same prompts, tokens
and weights, in turns (every other step the floor goes first), the least that could do the work:

generate              llm.generate, the bare engine: same seeds, so same texts; no log-probs
grade                 nothing: grading is done beside the engine; here is what is left at its end
ref log-prob          a forward of the plain transformers model on the same packed tokens
forward and backward  the same, forward and backward, of the sum of ln pi: no loss, FSDP, clipping
optimiser             AdamW(fused=True) on plain tensors of the same shapes (of 2^28 numbers at
                      most, the time scaled to all of them)
sync                  a copy of the model's weights, as many bytes as the engine gets
rest                  nothing: here is choosing, packing, and putting the engine to sleep

On several ranks a phase takes as long as its slowest rank. Numbers are medians over the steps but
the first; a ratio is the median of the ratios of each step, so that a busy minute does not count.
Then: stage 1 (`problems.sample_all`, with graders and partial files) against the bare engine;
padding, counted; and on the CPU the memory of ln pi with backward against plain logits.

With --shape the real architecture gets random weights, and prompts are made up. Lengths of
responses are drawn from a long tail and forced (ignore_eos up to max_tokens), in floors as well.

FLOPs are the model's: 2 per weight and token, 2 per weight of the head and response token, causal
attention by halves, backward twice a forward, nothing recomputed. MFU is their rate over that of
one large matrix product measured first, in the dtype of the model.
Writes OUT.json and OUT.txt, by default experiments/results/speed-cpu or -gpu.
"""

import argparse
import contextlib
import ctypes
import inspect
import json
import math
import multiprocessing
import os
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AutoModelForCausalLM, Qwen2Config

import losses
import problems
import train_online
from experiments.memory import SHAPES
from experiments.toy import make_tokenizer

PHASES = ("generate", "grade", "ref log-prob", "forward and backward", "optimiser", "sync", "rest")
FORWARDS = {"generate": 1, "ref log-prob": 1, "forward and backward": 3}  # FLOPs, in forwards
RESULTS = Path("experiments/results")
GIB = 2**30
MOST_NUMBERS = 2**28  # of the tensors on which the optimiser's floor is measured
MOST_LOGITS = 2**28  # the floor's own head is plain up to here, and chunked as ours is beyond
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
        "tie_word_embeddings": True}  # fmt: skip


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=style)
    add = parser.add_argument
    add("--model", help="reference pi_ref, with --values")
    add("--values", help="stage 1's file")
    add("--shape", help=f"instead of both: {', '.join(SHAPES)}")
    add("--steps", type=int, default=40, help="measured steps, after one that is not")
    add("--batch-size", type=int, default=256, help="prompts per rollout")
    add("--samples-per-prompt", type=int, default=1, help="responses per prompt and rollout")
    add("--updates-per-batch", type=int, default=2, help="updates per rollout")
    add("--response-tokens", type=int, default=1024, help="with --shape: longest response")
    add("--stage1-prompts", type=int, default=256, help="prompts of stage 1; 0: no stage 1")
    add("--stage1-rounds", type=int, default=3, help="rounds of stage 1, after a short one")
    add("--num-value-samples", type=int, default=8, help="N, responses per prompt in stage 1")
    add("--logprob-tokens", type=int, default=4096, help="tokens of the log-prob; 0: none")
    add("--beta2", type=float, default=1e-3, help="strength of the KL term")
    add("--lr", type=float, default=1e-4, help="AdamW's learning rate")
    add("--seed", type=int, default=0, help="of data order, sampling and lengths")
    add("--micro-batch-tokens", type=int, default=8192, help="tokens per forward and rank")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory")
    add("--offload-ref", action="store_true", help="keep pi_ref in CPU memory")
    add("--gpu-memory-utilization", type=float, default=0.6, help="the engine's share of a GPU")
    add("--tensor-parallel-size", type=int, default=1, help="GPUs per engine")
    add("--cpu-time", action="store_true", help="CPU time: for cores that others use as well")
    add("--out", type=Path, help="results, without suffix")
    return parser.parse_args()


def check(args: argparse.Namespace) -> list[dict]:
    """Check the arguments; the prompts of the values file, or made-up ones of a shape."""
    args.out = args.out or RESULTS / f"speed-{'gpu' if torch.cuda.is_available() else 'cpu'}"
    may_be_zero = ("stage1_prompts", "logprob_tokens")
    problems.check_args(args, *may_be_zero)
    if bool(args.shape) == bool(args.model and args.values):
        raise problems.UserError("give either --model and --values, or --shape")
    if args.batch_size * args.samples_per_prompt % args.updates_per_batch:
        raise problems.UserError("--batch-size is not divisible by --updates-per-batch")
    if args.shape:
        shape_of(args.shape)
        args.temperature, args.max_prompt_tokens = 1.0, 256
        args.max_tokens, args.chat_template = args.response_tokens, False
        return made_up_prompts(max(args.batch_size, args.stage1_prompts), args.seed)
    values = problems.read_json(args.values)
    header, prompts = values["header"], values["prompts"]
    for name in ("temperature", "max_prompt_tokens", "max_tokens", "chat_template"):
        setattr(args, name, header[name])
    if len(prompts) < args.batch_size:
        raise problems.UserError(f"{args.values} has only {len(prompts)} prompts")
    problems.check_context(args)
    return prompts


# ---------------------------------------------------------------------------------------------
# Lengths, prompts and models made up


def long_tail(count: int, mean: float, most: int, seed: int) -> list[int]:
    """Draw lengths 1 to `most` whose mean is about `mean`: lognormal, half of them under 0.7 mean.

    sigma is 1; what lies above `most` is cut off, and the scale makes up for what that costs.
    """
    rng, scale = random.Random(seed), mean
    factors = [math.exp(rng.gauss(0, 1)) for _ in range(count)]
    for _ in range(50):
        lengths = [max(1, min(most, round(scale * factor))) for factor in factors]
        scale *= mean / (sum(lengths) / count)
    return lengths


def made_up_prompts(count: int, seed: int) -> list[dict]:
    """Prompts of 50 to 150 random bytes that look as those of a values file do."""
    rng = random.Random(seed)
    kept = {"prompt": "", "answer": "1", "v_star": 0.5}
    return [{"id": f"made-up/{i}", "prompt_ids": rng.choices(range(1, 257), k=rng.randint(50, 150))}
            | kept for i in range(count)]  # fmt: skip


def shape_of(name: str) -> dict[str, Any]:
    """A shape of experiments.memory, or the tiny one of a rehearsal; UserError if there is none."""
    known = SHAPES | {"tiny": TINY}
    if name not in known:
        raise problems.UserError(f"no shape {name}: choose from {', '.join(SHAPES)}")
    return known[name]


def make_model(name: str, folder: Path) -> None:
    """Write a model of the shape with random weights, and a tokenizer of bytes."""
    tokenizer = make_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(**shape_of(name), **special, bos_token_id=None)
    on_gpu, dtype = torch.cuda.is_available(), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if on_gpu else torch.float32)
    with torch.device("cuda" if on_gpu else "cpu"):
        lm = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(dtype)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del lm
    torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------
# The clock


class Stopwatch:
    """Seconds and peak bytes of phases, of which one runs at a time; None is none."""

    clock = staticmethod(time.perf_counter)

    def __init__(self):
        self.seconds, self.peaks = Counter(), Counter()
        self.phase, self.since = None, 0.0

    def switch(self, phase: str | None = None) -> str | None:
        """End the phase that runs and begin another; returns the one that ended."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            if self.phase:
                peak = max(self.peaks[self.phase], torch.cuda.max_memory_allocated())
                self.peaks[self.phase] = peak
            torch.cuda.reset_peak_memory_stats()
        now, ended = self.clock(), self.phase
        if ended:
            self.seconds[ended] += now - self.since
        self.phase, self.since = phase, now
        return ended

    def inside(self, phase: str, function: Callable) -> Callable:
        """Count the function's calls as `phase` and not as the phase that they interrupt."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            interrupted = self.switch(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch(interrupted)

        return timed

    def slowest(self) -> tuple[dict[str, float], dict[str, int]]:
        """Every phase's seconds and peak bytes on the rank where they are most; collective."""
        dist.all_gather_object(everyone := [None] * dist.get_world_size(), vars(self))
        ranks = [(each["seconds"], each["peaks"]) for each in everyone]
        merged = [{p: max(rank[i][p] for rank in ranks) for p in PHASES} for i in (0, 1)]
        merged[0]["total"] = max(sum(seconds.values()) for seconds, _ in ranks)
        return merged[0], merged[1]


def in_turns(number: int, *works: Callable[[], Any]) -> None:
    """Do two things, the second first when `number` is odd."""
    for work in works[:: -1 if number % 2 else 1]:
        work()


# ---------------------------------------------------------------------------------------------
# Real steps and their floors


def bare_logprob(lm: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """ln pi of packed tokens by a plain transformers model and plain logits; (R,) float32."""
    inputs = {k: v.to(lm.device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    rest = {k: v for k, v in inputs.items() if k not in ("rows", "targets", "temperature")}
    hidden = lm.base_model(use_cache=False, **rest).last_hidden_state[0][inputs["rows"]]
    weight, targets = lm.get_output_embeddings().weight, inputs["targets"]
    if len(targets) * len(weight) > MOST_LOGITS:
        return losses.token_logprob(hidden, weight, targets, inputs["temperature"])
    logits = (hidden @ weight.t()).float() / inputs["temperature"]
    return -cross_entropy(logits, targets, reduction="none")


def forward_flops(lm: torch.nn.Module, lengths: list[tuple[int, int]]) -> int:
    """FLOPs of a forward over (prompt, response) lengths, a response's last token not fed."""
    config, fed = lm.config, [prompt + response - 1 for prompt, response in lengths]
    matrices = sum(p.numel() for p in lm.base_model.layers.parameters() if p.ndim == 2)
    width = lm.base_model.layers[0].self_attn.q_proj.out_features * config.num_hidden_layers
    head = lm.get_output_embeddings().weight.numel() * sum(response for _, response in lengths)
    return 2 * matrices * sum(fed) + 2 * head + 2 * width * sum(n * n for n in fed)


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product, the best of some."""
    size, watch, seconds = 8192 if device == "cuda" else 1024, Stopwatch(), []
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
    for _ in range(20):
        watch.seconds.clear()
        watch.switch("product")
        a @ b
        watch.switch()
        seconds.append(watch.seconds["product"])
    return 2 * size**3 / min(seconds)


class Bench:
    """One rank's engine and trainer, as `train_online.train` sets them up, and a bare model."""

    def __init__(self, args: argparse.Namespace, prompts: list[dict]):
        self.args, self.prompts = args, prompts
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.on_gpu, nodes = torch.cuda.is_available(), self.world // local_world()
        options = {"logprobs_mode": "processed_logprobs", "enable_prefix_caching": False}
        options["enable_sleep_mode"] = self.on_gpu
        self.llm = problems.start_engine(args, args.max_prompt_tokens, **options)
        self.device, compute = train_online.DEVICE, train_online.COMPUTE
        self.rate = matmul_rate(self.device, compute)
        if not args.shape:
            problems.write_prompts(prompts, self.llm, args)
        self.lengths = long_tail(4096, 0.3 * args.max_tokens, args.max_tokens, args.seed)

        AttentionInterface.register("packed", losses.packed_attention)
        folder = problems.model_folder(args.model)
        attention = {"dtype": compute, "attn_implementation": "packed"}
        self.bare = AutoModelForCausalLM.from_pretrained(folder, **attention)
        self.bare = self.bare.to(self.device).train()
        # What is not the trainer's: the engine's weights and (unmapped) KV cache, the bare model.
        self.not_ours = torch.cuda.memory_allocated() if self.on_gpu else 0
        shape = (nodes, self.world // nodes)[nodes == 1 :]
        mesh = dist.init_device_mesh(
            self.device, shape, mesh_dim_names=("replicate", "shard")[nodes == 1 :]
        )
        self.policy = train_online.load_policy(folder, mesh, torch.float32)
        self.ref = train_online.load_policy(folder, mesh, compute, args.offload_ref)
        self.ref.requires_grad_(False)
        if args.gradient_checkpointing:
            for lm in (self.policy.lm, self.bare):
                lm.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), args.lr, fused=True)

    def limits(self, seed: int) -> dict[str, Any]:
        """How long a response may be, or with --shape must be."""
        if not self.args.shape:
            return {"max_tokens": self.args.max_tokens}
        return {"max_tokens": self.lengths[seed % len(self.lengths)], "ignore_eos": True}

    @contextlib.contextmanager
    def forced(self) -> Iterator[None]:
        """Make problems.sample ask for the lengths of `limits`."""
        import vllm

        plain = vllm.SamplingParams
        wanted = lambda **params: plain(**params | self.limits(params["seed"]))  # noqa: E731
        with mock.patch.object(vllm, "SamplingParams", wanted):
            yield

    # The floors

    def bare_generate(self, jobs: list[tuple[dict, dict]]) -> None:
        """This rank's share of the prompts through the engine as it comes."""
        from vllm import SamplingParams

        tp = self.args.tensor_parallel_size
        mine = jobs[self.rank // tp :: self.world // tp]
        alike, seeds = {"temperature": self.args.temperature}, [how["seed"] for _, how in mine]
        params = [SamplingParams(**alike, seed=seed, **self.limits(seed)) for seed in seeds]
        tokens = [{"prompt_token_ids": prompt["prompt_ids"]} for prompt, _ in mine]
        self.llm.generate(tokens, params, use_tqdm=False)

    def bare_update(self, floor: Stopwatch, responses: list[dict]) -> None:
        """Forward, then forward and backward, then the optimiser, of the plain model."""
        args, size = self.args, len(responses) // self.args.updates_per_batch
        updates = [responses[i : i + size] for i in range(0, len(responses), size)]
        updates = [train_online.micro_batches(update, args) for update in updates]
        floor.switch("ref log-prob")
        with torch.no_grad():
            for batch in (batch for update in updates for batch in update):
                bare_logprob(self.bare, batch.inputs)
        floor.switch("forward and backward")
        for update in updates:
            for batch in update:
                bare_logprob(self.bare, batch.inputs).sum().backward()
            self.bare.zero_grad()
        floor.switch()
        for _ in updates:
            self.bare_optimiser(floor)

    def bare_optimiser(self, floor: Stopwatch) -> None:
        """A step of AdamW on plain tensors of the shards' shapes."""
        shapes = [p.to_local().shape for p in self.policy.parameters()]
        numbers, kept = 0, []
        for shape in shapes:
            if not kept or numbers + shape.numel() <= MOST_NUMBERS:
                kept.append(torch.ones(shape, device=self.device, requires_grad=True))
                numbers += shape.numel()
        for tensor in kept:
            tensor.grad = torch.ones_like(tensor)
        adam = torch.optim.AdamW(kept, 1e-6, weight_decay=0.01, fused=True)
        adam.step()  # makes the states
        watch = Stopwatch()
        watch.switch("optimiser")
        adam.step()
        watch.switch()
        scale = sum(shape.numel() for shape in shapes) / numbers
        floor.seconds["optimiser"] += watch.seconds["optimiser"] * scale

    def bare_copy(self) -> None:
        """Copy every weight once."""
        for weight in self.bare.parameters():
            torch.empty_like(weight).copy_(weight.detach())

    # The real thing

    def rollout(self, real: Stopwatch, jobs: list[tuple[dict, dict]]) -> list[dict]:
        """Steps 2 and 3 of the algorithm."""
        real.switch("generate")
        with self.forced():
            lap = lambda: real.switch("grade")  # noqa: E731
            _, done = train_online.rollout(self.llm, jobs, self.args, (), lap)
        real.switch()
        return done

    def update(self, real: Stopwatch, responses: list[dict]) -> None:
        """Steps 4 and 5."""
        pack = real.inside("rest", train_online.micro_batches)
        step = real.inside("optimiser", self.optimizer.step)
        parts = (self.policy, self.ref, self.optimizer, responses, self.args)
        with (
            mock.patch.object(train_online, "micro_batches", pack),
            mock.patch.object(self.optimizer, "step", step),
        ):
            real.switch("ref log-prob")
            train_online.least_squares(*parts, lambda: real.switch("forward and backward"))
            real.switch()

    def sync(self, real: Stopwatch) -> None:
        """Step 6."""
        real.switch("sync")
        torch.cuda.empty_cache()
        train_online.sync(self.llm, self.policy)
        if self.on_gpu:
            self.llm.wake_up(tags=["kv_cache"])
        real.switch()

    def step(self, number: int) -> tuple[Stopwatch, Stopwatch, list[dict]]:
        """One real step and its floors, in turns; both clocks and the responses."""
        args, real, floor = self.args, Stopwatch(), Stopwatch()
        real.switch("rest")
        jobs = train_online.step_jobs(self.prompts, args, number)
        real.switch()
        responses = []
        in_turns(
            number,
            lambda: floor.inside("generate", self.bare_generate)(jobs),
            lambda: responses.extend(self.rollout(real, jobs)),
        )
        if self.on_gpu:
            real.switch("rest")
            self.llm.sleep(level=0)
            self.llm.release_kv_cache_memory()
            real.switch()
        in_turns(
            number,
            lambda: self.bare_update(floor, responses),
            lambda: self.update(real, responses),
        )
        in_turns(number, floor.inside("sync", self.bare_copy), lambda: self.sync(real))
        return real, floor, responses

    def stage1(self, number: int, rows: list[dict], folder: Path) -> tuple[float, float]:
        """Seconds of sample_all and of the bare engine on the same prompts and seeds."""
        args, real, floor = self.args, Stopwatch(), Stopwatch()
        n, out, identity = args.num_value_samples, folder / f"{number}.json", {"round": number}
        jobs = [(row, {"seed": problems.response_seed(args.seed, 0, row["id"], i)})
                for row in rows for i in range(n)]  # fmt: skip

        def sample_all() -> None:
            temperature = {"temperature": args.temperature}
            with self.forced():
                problems.sample_all(self.llm, rows, n, out, identity, args, **temperature)

        in_turns(
            number,
            lambda: floor.inside("generate", self.bare_generate)(jobs),
            real.inside("generate", sample_all),
        )
        return real.slowest()[0]["total"], floor.slowest()[0]["total"]


def local_world() -> int:
    """Ranks of this node; the engine overwrites the variable later."""
    return int(os.environ["LOCAL_WORLD_SIZE"])


# ---------------------------------------------------------------------------------------------
# The table


def medians(real: list[dict], floor: list[dict]) -> dict[str, dict[str, float]]:
    """Each phase's seconds, its floor's, and their ratio: medians over steps, the ratio paired."""
    rows = {}
    for phase in (*PHASES, "total"):
        pairs = [(r[phase], f[phase]) for r, f in zip(real, floor, strict=True)]
        seconds, least = (statistics.median(x) for x in zip(*pairs, strict=True))
        rows[phase] = {"seconds": seconds, "floor": least}
        if least:
            rows[phase]["ratio"] = statistics.median(r / f for r, f in pairs)
    return rows


def add_rates(
    rows: dict[str, dict], fed: float, drawn: float, flops: float, world: int, rate: float
) -> float:
    """Add tokens/s (of all ranks), TFLOP/s (of one) and MFU to the rows; returns the MFU.

    fed and drawn are a step's tokens, flops those of one forward over them. The MFU returned is of
    ref log-prob, forward and backward together.
    """
    for phase, row in rows.items():
        if row["seconds"] and phase in (*FORWARDS, "total"):
            row["tokens_per_second"] = (fed if "ward" in phase or "ref" in phase else drawn) / row[
                "seconds"
            ]
        if row["seconds"] and phase in FORWARDS:
            done = FORWARDS[phase] * flops / world / row["seconds"]
            row |= {"tflops": done / 1e12, "mfu": done / rate}
    busy = [phase for phase in FORWARDS if phase != "generate"]
    seconds = sum(rows[phase]["seconds"] for phase in busy)
    return sum(FORWARDS[phase] for phase in busy) * flops / world / seconds / rate


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Write the rows as text; an empty cell does not apply."""
    columns = {"seconds": ".4f", "floor": ".4f", "ratio": ".3f", "tokens_per_second": ".0f",
               "tflops": ".3f", "mfu": ".1%", "peak_gib": ".2f"}  # fmt: skip
    heads = ("phase", "seconds", "floor", "ratio", "tokens/s", "TFLOP/s", "MFU", "peak GiB")
    lines = [f"{heads[0]:22}" + "".join(f"{head:>10}" for head in heads[1:])]
    for phase, row in rows.items():
        cells = (format(row[c], spec) if row.get(c) else "" for c, spec in columns.items())
        lines.append(f"{phase:22}" + "".join(f"{cell:>10}" for cell in cells))
    return [line.rstrip() for line in lines]


def measure_steps(bench: Bench, tell: Callable[[str], None]) -> dict:
    """Run the steps, tell the table, and return what the JSON file keeps; collective."""
    args, real, floor, peaks, lengths = bench.args, [], [], Counter(), []
    for number in range(1, args.steps + 2):
        watch, least, responses = bench.step(number)
        (seconds, peak), (bare, _) = watch.slowest(), least.slowest()
        if number > 1:
            real, floor = [*real, seconds], [*floor, bare]
            lengths += [(len(r["prompt_ids"]), len(r["ids"])) for r in responses]
            peaks = {phase: max(peaks[phase], peak[phase]) for phase in PHASES}
            peaks = Counter(peaks)
    rows = medians(real, floor)
    fed = sum(prompt + response - 1 for prompt, response in lengths) / args.steps
    drawn = sum(response for _, response in lengths) / args.steps
    flops = forward_flops(bench.bare, lengths) / args.steps
    mfu = add_rates(rows, fed, drawn, flops, bench.world, bench.rate)
    for phase in PHASES:
        rows[phase]["peak_gib"] = peaks[phase] / GIB
    tell(
        f"\nA step, {args.steps} of them: {len(lengths) // args.steps} responses of "
        f"{drawn * args.steps / len(lengths):.0f} tokens, {fed:.0f} tokens fed, "
        f"{flops / 1e12:.4f}e12 FLOPs a forward; "
        f"a matrix product runs at {bench.rate / 1e12:.3f} TFLOP/s"
    )
    for line in table(rows):
        tell(line)
    ratios = sorted(r["total"] / f["total"] for r, f in zip(real, floor, strict=True))
    tell(f"total over floors, step by step: {' '.join(f'{ratio:.3f}' for ratio in ratios)}")
    told = {"step_over_floor": rows["total"]["ratio"], "mfu": mfu, "phases": rows}
    told |= {"generate_over_engine": rows["generate"]["ratio"]}
    told |= {"sync_over_copy": rows["sync"]["ratio"], "matmul_tflops": bench.rate / 1e12}
    return told | update_memory(bench, peaks, tell)


def update_memory(bench: Bench, peaks: dict[str, int], tell: Callable[[str], None]) -> dict:
    """Peak of the update over parameters, gradients, AdamW's states and reference; GPUs only."""
    if not bench.on_gpu:
        return {}
    update = ("ref log-prob", "forward and backward", "optimiser")
    peak = max(peaks[phase] for phase in update) - bench.not_ours
    shard = sum(p.to_local().numel() for p in bench.policy.parameters())
    least = shard * (4 + 4 + 8 + (0 if bench.args.offload_ref else 2))
    tell(
        f"peak of the update {peak / GIB:.2f} GiB, without the engine and the floor's model; "
        f"parameters, gradients, states and reference {least / GIB:.2f} GiB"
    )
    return {"update_memory_ratio": peak / least, "update_peak_gib": peak / GIB}


def measure_stage1(bench: Bench, tell: Callable[[str], None]) -> dict:
    """Stage 1 and the bare engine in turns; collective."""
    args, rows = bench.args, bench.prompts[: bench.args.stage1_prompts]
    box = [tempfile.mkdtemp() if bench.rank == 0 else ""]
    dist.broadcast_object_list(box)
    bench.stage1(0, rows[: max(1, len(rows) // 8)], Path(box[0]))
    pairs = [
        bench.stage1(number, rows, Path(box[0])) for number in range(1, args.stage1_rounds + 1)
    ]
    ratio = statistics.median(real / bare for real, bare in pairs)
    tell(
        f"\nStage 1, {len(rows)} prompts, {args.num_value_samples} samples each, seconds "
        f"(bare engine): {', '.join(f'{r:.2f} ({f:.2f})' for r, f in pairs)}; ratio {ratio:.3f}"
    )
    return {"stage1_over_engine": ratio, "stage1_seconds": pairs}


# ---------------------------------------------------------------------------------------------
# Padding and the memory of ln pi


def padding(lengths: list[int], prompt: int, num_ranks: int, budget: int) -> dict[str, float]:
    """Rows that go through the model, and the busiest rank, over fair.

    As train_online.micro_batches packs them, micro-batches of share 0 included.
    """
    args = argparse.Namespace(micro_batch_tokens=budget, temperature=1.0)
    kept = {"prompt_ids": [0] * prompt, "v_star": 0.0, "reward": 0.0, "sampler_logp": []}
    update = [kept | {"ids": [0] * n} for n in lengths]
    through, real = [], sum(prompt + n - 1 for n in lengths)
    for rank in range(num_ranks):
        with (
            mock.patch.object(dist, "get_world_size", return_value=num_ranks),
            mock.patch.object(dist, "get_rank", return_value=rank),
        ):
            batches = train_online.micro_batches(update, args)
        through.append(sum(batch.inputs["input_ids"].shape[1] for batch in batches))
    return {"padding": sum(through) / real, "busiest_rank": num_ranks * max(through) / real}


def measure_padding(args: argparse.Namespace, tell: Callable[[str], None]) -> dict:
    """Count the padding of an update with a long tail on 1 and on 8 ranks."""
    lengths = long_tail(256, 300, 1024, args.seed)
    told = {n: padding(lengths, 100, n, args.micro_batch_tokens) for n in (1, 8)}
    tell(
        f"\nPadding: an update of 256 responses of {statistics.mean(lengths):.0f} tokens (median "
        f"{statistics.median(lengths):.0f}, longest {max(lengths)}), prompts of 100 tokens,\n"
        f"micro-batches of {args.micro_batch_tokens}; computed over real tokens"
    )
    for ranks, row in told.items():
        tell(f"{ranks} rank{'s' * (ranks > 1)}: {row['padding']:.4f} through the model; "
             f"busiest rank over the mean {row['busiest_rank']:.4f}")  # fmt: skip
    return {"padding_ratio": max(row["padding"] for row in told.values()), "padding": told}


def resident(field: str) -> int:
    """Bytes of this process in memory now (VmRSS) or at its peak (VmHWM), as the kernel tells."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def logprob_peak(chunk: int, sizes: tuple[int, int, int], folder: str) -> tuple[int, float]:
    """Peak rise in bytes, and seconds, of ln pi with backward; chunk 0 is plain logits.

    For a process of its own. `sizes` are tokens, vocabulary and hidden size. Leaves ln pi and both
    gradients in FOLDER/CHUNK.
    """
    tokens, vocabulary, width = sizes
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = (torch.randn(vocabulary, width) / 8).requires_grad_()
    targets, upstream = torch.randint(vocabulary, (tokens,)), torch.randn(tokens)
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed leaves memory at once
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before, start = resident("VmRSS"), time.perf_counter()
    if chunk:
        logp = losses.token_logprob(hidden, weight, targets, 1.0, chunk)
    else:
        logp = -cross_entropy(hidden @ weight.t() / 1.0, targets, reduction="none")
    (logp * upstream).sum().backward()
    seconds, rise = time.perf_counter() - start, resident("VmHWM") - before
    torch.save([logp.detach(), hidden.grad, weight.grad], f"{folder}/{chunk}")
    return rise, seconds


def compare_logprob(chunks: list[int], sizes: tuple[int, int, int]) -> dict[int, dict]:
    """Measure plain logits (chunk 0) and chunks; the latter's ratio and largest relative error."""
    rows, spawn = {}, multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for chunk in (0, *chunks):
            with ProcessPoolExecutor(1, spawn) as alone:
                rise, seconds = alone.submit(logprob_peak, chunk, sizes, folder).result()
            rows[chunk] = {"gib": rise / GIB, "seconds": seconds}
            pairs = zip(*(torch.load(f"{folder}/{c}") for c in (chunk, 0)), strict=True)
            errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]
            rows[chunk] |= {"ratio": rise / GIB / rows[0]["gib"], "error": max(errors)}
    return rows


def measure_logprob(args: argparse.Namespace, tell: Callable[[str], None]) -> dict:
    """Tell the memory of ln pi with backward, at the default chunk and at smaller ones."""
    default = inspect.signature(losses.token_logprob).parameters["chunk"].default
    sizes = (args.logprob_tokens, 151_936, 256)
    rows = compare_logprob([default, *(c for c in (512, 256, 128) if c < default)], sizes)
    tell("\nln pi with backward, {:,} tokens x {:,} vocabulary, hidden {}, float32".format(*sizes))
    for chunk, row in rows.items():
        name = f"chunk {chunk}{' (default)' * (chunk == default)}" if chunk else "plain logits"
        tell(f"{name:20} {row['gib']:6.2f} GiB {row['seconds']:6.1f} s   memory {row['ratio']:.3f} "
             f"of plain, largest relative error {row['error']:.0e}")  # fmt: skip
    told = {"logprob_memory_ratio": rows[default]["ratio"]}
    return told | {"logprob_error": rows[default]["error"], "logprob": rows}


# ---------------------------------------------------------------------------------------------


def trl_ratios() -> dict[str, float]:
    """The two ratios that experiments.versus_trl has measured, as far as it has."""
    path = RESULTS / "versus-trl.json"
    saved = problems.read_json(path) if path.exists() else {}
    return {k: saved[k] for k in ("trl_ratio_uniform", "trl_ratio_long_tail") if k in saved}


def describe() -> str:
    """Say on what machine this runs, and how busy it is."""
    gpus = torch.cuda.device_count()
    device = f"{torch.cuda.get_device_name()}, {gpus} here" if gpus else platform.machine()
    return (f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, load "
            f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}")  # fmt: skip


def measure(args: argparse.Namespace, prompts: list[dict], tell: Callable[[str], None]) -> dict:
    """Measure all, on all ranks; the results."""
    rank, told = dist.get_rank(), {"device": describe(), "world": dist.get_world_size()}
    tell(f"{told['device']}, {told['world']} ranks")
    if rank == 0:
        told |= measure_padding(args, tell)
        if args.logprob_tokens and not torch.cuda.is_available():
            told |= measure_logprob(args, tell)
    with contextlib.ExitStack() as stack:
        if args.shape:
            box = [stack.enter_context(tempfile.TemporaryDirectory()) if rank == 0 else ""]
            if rank == 0:
                make_model(args.shape, Path(box[0]))
            dist.broadcast_object_list(box)
            args.model = box[0]
        bench = Bench(args, prompts)
        if args.stage1_prompts:
            told |= measure_stage1(bench, tell)
        told |= measure_steps(bench, tell)
        dist.barrier()
        bench.llm.llm_engine.engine_core.shutdown()  # destroys the process group as well
    return told


def main() -> None:
    """Check, launch, measure, write."""
    args = parse_args()
    prompts = check(args)
    command = f"python -m experiments.speed {shlex.join(sys.argv[1:])}"
    sys.argv[0:1] = ["--module", "experiments.speed"]  # what torchrun is to run
    problems.launch()
    if args.cpu_time:
        Stopwatch.clock = staticmethod(time.process_time)
    first, lines = dist.get_rank() == 0, []

    def tell(line: str) -> None:
        if first:
            print(line, flush=True)
            lines.append(line)

    tell(command)
    told = {"command": command} | measure(args, prompts, tell)
    if first:
        told |= {} if torch.cuda.is_available() else trl_ratios()
        Path(f"{args.out}.json").write_text(json.dumps(told, indent=1) + "\n")
        Path(f"{args.out}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    problems.run(main)
