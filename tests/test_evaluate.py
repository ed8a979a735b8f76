"""Stage 3 as a user runs it: the saved samples, their statistics, and --grade on files."""

import dataclasses
import inspect
import itertools
import json
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
from conftest import (
    ENV,
    FORK,
    NUM_PROMPTS,
    ROOT,
    SAMPLING,
    at_once,
    make_tokenizer,
    read_lines,
    torchrun,
    write_lines,
)

import evaluate
from apo import files, problems
from apo.files import UserError
from apo.problems import PLAIN, PromptStyle

FIELDS = {"id", "sample", "prompt", "answer", "output", "reward", "tokens", "finished"}
KEYS = {"num_problems", "num_samples", "mean", "stderr", "pass_at_k", "truncated", "tokens"}
# The dataset's two problems without a usable answer, and the long one, are asked and counted here.
NUM_PROBLEMS = NUM_PROMPTS + 3


def read(folder: Path, name: str = "digits") -> tuple[list[dict], dict]:
    """Read a benchmark's samples and its scores."""
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["benchmarks"]) == [name], "a local file's name is its stem"
    return read_lines(folder / f"{name}.jsonl"), summary["benchmarks"][name]


def row_of(text: str, name: str = "digits") -> str:
    (row,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return row


@pytest.fixture(scope="module")
def evaluations(
    run: Callable,
    model: Path,
    one_rank: Path,
    dataset: Path,
    fork: SimpleNamespace,
    tmp_path_factory: pytest.TempPathFactory,
) -> SimpleNamespace:
    """Evaluate three times: see the fixtures below."""
    folder = tmp_path_factory.mktemp("results") / "new"
    trained = ("--model", one_rank / "final", "--benchmarks", dataset, "--num-samples", "4")
    nine_tokens = ("--max-tokens", "9")  # the box is whole, but no EOS follows
    untrained = ("--model", model, "--benchmarks", dataset, "--num-samples", "4", *nine_tokens)
    of_fork = ("--model", fork.run / "final", "--benchmarks", "parity", "--num-samples", "2")
    runs = at_once(
        lambda: run("evaluate.py", *trained, "--out", folder / "trained"),
        lambda: run(FORK, "evaluate.py", *of_fork, "--out", folder / "fork", env=fork.env),
    )
    command = (*torchrun(2), "evaluate.py", *untrained, "--out", folder / "cut_short")
    runs.append(run(*command))
    for result, name in zip(runs, ("trained", "fork", "cut_short"), strict=True):
        assert result.code == 0, result.all
        result.folder = folder / name
    return SimpleNamespace(trained=runs[0], fork=runs[1], cut_short=runs[2])


@pytest.fixture(scope="module")
def evaluated(evaluations: SimpleNamespace) -> SimpleNamespace:
    """Four samples of each problem from stage 2's final model."""
    return evaluations.trained


@pytest.fixture(scope="module")
def cut_short(evaluations: SimpleNamespace) -> SimpleNamespace:
    """Four samples of nine tokens from the reference, on two ranks."""
    return evaluations.cut_short


def test_every_sample_is_saved(evaluated: SimpleNamespace) -> None:
    samples, _ = read(evaluated.folder)
    assert len(samples) == NUM_PROBLEMS * 4
    assert len({(s["id"], s["sample"]) for s in samples}) == NUM_PROBLEMS * 4
    for s in samples:
        assert s.keys() >= FIELDS and s["sample"] in range(4) and 1 <= s["tokens"] <= 48
        assert s["reward"] == 0 or s["finished"]
        assert s["reward"] == 0 or rf"\boxed{{{s['answer']}}}" in s["output"]
    assert any(s["reward"] for s in samples), "the fixture's model should be right now and then"
    assert len({s["output"] for s in samples if s["id"] == "p0"}) > 1, "each has its own seed"


def test_summary_is_what_the_samples_say(evaluated: SimpleNamespace) -> None:
    """Means over problems of means over samples, pass@k over all subsets of the samples."""
    samples, summary = read(evaluated.folder)
    assert summary.keys() >= KEYS
    assert (summary["num_problems"], summary["num_samples"]) == (NUM_PROBLEMS, 4)
    rewards = {}
    for s in samples:
        rewards.setdefault(s["id"], []).append(s["reward"])
    means = [statistics.mean(r) for r in rewards.values()]
    assert summary["mean"] == pytest.approx(statistics.mean(means))
    stderr = statistics.stdev(means) / len(means) ** 0.5
    assert summary["stderr"] == pytest.approx(stderr) and stderr > 0
    assert list(summary["pass_at_k"]) == ["1", "2", "4"]
    for k, value in summary["pass_at_k"].items():
        any_right = [max(s) for r in rewards.values() for s in itertools.combinations(r, int(k))]
        assert value == pytest.approx(statistics.mean(any_right)), k
    assert summary["truncated"] == statistics.mean(not s["finished"] for s in samples)
    assert summary["tokens"] == pytest.approx(statistics.mean(s["tokens"] for s in samples))


def test_a_trained_model_is_asked_as_it_was_trained(
    evaluated: SimpleNamespace, evaluations: SimpleNamespace, fork: SimpleNamespace
) -> None:
    """--max-tokens and the prompt come from the run's config.json: neither command names them."""
    header = json.loads((evaluated.folder / "summary.json").read_text())["header"]
    assert header["max_tokens"] == 48 == int(SAMPLING[-1])
    assert header["prompt_template"] == problems.BOXED_TEMPLATE
    header = json.loads((evaluations.fork.folder / "summary.json").read_text())["header"]
    assert header["max_tokens"] == 48
    assert header["prompt_template"] == "{question} Put it in \\boxed{}.\n"


def test_a_task_of_a_fork_runs_through_stage_3(
    evaluations: SimpleNamespace, fork: SimpleNamespace
) -> None:
    samples, summary = read(evaluations.fork.folder, "parity")
    assert len(samples) == 4 * 2
    for s in samples:
        assert s["prompt"] == f"Digit {s['id'][1:]}? Put it in \\boxed{{}}.\n"
        assert s["reward"] in (1.5, -0.5) if s["finished"] else s["reward"] == 0.0
    assert summary["mean"] == pytest.approx(statistics.mean(s["reward"] for s in samples))
    assert "parity" in evaluations.fork.out


def test_answers_that_cannot_be_graded_count_as_wrong_by_name(evaluated: SimpleNamespace) -> None:
    samples, _ = read(evaluated.folder)
    for key in ("empty-answer", "open-brace"):
        assert [line for line in evaluated.all.splitlines() if key in line]
        assert [s["reward"] for s in samples if s["id"] == key] == [0.0] * 4


def test_box_without_eos_earns_nothing(cut_short: SimpleNamespace) -> None:
    """With the rule waived, as base models may be scored, many would be right."""
    samples, summary = read(cut_short.folder)
    assert len({(s["id"], s["sample"]) for s in samples}) == len(samples) == NUM_PROBLEMS * 4
    assert summary["mean"] == 0.0 and summary["truncated"] > 0.8 and summary["tokens"] <= 9
    right = [rf"\boxed{{{s['answer']}}}" == s["output"] for s in samples]
    assert sum(right) > 10, "the fixture's model should be right now and then"
    assert summary["mean_any_end"] == pytest.approx(statistics.mean(right))
    assert f"{statistics.mean(right):.1%}" in row_of(cut_short.out).split()


# ---------------------------------------------------------------------------------------------
# Saved outputs


@pytest.fixture
def grade(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Run `evaluate.py --grade FILE` in this process, and return what it prints."""

    def call(path: Path) -> str:
        monkeypatch.setattr("sys.argv", ["evaluate.py", "--grade", str(path)])
        evaluate.main()
        return capsys.readouterr().out

    return call


def test_grading_the_saved_samples_gives_the_same_numbers(
    grade: Callable, evaluated: SimpleNamespace, cut_short: SimpleNamespace
) -> None:
    for result in (evaluated, cut_short):
        out = grade(result.folder / "digits.jsonl")
        assert row_of(out) == row_of(result.out)
        _, summary = read(result.folder)
        assert f"{summary['mean']:.1%}" in row_of(out)


HAND_WRITTEN = [
    {"answer": "1", "output": r"so \boxed{1}"},
    {"answer": r"\frac{1}{2}", "output": r"so \boxed{0.5}", "finished": True},
    {"answer": "1", "output": r"so \boxed{1}", "finished": False},
    {"answer": "1", "output": "so 1", "tokens": 12.0, "id": None},
    {"answer": "", "output": r"so \boxed{}", "id": "geometry/7"},
]


def test_grade_of_outputs_from_elsewhere(grade: Callable, tmp_path: Path) -> None:
    """Two of five are right, a third but for its EOS; the empty answer is named by its id."""
    out = grade(write_lines(tmp_path / "outputs.jsonl", HAND_WRITTEN))
    assert [line for line in out.splitlines() if "geometry/7" in line]
    row = row_of(out, "outputs").split()
    assert row[1] == "5" and "40.0%" in row and "60.0%" in row and "20.0%" in row, row
    assert [path.name for path in tmp_path.iterdir()] == ["outputs.jsonl"]


def test_tables_of_pandas_are_graded(grade: Callable, tmp_path: Path) -> None:
    """They have exact decimals as answers, and numbers of rows like 1.0."""
    table = pyarrow.table(
        {"id": [1.0, 2.0], "answer": [Decimal("0.50"), Decimal("2")], "output": [r"\boxed{.5}"] * 2}
    )
    pyarrow.parquet.write_table(table, tmp_path / "outputs.parquet")
    assert "50.0%" in row_of(grade(tmp_path / "outputs.parquet"), "outputs")


@pytest.mark.parametrize(
    "shell", ["PYTHONIOENCODING=ascii {python} {command}", "{python} {command} >&-"]
)
def test_a_poor_or_closed_terminal_is_no_fault(shell: str, tmp_path: Path) -> None:
    """ "±" is not in ASCII, and without an output there is nothing to write it to."""
    path = write_lines(tmp_path / "outputs.jsonl", HAND_WRITTEN)
    line = shell.format(python=sys.executable, command=f"evaluate.py --grade {path}")
    result = subprocess.run(line, shell=True, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert ">&-" in shell or "\\xb1" in result.stdout


def test_scores_by_hand() -> None:
    """Problem a: right, right, wrong; problem b: wrong, cut but right, wrong."""
    records = []
    for key, reward, finished in (
        *(("a", 1.0, True), ("a", 1.0, True), ("a", 0.0, True)),
        *(("b", 0.0, True), ("b", 0.0, False), ("b", 0.0, True)),
    ):
        output = r"\boxed{7}" if reward or not finished else r"\boxed{8}"
        record = {"id": key, "reward": reward, "finished": finished, "answer": "7", "tokens": 4}
        records.append(record | {"output": output})
    scores = evaluate.score(records)
    assert (scores["num_problems"], scores["num_samples"]) == (2, 3)
    assert scores["mean"] == pytest.approx(1 / 3) and scores["stderr"] == pytest.approx(1 / 3)
    # k = 2: problem a has one wrong sample, so that each pair holds a right one.
    assert scores["pass_at_k"] == pytest.approx({"1": 1 / 3, "2": 1 / 2, "3": 1 / 2})
    assert scores["truncated"] == pytest.approx(1 / 6)
    assert scores["mean_any_end"] == pytest.approx(1 / 2)
    # With one sample of a, and three of b: a mean over problems, as "mean" is.
    assert evaluate.score([records[0], *records[3:]])["mean_any_end"] == pytest.approx(2 / 3)
    assert evaluate.score(records[:1])["stderr"] == 0.0


# ---------------------------------------------------------------------------------------------
# Settings


TRAINED = {
    "prompt_template": "Q: {question}",
    "chat_template": True,
    "system_prompt": "Be brief.",
    "chat_template_kwargs": {"think": False},
    "max_tokens": 77,
    "values_digest": "0",
}


@pytest.fixture
def trained_run(tmp_path: Path) -> Path:
    for name in ("final", "checkpoints/step-5"):
        (tmp_path / "run" / name).mkdir(parents=True)
    files.write_json(tmp_path / "run" / "config.json", TRAINED)
    return tmp_path / "run"


def test_the_settings_of_a_run_are_found_beside_its_models(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("final", "checkpoints/step-5"):
        assert evaluate.settings_of_run(str(trained_run / name)) == TRAINED
    monkeypatch.chdir(trained_run)
    assert evaluate.settings_of_run("final") == TRAINED
    assert evaluate.settings_of_run("Qwen/Qwen2.5-1.5B") == {}
    # A model's own config.json is no run's.
    files.write_json(trained_run / "config.json", {"model_type": "qwen2"})
    assert evaluate.settings_of_run(str(trained_run / "final")) == {}


def test_another_programs_config_is_no_runs(trained_run: Path) -> None:
    files.write_json(trained_run / "config.json", {"max_tokens": 7, "system_prompt": "Be brief."})
    assert evaluate.settings_of_run(str(trained_run / "final")) == {}
    (trained_run / "config.json").write_text("[1, 2]")
    assert evaluate.settings_of_run(str(trained_run / "final")) == {}
    # A run's own, edited into something else, is the user's mistake.
    (trained_run / "final" / "manifest.json").touch()
    with pytest.raises(files.UserError, match="not an object"):
        evaluate.settings_of_run(str(trained_run / "final"))


def test_results_do_not_replace_the_benchmark(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "1 + 1?", "answer": "2"}\n')
    args = parse("--benchmarks", str(file), "--out", str(tmp_path / "."))
    with pytest.raises(UserError, match=r"mine\.jsonl"):
        evaluate.load_benchmarks(args, {})


def test_samples_replace_no_file_of_the_users(tmp_path: Path) -> None:
    """A data set may have the name that a benchmark's samples get."""
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    evaluate.check_results(tmp_path, ["math500"])
    with pytest.raises(UserError, match=r"gsm8k\.jsonl would be replaced"):
        evaluate.check_results(tmp_path, ["math500", "gsm8k"])
    (tmp_path / "gsm8k.jsonl.partial").mkdir()  # a kill came before the summary was written
    evaluate.check_results(tmp_path, ["math500", "gsm8k"])


@pytest.mark.parametrize(
    ("flags", "task", "expected"),
    [
        ("", "math500", (1, 0.0)),
        ("", "amc23", (32, 1.0)),
        ("--temperature 0", "amc23", (1, 0.0)),
        ("--temperature 0.6", "math500", (1, 0.6)),
        ("--num-samples 4", "math500", (4, 1.0)),
        ("--num-samples 1", "amc23", (1, 0.0)),
    ],
)
def test_how_often_a_problem_is_asked(flags: str, task: str, expected: tuple[int, float]) -> None:
    assert evaluate.how_to_sample(task, parse(*flags.split())) == expected


def parse(*flags: str) -> object:
    return evaluate.make_parser().parse_args(flags)


def test_a_link_to_a_trained_model_has_its_settings(trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "best").symlink_to(trained_run / "final")
    assert evaluate.settings_of_run(str(tmp_path / "best")) == TRAINED
    # A checkpoint that was moved to another disk, with a link in its place.
    checkpoint = trained_run / "checkpoints" / "step-5"
    checkpoint.rename(tmp_path / "moved")
    checkpoint.symlink_to(tmp_path / "moved")
    assert evaluate.settings_of_run(str(checkpoint)) == TRAINED


def test_positions_are_those_of_training_if_there_is_room(model: Path, tmp_path: Path) -> None:
    """Where they depend on the length, the room for prompts ends where they begin to."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config["rope_parameters"] = rope | {"original_max_position_embeddings": 128}
    (folder / "config.json").write_text(json.dumps(config))
    for max_tokens, room in (("48", 128 - 48), ("200", 512 - 200)):
        args = parse("--model", str(folder), "--max-tokens", max_tokens)
        assert evaluate.room_for_prompt(args) == room


def test_cut_prompts_are_told_and_kept_as_they_were_asked(model: Path) -> None:
    """The context of 512 tokens leaves room for 212 beside a response of 300."""
    rows = []
    for length in (1, 2, 400):
        rows.append({"id": f"{length}", "question": "a" * length, "answer": "1", "_task": "math"})
    args = parse("--model", str(model), "--max-tokens", "300")
    made = evaluate.make_benchmark("x.jsonl", rows, args, {}, make_tokenizer())
    [remark] = [remark for remark in made.remarks if "prompts have more" in remark]
    assert remark.startswith("x.jsonl: 1 of 3 prompts have more than 212 tokens")
    assert len(made.prompts[2].ids) == len(made.prompts[2].text) == 212


def test_responses_are_sampled_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    signature = inspect.signature(evaluate.engine.sample_all)
    given = {}

    def sample_all(*args: object, **options: object) -> None:
        given.update(signature.bind(*args, **options).arguments)

    monkeypatch.setattr(evaluate.engine, "sample_all", sample_all)
    args = parse("--top-p", "0.9", "--seed", "3", "--max-tokens", "7")
    benchmark = evaluate.Benchmark([], ["one", "two"], 4, 0.7, {}, [])
    evaluate.sample_benchmark(None, benchmark, Path("x.jsonl"), {}, args)
    assert (given["temperature"], given["top_p"]) == (0.7, 0.9)
    assert (given["seed"], given["max_tokens"], given["counts"]) == (3, 7, [4, 4])


def test_tokens_without_an_embedding_are_refused(
    model: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate.self_check, "vocabulary_size", lambda folder: 10)
    args = parse("--model", str(model), "--benchmarks", str(dataset), "--max-tokens", "5")
    with pytest.raises(UserError, match="embedding"):
        evaluate.load_benchmarks(args, {})


def test_solutions_of_gsm8k_are_no_answers(tmp_path: Path) -> None:
    """Each would be compared as a whole, and earn 0."""
    row = {"answer": "24 + 48 = 72\n#### 72", "output": r"\boxed{72}"}
    write_lines(tmp_path / "outputs.jsonl", [row])
    with pytest.raises(UserError, match="####"):
        evaluate.grade_file(tmp_path / "outputs.jsonl")


def test_a_trained_model_gets_the_template_of_its_training(model: Path) -> None:
    """It does where the task has the same reward function; a file is mathematics."""
    row = {"id": "a", "question": "abc", "answer": "1", "_task": "math"}
    args = parse("--model", str(model), "--max-tokens", "30")
    trained_with = {"prompt_template": "Q: {question}", "reward": problems.reward_name("math")}
    made = evaluate.make_benchmark("x.jsonl", [row], args, trained_with, make_tokenizer())
    assert made.prompts[0].text == "Q: abc"
    trained_with["reward"] = "apo.problems.another"
    made = evaluate.make_benchmark("x.jsonl", [row], args, trained_with, make_tokenizer())
    assert made.prompts[0].text == problems.format_prompt("abc")


def test_flags_win_over_the_settings_of_the_run() -> None:
    as_trained = PromptStyle("Q: {question}", True, "Be brief.", {"think": False})
    assert evaluate.base_style(parse(), TRAINED) == as_trained
    assert evaluate.base_style(parse(), {}) == PLAIN
    style = evaluate.base_style(parse("--chat-template", "--system-prompt", "Think."), TRAINED)
    assert style.chat_template and style.system_prompt == "Think."
    # A flag changes what it names, and the rest stays as in training.
    style = evaluate.base_style(parse("--system-prompt", "Think."), TRAINED)
    assert style == dataclasses.replace(as_trained, system_prompt="Think.")
    style = evaluate.base_style(parse("--chat-template-kwargs", '{"think": true}'), TRAINED)
    assert style == dataclasses.replace(as_trained, chat_template_kwargs={"think": True})
    style = evaluate.base_style(parse("--chat-template"), {})
    assert style == PromptStyle(chat_template=True)


def test_the_prompt_flags_are_part_of_the_header(model: Path) -> None:
    style = PromptStyle("Q: {question}", True, "Be brief.", {"think": False})
    header = evaluate.make_header(parse("--model", str(model), "--max-tokens", "5"), style)
    for name in ("prompt_template", "chat_template", "system_prompt", "chat_template_kwargs"):
        assert header[name] == TRAINED[name]
    assert header["model_fingerprint"] == files.model_fingerprint(model)
    assert header["max_tokens"] == 5


def benchmark(identity: dict) -> evaluate.Benchmark:
    return evaluate.Benchmark([], [], num_samples=1, temperature=0.0, identity=identity, remarks=[])


@pytest.mark.usefixtures("process_group")
def test_two_runs_with_one_out_keep_the_scores_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run finishes its benchmark while this one samples."""
    header = {"model": "m", "seed": 0}
    benchmarks = {"mine": evaluate.Benchmark([], [], 1, 0.0, {"dataset_digest": "1"}, [])}

    def scores(mean: float) -> dict:
        return dict.fromkeys(evaluate.SCORES, 0.0) | {"mean": mean, "pass_at_k": {"1": mean}}

    def sample(*arguments) -> list[dict]:
        theirs = {"header": header, "benchmarks": {"theirs": scores(0.5)}}
        files.write_json(tmp_path / "summary.json", theirs)
        return []

    monkeypatch.setattr(evaluate, "start_engine", lambda *arguments: None)
    monkeypatch.setattr(evaluate, "sample_benchmark", sample)
    monkeypatch.setattr(evaluate, "score", lambda records: scores(0.25))
    monkeypatch.setattr(evaluate.engine, "stop_engine", lambda llm: None)
    done = evaluate.sample_missing(SimpleNamespace(out=str(tmp_path)), header, benchmarks)
    assert done == files.read_json(tmp_path / "summary.json")["benchmarks"]
    assert done["theirs"] == scores(0.5)
    assert done["mine"]["mean"] == 0.25


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mean": "high"}, "mean is 'high', not a number"),
        ({"tokens": None}, "tokens is None"),
        ({"pass_at_k": [0.5]}, 'has no "pass_at_k"'),
        ({"pass_at_k": {"1": "half"}}, "pass@1 is 'half'"),
    ],
)
def test_scores_that_somebody_has_edited_are_named(change: dict, says: str) -> None:
    good = dict.fromkeys(evaluate.SCORES, -0.5) | {"pass_at_k": {"1": 0.5}}
    evaluate.check_scores(good, "it")  # rewards below 0 are rewards
    with pytest.raises(UserError, match=re.escape(says)):
        evaluate.check_scores(good | change, "it")


def test_results_of_another_run_are_refused_by_name(evaluated: SimpleNamespace) -> None:
    summary = json.loads((evaluated.folder / "summary.json").read_text())
    header = summary["header"] | {"model": "the same, elsewhere"}
    scores = summary["benchmarks"]["digits"]
    identity = {name: scores[name] for name in ("rows_digest", "prompt_template", "reward")}
    same = {"digits": benchmark(identity), "other": benchmark({"rows_digest": "0"})}
    assert evaluate.read_summary(evaluated.folder, header, same) == summary["benchmarks"]
    with pytest.raises(UserError, match="max_tokens 48, not 40"):
        evaluate.read_summary(evaluated.folder, header | {"max_tokens": 40}, {})
    for name in identity:
        changed = {"digits": benchmark(identity | {name: "another"})}
        with pytest.raises(UserError, match=rf"digits in .*{name}"):
            evaluate.read_summary(evaluated.folder, header, changed)
    assert evaluate.read_summary(evaluated.folder / "new", header, {}) == {}


# ---------------------------------------------------------------------------------------------
# Bad input

BAD = {  # name: arguments, what the error says
    "unknown benchmark": ("--benchmarks math500x", "'math500x'"),
    "one of two unknown": ("--benchmarks {dataset},nosuch", "'nosuch'"),
    "the same name twice": ("--benchmarks {dataset},{dataset}", "called digits"),
    "missing file": ("--benchmarks {files}/none.jsonl", "none.jsonl"),
    "missing column": ("--benchmarks {files}/column.jsonl", "row 2"),
    "no answer to grade": ("--benchmarks {files}/ungradable.jsonl", "answer that can be graded"),
    "missing model": ("--model {files}/nothing", "/nothing"),
    "no room for a prompt": ("--max-tokens 512", "--max-tokens 512"),
    "negative samples": ("--num-samples=-1", "--num-samples"),
    "negative temperature": ("--temperature=-1", "--temperature"),
    "top-p over 1": ("--top-p 1.5", "--top-p"),
    "equal samples": ("--temperature 0 --num-samples 4", "all 4 samples of a problem"),
    "top-p of one greedy sample": (
        "--top-p 0.9 --max-tokens 48",
        "does nothing in greedy decoding",
    ),
    "top-p of greedy samples": (
        "--top-p 0.9 --temperature 0 --max-tokens 48",
        "does nothing in greedy decoding",
    ),
    "system prompt alone": ("--system-prompt brief", "--chat-template"),
    "grade nothing": ("--grade {files}/none.jsonl", "none.jsonl"),
    "grade an empty file": ("--grade {files}/empty.jsonl", "empty.jsonl"),
    "grade a damaged file": ("--grade {files}/torn.jsonl", "line 2"),
    "grade without output": ("--grade {files}/column.jsonl", "row 1"),
    "grade ungradable answers": ("--grade {files}/outputs.jsonl", "answer that can be graded"),
    "grade a finish that is none": ("--grade {files}/finished.jsonl", '"finished"'),
    "grade too large a number": ("--grade {files}/huge.jsonl", '"tokens" is not a number'),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    good = {"question": "q", "answer": "1"}
    write_lines(folder / "column.jsonl", [good, {"question": "q", "solution": "1"}])
    write_lines(folder / "ungradable.jsonl", [good | {"answer": ""}, good | {"answer": "{"}])
    write_lines(folder / "outputs.jsonl", [{"answer": "", "output": r"\boxed{}"}])
    write_lines(folder / "finished.jsonl", [{"answer": "1", "output": "1", "finished": "no"}])
    write_lines(folder / "huge.jsonl", [{"answer": "1", "output": "1", "tokens": 10**400}])
    write_lines(folder / "empty.jsonl", [])
    (folder / "torn.jsonl").write_text('{"answer": "1", "output": "1"}\n{"answer": "1", "outp')
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_code_2(
    case: str, assert_refused: Callable, model: Path, dataset: Path, bad_files: Path, tmp_path: Path
) -> None:
    flags, says = BAD[case]
    flags = flags.replace("{files}", str(bad_files)).replace("{dataset}", str(dataset))
    base = f"--model {model} --benchmarks {dataset} --out {tmp_path / 'out'} "
    assert_refused(evaluate, base + flags, says)
    assert list(tmp_path.iterdir()) == []


def test_foreign_columns_of_a_graded_file_play_no_part(tmp_path: Path) -> None:
    rows = [
        {"answer": "1", "output": "\\boxed{1}", "row": 7, "_task": "other"},
        {"answer": "2", "output": "\\boxed{1}", "row": {"answer": "1"}, "reward": 1.0},
    ]
    path = write_lines(tmp_path / "foreign.jsonl", rows)
    assert evaluate.grade_file(path)["mean"] == 0.5
