"""Nothing is lost: kills, cut files, full disks, dead ranks, signals and everyday accidents.

`make test` runs one sample of each fault and `make test-faults` all of them. The scripts run as a
user starts them, and the faults are the system's own: signals, cut files, a disk of 40 MB. A kill
counts only if the stage was at work: after its first checkpoint or record, and before its end.
Moments are drawn from a seed; where in a step they fall depends on the machine.
"""

import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import (
    NUM_PROMPTS,
    RAGGED,
    ROOT,
    edit_values,
    kill,
    read_metrics,
    read_weights,
    snapshot,
    spawn,
    stage1_arguments,
    torchrun,
    wait_until,
    write_lines,
)

from apo import command_line, engine, files, problems
from apo.files import UserError
from apo.policy import find_checkpoint, saved_step

# What differs between two runs of the same settings.
MEASURED = ("tokens_per_second", "peak_gib", "seconds", "grading", "out", "resume")
many = pytest.mark.faults


def without_times(row: dict) -> dict:
    """Drop what was measured, not computed."""
    kept = {}
    for name, value in row.items():
        if name not in MEASURED and not name.startswith("seconds_"):
            kept[name] = value
    return kept


def only_error(result: SimpleNamespace) -> str:
    """Return the one sentence in which a run said why it ended."""
    assert "Traceback" not in result.all and "Exception ignored" not in result.all, result.all
    lines = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.all
    return lines[0]


def assert_traceback(result: SimpleNamespace, *says: str) -> None:
    """A run ended with exit code 1 and a full traceback that says all of `says`."""
    assert result.code == 1, result.all
    assert "Traceback (most recent call last)" in result.err, result.all
    for text in says:
        assert text in result.err, result.all


def assert_ended_well(result: SimpleNamespace) -> None:
    assert result.code == 0 and "Traceback" not in result.all, result.all


def finish(process: subprocess.Popen) -> SimpleNamespace:
    """Wait for a run's end, and return what it printed."""
    out, err = process.communicate(timeout=900)
    return SimpleNamespace(code=process.returncode, out=out, err=err, all=out + err)


def kill_run(process: subprocess.Popen, started: list[psutil.Process] | None = None) -> None:
    """SIGKILL a run's process group; what it started in other groups must end with it."""
    if started is None:
        started = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(started, timeout=600)
    for orphan in alive:
        orphan.kill()
    process.communicate(timeout=900)
    assert not alive, f"outlived their launcher: {alive}"


def on_ranks(num_ranks: int) -> list[str]:
    """Return what starts a script on so many ranks."""
    return torchrun(num_ranks) if num_ranks > 1 else []


# ---------------------------------------------------------------------------------------------
# The stages: how each is started, what shows its progress, and when two results are the same

STEPS = 44
TRAIN = f"""--num-steps {STEPS} --batch-size 6 --updates-per-batch 2 --samples-per-prompt 2
--lr 1e-4 --beta2 0.1 --save-every 2 --eval-every 5 --log-samples 3 --micro-batch-tokens 500"""
SAMPLES = 500  # of each problem in stages 1 and 3: drawing them must outlast the kills
NUM_OTHER = 20  # problems of the second benchmark
# Two answers are not answers: stage 1 drops them, stage 3 counts them as wrong.
NUM_DIGITS = {"offline_value": NUM_PROMPTS, "evaluate": NUM_PROMPTS + 3 + NUM_OTHER}


def last_step(out: Path) -> int:
    """Return the last step in a run's metrics, 0 before the first."""
    path = out / "metrics.jsonl"
    rows = whole_rows(path) if path.exists() else []
    return rows[-1]["step"] if rows else 0


def checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))


def is_saving(out: Path, since: float) -> bool:
    """Say whether a checkpoint is half written, by a process started at `since`."""
    with contextlib.suppress(FileNotFoundError):
        for path in (out / "checkpoints").glob(".*.unfinished"):
            if path.stat().st_mtime > since:
                return True
    return False


def whole_rows(path: Path) -> list[dict]:
    """Read a JSONL file as any reader of JSON does; a torn line is one without its end."""
    lines = path.read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def records(out: Path) -> list[tuple[str, str, int]]:
    """(file, id, sample) of all records that stage 1 or 3 has in or beside its result.

    Those of a partial folder are not counted again when the file that replaces it is there.
    """
    found = []
    for path in (*out.glob("*.jsonl"), *out.glob("*.partial/*.jsonl")):
        name = path.name
        if path.parent != out:
            name = path.parent.name.removesuffix(".partial")
            if (out / name).exists():
                continue
        found += [(name, row["id"], row["sample"]) for row in whole_rows(path)]
    return found


def count_records(out: Path) -> int:
    """Count the records quickly, while they are being written."""
    count = 0
    for path in (*out.glob("*.jsonl"), *out.glob("*.partial/*.jsonl")):
        with contextlib.suppress(FileNotFoundError):  # a partial file ends with its benchmark
            count += path.read_bytes().count(b'"reward"')
    return count


@pytest.fixture(scope="session")
def other_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second benchmark."""
    rows = []
    for i in range(NUM_OTHER):
        rows.append({"question": f"Digit, please. {i}", "answer": i % 4, "id": f"o{i}"})
    return write_lines(tmp_path_factory.mktemp("other") / "other.jsonl", rows)


@pytest.fixture(scope="session")
def command(
    model: Path, dataset: Path, other_digits: Path, stage1: SimpleNamespace
) -> Callable[[str, Path], tuple]:
    """What starts a stage, and starts it again after a kill, so that its files are in `out`."""

    def make(stage: str, out: Path) -> tuple:
        if stage == "offline_value":
            arguments = (*stage1_arguments(model, dataset), "--num-value-samples", SAMPLES)
            return ("offline_value.py", *arguments, "--out", out / "values.json")
        if stage == "evaluate":
            benchmarks = f"{dataset},{other_digits}"
            arguments = ("--model", model, "--benchmarks", benchmarks, "--max-tokens", "48")
            return ("evaluate.py", *arguments, "--num-samples", SAMPLES, "--out", out)
        arguments = ("--values", stage1.file, "--eval-dataset", dataset, *TRAIN.split())
        return ("train_online.py", *arguments, "--resume", "--out", out)

    return make


@pytest.fixture(scope="session")
def uninterrupted(
    run: Callable, command: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Path]:
    """The folder of a stage's uninterrupted run, each made once.

    What is sampled depends on no rank, so that one rank's run of stages 1 and 3 serves for two.
    """

    @functools.cache
    def make(stage: str, num_ranks: int) -> Path:
        if stage != "train_online" and num_ranks > 1:
            return make(stage, 1)
        out = tmp_path_factory.mktemp(f"uninterrupted-{stage}-{num_ranks}") / "out"
        result = run(*on_ranks(num_ranks), *command(stage, out), timeout=900)
        assert_ended_well(result)
        return out

    return make


def assert_same(stage: str, out: Path, expected: Path) -> None:
    """Two folders of a stage hold the same result, bit for bit, and nothing is left beside it."""
    assert [path for path in out.rglob(".*") if path.name != ".metadata"] == [], "left behind"
    assert list(out.rglob("*.partial")) == [], "left behind"
    for damaged in (out / "checkpoints").glob("damaged-*"):
        shutil.rmtree(damaged)
    names = sorted(path.relative_to(out) for path in out.rglob("*"))
    assert names == sorted(path.relative_to(expected) for path in expected.rglob("*"))
    if stage == "offline_value":
        a, b = files.read_json(out / "values.json"), files.read_json(expected / "values.json")
        assert json.dumps(a["prompts"]) == json.dumps(b["prompts"])
        assert without_times(a["header"]) == without_times(b["header"])
    elif stage == "evaluate":
        for path in expected.glob("*.jsonl"):
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
        a, b = files.read_json(out / "summary.json"), files.read_json(expected / "summary.json")
        assert a == b
    else:
        assert_same_run(out, expected)


def assert_same_run(out: Path, expected: Path) -> None:
    """Two runs of stage 2 have the same settings, metrics, samples and weights."""
    rows = [without_times(row) for row in read_metrics(out)]
    assert rows == [without_times(row) for row in read_metrics(expected)]
    assert (out / "samples.jsonl").read_text() == (expected / "samples.jsonl").read_text()
    a, b = files.read_json(out / "config.json"), files.read_json(expected / "config.json")
    assert without_times(a) == without_times(b)
    for folder in (out / "final", *checkpoints(out)):
        assert saved_step(folder) is not None, folder
        a, b = read_weights(folder), read_weights(expected / folder.relative_to(out))
        assert a.keys() == b.keys()
        for name, weight in a.items():
            assert weight.equal(b[name]), (folder, name)


def assert_same_to_rounding(row: dict, expected: dict) -> None:
    """Two ranks and one compute the same step: the same tokens, and sums in another order."""
    for name in ("step", "reward", "v_star", "response_tokens", "truncated"):
        assert row[name] == expected[name], name
    for name in ("loss", "grad_norm", "logratio", "kl_per_token"):
        assert row[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


# ---------------------------------------------------------------------------------------------
# 1. SIGKILL at any moment


def kill_training(start: tuple, out: Path, moments: list[str], chance: random.Random) -> list[str]:
    """Start and SIGKILL stage 2 once for each moment; return what each kill struck.

    At "step" the run is at least a step further than the last time. At "write" a checkpoint is
    being written; that is tried again if it was renamed before the kill. "start" is not counted.
    """
    struck = []
    while moments:
        assert len(struck) < 24 and last_step(out) < STEPS - 3, f"too few steps: {struck}"
        moment = moments.pop(0)
        before = last_step(out)
        goal = before + chance.randint(1, 2)
        begun = time.time()
        started = None
        process = spawn(*start)
        try:
            if moment == "start":
                time.sleep(chance.uniform(0, 7))
            elif moment == "write":
                wait_until(lambda: last_step(out) > before, process)  # noqa: B023
                # The processes are listed first, since that takes longer than writing.
                started = psutil.Process(process.pid).children(recursive=True)
                wait_until(
                    lambda: checkpoints(out) and is_saving(out, begun),  # noqa: B023
                    process,
                )
            else:
                wait_until(
                    lambda: checkpoints(out) and last_step(out) >= goal,  # noqa: B023
                    process,
                )
                time.sleep(chance.uniform(0, 0.3))
            assert process.poll() is None, process.communicate()
            kill_run(process, started)
        finally:
            kill(process)
        assert not (out / "final").exists() and checkpoints(out), "not at work: tests nothing"
        if moment == "write" and not is_saving(out, begun):
            moments.append("write")
            moment = "step"
        struck.append(moment)
    return struck


def kill_drawing(
    stage: str, start: tuple, out: Path, moments: list[str], chance: random.Random
) -> list[str]:
    """Start and SIGKILL stage 1 or 3 once for each moment; no sample is drawn twice.

    At "torn" the last line of each partial file is torn after the kill.
    """
    total = NUM_DIGITS[stage] * SAMPLES
    struck = []
    while moments:
        moment = moments.pop(0)
        before = len(records(out))
        process = spawn(*start)
        try:
            if moment == "start":
                time.sleep(chance.uniform(0, 7))
            else:  # kills are spread over the whole way: each leaves work for the others
                count = count_records(out)
                most = max(1, (total - count) // (len(moments) + 2))
                goal = count + chance.randint(1, most)
                wait_until(lambda: count_records(out) >= goal, process)  # noqa: B023
                time.sleep(chance.uniform(0, 0.05))
            assert process.poll() is None, process.communicate()
            kill_run(process)
        finally:
            kill(process)
        assert not (out / "values.json").exists(), "not at work: tests nothing"
        found = records(out)
        assert len(set(found)) == len(found), "some samples were drawn twice"
        assert moment == "start" or before < len(found) < total, "not at work: tests nothing"
        if moment == "torn":
            for path in out.glob("*.partial/*.jsonl"):
                tear_last_line(path)
        struck.append(moment)
    return struck


def tear_last_line(path: Path) -> None:
    """Leave a file as a kill in the middle of a write would: with half a line at its end."""
    lines = path.read_bytes().split(b"\n")[:-1]
    if lines:
        path.write_bytes(b"\n".join(lines) + b"\n" + lines[-1][: len(lines[-1]) // 2])


@pytest.fixture(scope="session")
def killed(
    command: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int, str], SimpleNamespace]:
    """A stage's folder after one kill at each of the given moments; each made once."""

    @functools.cache
    def make(stage: str, num_ranks: int, moments: str) -> SimpleNamespace:
        out = tmp_path_factory.mktemp(f"killed-{stage}-{num_ranks}") / "out"
        out.mkdir()
        start = (*on_ranks(num_ranks), *command(stage, out))
        chance = random.Random(f"{stage}/{num_ranks}")
        if stage == "train_online":
            struck = kill_training(start, out, moments.split(), chance)
        else:
            struck = kill_drawing(stage, start, out, moments.split(), chance)
        return SimpleNamespace(folder=out, struck=struck)

    return make


# Ten that count, and two while it starts. The first must count: nothing would be there to lose.
TRAINING = "step write step step start write step write step start write step step"
DRAWING = "work work work start work torn work work start work torn work"
STAGES = ("offline_value", "train_online", "evaluate")


def kill_cases() -> list:
    """One kill of stage 2 for `make test`; ten of each stage on one and on two ranks."""
    cases = [pytest.param("train_online", 1, "write", id="train_online-1-sample")]
    for stage in STAGES:
        moments = TRAINING if stage == "train_online" else DRAWING
        for num_ranks in (1, 2):
            name = f"{stage}-{num_ranks}-ten"
            cases.append(pytest.param(stage, num_ranks, moments, id=name, marks=many))
    return cases


@pytest.mark.parametrize("stage, num_ranks, moments", kill_cases())
def test_killed_and_continued_is_as_if_it_had_not_been(
    stage, num_ranks, moments, killed, uninterrupted, run, command, tmp_path
):
    """Bit for bit. A lost sampling seed, moment of Adam or order of an epoch would all show."""
    expected = uninterrupted(stage, num_ranks)
    dead = killed(stage, num_ranks, moments)
    planned = moments.split()
    for moment in ("start", "write"):
        assert dead.struck.count(moment) == planned.count(moment), dead.struck
    assert len(dead.struck) >= len(planned)
    out = tmp_path / "out"
    shutil.copytree(dead.folder, out)
    assert_ended_well(run(*on_ranks(num_ranks), *command(stage, out), timeout=900))
    assert_same(stage, out, expected)


@many
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_run_continues_on_another_number_of_ranks(
    stage, before, after, killed, uninterrupted, run, command, tmp_path
):
    """Stages 1 and 3 bit for bit. Stage 2 to rounding, of weights and of Adam's moments."""
    dead = killed(stage, before, TRAINING if stage == "train_online" else DRAWING)
    out = tmp_path / "out"
    shutil.copytree(dead.folder, out)
    assert_ended_well(run(*on_ranks(after), *command(stage, out), timeout=900))
    expected = uninterrupted(stage, before)
    if stage != "train_online":
        assert_same(stage, out, expected)
        return
    done = max(saved_step(folder) for folder in checkpoints(dead.folder) if saved_step(folder))
    rows = read_metrics(out)
    expected_rows = read_metrics(expected)
    assert [row["step"] for row in rows] == list(range(STEPS + 1)) and 0 < done < STEPS - 3
    for step in range(done + 1):
        assert without_times(rows[step]) == without_times(expected_rows[step])
    # The third step after it has weights that two steps with the saved moments have made.
    for step in range(done + 1, done + 4):
        assert_same_to_rounding(rows[step], expected_rows[step])
    assert saved_step(out / "final") == STEPS


# ---------------------------------------------------------------------------------------------
# 2. Files that were cut or are missing


@pytest.fixture
def checkpoint(one_rank: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints" / "step-2"
    shutil.copytree(one_rank / "checkpoints" / "step-2", folder)
    assert find_checkpoint(folder.parent) == folder
    return folder


def test_checkpoint_with_a_cut_or_missing_file_is_not_whole(checkpoint):
    """Every file in turn: weights, tokenizer, config, optimizer state, the manifest itself."""
    chance = random.Random(0)
    paths = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert {"model.safetensors", "config.json", "manifest.json", ".metadata"} <= {
        path.name for path in paths
    }
    for path in paths:
        content = path.read_bytes()
        path.unlink()
        assert saved_step(checkpoint) is None, path
        # The last byte of the manifest is a newline, which means nothing.
        longest = len(content) - 2
        for length in (0, longest, *(chance.randrange(longest) for _ in range(3))):
            path.write_bytes(content[:length])
            assert saved_step(checkpoint) is None, (path, length)
        path.write_bytes(content)
    assert saved_step(checkpoint) == 2


def test_manifest_of_any_content_is_no_error(checkpoint, capfd):
    """It names another step, or none; the checkpoint is put aside and nothing raises."""
    chance = random.Random(0)
    manifest = checkpoint / "manifest.json"
    content = manifest.read_bytes()
    for _ in range(200):
        flipped = bytearray(content)
        for place in chance.sample(range(len(content)), chance.randint(1, 4)):
            flipped[place] ^= chance.randrange(1, 256)
        manifest.write_bytes(flipped)
        saved_step(checkpoint)
    for text in ("[]", "{}", '{"step": null, "files": {}}', '{"step": 2, "files": []}', "nul"):
        manifest.write_text(text)
        assert saved_step(checkpoint) is None, text
    manifest.write_bytes(content.replace(b'"step": 2', b'"step": 7'))
    assert find_checkpoint(checkpoint.parent) is None, "another step's schedule would be resumed"
    (damaged,) = checkpoint.parent.iterdir()
    assert damaged.name.startswith("damaged-") and damaged.name.endswith("step-2")
    err = capfd.readouterr().err
    assert str(checkpoint) in err and damaged.name in err


@pytest.fixture
def two_steps(one_rank: Path, stage1: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A copy of a finished run of two steps, to be damaged, and the command that continues it."""
    out = tmp_path / "run"
    shutil.copytree(one_rank, out)
    command = ("train_online.py", "--values", stage1.file, "--out", out, *RAGGED.split())
    return SimpleNamespace(out=out, command=(*command, "--resume"), base=one_rank)


def cut(path: Path) -> None:
    """Cut off the second half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_run_continues_from_the_checkpoint_before_a_damaged_one(run, two_steps):
    """The logs are cut back to it, so that no step is in them twice."""
    out = two_steps.out
    cut(out / "final" / "model.safetensors")
    (out / "checkpoints" / "step-2" / "trainer" / ".metadata").unlink()
    for name in ("metrics.jsonl", "samples.jsonl"):
        tear_last_line(out / name)
    result = run(*two_steps.command)
    assert_ended_well(result)
    line, of_final = [line for line in result.err.splitlines() if "damaged" in line]
    assert "step-2" in line and "step-1" not in line and "final" in of_final
    (damaged,) = (out / "checkpoints").glob("damaged-*")
    assert damaged.name in line
    assert_same("train_online", out, two_steps.base)


def test_run_whose_checkpoints_were_moved_away_keeps_its_logs(run, two_steps):
    """They may lie on a disk that is not mounted: a run from the start is not what was meant."""
    out = two_steps.out
    (out / "checkpoints").rename(out.with_name("moved"))
    (out / "final").rename(out.with_name("final"))
    result = run(*two_steps.command)
    assert result.code == 2 and "are gone" in only_error(result), result.all
    assert read_metrics(out) == read_metrics(two_steps.base)


@many
def test_run_with_nothing_whole_left_says_so_and_starts_again(run, two_steps):
    out = two_steps.out
    cut(out / "final" / "model.safetensors")
    cut(out / "checkpoints" / "step-2" / "config.json")
    trainer = out / "checkpoints" / "step-1" / "trainer"
    cut(max(trainer.iterdir(), key=lambda path: path.stat().st_size))
    result = run(*two_steps.command)
    assert_ended_well(result)
    for name in ("step-1", "step-2"):
        lines = [line for line in result.err.splitlines() if name in line and "damaged" in line]
        assert len(lines) == 1, result.err
    assert "starts again" in result.err
    assert_same("train_online", out, two_steps.base)


IDENTITY = {"model_fingerprint": {"config.json": "0", "tokenizer.json": "1"}, "temperature": 1.0}


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """A folder of partial records of two ranks."""
    folder = tmp_path / "values.json.partial"
    folder.mkdir()
    files.write_json(folder / "identity.json", IDENTITY)
    for rank in (0, 1):
        rest = {"prompt": "p", "answer": "1", "reward": 0.0, "finished": True, "tokens": 3}
        rows = [{"id": f"p{i}", "sample": rank, "output": "é\u2028\n"} | rest for i in range(50)]
        write_lines(folder / f"{rank}.jsonl", rows)
    return folder


def test_torn_line_of_a_partial_file_is_dropped_alone(partial):
    path = partial / "1.jsonl"
    content = path.read_bytes()
    chance = random.Random(0)
    for length in chance.sample(range(len(content)), 30):
        path.write_bytes(content[:length])
        kept = [row for row in engine.read_partial(partial, IDENTITY) if row["sample"] == 1]
        assert len(kept) - content[:length].count(b"\n") in (0, 1), "only a whole line counts"
        with files.open_locked(path):
            assert whole_rows(path) == kept[: content[:length].count(b"\n")]
            assert path.read_bytes()[-1:] in (b"", b"\n")


def test_partial_folder_of_another_run_is_refused_by_field(partial):
    """Another model's samples would be mixed in silently."""
    assert len(engine.read_partial(partial, IDENTITY)) == 100
    before = snapshot(partial)
    tokenizer = {"model_fingerprint": {"config.json": "0", "tokenizer.json": "2"}}
    with pytest.raises(UserError, match=r"model_fingerprint \(tokenizer\.json\)") as refused:
        engine.read_partial(partial, IDENTITY | tokenizer)
    assert str(partial) in str(refused.value)
    with pytest.raises(UserError, match=r"temperature 1\.0, not 0\.5"):
        engine.read_partial(partial, IDENTITY | {"temperature": 0.5})
    cut(partial / "identity.json")
    with pytest.raises(UserError, match=r"identity\.json"):
        engine.read_partial(partial, IDENTITY)
    (partial / "identity.json").unlink()
    with pytest.raises(UserError, match=r"identity\.json"):
        engine.read_partial(partial, IDENTITY)
    assert {path: before[path] for path in snapshot(partial)} == snapshot(partial)


# ---------------------------------------------------------------------------------------------
# 3. A full disk

DISK_BYTES = 40_000_000
LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = sys.argv[2:]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def mount(folder: Path, options: str) -> bool:
    """Mount a small disk in memory; return whether that was allowed."""
    if shutil.which("mount") is None:
        return False
    arguments = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(arguments, capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A small disk: `.leave(n)` fills all but n bytes of it and returns what starts a script.

    A tmpfs; where none may be mounted, no file may become larger than n.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = mount(folder, f"size={DISK_BYTES}")
    ballast = folder / "ballast"

    def leave(count: int) -> tuple:
        if not mounted:
            return "-c", LIMITED, str(count)
        space = os.statvfs(folder)
        ballast.write_bytes(bytes(space.f_bavail * space.f_frsize - count))
        return ()

    def give_back() -> None:
        ballast.unlink(missing_ok=True)

    says = "No space left on device" if mounted else "File too large"
    try:
        yield SimpleNamespace(folder=folder, leave=leave, give_back=give_back, says=says)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


# A checkpoint of the tests' model takes about 1 MB, its weights a third of it.
@pytest.mark.parametrize(
    ("left", "fails_in"),
    [
        pytest.param(600_000, "save_checkpoint", id="weights"),
        pytest.param(150_000, "save_checkpoint", id="optimizer", marks=many),
        pytest.param(20_000, "save_checkpoint", id="tokenizer", marks=many),
        # Before an engine starts: not even config.json can be written.
        pytest.param(0, "open_run", id="nothing", marks=many),
    ],
)
def test_full_disk_while_a_checkpoint_is_written(left, fails_in, disk, run, one_rank, stage1):
    """The one before stays whole and, with space again, the run ends as if nothing had been."""
    out = disk.folder / "run"
    shutil.copytree(one_rank, out)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints" / "step-2")
    command = ("train_online.py", "--values", stage1.file, "--out", out, *RAGGED.split())
    result = run(*disk.leave(left), *command, "--resume")
    assert_traceback(result, fails_in)
    # torch.save loses the system's error and says this instead.
    assert disk.says in result.err or "unexpected pos" in result.err, result.all
    assert [path.name for path in checkpoints(out)] == ["step-1"]
    assert saved_step(out / "checkpoints" / "step-1") == 1 and not (out / "final").exists()
    first_rows = read_metrics(one_rank)[:1]
    assert read_metrics(out)[:1] == first_rows, "the log of the steps before is kept"
    disk.give_back()
    assert_ended_well(run(*command, "--resume"))
    assert_same("train_online", out, one_rank)


# All records of stage 1 need about 5 MB, those of stage 3 about 8 MB.
@many
@pytest.mark.parametrize("struck", ["partial", "result"])
@pytest.mark.parametrize("stage", ["offline_value", "evaluate"])
def test_full_disk_while_samples_are_drawn(stage, struck, disk, run, command, uninterrupted):
    """What was drawn is kept and not drawn again; the result is that of a large disk.

    Where the result itself is meant to find no room, the disk is filled when all is drawn.
    """
    expected = uninterrupted(stage, 1)
    out = disk.folder / "out"
    out.mkdir()
    if struck == "partial":
        result = run(*disk.leave(60_000), *command(stage, out), timeout=900)
        fewest = 50
    else:
        result = fill_late(stage, disk, command(stage, out), out, expected)
        fewest = NUM_PROMPTS * SAMPLES
    assert_traceback(result, disk.says)
    assert not (out / "values.json").exists() and not (out / "summary.json").exists()
    assert len(records(out)) >= fewest, "struck elsewhere: choose another size"
    disk.give_back()
    assert_ended_well(run(*command(stage, out), timeout=900))
    assert_same(stage, out, expected)


def fill_late(
    stage: str, disk: SimpleNamespace, start: tuple, out: Path, expected: Path
) -> SimpleNamespace:
    """Fill the disk once a quarter is drawn, but for what the other records need and a little."""
    if disk.says != "No space left on device":
        pytest.skip("needs a tmpfs, which may not be mounted here")
    first = "values.json" if stage == "offline_value" else "digits.jsonl"
    num_problems = NUM_PROMPTS if stage == "offline_value" else NUM_PROMPTS + 3
    total = num_problems * SAMPLES
    process = spawn(*start)
    try:
        wait_until(lambda: count_records(out) >= total // 4, process)
        os.kill(process.pid, signal.SIGSTOP)
        (path,) = out.glob("*.partial/0.jsonl")
        size = path.stat().st_size
        count = count_records(out)
        needed = size / count * (total - count)
        result_size = (expected / first).stat().st_size
        disk.leave(round(needed + min(96_000, result_size / 2)))
        os.kill(process.pid, signal.SIGCONT)
        return finish(process)
    finally:
        kill(process)


# ---------------------------------------------------------------------------------------------
# 4. One rank of two dies


@pytest.mark.parametrize("rank, ranks_after", [(1, 1), pytest.param(0, 2, marks=many)])
def test_one_rank_killed_ends_the_job_by_name_and_the_run_continues(
    rank, ranks_after, run, command, uninterrupted, tmp_path
):
    """The other waits in a collective for a rank that never comes: for a day, if nobody looks."""
    out = tmp_path / "out"
    chance = random.Random(rank)
    process = spawn(*torchrun(2), *command("train_online", out))
    try:
        wait_until(lambda: last_step(out) >= 3, process)
        ranks = {p.environ().get("RANK"): p for p in psutil.Process(process.pid).children()}
        time.sleep(chance.uniform(0, 0.2))
        started = psutil.Process(process.pid).children(recursive=True)
        ranks[str(rank)].send_signal(signal.SIGKILL)
        result = finish(process)
    finally:
        kill(process)
    assert result.code not in (0, None), result.all
    assert re.search(rf"\brank\W+{rank}\b", result.all), result.all
    _, alive = psutil.wait_procs(started, timeout=600)
    assert not alive
    assert checkpoints(out) and not (out / "final").exists(), "killed too late: tests nothing"
    done = max(saved_step(folder) for folder in checkpoints(out))
    assert_ended_well(run(*on_ranks(ranks_after), *command("train_online", out), timeout=900))
    expected = uninterrupted("train_online", ranks_after)
    if ranks_after == 2:
        assert_same("train_online", out, expected)
        return
    rows, expected_rows = read_metrics(out), read_metrics(expected)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    for step in range(1, done + 4):
        assert_same_to_rounding(rows[step], expected_rows[step])


# ---------------------------------------------------------------------------------------------
# 5. Signals

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


def interrupt(process: subprocess.Popen, number: signal.Signals) -> None:
    """Send a signal as it comes: Ctrl-C goes to the whole process group, kill to the process."""
    if number == INT:
        os.killpg(process.pid, INT)
    else:
        process.send_signal(number)


@pytest.mark.parametrize(
    "number, num_ranks",
    [
        (INT, 1),
        pytest.param(TERM, 1, marks=many),
        pytest.param(HUP, 1, marks=many),
        pytest.param(INT, 2, marks=many),
        pytest.param(TERM, 2, marks=many),
        pytest.param(HUP, 2, marks=many),
    ],
)
def test_training_that_is_stopped_finishes_its_step_and_saves_it(
    number, num_ranks, command, uninterrupted, tmp_path
):
    out = tmp_path / "out"
    chance = random.Random(f"{number}/{num_ranks}")
    start = (*on_ranks(num_ranks), *command("train_online", out), "--save-every", "1000")
    process = spawn(*start)
    try:
        wait_until(lambda: last_step(out) >= 3, process)
        time.sleep(chance.uniform(0, 0.5))
        started = psutil.Process(process.pid).children(recursive=True)
        before = last_step(out)
        interrupt(process, number)
        result = finish(process)
    finally:
        kill(process)
    if num_ranks == 1:
        assert result.code == 128 + number and "Traceback" not in result.all, result.all
    else:
        assert result.code != 0, result.all  # the code is torchrun's
    _, alive = psutil.wait_procs(started, timeout=600)
    assert not alive
    rows = read_metrics(out)
    (saved,) = checkpoints(out)
    assert 3 <= before <= rows[-1]["step"] < STEPS, "too late: tests nothing"
    assert saved.name == f"step-{rows[-1]['step']}" and saved_step(saved) == rows[-1]["step"]
    # The step under way, and perhaps the one before which the ranks had just agreed.
    assert rows[-1]["step"] <= before + 2 and not (out / "final").exists()
    expected = read_metrics(uninterrupted("train_online", num_ranks))[: len(rows)]
    assert [without_times(row) for row in rows] == [without_times(row) for row in expected]


@pytest.mark.parametrize("what", ["sent twice", "tee ended"])
def test_a_stop_is_saved(what, command, tmp_path):
    """`pkill` reaches a rank twice, once through its launcher. Ctrl-C also ends a `| tee log`."""
    out = tmp_path / "out"
    process = spawn(*command("train_online", out), "--save-every", "1000")
    try:
        wait_until(lambda: last_step(out) >= 1, process)
        if what == "tee ended":
            process.stdout.close()
            process.stdout = None
        else:
            process.send_signal(TERM)
        process.send_signal(INT)
        _, err = process.communicate(timeout=900)
    finally:
        kill(process)
    assert process.returncode in (128 + INT, 128 + TERM) and err.count("Traceback") == 0, err
    (saved,) = checkpoints(out)
    assert saved_step(saved) == last_step(out)


STOPPED = """
import os, sys, time
sys.path.insert(0, os.getcwd())
from apo import command_line


def main():
    flag = command_line.StopFlag()
    print("waiting", flush=True)
    while True:
        time.sleep(0.1)


command_line.run(main)
"""


def test_a_second_stop_ends_training_at_once(tmp_path):
    """But not one that comes with the first. The system merges equal ones, so they differ."""
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED)
    process = spawn(script)
    try:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(INT)
        process.send_signal(TERM)
        time.sleep(command_line.SECONDS_OF_ONE_STOP + 1)
        assert process.poll() is None
        process.send_signal(TERM)
        result = finish(process)
    finally:
        kill(process)
    assert result.code == 128 + TERM and "Traceback" not in result.all, result.all


@many
@pytest.mark.parametrize(
    "stage, number, num_ranks",
    [
        ("evaluate", INT, 1),
        ("evaluate", TERM, 2),
        ("offline_value", INT, 2),
        ("offline_value", TERM, 1),
    ],
)
def test_sampling_that_is_stopped_keeps_what_it_drew(stage, number, num_ranks, command, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    process = spawn(*on_ranks(num_ranks), *command(stage, out))
    try:
        wait_until(lambda: count_records(out) >= 20, process)
        started = psutil.Process(process.pid).children(recursive=True)
        interrupt(process, number)
        result = finish(process)
    finally:
        kill(process)
    if num_ranks == 1:
        assert result.code == 128 + number and "Traceback" not in result.all, result.all
    else:
        assert result.code != 0, result.all  # the code is torchrun's
    _, alive = psutil.wait_procs(started, timeout=600)
    assert not alive
    assert len(records(out)) >= 20
    for path in out.glob("*.partial/*.jsonl"):
        assert path.read_bytes()[-1:] in (b"", b"\n"), "a line is torn"
    assert not (out / "values.json").exists() and not (out / "summary.json").exists()


@many
@pytest.mark.parametrize("moment, number", [("importing", TERM), ("engine", INT), ("engine", TERM)])
def test_signal_while_starting_needs_no_traceback(moment, number, command, tmp_path):
    """It is over at once. Ctrl-C while Python still imports is Python's own to report."""
    out = tmp_path / "out"
    process = spawn(*command("train_online", out))
    try:
        if moment == "importing":
            time.sleep(0.4)
        else:
            wait_until((out / "config.json").exists, process)
            time.sleep(0.5)
        interrupt(process, number)
        result = finish(process)
    finally:
        kill(process)
    codes = (128 + number, -number) if moment == "importing" else (128 + number,)
    assert result.code in codes, result.all
    assert "Traceback" not in result.all, result.all
    assert not checkpoints(out) and last_step(out) == 0


# ---------------------------------------------------------------------------------------------
# 6. Mistakes in code: a full traceback and exit code 1 (test_bad_input.py has the user's mistakes)

# A task of a user's own. The reward function trusts that every row has the column "wanted".
OWN_TASK = '''
import importlib, os, sys
sys.path.insert(0, os.getcwd())
from apo import command_line, problems


def closeness(response, row):
    """1 at the wanted length, less elsewhere."""
    return row["scale"] / (1 + abs(len(response) - row["wanted"]))


problems.DATASETS["lengths"] = problems.Dataset(
    source=os.path.dirname(__file__) + "/lengths-{split}.jsonl",
    splits={"train": "all", "test": "all"},
    question=lambda row: row["text"],
    answer=lambda row: None,
    reward=closeness,
)
command_line.run(importlib.import_module(sys.argv.pop(1)).main)
'''


@pytest.fixture
def own_task(tmp_path: Path, model: Path) -> Callable[[str, dict | None], tuple]:
    """What starts a stage on that task; row 5 is as given, or as good as the others."""

    def make(stage: str, bad_row: dict | None) -> tuple:
        script = tmp_path / "own_task.py"
        script.write_text(OWN_TASK)
        rows = []
        for i in range(8):
            rows.append({"id": f"n{i}", "text": "Say much. ", "wanted": 9 + i, "scale": 1.0})
        if bad_row is not None:
            rows[5] = {"id": "n5", "text": "Say much. "} | bad_row
        write_lines(tmp_path / "lengths-all.jsonl", rows)
        sampling = ("--model", model, "--max-tokens", "48", "--out", tmp_path / "out")
        if stage == "offline_value":
            samples = ("--num-value-samples", "1", "--max-prompt-tokens", "160")
            return (script, stage, "--dataset", "lengths", *samples, *sampling)
        if stage == "evaluate":
            return (script, stage, "--benchmarks", "lengths", *sampling)
        header = {"model": str(model), "task": "lengths", "beta1": 0.5, "temperature": 1.0}
        header |= {"max_prompt_tokens": 160, "max_tokens": 48}
        prompts = []
        for row in rows:
            entry = {"id": row["id"], "prompt": row["text"], "answer": None, "rewards": [0.5]}
            prompts.append(entry | {"row": row})
        files.write_json(tmp_path / "values.json", {"header": header, "prompts": prompts})
        batch = ("--batch-size", "8", "--num-steps", "1", "--log-samples", "8")
        values = ("--values", tmp_path / "values.json", "--out", tmp_path / "out")
        return (script, stage, *values, *batch)

    return make


@many
@pytest.mark.parametrize(
    "stage, num_ranks",
    [
        ("offline_value", 2),  # the row is rank 1's
        ("train_online", 1),
        ("train_online", 2),
        ("evaluate", 1),
    ],
)
def test_reward_that_raises_shows_its_traceback_and_the_row(stage, num_ranks, own_task, run):
    """It never becomes a zero, whichever rank it happens on."""
    result = run(*on_ranks(num_ranks), *own_task(stage, {"scale": 1.0}))
    assert_traceback(result, "KeyError: 'wanted'", 'row["wanted"]', "row 'n5'", stage)


@many
def test_reward_that_is_no_number_is_no_reward(own_task, run):
    result = run(*own_task("offline_value", {"wanted": 3, "scale": float("nan")}))
    assert_traceback(result, "nan on row 'n5'")


# What a stage does on a machine with two GPUs, without the GPUs.
ENDS_AFTER_A_MESSAGE = """
import sys
sys.path.insert(0, {root!r})
from apo import command_line, engine
from apo.files import UserError

def main():
    engine.launch()
    engine.on_rank_0(print, "sent")
    if sys.argv[1] == "mistake":
        raise UserError("--lr is odd")

command_line.run(main)
"""


@pytest.mark.parametrize(("how", "code"), [("finished", 0), ("mistake", 2)])
def test_a_process_that_ends_right_after_a_message_does_not_abort(how, code, run, tmp_path):
    """torch's sending thread may still hold the message when Python shuts down."""
    script = tmp_path / "ends.py"
    script.write_text(ENDS_AFTER_A_MESSAGE.format(root=str(ROOT)))
    for _ in range(5):  # it aborted in half of the tries
        result = run(script, how)
        assert result.code == code and "sent" in result.out, result.all


RELAUNCHED = """
import atexit, os, signal, sys, time
sys.path.insert(0, os.getcwd())
import torch
from apo import command_line, engine
from apo.files import UserError


def main():
    if "RANK" not in os.environ:
        engine.restart_under_torchrun(2)
    rank = os.environ["RANK"]
    if sys.argv[1] == "mistake":
        raise UserError("--lr is odd")
    if sys.argv[1] == "fault" and rank == "1":
        raise KeyError("of rank 1")
    if sys.argv[1] == "fault beside others":
        engine.launch()
        if rank == "1":
            atexit.register(time.sleep, 3600)  # as vLLM's clean-up waits on GPUs
            raise KeyError("of rank 1")
        torch.distributed.barrier()
    if sys.argv[1] == "mistake beside others":
        engine.launch()
        if rank == "1":
            atexit.register(time.sleep, 3600)
            raise UserError("--lr is odd")
        torch.distributed.barrier()
    if sys.argv[1] == "mistake of one":
        if rank == "1":
            raise UserError("--lr is odd")
        time.sleep(60)
    if sys.argv[1] == "wait":
        print("waiting", flush=True)
        time.sleep(60)


command_line.run(main)
"""


@pytest.mark.parametrize(
    "what",
    [
        "fault",
        "fault beside others",
        "mistake of one",
        pytest.param("mistake", marks=many),
        pytest.param("mistake beside others", marks=many),
    ],
)
def test_relaunched_script_ends_as_its_ranks_do(what, run, tmp_path):
    """A rank other than 0 prints its traceback too; a user's mistake is one sentence in all."""
    script = tmp_path / "relaunched.py"
    script.write_text(RELAUNCHED)
    result = run(script, what)
    if what.startswith("fault"):
        assert_traceback(result, "KeyError: 'of rank 1'", 'raise KeyError("of rank 1")')
        assert result.all.count("Traceback") == 1, result.all
    else:
        assert result.code == 2 and only_error(result) == "error: --lr is odd", result.all


@many
@pytest.mark.parametrize("number", [INT, TERM, HUP])
def test_relaunched_script_ends_on_a_signal_with_its_code(number, tmp_path):
    script = tmp_path / "relaunched.py"
    script.write_text(RELAUNCHED)
    process = spawn(script, "wait")
    try:
        both = process.stdout.read(2 * len("waiting\n"))
        assert both.count("waiting") == 2, both
        interrupt(process, number)
        result = finish(process)
    finally:
        kill(process)
    assert result.code == 128 + number, result.all
    assert "Traceback" not in result.all, result.all


@many
def test_nohup_outlives_its_terminal(tmp_path):
    """torchrun would take SIGHUP for a stop signal, where `nohup` has set that it is ignored."""
    script = tmp_path / "relaunched.py"
    script.write_text(RELAUNCHED)
    ignoring = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    ignoring += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    process = spawn("-c", ignoring, script, "wait")
    try:
        both = process.stdout.read(2 * len("waiting\n"))
        assert both.count("waiting") == 2, both
        started = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, HUP)
        _, alive = psutil.wait_procs(started, timeout=5)
        assert len(alive) == len(started) == 2 and process.poll() is None
        interrupt(process, TERM)
        result = finish(process)
    finally:
        kill(process)
    assert result.code == 128 + TERM, result.all


# ---------------------------------------------------------------------------------------------
# 7. Everyday accidents


@pytest.mark.parametrize(
    "stage",
    [
        "train_online",
        pytest.param("offline_value", marks=many),
        pytest.param("evaluate", marks=many),
    ],
)
def test_of_two_runs_started_at_once_one_is_refused(stage, command, uninterrupted, tmp_path):
    out = tmp_path / "out"
    start = [word for word in command(stage, out) if word != "--resume"]
    processes = [spawn(*start), spawn(*start)]
    try:
        results = [finish(process) for process in processes]
    finally:
        for process in processes:
            kill(process)
    winner, loser = sorted(results, key=lambda result: result.code)
    assert (winner.code, loser.code) == (0, 2), (winner.all, loser.all)
    line = only_error(loser)
    # A loser that comes a second later sees that the folder is not empty.
    assert str(out) in line and ("another run" in line or "is not empty" in line), line
    assert_same(stage, out, uninterrupted(stage, 1))


@many
@pytest.mark.parametrize("stage", STAGES)
def test_run_beside_a_run_is_refused_and_leaves_it_alone(
    stage, run, command, uninterrupted, tmp_path
):
    out = tmp_path / "out"
    is_at_work = last_step if stage == "train_online" else count_records
    process = spawn(*command(stage, out))
    try:
        wait_until(lambda: is_at_work(out) >= 1, process)
        os.kill(process.pid, signal.SIGSTOP)  # it might end before the other has started
        before = snapshot(out)
        other = run(*command(stage, out))
        assert other.code == 2 and "another run" in only_error(other), other.all
        assert snapshot(out) == before
        os.kill(process.pid, signal.SIGCONT)
        result = finish(process)
    finally:
        kill(process)
    assert_ended_well(result)
    assert_same(stage, out, uninterrupted(stage, 1))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder into which nobody may write, root included; /proc if nothing may be mounted."""
    folder = tmp_path / "read only"
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
    elif mount(folder, "ro,size=1m"):
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
    else:
        yield Path("/proc")


@pytest.mark.parametrize(
    "stage",
    [
        "train_online",
        pytest.param("offline_value", marks=many),
        pytest.param("evaluate", marks=many),
    ],
)
def test_folder_that_cannot_be_written_is_refused_at_once(stage, run, command, read_only):
    """Before minutes of sampling, and before the engine starts."""
    with pytest.raises(OSError):
        (read_only / "x").mkdir()
    result = run(*command(stage, read_only / "out"))
    assert result.code == 2 and str(read_only) in only_error(result), result.all


@many
@pytest.mark.parametrize("stage", ["train_online", "evaluate"])
def test_finished_run_that_cannot_be_written_is_refused_or_left(
    stage, run, command, uninterrupted, read_only
):
    """Asked again, a finished run changes nothing, so that an archive may be read-only."""
    if not os.path.ismount(read_only):
        pytest.skip("needs a tmpfs, which may not be mounted here")
    subprocess.run(["mount", "-o", f"remount,rw,size={DISK_BYTES}", read_only], check=True)
    out = read_only / "out"
    shutil.copytree(uninterrupted(stage, 1), out)
    subprocess.run(["mount", "-o", "remount,ro", read_only], check=True)
    result = run(*command(stage, out))
    assert "Traceback" not in result.all, result.all
    assert result.code == 0 or (result.code == 2 and str(out) in only_error(result)), result.all


def test_model_is_known_by_its_content(model, tmp_path, monkeypatch):
    """Not by its path, and not by files that say nothing about what the model says."""
    fingerprint = files.model_fingerprint(model)
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    (moved / "README.md").write_text("Where it is from.")
    (moved / ".git").mkdir()
    monkeypatch.chdir(tmp_path)
    assert files.model_fingerprint(Path("moved")) == fingerprint
    assert files.model_fingerprint(Path("./moved")) == fingerprint
    for path in files.model_files(model):
        content = (moved / path.name).read_bytes()
        place = len(content) // 2
        flipped = bytes([content[place] ^ 1])
        (moved / path.name).write_bytes(content[:place] + flipped + content[place + 1 :])
        changed = files.model_fingerprint(moved)
        assert {name for name in changed if changed[name] != fingerprint[name]} == {path.name}
        (moved / path.name).write_bytes(content)


MOVED = [
    "offline_value",
    pytest.param("train_online", marks=many),
    pytest.param("evaluate", marks=many),
]


@pytest.mark.parametrize("stage", MOVED)
def test_model_may_move_but_not_change(
    stage, run, stage1, one_rank, model, dataset, tmp_path, request
):
    """A finished stage knows a moved copy as the same model, and another tokenizer as another."""
    moved = tmp_path / "moved"
    shutil.copytree(model, moved)
    (moved / "README.md").write_text("Where it is from.")
    relative = os.path.relpath(moved, ROOT)
    out = tmp_path / "out"
    if stage == "offline_value":
        shutil.copy(stage1.file, out)
        command = ("offline_value.py", *stage1_arguments(relative, dataset), "--out", out)
    elif stage == "train_online":
        shutil.copytree(one_rank, out)

        def move(values: dict) -> None:
            values["header"]["model"] = relative

        values = edit_values(stage1.file, tmp_path / "values.json", move)
        command = ("train_online.py", "--values", values, "--out", out, *RAGGED.split())
        command = (*command, "--resume")
    else:
        shutil.copytree(request.getfixturevalue("uninterrupted")("evaluate", 1), out)
        command = request.getfixturevalue("command")("evaluate", out)
        command = tuple(relative if word == model else word for word in command)
    before = snapshot(out)
    result = run(*command)
    assert_ended_well(result)
    assert stage == "evaluate" or "nothing to do" in result.out
    contents = {path: content for path, (_, content) in snapshot(out).items()}
    assert contents == {path: content for path, (_, content) in before.items()}

    tokenizer = moved / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    result = run(*command)
    assert result.code == 2, result.all
    assert "model_fingerprint (tokenizer_config.json)" in only_error(result)


ODD = "mein Ordner 数学 & 'é%s{0}"


@pytest.fixture
def odd_place(tmp_path: Path, model: Path, dataset: Path) -> SimpleNamespace:
    """A folder whose name has spaces, quotes and letters of three alphabets, with all inputs.

    A benchmark's path cannot have a comma, which separates benchmarks.
    """
    place = tmp_path / ODD
    shutil.copytree(model, place / "mödel 1")
    shutil.copy(dataset, place / "größe 1.jsonl")
    return SimpleNamespace(folder=place, model=place / "mödel 1", dataset=place / "größe 1.jsonl")


@many
def test_three_stages_in_a_path_with_spaces_and_non_ascii(run, stage1, one_rank, odd_place):
    place = odd_place.folder
    values, out, results = place / "wérte.json", place / "läufe 1", place / "ergebnisse *"
    command = ("offline_value.py", *stage1_arguments(odd_place.model, odd_place.dataset))
    assert_ended_well(run(*command, "--out", values))
    prompts = files.read_json(stage1.file)["prompts"]
    assert files.read_json(values)["prompts"] == prompts

    arguments = ("--values", values, "--eval-dataset", odd_place.dataset, *RAGGED.split())
    assert_ended_well(run("train_online.py", *arguments, "--out", out))
    for row, expected in zip(read_metrics(out)[1:], read_metrics(one_rank), strict=True):
        row.pop("eval_accuracy", None)
        row.pop("eval_truncated", None)
        assert without_times(row) == without_times(expected)

    arguments = ("--model", out / "final", "--benchmarks", odd_place.dataset, "--max-tokens", "48")
    assert_ended_well(run("evaluate.py", *arguments, "--out", results))
    names = sorted(path.name for path in results.iterdir())
    assert names == ["größe 1.jsonl", "summary.json"], "partial files and all else are gone"
    assert list(files.read_json(results / "summary.json")["benchmarks"]) == ["größe 1"]


def odd_dataset(path: Path, rows: list[dict]) -> Path:
    """Write rows as Windows does, with a byte-order mark, CRLF, and blank lines here and there."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for i in (0, 3, 4, len(lines)):
        lines.insert(i, "  " if i == 3 else "")
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n")
    return path


def test_dataset_with_crlf_bom_blank_lines_and_many_rows(tmp_path):
    """All rows, each as it is: no \\r at an answer's end, no mark before the first key."""
    rows = []
    for i in range(100_000):
        rows.append({"question": f"Größe\r\n{i}?\u2028\x85", "answer": str(i), "id": str(i)})
    path = odd_dataset(tmp_path / "odd.jsonl", rows)
    assert path.read_bytes().count(b"\r\n") > 100_000
    loaded = problems.load_problems(str(path))
    assert loaded == [row | {"_task": "math"} for row in rows]
    rows.insert(99_000, {"question": 5, "answer": "1"})
    odd_dataset(path, rows)
    with pytest.raises(UserError, match=r"row 99001\b"):
        problems.load_problems(str(path))
