"""What problems.py promises but for the reward: loading, prompts, seeds, files."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

import problems
from problems import DATASETS, UserError, load_problems

# One row of every set on the hub, with all of its columns, and the answer to be read from it.
LATEX = r"So $x=\boxed{1}$, hence \boxed{\frac{1}{2}}."
HUB = {
    ("math", "train"): (
        {"problem": "Q {x}", "level": "Level 5", "solution": LATEX, "type": "Algebra"},
        r"\frac{1}{2}",
    ),
    ("gsm8k", "train"): (
        {"question": "Q {x}", "answer": "She sold 24 + 48 = <<24+48=72>>72 clips.\n#### 1,072"},
        "1,072",
    ),
    ("gsm8k", "test"): ({"question": "Q {x}", "answer": "9 * 2 = $<<9*2=18>>18\n#### 18"}, "18"),
    ("math500", "test"): (
        {"problem": "Q {x}", "solution": LATEX, "answer": r"\left( 3, \pi \right)"}
        | {"subject": "Precalculus", "level": 2, "unique_id": "test/precalculus/807.json"},
        r"\left( 3, \pi \right)",
    ),
    ("minerva", "test"): ({"question": "Q {x}", "answer": "4.5e33"}, "4.5e33"),
    ("olympiadbench", "test"): (
        {"id": 1606, "question": "Q {x}", "solution": ["long", "other"], "final_answer": ["2"]}
        | {"context": None, "modality": "Text-only", "is_multiple_answer": False, "unit": None},
        "2",
    ),
    ("amc23", "test"): ({"id": 0, "question": "Q {x}", "answer": "27.0", "url": "u"}, "27.0"),
    ("aime24", "test"): (
        {"id": 60, "problem": "Q {x}", "solution": LATEX, "answer": "204", "url": "u"},
        "204",
    ),
    ("aime25", "test"): ({"problem": "Q {x}", "answer": "70", "id": "0"}, "70"),
    ("hmmt_feb_2024", "test"): ({"problem_idx": 1, "problem": "Q {x}", "answer": "3"}, "3"),
    ("hmmt_feb_2025", "test"): (
        {"problem_idx": 1, "problem": "Q {x}", "answer": r"\frac{1}{576}", "problem_type": ["A"]},
        r"\frac{1}{576}",
    ),
}
IDS = {  # hub id, config and split of each, from the sets' cards
    ("math", "train"): ("DigitalLearningGmbH/MATH-lighteval", None, "train"),
    ("gsm8k", "train"): ("openai/gsm8k", "main", "train"),
    ("gsm8k", "test"): ("openai/gsm8k", "main", "test"),
    ("math500", "test"): ("HuggingFaceH4/MATH-500", None, "test"),
    ("minerva", "test"): ("math-ai/minervamath", None, "test"),
    ("olympiadbench", "test"): ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
    ("amc23", "test"): ("math-ai/amc23", None, "test"),
    ("aime24", "test"): ("HuggingFaceH4/aime_2024", None, "train"),
    ("aime25", "test"): ("math-ai/aime25", None, "test"),
    ("hmmt_feb_2024", "test"): ("MathArena/hmmt_feb_2024", None, "train"),
    ("hmmt_feb_2025", "test"): ("MathArena/hmmt_feb_2025", None, "train"),
}


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


# ---------------------------------------------------------------------------------------------
# Datasets


def test_every_registered_dataset_is_tried_below():
    assert DATASETS.keys() == HUB.keys() == IDS.keys()


@pytest.mark.parametrize("name, serves", HUB)
def test_hub_datasets_give_question_and_answer(name, serves, monkeypatch):
    row, answer = HUB[name, serves]
    asked = []

    def load_dataset(path, name=None, split=None):
        asked.append((path, name, split))
        return datasets.Dataset.from_list([row, row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_problems(name, serves)
    assert asked == [IDS[name, serves]]
    assert [(p["question"], p["answer"]) for p in loaded] == [("Q {x}", answer)] * 2
    assert len({p["id"] for p in loaded}) == 2
    assert problems.split_gradable(name, loaded, "") == loaded
    assert problems.grade([rf"\boxed{{{answer}}}"], [answer]) == [1.0]


def test_hub_rows_without_an_answer_are_kept_to_be_named(monkeypatch, capsys):
    row = HUB["olympiadbench", "test"][0] | {"final_answer": []}
    table = datasets.Dataset.from_list([row, row | {"final_answer": ["5"]}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    rows = load_problems("olympiadbench")
    gradable = problems.split_gradable("it", rows, "is dropped")
    assert [p["answer"] for p in gradable] == ["5"]
    assert capsys.readouterr().out.startswith(f"{rows[0]['id']} is dropped: ")


def test_hub_that_cannot_be_reached_is_told_in_one_sentence(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("offline\n  with a long explanation" + 1000 * "!")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    told = r"^cannot load amc23 .*math-ai/amc23.*offline with a long explanation!{200,400}$"
    with pytest.raises(UserError, match=told):
        load_problems("amc23")


ROWS = [
    {"question": "1 + 1?", "answer": "2", "id": "a"},
    {"question": r"{braces} \frac12 ü", "answer": 3, "id": 7, "more": [1, 2]},
    {"question": "x", "answer": 0.5, "id": "c"},
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "marked", "windows"])
def test_local_files(kind, tmp_path):
    """Also with a byte-order mark, with \\r\\n, and with U+2028, where str.splitlines would cut."""
    rows = [row | {"answer": str(row["answer"]), "id": str(row["id"])} for row in ROWS]
    rows = [{k: v for k, v in row.items() if k != "more"} for row in rows]
    rows[0]["question"] = "1\u2028+ 1?"
    path = tmp_path / f"mine.{kind if kind in ('json', 'parquet') else 'jsonl'}"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif kind == "json":
        write(path, json.dumps(rows))
    else:
        text = {"jsonl": "\n".join(lines), "marked": "\ufeff" + "\n".join(lines) + "\n\n"}
        write(path, text.get(kind, "\r\n".join(lines) + "\r\n"))
    assert load_problems(str(path)) == rows


def test_rows_without_id_get_one_that_depends_on_the_row_alone(tmp_path):
    path = write(tmp_path / "q.jsonl", '{"question": "x", "answer": 1}\n' * 3)
    assert [p["id"] for p in load_problems(str(path))] == ["q/0", "q/1", "q/2"]


GOOD = '{"question": "x", "answer": "1", "id": "k"}\n'
BAD_FILES = {
    "missing": (None, "No such file"),
    "empty": ("", "no rows"),
    "torn line": (GOOD + '{"question": "y", "ans', "line 2"),
    "no question": (GOOD + '{"problem": "y", "answer": "1"}', "row 2"),
    "no answer": (GOOD + '{"question": "y"}', "row 2"),
    "blank question": (GOOD + '{"question": " ", "answer": "1"}', "row 2"),
    "question of another type": (GOOD + '{"question": 3, "answer": "1"}', "row 2"),
    "row is no object": (GOOD + "[1, 2]", "row 2"),
    "id twice": (GOOD + GOOD.replace("x", "y"), "'k'"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_files_are_told_with_their_place(case, tmp_path):
    text, says = BAD_FILES[case]
    path = tmp_path / "bad.jsonl"
    if text is not None:
        write(path, text)
    with pytest.raises(UserError) as told:
        load_problems(str(path))
    assert says in str(told.value) and "bad.jsonl" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name, text", [("b.parquet", "PAR1 no"), ("b.json", "{"), ("b.json", "3")])
def test_damaged_json_and_parquet(name, text, tmp_path):
    with pytest.raises(UserError, match=r"^[^\n]*$"):
        load_problems(str(write(tmp_path / name, text)))


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(UserError, match=r"'nosuch'.*gsm8k.*math"):
        load_problems("nosuch", "train")
    with pytest.raises(UserError, match="math500"):
        load_problems("math501", "test")
    with pytest.raises(UserError, match="'math500'"):
        load_problems("math500", "train")  # stage 1 must not learn from a benchmark


def test_split_gradable_keeps_order_and_gives_reasons(capsys):
    answers = ["1", "", 2, None, "{", True, "a word", float("nan"), 0.25]
    rows = [{"id": str(i), "question": "q", "answer": a} for i, a in enumerate(answers)]
    gradable = problems.split_gradable("it", rows, "counts as wrong")
    assert [(p["id"], p["answer"]) for p in gradable] == [
        *[("0", "1"), ("2", "2"), ("6", "a word"), ("8", "0.25")]
    ]
    told = [
        line.partition(" counts as wrong: its answer is ")
        for line in capsys.readouterr().out.splitlines()
    ]
    assert [key for key, _, _ in told] == ["1", "3", "4", "5", "7"] and all(why for *_, why in told)


# ---------------------------------------------------------------------------------------------
# Prompts and seeds


@given(st.text())
def test_prompt_holds_any_question_untouched(question):
    """str.format would choke on the braces of LaTeX."""
    before, after = problems.PROMPT_TEMPLATE.split("{question}")
    assert problems.format_prompt(question) == before + question + after


def test_prompt_asks_for_what_the_reward_reads():
    assert r"\boxed{}" in problems.format_prompt("q")


def test_lone_surrogates_do_not_reach_the_tokenizer(tmp_path):
    path = write(tmp_path / "s.jsonl", r'{"question": "a \ud800 b", "answer": "1"}')
    (row,) = load_problems(str(path))
    row["question"].encode()


keys = st.tuples(st.integers(0, 99), st.integers(0, 999), st.text(max_size=9), st.integers(0, 99))


@given(st.lists(keys, min_size=2, max_size=2, unique=True))
def test_every_response_has_its_own_seed(pair):
    first, second = (problems.response_seed(*key) for key in pair)
    assert first != second and first == problems.response_seed(*pair[0])
    assert 0 <= first < 2**63, "vLLM takes an int64"


def test_seed_is_the_same_tomorrow():
    """Python's own hash() differs from process to process, and a resumed run with it."""
    code = "import problems; print(problems.response_seed(0, 1, 'math/2', 3))"
    root = Path(problems.__file__).parent
    told = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert int(told.stdout) == problems.response_seed(0, 1, "math/2", 3)


# ---------------------------------------------------------------------------------------------
# Files and arguments


def test_write_whole_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    problems.write_whole(path, "old")

    def power_cut(*args):
        raise OSError("power cut")

    monkeypatch.setattr(problems.os, "replace", power_cut)
    with pytest.raises(OSError, match="power cut"):
        problems.write_whole(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    problems.write_whole(path, "new ü")
    assert path.read_text("utf-8") == "new ü" and [p.name for p in tmp_path.iterdir()] == [
        path.name
    ]


def test_json_of_ours_is_read_back_only_as_it_was_written(tmp_path):
    path, document = tmp_path / "values.json", {"header": {"a": 1}, "prompts": [{"v": [0.1, 1.0]}]}
    problems.write_json(path, document)
    text = path.read_text()
    saved = problems.read_json(path, ours=True)
    assert re.fullmatch("[0-9a-f]{64}", saved.pop("sha256")) and saved == document
    for damaged in (text.replace("0.1", "0.2"), text.replace("header", "heeder"), text[:-9], "[]"):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"values\.json"):
            problems.read_json(path, ours=True)


def test_differences_are_named_with_both_values():
    saved = {"temperature": 1.0, "seed": 0, "more": 1}
    problems.refuse_difference("it", saved, {"temperature": 1.0, "seed": 0})
    with pytest.raises(UserError, match=r"temperature 1\.0, not 0\.5.*seed 0, not 3"):
        problems.refuse_difference("it", saved, {"temperature": 0.5, "seed": 3})


@pytest.mark.parametrize("value", [0, -1, 0.0, -0.5, math.nan, math.inf, -math.inf])
def test_numbers_out_of_range(value):
    with pytest.raises(UserError, match="--batch-size"):
        problems.check_args(SimpleNamespace(out="o", batch_size=value))
    problems.check_args(
        SimpleNamespace(out="o", batch_size=1, seed=0, name="", flag=False, none=None)
    )


def test_beta1_may_be_infinite_and_named_flags_zero():
    problems.check_args(SimpleNamespace(out="o", beta1=math.inf, limit=0), "limit")
    with pytest.raises(UserError, match="--limit -1"):
        problems.check_args(SimpleNamespace(out="o", limit=-1), "limit")


def test_nothing_heavy_is_imported_at_the_top():
    """The file is the grading worker as well: torch or vllm there is 10 s and a GB for each."""
    code = "import problems, sys; print([m for m in sys.modules if m in sys.argv[1:]])"
    heavy = ["torch", "vllm", "transformers", "datasets", "sympy", "math_verify"]
    root = Path(problems.__file__).parent
    command = [sys.executable, "-c", code, *heavy]
    told = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert told.stdout.strip() == "[]", told
