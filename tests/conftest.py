"""What the end-to-end tests share: a model of 80,000 weights, its problems, runs of the scripts.

The scripts are run as a user runs them, in processes of their own: no engine, process group or
grader is imitated anywhere. A start costs 10 to 15 s, so each run below is made once and looked at
by many tests.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from apo import files, problems

ROOT = Path(__file__).parent.parent
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
# So small a model gains nothing from a second thread, and on busy cores each waits for the other.
ENV |= {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def run() -> Callable[..., SimpleNamespace]:
    """Run `python *command` in the repository; its exit code and what it printed."""

    def call(*command: str | Path, timeout: int = 240) -> SimpleNamespace:
        process = spawn(*command)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            kill(process)
        return SimpleNamespace(code=process.returncode, out=out, err=err, all=out + err)

    return call


def spawn(*command: str | Path) -> subprocess.Popen:
    pipe = subprocess.PIPE
    arguments = [sys.executable, *map(str, command)]
    options = {"cwd": ROOT, "env": ENV, "text": True, "start_new_session": True}
    return subprocess.Popen(arguments, stdout=pipe, stderr=pipe, **options)


def kill(process: subprocess.Popen) -> None:
    """End a process, if it still runs, and all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def torchrun(num_ranks: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_until(true: Callable[[], bool], process: subprocess.Popen, seconds: int = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All files below a folder, or a file itself: when written, and with what."""
    files = [p for p in (folder, *folder.rglob("*")) if p.is_file()]
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


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
    """A Qwen2 of two layers that answers every prompt with a few a's and a digit in a box.

    `aa\\boxed{3}`, the number of a's geometric, the digit one of 0 to 3: it is right about a
    quarter of the time, responses have 10 tokens and more, and V* lies between 0 and 1. Its
    training takes three seconds.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)} | {"<|endoftext|>": 256}
    bytelevel = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bytelevel.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytelevel.decoder = decoders.ByteLevel()
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytelevel, **special)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as above
    sizes = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 128}
    # The CPU engine's attention wants heads of 32 or more.
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256}
    ids |= {"max_position_embeddings": 512, "tie_word_embeddings": True}
    lm = Qwen2ForCausalLM(Qwen2Config(**sizes, **ids))
    optimizer, chance = torch.optim.AdamW(lm.parameters(), 3e-3), random.Random(0)
    for _ in range(150):
        texts = []
        for _ in range(16):
            prompt = problems.format_prompt("".join(chance.choices("abcdefg ", k=4)))[-20:]
            count = next(k for k in range(99) if chance.random() < 0.5)
            texts.append((prompt, "a" * count + f"\\boxed{{{chance.randrange(4)}}}"))
        rows = [(tokenizer(p).input_ids, [*tokenizer(r).input_ids, 256]) for p, r in texts]
        longest = max(len(p + r) for p, r in rows)
        ids = torch.tensor([p + r + [256] * (longest - len(p + r)) for p, r in rows])
        labels = torch.full_like(ids, -100)
        for i, (p, r) in enumerate(rows):
            labels[i, len(p) : len(p + r)] = torch.tensor(r)
        lm(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    folder = tmp_path_factory.mktemp("model")
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


NUM_PROMPTS, NUM_VALUE_SAMPLES = 40, 8
SAMPLING = ("--max-prompt-tokens", "160", "--max-tokens", "48")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty problems that can be asked, one that is too long, two whose answer is none."""
    rows = [
        {"question": "Give a digit. " * (1 + i % 5), "answer": i % 4, "id": f"p{i}"}
        for i in range(NUM_PROMPTS)
    ]
    rows.insert(3, {"question": "long " * 50, "answer": "1", "id": "too-long"})
    rows.insert(5, {"question": "Which?", "answer": "", "id": "empty-answer"})
    rows.append({"question": "Which?", "answer": "{1", "id": "open-brace"})
    return write_lines(tmp_path_factory.mktemp("data") / "digits.jsonl", rows)


@pytest.fixture(scope="session")
def stage1(run: Callable, model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory):
    """An uninterrupted run of stage 1: what it printed, and `.file`."""
    file = tmp_path_factory.mktemp("stage1") / "new" / "values.json"
    told = run("offline_value.py", *stage1_arguments(model, dataset), "--out", file)
    assert told.code == 0, told.all
    return SimpleNamespace(**vars(told), file=file)


def stage1_arguments(model: Path, dataset: Path) -> tuple:
    samples = ("--num-value-samples", NUM_VALUE_SAMPLES)
    return ("--model", model, "--dataset", dataset, *samples, *SAMPLING)


@pytest.fixture(scope="session")
def cut_short(run: Callable, model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory):
    """Stage 1's file when nobody may say a tenth token: the box is whole, but no EOS follows."""
    file = tmp_path_factory.mktemp("cut") / "values.json"
    command = ("offline_value.py", *stage1_arguments(model, dataset), *CUT_SHORT, "--out", file)
    told = run(*command)
    assert told.code == 0, told.all
    return file


CUT_SHORT = ("--max-tokens", "9")  # `\\boxed{1}`, byte by byte


# Five sequences never part evenly, and 200 tokens hold two: ranks and micro-batches are unequal.
# A learning rate of 1e-4 moves the model of the tests visibly at each step.
RAGGED = """--batch-size 5 --updates-per-batch 1 --num-steps 2 --micro-batch-tokens 200 --lr 1e-4
--beta2 0.1 --save-every 1"""


@pytest.fixture(scope="session")
def one_rank(run: Callable, stage1: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory):
    """The folder of a run of stage 2, two steps on one rank."""
    out = tmp_path_factory.mktemp("stage2") / "new" / "run"
    told = run("train_online.py", "--values", stage1.file, "--out", out, *RAGGED.split())
    assert told.code == 0, told.all
    return out


# ---------------------------------------------------------------------------------------------
# Bad input


@pytest.fixture(scope="session")
def bad_runs(run: Callable) -> Callable[..., dict[str, SimpleNamespace]]:
    """Run a script once for each case of a table {name: (arguments, what it says)}, two at a time.

    `{place}` in the arguments becomes one of `places`; {out} is a path of the case's own in which
    nothing is, and `.left` is what is there afterwards.
    """

    def call(script: str, table: dict, folder: Path, **places: Path) -> dict[str, SimpleNamespace]:
        def one(numbered: tuple[int, str]) -> SimpleNamespace:
            number, name = numbered
            place = folder / str(number)
            place.mkdir()
            words = table[name][0].format(out=place / "out", **places).split()
            told = run(script, *words)
            told.left = [path.name for path in place.rglob("*")]
            return told

        with ThreadPoolExecutor(2) as pool:
            return dict(zip(table, pool.map(one, enumerate(table)), strict=True))

    return call


def assert_refused(told: SimpleNamespace, says: str) -> None:
    """Exit code 2, one sentence that says what is wrong, and nothing written."""
    assert told.code == 2, told.all
    assert "Traceback" not in told.all
    (line,) = [line for line in told.err.splitlines() if line.startswith("error:")]
    assert says in line
    assert told.left == []
