"""The algorithm against its mathematics: closed forms, brute force, hand sums and the fixed point.

Every function of losses.py meets an oracle that shares no code with it: mpmath for V*, a float64
softmax for log-probs and their gradients, enumeration for pass@k. The bandit at the end shows that
the optimal policy is the fixed point of V* and the loss together, and that with another number in
V*'s place it is not.
"""

import itertools
import math
import random
import weakref

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import losses

FLOAT64 = torch.float64
quick = settings(deadline=None, max_examples=100)


def closeness(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error, in units of the largest expected entry."""
    error = (actual.to(FLOAT64) - expected.to(FLOAT64)).abs().max()
    return (error / expected.to(FLOAT64).abs().max()).item()


# ---------------------------------------------------------------------------------------------
# V*

BETAS = [1e-8, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0, 10.0, 1e2, 1e4, 1e8, 1e12, math.inf]
REWARDS = st.lists(st.floats(-10, 10), min_size=1, max_size=12)
BETA1 = st.floats(-4, 4).map(lambda exponent: 10.0**exponent)


def exact_value(rewards: list[float], beta1: float) -> float:
    """Eq. (1) as it is written, with 60 digits."""
    with mpmath.workdps(60):
        if math.isinf(beta1):
            return float(mpmath.fsum(rewards) / len(rewards))
        powers = [mpmath.exp(mpmath.mpf(r) / mpmath.mpf(beta1)) for r in rewards]
        return float(mpmath.mpf(beta1) * mpmath.log(mpmath.fsum(powers) / len(rewards)))


def value(rewards: list[float], beta1: float) -> float:
    return losses.optimal_value(torch.tensor([rewards], dtype=FLOAT64), beta1).item()


def test_beta1_may_be_a_large_whole_number() -> None:
    """JSON may hold one, and torch takes none above 2^63."""
    rewards = torch.tensor([[0.0, 1.0]], dtype=FLOAT64)
    assert losses.optimal_value(rewards, 10**20).item() == pytest.approx(0.5)
    assert losses.value_standard_error(rewards, 10**20).item() > 0


@pytest.mark.parametrize("beta1", BETAS)
def test_v_star_is_exact_for_any_beta1(beta1: float) -> None:
    """Below beta1 = 0.01 a plain exp overflows; above 1e8 a plain logsumexp has lost its digits."""
    table = [[float(i < k) for i in range(8)] for k in range(9)]
    table += [[-1.0] * 8, [0.25, -3.0, 2.5, 0.0, 0.1, -0.7, 2.4, 1.0], [-7.0] + [-7.5] * 7]
    expected = torch.tensor([exact_value(row, beta1) for row in table], dtype=FLOAT64)
    for dtype, error in ((FLOAT64, 1e-9), (torch.float32, 1e-6)):
        v_star = losses.optimal_value(torch.tensor(table, dtype=dtype), beta1)
        assert v_star.dtype == dtype
        torch.testing.assert_close(v_star, expected.to(dtype), rtol=0, atol=error)


def test_v_star_of_the_published_setting() -> None:
    """N = 8, beta1 = 0.5, k right: beta1 ln(1 + k/8 (e^2 - 1)), and the digits of that."""
    table = torch.tensor([[float(i < k) for i in range(8)] for k in range(9)])
    row = [0, 0.2935, 0.4772, 0.6113, 0.7169, 0.8040, 0.8782, 0.9428, 1]
    v_star = losses.optimal_value(table, 0.5).tolist()
    assert v_star == pytest.approx(row, abs=5e-5)
    closed = [0.5 * math.log1p(k / 8 * math.expm1(2)) for k in range(9)]
    assert v_star == pytest.approx(closed, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16])
def test_v_star_of_rewards_in_coarse_types(dtype: torch.dtype) -> None:
    """In the rewards' own type V* would be rounded to 0 or 1."""
    v_star = losses.optimal_value(torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]]).to(dtype), 0.5)
    assert v_star.dtype == torch.float32
    expected = [exact_value([1, 0, 1, 0], 0.5), exact_value([0, 0, 0, 1], 0.5)]
    assert v_star.tolist() == pytest.approx(expected, abs=1e-6)


@quick
@given(REWARDS, BETA1)
def test_v_star_between_the_mean_and_the_best(rewards: list[float], beta1: float) -> None:
    v_star = value(rewards, beta1)
    assert v_star == pytest.approx(exact_value(rewards, beta1), abs=1e-9)
    assert math.fsum(rewards) / len(rewards) - 1e-9 <= v_star <= max(rewards)
    assert value(rewards, math.inf) == pytest.approx(math.fsum(rewards) / len(rewards), abs=1e-12)
    assert value(rewards, 1e-12) == pytest.approx(max(rewards), abs=1e-9)


@quick
@given(REWARDS, BETA1, BETA1)
def test_v_star_falls_as_beta1_grows(rewards: list[float], one: float, other: float) -> None:
    assert value(rewards, min(one, other)) >= value(rewards, max(one, other)) - 1e-9


@quick
@given(REWARDS, BETA1, st.floats(-100, 100), st.randoms())
def test_v_star_ignores_order_and_follows_shifts(
    rewards: list[float], beta1: float, shift: float, random: random.Random
) -> None:
    v_star, shuffled = value(rewards, beta1), random.sample(rewards, len(rewards))
    assert value(shuffled, beta1) == pytest.approx(v_star, abs=1e-9)
    assert value([r + shift for r in rewards], beta1) == pytest.approx(v_star + shift, abs=1e-9)
    assert value(rewards * 2, beta1) == pytest.approx(v_star, abs=1e-9)  # a mean, not a sum


def test_v_star_is_per_prompt() -> None:
    rewards = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=FLOAT64)
    v_star = losses.optimal_value(rewards, 0.5)
    assert v_star.tolist() == [value(row, 0.5) for row in rewards.tolist()]
    assert losses.optimal_value(torch.zeros(0, 8), 0.5).shape == (0,)


@pytest.mark.parametrize("beta1", [0, 0.0, -0.0, -1, -math.inf, math.nan])
def test_v_star_refuses_beta1(beta1: float) -> None:
    """The authors' code reads 0 as the mean and -1 as V* = 0: here neither passes unnoticed."""
    with pytest.raises(ValueError, match="beta1"):
        losses.optimal_value(torch.tensor([[0.0, 1.0]]), beta1)


@pytest.mark.parametrize("shape", [(), (8,), (4, 0), (2, 4, 8)])
def test_v_star_refuses_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rewards"):
        losses.optimal_value(torch.zeros(shape), 0.5)


# ---------------------------------------------------------------------------------------------
# How uncertain V* is


@pytest.mark.parametrize("beta1", [0.1, 0.5, 2.0, math.inf])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_standard_error_of_v_star_is_that_of_many_draws(beta1: float, rate: float) -> None:
    """V* of N = 400 samples, drawn 4,000 times. At so large an N the delta method is exact."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.rand(4000, 400, generator=generator, dtype=FLOAT64) < rate
    spread = losses.optimal_value(rewards.double(), beta1).std().item()
    estimated = losses.value_standard_error(rewards.double(), beta1).mean().item()
    assert estimated == pytest.approx(spread, rel=0.1)


def test_two_equal_rewards_are_not_taken_for_certain() -> None:
    """By Laplace's rule k of N right counts as p = (k + 1) / (N + 2)."""
    for rewards, rate in (([0.0, 0.0], 1 / 4), ([0.0, 1.0], 1 / 2), ([1.0, 1.0], 3 / 4)):
        # dV*/dp of V* = beta1 ln(1 + p (e^(1/beta1) - 1)), times the standard error of p.
        slope = 0.5 * math.expm1(2) / (1 + rate * math.expm1(2))
        expected = slope * math.sqrt(rate * (1 - rate) / 2)
        [error] = losses.value_standard_error(torch.tensor([rewards], dtype=FLOAT64), 0.5).tolist()
        assert error == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("beta1", [1e-3, 1e-12])
def test_the_standard_error_does_not_overflow(beta1: float) -> None:
    """As beta1 -> 0, V* is the best reward, and one right response is enough to know it."""
    rewards = torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=FLOAT64)
    assert losses.value_standard_error(rewards, beta1).tolist() == pytest.approx([0, 0], abs=0.01)


# ---------------------------------------------------------------------------------------------
# log pi of tokens


def example(
    num_rows: int, dim: int = 16, vocabulary: int = 50, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    hidden = scale * torch.randn(num_rows, dim, generator=generator)
    weight = torch.randn(vocabulary, dim, generator=generator)
    return hidden, weight, torch.randint(vocabulary, (num_rows,), generator=generator)


def hand_logprob(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The definition: logit of the target minus ln of the sum of exp of all logits, in float64."""
    logits = hidden.to(FLOAT64) @ weight.to(FLOAT64).T / temperature
    chosen = torch.stack([row[target] for row, target in zip(logits, targets, strict=True)])
    return chosen - logits.exp().sum(dim=1).log()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("chunk", [1, 3, 5, 12, 1024])
def test_token_logprob_and_both_gradients(temperature: float, chunk: int) -> None:
    """A forgotten temperature, the last partial chunk, or a gradient for hidden alone."""
    for num_rows in (12, 13):
        hidden, weight, targets = example(num_rows)
        upstream = torch.linspace(-2, 3, num_rows)
        ours, theirs = [
            [x.to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
            for dtype in (torch.float32, FLOAT64)
        ]
        logp = losses.token_logprob(*ours, targets, temperature, chunk)
        expected = hand_logprob(*theirs, targets, temperature)
        assert logp.dtype == torch.float32
        assert closeness(logp, expected) < 1e-6
        logp.backward(upstream)
        expected.backward(upstream.to(FLOAT64))
        for x, y in zip(ours, theirs, strict=True):
            assert x.grad.dtype == torch.float32
            assert closeness(x.grad, y.grad) < 1e-5


@quick
@given(st.integers(1, 30), st.integers(1, 35), st.floats(0.2, 5))
def test_chunks_are_invisible(num_rows: int, chunk: int, temperature: float) -> None:
    logp = losses.token_logprob(*example(num_rows), temperature, chunk)
    assert closeness(logp, hand_logprob(*example(num_rows), temperature)) < 1e-5


def test_token_logprob_of_logits_in_the_hundreds() -> None:
    """exp of such logits overflows in float32."""
    hidden, weight, targets = example(9, scale=40.0)
    hidden.requires_grad_()
    logp = losses.token_logprob(hidden, weight, targets)
    expected = hand_logprob(hidden, weight, targets, 1.0)
    assert expected.min() < -300
    assert closeness(logp, expected) < 1e-6
    logp.sum().backward()
    assert hidden.grad.isfinite().all()


def test_token_logprob_of_bf16_numbers_is_exact() -> None:
    """bf16 logits carry 8 bits: at 20 and more they blur each token's log-prob by 0.1 nat."""
    hidden, weight, targets = example(64, dim=256, vocabulary=400, scale=1.5)
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    exact = hand_logprob(hidden, weight, targets, 1.0)
    bf16_logits = (hidden @ weight.T).float().log_softmax(dim=1)[torch.arange(64), targets]
    assert (bf16_logits - exact).abs().max() > 0.1  # the numbers are hard enough
    logp = losses.token_logprob(hidden, weight, targets)
    assert logp.dtype == torch.float32
    assert (logp - exact).abs().max() < 0.005


def test_the_gradient_of_a_bf16_weight_over_chunks() -> None:
    """The chunks' parts meet in bf16, as autograd adds them: eight cost less than a percent."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 32).bfloat16(), torch.randn(99, 32).bfloat16()
    targets = torch.randint(99, (512,))
    grads = []
    for dtype, chunk in ((torch.bfloat16, 64), (torch.float64, 512)):
        h, w = hidden.to(dtype), weight.detach().to(dtype, copy=True).requires_grad_()
        logp = (
            losses.token_logprob(h, w, targets, chunk=chunk)
            if dtype == torch.bfloat16
            else (h @ w.t()).log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
        )
        logp.sum().backward()
        grads.append(w.grad.double())
    assert (grads[0] - grads[1]).norm() < 0.01 * grads[1].norm()


class Memory(TorchDispatchMode):
    """Follows all tensors made under it: the largest one, and the most elements alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.largest, self.peak = [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *(x.numel() for x in tensors)])
        self.made = [ref for ref in self.made if ref() is not None] + [*map(weakref.ref, tensors)]
        alive = {x.data_ptr(): x.numel() for x in (ref() for ref in self.made)}
        self.peak = max(self.peak, sum(alive.values()))
        return out


def test_logits_of_all_tokens_never_stand_in_memory() -> None:
    """(R, V) in forward or backward is 9 GiB at full size; neither whole nor as saved pieces."""
    num_rows, vocabulary, chunk = 512, 1024, 32
    hidden, weight, targets = example(num_rows, 8, vocabulary)
    hidden.requires_grad_()
    weight.requires_grad_()
    with Memory() as forward:
        loss = losses.token_logprob(hidden, weight, targets, chunk=chunk).sum()
    with Memory() as backward:
        loss.backward()
    for memory in (forward, backward):
        assert memory.largest == chunk * vocabulary
        assert memory.peak < 4 * chunk * vocabulary < num_rows * vocabulary / 2


def test_no_tokens_are_no_crash() -> None:
    hidden, weight, targets = example(0)
    hidden.requires_grad_()
    weight.requires_grad_()
    logp = losses.token_logprob(hidden, weight, targets)
    assert logp.shape == (0,)
    logp.sum().backward()
    assert hidden.grad.shape == (0, 16)
    assert not weight.grad.any()


@pytest.mark.parametrize(
    ("hidden", "weight", "targets"),
    [((1, 5, 4), (9, 4), (5,)), ((5, 4), (9, 3), (5,)), ((5, 4), (4, 9), (5,))]
    + [((5, 4), (9, 4), shape) for shape in ((4,), (5, 1), (1, 5), ())],
)
def test_token_logprob_refuses_shapes(hidden: tuple, weight: tuple, targets: tuple) -> None:
    with pytest.raises(AssertionError, match="need hidden"):
        losses.token_logprob(
            torch.zeros(hidden), torch.zeros(weight), torch.zeros(targets, dtype=torch.int64)
        )


# ---------------------------------------------------------------------------------------------
# log pi of sequences


def test_sequence_logprob_sums_each_response() -> None:
    token_logp = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0, -32.0], requires_grad=True)
    logp = losses.sequence_logprob(token_logp, torch.tensor([3, 1, 2]))
    assert logp.tolist() == [-7.0, -8.0, -48.0]  # sums: not means, the short one not favoured
    logp.backward(torch.tensor([1.0, 10.0, 100.0]))
    assert token_logp.grad.tolist() == [1, 1, 1, 10, 100, 100]


def test_sequence_logprob_sums_in_float32() -> None:
    """A bf16 sum of 4,096 tokens of -1 stops at -256."""
    logp = losses.sequence_logprob(-torch.ones(4096).bfloat16(), torch.tensor([4096]))
    assert logp.dtype == torch.float32
    assert logp.tolist() == [-4096]


@pytest.mark.parametrize("lengths", [[3, 2], [3, 4], [], [6, 1]])
def test_sequence_logprob_refuses_a_wrong_total(lengths: list[int]) -> None:
    with pytest.raises(AssertionError, match="lengths"):
        losses.sequence_logprob(torch.zeros(6), torch.tensor(lengths, dtype=torch.int64))


def test_sequence_logprob_refuses_a_column() -> None:
    with pytest.raises(AssertionError, match="lengths"):
        losses.sequence_logprob(torch.zeros(6, 1), torch.tensor([2, 4]))


# ---------------------------------------------------------------------------------------------
# The loss


def test_loss_and_gradient_by_hand() -> None:
    """A wrong sign, a lost factor, a sum for the mean; all numbers are exact in binary."""
    logp = torch.tensor([-1.0, -2.0, -3.0, -8.0], requires_grad=True)
    ref_logp = torch.tensor([-3.0, -4.0, -3.0, -4.0])
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    v_star = torch.tensor([0.25, 0.25, 1.0, 0.5])
    loss = losses.a_star_po_loss(logp, ref_logp, rewards, v_star, 0.5)
    # residuals: 1/2 * 2 - 3/4 = 1/4, 1/2 * 2 + 1/4 = 5/4, 0 - 0 = 0, 1/2 * -4 + 1/2 = -3/2
    assert loss.shape == ()
    assert loss.item() == (1 / 16 + 25 / 16 + 0 + 9 / 4) / 4
    loss.backward()
    # d loss / d logp = 2 * 1/2 * residual / 4
    assert logp.grad.tolist() == [1 / 16, 5 / 16, 0, -3 / 8]
    each = losses.squared_residuals(logp, ref_logp, rewards, v_star, 0.5)
    assert each.tolist() == [1 / 16, 25 / 16, 0, 9 / 4]


@pytest.mark.parametrize("odd", range(4))
@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (1,), (3,), ()])
def test_loss_refuses_to_broadcast(odd: int, shape: tuple[int, ...]) -> None:
    """(B,) against (B, 1) is a (B, B) loss that looks well and learns nothing."""
    tensors = [torch.zeros(4)] * 4
    tensors[odd] = torch.zeros(shape)
    with pytest.raises(ValueError, match="one shape"):
        losses.a_star_po_loss(*tensors, 1e-3)


def test_loss_refuses_four_columns() -> None:
    with pytest.raises(ValueError, match="one shape"):
        losses.a_star_po_loss(*[torch.zeros(4, 1)] * 4, 1e-3)


@pytest.mark.parametrize("beta2", [0, -1e-3, math.nan])
def test_loss_refuses_beta2(beta2: float) -> None:
    with pytest.raises(ValueError, match="beta2"):
        losses.a_star_po_loss(*[torch.zeros(4)] * 4, beta2)


# ---------------------------------------------------------------------------------------------
# The fixed point: a bandit with four arms, the policy a softmax of four logits. An arm of weight n
# stands n times among the samples, so that a mean over them is an exact expectation.

ARM_REWARDS = torch.tensor([1.0, 0.0, 0.5, -0.5], dtype=FLOAT64)
REF_COUNTS = torch.tensor([1, 2, 3, 4])
LN_REF = (REF_COUNTS / 10).to(FLOAT64).log()
OFF_POLICY = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 3, 3])  # neither pi_ref nor pi*
BETA = 0.5


def arms_loss(
    logits: torch.Tensor, arms: torch.Tensor, v_star: torch.Tensor, beta2: float
) -> torch.Tensor:
    """The shipped loss of sampled arms."""
    logp = logits.log_softmax(dim=0)[arms]
    return losses.a_star_po_loss(
        logp, LN_REF[arms], ARM_REWARDS[arms], v_star.expand(len(arms)), beta2
    )


def regress(v_star: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Descend the off-policy loss to its minimum: the policy there, and the loss."""
    logits = torch.zeros(4, dtype=FLOAT64, requires_grad=True)
    options = {"tolerance_grad": 1e-12, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([logits], max_iter=500, **options)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = arms_loss(logits, OFF_POLICY, v_star, BETA)
        loss.backward()
        return loss

    optimizer.step(closure)
    loss = closure().item()
    assert logits.grad.abs().max() < 1e-9  # a minimum, not a walk cut short
    return logits.detach().softmax(dim=0), loss


def ref_value(beta1: float) -> torch.Tensor:
    """V* of pi_ref, exactly: ten responses in its own proportions."""
    rewards = ARM_REWARDS.repeat_interleave(REF_COUNTS)
    return losses.optimal_value(rewards[None], beta1)


def optimal_policy() -> torch.Tensor:
    """pi_ref e^(r / beta) / Z."""
    unnormalised = (LN_REF + ARM_REWARDS / BETA).exp()
    return unnormalised / unnormalised.sum()


def test_off_policy_regression_reaches_the_optimal_policy() -> None:
    policy, loss = regress(ref_value(BETA))
    assert loss < 1e-12
    assert (policy - optimal_policy()).abs().max() < 1e-6


@pytest.mark.parametrize("beta1", [math.inf, None], ids=["mean reward", "zero"])
def test_off_policy_regression_exposes_a_wrong_v_star(beta1: float | None) -> None:
    """On-policy any baseline will do, so no on-policy experiment shows that V* is wrong."""
    policy, loss = regress(torch.zeros(1, dtype=FLOAT64) if beta1 is None else ref_value(beta1))
    assert loss > 0.01
    assert (policy - optimal_policy()).abs().max() > 0.02


@quick
@given(st.lists(st.integers(1, 9), min_size=4, max_size=4), st.floats(-2, 2), st.floats(1e-3, 2))
def test_on_policy_gradient_is_that_of_the_objective(
    counts: list[int], baseline: float, beta2: float
) -> None:
    """E over y ~ pi of the loss's gradient is -2 beta2 grad(E r - beta2 KL), for any baseline."""
    counts = torch.tensor(counts)
    logits = counts.to(FLOAT64).log().requires_grad_()
    arms = torch.arange(4).repeat_interleave(counts)  # in pi's own proportions
    loss = arms_loss(logits, arms, torch.tensor([baseline], dtype=FLOAT64), beta2)
    (of_loss,) = torch.autograd.grad(loss, logits)
    ln_pi = logits.log_softmax(dim=0)
    objective = (ln_pi.exp() * (ARM_REWARDS - beta2 * (ln_pi - LN_REF))).sum()
    (of_objective,) = torch.autograd.grad(objective, logits)
    torch.testing.assert_close(of_loss, -2 * beta2 * of_objective, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------
# pass@k


@pytest.mark.parametrize("num_samples", range(1, 9))
def test_pass_at_k_by_enumeration(num_samples: int) -> None:
    """1 - (1 - c/n)^k, the chance with replacement, is biased low."""
    for num_correct, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
        draws = list(itertools.combinations(range(num_samples), k))
        hits = sum(min(draw) < num_correct for draw in draws)  # samples 0 .. c - 1 are correct
        chance = losses.pass_at_k(num_samples, num_correct, k)
        assert chance == hits / len(draws)


@quick
@given(st.integers(1, 5000), st.data())
def test_pass_at_k_of_many_samples(num_samples: int, data: st.DataObject) -> None:
    """Factorials in floats overflow at 171; here n has no limit."""
    assert losses.pass_at_k(4096, 1, 2048) == 0.5
    num_correct = data.draw(st.integers(0, num_samples))
    k = data.draw(st.integers(1, num_samples))
    chance = losses.pass_at_k(num_samples, num_correct, k)
    assert 0 <= chance <= 1
    assert (chance == 0) == (num_correct == 0)
    assert losses.pass_at_k(num_samples, num_correct, 1) == num_correct / num_samples
    assert losses.pass_at_k(num_samples, 1, k) == k / num_samples


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k"),
    [(8, 9, 1), (8, -1, 1), (8, 4, 0), (8, 4, -1), (8, 4, 9), (0, 0, 1), (0, 0, 0)],
)
def test_pass_at_k_refuses(num_samples: int, num_correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"num_correct|num_samples"):
        losses.pass_at_k(num_samples, num_correct, k)
