"""The memory simulation: published shapes, and what must save memory does."""

import functools
import sys

import pytest

from apo.files import UserError
from experiments import memory

PUBLISHED = {
    "0.5b": 0.49e9,
    "1.5b": 1.54e9,
    "3b": 3.09e9,
    "7b": 7.62e9,
    "14b": 14.8e9,
    "32b": 32.8e9,
}


@functools.cache
def peak(num_gpus: int = 8, num_tokens: int = 2048, checkpointing: bool = True) -> int:
    """Simulate two layers of 0.5B, in a second or two."""
    return memory.simulate("0.5b", num_gpus, num_tokens, checkpointing, num_hidden_layers=2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_are_the_published_ones(name: str):
    """A wrong shape would make every number of the table wrong, and nothing would look odd."""
    count = memory.count_parameters(memory.make_config(name))
    assert count == pytest.approx(PUBLISHED[name], rel=0.01)


def test_the_peak_of_a_few_tokens_is_that_of_the_weights():
    """4 bytes a parameter of weights and 4 of gradients, and what FSDP gathers and reduces."""
    count = memory.count_parameters(memory.make_config("0.5b", num_hidden_layers=2))
    assert 8 * count < peak(num_gpus=1, num_tokens=16) < 16 * count
    assert peak(num_gpus=8, num_tokens=16) > 8 * count / 8


def test_more_gpus_need_less_and_more_replicas_no_less():
    eight, sixteen, many = (peak(num_gpus) for num_gpus in (8, 16, 64))
    assert peak(num_gpus=1) > eight
    assert eight <= sixteen == many


def test_checkpointing_needs_less():
    assert peak() < peak(checkpointing=False)


def test_memory_is_linear_in_tokens():
    """A (T, T) mask would show as a difference of differences; (T, V) logits as a large one."""
    one, two, three = (peak(num_tokens=n, checkpointing=False) for n in (2048, 4096, 6144))
    assert three - two == pytest.approx(two - one, rel=0.01)
    logits = 2048 * memory.make_config("0.5b").vocab_size * 4
    assert peak(num_tokens=4096) - peak() < logits / 5


def test_adapters_need_less_and_the_frozen_weights_are_bf16():
    """2 bytes a parameter, and next to nothing for gradients. It takes peft."""
    pytest.importorskip("peft")
    count = memory.count_parameters(memory.make_config("0.5b", num_hidden_layers=2))
    adapted = memory.simulate("0.5b", 1, 16, True, lora_rank=4, num_hidden_layers=2)
    assert 2 * count < adapted < peak(num_gpus=1, num_tokens=16) - 4 * count


@pytest.fixture
def fixed_peak(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let every simulation return 16 GiB, and note what was simulated."""
    gib = 16 * memory.GIB
    monkeypatch.setattr(memory, "simulate_once", lambda *arguments: gib)
    return gib


def test_a_case_adds_what_is_not_simulated(fixed_peak: int):
    """7.6e9 parameters on 8 GPUs: AdamW 8 bytes, the reference 2, the engine 2 and unsharded."""
    case = memory.simulate_command(memory.Command("qwen2.5-7b", 8, 80, ""))
    count = case.parameters
    known = 8 * count / 8 + 2 * count / 8 + 2 * count
    assert case.budget.training == pytest.approx(fixed_peak + known, abs=64)
    assert case.fits
    flags = "--offload-ref --tensor-parallel-size 2"
    less = memory.simulate_command(memory.Command("qwen2.5-7b", 8, 80, flags))
    assert case.budget.training - less.budget.training == pytest.approx(1.25 * count, abs=64)
    assert not memory.simulate_command(memory.Command("qwen2.5-7b", 8, 24, "")).fits


def test_flags_reach_the_simulation(monkeypatch: pytest.MonkeyPatch):
    """The memory in the documents is of the very flags that stand beside it."""
    simulated = []
    monkeypatch.setattr(memory, "simulate_once", lambda *a: simulated.append(a) or 2**34)
    monkeypatch.setattr(memory.lora, "check", lambda *a: None)
    flags = "--gradient-checkpointing --micro-batch-tokens 4096 --lora-rank 8"
    memory.simulate_command(memory.Command("qwen2.5-1.5b", 64, 80, flags))
    memory.simulate_command(memory.Command("qwen2.5-1.5b", 1, 80, ""))
    assert simulated[0] == ("qwen2.5-1.5b", 16, 4096, True, 8), "two machines stand for all"
    assert simulated[1] == ("qwen2.5-1.5b", 1, 8192, False, 0)


def test_tables_mark_what_does_not_fit(fixed_peak: int):
    commands = [memory.Command("qwen2.5-7b", n, card, "") for n, card in ((8, 80), (8, 40))]
    cases = [memory.simulate_command(command) for command in commands]
    fits, too_large = (line for line in memory.describe_cases(cases) if line.startswith("| 8 x"))
    assert "| yes |" in fits and "✗" not in fits
    assert "✗" in too_large
    assert memory.format_peak(cases[0]) == "39.1"
    assert memory.format_peak(cases[1]) == "✗ 39.1"


def test_what_is_no_flag_of_either_is_refused(monkeypatch: pytest.MonkeyPatch, capsys):
    arguments = ["memory", "--shapes", "7b", "--gpus", "8", "--gradient-checkpointing"]
    monkeypatch.setattr(sys, "argv", arguments)
    args, flags = memory.parse_args()
    assert args.shapes == ["qwen2.5-7b"] and args.gpus == [8]
    assert flags == "--gradient-checkpointing"
    monkeypatch.setattr(sys, "argv", [*arguments, "--no-such-flag"])
    with pytest.raises(SystemExit):
        memory.parse_args()
    assert "--no-such-flag" in capsys.readouterr().err


def test_an_unknown_shape_is_named():
    with pytest.raises(UserError, match="no shape 70b"):
        memory.make_config("70b")
