"""LoRA: what is trained, its reference, the weights that leave the trainer, and stage 2 with it.

The oracle is an ordinary transformers model that runs with the weights W + 2 B A. It knows neither
peft nor FSDP, and reads one sequence at a time.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import (
    assert_one_error,
    at_once,
    free_port,
    read_metrics,
    read_weights,
    snapshot,
)
from test_policy import (
    LR,
    PROMPTS,
    RESPONSES,
    assert_same_metrics,
    loss_with_statistics,
    make_lm,
    make_updates,
    plain_update,
    save_lm,
    single_logprob,
)
from test_train_online import untimed

import train_online
from apo import files, lora, policy
from apo.engine import Response
from apo.lora import LoraPolicy, Reference
from apo.policy import Policy, make_micro_batches, pack
from apo.problems import Prompt

RANK = 3
SEED = 5
# The linear layers of the tiny model's two decoder layers.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ADAPTED = {f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ATTENTION}
ADAPTED |= {f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")}


def load(folder: Path, checkpoint: Path | None = None) -> tuple[LoraPolicy, torch.optim.Optimizer]:
    """Load and shard a policy with adapters over all ranks, with its optimizer."""
    loaded = lora.load_lora_policy(folder, policy.make_mesh(), RANK, SEED, checkpoint)
    trained = [parameter for parameter in loaded.parameters() if parameter.requires_grad]
    return loaded, torch.optim.AdamW(trained, LR, fused=True)


def whole_adapters(loaded: LoraPolicy) -> dict[str, torch.Tensor]:
    """Return a copy of all A and B, put together from all ranks."""
    return {name: slices.full_tensor().clone() for name, slices in loaded.adapters().items()}


def is_b(name: str) -> bool:
    return name.endswith(lora.B)


@pytest.fixture
def one_machine(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell this process, which is the only rank, that it is alone on its machine."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return save_lm(tmp_path / "model")


# ---------------------------------------------------------------------------------------------
# What is trained


def test_each_linear_layer_but_the_head_gets_an_adapter_and_nothing_else_a_gradient(
    one_machine: None, tmp_path: Path
) -> None:
    folder = save_lm(tmp_path / "untied", tie_word_embeddings=False)
    loaded, _ = load(folder)
    adapters = loaded.adapters()
    assert {name.removesuffix("." + lora.A) for name in adapters if not is_b(name)} == ADAPTED
    assert {name.removesuffix("." + lora.B) for name in adapters if is_b(name)} == ADAPTED
    for name, tensor in adapters.items():
        assert (tensor.shape[1] if is_b(name) else tensor.shape[0]) == RANK
        assert (tensor.full_tensor() == 0).all() == is_b(name)

    inputs, _ = pack(PROMPTS, RESPONSES)
    loaded(temperature=1.0, **inputs).sum().backward()
    for name, parameter in loaded.lm.named_parameters():
        assert parameter.requires_grad == (name in adapters), name
        assert (parameter.grad is not None) == (name in adapters), name
        if is_b(name):  # A has the gradient 0 as long as B is 0
            assert parameter.grad.full_tensor().abs().max() > 0, name


@pytest.mark.parametrize("reshards", [False, True])
def test_adapters_learn_after_each_pass_of_the_reference(
    reshards: bool, one_machine: None, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft's own switch fails here. FSDP frees gathered weights after a pass on GPUs alone."""
    monkeypatch.setattr(policy, "ON_GPU", reshards)
    loaded, optimizer = load(reference)
    frozen = {name: p.full_tensor().clone() for name, p in frozen_parameters(loaded)}
    assert len(frozen) > 10
    for _ in range(2):
        updates = make_updates(20)
        policy.add_ref_logp(Reference(loaded), updates)
        for batches in updates:
            before = whole_adapters(loaded)
            train_online.update(loaded, optimizer, [batches], loss_with_statistics)
            for name, after in whole_adapters(loaded).items():
                assert not torch.equal(after, before[name]), name
    for name, parameter in frozen_parameters(loaded):
        assert torch.equal(parameter.full_tensor(), frozen[name]), name


def frozen_parameters(loaded: LoraPolicy) -> list[tuple[str, torch.Tensor]]:
    return [(name, p) for name, p in loaded.lm.named_parameters() if name not in loaded.adapters()]


class ByHand(torch.nn.Module):
    """The tiny model with adapters as its only parameters, as the definition has them."""

    def __init__(self, adapters: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.plain = [make_lm()]  # in a list, so that its parameters are not this module's
        self.names = list(adapters)
        self.adapters = torch.nn.ParameterList(tensor.clone() for tensor in adapters.values())

    def forward(self, tokens: torch.Tensor) -> object:
        """Run the plain model on the weights W + 2 B A."""
        (plain,) = self.plain
        adapters = dict(zip(self.names, self.adapters, strict=True))
        weights = {name: p.detach() for name, p in plain.named_parameters()}
        for layer in ADAPTED:
            product = adapters[f"{layer}.{lora.B}"] @ adapters[f"{layer}.{lora.A}"]
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + 2 * product
        return torch.func.functional_call(plain, weights, (tokens,))


def first_adapters() -> dict[str, torch.Tensor]:
    """Draw the adapters that training starts with, without sharding."""
    lm = make_lm()
    lora.add_adapters(lm, RANK, SEED)
    return {name: p.detach() for name, p in lm.named_parameters() if p.requires_grad}


def assert_same_adapters(adapters: dict[str, torch.Tensor], expected: ByHand) -> None:
    """Compare what training added.

    Adam magnifies rounding where a gradient is about 0, as that of q_proj is here: rewards that
    differ by 4e-7 move such adapters by 2e-4.
    """
    start = first_adapters()
    moves = []
    expected_moves = []
    for name, tensor in zip(expected.names, expected.adapters, strict=True):
        moves.append((adapters[name] - start[name]).flatten())
        expected_moves.append((tensor.detach() - start[name]).flatten())
    move, expected_move = torch.cat(moves), torch.cat(expected_moves)
    assert (move - expected_move).norm() < 5e-3 * expected_move.norm()
    assert ((move - expected_move).abs() < 5e-4).double().mean() > 0.99


@pytest.mark.parametrize("budget", [20, 1000])
def test_update_is_that_of_the_definition(one_machine: None, reference: Path, budget: int) -> None:
    """Another scale, dropout, a forgotten layer or a weight that moves too: each shows here."""
    loaded, optimizer = load(reference)
    metrics = train_online.update(loaded, optimizer, make_updates(budget), loss_with_statistics)
    plain = ByHand(first_adapters())
    expected = plain_update(plain, torch.optim.AdamW(plain.parameters(), LR))
    assert_same_metrics(metrics, expected)
    assert_same_adapters(whole_adapters(loaded), plain)


def test_adapters_follow_from_the_seed(reference: Path) -> None:
    """Each rank draws all of A and keeps a slice: what was drawn before must not matter."""
    once = first_adapters()
    torch.rand(3)
    again = first_adapters()
    assert all(torch.equal(tensor, again[name]) for name, tensor in once.items())
    lm = make_lm()
    lora.add_adapters(lm, RANK, SEED + 1)
    other = dict(lm.named_parameters())
    assert not any(torch.equal(once[name], other[name]) for name in once if not is_b(name))


# ---------------------------------------------------------------------------------------------
# The reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_ratio_is_exactly_zero_before_the_first_update_alone(
    dtype: torch.dtype, one_machine: None, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16, as on GPUs, frozen weights are bf16 and adapters float32."""
    for module in (policy, lora):
        monkeypatch.setattr(module, "COMPUTE_DTYPE", dtype)
    loaded, optimizer = load(reference)
    adapters = loaded.adapters()
    for name, parameter in loaded.lm.named_parameters():
        assert parameter.dtype == (torch.float32 if name in adapters else dtype), name

    ref = Reference(loaded)
    inputs, _ = pack(PROMPTS, RESPONSES)
    with torch.no_grad():
        ref_logp = ref(temperature=1.0, **inputs)
    ratios = []
    for _ in range(2):
        updates = make_updates(20)
        policy.add_ref_logp(ref, updates)
        metrics = train_online.update(loaded, optimizer, updates, loss_with_statistics)
        ratios.append((metrics["logratio"], metrics["kl_per_token"]))
    assert ratios[0] == (0.0, 0.0) and abs(ratios[1][0]) > 1e-2
    with torch.no_grad():
        assert torch.equal(ref(temperature=1.0, **inputs), ref_logp)
        assert not torch.equal(loaded(temperature=1.0, **inputs), ref_logp)


def test_the_reference_is_the_model_that_was_loaded(one_machine: None, reference: Path) -> None:
    """Bit for bit what stage 2 computes without adapters, from a second copy of the weights."""
    loaded, optimizer = load(reference)
    train_online.update(loaded, optimizer, make_updates(20), loss_with_statistics)
    plain = policy.load_policy(reference, policy.make_mesh(), torch.float32)
    inputs, _ = pack(PROMPTS, RESPONSES)
    with torch.no_grad():
        expected = plain(temperature=0.5, **inputs)
        assert torch.equal(Reference(loaded)(temperature=0.5, **inputs), expected)


# ---------------------------------------------------------------------------------------------
# The weights that leave the trainer


@pytest.mark.parametrize("tied", [True, False])
def test_the_finished_model_is_an_ordinary_one(
    tied: bool, one_machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the names of the reference's weights, needs no peft, and computes the policy's ln pi.

    The weights of the checkpoint and those for the engine are the same.
    """
    from transformers import AutoModelForCausalLM

    folder = save_lm(tmp_path / "model", tie_word_embeddings=tied)
    loaded, optimizer = load(folder)
    train_online.update(loaded, optimizer, make_updates(20), loss_with_statistics)
    policy.save_checkpoint(tmp_path / "step-1", 1, loaded, optimizer, folder)
    policy.save_final_model(tmp_path / "final", 1, loaded, folder)
    inputs, _ = pack(PROMPTS, RESPONSES)
    logp = loaded(temperature=1.0, **inputs)
    to_engine = dict(loaded.weights(policy.COMPUTE_DTYPE))

    monkeypatch.setitem(sys.modules, "peft", None)
    before, weights = read_weights(folder), read_weights(tmp_path / "final")
    assert {name: w.shape for name, w in weights.items()} == {n: w.shape for n, w in before.items()}
    for name, weight in weights.items():
        adapted = name.removesuffix(".weight") in ADAPTED
        assert torch.equal(weight, before[name]) != adapted, name
        assert torch.equal(weight, to_engine[name]), name
    saved = read_weights(tmp_path / "step-1")
    assert all(torch.equal(weight, weights[name]) for name, weight in saved.items())

    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype="auto")
    alone = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        alone.append(single_logprob(lm, prompt, response))
    assert (logp - torch.cat(alone)).abs().max() < 1e-5


def test_adapters_are_added_in_float32_and_then_rounded_once(
    one_machine: None, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter rounded to bf16 before the product is off by more than the last bit."""
    for module in (policy, lora):
        monkeypatch.setattr(module, "COMPUTE_DTYPE", torch.bfloat16)
    loaded, optimizer = load(reference)
    train_online.update(loaded, optimizer, make_updates(20), loss_with_statistics)
    adapters = whole_adapters(loaded)
    weights = dict(loaded.weights(torch.bfloat16))
    before = read_weights(reference)
    for layer in ADAPTED:
        a, b = adapters[f"{layer}.{lora.A}"], adapters[f"{layer}.{lora.B}"]
        start = before[f"{layer}.weight"].bfloat16().double()
        exact = start + 2 * b.double() @ a.double()
        right = weights[f"{layer}.weight"] == exact.bfloat16()
        assert right.double().mean() > 0.999, layer


# ---------------------------------------------------------------------------------------------
# Two ranks, and checkpoints


def train_on_rank(rank: int, port: int, folder: Path) -> None:
    """Be one of two ranks: two updates, a checkpoint, the finished model, the metrics."""
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    loaded, optimizer = load(folder / "model")
    updates = make_updates(20)
    policy.add_ref_logp(Reference(loaded), updates)
    logratio = train_online.update(loaded, optimizer, updates, loss_with_statistics)["logratio"]

    loaded, optimizer = load(folder / "model")
    metrics = train_online.update(loaded, optimizer, make_updates(20), loss_with_statistics)
    policy.save_checkpoint(folder / "step-1", 1, loaded, optimizer, folder / "model")
    policy.save_final_model(folder / "final", 1, loaded, folder / "model")
    if rank == 0:
        files.write_json(folder / "metrics.json", metrics | {"first_logratio": logratio})
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on two ranks, each a process of its own; return the folder of what they wrote."""
    folder = tmp_path_factory.mktemp("two_ranks")
    save_lm(folder / "model")
    arguments = (free_port(), folder)
    torch.multiprocessing.start_processes(train_on_rank, arguments, nprocs=2, start_method="spawn")
    return folder


def test_two_ranks_train_as_one_and_their_checkpoint_continues_on_one(
    one_machine: None, two_ranks: Path
) -> None:
    """Three rows of A lie on two ranks as two and one."""
    plain = ByHand(first_adapters())
    optimizer_by_hand = torch.optim.AdamW(plain.parameters(), LR)
    expected = plain_update(plain, optimizer_by_hand)
    metrics = json.loads((two_ranks / "metrics.json").read_text())
    assert metrics.pop("first_logratio") == 0.0
    assert_same_metrics(metrics, expected)

    loaded, optimizer = load(two_ranks / "model", two_ranks / "step-1")
    policy.load_optimizer(two_ranks / "step-1", loaded, optimizer)
    assert_same_adapters(whole_adapters(loaded), plain)
    saved = read_weights(two_ranks / "final")
    for name, weight in loaded.weights(torch.float32):
        if name in saved:  # the tied head is not
            assert torch.equal(weight, saved[name]), name

    plain_update(plain, optimizer_by_hand)
    train_online.update(loaded, optimizer, make_updates(20), loss_with_statistics)
    assert_same_adapters(whole_adapters(loaded), plain)


# ---------------------------------------------------------------------------------------------
# Learning: thirty steps of one token a response, whose expected reward can be computed


QUESTIONS = [[5, 9, 3], [7], [2, 4, 6, 8], [11, 3], [9, 0, 4, 4], [21], [30, 2], [8, 41, 8]]
NUM_STEPS = 30
VOCABULARY = 50


def is_right(question: int, token: int) -> bool:
    """A sixth of all tokens is right, and to each question others."""
    return token % 6 == question % 6


def every_response() -> list[Response]:
    """Make every possible response, graded; the responses to a question follow each other."""
    responses = []
    for question, ids in enumerate(QUESTIONS):
        for token in range(VOCABULARY):
            prompt = Prompt({"id": str(question)}, "", ids)
            response = Response(len(responses), prompt, 0, [token], "", True, [])
            response.reward = float(is_right(question, token))
            response.numbers["v_star"] = 1 / 6
            responses.append(response)
    return responses


def learn(loaded: Policy, ref: Callable[..., torch.Tensor], lr: float) -> tuple[float, float]:
    """Train for 30 steps of A*-PO; return the expected reward before and after."""
    trained = [parameter for parameter in loaded.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr)
    generator = torch.Generator().manual_seed(0)
    every = every_response()
    inputs, _ = pack([response.prompt.ids for response in every], [r.ids for r in every])
    rewards = torch.tensor([response.reward for response in every]).view(len(QUESTIONS), -1)
    expected = []
    for _ in range(NUM_STEPS + 1):
        with torch.no_grad():
            pi = loaded(temperature=1.0, **inputs).exp().view(len(QUESTIONS), -1)
        expected.append((pi * rewards).sum(dim=1).mean().item())
        chosen = []
        for question, token in enumerate(pi.multinomial(8, True, generator=generator)):
            chosen += [every[question * VOCABULARY + int(i)] for i in token]
        updates = [make_micro_batches(chosen, 1.0, 1000)]
        policy.add_ref_logp(ref, updates)
        train_online.update(loaded, optimizer, updates, train_online.a_star_po(1e-3).loss)
    return expected[0], expected[-1]


def test_adapters_learn_as_well_as_all_weights(one_machine: None, reference: Path) -> None:
    """At ten times the learning rate, in the same number of steps."""
    mesh = policy.make_mesh()
    full = policy.load_policy(reference, mesh, torch.float32)
    ref = policy.load_policy(reference, mesh, torch.float32)
    before, all_weights = learn(full, ref, 1e-3)
    adapted, _ = load(reference)
    same, adapters = learn(adapted, Reference(adapted), 1e-2)
    assert before == same < 0.2
    assert all_weights > 0.9
    assert adapters > all_weights - 0.05


# ---------------------------------------------------------------------------------------------
# Stage 2 as a user runs it


FLAGS = """--batch-size 6 --updates-per-batch 2 --beta2 0.1 --lr 1e-3 --lora-rank 4
--micro-batch-tokens 200 --eval-dataset none"""


@pytest.fixture(scope="module")
def runs(
    run: Callable, stage1: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """Run stage 2: four steps, and four steps with a stop after two."""
    folder = tmp_path_factory.mktemp("lora")

    def start(name: str, *flags: str) -> None:
        arguments = ("--values", stage1.file, "--out", folder / name, *FLAGS.split(), *flags)
        result = run("train_online.py", *arguments)
        assert result.code == 0, result.all

    def stopped() -> None:
        start("stopped", "--num-steps", "2", "--save-every", "2")
        start("stopped", "--num-steps", "4", "--save-every", "2", "--resume")

    at_once(stopped, lambda: start("straight", "--num-steps", "4"))
    return SimpleNamespace(folder=folder, values=stage1.file)


def test_the_engine_has_the_merged_weights_after_every_sync(runs: SimpleNamespace) -> None:
    rows = read_metrics(runs.folder / "straight")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["logratio"] == rows[0]["kl_per_token"] == 0.0
    assert all(abs(row["logratio"]) > 1e-3 for row in rows[1:])
    assert all(row["logprob_gap"] < 1e-4 for row in rows)


def test_a_resumed_run_is_as_if_it_had_not_been_stopped(runs: SimpleNamespace) -> None:
    stopped, straight = runs.folder / "stopped", runs.folder / "straight"
    assert untimed(read_metrics(stopped)) == untimed(read_metrics(straight))
    weights = read_weights(stopped / "final")
    for name, expected in read_weights(straight / "final").items():
        assert torch.equal(weights[name], expected), name


@pytest.mark.parametrize("rank", [0, 5])
def test_a_run_is_not_resumed_with_another_rank(
    rank: int, run: Callable, runs: SimpleNamespace
) -> None:
    folder = runs.folder / "straight"
    before = snapshot(folder)
    arguments = ("--values", runs.values, "--out", folder, *FLAGS.split(), "--resume")
    result = run("train_online.py", *arguments, "--lora-rank", rank, "--num-steps", "5")
    assert result.code == 2, result.all
    assert_one_error(result.err, f"lora_rank 4, not {rank}")
    assert snapshot(folder) == before


REFUSED = {
    "peft is missing": ("--lora-rank 8", "pip install peft"),
    "a reference that is no second model": ("--lora-rank 8 --offload-ref", "--offload-ref"),
    "a negative rank": ("--lora-rank=-1", "--lora-rank"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence_and_code_2(
    case: str,
    assert_refused: Callable,
    stage1: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags, says = REFUSED[case]
    if case == "peft is missing":
        monkeypatch.setitem(sys.modules, "peft", None)
    base = f"--values {stage1.file} --out {tmp_path / 'out'} --batch-size 6 "
    assert_refused(train_online, base + flags, says)
    assert list(tmp_path.iterdir()) == []
