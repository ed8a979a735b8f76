"""The model being trained: packing, log-probs, the update on one rank and on two, checkpoints.

The oracle is an ordinary transformers model that reads one sequence at a time, without packing,
sharding or micro-batches.
"""

import itertools
import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import free_port, read_weights
from hypothesis import given, settings
from hypothesis import strategies as st

import losses
import train_online
from apo import files, policy
from apo.engine import Response
from apo.policy import MicroBatch, Policy, assign_to_ranks, make_micro_batches, pack
from apo.problems import Prompt

FLOAT64 = torch.float64
quick = settings(deadline=None, max_examples=100)


def closeness(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error, in units of the largest expected entry."""
    error = (actual.to(FLOAT64) - expected.to(FLOAT64)).abs().max()
    return (error / expected.to(FLOAT64).abs().max()).item()


# ---------------------------------------------------------------------------------------------
# Packing


def test_pack_by_hand() -> None:
    """Rows that are off by one train a model to repeat what it reads. Positions start again."""
    inputs, lengths = pack([[1, 2, 3], [4], [5, 6]], [[7, 8], [9], [10, 11, 12]])
    assert inputs["input_ids"].tolist() == [[1, 2, 3, 7, 4, 5, 6, 10, 11]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0, 1, 2, 3]]
    assert inputs["rows"].tolist() == [2, 3, 4, 6, 7, 8]
    assert inputs["targets"].tolist() == [7, 8, 9, 10, 11, 12]
    assert inputs["cu_seq_lens_q"].tolist() == [0, 4, 5, 9]
    assert inputs["cu_seq_lens_q"].dtype == torch.int32  # what the kernel takes
    assert inputs["max_length_q"] == 4
    assert lengths.tolist() == [2, 1, 3]


def test_pack_refuses_a_prompt_without_response() -> None:
    with pytest.raises(ValueError, match="shorter"):
        pack([[1], [2]], [[3]])


TOKENS = st.lists(st.integers(0, 99), min_size=1, max_size=9)


@quick
@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=6))
def test_pack_feeds_no_padding(pairs: list[tuple[list[int], list[int]]]) -> None:
    inputs, lengths = pack([prompt for prompt, _ in pairs], [response for _, response in pairs])
    num_tokens = sum(len(prompt) + len(response) - 1 for prompt, response in pairs)
    assert inputs["input_ids"].shape == inputs["position_ids"].shape == (1, num_tokens)
    ids = inputs["input_ids"][0]
    rows = inputs["rows"].split(lengths.tolist())
    for (prompt, response), places in zip(pairs, rows, strict=True):
        assert ids[places].tolist() == [prompt[-1], *response[:-1]]
        assert inputs["position_ids"][0, places[0]] == len(prompt) - 1


def test_eos_counts_also_where_pad_is_eos() -> None:
    """A mask `token != pad` drops the last token where pad is EOS, and with it ln pi(stop here)."""
    eos = 0  # and pad, and once inside the prompt
    inputs, lengths = pack([[7, eos, 3], [5]], [[4, 6, eos], [eos]])
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 4, generator=generator)
    weight = torch.randn(8, 4, generator=generator)
    token_logp = losses.token_logprob(hidden[inputs["rows"]], weight, inputs["targets"])
    logp = losses.sequence_logprob(token_logp, lengths)
    # Places 2, 3 and 4 predict 4, 6 and EOS; place 5 predicts the second response's EOS.
    ln_pi = (hidden @ weight.T).to(FLOAT64).log_softmax(dim=1)
    expected = torch.stack([ln_pi[2, 4] + ln_pi[3, 6] + ln_pi[4, eos], ln_pi[5, eos]])
    assert closeness(logp, expected) < 1e-6


# ---------------------------------------------------------------------------------------------
# Ranks and micro-batches


@quick
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 6), st.integers(1, 120))
def test_assign_to_ranks(lengths: list[int], num_ranks: int, budget: int) -> None:
    """No sequence is lost or doubled, every rank has as many forward passes, none is too large."""
    assigned = assign_to_ranks(lengths, num_ranks, budget)
    assert len(assigned) == num_ranks
    assert len({len(batches) for batches in assigned}) == 1
    places = [place for batches in assigned for batch in batches for place in batch]
    assert sorted(places) == list(range(len(lengths)))
    rank_tokens = [sum(lengths[i] for batch in batches for i in batch) for batches in assigned]
    assert max(rank_tokens) - min(rank_tokens) <= max(lengths, default=0)
    for batches in assigned:
        tokens = [[lengths[i] for i in batch] for batch in batches]
        assert all(sum(batch) <= budget or len(batch) == 1 for batch in tokens)
        sums = [sum(batch) for batch in tokens]  # none is much smaller than another
        assert max(sums) - min(sums) <= max(lengths, default=0)
    if sum(lengths) <= budget:
        assert len(assigned[0]) == 1  # none is cut without need


def test_assign_to_ranks_by_hand() -> None:
    """20 tokens to one rank, over budget alone; 9, 5, 4, 3 to the other, at most 10 a time."""
    assert assign_to_ranks([5, 9, 3, 4, 20], 2, 10) == [[[4], [], []], [[1], [0], [3, 2]]]
    assert assign_to_ranks([7], 3, 10) == [[[0]], [[]], [[]]]


def test_micro_batches_are_even() -> None:
    """Filled one after another they would have 32 sequences and 1."""
    (batches,) = assign_to_ranks([256] * 33, 1, 8192)
    assert [len(batch) for batch in batches] == [17, 16]


def make_responses(count: int, vocabulary: int = 50, seed: int = 0) -> list[Response]:
    """Make responses of many lengths, with rewards, V* and the sampler's log-probs."""
    chance = random.Random(seed)
    responses = []
    for index in range(count):
        prompt = Prompt({"id": f"p{index}"}, "", chance.choices(range(vocabulary), k=index % 5 + 1))
        ids = chance.choices(range(vocabulary), k=index * 3 % 7 + 1)
        response = Response(
            index=index,
            prompt=prompt,
            sample=0,
            ids=ids,
            text="",
            finished=True,
            sampler_logp=[-1.0 - index - i for i in range(len(ids))],
            reward=float(index % 2),
        )
        response.numbers["v_star"] = index / 10
        responses.append(response)
    return responses


@pytest.mark.parametrize("num_ranks", [1, 3, 5])
@pytest.mark.parametrize("group_size", [1, 2])
def test_micro_batches_carry_what_belongs_to_each_response(
    num_ranks: int, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    responses = make_responses(8)
    monkeypatch.setattr(dist, "get_world_size", lambda: num_ranks)
    seen = []
    for rank in range(num_ranks):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        for batch in make_micro_batches(responses, 0.5, 16, group_size):
            check_micro_batch(batch, responses)
            indices = [response.index for response in batch.responses]
            if batch.weight:
                seen += indices
            for start in range(0, len(indices), group_size):  # no group is torn
                first = indices[start]
                assert first % group_size == 0
                group = indices[start : start + group_size]
                assert group == list(range(first, first + group_size))
    assert sorted(seen) == list(range(8))


def check_micro_batch(batch: MicroBatch, responses: list[Response]) -> None:
    """Compare a micro-batch with the responses in it, number by number."""
    here = batch.responses
    assert batch.num_sequences == len(responses)
    assert batch.num_tokens == sum(len(response.ids) for response in responses)
    assert batch.lengths.tolist() == [len(response.ids) for response in here]
    assert batch.rewards.tolist() == [response.reward for response in here]
    v_star = [response.numbers["v_star"] for response in here]
    assert batch.numbers["v_star"].tolist() == pytest.approx(v_star)
    assert batch.inputs["temperature"] == 0.5
    assert batch.inputs["targets"].tolist() == [i for response in here for i in response.ids]
    sampler_logp = [logp for response in here for logp in response.sampler_logp]
    assert batch.sampler_logp.tolist() == sampler_logp


def test_small_differences_of_large_rewards_survive(process_group: None) -> None:
    """float32 would make 100,000,001 - 100,000,000 to 0."""
    responses = make_responses(2)
    for response in responses:
        response.numbers["v_star"] = 1e8
        response.reward = 1e8 + 1
    for batch in make_micro_batches(responses, 1.0, 1000):
        assert (batch.rewards - batch.numbers["v_star"] == 1).all()


def test_any_number_of_a_response_reaches_the_loss(process_group: None) -> None:
    """This is how an algorithm hands an advantage from its credit function to its loss."""
    responses = make_responses(5)
    for response in responses:
        response.numbers["advantage"] = -response.index
        response.sampler_logp = []
    batches = make_micro_batches(responses, 1.0, 10)
    for batch in batches:
        advantages = [-response.index for response in batch.responses]
        assert batch.numbers["advantage"].tolist() == advantages
        assert batch.sampler_logp is None  # not asked for


# ---------------------------------------------------------------------------------------------
# Attention and log-probs of packed sequences


@pytest.mark.parametrize("scaling", [None, 0.3])
def test_packed_attention_by_hand(scaling: float | None) -> None:
    """A wrong window, scale or grouping of heads shows: head h reads key head h // 2."""
    generator = torch.Generator().manual_seed(0)
    bounds, heads, dim = [0, 4, 5, 11], 4, 8
    query = torch.randn(1, heads, bounds[-1], dim, generator=generator)
    key = torch.randn(1, 2, bounds[-1], dim, generator=generator)
    value = torch.randn(1, 2, bounds[-1], dim, generator=generator)
    out, _ = policy.packed_attention(
        None,
        query,
        key,
        value,
        None,
        cu_seq_lens_q=torch.tensor(bounds, dtype=torch.int32),
        max_length_q=6,
        scaling=scaling,
    )
    q, k, v = (x[0].to(FLOAT64) for x in (query, key, value))
    expected = torch.empty(1, bounds[-1], heads, dim, dtype=FLOAT64)
    for start, end in itertools.pairwise(bounds):
        for head, place in itertools.product(range(heads), range(start, end)):
            seen = slice(start, place + 1)
            scores = k[head // 2, seen] @ q[head, place] * (scaling or dim**-0.5)
            weights = scores.exp() / scores.exp().sum()
            expected[0, place, head] = weights @ v[head // 2, seen]
    assert out.shape == expected.shape
    assert closeness(out, expected) < 1e-6


# In and out of order of length, with responses of one token; 0 is EOS and pad.
PROMPTS = [[5, 9, 3], [7], [2, 4, 6, 8, 10, 12, 14], [11, 3], [9, 0, 4, 4]]
RESPONSES = [[4, 8, 15, 16, 23, 0], [0], [13, 0], [21, 1, 34, 0], [17]]


def make_lm(implementation: str = "eager", **changes: object) -> torch.nn.Module:
    """Make a tiny Qwen2 whose weights are so large that context matters, always the same one."""
    from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

    AttentionInterface.register("packed", policy.packed_attention)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "tie_word_embeddings": True,
        "initializer_range": 0.15,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "attn_implementation": implementation,
    }
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**sizes | changes))


@pytest.fixture
def lms() -> tuple[torch.nn.Module, torch.nn.Module]:
    """Give the same model twice: packed, and ordinary."""
    return make_lm("packed"), make_lm("eager")


def packed_logprob(
    lm: torch.nn.Module, prompts: list, responses: list, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and sequence log-probs of packed sequences, as stage 2 computes them."""
    inputs, lengths = pack(prompts, responses)
    token_logp = Policy(lm)(**inputs, temperature=temperature)
    return token_logp, losses.sequence_logprob(token_logp, lengths)


def single_logprob(
    lm: torch.nn.Module, prompt: list[int], response: list[int], temperature: float = 1.0
) -> torch.Tensor:
    """The tokens of one response, from the logits of an ordinary run over the whole text."""
    logits = lm(torch.tensor([prompt + response])).logits[0].to(FLOAT64) / temperature
    ln_pi = logits.log_softmax(dim=1)
    return torch.stack([ln_pi[len(prompt) - 1 + i, token] for i, token in enumerate(response)])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_packed_sequences_are_as_if_alone(lms: tuple, temperature: float) -> None:
    """Attention across a border shows, and so do rows off by one and a forgotten temperature."""
    packed, ordinary = lms
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])
    token_logp, logp = packed_logprob(packed, PROMPTS, RESPONSES, temperature)
    alone = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        alone.append(single_logprob(ordinary, prompt, response, temperature))
    assert (token_logp - torch.cat(alone)).abs().max() < 1e-5
    expected = torch.stack([tokens.sum() for tokens in alone])
    assert (logp - expected).abs().max() < 1e-5
    (logp * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for (name, x), y in zip(packed.named_parameters(), ordinary.parameters(), strict=True):
        assert closeness(x.grad, y.grad) < 1e-5, name


def test_packed_sequences_do_not_see_each_other(lms: tuple) -> None:
    """Leaks are small and train without complaint: every sequence's first token is changed once."""
    with torch.no_grad():
        _, before = packed_logprob(lms[0], PROMPTS, RESPONSES)
        for changed in range(len(PROMPTS)):
            prompts = [list(prompt) for prompt in PROMPTS]
            prompts[changed][0] = 49
            _, after = packed_logprob(lms[0], prompts, RESPONSES)
            difference = (after - before).abs()
            assert difference[changed] > 1e-2
            difference[changed] = 0
            assert difference.max() < 1e-6


def test_packed_tokens_do_not_see_the_future(lms: tuple) -> None:
    """Without a causal window a token attends to the one that it predicts."""
    responses = [list(response) for response in RESPONSES]
    responses[0][2] = 49
    with torch.no_grad():
        before, _ = packed_logprob(lms[0], PROMPTS, RESPONSES)
        after, _ = packed_logprob(lms[0], PROMPTS, responses)
    difference = (after - before).abs()
    assert difference[:2].max() < 1e-6
    assert difference[2:6].min() > 1e-3
    assert difference[6:].max() < 1e-6


def test_dropout_is_never_on(
    tmp_path: Path, process_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout ln pi would be another one each time, also while layers are checkpointed."""
    from transformers import Phi3Config, Phi3ForCausalLM

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    config = Phi3Config(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
        resid_pdrop=0.5,
        embd_pdrop=0.5,
        sliding_window=None,
    )
    Phi3ForCausalLM(config).save_pretrained(tmp_path)
    for checkpointing in (False, True):
        loaded = policy.load_policy(
            tmp_path, policy.make_mesh(), torch.float32, gradient_checkpointing=checkpointing
        )
        dropouts = [m for m in loaded.modules() if isinstance(m, torch.nn.Dropout)]
        assert dropouts, "the model has no dropout: this tests nothing"
        assert not any(module.training for module in dropouts)
        inputs, _ = pack(PROMPTS, RESPONSES)
        once = loaded(temperature=1.0, **inputs)
        assert torch.equal(once, loaded(temperature=1.0, **inputs))
        once.sum().backward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_runs_each_layer_twice(
    checkpointing: bool, one_machine: None, reference: Path
) -> None:
    """Once in the forward pass and once in the backward pass: activations are not kept."""
    loaded = policy.load_policy(
        reference, policy.make_mesh(), torch.float32, gradient_checkpointing=checkpointing
    )
    calls = []
    layer = loaded.lm.base_model.layers[0]
    layer.input_layernorm.register_forward_hook(lambda *arguments: calls.append(1))
    inputs, _ = pack([[1, 2, 3]], [[4, 5]])
    loaded(temperature=1.0, **inputs).sum().backward()
    assert len(calls) == (2 if checkpointing else 1)


def test_a_checkpoint_copies_what_the_model_needs_alone(tmp_path: Path) -> None:
    """Folders of the hub hold other formats of the weights beside it, which are as large again."""
    needed = {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    other = ("model.safetensors", "model.safetensors.index.json", "q4.gguf", "pytorch_model.bin")
    other += ("README.md", "original/consolidated.00.pth", ".git/lfs/x")
    for name in (*needed, *other):
        files.write_text(tmp_path / "model" / name, "{}")
    (tmp_path / "out").mkdir()
    policy.copy_model_files(tmp_path / "model", tmp_path / "out", torch.float32)
    assert {path.name for path in (tmp_path / "out").iterdir()} == needed


# ---------------------------------------------------------------------------------------------
# The update, on one rank and on two


BETA2 = 0.1
LR = 1e-2
NUM_RESPONSES = 7


def save_lm(folder: Path, **change: object) -> Path:
    """Save the tiny model, with a file that looks like a tokenizer."""
    make_lm(**change).save_pretrained(folder)
    files.write_text(folder / "tokenizer_config.json", "{}")
    return folder


def load(folder: Path) -> tuple[Policy, torch.optim.Optimizer]:
    """Load and shard a policy over all ranks, with an optimizer as stage 2 has it."""
    loaded = policy.load_policy(folder, policy.make_mesh(), torch.float32)
    return loaded, torch.optim.AdamW(loaded.parameters(), LR)


def make_updates(budget: int, responses: list[Response] | None = None) -> list[list[MicroBatch]]:
    """Pack two updates; ln pi_ref is the same number for every token.

    The second has a single response: of two ranks, one has only a copy, which must not count.
    """
    first = responses or make_responses(NUM_RESPONSES)
    updates = []
    for part in (first, make_responses(1, seed=1)):
        updates.append(make_micro_batches(part, 0.5, budget))
    for batches in updates:
        for batch in batches:
            batch.ref_logp = torch.full((len(batch.inputs["targets"]),), -4.0)
    return updates


def loss_with_statistics(
    batch: MicroBatch, token_logp: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A*-PO's loss, with one more statistic, as a fork would add it."""
    sequence_losses, statistics = train_online.a_star_po(BETA2).loss(batch, token_logp)
    statistics["long"] = (batch.lengths > 3).float()
    return sequence_losses, statistics


def train_on_rank(rank: int, port: int, folder: Path) -> None:
    """Be one of two ranks, on one machine and then as if on two.

    Each time: two updates, a checkpoint, the finished model, and on rank 0 the metrics.
    """
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for machines in (1, 2):  # weights are sharded over a machine, and replicated across machines
        os.environ["LOCAL_WORLD_SIZE"] = str(2 // machines)
        out = folder / f"machines-{machines}"
        loaded, optimizer = load(folder / "model")
        metrics = train_online.update(loaded, optimizer, make_updates(20), loss_with_statistics)
        policy.save_checkpoint(out / "step-1", 1, loaded, optimizer, folder / "model")
        policy.save_final_model(out / "final", 1, loaded, folder / "model")
        if rank == 0:
            files.write_json(out / "metrics.json", metrics)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on two ranks, each a process of its own; return the folder of what they wrote."""
    folder = tmp_path_factory.mktemp("two_ranks")
    save_lm(folder / "model")
    arguments = (free_port(), folder)
    torch.multiprocessing.start_processes(train_on_rank, arguments, nprocs=2, start_method="spawn")
    return folder


@pytest.fixture
def two_ranks(on_two_ranks: Path) -> Path:
    """Return the folder of the training on two ranks of one machine."""
    return on_two_ranks / "machines-1"


@pytest.fixture
def one_machine(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tell this process, which is the only rank, that it is alone on its machine."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return save_lm(tmp_path / "model")


def plain_update(lm: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Make the same two updates with an ordinary model, one sequence after the other."""
    metrics = {"loss": 0.0, "grad_norm": 0.0}
    for number, responses in enumerate((make_responses(NUM_RESPONSES), make_responses(1, seed=1))):
        logps = []
        gap = 0.0
        for response in responses:
            tokens = single_logprob(lm, response.prompt.ids, response.ids, 0.5)
            logps.append(tokens.sum())
            gap += (tokens - torch.tensor(response.sampler_logp)).abs().sum().item()
        logp = torch.stack(logps)
        lengths = torch.tensor([len(response.ids) for response in responses])
        rewards = torch.tensor([r.reward for r in responses], dtype=torch.float64)
        v_star = torch.tensor([r.numbers["v_star"] for r in responses], dtype=torch.float64)
        loss = losses.a_star_po_loss(logp, -4.0 * lengths, rewards, v_star, BETA2)
        loss.backward()
        metrics["loss"] += loss.item() / 2
        metrics["grad_norm"] += torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0).item() / 2
        optimizer.step()
        optimizer.zero_grad()
        if number == 0:
            metrics["logratio"] = (logp + 4.0 * lengths).mean().item()
            metrics["kl_per_token"] = ((logp + 4.0 * lengths).sum() / lengths.sum()).item()
            metrics["logprob_gap"] = gap / lengths.sum().item()
            metrics["long"] = (lengths > 3).float().mean().item()
    return metrics


def assert_same_weights(weights: dict, expected: torch.nn.Module, start: torch.nn.Module) -> None:
    """Compare what training added to the weights. Adam magnifies rounding where g is about 0."""
    before = dict(start.named_parameters())
    moves = []
    expected_moves = []
    for name, parameter in expected.named_parameters():
        moves.append((weights[name] - before[name]).detach().flatten())
        expected_moves.append((parameter - before[name]).detach().flatten())
    move = torch.cat(moves)
    expected_move = torch.cat(expected_moves)
    assert (move - expected_move).norm() < 2e-3 * expected_move.norm()
    assert ((move - expected_move).abs() < 1e-4).double().mean() > 0.99


def assert_same_metrics(metrics: dict[str, float], expected: dict[str, float]) -> None:
    """Compare all metrics that are expected; a fork may have more."""
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("budget", [1, 20, 1000])
def test_update_is_that_of_a_plain_model(one_machine: None, reference: Path, budget: int) -> None:
    """A mean per micro-batch, a lost sequence, an update too many: each shows in the weights."""
    loaded, optimizer = load(reference)
    metrics = train_online.update(loaded, optimizer, make_updates(budget), loss_with_statistics)
    plain = make_lm()
    expected = plain_update(plain, torch.optim.AdamW(plain.parameters(), LR))
    assert_same_metrics(metrics, expected)
    weights = {name: p.full_tensor() for name, p in loaded.lm.named_parameters()}
    assert_same_weights(weights, plain, make_lm())


@pytest.mark.parametrize(
    "name", ["loss", "grad_norm", "reward", "adv", "kl_per_token", "peak_gib", "eval_accuracy"]
)
def test_a_statistic_hides_no_metric(one_machine: None, reference: Path, name: str) -> None:
    loaded, optimizer = load(reference)

    def loss(batch: MicroBatch, token_logp: torch.Tensor) -> tuple[torch.Tensor, dict]:
        sequence_losses, _ = loss_with_statistics(batch, token_logp)
        return sequence_losses, {name: sequence_losses}

    with pytest.raises(ValueError, match=f"'{name}'"):
        train_online.update(loaded, optimizer, make_updates(1000), loss)


@pytest.mark.parametrize("of", ["loss", "entropy"])
@pytest.mark.parametrize("shape", ["mean", "tokens", "square"])
def test_what_is_no_number_for_each_sequence_is_refused(
    one_machine: None, reference: Path, of: str, shape: str
) -> None:
    """A fork's slip would otherwise be trained on, or logged, with another scale."""
    loaded, optimizer = load(reference)

    def loss(batch: MicroBatch, token_logp: torch.Tensor) -> tuple[torch.Tensor, dict]:
        sequence_losses, _ = loss_with_statistics(batch, token_logp)
        square = sequence_losses + torch.zeros(len(sequence_losses) + 1, 1)
        wrong = {"mean": sequence_losses.mean(), "tokens": token_logp, "square": square}[shape]
        if of == "loss":
            return wrong, {}
        return sequence_losses, {of: wrong}

    with pytest.raises(ValueError, match=rf"{of}.* \({NUM_RESPONSES},\)"):
        train_online.update(loaded, optimizer, make_updates(1000), loss)


def test_a_statistic_of_some_micro_batches_is_refused(one_machine: None, reference: Path) -> None:
    loaded, optimizer = load(reference)

    def loss(batch: MicroBatch, token_logp: torch.Tensor) -> tuple[torch.Tensor, dict]:
        sequence_losses, statistics = loss_with_statistics(batch, token_logp)
        if (batch.lengths > 3).any():
            statistics["later"] = sequence_losses
        return sequence_losses, statistics

    with pytest.raises(ValueError, match="some micro-batches"):
        train_online.update(loaded, optimizer, make_updates(1), loss)


def test_an_offloaded_reference_computes_the_same(
    one_machine: None, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU there is nothing to gain, but the flag does no harm."""
    updates = make_updates(1000)
    for batches in updates:
        for batch in batches:
            batch.ref_logp = None
    mesh = policy.make_mesh()
    policy.add_ref_logp(policy.load_policy(reference, mesh, torch.float32), updates)
    expected = updates[0][0].ref_logp
    policies = []
    fully_shard = policy.fsdp.fully_shard

    def shard(module: torch.nn.Module, **options: object) -> None:
        policies.append(type(options["offload_policy"]))
        fully_shard(module, **options)

    monkeypatch.setattr(policy.fsdp, "fully_shard", shard)
    offloaded = policy.load_policy(reference, mesh, torch.float32, offload=True)
    assert set(policies) == {policy.fsdp.CPUOffloadPolicy}
    policy.add_ref_logp(offloaded, updates)
    assert torch.equal(updates[0][0].ref_logp, expected)


@pytest.mark.parametrize("machines", [1, 2])
def test_two_ranks_make_the_update_of_one(machines: int, on_two_ranks: Path) -> None:
    """A mean per rank in place of the global one shows, and so does a copy that is counted."""
    two_ranks = on_two_ranks / f"machines-{machines}"
    plain = make_lm()
    expected = plain_update(plain, torch.optim.AdamW(plain.parameters(), LR))
    metrics = json.loads((two_ranks / "metrics.json").read_text())
    assert_same_metrics(metrics, expected)
    assert_same_weights(read_weights(two_ranks / "step-1"), plain, make_lm())


def test_a_copy_that_keeps_a_rank_in_step_counts_nothing(
    one_machine: None, reference: Path
) -> None:
    """A rank that has no micro-batch left computes a copy with weight 0."""
    loaded, optimizer = load(reference)
    updates = make_updates(1000)
    copies = make_updates(1000, make_responses(3, seed=2))
    copies[0][0].weight = 0.0
    updates[0].append(copies[0][0])
    metrics = train_online.update(loaded, optimizer, updates, loss_with_statistics)
    plain = make_lm()
    expected = plain_update(plain, torch.optim.AdamW(plain.parameters(), LR))
    assert_same_metrics(metrics, expected)
    weights = {name: p.full_tensor() for name, p in loaded.lm.named_parameters()}
    assert_same_weights(weights, plain, make_lm())


def test_log_ratio_is_exactly_zero_before_the_first_update(
    one_machine: None, reference: Path
) -> None:
    loaded, optimizer = load(reference)
    ref, _ = load(reference)
    updates = make_updates(20)
    policy.add_ref_logp(ref, updates)
    metrics = train_online.update(loaded, optimizer, updates, loss_with_statistics)
    assert metrics["logratio"] == metrics["kl_per_token"] == 0.0


# ---------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.parametrize("machines", [1, 2])
def test_checkpoint_of_two_ranks_continues_on_one(
    machines: int, one_machine: None, on_two_ranks: Path
) -> None:
    """Without the optimizer's state Adam would start again: the second step would be another."""
    two_ranks = on_two_ranks / f"machines-{machines}"
    loaded, optimizer = load(two_ranks / "step-1")
    policy.load_optimizer(two_ranks / "step-1", loaded, optimizer)
    train_online.update(loaded, optimizer, make_updates(20), loss_with_statistics)

    plain = make_lm()
    plain_optimizer = torch.optim.AdamW(plain.parameters(), LR)
    plain_update(plain, plain_optimizer)
    plain_update(plain, plain_optimizer)
    weights = {name: p.full_tensor() for name, p in loaded.lm.named_parameters()}
    assert_same_weights(weights, plain, make_lm())


def test_a_saved_folder_is_an_ordinary_model(two_ranks: Path) -> None:
    from transformers import AutoModelForCausalLM

    for name in ("step-1", "final"):
        lm = AutoModelForCausalLM.from_pretrained(two_ranks / name, dtype="auto")
        assert {parameter.dtype for parameter in lm.parameters()} == {torch.float32}
        weights = read_weights(two_ranks / name)
        assert "lm_head.weight" not in weights  # it is tied to the embedding
        for key, parameter in lm.named_parameters():
            assert torch.equal(parameter, weights[key]), key
        assert (two_ranks / name / "tokenizer_config.json").exists()
    assert (two_ranks / "step-1" / "trainer").is_dir()
    assert not (two_ranks / "final" / "trainer").exists()


@pytest.fixture
def checkpoints(two_ranks: Path, tmp_path: Path) -> Path:
    """Make a folder with four checkpoints: steps 2, 9, 10 and 100, in no alphabetical order."""
    folder = tmp_path / "checkpoints"
    for step in (2, 9, 10, 100):
        shutil.copytree(two_ranks / "step-1", folder / f"step-{step}")
        manifest = json.loads((folder / f"step-{step}" / "manifest.json").read_text())
        manifest["step"] = step
        files.write_json(folder / f"step-{step}" / "manifest.json", manifest)
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_newest_checkpoints_are_kept(checkpoints: Path) -> None:
    (checkpoints / ".step-101.unfinished").mkdir()
    assert policy.find_checkpoint(checkpoints) == checkpoints / "step-100"
    policy.remove_old_checkpoints(checkpoints, 2)
    assert names(checkpoints) == {"step-10", "step-100"}


def test_other_folders_and_links_do_no_harm(checkpoints: Path, tmp_path: Path) -> None:
    for name in ("step-\N{SUPERSCRIPT TWO}", "step-two", "stepping"):
        (checkpoints / name).mkdir()
    # A user has moved a checkpoint to another disk.
    (checkpoints / "step-9").rename(tmp_path / "moved")
    (checkpoints / "step-9").symlink_to(tmp_path / "moved")
    policy.remove_old_checkpoints(checkpoints, 2)
    kept = {"step-10", "step-100", "step-\N{SUPERSCRIPT TWO}", "step-two", "stepping"}
    assert names(checkpoints) == kept
    assert (tmp_path / "moved" / "model.safetensors").exists()


def test_a_checkpoint_of_a_read_only_model_is_written(
    one_machine: None, reference: Path, tmp_path: Path
) -> None:
    shared = shutil.copytree(reference, tmp_path / "shared")
    for path in shared.iterdir():
        path.chmod(0o444)
    loaded, optimizer = load(shared)
    policy.save_checkpoint(tmp_path / "step-1", 1, loaded, optimizer, shared)
    for path in (tmp_path / "step-1").iterdir():
        assert path.stat().st_mode & 0o200, f"{path} is read-only as well"


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGE = {
    "weights cut short": lambda folder: cut(folder / "model.safetensors"),
    "weights gone": lambda folder: (folder / "model.safetensors").unlink(),
    "optimizer cut short": lambda folder: cut(next((folder / "trainer").glob("*.distcp"))),
    "manifest gone": lambda folder: (folder / "manifest.json").unlink(),
    "manifest cut short": lambda folder: cut(folder / "manifest.json"),
    "manifest of no end": lambda folder: (folder / "manifest.json").write_text(
        '{"files": {}, "step": Infinity}'
    ),
    "manifest of a list": lambda folder: (folder / "manifest.json").write_text("[]"),
    "another step's": lambda folder: shutil.copy(
        folder.with_name("step-2") / "manifest.json", folder
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_put_aside(
    case: str, checkpoints: Path, capsys: pytest.CaptureFixture
) -> None:
    DAMAGE[case](checkpoints / "step-100")
    if case == "manifest cut short":
        cut(checkpoints / "step-100" / "manifest.json")  # after the line break, the brace
    assert policy.find_checkpoint(checkpoints) == checkpoints / "step-10"
    (damaged,) = names(checkpoints) - {"step-2", "step-9", "step-10"}
    assert damaged.startswith("damaged-") and damaged.endswith("step-100")
    err = capsys.readouterr().err
    assert "step-100 is damaged" in err and len(err.splitlines()) == 1
    shutil.rmtree(checkpoints / damaged)
    for step in (2, 9, 10):
        shutil.rmtree(checkpoints / f"step-{step}")
    assert policy.find_checkpoint(checkpoints) is None


def test_a_model_that_was_moved_to_another_disk_is_saved_again(
    one_machine: None, reference: Path, tmp_path: Path
) -> None:
    loaded, _ = load(reference)
    (tmp_path / "disk").mkdir()
    (tmp_path / "final").symlink_to(tmp_path / "disk")
    policy.save_final_model(tmp_path / "final", 3, loaded, reference)
    assert policy.saved_step(tmp_path / "final") == 3
    assert not (tmp_path / "final").is_symlink() and names(tmp_path / "disk") == set()


def test_a_save_that_fails_leaves_the_old_checkpoint(
    one_machine: None, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder gets its name last: until then the one before it is untouched."""
    loaded, optimizer = load(reference)
    folder = tmp_path / "checkpoints" / "step-1"
    policy.save_checkpoint(folder, 1, loaded, optimizer, reference)
    before = SimpleNamespace(step=policy.saved_step(folder), weights=read_weights(folder))
    train_online.update(loaded, optimizer, make_updates(20), loss_with_statistics)

    def full_disk(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(policy, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        policy.save_checkpoint(folder, 1, loaded, optimizer, reference)
    assert policy.find_checkpoint(folder.parent) == folder
    assert policy.saved_step(folder) == before.step == 1
    assert all(torch.equal(x, before.weights[name]) for name, x in read_weights(folder).items())
    monkeypatch.undo()
    policy.save_checkpoint(folder, 1, loaded, optimizer, reference)
    assert names(folder.parent) == {"step-1"}
    changed = read_weights(folder)
    assert not all(torch.equal(x, changed[name]) for name, x in before.weights.items())
