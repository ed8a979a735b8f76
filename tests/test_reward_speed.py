"""The commands that check the reward on rows of a data set."""

import json
import sys

import pytest

from apo.files import UserError
from experiments import reward_speed


def test_check_counts_what_is_graded_as_it_should_be(tmp_path, monkeypatch, capsys):
    rows = [
        {"answer": "2", "solution": "1 + 1 is 2.", "output": r"\boxed{2}", "label": True},
        {"answer": r"\frac{1}{2}", "output": r"\boxed{2}", "label": False},
        {"answer": "3", "output": r"\boxed{4}", "label": True},  # a label that is wrong
        {"question": "without an answer"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    monkeypatch.setattr(sys, "argv", ["reward_speed", "check", str(path)])
    reward_speed.main()
    out = capsys.readouterr().out
    for line in ("boxed: 3 of 3", "solution: 1 of 1", "next: 3 of 3", "label: 2 of 3"):
        assert f"{path} {line} as they should be" in out
    assert f"{path}:3 label: answer '3', box '4'" in out
    assert f"{path}:4: neither text nor a number" in out


def test_speed_measures_equal_grades(tmp_path, monkeypatch, capsys):
    rows = [{"answer": f"{n}", "solution": rf"It is \boxed{{{n}}}."} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    monkeypatch.setattr(sys, "argv", ["reward_speed", "speed", str(tmp_path / "rows.jsonl")])
    monkeypatch.setattr(reward_speed, "ROUNDS", 1)
    monkeypatch.setattr(reward_speed, "PATHOLOGICAL", 5 * ["x"])  # those would take a minute
    reward_speed.main()
    out = capsys.readouterr().out
    means = {}
    for line in out.splitlines():
        means[line.split()[0]] = line.split()[-1]
    assert means["grade"] == means["again"] == means["math-verify"]
    assert 0 < float(means["grade"]) < 1


def test_an_unknown_command_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reward_speed", "chess"])
    with pytest.raises(UserError, match="give `check` or `speed`"):
        reward_speed.main()
