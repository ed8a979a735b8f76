"""The speed experiment: what it compares, counts and draws. How fast it is is not asserted."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

from apo import policy
from apo.engine import Response
from apo.problems import Prompt
from experiments import speed

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 300,
    "tie_word_embeddings": True,
}


def step_seconds(**seconds: float) -> dict[str, float]:
    return dict.fromkeys(speed.PARTS, 0.0) | seconds


def test_a_ratio_is_of_the_same_step():
    """A busy minute doubles a step and its floor. A ratio of medians would show it, or hide one."""
    real = [step_seconds(generate=g, grade=0.5) for g in (2.2, 1.1, 8.8)]
    floor = [step_seconds(generate=g) for g in (2.0, 1.0, 4.0)]
    rows = speed.make_rows(real, floor)
    assert rows["generate"] == speed.Row(2.2, 2.0, pytest.approx(1.1))
    assert rows["grade"] == speed.Row(0.5, 0.0, None)
    assert rows["total"] == speed.Row(2.7, 2.0, pytest.approx(1.6))


def test_the_real_thing_and_its_floor_take_turns():
    done = []
    for number in range(2):
        speed.in_turns(number, lambda: done.append("floor"), lambda: done.append("real"))
    assert done == ["floor", "real", "real", "floor"]


def test_forward_flops_are_those_that_torch_counts():
    """Torch counts attention in full, where a causal one does half, and every row of the head."""
    lm = Qwen2ForCausalLM(Qwen2Config(**TINY, attn_implementation="eager"))
    length = 24
    response_length = 5
    with FlopCounterMode(display=False) as counter:
        lm(torch.zeros(1, length, dtype=torch.long))
    other_half = 2 * TINY["hidden_size"] * TINY["num_hidden_layers"] * length**2
    prompt_rows = 2 * TINY["hidden_size"] * TINY["vocab_size"] * (length - response_length)
    expected = counter.get_total_flops() - other_half - prompt_rows
    # The last token of a response is not put in.
    prompt = Prompt({}, "", [0] * (length + 1 - response_length))
    response = Response(0, prompt, 0, [0] * response_length, "", True, [])
    assert speed.forward_flops(lm, [response]) == expected


def test_the_floor_computes_the_same_log_probs(monkeypatch: pytest.MonkeyPatch):
    """A floor that left something out would make our ratio look bad."""
    AttentionInterface.register("packed", policy.packed_attention)
    lm = Qwen2ForCausalLM(Qwen2Config(**TINY, attn_implementation="packed"))
    inputs, _ = policy.pack([[1, 2, 3], [4]], [[5, 6], [7, 8, 9, 10]])
    inputs["temperature"] = 0.7
    expected = policy.Policy(lm)(**inputs)
    torch.testing.assert_close(speed.bare_logprob(lm, inputs), expected)
    monkeypatch.setattr(speed, "MOST_LOGITS", 0)
    torch.testing.assert_close(speed.bare_logprob(lm, inputs), expected)


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
def test_padding_counts_what_the_trainer_computes(num_ranks: int, monkeypatch: pytest.MonkeyPatch):
    """For 5 sequences on 8 ranks, 3 ranks compute a copy of the first one."""
    prompt = Prompt({}, "", [0] * 10)
    responses = [Response(i, prompt, 0, [0] * (i + 1), "", True, [], 0.0) for i in range(5)]
    lengths = [policy.num_input_tokens(response) for response in responses]
    computed = 0
    for rank in range(num_ranks):
        monkeypatch.setattr(policy.dist, "get_world_size", lambda: num_ranks)
        monkeypatch.setattr(policy.dist, "get_rank", lambda rank=rank: rank)
        for batch in policy.make_micro_batches(responses, 1.0, 25):
            computed += batch.inputs["input_ids"].numel()
    assert speed.padding(lengths, num_ranks, 25) == pytest.approx(computed / sum(lengths))


def test_log_prob_takes_a_fraction_of_plain_logits():
    """Measured small, in own processes: 187 MiB of logits, of which a chunk is a quarter."""
    data, lines = speed.measure_logprob(num_tokens=2048, num_words=24_000)
    assert 0.1 < data["logprob_memory_ratio"] < 0.6, lines
    assert 0 < data["logprob_error"] < 1e-5, lines


def test_every_part_of_a_step_is_measured(run: Callable, tmp_path: Path):
    """A part that the trainer no longer does by that name would leave its row at nothing."""
    config = Qwen2Config(**TINY)
    values = speed.make_random_model(
        config, num_prompts=8, max_tokens=12, folder=tmp_path / "model"
    )
    told = run(
        "-m",
        "experiments.speed",
        *("--values", values, "--batch-size", "4", "--num-steps", "2", "--stage1-prompts", "2"),
        *("--logprob-tokens", "0", "--results", tmp_path / "speed"),
    )
    assert told.code == 0, told.all
    results = json.loads((tmp_path / "speed.json").read_text())
    assert results["parts"].keys() == {*speed.PARTS, "total"}
    for part, row in results["parts"].items():
        assert row["seconds"] > 0, part
        assert (row["floor"] > 0) == (part not in ("grade", "pack")), part
    assert results["stage1_over_engine"] > 0
    # 4 responses of 12 tokens: a model of random weights hardly ever says EOS.
    tokens = results["tokens_per_second"] * results["parts"]["total"]["seconds"]
    assert 24 < round(tokens, 6) <= 48
    assert "step_over_floor" in results and "A step, median of 2" in told.out
