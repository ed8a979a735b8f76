"""The memory simulation: the shapes are the published ones, and what must save memory does."""

import functools
from types import SimpleNamespace

import pytest

from experiments import memory
from problems import UserError

PUBLISHED = {"0.5b": 0.49e9, "1.5b": 1.54e9, "3b": 3.09e9, "7b": 7.62e9, "14b": 14.8e9}
PUBLISHED |= {"32b": 32.8e9}


@functools.cache
def peak(gpus: int = 8, tokens: int = 2048, checkpointing: bool = True) -> int:
    """Peak bytes of two layers of 0.5B, in half a second."""
    return memory.simulate("0.5b", gpus, tokens, checkpointing, num_hidden_layers=2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_are_the_published_ones(name):
    """A wrong shape would make every number of the table wrong, and nothing would look odd."""
    count = memory.num_parameters(memory.config(name))
    assert count == pytest.approx(PUBLISHED[name], rel=0.01)


def test_peak_is_above_its_floor():
    """Float32 weights and gradients at least; a tracker that loses sight of them shows less."""
    count = memory.num_parameters(memory.config("0.5b", num_hidden_layers=3))
    assert peak() > 8 * count / 8
    assert peak(gpus=1) > 8 * count


def test_more_gpus_need_less_and_more_replicas_no_less():
    one, two, eight, sixteen, many = (peak(gpus) for gpus in (1, 2, 8, 16, 64))
    assert one > two > eight
    assert eight <= sixteen == many


def test_checkpointing_needs_less():
    assert peak() < peak(checkpointing=False)


def test_memory_is_linear_in_tokens():
    """A (T, T) mask, padding or (T, V) logits would show as more than the same step twice."""
    one, two, three = (peak(tokens=n, checkpointing=False) for n in (2048, 4096, 6144))
    assert three - two == pytest.approx(two - one, rel=0.01)
    logits = 2048 * memory.config("0.5b").vocab_size * 4
    assert peak(tokens=4096) - peak(tokens=2048) < logits / 5


def test_account_adds_what_is_not_simulated():
    """7.6e9 parameters on 8 GPUs: 8 bytes of AdamW, 2 of the reference, 2 whole of the engine."""
    cell = memory.account("7b", 8, 10 * 2**30, offload_ref=False, tensor_parallel=1)
    count = cell["parameters"]
    assert cell["peak_gib"] == pytest.approx(10 + (count + count / 4 + 2 * count) / 2**30)
    # 28 layers, 4 KV heads of 128: 57,344 bytes a token; 4 + 8 + 2 bytes a parameter are sharded
    room = 80e9 - 14 * count / 8 - 2 * count
    assert cell["fits"] and cell["kv_tokens"] == int(room / 57_344)
    offloaded = memory.account("7b", 8, 10 * 2**30, offload_ref=True, tensor_parallel=1)
    assert cell["peak_gib"] - offloaded["peak_gib"] == pytest.approx(cell["ref_gib"])
    assert not memory.account("32b", 1, 0, offload_ref=True, tensor_parallel=1)["fits"]


def test_tables_mark_what_does_not_fit():
    args = SimpleNamespace(shapes=["qwen2.5-7b"], gpus=[1, 8], tokens=8192)
    args.tensor_parallel_size, args.offload_ref = 1, False
    found = []
    for gpus, gib, checkpointing in ((1, 66, True), (8, 16, True), (8, 61, False)):
        cell = memory.account("qwen2.5-7b", gpus, gib * memory.GIB, False, 1)
        found.append(cell | {"checkpointing": checkpointing})
    peaks, caches, parts = (x for x in memory.tables(found, args) if x.startswith("| qwen"))
    assert peaks == "| qwen2.5-7b | ✗ 151.1 | 39.1 |"
    assert caches == "| qwen2.5-7b | ✗ | 897k |"
    assert parts.endswith("| 39.1 | ✗ 84.1 |")


def test_an_unknown_shape_is_named():
    with pytest.raises(UserError, match="no shape 70b"):
        memory.config("70b")
