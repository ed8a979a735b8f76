"""Which models are refused, and by what: tiny random models of several architectures."""

import contextlib
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import losses
from apo import self_check
from apo.engine import Response
from apo.files import UserError
from apo.policy import Policy
from apo.problems import Prompt

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
# The longest sequence below has 30 tokens.
LONGEST = 64


def save_model(folder: Path, kind: str, **settings: object) -> Path:
    """Save a model of an architecture, with random norms and biases as well."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | settings))
    lm = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    lm.save_pretrained(folder)
    return folder


def make_responses(folder: Path) -> list[Response]:
    """Make four responses whose sampler's ln pi is right."""
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    responses = []
    for number in range(4):
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(2, SIZES["vocab_size"], (15 + 5 * number,), generator=generator)
        response = Response(
            index=number,
            prompt=Prompt({"id": str(number)}, "", ids[:8].tolist()),
            sample=0,
            ids=ids[8:].tolist(),
            text="",
            finished=True,
            sampler_logp=[],
        )
        with torch.no_grad():
            logp = lm(ids[None]).logits[0].log_softmax(-1)
        for place in range(8, len(ids)):
            response.sampler_logp.append(logp[place - 1, ids[place]].item())
        responses.append(response)
    return responses


def check(folder: Path) -> None:
    self_check.check_config(folder, LONGEST)
    self_check.check_model(folder, make_responses(folder))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "rope_theta": 1e4,
}


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen2", {"rope_parameters": YARN | {"rope_theta": 1e4}}),
        ("qwen3", {"head_dim": 16}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": LONGEST}),
        ("phi3", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "sliding_window": None}),
        ("phi3", {"original_max_position_embeddings": LONGEST, "rope_parameters": LONGROPE}),
        ("smollm3", {"no_rope_layer_interval": 2}),
        ("olmo2", {}),
        ("granite", {"residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
    ],
)
def test_a_model_that_is_right_passes(kind: str, settings: dict, tmp_path: Path) -> None:
    check(save_model(tmp_path, kind, **settings))


@pytest.mark.parametrize(
    "kind, settings, says",
    [
        ("qwen3_moe", {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 8}, "experts"),
        ("mixtral", {"num_local_experts": 4}, "experts"),
        ("mistral", {"sliding_window": LONGEST - 1}, "sliding_window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "8"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "conv"),
        (
            "phi3",
            {"original_max_position_embeddings": LONGEST - 1, "rope_parameters": LONGROPE},
            "rotary",
        ),
        ("granite", {"logits_scaling": 4.0}, "ln pi"),
        ("cohere", {"logit_scale": 0.25}, "ln pi"),
        ("gemma2", {"sliding_window": LONGEST, "head_dim": 16}, "ln pi"),  # it caps logits softly
        ("phi", {}, "ln pi"),  # its head has a bias
        ("mamba", {"state_size": 4}, "not supported"),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}, "layers"),
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 32}, "layers"),
        ("stablelm", {}, "packed"),
    ],
)
def test_a_model_that_would_be_wrong_is_refused(
    kind: str, settings: dict, says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        check(save_model(tmp_path, kind, **settings))


def test_a_window_inside_a_multimodal_config_is_found() -> None:
    config = {"vision_config": {"hidden_size": 8}, "text_config": {"sliding_window": 8}}
    assert self_check.find_window(config, 9) is not None
    assert self_check.find_window(config, 8) is None


def test_an_engine_that_disagrees_is_noticed(tmp_path: Path) -> None:
    """So would be one that computes this architecture in another way."""
    folder = save_model(tmp_path, "qwen2")
    responses = make_responses(folder)
    for response in responses:
        response.sampler_logp = [logp - 0.02 for logp in response.sampler_logp]
    with pytest.raises(UserError, match="vLLM"):
        self_check.check_model(folder, responses)
    responses[0].sampler_logp[0] = float("nan")
    with pytest.raises(UserError, match="vLLM"):
        self_check.check_model(folder, responses)


def test_a_mistake_in_our_own_code_is_no_unsupported_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever changes the trainer needs the traceback, and not a sentence about the model."""
    folder = save_model(tmp_path, "qwen2")
    responses = make_responses(folder)
    monkeypatch.delattr(losses, "token_logprob")  # a name that Policy.forward uses
    with pytest.raises(AttributeError, match="token_logprob"):
        self_check.check_model(folder, responses)


def test_a_mistake_that_shows_inside_torch_is_ours_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path, "qwen2")
    responses = make_responses(folder)

    def token_logprob(hidden, head, targets, temperature):
        logits = hidden[:-1] @ head.T
        return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")

    token_logprob.__code__ = token_logprob.__code__.replace(co_filename=losses.__file__)
    monkeypatch.setattr(losses, "token_logprob", token_logprob)
    with pytest.raises(ValueError, match="batch_size"):
        self_check.check_model(folder, responses)


class NoisyPolicy(Policy):
    """A policy whose layers draw random numbers."""

    def forward(self, **inputs: object) -> torch.Tensor:
        logp = super().forward(**inputs)
        return logp + 1e-6 * torch.rand_like(logp)


@pytest.mark.parametrize(
    "kind, off, says",
    [
        (Policy, 0.0, None),
        (Policy, 0.02, "disagree"),
        (Policy, float("nan"), "disagree"),
        (NoisyPolicy, 0.0, "random numbers"),
    ],
)
def test_the_policy_is_compared_with_the_engine(
    kind: type[Policy],
    off: float,
    says: str | None,
    process_group: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = save_model(tmp_path, "qwen2")
    responses = make_responses(folder)
    for response in responses:
        response.reward = 0.0
        response.sampler_logp = [logp + off for logp in response.sampler_logp]
    monkeypatch.setattr(self_check, "reshard", lambda policy: None)  # it is not sharded
    self_check.register_packed_attention()
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    lm.set_attn_implementation("packed")
    expected = contextlib.nullcontext() if says is None else pytest.raises(UserError, match=says)
    with expected:
        self_check.check_policy(kind(lm), responses)


def test_only_some_responses_are_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every engine samples some, and rank 0 would take long for those of many engines."""
    taken = []
    monkeypatch.setattr(self_check, "compare", lambda folder, some: taken.extend(some))
    self_check.check_model(tmp_path, ["a response"] * 100)
    assert len(taken) == self_check.NUM_RESPONSES


def test_a_folder_that_transformers_cannot_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(UserError, match="no-such-model"):
        self_check.check_config(tmp_path, LONGEST)
