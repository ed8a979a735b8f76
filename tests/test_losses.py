"""The algorithm against its mathematics: closed forms, brute force, hand sums and the fixed point.

Every function of losses.py meets an oracle that shares no code with it: mpmath for V*, a float64
softmax for log-probs and their gradients, enumeration for pass@k, one-by-one runs of an ordinary
model for packing. The bandit at the end shows that together they have the optimal policy as fixed
point, and that with another number in V*'s place they do not.
"""

import itertools
import math
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
    rewards: list[float], beta1: float, shift: float, random
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


def test_eos_counts_also_where_pad_is_eos() -> None:
    """A mask `token != pad` drops the last token where pad is EOS, and with it ln pi(stop here)."""
    eos = 0  # and pad, and once inside the prompt
    inputs, lengths = losses.pack([[7, eos, 3], [5]], [[4, 6, eos], [eos]])
    hidden, weight, _ = example(6, dim=4, vocabulary=8)
    token_logp = losses.token_logprob(hidden[inputs["rows"]], weight, inputs["targets"])
    logp = losses.sequence_logprob(token_logp, lengths)
    # 4, 6 and EOS are predicted at places 2, 3, 4; the second response's EOS at place 5
    ln_pi = (hidden @ weight.T).to(FLOAT64).log_softmax(dim=1)
    expected = torch.stack([ln_pi[2, 4] + ln_pi[3, 6] + ln_pi[4, eos], ln_pi[5, eos]])
    assert closeness(logp, expected) < 1e-6


@pytest.mark.parametrize("lengths", [[3, 2], [3, 4], [], [6, 1]])
def test_sequence_logprob_refuses_a_wrong_total(lengths: list[int]) -> None:
    with pytest.raises(AssertionError, match="lengths"):
        losses.sequence_logprob(torch.zeros(6), torch.tensor(lengths, dtype=torch.int64))


def test_sequence_logprob_refuses_a_column() -> None:
    with pytest.raises(AssertionError, match="lengths"):
        losses.sequence_logprob(torch.zeros(6, 1), torch.tensor([2, 4]))


# ---------------------------------------------------------------------------------------------
# Dealing and packing


@quick
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 6), st.integers(1, 120))
def test_deal(lengths: list[int], num_ranks: int, budget: int) -> None:
    """Lost or doubled sequences, a rank with fewer forwards (FSDP hangs), memory over budget."""
    hands = losses.deal(lengths, num_ranks, budget)
    assert len(hands) == num_ranks
    assert len({len(hand) for hand in hands}) == 1
    dealt = [i for hand in hands for batch in hand for i in batch]
    assert sorted(dealt) == list(range(len(lengths)))
    loads = [sum(lengths[i] for batch in hand for i in batch) for hand in hands]
    assert max(loads) - min(loads) <= max(lengths, default=0)
    for hand in hands:
        tokens = [[lengths[i] for i in batch] for batch in hand]
        assert all(sum(batch) <= budget or len(batch) == 1 for batch in tokens)
        for batch, following in itertools.pairwise(tokens):  # none cut or empty without need
            assert not following or (batch and sum(batch) + following[0] > budget)
    assert any(hand[-1] for hand in hands) or not lengths


def test_deal_by_hand() -> None:
    """20 tokens to one rank, over budget alone; 9, 5, 4, 3 to the other, at most 10 a time."""
    assert losses.deal([5, 9, 3, 4, 20], 2, 10) == [[[4], [], []], [[1], [0, 3], [2]]]
    assert losses.deal([7], 3, 10) == [[[0]], [[]], [[]]]


def test_pack_by_hand() -> None:
    """Rows off by one train a model to repeat what it reads; positions must not run on, either."""
    inputs, lengths = losses.pack([[1, 2, 3], [4], [5, 6]], [[7, 8], [9], [10, 11, 12]])
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 7, 4, 5, 6, 10, 11]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 3]]
    assert inputs["rows"].tolist() == [2, 3, 4, 6, 7, 8]
    assert inputs["targets"].tolist() == [7, 8, 9, 10, 11, 12]
    assert inputs["cu_seq_lens_q"].tolist() == [0, 4, 5, 9]
    assert inputs["cu_seq_lens_q"].dtype == torch.int32  # what the kernel takes
    assert inputs["max_length_q"] == 4
    assert lengths.tolist() == [2, 1, 3]


def test_pack_refuses_a_prompt_without_response() -> None:
    with pytest.raises(ValueError, match="shorter"):
        losses.pack([[1], [2]], [[3]])


TOKENS = st.lists(st.integers(0, 99), min_size=1, max_size=9)


@quick
@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=6))
def test_pack_feeds_no_padding(pairs: list[tuple[list[int], list[int]]]) -> None:
    inputs, lengths = losses.pack([p for p, _ in pairs], [r for _, r in pairs])
    assert inputs["input_ids"].shape == (1, sum(len(p) + len(r) - 1 for p, r in pairs))
    assert inputs["position_ids"].shape == inputs["input_ids"].shape
    ids, rows = inputs["input_ids"][0], inputs["rows"].split(lengths.tolist())
    for (prompt, response), places in zip(pairs, rows, strict=True):
        assert ids[places].tolist() == [prompt[-1], *response[:-1]]
        assert inputs["position_ids"][0, places[0]] == len(prompt) - 1


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_packed_attention_by_hand(scaling: float | None) -> None:
    """A wrong window, scale or grouping of heads (head h reads key head h // 2)."""
    generator = torch.Generator().manual_seed(0)
    bounds, heads, dim = [0, 4, 5, 11], 4, 8
    q, k, v = (torch.randn(1, n, bounds[-1], dim, generator=generator) for n in (heads, 2, 2))
    packing = {"cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32), "max_length_q": 6}
    out, _ = losses.packed_attention(None, q, k, v, None, **packing, scaling=scaling)
    expected = torch.empty(1, bounds[-1], heads, dim, dtype=FLOAT64)
    q, k, v = (x[0].to(FLOAT64) for x in (q, k, v))
    for start, end in itertools.pairwise(bounds):
        for head, place in itertools.product(range(heads), range(start, end)):
            seen = slice(start, place + 1)
            scores = k[head // 2, seen] @ q[head, place] * (scaling or dim**-0.5)
            weights = scores.exp() / scores.exp().sum()
            expected[0, place, head] = weights @ v[head // 2, seen]
    assert out.shape == expected.shape
    assert closeness(out, expected) < 1e-6


# Ragged, in and out of order of length, responses of one token; 0 is EOS and pad.
PROMPTS = [[5, 9, 3], [7], [2, 4, 6, 8, 10, 12, 14], [11, 3], [9, 0, 4, 4]]
RESPONSES = [[4, 8, 15, 16, 23, 0], [0], [13, 0], [21, 1, 34, 0], [17]]


@pytest.fixture(scope="module")
def models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """A tiny Qwen2 twice, packed and ordinary, its weights so large that context matters."""
    from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

    AttentionInterface.register("packed", losses.packed_attention)
    twins = []
    for implementation in ("packed", "eager"):
        config = Qwen2Config(
            vocab_size=50,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            tie_word_embeddings=True,
            initializer_range=0.15,
            eos_token_id=0,
            pad_token_id=0,
            attn_implementation=implementation,
        )
        torch.manual_seed(0)
        twins.append(Qwen2ForCausalLM(config))
    return tuple(twins)


def packed_logprob(
    model: torch.nn.Module, prompts: list, responses: list, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and sequence log-probs of packed sequences, as stage 2 computes them."""
    inputs, lengths = losses.pack(prompts, responses)
    rows, targets = inputs.pop("rows"), inputs.pop("targets")
    hidden = model.base_model(use_cache=False, **inputs).last_hidden_state[0]
    token_logp = losses.token_logprob(hidden[rows], model.lm_head.weight, targets, temperature)
    return token_logp, losses.sequence_logprob(token_logp, lengths)


def single_logprob(
    model: torch.nn.Module, prompt: list[int], response: list[int], temperature: float
) -> torch.Tensor:
    """The tokens of one response, from the logits of an ordinary run over the whole text."""
    logits = model(torch.tensor([prompt + response])).logits[0].to(FLOAT64) / temperature
    ln_pi = logits.log_softmax(dim=1)
    return torch.stack([ln_pi[len(prompt) - 1 + i, token] for i, token in enumerate(response)])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_packed_sequences_are_as_if_alone(models: tuple, temperature: float) -> None:
    """Attention across a border, rows off by one, a temperature forgotten; gradients likewise."""
    packed, ordinary = models
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])
    token_logp, logp = packed_logprob(packed, PROMPTS, RESPONSES, temperature)
    pairs = zip(PROMPTS, RESPONSES, strict=True)
    alone = [single_logprob(ordinary, *pair, temperature) for pair in pairs]
    assert (token_logp - torch.cat(alone)).abs().max() < 1e-5
    expected = torch.stack([tokens.sum() for tokens in alone])
    assert (logp - expected).abs().max() < 1e-5
    for model, result in ((packed, logp), (ordinary, expected)):
        model.zero_grad()
        (result * upstream).sum().backward()
    for (name, x), y in zip(packed.named_parameters(), ordinary.parameters(), strict=True):
        assert closeness(x.grad, y.grad) < 1e-5, name


def test_packed_sequences_do_not_see_each_other(models: tuple) -> None:
    """Leaks are small and train without complaint: every sequence's first token is changed once."""
    with torch.no_grad():
        _, before = packed_logprob(models[0], PROMPTS, RESPONSES)
        for changed in range(len(PROMPTS)):
            prompts = [list(prompt) for prompt in PROMPTS]
            prompts[changed][0] = 49
            _, after = packed_logprob(models[0], prompts, RESPONSES)
            difference = (after - before).abs()
            assert difference[changed] > 1e-2
            difference[changed] = 0
            assert difference.max() < 1e-6


def test_packed_tokens_do_not_see_the_future(models: tuple) -> None:
    """A window not asked for lets a token attend to the one it predicts."""
    responses = [list(response) for response in RESPONSES]
    responses[0][2] = 49
    with torch.no_grad():
        before, _ = packed_logprob(models[0], PROMPTS, RESPONSES)
        after, _ = packed_logprob(models[0], PROMPTS, responses)
    difference = (after - before).abs()
    assert difference[:2].max() < 1e-6
    assert difference[2:6].min() > 1e-3
    assert difference[6:].max() < 1e-6


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


@pytest.mark.parametrize("odd", range(4))
@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (1,), (3,), ()])
def test_loss_refuses_to_broadcast(odd: int, shape: tuple[int, ...]) -> None:
    """(B,) against (B, 1) is a (B, B) loss that looks well and learns nothing."""
    tensors = [torch.zeros(4)] * 4
    tensors[odd] = torch.zeros(shape)
    with pytest.raises(ValueError, match="four tensors"):
        losses.a_star_po_loss(*tensors, 1e-3)


def test_loss_refuses_four_columns() -> None:
    with pytest.raises(ValueError, match="four tensors"):
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
        assert chance == pytest.approx(hits / len(draws), abs=1e-15)


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
    assert losses.pass_at_k(num_samples, num_correct, 1) == pytest.approx(num_correct / num_samples)
    assert losses.pass_at_k(num_samples, 1, k) == pytest.approx(k / num_samples)


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k"),
    [(8, 9, 1), (8, -1, 1), (8, 4, 0), (8, 4, -1), (8, 4, 9), (0, 0, 1), (0, 0, 0)],
)
def test_pass_at_k_refuses(num_samples: int, num_correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="num_correct"):
        losses.pass_at_k(num_samples, num_correct, k)
