"""The baselines against hand calculation, TRL's outputs, brute force and other splits.

tests/trl_losses.json has what TRL's own code made of a few numbers, and the command for it.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import losses
import problems
import train_online
from experiments import ablate, baselines, compare
from problems import UserError

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


def vectors(seed: int, count: int, size: int) -> list[torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, size, generator=chance, dtype=FLOAT64))


# ---------------------------------------------------------------------------------------------
# The losses


def test_group_advantages_by_hand():
    rows = [[1.0, 0, 0, 1, 0, 0, 0, 0], [0.5, 2.0, -1.0, 3.0, 1.0, 1.0, 0.0, 0.25]]
    told = baselines.group_advantages(torch.tensor(rows, dtype=FLOAT64))
    for ours, row in zip(told.tolist(), rows, strict=True):
        mean, std = statistics.mean(row), statistics.stdev(row)
        assert ours == pytest.approx([(r - mean) / (std + 1e-4) for r in row])
    assert baselines.group_advantages(torch.ones(3, 8)).tolist() == [[0.0] * 8] * 3
    with pytest.raises(ValueError, match=r"\(4, 1\)"):
        baselines.group_advantages(torch.ones(4, 1))


def test_group_advantages_are_trls():
    groups = {name: torch.tensor(x) for name, x in TRL["groups"].items()}
    close(baselines.group_advantages(groups["rewards"]), groups["advantages"], 1e-6)


def test_grpo_loss_by_hand():
    """Two tokens inside the clip and two outside, on the side where it acts and where it does not.

    Clipping only what A > 0 pushes too far up: w = 1.5 with A > 0 counts as 1.2, w = 0.5 as 0.5.
    """
    ratio, advantage = [1.1, 1.5, 0.5, 1.5], [2.0, 2.0, 2.0, -2.0]
    surrogate = [1.1 * 2, 1.2 * 2, 0.5 * 2, 1.5 * -2]
    logp, ref_logp = [-1.0, -0.5, -2.0, -0.1], [-1.2, -0.5, -1.0, -0.3]
    old = [x - math.log(w) for x, w in zip(logp, ratio, strict=True)]
    k3 = [math.exp(b - a) - (b - a) - 1 for a, b in zip(logp, ref_logp, strict=True)]
    tensors = (torch.tensor(x, dtype=FLOAT64) for x in (logp, old, ref_logp, advantage))
    expected = -sum(surrogate) / 4 + 0.04 * sum(k3) / 4
    assert baselines.grpo_loss(*tensors).item() == pytest.approx(expected, rel=1e-12)


def test_grpo_loss_is_trls_dapo():
    """Value and gradient; TRL's default is the mean over tokens, not responses."""
    assert TRL["grpo"]["loss_type"] == "dapo"
    logp = given("logp").requires_grad_()
    advantages = torch.tensor(TRL["given"]["advantages"], dtype=FLOAT64)
    of_tokens = advantages.repeat_interleave(LENGTHS)
    loss = baselines.grpo_loss(logp, given("old_logp"), given("ref_logp"), of_tokens)
    loss.backward()
    assert loss.item() == pytest.approx(TRL["grpo"]["loss"], rel=1e-12)
    close(logp.grad, packed(TRL["grpo"]["grad"]))
    ratio = (given("logp") - given("old_logp")).exp()
    assert ((ratio - 1).abs() > 0.2).any() and ((ratio - 1).abs() < 0.2).any()


def test_ppo_losses_are_trls():
    told = TRL["ppo"]
    logp, values = given("logp").requires_grad_(), given("values").requires_grad_()
    policy = baselines.ppo_loss(logp, given("old_logp"), packed(told["whitened"]))
    value = baselines.value_loss(values, given("old_values"), packed(told["returns"]))
    (policy + value).backward()
    assert policy.item() == pytest.approx(told["policy_loss"], rel=1e-12)
    assert value.item() == pytest.approx(told["value_loss"], rel=1e-12)
    close(logp.grad, packed(told["policy_grad"]))
    close(values.grad, packed(told["value_grad"]))


def test_value_loss_by_hand():
    """From 1 to 1.5 and to 1.1 with a return of 2: the clip at 1.2 leaves the larger error."""
    values, old, returns = (torch.tensor(x) for x in ([1.5, 1.1], [1.0, 1.0], [2.0, 2.0]))
    expected = 0.5 * (0.8**2 + 0.9**2) / 2
    assert baselines.value_loss(values, old, returns).item() == pytest.approx(expected)


def test_rebel_loss_by_hand():
    logratio = torch.tensor([[0.5, -0.25], [0.0, 1.0]])
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    for eta in (1.0, 0.5):
        expected = ((0.75 / eta - 1) ** 2 + (-1 / eta) ** 2) / 2
        assert baselines.rebel_loss(logratio, rewards, eta).item() == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"\(4,\)"):
        baselines.rebel_loss(logratio.flatten(), rewards.flatten())


def test_losses_refuse_what_would_broadcast():
    row = torch.zeros(3)
    for call in (lambda: baselines.ppo_loss(row, row, torch.zeros(1)),
                 lambda: baselines.value_loss(row, torch.zeros(1, 3), row),
                 lambda: baselines.grpo_loss(row, row, row, torch.zeros(3, 1)),
                 lambda: baselines.gae(row, row, torch.tensor([1, 1]))):  # fmt: skip
        with pytest.raises(ValueError):
            call()


# ---------------------------------------------------------------------------------------------
# GAE


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_its_double_sum(gamma, lam):
    """Eq. (16) term by term; a value that leaks in from the next response shows at once."""
    rewards, values = vectors(0, 2, int(LENGTHS.sum()))
    advantages, returns = baselines.gae(rewards, values, LENGTHS, gamma, lam)
    expected = []
    for r, v in zip(rewards.split(LENGTHS.tolist()), values.split(LENGTHS.tolist()), strict=True):
        ahead = [*v.tolist()[1:], 0.0]
        delta = [r[t].item() + gamma * ahead[t] - v[t].item() for t in range(len(r))]
        expected += [
            sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(r)))
            for t in range(len(r))
        ]
    expected = torch.tensor(expected, dtype=FLOAT64)
    close(advantages, expected)
    close(returns, expected + values)


def test_gae_is_trls(group):
    """Rewards with the KL in them, returns, and the advantages once whitened."""
    told, old_values = TRL["ppo"], given("old_values")
    right = torch.tensor(TRL["given"]["rewards"], dtype=FLOAT64)
    rewards = baselines.token_rewards(right, given("old_logp"), given("ref_logp"), LENGTHS)
    close(rewards, packed(told["rewards"]))
    advantages, returns = baselines.gae(rewards, old_values, LENGTHS)
    close(returns, packed(told["returns"]))
    parts = advantages.split([4, 7, 3])
    batches = [SimpleNamespace(advantages=part, share=0.3) for part in parts]
    baselines.whiten(batches)
    close(torch.cat([batch.advantages for batch in batches]).double(),
          packed(told["whitened"]), 1e-6)  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The steps, on a model of two layers


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


def rollout(samples_per_prompt: int) -> list[dict]:
    """Eight prompts with responses of 1 to 9 tokens; every fifth is right."""
    chance = torch.Generator().manual_seed(1)

    def tokens(longest: int) -> list[int]:
        count = int(torch.randint(1, longest, (1,), generator=chance))
        return torch.randint(20, (count,), generator=chance).tolist()

    prompts = [{"prompt_ids": tokens(6), "v_star": 0.25} for _ in range(8)]
    asked = [p for p in prompts for _ in range(samples_per_prompt)]
    responses = [p | {"ids": tokens(10), "reward": float(i % 5 == 0)} for i, p in enumerate(asked)]
    return [r | {"sampler_logp": [-3.0] * len(r["ids"])} for r in responses]


def step(folder: Path, method: str, budget: int, updates: int = 2, lr: float = 0.1):
    """One rollout's updates by SGD; what the step told, and what it moved (float64 vectors)."""
    learn, samples = baselines.METHODS[method]
    args = argparse.Namespace(model=str(folder), lr=1e-3, samples_per_prompt=samples, beta2=0.1)
    vars(args).update(updates_per_batch=updates, micro_batch_tokens=budget, temperature=1.0)
    args.gradient_checkpointing = False
    mesh = dist.init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    policy, ref = (train_online.load_policy(folder, mesh, torch.float32) for _ in "ab")
    optimizer = torch.optim.SGD(policy.parameters(), lr)
    baselines.CRITIC.clear()
    if method == "ppo":  # with AdamW, whose division makes rounding visible, nothing could be told
        baselines.make_critic(policy, args)
        critic = baselines.CRITIC["model"]
        baselines.CRITIC["optimizer"] = torch.optim.SGD(critic.parameters(), lr)
    laps = []
    told = learn(policy, ref.requires_grad_(False), optimizer, rollout(samples), args,
                 lambda: laps.append(1))  # fmt: skip
    assert len(laps) == 1  # the log's columns count on it
    models = [policy, baselines.CRITIC["model"]] if method == "ppo" else [policy]
    weights = [p.full_tensor().detach().double().flatten() for m in models for p in m.parameters()]
    return torch.tensor(told, dtype=FLOAT64), torch.cat(weights)


def moved(folder: Path, method: str, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
    told, after = step(folder, method, budget)
    _, before = step(folder, method, budget, lr=0.0)
    return told, after - before


@pytest.mark.parametrize("method", ["grpo", "rebel", "ppo"])
def test_the_split_into_micro_batches_changes_nothing(method, group, folder):
    """A mean per micro-batch in place of the global one is off by tens of per cent here.

    25 tokens hold two responses or three, and some pairs not even that: they still stay together.
    """
    whole, split = moved(folder, method, 10_000), moved(folder, method, 25)
    assert whole[1].norm() > 1e-3
    close(split[0], whole[0], 1e-4)
    assert (split[1] - whole[1]).norm() < 1e-4 * whole[1].norm()
    assert whole[0][1] == 0 and whole[0][2] == 0  # pi is still pi_ref in the first update


@pytest.mark.parametrize("method", ["grpo", "rebel", "ppo"])
def test_both_updates_look_back_at_the_policy_that_sampled(method, group, folder, monkeypatch):
    """The second update's ratio is to pi_t, not to itself: else nothing is ever clipped."""
    seen, ppo_loss, rebel_loss = [], baselines.ppo_loss, baselines.rebel_loss

    def clipped(logp, old_logp, *more):
        seen.append((logp - old_logp).abs().max().item())
        return ppo_loss(logp, old_logp, *more)

    def paired(logratio, rewards):
        seen.append(logratio.abs().max().item())
        return rebel_loss(logratio, rewards)

    monkeypatch.setattr(baselines, "ppo_loss", clipped)
    monkeypatch.setattr(baselines, "rebel_loss", paired)
    step(folder, method, 10_000)
    assert len(seen) == 2 and seen[0] < 1e-5 and seen[1] > 1e-2


def test_rebels_pairs_stay_together(group):
    responses = rollout(2)
    args = argparse.Namespace(updates_per_batch=2, micro_batch_tokens=25, temperature=1.0)
    seen, where = [], {tuple(r["ids"]): i for i, r in enumerate(responses)}
    assert len(where) == len(responses)
    for update in baselines.pair_updates(responses, args):
        assert sum(batch.share for batch in update) == pytest.approx(1)
        for batch in update:
            parts = batch.inputs["targets"].split(batch.lengths.tolist())
            numbers = [where[tuple(part.tolist())] for part in parts]
            assert batch.rewards.tolist() == [responses[i]["reward"] for i in numbers]
            seen += zip(numbers[::2], numbers[1::2], strict=True)
    assert sorted(seen) == [(i, i + 1) for i in range(0, len(responses), 2)]


def test_rebels_step_is_the_pair_gradient(group, folder):
    """At pi = pi_t: -2 mean (r_1 - r_2) (grad ln pi(y_1) - grad ln pi(y_2)) / eta, by hand.

    With an ordinary model that sees one response at a time; wrong pairs, a pi_t that carries
    gradients or a reward of another response change it.
    """
    from transformers import Qwen2ForCausalLM

    lm = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total = 0.0
    responses = rollout(2)
    for one, two in zip(responses[::2], responses[1::2], strict=True):
        for sign, r in ((1, one), (-1, two)):
            ids = torch.tensor([r["prompt_ids"] + r["ids"]])
            logp = lm(input_ids=ids).logits[0].log_softmax(-1)
            n = len(r["ids"])
            chosen = logp[-n - 1 : -1].gather(1, torch.tensor(r["ids"])[:, None]).sum()
            total = total - 2 * sign * (one["reward"] - two["reward"]) * chosen / 8
    total.backward()
    grads = torch.cat([p.grad.double().flatten() for p in lm.parameters()])
    told, after = step(folder, "rebel", 10_000, updates=1, lr=0.1)
    _, before = step(folder, "rebel", 10_000, updates=1, lr=0.0)
    clip = min(1.0, 1 / (grads.norm().item() + 1e-6))
    expected = -0.1 * clip * grads
    assert told[3].item() == pytest.approx(grads.norm().item(), rel=1e-4)
    assert (after - before - expected).norm() < 1e-4 * expected.norm()


def test_rebels_reward_holds_the_kl_term(group, folder, monkeypatch):
    """r - 0.05 ln(pi_t / pi_ref) of the whole response, as its authors' code has it."""
    mesh = dist.init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    policy, ref = (train_online.load_policy(folder, mesh, torch.float32) for _ in "ab")
    with torch.no_grad():
        for p in ref.parameters():
            p.to_local().mul_(1.1)
    args = argparse.Namespace(updates_per_batch=1, micro_batch_tokens=10_000, temperature=1.0)
    [[batch]] = baselines.pair_updates(rollout(2), args)
    with torch.no_grad():
        token_kl = policy(**batch.inputs) - ref(**batch.inputs)
    kl = losses.sequence_logprob(token_kl, batch.lengths)
    assert kl.abs().min() > 0.01
    seen, optimizer = [], torch.optim.SGD(policy.parameters(), 0.0)
    monkeypatch.setattr(baselines, "rebel_loss", lambda ratio, r: seen.append(r) or ratio.mean())
    baselines.rebel_step(policy, ref, optimizer, rollout(2), args, lambda: None)
    close(seen[0].flatten().double(), (batch.rewards - 0.05 * kl).double(), 1e-5)


def test_the_critic_learns_from_the_rewards(group, folder):
    """From 0, on ten rounds of the same rollout, its error falls."""
    step(folder, "ppo", 10_000, lr=0.0)
    critic = baselines.CRITIC["model"]
    args = argparse.Namespace(updates_per_batch=1, micro_batch_tokens=10_000, temperature=1.0)
    [[batch]] = baselines.token_updates(rollout(1), args)
    goal = batch.rewards.repeat_interleave(batch.lengths)
    optimizer, errors = torch.optim.AdamW(critic.parameters(), 1e-2), []
    batch.ref_logp = batch.sampler_logp
    for _ in range(10):
        told = baselines.descend(critic, optimizer, [[batch]],
                                 lambda b, values: (values - goal).square().mean())  # fmt: skip
        errors.append(told[0])
    assert errors[0] == pytest.approx(goal.square().mean().item())  # the head starts at 0
    assert errors[-1] < 0.5 * errors[0]


# ---------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize(
    ("words", "says"),
    [("grpo --samples-per-prompt 1", "not for grpo"), ("rebel --samples-per-prompt 3", "not for"),
     ("ppo --resume", "critic")],
)  # fmt: skip
def test_what_a_method_cannot_do_is_told(words, says, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["baselines", "--method", *words.split()])
    with pytest.raises(UserError, match=says):
        baselines.main()


def test_group_sizes_are_defaults_of_the_flag(monkeypatch):
    """And train_online gets its own flags, without --method."""
    caught = {}

    def check(args):
        caught[args.method] = args.samples_per_prompt
        raise UserError("enough")

    monkeypatch.setattr(train_online, "check", check)
    for method in baselines.METHODS:
        monkeypatch.setattr(sys, "argv", ["baselines", "--method", method, "--lr", "1e-5"])
        with pytest.raises(UserError, match="enough"):
            baselines.main()
    assert caught == {"a_star_po": 1, "grpo": 8, "rebel": 2, "ppo": 1}
    assert baselines.METHODS["a_star_po"][0] is train_online.least_squares


# ---------------------------------------------------------------------------------------------
# What compare and ablate make of the runs


def test_first_reach_is_linear_between_evaluations():
    rows = [(1, 0.5), (2, None), (3, 0.8), (4, None), (5, 1.0), (6, 0.7)]
    steps = [{"seconds": 10.0 * n} | ({} if a is None else {"eval_accuracy": a}) for n, a in rows]
    assert compare.first_reach(steps, "seconds") == pytest.approx(40)
    assert compare.first_reach(steps, "seconds", 0.8) == pytest.approx(30)
    assert compare.first_reach(steps, "seconds", 0.4) == 10  # nothing is known before
    assert compare.first_reach(steps[:4], "seconds") is None
    assert compare.spread([1.0, 2.0, 6.0]) == pytest.approx([3, math.sqrt(7 / 3)])
    assert compare.spread([1.0, None]) is None


def test_sampled_reach_is_what_was_spent_before_the_middle_of_three():
    rewards = [0.5, 0.8, 0.95, 0.85, 0.91, 0.97]
    steps = [{"reward": r, "seconds": 10.0 * (i + 1)} for i, r in enumerate(rewards)]
    # means of three 0.75, 0.8667 and 0.9033, when 10, 20 and 30 s were spent
    assert compare.sampled_reach(steps, "seconds") == pytest.approx(20 + 10 * (100 / 110))
    assert compare.sampled_reach(steps[:4], "seconds") is None


def test_the_rate_taken_is_the_fastest_of_the_good(monkeypatch):
    """The fastest of all may end four points below the best; the best may never get there."""
    runs = {"1": (30.0, 0.98), "2": (20.0, 0.97), "4": (10.0, 0.94), "8": (None, 0.99)}
    monkeypatch.setattr(compare, "train", lambda args, method, lr, seed: lr)
    told = lambda args, method, lr: {  # noqa: E731
        "seconds_to_90_stage2": runs[lr][0], "accuracy": runs[lr][1], "reward": 0, "kl_response": 0
    }  # fmt: skip
    monkeypatch.setattr(compare, "measure", told)
    lr, grid = compare.tune(SimpleNamespace(learning_rates="1,2,4,8"), "ppo")
    assert lr == "2" and [row["lr"] for row in grid] == ["1", "2", "4", "8"]


def test_a_finished_run_is_used_again(tmp_path):
    """Half a run is not, and one made by another command is refused by name."""
    write = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(); "
    write += "open(p.with_name('count'), 'a').write('x'); (p / 'done').touch()"
    folder, count = tmp_path / "run", tmp_path / "count"
    folder.mkdir()
    for _ in range(2):
        compare.finish(["-c", write, folder], folder, "done")
        assert count.read_text() == "x"
    with pytest.raises(UserError, match="command"):
        compare.finish(["-c", write, folder, "more"], folder, "done")
    with pytest.raises(ChildProcessError, match=r"exit code 3, see .*bad\.log"):
        compare.finish(["-c", "raise SystemExit(3)"], tmp_path / "bad", "done")


def test_gradient_noise_of_parts_that_are_known(group, folder):
    """Alternate parts a and b: the noise is |a - b|^2 / 4 over 15; equal parts have none."""
    args = argparse.Namespace(micro_batch_tokens=10_000, temperature=1.0, beta2=0.1)
    mesh = dist.init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    policy, ref = (train_online.load_policy(folder, mesh, torch.float32) for _ in "ab")
    a, b = (rollout(1)[i : i + 2] for i in (0, 4))
    noise = lambda parts: ablate.gradient_noise(policy, ref, parts, args)  # noqa: E731
    of_a, of_b, mixed = noise(16 * a), noise(16 * b), noise(8 * (a + b))
    for same in (of_a, of_b):
        assert same["signal"] > 0 and abs(same["noise"]) < 1e-9 * same["signal"]
    mean = mixed["signal"] + mixed["noise"]  # |(a + b) / 2|^2
    difference = 2 * of_a["signal"] + 2 * of_b["signal"] - 4 * mean
    assert mixed["noise"] == pytest.approx(difference / 4 / 15, rel=1e-4)
    assert all(p.grad is None for p in policy.parameters())
    # In units in which it is the policy gradient of r - V*, as pi is pi_ref here.
    [batch] = train_online.micro_batches(a, args)
    logp = train_online.losses.sequence_logprob(policy(**batch.inputs), batch.lengths)
    ((batch.rewards - batch.v_star) * logp).mean().backward()
    grads = [p.grad.full_tensor().flatten() for p in policy.parameters()]
    assert of_a["signal"] == pytest.approx(torch.cat(grads).square().sum().item(), rel=1e-4)


def test_fewer_samples_are_the_first_ones(tmp_path):
    source, to = tmp_path / "values.json", tmp_path / "values-2.json"
    prompts = [{"id": "a", "rewards": [1.0, 0.0, 0.0], "lengths": [3, 4, 5], "v_star": 9.0}]
    problems.write_json(source, {"header": {"beta1": 0.5}, "prompts": prompts})
    ablate.fewer_samples(source, to, 2)
    told = problems.read_json(to, ours=True)
    [prompt] = told["prompts"]
    assert prompt["rewards"] == [1.0, 0.0] and prompt["lengths"] == [3, 4]
    assert prompt["v_star"] == pytest.approx(0.5 * math.log((math.exp(2) + 1) / 2))
    assert told["header"]["num_value_samples"] == 2


def test_other_values_are_those_of_the_first_samples():
    offline = torch.tensor([[1.0] + 31 * [0.0], 8 * [0.0] + 24 * [1.0]], dtype=FLOAT64)
    told = ablate.other_values(offline, 0.3)
    of = lambda p, b: b * math.log(1 + p * math.expm1(1 / b))  # noqa: E731
    assert told["0"] == [0, 0] and told["running mean"] == pytest.approx([0.3, 0.3])
    assert told["mean reward"] == [1 / 8, 0] and told["best of N"] == [1, 0]
    assert told[ablate.PUBLISHED] == pytest.approx([of(1 / 8, 0.5), 0])
    assert told["V*, beta1 10"] == pytest.approx([of(1 / 8, 10), 0])
    assert told["N = 1"] == pytest.approx([1, 0])
    assert told["N = 32"] == pytest.approx([of(1 / 32, 0.5), of(24 / 32, 0.5)])
    says = {setting.says for setting in ablate.SETTINGS if setting.table == "baseline value"}
    assert says <= told.keys()


def test_ablations_differ_in_what_they_say():
    """The issue's tables, and no two rows of a table that are one run."""
    tables = {}
    for setting in ablate.SETTINGS:
        tables.setdefault(setting.table, []).append(setting[2:])
    counts = {table: len(rows) for table, rows in tables.items()}
    assert counts == {"baseline value": 8, "N": 5, "beta2": 4, "filter": 2, "updates a step": 3,
                      "with lr / updates": 5, "responses per prompt": 3}  # fmt: skip
    assert all(len(set(rows)) == len(rows) for rows in tables.values())
