"""Online learning with the loss of losses.py and log-linear policies, in small.

With the exact V*, the noise of online gradient descent dies out. No other number does that. What
experiments.regret adds (problems, Fisher matrices, the learners, the slope) is compared with closed
forms and brute force.
"""

import json
import sys

import pytest
import torch

from experiments import regret
from experiments.theory import FLOAT64


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread, as tensors so small gain nothing from a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------
# The problems


@pytest.mark.parametrize("fisher", regret.FISHERS)
def test_the_optimal_policy_is_log_linear(fisher: str) -> None:
    """It has zero loss under any sampler, and the Fisher matrix is the one that is named."""
    world = regret.make_world(3, fisher, 0)
    optimal = (world.ref_logp + world.rewards / regret.BETA).log_softmax(dim=2)
    found = regret.log_policy(world, world.theta_star)
    torch.testing.assert_close(found, optimal, rtol=0, atol=1e-9)
    weights = torch.rand(world.rewards.shape, dtype=FLOAT64, generator=seeded())
    assert regret.world_loss(world, world.theta_star, weights).max() < 1e-18
    spectrum = torch.linalg.eigvalsh(regret.fisher_matrix(world.features, world.ref_logp))
    least = {"identity": 1, "singular": 0, "badly conditioned": 1e-3}[fisher]
    assert spectrum[:, 0].tolist() == pytest.approx([least] * 3, abs=1e-9)
    assert spectrum[:, -1].tolist() == pytest.approx([1] * 3, abs=1e-9)


@pytest.mark.parametrize("baseline", regret.BASELINES)
def test_the_expected_step_leads_to_the_optimum(baseline: str) -> None:
    """On-policy, the gradient along theta - theta* is 2 beta^2 Var ln(pi / pi*), for any V*."""
    world = regret.make_world(4, "badly conditioned", 1)
    world = regret.with_baseline(world, baseline, 2)
    theta = torch.randn(world.theta_star.shape, dtype=FLOAT64, generator=seeded())
    logp = regret.log_policy(world, theta)
    policy = logp.exp()
    gradient = regret.loss_gradient(world, theta, policy / regret.NUM_PROMPTS)
    along = (gradient * (theta - world.theta_star)).sum(dim=1)

    ratio = logp - regret.log_policy(world, world.theta_star)
    mean = (policy * ratio).sum(dim=2, keepdim=True)
    variance = (policy * (ratio - mean).square()).sum(dim=2).mean(dim=1)
    assert (variance > 0).all()
    torch.testing.assert_close(along, 2 * regret.BETA**2 * variance, rtol=1e-9, atol=0)


def test_baselines_are_what_their_names_say() -> None:
    world = regret.make_world(2, "identity", 0)
    mean = regret.with_baseline(world, "mean reward", 1).v_star
    estimate = regret.with_baseline(world, "V* from 8 samples", 1).v_star
    zero = regret.with_baseline(world, "zero", 1).v_star
    assert (mean < world.v_star).all()
    assert (zero == 0).all()
    assert 0.01 < (estimate - world.v_star).abs().mean() < 0.3
    assert torch.equal(regret.with_baseline(world, "exact V*", 1).v_star, world.v_star)


# ---------------------------------------------------------------------------------------------
# Gradient descent


def descend(baseline: str, fisher: str = "identity", rounds: int = 250) -> regret.Play:
    world = regret.with_baseline(regret.make_world(4, fisher, 0), baseline, 1)
    return regret.play(world, regret.gradient_descent(world, power=0.0), rounds, 2)


def test_gradient_descent_converges_with_the_exact_v_star() -> None:
    """At a constant step: the gradient of every single sample vanishes at pi*."""
    played = descend("exact V*")
    assert played.kl[0].min() > 0.3
    assert played.kl[-1].max() < 1e-9
    assert played.regret[-1].max() < 2
    assert regret.fit_slope(played.regret.mean(dim=1)) < 0.1


@pytest.mark.parametrize("baseline", ["V* from 8 samples", "mean reward", "zero"])
def test_gradient_descent_stays_noisy_with_any_other_number(baseline: str) -> None:
    """It comes near pi*, because the expected step is the same, but not nearer."""
    assert 1e-4 < descend(baseline).kl[-100:].mean() < 0.3


def test_a_singular_fisher_matrix_does_not_slow_gradient_descent_and_a_small_eigenvalue_does() -> (
    None
):
    identity = descend("exact V*", "identity", 60)
    singular = descend("exact V*", "singular", 60)
    bad = descend("exact V*", "badly conditioned", 60)
    torch.testing.assert_close(singular.kl, identity.kl, rtol=1e-6, atol=1e-12)
    assert bad.kl[-1].min() > 100 * identity.kl[-1].max()


# ---------------------------------------------------------------------------------------------
# The perturbed leader


@pytest.mark.parametrize("fisher", regret.FISHERS)
def test_the_perturbed_leader_has_sublinear_regret(fisher: str) -> None:
    world = regret.make_world(4, fisher, 0)
    played = regret.play(world, regret.perturbed_leader(world, seed=3), 60, 2)
    mean = played.regret.mean(dim=1)
    assert (mean.diff() > 0).all()
    assert regret.fit_slope(mean) < 0.9
    if fisher != "badly conditioned":
        assert played.kl[-20:].mean() < 0.1 * played.kl[0].mean()


@pytest.mark.parametrize("fisher", regret.FISHERS)
def test_two_steps_a_round_keep_the_leader_near_the_minimum(fisher: str) -> None:
    """Forty Gauss-Newton steps from four places find nothing that is better by 1 %."""
    world = regret.make_world(4, fisher, 0)
    radius = 2 * world.theta_star.norm(dim=1)
    generator = seeded(1)
    seen = torch.zeros_like(world.rewards)
    theta = torch.zeros_like(world.theta_star)
    for t in range(1, 101):
        p = regret.log_policy(world, theta).exp()
        seen += p / regret.NUM_PROMPTS
        noise = torch.empty_like(theta).exponential_(generator=generator)
        noise = 0.03 * t**0.5 * noise
        for _ in range(2):
            theta = regret.gauss_newton(world, theta, seen, noise, radius)

    def objective(point: torch.Tensor) -> torch.Tensor:
        return regret.world_loss(world, point, seen) - (noise * point).sum(dim=1)

    zero = torch.zeros_like(theta)
    best = objective(theta)
    for start in (theta, zero, world.theta_star, -world.theta_star):
        point = start
        for _ in range(40):
            point = regret.gauss_newton(world, point, seen, noise, radius)
            best = torch.minimum(best, objective(point))
    gap = (objective(theta) - best) / (objective(zero) - best)
    assert gap.max() < 0.01


def test_the_leader_without_noise_is_the_optimum() -> None:
    world = regret.make_world(4, "identity", 0)
    weights = torch.rand(world.rewards.shape, dtype=FLOAT64, generator=seeded())
    theta = torch.zeros_like(world.theta_star)
    radius = 2 * world.theta_star.norm(dim=1)
    for _ in range(30):
        theta = regret.gauss_newton(world, theta, weights, torch.zeros_like(theta), radius)
    assert (theta - world.theta_star).abs().max() < 1e-6


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_a_step_stays_in_the_ball_and_no_point_there_is_lower(share: float) -> None:
    """The quadratic model, at a radius that binds, against 20,000 random points of the ball."""
    world = regret.make_world(3, "badly conditioned", 0)
    weights = world.ref_logp.exp() / regret.NUM_PROMPTS
    theta = torch.zeros_like(world.theta_star)
    radius = share * world.theta_star.norm(dim=1)
    noise = torch.zeros_like(theta)
    found = regret.gauss_newton(world, theta, weights, noise, radius)
    assert (found.norm(dim=1) <= radius * (1 + 1e-6)).all()

    hessian = 2 * regret.BETA**2 * regret.fisher_matrix(world.features, world.ref_logp)
    gradient = regret.loss_gradient(world, theta, weights)

    def model(points: torch.Tensor) -> torch.Tensor:
        curved = torch.einsum("...si,sij,...sj->...s", points, hessian, points) / 2
        return curved + (gradient * points).sum(dim=-1)

    others = torch.randn(20_000, *theta.shape, dtype=FLOAT64, generator=seeded(2))
    lengths = torch.rand(20_000, 3, dtype=FLOAT64, generator=seeded(3)) * radius
    others = others / others.norm(dim=-1, keepdim=True) * lengths[..., None]
    assert (model(others).amin(dim=0) >= model(found) - 1e-9).all()


def test_the_slope_of_a_power_law_is_its_exponent() -> None:
    rounds = torch.arange(1, 1001, dtype=FLOAT64)
    assert regret.fit_slope(3 * rounds**0.5) == pytest.approx(0.5, abs=1e-9)


def test_the_command_writes_log_numbers_and_a_picture(tmp_path, monkeypatch, capsys) -> None:
    few = ["--rounds", "24", "--worlds", "2", "--seed", "3"]
    monkeypatch.setattr(sys, "argv", ["regret", "--out", str(tmp_path), *few])
    regret.main()
    log = (tmp_path / "regret.txt").read_text()
    assert log == capsys.readouterr().out
    assert "--seed 3 --rounds 24 --worlds 2" in log
    data = json.loads((tmp_path / "regret.json").read_text())
    assert len(data["regret"]) == 9 and len(data["kl"]) == 4
    assert len(data["regret"][0]["curve"]) == len(data["rounds"])
    assert (tmp_path / "regret.png").exists()
