"""Stage 2: train the policy by least squares on r - V*, one response per prompt.

The loop of `train` is the algorithm box, 1 to 6; `least_squares` is its steps 4 and 5. There is no
critic, group, importance ratio, clipping or normalisation (README, details).

    python train_online.py --values values/math.json --out runs/math     # all GPUs here, or the CPU
    torchrun --nnodes 2 --nproc-per-node 8 [...] train_online.py [...]   # several nodes
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any, TextIO

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict as dcp

import losses
import problems

FROM_HEADER = ("model", "temperature", "max_prompt_tokens", "max_tokens", "chat_template")
# What --resume may change: how long and on what a run runs, not what it computes.
FREE_ON_RESUME = ("resume", "values", "num_steps", "save_every", "keep_checkpoints",
                  "micro_batch_tokens", "gradient_checkpointing", "offload_ref")  # fmt: skip
COLUMNS = """step loss reward v_star adv logratio kl_per_token response_tokens truncated grad_norm
lr logprob_gap seconds_generate seconds_grade seconds_ref seconds_update seconds_sync seconds_total
tokens_per_second peak_gib eval_accuracy"""  # the last only on steps that evaluate
ON_GPU = torch.cuda.is_available()
DEVICE, COMPUTE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)

# The published MATH run needs no flag.
parser = problems.command_line(__doc__.splitlines()[0], engine_share=0.6)
add = parser.add_argument
add("--values", default="values/math.json", help="stage 1's file")
add("--out", default="runs/math", help="folder of the run")
add("--resume", action="store_true", help="continue from OUT's last whole checkpoint")
add("--num-steps", type=int, default=725, help="rollouts")
add("--batch-size", type=int, default=256, help="prompts per rollout")
add("--samples-per-prompt", type=int, default=1, help="responses per prompt and rollout")
add("--updates-per-batch", type=int, default=2, help="updates per rollout; 1 is on-policy")
add("--beta1", type=float, help="recompute V* with this beta1; None: the values file's")
add("--beta2", type=float, default=1e-3, help="strength of the KL term")
add("--lr", type=float, default=1e-6, help="AdamW's learning rate, constant")
add("--filter-unsolved", action="store_true", help="drop prompts the reference never solved")
add("--save-every", type=int, default=50, help="steps between checkpoints")
add("--keep-checkpoints", type=int, default=2, help="how many of the newest to keep")
add("--eval-dataset", help="measure greedy accuracy on it while training")
add("--eval-every", type=int, default=50, help="steps between evaluations")
add("--model", help="pi_ref; None: the values file's, and so for the next three")
add("--temperature", type=float, help="of sampling and of ln pi")
add("--max-prompt-tokens", type=int, help="longest prompt, in tokens")
add("--max-tokens", type=int, help="longest response, in tokens")
add("--micro-batch-tokens", type=int, default=8192, help="tokens per forward and rank")
add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory")
add("--offload-ref", action="store_true", help="keep pi_ref in CPU memory")


def check(args: Namespace) -> tuple[list[dict], list[dict]]:
    """Check arguments and files before anything starts, and fill in what defaults to the header's.

    Returns the prompts of the values file and the rows of --eval-dataset. UserError for the first
    mistake.
    """
    problems.check_args(args)
    if args.batch_size % args.updates_per_batch:
        raise problems.UserError(f"--updates-per-batch must divide --batch-size {args.batch_size}")
    values = problems.read_json(args.values, ours=True)
    with problems.explain(f"{args.values} lacks the header, prompts or rewards of stage 1"):
        header, prompts = values["header"] | {"values_sha256": values["sha256"]}, values["prompts"]
        given = {k: v for k, v in vars(args).items() if k in FROM_HEADER and v is not None}
        # with the hashes of model and values, which `open_run` and --resume compare
        vars(args).update({k: header[k] for k in (*FROM_HEADER, "model_sha256", "values_sha256")})
        rewards = torch.tensor([prompt["rewards"] for prompt in prompts], dtype=torch.float64)
        v_star = losses.optimal_value(rewards, args.beta1 or header["beta1"])
        prompts = [p | {"v_star": value} for p, value in zip(prompts, v_star.tolist(), strict=True)]
        texts = {p["id"]: "".join((p["prompt"], p["answer"])) for p in prompts}
        if len(texts) < len(prompts) or not v_star.isfinite().all():
            raise ValueError("an id is there twice, or a reward is no number")
    given["prompt_template"] = problems.PROMPT_TEMPLATE
    problems.refuse_difference(args.values, header, given)
    problems.check_context(args)
    prompts = [p for p in prompts if not args.filter_unsolved or max(p["rewards"]) > 0]
    if len(prompts) < args.batch_size:
        left = f"{args.values}: {len(prompts)} prompts{' ever solved' * args.filter_unsolved}"
        raise problems.UserError(f"{left}, fewer than --batch-size {args.batch_size}")
    questions = problems.load_problems(args.eval_dataset, "test") if args.eval_dataset else []
    args.eval_sha256 = problems.content_sha256({"rows": questions})
    if not args.resume and any(Path(args.out).glob("*")):
        raise problems.UserError(f"{args.out} is in use: --resume it, or give another --out")
    return prompts, questions


# ---------------------------------------------------------------------------------------------
# Sampling


def step_jobs(prompts: list[dict], args: Namespace, step: int) -> list[tuple[dict, dict]]:
    """Say what step 1, 2, ... samples, and how: (prompt, its response's own sampling parameters).

    Prompts come in seeded shuffled epochs, their remainders dropped. The engine tells its log-probs
    of the first update's responses alone: no others are on-policy.
    """
    epoch, batch = divmod(step - 1, len(prompts) // args.batch_size)
    order = list(prompts)
    random.Random(f"{args.seed}/{epoch}").shuffle(order)
    order = order[batch * args.batch_size : (batch + 1) * args.batch_size]
    asked = [(prompt, n) for prompt in order for n in range(args.samples_per_prompt)]
    return [(prompt, {"temperature": args.temperature,
                      "seed": problems.response_seed(args.seed, step, prompt["id"], n),
                      "logprobs": 0 if i < len(asked) // args.updates_per_batch else None})
            for i, (prompt, n) in enumerate(asked)]  # fmt: skip


def rollout(llm, jobs: list, args: Namespace, stop=(), lap=lambda: None) -> tuple[list, list]:
    """Answer and grade jobs, the engines sharing the work; collective.

    Every rank gets what the ranks were told to `stop` by, after which responses are missing, and
    the responses of `problems.sample`, in order and each with its prompt's fields, among which
    "rewards", "lengths" and "truncated" are of stage 1's samples.
    """
    mine = dict(problems.sample(llm, jobs, args, stop, lap))
    dist.all_gather_object(everyone := [None] * dist.get_world_size(), (list(stop), mine))
    drawn = {i: response for _, part in everyone for i, response in part.items()}
    responses = [jobs[i][0] | drawn[i] for i in sorted(drawn)]
    return [number for numbers, _ in everyone for number in numbers], responses


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
    """Load a model in `dtype` and shard it; UserError where ln pi would come out wrong."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    AttentionInterface.register("packed", losses.packed_attention)
    with problems.explain(f"cannot load {folder}"):
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="packed")
    odd = {"final_logit_softcapping", "logits_scaling", "logit_scale"} & lm.config.to_dict().keys()
    sliding = "sliding_attention" in (getattr(lm.config, "layer_types", None) or ())
    if odd or sliding or lm.get_output_embeddings().bias is not None:
        raise problems.UserError(f"{lm.config.model_type}: its attention or head is not supported")
    return shard(lm, mesh, COMPUTE, offload)


def shard(lm: torch.nn.Module, mesh: Any, compute: torch.dtype, offload: bool = False) -> Policy:
    """Shard a model over `mesh`, layer by layer and then the rest; gradients meet in float32."""
    options = {"mesh": mesh, "mp_policy": dist.fsdp.MixedPrecisionPolicy(compute, torch.float32)}
    options |= {"offload_policy": dist.fsdp.CPUOffloadPolicy()} if offload else {}
    # On a CPU gathering costs time, and there is room to keep what is gathered. On a GPU the root
    # goes too: backward gathers the head once more, but the reference's never stays in memory.
    options |= {"reshard_after_forward": compute != torch.float32}
    for module in [*lm.base_model.layers, policy := Policy(lm)]:
        dist.fsdp.fully_shard(module, **options)
    return policy.train()


def sync(llm: Any, policy: Policy) -> None:
    """Stream the policy's weights into the engine, one at a time: no second copy; collective."""
    # A head tied to the embedding is there twice: the engine has a copy of it, packed for CPUs.
    # Each is cast before it travels.
    weights = ((k, part.to(COMPUTE).full_tensor()) for k, part in policy.lm.state_dict().items())
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})


# ---------------------------------------------------------------------------------------------
# The run's folder: every file whole or absent


WHOLE = dcp.StateDictOptions(True, cpu_offload=True, broadcast_from_rank0=True)


def save(folder: Path, step: int, policy: Policy, optimizer: Any, args: Namespace) -> None:
    """Write a checkpoint that from_pretrained and vLLM load as it is; collective.

    float32 weights, AdamW's state in trainer.pt, the log so far in metrics.jsonl; without an
    optimiser the finished model alone, in bf16 on GPUs. Data order and seeds follow from the step.
    Written beside, hashed into manifest.json, flushed, renamed; what a kill leaves unfinished goes
    with the next save.
    """
    beside, dtype = folder.with_name(".unfinished"), torch.float32 if optimizer else COMPUTE
    # A head tied to the embedding is there once.
    whole = ((k, p.detach().to(dtype).full_tensor()) for k, p in policy.lm.named_parameters())
    weights = {name: tensor.cpu() for name, tensor in whole if dist.get_rank() == 0}
    state = dcp.get_optimizer_state_dict(policy, optimizer, options=WHOLE) if optimizer else {}
    if dist.get_rank() == 0:
        with problems.explain(f"cannot write {folder}", OSError):
            shutil.rmtree(beside, ignore_errors=True)
            reference, its = problems.model_folder(args.model), ("*.safetensors*", "*.bin", "*.pt")
            skip = shutil.ignore_patterns(*its, "config.json", "manifest.json", "metrics.jsonl")
            shutil.copytree(reference, beside, ignore=skip)
            config = problems.read_json(reference / "config.json") | {"dtype": str(dtype)[6:]}
            (beside / "config.json").write_text(json.dumps(config, indent=2))
            save_file(weights, beside / "model.safetensors", metadata={"format": "pt"})
            if state:
                shutil.copy(Path(args.out, "metrics.jsonl"), beside)
                need = 2.01 * (beside / "model.safetensors").stat().st_size
                if shutil.disk_usage(beside).free < need:  # torch.save would not say why
                    raise OSError("No space left on device")
                torch.save(state, beside / "trainer.pt")
            manifest = {"step": step, "files": problems.folder_hashes(beside)}
            problems.write_json(beside / "manifest.json", manifest)  # all else is on the disk now
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(beside, folder)
            for old in step_folders(folder.parent)[args.keep_checkpoints :]:
                shutil.rmtree(old)
    dist.barrier()


def step_folders(folder: Path) -> list[Path]:
    """List a folder's step-N, newest first."""
    ours = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(ours, key=lambda path: -int(path.name[5:]))


def whole_step(folder: Path) -> int:
    """Return a saved model's step; 0 if there is none or it is not as its manifest says."""
    with contextlib.suppress(problems.UserError):
        manifest = problems.read_json(folder / "manifest.json", ours=True)
        whole = manifest["files"].items() <= problems.folder_hashes(folder).items()
        return manifest["step"] * (whole and folder.name in ("final", f"step-{manifest['step']}"))
    return 0


def open_run(args: Namespace) -> tuple[TextIO, int | None]:
    """Take OUT for this process alone: its metrics file, the last step saved (None: done)."""
    out, step, identity = Path(args.out), 0, problems.identify(args, *FREE_ON_RESUME)
    problems.refuse_difference(args.values, vars(args), {"model_sha256": identity["model_sha256"]})
    metrics = problems.lock(out / "metrics.jsonl")
    if problems.left_by(out / "config.json", identity):
        if whole_step(out / "final") >= args.num_steps:
            return metrics, None
        for folder in step_folders(out / "checkpoints"):
            if step := whole_step(folder):
                break
            print(f"{folder} is damaged, now damaged-*; trying the one before", file=sys.stderr)
            folder.rename(folder.with_name(f"damaged-{time.time():.0f}-{folder.name}"))
    problems.write_json(out / "config.json", vars(args) | identity)
    told = (out / "checkpoints" / f"step-{step}" / "metrics.jsonl").read_text() if step else ""
    metrics.truncate(0)  # the steps after the checkpoint run, and are told, again
    print(told, end="", file=metrics, flush=True)
    return metrics, step


# ---------------------------------------------------------------------------------------------
# The algorithm


def micro_batches(update: list[dict], args: Namespace) -> list[Namespace]:
    """Pack this rank's hand of an update; `share` is a micro-batch's part of the global mean."""
    lengths = [len(r["prompt_ids"]) + len(r["ids"]) - 1 for r in update]
    hands, batches = losses.deal(lengths, dist.get_world_size(), args.micro_batch_tokens), []
    for hand in hands[dist.get_rank()]:
        chosen = [update[i] for i in hand] or update[:1]  # share 0: FSDP wants equal forwards
        batch = {"rewards": [r["reward"] for r in chosen], "v_star": [r["v_star"] for r in chosen],
                 "sampler_logp": [x for r in chosen for x in r["sampler_logp"]]}  # fmt: skip
        batch = {name: torch.tensor(x, device=DEVICE) for name, x in batch.items()}
        inputs, counts = losses.pack([r["prompt_ids"] for r in chosen], [r["ids"] for r in chosen])
        # FSDP moves the inputs to the GPU; the responses' lengths are read here
        batch |= {"inputs": inputs | {"temperature": args.temperature}, "lengths": counts}
        batches.append(Namespace(**batch, share=len(hand) / len(update)))
    return batches


def least_squares(policy: Policy, ref: Policy, optimizer, responses: list, args: Namespace, lap):
    """Steps 4 and 5 on a rollout: descend the mean of (beta2 ln(pi / pi_ref) - (r - V*))^2.

    Returns loss, logratio, kl_per_token, grad_norm and logprob_gap; all but the loss and the norm
    are of the first update, before it moves the weights: there pi still is what sampled.
    """
    # 4. ln pi_ref(y|x), by the same code and in the same shapes as ln pi
    size, beta2 = len(responses) // args.updates_per_batch, args.beta2
    updates = [micro_batches(responses[i : i + size], args) for i in range(0, len(responses), size)]
    with torch.no_grad():
        for batch in [batch for update in updates for batch in update]:
            batch.ref_logp = losses.sequence_logprob(ref(**batch.inputs), batch.lengths)
    lap()
    # 5. least squares
    sums, norm = torch.zeros(4, dtype=torch.float64, device=DEVICE), 0.0
    for number, update in enumerate(updates):
        for batch in update:
            token_logp = policy(**batch.inputs)
            logp = losses.sequence_logprob(token_logp, batch.lengths)
            loss = losses.a_star_po_loss(logp, batch.ref_logp, batch.rewards, batch.v_star, beta2)
            # FSDP takes the mean over the ranks
            (loss * batch.share * dist.get_world_size()).backward()
            sums[0] += loss.detach() * batch.share / len(updates)
            if number == 0 and batch.share:
                sums[1] += (logp - batch.ref_logp).detach().sum()
                sums[2] += (token_logp - batch.sampler_logp).detach().abs().sum()
                sums[3] += len(token_logp)
        norm += torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).full_tensor()
        optimizer.step()
        optimizer.zero_grad()
    dist.all_reduce(sums)
    loss, logratio, gap, tokens = sums.tolist()
    return loss, logratio / size, logratio / tokens, norm.item() / len(updates), gap / tokens


def train(args: Namespace, prompts: list, questions: list, learn: Callable = least_squares) -> None:
    """Run A*-PO on this rank; another `learn` makes it another algorithm (experiments/).

    `learn` takes and returns what `least_squares` does, and calls `lap` once, before its updates.
    """
    told: list[int] = []  # the signals that this rank got
    for number in problems.STOPS:  # the first lets the last step be saved
        signal.signal(number, lambda n, frame: os._exit(128 + n) if told else told.append(n))
    rank, world = dist.get_rank(), dist.get_world_size()
    out, nodes = Path(args.out), world // int(os.environ["LOCAL_WORLD_SIZE"])  # the engine's later
    metrics, done = open_run(args) if rank == 0 else (None, 0)
    dist.broadcast_object_list(box := [done])
    if (done := box[0]) is None:
        return
    # The engine's log-probs are at the sampling temperature, as ln pi is. No prefix cache: a prompt
    # is asked once, and a resumed run must start as cold as an uninterrupted one.
    options = {"logprobs_mode": "processed_logprobs", "enable_prefix_caching": False}
    llm = problems.start_engine(args, args.max_prompt_tokens, enable_sleep_mode=ON_GPU, **options)
    # Shard inside a node, replicate across them.
    dims = ({"replicate": nodes} if nodes > 1 else {}) | {"shard": world // nodes}
    mesh = dist.init_device_mesh(DEVICE, tuple(dims.values()), mesh_dim_names=tuple(dims))
    reference = problems.model_folder(args.model)
    start = out / "checkpoints" / f"step-{done}" if done else reference
    policy = load_policy(start, mesh, torch.float32)
    ref = load_policy(reference, mesh, COMPUTE, args.offload_ref).requires_grad_(False)
    if args.gradient_checkpointing:
        policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    # Betas 0.9 and 0.999 and a weight decay of 0.01, as published, are its defaults.
    optimizer = torch.optim.AdamW(policy.parameters(), args.lr, fused=True)
    if done:
        # a pickle, of which whole_step has seen that it is ours, and of tensors alone
        state = torch.load(start / "trainer.pt", weights_only=True) if rank == 0 else {}
        dcp.set_optimizer_state_dict(policy, optimizer, state, options=WHOLE)
        sync(llm, policy)  # the engine holds the reference
    # Of what is longer, which a question of --eval-dataset may be, the end is asked.
    problems.write_prompts(questions + prompts, llm, args, args.max_prompt_tokens)

    def lap() -> None:  # tell the seconds since the last lap of this step
        torch.get_device_module(DEVICE).synchronize()
        seconds.append(time.perf_counter() - began - sum(seconds))

    saved, stops = done, []
    for step in range(done + 1, args.num_steps + 1):
        began, seconds = time.perf_counter(), []
        # 1. x ~ D
        jobs = step_jobs(prompts, args, step)
        # 2. y ~ pi_t(.|x) and 3. r(x, y), side by side
        stops, responses = rollout(llm, jobs, args, told, lap)
        if stops:  # the unfinished step is abandoned
            if step - 1 > saved:
                save(out / "checkpoints" / f"step-{step - 1}", step - 1, policy, optimizer, args)
            break
        if ON_GPU:  # the engine's KV cache makes room for the trainer
            llm.sleep(level=0)
            llm.release_kv_cache_memory()
        lap()
        # 4. ln pi_ref(y|x) and 5. least squares
        loss, logratio, kl, norm, gap = learn(policy, ref, optimizer, responses, args, lap)
        if not torch.tensor(loss + norm).isfinite():
            raise ArithmeticError(f"step {step}: loss {loss}, norm {norm}; {saved} steps are saved")
        lap()

        # 6. pi_t+1 into the engine
        torch.cuda.empty_cache()  # nothing without a GPU
        sync(llm, policy)
        if ON_GPU:
            llm.wake_up(tags=["kv_cache"])
        lap()

        of_each = [(r["reward"], r["v_star"], len(r["ids"]), not r["finished"]) for r in responses]
        reward, v_star, length, cut = (sum(x) / len(x) for x in zip(*of_each, strict=True))
        total = sum(seconds)
        memory = torch.cuda.max_memory_allocated() or getrusage(RUSAGE_SELF).ru_maxrss * 1024
        row = [step, loss, reward, v_star, reward - v_star, logratio, kl, length, cut, norm]
        row += [args.lr, gap, *seconds, total, length * len(responses) / total, memory / 2**30]
        if questions and (step % args.eval_every == 0 or step == args.num_steps):
            _, graded = rollout(llm, [(q, {"temperature": 0.0}) for q in questions], args)
            row.append(sum(r["reward"] for r in graded) / len(questions))
        if rank == 0:
            line = dict(zip(COLUMNS.split(), row, strict=False))
            print(*(f"{name} {value:<10.4g}" for name, value in line.items()))
            with problems.explain(f"cannot write {metrics.name}", OSError):
                print(json.dumps(line), file=metrics, flush=True)
        if step % args.save_every == 0 or step == args.num_steps:
            save(out / "checkpoints" / f"step-{step}", step, policy, optimizer, args)
            saved = step
    else:
        save(out / "final", max(done, args.num_steps), policy, None, args)
    if rank == 0:
        print("grading:", problems.grading_counts)
    llm.llm_engine.engine_core.shutdown()  # destroys the process group as well
    if stops:  # every rank leaves with the code of the one that was told
        sys.exit(128 + stops[0])


def main() -> None:
    """Check, launch, train."""
    args = parser.parse_args()
    checked = check(args)
    problems.launch(args.tensor_parallel_size)
    train(args, *checked)


if __name__ == "__main__":
    problems.run(main)
