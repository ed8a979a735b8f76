"""A*-PO as mathematics: V*, ln pi(y|x), the regression loss, pass@k. No model and no I/O.

The objective is reward with a KL penalty, max over pi of E[r(x, y)] - beta KL(pi || pi_ref). Its
optimum pi* satisfies, for every prompt x and response y,

    V*(x) = beta ln E_{y ~ pi_ref} exp(r(x, y) / beta)                                     (1)
    beta ln(pi*(y|x) / pi_ref(y|x)) = r(x, y) - V*(x)                                      (2)

so stage 1 estimates (1) from N responses of the reference, and stage 2 makes (2) hold by

    min over pi of the mean of (beta2 ln(pi(y|x) / pi_ref(y|x)) - (r(x, y) - V*(x)))^2     (3)

Axes: P prompts, N responses per prompt, B sequences, T tokens of all sequences together, R their
response tokens, D hidden size, V vocabulary.
"""

import itertools
import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def optimal_value(rewards: Tensor, beta1: float) -> Tensor:
    """Eq. (1): V* = beta1 ln((1/N) sum_i exp(r_i / beta1)), rewards (P, N) -> v_star (P,).

    The mean reward for beta1 = inf, the best of the N as beta1 -> 0. Computed in float64 with the
    maximum m taken out, m + beta1 log1p(mean(expm1((r - m) / beta1))): exp(1 / beta1) cannot
    overflow, and at a large beta1 the logarithm of nearly 1 keeps its digits. Rewards of 32 or 64
    bits keep their dtype, others give float32. Raises ValueError unless beta1 > 0 and N >= 1.
    """
    if not beta1 > 0 or rewards.ndim != 2 or rewards.shape[1] == 0:
        raise ValueError(f"need beta1 > 0 and rewards (P, N), not {beta1}, {tuple(rewards.shape)}")
    r, v_star = rewards.double(), rewards.double().mean(dim=1)
    if beta1 < math.inf:
        best = r.amax(dim=1, keepdim=True)
        v_star = best[:, 0] + beta1 * ((r - best) / beta1).expm1().mean(dim=1).log1p()
    return v_star.to(torch.promote_types(rewards.dtype, torch.float32))


def token_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, temperature=1.0, chunk=512):
    """ln softmax(hidden weight^T / temperature) at the targets; (R, D), (V, D), (R,) -> (R,).

    `chunk` rows at a time, whose logits are computed again in backward, so that (R, V) never stands
    in memory: at V = 151,936 one float32 copy for 16,384 tokens would be 9.3 GiB. Float32 logits
    and result also for bf16 inputs, since the 8 bits of bf16 are off by up to 0.2 % of a logit.
    """
    assert hidden.shape == (*targets.shape, weight.shape[1]), f"need hidden (R, D): {hidden.shape}"

    def head(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = _Float32Product.apply(hidden, weight) / temperature
        return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([checkpoint(head, *part, use_reentrant=False) for part in parts])


class _Float32Product(torch.autograd.Function):
    """hidden weight^T, (R, D), (V, D) -> (R, V) float32; bf16 operands keep their fast kernels."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return hidden.float() @ weight.float().t()

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        grad = grad.to(hidden.dtype)
        return grad @ weight, grad.t() @ hidden


def sequence_logprob(token_logp: Tensor, lengths: Tensor) -> Tensor:
    """ln pi(y|x): sum each response's tokens, EOS included; (R,), lengths (B,) -> (B,) float32.

    Response b owns the lengths[b] entries after those of the responses before it. Lengths rather
    than `token != pad` say what belongs to it: in many base models pad is EOS.
    """
    assert token_logp.shape == (lengths.sum(),), f"lengths {lengths.tolist()}: {token_logp.shape}"
    # Not index_add: its order of addition is not fixed on a GPU, and pi / pi_ref would not be 1.
    return torch.stack([part.sum() for part in token_logp.float().split(lengths.tolist())])


def deal(lengths: list[int], num_ranks: int, budget: int) -> list[list[list[int]]]:
    """Deal sequences to ranks, each hand cut into micro-batches: [rank][micro-batch] -> indices.

    Longest first, each to the rank with the fewest tokens, so that all finish together; a
    micro-batch has at most `budget` tokens, or one sequence. FSDP wants equally many forwards on
    every rank, so short hands end with empty micro-batches.
    """
    hands, tokens = [[[]] for _ in range(num_ranks)], [0] * num_ranks
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = tokens.index(min(tokens))
        tokens[rank] += lengths[i]
        if hands[rank][-1] and sum(lengths[j] for j in hands[rank][-1]) + lengths[i] > budget:
            hands[rank].append([])
        hands[rank][-1].append(i)
    most = max(len(hand) for hand in hands)
    return [hand + [[]] * (most - len(hand)) for hand in hands]


def pack(prompts: list[list[int]], responses: list[list[int]]) -> tuple[dict, Tensor]:
    """Lay B sequences end to end without padding, for a model with `packed_attention`.

    Returns the inputs: input_ids and position_ids (1, T), the bounds of the sequences, and `rows`
    (R,), the places whose hidden state predicts the response tokens `targets` (R,); and the
    responses' lengths (B,). A response's last token predicts nothing and is not fed.
    """
    whole = [x + y[:-1] for x, y in zip(prompts, responses, strict=True)]
    bounds = [0, *itertools.accumulate(map(len, whole))]
    ends = zip(bounds[1:], responses, strict=True)
    inputs = {"input_ids": torch.tensor([[token for ids in whole for token in ids]])}
    inputs["position_ids"] = torch.tensor([[i for ids in whole for i in range(len(ids))]])
    inputs["rows"] = torch.tensor([row for end, y in ends for row in range(end - len(y), end)])
    inputs["targets"] = torch.tensor([token for y in responses for token in y])
    inputs["cu_seq_lens_q"] = torch.tensor(bounds, dtype=torch.int32)
    inputs["max_length_q"] = max(map(len, whole))
    return inputs, torch.tensor([len(y) for y in responses])


def packed_attention(module, query, key, value, mask, *, cu_seq_lens_q, max_length_q, scaling, **_):
    """Causal attention inside each packed sequence, as transformers calls it.

    (1, heads, T, dim) -> (1, T, heads, dim). Being causal must be asked for, varlen_attn's default
    is not; and what transformers itself does about packing fails silently.
    """
    qkv = [x[0].transpose(0, 1) for x in (query, key, value)]
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        options = {"window_size": (-1, 0), "enable_gqa": True, "scale": scaling}
        return varlen_attn(*qkv, *bounds, **options)[None], None
    # No such kernel on the CPU: pad, for attention alone, at the end, where no causal mask looks.
    # One sequence after another is faster where lengths differ much, slower where they are alike.
    own = torch.arange(max_length_q) < cu_seq_lens_q.diff()[:, None]  # (B, longest)
    qkv = [x.new_zeros(own.shape + x.shape[1:]).index_put_((own,), x).transpose(1, 2) for x in qkv]
    options = {"is_causal": True, "enable_gqa": True, "scale": scaling}
    out = torch.nn.functional.scaled_dot_product_attention(*qkv, **options)
    return out.transpose(1, 2)[own][None], None


def a_star_po_loss(logp: Tensor, ref_logp: Tensor, rewards: Tensor, v_star: Tensor,
                   beta2: float) -> Tensor:  # fmt: skip
    """Eq. (3): mean of (beta2 (logp - ref_logp) - (rewards - v_star))^2; all (B,) -> ().

    Sums over tokens, not means; no importance ratio, clipping or normalisation. At the published
    beta2 = 1e-3 an advantage of 0.3 is matched only 300 nats from the reference: early training is
    a policy gradient with baseline V* and a weak pull to the reference. Raises ValueError on
    unequal shapes, which would broadcast silently, or beta2 <= 0.
    """
    shapes = {tuple(x.shape) for x in (logp, ref_logp, rewards, v_star)}
    if shapes != {(logp.numel(),)} or not beta2 > 0:
        raise ValueError(f"need four tensors (B,) and beta2 > 0, not {shapes} and {beta2}")
    residual = beta2 * (logp - ref_logp) - (rewards - v_star)
    return residual.square().mean()


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold one of the c correct ones.

    1 - C(n-c, k) / C(n, k), the unbiased estimate of pass@k (Chen et al. 2021, arXiv 2107.03374),
    in exact integers. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
        raise ValueError(f"not k {k} of num_samples {num_samples}, num_correct {num_correct}")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)
