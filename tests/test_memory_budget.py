"""The memory budget: its arithmetic, the decision, and agreement with the simulation."""

import functools
from types import SimpleNamespace

import pytest
import torch

from apo import memory_budget
from apo.memory_budget import GIB, Setup
from experiments import memory

# The published run on eight cards of 80 GB.
PUBLISHED = Setup(
    gpus_per_machine=8,
    num_machines=1,
    micro_batch_tokens=8192,
    gradient_checkpointing=False,
    offload_ref=False,
    tensor_parallel_size=1,
    num_requests=32,
    longest=1280,
    most_of_card=0.6,
)
CARD = 80 * 10**9


@functools.cache
def size_of(name: str, num_layers: int | None = None) -> memory_budget.ModelSize:
    changes = {} if num_layers is None else {"num_hidden_layers": num_layers}
    return memory_budget.model_size(memory.make_config(name, **changes))


# ---------------------------------------------------------------------------------------------
# Parts


def test_the_parts_are_the_known_bytes_of_a_parameter():
    size = size_of("1.5b")
    assert size.parameters == pytest.approx(1.54e9, rel=0.01)
    budget = memory_budget.make_budget(size, PUBLISHED, CARD)
    shard = size.parameters / 8
    parts = (budget.weights, budget.gradients, budget.optimizer, budget.reference)
    assert parts == tuple(pytest.approx(n * shard, abs=8) for n in (4, 4, 8, 2))
    assert budget.engine == 2 * size.parameters
    offloaded = memory_budget.make_budget(size, PUBLISHED._replace(offload_ref=True), CARD)
    assert offloaded.reference == 0


def test_the_cache_holds_every_response_of_a_step_at_full_length():
    """28,672 bytes a token at 1.5B: two heads of 128, keys and values, 28 layers, bf16."""
    size = size_of("1.5b")
    cache = memory_budget.cache_bytes(size, 32, 1280, 1)
    assert 32 * 1280 * 28_672 < cache < 1.02 * 32 * 1280 * 28_672
    assert memory_budget.cache_bytes(size, 32, 1280, 2) == cache // 2
    assert memory_budget.cache_bytes(size, 32, 1280, 8) == cache // 2, "a head is not divided"


def test_lora_trains_its_adapters_alone():
    size = size_of("1.5b")
    adapted = PUBLISHED._replace(lora_rank=16)
    budget = memory_budget.make_budget(size, adapted, CARD)
    # peft's own count for rank 16 on every linear layer of the decoder.
    adapters = memory_budget.num_adapter_parameters(size, 16)
    assert adapters == 18_464_768
    assert budget.weights == (2 * size.parameters + 4 * adapters) // 8
    assert budget.gradients == 4 * adapters // 8
    assert budget.reference == 0, "it is the same model"


# ---------------------------------------------------------------------------------------------
# Activations


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("num_gpus", [1, 8])
@pytest.mark.parametrize(
    "name, num_layers, num_tokens",
    [("0.5b", 4, 2048), ("1.5b", 3, 8192), ("7b", 2, 4096)],
)
def test_the_budget_agrees_with_the_simulation(
    name: str, num_layers: int, num_tokens: int, num_gpus: int, checkpointing: bool
):
    """Few layers are enough, as every layer takes the same; 7B's head is not tied."""
    size = size_of(name, num_layers)
    setup = PUBLISHED._replace(
        gpus_per_machine=num_gpus,
        micro_batch_tokens=num_tokens,
        gradient_checkpointing=checkpointing,
    )
    simulated = memory.simulate(
        name, num_gpus, num_tokens, checkpointing, num_hidden_layers=num_layers
    )
    states = 8 * size.parameters / num_gpus
    computed = memory_budget.activations(size, setup)
    assert computed == pytest.approx(simulated - states, rel=0.05)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_with_adapters_it_agrees_as_well(checkpointing: bool):
    pytest.importorskip("peft")
    size = size_of("1.5b", 3)
    setup = PUBLISHED._replace(gradient_checkpointing=checkpointing, lora_rank=16)
    simulated = memory.simulate("1.5b", 8, 8192, checkpointing, lora_rank=16, num_hidden_layers=3)
    budget = memory_budget.make_budget(size, setup, CARD)
    activations = simulated - budget.weights - budget.gradients
    assert budget.activations == pytest.approx(activations, rel=0.05)


def test_two_machines_need_more_than_one():
    """Small states and large layers: at the last layer all reduced gradients are there."""
    size = size_of("7b", 6)
    setup = PUBLISHED._replace(num_machines=2, micro_batch_tokens=1280, gradient_checkpointing=True)
    simulated = memory.simulate("7b", 16, 1280, True, num_hidden_layers=6)
    computed = memory_budget.activations(size, setup)
    assert computed == pytest.approx(simulated - size.parameters, rel=0.05)
    assert computed > memory_budget.activations(size, setup._replace(num_machines=1))


# ---------------------------------------------------------------------------------------------
# The decision


def test_the_published_run_keeps_its_cache():
    budget = memory_budget.make_budget(size_of("1.5b"), PUBLISHED, CARD)
    assert not budget.sleep_mode
    assert budget.peak == budget.training + budget.cache + budget.reserve < CARD
    assert budget.cache == memory_budget.cache_bytes(size_of("1.5b"), 32, 1280, 1)


def test_sleep_mode_is_for_what_does_not_fit_together():
    setup = PUBLISHED._replace(gpus_per_machine=1, num_requests=256, gradient_checkpointing=True)
    size = size_of("3b")
    budget = memory_budget.make_budget(size, setup, CARD)
    assert budget.training + budget.cache + budget.reserve > CARD
    assert budget.sleep_mode and budget.peak <= CARD
    assert budget.peak == max(budget.training + budget.reserve, budget.sampling)
    roomy = memory_budget.make_budget(size, setup, 2 * CARD)
    assert not roomy.sleep_mode and roomy.cache == budget.cache


def test_the_cache_is_cut_to_what_there_is_but_holds_one_response():
    size = size_of("1.5b")
    setup = PUBLISHED._replace(gpus_per_machine=1, num_requests=256, gradient_checkpointing=True)
    needed = memory_budget.cache_bytes(size, 256, 1280, 1)
    cut = memory_budget.make_budget(size, setup, 36 * 10**9)
    assert cut.sleep_mode and cut.cache < needed
    assert cut.sampling <= cut.card
    # Several GPUs put a weight together on each of them, to save it while the cache is there.
    two = setup._replace(gpus_per_machine=2, num_requests=1024)
    beside = memory_budget.make_budget(size, two, 22 * 10**9)
    assert beside.sleep_mode and beside.sampling <= beside.card
    assert beside.gathered == 4 * size.vocabulary * size.hidden and cut.gathered == 0
    models = beside.weights + beside.optimizer + beside.reference + beside.engine
    assert models + beside.cache + beside.gathered + beside.reserve <= beside.card
    # The user's bound counts in any case.
    bound = memory_budget.make_budget(size, setup._replace(most_of_card=0.1), CARD)
    assert bound.cache == int(0.1 * CARD) - bound.engine < needed
    tiny = memory_budget.make_budget(size, setup, 10**9)
    assert tiny.cache == memory_budget.cache_bytes(size, 1, 1280, 1)


def test_more_responses_than_run_at_once_need_no_more():
    size = size_of("1.5b")
    budgets = []
    for num_requests in (memory_budget.MOST_AT_ONCE, 4096):
        setup = PUBLISHED._replace(num_requests=num_requests)
        budgets.append(memory_budget.make_budget(size, setup, CARD))
    assert budgets[0] == budgets[1]


def test_what_is_printed_adds_up():
    """The peak must be the sum of the parts that stand before it."""
    budget = memory_budget.make_budget(size_of("1.5b"), PUBLISHED, CARD)
    parts, together = memory_budget.describe(budget)
    numbers = [float(part.split()[-1]) for part in parts.split(": ")[1].split(", ")]
    assert len(numbers) == 8
    assert sum(numbers) == pytest.approx(budget.peak / GIB, abs=0.4)
    assert f"{budget.peak / GIB:.1f}" in together
    too_small = memory_budget.make_budget(size_of("1.5b"), PUBLISHED, CARD // 8)
    assert len(memory_budget.describe(too_small)) == 3, "no warning"


# ---------------------------------------------------------------------------------------------
# What the engine gets


def test_the_engine_gets_the_decision():
    size = size_of("1.5b")
    for setup in (PUBLISHED, PUBLISHED._replace(gpus_per_machine=1, num_requests=256)):
        budget = memory_budget.make_budget(size, setup, CARD // 2)
        options = memory_budget.engine_options(budget, CARD)
        assert options["kv_cache_memory_bytes"] == budget.cache
        assert options["enable_sleep_mode"] == budget.sleep_mode
        # vLLM demands that this share of the whole card is free: of half of it, it must be less.
        share = options["gpu_memory_utilization"]
        assert budget.cache / CARD < share < 0.5


@pytest.mark.usefixtures("process_group")
def test_a_run_plans_by_its_flags_and_by_what_is_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path, capsys: pytest.CaptureFixture
):
    """As on a GPU: what stage 2 prints is the budget of its flags."""
    memory.make_config("0.5b").save_pretrained(tmp_path)
    args = SimpleNamespace(
        gpu_memory_utilization=0.5,
        tensor_parallel_size=1,
        micro_batch_tokens=4096,
        gradient_checkpointing=True,
        offload_ref=False,
        batch_size=64,
        samples_per_prompt=2,
        lora_rank=0,
    )
    nothing = memory_budget.plan_memory(args, tmp_path, 1280)
    assert nothing == {"gpu_memory_utilization": 0.5} and capsys.readouterr().out == ""

    card = 24 * 10**9
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (card, 2 * card))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    options = memory_budget.plan_memory(args, tmp_path, 1280)
    setup = Setup(1, 1, 4096, True, False, 1, 128, 1280, 0.5)
    budget = memory_budget.make_budget(size_of("0.5b"), setup, card)
    assert options == memory_budget.engine_options(budget, 2 * card)
    assert capsys.readouterr().out.splitlines() == memory_budget.describe(budget)
