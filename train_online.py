"""Stage 2: train the policy by least squares on r - V*, one response per prompt.

A step is numbered 1 to 6 in `train`: draw prompts, sample a response to each from the policy, score
it, take ln pi_ref, regress beta2 ln(pi / pi_ref) onto r - V*, give the new weights to the engine.
What differs from other trainers:

- There is no critic and no group of responses. The baseline is V*, which stage 1 has computed.
- There is no importance ratio, and no clipping of one. The loss is a squared error, in losses.py.
- ln pi(y|x) is a sum over the response's tokens, EOS included, and is not divided by its length.
  The policy and the reference compute it by the same code in the same shapes.
- As published, a step makes two updates, each on its half of the responses. The second half was
  sampled before the first update, so it is slightly off-policy. --updates-per-batch 1 avoids that.
- There is no learning-rate schedule and no entropy bonus.

It uses all GPUs of this machine, or the CPU if there is none. On several machines, start it on each
with torchrun (docs/hardware.md).
"""

from apo import environment  # noqa: F401 - it ends with a sentence if no environment is active

# isort: split
import argparse
import contextlib
import dataclasses
import itertools
import math
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import losses
from apo import command_line, engine, files, lora, math_reward, memory_budget, problems, self_check
from apo.command_line import (
    positive_integer,
    positive_number,
    positive_or_infinite,
    whole_number,
)
from apo.engine import Request, Response
from apo.files import UserError
from apo.policy import (
    COMPUTE_DTYPE,
    DEVICE,
    LARGEST_GAP,
    ON_GPU,
    MicroBatch,
    Policy,
    add_ref_logp,
    load_optimizer,
    load_policy,
    make_mesh,
    make_micro_batches,
    remove_old_checkpoints,
    save_checkpoint,
    save_final_model,
)
from apo.problems import Prompt
from apo.run_folder import HAS_CHECKPOINTS, RunLog, is_failed_start, open_run
from apo.values import Values, load_values, make_prompts

EXAMPLES = """examples:
  python train_online.py                                      the published MATH run
  python train_online.py --resume                             go on from the last checkpoint
  python train_online.py --values values/smoke.json --num-steps 4 --out runs/smoke
"""
# ---------------------------------------------------------------------------------------------
# The algorithm


class Algorithm(NamedTuple):
    """The parts of an algorithm that the loop below leaves open.

    `a_star_po` is the one of the paper, and needs only a loss: V* is in MicroBatch.numbers for
    every algorithm. experiments/baselines.py has others, and shows what each needs beside its loss.
    To try your own, write it below `a_star_po`, which baselines.py and the tests use as it is. If
    you need a function of baselines.py, copy it here: that file imports this one. To compare yours
    with the others, write it in baselines.py instead (experiments/README.md).
    """

    # From a micro-batch and ln pi of its response tokens (R,): the loss of each sequence (B,), and
    # statistics by name, (B,) each. The update minimises the mean over all sequences; `token_mean`
    # in experiments/baselines.py makes it a mean over all tokens. Statistics are reported for
    # the first update of a step only, because there the policy is still the one that sampled. Other
    # shapes are refused, and so are names in METRIC_NAMES.
    loss: Callable[[MicroBatch, Tensor], tuple[Tensor, dict[str, Tensor]]]
    # Adds to Response.numbers of all responses of a step, for example an advantage. It is then in
    # MicroBatch.numbers under the same name. The list holds the --samples-per-prompt responses to
    # the first prompt, then those to the second, and so on.
    credit: Callable[[list[Response]], None] | None = None
    # Is called with the policy and the list of the step's updates, before the first of them moves
    # the weights. It may put what it computes into MicroBatch.extra, and add updates to the list.
    prepare: Callable[[Policy, list[list[MicroBatch]]], None] | None = None
    # Keep this many responses to a prompt in one micro-batch, for a loss that compares them. A
    # method that compares them in `credit`, such as GRPO, leaves it at 1.
    group_size: int = 1


def a_star_po(beta2: float) -> Algorithm:
    """A*-PO: fit beta2 times the log-ratio of each response to its advantage, r - V*.

    Nothing is added to the responses and nothing is prepared: V* is in batch.numbers, and ln pi_ref
    is there for every algorithm. The log-ratio is reported, since its mean over responses of the
    policy is an unbiased estimate of KL(pi || pi_ref).
    """

    def loss(batch: MicroBatch, token_logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logp = losses.sequence_logprob(token_logp, batch.lengths)
        ref_logp = losses.sequence_logprob(batch.ref_logp, batch.lengths)
        residuals = losses.squared_residuals(
            logp, ref_logp, batch.rewards, batch.numbers["v_star"], beta2
        )
        return residuals, {"logratio": logp - ref_logp}

    return Algorithm(loss)


# The metrics that a step can have. A loss may not return a statistic with such a name.
METRIC_NAMES = {
    "step",
    "lr",
    "loss",
    "reward",
    "v_star",
    "adv",
    "kl_per_token",
    "grad_norm",
    "logprob_gap",
    "response_tokens",
    "truncated",
    "seconds_generate",
    "seconds_grade",
    "seconds_ref",
    "seconds_update",
    "seconds_sync",
    "seconds_total",
    "tokens_per_second",
    "peak_gib",
    "eval_accuracy",
    "eval_truncated",
}


def update(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    updates: list[list[MicroBatch]],
    loss_function: Callable[[MicroBatch, Tensor], tuple[Tensor, dict[str, Tensor]]],
    max_grad_norm: float = 1.0,
) -> dict[str, float]:
    """Make one optimizer step for each update; all ranks must call it together.

    `model` is the policy, or another module that takes a micro-batch's inputs and is sharded
    (`shard` in policy.py), such as a critic: the loss function gets what it returns. `updates` has
    the micro-batches of each update. A gradient whose norm is above `max_grad_norm` is scaled down
    to it. Returns:

    - "loss" and "grad_norm" (before clipping): means over the updates;
    - each statistic of the loss function: its mean over the sequences;
    - "logprob_gap": the mean over the tokens of |ln pi by this forward pass - ln pi by the engine|
      (for a critic it means nothing);
    - "kl_per_token", if there is a statistic "logratio".

    The last three are of the first update, before it moves the weights: there the policy is still
    the one that sampled.
    """
    first = updates[0][0]
    sums = {"loss": torch.zeros((), dtype=torch.float64, device=DEVICE)}
    grad_norm = 0.0
    for number, batches in enumerate(updates):
        for batch in batches:
            output = model(**batch.inputs)
            sequence_losses, statistics = loss_function(batch, output)
            check_loss(batch, sequence_losses, statistics)
            # The mean over all sequences of the update, whatever the split into micro-batches. A
            # micro-batch has weight 0 if it only keeps this rank in step with the others.
            loss = batch.weight * sequence_losses.sum() / batch.num_sequences
            # Each rank has the part of its own sequences. FSDP averages gradients over the ranks,
            # where the sum of the parts is wanted.
            (loss * dist.get_world_size()).backward()
            sums["loss"] += loss.detach() / len(updates)
            # Kept for `add_sums`, for the last lines of this function, and for samples.jsonl.
            batch.statistics = {name: x.detach() for name, x in statistics.items()}
            if batch.statistics.keys() != first.statistics.keys():
                raise ValueError("the loss returns other statistics for some micro-batches")
            if number == 0:
                add_sums(sums, batch, output.detach())
        # The norm of the gradient, over the slices of all ranks. FSDP's tensors are DTensors: each
        # rank holds its slice, and full_tensor() puts the slices of all ranks together.
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        grad_norm += norm.full_tensor()
        optimizer.step()
        optimizer.zero_grad()

    # One message for all sums; every rank has the same names in the same order.
    stacked = torch.stack(list(sums.values()))
    dist.all_reduce(stacked)
    totals = dict(zip(sums, stacked.tolist(), strict=True))
    metrics = {"loss": totals["loss"], "grad_norm": grad_norm.item() / len(updates)}
    for name in first.statistics:
        metrics[name] = totals[name] / first.num_sequences
    if "logratio" in totals:
        metrics["kl_per_token"] = totals["logratio"] / first.num_tokens
    if "logprob_gap" in totals:
        metrics["logprob_gap"] = totals["logprob_gap"] / first.num_tokens
    return metrics


def check_loss(batch: MicroBatch, sequence_losses: Tensor, statistics: dict[str, Tensor]) -> None:
    """Check what a loss function returned for a micro-batch.

    Raises ValueError for a name in METRIC_NAMES, and unless there is one number for each sequence.
    Without this check, a mean, or one number for each token, would be trained on as well, with
    another scale.
    """
    taken = METRIC_NAMES & statistics.keys()
    if taken:
        raise ValueError(f"the log has its own {sorted(taken)}: rename the statistic")
    for name, values in {"loss": sequence_losses, **statistics}.items():
        if values.shape != batch.lengths.shape:
            expected = tuple(batch.lengths.shape)
            raise ValueError(
                f"{name} has the shape {tuple(values.shape)} in place of {expected}: "
                "a loss function returns one number for each sequence"
            )


def add_sums(sums: dict[str, Tensor], batch: MicroBatch, token_logp: Tensor) -> None:
    """Add a micro-batch's sums of its statistics, and of the gap to the sampler."""
    totals = {name: values.sum() for name, values in batch.statistics.items()}
    if batch.sampler_logp is not None:
        totals["logprob_gap"] = (token_logp - batch.sampler_logp).abs().sum()
    for name, total in totals.items():
        sums[name] = sums.get(name, 0.0) + batch.weight * total.double()


# ---------------------------------------------------------------------------------------------
# The loop


@dataclasses.dataclass
class TrainingData:
    """What a run is trained and evaluated on, checked."""

    values: Values
    v_star: dict[str, float]  # by the prompt's id
    prompts: list[Prompt]
    eval_rows: list[dict]
    eval_prompts: list[Prompt]
    notes: list[str]  # sentences on the evaluation set, to be printed


@dataclasses.dataclass
class Run:
    """What `set_up` makes and the loop of `train` uses."""

    log: RunLog
    llm: Any
    policy: Policy
    ref: Callable[..., Tensor]  # as a policy is called; it returns ln pi_ref
    optimizer: torch.optim.Optimizer
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    reference_folder: Path
    first_step: int  # 1, or the one after the checkpoint that it continues from


def train(args: argparse.Namespace, data: TrainingData, algorithm: Algorithm) -> None:
    """Train on this rank; all ranks call it together. It resumes what --out holds."""
    if args.samples_per_prompt % algorithm.group_size != 0:
        raise UserError(
            f"--samples-per-prompt {args.samples_per_prompt}: this algorithm compares responses to "
            f"a prompt in groups of {algorithm.group_size}"
        )
    run = set_up(args, data, algorithm)
    if run is None:
        return
    # Sampling is as in stage 1, or V* would belong to another distribution.
    temperature = data.values.header["temperature"]
    max_tokens = data.values.header["max_tokens"]
    if run.eval_prompts and run.first_step == 1:
        log_metrics(run, {"step": 0} | evaluate(run, max_tokens))

    stop_flag = command_line.StopFlag()
    stopped_by = 0
    for step in range(run.first_step, args.num_steps + 1):
        metrics = {"step": step, "lr": args.lr}
        start = time.perf_counter()

        # 1. x ~ D: the next prompts of this epoch.
        prompts = next_batch(run.prompts, args.batch_size, args.seed, step)
        requests = make_requests(prompts, args, step)

        # 2. y ~ pi_t(. | x). Each rank samples its share of the requests. Grading starts as soon as
        # a response has ended, and runs beside the sampling.
        with timed(metrics, "seconds_generate"):
            sampled = list(engine.sample(run.llm, requests, temperature, max_tokens))

        # 3. r(x, y). After `gather` every rank has all responses with their rewards, and each
        # response gets V* of its prompt.
        with timed(metrics, "seconds_grade"):
            responses = engine.gather(sampled)
            # Sleep mode is for GPUs on which trainer and KV cache do not fit together: the cache's
            # memory is the trainer's from here on, until `restore_cache`.
            engine.release_cache(run.llm)
        for response in responses:
            response.numbers["v_star"] = data.v_star[response.prompt.row["id"]]
        if algorithm.credit is not None:
            algorithm.credit(responses)

        # 4. ln pi_ref(y | x), in the very micro-batches in which the policy will run.
        with timed(metrics, "seconds_ref"):
            updates = split_into_updates(responses, args, temperature, algorithm.group_size)
            add_ref_logp(run.ref, updates)

        # 5. Descend the algorithm's loss: for A*-PO, least squares on r - V*. The first update is
        # on-policy, a second one slightly off it.
        with timed(metrics, "seconds_update"):
            if algorithm.prepare is not None:
                algorithm.prepare(run.policy, updates)
            metrics |= update(
                run.policy, run.optimizer, updates, algorithm.loss, args.max_grad_norm
            )
            metrics["peak_gib"] = used_memory()

        # 6. pi_{t+1} into the engine.
        with timed(metrics, "seconds_sync"):
            run.policy.load_into(run.llm)
            engine.restore_cache(run.llm)

        # The step ends here. What follows is not counted in its seconds.
        metrics["seconds_total"] = time.perf_counter() - start
        metrics |= summarize(responses, metrics["seconds_total"])
        check_metrics(metrics, temperature)
        is_last = step == args.num_steps
        if run.eval_prompts and (is_last or step % args.eval_every == 0):
            metrics |= evaluate(run, max_tokens)
        own_updates = updates[: args.updates_per_batch]  # `prepare` may have added others
        log_step(run, metrics, responses[: args.log_samples], own_updates)

        # A signal may reach one rank alone, so the ranks agree once a step whether to stop.
        stopped_by = stop_flag.agree()
        if stopped_by or is_last or step % args.save_every == 0:
            save_step(run, args, step)
        if stopped_by:
            break
    finish(run, args, stopped_by)


@contextlib.contextmanager
def timed(metrics: dict[str, Any], name: str) -> Iterator[None]:
    """Measure the seconds of a block as metrics[name].

    A GPU runs its kernels while Python goes on, so the end of the block waits for them.
    """
    start = time.perf_counter()
    yield
    torch.get_device_module(DEVICE).synchronize()
    metrics[name] = time.perf_counter() - start


# ---------------------------------------------------------------------------------------------
# The parts of a step


def next_batch(prompts: list[Prompt], batch_size: int, seed: int, step: int) -> list[Prompt]:
    """Return the prompts of step 1, 2, ...; they follow from seed and step alone.

    An epoch is a seeded shuffle of all prompts. Prompts at its end that do not fill a batch are
    left out of that epoch.
    """
    batches_per_epoch = len(prompts) // batch_size
    epoch, batch = divmod(step - 1, batches_per_epoch)
    shuffled = list(prompts)
    random.Random(f"{seed}/{epoch}").shuffle(shuffled)
    return shuffled[batch * batch_size : (batch + 1) * batch_size]


def make_requests(prompts: list[Prompt], args: argparse.Namespace, step: int) -> list[Request]:
    """Ask for --samples-per-prompt responses of each prompt, each with its own seed.

    The responses of a prompt follow each other. Those of the first update come with the sampler's
    log-probs, for logprob_gap.
    """
    num_requests = len(prompts) * args.samples_per_prompt
    num_logprobs = num_requests // args.updates_per_batch
    requests = []
    for prompt in prompts:
        for number in range(args.samples_per_prompt):
            seed = engine.response_seed(args.seed, step, prompt.row["id"], number)
            wants_logprobs = len(requests) < num_logprobs
            requests.append(Request(prompt, number, seed, wants_logprobs))
    return requests


def split_into_updates(
    responses: list[Response], args: argparse.Namespace, temperature: float, group_size: int
) -> list[list[MicroBatch]]:
    """Cut a step's responses into --updates-per-batch parts, and pack each into micro-batches.

    A rank gets its own micro-batches of every update, and all ranks get the same number of them.
    """
    size = len(responses) // args.updates_per_batch
    updates = []
    for start in range(0, len(responses), size):
        part = responses[start : start + size]
        tokens = args.micro_batch_tokens
        updates.append(make_micro_batches(part, temperature, tokens, group_size))
    return updates


def summarize(responses: list[Response], seconds: float) -> dict[str, float]:
    """Return the metrics of a step's responses, those of all ranks: means, and tokens per second.

    A fork that wants another number of the whole batch adds it here, and its name to METRIC_NAMES.
    """
    count = len(responses)
    num_tokens = sum(len(response.ids) for response in responses)
    reward = sum(response.reward for response in responses) / count
    v_star = sum(response.numbers["v_star"] for response in responses) / count
    return {
        "reward": reward,
        "v_star": v_star,
        "adv": reward - v_star,
        "response_tokens": num_tokens / count,
        "truncated": sum(not response.finished for response in responses) / count,
        "tokens_per_second": num_tokens / seconds,
    }


def gather_logratios(updates: list[list[MicroBatch]], num_logged: int) -> dict[int, float]:
    """Collect from all ranks the log-ratios of the first responses; by the response's index."""
    here = {}
    for batch in itertools.chain.from_iterable(updates):
        if batch.weight == 0 or "logratio" not in batch.statistics:
            continue
        for response, value in zip(batch.responses, batch.statistics["logratio"], strict=True):
            if response.index < num_logged:
                here[response.index] = value.item()
    everywhere = {}
    for logratios in engine.from_all_ranks(here):
        everywhere.update(logratios)
    return everywhere


def evaluate(run: Run, max_tokens: int) -> dict[str, float]:
    """Return the metrics of one greedy response to each evaluation prompt."""
    requests = [Request(prompt) for prompt in run.eval_prompts]
    responses = engine.gather(list(engine.sample(run.llm, requests, 0.0, max_tokens)))
    return {
        "eval_accuracy": sum(response.reward for response in responses) / len(responses),
        "eval_truncated": sum(not response.finished for response in responses) / len(responses),
    }


def used_memory() -> float:
    """Return the GiB in use on this GPU; without one, the largest memory of this process so far.

    Right after an update, torch still holds the memory of the update's peak. The number is the
    driver's: torch would count the engine's cache as allocated even after its release.
    """
    if ON_GPU:
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def save_step(run: Run, args: argparse.Namespace, step: int) -> None:
    """Save a checkpoint, and remove those that are too many."""
    folder = Path(args.out, "checkpoints")
    save_checkpoint(folder / f"step-{step}", step, run.policy, run.optimizer, run.reference_folder)
    if dist.get_rank() == 0:
        Path(args.out, HAS_CHECKPOINTS).touch()
        remove_old_checkpoints(folder, args.keep_checkpoints)


def log_metrics(run: Run, metrics: dict[str, Any]) -> None:
    """Write metrics, on rank 0 alone."""
    if dist.get_rank() == 0:
        run.log.write_metrics(metrics)


def log_step(
    run: Run, metrics: dict[str, Any], samples: list[Response], updates: list[list[MicroBatch]]
) -> None:
    """Write a step's metrics, and some of its responses with their log-ratios."""
    logratios = gather_logratios(updates, len(samples))
    log_metrics(run, metrics)
    if dist.get_rank() == 0:
        run.log.write_samples(metrics["step"], samples, logratios)


def check_metrics(metrics: dict[str, Any], temperature: float) -> None:
    """Stop before a broken policy is saved and the good ones are removed."""
    if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
        raise ArithmeticError(
            f"step {metrics['step']}: loss {metrics['loss']}, grad_norm {metrics['grad_norm']}; "
            "the last checkpoint is from before that"
        )
    # Dividing logits by a small temperature makes every difference larger.
    largest_gap = LARGEST_GAP / min(1.0, temperature)
    # `not <=` also catches NaN.
    if not metrics["logprob_gap"] <= largest_gap:
        raise UserError(
            f"step {metrics['step']}: logprob_gap {metrics['logprob_gap']:.3g} is over "
            f"{largest_gap:.3g}, so the engine samples from another distribution than the one that "
            "is trained. The last checkpoint is from before that. Check that the model's folder "
            "has not changed, and see logprob_gap in docs/metrics.md"
        )


def finish(run: Run, args: argparse.Namespace, stopped_by: int) -> None:
    """Save the trained model unless a signal stopped the run, and shut down.

    After a signal it leaves with the signal's exit code.
    """
    if not stopped_by:
        folder = Path(args.out, "final")
        # A run may be resumed with fewer steps than it has made.
        step = max(run.first_step - 1, args.num_steps)
        save_final_model(folder, step, run.policy, run.reference_folder)
    if dist.get_rank() == 0:
        command_line.print_line(f"grading: {math_reward.counts}")
        run.log.finish_tracker()
    engine.stop_engine(run.llm)
    if stopped_by:
        sys.exit(128 + stopped_by)


# ---------------------------------------------------------------------------------------------
# Before the loop: flags, files, models


def set_up(args: argparse.Namespace, data: TrainingData, algorithm: Algorithm) -> Run | None:
    """Take the run's folder, start the engine, load and check the models.

    Returns None if the run is finished.
    """
    log = RunLog(Path(args.out), args.num_steps)
    config = make_config(args, data, algorithm)
    progress = engine.on_rank_0(open_run, config, log)
    if progress.finished:
        if dist.get_rank() == 0:
            print(f"{args.out} is finished: nothing to do")
        return None

    if dist.get_rank() == 0:
        for sentence in data.notes:
            print(f"--eval-dataset: {sentence}")

    if args.tracker:
        engine.on_rank_0(log.start_tracker, args.tracker, config)
    # The engine comes first, while no trainer memory is in its way.
    reference = files.model_folder(data.values.header["model"])
    llm = start_engine(args, data, reference)
    # As in every step, the cache makes room for the trainer. Loading AdamW's state takes memory for
    # gradients, too.
    engine.release_cache(llm)
    policy, ref = load_models(args, reference, progress.checkpoint)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    # AdamW's own defaults are the published ones: betas 0.9 and 0.999, weight decay 0.01.
    optimizer = torch.optim.AdamW(trained, args.lr, fused=True)
    if progress.checkpoint is not None:
        load_optimizer(progress.checkpoint, policy, optimizer)
    policy.load_into(llm)
    engine.restore_cache(llm)
    compare_logprobs(llm, policy, data.prompts, None if progress.checkpoint else reference)

    return Run(
        log=log,
        llm=llm,
        policy=policy,
        ref=ref,
        optimizer=optimizer,
        prompts=data.prompts,
        eval_prompts=data.eval_prompts,
        reference_folder=reference,
        first_step=progress.step + 1,
    )


def start_engine(args: argparse.Namespace, data: TrainingData, reference: Path) -> Any:
    """Start the engine with random weights and a KV cache as large as a step needs.

    All weights come from the policy later, so that a tensor that does not arrive shows in
    `compare_logprobs`.
    """
    header = data.values.header
    longest = header["max_prompt_tokens"] + header["max_tokens"]
    memory = memory_budget.plan_memory(args, reference, longest)
    return engine.start_engine(
        header["model"],
        longest,
        args.seed,
        tensor_parallel_size=args.tensor_parallel_size,
        # Without a prefix cache, a resumed run samples exactly what an unbroken run samples.
        enable_prefix_caching=False,
        load_format="dummy",
        **memory,
    )


def compare_logprobs(
    llm: Any, policy: Policy, prompts: list[Prompt], reference: Path | None
) -> None:
    """Check that the engine, the policy and transformers give some responses the same ln pi.

    `reference` is the folder of the model whose weights the policy has; None if it has those of a
    checkpoint, and then transformers is left out. Raises UserError for a difference.
    """
    responses = self_check.sample_for_check(llm, prompts)
    engine.release_cache(llm)
    self_check.check_policy(policy, responses)
    engine.restore_cache(llm)
    if reference is not None:
        engine.on_rank_0(self_check.check_model, reference, responses)


def load_models(
    args: argparse.Namespace, reference: Path, checkpoint: Path | None
) -> tuple[Policy, Callable[..., Tensor]]:
    """Load the policy, from a checkpoint if there is one, and the reference.

    Training changes the policy. It is in float32, and takes 16 bytes per parameter with its
    gradient and AdamW's two moments, shared out over the GPUs. The reference never changes. It is
    kept in COMPUTE_DTYPE, bf16 on GPUs. FSDP runs the policy in that dtype too, so at the start the
    two compute the same numbers. With --lora-rank only the adapters change, and the policy is its
    own reference.
    """
    mesh = make_mesh()
    checkpointing = args.gradient_checkpointing
    if args.lora_rank > 0:
        adapted = lora.load_lora_policy(
            reference, mesh, args.lora_rank, args.seed, checkpoint, checkpointing
        )
        return adapted, lora.Reference(adapted)

    start = checkpoint or reference
    policy = load_policy(start, mesh, torch.float32, gradient_checkpointing=checkpointing)
    ref = load_policy(reference, mesh, COMPUTE_DTYPE, offload=args.offload_ref)
    ref.requires_grad_(False)
    return policy, ref


def make_config(args: argparse.Namespace, data: TrainingData, algorithm: Algorithm) -> dict:
    """Collect the flags, what the values file's header decides, and the algorithm, for config.json.

    --resume compares them with those of the run, and stage 3 makes its prompts by them.
    """
    config = dict(vars(args))
    for name in (
        "model",
        "model_fingerprint",
        "task",
        "reward",
        "temperature",
        "max_prompt_tokens",
        "max_tokens",
    ):
        config[name] = data.values.header[name]
    config |= data.values.style.settings()
    config["values_digest"] = data.values.digest
    # Without the ids, which a file that has none gets from its name.
    eval_rows = [row | {"id": None} for row in data.eval_rows]
    config["eval_digest"] = files.content_digest(eval_rows)
    config["algorithm_name"] = name_of(algorithm)
    return config


def name_of(algorithm: Algorithm) -> str:
    """Name the functions that made the parts of an algorithm, to tell it from others on --resume.

    Example: the loss a_star_po.<locals>.loss alone -> "a_star_po"; with another algorithm's
    running.<locals>.credit -> "a_star_po+running".
    """
    names = []
    for function in (algorithm.loss, algorithm.credit, algorithm.prepare):
        if function is not None:
            # A callable that is no function, such as functools.partial, has only its type's name.
            full_name = getattr(function, "__qualname__", type(function).__qualname__)
            names.append(full_name.split(".")[0])
    return "+".join(dict.fromkeys(names))


def check(args: argparse.Namespace, can_resume: bool = True) -> TrainingData:
    """Check the flags and load the data, before anything starts.

    `can_resume` says whether the algorithm's runs can. Raises UserError for the user's first
    mistake.
    """
    check_flags(args, can_resume)
    return load_data(args)


def check_flags(args: argparse.Namespace, can_resume: bool) -> None:
    """Raise UserError for flags that cannot work, whatever the values file holds."""
    if args.batch_size % args.updates_per_batch != 0:
        raise UserError(
            f"--updates-per-batch {args.updates_per_batch} does not divide --batch-size "
            f"{args.batch_size}"
        )
    files.check_writable(args.out, is_folder=True)
    is_new = not any(Path(args.out).glob("*")) or is_failed_start(Path(args.out))
    if not args.resume and not is_new:
        advice = "--resume the run, or give" if can_resume else "give"
        raise UserError(f"{args.out} is not empty: {advice} another --out")
    if args.tracker and not command_line.is_installed(args.tracker):
        raise UserError(f"--tracker {args.tracker}: install it first (pip install {args.tracker})")
    lora.check(args.lora_rank, args.offload_ref)


def load_data(args: argparse.Namespace) -> TrainingData:
    """Load the prompts of training and evaluation, and compute V*.

    Fills in --beta1 and --eval-dataset, whose defaults depend on the values file.
    """
    values = load_values(args.values)
    if args.beta1 is None:
        args.beta1 = values.header["beta1"]
    v_star = compute_v_star(values, args.beta1)
    entries = choose_entries(values, args)
    if args.eval_dataset is None:
        args.eval_dataset = default_eval_dataset(values.header["dataset"])
    eval_rows = []
    notes = []
    if args.eval_dataset != "none":
        eval_rows = problems.load_problems(args.eval_dataset, "test")
        _, ungradable = problems.keep_gradable(args.eval_dataset, eval_rows)
        notes = [f"counted as wrong: {sentence}" for sentence in ungradable]

    longest = values.header["max_prompt_tokens"] + values.header["max_tokens"]
    folder = files.model_folder(values.header["model"])
    self_check.check_config(folder, longest)
    # A damaged tokenizer, or a prompt that is too long, shows here, before the engine starts.
    tokenizer = problems.load_tokenizer(folder)
    prompts = make_prompts(entries, values, tokenizer)
    eval_prompts = make_eval_prompts(eval_rows, values, tokenizer)
    longest_prompt = values.header["max_prompt_tokens"]
    cut = problems.cut_prompts(args.eval_dataset, eval_prompts, longest_prompt, tokenizer)
    if cut is not None:
        notes.append(cut)
    all_prompts = prompts + eval_prompts
    problems.check_prompts(all_prompts, self_check.vocabulary_size(folder), tokenizer)
    return TrainingData(values, v_star, prompts, eval_rows, eval_prompts, notes)


def compute_v_star(values: Values, beta1: float) -> dict[str, float]:
    """Compute eq. (1) by prompt id, from the raw rewards. The V* of the file is for readers."""
    v_star = {}
    for entry in values.entries:
        rewards = torch.tensor([entry["rewards"]], dtype=torch.float64)
        v_star[entry["id"]] = losses.optimal_value(rewards, beta1).item()
    return v_star


def choose_entries(values: Values, args: argparse.Namespace) -> list[dict]:
    """Return the prompts that are trained on; UserError if they do not fill a batch."""
    entries = values.entries
    if args.filter_unsolved:
        entries = [entry for entry in entries if max(entry["rewards"]) > 0]
    if len(entries) < args.batch_size:
        solved = " that the reference solved" if args.filter_unsolved else ""
        raise UserError(
            f"{args.values} has {len(entries)} prompts{solved}, fewer than --batch-size "
            f"{args.batch_size}"
        )
    return entries


def make_eval_prompts(rows: list[dict], values: Values, tokenizer: Any) -> list[Prompt]:
    """Make the evaluation prompts in the style of training."""
    prompts = []
    for row in rows:
        style = problems.style_of_task(
            values.style, row["_task"], trained_reward=values.header["reward"]
        )
        prompts.append(problems.make_prompt(row, style, tokenizer))
    return prompts


def default_eval_dataset(training_set: str) -> str:
    """Name the test set that belongs to a training set; none for a file."""
    dataset = problems.DATASETS.get(training_set)
    return dataset.test_set if dataset else "none"


def make_parser() -> argparse.ArgumentParser:
    """Describe the flags. The defaults are the published MATH run.

    baselines.py and other experiments take these flags and defaults, and add their own.
    """
    parser = command_line.new_parser(__doc__.splitlines()[0], EXAMPLES)
    add = parser.add_argument_group("the run").add_argument
    add(
        "--values",
        default="values/math.json",
        help="the file of stage 1: prompts, rewards, and the model that is trained",
    )
    add("--out", default="runs/math", help="folder of the run")
    add("--resume", action="store_true", help="continue from the last checkpoint in --out")
    add("--save-every", type=positive_integer, default=50, help="steps between checkpoints")
    add("--keep-checkpoints", type=positive_integer, default=2, help="the newest ones stay")
    add(
        "--eval-dataset",
        help="measure greedy accuracy on this set while training; none switches it off; default: "
        "the test set that apo/problems.py names for the training set, and none if that is a file",
    )
    add("--eval-every", type=positive_integer, default=50, help="steps between evaluations")
    add("--log-samples", type=whole_number, default=8, help="responses a step in samples.jsonl")
    add("--tracker", choices=("wandb", "trackio"), help="send the metrics to this tracker too")

    add = parser.add_argument_group("the algorithm").add_argument
    add("--num-steps", type=positive_integer, default=725, help="steps, each with a new batch")
    add("--batch-size", type=positive_integer, default=256, help="prompts per step, all GPUs")
    add("--samples-per-prompt", type=positive_integer, default=1, help="responses per prompt")
    add(
        "--updates-per-batch",
        type=positive_integer,
        default=2,
        help="optimizer updates per step, each on its part of the batch; 1 is strictly on-policy",
    )
    add(
        "--beta1",
        type=positive_or_infinite,
        help="compute V* again with this beta1; by default the one of the values file",
    )
    add("--beta2", type=positive_number, default=1e-3, help="strength of the pull to the reference")
    add("--lr", type=positive_number, default=1e-6, help="learning rate of AdamW, constant")
    add(
        "--max-grad-norm",
        type=positive_or_infinite,
        default=1.0,
        help="scale a gradient with a larger norm down to it; inf: never",
    )
    add(
        "--lora-rank",
        type=whole_number,
        default=0,
        help="train adapters of this rank in place of all weights (needs peft); 0 trains all; "
        "adapters want a larger --lr",
    )
    add("--filter-unsolved", action="store_true", help="drop prompts the reference never solved")

    add = parser.add_argument_group("memory and speed, without effect on the result").add_argument
    add(
        "--micro-batch-tokens",
        type=positive_integer,
        default=8192,
        help="tokens per forward pass on each GPU; at least one sequence",
    )
    add("--gradient-checkpointing", action="store_true", help="less memory for more time")
    add("--offload-ref", action="store_true", help="keep the reference in CPU memory")
    command_line.add_engine_flags(parser, gpu_share=0.6)
    return parser


def main() -> None:
    """Check, launch, train."""
    args = make_parser().parse_args()
    data = check(args)
    # With several GPUs, torchrun now starts this script again, once for each. Each of these ranks
    # runs from the top and reaches this line, too. From here on they work together.
    engine.launch(args.tensor_parallel_size)
    train(args, data, a_star_po(args.beta2))


if __name__ == "__main__":
    command_line.run(main)
