"""The regret of the regression with log-linear policies: gradient descent and perturbed leader.

Question: does online learning with the paper's loss reach pi*, and must the Fisher matrix be well
          conditioned for it?
Command:  python -m experiments.regret
Time:     a minute on one core. There is no model.
Output:   regret.txt, regret.json and regret.png in experiments/results.
Answer:
  1. The regret of online gradient descent stops growing where the Fisher matrix is the identity,
     and even where it is singular. It grows where an eigenvalue is small. There,
     follow-the-perturbed-leader is better, with regret of about the square root of the rounds.
  2. At a constant step, the exact V* takes gradient descent to pi*. Any other number in its place
     leaves the policy at a distance, because its gradients stay noisy.

The policies are pi_theta(y|x) = pi_ref(y|x) exp(theta . phi(x, y)) / Z(x). Rewards are 0 or 1 and
lie in the span of the features, so pi* = pi_theta* for some theta*. In round t the learner plays
theta_t and sees B prompts with one response each from pi_t = pi_theta_t. Then

    l_t(theta)  = E_x E_{y ~ pi_t} (beta ln(pi_theta / pi_ref)(y|x) - (r(x, y) - V*(x)))^2
    regret R(T) = l_1(theta_1) + ... + l_T(theta_T) - min over theta of the same sum at theta

With the exact V* the minimum is 0, at theta*. So the regret is the sum of the losses. Three
parametrisations of the same policies differ in the Fisher matrix E_x Cov_{y ~ pi} phi(x, y) at
pi_ref: the identity, singular (each feature is there twice), and badly conditioned (eigenvalues
from 1 to 1e-3).
"""

import argparse
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import pyplot
from torch import Tensor

import losses
from apo import command_line
from apo.files import check_writable
from experiments.plot import COLOURS, Label, finish, label_lines, save
from experiments.theory import BETA, FLOAT64, checkpoints, expected_loss, write_results

NUM_PROMPTS = 16  # P
NUM_RESPONSES = 8  # K, all that a prompt has
NUM_FEATURES = 6  # d; 12 with the singular Fisher matrix
BATCH = 16  # B
STEP_SIZE = 2.0
LEARNERS = ("OGD, step ~ 1/sqrt(t)", "OGD, constant step", "FTPL")
BASELINES = ("exact V*", "V* from 8 samples", "mean reward", "zero")
FISHERS = ("identity", "singular", "badly conditioned")


# ---------------------------------------------------------------------------------------------
# 1. The problems


class World(NamedTuple):
    """S independent problems with P prompts, K responses to each and d features."""

    rewards: Tensor  # (S, P, K), 0 or 1
    ref_logp: Tensor  # (S, P, K)
    features: Tensor  # (S, P, K, d)
    v_star: Tensor  # (S, P), what the regression uses for V*
    theta_star: Tensor  # (S, d), the parameters of pi*


def make_world(num_worlds: int, fisher: str, seed: int) -> World:
    """Make problems in which pi* is log-linear, though no single feature is the reward.

    A seed gives the same rewards and the same pi_ref for every kind of Fisher matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (num_worlds, NUM_PROMPTS, NUM_RESPONSES)
    rewards = (torch.rand(shape, dtype=FLOAT64, generator=generator) < 0.3).to(FLOAT64)
    # Each prompt has a right and a wrong response.
    rewards[..., 0] = 1.0
    rewards[..., 1] = 0.0
    ref_logp = (torch.randn(shape, dtype=FLOAT64, generator=generator) / 2).log_softmax(dim=2)
    v_star = BETA * (ref_logp + rewards / BETA).logsumexp(dim=2)

    # Features with the identity for a Fisher matrix: the reward and random numbers, whitened.
    others = (*shape, NUM_FEATURES - 1)
    random_features = torch.randn(others, dtype=FLOAT64, generator=generator)
    raw = centre(torch.cat([rewards[..., None], random_features], dim=-1), ref_logp)
    root = torch.linalg.cholesky(fisher_matrix(raw, ref_logp)).mT
    # A reflection spreads theta* evenly over all features. Without it only the first would count.
    identity = torch.eye(NUM_FEATURES, dtype=FLOAT64)
    axis = identity[0] - NUM_FEATURES**-0.5
    reflection = identity - 2 * axis.outer(axis) / axis.dot(axis)
    mixing = root.inverse() @ reflection
    features = raw @ mixing[:, None]
    theta_star = mixing.inverse()[:, :, 0] / BETA

    if fisher == "singular":
        features = torch.cat([features, features], dim=-1) / math.sqrt(2)
        theta_star = torch.cat([theta_star, theta_star], dim=-1) / math.sqrt(2)
    elif fisher == "badly conditioned":
        scale = 10 ** -torch.linspace(0, 1.5, NUM_FEATURES, dtype=FLOAT64)
        features = features * scale
        theta_star = theta_star / scale
    return World(rewards, ref_logp, features, v_star, theta_star)


def centre(features: Tensor, logp: Tensor) -> Tensor:
    """Subtract each prompt's mean under the policy, (S, P, K, d) -> (S, P, K, d)."""
    mean = (logp.exp()[..., None] * features).sum(dim=2, keepdim=True)
    return features - mean


def fisher_matrix(features: Tensor, logp: Tensor) -> Tensor:
    """Return E_x Cov_{y ~ pi} phi(x, y), (S, P, K, d) and (S, P, K) -> (S, d, d)."""
    centred = centre(features, logp)
    return torch.einsum("spki,spk,spkj->sij", centred, logp.exp() / NUM_PROMPTS, centred)


def with_baseline(world: World, baseline: str, seed: int) -> World:
    """Put something else in the place of V*: its estimate from 8 responses, the mean, or zero."""
    p = world.ref_logp.exp()
    if baseline == "V* from 8 samples":
        generator = torch.Generator().manual_seed(seed)
        draws = torch.multinomial(p.flatten(0, 1), 8, replacement=True, generator=generator)
        rewards = world.rewards.flatten(0, 1).gather(1, draws)
        estimates = losses.optimal_value(rewards, BETA)
        return world._replace(v_star=estimates.view_as(world.v_star))
    if baseline == "mean reward":
        return world._replace(v_star=(p * world.rewards).sum(dim=2))
    if baseline == "zero":
        return world._replace(v_star=torch.zeros_like(world.v_star))
    return world


def log_policy(world: World, theta: Tensor) -> Tensor:
    """Return ln pi_theta, (S, d) -> (S, P, K)."""
    scores = torch.einsum("spkd,sd->spk", world.features, theta)
    return (world.ref_logp + scores).log_softmax(dim=2)


def world_loss(world: World, theta: Tensor, weights: Tensor) -> Tensor:
    """Return the loss of theta, weighted by prompt and response: (S, d), (S, P, K) -> (S,)."""
    v_star = world.v_star[..., None].expand_as(world.rewards)
    return expected_loss(
        weights.flatten(1),
        log_policy(world, theta).flatten(1),
        world.ref_logp.flatten(1),
        world.rewards.flatten(1),
        v_star.flatten(1),
    )


def loss_gradient(world: World, theta: Tensor, weights: Tensor) -> Tensor:
    """Return the gradient of `world_loss` in theta, (S, d)."""
    theta = theta.detach().requires_grad_()
    loss = world_loss(world, theta, weights)
    return torch.autograd.grad(loss.sum(), theta)[0]


# ---------------------------------------------------------------------------------------------
# 2. The learners

# A learner maps (theta_t, the round's batch as weights (S, P, K), t) to theta_t+1.
Learner = Callable[[Tensor, Tensor, int], Tensor]


def gradient_descent(world: World, power: float) -> Learner:
    """Online gradient descent (OGD) with step sizes STEP_SIZE / t^power."""

    def learn(theta: Tensor, batch: Tensor, t: int) -> Tensor:
        return theta - STEP_SIZE * t**-power * loss_gradient(world, theta, batch)

    return learn


def perturbed_leader(world: World, seed: int) -> Learner:
    """Follow the perturbed leader (FTPL): minimise all losses so far, minus a random slope.

    theta_t+1 = argmin over |theta| <= 2 |theta*| of (sum of the batches' losses) - noise . theta,
    where the noise is 0.03 sqrt(t) times exponential numbers, new in every round. Two Gauss-Newton
    steps from theta_t stand for the argmin.
    """
    generator = torch.Generator().manual_seed(seed)
    radius = 2 * world.theta_star.norm(dim=1)
    seen = torch.zeros_like(world.rewards)

    def learn(theta: Tensor, batch: Tensor, t: int) -> Tensor:
        seen.add_(batch)
        noise = torch.empty_like(theta).exponential_(generator=generator)
        for _ in range(2):
            theta = gauss_newton(world, theta, seen, 0.03 * math.sqrt(t) * noise, radius)
        return theta

    return learn


def gauss_newton(
    world: World, theta: Tensor, weights: Tensor, noise: Tensor, radius: Tensor
) -> Tensor:
    """Minimise a quadratic model of `world_loss` - noise . theta over the ball, -> (S, d).

    The model takes ln pi as linear in theta. Its minimum is (H + mu)^-1 g with the least mu >= 0
    that keeps it in the ball, which also covers a singular H. Bisection finds mu.
    """
    jacobian = BETA * centre(world.features, log_policy(world, theta))
    hessian = 2 * torch.einsum("spki,spk,spkj->sij", jacobian, weights, jacobian)
    slope = noise - loss_gradient(world, theta, weights)
    linear = torch.einsum("sij,sj->si", hessian, theta) + slope
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    rotated = torch.einsum("sij,si->sj", vectors, linear)
    low = torch.zeros_like(radius)
    high = linear.norm(dim=1) / radius + 1e-12
    for _ in range(30):
        middle = (low + high) / 2
        length = (rotated / (eigenvalues.clamp_min(0) + middle[:, None])).norm(dim=1)
        low = torch.where(length > radius, middle, low)
        high = torch.where(length > radius, high, middle)
    solution = rotated / (eigenvalues.clamp_min(0) + high[:, None])
    return torch.einsum("sij,sj->si", vectors, solution)


# ---------------------------------------------------------------------------------------------
# 3. The game


class Play(NamedTuple):
    """What a learner did in T rounds of S problems: the regret and E_x KL(pi_t | pi*), (T, S)."""

    regret: Tensor
    kl: Tensor


def play(world: World, learn: Learner, num_rounds: int, seed: int) -> Play:
    """Let a learner play from theta_1 = 0, which is pi_ref. The regret assumes the exact V*."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.zeros_like(world.theta_star)
    optimal = log_policy(world, world.theta_star)
    loss = []
    kl = []
    for t in range(1, num_rounds + 1):
        logp = log_policy(world, theta)
        p = logp.exp() / NUM_PROMPTS
        loss.append(world_loss(world, theta, p))
        kl.append((p * (logp - optimal)).sum(dim=(1, 2)))
        drawn = torch.multinomial(p.flatten(1), BATCH, replacement=True, generator=generator)
        batch = torch.zeros_like(p)
        batch.flatten(1).scatter_add_(1, drawn, torch.full_like(drawn, 1 / BATCH, dtype=FLOAT64))
        theta = learn(theta, batch, t)
    return Play(torch.stack(loss).cumsum(dim=0), torch.stack(kl))


def fit_slope(regret: Tensor) -> float:
    """Fit regret ~ T^a over the last decade of rounds, by least squares on log axes, (T,) -> a."""
    rounds = [t for t in checkpoints(len(regret)) if t >= len(regret) / 10]
    x = torch.tensor(rounds, dtype=FLOAT64).log()
    y = regret[torch.tensor(rounds) - 1].log()
    x = x - x.mean()
    return (x.dot(y) / x.dot(x)).item()


def make_learner(name: str, world: World, seed: int) -> Learner:
    """Make one of the three learners."""
    if name == "FTPL":
        return perturbed_leader(world, seed)
    if name == "OGD, constant step":
        return gradient_descent(world, power=0.0)
    return gradient_descent(world, power=0.5)


def at_checkpoints(values: Tensor) -> list[float]:
    """Take a few values of a curve, evenly spread on a log scale of rounds, (T,) -> list."""
    return values[torch.tensor(checkpoints(len(values))) - 1].tolist()


# ---------------------------------------------------------------------------------------------
# 4. The command


class Regret(NamedTuple):
    """The regret of one learner with one kind of Fisher matrix, and its standard error at T."""

    learner: str
    fisher: str
    curve: list[float]  # at the checkpoints; a mean over the problems
    stderr: float
    slope: float


class Distance(NamedTuple):
    """KL(pi_t | pi*) of gradient descent with one number in the place of V*."""

    baseline: str
    curve: list[float]  # at the checkpoints; a mean over the problems
    last: float  # mean of the last tenth of the rounds


def measure_regret(
    learner: str, fisher: str, seed: int, num_rounds: int, num_worlds: int
) -> Regret:
    """Play one learner with the exact V*."""
    world = make_world(num_worlds, fisher, seed)
    played = play(world, make_learner(learner, world, seed + 3), num_rounds, seed + 2)
    mean = played.regret.mean(dim=1)
    stderr = played.regret[-1].std().item() / math.sqrt(num_worlds)
    return Regret(learner, fisher, at_checkpoints(mean), stderr, fit_slope(mean))


def measure_distance(baseline: str, seed: int, num_rounds: int, num_worlds: int) -> Distance:
    """Play gradient descent at a constant step, Fisher identity, with a number in V*'s place."""
    world = with_baseline(make_world(num_worlds, "identity", seed), baseline, seed + 1)
    played = play(world, gradient_descent(world, power=0.0), num_rounds, seed + 2)
    kl = played.kl.mean(dim=1).clamp_min(0)  # rounding can make a zero negative
    last = kl[-(num_rounds // 10) :].mean().item()
    return Distance(baseline, at_checkpoints(kl), last)


def make_log(regrets: list[Regret], distances: list[Distance]) -> list[str]:
    """Lay out the results as two tables."""
    log = [
        "Regret with the exact V*, mean ± s.e. over problems, and its slope on log axes over the"
    ]
    log.append("last decade of rounds:")
    for found in regrets:
        value = f"{found.curve[-1]:.3f} ± {found.stderr:.3f}"
        log.append(f"  {found.learner:<23} {found.fisher:<18} {value:>16} {found.slope:>6.2f}")
    log.append(
        "KL(pi_t | pi*) of OGD at a constant step, Fisher identity, at the end of half as many"
    )
    log.append("rounds, with this in V*'s place:")
    for found in distances:
        log.append(f"  {found.baseline:<18} {found.last:.1e}")
    return log


def draw(rounds: int, regrets: list[Regret], distances: list[Distance], out: Path) -> None:
    """Draw regret against rounds, and the distance to pi* with each number in V*'s place."""
    figure, panels = pyplot.subplots(1, 2, figsize=(8.2, 3.6), layout="constrained")
    left, right = panels
    colours = dict(zip(FISHERS, COLOURS, strict=False))
    styles = {"OGD, step ~ 1/sqrt(t)": "-", "FTPL": "--"}
    labels = []
    for found in regrets:
        if found.learner not in styles:
            continue
        colour = colours[found.fisher]
        name = f"{found.learner.split(',')[0]}, {found.fisher}"
        width = 1.5
        if name == "OGD, identity":
            # The line of the singular matrix coincides. It is drawn on top, and thinner.
            name = "OGD, identity and singular"
            width = 3.5
        style = styles[found.learner]
        left.loglog(checkpoints(rounds), found.curve, style, color=colour, linewidth=width)
        if name != "OGD, singular":
            labels.append(Label(name, found.curve[-1], colour))
    finish(left, "A small eigenvalue makes OGD's regret grow", "round T", "regret R(T)")
    label_lines(left, labels)
    labels = []
    for found, colour in zip(distances, COLOURS, strict=False):
        right.loglog(checkpoints(rounds // 2), found.curve, color=colour, linewidth=1.5)
        labels.append(Label(found.baseline, found.last, colour))
    right.set_ylim(1e-10, 3)
    finish(right, "Only the exact V* takes OGD to π*", "round t", "KL(π_t | π*) (nats)")
    label_lines(right, labels)
    save(figure, out)


def main() -> None:
    """Play all games. Print and keep the log, the numbers and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("experiments/results"), help="folder")
    add("--seed", type=command_line.seed, default=0, help="seed of the problems and of all samples")
    add("--rounds", type=command_line.positive_integer, default=2000, help="rounds T")
    add("--worlds", type=command_line.positive_integer, default=16, help="independent problems")
    args = parser.parse_args()
    check_writable(args.out, is_folder=True)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the tensors are tiny
    start = time.process_time()
    regrets = []
    for learner, fisher in itertools.product(LEARNERS, FISHERS):
        regrets.append(measure_regret(learner, fisher, args.seed, args.rounds, args.worlds))
    distances = []
    for baseline in BASELINES:
        distances.append(measure_distance(baseline, args.seed, args.rounds // 2, args.worlds))
    draw(args.rounds, regrets, distances, args.out / "regret.png")
    log = [
        f"$ python -m experiments.regret --seed {args.seed} --rounds {args.rounds} "
        f"--worlds {args.worlds}",
        "",
        *make_log(regrets, distances),
        "",
        f"{time.process_time() - start:.0f} s of one core",
    ]
    data = {
        "rounds": checkpoints(args.rounds),
        "regret": [found._asdict() for found in regrets],
        "rounds_of_kl": checkpoints(args.rounds // 2),
        "kl": [found._asdict() for found in distances],
    }
    write_results(args.out / "regret", log, data)
    print("\n".join(log))


if __name__ == "__main__":
    command_line.run(main)
