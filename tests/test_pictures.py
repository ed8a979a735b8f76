"""The pictures that explain the method: drawn from what a run writes."""

from pathlib import Path

import pytest
from matplotlib import pyplot

from experiments import pictures


def test_v_star_lies_between_the_mean_and_the_best() -> None:
    values = pictures.values_by_count(0.5)
    assert values[1] == pytest.approx(0.293, abs=1e-3)
    means = pictures.values_by_count(float("inf"))
    assert means == pytest.approx([k / 8 for k in range(9)])
    assert all(mean <= value for mean, value in zip(means, values, strict=True))


def test_pictures_are_drawn_from_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles = []
    figures = []
    monkeypatch.setattr(pictures, "RESULTS", tmp_path)
    plain_save = pictures.save

    def save(figure: pyplot.Figure, name: str) -> None:
        titles.append(figure.axes[0].get_title(loc="left"))
        figures.append(figure)
        plain_save(figure, name)

    monkeypatch.setattr(pictures, "save", save)
    rewards = [[0.0] * 8, [1.0] * 8, [1.0] + [0.0] * 7, [1.0] * 4 + [0.0] * 4]
    pictures.draw_stage_1({"prompts": [{"rewards": r} for r in rewards]})
    step = {"seconds_generate": 3, "seconds_grade": 0, "seconds_ref": 1, "seconds_sync": 0.5}
    pictures.draw_step_time([step | {"seconds_update": 1.0, "step": n} for n in (1, 2, 3)])
    pictures.draw_stages()
    pictures.draw_v_star()
    assert "50 %" in titles[0] and "sample" in titles[1]
    words = " ".join(text.get_text() for text in figures[2].axes[0].texts)
    for script in ("offline_value.py", "train_online.py", "evaluate.py"):
        assert script in words
    curves = [line.get_ydata() for line in figures[3].axes[0].lines]
    assert any(list(curve) == pytest.approx(pictures.values_by_count(0.5)) for curve in curves)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["stage-1.png", "stages.png", "step-time.png", "v-star.png"]
