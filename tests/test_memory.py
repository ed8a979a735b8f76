"""The memory simulation: published shapes, and what must save memory does."""

import functools
from types import SimpleNamespace

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


def test_a_case_adds_what_is_not_simulated():
    """7.6e9 parameters on 8 GPUs: AdamW 8 bytes, the reference 2, the engine 2 and unsharded."""
    options = {"num_tokens": 8192, "checkpointing": True, "trainer": 10 * 2**30}
    case = memory.make_case("qwen2.5-7b", 8, **options, offload_ref=False, tensor_parallel=1)
    count = case.parameters
    assert case.peak_gib == pytest.approx(10 + (count + count / 4 + 2 * count) / 2**30)
    # 28 layers, 4 KV heads of 128, keys and values of 2 bytes: 57,344 bytes a token. While the
    # engine samples, 4 + 8 + 2 bytes a parameter are sharded over the GPUs.
    room = 80e9 - 14 * count / 8 - 2 * count
    assert case.fits
    assert case.kv_tokens == int(room / 57_344)

    offloaded = memory.make_case("qwen2.5-7b", 8, **options, offload_ref=True, tensor_parallel=1)
    assert case.peak_gib - offloaded.peak_gib == pytest.approx(case.ref_gib)
    alone = memory.make_case("qwen2.5-32b", 1, **options, offload_ref=True, tensor_parallel=1)
    assert not alone.fits
    assert alone.kv_tokens == 0


def test_tables_mark_what_does_not_fit():
    args = SimpleNamespace(
        shapes=["qwen2.5-7b"],
        gpus=[1, 8],
        tokens=8192,
        tensor_parallel_size=1,
        offload_ref=False,
    )
    cases = []
    for num_gpus, gib, checkpointing in ((1, 66, True), (8, 16, True), (8, 61, False)):
        cases.append(
            memory.make_case(
                "qwen2.5-7b", num_gpus, 8192, checkpointing, gib * memory.GIB, False, 1
            )
        )
    rows = [line for line in memory.describe(cases, args) if line.startswith("| qwen")]
    peaks, caches, parts = rows
    assert peaks == "| qwen2.5-7b | ✗ 151.1 | 39.1 |"
    assert caches == "| qwen2.5-7b | ✗ | 897k |"
    assert parts.endswith("| 39.1 | ✗ 84.1 |")


def test_an_unknown_shape_is_named():
    with pytest.raises(UserError, match="no shape 70b"):
        memory.make_config("70b")
