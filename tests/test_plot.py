"""The pictures of runs: what is read, what is said, and what is refused."""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot

from apo.files import UserError
from experiments import plot


def make_run(folder: Path, num_steps: int, reward: float = 0.5, **settings: object) -> Path:
    """Write a run folder: reward rises by 0.01 a step, evaluation before and after."""
    folder.mkdir(parents=True)
    lines = [{"step": 0, "eval_accuracy": 0.25}]
    for step in range(1, num_steps + 1):
        lines.append(
            {
                "step": step,
                "reward": reward + 0.01 * (step - 1),
                "v_star": 0.6,
                "logratio": 0.1 * (step - 1),
                "response_tokens": 30.0,
                "seconds_total": 2.0,
            }
        )
    lines[-1]["eval_accuracy"] = 0.75
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def titles(runs: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Draw runs and return the titles of the panels."""
    found = []

    def save(figure: pyplot.Figure, path: Path) -> None:
        found.extend(axes.get_title(loc="left") for axes in figure.axes)
        figure.savefig(path)

    monkeypatch.setattr(plot, "save", save)
    plot.draw(plot.load_runs(runs), out)
    return found[: len(plot.PANELS)]


def numbers_in(text):
    return re.findall(r"\d[\d.]*", text)


def test_titles_state_what_is_seen(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", 10)
    found = titles([run], tmp_path / "out.png", monkeypatch)[:5]
    assert ["rises" in title for title in found] == [True, True, True, False, False]
    assert [numbers_in(title) for title in found] == [
        ["0.50", "0.59"],
        ["25.0", "75.0"],
        ["0.00", "0.90"],
        ["30"],
        ["2.0"],
    ]


@pytest.mark.parametrize("num_more", [1, 2, 3])
def test_more_panels_are_all_drawn(tmp_path, monkeypatch, num_more):
    """A fork adds a metric, and a line to PANELS."""
    more = [plot.Panel("reward", f"More {n}", "mean reward") for n in range(num_more)]
    before = len(plot.PANELS)
    monkeypatch.setattr(plot, "PANELS", (*plot.PANELS, *more))
    drawn = titles([make_run(tmp_path / "run", 10)], tmp_path / "out.png", monkeypatch)
    assert len(drawn) == before + num_more
    assert drawn[-1].startswith(f"More {num_more - 1} ")
    assert numbers_in(drawn[-1])[1:] == ["0.50", "0.59"]


def test_titles_of_several_runs_give_the_range_of_the_ends(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / "a", 10), make_run(tmp_path / "b", 20, reward=0.3)]
    found = titles(runs, tmp_path / "out.svg", monkeypatch)
    assert numbers_in(found[0]) == ["0.48", "0.59"]  # the mean of 0.48 and 0.49, two of 20 steps
    assert numbers_in(found[3]) == ["30"]


def test_run_of_one_step_without_evaluation(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", 1)
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5, "logratio": NaN}\n')
    found = titles([folder], tmp_path / "out.png", monkeypatch)
    assert numbers_in(found[0]) == ["0.50"]
    assert numbers_in(found[1]) == []  # not in the log
    assert numbers_in(found[2]) == []  # a NaN is left out


def test_evaluation_of_step_0_is_drawn_at_0(tmp_path):
    [run] = plot.load_runs([make_run(tmp_path / "run", 3)])
    accuracy = plot.read_line(run, plot.PANELS[1])
    assert accuracy == plot.Line([0, 3], [25.0, 75.0])
    reward = plot.read_line(run, plot.PANELS[0])
    assert reward.steps == [1, 2, 3]


def test_command_draws_next_to_the_first_run(tmp_path, monkeypatch, capsys):
    runs = [make_run(tmp_path / name, 30) for name in ("a", "b")]
    monkeypatch.setattr(sys, "argv", ["plot", *map(str, runs)])
    plot.main()
    assert (tmp_path / "a/curve.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "b/curve.png").exists()
    assert "a/curve.png" in capsys.readouterr().out


def test_file_of_metrics_stands_for_a_run(tmp_path, monkeypatch):
    file = tmp_path / "seed-1.jsonl"
    file.write_text((make_run(tmp_path / "run", 2) / "metrics.jsonl").read_text())
    monkeypatch.setattr(sys, "argv", ["plot", str(file)])
    plot.main()
    assert (tmp_path / "seed-1.png").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "missing does not exist"),
        ("empty", r"empty has no metrics\.jsonl"),
        ("data.jsonl", r'data\.jsonl has no line with a "step"'),
    ],
)
def test_what_is_no_run_is_refused_by_name(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.jsonl").write_text('{"question": "1 + 1?"}\n')
    with pytest.raises(UserError, match=message):
        plot.load_runs([tmp_path / name])


def test_the_same_run_twice_is_refused(tmp_path):
    run = make_run(tmp_path / "run", 1)
    with pytest.raises(UserError, match="twice"):
        plot.load_runs([run, run])


def test_picture_of_an_unknown_kind_is_refused_before_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plot", "missing", "--out", "curve.jpg"])
    with pytest.raises(UserError, match=r"curve\.jpg"):
        plot.main()


def test_picture_goes_to_a_new_folder_but_not_below_a_file(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", 2)
    out = tmp_path / "new" / "curve.png"
    monkeypatch.setattr(sys, "argv", ["plot", str(run), "--out", str(out)])
    plot.main()
    assert out.exists()
    below = run / "metrics.jsonl" / "curve.png"
    monkeypatch.setattr(sys, "argv", ["plot", str(run), "--out", str(below)])
    with pytest.raises(UserError, match="cannot be written"):
        plot.main()


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a"], ["a"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["x/run", "y/run"], ["x/run", "y/run"]),
        (["results/seed-1.jsonl", "runs/a"], ["seed-1", "a"]),
        (["runs/qwen2.5-1.5b"], ["qwen2.5-1.5b"]),
    ],
)
def test_short_names(paths, names):
    assert plot.short_names([Path(path) for path in paths]) == names


def test_several_runs_are_described_by_the_settings_that_differ(tmp_path):
    first = make_run(tmp_path / "a", 2, lr=1e-4, seed=0, beta2=1e-3, out="a")
    second = make_run(tmp_path / "b", 3, lr=2e-4, seed=0, beta2=1e-3, out="b")
    assert plot.describe_runs(plot.load_runs([first, second])) == [
        "a: 2 steps\n   lr 0.0001",
        "b: 3 steps\n   lr 0.0002",
    ]
    [alone] = plot.describe_runs(plot.load_runs([first]))
    assert "seed 0" in alone and "beta2 0.001" in alone


@pytest.mark.parametrize(
    "heights", [[0.5, 0.5, 0.5], [1.0, 0.99, 0.0], [0.0, 0.02, 0.9], [0.2, 0.8], [0.3]]
)
def test_labels_keep_their_order_and_do_not_overlap(heights):
    placed = plot.spread(heights, gap=0.1)
    by_height = sorted(range(len(heights)), key=lambda i: heights[i])
    in_order = [placed[i] for i in by_height]
    for below, above in itertools.pairwise(in_order):
        assert above - below >= 0.1 - 1e-9
    assert min(placed) >= 0 and max(placed) <= 1
    if heights == [0.2, 0.8]:
        assert placed == heights


def test_smooth_is_the_mean_of_the_steps_around():
    assert plot.smooth([1.0, 2.0, 6.0], window=2) == [1.5, 3.0, 4.0]
    assert plot.smooth([5.0], window=10) == [5.0]
