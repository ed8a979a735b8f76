"""What A*-PO is compared with: GRPO, REBEL and PPO on train_online.py's own loop.

    python -m experiments.baselines --method grpo --values toy/values.json --out runs/grpo [...]

takes train_online.py's flags and --method. Engine, prompts, reward, sharding, log and checkpoints
are that script's; a method is one pure loss and one `learn` function, which stands where
`train_online.least_squares` does. What each changes:

             responses  critic  pi_ref          pi_t before        loss, a mean over
                                                the update
A*-PO                1  -       in the target   -                  responses: (..)^2, losses.py
GRPO                 8  -       KL in the loss  in the ratio       tokens: clipped ratio
REBEL                2  -       KL in reward    in the target      pairs: (..)^2
PPO                  1  yes     KL in reward    ratio and KL       tokens: clipped ratio

Like A*-PO they do one pass over a rollout in --updates-per-batch updates, clip gradients at norm 1
and use the same AdamW. Names and defaults are TRL's (constants below), with these differences: one
pass where TRL's PPO and REBEL's authors do 4; GRPO's KL term as published, with beta = 0.04 and no
ratio before it (TRL 1.16: beta 0, use_bias_correction_kl); the critic has an optimiser of its own,
so that vf_coef has nothing to weigh. ln pi_t is the trainer's, not the engine's, as in TRL; for a
rollout's first update it is that update's own forward and costs nothing (but PPO's reward needs it
before that).
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import fsdp
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

import losses
import problems
import train_online

EPSILON = 0.2  # GRPO's clip range
BETA = 0.04  # weight of GRPO's KL term (DeepSeekMath, section 4.2)
ETA = 1.0  # REBEL's step size (the authors' default on TL;DR)
GAMMA, LAM = 1.0, 0.95  # PPO: discount, and lambda of GAE
CLIPRANGE, CLIPRANGE_VALUE = 0.2, 0.2  # PPO: of the ratio, of the value
KL_COEF = 0.05  # PPO and REBEL: weight of -ln(pi_t / pi_ref) in the reward, as in TRL and theirs
CRITIC_LR = 10.0  # PPO: the critic's learning rate in units of --lr, as in verl (1e-5 and 1e-6)

# ---------------------------------------------------------------------------------------------
# The losses. R response tokens, B sequences, P prompts, N responses per prompt, as in losses.py


def same_shape(*tensors: Tensor) -> None:
    """Raise ValueError unless all are (n,) with one n: others would broadcast silently."""
    shapes = {tuple(x.shape) for x in tensors}
    if shapes != {(tensors[0].numel(),)}:
        raise ValueError(f"need tensors of one shape (n,), not {shapes}")


def group_advantages(rewards: Tensor) -> Tensor:
    """GRPO's (r - mean) / (std + 1e-4) inside each group, (P, N) -> (P, N).

    Shao et al. 2024 (arXiv 2402.03300), section 4.1.2; TRL's std (N - 1) and 1e-4. 0 for a group
    of equal rewards. ValueError unless N >= 2.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"need rewards (P, N) with N >= 2, not {tuple(rewards.shape)}")
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-4)


def grpo_loss(
    logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor,
    epsilon: float = EPSILON, beta: float = BETA,
) -> Tensor:  # fmt: skip
    """Mean over tokens of -min(w A, clip(w) A) + beta k3, w = pi / pi_t; all (R,) -> ().

    Shao et al. 2024, eq. (3) and (4), with k3 = pi_ref/pi - ln(pi_ref/pi) - 1. The mean is over all
    tokens, as in TRL's default loss_type "dapo", where the paper's is over each response first.
    """
    same_shape(logp, old_logp, ref_logp, advantages)
    k3 = (ref_logp - logp).exp() - (ref_logp - logp) - 1
    return ppo_loss(logp, old_logp, advantages, epsilon) + beta * k3.mean()


def rebel_loss(logratio: Tensor, rewards: Tensor, eta: float = ETA) -> Tensor:
    """Mean over pairs of ((1/eta) (logratio_1 - logratio_2) - (r_1 - r_2))^2, (P, 2) twice -> ().

    `logratio` is ln(pi / pi_t) of whole responses, pi_t the policy that sampled them. Gao et al.
    2024 (arXiv 2404.16767), eq. (1). Differences inside a pair need no baseline, critic or V*.
    """
    if logratio.shape != rewards.shape or rewards.shape[1:] != (2,):
        shapes = tuple(logratio.shape), tuple(rewards.shape)
        raise ValueError(f"need logratio and rewards (P, 2), not {shapes}")
    residual = (logratio[:, 0] - logratio[:, 1]) / eta - (rewards[:, 0] - rewards[:, 1])
    return residual.square().mean()


def ppo_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, cliprange: float = CLIPRANGE
) -> Tensor:
    """Mean over tokens of -min(w A, clip(w, 1 ± cliprange) A), w = pi / pi_t; all (R,) -> ().

    Schulman et al. 2017 (arXiv 1707.06347), eq. (7).
    """
    same_shape(logp, old_logp, advantages)
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    return -torch.min(ratio * advantages, clipped * advantages).mean()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float = CLIPRANGE_VALUE
) -> Tensor:
    """Half the mean over tokens of max((v - R)^2, (clipped v - R)^2); all (R,) -> ().

    The clip is to old_values ± cliprange_value. Not in the PPO paper but in its code, and in TRL.
    """
    same_shape(values, old_values, returns)
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    return 0.5 * torch.max((values - returns).square(), (clipped - returns).square()).mean()


def token_rewards(
    rewards: Tensor, old_logp: Tensor, ref_logp: Tensor, lengths: Tensor, kl_coef: float = KL_COEF
) -> Tensor:
    """PPO's reward of each token: -kl_coef ln(pi_t / pi_ref), at the last one plus r.

    Rewards and lengths (B,), log-probs (R,) -> (R,). Ziegler et al. 2019 (arXiv 1909.08593),
    eq. (2), its KL shared out over the tokens as TRL does.
    """
    same_shape(old_logp, ref_logp)
    told = -kl_coef * (old_logp - ref_logp)
    told[lengths.cumsum(0) - 1] += rewards
    return told


def gae(
    rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float = GAMMA, lam: float = LAM
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, (R,) each, of packed rewards and values, (R,), with lengths (B,).

    A_t = sum_l (gamma lam)^l delta_t+l with delta_t = r_t + gamma v_t+1 - v_t and no value after a
    response's last token; returns are A + v. Schulman et al. 2016 (arXiv 1506.02438), eq. (16).
    """
    same_shape(rewards, values)
    if int(lengths.sum()) != len(values):
        raise ValueError(f"lengths {lengths.tolist()} for tokens {tuple(values.shape)}")
    real = torch.arange(int(lengths.max())) < lengths.cpu()[:, None]  # (B, longest)
    padded = values.new_zeros(2, *real.shape)
    padded[:, real.to(values.device)] = torch.stack((rewards, values))
    r, v = padded.unbind()
    ahead = torch.zeros_like(v)
    ahead[:, :-1] = v[:, 1:]
    advantages = r + gamma * ahead - v
    for t in reversed(range(advantages.shape[1] - 1)):  # behind a response's end there are zeros
        advantages[:, t] += gamma * lam * advantages[:, t + 1]
    flat = advantages[real.to(values.device)]
    return flat, flat + values


# ---------------------------------------------------------------------------------------------
# What their steps have in common


def token_updates(responses: list[dict], args: argparse.Namespace) -> list[list]:
    """Cut a rollout into updates of micro-batches whose `share` is of the update's tokens.

    So that share times a micro-batch's token mean adds up to the update's, whatever the split.
    """
    size, updates = len(responses) // args.updates_per_batch, []
    for start in range(0, len(responses), size):
        update = responses[start : start + size]
        batches = train_online.micro_batches(update, args)
        total = sum(len(response["ids"]) for response in update)
        for batch in batches:
            batch.share = int(batch.lengths.sum()) / total if batch.share else 0.0
        updates.append(batches)
    return updates


def pair_updates(responses: list[dict], args: argparse.Namespace) -> list[list]:
    """Cut a rollout into updates of micro-batches of whole pairs; `share` is of the pairs.

    train_online.micro_batches deals single responses; here two that follow each other are dealt as
    one, since a pair's loss needs both.
    """
    rank, world, updates = dist.get_rank(), dist.get_world_size(), []
    size = len(responses) // args.updates_per_batch
    for start in range(0, len(responses), size):
        update = responses[start : start + size]
        lengths = [len(r["prompt_ids"]) + len(r["ids"]) - 1 for r in update]
        both = [sum(lengths[i : i + 2]) for i in range(0, size, 2)]
        batches = []
        for hand in losses.deal(both, world, args.micro_batch_tokens)[rank]:
            chosen = [update[2 * i + k] for i in hand for k in (0, 1)] or update[:2]
            ids = [r["prompt_ids"] for r in chosen], [r["ids"] for r in chosen]
            inputs, counts = losses.pack(*ids)
            device = train_online.DEVICE
            rewards = torch.tensor([r["reward"] for r in chosen], device=device)
            gaps = torch.tensor([x for r in chosen for x in r["sampler_logp"]], device=device)
            inputs |= {"temperature": args.temperature}
            batch = {"inputs": inputs, "lengths": counts, "rewards": rewards, "sampler_logp": gaps}
            batches.append(SimpleNamespace(**batch, share=len(hand) / len(both)))
        updates.append(batches)
    return updates


@torch.no_grad()
def score(model: torch.nn.Module, batches: Iterable, name: str) -> None:
    """Give every micro-batch the model's numbers for its tokens, (R,), under `name`."""
    for batch in batches:
        setattr(batch, name, model(**batch.inputs))


def descend(
    model: torch.nn.Module, optimizer: Any, updates: list[list], loss_of: Callable
) -> tuple[float, float, float, float, float]:
    """One optimiser step for each update; what train_online.least_squares returns.

    `loss_of(batch, output)` is the mean over a micro-batch; its `share` makes it global. All but
    the loss and the norm are of the first update, before it moves the weights.
    """
    device = next(model.parameters()).device
    sums, norms = torch.zeros(5, dtype=torch.float64, device=device), []
    for number, update in enumerate(updates):
        for batch in update:
            output = model(**batch.inputs)
            loss = loss_of(batch, output) * batch.share
            (loss * dist.get_world_size()).backward()  # FSDP takes the mean over the ranks
            sums[0] += loss.detach() / len(updates)
            if number == 0 and batch.share:
                sums[1] += (output - batch.ref_logp).detach().sum()
                sums[2] += (output - batch.sampler_logp).detach().abs().sum()
                sums[3:] += torch.tensor([len(output), len(batch.lengths)], device=device)
        norms.append(clip_grad_norm_(model.parameters(), 1.0).full_tensor())
        optimizer.step()
        optimizer.zero_grad()
    dist.all_reduce(sums)
    loss, logratio, gap, tokens, responses = sums.tolist()
    norm = torch.stack(norms).mean().item()
    return loss, logratio / responses, logratio / tokens, norm, gap / tokens


# ---------------------------------------------------------------------------------------------
# The methods: a `learn` for train_online.train each


def grpo_step(
    policy: Any, ref: Any, optimizer: Any, responses: list[dict],
    args: argparse.Namespace, lap: Callable[[], None],
) -> tuple[float, float, float, float, float]:  # fmt: skip
    """GRPO on a rollout; a prompt's responses follow each other in it."""
    rewards = torch.tensor([r["reward"] for r in responses]).view(-1, args.samples_per_prompt)
    advantages = group_advantages(rewards).flatten().tolist()
    # From here on a response's "reward" is its advantage: micro-batches carry it along.
    responses = [r | {"reward": a} for r, a in zip(responses, advantages, strict=True)]
    updates = token_updates(responses, args)
    score(ref, itertools.chain(*updates), "ref_logp")
    lap()
    score(policy, itertools.chain(*updates[1:]), "old_logp")

    def loss_of(batch: Any, logp: Tensor) -> Tensor:
        old_logp = getattr(batch, "old_logp", logp.detach())
        of_tokens = batch.rewards.repeat_interleave(batch.lengths.to(logp.device))
        return grpo_loss(logp, old_logp, batch.ref_logp, of_tokens)

    return descend(policy, optimizer, updates, loss_of)


def rebel_step(
    policy: Any, ref: Any, optimizer: Any, responses: list[dict],
    args: argparse.Namespace, lap: Callable[[], None],
) -> tuple[float, float, float, float, float]:  # fmt: skip
    """REBEL on a rollout of two responses per prompt, which follow each other."""
    updates = pair_updates(responses, args)
    score(ref, itertools.chain(*updates), "ref_logp")
    lap()
    score(policy, itertools.chain(*updates[1:]), "old_logp")

    def loss_of(batch: Any, logp: Tensor) -> Tensor:
        old_logp = getattr(batch, "old_logp", logp.detach())
        logratio = losses.sequence_logprob(logp - old_logp, batch.lengths)
        kl = losses.sequence_logprob(old_logp - batch.ref_logp, batch.lengths)
        return rebel_loss(logratio.view(-1, 2), (batch.rewards - KL_COEF * kl).view(-1, 2))

    return descend(policy, optimizer, updates, loss_of)


CRITIC: dict[str, Any] = {}  # PPO's "model" and "optimizer", from the first step on


class Critic(torch.nn.Module):
    """The reference without its head, and a Linear to one number, 0 at first."""

    def __init__(self, body: torch.nn.Module):
        super().__init__()
        self.body, self.head = body, torch.nn.Linear(body.config.hidden_size, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, rows: Tensor, targets: Tensor, temperature: float, **inputs: Any) -> Tensor:
        """Value before each response token, from all that stands before it; (R,) float32."""
        hidden = self.body(use_cache=False, **inputs).last_hidden_state[0]
        return self.head(hidden[rows]).float().sum(1)  # of one: no view, which FSDP warns of


def make_critic(policy: Any, args: argparse.Namespace) -> None:
    """Put into CRITIC a critic made of the reference, sharded as the policy is, and its AdamW."""
    mesh = next(policy.parameters()).device_mesh
    options = {"dtype": torch.float32, "attn_implementation": "packed"}
    lm = AutoModelForCausalLM.from_pretrained(problems.model_folder(args.model), **options)
    if args.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    critic = Critic(lm.base_model)
    options = {"mesh": mesh}  # as in train_online.shard
    options |= {"mp_policy": fsdp.MixedPrecisionPolicy(train_online.COMPUTE, torch.float32)}
    options |= {"reshard_after_forward": train_online.ON_GPU}
    for module in [*critic.body.layers, critic]:
        fsdp.fully_shard(module, **options)
    optimizer = torch.optim.AdamW(critic.parameters(), CRITIC_LR * args.lr, fused=True)
    CRITIC.update(model=critic.train(), optimizer=optimizer)


def whiten(batches: list) -> None:
    """Give the advantages, those of all ranks together, mean 0 and variance 1, as TRL does."""
    mine = [batch.advantages.double() for batch in batches if batch.share]
    flat = torch.cat([*mine, batches[0].advantages.double()[:0]])  # a rank may have none
    sums = torch.stack((flat.new_tensor(len(flat)), flat.sum(), flat.square().sum()))
    dist.all_reduce(sums)
    count, mean = sums[0], sums[1] / sums[0]
    variance = (sums[2] / count - mean.square()) * count / (count - 1)
    for batch in batches:
        batch.advantages = ((batch.advantages - mean) * (variance + 1e-8).rsqrt()).float()


def ppo_step(
    policy: Any, ref: Any, optimizer: Any, responses: list[dict],
    args: argparse.Namespace, lap: Callable[[], None],
) -> tuple[float, float, float, float, float]:  # fmt: skip
    """PPO on a rollout: GAE, then policy and critic, which share nothing, one after the other."""
    if not CRITIC:
        make_critic(policy, args)
    updates = token_updates(responses, args)
    batches = list(itertools.chain(*updates))
    score(ref, batches, "ref_logp")
    lap()
    score(policy, batches, "old_logp")
    score(CRITIC["model"], batches, "old_values")
    for batch in batches:
        rewards = token_rewards(batch.rewards, batch.old_logp, batch.ref_logp, batch.lengths)
        batch.advantages, batch.returns = gae(rewards, batch.old_values, batch.lengths)
    whiten(batches)
    told = descend(policy, optimizer, updates,
                   lambda b, logp: ppo_loss(logp, b.old_logp, b.advantages))  # fmt: skip
    descend(CRITIC["model"], CRITIC["optimizer"], updates,
            lambda b, values: value_loss(values, b.old_values, b.returns))  # fmt: skip
    return told


# ---------------------------------------------------------------------------------------------
# The command

# name: (its step, responses per prompt)
METHODS = {
    "a_star_po": (train_online.least_squares, 1),
    "grpo": (grpo_step, 8),
    "rebel": (rebel_step, 2),
    "ppo": (ppo_step, 1),
}


def train_with(learn: Callable, flags: list[str], module: str, **named: str) -> None:
    """Run train_online's main with another step; `named` goes into the run's config.json.

    `module` is the one running, with sys.argv as it was given: how torchrun starts it again.
    """
    again = ["-m", module, *sys.argv[1:]]
    sys.argv = [sys.argv[0], *flags]
    args = train_online.parser.parse_args()
    vars(args).update(named)
    n, method = args.samples_per_prompt, named.get("method")
    if (method == "grpo" and n < 2) or (method == "rebel" and n != 2):
        raise problems.UserError(f"--samples-per-prompt {n} is not for {method}: leave it out")
    if method == "ppo" and args.resume:
        raise problems.UserError("PPO cannot --resume: its critic is in no checkpoint")
    checked = train_online.check(args)
    sys.argv = again
    problems.launch()
    train_online.train(args, *checked, learn)


def main() -> None:
    """Choose the method and train."""
    about = __doc__.splitlines()[0] + " With train_online.py's own flags, which follow:"
    parser = argparse.ArgumentParser(description=about, add_help=False, allow_abbrev=False)
    parser.add_argument("--method", choices=METHODS, required=True, help="what to train with")
    if {"-h", "--help"} & set(sys.argv):
        parser.print_help()
        train_online.parser.parse_args()  # prints its own, and exits
    chosen, flags = parser.parse_known_args()
    learn, group = METHODS[chosen.method]
    flags = ["--samples-per-prompt", str(group), *flags]
    train_with(learn, flags, "experiments.baselines", method=chosen.method)


if __name__ == "__main__":
    problems.run(main)
