"""The values of beginnings and the loss by lines, against hand and brute force."""

import argparse
import sys
from types import SimpleNamespace

import pytest
import torch

import losses
from apo.engine import Response
from apo.files import UserError
from apo.policy import make_micro_batches
from apo.problems import Prompt
from experiments import forgetting, process

NEWLINE, EOS = 10, 0


def make_response(index: int, ids: list[int], reward: float = 1.0) -> Response:
    prompt = Prompt({"id": str(index), "answer": "5"}, "", [1, 2])
    response = Response(index, prompt, 0, ids, "", True, [])
    response.reward = reward
    response.numbers["v_star"] = 0.25
    return response


@pytest.mark.parametrize(
    ("ids", "ends"),
    [
        ([5, 10, 6, 7, 10, 8, 0], [2, 5, 7]),
        ([5, 6, 0], [3]),
        ([5, 10, 0], [2, 3]),
        ([5, 10], [2]),  # cut off: the newline is the last token, and no line follows
    ],
)
def test_lines_end_behind_newlines(ids, ends):
    assert process.line_ends(ids, NEWLINE) == ends


def test_targets_add_up_to_the_advantage():
    assert process.line_targets(1.0, 0.5, [0.25, 0.75]) == [-0.25, 0.5, 0.25]
    assert process.line_targets(1.0, 0.5, []) == [0.5]
    assert sum(process.line_targets(0.0, 0.3, [0.7, 0.1, 0.9])) == pytest.approx(-0.3)


@pytest.mark.parametrize("max_tokens", [8, 5])
def test_values_of_beginnings_by_hand(max_tokens, monkeypatch):
    """Two beginnings of the first response, one of the second, none of the third.

    With 5 tokens there is room for one behind the second beginning and for three behind the others.
    """
    responses = [
        make_response(0, [5, NEWLINE, 6, NEWLINE, 7, EOS]),
        make_response(1, [8, NEWLINE, 9, EOS]),
        make_response(2, [8, EOS]),
    ]
    seen = []
    # Of each beginning two continuations: token 20 is a right answer, 21 a wrong one.
    continuations = [[20, EOS], [21, EOS], [20, EOS], [20, 20], [21, 21, 21, EOS], [20, EOS]]

    def sample(ref, prompts, eos, max_tokens) -> forgetting.Responses:
        seen.extend(prompts)
        ids = torch.full((6, 9), EOS)
        for row, continuation in enumerate(continuations):
            ids[row, 5 : 5 + len(continuation)] = torch.tensor(continuation)
        lengths = torch.tensor([len(continuation) for continuation in continuations])
        return forgetting.Responses(ids, ids > 0, 5, lengths)

    def decode(ids) -> str:
        return r"\boxed{5}" if 20 in ids else r"\boxed{6}"

    monkeypatch.setattr(forgetting, "sample", sample)
    tokenizer = SimpleNamespace(eos_token_id=EOS, decode=decode)
    values, tokens = process.beginning_values(
        None, tokenizer, responses, NEWLINE, 2, max_tokens, 0.5
    )
    first, second = [1, 2, 5, NEWLINE], [1, 2, 5, NEWLINE, 6, NEWLINE]
    assert seen == [first, first, second, second, [1, 2, 8, NEWLINE], [1, 2, 8, NEWLINE]]
    # [20, 20] did not end, so it earns nothing.
    half = losses.optimal_value(torch.tensor([[1.0, 0.0]], dtype=torch.float64), 0.5).item()
    if max_tokens == 8:
        assert values == [pytest.approx([half, half]), pytest.approx([half]), []]
        assert tokens == [2 + 2 + 2 + 2, 4 + 2, 0]
    else:
        assert values == [pytest.approx([half, 0.0]), pytest.approx([half]), []]
        assert tokens == [2 + 2 + 1 + 1, 3 + 2, 0]


def test_a_run_cannot_be_resumed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["process", "--resume"])
    with pytest.raises(UserError, match="process cannot --resume"):
        process.main()


def test_resume_is_not_advised(monkeypatch, tmp_path):
    (tmp_path / "final").mkdir()
    monkeypatch.setattr(sys, "argv", ["process", "--values", "none.json", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="is not empty") as caught:
        process.main()
    assert "--resume" not in str(caught.value)


@pytest.fixture
def algorithm(monkeypatch):
    """The algorithm without a model: its values are given."""
    header = {"model": "m", "max_tokens": 8, "beta1": 0.5}
    data = SimpleNamespace(values=SimpleNamespace(header=header))

    def tokenizer(text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[NEWLINE])

    def no_model(*arguments, **more) -> SimpleNamespace:
        return SimpleNamespace(eval=lambda: None)

    monkeypatch.setattr(process.files, "model_folder", lambda name: name)
    monkeypatch.setattr(process.AutoTokenizer, "from_pretrained", lambda folder: tokenizer)
    monkeypatch.setattr(process.AutoModelForCausalLM, "from_pretrained", no_model)
    monkeypatch.setattr(
        process,
        "beginning_values",
        lambda ref, tokenizer, responses, *more: (
            [[0.5] * (len(process.line_ends(r.ids, NEWLINE)) - 1) for r in responses],
            [3 for _ in responses],
        ),
    )
    return process.process(argparse.Namespace(continuations=2, beta1=None, beta2=0.1), data)


@pytest.mark.usefixtures("process_group")
def test_the_loss_is_the_sum_over_the_lines(algorithm):
    """One line is A*-PO's own loss."""
    responses = [make_response(0, [5, NEWLINE, 6, 7, EOS]), make_response(1, [5, 6, EOS], 0.0)]
    algorithm.credit(responses)
    [batch] = make_micro_batches(responses, 1.0, 1000, 1)
    order = [response.index for response in batch.responses]
    logratio = {0: torch.tensor([1.0, 2, 3, 4, 5]), 1: torch.tensor([1.0, 1, 1])}
    batch.ref_logp = torch.full((8,), -1.0)
    token_logp = torch.cat([logratio[index] for index in order]) + batch.ref_logp
    found, statistics = algorithm.loss(batch, token_logp)
    by_index = dict(zip(order, found.tolist(), strict=True))
    lines = (0.1 * 3 - (0.5 - 0.25)) ** 2 + (0.1 * 12 - (1.0 - 0.5)) ** 2
    assert by_index[0] == pytest.approx(lines)
    assert by_index[1] == pytest.approx((0.1 * 3 - (0.0 - 0.25)) ** 2)
    assert statistics["ref_tokens"].tolist() == [3.0, 3.0]
    assert sorted(statistics["logratio"].tolist()) == pytest.approx([3, 15])
