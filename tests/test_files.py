"""Files are read with clear errors and written whole or not at all; models are told apart."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import spawn
from safetensors.torch import save_file

from apo import files
from apo.files import UserError

# ---------------------------------------------------------------------------------------------
# Reading and writing


def test_a_write_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file.json"
    files.write_text(path, "old")

    def power_cut(*arguments: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", power_cut)
    with pytest.raises(OSError, match="power cut"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    monkeypatch.undo()
    files.write_text(path, "new ü")
    assert path.read_text("utf-8") == "new ü"
    assert [path.name for path in path.parent.iterdir()] == ["file.json"]


def test_json_comes_back_as_it_was_written(tmp_path: Path) -> None:
    document = {"header": {"a": 1, "ü": None}, "prompts": [{"v": [0.1, 1.0]}]}
    files.write_json(tmp_path / "values.json", document)
    assert files.read_json(tmp_path / "values.json") == document
    assert json.loads((tmp_path / "values.json").read_text()) == document


@pytest.mark.parametrize("content", [None, b"", b"[1, 2]", b'{"a": 1', b'{"a": "\xff"}'])
def test_json_that_cannot_be_read_is_a_users_mistake(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"^cannot read [^\n]*values\.json: [^\n]+$"):
        files.read_json(path)


def test_jsonl_names_the_line_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}\r\n\n{"a": 2}')  # BOM, U+2028, CR LF
    assert files.read_jsonl(path) == [{"a": "\u2028"}, {"a": 2}]
    for line in ("{", "[1]", "3"):
        path.write_text('{"a": 1}\n\n' + line)
        with pytest.raises(UserError, match=r"rows\.jsonl, line 3"):
            files.read_jsonl(path)


def test_torn_lines_are_skipped_where_a_kill_can_leave_them(tmp_path: Path) -> None:
    path = tmp_path / "0.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id": 2, "te\xff\n{"id": 3}\n{"id": 4, "sam')
    assert files.read_whole_lines(path) == [{"id": 1}, {"id": 3}]


def test_weights_that_nothing_loads_may_be_damaged(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    (copy / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert files.model_folder(str(copy)) == copy
    (copy / "extra.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=r"extra\.safetensors is damaged"):
        files.model_folder(str(copy))
    index = {"weight_map": {"lm_head.weight": "model.safetensors"}}
    files.write_json(copy / "model.safetensors.index.json", index)
    assert files.model_folder(str(copy)) == copy
    index["weight_map"]["norm.weight"] = "model-2.safetensors"
    files.write_json(copy / "model.safetensors.index.json", index)
    with pytest.raises(UserError, match=r"has no model-2\.safetensors"):
        files.model_folder(str(copy))


def test_a_locked_file_belongs_to_one_run(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    first = files.open_locked(path)
    first.write('{"step": 1}\n{"st')
    first.flush()
    with pytest.raises(UserError, match=r"metrics\.jsonl is in use"):
        files.open_locked(path)
    first.close()
    second = files.open_locked(path)  # as if the first had been killed
    second.write('{"step": 2}\n')
    second.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_told(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As Lustre may be mounted on a cluster."""

    def flock(*arguments: object) -> None:
        raise OSError(number, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with files.open_locked(tmp_path / "metrics.jsonl") as file:
        file.write("{}\n")
    assert "cannot be locked" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power loss it is whole or the old one. The folder's list of names comes last."""
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    files.write_text(tmp_path / "file", "text")
    assert calls == ["fsync", "replace", "fsync"]


def test_only_a_flush_that_a_file_system_does_not_have_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(error: int) -> Callable[[int], None]:
        def fail(descriptor: int) -> None:
            raise OSError(error, "fsync")

        return fail

    monkeypatch.setattr(os, "fsync", fsync(errno.EINVAL))
    files.sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", fsync(errno.EIO))
    with pytest.raises(OSError, match="fsync"):
        files.sync_folder(tmp_path)


def test_a_run_whose_output_was_closed_leaves_its_file(tmp_path: Path) -> None:
    """As in `python train_online.py | head`: the run ends, and the next one can have the folder."""
    path = tmp_path / "metrics.jsonl"
    code = f"""
from pathlib import Path
from apo import command_line, files, math_reward

def main():
    file = files.open_locked(Path({str(path)!r}))
    math_reward.grade([r"\\boxed{{y+x}}"], ["x+y"])  # its workers must not keep the file
    while True:
        print("step")

command_line.run(main)
"""
    process = spawn("-c", code)
    assert process.stdout.readline() == "step\n"
    process.stdout.close()
    process.wait(timeout=900)
    files.open_locked(path).close()


def test_a_place_where_nothing_can_be_written_is_found_early(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "new" / "folder" / "values.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        files.check_writable(tmp_path / "file" / "values.json")
    with pytest.raises(UserError, match="is a folder"):
        files.check_writable(tmp_path)
    files.check_writable(tmp_path, is_folder=True)
    for name in ("v" * 250, "v" * 300, "\N{GREEK SMALL LETTER BETA}" * 125):
        with pytest.raises(UserError, match="too long"):
            files.check_writable(tmp_path / name)
    # A folder that exists may have the longest name: nothing is written in its place.
    (tmp_path / ("v" * 255)).mkdir()
    files.check_writable(tmp_path / ("v" * 255) / "values.json")
    (tmp_path / "gone").symlink_to(tmp_path / "unmounted")
    for name in ("gone", "gone/values.json"):
        with pytest.raises(UserError, match=r"is a link to .*unmounted, which is not there"):
            files.check_writable(tmp_path / name)
    with pytest.raises(UserError, match="stage"):
        files.check_writable(tmp_path / "values.json.partial" / "values.json")
    # The longest name can be written, while the file is unfinished, too.
    longest = "v" * (255 - len("..unfinished"))
    files.check_writable(tmp_path / longest)
    files.write_text(tmp_path / longest, "x")


# ---------------------------------------------------------------------------------------------
# Settings


def test_differences_are_named_with_both_values() -> None:
    saved = {"temperature": 1.0, "seed": 0, "more": 1}
    files.refuse_difference("it", saved, {"temperature": 1.0, "seed": 0})
    with pytest.raises(UserError, match=r"temperature 1\.0, not 0\.5.*seed 0, not 3"):
        files.refuse_difference("it", saved, {"temperature": 0.5, "seed": 3})
    with pytest.raises(UserError, match="limit None, not 4"):
        files.refuse_difference("it", saved, {"limit": 4})


def test_of_two_fingerprints_only_the_files_that_differ_are_named() -> None:
    saved = {"model_fingerprint": {"config.json": "aa", "model.safetensors": "bb"}}
    wanted = {"model_fingerprint": {"config.json": "aa", "model.safetensors": "cc"}}
    with pytest.raises(UserError, match=r"another model_fingerprint \(model\.safetensors\)$"):
        files.refuse_difference("it", saved, wanted)


def test_a_digest_is_of_the_content_alone() -> None:
    content = {"a": [1, 0.5, "ü", None], "b": "x"}
    assert files.content_digest(content) == files.content_digest(dict(reversed(content.items())))
    assert files.content_digest(content) != files.content_digest(content | {"a": [1, 0.5, "u"]})
    with pytest.raises(TypeError):  # its text is another one in every process
        files.content_digest({"a": {"x", "y"}})


# ---------------------------------------------------------------------------------------------
# Models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a model folder with 4 MB of random weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    torch.manual_seed(0)
    save_file({"w": torch.randn(1_000_000)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"max_position_embeddings": 512}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def append(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b" ")


def train(folder: Path) -> None:
    """Change every weight by a little; the file's size stays."""
    torch.manual_seed(0)
    save_file({"w": torch.randn(1_000_000) * 1.001}, folder / "model.safetensors")


CHANGES = {
    "trained": train,
    "another config": append("config.json"),
    "another tokenizer": append("tokenizer.json"),
    "longer weights": append("model.safetensors"),
    "an end": lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 1}'),
    "another template": lambda folder: (folder / "chat_template.jinja").write_text("{{ x }}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_models_that_differ_have_different_fingerprints(change: str, folder: Path) -> None:
    before = files.model_fingerprint(folder)
    CHANGES[change](folder)
    assert files.model_fingerprint(folder) != before


def test_a_fingerprint_is_neither_of_the_path_nor_of_other_files(folder: Path) -> None:
    before = files.model_fingerprint(folder)
    assert before.keys() == {"config.json", "model.safetensors", "tokenizer.json"}
    copy = shutil.copytree(folder, folder.with_name("copy"))
    (copy / "README.md").write_text("a model")
    (copy / "trainer").mkdir()
    (copy / "manifest.json").write_text("{}")
    # Mistral's second copy of the weights.
    shutil.copy(copy / "model.safetensors", copy / "consolidated.safetensors")
    assert files.model_fingerprint(copy) == before


def test_a_model_is_a_folder_with_weights_and_tokenizer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert files.model_folder(str(folder)) == folder
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(UserError, match=r"is not a model: it has no "):
            files.model_folder(str(folder))
        (folder / name).write_bytes(content)

    import huggingface_hub

    def offline(*arguments: object, **options: object) -> str:
        raise ConnectionError("offline\n  with a long explanation" + 1000 * "!")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    says = r"^no model 'org/name', here or on the hub: offline with a long explanation!{200,400}$"
    with pytest.raises(UserError, match=says):
        files.model_folder("org/name")


def test_context_length(folder: Path) -> None:
    assert files.context_length(folder) == 512
    (folder / "config.json").write_text("{}")
    assert files.context_length(folder) == float("inf")
