"""The paper's theory, run: the fixed point of the regression, V*, and the standard error of V*.

Question: does equation (3) lead to the optimal policy, and how good is a V* from N samples?
Command:  python -m experiments.theory
Time:     5 seconds on one core. There is no model: all is float64 and exact sums.
Output:   theory.txt, theory.json and three pictures theory-*.png in experiments/results.
Answer:
  1. With samples of another policy, only the exact V* leads to pi*. The mean reward or zero in its
     place ends elsewhere. On-policy, all three lead to pi*.
  2. V* falls from the best reward (beta1 -> 0) to the mean reward (beta1 -> infinity).
  3. The standard error of V* is largest at a low success rate: at 0.18 for N = 8, beta1 = 0.5, and
     not at one half.

The regression and V* are those of losses.py. experiments/regret.py has the theory's last part: the
regret of log-linear policies.
"""

import argparse
import itertools
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # there may be no display
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from torch import Tensor

import losses
from apo import command_line
from apo.files import check_writable, write_text
from experiments.plot import COLOURS, Label, finish, label_lines, save

FLOAT64 = torch.float64
BETA = 0.25  # beta1 and beta2, here and in regret.py
BETA1S = (0.1, 0.5, 1.0, 10.0)
NUM_SAMPLES = (1, 2, 4, 8, 32)

# One loss for each row: (S, n) four times -> (S,).
row_losses = torch.vmap(losses.a_star_po_loss, in_dims=(0, 0, 0, 0, None))


class Part(NamedTuple):
    """What one part of this module found: numbers for theory.json and lines for theory.txt."""

    data: dict
    log: list[str]


def expected_loss(
    weights: Tensor, logp: Tensor, ref_logp: Tensor, rewards: Tensor, v_star: Tensor
) -> Tensor:
    """Sum weights times squared residuals, all (S, n) -> (S,).

    If the weights are probabilities, this is the expectation of the loss. The residual is linear in
    the four tensors together, so multiplying all four by sqrt(w) multiplies its square by w.
    """
    root = weights.sqrt()
    mean = row_losses(root * logp, root * ref_logp, root * rewards, root * v_star, BETA)
    return weights.shape[1] * mean


# ---------------------------------------------------------------------------------------------
# 1. The fixed point of the regression, on a bandit with four arms

ARM_REWARDS = torch.tensor([1.0, 0.5, 0.0, 0.0], dtype=FLOAT64)
REF = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=FLOAT64)
OFF_POLICY = torch.tensor([0.4, 0.1, 0.3, 0.2], dtype=FLOAT64)  # neither pi_ref nor pi*
BASELINES = ("exact V*", "mean reward", "zero")


class Descent(NamedTuple):
    """Distances to pi* in total variation, (num_steps, 3), and the last losses, (3,)."""

    distances: Tensor
    loss: Tensor


def arm_baselines() -> Tensor:
    """Return what takes the place of V*: the exact V*, the mean reward and zero, -> (3,)."""
    # Ten samples in the proportions of pi_ref, so that their mean is the expectation.
    counts = (10 * REF).round().int()
    rewards = ARM_REWARDS.repeat_interleave(counts)[None]
    exact = losses.optimal_value(rewards, BETA)
    mean = losses.optimal_value(rewards, math.inf)
    return torch.cat([exact, mean, torch.zeros_like(mean)])


def optimal_arms() -> Tensor:
    """Return pi* = pi_ref exp(r / beta) / Z, -> (4,)."""
    return (REF.log() + ARM_REWARDS / BETA).softmax(dim=0)


def regress(on_policy: bool, num_steps: int) -> Descent:
    """Descend the expected loss from pi_ref, once for each baseline, with steps 16 / sqrt(t)."""
    ref_logp = REF.log().repeat(3, 1)
    rewards = ARM_REWARDS.expand(3, 4)
    v_star = arm_baselines()[:, None].expand(3, 4)
    logits = ref_logp
    distances = []
    for step in range(1, num_steps + 1):
        logits = logits.detach().requires_grad_()
        logp = logits.log_softmax(dim=1)
        policy = logp.detach().exp()
        distances.append((policy - optimal_arms()).abs().sum(dim=1) / 2)
        sampler = policy if on_policy else OFF_POLICY.expand(3, 4)
        loss = expected_loss(sampler, logp, ref_logp, rewards, v_star)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        logits = logits - 16 / math.sqrt(step) * gradient
    return Descent(torch.stack(distances), loss.detach())


def fixed_point(num_steps: int = 3000) -> Part:
    """Part 1: where the regression ends, for each sampler and each baseline."""
    row = "{:<11} {:<14} {:>7} {:>9} {:>9}"
    log = [
        f"1. The fixed point: 4 arms, beta {BETA}, {num_steps} steps, expectations for batches",
        row.format("samples", "in V*'s place", "value", "distance", "loss"),
    ]
    values = arm_baselines().tolist()
    steps = checkpoints(num_steps)
    data = {"steps": steps}
    for name, on_policy in (("on-policy", True), ("off-policy", False)):
        descent = regress(on_policy, num_steps)
        for i, baseline in enumerate(BASELINES):
            value = f"{values[i]:.4f}"
            distance = f"{descent.distances[-1, i].item():.1e}"
            loss = f"{descent.loss[i].item():.1e}"
            log.append(row.format(name, baseline, value, distance, loss))
        indices = torch.tensor(steps) - 1
        data[name] = descent.distances[indices].T.tolist()
    log.append("distance: to pi*, in total variation")
    return Part(data, log)


def checkpoints(last: int) -> list[int]:
    """Return twelve numbers a decade from 1 to `last`, evenly spread on a log scale."""
    count = round(12 * math.log10(last))
    return sorted({round(last ** (i / count)) for i in range(count + 1)})


# ---------------------------------------------------------------------------------------------
# 2. V* between the mean and the best


def value_table(beta1s: list[float], n: int = 8) -> Tensor:
    """Return V* of k right answers among n, k = 0 .. n, for each beta1 -> (len(beta1s), n + 1)."""
    num_right = torch.arange(n + 1)[:, None]
    rewards = (torch.arange(n) < num_right).to(FLOAT64)
    return torch.stack([losses.optimal_value(rewards, beta1) for beta1 in beta1s])


def limits() -> Part:
    """Part 2: V* of 0 to 8 right among 8, for many beta1 and in both limits."""
    grid = [10 ** (exponent / 20) for exponent in range(-60, 61)]
    table = value_table([1e-9, *grid, math.inf])
    k = torch.arange(9, dtype=FLOAT64)
    best_error = (table[0] - (k > 0).to(FLOAT64)).abs().max().item()
    mean_error = (table[-1] - k / 8).abs().max().item()
    largest_rise = table.diff(dim=0).max().item()
    header = " ".join(f"{i:>6}" for i in range(9))
    log = ["2. V* of k right among N = 8", f"{'beta1':>8} {header}"]
    for beta1 in (1e-3, *BETA1S, 1e3):
        cells = " ".join(f"{value:6.4f}" for value in value_table([beta1])[0].tolist())
        log.append(f"{beta1:>8g} {cells}")
    log.append(f"beta1 = inf is the mean to {mean_error:.0e}, 1e-9 the best to {best_error:.0e}.")
    log.append(f"Over {len(grid)} values of beta1, V* rises with beta1 by {largest_rise:.0e}.")
    return Part({"beta1": grid, "v_star": table[1:-1].tolist()}, log)


# ---------------------------------------------------------------------------------------------
# 3. The standard error and the bias of V* from N binary rewards


class Error(NamedTuple):
    """Standard error and bias of an estimated V*, for each success rate: (n,) twice."""

    stderr: Tensor
    bias: Tensor


def true_value(p: Tensor, beta1: float) -> Tensor:
    """Return V* of success rates, beta1 ln(1 + p (e^(1/beta1) - 1)), (n,) -> (n,)."""
    return beta1 * (p * math.expm1(1 / beta1)).log1p()


def exact_error(p: Tensor, n: int, beta1: float) -> Error:
    """Sum over k right answers of n with their binomial probabilities."""
    k = torch.arange(n + 1, dtype=FLOAT64)
    ways = torch.tensor([math.comb(n, i) for i in range(n + 1)], dtype=FLOAT64)
    chance = ways * p[:, None] ** k * (1 - p[:, None]) ** (n - k)
    values = value_table([beta1], n)[0]
    mean = chance @ values
    variance = (chance * (values - mean[:, None]).square()).sum(dim=1)
    return Error(variance.sqrt(), mean - true_value(p, beta1))


def success_rates() -> Tensor:
    """Return success rates from 1e-6 to 0.999, dense on a log scale and on a linear one."""
    low = 10 ** torch.linspace(-6, -2, 401, dtype=FLOAT64)
    return torch.cat([low[:-1], torch.linspace(0.01, 0.999, 990, dtype=FLOAT64)])


class ErrorRow(NamedTuple):
    """Where the standard error and the bias are largest, for one N and beta1."""

    n: int
    beta1: float
    p_delta: float  # where the standard error is largest to first order in 1/N
    p: float  # where it is largest
    stderr: float  # there
    stderr_at_half: float  # at a success rate of 1/2
    bias: float  # the largest
    p_bias: float  # where that is


def standard_errors() -> Part:
    """Part 3: at which success rate the standard error and the bias of V* are largest.

    To first order in 1/N, the standard error is |dV*/dp| sqrt(p (1 - p) / N). That is largest at
    p = 1 / (1 + e^(1/beta1)), whatever N is: the column "p, delta" (the delta method).
    """
    log = [
        "3. Standard error (s.e.) and bias of V* from N samples, at the success rate p where each",
        "   is largest",
        "  N  beta1  p, delta  p, exact    s.e.  at 1/2  ratio     bias    at p",
    ]
    p = success_rates()
    half = torch.tensor([0.5], dtype=FLOAT64)
    rows = []
    for n, beta1 in itertools.product(NUM_SAMPLES, BETA1S):
        error = exact_error(p, n, beta1)
        highest = error.stderr.argmax()
        lowest = error.bias.argmin()
        found = ErrorRow(
            n=n,
            beta1=beta1,
            p_delta=1 / (1 + math.exp(1 / beta1)),
            p=p[highest].item(),
            stderr=error.stderr[highest].item(),
            stderr_at_half=exact_error(half, n, beta1).stderr.item(),
            bias=error.bias[lowest].item(),
            p_bias=p[lowest].item(),
        )
        rows.append(found._asdict())
        log.append(
            f"{n:>3} {beta1:>6} {found.p_delta:>9.2g} {found.p:>9.2g} {found.stderr:>7.4f} "
            f"{found.stderr_at_half:>7.4f} {found.stderr / found.stderr_at_half:>6.2f} "
            f"{found.bias:>8.4f} {found.p_bias:>7.2g}"
        )
    log.append("The s.e. is largest at p = 1/2 for N = 1, where V* is the one reward, and nearly")
    log.append("there for beta1 = 10. Otherwise it is largest at a lower p.")
    return Part({"rows": rows}, log)


# ---------------------------------------------------------------------------------------------
# 4. Pictures


def draw_fixed_point(data: dict, out: Path) -> None:
    """Draw the distance to pi* against steps, off-policy on the left, on-policy on the right."""
    figure, panels = pyplot.subplots(1, 2, figsize=(8.2, 3.1), layout="constrained", sharey=True)
    off_policy, on_policy = panels
    labels = []
    for baseline, colour, distances in zip(BASELINES, COLOURS, data["off-policy"], strict=False):
        off_policy.loglog(data["steps"], distances, color=colour)
        labels.append(Label(baseline, distances[-1], colour))
    # The three lines coincide. Drawn in three widths, all of them can be seen.
    for width, colour, distances in zip((5, 3, 1), COLOURS, data["on-policy"], strict=False):
        on_policy.loglog(data["steps"], distances, color=colour, linewidth=width)
    off_policy.set_ylim(1e-14, 2)
    label_lines(off_policy, labels)
    label_lines(on_policy, [Label("all three", data["on-policy"][0][-1], "black")])
    y_label = "distance to π* (total variation)"
    finish(off_policy, "Off-policy, only the exact V* leads to π*", "step", y_label)
    finish(on_policy, "On-policy, any number in its place works", "step", "")
    save(figure, out)


def draw_limits(data: dict, out: Path) -> None:
    """Draw V* against beta1, a line for each number of right answers."""
    figure, axes = pyplot.subplots(figsize=(5.4, 3.6), layout="constrained")
    labels = []
    for k in range(9):
        values = [row[k] for row in data["v_star"]]
        axes.semilogx(data["beta1"], values, color=COLOURS[0], linewidth=1.4)
        labels.append(Label(f"{k} of 8 right", values[-1], COLOURS[0]))
    axes.axvline(0.5, color="0.5", linewidth=1, linestyle=":")
    axes.text(0.55, 0.03, "published β1", color="0.3", fontsize=8)
    label_lines(axes, labels)
    finish(axes, "V* falls from the best reward to the mean as β1 grows", "β1", "V* of 8 rewards")
    save(figure, out)


def draw_errors(out: Path) -> None:
    """Draw the standard error and the bias of V* against the success rate."""
    figure, panels = pyplot.subplots(1, 3, figsize=(8.2, 3.1), layout="constrained")
    noise, samples, bias = panels
    p = torch.linspace(0.001, 0.999, 999, dtype=FLOAT64)
    for beta1, colour in zip(BETA1S, COLOURS, strict=False):
        error = exact_error(p, 8, beta1)
        draw_error(noise, p, error.stderr, f"β1 = {beta1:g}", colour)
        draw_error(bias, p, -error.bias, f"β1 = {beta1:g}", colour)
    for n, colour in zip(NUM_SAMPLES, COLOURS, strict=False):
        draw_error(samples, p, exact_error(p, n, 0.5).stderr, f"N = {n}", colour)
    bias.set_yscale("log")
    bias.set_ylim(1e-4, 1)
    x_label = "success rate of the prompt"
    finish(noise, "V* is noisiest at a low rate", x_label, "standard error of V*, N = 8")
    finish(samples, "N = 1 alone peaks at 1/2", x_label, "standard error of V*, β1 = 0.5")
    finish(bias, "V* is too low on average", x_label, "true V* − mean of V*, N = 8")
    save(figure, out)


def draw_error(axes: Axes, p: Tensor, values: Tensor, name: str, colour: str) -> None:
    """Draw one line, and write its name above its highest point, on white."""
    axes.plot(p, values, color=colour, linewidth=1.5)
    top = (p[values.argmax()], values.max())
    axes.plot(*top, "o", color=colour, markersize=4)
    axes.annotate(
        name,
        top,
        (-2, 5),
        textcoords="offset points",
        color=colour,
        fontsize=7.5,
        path_effects=[withStroke(linewidth=2, foreground="white")],  # over the other lines
    )


# ---------------------------------------------------------------------------------------------
# 5. The command


def rounded(data: object) -> object:
    """Round all numbers to six digits, in dicts within lists within dicts."""
    if isinstance(data, dict):
        return {key: rounded(value) for key, value in data.items()}
    if isinstance(data, list):
        return [rounded(value) for value in data]
    if isinstance(data, float):
        return float(f"{data:.6g}")
    return data


def write_results(path: Path, log: list[str], data: dict) -> None:
    """Write PATH.txt with the log, and PATH.json with the numbers behind it."""
    write_text(path.with_suffix(".txt"), "\n".join(log) + "\n")
    write_text(path.with_suffix(".json"), json.dumps(rounded(data)) + "\n")


def main() -> None:
    """Run the three parts. Print and keep the log, the numbers and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("experiments/results"), help="folder")
    args = parser.parse_args()
    check_writable(args.out, is_folder=True)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the tensors are tiny
    start = time.process_time()
    parts = {"fixed-point": fixed_point(), "v-star": limits(), "standard-error": standard_errors()}
    draw_fixed_point(parts["fixed-point"].data, args.out / "theory-fixed-point.png")
    draw_limits(parts["v-star"].data, args.out / "theory-v-star.png")
    draw_errors(args.out / "theory-standard-error.png")
    log = [f"$ python -m experiments.theory --out {args.out}"]
    data = {}
    for name, part in parts.items():
        log += ["", *part.log]
        data[name] = part.data
    log += ["", f"{time.process_time() - start:.0f} s of one core"]
    write_results(args.out / "theory", log, data)
    print("\n".join(log))


if __name__ == "__main__":
    command_line.run(main)
