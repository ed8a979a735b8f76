"""The theory, run in small. The subjects are V* and the loss of losses.py, by experiments.theory.

Off-policy, the regression reaches pi* with the exact V* alone. The standard error of V* is compared
with all 2^N draws.
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
    """Use one thread, as tensors so small gain nothing from a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------
# The fixed point


def test_a_weight_counts_as_a_repeated_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = torch.randn(4, 2, 3, dtype=FLOAT64, generator=generator)
    counts = torch.tensor([[1, 2, 3], [4, 0, 1]])
    weighted = theory.expected_loss(counts.to(FLOAT64), *tensors)
    for row in range(2):
        repeated = [x[row].repeat_interleave(counts[row]) for x in tensors]
        total = counts[row].sum() * losses.a_star_po_loss(*repeated, theory.BETA)
        assert weighted[row].item() == pytest.approx(total.item(), rel=1e-12)


def test_off_policy_only_the_exact_v_star_reaches_the_optimal_policy() -> None:
    descent = theory.regress(on_policy=False, num_steps=800)
    exact, mean, zero = descent.distances[-1].tolist()
    assert exact < 1e-3 < 0.03 < min(mean, zero)
    assert descent.loss[0] < 1e-6 < 0.01 < min(descent.loss[1:])


def test_on_policy_any_baseline_reaches_the_optimal_policy() -> None:
    """The loss stays positive with a wrong V*. No on-policy test can tell that V* is wrong."""
    descent = theory.regress(on_policy=True, num_steps=800)
    assert descent.distances[-1].max() < 1e-3
    assert descent.loss[0] < 1e-6 < 0.01 < min(descent.loss[1:])
    # The expected gradient is the same with all three, so the path is the same.
    spread = descent.distances.amax(dim=1) - descent.distances.amin(dim=1)
    assert spread.max() < 1e-9


def test_the_optimal_arms_satisfy_the_equation() -> None:
    """beta ln(pi* / pi_ref) = r - V*, with the V* of losses.py."""
    left = theory.BETA * (theory.optimal_arms().log() - theory.REF.log())
    right = theory.ARM_REWARDS - theory.arm_baselines()[0]
    torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


def test_checkpoints_are_spread_on_a_log_scale() -> None:
    rounds = theory.checkpoints(1000)
    assert rounds[0] == 1 and rounds[-1] == 1000
    assert sum(100 < each <= 1000 for each in rounds) == 12


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
        assert found.stderr.item() == pytest.approx(error.item(), abs=1e-9)
        assert found.bias.item() == pytest.approx(mean.item() - true, abs=1e-9)
        assert found.bias < 0


@pytest.mark.parametrize(
    ("n", "beta1", "where", "stderr"),
    [(1, 0.5, 0.5, 0.5), (8, 0.5, 0.18, 0.2114), (32, 0.5, 0.13, 0.1048), (8, 10.0, 0.48, 0.1769)],
)
def test_standard_error_is_largest_at_low_success_rates(
    n: int, beta1: float, where: float, stderr: float
) -> None:
    """It is largest at one half for N = 1 only."""
    p = theory.success_rates()
    found = theory.exact_error(p, n, beta1).stderr
    assert p[found.argmax()].item() == pytest.approx(where, abs=0.006)
    assert found.max().item() == pytest.approx(stderr, abs=1e-4)


def test_with_many_samples_it_is_largest_where_the_delta_method_says() -> None:
    rows = theory.standard_errors().data["rows"]
    [row] = [row for row in rows if (row["n"], row["beta1"]) == (32, 0.5)]
    assert row["p_delta"] == pytest.approx(0.119, abs=1e-3)
    p = theory.success_rates()
    many = theory.exact_error(p, 1000, 0.5).stderr
    assert p[many.argmax()].item() == pytest.approx(row["p_delta"], abs=2e-3)


# ---------------------------------------------------------------------------------------------
# The command


def test_the_command_writes_log_numbers_and_pictures(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["theory", "--out", str(tmp_path)])
    part = theory.fixed_point
    monkeypatch.setattr(theory, "fixed_point", lambda: part(num_steps=30))
    theory.main()
    log = (tmp_path / "theory.txt").read_text()
    assert log.startswith("$ python -m experiments.theory")
    assert log == capsys.readouterr().out
    for part_number in ("1.", "2.", "3."):
        assert f"\n{part_number} " in log
    data = json.loads((tmp_path / "theory.json").read_text())
    assert set(data) == {"fixed-point", "v-star", "standard-error"}
    assert {path.stem for path in tmp_path.glob("*.png")} == {f"theory-{name}" for name in data}
