"""The folder of a training run: its settings, its logs, and where to continue.

RUN/config.json has the settings, RUN/metrics.jsonl a line for each step, RUN/samples.jsonl a line
for each saved response, RUN/checkpoints/ and RUN/final/ the weights.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from apo import command_line, files
from apo.engine import Response
from apo.files import UserError
from apo.policy import find_checkpoint, is_whole_checkpoint, list_checkpoints, saved_step

# What may be different on --resume: how long the run is, where its files lie, what it saves, and
# how it uses memory and hardware. Nothing here changes what is computed. Everything else must stay,
# even --eval-every, so that the curve of accuracy has even steps.
FREE_ON_RESUME = (
    "resume",
    "out",
    # These three are paths. What lies there must be the same: model_fingerprint, values_digest and
    # eval_digest say so.
    "values",
    "model",
    "eval_dataset",
    "num_steps",
    "save_every",
    "keep_checkpoints",
    "log_samples",
    "tracker",
    "micro_batch_tokens",
    "gradient_checkpointing",
    "offload_ref",
    "gpu_memory_utilization",
    "tensor_parallel_size",
)


# An empty file in the run's folder, written with the first checkpoint. Without it, a run that was
# stopped early could not be told from one whose checkpoints were moved away.
HAS_CHECKPOINTS = "has_checkpoints"
COLUMNS = 100  # of the longest line on the terminal


class Progress(NamedTuple):
    """How far an earlier run in the same folder came."""

    finished: bool  # there is nothing left to do
    checkpoint: Path | None  # to continue from; None starts from the reference
    step: int  # of the checkpoint, or of the finished model; 0 without either


def is_failed_start(out: Path) -> bool:
    """Say whether a folder has only what a run leaves that ended before its first step.

    It may have evaluated the untrained model. Its settings do not matter then.
    """
    if {path.name for path in out.glob("*")} - {"config.json", "metrics.jsonl", "samples.jsonl"}:
        return False
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = out / name
        if path.exists() and any(step_of(line) > 0 for line in path.read_bytes().splitlines()):
            return False
    try:
        config = files.read_json(out / "config.json")
    except UserError:
        return False
    return "values_digest" in config  # another program may have a config.json, too


def open_run(config: dict, log: "RunLog") -> Progress:
    """Lock the run's folder for this process, and find where to continue. Rank 0 calls it.

    final/                 checkpoints          outcome
    of the last step       any                  finished (also if of a later one)
    any other              one is whole         continue from the newest whole one
    missing or damaged     never one            start at step 1
    missing or damaged     all are damaged      start at step 1, with a message
    missing or damaged     all were removed     UserError
    of an earlier step     none is whole        UserError

    Raises UserError as well if another process has the folder, if it is a run with other settings
    or no run at all, or if `checkpoints` is a file or a link to nothing.
    """
    out = Path(config["out"])
    if not (out / "config.json").exists():
        for name in ("metrics.jsonl", "samples.jsonl"):
            if (out / name).exists() and (out / name).stat().st_size > 0:
                raise UserError(f"{out} has lost its config.json, or is no run: give another --out")
    files.refuse_broken_link(out / "checkpoints")
    if (out / "checkpoints").is_file():
        raise UserError(f"{out}/checkpoints is a file: give another --out")
    refuse_other_settings(out, config)  # first of all, since opening drops a torn last line
    log.open()  # from here on no other process can take the folder
    refuse_other_settings(out, config)  # another process may have begun in the meantime
    final_step = saved_step(out / "final")
    checkpoints = list_checkpoints(out / "checkpoints")
    had_checkpoints = bool(checkpoints)
    if not (out / "config.json").exists() and ((out / "final").exists() or had_checkpoints):
        raise UserError(f"{out} has lost its config.json, or is no run: give another --out")
    if final_step is not None and final_step >= config["num_steps"]:
        return Progress(True, None, final_step)
    # Not finished: --num-steps may have grown since, or the run was stopped or killed.
    whole = [path for path in checkpoints if is_whole_checkpoint(path)]
    if had_checkpoints and not whole and final_step is None:
        # The next statement renames them all. If a kill followed and this file were still there,
        # the next start would report the checkpoints as removed.
        (out / HAS_CHECKPOINTS).unlink(missing_ok=True)
    checkpoint = find_checkpoint(out / "checkpoints")
    if final_step is None and (out / "final").exists():
        print(f"{out}/final is damaged: it is not used", file=sys.stderr)
    if checkpoint is None and final_step is not None:
        raise UserError(
            f"{out}/final is from step {final_step}, and no whole checkpoint is left to continue "
            "from: give another --out"
        )
    if checkpoint is None and had_checkpoints:
        print(f"{out} has no whole checkpoint: training starts again", file=sys.stderr)
    if not had_checkpoints and (out / HAS_CHECKPOINTS).exists():
        raise UserError(f"the checkpoints of {out} are gone: give another --out")
    step = saved_step(checkpoint) if checkpoint else 0
    if config["resume"] and not (out / "config.json").exists():  # it may be a mistyped --out
        print(f"{out} has no run to resume: training starts at step 1", file=sys.stderr)
    files.write_json(out / "config.json", config)
    # The steps after the checkpoint run again, and are logged again.
    log.forget_after(step)
    return Progress(False, checkpoint, step)


def refuse_other_settings(out: Path, config: dict) -> None:
    """Raise UserError if the folder has a run with other settings, such as another algorithm's."""
    path = out / "config.json"
    if not path.exists() or is_failed_start(out):
        return
    saved = files.read_json(path)
    wanted = {}
    for name in saved | config:
        if name not in FREE_ON_RESUME:
            wanted[name] = config.get(name)
    files.refuse_difference(str(out), saved, wanted)


class RunLog:
    """What rank 0 writes for every step: metrics.jsonl, samples.jsonl, a line on the terminal."""

    def __init__(self, out: Path, num_steps: int) -> None:
        self.out = out
        self.num_steps = num_steps
        self.seconds = []  # of the steps since the start
        self.tracker = None

    def open(self) -> None:
        """Open both files, for this process alone."""
        self.metrics_file = files.open_locked(self.out / "metrics.jsonl")
        self.samples_file = files.open_locked(self.out / "samples.jsonl")

    def forget_after(self, last_step: int) -> None:
        """Drop the lines of steps that run again; without a checkpoint, of all of them.

        The files are truncated in place, not rewritten, so that a kill cannot lose a line that
        should stay.
        """
        for file in (self.metrics_file, self.samples_file):
            num_bytes = 0
            for line in Path(file.name).read_bytes().splitlines(keepends=True):
                if last_step == 0 or step_of(line) > last_step:
                    break
                num_bytes += len(line)
            file.truncate(num_bytes)

    def start_tracker(self, name: str, config: dict) -> None:
        """Send the metrics to wandb or trackio as well; the two have the same functions.

        Raises UserError if it does not start, for example without a login.
        """
        self.tracker = importlib.import_module(name)
        try:
            self.tracker.init(project="a-star-po", name=self.out.name, config=config)
        except Exception as error:  # each has its own types, and those of the network
            reason = files.one_line(error)
            raise UserError(f"--tracker {name} does not start: {reason}") from error

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write one step's metrics: to the file, to the tracker, and in short to the terminal."""
        self.metrics_file.write(json.dumps(metrics) + "\n")
        self.metrics_file.flush()
        if self.tracker is not None:
            self.tracker.log(metrics, step=metrics["step"])
        command_line.print_line(self.describe(metrics))

    def finish_tracker(self) -> None:
        """Tell the tracker that the run has ended: trackio sends its last lines only then."""
        if self.tracker is not None:
            self.tracker.finish()

    def write_samples(
        self, step: int, responses: list[Response], logratios: dict[int, float]
    ) -> None:
        """Write some responses of a step; `logratios` are by the response's index."""
        for response in responses:
            sample = {
                "step": step,
                "id": response.prompt.row["id"],
                "prompt": response.prompt.text,
                "output": response.text,
                "finished": response.finished,
                "reward": response.reward,
                "v_star": response.numbers["v_star"],
                "logratio": logratios.get(response.index),
            }
            self.samples_file.write(json.dumps(sample) + "\n")
        self.samples_file.flush()

    def describe(self, metrics: dict[str, Any]) -> str:
        """Say in one line how far the run is. What does not fit into COLUMNS is left out."""
        progress = f"step {metrics['step']}/{self.num_steps}"
        if "reward" not in metrics:  # step 0, the untrained model, has its evaluation alone
            truncated = f"{metrics['eval_truncated']:.1%} truncated"
            return f"{progress}  test {metrics['eval_accuracy']:.1%} ({truncated})"

        self.seconds.append(metrics["seconds_total"])
        # The recent speed: responses grow longer or shorter while a model learns.
        recent = self.seconds[-20:]
        left = (self.num_steps - metrics["step"]) * sum(recent) / len(recent)
        truncated = f"truncated {metrics['truncated']:.0%}"
        decimals = 1 if metrics["seconds_total"] < 100 else 0
        parts = [progress, f"reward {metrics['reward']:.3f}", f"V* {metrics['v_star']:.3f}"]
        if "logratio" in metrics:
            parts.append(f"KL {metrics['logratio']:.3f}")
        parts.append(f"length {metrics['response_tokens']:.0f}")
        parts.append(truncated)
        parts.append(f"{metrics['seconds_total']:.{decimals}f} s")
        parts.append(f"{describe_seconds(left)} left")
        if "eval_accuracy" in metrics:
            parts.append(f"test {metrics['eval_accuracy']:.1%}")
        if len("  ".join(parts)) > COLUMNS:
            parts.remove(truncated)
        return "  ".join(parts)


def step_of(line: bytes) -> int:
    """Read the step of a line of a log; 0 for a line that somebody has damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return step if type(step) is int else 0


def describe_seconds(seconds: float) -> str:
    """Write a time for a person: 45 s, 12 min, 3 h 20 min, 31 h."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 600:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes / 60:.0f} h"
