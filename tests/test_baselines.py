"""The baselines against brute force, TRL's outputs, other splits, and the command; and compare.py.

tests/trl_losses.json has the outputs of TRL's own code for a few numbers, and the command for it.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import re
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import read_metrics, torchrun

import losses
import train_online
from apo import files
from apo.engine import Response
from apo.files import UserError
from apo.policy import MicroBatch, add_ref_logp, load_policy
from apo.problems import Prompt
from experiments import baselines, compare, compare_results, countdown
from train_online import Algorithm

FLOAT64 = torch.float64
TRL = json.loads(Path(__file__).with_name("trl_losses.json").read_text())
MASK = torch.tensor(TRL["given"]["mask"], dtype=torch.bool)
LENGTHS = torch.tensor(TRL["lengths"])


def packed(rows: list) -> torch.Tensor:
    """TRL's padded (B, T) as ours, (R,)."""
    return torch.tensor(rows, dtype=FLOAT64)[MASK]


def given(name: str) -> torch.Tensor:
    return packed(TRL["given"][name])


def close(actual: torch.Tensor, expected: torch.Tensor, error: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=error, atol=error)


def vectors(seed: int, count: int, size: int, scale: float = 1.0) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return list(scale * torch.randn(count, size, generator=chance, dtype=FLOAT64))


# ---------------------------------------------------------------------------------------------
# The losses


def test_group_advantages_by_hand():
    rows = [[1.0, 0, 0, 1, 0, 0, 0, 0], [0.5, 2.0, -1.0, 3.0, 1.0, 1.0, 0.0, 0.25]]
    advantages = baselines.group_advantages(torch.tensor(rows, dtype=FLOAT64))
    for ours, row in zip(advantages.tolist(), rows, strict=True):
        mean = statistics.mean(row)
        std = statistics.stdev(row)
        assert ours == pytest.approx([(r - mean) / (std + 1e-4) for r in row])
    assert baselines.group_advantages(torch.ones(3, 8)).tolist() == [[0.0] * 8] * 3
    with pytest.raises(ValueError, match=r"\(4, 1\)"):
        baselines.group_advantages(torch.ones(4, 1))


def test_group_advantages_are_trls():
    groups = {name: torch.tensor(x) for name, x in TRL["groups"].items()}
    close(baselines.group_advantages(groups["rewards"]), groups["advantages"], 1e-6)


def clipped_by_hand(ratio: float, advantage: float) -> float:
    """Return the loss of one token, by cases: the clip acts only on what goes too far."""
    if advantage > 0 and ratio > 1.2:
        return -1.2 * advantage
    if advantage < 0 and ratio < 0.8:
        return -0.8 * advantage
    return -ratio * advantage


def test_ppo_and_grpo_losses_token_by_token():
    """40 tokens; in each of the four cases, clipped or not and good or bad, there are some."""
    logp, old_logp, ref_logp = vectors(0, 3, 40, scale=0.3)
    [advantages] = vectors(1, 1, 40)
    ppo = baselines.ppo_loss(logp, old_logp, advantages)
    grpo = baselines.grpo_loss(logp, old_logp, ref_logp, advantages)
    cases = set()
    for i in range(40):
        ratio = math.exp(logp[i] - old_logp[i])
        surrogate = clipped_by_hand(ratio, advantages[i].item())
        gap = (ref_logp[i] - logp[i]).item()
        assert ppo[i].item() == pytest.approx(surrogate, rel=1e-12)
        expected = surrogate + 0.04 * (math.exp(gap) - gap - 1)
        assert grpo[i].item() == pytest.approx(expected, rel=1e-12)
        cases.add((abs(ratio - 1) > 0.2, ratio > 1, advantages[i].item() > 0))
    assert len(cases) == 8


def test_grpo_loss_is_trls_dapo():
    """Value and gradient. TRL's default is the mean over tokens, not over responses."""
    assert TRL["grpo"]["loss_type"] == "dapo"
    logp = given("logp").requires_grad_()
    advantages = torch.tensor(TRL["given"]["advantages"], dtype=FLOAT64)
    of_tokens = advantages.repeat_interleave(LENGTHS)
    loss = baselines.grpo_loss(logp, given("old_logp"), given("ref_logp"), of_tokens).mean()
    loss.backward()
    assert loss.item() == pytest.approx(TRL["grpo"]["loss"], rel=1e-12)
    close(logp.grad, packed(TRL["grpo"]["grad"]))


def test_ppo_losses_are_trls():
    expected = TRL["ppo"]
    logp = given("logp").requires_grad_()
    values = given("values").requires_grad_()
    policy = baselines.ppo_loss(logp, given("old_logp"), packed(expected["whitened"])).mean()
    value = baselines.value_loss(values, given("old_values"), packed(expected["returns"])).mean()
    (policy + value).backward()
    assert policy.item() == pytest.approx(expected["policy_loss"], rel=1e-12)
    assert value.item() == pytest.approx(expected["value_loss"], rel=1e-12)
    close(logp.grad, packed(expected["policy_grad"]))
    close(values.grad, packed(expected["value_grad"]))


def test_value_loss_token_by_token():
    values, old_values, returns = vectors(2, 3, 40, scale=0.5)
    actual = baselines.value_loss(values, old_values, returns)
    for i in range(40):
        clipped = min(max(values[i], old_values[i] - 0.2), old_values[i] + 0.2)
        worse = max((values[i] - returns[i]) ** 2, (clipped - returns[i]) ** 2)
        assert actual[i].item() == pytest.approx(worse.item() / 2, rel=1e-12)


def test_rebel_loss_pair_by_pair():
    logratio = vectors(3, 6, 2)
    rewards = vectors(4, 6, 2)
    for eta in (1.0, 0.5):
        actual = baselines.rebel_loss(torch.stack(logratio), torch.stack(rewards), eta)
        for i in range(6):
            (l1, l2), (r1, r2) = logratio[i].tolist(), rewards[i].tolist()
            assert actual[i].item() == pytest.approx(((l1 - l2) / eta - (r1 - r2)) ** 2)
    with pytest.raises(ValueError, match=r"\(4,\)"):
        baselines.rebel_loss(torch.zeros(4), torch.zeros(4))


def test_losses_refuse_what_would_broadcast():
    row = torch.zeros(3)
    with pytest.raises(ValueError):
        baselines.ppo_loss(row, row, torch.zeros(1))
    with pytest.raises(ValueError):
        baselines.value_loss(row, torch.zeros(1, 3), row)
    with pytest.raises(ValueError):
        baselines.grpo_loss(row, row, row, torch.zeros(3, 1))
    with pytest.raises(ValueError):
        baselines.gae(row, row, torch.tensor([1, 1]))


# ---------------------------------------------------------------------------------------------
# GAE


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_its_double_sum(gamma, lam):
    """Eq. (16) term by term. A value that leaks in from the next response shows at once."""
    rewards, values = vectors(0, 2, int(LENGTHS.sum()))
    advantages, returns = baselines.gae(rewards, values, LENGTHS, gamma, lam)
    expected = []
    for r, v in zip(rewards.split(LENGTHS.tolist()), values.split(LENGTHS.tolist()), strict=True):
        next_values = [*v.tolist()[1:], 0.0]
        deltas = [r[t].item() + gamma * next_values[t] - v[t].item() for t in range(len(r))]
        for t in range(len(r)):
            terms = [(gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(r))]
            expected.append(sum(terms))
    expected = torch.tensor(expected, dtype=FLOAT64)
    close(advantages, expected)
    close(returns, expected + values)


def test_gae_is_trls(group):
    """Rewards with the KL in them, returns, and the advantages once whitened."""
    expected = TRL["ppo"]
    reward = torch.tensor(TRL["given"]["rewards"], dtype=FLOAT64)
    rewards = baselines.token_rewards(reward, given("old_logp"), given("ref_logp"), LENGTHS)
    close(rewards, packed(expected["rewards"]))
    advantages, returns = baselines.gae(rewards, given("old_values"), LENGTHS)
    close(returns, packed(expected["returns"]))
    batches = []
    for part in advantages.split([4, 7, 3]):
        batches.append(SimpleNamespace(extra={"advantages": part}, weight=1.0))
    # A copy that keeps a rank in step does not count.
    batches.append(SimpleNamespace(extra={"advantages": advantages[:2] + 9}, weight=0.0))
    baselines.whiten(batches)
    whitened = torch.cat([batch.extra["advantages"] for batch in batches[:3]])
    close(whitened.double(), packed(expected["whitened"]), 1e-6)


def test_the_advantage_of_a_single_token_is_whitened_to_zero(group) -> None:
    batch = SimpleNamespace(extra={"advantages": torch.tensor([0.7])}, weight=1.0)
    baselines.whiten([batch])
    assert batch.extra["advantages"].tolist() == [0.0]


# ---------------------------------------------------------------------------------------------
# A step's updates, on a model of two layers


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"vocab_size": 20, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3}
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny")
    Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True)).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")  # a folder without one is no model
    return path


def rollout(samples_per_prompt: int) -> list[Response]:
    """Eight prompts with responses of 1 to 9 tokens; every fifth is right."""
    chance = torch.Generator().manual_seed(1)

    def tokens(longest: int) -> list[int]:
        count = int(torch.randint(1, longest, (1,), generator=chance))
        return torch.randint(20, (count,), generator=chance).tolist()

    prompts = [Prompt({"id": str(i)}, "", tokens(6)) for i in range(8)]
    responses = []
    for prompt in prompts:
        for sample in range(samples_per_prompt):
            index = len(responses)
            ids = tokens(10)
            response = Response(index, prompt, sample, ids, "", True, [-3.0] * len(ids))
            response.reward = float(index % 5 == 0)
            response.numbers["v_star"] = 0.25
            responses.append(response)
    return responses


def make(
    method: str,
    folder: Path,
    kl_weight: float | None = None,
    num_updates: int = 1,
    gae_lambda: float | None = None,
    max_grad_norm: float = 1.0,
) -> tuple[Algorithm, int]:
    """Make an algorithm, and say how many responses it has per prompt."""
    samples = baselines.METHODS[method].samples_per_prompt
    args = argparse.Namespace(lr=1e-3, samples_per_prompt=None, resume=False)
    args.beta1 = None
    args.beta2 = None  # the default, for methods that have it
    args.method = method
    args.kl_weight = kl_weight
    args.gae_lambda = gae_lambda
    args.max_grad_norm = max_grad_norm
    args.updates_per_batch = num_updates
    args.gradient_checkpointing = False
    baselines.check_method(args)
    data = SimpleNamespace(values=SimpleNamespace(header={"model": str(folder)}))
    return baselines.METHODS[method].make(args, data), samples


class Step:
    """What a rollout and its updates by SGD need, in the order of train_online.train."""

    def __init__(self, folder: Path, algorithm: Algorithm, responses: list[Response]) -> None:
        self.algorithm = algorithm
        self.responses = responses
        mesh = dist.init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
        self.policy = load_policy(folder, mesh, torch.float32)
        self.ref = load_policy(folder, mesh, torch.float32).requires_grad_(False)
        if algorithm.credit is not None:
            algorithm.credit(responses)

    def split(self, budget: int, num_updates: int) -> list[list[MicroBatch]]:
        args = argparse.Namespace(updates_per_batch=num_updates, micro_batch_tokens=budget)
        group_size = self.algorithm.group_size
        updates = train_online.split_into_updates(self.responses, args, 1.0, group_size)
        add_ref_logp(self.ref, updates)
        return updates

    def update(self, updates: list[list[MicroBatch]], lr: float = 0.1) -> dict[str, float]:
        optimizer = torch.optim.SGD(self.policy.parameters(), lr)
        if self.algorithm.prepare is not None:
            self.algorithm.prepare(self.policy, updates)
        return train_online.update(self.policy, optimizer, updates, self.algorithm.loss)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.full_tensor().detach().double().flatten() for p in model.parameters()])


@pytest.fixture
def critics(monkeypatch) -> list[baselines.Critic]:
    """The critics that PPO makes. SGD trains them: AdamW's division would show rounding."""
    made = []
    load_critic = baselines.load_critic

    def load(*arguments) -> baselines.Critic:
        made.append(load_critic(*arguments))
        return made[-1]

    def sgd(parameters, lr, fused) -> torch.optim.SGD:
        return torch.optim.SGD(parameters, 0.1)

    monkeypatch.setattr(baselines, "load_critic", load)
    monkeypatch.setattr(torch.optim, "AdamW", sgd)
    return made


def after_step(
    folder: Path, method: str, budget: int, critics: list
) -> tuple[dict[str, float], torch.Tensor]:
    """Return a step's metrics, and by how much it moved the weights, the critic's too."""
    algorithm, samples = make(method, folder)
    step = Step(folder, algorithm, rollout(samples))
    before = weights(step.policy)
    metrics = step.update(step.split(budget, 2))
    moved = weights(step.policy) - before
    if method == "ppo":
        # The critic's body starts as the reference and its head at 0.
        body_and_head = torch.cat([before, torch.zeros(33)])
        moved = torch.cat([moved, weights(critics[-1]) - body_and_head])
    return metrics, moved


@pytest.mark.parametrize("method", ["grpo", "rebel", "ppo"])
def test_the_split_into_micro_batches_changes_nothing(method, group, folder, critics):
    """A mean per micro-batch in place of the global one is off by tens of per cent here.

    25 tokens hold two or three responses, and not even that for some pairs: these stay together.
    """
    metrics_of_one, moved_by_one = after_step(folder, method, 10_000, critics)
    metrics_of_many, moved_by_many = after_step(folder, method, 25, critics)
    assert metrics_of_many == pytest.approx(metrics_of_one, rel=1e-4, abs=1e-6)
    assert moved_by_one.norm() > 1e-3
    assert (moved_by_many - moved_by_one).norm() < 1e-4 * moved_by_one.norm()
    assert metrics_of_one["logratio"] == 0  # pi is still pi_ref in the first update


def test_the_loss_is_the_mean_over_all_tokens(group, folder):
    """GRPO's first update, in which w is 1 and k3 is 0: the loss is -sum |y| A / sum |y|."""
    algorithm, samples = make("grpo", folder)
    step = Step(folder, algorithm, rollout(samples))
    metrics = step.update(step.split(budget=25, num_updates=1))
    total = 0.0
    num_tokens = 0
    for start in range(0, 64, 8):
        chosen = step.responses[start : start + 8]
        rewards = [response.reward for response in chosen]
        for response in chosen:
            centred = response.reward - statistics.mean(rewards)
            advantage = centred / (statistics.stdev(rewards) + 1e-4)
            total -= len(response.ids) * advantage
            num_tokens += len(response.ids)
    assert abs(total / num_tokens) > 1e-3
    assert metrics["loss"] == pytest.approx(total / num_tokens, rel=1e-4)


@pytest.mark.parametrize("method", ["grpo", "rebel", "ppo"])
def test_both_updates_look_back_at_the_policy_that_sampled(method, group, folder, monkeypatch):
    """The second update's ratio is to pi_t, not to itself: else nothing is ever clipped."""
    seen = []
    ppo_loss = baselines.ppo_loss
    rebel_loss = baselines.rebel_loss

    def clipped(logp, old_logp, *more):
        seen.append((logp - old_logp).abs().max().item())
        return ppo_loss(logp, old_logp, *more)

    def paired(logratio, rewards):
        seen.append(logratio.abs().max().item())
        return rebel_loss(logratio, rewards)

    monkeypatch.setattr(baselines, "ppo_loss", clipped)
    monkeypatch.setattr(baselines, "rebel_loss", paired)
    algorithm, samples = make(method, folder)
    step = Step(folder, algorithm, rollout(samples))
    step.update(step.split(10_000, 2))
    assert len(seen) == 2 and seen[0] < 1e-5 and seen[1] > 1e-2


# ---------------------------------------------------------------------------------------------
# REBEL, PPO and `running`


def test_rebels_gradient_is_that_of_pairs(group, folder):
    """At pi = pi_t: -2 mean (r_1 - r_2) (grad ln pi(y_1) - grad ln pi(y_2)), by hand.

    With an ordinary model that sees one response at a time, and the pairs in many micro-batches.
    Wrong pairs, a pi_t that carries gradients or the reward of another response would change it.
    """
    from transformers import Qwen2ForCausalLM

    lm = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = 0.0
    responses = rollout(2)
    for one, two in zip(responses[::2], responses[1::2], strict=True):
        for sign, response in ((1, one), (-1, two)):
            ids = torch.tensor([response.prompt.ids + response.ids])
            logp = lm(input_ids=ids).logits[0].log_softmax(-1)
            targets = torch.tensor(response.ids)[:, None]
            chosen = logp[-len(targets) - 1 : -1].gather(1, targets).sum()
            total = total - 2 * sign * (one.reward - two.reward) * chosen / 8
    total.backward()
    gradient = torch.cat([p.grad.double().flatten() for p in lm.parameters()])
    expected = -0.1 * min(1.0, 1 / (gradient.norm().item() + 1e-6)) * gradient

    algorithm, _ = make("rebel", folder)
    step = Step(folder, algorithm, responses)
    before = weights(step.policy)
    metrics = step.update(step.split(budget=25, num_updates=1))
    assert metrics["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
    moved = weights(step.policy) - before
    assert (moved - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("kl_weight", [None, 0.2])
def test_rebels_reward_holds_the_kl_term(kl_weight, group, folder, monkeypatch):
    """r - 0.05 ln(pi_t / pi_ref) of the whole response, as in its authors' code."""
    algorithm, _ = make("rebel", folder, kl_weight)
    step = Step(folder, algorithm, rollout(2))
    with torch.no_grad():
        for p in step.ref.parameters():
            p.to_local().mul_(1.1)
    [[batch]] = updates = step.split(10_000, 1)
    with torch.no_grad():
        token_kl = step.policy(**batch.inputs) - batch.ref_logp
    kl = losses.sequence_logprob(token_kl, batch.lengths)
    assert kl.abs().min() > 0.01
    seen = []
    rebel_loss = baselines.rebel_loss

    def paired(logratio, rewards):
        seen.append(rewards.flatten())
        return rebel_loss(logratio, rewards)

    monkeypatch.setattr(baselines, "rebel_loss", paired)
    step.update(updates)
    close(seen[0], batch.rewards - (kl_weight or 0.05) * kl, 1e-5)


def test_the_critic_learns_from_the_rewards(group, folder, critics):
    """It starts at 0, and on one rollout again and again it comes nearer to the returns."""
    algorithm, _ = make("ppo", folder)
    step = Step(folder, algorithm, rollout(1))
    errors = []
    for _ in range(30):
        [[batch]] = updates = step.split(10_000, 1)
        step.update(updates, lr=0.0)
        rewards = batch.rewards.repeat_interleave(batch.lengths)
        errors.append((batch.extra["old_values"] - rewards).square().mean().item())
    assert len(critics) == 1
    assert errors[0] == pytest.approx(rewards.square().mean().item())
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize("gae_lambda", [None, 0.5, 1.0])
def test_ppos_returns_decay_with_lambda(gae_lambda, group, folder, critics):
    """All values are 0 at first and so is the KL: G_t is r times lambda for each later token."""
    algorithm, _ = make("ppo", folder, gae_lambda=gae_lambda)
    step = Step(folder, algorithm, rollout(1))
    [[batch]] = updates = step.split(10_000, 1)
    step.update(updates)
    expected = []
    for reward, length in zip(batch.rewards.tolist(), batch.lengths.tolist(), strict=True):
        expected += [reward * (gae_lambda or 0.95) ** later for later in reversed(range(length))]
    close(batch.extra["returns"], torch.tensor(expected), 1e-5)


def test_the_critic_is_clipped_as_the_policy_is(group, folder, critics):
    """By SGD with the learning rate 0.1, a gradient of norm 1e-3 moves the weights by 1e-4."""
    algorithm, _ = make("ppo", folder, max_grad_norm=1e-3)
    step = Step(folder, algorithm, rollout(1))
    start = torch.cat([weights(step.policy), torch.zeros(33)])
    step.update(step.split(10_000, 1))
    assert (weights(critics[0]) - start).norm().item() == pytest.approx(1e-4, rel=1e-2)


def test_running_means_are_of_earlier_steps(folder):
    algorithm, _ = make("running", folder)
    a, b, c, *_ = rollout(1)

    def step(*rewarded: tuple[Response, float]) -> list[float]:
        """Give the responses their rewards; return what stands in V*'s place."""
        responses = [response for response, _ in rewarded]
        for response, reward in rewarded:
            response.reward = reward
        algorithm.credit(responses)
        return [response.numbers["v_star"] for response in responses]

    # Before the first step nothing is known but its own mean.
    assert step((a, 1.0), (b, 0.0)) == pytest.approx([0.5, 0.5])
    # A prompt's mean keeps 0.8 of what it was: 0.8 * 0.5 + 0.2 * 1, and 0.8 * 0.5 + 0.2 * 0.
    assert step((a, 1.0), (b, 1.0)) == pytest.approx([0.6, 0.4])
    # A new prompt starts at the mean of all, 0.9 * 0.5 + 0.1 * 1.
    assert step((c, 0.0), (a, 0.0)) == pytest.approx([0.55, 0.68])
    # Two responses to a prompt get the same number, and both count for the next step.
    twin = dataclasses.replace(c, numbers={})
    assert step((c, 1.0), (twin, 0.0)) == pytest.approx([0.44, 0.44])
    assert step((c, 1.0)) == pytest.approx([0.8 * (0.8 * 0.44 + 0.2)])


@pytest.mark.parametrize("num_updates", [1, 2])
def test_a_rollout_is_replayed_in_the_next_three_steps(num_updates, group, folder):
    """Each step's own updates come first: the log is about them."""
    algorithm, _ = make("replay", folder, num_updates=num_updates)
    step = Step(folder, algorithm, rollout(1))
    rollouts = []  # the newest last
    for _ in range(6):
        rollouts.append(step.split(10_000, num_updates))
        updates = list(rollouts[-1])
        before = weights(step.policy)
        step.update(updates)
        older = [batches for rollout in rollouts[-4:-1] for batches in rollout]
        assert [id(batches) for batches in updates] == [id(b) for b in rollouts[-1] + older]
        assert not weights(step.policy).equal(before)


# ---------------------------------------------------------------------------------------------
# A fork


def test_a_fork_needs_a_loss_and_no_more(group, folder):
    """REINFORCE with the leave-one-out baseline (RLOO), as a course project would write it.

    Its gradient, through other code and another split, is the one taken by hand.
    """

    def credit(responses: list[Response]) -> None:
        for start in range(0, len(responses), 4):
            chosen = responses[start : start + 4]
            total = sum(response.reward for response in chosen)
            for response in chosen:
                response.numbers["advantage"] = response.reward - (total - response.reward) / 3

    def loss(batch: MicroBatch, token_logp: torch.Tensor) -> tuple[torch.Tensor, dict]:
        logp = losses.sequence_logprob(token_logp, batch.lengths)
        return -batch.numbers["advantage"] * logp, {"logp": logp}

    step = Step(folder, Algorithm(loss, credit), rollout(4))
    policy = load_policy(folder, next(step.policy.parameters()).device_mesh, torch.float32)
    expected = 0.0
    logps = []
    for response in step.responses:
        args = argparse.Namespace(updates_per_batch=1, micro_batch_tokens=1)
        [[batch]] = train_online.split_into_updates([response], args, 1.0, 1)
        logp = policy(**batch.inputs).sum()
        expected = expected - response.numbers["advantage"] * logp / 32
        logps.append(logp.item())
    expected.backward()
    norm = torch.cat([p.grad.full_tensor().flatten() for p in policy.parameters()]).norm()

    metrics = step.update(step.split(budget=25, num_updates=1))
    assert sum(r.numbers["advantage"] for r in step.responses) == pytest.approx(0)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["logp"] == pytest.approx(statistics.mean(logps), rel=1e-5)


# ---------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("grpo --samples-per-prompt 1", "GRPO needs at least 2"),
        ("rebel --samples-per-prompt 3", "REBEL needs pairs"),
        ("ppo --resume", "ppo cannot --resume"),
        ("running --resume", "running cannot --resume"),
        ("grpo --gae-lambda 0.9", "grpo has no --gae-lambda: that is PPO's"),
        ("running --kl-weight 0.1", "running has no --kl-weight: use --beta2"),
        ("grpo --beta2 0.001", "grpo has no --beta2: use --kl-weight"),
        ("running --beta1 inf", "running has no --beta1"),
        ("grpo --kl-weight -1", "--kl-weight -1.0 is not a number of at least 0"),
        ("grpo --kl-weight nan", "--kl-weight nan is not a number of at least 0"),
    ],
)
def test_a_method_refuses_what_it_cannot_do(flags, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["baselines", "--method", *flags.split()])
    with pytest.raises(UserError, match=message):
        baselines.main()


@pytest.mark.parametrize("method", baselines.METHODS)
def test_resume_is_advised_only_where_it_works(method, monkeypatch, tmp_path):
    (tmp_path / "final").mkdir()
    flags = ["--method", method, "--values", "none.json", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["baselines", *flags])
    with pytest.raises(UserError, match="is not empty") as caught:
        baselines.main()
    assert ("--resume" in str(caught.value)) == baselines.METHODS[method].can_resume


STEPS = "--batch-size 4 --num-steps 2 --lr 1e-3 --micro-batch-tokens 400 --eval-dataset none"
RUNS = {
    "grpo": ("-m", "experiments.baselines", "--method", "grpo", "--samples-per-prompt", "4"),
    "rebel": ("-m", "experiments.baselines", "--method", "rebel"),
    "ppo": ("-m", "experiments.baselines", "--method", "ppo"),
    "ppo on 2 ranks": (*torchrun(2), "-m", "experiments.baselines", "--method", "ppo"),
    "ppo with adapters": ("-m", "experiments.baselines", "--method", "ppo", "--lora-rank", "4"),
    "clipped": ("-m", "experiments.baselines", "--method", "rebel", "--max-grad-norm", "1e-13"),
}


@pytest.fixture(scope="module")
def runs(run: Callable, stage1: SimpleNamespace, tmp_path_factory) -> dict[str, Path]:
    """Two steps of each method, as a user starts them, two at a time."""
    place = tmp_path_factory.mktemp("runs")

    def start(name: str) -> Path:
        out = place / name
        if "--lora-rank" in RUNS[name] and importlib.util.find_spec("peft") is None:
            return out
        result = run(*RUNS[name], "--values", stage1.file, "--out", out, *STEPS.split())
        assert result.code == 0, result.all
        return out

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RUNS, pool.map(start, RUNS), strict=True))


@pytest.mark.parametrize(("method", "samples"), [("grpo", 4), ("rebel", 2), ("ppo", 1)])
def test_a_method_trains(method, samples, runs):
    steps = read_metrics(runs[method])
    assert [step["step"] for step in steps] == [1, 2]
    assert steps[0]["logratio"] == 0 and steps[1]["logratio"] != 0
    for step in steps:
        assert step["grad_norm"] > 0
        assert step["logprob_gap"] < 1e-4  # trained on the samples of this very policy
    config = files.read_json(runs[method] / "config.json")
    assert config["method"] == method and config["samples_per_prompt"] == samples
    assert (runs[method] / "final" / "model.safetensors").exists()


def test_ppo_trains_adapters(runs):
    """The reference is then the policy itself, which has just been used for ln pi_ref."""
    pytest.importorskip("peft")
    steps = read_metrics(runs["ppo with adapters"])
    assert steps[0]["logratio"] == 0 and steps[1]["logratio"] != 0


def test_a_small_max_grad_norm_stops_the_training(runs):
    """AdamW adds 1e-8 to the size of each gradient, beside which 1e-13 is nothing.

    The weight decay is left, which moves the policy a little.
    """
    clipped = read_metrics(runs["clipped"])
    free = read_metrics(runs["rebel"])
    assert clipped[0]["grad_norm"] > 1  # it is logged as it was before clipping
    assert 0 < abs(clipped[1]["logratio"]) < 0.05 * abs(free[1]["logratio"])


def test_ranks_change_nothing_but_rounding(runs):
    """Whitening and both losses are over all ranks."""
    one = read_metrics(runs["ppo"])
    two = read_metrics(runs["ppo on 2 ranks"])
    for a, b in zip(one, two, strict=True):
        assert a["reward"] == b["reward"]
        for name in ("loss", "grad_norm", "logratio"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-6), name


# ---------------------------------------------------------------------------------------------
# compare.py


def test_reach_is_linear_between_steps():
    reward = [0.5, 0.7, 0.6, 0.9]
    spent = [10.0, 20.0, 30.0, 40.0, 50.0]
    assert compare_results.reach(reward, spent, 0.4) == 10
    assert compare_results.reach(reward, spent, 0.6) == pytest.approx(15)
    assert compare_results.reach(reward, spent, 0.8) == pytest.approx(30 + 10 * 2 / 3)
    assert compare_results.reach(reward, spent, 0.95) is None


def test_mean_and_error():
    mean, error = compare_results.mean_and_error([1.0, 2.0, 6.0])
    assert mean == 3 and error == pytest.approx(math.sqrt(7 / 3))
    assert compare_results.mean_and_error([2.0]) == (2, None)
    assert compare_results.mean_and_error([1.0, None]) is None
    assert compare_results.format_estimate(compare_results.Estimate(0.25, None)) == "0.250"


def test_a_difference_of_less_than_two_standard_errors_is_none():
    results = []
    for name, mean in (("a", 10.0), ("b", 12.0), ("c", 13.0), ("d", None)):
        tokens = None if mean is None else compare_results.Estimate(mean, 1.0)
        results.append({"method": name, "seeds": 3, "tokens_to": {"0.5": tokens}})
    assert compare_results.best_methods(results, "tokens_to", "0.5") == ["a", "b"]
    assert compare_results.best_methods(results[3:], "tokens_to", "0.5") == []


def test_the_hatched_part_of_a_bar_is_stage_1(tmp_path, monkeypatch):
    scores = compare_results.Scores({"1": 0.5}, {})
    spent = {"tokens": [1e6, 3e6], "seconds": [10.0, 40.0]}
    cheap = compare_results.Run([0.5], spent, 0.0, 0.1, scores)
    spent = {"tokens": [0.0, 4e6], "seconds": [0.0, 90.0]}
    dear = compare_results.Run([0.5], spent, 0.0, 0.1, scores)
    drawn = []
    monkeypatch.setattr(compare_results.pyplot, "close", drawn.append)
    runs_of = {"ppo": [dear, dear], "a_star_po_n8": [cheap]}
    compare_results.draw_costs(runs_of, ["tokens", "seconds"], tmp_path / "costs.png")
    tokens, seconds = drawn[0].axes
    assert [bar.get_width() for bar in tokens.patches] == [4, 3, 0, 1]  # all, and then stage 1
    assert [bar.get_width() for bar in seconds.patches] == [90, 40, 0, 10]
    assert seconds.get_title(loc="left") == "Seconds: most with PPO,\nfewest with A*-PO, N = 8"


def test_off_policy_data_is_drawn(tmp_path):
    reward = compare_results.Estimate(0.3, 0.01)
    row = {"seeds": 2, "reward_final": reward}
    results = [{"method": setting.method} | row for setting in compare.OFF_POLICY]
    compare_results.draw_off_policy(results, tmp_path / "off-policy.png")
    assert (tmp_path / "off-policy.png").stat().st_size > 10_000


def test_a_single_rate_is_not_tuned() -> None:
    names = [setting.method for setting in compare.COMPARISON]
    tuned, lines = compare.tune(SimpleNamespace(rates=[0.5]), names)
    assert lines == [] and {pair.rate for pair in tuned.values()} == {0.5}
    assert tuned["a_star_po_n8"].kl_weight == 0.001 and tuned["grpo_8"].kl_weight == 0.04


@pytest.mark.parametrize(
    ("mean", "leads"), [(0.3, False), (0.32, False), (0.34, True)], ids=["behind", "near", "ahead"]
)
def test_v_star_leads_by_more_than_two_standard_errors(mean: float, leads: bool) -> None:
    """Over the mean and over 0; the error of a difference here is 0.014."""
    rewards = {"v_star": mean, "mean": 0.31, "zero": 0.3}
    rows = {}
    for name, reward in rewards.items():
        rows[f"replay_{name}"] = {"reward_final": compare_results.Estimate(reward, 0.01)}
    assert compare_results.v_star_leads(rows, "replay") == leads


def test_a_finished_job_is_kept(tmp_path):
    """Half a job is not, and one of another command is refused by name."""
    script = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(); "
    script += "open(p.with_name('count'), 'a').write('x'); (p / 'done').touch()"
    folder = tmp_path / "run"
    folder.mkdir()
    job = compare.Job(["-c", script, str(folder)], folder, "done")
    for _ in range(2):
        compare.run_jobs([job, job])
        assert (tmp_path / "count").read_text() == "x"
    with pytest.raises(UserError, match="command"):
        compare.run_job(job._replace(command=[*job.command, "more"]))
    # The sentence that the command printed is told, and not what comes after it.
    code = "import sys; print('error: no such', 'flag\\nlater'); sys.exit(2)"
    with pytest.raises(UserError, match=r"^no such flag \(see"):
        compare.run_job(compare.Job(["-c", code], tmp_path / "flags", "done"))
    bad = compare.Job(["-c", "raise SystemExit(3)"], tmp_path / "bad", "done")
    with (
        files.open_locked(tmp_path / "bad.log"),  # as another comparison has it
        pytest.raises(UserError, match=r"bad\.log is in use"),
    ):
        compare.run_job(bad)
    with pytest.raises(ChildProcessError, match=r"exit code 3, see .*bad\.log"):
        compare.run_job(bad)


def test_rows_differ_in_what_they_run():
    for settings in compare.ROWS.values():
        assert len({setting.method for setting in settings}) == len(settings)
        commands = {setting._replace(method="", tuned_as=None) for setting in settings}
        assert len(commands) == len(settings)
        # Each row is tuned, by itself or as another one.
        tuned_rows = {setting.method for setting in compare.COMPARISON}
        assert {setting.tuned_row for setting in settings} <= tuned_rows
    # compare.json has these; one of your own may come on top.
    names = "a_star_po_n8 a_star_po_n2 a_star_po_n1 mean zero running grpo_8 grpo_4 rebel ppo"
    methods = [setting.method for setting in compare.COMPARISON]
    assert methods[: len(names.split())] == names.split()
    assert all(setting.tuned_row == setting.method for setting in compare.COMPARISON)


def test_a_task_of_ones_own_runs_through_its_module():
    ours = SimpleNamespace(task="none")
    theirs = SimpleNamespace(task="experiments.countdown")
    grpo = "baselines --method grpo"
    assert compare.stage_command(ours, "train_online --beta1 inf")[0] == "train_online.py"
    assert compare.stage_command(ours, grpo)[:2] == ["-m", "experiments.baselines"]
    command = compare.stage_command(theirs, grpo)
    assert command == ["-m", "experiments.countdown", "baselines", "--method", "grpo"]
    assert compare.stage_command(ours, "process")[:2] == ["-m", "experiments.process"]
    for name in ("compare", "long", "controls", "ablations", "off-policy"):
        for setting in compare.ROWS[name]:
            assert setting.command.split()[0] in countdown.STAGES


def fake_job(job: compare.Job) -> None:
    """Write what a job would leave, without running it. Rewards rise by 0.1 a step, from 0.5."""
    if "offline_value.py" in job.command:
        n = int(job.folder.name.removeprefix("values-"))
        prompts = [{"id": "a", "rewards": [1.0] * n, "lengths": [10] * n, "v_star": 1.0}]
        values = {"header": {"seconds": 7.0}, "prompts": prompts}
        files.write_json(job.folder / "values.json", values)
    elif "evaluate.py" in job.command:
        scores = {"pass_at_k": {"1": 0.5, "4": 0.75}}
        files.write_json(job.folder / "summary.json", {"benchmarks": {"test": scores}})
    else:
        flags = dict(zip(job.command[1:-1], job.command[2:], strict=True))
        lines = []
        for step in range(1, int(flags["--num-steps"]) + 1):
            # The best learning rate is 0.002 for A*-PO, with the larger of the KL weights, and
            # 0.001 for the others. A step of seed 1 takes twice as long.
            best_rate = 0.002 if "--beta2" in flags else 0.001
            reward = 0.4 + 0.1 * step - abs(float(flags["--lr"]) - best_rate)
            if flags.get("--beta2") == "0.001" or flags.get("--kl-weight") == "0.05":
                reward -= 0.001
            # This run has the highest mean, but collapses.
            if flags.get("--beta2") == "0.001" and flags["--lr"] == "0.001":
                reward = 9.0 if step == 1 else 0.0
            metrics = {"reward": reward, "response_tokens": 5.0, "logratio": 0.25}
            metrics["grad_norm"] = 2.0 * step
            metrics["seconds_total"] = 1.0 + int(flags["--seed"])
            lines.append(json.dumps(metrics))
        files.write_text(job.folder / "metrics.jsonl", "\n".join(lines))


def test_results_of_known_runs(tmp_path, model, dataset, monkeypatch):
    monkeypatch.setattr(compare, "run_job", fake_job)
    monkeypatch.setattr(compare_results, "SMOOTHING", 5)
    monkeypatch.setattr(compare, "SMOOTHING", 5)
    command = f"compare --task none --model {model} --dataset {dataset} --test {dataset} --seeds 2"
    command += f" --work {tmp_path / 'work'} --out {tmp_path} --only a_star_po_n2 rebel"
    command += " --rates 0.001 0.002 --goals 0.65 2 --num-steps 6 --rollout-size 8"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--eval-samples", "4"])
    compare.main()
    ours, rebel = json.loads((tmp_path / "compare.json").read_text())
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    assert (tmp_path / "costs.png").stat().st_size > 10_000
    assert list(ours) == [
        *("method", "seeds", "learning_rate", "kl_weight", "rollouts"),
        *(
            "tokens_total",
            "seconds_total",
            "reward_final",
            "pass_at_1",
            "pass_at_4",
            "kl",
            "grad_norm",
            "tokens_to",
            "seconds_to",
            "reward_at_equal_tokens",
            "reward_at_equal_seconds",
        ),
    ]
    assert ours["method"] == "a_star_po_n2"
    assert ours["learning_rate"] == 0.002 and ours["kl_weight"] == 0.01
    assert rebel["learning_rate"] == 0.001 and rebel["kl_weight"] == 0.001
    # The best rate was the highest of A*-PO, so twice that rate was tried too, and the lowest of
    # REBEL, so half of it: each with the better weight.
    [tried] = tmp_path.glob("work/*/*lr0.004*")
    assert tried.name.startswith("train_online-n2-") and "-kl0.01-" in tried.name
    [tried] = tmp_path.glob("work/*/*lr0.0005*")
    assert tried.name.startswith("baselines-method-rebel-") and "-kl0.001-" in tried.name
    # Stage 1 has 20 tokens and 7 s, a step 40 tokens and 1 or 2 s.
    assert ours["tokens_total"] == [20 + 6 * 40, 0] and rebel["tokens_total"] == [6 * 40, 0]
    assert ours["seconds_total"] == pytest.approx([7 + 9, 3])
    assert rebel["seconds_total"] == pytest.approx([9, 3])
    assert ours["pass_at_4"] == [0.75, 0] and ours["kl"] == [0.25, 0]
    assert ours["grad_norm"] == [6, 0]  # 2, 4, 6, 8, 10: the first five of six steps
    # Rewards 0.5, 0.6, ..., 1: smoothed over five steps 0.6, 0.65, 0.7, ...
    assert ours["reward_final"] == pytest.approx([0.8, 0])
    assert ours["tokens_to"]["0.65"] == pytest.approx([20 + 40, 0])
    assert rebel["seconds_to"]["0.65"] == pytest.approx([1.5, 0.5])
    assert ours["tokens_to"]["2"] is None
    # The cheapest run takes 240 tokens or 6 s. Stage 1 alone takes longer.
    assert ours["reward_at_equal_tokens"] == pytest.approx([0.7, 0])  # five steps
    assert rebel["reward_at_equal_tokens"] == pytest.approx([0.8, 0])  # all six
    assert ours["reward_at_equal_seconds"] is None
    assert rebel["reward_at_equal_seconds"] == pytest.approx([0.7, 0.1])  # six steps, and three
    table = (tmp_path / "compare.txt").read_text().splitlines()
    assert any(re.search(r"^rebel .* 0.800 ± 0.000$", line) for line in table)  # at equal tokens
    assert any(re.match(r"rebel +2 +0.001 +0.001 +0.800 ± 0.000 +0.500", line) for line in table)
    assert any(re.match(r"reference +0.500 +0.750 +0.000", line) for line in table)
    assert "a_star_po_n2                 0.500   0.500" in table  # of each seed
    assert "stage 1, N = 2: 0.000 million tokens, 7 seconds" in table
    [chosen] = [line for line in table if re.match(r"a_star_po_n2 .*chosen", line)]
    # Rewards 0.5 to 1: 0.75 on average, and 0.8 in the last five steps.
    assert re.search(r"rate 0.002 .* mean reward 0.750  at the end 0.800 ", chosen)
    zero = files.read_json(next(tmp_path.glob("work/*/values-0/values.json")))
    assert zero["prompts"][0]["rewards"] == [0.0]

    # The same with what was tuned above. It differs if it was edited.
    edited = tmp_path / "edited.json"
    files.write_json(edited, [ours | {"kl_weight": 0.001}, rebel])
    command += f" --eval-samples 4 --tuned {edited}"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--out", str(tmp_path / "later")])
    compare.main()
    with_another, same = json.loads((tmp_path / "later" / "compare.json").read_text())
    assert with_another["learning_rate"] == 0.002 and with_another["kl_weight"] == 0.001
    assert same["kl_weight"] == 0.001 and same["reward_final"] == rebel["reward_final"]
    for more, says in (
        ("--only ppo", "has no row ppo"),
        (f"--out {tmp_path} --tuned {tmp_path / 'compare.json'}", "would be replaced"),
        (f"--tuned {tmp_path / 'compare.txt'}", "has no results of a comparison"),
        ("--rollout-size 9", "is no multiple of the 2 responses per prompt of rebel"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [*sys.argv, *more.split()])
            with pytest.raises(UserError, match=says):
                compare.main()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--task none --only reinforce", "--only reinforce: choose from a_star_po_n8"),
        ("--task experiments.chess", "--task experiments.chess: there is no such module"),
        ("--task chess.rules", "--task chess.rules: there is no such module"),
        ("--rows process", "--rows process needs --task none"),
        ("--task .x", "there is no such module"),
        ("--work README.md/work", "--work README.md/work cannot be written"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(monkeypatch, flags, says):
    monkeypatch.setattr(sys, "argv", ["compare", *flags.split()])
    with pytest.raises(UserError, match=says):
        compare.main()
