"""The toy: what its reference learns from and what it is tested on. (`make demo` trains it.)"""

import random
import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

import problems
from experiments import toy

EVERY_KIND = [
    problem
    for _, problem in sorted(
        {len(str(p.a)): p for p in map(toy.draw_problem, [random.Random(0)] * 500)}.items()
    )
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As the stages load it: AutoTokenizer puts its own class in the place of the one saved."""
    folder = tmp_path_factory.mktemp("reference")
    made = toy.make_tokenizer()
    made.save_pretrained(folder)
    toy.make_model(made).config.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_every_kind_is_drawn():
    assert len(EVERY_KIND) == len(toy.BAD_DAYS)


@pytest.mark.parametrize("problem", EVERY_KIND, ids=lambda p: p.question)
def test_careful_teacher_earns_the_reward(problem):
    assert problems.reward(toy.work(problem, bad_day=False), problem.answer) == 1.0


def test_careful_teacher_is_right_and_forgetful_teacher_wrong_where_something_is_carried():
    rng = random.Random(1)
    for problem in (toy.draw_problem(rng) for _ in range(2000)):
        careful, forgetful = toy.work(problem, False), toy.work(problem, True)
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


@given(st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    """Up to Unicode's NFC, to which Qwen's tokenizer normalizes."""
    text = unicodedata.normalize("NFC", text.replace("<|endoftext|>", ""))
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_saved_tokenizer_splits_as_the_one_trained_with(tokenizer):
    for problem in EVERY_KIND:
        for text in problems.format_prompt(problem.question), toy.work(problem, False):
            ids = tokenizer(text).input_ids
            assert ids == toy.make_tokenizer()(text).input_ids
            digits = [character for character in text if character.isdigit()]
            assert [t for t in tokenizer.convert_ids_to_tokens(ids) if t.isdigit()] == digits
    assert len(tokenizer(problems.format_prompt("")).input_ids) == 1
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_lengths_differ_by_a_factor_of_four(tokenizer):
    lengths = [len(tokenizer(toy.work(p, False)).input_ids) + 1 for p in EVERY_KIND]
    assert max(lengths) >= 4 * min(lengths)


def test_test_problems_are_in_neither_training_set(tokenizer):
    train, test = toy.draw_sets(random.Random(0), 200, 100)
    assert len({*train, *test}) == 300
    rng = random.Random(0)
    prompts = {tuple(tokenizer(problems.format_prompt(p.question)).input_ids) for p in test}
    batches = toy.draw_batches(rng, tokenizer, set(test), 64)
    seen = set()
    for ids, labels in (next(batches) for _ in range(60)):
        lengths = (labels != -100).int().argmax(1)
        seen |= {tuple(row[:n].tolist()) for row, n in zip(ids, lengths, strict=True)}
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


def test_folder_in_use_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "reference").mkdir()
    monkeypatch.setattr("sys.argv", ["toy", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        problems.run(toy.main)
    assert exit_.value.code == 2
    assert "reference exists" in capsys.readouterr().err


def test_toy_is_written_whole_and_loads(tmp_path, monkeypatch, capsys):
    """Two steps only. What the reference learns is measured by `make demo`."""
    sizes = ["--num-steps=2", "--batch-size=4", "--num-train=20", "--num-test=10"]
    monkeypatch.setattr("sys.argv", ["toy", "--out", str(tmp_path / "toy"), *sizes])
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)  # it outlives the test
    toy.main()
    assert sorted(p.name for p in (tmp_path / "toy").iterdir()) == [
        "reference", "test.jsonl", "train.jsonl",
    ]  # fmt: skip
    rows = problems.load_problems(str(tmp_path / "toy" / "test.jsonl"))
    assert len(rows) == 10 and set(rows[0]) == {"id", "question", "answer"}
    assert "20 training and 10 test problems" in capsys.readouterr().out
