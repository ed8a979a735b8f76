"""The theory in small: a fork that is no longer A*-PO does not pass.

The subjects are losses.py, through experiments.theory: off-policy regression reaches pi* with the
exact V* alone; with it the noise of online gradient descent dies out, which no other baseline does;
V*'s standard error against all 2^N draws. What theory.py adds of its own (weights, Fisher matrices,
the oracle of FTPL, the slope) is held against brute force.
"""

import itertools
import json
import math
import sys

import pytest
import torch

import losses
from experiments import theory

FLOAT64 = torch.float64


@pytest.fixture(autouse=True)
def one_thread():
    """So small tensors gain nothing from a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------
# The fixed point


def test_weights_are_samples_repeated() -> None:
    """The root of a weight goes into all four tensors, or the weighted loss is another loss."""
    tensors = torch.randn(4, 2, 3, dtype=FLOAT64, generator=seeded())
    counts = torch.tensor([[1, 2, 3], [4, 0, 1]])
    weighted = theory.weighted_loss(counts.to(FLOAT64), *tensors, 0.3)
    for row in range(2):
        repeated = (x[row].repeat_interleave(counts[row]) for x in tensors)
        total = counts[row].sum() * losses.a_star_po_loss(*repeated, 0.3)
        assert weighted[row].item() == pytest.approx(total.item(), rel=1e-12)


@pytest.mark.parametrize("batch", [None, 64])
def test_off_policy_only_the_exact_v_star_reaches_the_optimal_policy(batch: int | None) -> None:
    distances, loss = theory.regress(False, batch, 800, seeded())
    exact, mean, zero = distances[-1].tolist()
    assert exact < 1e-3 < 0.03 < min(mean, zero)
    assert loss[0] < 1e-6 < 0.01 < min(loss[1:])


def test_on_policy_any_baseline_reaches_the_optimal_policy() -> None:
    """Positive loss and all: that is why no on-policy test can tell that V* is wrong."""
    distances, loss = theory.regress(True, None, 800, seeded())
    assert distances[-1].max() < 1e-3
    assert loss[0] < 1e-6 < 0.01 < min(loss[1:])
    spread = distances.amax(dim=1) - distances.amin(dim=1)
    assert spread.max() < 1e-9  # the same expected gradient, so the same path


def test_the_optimal_arms_satisfy_the_equation() -> None:
    """beta ln(pi* / pi_ref) = r - V*, with losses.py's V*."""
    left = theory.BETA * (theory.optimal_arms().log() - theory.REF.log())
    right = theory.ARM_REWARDS - theory.arm_baselines()[0]
    torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------------
# V* and its standard error


def test_v_star_falls_from_the_best_to_the_mean() -> None:
    table = theory.value_table([1e-9, 0.1, 0.5, 1, 10, 1e9])
    k = torch.arange(9, dtype=FLOAT64)
    torch.testing.assert_close(table[0], (k > 0).to(FLOAT64), rtol=0, atol=1e-8)
    torch.testing.assert_close(table[-1], k / 8, rtol=0, atol=1e-8)
    assert (table.diff(dim=0)[:, 1:-1] < 0).all()
    published = [0, 0.2935, 0.4772, 0.6113, 0.7169, 0.8040, 0.8782, 0.9428, 1]
    assert table[2].tolist() == pytest.approx(published, abs=5e-5)


@pytest.mark.parametrize("beta1", theory.BETA1S)
@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_exact_error_by_enumeration(n: int, beta1: float) -> None:
    """All 2^N draws one by one, with V* as equation (1) is written."""
    draws = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)), dtype=FLOAT64)
    estimates = beta1 * (draws / beta1).exp().mean(dim=1).log()
    for p in (0.05, 0.5, 0.9):
        chance = (draws * p + (1 - draws) * (1 - p)).prod(dim=1)
        mean = (chance * estimates).sum()
        error = (chance * (estimates - mean).square()).sum().sqrt()
        true = beta1 * math.log(p * math.exp(1 / beta1) + 1 - p)
        found = theory.exact_error(torch.tensor([p], dtype=FLOAT64), n, beta1)
        assert found[0].item() == pytest.approx(error.item(), abs=1e-9)
        assert found[1].item() == pytest.approx(mean.item() - true, abs=1e-9)
        assert found[1] < 0


def test_delta_method_is_the_limit_of_many_samples() -> None:
    """Its error is of the next order: a tenth of it when N is ten times as large."""
    p = torch.linspace(0.1, 0.9, 9, dtype=FLOAT64)
    off = []
    for n in (32, 320):
        pairs = zip(theory.delta_method(p, n, 0.5), theory.exact_error(p, n, 0.5), strict=True)
        off.append([(delta / exact - 1).abs().max().item() for delta, exact in pairs])
    assert max(off[0]) < 0.3
    assert max(off[1]) < 0.03


def test_simulated_error_is_the_exact_one() -> None:
    p = torch.tensor([0.1, 0.18, 0.5], dtype=FLOAT64)
    (se, bias), (exact_se, exact_bias) = (
        theory.simulated_error(p, 8, 0.5, 20_000, seeded()),
        theory.exact_error(p, 8, 0.5),
    )
    torch.testing.assert_close(se, exact_se, rtol=0.03, atol=0)
    torch.testing.assert_close(bias, exact_bias, rtol=0, atol=5 * 0.22 / 20_000**0.5)


@pytest.mark.parametrize(
    ("n", "beta1", "where", "se"),
    [(1, 0.5, 0.5, 0.5), (8, 0.5, 0.18, 0.2114), (32, 0.5, 0.13, 0.1048), (8, 10.0, 0.48, 0.1769)],
)
def test_standard_error_is_largest_at_low_success_rates(
    n: int, beta1: float, where: float, se: float
) -> None:
    """At one half for N = 1 only, whatever the rebuttal says."""
    p = theory.success_rates()
    error = theory.exact_error(p, n, beta1)[0]
    assert p[error.argmax()].item() == pytest.approx(where, abs=0.006)
    assert error.max().item() == pytest.approx(se, abs=1e-4)
    delta = theory.delta_method(p, n, beta1)[0]
    assert p[delta.argmax()].item() == pytest.approx(1 / (1 + math.exp(1 / beta1)), abs=1e-3)


# ---------------------------------------------------------------------------------------------
# Log-linear policies


@pytest.mark.parametrize("fisher", theory.FISHERS)
def test_worlds_are_realisable(fisher: str) -> None:
    """pi* is in the class, with zero loss under any sampler; Fisher matrices are as announced."""
    world = theory.make_world(3, fisher, 0)
    logp, optimal = theory.log_policy(world, world.theta_star), theory.optimal_logp(world)
    torch.testing.assert_close(logp, optimal, rtol=0, atol=1e-9)
    weights = torch.rand(world.rewards.shape, dtype=FLOAT64, generator=seeded())
    assert theory.population_loss(world, world.theta_star, weights).max() < 1e-18
    spectrum = torch.linalg.eigvalsh(theory.fisher_matrix(world.features, world.ref_logp))
    least = {"identity": 1, "singular": 0, "badly conditioned": 1e-3}[fisher]
    assert spectrum[:, 0].tolist() == pytest.approx([least] * 3, abs=1e-9)
    assert spectrum[:, -1].tolist() == pytest.approx([1] * 3, abs=1e-9)


@pytest.mark.parametrize("kind", ["exact V*", "estimated V*", "mean reward", "zero"])
def test_the_expected_step_leads_to_the_optimum(kind: str) -> None:
    """On-policy the gradient along theta - theta* is a variance, so not negative, for any V*."""
    world = theory.with_baseline(theory.make_world(4, "badly conditioned", 1), kind, 2)
    theta = torch.randn(world.theta_star.shape, dtype=FLOAT64, generator=seeded())
    along, variance = theory.downhill(world, theta)
    torch.testing.assert_close(along, variance, rtol=1e-9, atol=0)
    assert (variance > 0).all()


def test_the_loss_is_concave_at_the_start() -> None:
    """Nonconvex in theta, as the paper says: beta is below V* - mean reward."""
    low, high = theory.start_curvature(theory.make_world(1, "identity", 0))
    assert low < high < 0


def descend(kind: str, fisher: str = "identity", rounds: int = 250) -> theory.Play:
    world = theory.with_baseline(theory.make_world(4, fisher, 0), kind, 1)
    return theory.play(world, theory.gradient_descent(world, theory.STEP_SIZE, 0.0), rounds, 2)


def test_online_gradient_descent_converges_with_the_exact_v_star() -> None:
    """At a constant step: with the exact V* the gradient of every single sample vanishes at pi*."""
    result = descend("exact V*")
    world = theory.make_world(4, "identity", 0)
    assert result.kl[0].min() > 0.3
    assert result.kl[-1].max() < 1e-9
    assert (result.theta - world.theta_star).abs().max() < 1e-3
    assert result.regret[-1].max() < 2
    assert theory.fit_slope(result.rounds, result.regret.mean(dim=1)) < 0.1


@pytest.mark.parametrize("kind", ["estimated V*", "mean reward", "zero"])
def test_online_gradient_descent_stays_noisy_with_any_other(kind: str) -> None:
    """Near pi*, since the expected step is the same, but no nearer."""
    result = descend(kind)
    assert 1e-4 < result.kl[-100:].mean() < 0.3


def test_twice_the_same_features_change_nothing() -> None:
    """A singular Fisher matrix does not hurt gradient descent; a badly conditioned one does."""
    identity, singular, bad = (descend("exact V*", fisher, 60) for fisher in theory.FISHERS)
    torch.testing.assert_close(singular.kl, identity.kl, rtol=1e-6, atol=1e-12)
    assert bad.kl[-1].min() > 100 * identity.kl[-1].max()


def test_follow_the_perturbed_leader_learns() -> None:
    for fisher in theory.FISHERS:
        world = theory.make_world(4, fisher, 0)
        learn = theory.perturbed_leader(world, theory.PERTURBATION, seeded())
        result = theory.play(world, learn, 60, 2)
        regret = result.regret.mean(dim=1)
        assert (regret.diff() > 0).all()
        assert theory.fit_slope(result.rounds, regret) < 0.9  # sublinear
        gap = theory.oracle_gap(world, result.theta, *learn.problem)
        assert gap.max() < 0.01, fisher
        if fisher != "badly conditioned":
            assert result.kl[-20:].mean() < 0.1 * result.kl[0].mean()


def test_the_leader_without_perturbation_is_the_optimum() -> None:
    """Responses seen often enough, no noise: the least squares solution is theta*."""
    world = theory.make_world(4, "identity", 0)
    weights = torch.rand(world.rewards.shape, dtype=FLOAT64, generator=seeded())
    none = torch.zeros_like(world.theta_star)
    theta = theory.minimise(world, none, weights, none, 30)
    assert (theta - world.theta_star).abs().max() < 1e-6


def test_minimum_on_a_ball() -> None:
    """Inside, on the border, and with a singular matrix; no point of the ball is lower."""
    root = torch.randn(3, 4, 4, dtype=FLOAT64, generator=seeded())
    root[2, :, 2:] = 0
    curvature = root.mT @ root
    linear = torch.randn(3, 4, dtype=FLOAT64, generator=seeded(1))
    radius = torch.tensor([100.0, 0.5, 2.0], dtype=FLOAT64)
    x = theory.minimise_on_ball(curvature, linear, radius)
    solution = torch.linalg.solve(curvature[0], linear[0])
    torch.testing.assert_close(x[0], solution, rtol=1e-5, atol=1e-5)
    assert (x.norm(dim=1) <= radius * (1 + 1e-6)).all()

    def value(x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...si,sij,...sj->...s", x, curvature, x) / 2 - (linear * x).sum(-1)

    others = torch.randn(20_000, 3, 4, dtype=FLOAT64, generator=seeded(2))
    others *= (radius / others.norm(dim=-1) * torch.rand(20_000, 3, generator=seeded(3)))[..., None]
    assert (value(others).amin(dim=0) >= value(x) - 1e-6).all()


def test_slope_of_a_power_law() -> None:
    rounds = theory.checkpoints(1000)
    assert rounds[0] == 1 and rounds[-1] == 1000
    regret = 3 * torch.tensor(rounds, dtype=FLOAT64) ** 0.5
    assert theory.fit_slope(rounds, regret) == pytest.approx(0.5, abs=1e-9)


def test_the_command_writes_log_numbers_and_figures(tmp_path, monkeypatch, capsys) -> None:
    """In small: the parts as they are, with few steps, worlds and samples."""
    small = {
        "fixed_point": {"num_steps": 30},
        "standard_errors": {"count": 100},
        "log_linear": {"num_rounds": 12, "num_worlds": 2},
    }
    for name, few in small.items():
        part = getattr(theory, name)
        monkeypatch.setattr(theory, name, lambda seed, part=part, few=few: part(seed, **few))
    monkeypatch.setattr(sys, "argv", ["theory", "--out", str(tmp_path), "--seed", "3"])
    theory.main()
    log = (tmp_path / "theory.txt").read_text()
    assert log.startswith("$ python -m experiments.theory")
    assert "CONTRADICTS" in log and "CONTRADICTS" in capsys.readouterr().out
    data = json.loads((tmp_path / "theory.json").read_text())
    assert {path.stem for path in tmp_path.glob("*.png")} == {f"theory-{name}" for name in data}
    assert len(data["log-linear"]["regret"]) == 18
