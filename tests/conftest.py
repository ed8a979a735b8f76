"""What the tests share: a model of 80,000 weights, its problems, and runs of the scripts.

The scripts are run as a user runs them, in processes of their own, with the real engine and the
real grader. A start costs 10 to 15 s, so each run below is made once and looked at by many tests.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file

from apo import command_line, engine, files, problems

ROOT = Path(__file__).parent.parent
# A process inherits which signals are ignored, but not who handles them. Under `nohup make test`,
# what the tests start would not see SIGHUP.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)
ENV = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # So small a model gains nothing from a second thread, and on busy cores each waits for the
    # other.
    "OMP_NUM_THREADS": "1",
}

# The same examples in every run, however slow the machine.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")

# ---------------------------------------------------------------------------------------------
# Processes


@pytest.fixture(scope="session")
def run() -> Callable[..., SimpleNamespace]:
    """Run `python *command` in the repository; return its exit code and what it printed."""

    def call(
        *command: object, timeout: float = 1800, env: dict[str, str] | None = None
    ) -> SimpleNamespace:
        process = spawn(*command, env=env)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            kill(process)
        return SimpleNamespace(code=process.returncode, out=out, err=err, all=out + err)

    return call


def spawn(*command: object, env: dict[str, str] | None = None) -> subprocess.Popen:
    """Start `python *command` in the repository, with `env` added to the environment."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=ENV | (env or {}),
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def kill(process: subprocess.Popen) -> None:
    """End a process, if it still runs, and all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def at_once(*calls: Callable[[], object]) -> list:
    """Call some functions at the same time, and return their results in order."""
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.result() for future in futures]


def torchrun(num_ranks: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_until(true: Callable[[], bool], process: subprocess.Popen, seconds: float = 1200) -> None:
    """Wait until `true()` is, while the process runs."""
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"nothing happened within {seconds} s"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """Make this process the only rank of a process group."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def assert_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> Iterator[Callable[[ModuleType, str, str], None]]:
    """Call a script's main in this process: it must refuse, in one sentence, before it starts.

    The arguments are the script's module, its command line, and a part of the sentence.
    """
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in stops}

    def launch(*arguments: object) -> None:
        pytest.fail("the script started: its checks let this pass")

    def call(script: ModuleType, command_line_text: str, says: str) -> None:
        monkeypatch.setattr(engine, "launch", launch)
        monkeypatch.setattr(sys, "argv", [script.__file__, *command_line_text.split()])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            command_line.run(script.main)
        err = capfd.readouterr().err
        assert exit_info.value.code == 2, err
        assert_one_error(err, says)

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


def assert_one_error(err: str, says: str) -> None:
    """Check that the standard error has one sentence that says what is wrong, and no traceback."""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "error: " in line]
    assert len(lines) == 1, err
    sentence = lines[0]
    if "." not in says and "/" not in says:  # a path must not happen to contain it
        sentence = re.sub(r"/\S+", "", sentence)
    assert says in sentence


# ---------------------------------------------------------------------------------------------
# Files


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def read_metrics(folder: Path) -> list[dict]:
    return read_lines(folder / "metrics.jsonl")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Take all files below a folder, or a file itself: when written, and with what."""
    paths = [path for path in (folder, *folder.rglob("*")) if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def edit_values(source: Path, to: Path, change: Callable[[dict], None]) -> Path:
    """Copy a values file with a change made, as its user may."""
    values = json.loads(source.read_text())
    change(values)
    files.write_json(to, values)
    return to


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------------------------------------
# The model and its problems


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a Qwen2 of two layers to answer every prompt with a few a's and a digit in a box.

    `aa\\boxed{3}`: the number of a's is geometric, the digit one of 0 to 3. So it is right about a
    quarter of the time, responses have 10 tokens and more, and V* lies between 0 and 1. The
    training takes three seconds.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as above
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        # The CPU engine's attention wants heads of 32 or more.
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
    )
    lm = Qwen2ForCausalLM(config)
    optimizer = torch.optim.AdamW(lm.parameters(), 3e-3)
    chance = random.Random(0)
    for _ in range(150):
        rows = []
        for _ in range(16):
            question = "".join(chance.choices("abcdefg ", k=4))
            prompt = tokenizer(problems.format_prompt(question)[-20:]).input_ids
            count = next(k for k in range(99) if chance.random() < 0.5)
            response = tokenizer("a" * count + f"\\boxed{{{chance.randrange(4)}}}").input_ids
            rows.append((prompt, [*response, 256]))
        longest = max(len(prompt + response) for prompt, response in rows)
        ids = torch.full((len(rows), longest), 256)
        labels = torch.full((len(rows), longest), -100)
        for i, (prompt, response) in enumerate(rows):
            end = len(prompt + response)
            ids[i, :end] = torch.tensor(prompt + response)
            labels[i, len(prompt) : end] = torch.tensor(response)
        lm(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)

    folder = tmp_path_factory.mktemp("model")
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer() -> object:
    """Make a tokenizer whose tokens are the 256 bytes and one that is both EOS and pad."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    vocabulary["<|endoftext|>"] = 256
    byte_level = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


NUM_PROMPTS = 40
NUM_VALUE_SAMPLES = 8
SAMPLING = ("--max-prompt-tokens", "160", "--max-tokens", "48")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write forty problems that can be asked, one that is too long, two without a usable answer."""
    rows = []
    for i in range(NUM_PROMPTS):
        question = "Give a digit. " * (1 + i % 5)
        rows.append({"question": question, "answer": i % 4, "id": f"p{i}"})
    rows.insert(3, {"question": "long " * 50, "answer": "1", "id": "too-long"})
    rows.insert(5, {"question": "Which?", "answer": "", "id": "empty-answer"})
    rows.append({"question": "Which?", "answer": "{1", "id": "open-brace"})
    return write_lines(tmp_path_factory.mktemp("data") / "digits.jsonl", rows)


# ---------------------------------------------------------------------------------------------
# Runs of the stages


def stage1_arguments(model: Path, dataset: Path) -> tuple:
    samples = ("--num-value-samples", NUM_VALUE_SAMPLES)
    return ("--model", model, "--dataset", dataset, *samples, *SAMPLING)


@pytest.fixture(scope="session")
def stage1(
    run: Callable, model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """Run stage 1 uninterrupted; `.file` is its values file."""
    file = tmp_path_factory.mktemp("stage1") / "new" / "values.json"
    result = run("offline_value.py", *stage1_arguments(model, dataset), "--out", file)
    assert result.code == 0, result.all
    result.file = file
    return result


# Five sequences never divide evenly, and 200 tokens hold two: ranks and micro-batches are unequal.
# A learning rate of 1e-4 moves the model of the tests visibly at each step.
RAGGED = """--batch-size 5 --samples-per-prompt 1 --updates-per-batch 1 --num-steps 2
--micro-batch-tokens 200 --lr 1e-4 --beta2 0.1 --save-every 1"""
# Two updates a step, two responses per prompt, and an evaluation now and then.
LONG = """--batch-size 6 --updates-per-batch 2 --samples-per-prompt 2 --lr 1e-4 --beta2 0.1
--beta1 1 --eval-every 3"""


@pytest.fixture(scope="session")
def stage2_runs(
    run: Callable, stage1: SimpleNamespace, dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SimpleNamespace, SimpleNamespace]:
    """Run stage 2 twice: two steps in unequal micro-batches, and eight steps at temperature 0.5."""
    folder = tmp_path_factory.mktemp("stage2") / "new"
    cool = folder.with_name("cool.json")
    edit_values(stage1.file, cool, lambda values: values["header"].update(temperature=0.5))

    def ragged() -> SimpleNamespace:
        arguments = ("--values", stage1.file, *RAGGED.split())
        result = run("train_online.py", *arguments, "--out", folder / "ragged")
        result.folder = folder / "ragged"
        result.arguments = arguments
        return result

    def straight() -> SimpleNamespace:
        arguments = ("--values", cool, "--eval-dataset", dataset, *LONG.split())
        last = ("--num-steps", "8", "--save-every", "3", "--out", folder / "straight")
        result = run("train_online.py", *arguments, *last)
        result.folder = folder / "straight"
        result.arguments = arguments
        result.values = json.loads(cool.read_text())
        return result

    results = at_once(ragged, straight)
    for result in results:
        assert result.code == 0, result.all
    return tuple(results)


@pytest.fixture(scope="session")
def one_rank(stage2_runs: tuple) -> Path:
    """Return the folder of the first run of stage 2."""
    return stage2_runs[0].folder


FORK = Path(__file__).parent / "fork" / "parity.py"
SHORT = """--batch-size 4 --samples-per-prompt 1 --num-steps 2 --lr 1e-4 --log-samples 3
--tracker trackio"""


@pytest.fixture(scope="session")
def fork(run: Callable, model: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Run a fork's stages 1 and 2: a task that is not mathematics, two steps of four prompts.

    `.fails` is stage 1 again, with a reward that raises on one of the rows.
    """
    folder = tmp_path_factory.mktemp("fork")
    rows = [{"ask": f"Digit {i}", "rule": {"parity": i % 2}, "id": f"r{i}"} for i in range(8)]
    write_lines(folder / "parity-train.jsonl", rows)
    write_lines(folder / "parity-dev.jsonl", rows[:4])
    fork = SimpleNamespace(rows=rows, values=folder / "values.json", run=folder / "run")
    fork.env = {"FORK_DATA": str(folder)}
    fork.results = folder / "results"
    fork.tracker_calls = folder / "calls.jsonl"

    def stage1(out: Path, **env: str) -> SimpleNamespace:
        flags = ("--model", model, "--num-value-samples", "4", *SAMPLING, "--out", out)
        return run(FORK, "offline_value.py", "--dataset", "parity", *flags, env=fork.env | env)

    fork.stage1, fork.fails = at_once(
        lambda: stage1(fork.values), lambda: stage1(folder / "failing.json", FORK_FAILS="r5")
    )
    assert fork.stage1.code == 0, fork.stage1.all
    # Python finds the tracker in the folder of the script.
    env = fork.env | {"TRACKIO_CALLS": str(fork.tracker_calls)}
    stage2 = ("train", "--values", fork.values, "--out", fork.run, *SHORT.split())
    fork.stage2 = run(FORK, *stage2, env=env)
    assert fork.stage2.code == 0, fork.stage2.all
    return fork


@pytest.fixture(scope="session")
def straight(stage2_runs: tuple) -> SimpleNamespace:
    """Return the second run of stage 2."""
    return stage2_runs[1]
