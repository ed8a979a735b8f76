"""How a script starts and ends: its flags, its exit codes, and what a signal does.

Exit codes: 0; 2 for a user's mistake, told in one sentence; 128 + the signal's number if a signal
ends it, so 129, 130 and 143 for SIGHUP, SIGINT and SIGTERM; 1 with a full traceback for anything
else.
"""

import argparse
import contextlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

from apo.files import UserError

LOWEST_TEMPERATURE = 0.01  # vLLM silently raises what is below it
LARGEST_NUMBER = 10**9  # of steps, tokens and the like; more is a mistake
LARGEST_SEED = 2**32 - 1  # of numpy's generator, which vLLM seeds as well
SECONDS_FOR_RANK_0 = 10  # to say what is wrong and to end, before another rank says it
SECONDS_FOR_MESSAGES = 0.5
# Signals that come within so many seconds are one request to stop. `pkill` reaches the ranks and
# their launcher, which sends it to the ranks once more.
SECONDS_OF_ONE_STOP = 3


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Show the default of each flag that has one, and keep the line breaks of the examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        if action.default == argparse.SUPPRESS:
            return action.help
        return f"{action.help} (default: %(default)s)"


def new_parser(description: str, examples: str) -> argparse.ArgumentParser:
    """Start a script's command line. `examples` is printed at the end of --help."""
    return argparse.ArgumentParser(
        usage="%(prog)s [flags]",
        description=description,
        epilog=examples,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )


def add_engine_flags(parser: argparse.ArgumentParser, gpu_share: float) -> None:
    """Add the flags that all three stages have."""
    add = parser.add_argument_group("seed and sampling engine (flags of all stages)").add_argument
    add("--seed", type=seed, default=0, help="seed of all that is drawn")
    add(
        "--gpu-memory-utilization",
        type=fraction,
        default=gpu_share,
        help="share of each GPU's memory that the engine may use (in stage 2 of the free memory, "
        "and less if a step needs less)",
    )
    share = "GPUs that share one copy of the model while sampling"
    add("--tensor-parallel-size", type=positive_integer, default=1, help=share)


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of stages 1 and 3 that decide how a question becomes a prompt."""
    add = parser.add_argument_group("prompt").add_argument
    add(
        "--chat-template",
        action="store_true",
        help="write prompts in the tokenizer's chat template, for instruct models; without it they "
        "are plain text, for base models",
    )
    add("--system-prompt", metavar="TEXT", help="a system turn; it needs --chat-template")
    add(
        "--chat-template-kwargs",
        metavar="JSON",
        help="arguments of the chat template, such as '{\"enable_thinking\": false}'",
    )


def is_installed(package: str) -> bool:
    """Say whether a package can be imported. A folder of its name, such as wandb/, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


# ---------------------------------------------------------------------------------------------
# Types of flags. argparse turns a ValueError or ArgumentTypeError into a sentence and exit code 2.


def positive_integer(text: str) -> int:
    """Read 1, 2, 3, ..."""
    value = int(text)
    if not 1 <= value <= LARGEST_NUMBER:
        raise argparse.ArgumentTypeError(
            f"{text:.30} is not a whole number from 1 to {LARGEST_NUMBER}"
        )
    return value


def whole_number(text: str) -> int:
    """Read 0, 1, 2, ..."""
    value = int(text)
    if not 0 <= value <= LARGEST_NUMBER:
        raise argparse.ArgumentTypeError(
            f"{text:.30} is not a whole number from 0 to {LARGEST_NUMBER}"
        )
    return value


def seed(text: str) -> int:
    """Read a seed that every generator takes."""
    value = int(text)
    if not 0 <= value <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(
            f"{text:.30} is not a whole number from 0 to {LARGEST_SEED}"
        )
    return value


def positive_number(text: str) -> float:
    """Read a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def positive_or_infinite(text: str) -> float:
    """Read a number above 0, or inf."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is neither a number above 0 nor inf")
    return value


def temperature(text: str) -> float:
    """Read 0 (greedy), or a temperature that vLLM takes as it is."""
    value = float(text)
    if value != 0 and not LOWEST_TEMPERATURE <= value <= LARGEST_NUMBER:
        raise argparse.ArgumentTypeError(
            f"{text} is neither 0 (greedy) nor from {LOWEST_TEMPERATURE} to {LARGEST_NUMBER}"
        )
    return value


def sampling_temperature(text: str) -> float:
    """Read a temperature above 0: V* and ln pi are not defined for greedy decoding."""
    value = temperature(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 is greedy decoding: a temperature above 0 is needed")
    return value


def fraction(text: str) -> float:
    """Read a number above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


# ---------------------------------------------------------------------------------------------
# Start and end


def run(main: Callable[[], None]) -> None:
    """Run a script's `main` with the exit codes above.

    Stop signals end it at once. The training loop replaces their handlers by a StopFlag.
    """
    for number in stop_signals():
        signal.signal(number, exit_on_signal)
    for stream in (sys.stdout, sys.stderr):
        # A terminal without "±" then shows an escape code, and print does not fail. A stream is
        # None if the shell has closed it.
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:
        # Nearly always all ranks find the same mistake. Then the first one says it and ends, and
        # torchrun ends the others while they wait here. If only this rank has found it, it says so.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            signal.signal(signal.SIGTERM, exit_on_signal)  # a StopFlag would let this rank wait on
            time.sleep(SECONDS_FOR_RANK_0)
        with contextlib.suppress(OSError):  # there may be nobody who reads it
            print(f"error: {error}", file=sys.stderr, flush=True)
        if has_others():
            leave_others(2)
        sys.exit(2)
    except Exception:
        if has_others():
            # If this is only because another rank has failed, torchrun ends this one meanwhile.
            let_messages_end()
            sys.excepthook(*sys.exc_info())  # it prints the traceback, as Python itself would
            leave_others(1)
        raise
    finally:
        let_messages_end()


def leave_others(code: int) -> None:
    """End this rank at once, so that torchrun ends the others as well.

    vLLM cleans up when Python shuts down: it destroys the process group. On GPUs that waits for the
    other ranks, which may wait for this one.
    """
    with contextlib.suppress(Exception):  # there may be nobody who reads it
        sys.stdout.flush()
    os._exit(code)


def has_others() -> bool:
    """Say whether this process is one of several ranks."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_initialized():
        return False
    return torch.distributed.get_world_size() > 1


def let_messages_end() -> None:
    """Give the thread that sends messages between ranks the time to free the last one.

    For that it needs the interpreter. If Python is already shutting down, the thread is ended in
    the middle of it, and the process aborts with exit code 134. destroy_process_group would wait
    for that thread, but on GPUs for the other ranks as well, which may not come.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_initialized():
        time.sleep(SECONDS_FOR_MESSAGES)


def stop_signals() -> list[int]:
    """Return the signals that ask this process to stop. SIGHUP says that its terminal is gone."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as `nohup` sets it
        numbers.append(signal.SIGHUP)
    return numbers


def print_line(text: str) -> None:
    """Print a line at once. If nobody reads it any more, nothing is printed from here on.

    That must not end a run: Ctrl-C also ends the `tee` behind it, before the step is saved.
    """
    try:
        print(text, flush=True)
    except OSError:
        # Whatever is still in the buffer goes there too, without another error at the end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def exit_on_signal(number: int, frame: FrameType | None) -> None:
    """Leave with exit code 128 + number. Graded responses are on the disk, except the last few.

    No exception is raised: one that reaches C++, while a library is imported, aborts the process.
    """
    # It may come in the middle of a print, or there may be nobody who reads what is printed.
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(128 + number)


class StopFlag:
    """Remembers the first stop signal, so that the step can be finished and saved.

    A second one ends the process at once, unless it belongs to the same request to stop.
    """

    def __init__(self) -> None:
        self.number = 0
        self.first_time = 0.0  # when the first one came
        for number in stop_signals():
            signal.signal(number, self.receive)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note the signal."""
        if not self.number:
            self.number = number
            self.first_time = time.monotonic()
        elif time.monotonic() > self.first_time + SECONDS_OF_ONE_STOP:
            os._exit(128 + number)

    def agree(self) -> int:
        """Return the signal that any rank received, 0 if none; all ranks call it together."""
        import torch  # here, as nothing else in this file needs it

        received = torch.tensor(self.number)
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
        return int(received)
