"""The mathematics of A*-PO: V*, ln pi(y|x), the regression loss, pass@k. No model and no I/O.

The objective is the reward with a KL penalty, max over pi of E[r(x, y)] - beta KL(pi || pi_ref).
Its optimum pi* satisfies, for every prompt x and response y,

    V*(x) = beta ln E_{y ~ pi_ref} exp(r(x, y) / beta)                                     (1)
    beta ln(pi*(y|x) / pi_ref(y|x)) = r(x, y) - V*(x)                                      (2)

Stage 1 estimates (1) from N responses of the reference. Stage 2 makes (2) hold by least squares:

    min over pi of the mean of (beta2 ln(pi(y|x) / pi_ref(y|x)) - (r(x, y) - V*(x)))^2     (3)

Axes: P prompts, N responses per prompt, B sequences, R response tokens of all sequences together,
D hidden size, V vocabulary.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

CHUNK = 512  # rows of logits that are computed at a time


def optimal_value(rewards: Tensor, beta1: float) -> Tensor:
    """Eq. (1): V* = beta1 ln((1/N) sum_i exp(r_i / beta1)), rewards (P, N) -> v_star (P,).

    It is the mean reward for beta1 = inf, and goes to the best of the N as beta1 -> 0.
    Example: N = 8 rewards with k ones, beta1 = 0.5: k = 0, 1, 4, 8 -> V* = 0, 0.29, 0.72, 1.

    float32 and float64 rewards give V* in their own dtype, all other dtypes give float32. Raises
    ValueError unless beta1 > 0, rewards are (P, N) and N >= 1.
    """
    beta1 = float(beta1)  # torch takes no whole number above 2^63
    if not beta1 > 0:
        raise ValueError(f"need beta1 > 0, not {beta1}")
    if rewards.ndim != 2 or rewards.shape[1] == 0:
        raise ValueError(f"need rewards (P, N) with N >= 1, not {tuple(rewards.shape)}")
    r = rewards.double()
    if beta1 == math.inf:
        v_star = r.mean(dim=1)
    else:
        # With the best reward taken out, V* = best + beta1 ln(mean(exp((r - best) / beta1))). No
        # exponent is above 0, so nothing overflows. For a large beta1 that mean is nearly 1. So
        # expm1 computes mean - 1, and log1p adds the 1 back, without a loss of digits.
        best = r.amax(dim=1, keepdim=True)
        mean_excess = torch.expm1((r - best) / beta1).mean(dim=1)
        v_star = best[:, 0] + beta1 * torch.log1p(mean_excess)
    return v_star.to(torch.promote_types(rewards.dtype, torch.float32))


def value_standard_error(rewards: Tensor, beta1: float) -> Tensor:
    """Estimate how uncertain `optimal_value` is: rewards (P, N) -> standard errors (P,).

    V* is beta1 ln(m) with m the mean of w = exp(r / beta1), so by the delta method its standard
    error is beta1 / m times that of m. Two responses with the rewards 0 and 1 are added first
    (Laplace's rule), because two equal rewards do not make a prompt certain: k of N right counts as
    the success rate (k + 1) / (N + 2). The spread of all N + 2 is divided by sqrt(N), since
    only N were sampled. Rewards should lie between 0 and 1.
    Example: beta1 = 0.5: 0 of 2, 1 of 2, 2 of 2, 0 of 12 right -> 0.38, 0.27, 0.17, 0.16.

    Raises ValueError in the same cases as `optimal_value`, and returns the same dtype.
    """
    beta1 = float(beta1)
    v_star = optimal_value(rewards, beta1)
    extremes = torch.tensor([[0.0, 1.0]], dtype=torch.float64, device=rewards.device)
    smoothed = torch.cat([rewards.double(), extremes.expand(len(rewards), 2)], dim=1)
    if beta1 == math.inf:
        deviation = smoothed.std(dim=1, correction=0)
    else:
        # The largest w is taken out, as above, so that nothing overflows.
        best = smoothed.amax(dim=1, keepdim=True)
        excess = torch.expm1((smoothed - best) / beta1)
        deviation = beta1 * excess.std(dim=1, correction=0) / (1 + excess.mean(dim=1))
    return (deviation / math.sqrt(rewards.shape[1])).to(v_star.dtype)


def token_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int = CHUNK
) -> Tensor:
    """Return ln softmax(hidden weight^T / temperature) at the targets.

    Takes hidden (R, D), weight (V, D) and targets (R,); returns (R,) float32. The full logits
    tensor is never materialised: `chunk` rows are done at a time, and their logits are computed
    again in the backward pass. At V = 151,936 one float32 copy for 16,384 tokens would be 9.3 GiB.
    Gradients reach both hidden and weight.
    """
    assert hidden.shape == (*targets.shape, weight.shape[1]), (
        f"need hidden (R, D), weight (V, D), targets (R,), not {tuple(hidden.shape)}, "
        f"{tuple(weight.shape)}, {tuple(targets.shape)}"
    )

    def chunk_logprob(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = _Float32Product.apply(hidden, weight) / temperature
        return -cross_entropy(logits, targets, reduction="none")

    parts = []
    for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        parts.append(checkpoint(chunk_logprob, h, y, use_reentrant=False))
    return torch.cat(parts)


class _Float32Product(torch.autograd.Function):
    """hidden weight^T in float32, also for bf16 operands: (R, D), (V, D) -> (R, V).

    A bf16 logit has 8 significant bits, so it is off by up to 0.2 %, and ln pi(y|x) is a sum of
    hundreds. torch.mm with out_dtype has no backward pass, so we write our own. Gradients are
    multiplied in the dtype of the operands, as in any bf16 layer.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return hidden.float() @ weight.float().t()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        grad = grad.to(hidden.dtype)
        weight_grad = None
        if ctx.needs_input_grad[1]:  # not if the head is frozen
            weight_grad = grad.t() @ hidden
        return grad @ weight, weight_grad


def sequence_logprob(token_logp: Tensor, lengths: Tensor) -> Tensor:
    """Return ln pi(y|x), the sum over each response's tokens, EOS included.

    Takes token_logp (R,), and lengths (B,), which are on the CPU; returns (B,) float32. The
    responses lie one after another in token_logp, and response b has lengths[b] entries. Lengths,
    not `token != pad`, say what belongs to a response: in many base models pad is EOS.
    """
    assert token_logp.shape == (lengths.sum(),), (
        f"lengths {lengths.tolist()} do not add up to token_logp {tuple(token_logp.shape)}"
    )
    # Not index_add: its order of addition is not fixed on a GPU, and ln(pi / pi_ref) would not be
    # exactly 0 before the first update.
    responses = token_logp.float().split(lengths.tolist())
    return torch.stack([response.sum() for response in responses])


def squared_residuals(
    logp: Tensor, ref_logp: Tensor, rewards: Tensor, v_star: Tensor, beta2: float
) -> Tensor:
    """Eq. (3) for each sequence: (beta2 (logp - ref_logp) - (rewards - v_star))^2; all (B,).

    Log-probs are sums over tokens, not means. There is no importance ratio, clipping or
    normalisation. The gradient is 2 beta2 (beta2 logratio - advantage) times that of logp. At the
    published beta2 = 1e-3, fitting an advantage of 0.3 would take a log-ratio of 300 nats, so in
    practice the loss acts as a policy gradient with V* as its baseline.

    Raises ValueError unless beta2 > 0 and all shapes are (B,): others would broadcast silently.
    """
    shapes = [tuple(x.shape) for x in (logp, ref_logp, rewards, v_star)]
    if shapes != [(logp.numel(),)] * 4:
        raise ValueError(f"need logp, ref_logp, rewards and v_star of one shape (B,), not {shapes}")
    if not beta2 > 0:
        raise ValueError(f"need beta2 > 0, not {beta2}")
    implicit_reward = beta2 * (logp - ref_logp)
    target = rewards - v_star
    return (implicit_reward - target).square()


def a_star_po_loss(
    logp: Tensor, ref_logp: Tensor, rewards: Tensor, v_star: Tensor, beta2: float
) -> Tensor:
    """Eq. (3): the mean of `squared_residuals` over the sequences; all (B,) -> ().

    This is for theory and tests. In training, `train_online.update` takes the same mean over all
    micro-batches and ranks.
    """
    return squared_residuals(logp, ref_logp, rewards, v_star, beta2).mean()


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the chance that k of n samples, drawn without replacement, include a correct one.

    With n = num_samples and c = num_correct it is 1 - C(n-c, k) / C(n, k), in exact integers: the
    unbiased estimate of pass@k (Chen et al. 2021, arXiv 2107.03374). Raises ValueError unless
    0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct {num_correct} is not between 0 and {num_samples}")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k {k} is not between 1 and num_samples {num_samples}")
    num_wrong = num_samples - num_correct
    num_draws = math.comb(num_samples, k)
    # The division of two whole numbers is exact up to one rounding.
    return (num_draws - math.comb(num_wrong, k)) / num_draws
