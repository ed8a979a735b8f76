"""The rules that divide samples among prompts, against draws and against algebra."""

import sys

import numpy
import pytest

from apo import files
from experiments import adaptive
from experiments.adaptive import Spread

TWO_KINDS = Spread(rates=numpy.array([0.1, 0.7]), weights=numpy.array([0.25, 0.75]))


def draw(rule: adaptive.Rule, rate: float, rng: numpy.random.Generator) -> tuple[int, int]:
    """Flip coins until the rule stops. Return how many there were, and how many were right."""
    n = 2
    right = rng.binomial(2, rate)
    while n < adaptive.MOST and not rule(n, right):
        n += 1
        right += rng.binomial(1, rate)
    return n, right


def test_a_rule_takes_and_gives_what_many_draws_do() -> None:
    errors = adaptive.standard_errors()

    def rule(n: int, k: int) -> bool:
        return errors[n, k] <= 0.2

    expected = adaptive.follow(rule, TWO_KINDS)
    rng = numpy.random.default_rng(0)
    samples, squares = [], []
    for rate in rng.choice(TWO_KINDS.rates, p=TWO_KINDS.weights, size=20_000):
        n, right = draw(rule, rate, rng)
        samples.append(n)
        estimate = adaptive.true_value(numpy.array(right / n))
        squares.append((estimate - adaptive.true_value(numpy.array(rate))) ** 2)
    assert numpy.mean(samples) == pytest.approx(expected.samples, rel=0.02)
    assert numpy.mean(squares) ** 0.5 == pytest.approx(expected.error, rel=0.02)


def test_the_bound_is_the_loosest_that_reaches_the_goal() -> None:
    """A rule that stops after 1 / bound samples, whatever they are: N = 8 takes 8."""
    goal = adaptive.fixed(8, TWO_KINDS).error
    found = adaptive.cheapest(lambda bound: lambda n, k: n * bound >= 1, TWO_KINDS, goal)
    assert found == adaptive.fixed(8, TWO_KINDS)


def test_known_rates_never_take_more_than_equal_numbers() -> None:
    for spread in (TWO_KINDS, adaptive.beta_spread(0.4, 0.6)):
        goal = adaptive.fixed(8, spread).error
        best = adaptive.with_known_rates(spread, goal)
        assert best.error <= goal and best.samples <= 8


def test_where_all_prompts_are_alike_nothing_can_be_saved() -> None:
    alike = Spread(rates=numpy.array([0.4]), weights=numpy.array([1.0]))
    assert adaptive.large_n_limit(alike) == pytest.approx(1)
    # Half of the prompts are always right and need no samples.
    half = Spread(rates=numpy.array([0.4, 1.0]), weights=numpy.array([0.5, 0.5]))
    assert adaptive.large_n_limit(half) == pytest.approx(0.5)


def test_the_command_writes_a_row_for_each_values_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(adaptive, "MOST", 9)  # quicker
    values, out = tmp_path / "values.json", tmp_path / "table.txt"
    rewards = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]]
    files.write_json(values, {"prompts": [{"rewards": each} for each in rewards]})
    monkeypatch.setattr(sys, "argv", ["adaptive", str(values), "--out", str(out)])
    adaptive.main()
    last = out.read_text().splitlines()[-1]
    measured = Spread(rates=numpy.array([0.25, 0.75]), weights=numpy.array([0.5, 0.5]))
    assert last.startswith(str(values))
    assert last.endswith(f"{adaptive.large_n_limit(measured):.0%}")
