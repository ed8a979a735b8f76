"""The table of architectures: what can be checked of it without an engine, and that docs agree."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from test_self_check import make_responses

from apo import self_check
from apo.files import UserError
from experiments import architectures

OUTCOMES = {}
for line in architectures.RESULTS.read_text().splitlines()[1:]:
    name, rest = line[:28].strip(), line[28:]
    OUTCOMES[name] = rest.split()[0]
# The engine computes these in another way than transformers, which only a run can show.
BY_THE_ENGINE = ("Apertus", "GPT-NeoX")


def test_the_table_has_every_architecture_and_nothing_in_between() -> None:
    assert list(OUTCOMES) == list(architectures.ARCHITECTURES)
    assert set(OUTCOMES.values()) == {"right", "refused"}


def test_the_documents_list_what_is_right() -> None:
    page = (ROOT / "docs" / "hardware.md").read_text("utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith("| right in all stages |")]
    listed = [name.strip() for name in line.split("|")[2].split(";")]
    assert listed == [name for name, outcome in OUTCOMES.items() if outcome == "right"]


@pytest.mark.parametrize("name", [name for name in OUTCOMES if name not in BY_THE_ENGINE])
def test_each_is_judged_as_the_table_says(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("model")
    architectures.build(name, folder)
    refused = False
    try:
        self_check.check_config(folder, architectures.LONGEST)
        self_check.check_model(folder, make_responses(folder))
    except UserError:
        refused = True
    assert refused == (OUTCOMES[name] == "refused")


@pytest.mark.faults
@pytest.mark.parametrize("name", ["SmolLM3", *BY_THE_ENGINE])
def test_some_are_taken_through_the_stages(name: str, tmp_path: Path) -> None:
    """SmolLM3 is one of those that vLLM builds from transformers' own classes."""
    data = tmp_path / "problems.jsonl"
    rows = [{"question": f"What is {i} + {i}?", "answer": 2 * i} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    verdict = architectures.judge(name, tmp_path, data)
    assert verdict.outcome == OUTCOMES[name], verdict
