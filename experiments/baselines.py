r"""GRPO, REBEL and PPO on train_online.py's own loop, to compare A*-PO with.

Question: what does another algorithm change in the training loop?
Command:  python -m experiments.baselines --method grpo --values toy/values.json --lr 1e-4 \
              --batch-size 16 --num-steps 50 --eval-dataset toy/test.jsonl --out runs/grpo
          With 8 responses to each of 16 prompts, a step has as many responses as one of the demo.
          On MATH, use --values values/math.json --batch-size 32. All flags of train_online.py work.
          --beta2 is for `running` and `replay`, --beta1 for `replay` alone.
Time:     that of train_online.py for as many responses. PPO trains a second model, its critic.
Output:   a run folder like that of train_online.py. Prompts come from the values file.
Answer:   a loss of a few lines, and what that loss needs. The loop stays the same.

         responses   compared with           pi_ref is in   pi_t is in      mean of the
         per prompt                                                         loss over
A*-PO             1  V*, from stage 1        the loss       -               responses
GRPO              8  the group's mean        the loss       the ratio       tokens
REBEL             2  the pair's other one    the reward     the log-ratio   pairs
PPO               1  a critic's value        the reward     the ratio       tokens

pi_t is the policy that sampled. `running` is A*-PO without stage 1: a running mean of each prompt's
online rewards takes the place of V*. `replay` is A*-PO that uses each rollout in four steps.

All clip gradients at --max-grad-norm and use AdamW, as A*-PO does. The defaults are TRL's, except
for these (verl's PPO has lambda = 1 and clips values at 0.5):

- All but `replay` make one pass over a rollout, in --updates-per-batch updates. TRL's PPO and
  REBEL's authors make four passes.
- GRPO's KL term has the published weight, 0.04. TRL 1.16 has 0. --kl-weight changes it.
- PPO's critic has its own optimizer, so there is no vf_coef. Its learning rate is ten times --lr,
  as in verl.
- REBEL's eta is 1, as in its authors' code.

ln pi_t is computed by the trainer, not by the engine.
"""

import argparse
import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import losses
import train_online
from apo import command_line, engine, files
from apo.engine import Response
from apo.files import UserError
from apo.policy import DEVICE, MicroBatch, Policy, load_lm, reshard, shard
from train_online import Algorithm, TrainingData

GRPO_CLIP_RATIO = 0.2
GRPO_KL_WEIGHT = 0.04  # of k3 in the loss of each token (DeepSeekMath, section 4.2)
ETA = 1.0  # REBEL's step size (the authors' default on TL;DR)
GAMMA = 1.0  # PPO's discount
LAMBDA = 0.95  # PPO's lambda of GAE
PPO_CLIP_RATIO = 0.2
PPO_CLIP_VALUE = 0.2
REWARD_KL_WEIGHT = 0.05  # PPO and REBEL: of -ln(pi_t / pi_ref) in the reward, as in TRL
CRITIC_LR_FACTOR = 10.0  # PPO: the critic's rate in units of --lr, as in verl (1e-5 and 1e-6)
USES_OF_ROLLOUT = 4  # `replay`: the number of steps that use a rollout
DECAY_OF_ALL = 0.9  # `running`: weight of the past in the mean of all rewards, at each step
DECAY_OF_PROMPT = 0.8  # the same in a prompt's mean, at each response to it

# ---------------------------------------------------------------------------------------------
# The losses, not yet averaged. R response tokens, B sequences, P prompts, N responses per prompt


def check_shapes(*tensors: Tensor) -> None:
    """Raise ValueError unless all are (n,) with one n: others would broadcast silently."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if shapes != [(tensors[0].numel(),)] * len(tensors):
        raise ValueError(f"need tensors of one shape (n,), not {shapes}")


def group_advantages(rewards: Tensor) -> Tensor:
    """GRPO's (r - mean) / (std + 1e-4) inside each group, (P, N) -> (P, N).

    Shao et al. 2024 (arXiv 2402.03300), section 4.1.2. The std, with N - 1, and the 1e-4 are TRL's.
    A group of equal rewards gets 0. Raises ValueError unless N >= 2.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"need rewards (P, N) with N >= 2, not {tuple(rewards.shape)}")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-4)


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    advantages: Tensor,
    kl_weight: float = GRPO_KL_WEIGHT,
) -> Tensor:
    """Return -min(w A, clip(w) A) + kl_weight k3 of each token, w = pi / pi_t; all (R,).

    Shao et al. 2024, eq. (3) and (4), with k3 = pi_ref / pi - ln(pi_ref / pi) - 1.
    """
    check_shapes(logp, old_logp, ref_logp, advantages)
    k3 = (ref_logp - logp).exp() - (ref_logp - logp) - 1
    return ppo_loss(logp, old_logp, advantages, GRPO_CLIP_RATIO) + kl_weight * k3


def rebel_loss(logratio: Tensor, rewards: Tensor, eta: float = ETA) -> Tensor:
    """Return ((1 / eta) (logratio_1 - logratio_2) - (r_1 - r_2))^2 of each pair, (P, 2) -> (P,).

    `logratio` is ln(pi / pi_t) of whole responses. Gao et al. 2024 (arXiv 2404.16767), eq. (1).
    Differences inside a pair need no baseline, critic or V*.
    """
    if logratio.shape != rewards.shape or rewards.shape[1:] != (2,):
        shapes = f"{tuple(logratio.shape)} and {tuple(rewards.shape)}"
        raise ValueError(f"need logratio and rewards (P, 2), not {shapes}")
    implicit_reward = (logratio[:, 0] - logratio[:, 1]) / eta
    target = rewards[:, 0] - rewards[:, 1]
    return (implicit_reward - target).square()


def ppo_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, clip_ratio: float = PPO_CLIP_RATIO
) -> Tensor:
    """Return -min(w A, clip(w, 1 - clip_ratio, 1 + clip_ratio) A) of each token; all (R,).

    w = pi / pi_t. Schulman et al. 2017 (arXiv 1707.06347), eq. (7).
    """
    check_shapes(logp, old_logp, advantages)
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    return -torch.min(ratio * advantages, clipped * advantages)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor) -> Tensor:
    """Return half of max((v - G)^2, (clipped v - G)^2) of each token, G its return; all (R,).

    v is clipped to old_values ± PPO_CLIP_VALUE. This is not in the PPO paper, but in its code and
    in TRL.
    """
    check_shapes(values, old_values, returns)
    clipped = old_values + (values - old_values).clamp(-PPO_CLIP_VALUE, PPO_CLIP_VALUE)
    return 0.5 * torch.max((values - returns).square(), (clipped - returns).square())


def token_rewards(
    rewards: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    lengths: Tensor,
    kl_weight: float = REWARD_KL_WEIGHT,
) -> Tensor:
    """PPO's reward of each token: -kl_weight ln(pi_t / pi_ref), plus r at the last token.

    Takes rewards and lengths (B,), log-probs (R,); returns (R,). Ziegler et al. 2019
    (arXiv 1909.08593), eq. (2), with its KL spread over the tokens as in TRL.
    """
    check_shapes(old_logp, ref_logp)
    result = -kl_weight * (old_logp - ref_logp)
    last_tokens = lengths.cumsum(0) - 1
    result[last_tokens] += rewards
    return result


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float = GAMMA, lam: float = LAMBDA
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, (R,) each, from packed rewards and values (R,), lengths (B,).

    A_t = delta_t + gamma lam A_t+1 with delta_t = r_t + gamma v_t+1 - v_t, where A and v are 0
    after a response's last token. Returns are A + v. Schulman et al. 2016 (arXiv 1506.02438),
    eq. (16).
    """
    check_shapes(rewards, values)
    if lengths.sum() != len(values):
        raise ValueError(f"lengths {lengths.tolist()} for tokens {tuple(values.shape)}")
    # Padded to (B, longest) with zeros, so that one loop over tokens serves all responses.
    is_token = torch.arange(int(lengths.max())) < lengths[:, None]
    is_token = is_token.to(values.device)  # `lengths` is on the CPU
    r = values.new_zeros(is_token.shape)
    v = values.new_zeros(is_token.shape)
    r[is_token] = rewards
    v[is_token] = values
    advantages = torch.zeros_like(v)
    next_value = torch.zeros_like(v[:, 0])
    next_advantage = torch.zeros_like(v[:, 0])
    for t in reversed(range(v.shape[1])):
        delta = r[:, t] + gamma * next_value - v[:, t]
        advantages[:, t] = delta + gamma * lam * next_advantage
        next_value = v[:, t]
        next_advantage = advantages[:, t]
    packed = advantages[is_token]
    return packed, packed + values


# ---------------------------------------------------------------------------------------------
# From tokens to sequences, and ln pi_t


def token_mean(token_losses: Tensor, batch: MicroBatch) -> Tensor:
    """Return (B,) losses whose mean over all sequences is the mean of (R,) over all tokens.

    The update takes the mean over sequences. Each sequence counts by the sum over its tokens, in
    units of the mean length in the whole update. So the split into micro-batches does not matter.
    """
    parts = token_losses.split(batch.lengths.tolist())
    sums = torch.stack([part.sum() for part in parts])
    return sums * (batch.num_sequences / batch.num_tokens)


def for_each_token(numbers: Tensor, batch: MicroBatch) -> Tensor:
    """Repeat the number of each sequence for its tokens, (B,) -> (R,)."""
    return numbers.repeat_interleave(batch.lengths.to(numbers.device))


def logratio_to_ref(batch: MicroBatch, token_logp: Tensor) -> dict[str, Tensor]:
    """Return the statistic that the log calls logratio: ln(pi / pi_ref) of each response, (B,)."""
    return {"logratio": losses.sequence_logprob(token_logp - batch.ref_logp, batch.lengths)}


@torch.no_grad()
def add_old_logp(policy: Policy, updates: list[list[MicroBatch]]) -> None:
    """Store ln pi_t of the second and later updates, before the first one moves the weights.

    The first update needs none: its own forward pass gives ln pi_t.
    """
    for batches in updates[1:]:
        for batch in batches:
            batch.extra["old_logp"] = policy(**batch.inputs)


def get_old_logp(batch: MicroBatch, token_logp: Tensor) -> Tensor:
    """Return ln pi_t of each token, (R,); see `add_old_logp`."""
    return batch.extra.get("old_logp", token_logp.detach())


# ---------------------------------------------------------------------------------------------
# GRPO, REBEL, `running` and `replay`


def grpo(args: argparse.Namespace, data: TrainingData) -> Algorithm:
    """GRPO: a clipped policy gradient, with the group of a prompt's responses as its baseline.

    The mean is over all tokens, as in TRL's loss_type "dapo"; the paper takes it over each response
    first.
    """

    def credit(responses: list[Response]) -> None:
        # The responses to a prompt follow each other.
        rewards = torch.tensor([response.reward for response in responses])
        advantages = group_advantages(rewards.view(-1, args.samples_per_prompt))
        for response, advantage in zip(responses, advantages.flatten().tolist(), strict=True):
            response.numbers["advantage"] = advantage

    def loss(batch: MicroBatch, token_logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        old_logp = get_old_logp(batch, token_logp)
        advantages = for_each_token(batch.numbers["advantage"], batch)
        token_losses = grpo_loss(token_logp, old_logp, batch.ref_logp, advantages, args.kl_weight)
        return token_mean(token_losses, batch), logratio_to_ref(batch, token_logp)

    return Algorithm(loss, credit=credit, prepare=add_old_logp)


def rebel(args: argparse.Namespace, data: TrainingData) -> Algorithm:
    """REBEL: fit the difference of two log-ratios to the difference of two rewards."""

    def loss(batch: MicroBatch, token_logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        old_logp = get_old_logp(batch, token_logp)
        logratio = losses.sequence_logprob(token_logp - old_logp, batch.lengths)
        kl = losses.sequence_logprob(old_logp - batch.ref_logp, batch.lengths)
        rewards = batch.rewards - args.kl_weight * kl
        pair_losses = rebel_loss(logratio.view(-1, 2), rewards.view(-1, 2))
        # Both sequences of a pair get its loss, so that the mean over sequences is that over pairs.
        return pair_losses.repeat_interleave(2), logratio_to_ref(batch, token_logp)

    return Algorithm(loss, prepare=add_old_logp, group_size=2)


def running(args: argparse.Namespace, data: TrainingData) -> Algorithm:
    """A*-PO with a running mean of each prompt's rewards in place of V*: no stage 1 is needed.

    A prompt's mean starts at the running mean of all rewards so far. In the first step there is
    none yet, so the mean of that step's own rewards stands in for it.
    """
    mean_of_all = None
    mean_of_prompt = {}  # by the prompt's id

    def credit(responses: list[Response]) -> None:
        nonlocal mean_of_all
        step_mean = sum(response.reward for response in responses) / len(responses)
        if mean_of_all is None:
            mean_of_all = step_mean  # nothing is known before the first step
        for response in responses:
            mean_of_prompt.setdefault(response.prompt.row["id"], mean_of_all)
            response.numbers["v_star"] = mean_of_prompt[response.prompt.row["id"]]
        # A second loop: the responses to one prompt must not see each other's rewards.
        for response in responses:
            prompt_id = response.prompt.row["id"]
            old_mean = mean_of_prompt[prompt_id]
            new_mean = DECAY_OF_PROMPT * old_mean + (1 - DECAY_OF_PROMPT) * response.reward
            mean_of_prompt[prompt_id] = new_mean
        mean_of_all = DECAY_OF_ALL * mean_of_all + (1 - DECAY_OF_ALL) * step_mean

    return train_online.a_star_po(args.beta2)._replace(credit=credit)


def replay(args: argparse.Namespace, data: TrainingData) -> Algorithm:
    """A*-PO that uses each rollout in the step that samples it, and again in the next three.

    It shows what V* does for off-policy data. Nothing else is needed: the loss has no ratio to the
    policy that sampled, and ln pi_ref of a response stays what it is.
    """
    old_updates = collections.deque(maxlen=(USES_OF_ROLLOUT - 1) * args.updates_per_batch)

    def prepare(policy: Policy, updates: list[list[MicroBatch]]) -> None:
        new_updates = list(updates)
        # `update` runs through this list in order: first the new updates, then the old ones.
        updates.extend(old_updates)
        old_updates.extend(new_updates)

    return train_online.a_star_po(args.beta2)._replace(prepare=prepare)


# ---------------------------------------------------------------------------------------------
# PPO


class Critic(torch.nn.Module):
    """The reference without its head, and a linear map to one number, 0 at first."""

    def __init__(self, body: torch.nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = torch.nn.Linear(body.config.hidden_size, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, rows: Tensor, targets: Tensor, temperature: float, **inputs: Any) -> Tensor:
        """Return the value before each response token, (R,) float32; it takes what Policy takes."""
        hidden = self.body(use_cache=False, **inputs).last_hidden_state[0]
        # A sum over one number, and not a view of it, which FSDP warns of.
        return self.head(hidden[rows]).float().sum(dim=1)


def load_critic(folder: Path, mesh: DeviceMesh, gradient_checkpointing: bool) -> Critic:
    """Make a critic of the reference, sharded as the policy is."""
    critic = Critic(load_lm(folder, torch.float32, gradient_checkpointing).base_model)
    shard([*critic.body.layers, critic], mesh)
    return critic


def whiten(batches: list[MicroBatch]) -> None:
    """Give the advantages, those of all ranks together, mean 0 and variance 1, as TRL does."""
    sums = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    for batch in batches:
        advantages = batch.extra["advantages"].double()
        count = torch.tensor(len(advantages), dtype=torch.float64, device=DEVICE)
        parts = (count, advantages.sum(), advantages.square().sum())
        sums += batch.weight * torch.stack(parts)
    dist.all_reduce(sums)
    count, total, total_square = sums
    mean = total / count
    # A step of a single token has the advantage 0.
    variance = (total_square / count - mean.square()) * count / (count - 1).clamp(min=1)
    for batch in batches:
        centred = batch.extra["advantages"] - mean
        batch.extra["advantages"] = (centred * (variance + 1e-8).rsqrt()).float()


def ppo(args: argparse.Namespace, data: TrainingData) -> Algorithm:
    """PPO: a clipped policy gradient. Its baseline is a critic that is trained together with it."""
    critic = None
    optimizer = None

    def critic_loss(batch: MicroBatch, critic_values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        old_values = batch.extra["old_values"]
        token_losses = value_loss(critic_values, old_values, batch.extra["returns"])
        return token_mean(token_losses, batch), {}

    def prepare(policy: Policy, updates: list[list[MicroBatch]]) -> None:
        nonlocal critic, optimizer
        if critic is None:
            # Only now: on a GPU the engine must start before any of the trainer's models.
            folder = files.model_folder(data.values.header["model"])
            # With adapters the policy has just been called as the reference, which left its full
            # weights gathered. They are plain tensors without a mesh, and take memory.
            reshard(policy)
            mesh = next(policy.parameters()).device_mesh
            critic = load_critic(folder, mesh, args.gradient_checkpointing)
            critic_lr = CRITIC_LR_FACTOR * args.lr
            optimizer = torch.optim.AdamW(critic.parameters(), critic_lr, fused=True)

        all_batches = [batch for batches in updates for batch in batches]
        with torch.no_grad():
            for batch in all_batches:
                old_logp = policy(**batch.inputs)
                critic_values = critic(**batch.inputs)
                rewards = token_rewards(
                    batch.rewards, old_logp, batch.ref_logp, batch.lengths, args.kl_weight
                )
                advantages, returns = gae(
                    rewards, critic_values, batch.lengths, lam=args.gae_lambda
                )
                batch.extra["old_logp"] = old_logp
                batch.extra["old_values"] = critic_values
                batch.extra["advantages"] = advantages
                batch.extra["returns"] = returns
        whiten(all_batches)
        # Critic and policy share no weights, so the critic can be updated here, before the policy.
        train_online.update(critic, optimizer, updates, critic_loss, args.max_grad_norm)

    def loss(batch: MicroBatch, token_logp: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        token_losses = ppo_loss(token_logp, batch.extra["old_logp"], batch.extra["advantages"])
        return token_mean(token_losses, batch), logratio_to_ref(batch, token_logp)

    return Algorithm(loss, prepare=prepare)


# ---------------------------------------------------------------------------------------------
# The command


class Method(NamedTuple):
    """What --method names."""

    make: Callable[[argparse.Namespace, TrainingData], Algorithm]
    samples_per_prompt: int  # unless --samples-per-prompt is given
    kl_weight: float | None  # unless --kl-weight is given; None: it has --beta2 instead
    # Whether a run can be resumed: not if the method keeps something that no checkpoint has.
    can_resume: bool = True


METHODS = {
    "grpo": Method(grpo, samples_per_prompt=8, kl_weight=GRPO_KL_WEIGHT),
    "rebel": Method(rebel, samples_per_prompt=2, kl_weight=REWARD_KL_WEIGHT),
    "ppo": Method(ppo, samples_per_prompt=1, kl_weight=REWARD_KL_WEIGHT, can_resume=False),
    "running": Method(running, samples_per_prompt=1, kl_weight=None, can_resume=False),
    "replay": Method(replay, samples_per_prompt=1, kl_weight=None, can_resume=False),
}


def make_parser() -> argparse.ArgumentParser:
    """Take the flags of train_online.py, and add --method."""
    parser = train_online.make_parser()
    parser.description = __doc__.splitlines()[0]
    parser.epilog = None
    group = parser.add_argument_group("baseline")
    group.add_argument("--method", choices=METHODS, required=True, help="the algorithm")
    group.add_argument(
        "--kl-weight",
        type=float,
        help="weight of the KL term, if not the published one (the head of this file)",
    )
    group.add_argument(
        "--gae-lambda",
        type=command_line.fraction,
        help=f"PPO's lambda of GAE ({LAMBDA}); 1: the advantage is the return minus the value",
    )
    # None stands for the method's own number.
    parser.set_defaults(samples_per_prompt=None, beta2=None)
    return parser


def check_method(args: argparse.Namespace) -> None:
    """Fill in the method's own numbers; raise UserError for what it cannot do."""
    method = METHODS[args.method]
    if method.kl_weight is None and args.kl_weight is not None:
        raise UserError(f"{args.method} has no --kl-weight: use --beta2")
    if args.beta2 is None:
        args.beta2 = train_online.make_parser().get_default("beta2")
    elif method.kl_weight is not None:
        raise UserError(f"{args.method} has no --beta2: use --kl-weight")
    if args.beta1 is not None and args.method != "replay":
        raise UserError(f"{args.method} has no --beta1: it does not use V*")
    if args.kl_weight is None:
        args.kl_weight = method.kl_weight
    elif not 0 <= args.kl_weight < float("inf"):
        raise UserError(f"--kl-weight {args.kl_weight} is not a number of at least 0")
    if args.gae_lambda is not None and args.method != "ppo":
        raise UserError(f"{args.method} has no --gae-lambda: that is PPO's")
    if args.gae_lambda is None:
        args.gae_lambda = LAMBDA
    if args.samples_per_prompt is None:
        args.samples_per_prompt = method.samples_per_prompt
    if args.method == "grpo" and args.samples_per_prompt < 2:
        raise UserError("--samples-per-prompt 1 is no group: GRPO needs at least 2")
    if args.method == "rebel" and args.samples_per_prompt != 2:
        raise UserError(f"--samples-per-prompt {args.samples_per_prompt}: REBEL needs pairs, 2")
    if args.resume and not method.can_resume:
        raise UserError(
            f"{args.method} cannot --resume, because checkpoints hold only the policy: "
            "start again with another --out"
        )


def main() -> None:
    """Check, launch, train."""
    args = make_parser().parse_args()
    check_method(args)
    method = METHODS[args.method]
    data = train_online.check(args, method.can_resume)
    engine.launch(args.tensor_parallel_size)
    train_online.train(args, data, method.make(args, data))


if __name__ == "__main__":
    command_line.run(main)
