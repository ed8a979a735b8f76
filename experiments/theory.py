"""The paper's theory, run: the fixed point, V* and its standard error, regret.

    python -m experiments.theory                    # one to two minutes on one core, no model

Everything is small enough to be exact in float64, and the algorithm is losses.py itself:

1. The fixed point of the regression on a bandit with four arms, on-policy and off-policy, with the
   exact V*, the mean reward and zero in V*'s place.
2. V* between the mean reward (beta1 -> infinity) and the best reward (beta1 -> 0).
3. Standard error and bias of V* estimated from N binary rewards, against the success rate p: the
   delta method, the exact sum over the binomial distribution, and a simulation.
4. Log-linear policies pi_theta(y|x) = pi_ref(y|x) exp(theta . phi(x, y)) / Z(x) and rewards 0 or 1
   in the span of the features, so that pi* is pi_theta*. In round t the learner plays theta_t and
   sees B prompts with one response each from pi_t = pi_theta_t. With expectations as exact sums,
       l_t(theta) = E_x E_{y ~ pi_t} (beta ln(pi_theta / pi_ref)(y|x) - (r(x, y) - V*(x)))^2
       regret R(T) = sum_t l_t(theta_t) - min_theta sum_t l_t(theta)       (t = 1 .. T)
   Both sums have the same samplers pi_t. With the exact V* the minimum is 0, at theta*. Learners:
   - online gradient descent (OGD), theta <- theta - eta_t grad (the batch's loss), not projected;
   - follow the perturbed leader (FTPL), theta_t+1 = argmin over |theta| <= 2 |theta*| of
     (sum of the batches' losses) - c sqrt(t) sigma . theta, sigma_i ~ Exp(1), new in every round.
   Three parametrisations of one policy class differ in nothing but the Fisher matrix
   E_x Cov_{y ~ pi} phi: the identity at pi_ref; singular, as every feature is there twice; badly
   conditioned, with eigenvalues from 1 to 1e-3.

What is approximate: FTPL's argmin is two Gauss-Newton steps from theta_t, each exact on the ball
and with a line search (the log compares the last round's with the best of four long runs); the
minimum in R(T) is found likewise, in at most 15 steps from theta*; slopes are fits over the last
decade of rounds.
FTPL is told |theta*|, and its bound in the literature is for a scale chosen by T, not sqrt(t).
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # there may be no display
import torch
from matplotlib import pyplot
from torch import Tensor

import losses
import problems

FLOAT64 = torch.float64
BETA = 0.25  # small enough for the loss to be concave at pi_ref, see `start_curvature`
BETA1S, NUM_SAMPLES = (0.1, 0.5, 1.0, 10.0), (1, 2, 4, 8, 32)

# One loss for each row, (S, n) four times -> (S,): the shipped function, S times.
row_losses = torch.vmap(losses.a_star_po_loss, in_dims=(0, 0, 0, 0, None))


def weighted_loss(
    weights: Tensor, logp: Tensor, ref_logp: Tensor, rewards: Tensor, v_star: Tensor, beta2: float
) -> Tensor:
    """Sum weights times squared residuals with the shipped loss; all (S, n) -> (S,).

    The residual is linear in the four tensors together, so a weight goes in as its root. With
    probabilities for weights this is an expectation, with counts a sum over past samples.
    """
    root = weights.sqrt()
    scaled = (root * x for x in (logp, ref_logp, rewards, v_star))
    return weights.shape[1] * row_losses(*scaled, beta2)


# ---------------------------------------------------------------------------------------------
# 1. The fixed point

ARM_REWARDS = torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=FLOAT64)
REF = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=FLOAT64)
OFF_POLICY = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=FLOAT64)  # neither pi_ref nor pi*
BASELINES = ("exact V*", "mean reward", "zero")


def arm_baselines() -> Tensor:
    """What stands in V*'s place, -> (3,): V* by eq. (1), the mean reward under pi_ref, and zero."""
    rewards = ARM_REWARDS.repeat_interleave((10 * REF).round().int())[None]  # pi_ref's proportions
    values = [losses.optimal_value(rewards, beta1)[0] for beta1 in (BETA, math.inf)]
    return torch.stack([*values, torch.zeros((), dtype=FLOAT64)])


def optimal_arms() -> Tensor:
    """pi* = pi_ref exp(r / beta) / Z, -> (4,)."""
    return (REF.log() + ARM_REWARDS / BETA).softmax(dim=0)


def regress(
    on_policy: bool, batch: int | None, num_steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Descend the loss from pi_ref with every baseline: distances to pi* (steps, 3) and loss (3,).

    `batch` arms a step, None for the expectation itself; step sizes 16 / sqrt(t). Distances are in
    total variation, the loss is the expectation at the last policy under its sampling distribution.
    """
    baselines, distances = arm_baselines(), []
    ref_logp, rewards = (x.expand(3, 4) for x in (REF.log(), ARM_REWARDS))
    v_star, logits = baselines[:, None].expand(3, 4), REF.log().repeat(3, 1)
    for t in range(1, num_steps + 1):
        logits.requires_grad_()
        logp = logits.log_softmax(dim=1)
        distances.append((logp.detach().exp() - optimal_arms()).abs().sum(dim=1) / 2)
        sampler = logp.detach().exp() if on_policy else OFF_POLICY.expand(3, 4)
        weights = sampler
        if batch is not None:
            arms = torch.multinomial(sampler, batch, replacement=True, generator=generator)
            weights = torch.zeros_like(sampler).scatter_add_(
                1, arms, torch.full(arms.shape, 1 / batch, dtype=FLOAT64)
            )
        loss = weighted_loss(weights, logp, ref_logp, rewards, v_star, BETA)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        logits = logits.detach() - 16 * t**-0.5 * grad
    expected = weighted_loss(sampler, logp.detach(), ref_logp, rewards, v_star, BETA)
    return torch.stack(distances), expected


def fixed_point(seed: int, num_steps: int = 3000) -> tuple[dict, list[str]]:
    """Part 1: where the regression ends, for each sampler and baseline, and the log."""
    row = "{:<12} {:<14} {:>8} {:>12} {:>12} {:>14}".format
    lines = [
        f"1. The fixed point: 4 arms, beta {BETA}, {num_steps} steps, distance to pi* in TV",
        row("samples", "in V*'s place", "value", "distance", "loss", "with 64 arms"),
    ]
    data, values = {}, arm_baselines().tolist()
    for name, on_policy in (("on-policy", True), ("off-policy", False)):
        generator = torch.Generator().manual_seed(seed)
        exact, loss = regress(on_policy, None, num_steps, generator)
        sampled, _ = regress(on_policy, 64, num_steps, generator)
        kept = [t - 1 for t in checkpoints(num_steps)]
        data[name] = {"steps": checkpoints(num_steps), "exact": exact[kept].T.tolist()}
        data[name] |= {"sampled": sampled[kept].T.tolist(), "loss": loss.tolist()}
        for i, baseline in enumerate(BASELINES):
            numbers = (exact[-1, i], loss[i], sampled[-num_steps // 10 :, i].mean())
            cells = (f"{float(number):.1e}" for number in numbers)
            lines.append(row(name, baseline, f"{values[i]:.4f}", *cells))
    lines.append(
        "distance and loss: expectations in place of a batch; with 64 arms: mean of the last tenth"
    )
    return data, lines


# ---------------------------------------------------------------------------------------------
# 2. V* between the mean and the best


def value_table(beta1s: list[float], n: int = 8) -> Tensor:
    """V* of k right among n, -> (len(beta1s), n + 1)."""
    rewards = (torch.arange(n) < torch.arange(n + 1)[:, None]).to(FLOAT64)
    return torch.stack([losses.optimal_value(rewards, beta1) for beta1 in beta1s])


def limits() -> tuple[dict, list[str]]:
    """Part 2: V* of 0 to 8 right among 8 for many beta1, its limits, and the log."""
    grid = [10 ** (e / 20) for e in range(-60, 61)]
    table = value_table([1e-9, *grid, math.inf])
    k = torch.arange(9, dtype=FLOAT64)
    mean_error = (table[-1] - k / 8).abs().max().item()
    best_error = (table[0] - (k > 0).to(FLOAT64)).abs().max().item()
    rise = table.diff(dim=0).max().item()  # beta1 grows downwards, V* must not
    lines = [
        "2. V* of k right among N = 8",
        f"{'beta1':>8} " + " ".join(f"{i:>6}" for i in range(9)),
    ]
    for beta1 in (1e-3, *BETA1S, 1e3):
        row = value_table([beta1])[0].tolist()
        lines.append(f"{beta1:>8g} " + " ".join(f"{v:6.4f}" for v in row))
    lines.append(
        f"beta1 = inf is the mean to {mean_error:.0e}, beta1 = 1e-9 the best to {best_error:.0e};"
        f" over {len(grid)} values"
        f"\nbetween them V* never rises with beta1 ({rise:.0e} at most)."
    )
    return {"beta1": grid, "v_star": table[1:-1].tolist(), "largest_rise": rise}, lines


# ---------------------------------------------------------------------------------------------
# 3. The standard error of an estimated V*


def true_value(p: Tensor, beta1: float) -> Tensor:
    """V* of a success rate, beta1 ln(1 + p (e^(1/beta1) - 1)), (n,) -> (n,)."""
    return beta1 * (p * math.expm1(1 / beta1)).log1p()


def delta_method(p: Tensor, n: int, beta1: float) -> tuple[Tensor, Tensor]:
    """Standard error and bias of V* from N samples to first order in 1/N, (n,) -> (n,) twice.

    With h(p) the true value: |h'| sqrt(p (1 - p) / N), and h'' p (1 - p) / (2 N). The first is
    largest at p = 1 / (1 + e^(1/beta1)), whatever N.
    """
    e = math.expm1(1 / beta1)
    slope, variance = beta1 * e / (1 + p * e), p * (1 - p) / n
    return slope * variance.sqrt(), -(slope**2) * variance / (2 * beta1)


def exact_error(p: Tensor, n: int, beta1: float) -> tuple[Tensor, Tensor]:
    """Standard error and bias by the sum over k right of N, (n,) -> (n,) twice."""
    k = torch.arange(n + 1, dtype=FLOAT64)
    ways = torch.tensor([float(math.comb(n, i)) for i in range(n + 1)], dtype=FLOAT64)
    chance = ways * p[:, None] ** k * (1 - p[:, None]) ** (n - k)
    values = value_table([beta1], n)[0]
    mean = chance @ values
    variance = (chance * (values - mean[:, None]).square()).sum(dim=1)
    return variance.sqrt(), mean - true_value(p, beta1)


def simulated_error(
    p: Tensor, n: int, beta1: float, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Standard error and bias of `count` estimates of V* for each rate, (n,) -> (n,) twice."""
    errors, biases = [], []
    for rate in p:
        draws = torch.rand(count, n, dtype=FLOAT64, generator=generator) < rate
        estimates = losses.optimal_value(draws.to(FLOAT64), beta1)
        errors.append(estimates.std())
        biases.append(estimates.mean() - true_value(rate, beta1))
    return torch.stack(errors), torch.stack(biases)


def success_rates() -> Tensor:
    """Success rates from 1e-6 to 1, dense on both scales, -> (n,)."""
    low = 10 ** torch.linspace(-6, -2, 401, dtype=FLOAT64)
    return torch.cat([low[:-1], torch.linspace(0.01, 0.999, 990, dtype=FLOAT64)])


FEW = torch.tensor([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9], dtype=FLOAT64)  # simulated


def error_row(n: int, beta1: float, count: int, generator: torch.Generator) -> dict:
    """Where standard error and bias are largest for one N and beta1, and the simulation of FEW."""
    p = success_rates()
    se, bias = exact_error(p, n, beta1)
    top, low = se.argmax(), bias.argmin()
    few_se, few_bias = exact_error(FEW, n, beta1)
    sim_se, sim_bias = simulated_error(FEW, n, beta1, count, generator)
    return {
        "n": n,
        "beta1": beta1,
        "p_delta": 1 / (1 + math.exp(1 / beta1)),
        "p": p[top].item(),
        "se": se[top].item(),
        "se_at_half": exact_error(p.new_tensor([0.5]), n, beta1)[0].item(),
        "bias": bias[low].item(),
        "p_bias": p[low].item(),
        "sim_p": FEW.tolist(),
        "sim_se": sim_se.tolist(),
        "sim_bias": sim_bias.tolist(),
        "worst_bias": ((sim_bias - few_bias) / (few_se / count**0.5)).abs().max().item(),
        "worst_se": (sim_se / few_se - 1).abs().max().item(),
    }


def standard_errors(seed: int, count: int = 20_000) -> tuple[dict, list[str]]:
    """Part 3: where the standard error of V* is largest, and the log."""
    line = "{:>3} {:>6} {:>9} {:>9} {:>7} {:>7} {:>6} {:>8} {:>7} {:>5}".format
    heads = (
        "N",
        "beta1",
        "p, delta",
        "p, exact",
        "s.e.",
        "at 1/2",
        "ratio",
        "bias",
        "at p",
        "sim.",
    )
    lines = [
        "3. Standard error (s.e.) of V* from N samples: at which success rate p is it largest?",
        "   And the bias, where it is largest.",
        line(*heads),
    ]
    generator, rows = torch.Generator().manual_seed(seed), []
    for n, beta1 in itertools.product(NUM_SAMPLES, BETA1S):
        r = error_row(n, beta1, count, generator)
        rows.append(r)
        cells = [f"{r['p_delta']:.2g}", f"{r['p']:.2g}", f"{r['se']:.4f}", f"{r['se_at_half']:.4f}"]
        cells += [f"{r['se'] / r['se_at_half']:.2f}", f"{r['bias']:.4f}", f"{r['p_bias']:.2g}"]
        lines.append(line(n, beta1, *cells, f"{r['worst_bias']:.1f}"))
    worst = max(r["worst_se"] for r in rows)
    lines += [
        f"sim.: the worst of 8 success rates' means of {count} simulated V*, in standard errors.",
        f"The simulated s.e. is off by {worst:.1%} at most, where a rare draw matters.",
        "CONTRADICTS THE REBUTTAL, which has the s.e. largest at p = 1/2: so it is for N = 1,",
        "where V* is the one reward, and nearly so for beta1 = 10; else it is at a much lower p.",
    ]
    return {"rows": rows}, lines


# ---------------------------------------------------------------------------------------------
# 4. Log-linear policies

NUM_PROMPTS, NUM_RESPONSES, NUM_FEATURES, BATCH = 16, 8, 6, 16
FISHERS = ("identity", "singular", "badly conditioned")
RADIUS, PERTURBATION = 2.0, 0.03  # in units of |theta*|; c


class World(NamedTuple):
    """S independent problems of P prompts with K responses each and d features."""

    rewards: Tensor  # (S, P, K), 0 or 1
    ref_logp: Tensor  # (S, P, K)
    features: Tensor  # (S, P, K, d)
    v_star: Tensor  # (S, P), what the regression uses for V*
    theta_star: Tensor  # (S, d), pi* in this parametrisation


def make_world(num_worlds: int, fisher: str, seed: int) -> World:
    """Make problems in which pi* is log-linear though no single feature is the reward.

    The reward and d - 1 distractors are whitened under pi_ref and reflected so that theta* has
    equal entries. The same seed gives the same rewards and pi_ref for every kind of Fisher matrix.
    """
    generator, d = torch.Generator().manual_seed(seed), NUM_FEATURES
    shape = (num_worlds, NUM_PROMPTS, NUM_RESPONSES)
    rewards = (torch.rand(shape, dtype=FLOAT64, generator=generator) < 0.3).to(FLOAT64)
    rewards[..., 0], rewards[..., 1] = 1.0, 0.0  # a success rate bounded from below
    ref_logp = (torch.randn(shape, dtype=FLOAT64, generator=generator) / 2).log_softmax(dim=2)
    distractors = torch.randn(*shape, d - 1, dtype=FLOAT64, generator=generator)
    raw = centre(torch.cat([rewards[..., None], distractors], dim=-1), ref_logp)
    root = torch.linalg.cholesky(fisher_matrix(raw, ref_logp)).mT
    toward = torch.eye(d, dtype=FLOAT64)[0] - d**-0.5
    reflection = torch.eye(d, dtype=FLOAT64) - 2 * toward.outer(toward) / toward.dot(toward)
    mixing = root.inverse() @ reflection
    features, theta = raw @ mixing[:, None], mixing.inverse()[:, :, 0] / BETA
    if fisher == "singular":
        features, theta = (torch.cat([x, x], dim=-1) / 2**0.5 for x in (features, theta))
    elif fisher == "badly conditioned":
        scale = 10 ** -torch.linspace(0, 1.5, d, dtype=FLOAT64)
        features, theta = features * scale, theta / scale
    v_star = BETA * (ref_logp + rewards / BETA).logsumexp(dim=2)
    return World(rewards, ref_logp, features, v_star, theta)


def centre(features: Tensor, logp: Tensor) -> Tensor:
    """Take each prompt's mean under the policy out of the features, (S, P, K, d) -> the same."""
    return features - (logp.exp()[..., None] * features).sum(dim=2, keepdim=True)


def fisher_matrix(features: Tensor, logp: Tensor) -> Tensor:
    """E_x Cov_{y ~ pi} phi(x, y); features (S, P, K, d), logp (S, P, K) -> (S, d, d)."""
    c = centre(features, logp)
    return torch.einsum("spki,spk,spkj->sij", c, logp.exp() / logp.shape[1], c)


def with_baseline(world: World, kind: str, seed: int) -> World:
    """Replace V* by its estimate from 8 responses, the mean reward or zero; or leave it exact."""
    p = world.ref_logp.exp()
    if kind == "mean reward":
        return world._replace(v_star=(p * world.rewards).sum(dim=2))
    if kind == "zero":
        return world._replace(v_star=torch.zeros_like(world.v_star))
    if kind == "estimated V*":
        generator = torch.Generator().manual_seed(seed)
        draws = torch.multinomial(p.flatten(0, 1), 8, replacement=True, generator=generator)
        rewards = world.rewards.flatten(0, 1).gather(1, draws)
        return world._replace(v_star=losses.optimal_value(rewards, BETA).view_as(world.v_star))
    return world


def log_policy(world: World, theta: Tensor) -> Tensor:
    """ln pi_theta = ln pi_ref + theta . phi - ln Z, theta (S, d) -> (S, P, K)."""
    scores = torch.einsum("spkd,sd->spk", world.features, theta)
    return (world.ref_logp + scores).log_softmax(dim=2)


def optimal_logp(world: World) -> Tensor:
    """ln pi* = ln pi_ref + r / beta - ln Z, -> (S, P, K); no theta in it."""
    return (world.ref_logp + world.rewards / BETA).log_softmax(dim=2)


def population_loss(world: World, theta: Tensor, weights: Tensor) -> Tensor:
    """The shipped loss, weighted by (prompt, response); theta (S, d), weights (S, P, K) -> (S,)."""
    v_star = world.v_star[..., None].expand_as(world.rewards)
    tensors = (weights, log_policy(world, theta), world.ref_logp, world.rewards, v_star)
    return weighted_loss(*(x.flatten(1) for x in tensors), BETA)


def batch_loss(world: World, theta: Tensor, cells: Tensor) -> Tensor:
    """The shipped loss of sampled responses; cells (S, B) index prompt and response -> (S,)."""
    v_star = world.v_star[..., None].expand_as(world.rewards)
    tensors = (log_policy(world, theta), world.ref_logp, world.rewards, v_star)
    return row_losses(*(x.flatten(1).gather(1, cells) for x in tensors), BETA)


Learner = Callable[[Tensor, Tensor, int], Tensor]  # theta_t (S, d), cells (S, B), t -> theta_t+1


def gradient_descent(world: World, step_size: float, power: float) -> Learner:
    """Online gradient descent with step sizes step_size / t^power."""

    def learn(theta: Tensor, cells: Tensor, t: int) -> Tensor:
        theta = theta.requires_grad_()
        (grad,) = torch.autograd.grad(batch_loss(world, theta, cells).sum(), theta)
        return theta.detach() - step_size * t**-power * grad

    return learn


def perturbed_leader(world: World, scale: float, generator: torch.Generator) -> Learner:
    """Follow the perturbed leader; remembers how often each response was seen, not when."""
    seen = torch.zeros_like(world.rewards)

    def learn(theta: Tensor, cells: Tensor, t: int) -> Tensor:
        seen.flatten(1).scatter_add_(1, cells, torch.full(cells.shape, 1 / BATCH, dtype=FLOAT64))
        noise = torch.empty_like(theta).exponential_(generator=generator)
        learn.problem = (seen, scale * t**0.5 * noise)  # for `oracle_gap`
        return minimise(world, theta, *learn.problem, num_steps=2)

    return learn


def perturbed_loss(world: World, theta: Tensor, weights: Tensor, noise: Tensor) -> Tensor:
    """FTPL's objective: the weighted loss - noise . theta, -> (S,)."""
    return population_loss(world, theta, weights) - (noise * theta).sum(dim=1)


def minimise(world: World, theta: Tensor, weights: Tensor, noise: Tensor, num_steps: int) -> Tensor:
    """Minimise `perturbed_loss` over the ball |theta| <= 2 |theta*|, theta (S, d) -> (S, d).

    Gauss-Newton: the gradient is autograd's, of the shipped loss; the curvature leaves out that of
    the log normaliser. The line search keeps the best of four points, the present one among them,
    so a step never makes it worse. The objective is not convex: the minimum may be a local one.
    """
    radius = RADIUS * world.theta_star.norm(dim=1)
    fractions = theta.new_tensor([1, 1 / 2, 1 / 8, 0])[:, None, None]
    four = World(*(torch.cat([x] * len(fractions)) for x in world))  # the line search, at once
    tasks = [torch.cat([x] * len(fractions)) for x in (weights, noise)]
    for _ in range(num_steps):
        theta = theta.detach().requires_grad_()
        value = perturbed_loss(world, theta, weights, noise)
        (grad,) = torch.autograd.grad(value.sum(), theta)
        theta = theta.detach()
        jacobian = BETA * centre(world.features, log_policy(world, theta))
        curvature = 2 * torch.einsum("spki,spk,spkj->sij", jacobian, weights, jacobian)
        linear = torch.einsum("sij,sj->si", curvature, theta) - grad
        points = theta + fractions * (minimise_on_ball(curvature, linear, radius) - theta)
        values = perturbed_loss(four, points.flatten(0, 1), *tasks).view(len(fractions), -1)
        chosen = values.argmin(dim=0)
        theta = points[chosen, torch.arange(len(theta))]
        if (chosen == len(fractions) - 1).all():
            break
    return theta


def minimise_on_ball(curvature: Tensor, linear: Tensor, radius: Tensor) -> Tensor:
    """Minimise x'Hx/2 - g'x over |x| <= radius, H >= 0; (S, d, d), (S, d), (S,) -> (S, d).

    x = (H + mu)^-1 g with the least mu >= 0 that keeps it in the ball, by bisection: a singular H,
    in whose null space the perturbation pushes without end, needs no other treatment.
    """
    eigenvalues, vectors = torch.linalg.eigh(curvature)
    g = torch.einsum("sij,si->sj", vectors, linear)
    low, high = torch.zeros_like(radius), linear.norm(dim=1) / radius + 1e-12
    for _ in range(30):
        middle = (low + high) / 2
        outside = (g / (eigenvalues.clamp_min(0) + middle[:, None])).norm(dim=1) > radius
        low, high = torch.where(outside, middle, low), torch.where(outside, high, middle)
    return torch.einsum("sij,sj->si", vectors, g / (eigenvalues.clamp_min(0) + high[:, None]))


class Play(NamedTuple):
    """What a learner did in T rounds of S problems."""

    rounds: list[int]  # the checkpoints
    regret: Tensor  # (checkpoints, S)
    kl: Tensor  # (T, S), E_x KL(pi_t | pi*)
    theta: Tensor  # (S, d), theta_T+1


def checkpoints(num_rounds: int) -> list[int]:
    """Rounds on a log scale, twelve a decade, the last among them."""
    count = round(12 * math.log10(num_rounds))
    return sorted({round(num_rounds ** (i / count)) for i in range(count + 1)})


def play(world: World, learn: Learner, num_rounds: int, seed: int) -> Play:
    """Let a learner play from theta_1 = 0, which is pi_ref; regret as defined at the top."""
    generator, rounds = torch.Generator().manual_seed(seed), checkpoints(num_rounds)
    theta, ln_star = torch.zeros_like(world.theta_star), optimal_logp(world)
    played, samplers, none = 0, torch.zeros_like(world.rewards), torch.zeros_like(theta)
    regret, kl = [], []
    for t in range(1, num_rounds + 1):
        with torch.no_grad():
            logp = log_policy(world, theta)
            p = logp.exp() / NUM_PROMPTS
            played = played + population_loss(world, theta, p)
            samplers += p
            kl.append((p * (logp - ln_star)).sum(dim=(1, 2)))
        if t in rounds:
            best = minimise(world, world.theta_star, samplers, none, num_steps=15)
            regret.append(played - population_loss(world, best, samplers))
        cells = torch.multinomial(p.flatten(1), BATCH, replacement=True, generator=generator)
        theta = learn(theta, cells, t)
    return Play(rounds, torch.stack(regret), torch.stack(kl), theta)


def oracle_gap(world: World, theta: Tensor, weights: Tensor, noise: Tensor) -> Tensor:
    """How much better than FTPL's argmin four long runs do, relative to the span to 0, -> (S,)."""
    found = perturbed_loss(world, theta, weights, noise)
    starts = (theta, torch.zeros_like(theta), world.theta_star, -world.theta_star)
    runs = [minimise(world, start, weights, noise, num_steps=40) for start in starts]
    best = torch.stack([perturbed_loss(world, x, weights, noise) for x in runs]).amin(dim=0)
    return (found - best) / (perturbed_loss(world, starts[1], weights, noise) - best)


def fit_slope(rounds: list[int], regret: Tensor) -> float:
    """Fit regret ~ T^a over the last decade of rounds by least squares on log axes, (n,) -> a."""
    points = [(math.log(t), math.log(r)) for t, r in zip(rounds, regret.tolist(), strict=True)
              if t >= rounds[-1] / 10 and r > 0]  # fmt: skip
    x, y = torch.tensor(points, dtype=FLOAT64).T
    x = x - x.mean()
    return (x.dot(y) / x.dot(x)).item()


def start_curvature(world: World) -> tuple[float, float]:
    """Least and greatest eigenvalue of the Hessian of l_1 at pi_ref, in the first problem.

    A prompt's part of it is 2 beta^2 (1 - KL(pi_ref | pi*)) Cov(phi), with KL = (V* - mean) / beta:
    the loss is concave there as soon as V* exceeds the mean reward by more than beta.
    """
    one = World(*(x[:1] for x in world))
    weights, theta = one.ref_logp.exp() / NUM_PROMPTS, torch.zeros_like(one.theta_star[0])
    hessian = torch.autograd.functional.hessian(
        lambda x: population_loss(one, x[None], weights)[0], theta
    )
    eigenvalues = torch.linalg.eigvalsh(hessian)
    return eigenvalues[0].item(), eigenvalues[-1].item()


def downhill(world: World, theta: Tensor) -> tuple[Tensor, Tensor]:
    """grad l_t(theta_t) . (theta_t - theta*), and 2 beta^2 E_x Var_pi_t ln(pi_t / pi*); (S,) each.

    They are equal, whatever stands for V*: on-policy, every step of the expected gradient leads
    toward theta*, nonconvex as the loss is, and nothing is asked of the Fisher matrix.
    """
    theta = theta.detach().requires_grad_()
    logp = log_policy(world, theta.detach())
    (grad,) = torch.autograd.grad(
        population_loss(world, theta, logp.exp() / NUM_PROMPTS).sum(), theta
    )
    ratio = centre((logp - optimal_logp(world))[..., None], logp)[..., 0]
    variance = (logp.exp() * ratio.square()).sum(dim=2).mean(dim=1)
    along = (grad * (theta.detach() - world.theta_star)).sum(dim=1)
    return along, 2 * BETA**2 * variance


LEARNERS = {"OGD, eta/sqrt(t)": 0.5, "OGD, eta constant": 0.0, "FTPL": None}
STEP_SIZE = 2.0


def play_one(
    name: str, fisher: str, kind: str, num_rounds: int, num_worlds: int, seed: int
) -> tuple[Play, float]:
    """Play one learner in one kind of world; and FTPL's oracle gap in the last round (else 0)."""
    world = with_baseline(make_world(num_worlds, fisher, seed), kind, seed + 1)
    power = LEARNERS[name]
    if power is not None:
        return play(world, gradient_descent(world, STEP_SIZE, power), num_rounds, seed + 2), 0.0
    learn = perturbed_leader(world, PERTURBATION, torch.Generator().manual_seed(seed + 3))
    result = play(world, learn, num_rounds, seed + 2)
    return result, oracle_gap(world, result.theta, *learn.problem).max().item()


VERDICT = [
    "AS THE REBUTTAL SAYS: where the Fisher matrix is well conditioned OGD at eta/sqrt(t) has the",
    "smaller slope; FTPL's stays near 1/2 even where it is badly conditioned, and OGD's does not.",
    "BEYOND IT: a lower bound on the Fisher matrix is sufficient, not necessary. With each feature",
    "twice it is singular and OGD does the same as before. On-policy the expected gradient never",
    "leads away from theta* (`downhill`), for any Fisher matrix and whatever stands for V*; what",
    "slows it is a small eigenvalue in a direction that pi* needs. Slopes over one decade are not",
    "asymptotic exponents.",
]


def log_linear(seed: int, num_rounds: int = 2000, num_worlds: int = 16) -> tuple[dict, list[str]]:
    """Part 4: regret of every learner, kind of Fisher matrix and V*, and the log."""
    row = "{:<13} {:<18} {:<18} {:>9} {:>16} {:>15} {:>9}".format
    lines = [*describe(seed, num_worlds)]
    lines.append(
        f"{num_worlds} problems, {num_rounds} rounds, B = {BATCH}, beta {BETA}; mean ± s.e."
    )
    head = ("V*", "learner", "Fisher", f"R({num_rounds // 10})", f"R({num_rounds})", "slope")
    lines.append(row(*head, "last KL"))
    runs, gaps = [], []
    for kind, name, fisher in itertools.product(("exact V*", "estimated V*"), LEARNERS, FISHERS):
        result, gap = play_one(name, fisher, kind, num_rounds, num_worlds, seed)
        run = {"v_star": kind, "learner": name, "fisher": fisher} | summary(result)
        tenth = next(i for i, t in enumerate(run["rounds"]) if t >= num_rounds / 10)
        end = f"{run['regret'][-1]:.3f} ± {run['stderr'][-1]:.3f}"
        slope = f"{run['slope']:.3f} ± {run['slope_stderr']:.3f}"
        first = f"{run['regret'][tenth]:.3f}"
        lines.append(row(kind, name, fisher, first, end, slope, f"{run['kl']:.0e}"))
        runs.append(run)
        gaps.append(gap)
    lines.append(f"FTPL's argmin misses the best of four long runs by {max(gaps):.0e} of the span.")
    noise, more = baseline_noise(seed, num_rounds // 2, num_worlds)
    return {"regret": runs, "noise": noise, "oracle_gap": max(gaps)}, lines + more + VERDICT


def summary(result: Play) -> dict:
    """Sum up a play over its problems; `kl` is the mean of the last tenth of rounds."""
    mean, error = mean_and_error(result.regret)
    each = [fit_slope(result.rounds, r) for r in result.regret.T if (r > 0).all()]
    spread = torch.tensor(each).std().item() / len(each) ** 0.5 if len(each) > 1 else math.nan
    last = result.kl[-(len(result.kl) // 10) :].mean().item()
    return {
        "rounds": result.rounds,
        "regret": mean.tolist(),
        "stderr": error.tolist(),
        "slope": fit_slope(result.rounds, mean),
        "slope_stderr": spread,
        "kl": max(last, 0.0),  # not -1e-18
    }


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over problems and its standard error, (n, S) -> (n,) twice."""
    return values.mean(dim=1), values.std(dim=1) / values.shape[1] ** 0.5


def describe(seed: int, num_worlds: int) -> list[str]:
    """The log of what the worlds are like: Fisher matrices, curvature, and the way downhill."""
    row = "{:<18} {:>8} {:>18} {:>16} {:>20} {:>10}".format
    lines = [
        "4. Log-linear policies: regret against rounds. The worlds, eigenvalues least to greatest:"
    ]
    head = (
        "Fisher",
        "|theta*|",
        "Fisher at pi_ref",
        "Fisher at pi*",
        "Hessian at pi_ref",
        "descent",
    )
    lines.append(row(*head))
    for fisher in FISHERS:
        world = make_world(num_worlds, fisher, seed)
        spans = []
        for logp in (world.ref_logp, optimal_logp(world)):
            spectrum = torch.linalg.eigvalsh(fisher_matrix(world.features, logp)).mean(dim=0)
            spans.append(f"{spectrum[0].clamp_min(0):.1g} to {spectrum[-1]:.2g}")
        low, high = start_curvature(world)
        along, variance = downhill(world, world.theta_star / 3)
        error = (along / variance - 1).abs().max().item()
        length = f"{world.theta_star.norm(dim=1).mean():.2f}"
        lines.append(row(fisher, length, *spans, f"{low:.0e} to {high:.0e}", f"{error:.0e}"))
    lines.append("descent: relative error of grad . (theta - theta*) = 2 beta^2 Var ln(pi_t / pi*)")
    return lines


def baseline_noise(seed: int, num_rounds: int, num_worlds: int) -> tuple[list, list[str]]:
    """KL to pi* of on-policy OGD at a constant step with each number in V*'s place, and the log."""
    data, lines = [], ["KL(pi_t | pi*) of on-policy OGD, constant step, Fisher identity"]
    for kind in ("exact V*", "estimated V*", "mean reward", "zero"):
        result, _ = play_one("OGD, eta constant", "identity", kind, num_rounds, num_worlds, seed)
        mean, error = mean_and_error(result.kl)
        kept = [t - 1 for t in result.rounds]
        run = {"v_star": kind, "rounds": result.rounds, "kl": mean[kept].tolist()}
        data.append(run | {"stderr": error[kept].tolist()})
        last = max(mean[-(num_rounds // 10) :].mean().item(), 0.0)  # not -1e-18
        lines.append(
            f"  {kind:<13} {mean[min(9, num_rounds - 1)]:.1e} in round 10, {last:.1e} at the end"
        )
    return data, lines


# ---------------------------------------------------------------------------------------------
# 5. Figures

COLOURS = dict(zip(FISHERS, ("tab:blue", "tab:green", "tab:red"), strict=True))
BASELINE_COLOURS = {
    "exact V*": "tab:blue",
    "estimated V*": "tab:green",
    "mean reward": "tab:orange",
}
BASELINE_COLOURS |= {"zero": "tab:red"}
WIDTHS = {"exact V*": 4.0, "mean reward": 2.4, "zero": 1.0}  # of lines that coincide


def draw_fixed_point(data: dict, out: Path) -> None:
    """Distance to pi* against steps, on-policy on the left, off-policy on the right."""
    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.2), layout="constrained", sharey=True)
    for axes, (name, part) in zip(panels, data.items(), strict=True):
        for baseline, exact, sampled in zip(BASELINES, part["exact"], part["sampled"], strict=True):
            colour, steps = BASELINE_COLOURS[baseline], part["steps"]
            axes.loglog(steps, sampled, color=colour, linewidth=1, linestyle=":")
            axes.loglog(steps, exact, color=colour, label=baseline, linewidth=WIDTHS[baseline])
        axes.set(title=f"{name} samples", xlabel="step", ylim=(1e-8, 1))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("total variation to π*")
    panels[0].annotate("solid: expectations (all three coincide)\ndotted: 64 sampled arms a step",
                       (0.03, 0.04), xycoords="axes fraction", fontsize=8)  # fmt: skip
    panels[1].legend(title="in V*'s place", fontsize=9, loc="lower left")
    save(figure, out)


def draw_limits(data: dict, out: Path) -> None:
    """V* against beta1 for each number right."""
    figure, axes = pyplot.subplots(figsize=(5.2, 3.4), layout="constrained")
    for k, values in enumerate(zip(*data["v_star"], strict=True)):
        axes.semilogx(data["beta1"], values, color=pyplot.cm.viridis(k / 9), linewidth=1.6)
        axes.annotate(f"{k}/8", (data["beta1"][-1], values[-1]), xytext=(4, 0), fontsize=8,
                      textcoords="offset points", va="center")  # fmt: skip
    axes.axvline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.annotate("published β1", (0.5, 0.02), xytext=(4, 4), fontsize=8, color="grey",
                  textcoords="offset points")  # fmt: skip
    axes.set(xlabel="β1", ylabel="V*", title="V*: best of 8 (left) to mean of 8 (right)")
    axes.grid(alpha=0.3)
    save(figure, out)


def draw_errors(data: dict, out: Path) -> None:
    """Standard error for several beta1 and several N, and the bias, against the success rate."""
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.3), layout="constrained")
    p = torch.linspace(0.001, 0.999, 500, dtype=FLOAT64)
    titles = ("s.e. of V*, N = 8", "s.e. of V*, β1 = 0.5", "bias of V*, N = 8")
    for axes, title, which in zip(panels, titles, (0, 0, 1), strict=True):
        by_n = axes is panels[1]
        for i, setting in enumerate(NUM_SAMPLES if by_n else BETA1S):
            n, beta1 = (setting, 0.5) if by_n else (8, setting)
            label, colour = f"N = {n}" if by_n else f"β1 = {beta1:g}", pyplot.cm.viridis(i / 4.5)
            exact = exact_error(p, n, beta1)[which]
            axes.plot(p, exact, color=colour, label=label)
            [row] = [r for r in data["rows"] if (r["n"], r["beta1"]) == (n, beta1)]
            axes.plot(row["sim_p"], row[("sim_se", "sim_bias")[which]], ".", color=colour)
            if which == 0:
                top = exact.argmax()
                axes.plot(p[top], exact[top], "v", color=colour, markersize=7)
                delta = delta_method(p, n, beta1)[0]
                axes.plot(p, delta, color=colour, linestyle=":", linewidth=1)
        axes.set(title=title, xlabel="success rate p", xlim=(0, 1))
        axes.axvline(0.5, color="grey", linewidth=0.8, alpha=0.6)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, ncols=2 if by_n else 1)
    panels[0].set_ylim(0, 0.45)
    panels[1].set_ylim(0, 0.75)
    figure.suptitle(
        "lines exact, dots simulated, dotted the delta method, triangle the largest", fontsize=9
    )
    save(figure, out)


def draw_regret(data: dict, out: Path) -> None:
    """Regret against rounds with exact and estimated V*; KL of OGD with each baseline."""
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.7), layout="constrained")
    styles = dict(zip(LEARNERS, ("-", ":", "--"), strict=True))
    for axes, kind in zip(panels, ("exact V*", "estimated V*"), strict=False):
        for run in data["regret"]:
            steady = run["learner"] == "OGD, eta constant"
            if run["v_star"] == kind and (not steady or run["fisher"] == "badly conditioned"):
                label = f"{run['learner']}; {run['fisher']}; {run['slope']:.2f}"
                band(axes, run, styles[run["learner"]], label)
        axes.set(title=f"regret, {kind}", xlabel="rounds T", xscale="log", yscale="log")
        axes.set_ylim(0.2, 5e3)  # room for the legend
        axes.legend(loc="upper left", fontsize=7, title_fontsize=7,
                    title="learner; Fisher matrix; slope of last decade")  # fmt: skip
    for run in data["noise"]:
        panels[2].plot(run["rounds"], run["kl"], color=BASELINE_COLOURS[run["v_star"]],
                       label=run["v_star"])  # fmt: skip
    panels[2].set(title="KL to π*, OGD at a constant step", xlabel="round", xscale="log",
                  yscale="log", ylim=(1e-12, 1))  # fmt: skip
    panels[2].legend(fontsize=8, title="in V*'s place", title_fontsize=8)
    for axes in panels:
        axes.grid(alpha=0.3)
    save(figure, out)


def band(axes: pyplot.Axes, run: dict, style: str, label: str) -> None:
    """A line of mean regret with a band of two standard errors around it."""
    pairs, colour = list(zip(run["regret"], run["stderr"], strict=True)), COLOURS[run["fisher"]]
    low, high = ([mean + sign * 2 * error for mean, error in pairs] for sign in (-1, 1))
    axes.fill_between(run["rounds"], low, high, color=colour, alpha=0.15, linewidth=0)
    width = (
        3.5 if run["fisher"] == "identity" and style == "-" else 1.4
    )  # OGD's lines for the first two coincide
    axes.plot(run["rounds"], run["regret"], color=colour, linestyle=style, linewidth=width,
              label=label)  # fmt: skip


def rounded(data: object) -> object:
    """Six digits are enough for JSON that is kept in git; containers within containers."""
    if isinstance(data, dict):
        return {key: rounded(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [rounded(value) for value in data]
    return float(f"{data:.6g}") if isinstance(data, float) else data


def save(figure: pyplot.Figure, out: Path) -> None:
    """Write a PNG and forget the figure."""
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------
# 6. The command


def main() -> None:
    """Run the four parts; print and keep the log, the numbers and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("experiments/results"), help="folder")
    parser.add_argument("--seed", type=int, default=0, help="of samples and worlds")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # tensors are tiny
    start, data = time.perf_counter(), {}
    log = [f"$ python -m experiments.theory --out {args.out} --seed {args.seed}"]
    parts = {
        "fixed-point": (lambda: fixed_point(args.seed), draw_fixed_point),
        "v-star": (limits, draw_limits),
        "standard-error": (lambda: standard_errors(args.seed), draw_errors),
        "log-linear": (lambda: log_linear(args.seed), draw_regret),
    }
    for name, (compute, draw) in parts.items():
        data[name], lines = compute()
        draw(data[name], args.out / f"theory-{name}.png")
        print("\n".join(lines), flush=True)
        log += ["", *lines]
    log.append(f"\n{time.perf_counter() - start:.0f} s on one thread")
    print(log[-1])
    problems.write_whole(args.out / "theory.json", json.dumps(rounded(data)) + "\n")
    problems.write_whole(args.out / "theory.txt", "\n".join(log) + "\n")


if __name__ == "__main__":
    problems.run(main)
