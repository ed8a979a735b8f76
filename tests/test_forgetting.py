"""Responses sampled in padded batches, against one sequence at a time."""

import itertools

import pytest
import torch
from transformers import PreTrainedModel, Qwen2Tokenizer

from experiments import countdown, forgetting


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return countdown.make_tokenizer()


@pytest.fixture(scope="module")
def small(tokenizer) -> PreTrainedModel:
    torch.manual_seed(0)
    return countdown.make_model(tokenizer).eval()


def test_logprobs_are_those_of_one_sequence_at_a_time(small, tokenizer):
    """Also where EOS, which is the padding, is more likely than by chance."""
    eos = tokenizer.eos_token_id
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [14, 15]] * 8
    torch.manual_seed(1)
    responses = forgetting.sample(small, prompts, eos, 40)
    logprobs = forgetting.sequence_logprobs(small, responses)
    assert len(set(responses.lengths.tolist())) > 1
    for row, prompt in enumerate(prompts):
        length = int(responses.lengths[row])
        response = responses.ids[row, responses.start :][:length]
        assert eos not in response[:-1]
        assert length == 40 or response[-1] == eos
        ids = torch.cat([torch.tensor(prompt), response])
        with torch.no_grad():
            logp = small(ids[None]).logits[0].log_softmax(-1)
        expected = logp[len(prompt) - 1 : -1].gather(1, response[:, None]).sum()
        assert logprobs[row].item() == pytest.approx(expected.item(), abs=1e-3)


def test_a_model_is_compared_with_its_reference(small, tokenizer, tmp_path, monkeypatch):
    """Against itself the KL is 0; it is not after the weights have changed."""
    monkeypatch.setattr(forgetting, "NUM_SAMPLES", 2)
    monkeypatch.setattr(forgetting, "MAX_TOKENS", 8)
    for name in ("reference", "trained"):
        small.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    same = forgetting.measure(tmp_path / "trained", tmp_path / "reference", 0)
    assert same == {"kl": 0.0, "reward": 0.0}
    changed = countdown.make_model(tokenizer)
    changed.save_pretrained(tmp_path / "trained")
    other = forgetting.measure(tmp_path / "trained", tmp_path / "reference", 0)
    assert other["kl"] > 1.0


def test_the_other_problems_are_all_with_two_numbers():
    found = set()
    for a, b in itertools.product(range(1, 10), repeat=2):
        for value in (a + b, a * b if b > 1 else a):
            if 10 <= value <= countdown.LARGEST_VALUE:
                found.add(countdown.Problem((min(a, b), max(a, b)), value))
    assert forgetting.other_problems() == sorted(found)
