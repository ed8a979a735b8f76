"""The end of the demo: seconds of the parts, the table, and one problem worked twice."""

import os
import re

import pytest

from apo.files import UserError
from experiments import report


def make_demo(folder, ends):
    """Write the files that the parts of the demo leave, with their times."""
    for name, end in zip(("started", *report.PARTS.values()), ends, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (end, end))


def test_seconds_of_the_parts(tmp_path):
    make_demo(tmp_path, [1000, 1060, 1080, 1090, 1150, 1160])
    seconds = report.part_seconds(tmp_path)
    assert list(seconds.values()) == [60, 20, 10, 60, 10]
    line = report.format_seconds(seconds)
    assert [int(word) for word in re.findall(r" (\d\d+)\b", line)] == [60, 20, 10, 60, 10, 160]


def test_parts_that_were_kept_are_marked(tmp_path):
    make_demo(tmp_path, [1000, 500, 600, 1030, 1090, 1100])
    line = report.format_seconds(report.part_seconds(tmp_path))
    assert "reference kept, stage 1 kept, evaluate before 30" in line
    assert line.endswith("total 100")


def test_demo_that_has_not_ended_is_refused(tmp_path):
    make_demo(tmp_path, [0, 1, 2, 3, 4, 5])
    (tmp_path / "after/summary.json").unlink()
    with pytest.raises(UserError, match=r"after/summary\.json is missing"):
        report.part_seconds(tmp_path)


def test_table_has_both_lines():
    before = {
        "num_problems": 256,
        "num_samples": 8,
        "mean": 0.51,
        "stderr": 0.024,
        "pass_at_k": {"1": 0.51, "8": 0.879},
        "truncated": 0.0,
        "tokens": 28.5,
    }
    after = before | {"mean": 0.97, "stderr": 0.006, "pass_at_k": {"1": 0.97, "8": 0.996}}
    text = report.format_table(before, after)
    assert "256 test problems, 8 samples each" in text
    [reference] = [line for line in text.splitlines() if line.startswith("reference")]
    [trained] = [line for line in text.splitlines() if line.startswith("trained")]
    assert reference.split() == ["reference", "51.0%", "±", "2.4%", "87.9%", "0.0%", "28.5"]
    assert trained.split()[1:5] == ["97.0%", "±", "0.6%", "99.6%"]


def record(problem_id, sample, reward, output):
    prompt = f"What is {problem_id}?\nThink."
    return {
        "id": problem_id,
        "sample": sample,
        "reward": reward,
        "output": output,
        "prompt": prompt,
        "answer": "9",
    }


def test_transcript_is_the_first_sample_that_became_right():
    before = [
        record("a", 0, 1.0, "good"),
        record("b", 0, 0.0, "one\ntwo"),
        record("b", 1, 1.0, "fine"),
        record("c", 0, 0.0, "later"),
    ]
    after = [
        record("c", 0, 1.0, "late"),
        record("b", 1, 1.0, "fine"),
        record("b", 0, 1.0, "uno\ndos\ntres"),
        record("a", 0, 0.0, "bad"),
    ]
    lines = report.format_transcript(before, after).splitlines()
    assert lines[0] == "What is b?  (answer: 9)"
    assert [line.split() for line in lines[2:5]] == [["one", "uno"], ["two", "dos"], ["tres"]]
    assert lines[5].startswith("(1 of 2 samples right)")
    assert lines[5].endswith("(2 of 2 samples right)")
    assert report.find_improved(before, before) is None
    assert "No sample" in report.format_transcript(before, before)
