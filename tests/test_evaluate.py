"""Stage 3 as a user runs it: the saved samples, their statistics, and --grade on files."""

import itertools
import json
import re
import statistics

import pytest
from conftest import CUT_SHORT, NUM_PROMPTS, assert_refused, torchrun, write_lines

FIELDS = {"id", "sample", "prompt", "answer", "output", "reward", "tokens", "finished"}
KEYS = {"num_problems", "num_samples", "mean", "stderr", "pass_at_k", "truncated", "tokens"}
# The dataset's two problems whose answer is none, and the long one, are asked and counted here.
NUM_PROBLEMS = NUM_PROMPTS + 3


def read(folder) -> tuple[list[dict], dict]:
    samples = (folder / "digits.jsonl").read_text().splitlines()
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["benchmarks"]) == ["digits"], "a local file's name is its stem"
    return [json.loads(line) for line in samples], summary["benchmarks"]["digits"]


def row_of(text: str, name: str = "digits") -> str:
    (row,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return row


@pytest.fixture(scope="module")
def evaluated(run, one_rank, dataset, tmp_path_factory):
    """Stage 2's final model, four samples of each problem."""
    out = tmp_path_factory.mktemp("results") / "new"
    arguments = ("--model", one_rank / "final", "--benchmarks", dataset, "--out", out)
    told = run("evaluate.py", *arguments, "--num-samples", "4", "--max-tokens", "48")
    assert told.code == 0, told.all
    told.folder, told.arguments = out, arguments
    return told


def test_every_sample_is_saved(evaluated):
    samples, _ = read(evaluated.folder)
    assert len(samples) == NUM_PROBLEMS * 4
    assert len({(s["id"], s["sample"]) for s in samples}) == NUM_PROBLEMS * 4
    for s in samples:
        assert s.keys() >= FIELDS and s["sample"] in range(4) and 1 <= s["tokens"] <= 48
        assert s["reward"] == 0 or s["finished"]
        assert s["reward"] == 0 or rf"\boxed{{{s['answer']}}}" in s["output"]
    assert any(s["reward"] for s in samples), "the fixture's model should be right now and then"
    assert len({s["output"] for s in samples if s["id"] == "p0"}) > 1, "each has its own seed"


def test_summary_is_what_the_samples_say(evaluated):
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
    header = json.loads((evaluated.folder / "summary.json").read_text())["header"]
    assert header["max_tokens"] == 48 and re.fullmatch("[0-9a-f]{64}", header["model_sha256"])


def test_answers_that_cannot_be_graded_count_as_wrong_by_name(evaluated):
    samples, _ = read(evaluated.folder)
    for key in ("empty-answer", "open-brace"):
        assert [line for line in evaluated.all.splitlines() if key in line]
        assert [s["reward"] for s in samples if s["id"] == key] == [0.0] * 4


def test_grading_the_saved_samples_gives_the_same_numbers(run, evaluated):
    told = run("evaluate.py", "--grade", evaluated.folder / "digits.jsonl")
    assert told.code == 0, told.all
    assert row_of(told.out) == row_of(evaluated.out)
    _, summary = read(evaluated.folder)
    assert f"{summary['mean']:.1%}" in row_of(told.out)


def test_folder_of_other_results_is_refused_by_name(run, evaluated):
    before = (evaluated.folder / "summary.json").read_bytes()
    told = run("evaluate.py", *evaluated.arguments, "--num-samples", "4", "--max-tokens", "40")
    told.left = []
    assert_refused(told, "max_tokens 48, not 40")
    assert (evaluated.folder / "summary.json").read_bytes() == before


def test_box_without_eos_earns_nothing(run, model, dataset, tmp_path):
    """On two ranks. With the rule waived, as base models may be scored, many would be right."""
    arguments = ("--model", model, "--benchmarks", dataset, "--num-samples", "4", *CUT_SHORT)
    told = run(*torchrun(2), "evaluate.py", *arguments, "--out", tmp_path)
    assert told.code == 0, told.all
    samples, summary = read(tmp_path)
    assert len({(s["id"], s["sample"]) for s in samples}) == len(samples) == NUM_PROBLEMS * 4
    assert summary["mean"] == 0.0 and summary["truncated"] > 0.8 and summary["tokens"] <= 9
    right = [rf"\boxed{{{s['answer']}}}" == s["output"] for s in samples]
    assert sum(right) > 10, "the fixture's model should be right now and then"
    waived = [
        share for share in row_of(told.out).split() if share == f"{statistics.mean(right):.1%}"
    ]
    assert waived, row_of(told.out)


HAND_WRITTEN = [
    {"answer": "1", "output": r"so \boxed{1}"},
    {"answer": r"\frac{1}{2}", "output": r"so \boxed{0.5}", "finished": True},
    {"answer": "1", "output": r"so \boxed{1}", "finished": False},
    {"answer": "1", "output": "so 1"},
    {"answer": "", "output": r"so \boxed{}", "id": "geometry/7"},
]


def test_grade_of_outputs_from_elsewhere(run, tmp_path):
    """Two of five are right, a third but for its EOS; the empty answer is named by its id."""
    path = write_lines(tmp_path / "outputs.jsonl", HAND_WRITTEN)
    told = run("evaluate.py", "--grade", path)
    assert told.code == 0, told.all
    assert [line for line in told.all.splitlines() if "geometry/7" in line]
    row = row_of(told.out, "outputs").split()
    assert row[1] == "5" and "40.0%" in row and "60.0%" in row and "20.0%" in row, row
    assert [p.name for p in tmp_path.iterdir()] == ["outputs.jsonl"]


# ---------------------------------------------------------------------------------------------
# Bad input

BAD = {  # name: arguments, what the error says
    "unknown benchmark": ("--benchmarks math500x", "'math500x'"),
    "one of two unknown": ("--benchmarks {dataset},nosuch", "'nosuch'"),
    "missing file": ("--benchmarks {files}/none.jsonl", "none.jsonl"),
    "missing column": ("--benchmarks {files}/column.jsonl", "row 2"),
    "no answer to grade": ("--benchmarks {files}/ungradable.jsonl", "no answer can be graded"),
    "missing model": ("--model {files}/nothing", "nothing"),
    "negative samples": ("--num-samples=-1", "--num-samples"),
    "negative temperature": ("--temperature=-1", "--temperature"),
    "top-p over 1": ("--top-p 1.5", "--top-p"),
    "grade nothing": ("--grade {files}/none.jsonl", "none.jsonl"),
    "grade an empty file": ("--grade {files}/empty.jsonl", "empty.jsonl"),
    "grade a damaged file": ("--grade {files}/torn.jsonl", "line 2"),
    "grade without output": ("--grade {files}/column.jsonl", "row 1"),
    "grade ungradable answers": ("--grade {files}/outputs.jsonl", "no answer can be graded"),
}


@pytest.fixture(scope="module")
def bad(bad_runs, model, dataset, tmp_path_factory):
    files, folder = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("bad")
    good = {"question": "q", "answer": "1"}
    write_lines(files / "column.jsonl", [good, {"question": "q", "solution": "1"}])
    write_lines(files / "ungradable.jsonl", [good | {"answer": ""}, good | {"answer": "{"}])
    write_lines(files / "outputs.jsonl", [{"answer": "", "output": r"\boxed{}"}])
    write_lines(files / "empty.jsonl", [])
    (files / "torn.jsonl").write_text('{"answer": "1", "output": "1"}\n{"answer": "1", "outp')
    base = "--model {model} --benchmarks {dataset} --out {out} "
    table = {name: (base + arguments, says) for name, (arguments, says) in BAD.items()}
    places = {"model": model, "dataset": dataset, "files": files}
    return bad_runs("evaluate.py", table, folder, **places)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_code_2(case, bad):
    assert_refused(bad[case], BAD[case][1])
