"""Files and models on disk: read with clear errors, written whole or not at all.

A file gets its name last, by a rename after fsync, so that a kill or a full disk leaves either the
old file or the new one. Settings of an earlier run are compared by value, and the fields that
differ are named.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError, safe_open

# The files of a model folder that decide what the model says. Whatever else lies there (a README,
# other formats of the weights, .git) is neither compared nor copied into checkpoints.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)
SECOND_COPY = "consolidated*"  # Mistral's own format, beside the same weights in safetensors
# Names under which a config.json has the largest number of tokens that a model can read.
CONTEXT_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
# Errors of a file system that has no flush of folders, or no locks, at all.
CANNOT = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK)
LONGEST_NAME = 255  # bytes of a file's name, on nearly all file systems
BLOCK = 1 << 16  # bytes of a weight file that are read at one place for the fingerprint
NUM_BLOCKS = 16  # places per weight file
# Settings that are a hash of some content, and what has changed if they differ.
DIGESTS = {
    "values_digest": "other prompts or rewards in --values",
    "eval_digest": "other problems in --eval-dataset",
    "dataset_digest": "other problems in --dataset",
    "rows_digest": "other problems",
}


class UserError(Exception):
    """A mistake in flags or files. The script prints its one sentence and exits with code 2."""


def one_line(error: Exception | str, longest: int = 300) -> str:
    """Return the message of a library's error in one line of at most `longest` characters."""
    return " ".join(str(error).split())[:longest]


# ---------------------------------------------------------------------------------------------
# Reading


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file, without the byte-order mark that some editors write."""
    try:
        return Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def read_json(path: str | Path) -> dict:
    """Read a JSON file that holds one object. UserError says what is wrong with it."""
    try:
        document = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: it is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise UserError(f"cannot read {path}: it holds a {type(document).__name__}, not an object")
    return document


def read_jsonl(path: str | Path) -> list[dict]:
    """Read a file with one JSON object a line. UserError names the line that is not one."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is not a JSON object: {line[:60]!r}")
        rows.append(row)
    return rows


def read_whole_lines(path: Path) -> list[dict]:
    """Read the lines of a JSONL file that are whole.

    A killed process can leave a torn line. What it described is simply made again.
    """
    rows = []
    for line in path.read_text("utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------
# Writing


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
    sync_folder(path.parent)


def write_json(path: str | Path, document: dict) -> None:
    """Write one JSON object whole or not at all.

    What JSON has no form for, such as a date, is written as text, and infinity as Infinity.
    """
    write_text(path, json.dumps(document, indent=1, default=str) + "\n")


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names, so that a rename survives a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in CANNOT:
            raise
    finally:
        os.close(descriptor)


def open_locked(path: Path) -> TextIO:
    """Open a JSONL file for appending, for this process alone.

    A torn last line, which a kill can leave, is dropped first. Raises UserError if another process
    has the file open.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - it is locked while it is open
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(
            f"{path} is in use by another run: wait until that has ended, or give another --out"
        ) from error
    except OSError as error:
        if error.errno not in CANNOT:
            raise
        print(
            f"{path} cannot be locked on this file system: no other run may use it now",
            file=sys.stderr,
        )
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        file.truncate(content.rfind(b"\n") + 1)
    return file


def check_writable(out: str | Path, is_folder: bool = False, flag: str = "--out") -> None:
    """Raise UserError, before hours are spent, if nothing can be written at `out`.

    `is_folder` says whether `out` is to be a folder, or a file, and `flag` names it.
    """
    path = Path(out).absolute()
    for place in (path, *path.parents):
        # write_text adds some letters to a name until the file is whole.
        is_too_long = len(os.fsencode(f".{place.name}.unfinished")) > LONGEST_NAME
        if is_too_long and (place == path or not os.path.exists(place)):
            raise UserError(f"{flag} cannot be written: the name {place.name:.40}... is too long")
    for place in (path, *path.parents):
        refuse_broken_link(place)
    partial = f"{path}.partial"
    if not is_folder and os.path.isfile(partial):
        raise UserError(f"{flag} {out} needs a folder {partial}, and that is a file")
    for place in (path, path.parent):
        if place.name.endswith(".partial"):
            raise UserError(f"{flag} {out}: in {place} stages 1 and 3 keep what is not finished")
    if not is_folder and os.path.isdir(path):
        raise UserError(f"{flag} {out} is a folder: give the name of a file")
    folder = path if is_folder else path.parent
    while not os.path.exists(folder):  # until the nearest one that exists
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {out} cannot be written: {folder} is no writable folder")


def refuse_other_content(path: Path, text: str) -> None:
    """Raise UserError if a file, such as the user's own, would be replaced by another content."""
    if path.exists() and read_text(path) != text:
        raise UserError(f"{path} would be replaced: remove it, or give another --out")


def refuse_broken_link(path: Path) -> None:
    """Raise UserError if a path is a link to nothing, such as to a disk that is not mounted."""
    # os.path, since Path.is_symlink raises where a folder may not be entered.
    if os.path.islink(path) and not os.path.exists(path):
        raise UserError(f"{path} is a link to {os.readlink(path)}, which is not there")


# ---------------------------------------------------------------------------------------------
# Settings and models


def refuse_difference(what: str, saved: dict, wanted: dict) -> None:
    """Raise UserError that names each field of `wanted` in which `saved` has another value."""
    differences = []
    for name, new in wanted.items():
        old = saved.get(name)
        if old == new:
            continue
        if name in DIGESTS:
            differences.append(f"another {name} ({DIGESTS[name]})")
        elif isinstance(old, dict) and isinstance(new, dict):
            keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
            differences.append(f"another {name} ({', '.join(keys)})")
        else:
            differences.append(f"{name} {old!r}, not {new!r}")
    if differences:
        raise UserError(f"{what} was made with {'; '.join(differences)}")


def model_folder(model: str) -> Path:
    """Find a model's folder: a local one, or a hub id's, which is downloaded if need be."""
    folder = Path(model)
    if not os.path.isdir(folder):  # False as well for a name that is no path at all
        import huggingface_hub  # here, as it takes a second

        try:
            folder = Path(
                huggingface_hub.snapshot_download(
                    model, allow_patterns=MODEL_FILES, ignore_patterns=SECOND_COPY
                )
            )
        except Exception as error:  # the hub's library raises a dozen unrelated types
            reason = one_line(error)
            raise UserError(f"no model {model!r}, here or on the hub: {reason}") from error
    for pattern in ("config.json", "*.safetensors", "*token*"):
        if not any(folder.glob(pattern)):
            raise UserError(f"{folder} is not a model: it has no {pattern}")
    check_weights(folder)
    if glob.escape(str(folder)) != str(folder):
        raise UserError(f"vLLM finds no model at {folder}: rename it, without *, ? and [")
    if (folder / "generation_config.json").exists():
        # vLLM would silently do without it, and so without the tokens at which a response ends.
        read_json(folder / "generation_config.json")
    return folder


def check_weights(folder: Path) -> None:
    """Raise UserError if a model's weights are damaged, or if a part of them is missing.

    Only the head of each file is read. It says how long the file must be. Files that the model's
    index does not list are not used, so they are not checked.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict):
            raise UserError(f"{index} has no weight_map")
        paths = [folder / str(name) for name in sorted(set(places.values()))]
    else:
        paths = [path for path in folder.glob("*.safetensors") if not path.match(SECOND_COPY)]
    for path in paths:
        if not path.exists():
            raise UserError(f"{folder} has no {path.name}, which {index.name} lists")
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged, or was not downloaded whole ({error})") from error


def model_files(folder: Path) -> list[Path]:
    """List the files of a model folder that decide what the model says, sorted by name."""
    files = set()
    for pattern in MODEL_FILES:
        for path in folder.glob(pattern):
            if path.is_file() and not path.match(SECOND_COPY):
                files.add(path)
    return sorted(files)


def model_fingerprint(folder: Path) -> dict[str, str]:
    """Return a short hash of each file of a model, in milliseconds whatever its size.

    Small files are read whole, weight files at NUM_BLOCKS places spread over them. Training changes
    weights all over these files, so this tells two models apart. One changed byte can go unseen.
    """
    fingerprint = {}
    for path in model_files(folder):
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with open(path, "rb") as file:
            if path.suffix == ".safetensors":
                last_start = max(0, size - BLOCK)
                for i in range(NUM_BLOCKS):
                    file.seek(i * last_start // (NUM_BLOCKS - 1))
                    digest.update(file.read(BLOCK))
            else:
                digest.update(file.read())
        fingerprint[path.name] = digest.hexdigest()[:16]
    return fingerprint


def content_digest(content: Any) -> str:
    """Return a short hash of anything that JSON can hold, to compare what is too long to keep."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def context_length(folder: Path) -> float:
    """Return how many tokens, prompt and response together, the model can read."""
    config = read_json(folder / "config.json")
    for name in CONTEXT_LENGTHS:
        length = config.get(name)
        if length is None:
            continue
        if type(length) is not int or length < 1:
            raise UserError(f"{folder}/config.json: {name} is {length!r}, not a number of tokens")
        return length
    return float("inf")
