"""Countdown: the reward, the data, and what the reference learns from."""

import dataclasses
import importlib
import itertools
import json
import math
import operator
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from apo import problems
from apo.files import UserError, read_jsonl
from experiments import countdown

ROOT = Path(__file__).parent.parent
OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
ROW = {"id": "a", "numbers": [3, 7, 15, 7], "target": 26}

# ---------------------------------------------------------------------------------------------
# The reward, against another way to compute it


def random_tree(draw: st.DrawFn, depth: int) -> tuple[str, Fraction | None, list[int]]:
    """Draw an expression: its text, its value (None where it divides by 0), and its numbers.

    Every operation has its brackets, so that the text needs no rules of precedence.
    """
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        number = draw(st.integers(0, 12))
        return str(number), Fraction(number), [number]
    left, left_value, left_numbers = random_tree(draw, depth - 1)
    right, right_value, right_numbers = random_tree(draw, depth - 1)
    sign = draw(st.sampled_from("+-*/"))
    space = draw(st.sampled_from(["", " "]))
    if left_value is None or right_value is None or (sign == "/" and right_value == 0):
        value = None
    else:
        value = OPERATORS[sign](left_value, right_value)
    text = f"({left}{space}{sign}{space}{right})"
    return text, value, left_numbers + right_numbers


@st.composite
def expressions(draw: st.DrawFn) -> tuple[str, Fraction | None, list[int]]:
    return random_tree(draw, 3)


@given(expressions(), st.lists(st.integers(0, 12), max_size=3), st.booleans())
def test_a_solution_earns_1(expression, others, boxed):
    text, value, numbers = expression
    if value is None or len(text) > countdown.LONGEST:
        return
    row = {"numbers": [*others, *reversed(numbers)], "target": int(value)}
    response = f"{text}=1\n\\boxed{{{text}}}" if boxed else f"1+1=2\n{text}\n"
    assert countdown.reward(response, row) == (1.0 if value.denominator == 1 else 0.0)


@given(expressions(), st.integers(-30, 200))
def test_another_value_earns_0(expression, target):
    text, value, numbers = expression
    row = {"numbers": numbers, "target": target}
    if value != target:
        assert countdown.reward(f"\\boxed{{{text}}}", row) == 0.0


@given(expressions(), st.data())
def test_a_number_too_often_earns_0(expression, data):
    """Each number of the expression in turn is missing from the row, once."""
    text, value, numbers = expression
    if value is None or value.denominator != 1:
        return
    missing = data.draw(st.integers(0, len(numbers) - 1))
    row = {"numbers": numbers[:missing] + numbers[missing + 1 :], "target": int(value)}
    assert countdown.reward(text, row) == 0.0


def values_by_python(numbers: list[int]) -> dict[str, Fraction]:
    """Write all expressions a+b*c of two or three of the numbers without brackets, and run them."""
    values = {}
    for size in (2, 3):
        for chosen in itertools.permutations(numbers, size):
            for signs in itertools.product("+-*/", repeat=size - 1):
                text = str(chosen[0])
                code = f"Fraction({chosen[0]})"
                for sign, number in zip(signs, chosen[1:], strict=True):
                    text += f"{sign}{number}"
                    code += f"{sign}Fraction({number})"
                try:
                    values[text] = eval(code)
                except ZeroDivisionError:
                    values[text] = None
    return values


@pytest.mark.parametrize(
    ("expression", "numbers"),
    [
        ("5**2+1", [5, 2, 1]),
        ("53//2", [53, 2]),
        ("-4+30", [4, 30]),
        ("+26", [26]),
        ("(26)", [1]),
        ("(26,)", [26]),
    ],
)
def test_what_is_not_allowed_earns_0_even_where_python_says_26(expression, numbers):
    row = {"numbers": numbers, "target": 26}
    assert countdown.reward(expression, row) == 0.0
    assert countdown.reward("26", {"numbers": [26], "target": 26}) == 1.0


def test_values_are_exact():
    assert 1 / 49 * 49 != 1  # in floating point
    assert countdown.reward("1/49*49", {"numbers": [1, 49, 49], "target": 1}) == 1.0
    row = {"numbers": [10**17, 10**17, 1], "target": 0}
    assert countdown.reward(f"{10**17}-{10**17}-1", row) == 0.0


def test_precedence_is_pythons():
    for numbers in ([3, 7, 49], [2, 3, 0], [10, 3, 3]):
        for text, value in values_by_python(numbers).items():
            for target in (7, 6, 10, 1, 0, 52):
                expected = 1.0 if value == target else 0.0
                assert countdown.reward(text, {"numbers": numbers, "target": target}) == expected


# ---------------------------------------------------------------------------------------------
# The reward, by hand


@pytest.mark.parametrize(
    "response",
    [
        "\\boxed{(15+7)+7-3}",
        "\\boxed{ 15 + 7 + (7 - 3) }",
        "\\boxed{15+7+7-3} is it.",
        "first \\boxed{1}, then \\boxed{15+7+7-3}",
        "15+7=22\n15+7+7-3",
        "15+7=22\r\n  15+7+7-3  \n\n",
        "15+7+7-3",
        "\\boxed{(((((15+7))+7)-3))}",
    ],
)
def test_right(response):
    assert countdown.reward(response, ROW) == 1.0


WRONG = {
    "nothing": "",
    "empty box": "\\boxed{}",
    "only spaces": "\\boxed{  }",
    "open box": "15+7+7-3\n\\boxed{15+7+7-3",
    "a box before the right line": "\\boxed{15}\n15+7+7-3",
    "the right box is not the last": "\\boxed{15+7+7-3} \\boxed{15+7}",
    "the result alone": "\\boxed{26}",
    "an equation": "\\boxed{15+7+7-3=26}",
    "a number twice": "\\boxed{15+15-7+3}",
    "a number that is not there": "\\boxed{13+13}",
    "a digit for a number": "\\boxed{1*5+7+7+7}",
    "a sign before a number": "\\boxed{-3+15+7+7}",
    "a plus before a number": "\\boxed{+15+7+7-3}",
    "a minus before a bracket": "\\boxed{15+7-(-7+3)}",
    "a power": "\\boxed{3**3}",
    "a whole division": "\\boxed{15//3}",
    "a remainder": "\\boxed{15%7}",
    "a decimal": "\\boxed{15.0+7+7-3}",
    "an exponent": "\\boxed{15e0+7+7-3}",
    "an underscore": "\\boxed{1_5+7+7-3}",
    "another base": "\\boxed{0xf+7+7-3}",
    "a leading zero": "\\boxed{015+7+7-3}",
    "no operator between brackets": "\\boxed{(15)(7)}",
    "a pair": "\\boxed{(15+7+7-3,)}",
    "an empty bracket": "\\boxed{()}",
    "a call": "\\boxed{int(15)+7+7-3}",
    "a name": "\\boxed{x}",
    "a text": "\\boxed{'15'+7}",
    "true": "\\boxed{True}",
    "a comment": "\\boxed{15+7+7-3#}",
    "two lines": "\\boxed{15+7+\n7-3}",
    "two statements": "\\boxed{15+7+7-3;1}",
    "an assignment": "\\boxed{(x:=26)}",
    "brackets of sets": "\\boxed{{15+7+7-3}}",
    "a bracket too few": "\\boxed{(15+7+7-3}",
    "a bracket too many": "\\boxed{15+7+7-3)}",
    "mathematical digits": "\\boxed{𝟏𝟓+7+7-3}",
    "wide digits": "\\boxed{１５+7+7-3}",
    "arabic digits": "\\boxed{١٥+7+7-3}",
    "a superscript": "\\boxed{15+7+7-3²}",
    "a wide plus": "\\boxed{15＋7+7-3}",
    "a zero byte": "\\boxed{15+7+7-3\0}",
    "half of a surrogate pair": "\\boxed{15+7+7-3\ud800}",
    "division by zero": "\\boxed{3/(7-7)}",
    "a hundred digits": f"\\boxed{{{'9' * 100}}}",
    "a million digits": f"\\boxed{{{'9' * 10**6}}}",
    "a huge power": "\\boxed{15**7**15**7**15}",
    "a tower of powers": "\\boxed{" + "**".join(["9"] * 60) + "}",
    "a hundred brackets": "\\boxed{" + "(" * 99 + "26" + ")" * 99 + "}",
    "a million brackets": "(" * 10**6,
    "a million closed brackets": "\\boxed{" + "(" * 10**6 + "26" + ")" * 10**6 + "}",
    "many signs": "\\boxed{" + "-" * 190 + "3}",
    "a million signs": "-" * 10**6 + "3",
    "many terms": "+".join(["1"] * 10**6),
    "a hundred terms": "\\boxed{" + "+".join(["1"] * 100) + "}",
    "a million boxes": "\\boxed{" * 10**6,
    "a million lines": "15+7\n" * 10**6,
    "strange ends of lines": "15+7+7-3\u2028x",
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.filterwarnings("error")  # Python warns of some expressions
def test_wrong(name):
    assert countdown.reward(WRONG[name], ROW) == 0.0


@given(st.text(), st.booleans())
def test_any_text_is_scored(text, boxed):
    response = f"\\boxed{{{text}}}" if boxed else text
    assert countdown.reward(response, ROW) in (0.0, 1.0)


@given(st.text("0123456789+-*/() ", max_size=250))
def test_any_allowed_characters_are_scored(text):
    assert countdown.reward(text, ROW) in (0.0, 1.0)


def test_the_row_is_left_alone():
    row = {"numbers": [1, 2], "target": 3}
    assert countdown.reward("1+2", row) == countdown.reward("1+2", row) == 1.0
    assert row == {"numbers": [1, 2], "target": 3}


def test_a_fault_of_the_row_is_no_zero():
    """Only the response is the model's; a row without a target is a mistake in the data."""
    with pytest.raises(KeyError):
        countdown.reward("1+2", {"numbers": [1, 2]})


# ---------------------------------------------------------------------------------------------
# The data and the teacher


def solve(values: list[Fraction], target: int) -> bool:
    """Say whether any expression of some of the values gives the target."""
    if target in values:
        return True
    for i, j in itertools.permutations(range(len(values)), 2):
        rest = [value for k, value in enumerate(values) if k not in (i, j)]
        results = [values[i] + values[j], values[i] - values[j], values[i] * values[j]]
        if values[j] != 0:
            results.append(values[i] / values[j])
        if any(solve([*rest, result], target) for result in results):
            return True
    return False


def test_every_problem_can_be_solved():
    train, test = countdown.draw_sets(random.Random(0), 60, 20)
    for problem in [*train, *test]:
        assert solve([Fraction(number) for number in problem.numbers], problem.target)
        assert problem.target not in problem.numbers
    assert not solve([Fraction(2), Fraction(3)], 7)  # the solver can say no


def test_the_sets_are_apart_and_of_the_size_asked():
    train, test = countdown.draw_sets(random.Random(0), 1024, 256)
    assert (len(train), len(test)) == (1024, 256)
    assert len({*train, *test}) == 1280
    for problem in [*train, *test]:
        assert list(problem.numbers) == sorted(problem.numbers)
        assert len(problem.numbers) in countdown.SIZES


def test_seed_gives_the_data():
    drawn = []
    for seed in (0, 0, 1):
        rng = random.Random(seed)
        train, test = countdown.draw_sets(rng, 50, 50)
        rows = countdown.make_rows(rng, "test", test)
        drawn.append((train, test, rows, countdown.work(rng, train[0])))
    assert drawn[0] == drawn[1] != drawn[2]


def test_possible_steps():
    assert countdown.possible_steps(12, 4) == [
        ("+", 4, 16),
        ("-", 4, 8),
        ("*", 4, 48),
        ("/", 4, 3),
    ]
    assert countdown.possible_steps(5, 1) == [("+", 1, 6), ("-", 1, 4)]
    for value in range(1, countdown.LARGEST_VALUE + 1):
        for number in range(1, countdown.LARGEST_NUMBER + 1):
            steps = countdown.possible_steps(value, number)
            assert steps
            for step in steps:
                assert OPERATORS[step.sign](value, number) == step.value
                assert 1 <= step.value <= countdown.LARGEST_VALUE


def test_a_try_is_written_in_both_ways():
    attempt = countdown.Try(15, [countdown.Step("+", 4, 19), countdown.Step("*", 2, 38)])
    assert (attempt.value, attempt.line) == (38, "15+4=19*2=38")
    assert attempt.expression == "(15+4)*2"


def test_the_teachers_work_is_right_line_by_line_and_scored_by_its_last_line():
    rng = random.Random(1)
    solved = 0
    for _ in range(500):
        problem = countdown.draw_problem(rng)
        row = {"numbers": list(problem.numbers), "target": problem.target}
        text = countdown.work(rng, problem)
        hit = countdown.HIT in text
        tries, _, _ = text.partition(countdown.HIT if hit else countdown.ENOUGH)
        lines = tries.split("\n")
        assert 1 <= len(lines) <= countdown.MOST_TRIES
        for line in lines:
            assert check_line(line) == list(problem.numbers)
        results = [int(line.rpartition("=")[2]) for line in lines]
        assert problem.target not in results[:-1]
        assert hit == (results[-1] == problem.target)
        assert countdown.reward(text, row) == (1.0 if hit else 0.0)
        solved += hit
    assert 0.1 < solved / 500 < 0.5


def check_line(line: str) -> list[int]:
    """Assert that a line like 15+4=19*2=38 is right; return its numbers in ascending order."""
    first, *rest = re.findall(r"\d+|[-+*/=]", line)
    assert "".join([first, *rest]) == line
    numbers = [int(first)]
    value = Fraction(first)
    for i in range(0, len(rest), 4):
        sign, number, equals, result = rest[i : i + 4]
        value = OPERATORS[sign](value, Fraction(number))
        assert equals == "="
        assert value == int(result)
        numbers.append(int(number))
    return sorted(numbers)


# ---------------------------------------------------------------------------------------------
# The reference


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Load the tokenizer as the stages do: AutoTokenizer chooses a class of its own."""
    folder = tmp_path_factory.mktemp("reference")
    made = countdown.make_tokenizer()
    made.save_pretrained(folder)
    countdown.make_model(made).config.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_each_number_and_the_instruction_are_one_token(tokenizer):
    row = {"numbers": [7, 15, 4], "target": 26}
    prompt = countdown.TEMPLATE.replace("{question}", countdown.question(row))
    # Make 26 from 7 , 15 , 4 instruction
    assert len(tokenizer(prompt).input_ids) == 9
    # 15 + 4 = 19 + 7 = 26 yes ( 15 + 4 ) + 7 }
    response = "15+4=19+7=26, yes:\n\\boxed{(15+4)+7}"
    assert len(tokenizer(response).input_ids) == 9 + 1 + 8
    for text in (prompt, response):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert tokenizer(text).input_ids == countdown.make_tokenizer()(text).input_ids
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_lengths_differ_by_a_factor_of_five(tokenizer):
    rng = random.Random(0)
    lengths = []
    for _ in range(1000):
        text = countdown.work(rng, countdown.draw_problem(rng))
        lengths.append(len(tokenizer(text).input_ids) + 1)
    lengths.sort()
    assert lengths[950] >= 5 * lengths[50]


def test_no_test_problem_is_learned_from_and_lessons_come_in_order(tokenizer):
    held_out = set()
    rng = random.Random(0)
    while len(held_out) < 200:
        held_out.add(countdown.draw_problem(rng, countdown.SIZES))
    counts = []
    for batch in countdown.draw_batches(rng, tokenizer, held_out, 16, 40):
        sizes = set()
        for ids, labels in zip(batch.ids, batch.labels, strict=True):
            kept = labels != -100
            prompt, _, instruction = tokenizer.decode(ids[: kept.int().argmax()]).partition("\n")
            target, *numbers = [int(number) for number in re.findall(r"\d+", prompt)]
            assert f"{{question}}\n{instruction}" == countdown.TEMPLATE
            assert countdown.Problem(tuple(sorted(numbers)), target) not in held_out
            assert tokenizer.decode(ids[kept]).endswith("}<|endoftext|>")
            sizes.add(len(numbers))
        counts.append(max(sizes))
    assert len(counts) >= 40
    share, sizes = countdown.LESSONS[0]
    first_lesson = math.ceil(share * 40)
    assert set(counts[:first_lesson]) <= set(sizes)
    assert max(counts[first_lesson:]) == max(countdown.SIZES)


# ---------------------------------------------------------------------------------------------
# The commands


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a small countdown; its reference has learned nothing yet."""
    folder = tmp_path_factory.mktemp("made")
    sizes = ["--num-steps=3", "--batch-size=4", "--num-train=20", "--num-test=10"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["countdown", "make", "--out", str(folder), *sizes])
        patch.setattr(torch, "set_num_threads", lambda number: None)  # it outlives the test
        countdown.main()
    return folder


def test_make_writes_rows_that_the_entry_turns_into_prompts(made, tokenizer, monkeypatch):
    assert sorted(path.name for path in made.iterdir()) == [
        "reference",
        "test.jsonl",
        "train.jsonl",
    ]
    assert set(read_jsonl(made / "train.jsonl")[0]) == {"id", "numbers", "target"}
    assert len(read_jsonl(made / "test.jsonl")) == 10
    task = dataclasses.replace(countdown.TASK, source=str(made / "{split}.jsonl"))
    monkeypatch.setitem(problems.DATASETS, "countdown", task)
    rows = problems.load_problems("countdown", "train")
    assert len(rows) == 20
    row = rows[3]
    style = problems.PromptStyle(task.template)
    prompt = problems.make_prompt(row, style, tokenizer)
    assert prompt.text.startswith(f"Make {row['target']} from {row['numbers'][0]}, ")
    assert problems.keep_gradable("countdown", rows) == (rows, [])
    row = row | {"numbers": [3, 4, 2], "target": 10}
    assert problems.submit_reward("\\boxed{3*4-2}", row).result() == 1.0
    assert problems.submit_reward("\\boxed{10}", row).result() == 0.0
    assert problems.reward_name("countdown") == "experiments.countdown.reward"


def test_make_does_not_write_over_a_reference(made, monkeypatch):
    arguments = ["--out", str(made), "--num-steps=1", "--num-train=2", "--num-test=2"]
    monkeypatch.setattr(sys, "argv", ["countdown", "make", *arguments])
    with pytest.raises(UserError, match="reference exists"):
        countdown.main()


@pytest.mark.parametrize("stage", countdown.STAGES)
def test_the_second_word_runs_a_stage_with_the_other_arguments(stage, monkeypatch):
    seen = []
    module = importlib.import_module(countdown.STAGES[stage])
    monkeypatch.setattr(module, "main", lambda: seen.append((list(sys.argv), countdown.TASK)))
    monkeypatch.setattr(sys, "argv", ["countdown.py", stage, "--seed", "3"])
    countdown.main()
    ((arguments, task),) = seen
    assert arguments[1:] == ["--seed", "3"]
    assert problems.DATASETS["countdown"] is task


def test_another_second_word_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["countdown.py", "train"])
    with pytest.raises(UserError, match="'train' is no command"):
        countdown.main()


def test_more_problems_than_there_are_is_refused(monkeypatch):
    only = countdown.Problem((1, 2, 7), 10)
    monkeypatch.setattr(countdown, "draw_problem", lambda rng: only)
    with pytest.raises(UserError, match="not 2 different problems"):
        countdown.draw_sets(random.Random(0), 1, 1)


def test_describe_wants_responses(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"id": 1}\n')
    monkeypatch.setattr(sys, "argv", ["countdown", "describe", str(tmp_path / "rows.jsonl")])
    with pytest.raises(UserError, match="has no responses"):
        countdown.main()


def test_as_a_command_the_reward_has_its_full_name():
    """Started with -m the module is called __main__, which no other program could look up."""
    code = (
        "import runpy, sys; sys.argv = ['countdown', '--help'];"
        "runpy.run_module('experiments.countdown', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code + "; from apo import problems;"]
    command[-1] += "print(problems.reward_name('countdown'))"
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert finished.stdout.splitlines()[-1] == "experiments.countdown.reward"


def test_describe_counts_tries_and_repeats(tmp_path, monkeypatch, capsys):
    outputs = [
        ("2+7=9+1=10, yes:\n\\boxed{(2+7)+1}", 1.0),
        ("2+7=9\n2*7=14\n2+7=9, enough:\n\\boxed{2+7}", 0.0),
    ]
    lines = [json.dumps({"output": output, "reward": reward}) for output, reward in outputs]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "argv", ["countdown", "describe", str(tmp_path / "samples.jsonl")])
    countdown.main()
    out = capsys.readouterr().out
    assert "2 responses" in out and "2.0 tries" in out and out.count("50.0%") == 3
