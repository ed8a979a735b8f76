"""The speed experiment: its arithmetic, what it counts and draws. No time is asserted anywhere."""

import json
import statistics

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

import losses
from experiments import engine, speed
from problems import UserError


def phases(**seconds: float) -> dict[str, float]:
    filled = dict.fromkeys(speed.PHASES, 0.0) | seconds
    return filled | {"total": sum(filled.values())}


def test_a_ratio_is_of_the_same_step():
    """A busy minute doubles a step and its floor; a ratio of medians would show it, or hide one."""
    real = [phases(generate=2.2, rest=0.0), phases(generate=1.1), phases(generate=4.4)]
    floor = [phases(generate=2.0), phases(generate=1.0), phases(generate=4.0)]
    rows = speed.medians(real, floor)
    assert rows["generate"] == {"seconds": 2.2, "floor": 2.0, "ratio": pytest.approx(1.1)}
    assert rows["total"]["ratio"] == pytest.approx(1.1)
    assert "ratio" not in rows["grade"]  # it has no floor


def test_rates_count_what_each_phase_does():
    """Backward is two forwards; a rank does its share; MFU is over the measured matrix rate."""
    seconds = {"generate": 1.0, "ref log-prob": 1.0, "forward and backward": 3.0, "sync": 1.0}
    rows = speed.medians([phases(**seconds)], [phases(**seconds)])
    mfu = speed.add_rates(rows, fed=600, drawn=300, flops=8e12, world=2, rate=8e12)
    assert mfu == pytest.approx(0.5)
    assert rows["forward and backward"]["mfu"] == pytest.approx(0.5)
    assert rows["ref log-prob"]["tflops"] == pytest.approx(4)
    assert rows["ref log-prob"]["tokens_per_second"] == 600
    assert rows["generate"]["tokens_per_second"] == 300
    assert rows["total"]["tokens_per_second"] == 50
    text = speed.table(rows)
    assert len(text) == 1 + len(rows) and "50.0%" in text[4] and "nan" not in "".join(text)


def test_forward_flops_are_those_that_torch_counts():
    """Torch counts attention in full where a causal one does half, and every row of the head."""
    config = Qwen2Config(**speed.TINY, attn_implementation="eager")
    lm, length = Qwen2ForCausalLM(config), 24
    with FlopCounterMode(display=False) as counter:
        lm(torch.zeros(1, length, dtype=torch.long))
    pairs = 2 * config.hidden_size * config.num_hidden_layers * length**2
    rows_of_head = 2 * config.hidden_size * config.vocab_size * (length - 5)
    expected = counter.get_total_flops() - pairs - rows_of_head
    assert speed.forward_flops(lm, [(length + 1 - 5, 5)]) == expected


def test_the_floor_computes_the_same_log_probs(monkeypatch):
    """A floor that left something out would flatter nobody but the table."""
    from transformers import AttentionInterface

    AttentionInterface.register("packed", losses.packed_attention)
    config = Qwen2Config(**speed.TINY, attn_implementation="packed")
    lm = Qwen2ForCausalLM(config)
    inputs, _ = losses.pack([[1, 2, 3], [4]], [[5, 6], [7, 8, 9, 10]])
    inputs |= {"temperature": 0.7}
    plain = speed.bare_logprob(lm, inputs)
    monkeypatch.setattr(speed, "MOST_LOGITS", 0)
    torch.testing.assert_close(speed.bare_logprob(lm, inputs), plain)
    lm.set_attn_implementation("eager")
    logits = lm(torch.tensor([[1, 2, 3, 5]])).logits[0, 2:] / 0.7
    expected = logits.log_softmax(-1).gather(1, torch.tensor([[5], [6]]))[:, 0]
    torch.testing.assert_close(plain[:2], expected, atol=1e-4, rtol=1e-4)


def test_a_phase_inside_another_is_taken_out_of_it(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(speed.Stopwatch, "clock", staticmethod(lambda: next(now)))
    watch = speed.Stopwatch()
    watch.switch("generate")
    watch.inside("optimiser", lambda: None)()
    watch.switch()
    watch.switch("sync")
    watch.switch()
    assert watch.seconds == {"generate": 2, "optimiser": 1, "sync": 1}


def test_turns_alternate():
    done = []
    for number in range(2):
        speed.in_turns(number, lambda: done.append("floor"), lambda: done.append("real"))
    assert done == ["floor", "real", "real", "floor"]


def test_lengths_have_a_long_tail():
    lengths = speed.long_tail(4096, 300, 1024, seed=0)
    assert statistics.mean(lengths) == pytest.approx(300, rel=0.01)
    assert statistics.median(lengths) < 225 and max(lengths) == 1024 and min(lengths) >= 1
    assert lengths == speed.long_tail(4096, 300, 1024, seed=0)


@pytest.mark.parametrize("num_ranks", [1, 8])
def test_hardly_a_row_is_computed_in_vain(num_ranks):
    lengths = speed.long_tail(256, 300, 1024, seed=1)
    assert speed.padding(lengths, 100, num_ranks, 8192)["padding"] <= 1.05


def test_padding_counts_micro_batches_without_a_share():
    """One sequence for two ranks: the second computes it as well, for nothing."""
    assert speed.padding([10], 5, 2, 8192)["padding"] == 2
    assert speed.padding([10, 4], 5, 1, 8192)["padding"] == 1


def test_log_prob_takes_a_fraction_of_plain_logits():
    """Measured small, in processes of their own: 96 MiB of logits, a chunk is a sixteenth."""
    rows = speed.compare_logprob([64], (1024, 24_000, 64))
    assert rows[64]["ratio"] < 0.5 and rows[64]["error"] < 1e-5, rows
    assert rows[0]["gib"] > 2 * 1024 * 24_000 * 4 / 2**30, rows


def test_every_part_of_the_engine_is_timed(run, model, dataset, tmp_path):
    """A function that the engine no longer calls by that name would leave its part at nothing."""
    arguments = ("--model", model, "--dataset", dataset, "--prompts", "4", "--batch-size", "4")
    limits = ("--max-prompt-tokens", "160", "--max-tokens", "48", "--rounds", "1")
    told = run("-m", "experiments.engine", *arguments, *limits, "--out", tmp_path / "engine")
    assert told.code == 0, told.all
    results = json.loads((tmp_path / "engine.json").read_text())
    first, second = (load for load in results.values() if isinstance(load, dict))
    for load in (first, second):
        assert all(load[part] > 0 for part in engine.PARTS), load
        assert sum(load[part] for part in engine.PARTS) == pytest.approx(load["total"])
    assert first["tokens"] > second["tokens"] >= 4 and second["steps"] > 4


def test_mistakes_are_told(monkeypatch):
    with pytest.raises(UserError, match="no shape 70b"):
        speed.shape_of("70b")
    monkeypatch.setattr("sys.argv", ["speed", "--model", "m"])
    with pytest.raises(UserError, match="--model and --values, or --shape"):
        speed.check(speed.parse_args())
