"""Stage 2: train the policy by least squares on r - V*, one response per prompt.

The loop of `train` is the algorithm box, 1 to 6. There is no critic, group, importance ratio,
clipping or normalisation and, unlike in the published code, no entropy bonus (README, details).

    python train_online.py --values values/math.json --out runs/math     # all GPUs here, or the CPU
    torchrun --nnodes 2 --nproc-per-node 8 [...] train_online.py [...]   # several nodes
"""

import argparse
import functools
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TextIO

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_

import losses
import problems
from problems import UserError

FROM_HEADER = ("model", "temperature", "max_prompt_tokens", "max_tokens")
# What --resume may change: how long and on what a run runs, not what it computes.
FREE_ON_RESUME = ("resume", "values", "num_steps", "save_every", "keep_checkpoints",
                  "micro_batch_tokens", "gradient_checkpointing", "offload_ref")  # fmt: skip
COLUMNS = """step:4 loss:.4f reward:.3f v_star:.3f adv:+.3f logratio:+8.3f kl_per_token:+.4f
response_tokens:6.1f truncated:.3f grad_norm:.1e lr:.0e logprob_gap:.0e seconds_generate:.2f
seconds_grade:.2f seconds_ref:.2f seconds_update:.2f seconds_sync:.2f seconds_total:.2f
tokens_per_second:6.0f peak_gib:.1f eval_accuracy:.3f"""
STOP: list[int] = []  # the signal that asks the run to stop


def parse_args() -> argparse.Namespace:
    """Read the command line; the published MATH run needs no flag."""
    style = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--values", default="values/math.json", help="stage 1's file")
    add("--out", default="runs/math", help="folder of the run")
    add("--resume", action="store_true", help="continue from OUT's last whole checkpoint")
    add("--num-steps", type=int, default=725, help="rollouts")
    add("--batch-size", type=int, default=256, help="prompts per rollout")
    add("--samples-per-prompt", type=int, default=1, help="responses per prompt and rollout")
    add("--updates-per-batch", type=int, default=2, help="updates per rollout; 1 is on-policy")
    add("--beta1", type=float, help="recompute V* with this beta1 (default: the values file's)")
    add("--beta2", type=float, default=1e-3, help="strength of the KL term")
    add("--lr", type=float, default=1e-6, help="AdamW's learning rate, constant")
    add("--filter-unsolved", action="store_true", help="drop prompts the reference never solved")
    add("--seed", type=int, default=0, help="of data order and sampling")
    add("--save-every", type=int, default=50, help="steps between checkpoints")
    add("--keep-checkpoints", type=int, default=2, help="how many of the newest to keep")
    add("--eval-dataset", help="measure greedy accuracy on it while training")
    add("--eval-every", type=int, default=50, help="steps between evaluations")
    add("--model", help="reference pi_ref (default: the values file's, as for the next three)")
    add("--temperature", type=float, help="of sampling and of ln pi")
    add("--max-prompt-tokens", type=int, help="longest prompt, in tokens")
    add("--max-tokens", type=int, help="longest response, in tokens")
    add("--micro-batch-tokens", type=int, default=8192, help="tokens per forward and rank")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory")
    add("--offload-ref", action="store_true", help="keep pi_ref in CPU memory")
    add("--gpu-memory-utilization", type=float, default=0.6, help="the engine's share of a GPU")
    add("--tensor-parallel-size", type=int, default=1, help="GPUs per engine")
    return parser.parse_args()


def check(args: argparse.Namespace) -> tuple[dict, list[dict]]:
    """Check arguments and files before anything starts; header and prompts of the values file.

    Fills in the arguments that default to the header's. UserError for the first mistake.
    """
    problems.check_numbers(args)
    if args.batch_size % args.updates_per_batch:
        raise UserError(f"--batch-size {args.batch_size} is not divisible by --updates-per-batch")
    header, prompts = problems.read_values(args.values)
    for name in (name for name in FROM_HEADER if getattr(args, name) is None):
        setattr(args, name, header[name])
    same = {name: getattr(args, name) for name in FROM_HEADER}
    same["prompt_template"] = problems.PROMPT_TEMPLATE
    problems.refuse_difference(args.values, header, same)
    if args.max_prompt_tokens + args.max_tokens > problems.context_length(args.model):
        raise UserError(f"--max-prompt-tokens + --max-tokens is more than {args.model} can read")
    if args.filter_unsolved:
        prompts = [prompt for prompt in prompts if max(prompt["rewards"]) > 0]
    if len(prompts) < args.batch_size:
        left = f"{len(prompts)} prompts{' that were ever solved' * args.filter_unsolved}"
        raise UserError(f"{args.values} has {left}, fewer than --batch-size {args.batch_size}")
    if args.eval_dataset:
        problems.load_problems(args.eval_dataset, "test")
    out, first = Path(args.out), os.environ.get("RANK", "0") == "0"
    if first and not args.resume and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is in use: continue it with --resume, or give another --out")
    return header, prompts


# ---------------------------------------------------------------------------------------------
# Sampling


class Response(NamedTuple):
    """One sampled response, as every rank knows it."""

    place: int  # in what the engine was asked
    prompt: dict
    ids: list[int]  # EOS included
    sampler_logp: list[float]  # per token, the engine's
    finished: bool
    reward: float


def step_prompts(num_prompts: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Choose the prompts of step 1, 2, ...: seeded shuffled epochs, their remainders dropped."""
    epoch, batch = divmod(step - 1, num_prompts // batch_size)
    order = list(range(num_prompts))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order[batch * batch_size : (batch + 1) * batch_size]


def rollout(
    llm: Any, asked: list[dict], seeds: list[int], args: argparse.Namespace, **options: Any
) -> list[Response]:
    """Sample and grade a response to each prompt asked."""
    jobs = [(p["prompt_ids"], seed, p["answer"]) for p, seed in zip(asked, seeds, strict=True)]
    options |= {"max_tokens": args.max_tokens, "logprobs": 0, "flat_logprobs": True}
    responses = []
    for i, out, reward in problems.sample(llm, jobs, stop=lambda: bool(STOP), **options):
        ids, logp, finished = out.token_ids, out.logprobs.logprobs, out.finish_reason == "stop"
        responses.append(Response(i, asked[i], list(ids), list(logp), finished, reward))
    return sorted(responses)


# ---------------------------------------------------------------------------------------------
# The model


class Policy(torch.nn.Module):
    """A causal language model that gives token log-probs and never its logits."""

    def __init__(self, lm: torch.nn.Module):
        super().__init__()
        self.lm = lm

    def forward(self, rows: Any, targets: Any, temperature: float, **inputs: Any) -> torch.Tensor:
        """Run packed sequences (`losses.pack`); ln pi of each response token, (R,) float32."""
        hidden = self.lm.base_model(use_cache=False, **inputs).last_hidden_state[0]
        weight = self.lm.get_output_embeddings().weight  # whole here, in the forward of FSDP's root
        return losses.token_logprob(hidden[rows], weight, targets, temperature)


def load_policy(folder: Path, mesh: Any, dtype: torch.dtype, offload: bool = False) -> Policy:
    """Load a model in `dtype` and shard it over `mesh`, layer by layer and then the rest.

    Computes in bf16 on GPUs and in float32 on the CPU; gradients are reduced in float32. UserError
    for an architecture whose log-probs would come out wrong.
    """
    from torch.distributed import fsdp
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register("packed", losses.packed_attention)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="packed")
    odd = {"final_logit_softcapping", "logits_scaling", "logit_scale"} & lm.config.to_dict().keys()
    sliding = "sliding_attention" in (getattr(lm.config, "layer_types", None) or ())
    if odd or sliding or lm.get_output_embeddings().bias is not None:
        raise UserError(f"{lm.config.model_type} has an attention or a head not supported here")
    policy, compute = Policy(lm), torch.bfloat16 if mesh.device_type == "cuda" else torch.float32
    options = {"mesh": mesh, "mp_policy": fsdp.MixedPrecisionPolicy(compute, torch.float32)}
    options |= {"offload_policy": fsdp.CPUOffloadPolicy()} if offload else {}
    for module in [*lm.base_model.layers, policy]:
        fsdp.fully_shard(module, **options)
    return policy.train()


def gather(shards: Iterable, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Gather named shards one by one, cast before they travel; all ranks must iterate."""
    for name, shard in shards:
        yield name, shard.detach().to(dtype).full_tensor()


# ---------------------------------------------------------------------------------------------
# The run's folder: every file whole or absent


def save(folder: Path, step: int, policy: Policy, optimizer: Any, args: argparse.Namespace) -> None:
    """Write a checkpoint that from_pretrained and vLLM load as it is; collective.

    float32 weights and, under trainer/, Adam's moments; without an optimiser the finished model
    alone, in bf16 on GPUs. Data order and seeds follow from the step, so there is no other state.
    Written beside, hashed into manifest.json, flushed, renamed.
    """
    from safetensors.torch import save_file

    beside, first = folder.with_name(f".{folder.name}.tmp"), dist.get_rank() == 0
    dtype = torch.float32 if optimizer or not torch.cuda.is_available() else torch.bfloat16
    weights = dict(policy.lm.named_parameters())  # a head tied to the embedding is there once
    parts = {"model.safetensors": weights.items()}
    if optimizer:
        keys = itertools.product(("exp_avg", "exp_avg_sq"), weights.items())
        moments = ((f"{key}.{name}", optimizer.state[weight][key]) for key, (name, weight) in keys)
        parts["trainer/adam.safetensors"] = moments
    if first:
        shutil.rmtree(beside, ignore_errors=True)
        skip = shutil.ignore_patterns(
            "*.safetensors*", "*.bin*", "*.pt*", "manifest.json", "trainer"
        )
        shutil.copytree(problems.model_folder(args.model), beside, ignore=skip)
        (beside / "trainer").mkdir()
        config = problems.read_json(beside / "config.json") | {"dtype": str(dtype)[6:]}
        problems.write_whole(beside / "config.json", json.dumps(config, indent=2))
    for name, shards in parts.items():
        tensors = {k: v.cpu() for k, v in gather(shards, dtype) if first}
        if first:
            save_file(tensors, beside / name, metadata={"format": "pt"})
    if first:
        manifest = {"step": step, "sha256": problems.folder_hashes(beside)}
        problems.write_whole(beside / "manifest.json", json.dumps(manifest, indent=2))
        os.sync()
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
        for old in step_folders(folder.parent)[args.keep_checkpoints :]:
            shutil.rmtree(old)
    dist.barrier()


def load_adam(file: Path, num_updates: int, policy: Policy, optimizer: Any) -> None:
    """Restore AdamW's state from a checkpoint, whatever number of ranks wrote it."""
    from safetensors import safe_open
    from torch.distributed.tensor import distribute_tensor

    with safe_open(file, "pt") as saved:
        for name, p in policy.lm.named_parameters():
            state = {"step": torch.tensor(float(num_updates), device=p.device)}
            for key in ("exp_avg", "exp_avg_sq"):
                moment = saved.get_tensor(f"{key}.{name}").to(p.device)
                state[key] = distribute_tensor(moment, p.device_mesh, p.placements)
            optimizer.state[p] = state


def step_folders(folder: Path) -> list[Path]:
    """List a folder's step-N, newest first."""
    return sorted(folder.glob("step-*"), key=lambda p: -int(p.name.removeprefix("step-")))


def whole_step(folder: Path) -> int:
    """Return a saved model's step; 0 if there is none or it is not as its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return manifest["step"] if manifest["sha256"] == problems.folder_hashes(folder) else 0
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def open_run(args: argparse.Namespace, header: dict, identity: dict) -> tuple[TextIO, int]:
    """Take OUT for this process alone; returns its metrics file and the step to continue after."""
    out, step = Path(args.out), 0
    problems.refuse_difference(args.values, header, {"model_sha256": identity["model_sha256"]})
    identity["values_sha256"] = header["sha256"]
    metrics = problems.lock(out / "metrics.jsonl")
    if (out / "config.json").exists():
        saved = problems.read_json(out / "config.json")
        problems.refuse_difference(f"the run in {out}", saved, identity)
        if (step := whole_step(out / "final")) >= args.num_steps:
            return metrics, step
        for folder in step_folders(out / "checkpoints"):
            if step := whole_step(folder):
                break
            print(f"{folder} is damaged: going back to the one before it", file=sys.stderr)
    config = json.dumps(vars(args) | identity, indent=2)
    problems.write_whole(out / "config.json", config)
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step]
    metrics.truncate(sum(map(len, kept)))  # the steps after it run, and are told, again
    return metrics, step


# ---------------------------------------------------------------------------------------------
# The algorithm


def on_signal(number: int, frame: Any) -> None:
    """Ask the run to save its last finished step and stop; at the second signal, leave at once."""
    if STOP:
        os._exit(128 + number)
    STOP.append(number)


def micro_batches(update: list[Response], args: argparse.Namespace, device: Any) -> list:
    """Pack this rank's hand of an update; `share` is a micro-batch's part of the global mean."""
    lengths = [len(r.prompt["prompt_ids"]) + len(r.ids) - 1 for r in update]
    hands, batches = losses.deal(lengths, dist.get_world_size(), args.micro_batch_tokens), []
    tensor = functools.partial(torch.tensor, device=device)
    for hand in hands[dist.get_rank()]:
        chosen = [update[i] for i in hand] or update[:1]  # share 0: FSDP wants equal forwards
        prompts, responses = [r.prompt["prompt_ids"] for r in chosen], [r.ids for r in chosen]
        batch = SimpleNamespace(share=len(hand) / len(update))
        batch.inputs, batch.lengths = losses.pack(prompts, responses, device)
        batch.rewards = tensor([r.reward for r in chosen])
        batch.v_star = tensor([r.prompt["v_star"] for r in chosen])
        batch.sampler_logp = tensor([x for r in chosen for x in r.sampler_logp])
        batches.append(batch)
    return batches


def train(args: argparse.Namespace, header: dict, prompts: list[dict]) -> None:
    """Run A*-PO on this rank."""
    from torch.distributed.device_mesh import init_device_mesh

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    rank, world, tp = dist.get_rank(), dist.get_world_size(), args.tensor_parallel_size
    on_gpu, out = torch.cuda.is_available(), Path(args.out)
    nodes = world // int(os.environ["LOCAL_WORLD_SIZE"])  # read here: the engine overwrites it
    identity = problems.identify(args, *FREE_ON_RESUME)
    metrics, done = open_run(args, header, identity) if rank == 0 else (None, 0)
    dist.broadcast_object_list(box := [done])
    if (done := box[0]) >= args.num_steps:
        return
    # The engine's log-probs are at the sampling temperature, as ln pi is. No prefix cache: a prompt
    # is asked once, and a resumed run must start as cold as an uninterrupted one.
    options = {"logprobs_mode": "processed_logprobs", "enable_prefix_caching": False}
    context = args.max_prompt_tokens + args.max_tokens
    llm = problems.start_engine(args, context, enable_sleep_mode=on_gpu, **options)
    device, compute = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    # Shard inside a node, replicate across them.
    shape, names = (
        ((nodes, world // nodes), ("replicate", "shard")) if nodes > 1 else ((world,), None)
    )
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    reference = problems.model_folder(args.model)
    start = out / "checkpoints" / f"step-{done}" if done else reference
    policy = load_policy(start, mesh, torch.float32)
    ref = load_policy(reference, mesh, compute, args.offload_ref).requires_grad_(False)
    if args.gradient_checkpointing:
        policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    adam = {"betas": (0.9, 0.999), "weight_decay": 0.01, "fused": True}
    optimizer = torch.optim.AdamW(policy.parameters(), args.lr, **adam)
    if done:
        load_adam(
            start / "trainer/adam.safetensors", done * args.updates_per_batch, policy, optimizer
        )
    questions = problems.load_problems(args.eval_dataset, "test") if args.eval_dataset else []
    problems.write_prompts(questions + prompts, llm.get_tokenizer(), header["chat_template"])
    rewards = torch.tensor([p["rewards"] for p in prompts], dtype=torch.float64)
    v_star = losses.optimal_value(rewards, args.beta1 or header["beta1"]).tolist()
    prompts = [p | {"v_star": value} for p, value in zip(prompts, v_star, strict=True)]

    def sync() -> None:
        if on_gpu:
            torch.cuda.empty_cache()
        weights = gather(policy.lm.state_dict().items(), compute)
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if on_gpu:
            llm.wake_up(tags=["kv_cache"])

    def lap() -> None:
        if on_gpu:
            torch.cuda.synchronize()
        clock.append(time.perf_counter())

    sync()  # the engine of a resumed run holds the reference
    saved, stops = done, []
    for step in range(done + 1, args.num_steps + 1):
        clock = [time.perf_counter()]
        # 1. x ~ D
        chosen = step_prompts(len(prompts), args.batch_size, step, args.seed)
        asked = [(prompts[i], n) for i in chosen for n in range(args.samples_per_prompt)]

        # 2. y ~ pi_t(.|x), the engines sharing the work, and 3. r(x, y), beside it
        mine = asked[rank // tp :: world // tp]
        seeds = [problems.response_seed(args.seed, step, p["id"], n) for p, n in mine]
        options = {"temperature": args.temperature, "sampled": lap}
        mine = rollout(llm, [p for p, _ in mine], seeds, args, **options)
        dist.all_gather_object(everyone := [None] * world, (STOP, mine))
        if stops := [number for stop, _ in everyone for number in stop]:
            break  # the unfinished step is abandoned
        parts = [part for _, part in everyone[::tp]]
        responses = [r for row in itertools.zip_longest(*parts) for r in row if r]  # as asked
        if on_gpu:  # the engine's KV cache makes room for the trainer
            llm.sleep(level=0)
            llm.release_kv_cache_memory()
        lap()

        # 4. ln pi_ref(y|x), by the same code and in the same shapes as ln pi
        random.Random(f"{args.seed}/{step}").shuffle(responses)
        size = len(responses) // args.updates_per_batch
        updates = [responses[i : i + size] for i in range(0, len(responses), size)]
        updates = [micro_batches(update, args, device) for update in updates]
        with torch.no_grad():
            for batch in itertools.chain(*updates):
                token_logp = ref(temperature=args.temperature, **batch.inputs)
                batch.ref_logp = losses.sequence_logprob(token_logp, batch.lengths)
        ref.reshard()
        lap()

        # 5. descend the mean of (beta2 ln(pi / pi_ref) - (r - V*))^2
        sums, norms = torch.zeros(4, dtype=torch.float64, device=device), []
        for number, update in enumerate(updates):
            for batch in update:
                token_logp = policy(temperature=args.temperature, **batch.inputs)
                logp = losses.sequence_logprob(token_logp, batch.lengths)
                goal = (batch.ref_logp, batch.rewards, batch.v_star, args.beta2)
                loss = losses.a_star_po_loss(logp, *goal)
                (loss * batch.share * world).backward()  # FSDP takes the mean over the ranks
                sums[0] += loss.detach() * batch.share
                if number == 0 and batch.share:  # still pi_t, which sampled: on-policy
                    sums[1] += (logp - batch.ref_logp).detach().sum()
                    sums[2] += (token_logp - batch.sampler_logp).detach().abs().sum()
                    sums[3] += len(token_logp)
            norms.append(clip_grad_norm_(policy.parameters(), 1.0).full_tensor().item())
            if not math.isfinite(norms[-1]):
                sys.exit(
                    f"error: step {step}: the gradient is {norms[-1]}; {saved} steps are saved"
                )
            optimizer.step()
            optimizer.zero_grad()
        lap()

        # 6. pi_t+1 into the engine
        sync()
        lap()

        dist.all_reduce(sums)
        loss, logratio, gap, tokens = sums.tolist()
        of_each = [[r.reward, r.prompt["v_star"], len(r.ids), not r.finished] for r in responses]
        reward, v_star, length, cut = (sum(x) / len(x) for x in zip(*of_each, strict=True))
        seconds, total = [b - a for a, b in itertools.pairwise(clock)], clock[-1] - clock[0]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        memory = torch.cuda.max_memory_allocated() if on_gpu else memory
        row = [step, loss / len(updates), reward, v_star, reward - v_star, logratio / size]
        row += [logratio / tokens, length, cut, sum(norms) / len(norms), args.lr, gap / tokens]
        row += [*seconds, total, length * len(responses) / total, memory / 2**30]
        if questions and (step % args.eval_every == 0 or step == args.num_steps):
            mine = questions[rank // tp :: world // tp]  # too long a prompt counts as wrong
            mine = [q for q in mine if len(q["prompt_ids"]) <= args.max_prompt_tokens]
            mine = rollout(llm, mine, [0] * len(mine), args, temperature=0.0)
            dist.all_gather_object(parts := [None] * world, sum(r.reward for r in mine))
            row.append(sum(parts[::tp]) / len(questions))
        if rank == 0:
            columns = [column.split(":") for column in COLUMNS.split()][: len(row)]
            print(*(f"{name} {x:{spec}}" for (name, spec), x in zip(columns, row, strict=True)))
            named = {name: x for (name, _), x in zip(columns, row, strict=True)}
            print(json.dumps(named), file=metrics, flush=True)
        if step % args.save_every == 0 or step == args.num_steps:
            save(out / "checkpoints" / f"step-{step}", step, policy, optimizer, args)
            saved = step
    if stops and step - 1 > saved:
        save(out / "checkpoints" / f"step-{step - 1}", step - 1, policy, optimizer, args)
    if not stops:
        save(out / "final", args.num_steps, policy, None, args)
    llm.llm_engine.engine_core.shutdown()  # destroys the process group as well
    if stops:
        sys.exit(128 + stops[0])


def main() -> None:
    """Check, launch, train."""
    args = parse_args()
    header, prompts = check(args)
    problems.launch()
    train(args, header, prompts)


if __name__ == "__main__":
    problems.run(main)
