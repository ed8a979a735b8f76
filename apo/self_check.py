"""Refuse models that the trainer would compute wrongly, before the long runs begin.

The trainer lays sequences end to end, uses its own attention, and takes ln pi from the last hidden
states. An architecture that needs anything else (a window, scaled logits, a state that flows on
from token to token) would train without an error, but on a wrong distribution. So three things are
checked, and none of them knows architectures by name:

1. `check_config`, before the engine starts: what only the config tells, such as a window that is
   longer than the test, and whether the model is made of layers as the trainer expects.
2. `check_model`, on rank 0: ln pi of packed sequences is that of each sequence alone through the
   plain model, and that of the engine.
3. `check_policy`, in stage 2: ln pi by the sharded policy is that of the engine, which has just got
   the policy's weights.
"""

import math
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apo import engine, files
from apo.engine import Request, Response
from apo.files import UserError
from apo.policy import (
    LARGEST_GAP,
    ON_GPU,
    Policy,
    make_micro_batches,
    pack,
    register_packed_attention,
    reshard,
)
from apo.problems import Prompt

# Packed or alone, the same float32 numbers are added in another order: ln pi differs by 1e-6 or so.
LARGEST_PACKING_ERROR = 1e-3
# In float32 the engine's ln pi differs by 1e-6 or so, on average over the tokens.
LARGEST_CHECK_GAP = LARGEST_GAP if ON_GPU else 1e-4
# The folders of this repository's own code.
OUR_CODE = (Path(__file__).parent, Path(__file__).parent.parent)
# Responses that are sampled for each rank. Of all of them, rank 0 computes this many again.
NUM_RESPONSES = 4
NUM_TOKENS = 16
# They are packed as in a step, at the default of --micro-batch-tokens.
MICRO_BATCH_TOKENS = 8192
# The names under which configs have the number of tokens that a layer's attention sees.
WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "window_size",
    "local_attention",
    "attention_chunk_size",
)

# ---------------------------------------------------------------------------------------------
# By the config


def check_config(folder: Path, longest: int) -> None:
    """Raise UserError for what a short test cannot show, and for another kind of model.

    `longest` is the number of tokens of the longest prompt and response together.
    """
    config = read_config(folder)
    for reason in (
        find_kind(config),
        find_experts(config),
        find_state(config),
        find_window(config, longest),
        find_length_dependence(config, longest),
    ):
        if reason is not None:
            raise UserError(f"{folder} ({config.get('model_type')}) is not supported: {reason}")
    check_layers(folder)


def check_layers(folder: Path) -> None:
    """Raise UserError unless the layers are where the trainer looks for them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):  # shapes without weights
            lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except Exception as error:  # a config.json can be wrong in many ways
        reason = files.one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"{folder}: its config.json describes no model ({reason})") from error
    if not hasattr(lm.base_model, "layers"):
        raise UserError(
            f"{folder} ({lm.config.model_type}) is not supported: its layers are not where the "
            "trainer looks for them (base_model.layers)"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Read a model's config, with what its architecture fills in by default."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder).to_dict()
    except Exception as error:  # the library raises a dozen unrelated types
        reason = files.one_line(error)
        raise UserError(f"{folder} is not supported: {reason}") from error


def vocabulary_size(folder: Path) -> float:
    """Return for how many different tokens a model has an embedding; inf if it does not say."""
    for config in parts_of(read_config(folder)):
        if type(config.get("vocab_size")) is int:
            return config["vocab_size"]
    return math.inf


def parts_of(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """List a config and those inside of it, such as the text_config of a multimodal model."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from parts_of(value)


def find_kind(config: dict[str, Any]) -> str | None:
    """Say so if it is no plain language model: transformers could not load it for training."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "it is no language model that continues a text (AutoModelForCausalLM)"
    for part in parts_of(config):
        if part.get("quantization_config"):
            return "its weights are quantised, and training needs them in full"
    return None


def find_experts(config: dict[str, Any]) -> str | None:
    """Say so if the model is a mixture of experts.

    vLLM keeps the weights of all experts in one tensor of its own layout, and does not put weights
    that arrive during training into it correctly.
    """
    for part in parts_of(config):
        for name, value in part.items():
            if "experts" in str(name) and type(value) is int and value > 1:
                return f"it is a mixture of experts ({name} {value}), which vLLM cannot update"
    return None


def find_state(config: dict[str, Any]) -> str | None:
    """Say so if some layers are no attention: their state flows on into the next sequence."""
    for part in parts_of(config):
        for kind in part.get("layer_types") or ():
            if kind not in ("full_attention", "sliding_attention", "chunked_attention"):
                return f"it has layers of the kind {kind}, which cannot run packed sequences"
    return None


def find_window(config: dict[str, Any], longest: int) -> str | None:
    """Say so if tokens of one sequence can be too far apart to see each other.

    `packed_attention` has no window. That is right as long as all sequences fit into it.
    """
    for part in parts_of(config):
        kinds = part.get("layer_types")
        # Without layer_types, as in Mistral's config, a window holds for all layers.
        if kinds and set(kinds) == {"full_attention"}:
            continue
        for name in WINDOWS:
            window = part.get(name)
            if type(window) is int and window < longest:
                return (
                    f"its attention sees {window} tokens ({name}), and a prompt and its response "
                    f"can have {longest}: lower --max-tokens or --max-prompt-tokens"
                )
    return None


def find_length_dependence(config: dict[str, Any], longest: int) -> str | None:
    """Say so if its rotary positions depend on the length, and sequences can reach that length.

    The engine and the trainer then decide by different lengths: the engine by the longest sequence
    that it may meet, the trainer by the longest one in a micro-batch.
    """
    length = exact_length(config)
    if longest > length:
        return (
            f"beyond {length} tokens its rotary positions depend on the length of the text, and a "
            f"prompt and its response can have {longest}: lower --max-tokens or "
            "--max-prompt-tokens"
        )
    return None


def exact_length(config: dict[str, Any]) -> float:
    """Return the longest sequence whose rotary positions do not depend on its length, or inf."""
    name = "original_max_position_embeddings"
    for part in parts_of(config):
        for rope in parts_of(part.get("rope_parameters") or part.get("rope_scaling") or {}):
            if rope.get("rope_type") in ("longrope", "dynamic"):
                return rope.get(name) or part.get(name) or part["max_position_embeddings"]
    return float("inf")


# ---------------------------------------------------------------------------------------------
# By comparing


def sample_for_check(llm: Any, prompts: list[Prompt]) -> list[Response]:
    """Let every engine sample short responses to the first prompts. All ranks call it together."""
    requests = []
    for i in range(NUM_RESPONSES * torch.distributed.get_world_size()):
        requests.append(Request(prompts[i % len(prompts)], seed=i, logprobs=True))
    sampled = list(engine.generate(llm, requests, 1.0, NUM_TOKENS))
    for response in sampled:
        response.reward = 0.0  # it is not graded
    return engine.gather(sampled)


def check_model(folder: Path, responses: list[Response]) -> None:
    """Compare ln pi of these responses: packed, each alone, and by the engine. Rank 0 calls it.

    The first two are computed here, in float32 on the CPU, so that only the method differs. The
    third the engine computed while it sampled, on a GPU in bf16. Raises UserError if they disagree.
    """
    # The other ranks wait, so all cores are free. torchrun gives each rank only one thread.
    num_threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        compare(folder, responses[:NUM_RESPONSES])
    finally:
        torch.set_num_threads(num_threads)


def compare(folder: Path, responses: list[Response]) -> None:
    """Raise UserError as `check_model` says; the number of threads is its caller's matter."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        alone = torch.cat([plain_logprobs(lm, response) for response in responses])
        packed = packed_logprobs(lm, responses)
    name = f"{folder} ({lm.config.model_type})"
    error = (packed - alone).abs().max().item()
    if not error < LARGEST_PACKING_ERROR:
        raise UserError(
            f"{name} is not supported: the trainer's ln pi differs from the plain model's by up to "
            f"{error:.2g} nats a token, because its attention, its head or its layers do something "
            "that apo/policy.py does not"
        )
    gap = mean_gap(alone, sampler_logprobs(responses))
    if not gap < LARGEST_CHECK_GAP:
        raise UserError(
            f"{name} is not supported: vLLM's ln pi differs from the plain model's by {gap:.2g} "
            "nats a token"
        )


def plain_logprobs(lm: torch.nn.Module, response: Response) -> Tensor:
    """Return ln pi of a response's tokens (R,) by the plain model, without any of our own code."""
    prompt_ids = response.prompt.ids
    tokens = torch.tensor([prompt_ids + response.ids])
    logp = lm(input_ids=tokens).logits[0].float().log_softmax(dim=-1)
    # The token before a token predicts it.
    rows = range(len(prompt_ids) - 1, tokens.shape[1] - 1)
    return logp[list(rows), tokens[0, len(prompt_ids) :]]


def packed_logprobs(lm: torch.nn.Module, responses: list[Response]) -> Tensor:
    """Return ln pi of all responses' tokens (R,) by the trainer's code, in one micro-batch."""
    register_packed_attention()
    inputs, _ = pack([r.prompt.ids for r in responses], [r.ids for r in responses])
    try:
        lm.set_attn_implementation("packed")
        return Policy(lm)(temperature=1.0, **inputs)
    except Exception as error:  # an architecture that is made in another way fails in many ways
        if is_our_mistake(error):
            raise
        reason = files.one_line(f"{type(error).__name__}: {error}")
        raise UserError(
            f"{lm.config.model_type} is not supported: its layers cannot run packed sequences "
            f"({reason})"
        ) from error


def is_our_mistake(error: Exception) -> bool:
    """Say whether this repository, and not the model's own layers, called what failed."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.parent in OUR_CODE:
            return True
        if "transformers" in path.parts:
            return False
    return False


def sampler_logprobs(responses: list[Response]) -> Tensor:
    """Return ln pi of all responses' tokens (R,) as the engine computed them."""
    return torch.tensor([logp for response in responses for logp in response.sampler_logp])


def mean_gap(logp: Tensor, other: Tensor) -> float:
    """Return the mean difference of two ln pi, in nats a token; inf if one is not a number."""
    gap = (logp - other).abs().mean().item()
    return float("inf") if math.isnan(gap) else gap


def check_policy(policy: Policy, responses: list[Response]) -> None:
    """Compare ln pi by the sharded policy and by the engine, which has just got its weights.

    `responses` are what it has sampled since then. The same input must also give the same ln pi
    twice. All ranks call it together. Raises UserError if the results disagree.
    """
    with torch.no_grad():
        for batch in make_micro_batches(responses, temperature=1.0, budget=MICRO_BATCH_TOKENS):
            logp = policy(**batch.inputs)
            again = policy(**batch.inputs)
            gap = mean_gap(logp, batch.sampler_logp)
            if not torch.equal(logp, again):
                raise UserError(
                    "the policy gives two different ln pi for the same input: its layers draw "
                    "random numbers"
                )
            if not gap < LARGEST_CHECK_GAP:
                raise UserError(
                    f"the engine and the policy disagree on ln pi by {gap:.2g} nats a token, right "
                    "after the engine got the policy's weights: this model cannot be trained here"
                )
    reshard(policy)
