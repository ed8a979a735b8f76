"""The task: datasets, prompt and reward, on which the three stages must agree.

To train on another task, edit this file: add a row to `DATASETS` or change `reward`. Nothing heavy is
imported at the top, because the file is also run as a grading worker (section 4), several at a time.
"""

import ctypes
import fcntl
import hashlib
import json
import os
import signal
import socket
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO


class UserError(ValueError):
    """A mistake of the user's, told in one sentence: `run` prints it and exits with code 2."""


# ---------------------------------------------------------------------------------------------
# 1. Datasets

# (name, what it serves): hub id, config, split on the hub, columns of question and answer.
# Stage 1 takes only what serves "train"; the hub calls the one split of some test sets "train" too.
DATASETS = {
    ("math", "train"): ("DigitalLearningGmbH/MATH-lighteval", None, "train", "problem", "solution"),
    ("gsm8k", "train"): ("openai/gsm8k", "main", "train", "question", "answer"),
    ("gsm8k", "test"): ("openai/gsm8k", "main", "test", "question", "answer"),
    ("math500", "test"): ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    ("minerva", "test"): ("math-ai/minervamath", None, "test", "question", "answer"),
    ("olympiadbench", "test"): (
        *("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "question", "final_answer"),
    ),
    ("amc23", "test"): ("math-ai/amc23", None, "test", "question", "answer"),
    ("aime24", "test"): ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    ("aime25", "test"): ("math-ai/aime25", None, "test", "problem", "answer"),
    ("hmmt_feb_2024", "test"): ("MathArena/hmmt_feb_2024", None, "train", "problem", "answer"),
    ("hmmt_feb_2025", "test"): ("MathArena/hmmt_feb_2025", None, "train", "problem", "answer"),
}


def load_problems(name: str, serves: str | None = None) -> list[dict]:
    """Load a registered dataset, or a .jsonl, .json or .parquet file, as {"id", "question", "answer"}.

    `serves` is "train" or "test" (some names have both); None takes the first. What cannot be loaded
    raises UserError; an answer that cannot be graded is kept, for `split_gradable` to find.
    """
    path, keys = Path(name), [k for k in DATASETS if k[0] == name and serves in (None, k[1])]
    if path.suffix in (".jsonl", ".json", ".parquet"):
        rows, question_column, answer_column = _read_rows(path), "question", "answer"
    elif keys:
        hub_id, config, split, question_column, answer_column = DATASETS[keys[0]]
        import datasets  # here and not above: it takes a second

        try:
            rows = datasets.load_dataset(hub_id, config, split=split)
        except Exception as error:  # the hub raises a dozen types; what counts is the cause
            raise UserError(
                f"cannot load {name} from the hub ({hub_id}): {cause(error)}"
            ) from error
    else:
        known = ", ".join(sorted({n for n, role in DATASETS if serves in (None, role)}))
        raise UserError(
            f"unknown dataset {name!r}: use a .jsonl, .json or .parquet file, or {known}"
        )
    problems = {}
    for number, row in enumerate(rows, start=1):
        where = f"{name}, row {number}"
        if not isinstance(row, dict) or not row.keys() >= {question_column, answer_column}:
            columns = f"{question_column!r} and {answer_column!r}"
            raise UserError(f"{where} has not the columns {columns}: {row!r:.60}")
        question, answer = row[question_column], row[answer_column]
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"{where}: the question is not a text: {question!r:.60}")
        question = question.encode(errors="replace").decode()  # no tokenizer takes a lone surrogate
        if answer_column == "solution":
            answer = last_box(str(answer))
        elif name == "gsm8k":
            answer = str(answer).split("####")[-1].strip()
        elif answer_column == "final_answer":  # OlympiadBench: a list of one
            answer = answer[0] if answer else None
        key = row.get("id") if path.suffix else None
        key = f"{path.stem}/{number - 1}" if key is None else str(key)
        if key in problems:
            raise UserError(f"{where}: the id {key!r} was taken by a row before it")
        problems[key] = {"id": key, "question": question, "answer": answer}
    if not problems:
        raise UserError(f"{name} has no rows")
    return list(problems.values())


def _read_rows(path: Path) -> list:
    """Read a local file's rows; UserError says what is wrong and where."""
    rows = []
    try:
        if path.suffix == ".parquet":
            import datasets

            return datasets.Dataset.from_parquet(str(path)).to_list()
        with open(path, encoding="utf-8-sig") as lines:  # -sig: a byte-order mark is dropped
            if path.suffix == ".json":
                return json.load(lines)
            for number, line in enumerate(lines, start=1):  # noqa: B007 (told in the error)
                if line.strip():
                    rows.append(json.loads(line))
    except json.JSONDecodeError as error:
        number = error.lineno if path.suffix == ".json" else number
        raise UserError(f"{path}, line {number}: no valid JSON: {error.msg}") from error
    except Exception as error:  # missing, unreadable, damaged: datasets raises a dozen types
        raise UserError(f"cannot read {path}: {cause(error)}") from error
    return rows


def split_gradable(problems: list[dict]) -> tuple[list[dict], dict[str, str]]:
    """Part the problems that can be graded, answers made texts, from {id: reason} of the others."""
    gradable, reasons = [], {}
    for problem in problems:
        try:
            gradable.append(problem | {"answer": check_answer(problem["answer"])})
        except ValueError as error:
            reasons[problem["id"]] = str(error)
    return gradable, reasons


# ---------------------------------------------------------------------------------------------
# 2. The prompt

PROMPT_TEMPLATE = "{question}\nLet's think step by step, and put the final answer in \\boxed{}.\n"


def format_prompt(question: str, chat_tokenizer: Any = None) -> str:
    """Write the prompt for a question; given a tokenizer, as a user's turn in its chat template."""
    prompt = PROMPT_TEMPLATE.replace("{question}", question)  # not str.format: braces abound
    if chat_tokenizer is None:
        return prompt
    turn = [{"role": "user", "content": prompt}]
    return chat_tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def prompt_token_ids(tokenizer: Any, prompt: str, chat_template: bool) -> list[int]:
    """Tokenize a prompt; a chat template has already written the special tokens (BOS) itself."""
    return tokenizer(prompt, add_special_tokens=not chat_template).input_ids


# ---------------------------------------------------------------------------------------------
# 3. The reward


# ---------------------------------------------------------------------------------------------
# 4. Grading many at once


# ---------------------------------------------------------------------------------------------
# 5. What all stages agree on beside the task

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in the rank's own process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else a CPU engine pins the whole process to one core
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}


def run(main: Callable[[], None]) -> None:
    """Run a script: a UserError becomes one sentence and exit code 2, a signal code 130 or 143."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def launch() -> None:
    """Give every GPU a rank: with two or more, run this command under torchrun and exit as it does.

    Returns in a rank: one of torchrun's, or the only one. Call it when all that can be checked is.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "RANK" in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive the launcher
        return
    import torch
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if (gpus := torch.cuda.device_count()) > 1:
        try:
            command = ["--standalone", f"--nproc-per-node={gpus}", *sys.argv]
            torchrun.run(torchrun.parse_args(command))
        except ChildFailedError as error:
            code = error.get_first_failure()[1].exitcode
            sys.exit(code if code in (2, 130, 143) else 1)
        except SignalException as error:
            sys.exit(128 + error.sigval)
        sys.exit(0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")


def response_seed(seed: int, step: int, problem_id: str, sample: int) -> int:
    """Seed one response by what it is, so that no batch, rank or resume changes what is sampled."""
    text = json.dumps([seed, step, problem_id, sample])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 2  # fits an int64


def model_folder(model: str) -> Path:
    """Find a model's files, a local folder or a hub id's (downloaded if need be), or UserError."""
    folder = Path(model)
    if not folder.is_dir():
        import huggingface_hub

        try:
            wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
            folder = Path(huggingface_hub.snapshot_download(model, allow_patterns=wanted))
        except Exception as error:  # as for the datasets
            raise UserError(f"no model {model}, here or on the hub: {cause(error)}") from error
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} is no model: it wants config.json and *.safetensors files")
    return folder


def folder_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a model's folder that decides what the model does."""
    suffixes = (".safetensors", ".json", ".txt", ".model", ".jinja")
    files = [p for p in sorted(folder.rglob("*")) if p.suffix in suffixes]
    return {str(p.relative_to(folder)): file_sha256(p) for p in files if p.name != "manifest.json"}


def model_sha256(model: str) -> str:
    """Identify a model: its weights (in full), config and tokenizer."""
    return hashlib.sha256(json.dumps(folder_hashes(model_folder(model))).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hash a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(document: dict) -> str:
    """Hash a document but for the sha256 in its own header."""
    header = {k: v for k, v in document["header"].items() if k != "sha256"}
    return hashlib.sha256(json.dumps(document | {"header": header}).encode()).hexdigest()


def refuse_difference(what: str, saved: dict, wanted: dict) -> None:
    """Raise UserError naming each field of `wanted` in which `saved` differs."""
    differ = [k for k, v in wanted.items() if saved.get(k) != v]
    if differ:
        fields = "; ".join(f"{k} {saved.get(k)!r}, not {wanted[k]!r}" for k in differ)
        raise UserError(f"{what} was made with {fields}")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside, flushed to the disk, renamed."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def lock(path: Path) -> TextIO:
    """Open `path` for appending, for this process alone; UserError if another has it."""
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (held until the run ends)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"another run is writing {path}: wait for it or give another --out"
        ) from error
    return file


def append_record(file: TextIO, record: dict) -> None:
    """Append a line that survives a SIGKILL and that `read_records` knows from a torn one."""
    text = json.dumps(record)
    file.write(f"\n{zlib.crc32(text.encode()):08x} {text}")
    file.flush()


def read_records(paths: list[Path]) -> list[dict]:
    """Read the lines of `append_record` from several files, those that are whole."""
    lines = (line for path in paths for line in path.read_text("utf-8", "replace").split("\n"))
    return [json.loads(x[9:]) for x in lines if x[:8] == f"{zlib.crc32(x[9:].encode()):08x}"]


def cause(error: Exception) -> str:
    """First line of what an exception says, or its type."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
