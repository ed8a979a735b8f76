"""Does adaptive sampling make V* cheaper?

Question: stage 1 samples each prompt 8 times. With --max-value-samples it samples easy prompts less
          and hard ones more. How many samples does V* of the same accuracy then take?
Command:  python offline_value.py --model toy/reference --dataset toy/train.jsonl \
              --max-tokens 128 --num-value-samples 32 --out toy/values-32.json
          python -m experiments.countdown offline_value --dataset countdown \
              --model countdown/reference --max-tokens 160 --num-value-samples 32 \
              --out countdown/values-32.json
          python -m experiments.adaptive toy/values-32.json countdown/values-32.json
          Without values files, the table has the made-up success rates alone.
Time:     10 s, and 3 min for both values files
Output:   experiments/results/adaptive.txt, a table
Answer:   about as many: 84 to 129 % of those of N = 8, depending on how difficult the prompts are.
          With all success rates known beforehand it would be 66 to 92 %.

From a values file, the fraction of right responses is taken for a prompt's success rate. So a
prompt that is seldom solved may count as one that never is. The published models' success rates on
MATH are not known to us; the second row is a guess at them.

Nothing is sampled here. Whether a response is right is a coin flip with the prompt's success rate
p, so the distribution of (samples, right ones) when a rule stops follows exactly, sample by sample.
The error is that of V* from eq. (1) at beta1 = 0.5 against V* at the true p.

Why it saves so little. With n samples, the squared error of V* is about s(p)^2 / n, where
s(p) = V*'(p) sqrt(p (1 - p)). N samples each have the mean squared error E[s^2] / N.

- Stopping at a standard error e takes n = s^2 / e^2 samples. For the same mean squared error,
  e^2 = E[s^2] / N, and the mean of n is N again. Prompts differ in n, and nothing is saved.
- The best division of the same number of samples is n in proportion to s (Lagrange). It takes
  E[s]^2 / E[s^2] of the samples. That is close to 1 unless s is 0 for many prompts, and s is 0 only
  for prompts that are always or never right.
- Nobody knows s(p) beforehand. To tell p = 0 from p = 0.1, where s is largest, takes samples.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy
import torch

from apo import command_line, files
from losses import optimal_value, value_standard_error

RESULTS = Path(__file__).parent / "results" / "adaptive.txt"
BETA1 = 0.5
PUBLISHED = 8  # samples per prompt
MOST = 32  # of the adaptive rules
# The success rates that a smooth spread is computed at.
GRID = (numpy.arange(200) + 0.5) / 200


class Spread(NamedTuple):
    """How success rates are spread over the prompts."""

    rates: numpy.ndarray  # (P,)
    weights: numpy.ndarray  # (P,), of sum 1


class Outcome(NamedTuple):
    """What a rule takes and gives, over all prompts."""

    samples: float  # mean number per prompt
    error: float  # root mean squared error of V*


# A rule says whether to stop after n samples of which k are right.
Rule = Callable[[int, int], bool]


def beta_spread(a: float, b: float) -> Spread:
    """Spread success rates by a Beta distribution, of mean a / (a + b)."""
    density = GRID ** (a - 1) * (1 - GRID) ** (b - 1)
    return Spread(GRID, density / density.sum())


def measured_spread(path: str) -> Spread:
    """Take the fractions of right responses in a values file for the true success rates."""
    entries = files.read_json(path).get("prompts")
    if not entries or not all(entry.get("rewards") for entry in entries):
        raise files.UserError(f"{path} is not a values file of stage 1")
    rates = [sum(reward > 0 for reward in e["rewards"]) / len(e["rewards"]) for e in entries]
    values, counts = numpy.unique(rates, return_counts=True)
    return Spread(values, counts / counts.sum())


def rewards_of(num_samples: int, num_right: int) -> torch.Tensor:
    """Write down the rewards of one prompt: (1, N)."""
    rewards = torch.zeros(1, num_samples, dtype=torch.float64)
    rewards[:, :num_right] = 1
    return rewards


def true_value(rates: numpy.ndarray) -> numpy.ndarray:
    """Return V* at known success rates: beta1 ln(1 + p (e^(1 / beta1) - 1))."""
    return BETA1 * numpy.log1p(rates * numpy.expm1(1 / BETA1))


def chances_of_right(num_samples: int, rates: numpy.ndarray) -> numpy.ndarray:
    """Return the chance of k = 0 ... n right samples at each success rate: (P, n + 1)."""
    columns = []
    for k in range(num_samples + 1):
        columns.append(math.comb(num_samples, k) * rates**k * (1 - rates) ** (num_samples - k))
    return numpy.stack(columns, axis=1)


def squared_errors(num_samples: int, spread: Spread) -> numpy.ndarray:
    """Return (V* from k of n right - V* at p)^2 for each rate p and k = 0 ... n: (P, n + 1)."""
    values = [optimal_value(rewards_of(num_samples, k), BETA1) for k in range(num_samples + 1)]
    return (torch.cat(values).numpy()[None, :] - true_value(spread.rates)[:, None]) ** 2


def follow(rule: Rule, spread: Spread) -> Outcome:
    """Follow a rule sample by sample: two at the start, then one at a time until it stops."""
    rates = spread.rates[:, None]
    # going[p, k]: the chance that the rule has not stopped yet and k of the n samples are right.
    n = 2
    going = chances_of_right(n, spread.rates)
    samples = 0.0
    squared_error = 0.0
    while True:
        stops = numpy.array([n == MOST or rule(n, k) for k in range(n + 1)])
        stopped = going * stops
        samples += n * (spread.weights @ stopped.sum(axis=1))
        squared_error += spread.weights @ (stopped * squared_errors(n, spread)).sum(axis=1)
        if n == MOST:
            return Outcome(samples, squared_error**0.5)
        going = going * ~stops
        wrong = numpy.pad(going * (1 - rates), ((0, 0), (0, 1)))
        right = numpy.pad(going * rates, ((0, 0), (1, 0)))
        going = wrong + right
        n += 1


def fixed(num_samples: int, spread: Spread) -> Outcome:
    """Sample every prompt equally often."""
    return follow(lambda n, k: n >= num_samples, spread)


def standard_errors() -> dict[tuple[int, int], float]:
    """Return the stage's estimate for every n and k: the bound of a rule refers to it."""
    errors = {}
    for n in range(2, MOST + 1):
        for k in range(n + 1):
            errors[n, k] = value_standard_error(rewards_of(n, k), BETA1).item()
    return errors


def cheapest(stop_below: Callable[[float], Rule], spread: Spread, goal: float) -> Outcome:
    """Find the loosest bound whose error is at most the goal, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(25):
        middle = (low + high) / 2
        if follow(stop_below(middle), spread).error <= goal:
            low = middle
        else:
            high = middle
    return follow(stop_below(low), spread)


def with_known_rates(spread: Spread, goal: float) -> Outcome:
    """Choose each prompt's number of samples with its success rate known beforehand.

    It minimises the squared error plus a price per sample. The price is raised until the error is
    the goal.
    """
    counts = numpy.arange(2, MOST + 1)
    errors = []  # by number of samples, for each success rate
    for n in counts:
        expected = chances_of_right(n, spread.rates) * squared_errors(n, spread)
        errors.append(expected.sum(axis=1))
    errors = numpy.stack(errors)

    def choose(price: float) -> Outcome:
        best = (errors + price * counts[:, None]).argmin(axis=0)
        chosen = errors[best, numpy.arange(len(best))]
        return Outcome(spread.weights @ counts[best], (spread.weights @ chosen) ** 0.5)

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        if choose(middle).error <= goal:
            low = middle
        else:
            high = middle
    return choose(low)


def large_n_limit(spread: Spread) -> float:
    """Return E[s]^2 / E[s^2], the part of the samples that the best division takes."""
    p = spread.rates
    slope = BETA1 * numpy.expm1(1 / BETA1) / (1 + p * numpy.expm1(1 / BETA1))
    s = slope * numpy.sqrt(p * (1 - p))
    return (spread.weights @ s) ** 2 / (spread.weights @ s**2)


def make_table(spreads: dict[str, Spread]) -> list[str]:
    """Compare the rules on each spread: lines of a table."""
    errors = standard_errors()

    def below_error(bound: float) -> Rule:
        return lambda n, k: errors[n, k] <= bound

    def below_gain(bound: float) -> Rule:
        # One more sample lowers s^2 / n by about s^2 / n^2.
        return lambda n, k: errors[n, k] / n**0.5 <= bound

    row = "{:<36} {:>7} {:>9} {:>9} {:>9} {:>9}"
    lines = [
        f"Samples per prompt that reach the error of N = {PUBLISHED}, in % of {PUBLISHED}",
        row.format("success rates", "error", "standard", "gain of", "rates", "the same,"),
        row.format("", "of N=8", "error", "one more", "known", "large N"),
    ]
    for name, spread in spreads.items():
        goal = fixed(PUBLISHED, spread).error
        cells = []
        for outcome in (
            cheapest(below_error, spread, goal),
            cheapest(below_gain, spread, goal),
            with_known_rates(spread, goal),
        ):
            cells.append(f"{outcome.samples / PUBLISHED:.0%}")
        cells.append(f"{large_n_limit(spread):.0%}")
        lines.append(row.format(name, f"{goal:.3f}", *cells))
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("values", nargs="*", help="values files with many samples per prompt")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the table")
    args = parser.parse_args()
    files.check_writable(args.out)
    spreads = {
        "even": beta_spread(1, 1),
        "most near 0 or 1, mean 0.4 (MATH?)": beta_spread(0.4, 0.6),
        "nearly all near 0 or 1": beta_spread(0.2, 0.2),
        "most are low, mean 0.25": beta_spread(1, 3),
        "most are medium": beta_spread(2, 2),
    }
    for path in args.values:
        spreads[path] = measured_spread(path)
    lines = make_table(spreads)
    print("\n".join(lines))
    files.write_text(args.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    command_line.run(main)
