"""The tasks: rows with all their columns, prompts as the model was trained on, and rewards."""

import dataclasses
import functools
import json
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from fractions import Fraction
from operator import itemgetter
from pathlib import Path

import datasets
import pytest
from conftest import make_tokenizer, write_lines
from hypothesis import given
from hypothesis import strategies as st

from apo import engine, problems
from apo.engine import Response
from apo.files import UserError
from apo.problems import DATASETS, PLAIN, Dataset, Prompt, PromptStyle, load_problems

# ---------------------------------------------------------------------------------------------
# Datasets of the hub. A row of each set that is registered, with all of its columns, the answer to
# be read from it, and where it comes from, by the sets' cards.

LATEX = r"So $x=\boxed{1}$, hence \boxed{\frac{1}{2}}."
HUB = {
    ("math", "train"): (
        ("DigitalLearningGmbH/MATH-lighteval", None, "train"),
        {"problem": "Q {x}", "level": "Level 5", "solution": LATEX, "type": "Algebra"},
        r"\frac{1}{2}",
    ),
    ("gsm8k", "train"): (
        ("openai/gsm8k", "main", "train"),
        {"question": "Q {x}", "answer": "She sold 24 + 48 = <<24+48=72>>72 clips.\n#### 1,072"},
        "1,072",
    ),
    ("gsm8k", "test"): (
        ("openai/gsm8k", "main", "test"),
        {"question": "Q {x}", "answer": "9 * 2 = $<<9*2=18>>18\n#### 18"},
        "18",
    ),
    ("math500", "test"): (
        ("HuggingFaceH4/MATH-500", None, "test"),
        {
            "problem": "Q {x}",
            "solution": LATEX,
            "answer": r"\left( 3, \pi \right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        },
        r"\left( 3, \pi \right)",
    ),
    ("minerva", "test"): (
        ("math-ai/minervamath", None, "test"),
        {"question": "Q {x}", "answer": "4.5e33"},
        "4.5e33",
    ),
    ("olympiadbench", "test"): (
        ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train"),
        {
            "id": 1606,
            "question": "Q {x}",
            "solution": ["long", "other"],
            "final_answer": ["2"],
            "context": None,
            "modality": "Text-only",
            "is_multiple_answer": False,
            "unit": None,
        },
        "2",
    ),
    ("amc23", "test"): (
        ("math-ai/amc23", None, "test"),
        {"id": 0, "question": "Q {x}", "answer": "27.0", "url": "u"},
        "27.0",
    ),
    ("aime24", "test"): (
        ("HuggingFaceH4/aime_2024", None, "train"),
        {"id": 60, "problem": "Q {x}", "solution": LATEX, "answer": "204", "url": "u"},
        "204",
    ),
    ("aime25", "test"): (
        ("math-ai/aime25", None, "test"),
        {"problem": "Q {x}", "answer": "70", "id": "0"},
        "70",
    ),
    ("hmmt_feb_2024", "test"): (
        ("MathArena/hmmt_feb_2024", None, "train"),
        {"problem_idx": 1, "problem": "Q {x}", "answer": "3"},
        "3",
    ),
    ("hmmt_feb_2025", "test"): (
        ("MathArena/hmmt_feb_2025", None, "train"),
        {"problem_idx": 1, "problem": "Q {x}", "answer": r"\frac{1}{576}", "problem_type": ["A"]},
        r"\frac{1}{576}",
    ),
}


@pytest.mark.parametrize("name, serves", HUB)
def test_hub_datasets_give_question_answer_and_every_column(
    name: str, serves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, source, answer = HUB[name, serves]
    asked = []

    def load_dataset(
        path: str, config: str | None = None, split: str | None = None
    ) -> datasets.Dataset:
        asked.append((path, config, split))
        return datasets.Dataset.from_list([source, source])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_problems(name, serves)
    assert asked == [place]
    assert [(row["question"], row["answer"]) for row in rows] == [("Q {x}", answer)] * 2
    assert [row["id"] for row in rows] == [f"{name}/0", f"{name}/1"]
    for column, value in source.items():
        if column not in ("id", "question", "answer"):
            assert rows[0][column] == value, column
    gradable, reasons = problems.keep_gradable(name, rows)
    assert [row["answer"] for row in gradable] == [answer] * 2 and reasons == []
    assert problems.reward(rf"So it is \boxed{{{answer}}}.", rows[0]) == 1.0
    assert problems.reward(r"So it is \boxed{-77}.", rows[0]) == 0.0


def test_every_registered_dataset_can_be_asked_for() -> None:
    """This holds for an entry that a fork adds, too."""
    for name, dataset in DATASETS.items():
        assert dataset.splits and dataset.splits.keys() <= {"train", "test"}, name
        if dataset.test_set != "none":
            assert "test" in DATASETS[dataset.test_set].splits, name


def test_hub_rows_without_an_answer_are_kept_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _, source, _ = HUB["olympiadbench", "test"]
    sources = [source | {"final_answer": []}, source | {"final_answer": ["5"]}]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **options: datasets.Dataset.from_list(sources)
    )
    rows = load_problems("olympiadbench")
    gradable, reasons = problems.keep_gradable("it", rows)
    assert [row["answer"] for row in gradable] == ["5"]
    assert len(reasons) == 1 and reasons[0].startswith("olympiadbench/0: ")


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*arguments: object, **options: object) -> None:
        raise ConnectionError("offline\n  with a long explanation" + 1000 * "!")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    says = r"^cannot load amc23 .*math-ai/amc23.*offline with a long explanation!{200,400}$"
    with pytest.raises(UserError, match=says):
        load_problems("amc23")


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'nosuch'.*gsm8k.*math"):
        load_problems("nosuch", "train")
    with pytest.raises(UserError, match="math500"):
        load_problems("math501", "test")
    with pytest.raises(UserError, match="'math500'"):
        load_problems("math500", "train")  # stage 1 must not learn from a benchmark


# ---------------------------------------------------------------------------------------------
# Local files

ROWS = [
    {"question": "1\u2028+ 1?", "answer": "2", "id": "a", "more": [1, 2]},
    {"question": r"{braces} \frac12 ü", "answer": "3", "id": "7", "more": [3]},
    {"question": "x", "answer": "0.5", "id": "c", "more": []},
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "marked", "windows", "capitals"])
def test_local_files(kind: str, tmp_path: Path) -> None:
    """With a byte-order mark, with CR LF, and with U+2028, where str.splitlines would cut."""
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path = tmp_path / "mine.jsonl"
    if kind == "parquet":
        path = tmp_path / "mine.parquet"
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    elif kind == "json":
        path = tmp_path / "mine.json"
        path.write_text(json.dumps(ROWS), "utf-8")
    elif kind == "marked":
        path.write_text("\n".join(lines) + "\n\n", "utf-8-sig")
    elif kind == "windows":
        path.write_bytes("\r\n".join(lines).encode() + b"\r\n")
    else:
        if kind == "capitals":
            path = tmp_path / "mine.JSONL"
        path.write_text("\n".join(lines), "utf-8")
    assert load_problems(str(path)) == [row | {"_task": "math"} for row in ROWS]


def test_numbers_are_answers_and_ids_become_text(tmp_path: Path) -> None:
    rows = [{"question": "x", "answer": 3, "id": 7}, {"question": "y", "answer": 0.5, "id": 8}]
    loaded = load_problems(str(write_lines(tmp_path / "q.jsonl", rows)))
    assert [row["id"] for row in loaded] == ["7", "8"]
    assert [problems.reward(r"\boxed{3}", row) for row in loaded] == [1.0, 0.0]


def test_rows_without_id_get_one_that_depends_on_the_row_alone(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "q.jsonl", [{"question": "x", "answer": 1}] * 3)
    assert [row["id"] for row in load_problems(str(path))] == ["q/0", "q/1", "q/2"]


GOOD = '{"question": "x", "answer": "1", "id": "k"}\n'
BAD_FILES = {  # name: content, what the error says
    "missing": (None, "No such file"),
    "empty": ("", "no rows"),
    "torn line": (GOOD + '{"question": "y", "ans', "line 2"),
    "no question": (GOOD + '{"problem": "y", "answer": "1"}', "row 2"),
    "no answer": (GOOD + '{"question": "y"}', "row 2"),
    "blank question": (GOOD + '{"question": " ", "answer": "1"}', "row 2"),
    "question of another type": (GOOD + '{"question": 3, "answer": "1"}', "row 2"),
    "row is no object": (GOOD + "[1, 2]", "line 2"),
    "id twice": (GOOD + GOOD.replace("x", "y"), "'k'"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_damaged_files_are_told_with_their_place(case: str, tmp_path: Path) -> None:
    content, says = BAD_FILES[case]
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        load_problems(str(path))
    assert says in str(error.value) and "bad.jsonl" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, text", [("b.parquet", "PAR1 no"), ("b.json", "{"), ("b.json", "3")])
def test_damaged_json_and_parquet(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"^[^\n]*$"):
        load_problems(str(tmp_path / name))


def test_a_parquet_file_may_have_any_name(tmp_path: Path) -> None:
    path = tmp_path / "x[1] *.parquet"
    rows = [{"question": "q", "answer": "1", "more": [1, 2]}]
    datasets.Dataset.from_list(rows).to_parquet(path)
    [row] = load_problems(str(path))
    assert row["question"] == "q" and row["more"] == [1, 2]


def test_rows_of_a_task_are_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.json").write_text("[1, 2]")
    task = problems.Dataset(
        source=str(tmp_path / "{split}.json"),
        splits={"train": "train"},
        question=lambda row: row["q"],
        answer=lambda row: row["a"],
    )
    monkeypatch.setitem(problems.DATASETS, "numbers", task)
    with pytest.raises(UserError, match="row 1 is not an object: 1"):
        load_problems("numbers")


def test_answers_that_cannot_be_graded_are_named_and_the_others_keep_their_order() -> None:
    answers = ["1", "", 2, None, "{", True, "a word", float("nan"), 0.25]
    rows = []
    for i, answer in enumerate(answers):
        rows.append({"id": f"k{i}", "question": "q", "answer": answer, "_task": "math"})
    gradable, reasons = problems.keep_gradable("it", rows)
    kept = [(row["id"], row["answer"]) for row in gradable]
    assert kept == [("k0", "1"), ("k2", "2"), ("k6", "a word"), ("k8", "0.25")]
    assert [reason.split(":")[0] for reason in reasons] == ["k1", "k3", "k4", "k5", "k7"]
    with pytest.raises(UserError, match="it: no row has an answer that can be graded"):
        problems.keep_gradable("it", [rows[1]])


# ---------------------------------------------------------------------------------------------
# Prompts


@given(st.text())
def test_a_prompt_holds_any_question_untouched(question: str) -> None:
    """str.format would choke on the braces of LaTeX."""
    before, after = problems.BOXED_TEMPLATE.split("{question}")
    assert problems.format_prompt(question) == before + question + after


def test_a_prompt_asks_for_what_the_reward_reads() -> None:
    assert r"\boxed{}" in problems.format_prompt("q")


def test_lone_surrogates_do_not_reach_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text(r'{"question": "a \ud800 b", "answer": "1"}')
    (row,) = load_problems(str(tmp_path / "s.jsonl"))
    row["question"].encode()


CHAT = """{% if think %}<think>{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def chat_tokenizer(template: str = CHAT) -> object:
    """Make a tokenizer that puts a BOS before a text, as Llama's does, and has a chat template."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    tokenizer.chat_template = template
    return tokenizer


def test_a_base_model_is_asked_with_the_template_alone() -> None:
    tokenizer = chat_tokenizer()
    prompt = problems.make_prompt({"id": "a", "question": "{x}?"}, PLAIN, tokenizer)
    assert prompt.text == problems.format_prompt("{x}?")
    assert prompt.ids[0] == 256 and tokenizer.decode(prompt.ids[1:]) == prompt.text
    assert prompt.row["id"] == "a"


def make_prompts(*lengths: int) -> list[Prompt]:
    return [Prompt({"id": f"p{n}"}, "a" * n, [65] * n) for n in lengths]


def test_a_prompt_that_the_model_cannot_continue_is_refused() -> None:
    """A token without an embedding, an end that the tokenizer puts after every prompt, no token."""
    tokenizer = make_tokenizer()
    prompts = make_prompts(3, 5)
    problems.check_prompts(prompts, 257, tokenizer)
    prompts[1].ids[2] = 257
    with pytest.raises(UserError, match="p5 has the token 257"):
        problems.check_prompts(prompts, 257, tokenizer)
    prompts[1].ids = [65, 256]
    with pytest.raises(UserError, match="add_eos_token"):
        problems.check_prompts(prompts, 257, tokenizer)
    prompts[1].text += "<|endoftext|>"  # the template itself has written it
    problems.check_prompts(prompts, 257, tokenizer)
    prompts[1].ids = []
    with pytest.raises(UserError, match="p5 has no tokens"):
        problems.check_prompts(prompts, 257, tokenizer)


def test_long_prompts_keep_their_end_and_are_counted() -> None:
    tokenizer = make_tokenizer()
    prompts = [problems.make_prompt({"id": "a", "question": "abcdef"}, PLAIN, tokenizer)]
    prompts += make_prompts(3, 4)
    text = prompts[0].text
    assert problems.cut_prompts("x", prompts, len(text), tokenizer) is None
    sentence = problems.cut_prompts("x", prompts, 10, tokenizer)
    assert "x: 1 of 3" in sentence and "10 tokens" in sentence
    assert prompts[0].text == text[-10:] and len(prompts[0].ids) == 10
    assert [len(prompt.ids) for prompt in prompts[1:]] == [3, 4]
    with pytest.raises(UserError, match="x: 2 of 3"):
        problems.cut_prompts("x", prompts, 3, tokenizer)


def make_task(monkeypatch: pytest.MonkeyPatch, folder: Path, **functions: object) -> None:
    (folder / "mine-train.jsonl").write_text('{"word": "ab", "n": 3}\n')
    entry = Dataset(
        source=f"{folder}/mine-{{split}}.jsonl",
        splits={"train": "train"},
        **{"question": itemgetter("word"), "answer": itemgetter("n")} | functions,
    )
    monkeypatch.setitem(problems.DATASETS, "mine", entry)


def test_rows_are_the_same_before_and_after_a_values_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 2 reads its rows from a values file, and the reward must not see other types there."""
    answers = {"a": (1, 2), "b": Fraction(1, 3), "c": [date(2026, 1, 2)], "d": {1: b"x"}}
    make_task(monkeypatch, tmp_path, answer=lambda row: answers)
    [row] = problems.load_problems("mine", "train")
    assert row["answer"] == {"a": [1, 2], "b": "1/3", "c": ["2026-01-02"], "d": {"1": "b'x'"}}
    assert row == json.loads(json.dumps(row))


def take_number(response: str, row: dict) -> float:
    row["answer"].remove(int(response))
    return 1.0


def return_text(response: str, row: dict) -> str:
    return "42"


def test_a_reward_that_changes_its_row_changes_no_other_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may take numbers off a list as the response uses them."""
    make_task(monkeypatch, tmp_path, answer=lambda row: [row["n"]], reward=take_number)
    [row] = problems.load_problems("mine", "train")
    for _ in range(2):
        assert problems.submit_reward("3", row).result() == 1.0
    assert row["answer"] == [3]


def test_a_text_is_no_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the answer, returned by mistake."""
    make_task(monkeypatch, tmp_path, reward=return_text)
    [row] = problems.load_problems("mine", "train")
    with pytest.raises(RuntimeError, match="mine/0") as caught:
        problems.submit_reward("3", row)
    assert isinstance(caught.value.__cause__, TypeError)


def test_solutions_of_gsm8k_are_no_answers(tmp_path: Path) -> None:
    """Each would be a text that no response equals."""
    rows = tmp_path / "train.jsonl"
    rows.write_text(json.dumps({"question": "Q", "answer": "48 / 2 = 24\n#### 24"}))
    with pytest.raises(UserError, match=r"row 1.*####"):
        problems.load_problems(str(rows), "train")


def test_a_key_of_a_tasks_own_table_is_no_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_task(monkeypatch, tmp_path, answer=lambda row: {"yes": 1}[row["word"]])
    with pytest.raises(RuntimeError, match="mine, row 1") as caught:
        problems.load_problems("mine", "train")
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("functions", "says"),
    [
        ({"answer": lambda row: {1, 2}}, r"mine, row 1 cannot be written.* no JSON for set"),
        ({"answer": lambda row: [object()]}, r"mine, row 1 cannot be written.* object"),
        ({"answer": itemgetter("m")}, r"mine, row 1 has no column 'm'"),
        ({"question": itemgetter("n")}, r"mine, row 1: its question is not text: 3"),
    ],
)
def test_rows_that_do_not_fit_their_task_are_named(
    functions: dict, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_task(monkeypatch, tmp_path, **functions)
    with pytest.raises(UserError, match=says):
        problems.load_problems("mine", "train")


def test_a_fault_in_a_tasks_own_function_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_task(monkeypatch, tmp_path, answer=lambda row: row["n"].lower())
    with pytest.raises(RuntimeError, match="mine, row 1") as caught:
        problems.load_problems("mine", "train")
    assert isinstance(caught.value.__cause__, AttributeError)


def test_a_missing_file_of_a_task_is_told_with_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_task(monkeypatch, tmp_path)
    (tmp_path / "mine-train.jsonl").unlink()
    with pytest.raises(UserError, match=f"there is no {tmp_path}/mine-train.jsonl"):
        problems.load_problems("mine", "train")


def test_exact_decimals_of_a_table_are_answers(tmp_path: Path) -> None:
    import datasets

    table = {"question": ["a"], "answer": [Decimal("2.50")]}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "decimal.parquet")
    (row,) = problems.load_problems(str(tmp_path / "decimal.parquet"))
    assert problems.reward(r"\boxed{2.5}", row) == 1.0
    (gradable,), _ = problems.keep_gradable("decimal", [row])
    assert gradable["answer"] == "2.50"


def test_a_style_is_read_back_as_it_was_written() -> None:
    style = PromptStyle("a {question}", True, "be brief", {"enable_thinking": False})
    assert PromptStyle.from_settings(style.settings()) == style
    assert PromptStyle.from_settings({}) == PLAIN


def test_a_chat_model_is_asked_in_its_template_once_with_special_tokens() -> None:
    tokenizer = chat_tokenizer()
    row = {"id": "a", "question": "1 + 1?"}
    prompt = problems.make_prompt(row, PromptStyle("Q: {question}", True), tokenizer)
    assert prompt.text == "<user>Q: 1 + 1?\n<assistant>"
    assert tokenizer.decode(prompt.ids) == prompt.text  # no second BOS
    style = problems.prompt_style("Q: {question}", True, "Be brief.", '{"think": true}')
    prompt = problems.make_prompt(row, style, tokenizer)
    assert prompt.text == "<think><system>Be brief.\n<user>Q: 1 + 1?\n<assistant>"
    again = problems.make_prompt(row, style, tokenizer, prompt.text)  # as stage 2 does
    assert again.ids == prompt.ids


def test_a_chat_template_that_fails_is_a_users_mistake() -> None:
    style = PromptStyle(chat_template=True, system_prompt="Be brief.")
    tokenizer = chat_tokenizer("{{ raise_exception('no system turn') }}")
    with pytest.raises(UserError, match="no system turn"):
        problems.format_prompt("q", style, tokenizer)


@pytest.mark.parametrize(
    "flags, says",
    [
        ((False, "Be brief.", None), "--chat-template"),
        ((False, None, '{"think": true}'), "--chat-template"),
        ((True, None, "{think: true}"), "not a JSON object"),
        ((True, None, "[1]"), "not a JSON object"),
    ],
)
def test_prompt_flags_that_do_not_fit_together(flags: tuple, says: str) -> None:
    with pytest.raises(UserError, match=says):
        problems.prompt_style("{question}", *flags)


# ---------------------------------------------------------------------------------------------
# Rewards


def score_backwards(response: str, row: dict) -> float:
    """Score the letters that stand where the word's do, read backwards; between -1 and 1."""
    if response == "raise":
        raise ZeroDivisionError("a fault in the reward function")
    if response == "exit":
        raise SystemExit(0)
    if response == "nan":
        return float("nan")
    backwards = row["word"][::-1]
    return sum(x == y for x, y in zip(response, backwards, strict=False)) / len(backwards) * 2 - 1


BACKWARDS = Dataset(
    source="words-{split}.jsonl",
    splits={"train": "train", "test": "dev"},
    question=lambda row: "Write backwards: " + row["word"],
    answer=lambda row: row["word"][::-1],
    template="{question}\n",
    reward=score_backwards,
    test_set="backwards",
)


@pytest.fixture
def backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Register a task that is not mathematics, as a fork does, and return its name."""
    for split, words in (("train", ["abc", "word"]), ("dev", ["xy"])):
        rows = [{"word": word, "source": {"page": i}} for i, word in enumerate(words)]
        write_lines(tmp_path / f"words-{split}.jsonl", rows)
    source = str(tmp_path / "words-{split}.jsonl")
    entry = dataclasses.replace(BACKWARDS, source=source)
    monkeypatch.setitem(DATASETS, "backwards", entry)
    return "backwards"


def test_an_entry_is_all_that_a_task_needs(backwards: str) -> None:
    rows = load_problems(backwards, "train")
    assert [row["id"] for row in rows] == ["backwards/0", "backwards/1"]
    assert rows[1]["question"] == "Write backwards: word" and rows[1]["answer"] == "drow"
    assert rows[1]["word"] == "word" and rows[1]["source"] == {"page": 1}
    assert [row["word"] for row in load_problems(backwards, "test")] == ["xy"]
    assert problems.keep_gradable(backwards, rows) == (rows, [])  # only mathematics is checked
    assert problems.reward("drow", rows[1]) == 1.0
    assert problems.reward("dog", rows[1]) == -0.5
    assert problems.submit_reward("dxxx", rows[1]).result() == -0.5


@pytest.mark.parametrize("place", ["template", "prompt"])
def test_halves_of_letters_reach_no_tokenizer(place: str) -> None:
    """JSON can hold them, and so can a flag; no tokenizer takes them."""
    style = PromptStyle(template="\ud800{question}")
    text = "a\udcff" if place == "prompt" else None
    tokenizer = make_tokenizer()
    prompt = problems.make_prompt({"question": "1", "id": "a"}, style, tokenizer, text)
    assert prompt.text == {"template": "?1", "prompt": "a?"}[place]
    assert prompt.ids == tokenizer.encode(prompt.text)


def test_headers_name_the_reward(backwards: str) -> None:
    assert problems.reward_name(backwards).endswith("score_backwards")
    assert problems.reward_name(backwards) != problems.reward_name("math")
    assert problems.reward_name("math") == problems.reward_name("gsm8k")
    # Two lambdas have one name, so that one's values would pass for the other's.
    for nameless in (lambda text, row: 1.0, functools.partial(problems.reward)):
        with pytest.raises(TypeError, match="must be a function of a module"):
            dataclasses.replace(BACKWARDS, reward=nameless)


@pytest.mark.parametrize(
    "response, cause",
    [("raise", "ZeroDivisionError"), ("exit", "SystemExit"), ("nan", "nan")],
)
def test_a_fault_in_a_reward_stops_the_run_with_the_row_and_is_no_zero(
    response: str, cause: str, backwards: str
) -> None:
    row = load_problems(backwards, "train")[1]
    prompt = Prompt(row, "", [])
    sampled = Response(0, prompt, 0, [1], response, finished=True, sampler_logp=[])
    with pytest.raises(RuntimeError, match="backwards/1") as error:
        engine.start_grading(sampled)
    assert cause in str(error.value) + repr(error.value.__cause__)


def test_a_response_that_did_not_finish_earns_zero_in_every_task(backwards: str) -> None:
    for row in (*load_problems(backwards, "train"), {"id": "m", "answer": "1", "_task": "math"}):
        text = r"\boxed{1}" if row["_task"] == "math" else row["word"][::-1]
        for finished, reward in ((True, 1.0), (False, 0.0)):
            response = Response(0, Prompt(row, "", []), 0, [1], text, finished, sampler_logp=[])
            engine.start_grading(response)
            engine.wait_for_reward(response)
            assert response.reward == reward and engine.is_graded(response)


def test_a_plain_answer_is_that_of_a_math_problem() -> None:
    assert problems.reward(r"\boxed{0.5}", r"\frac{1}{2}") == 1.0
    assert problems.reward(r"\boxed{0.5}", 2) == 0.0
    assert problems.reward(r"\boxed{0.5}", {"id": "a", "answer": "0.5"}) == 1.0
    with pytest.raises(ValueError):
        problems.reward(r"\boxed{0.5}", {"id": "a", "answer": ""})


def test_the_default_test_set_belongs_to_the_training_set() -> None:
    assert DATASETS["math"].test_set == "math500"
    assert DATASETS["gsm8k"].test_set == "gsm8k"


def test_another_task_is_asked_in_its_own_template(backwards: str) -> None:
    """A model that learned one template for mathematics is asked all mathematics in it."""
    style_of: Callable = problems.style_of_task
    trained = PromptStyle(template="Trained: {question}", chat_template=True)
    assert style_of(trained, "gsm8k", problems.reward_name("math")) == trained
    asked = style_of(trained, backwards, problems.reward_name("math"))
    assert asked == dataclasses.replace(trained, template="{question}\n")
    assert style_of(trained, backwards, problems.reward_name(backwards)) == trained
    # A model that was not trained here is asked as stage 1 would ask it.
    assert style_of(trained, "gsm8k", None).template == DATASETS["gsm8k"].template
