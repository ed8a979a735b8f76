"""The values file: anyone may write or edit one, and what is wrong in it is named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import make_tokenizer

from apo import problems
from apo.files import UserError
from apo.values import load_values, make_prompts


@pytest.fixture
def by_hand(model: Path) -> dict:
    """Return the least that a values file needs."""
    return {
        "header": {
            "model": str(model),
            "beta1": 0.5,
            "temperature": 1.0,
            "max_prompt_tokens": 100,
            "max_tokens": 48,
        },
        "prompts": [
            {"id": "a", "prompt": "1 + 1 = ", "answer": "2", "rewards": [1, 0.0]},
            {"id": "b", "prompt": "1 + 2 = ", "answer": 3, "rewards": [-0.5]},
        ],
    }


def load(document: dict, folder: Path) -> object:
    path = folder / "values.json"
    path.write_text(json.dumps(document))
    return load_values(str(path))


def test_a_values_file_written_by_hand_is_complete(by_hand: dict, tmp_path: Path) -> None:
    values = load(by_hand, tmp_path)
    assert values.entries == by_hand["prompts"]
    assert values.header.items() >= by_hand["header"].items()
    assert values.header["task"] == "math"
    assert values.style == problems.PLAIN
    assert load(by_hand, tmp_path).digest == values.digest
    prompts = make_prompts(values.entries, values, make_tokenizer())
    assert [prompt.text for prompt in prompts] == ["1 + 1 = ", "1 + 2 = "]
    assert prompts[0].ids == make_tokenizer().encode("1 + 1 = ")
    assert [prompt.row["answer"] for prompt in prompts] == ["2", 3]
    assert problems.reward(r"\boxed{3}", prompts[1].row) == 1.0


def test_a_task_brings_its_template(by_hand: dict, tmp_path: Path) -> None:
    """Evaluation writes new prompts, and must not ask for a box where the task does not."""
    dataset = problems.Dataset("none", {}, question=str, answer=str, template="{question}\n")
    problems.DATASETS["lines"] = dataset
    try:
        by_hand["header"]["task"] = "lines"
        assert load(by_hand, tmp_path).style.template == "{question}\n"
        by_hand["header"]["prompt_template"] = "Q: {question}"
        assert load(by_hand, tmp_path).style.template == "Q: {question}"
    finally:
        del problems.DATASETS["lines"]


def test_all_columns_of_a_row_come_back(by_hand: dict, tmp_path: Path) -> None:
    """A reward may need any column of the source, such as the numbers of a Countdown problem."""
    by_hand["prompts"][0]["row"] = {"numbers": [1, 2], "target": 3}
    values = load(by_hand, tmp_path)
    (prompt, _) = make_prompts(values.entries, values, make_tokenizer())
    assert prompt.row["numbers"] == [1, 2] and prompt.row["target"] == 3
    assert prompt.row["id"] == "a"


def test_an_edit_of_a_reward_is_taken_and_changes_the_digest(by_hand: dict, tmp_path: Path) -> None:
    """A run must not continue with other values than it began with."""
    before = load(by_hand, tmp_path)
    by_hand["prompts"][0]["rewards"] = [1.0, 1.0]
    after = load(by_hand, tmp_path)
    assert after.entries[0]["rewards"] == [1.0, 1.0]
    assert after.digest != before.digest


def test_a_values_file_of_another_model_is_refused_by_the_files_that_differ(
    by_hand: dict, tmp_path: Path
) -> None:
    fingerprint = load(by_hand, tmp_path).header["model_fingerprint"]
    by_hand["header"]["model_fingerprint"] = fingerprint
    load(by_hand, tmp_path)
    by_hand["header"]["model_fingerprint"] = fingerprint | {"model.safetensors": "0"}
    with pytest.raises(UserError, match=r"model_fingerprint \(model\.safetensors\)"):
        load(by_hand, tmp_path)


def in_header(**fields: object) -> Callable[[dict], None]:
    return lambda document: document["header"].update(fields)


def in_second_prompt(**fields: object) -> Callable[[dict], None]:
    return lambda document: document["prompts"][1].update(fields)


WRONG = {  # name: a change, what the error says
    "no header": (lambda document: document.pop("header"), '"header"'),
    "no prompts": (lambda document: document.pop("prompts"), '"prompts"'),
    "empty prompts": (lambda document: document.update(prompts=[]), '"prompts"'),
    "no model": (in_header(model=None), '"model"'),
    "beta1 0": (in_header(beta1=0), '"beta1" in its header is 0'),
    "temperature of text": (in_header(temperature="1"), "\"temperature\" in its header is '1'"),
    "temperature true": (in_header(temperature=True), '"temperature"'),
    "temperature 0.005": (in_header(temperature=0.005), '"temperature"'),
    "an answer that no box can hold": (in_second_prompt(answer="{1"), "b: its answer"),
    "no max_tokens": (in_header(max_tokens=None), '"max_tokens"'),
    "too long": (in_header(max_tokens=5000), "5000"),
    "half a token": (in_header(max_tokens=48.5), '"max_tokens" in its header is 48.5, not a whole'),
    "unknown task": (in_header(task="chess"), "'chess'"),
    "another reward": (in_header(reward="apo.chess.reward"), "apo.chess.reward"),
    "prompt of another type": (lambda document: document["prompts"].append(3), "prompt 3"),
    "no id": (in_second_prompt(id=None), 'prompt 2 has no text "id"'),
    "no text": (in_second_prompt(prompt=3), 'prompt 2 has no text "prompt"'),
    "no answer": (
        lambda document: document["prompts"][1].pop("answer"),
        'prompt 2 has no "answer"',
    ),
    "id twice": (in_second_prompt(id="a"), "prompt 2: an earlier prompt has the same id, 'a'"),
    "no rewards": (in_second_prompt(rewards=[]), 'prompt 2 (b) has no list "rewards"'),
    "reward of text": (in_second_prompt(rewards=[1, "1"]), "prompt 2 (b): the reward '1'"),
    "reward true": (in_second_prompt(rewards=[True]), "prompt 2 (b): the reward True"),
    "reward nan": (in_second_prompt(rewards=[float("nan")]), "prompt 2 (b): the reward nan"),
    "reward inf": (in_second_prompt(rewards=[float("inf")]), "prompt 2 (b): the reward inf"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case: str, by_hand: dict, tmp_path: Path) -> None:
    change, says = WRONG[case]
    change(by_hand)
    with pytest.raises(UserError) as error:
        load(by_hand, tmp_path)
    assert says in str(error.value) and "values.json" in str(error.value)
    assert "\n" not in str(error.value)
