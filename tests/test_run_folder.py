"""Where a run continues, and what it refuses, from folders written by hand."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from apo import files, policy, run_folder
from apo.files import UserError
from apo.run_folder import HAS_CHECKPOINTS, Progress, RunLog, open_run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run of four steps, with checkpoints of steps 2 and 4 and a finished model."""
    out = tmp_path / "run"
    files.write_json(out / "config.json", {"out": str(out), "num_steps": 4, "lr": 0.1})
    lines = [json.dumps({"step": step}) + "\n" for step in range(1, 5)]
    for name in ("metrics.jsonl", "samples.jsonl"):
        (out / name).write_text("".join(lines))
    (out / HAS_CHECKPOINTS).touch()
    for name, step in (("checkpoints/step-2", 2), ("checkpoints/step-4", 4), ("final", 4)):
        (out / name).mkdir(parents=True)
        (out / name / "model.safetensors").write_text("weights")
        policy.write_manifest(out / name, step)
    return out


def resume(out: Path, num_steps: int = 8, **changes: object) -> Progress:
    config = {"out": str(out), "num_steps": num_steps, "lr": 0.1, "resume": True} | changes
    log = RunLog(out, num_steps)
    try:
        return open_run(config, log)
    finally:
        for name in ("metrics_file", "samples_file"):
            if hasattr(log, name):  # it was opened
                getattr(log, name).close()


def steps(out: Path) -> list[object]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_it_goes_on_from_the_newest_checkpoint(out: Path) -> None:
    assert resume(out) == Progress(False, out / "checkpoints" / "step-4", 4)
    assert resume(out, num_steps=4) == Progress(True, None, 4)
    assert resume(out, num_steps=3) == Progress(True, None, 4)
    remove(out / "checkpoints" / "step-4")
    remove(out / "final")
    assert resume(out) == Progress(False, out / "checkpoints" / "step-2", 2)
    assert steps(out) == [1, 2]


def test_a_folder_without_a_run_starts_one_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The name may be mistyped."""
    assert resume(tmp_path / "new", resume=False) == Progress(False, None, 0)
    assert capsys.readouterr().err == ""
    assert resume(tmp_path / "mistyped") == Progress(False, None, 0)
    assert "mistyped" in capsys.readouterr().err
    resume(tmp_path / "mistyped")
    assert capsys.readouterr().err == ""


def test_a_finished_model_is_never_trained_again_from_the_start(out: Path) -> None:
    """Its checkpoints may have been removed to make room on the disk."""
    for step in (2, 4):
        remove(out / "checkpoints" / f"step-{step}")
    with pytest.raises(UserError, match="step 4"):
        resume(out)
    assert steps(out) == [1, 2, 3, 4]
    assert policy.saved_step(out / "final") == 4
    assert files.read_json(out / "config.json")["num_steps"] == 4


def test_without_any_whole_model_it_starts_again_and_says_so(
    out: Path, capsys: pytest.CaptureFixture
) -> None:
    remove(out / "final")
    remove(out / "checkpoints" / "step-2")
    (out / "checkpoints" / "step-4" / "model.safetensors").unlink()
    assert resume(out) == Progress(False, None, 0)
    assert "no whole checkpoint" in capsys.readouterr().err
    assert steps(out) == []
    assert resume(out) == Progress(False, None, 0), "killed at once, and started once more"


def test_a_checkpoint_under_another_steps_name_is_damaged(out: Path) -> None:
    remove(out / "final")
    remove(out / "checkpoints" / "step-4")
    (out / "checkpoints" / "step-2").rename(out / "checkpoints" / "step-3")
    assert resume(out) == Progress(False, None, 0)
    assert resume(out) == Progress(False, None, 0), "killed at once, and started once more"


def test_a_run_whose_checkpoints_are_gone_keeps_its_logs(out: Path) -> None:
    """They may only have been moved, or lie on a disk that is not mounted."""
    remove(out / "final")
    (out / "checkpoints").rename(out.with_name("moved"))
    with pytest.raises(UserError, match="checkpoints"):
        resume(out)
    (out / "checkpoints").mkdir()  # where the disk would be mounted
    with pytest.raises(UserError, match="checkpoints"):
        resume(out)
    (out / "checkpoints").rmdir()
    (out / "checkpoints").symlink_to(out.with_name("unmounted"))
    with pytest.raises(UserError, match=r"link to .*unmounted"):
        resume(out)
    assert steps(out) == [1, 2, 3, 4]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(out: Path) -> None:
    remove(out / "final")
    shutil.rmtree(out / "checkpoints")
    (out / HAS_CHECKPOINTS).unlink()
    assert resume(out) == Progress(False, None, 0)


def test_a_run_of_another_algorithm_is_refused_before_anything_is_touched(out: Path) -> None:
    """baselines.py saves flags that train_online.py does not have."""
    config = files.read_json(out / "config.json")
    files.write_json(out / "config.json", config | {"method": "running"})
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 5}')  # another program's last line may have no end
    before = (out / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="made with method 'running', not None"):
        resume(out)
    assert (out / "metrics.jsonl").read_text() == before


def test_a_kill_while_damaged_checkpoints_are_renamed_changes_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove(out / "final")
    for step in (2, 4):
        (out / "checkpoints" / f"step-{step}" / "model.safetensors").unlink()

    def killed(folder: Path) -> None:
        policy.find_checkpoint(folder)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run_folder, "find_checkpoint", killed)
        resume(out)
    assert resume(out) == Progress(False, None, 0)


@pytest.mark.parametrize("kept", ["final", "checkpoints"])
def test_models_without_their_settings_are_refused(kept: str, out: Path) -> None:
    """Else a run could go on with another learning rate."""
    (out / "config.json").unlink()
    if kept == "final":
        for step in (2, 4):
            remove(out / "checkpoints" / f"step-{step}")
    else:
        remove(out / "final")
    with pytest.raises(UserError, match=r"has lost its config\.json"):
        resume(out, lr=0.2)
    assert steps(out) == [1, 2, 3, 4]


def test_a_folder_that_is_no_run_keeps_what_it_has(out: Path) -> None:
    """Another program may have logs of these names, and its last line no end."""
    shutil.rmtree(out)
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"loss": 1}\n{"loss": 2}')
    with pytest.raises(UserError, match="or is no run"):
        resume(out)
    assert (out / "metrics.jsonl").read_text() == '{"loss": 1}\n{"loss": 2}'


def test_another_programs_model_is_not_replaced(tmp_path: Path) -> None:
    """Training would end by removing what is in final/."""
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "model.safetensors").write_text("weights")
    with pytest.raises(UserError, match="or is no run"):
        resume(tmp_path)


def test_checkpoints_out_of_reach_are_not_damaged(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is not mounted comes back, and the logs must still be there then."""
    moved = out.with_name("moved")
    for name in ("checkpoints/step-4", "final"):
        (out / name).rename(moved)
        (out / name).symlink_to(moved)
        assert resume(out).step == 4
        moved.rename(out.with_name("away"))
        with pytest.raises(UserError, match=r"link to .*moved"):
            resume(out)
        (out / name).unlink()
        out.with_name("away").rename(out / name)

    def stale(path: Path, *arguments: object, **options: object) -> str:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="Stale file handle"):
        patch.setattr(Path, "read_text", stale)
        policy.saved_step(out / "checkpoints" / "step-4")
    assert steps(out) == [1, 2, 3, 4]
    assert resume(out).step == 4


def test_a_tracker_that_does_not_start_is_one_sentence(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: object) -> None:
        raise ConnectionError("no login:\n run wandb login")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(UserError, match="--tracker wandb does not start: no login: run wandb"):
        RunLog(out, 1).start_tracker("wandb", {})


def test_a_start_that_failed_binds_nobody(tmp_path: Path) -> None:
    """It may have found too little memory. The next start may have other flags."""
    out = tmp_path / "run"
    resume(out, resume=False, values_digest="0")
    assert resume(out, lr=0.2, resume=False, values_digest="0") == Progress(False, None, 0)
    assert files.read_json(out / "config.json")["lr"] == 0.2
    (out / "metrics.jsonl").write_text('{"step": 0}\n')
    resume(out, lr=0.1, values_digest="0")
    assert steps(out) == [], "the evaluation of the untrained model is made again"
    (out / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    with pytest.raises(UserError, match="lr"):
        resume(out, lr=0.3, values_digest="0")


def test_checkpoints_cannot_be_a_file(tmp_path: Path) -> None:
    """Else the first checkpoint fails, after up to --save-every steps."""
    (tmp_path / "checkpoints").touch()
    with pytest.raises(UserError, match="is a file"):
        resume(tmp_path)


@pytest.mark.parametrize("name", ["notes.txt", "final", "checkpoints", HAS_CHECKPOINTS])
def test_a_folder_with_anything_else_is_no_failed_start(name: str, tmp_path: Path) -> None:
    files.write_json(tmp_path / "config.json", {"values_digest": "0"})
    assert run_folder.is_failed_start(tmp_path)
    (tmp_path / name).mkdir()
    assert not run_folder.is_failed_start(tmp_path)


def test_another_programs_settings_are_no_failed_start(tmp_path: Path) -> None:
    files.write_json(tmp_path / "config.json", {"theme": "dark"})
    assert not run_folder.is_failed_start(tmp_path)


def test_another_setting_is_refused_by_name(out: Path) -> None:
    with pytest.raises(UserError, match=r"lr 0\.1, not 0\.2"):
        resume(out, lr=0.2)


@pytest.mark.parametrize("step", ["3", None, 3.0, [3]])
def test_a_line_with_an_odd_step_is_kept(step: object, out: Path) -> None:
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step}) + "\n")
    assert resume(out).step == 4
    assert steps(out) == [1, 2, 3, 4, step]
