"""Nothing is lost: kills, torn files, full disks, dead ranks, signals and everyday accidents.

`make test` runs one sample of each fault and `make test-faults` all of them. The scripts are run as
a user runs them and the faults are the system's own: signals, damaged bytes, a disk of 20 MB. A
kill counts only if the stage was at work: after its first checkpoint or partial record and before
its end. Moments are drawn from a seed; where in a step they fall is the machine's.
"""

import contextlib
import functools
import itertools
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

import evaluate
import problems
from problems import UserError
from train_online import whole_step

TIMING = """seconds_generate seconds_grade seconds_ref seconds_update seconds_sync seconds_total
tokens_per_second peak_gib seconds grading sha256 out resume"""
STARTS = 300  # seconds in which a run must have got to work, on whatever cores are left
many = pytest.mark.faults


def untimed(row: dict) -> dict:
    return {k: v for k, v in row.items() if k not in TIMING.split()}


def only_error(told: SimpleNamespace) -> str:
    """Return the one sentence in which a run told why it ended."""
    assert "Traceback" not in told.all and "Exception ignored" not in told.all, told.all
    lines = [line for line in told.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, told.all
    return lines[0]


def finish(process: subprocess.Popen, seconds: float) -> SimpleNamespace:
    """Wait for a run's end, at most so long; what it told, and `.seconds` that it took."""
    start = time.monotonic()
    out, err = process.communicate(timeout=seconds)
    took = time.monotonic() - start
    return SimpleNamespace(code=process.returncode, out=out, err=err, all=out + err, seconds=took)


def slay(process: subprocess.Popen, started: list | None = None) -> None:
    """SIGKILL a run's process group; what it started, in other groups too, must end with it."""
    started = started or psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(started, timeout=60)
    for orphan in alive:
        orphan.kill()
    process.communicate(timeout=30)
    assert not alive, f"outlived their launcher: {alive}"


# ---------------------------------------------------------------------------------------------
# The stages: how each is started, what shows its progress, and when two results are the same

STEPS = 44
TRAIN = f"""--num-steps {STEPS} --batch-size 6 --updates-per-batch 2 --samples-per-prompt 2
--lr 1e-4 --beta2 0.1 --save-every 2 --eval-every 5 --micro-batch-tokens 500"""
SAMPLES = 500  # of each problem in stages 1 and 3: drawing them must outlast the kills


def steps_told(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def checkpoints(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))


def being_written(out: Path, since: float) -> bool:
    """Tell whether a checkpoint is half written, by a process started at `since`."""
    with contextlib.suppress(FileNotFoundError):
        for path in (out / "checkpoints").glob(".unfinished"):
            if path.stat().st_mtime > since:
                return True
    return False


def records(out: Path) -> list[tuple[str, str, int]]:
    """(benchmark, id, sample) of all whole records that stage 1 or 3 has beside or in `out`.

    Those of a partial file are not counted again when the file that replaces it is there.
    """
    found, whole = [], list(out.glob("*.jsonl"))
    for path in whole:
        rows = map(json.loads, path.read_text("utf-8").splitlines())
        found += [(path.stem, row["id"], row["sample"]) for row in rows]
    for folder in out.glob("*.partial"):
        if folder.with_suffix("") not in whole:
            name = folder.name.split(".")[0]
            found += [(name, *key) for key in problems.read_partial(folder, whose(folder))]
    return found


def whose(folder: Path) -> str:
    """The identity of a partial folder, hashed."""
    path = folder / "identity.json"
    return problems.read_json(path, ours=True)["sha256"] if path.exists() else ""


def count_records(out: Path) -> int:
    count = 0
    for path in (*out.glob("*.jsonl"), *out.glob("*.partial/*.jsonl")):
        with contextlib.suppress(FileNotFoundError):  # a partial file ends with its benchmark
            count += path.read_bytes().count(b'"reward"')
    return count


@pytest.fixture(scope="session")
def other_digits(tmp_path_factory) -> Path:
    """A second benchmark."""
    rows = [{"question": f"Digit, please. {i}", "answer": i % 4, "id": f"o{i}"} for i in range(20)]
    return write_lines(tmp_path_factory.mktemp("other") / "other.jsonl", rows)


@pytest.fixture(scope="session")
def command(model, dataset, other_digits, stage1) -> Callable[[str, Path], tuple]:
    """What starts a stage, and starts it again after a kill, so that its files are in `out`."""

    def make(stage: str, out: Path) -> tuple:
        if stage == "offline_value":
            arguments = (*stage1_arguments(model, dataset), "--num-value-samples", SAMPLES)
            return ("offline_value.py", *arguments, "--out", out / "values.json")
        if stage == "evaluate":
            sets = f"{dataset},{other_digits}"
            arguments = ("--model", model, "--benchmarks", sets, "--max-tokens", "48")
            return ("evaluate.py", *arguments, "--num-samples", SAMPLES, "--out", out)
        arguments = ("--values", stage1.file, "--eval-dataset", dataset, *TRAIN.split())
        return ("train_online.py", *arguments, "--resume", "--out", out)

    return make


@pytest.fixture(scope="session")
def straight(run, command, tmp_path_factory) -> Callable[[str, int], Path]:
    """The folder of a stage's uninterrupted run, each made once.

    What is sampled depends on no rank, so that one rank's run of stages 1 and 3 serves for two.
    """

    @functools.cache
    def make(stage: str, ranks: int) -> Path:
        if stage != "train_online" and ranks > 1:
            return make(stage, 1)
        out = tmp_path_factory.mktemp(f"straight-{stage}-{ranks}") / "out"
        told = run(*(torchrun(ranks) if ranks > 1 else ()), *command(stage, out), timeout=600)
        assert told.code == 0, told.all
        return out

    return make


def assert_same(stage: str, out: Path, expected: Path) -> None:
    """Two folders of a stage hold the same result, bit for bit, and nothing is left beside it."""
    assert [p for p in out.rglob(".*")] == [], "left behind"
    assert [p for p in out.rglob("*.partial")] == [], "left behind"
    for put_aside in (out / "checkpoints").glob("damaged-*"):
        shutil.rmtree(put_aside)
    ours, theirs = (sorted(p.relative_to(x) for p in x.rglob("*")) for x in (out, expected))
    assert ours == theirs
    if stage == "offline_value":
        ours, theirs = (json.loads((x / "values.json").read_text()) for x in (out, expected))
        assert json.dumps(ours["prompts"]) == json.dumps(theirs["prompts"])
        assert untimed(ours["header"]) == untimed(theirs["header"])
        problems.read_json(out / "values.json", ours=True)
    elif stage == "evaluate":
        for path in expected.glob("*.jsonl"):
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
        ours, theirs = (json.loads((x / "summary.json").read_text()) for x in (out, expected))
        assert ours["benchmarks"] == theirs["benchmarks"]
        assert untimed(ours["header"]) == untimed(theirs["header"])
    else:
        ours, theirs = ([untimed(row) for row in read_metrics(x)] for x in (out, expected))
        assert ours == theirs
        ours, theirs = (json.loads((x / "config.json").read_text()) for x in (out, expected))
        assert untimed(ours) == untimed(theirs)
        saved = [out / "final", *checkpoints(out)]
        assert all(whole_step(folder) for folder in saved)
        for folder in saved:
            ours, theirs = read_weights(folder), read_weights(expected / folder.relative_to(out))
            assert ours.keys() == theirs.keys()
            assert all(ours[k].equal(theirs[k]) for k in ours), folder


# ---------------------------------------------------------------------------------------------
# 1. SIGKILL at any moment


def kill_training(start: tuple, out: Path, moments: list[str], chance: random.Random) -> list[str]:
    """Start and SIGKILL stage 2 once for each moment; what each kill struck.

    At "step" it is at least a step further than the last time; at "write" a checkpoint is being
    written, which is tried again if it was renamed before the kill; "start" is not counted.
    """
    struck = []
    while moments:
        assert len(struck) < 24 and steps_told(out) < STEPS - 3, f"too few steps: {struck}"
        moment, before, begun = moments.pop(0), steps_told(out), time.time()
        process, started = spawn(*start), None
        try:
            if moment == "start":
                time.sleep(chance.uniform(0, 7))
            elif moment == "write":
                wait_until(lambda: steps_told(out) > before, process, STARTS)  # noqa: B023
                # listed before, as that takes longer than a write
                started = psutil.Process(process.pid).children(recursive=True)
                ready = lambda: checkpoints(out) and being_written(out, begun)  # noqa: E731, B023
                wait_until(ready, process, STARTS)
            else:
                goal = before + chance.randint(1, 2)
                ready = lambda: steps_told(out) >= goal and checkpoints(out)  # noqa: E731, B023
                wait_until(ready, process, STARTS)
                time.sleep(chance.uniform(0, 0.3))
            assert process.poll() is None, process.communicate()
            slay(process, started)
        finally:
            kill(process)
        assert not (out / "final").exists() and checkpoints(out), "not at work: tests nothing"
        if moment == "write" and not being_written(out, begun):
            moments.append("write")
            moment = "step"
        struck.append(moment)
    return struck


def kill_drawing(start: tuple, out: Path, moments: list[str], chance: random.Random) -> list[str]:
    """Start and SIGKILL stage 1 or 3 once for each moment; no sample is drawn twice.

    At "damage" some bytes of its partial file are flipped after the kill.
    """
    total = (NUM_PROMPTS if "offline_value.py" in start else NUM_PROMPTS + 23) * SAMPLES
    struck = []
    while moments:
        moment, before = moments.pop(0), len(records(out))
        process = spawn(*start)
        try:
            if moment == "start":
                time.sleep(chance.uniform(0, 7))
            else:  # all along the way, as much of it as is left for each kill
                there = count_records(out)
                goal = there + chance.randint(1, max(1, (total - there) // (len(moments) + 2)))
                wait_until(lambda: count_records(out) >= goal, process, STARTS)  # noqa: B023
                time.sleep(chance.uniform(0, 0.05))
            assert process.poll() is None, process.communicate()
            slay(process)
        finally:
            kill(process)
        left, whole = list(out.glob("*.partial/*.jsonl")), records(out)
        assert not (out / "values.json").exists(), "not at work: tests nothing"
        assert len(set(whole)) == len(whole), "some samples were drawn twice"
        assert moment == "start" or before < len(whole) < total, "not at work: tests nothing"
        if moment == "damage" and left:
            path = chance.choice(left)
            path.write_bytes(damage(path.read_bytes(), "flipped", chance))
        struck.append(moment)
    return struck


@pytest.fixture(scope="session")
def killed(command, tmp_path_factory) -> Callable[[str, int, str], SimpleNamespace]:
    """A stage's folder after one kill at each of the given moments; each made once."""

    @functools.cache
    def make(stage: str, ranks: int, moments: str) -> SimpleNamespace:
        out = tmp_path_factory.mktemp(f"killed-{stage}-{ranks}") / "out"
        out.mkdir()
        launcher = torchrun(ranks) if ranks > 1 else ()
        start, chance = (*launcher, *command(stage, out)), random.Random(f"{stage}/{ranks}")
        striking = kill_training if stage == "train_online" else kill_drawing
        struck = striking(start, out, moments.split(), chance)
        return SimpleNamespace(folder=out, struck=struck)

    return make


# Ten that count, and two while it starts. The first must not: nothing would be there to lose.
TRAINING = "step write step start step write step step start write step step"
DRAWING = "work work work start work damage work work start work damage work"
KILLS = [
    pytest.param("train_online", 1, "step write", id="train_online-1-sample"),
    pytest.param("evaluate", 1, "work", id="evaluate-1-sample"),
    *(
        pytest.param(
            stage,
            ranks,
            TRAINING if stage == "train_online" else DRAWING,
            id=f"{stage}-{ranks}-ten",
            marks=many,
        )
        for stage in ("offline_value", "train_online", "evaluate")
        for ranks in (1, 2)
    ),
]


@pytest.mark.parametrize("stage, ranks, moments", KILLS)
def test_killed_and_continued_is_as_if_it_had_not_been(
    stage, ranks, moments, killed, straight, run, command, tmp_path
):
    """Bit for bit. A lost sampling seed, moment of Adam or epoch's order would all show."""
    expected, dead, out = straight(stage, ranks), killed(stage, ranks, moments), tmp_path / "out"
    assert len([moment for moment in dead.struck if moment != "start"]) >= (
        10 if "start" in moments else len(moments.split())
    )
    assert dead.struck.count("write") == moments.split().count("write"), dead.struck
    shutil.copytree(dead.folder, out)
    launcher = torchrun(ranks) if ranks > 1 else ()
    told = run(*launcher, *command(stage, out), timeout=600)
    assert told.code == 0 and "Traceback" not in told.all, told.all
    assert_same(stage, out, expected)


@many
def test_killed_on_two_ranks_and_continued_on_one_is_equal_to_rounding(
    killed, straight, run, command, tmp_path
):
    """The same tokens, as the weights are the same, and from them the same update to rounding."""
    dead, out = killed("train_online", 2, TRAINING), tmp_path / "out"
    shutil.copytree(dead.folder, out)
    done = max(whole_step(folder) for folder in checkpoints(out))
    told = run(*command("train_online", out), timeout=600)
    assert told.code == 0 and "Traceback" not in told.all, told.all
    ours, theirs = read_metrics(out), read_metrics(straight("train_online", 2))
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1)) and 0 < done < STEPS - 1
    assert [untimed(row) for row in ours[:done]] == [untimed(row) for row in theirs[:done]]
    a, b = ours[done], theirs[done]
    for key in ("reward", "v_star", "adv", "response_tokens", "truncated"):
        assert a[key] == b[key], key
    for key in ("loss", "grad_norm", "logratio", "kl_per_token"):
        assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
    assert whole_step(out / "final") == STEPS


# ---------------------------------------------------------------------------------------------
# 2. Torn and corrupted files: 200 cases that are detected or harmless


def damage(whole: bytes, how: str, chance: random.Random) -> bytes:
    """Cut bytes off at a random length, or flip up to eight of them."""
    if how == "truncated":
        return whole[: chance.randrange(len(whole))]
    broken = bytearray(whole)
    for place in chance.sample(range(len(whole)), chance.randint(1, min(8, len(whole)))):
        broken[place] ^= chance.randrange(1, 256)
    return bytes(broken)


@contextlib.contextmanager
def damaged(path: Path, how: str, chance: random.Random) -> Iterator[None]:
    whole = path.read_bytes()
    path.write_bytes(damage(whole, how, chance))
    try:
        yield
    finally:
        path.write_bytes(whole)


def cases(count: int) -> list:
    """Half of them cuts and half flips; `make test` tries the first of each."""
    numbered = [(how, i) for i in range(count // 2) for how in ("truncated", "flipped")]
    return [pytest.param(how, i, id=f"{how}-{i}", marks=many if i else ()) for how, i in numbered]


def load(path: Path) -> object:
    with contextlib.suppress(ValueError):
        return json.loads(path.read_bytes())


@pytest.fixture(scope="session")
def checkpoint(one_rank, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "step-2"
    shutil.copytree(one_rank / "checkpoints" / "step-2", folder)
    assert whole_step(folder) == 2
    return folder


@pytest.mark.parametrize("how, number", cases(90))
def test_damaged_checkpoint_is_never_taken_for_whole(how, number, checkpoint):
    """Every file in turn; only a manifest that still says the same may pass."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size)
    assert len(files) >= 4
    path = files[number % len(files)]
    said = load(path)
    with damaged(path, how, random.Random(f"checkpoint/{how}/{number}")):
        harmless = path.name == "manifest.json" and load(path) == said
        assert whole_step(checkpoint) == (2 if harmless else 0), path


def test_checkpoint_that_lost_a_file_or_took_anothers_place_is_not_whole(checkpoint, tmp_path):
    for path in [p for p in checkpoint.rglob("*") if p.is_file()]:
        whole = path.read_bytes()
        path.unlink()
        assert whole_step(checkpoint) == 0, path
        path.write_bytes(whole)
    assert whole_step(checkpoint) == 2
    shutil.copytree(checkpoint, tmp_path / "step-3")
    assert whole_step(tmp_path / "step-3") == 0, "its manifest says step 2"
    manifest = checkpoint / "manifest.json"
    whole = manifest.read_text()
    assert whole.count('"step": 2') == 1
    manifest.write_text(whole.replace('"step": 2', '"step": 7'))
    assert whole_step(checkpoint) == 0, "one flipped bit would resume another step's schedule"
    manifest.write_text(whole)


@pytest.fixture(scope="session")
def values_copy(stage1, tmp_path_factory) -> SimpleNamespace:
    path = tmp_path_factory.mktemp("values") / "values.json"
    shutil.copy(stage1.file, path)
    return SimpleNamespace(path=path, content=json.dumps(problems.read_json(path, ours=True)))


@pytest.mark.parametrize("how, number", cases(50))
def test_damaged_values_are_refused_or_read_as_they_were(how, number, values_copy):
    with damaged(values_copy.path, how, random.Random(f"values/{how}/{number}")):
        try:
            read = problems.read_json(values_copy.path, ours=True)
        except UserError as error:
            assert "values.json" in str(error)
        else:
            assert json.dumps(read) == values_copy.content


@pytest.fixture(scope="session")
def results(straight, tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("results") / "out"
    shutil.copytree(straight("evaluate", 1), folder)
    path = folder / "other.jsonl"
    return SimpleNamespace(folder=folder, path=path, score=evaluate.grade_file(path))


@pytest.mark.parametrize("how, number", cases(40))
def test_damaged_results_are_refused_or_give_the_same_score(how, number, results, capsys):
    """Or `--grade` says on stderr that the file is not as evaluate.py left it, by its name."""
    with damaged(results.path, how, random.Random(f"results/{how}/{number}")):
        try:
            score = evaluate.grade_file(results.path)
        except UserError as error:
            assert "other.jsonl" in str(error)
        else:
            assert score == results.score or "other.jsonl" in capsys.readouterr().err


@many
@pytest.mark.parametrize("how", ["one digit", "whole lines lost"])
def test_results_changed_without_a_trace_are_told(how, results, capsys):
    """What is still good JSON: only the hash or the counts that evaluate.py kept can tell."""
    whole = results.path.read_bytes()
    lines = whole.splitlines(keepends=True)
    right = next(i for i, line in enumerate(lines) if json.loads(line)["reward"])
    digit = f"boxed{{{json.loads(lines[right])['answer']}}}".encode()
    assert digit in lines[right]
    changed = lines[: len(lines) // 3]
    if how == "one digit":
        changed = [*lines[:right], lines[right].replace(digit, b"boxed{9}"), *lines[right + 1 :]]
    results.path.write_bytes(b"".join(changed))
    try:
        score = evaluate.grade_file(results.path)
        assert score != results.score and "other.jsonl" in capsys.readouterr().err
    except UserError as error:
        assert "other.jsonl" in str(error)
    finally:
        results.path.write_bytes(whole)


@pytest.fixture(scope="session")
def partial(killed, tmp_path_factory) -> SimpleNamespace:
    """A partial file of stage 3, whose it is, and its records."""
    dead = killed("evaluate", 1, "work").folder
    (left,) = dead.glob("*.partial")
    folder = shutil.copytree(left, tmp_path_factory.mktemp("partial") / left.name)
    kept, path = problems.read_partial(folder, whose(folder)), folder / "identity.json"
    assert len(kept) == len(records(folder.parent)) > 0
    return SimpleNamespace(path=folder / "0.jsonl", whose=path, records=kept)


@pytest.mark.parametrize("how, number", cases(20))
def test_damaged_partial_records_are_dropped_alone(how, number, partial):
    with damaged(partial.path, how, random.Random(f"partial/{how}/{number}")):
        read = problems.read_partial(partial.path.parent, whose(partial.path.parent))
        assert read.items() <= {**partial.records, **read}.items()
        assert all(partial.records[key] == record for key, record in read.items())
        lost = len(partial.records) - len(read)
        assert not read or how == "truncated" or lost <= 16, "eight bytes spoil 16 lines at most"


def test_partial_files_belong_to_one_identity(partial):
    """Another model's samples would be mixed in silently; whose they are must be beyond doubt."""
    identity = problems.left_by(partial.whose, {})
    assert {"model_sha256", "temperature", "prompt_template", "rows_sha256"} <= identity.keys()
    with pytest.raises(UserError, match="model_sha256"):
        problems.left_by(partial.whose, identity | {"model_sha256": "0" * 64})
    for how in ("truncated", "flipped"):
        with (
            damaged(partial.whose, how, random.Random(how)),
            pytest.raises(UserError, match=r"identity\.json"),
        ):
            problems.left_by(partial.whose, identity)
    # and where the identity is lost, or another's beside them, the records are nobody's
    assert problems.read_partial(partial.path.parent, "0" * 64) == {}


def test_the_corruption_cases_are_200():
    marks = [
        test_damaged_checkpoint_is_never_taken_for_whole,
        test_damaged_values_are_refused_or_read_as_they_were,
        test_damaged_results_are_refused_or_give_the_same_score,
        test_damaged_partial_records_are_dropped_alone,
    ]
    assert sum(len(test.pytestmark[0].args[1]) for test in marks) >= 200


@pytest.fixture
def two_steps(one_rank, stage1, tmp_path) -> SimpleNamespace:
    """A copy of a finished run of two steps, to be damaged, and the command that continues it."""
    out = tmp_path / "run"
    shutil.copytree(one_rank, out)
    command = ("train_online.py", "--values", stage1.file, "--out", out, *RAGGED.split())
    return SimpleNamespace(out=out, command=(*command, "--resume"), base=one_rank)


@many
def test_run_with_nothing_whole_left_says_so_and_starts_again(run, two_steps):
    out, chance = two_steps.out, random.Random(0)
    for name in ("final/model.safetensors", "checkpoints/step-2/config.json"):
        (out / name).write_bytes(damage((out / name).read_bytes(), "flipped", chance))
    trainer = max((out / "checkpoints/step-1").rglob("*"), key=lambda p: p.stat().st_size)
    trainer.write_bytes(damage(trainer.read_bytes(), "truncated", chance))
    told = run(*two_steps.command)
    assert told.code == 0 and "Traceback" not in told.all, told.all
    for name in ("step-1", "step-2"):
        assert [line for line in told.err.splitlines() if name in line and "damaged" in line]
    assert_same("train_online", out, two_steps.base)


@many
def test_damaged_final_model_is_written_again(run, two_steps):
    weights = two_steps.out / "final" / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes(), "flipped", random.Random(1)))
    told = run(*two_steps.command)
    assert told.code == 0 and "Traceback" not in told.all, told.all
    assert_same("train_online", two_steps.out, two_steps.base)


@many
@pytest.mark.parametrize("how", ["flipped", "a line lost", "no object"])
def test_damaged_metrics_come_back_from_the_checkpoint(how, run, two_steps):
    """No step's numbers are lost or told twice."""
    shutil.rmtree(two_steps.out / "final")
    shutil.rmtree(two_steps.out / "checkpoints" / "step-2")
    path = two_steps.out / "metrics.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    broken = {"flipped": first.replace(b'"step"', b'"st\x00p"'), "a line lost": b""}
    path.write_bytes(broken.get(how, b"[1]\n") + second)
    told = run(*two_steps.command)
    assert told.code == 0 and "Traceback" not in told.all, told.all
    assert path.read_bytes().startswith(first)
    assert_same("train_online", two_steps.out, two_steps.base)


@many
def test_pickle_in_a_checkpoint_is_not_run(run, two_steps, tmp_path):
    """Not even with its hash in the manifest: weights_only=True, or no pickle at all."""
    shutil.rmtree(two_steps.out / "final")
    (folder,) = [p for p in checkpoints(two_steps.out) if p.name == "step-1"]
    shutil.rmtree(two_steps.out / "checkpoints" / "step-2")
    state = next(folder.rglob("*.pt"), None) or next(folder.rglob("adam*"))
    import pickle

    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    state.write_bytes(pickle.dumps(Evil()))
    told = run(*two_steps.command, "--num-steps", "1")  # its hash does not match: step 0
    assert not (tmp_path / "ran").exists() and "damaged" in told.err, told.all
    assert told.code == 0 and "Traceback" not in told.all, told.all

    state.write_bytes(pickle.dumps(Evil()))
    manifest = {"step": 1, "files": problems.folder_hashes(folder)}
    problems.write_json(folder / "manifest.json", manifest)
    assert whole_step(folder) == 1
    told = run(*two_steps.command)
    assert told.code != 0 and not (tmp_path / "ran").exists(), told.all


@many
@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_finished_values_that_were_damaged_are_not_reported_as_a_result(
    how, run, stage1, model, dataset, tmp_path
):
    path = tmp_path / "values.json"
    path.write_bytes(damage(stage1.file.read_bytes(), how, random.Random(how)))
    before = snapshot(tmp_path)
    told = run("offline_value.py", *stage1_arguments(model, dataset), "--out", path)
    assert told.code == 2 and "values.json" in only_error(told), told.all
    assert snapshot(tmp_path) == before


@many
@pytest.mark.parametrize("name", ["truncated summary", "wrong summary", "truncated samples"])
def test_finished_results_that_were_damaged_are_told_or_made_good(
    name, run, straight, command, tmp_path
):
    """Asked again for the same evaluation, it does not repeat a wrong number in silence."""
    out, base = tmp_path / "out", straight("evaluate", 1)
    shutil.copytree(base, out)
    path = out / ("digits.jsonl" if "samples" in name else "summary.json")
    text = path.read_text()
    if name == "wrong summary":
        mean = json.loads(text)["benchmarks"]["digits"]["mean"]
        assert text.count(f'"mean": {mean}') == 1
        path.write_text(text.replace(f'"mean": {mean}', '"mean": 0.987'))
    elif name == "truncated samples":
        path.write_text("".join(text.splitlines(keepends=True)[:100]))
    else:
        path.write_text(text[: len(text) // 2])
    told = run(*command("evaluate", out))
    assert "Traceback" not in told.all and "98.7%" not in told.out, told.all
    if told.code == 0:
        assert_same("evaluate", out, base)
    else:
        assert told.code == 2 and path.name in only_error(told), told.all


# ---------------------------------------------------------------------------------------------
# 3. A full disk

LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = sys.argv[2:]
sys.path.insert(0, "")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def disk(tmp_path) -> Iterator[SimpleNamespace]:
    """A disk of 20 MB: `.leave(n)` fills all but n bytes of it and returns what starts a script.

    A tmpfs; where none may be mounted, no file may become larger than n.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0
    ballast = folder / "ballast"

    def leave(count: int) -> tuple:
        if not mounted:
            return "-c", LIMITED, str(count)
        space = os.statvfs(folder)
        ballast.write_bytes(bytes(space.f_bavail * space.f_frsize - count))
        return ()

    says = "No space left on device" if mounted else "File too large"
    give_back = lambda: ballast.unlink(missing_ok=True)  # noqa: E731
    try:
        yield SimpleNamespace(folder=folder, leave=leave, give_back=give_back, says=says)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


def assert_full(told: SimpleNamespace, disk: SimpleNamespace) -> None:
    line = only_error(told)
    assert told.code == 1, told.all
    assert disk.says in line and str(disk.folder) in line, line


# The whole checkpoint of the tests' model takes about 1 MB, its weights a third of it.
@pytest.mark.parametrize(
    "left",
    [
        pytest.param(600_000, id="optimiser"),
        pytest.param(150_000, id="weights", marks=many),
        pytest.param(20_000, id="tokenizer", marks=many),
        pytest.param(0, id="nothing", marks=many),
    ],
)
def test_full_disk_while_a_checkpoint_is_written(left, disk, run, one_rank, stage1):
    """The one before stays whole and, with space again, the run ends as if nothing had been."""
    out = disk.folder / "run"
    shutil.copytree(one_rank, out)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints" / "step-2")
    command = ("train_online.py", "--values", stage1.file, "--out", out, *RAGGED.split())
    told = run(*disk.leave(left), *command, "--resume")
    assert_full(told, disk)
    assert [p.name for p in checkpoints(out)] == ["step-1"]
    assert whole_step(out / "checkpoints" / "step-1") == 1 and not (out / "final").exists()
    disk.give_back()
    told = run(*command, "--resume")
    assert told.code == 0 and "Traceback" not in told.all, told.all
    assert_same("train_online", out, one_rank)


# Records have some 110 bytes, so that all of stage 1's need 280 KB and stage 3's 440 KB.
FULL = [("offline_value", "partial", 60_000), ("offline_value", "values", 0)]
FULL += [("evaluate", "partial", 60_000), ("evaluate", "results", 0)]


@many
@pytest.mark.parametrize("stage, struck, left", FULL, ids=lambda x: str(x))
def test_full_disk_while_samples_are_drawn(stage, struck, left, disk, run, command, straight):
    """What was drawn is kept and not drawn again; the result is that of a large disk.

    Where the result itself is meant to find no room, the disk is filled when all is drawn.
    """
    base, out = straight(stage, 1), disk.folder / "out"
    out.mkdir()
    if struck == "partial":
        told = run(*disk.leave(left), *command(stage, out), timeout=600)
        total = 0
    else:
        told, total = fill_late(disk, command(stage, out), out, base), NUM_PROMPTS * SAMPLES
    assert_full(told, disk)
    assert not (out / "values.json").exists() and not (out / "summary.json").exists()
    whole = len(records(out))
    assert whole >= max(total, 100), "struck elsewhere: choose another size"
    disk.give_back()
    told = run(*command(stage, out), timeout=600)
    assert told.code == 0 and "Traceback" not in told.all, told.all
    assert_same(stage, out, base)


def fill_late(disk: SimpleNamespace, start: tuple, out: Path, base: Path) -> SimpleNamespace:
    """Fill the disk once a quarter is drawn but for what the other records need, 96 KB less."""
    if disk.says != "No space left on device":
        pytest.skip("needs a tmpfs, which may not be mounted here")
    first = "values.json" if (base / "values.json").exists() else "digits.jsonl"
    total = NUM_PROMPTS * SAMPLES if first == "values.json" else (NUM_PROMPTS + 3) * SAMPLES
    process = spawn(*start)
    try:
        wait_until(lambda: count_records(out) >= total // 4, process, STARTS)
        os.kill(process.pid, signal.SIGSTOP)
        (path,) = out.glob("*.partial/0.jsonl")
        size, count = path.stat().st_size, count_records(out)
        needs = size / count * (total - count)
        result = (base / first).stat().st_size
        disk.leave(round(needs + min(96_000, result / 2)))
        os.kill(process.pid, signal.SIGCONT)
        return finish(process, 600)
    finally:
        kill(process)


# ---------------------------------------------------------------------------------------------
# 4. One rank of two dies


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=many)])
def test_one_rank_killed_ends_the_job_by_name_and_the_run_resumes(
    rank, run, command, straight, tmp_path
):
    """The other waits in a collective for a rank that never comes: for a day, if nobody looks."""
    out, chance = tmp_path / "out", random.Random(rank)
    expected, start = straight("train_online", 2), (*torchrun(2), *command("train_online", out))
    process = spawn(*start)
    try:
        wait_until(lambda: steps_told(out) >= 3, process, STARTS)
        ranks = psutil.Process(process.pid).children()
        by_rank = {p.environ().get("RANK"): p for p in ranks}
        time.sleep(chance.uniform(0, 0.2))
        started = psutil.Process(process.pid).children(recursive=True)
        by_rank[str(rank)].send_signal(signal.SIGKILL)
        told = finish(process, 60)
    finally:
        kill(process)
    assert told.code not in (0, None), told.all
    assert re.search(rf"\brank\W+{rank}\b", told.all), told.all
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive
    assert checkpoints(out) and not (out / "final").exists(), "killed too late: tests nothing"
    told = run(*start, timeout=600)
    assert told.code == 0, told.all
    assert_same("train_online", out, expected)


# ---------------------------------------------------------------------------------------------
# 5. Signals

INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    "number, ranks",
    [
        (INT, 1),
        pytest.param(TERM, 1, marks=many),
        pytest.param(INT, 2, marks=many),
        pytest.param(TERM, 2, marks=many),
    ],
)
def test_training_told_to_stop_saves_its_last_finished_step(
    number, ranks, command, straight, tmp_path
):
    out, chance = tmp_path / "out", random.Random(f"{number}/{ranks}")
    launcher = torchrun(ranks) if ranks > 1 else ()
    process = spawn(*launcher, *command("train_online", out), "--save-every", "1000")
    try:
        wait_until(lambda: steps_told(out) >= 3, process, STARTS)
        time.sleep(chance.uniform(0, 0.5))
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        told = finish(process, 60)
    finally:
        kill(process)
    assert told.seconds <= 30
    if ranks == 1:
        assert told.code == 128 + number and "Traceback" not in told.all, told.all
    else:
        assert told.code != 0, told.all  # it is torchrun's
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive
    rows, (saved,) = read_metrics(out), checkpoints(out)
    assert 3 <= len(rows) < STEPS and not (out / "final").exists(), "too late: tests nothing"
    assert saved.name == f"step-{len(rows)}" and whole_step(saved) == len(rows)
    straight_rows = read_metrics(straight("train_online", ranks))
    assert [untimed(row) for row in rows] == [untimed(row) for row in straight_rows[: len(rows)]]


def test_second_signal_ends_training_at_once(command, tmp_path):
    """Nothing is saved then. Another signal than the first, as the system merges equal ones."""
    out = tmp_path / "out"
    process = spawn(*command("train_online", out), "--save-every", "1000")
    try:
        wait_until(lambda: steps_told(out) >= 1, process, STARTS)
        process.send_signal(INT)
        process.send_signal(TERM)
        told = finish(process, 30)
    finally:
        kill(process)
    assert told.code in (128 + INT, 128 + TERM) and told.seconds < 5, told.all
    assert "Traceback" not in told.all, told.all
    assert checkpoints(out) == [] and not (out / "final").exists()


@many
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("number", [INT, TERM])
@pytest.mark.parametrize("stage", ["offline_value", "evaluate"])
def test_drawing_told_to_stop_keeps_what_it_drew(stage, number, count, command, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    process = spawn(*command(stage, out))
    try:
        wait_until(lambda: count_records(out) >= 20, process, STARTS)
        process.send_signal(number)
        if count == 2:
            time.sleep(0.1)
            process.send_signal(number)
        told = finish(process, 60)
    finally:
        kill(process)
    # the second may come when Python has already put the system's own handlers back
    assert told.code in (128 + number, -number)[:count] and "Traceback" not in told.all, told.all
    assert told.seconds <= (30 if count == 1 else 5)
    assert len(records(out)) >= 20
    assert not (out / "values.json").exists() and not (out / "summary.json").exists()


@many
@pytest.mark.parametrize("moment, number", [("importing", TERM), ("engine", INT), ("engine", TERM)])
def test_signal_while_starting_needs_no_traceback(moment, number, command, tmp_path):
    """It is over at once. Ctrl-C while Python still imports is Python's own to tell."""
    out = tmp_path / "out"
    process = spawn(*command("train_online", out))
    try:
        if moment == "importing":
            time.sleep(0.4)
        else:
            wait_until((out / "config.json").exists, process, STARTS)
            time.sleep(0.5)
        process.send_signal(number)
        told = finish(process, 60)
    finally:
        kill(process)
    codes = (128 + number, -number) if moment == "importing" else (128 + number,)
    assert told.code in codes and told.seconds <= 30, told.all
    assert "Traceback" not in told.all, told.all
    assert not checkpoints(out) and steps_told(out) == 0


# ---------------------------------------------------------------------------------------------
# 7. Everyday accidents (6, bad input, is test_bad_input.py)


@pytest.mark.parametrize(
    "stage",
    [
        "train_online",
        pytest.param("offline_value", marks=many),
        pytest.param("evaluate", marks=many),
    ],
)
def test_of_two_runs_started_at_once_one_is_refused(stage, command, straight, tmp_path):
    out = tmp_path / "out"
    start = [word for word in command(stage, out) if word != "--resume"]
    runs = [spawn(*start), spawn(*start)]
    try:
        told = [finish(process, 600) for process in runs]
    finally:
        for process in runs:
            kill(process)
    winner, loser = sorted(told, key=lambda x: x.code)
    assert (winner.code, loser.code) == (0, 2), (winner.all, loser.all)
    line = only_error(loser)
    assert str(out) in line and ("another run" in line or "in use" in line), line
    assert_same(stage, out, straight(stage, 1))


@many
@pytest.mark.parametrize("stage", ["offline_value", "train_online", "evaluate"])
def test_run_beside_a_run_is_refused_and_leaves_it_alone(stage, run, command, straight, tmp_path):
    out = tmp_path / "out"
    process = spawn(*command(stage, out))
    try:
        at_work = steps_told if stage == "train_online" else count_records
        wait_until(lambda: at_work(out) >= 1, process, STARTS)
        os.kill(process.pid, signal.SIGSTOP)  # else it might end before the other has started
        before = snapshot(out)
        other = run(*command(stage, out))
        assert other.code == 2 and "another run" in only_error(other), other.all
        assert snapshot(out) == before
        os.kill(process.pid, signal.SIGCONT)
        told = finish(process, 600)
    finally:
        kill(process)
    assert told.code == 0, told.all
    assert_same(stage, out, straight(stage, 1))


@pytest.fixture
def read_only(tmp_path) -> Iterator[Path]:
    """A folder into which nobody may write, root included; /proc if nothing may be mounted."""
    folder = tmp_path / "read only"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(folder)]
    if os.geteuid():
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
    elif shutil.which("mount") and subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield folder
        finally:
            subprocess.run(["umount", "-l", folder], check=True)
    else:
        yield Path("/proc")


@pytest.mark.parametrize("stage", ["offline_value", "train_online", "evaluate"])
def test_folder_that_cannot_be_written_is_told_at_once(stage, run, command, read_only):
    """Before minutes of sampling, and before the engine starts."""
    with pytest.raises(OSError):
        (read_only / "x").mkdir()
    told = run(*command(stage, read_only / "out"))
    assert told.code == 2 and str(read_only) in only_error(told), told.all


@many
@pytest.mark.parametrize("stage", ["train_online", "evaluate"])
def test_finished_run_that_cannot_be_written_is_told_or_left(
    stage, run, command, straight, read_only
):
    """Asked again, a finished run changes nothing, so that an archive may be read-only."""
    if not os.path.ismount(read_only):
        pytest.skip("needs a tmpfs, which may not be mounted here")
    subprocess.run(["mount", "-o", "remount,rw,size=20m", read_only], check=True)
    out = read_only / "out"
    shutil.copytree(straight(stage, 1), out)
    subprocess.run(["mount", "-o", "remount,ro", read_only], check=True)
    told = run(*command(stage, out))
    assert "Traceback" not in told.all, told.all
    assert told.code == 0 or (told.code == 2 and str(out) in only_error(told)), told.all


ODD = "mein Ordner, 数学 & 'é%s{0}"


@pytest.fixture
def odd_place(tmp_path, model, dataset) -> SimpleNamespace:
    """A folder whose name has spaces, quotes and letters of three alphabets, with all that is read.

    No comma can stand in a benchmark's path: commas part benchmarks.
    """
    place = tmp_path / ODD.replace(",", "")
    shutil.copytree(model, place / "mödel 1")
    shutil.copy(dataset, place / "größe 1.jsonl")
    return SimpleNamespace(folder=place, model=place / "mödel 1", dataset=place / "größe 1.jsonl")


def test_path_with_spaces_and_non_ascii(run, stage1, one_rank, odd_place):
    """Stage 2 alone; the test below takes all three through such a path."""
    place = odd_place.folder
    rename = lambda values: values["header"].update(model=str(odd_place.model))  # noqa: E731
    values = edit_values(stage1.file, place / "wérte.json", rename)
    arguments = ("--values", values, "--eval-dataset", odd_place.dataset, *RAGGED.split())
    told = run("train_online.py", *arguments, "--out", place / "läufe 1" / "run [2]")
    assert told.code == 0 and "Traceback" not in told.all, told.all
    ours, theirs = read_metrics(place / "läufe 1" / "run [2]"), read_metrics(one_rank)
    ours = [{k: v for k, v in row.items() if k != "eval_accuracy"} for row in ours]
    assert [untimed(row) for row in ours] == [untimed(row) for row in theirs]


@many
def test_three_stages_in_a_path_with_spaces_and_non_ascii(run, stage1, odd_place):
    place = odd_place.folder
    values, out, results = place / "wérte.json", place / "läufe 1", place / "ergebnisse *"
    command = ("offline_value.py", *stage1_arguments(odd_place.model, odd_place.dataset))
    told = run(*command, "--out", values)
    assert told.code == 0 and "Traceback" not in told.all, told.all
    assert (
        json.loads(values.read_text())["prompts"] == json.loads(stage1.file.read_text())["prompts"]
    )
    told = run("train_online.py", "--values", values, "--out", out, *RAGGED.split())
    assert told.code == 0 and "Traceback" not in told.all, told.all
    arguments = ("--model", out / "final", "--benchmarks", odd_place.dataset, "--max-tokens", "48")
    told = run("evaluate.py", *arguments, "--out", results)
    assert told.code == 0 and "Traceback" not in told.all, told.all
    names = sorted(p.name for p in results.iterdir())
    assert names == ["größe 1.jsonl", "summary.json"], "partial files and all else are gone"
    assert list(json.loads((results / "summary.json").read_text())["benchmarks"]) == ["größe 1"]


def odd_dataset(path: Path, rows: list[dict]) -> Path:
    """Write rows as Windows does, with a byte-order mark, CRLF, and blank lines here and there."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for i in (0, 3, 4, len(lines)):
        lines.insert(i, "  " if i == 3 else "")
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n")
    return path


def test_dataset_with_crlf_bom_blank_lines_and_100000_rows(tmp_path):
    """All rows, each as it is: no \\r at an answer's end, no mark before the first key."""
    rows = [
        {"question": f"Größe\r\n{i}?\u2028\x85", "answer": str(i), "id": str(i)}
        for i in range(100_000)
    ]
    path = odd_dataset(tmp_path / "odd.jsonl", rows)
    assert path.read_bytes().count(b"\r\n") > 100_000
    start = time.monotonic()
    loaded = problems.load_problems(str(path))
    assert time.monotonic() - start < 60
    assert loaded == [{k: row[k] for k in ("id", "question", "answer")} for row in rows]
    damaged = [*rows[:99_000], {"question": 5, "answer": "1"}, *rows[99_000:]]
    odd_dataset(path, damaged)
    with pytest.raises(UserError, match=r"row 99001\b"):
        problems.load_problems(str(path))


@many
def test_stage_1_with_crlf_bom_blank_lines_and_100000_rows(run, stage1, model, dataset, tmp_path):
    rows = [json.loads(line) for line in dataset.read_text().splitlines()]
    more = [{"question": f"More? {i}", "answer": "1", "id": f"more-{i}"} for i in range(100_000)]
    path = odd_dataset(tmp_path / "digits.jsonl", list(itertools.chain(rows, more)))
    out = tmp_path / "values.json"
    arguments = (*stage1_arguments(model, path), "--limit", len(rows), "--out", out)
    told = run("offline_value.py", *arguments)
    assert told.code == 0 and "Traceback" not in told.all, told.all
    ours, theirs = json.loads(out.read_text()), json.loads(stage1.file.read_text())
    assert ours["prompts"] == theirs["prompts"]


# ---------------------------------------------------------------------------------------------
# Steady: the log of 500 steps is experiments/results/steady.txt


@many
def test_steady_measures_a_run(run, stage1, tmp_path):
    out = tmp_path / "steady.txt"
    arguments = ("--values", stage1.file, "--num-steps", "15", "--batch-size", "6", "--out", out)
    told = run("-m", "experiments.steady", *arguments)
    assert told.code == 0, told.all
    for name in ("rss", "rss_with_graders", "open_files", "seconds_total"):
        (line,) = re.findall(rf"^{name} .*", out.read_text(), re.MULTILINE)
        early, late, ratio = (float(word) for word in line.split() if re.match(r"[\d.]+$", word))
        assert early > 0 and ratio == pytest.approx(late / early, rel=0.1)
    assert "steps 4-6" in out.read_text() and "steps 13-15" in out.read_text()
