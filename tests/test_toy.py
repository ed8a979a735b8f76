"""The toy: what its reference learns from and what it is tested on. (`make demo` trains it.)"""

import random
import sys
import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from apo import math_reward
from apo.files import UserError, read_json, read_jsonl
from apo.problems import format_prompt
from experiments import toy


def draw_every_kind() -> list[toy.Problem]:
    """Draw one problem of each number of digits, short ones first."""
    rng = random.Random(0)
    by_digits = {}
    for _ in range(500):
        problem = toy.draw_problem(rng)
        by_digits[len(str(problem.a))] = problem
    return [by_digits[digits] for digits in sorted(by_digits)]


EVERY_KIND = draw_every_kind()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Load the tokenizer as the stages do: AutoTokenizer chooses a class of its own."""
    folder = tmp_path_factory.mktemp("reference")
    made = toy.make_tokenizer()
    made.save_pretrained(folder)
    toy.make_model(made).config.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_every_kind_is_drawn():
    assert len(EVERY_KIND) == len(toy.BAD_DAYS)


@pytest.mark.parametrize("problem", EVERY_KIND, ids=lambda p: p.question)
def test_careful_teacher_earns_the_reward(problem):
    assert math_reward.reward(toy.work(problem, bad_day=False), problem.answer) == 1.0


def test_a_bad_day_gives_a_wrong_answer_wherever_something_is_carried():
    rng = random.Random(1)
    for _ in range(2000):
        problem = toy.draw_problem(rng)
        careful = toy.work(problem, bad_day=False)
        forgetful = toy.work(problem, bad_day=True)
        assert careful.endswith(f"\\boxed{{{problem.answer}}}")
        assert forgetful.endswith(f"\\boxed{{{problem.answer}}}") == (careful == forgetful)


@pytest.mark.parametrize(
    ("problem", "careful", "forgetful"),
    [
        ((358, 267), "8+7=15 5+6+1=12 3+2+1=6 {625}", "8+7=15 5+6=11 3+2=5 {515}"),
        ((99, 99), "9+9=18 9+9+1=19 {198}", "9+9=18 9+9=18 {188}"),
        ((4, 5), "4+5=9 {9}", "4+5=9 {9}"),
    ],
)
def test_worked_by_hand(problem, careful, forgetful):
    for bad_day, lines in (False, careful), (True, forgetful):
        text = toy.work(toy.Problem(*problem), bad_day)
        assert text == lines.replace(" ", "\n").replace("{", "\\boxed{")


@settings(deadline=None)
@given(st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    """Up to Unicode's NFC, to which Qwen's tokenizer normalizes."""
    text = unicodedata.normalize("NFC", text.replace("<|endoftext|>", ""))
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_saved_tokenizer_splits_as_the_one_trained_with(tokenizer):
    for problem in EVERY_KIND:
        for text in format_prompt(problem.question), toy.work(problem, False):
            ids = tokenizer(text).input_ids
            assert ids == toy.make_tokenizer()(text).input_ids
            digits = [character for character in text if character.isdigit()]
            assert [t for t in tokenizer.convert_ids_to_tokens(ids) if t.isdigit()] == digits
    assert len(tokenizer(format_prompt("")).input_ids) == 1
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_lengths_differ_by_a_factor_of_four(tokenizer):
    lengths = [len(tokenizer(toy.work(p, False)).input_ids) + 1 for p in EVERY_KIND]
    assert max(lengths) >= 4 * min(lengths)


def test_test_problems_are_in_neither_training_set(tokenizer):
    train, test = toy.draw_sets(random.Random(0), 200, 100)
    assert len({*train, *test}) == 300
    rng = random.Random(0)
    prompts = {tuple(tokenizer(format_prompt(p.question)).input_ids) for p in test}
    batches = toy.draw_batches(rng, tokenizer, set(test), 64)
    seen = set()
    for _ in range(60):
        batch = next(batches)
        prompt_lengths = (batch.labels != -100).int().argmax(1)
        for ids, length in zip(batch.ids, prompt_lengths, strict=True):
            seen.add(tuple(ids[:length].tolist()))
    assert len(seen) > 2000
    assert not seen & prompts


def test_labels_are_the_response_and_its_eos(tokenizer):
    """EOS is also the padding: one EOS, and only one, has to be learned."""
    ids, labels = next(toy.draw_batches(random.Random(0), tokenizer, set(), 64))
    for row, label in zip(ids, labels, strict=True):
        kept = label != -100
        assert torch.equal(row[kept], label[kept])
        assert tokenizer.decode(label[kept]).count("<|endoftext|>") == 1
        assert tokenizer.decode(row[: int(kept.int().argmax())]).endswith("\\boxed{}.\n")


def test_seed_gives_the_data():
    sets = [toy.draw_sets(random.Random(seed), 50, 50) for seed in (0, 0, 1)]
    assert sets[0] == sets[1] != sets[2]


def make_toy(folder, monkeypatch, *flags: str) -> None:
    """Make a toy of two steps. `make demo` measures what the reference learns."""
    sizes = ["--num-steps=2", "--batch-size=4", "--num-train=20", "--num-test=10"]
    monkeypatch.setattr(sys, "argv", ["toy", "--out", str(folder), *sizes, *flags])
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # it outlives the test
    toy.main()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make a toy of seed 0 once for the tests that only look at it."""
    folder = tmp_path_factory.mktemp("made") / "toy"
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_toy(folder, monkeypatch)
    return folder


def contents(folder) -> dict[str, tuple[int, bytes]]:
    """Return every file below a folder with its time and its bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_toy_is_written_and_loads(made):
    names = sorted(path.name for path in made.iterdir())
    assert names == ["reference", "settings.json", "test.jsonl", "train.jsonl"]
    rows = read_jsonl(made / "test.jsonl")
    assert len(rows) == 10 and set(rows[0]) == {"id", "question", "answer"}
    assert len(read_jsonl(made / "train.jsonl")) == 20
    assert read_json(made / "settings.json")["seed"] == 0
    AutoModelForCausalLM.from_pretrained(made / "reference")
    AutoTokenizer.from_pretrained(made / "reference")


def test_same_seed_gives_the_same_weights_and_shows_its_progress(
    made, tmp_path, monkeypatch, capsys
):
    make_toy(tmp_path / "again", monkeypatch, "--keep")  # there is nothing to keep
    out = capsys.readouterr().out
    assert "step    1 of 2" in out and "s left" in out
    assert "20 training and 10 test problems" in out
    make_toy(tmp_path / "other", monkeypatch, "--seed=1")
    weights = "reference/model.safetensors"
    first = (made / weights).read_bytes()
    assert first == (tmp_path / "again" / weights).read_bytes()
    assert first != (tmp_path / "other" / weights).read_bytes()


def test_keep_leaves_a_toy_of_the_same_settings_as_it_is(made, monkeypatch, capsys):
    before = contents(made)
    make_toy(made, monkeypatch, "--keep")
    assert "kept" in capsys.readouterr().out
    assert contents(made) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep", "--seed=1"], "seed 0, not 1"),
        (["--keep", "--num-steps=3"], "num_steps 2, not 3"),
        ([], "reference exists"),
    ],
)
def test_another_toy_in_the_folder_is_refused_and_left_alone(made, monkeypatch, flags, message):
    before = contents(made)
    with pytest.raises(UserError, match=message):
        make_toy(made, monkeypatch, *flags)
    assert contents(made) == before


@pytest.mark.parametrize("name", ["settings.json", "train.jsonl", "test.jsonl"])
def test_keep_wants_a_complete_toy(tmp_path, monkeypatch, name):
    (tmp_path / "reference").mkdir()
    for each in {"settings.json", "train.jsonl", "test.jsonl"} - {name}:
        (tmp_path / each).touch()
    with pytest.raises(UserError, match=name):
        make_toy(tmp_path, monkeypatch, "--keep")
