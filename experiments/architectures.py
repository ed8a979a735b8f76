"""Which architectures can be trained? A tiny random model of each runs through the stages.

    python -m experiments.architectures          all: an hour on one core
    python -m experiments.architectures Qwen3    one of them

If it is stopped and started again, it goes on with the next one.

A model is called right if all of this holds: stage 1 accepts it; stage 2 trains it for three steps,
and the trainer's and the engine's ln pi of the same tokens agree to 1e-4 nats at each; and the
finished model passes the checks of stage 1 in turn, which compare transformers, the engine and the
trainer. Otherwise stage 1 must refuse it with a sentence. Nothing in between may happen.

The table goes to experiments/results/architectures.txt. docs/hardware.md lists what is right.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from experiments.toy import make_tokenizer

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "experiments" / "results" / "architectures.txt"
FOLDER = ROOT / "architectures"  # models and runs; `make clean` removes it
NUM_STEPS = 3
LONGEST_PROMPT = 160
LONGEST_RESPONSE = 24
LONGEST = LONGEST_PROMPT + LONGEST_RESPONSE
EOS = make_tokenizer().eos_token_id

# All are as small as this, unless the table below says something else.
SIZES = {
    # More than the tokenizer has, as in many models.
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    # The CPU engine's attention wants heads of 32 or more.
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    # Larger than usual: with nearly equal logits every mistake would be small.
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
FULL_HEADS = {"num_key_value_heads": 2}
HEAD_DIM = {"head_dim": 32}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4}
EXPERTS |= {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
# DeepSeek-V2 brought experts in groups, with one that is always asked.
GROUPED_EXPERTS = EXPERTS | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
GROUPED_EXPERTS |= {"n_shared_experts": 1}
LATENT_HEADS = FULL_HEADS | {"kv_lora_rank": 32, "q_lora_rank": 32, "v_head_dim": 32}
LATENT_HEADS |= {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32}
LINEAR_HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
LINEAR_HEADS |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
GPT_SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}


def rope(settings: dict[str, Any]) -> dict[str, Any]:
    """Write rotary positions as a config has them."""
    return {"rope_parameters": settings | {"rope_theta": 10000.0}}


# A name, the model_type of transformers, and what differs from SIZES.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("qwen2", {}),
    "Qwen2, tied head": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen2, YaRN": ("qwen2", rope(YARN)),
    "Qwen2, window off": ("qwen2", {"use_sliding_window": False, "sliding_window": 8}),
    "Qwen2, window of 8": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    ),
    "Qwen3": ("qwen3", HEAD_DIM),
    "Llama": ("llama", {}),
    "Llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "Llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama, dropout": ("llama", {"attention_dropout": 0.1}),
    "Llama 3, its RoPE": ("llama", rope(LLAMA3)),
    "Llama, linear RoPE": ("llama", rope({"rope_type": "linear", "factor": 4.0})),
    "Llama, dynamic RoPE": ("llama", rope({"rope_type": "dynamic", "factor": 4.0})),
    "Mistral": ("mistral", {"sliding_window": None}),
    "Mistral, window of 8": ("mistral", {"sliding_window": 8}),
    "Mistral, window of 4096": ("mistral", {"sliding_window": 4096}),
    "Ministral, window of 8": ("ministral", HEAD_DIM | {"sliding_window": 8}),
    "Ministral 3": ("ministral3", HEAD_DIM),
    "Gemma": ("gemma", HEAD_DIM | {"tie_word_embeddings": True}),
    "Gemma 2": ("gemma2", HEAD_DIM | {"query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    "Gemma 3, window of 8": ("gemma3_text", HEAD_DIM | {"sliding_window": 8}),
    "Gemma 3, window of 512": ("gemma3_text", HEAD_DIM | {"sliding_window": 512}),
    "Gemma 4, window of 8": ("gemma4_text", HEAD_DIM | {"sliding_window": 8}),
    "Phi-2": ("phi", FULL_HEADS),
    "Phi-3": ("phi3", {"sliding_window": None}),
    "Phi-3, window of 8": ("phi3", {"sliding_window": 8}),
    "Phi-3, dropout": ("phi3", {"sliding_window": None, "resid_pdrop": 0.1, "embd_pdrop": 0.1}),
    "Phi-3, longrope": ("phi3", rope(LONGROPE) | {"original_max_position_embeddings": 256}),
    "Phi-3, beyond its longrope": (
        "phi3",
        rope(LONGROPE) | {"original_max_position_embeddings": 128},
    ),
    "SmolLM3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "SmolLM3, window of 8": (
        "smollm3",
        {"num_hidden_layers": 4, "no_rope_layer_interval": 2}
        | {"use_sliding_window": True, "sliding_window": 8},
    ),
    "OLMo": ("olmo", {}),
    "OLMo, clipped": ("olmo", {"clip_qkv": 0.5}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3, window of 8": ("olmo3", {"sliding_window": 8}),
    "Granite": ("granite", {"logits_scaling": 4.0}),
    "Cohere": ("cohere", {"logit_scale": 0.25}),
    "Cohere 2, window of 8": ("cohere2", {"logit_scale": 0.25, "sliding_window": 8}),
    "GLM": ("glm", HEAD_DIM),
    "GLM-4": ("glm4", HEAD_DIM),
    "EXAONE 4": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "EXAONE 4, window of 8": ("exaone4", {"sliding_window": 8}),
    "Seed-OSS": ("seed_oss", HEAD_DIM),
    "Hunyuan": ("hunyuan_v1_dense", HEAD_DIM),
    "ERNIE 4.5": ("ernie4_5", {}),
    "Arcee": ("arcee", {}),
    "Apertus": ("apertus", {}),
    "BitNet": ("bitnet", {}),
    "nanochat": ("nanochat", {}),
    "StarCoder 2": ("starcoder2", {"sliding_window": None, "tie_word_embeddings": True}),
    "StableLM": ("stablelm", FULL_HEADS),
    "Nemotron": ("nemotron", {}),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPT-2": ("gpt2", GPT_SIZES),
    "GPT-BigCode": ("gpt_bigcode", GPT_SIZES),
    "GPT-J": ("gptj", GPT_SIZES | {"rotary_dim": 32}),
    "OPT": ("opt", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "BLOOM": ("bloom", {"n_head": 2, "n_layer": 2}),
    "Falcon": ("falcon", {"alibi": False}),
    "Mixtral": ("mixtral", EXPERTS),
    "Qwen3, experts": ("qwen3_moe", HEAD_DIM | EXPERTS),
    "OLMo, experts": ("olmoe", FULL_HEADS | EXPERTS),
    "Granite, experts": ("granitemoe", EXPERTS),
    "GLM-4, experts": ("glm4_moe", HEAD_DIM | GROUPED_EXPERTS),
    "dots1, experts": ("dots1", HEAD_DIM | GROUPED_EXPERTS),
    "DeepSeek-V2, experts": ("deepseek_v2", LATENT_HEADS | GROUPED_EXPERTS),
    "DeepSeek-V3, experts": ("deepseek_v3", LATENT_HEADS | GROUPED_EXPERTS),
    "Llama 4, experts": ("llama4_text", HEAD_DIM | EXPERTS | {"intermediate_size_mlp": 128}),
    "MiniMax M2, experts": ("minimax_m2", HEAD_DIM | EXPERTS),
    "gpt-oss": ("gpt_oss", HEAD_DIM | EXPERTS),
    "Qwen3-Next": (
        "qwen3_next",
        HEAD_DIM | EXPERTS | LINEAR_HEADS | {"shared_expert_intermediate_size": 64},
    ),
    "Granite 4, Mamba": ("granitemoehybrid", MAMBA | {"layer_types": ["mamba", "attention"]}),
    "LFM2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
}


class Verdict(NamedTuple):
    """What became of one architecture."""

    name: str
    outcome: str  # "right", "refused", or what is wrong
    gap: float | None  # the largest logprob_gap of the steps
    reason: str  # the sentence of a refusal


def build(name: str, folder: Path) -> None:
    """Save a tiny random model of an architecture with the toy's tokenizer."""
    kind, changes = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | changes))
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in lm.parameters():
            # Norms start at 1 and biases at 0, where a mistake would not show.
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    lm.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def run_script(*command: object) -> subprocess.CompletedProcess:
    """Run a stage as a user does."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def run_stage_1(model: Path, data: Path, out: Path) -> subprocess.CompletedProcess:
    """Sample two short responses to each problem."""
    sizes = ("--num-value-samples", 2, "--max-prompt-tokens", LONGEST_PROMPT)
    sizes += ("--max-tokens", LONGEST_RESPONSE)
    return run_script("offline_value.py", "--model", model, "--dataset", data, *sizes, "--out", out)


def refusal(result: subprocess.CompletedProcess) -> str | None:
    """Return the sentence of a refusal, None if the script ended in any other way."""
    sentences = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    if result.returncode == 2 and len(sentences) == 1:
        return sentences[0].removeprefix("error: ")
    return None


def judge(name: str, folder: Path, data: Path) -> Verdict:
    """Take one architecture through the stages."""
    model = folder / "model"
    build(name, model)
    first = run_stage_1(model, data, folder / "values.json")
    if first.returncode != 0:
        reason = refusal(first)
        if reason is None:
            return Verdict(name, f"stage 1 exits with {first.returncode}", None, "")
        return Verdict(name, "refused", None, reason.replace(f"{model} ", ""))

    steps = ("--batch-size", 8, "--num-steps", NUM_STEPS, "--lr", 1e-3)
    values = ("--values", folder / "values.json")
    second = run_script("train_online.py", *values, *steps, "--out", folder / "run")
    if second.returncode != 0:
        return Verdict(name, f"stage 2 exits with {second.returncode}", None, "")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    gap = max(json.loads(line)["logprob_gap"] for line in lines)
    if gap > 1e-4:
        return Verdict(name, "wrong: gap", gap, "")

    final = run_stage_1(folder / "run" / "final", data, folder / "again.json")
    if final.returncode != 0:
        return Verdict(name, f"final/ exits with {final.returncode}", gap, "")
    return Verdict(name, "right", gap, "")


def judge_all(names: list[str]) -> Iterator[Verdict]:
    """Judge architectures, and keep each verdict, so that a second start goes on."""
    FOLDER.mkdir(exist_ok=True)
    data = FOLDER / "problems.jsonl"
    rows = [{"question": f"What is {7 * i} + {13 * i}?", "answer": 20 * i} for i in range(12)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in names:
        saved = FOLDER / f"{name}.json"
        if not saved.exists():
            with tempfile.TemporaryDirectory() as folder:
                verdict = judge(name, Path(folder), data)
            saved.write_text(json.dumps(verdict))
        yield Verdict(*json.loads(saved.read_text()))


def describe(verdict: Verdict) -> str:
    """Write a verdict as one line of the table."""
    gap = "" if verdict.gap is None else f"{verdict.gap:.1e}"
    return f"{verdict.name:<28} {verdict.outcome:<10} {gap:>8}  {verdict.reason}".rstrip()


def main() -> None:
    """Judge the architectures that are named, or all, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="some architectures; by default all")
    names = parser.parse_args().names
    for name in names:
        if name not in ARCHITECTURES:
            parser.error(f"no architecture {name!r}: choose from {', '.join(ARCHITECTURES)}")
    lines = [f"{'architecture':<28} {'outcome':<10} {'gap':>8}  reason of the refusal"]
    for verdict in judge_all(names or list(ARCHITECTURES)):
        lines.append(describe(verdict))
        print(lines[-1], flush=True)
    if not names:
        RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
