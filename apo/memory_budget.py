"""The memory of a GPU in stage 2: what each part takes, and whether the KV cache fits beside them.

Stage 2 trains and samples on the same GPUs: each holds its part of the policy, the reference and
AdamW's state, and an engine with a KV cache. The cache is sized from what a step needs. Where the
trainer and such a cache fit on the GPU together, nothing else is done. Where they do not, vLLM's
sleep mode is switched on: the cache is given up while the policy is updated.

The numbers are in bytes, for each GPU. All but the activations is arithmetic. The formula for the
activations counts the tensors that are alive at three moments of a backward pass. It was derived
from a simulation with the trainer's own code (experiments/memory.py) and agrees with it within a
few percent for Qwen2.5 of 0.5B to 32B. None of it has been measured on a GPU.
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import losses

GIB = 2**30
BLOCK = 16  # tokens; vLLM hands the cache out in such blocks
# The engine runs at most this many responses at once. If memory allows, the cache has room for so
# many at their full length. vLLM's own limit is 1024 on large cards. It counts the tokens of each
# response in a row of the whole vocabulary, so that a lower limit saves memory as well.
MOST_AT_ONCE = 256
# What no formula here covers: the CUDA context, workspaces of kernels, NCCL, the engine's CUDA
# graphs, and memory lost to fragmentation. These two are a guess until they are measured.
RESERVE_BYTES = 1.5 * GIB
RESERVE_SHARE = 0.05  # of what is free


class ModelSize(NamedTuple):
    """What decides how much memory a decoder-only model takes."""

    parameters: int  # a head that is tied to the embedding counts once
    layer_parameters: int  # of one layer
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocabulary: int

    @property
    def root_parameters(self) -> int:
        """Count what is in no layer: embedding, head and last norm. FSDP gathers them together."""
        return self.parameters - self.num_layers * self.layer_parameters


class Setup(NamedTuple):
    """The settings of a run that decide how much memory it takes."""

    gpus_per_machine: int
    num_machines: int
    micro_batch_tokens: int
    gradient_checkpointing: bool
    offload_ref: bool
    tensor_parallel_size: int
    num_requests: int  # responses that one engine samples in a step
    longest: int  # tokens of the longest prompt and response together
    most_of_card: float  # --gpu-memory-utilization
    lora_rank: int = 0  # 0: all weights are trained


class Budget(NamedTuple):
    """Where the memory of one GPU goes, in bytes."""

    weights: int  # of the policy
    gradients: int
    optimizer: int  # AdamW's two moments
    reference: int
    activations: int  # with what FSDP gathers and reduces
    engine: int  # its weights
    cache: int
    gathered: int  # of several GPUs: the largest weight, put together to be saved
    reserve: int
    card: int  # what is free before anything is loaded
    sleep_mode: bool  # whether the cache is given up while the policy is updated

    @property
    def training(self) -> int:
        """Add up what is there during an update; the cache and the reserve not included."""
        trainer = self.weights + self.gradients + self.optimizer + self.reference
        return trainer + self.activations + self.engine

    @property
    def sampling(self) -> int:
        """Add up what is there while the engine samples; the policy is saved beside the cache."""
        models = self.weights + self.optimizer + self.reference + self.engine
        return models + self.cache + self.gathered + self.reserve

    @property
    def peak(self) -> int:
        """Return the most that is needed at any time."""
        cache = 0 if self.sleep_mode else self.cache
        return max(self.training + cache + self.reserve, self.sampling)


# ---------------------------------------------------------------------------------------------
# Parts


def model_size(config: Any) -> ModelSize:
    """Read the size of a model off its transformers config. No weight is allocated."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    text = config.get_text_config()
    num_heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    return ModelSize(
        parameters=sum(p.numel() for p in lm.parameters()),
        layer_parameters=sum(p.numel() for p in lm.base_model.layers[0].parameters()),
        num_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        # A few architectures have another name for it; most of them have this size.
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        num_heads=num_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or num_heads,
        head_size=head_size,
        vocabulary=text.vocab_size,
    )


def num_adapter_parameters(size: ModelSize, lora_rank: int) -> int:
    """Count LoRA's parameters: of each linear layer, the rank times its inputs and its outputs."""
    width = size.num_heads * size.head_size
    kv_width = size.num_kv_heads * size.head_size
    attention = 2 * (size.hidden + width) + 2 * (size.hidden + kv_width)
    mlp = 3 * (size.hidden + size.intermediate)
    return lora_rank * size.num_layers * (attention + mlp)


def layer_bytes(size: ModelSize, all_trained: bool) -> int:
    """Return what a layer keeps of each token for its backward pass, in bytes.

    In bf16: the inputs of norms, attention and MLP.
    - Each of the two norms keeps the hidden state once in float32, which counts as two bf16 copies,
      and twice in bf16: 2 * (2 + 2) = 8 copies. If it is not trained, one bf16 copy less: 6.
    - The attention keeps queries and its result, keys and values.
    - The MLP keeps four tensors.
    In float32: the attention's normaliser of each head, and one number of each norm.
    """
    hidden = (8 if all_trained else 6) * size.hidden
    width = size.num_heads * size.head_size
    kv_width = size.num_kv_heads * size.head_size
    bf16 = hidden + 2 * width + 2 * kv_width + 4 * size.intermediate
    return 2 * bf16 + 4 * size.num_heads + 8


def activations(size: ModelSize, setup: Setup) -> int:
    """Return the most that a micro-batch takes beside weights and gradients, in bytes.

    It is the largest of three moments of the backward pass: at the head, in a layer, and at the
    end. Weights that LoRA does not train have no gradients, which is why many terms are 0 then.
    """
    all_trained = setup.lora_rank == 0
    tokens = max(setup.micro_batch_tokens, setup.longest)
    state = 2 * tokens * size.hidden  # the hidden states of all tokens
    states = size.num_layers * state  # what checkpointing keeps
    layer = tokens * layer_bytes(size, all_trained)
    kept = states if setup.gradient_checkpointing else size.num_layers * layer
    # bf16 weights that FSDP has gathered; with several GPUs those of the next layer as well.
    is_sharded = setup.gpus_per_machine > 1
    root_weights = 2 * size.root_parameters
    layer_weights = 2 * size.layer_parameters
    gathered = root_weights + (layer_weights if is_sharded else 0)
    # With several machines, FSDP averages a layer's gradient in a buffer, and keeps it until the
    # backward pass has ended. From the second micro-batch on it lies beside the sum of the earlier
    # ones, which is in Budget.gradients.
    reduced = 0
    if setup.num_machines > 1 and all_trained:
        reduced = 4 * size.layer_parameters // setup.gpus_per_machine

    # At the head, one of two moments is the largest. First there are three float32 tensors of a
    # chunk: logits, their log-softmax and its gradient; beside them is the head's gradient. Then
    # there are three gradients of the head: of the earlier chunks, of this one, and their sum. The
    # last norm keeps four states, and the rows that the head reads are one more. The rotary
    # positions are the same in all layers.
    chunk = 3 * 4 * losses.CHUNK * size.vocabulary
    head_gradient = 2 * size.vocabulary * size.hidden
    logits = chunk
    if all_trained:
        logits = max(chunk + head_gradient, 3 * head_gradient)
    rotary = 4 * tokens * size.head_size
    at_head = gathered + kept + 5 * state + rotary + logits

    # In a layer: its float32 gradient is being reduced, and the head's gradient waits.
    if setup.gradient_checkpointing:
        # Going back by one layer frees one state, and with several machines adds one reduced
        # gradient. So the most is kept at the last layer, which comes first, or at the first.
        kept = layer + max(states, state + (size.num_layers - 1) * reduced)
    # Two bf16 gradients as wide as the MLP are there at once. The 2.5 bytes were fitted to the
    # simulation.
    in_layer = tokens * (4 * size.intermediate + 2.5 * size.hidden)
    # `gathered` has the next layer's weights, `layer_weights` are this layer's.
    at_layer = gathered + layer_weights + kept + in_layer
    if all_trained:
        # In float32 the layer's gradient has twice the bytes of its bf16 weights.
        at_layer += 2 * layer_weights + head_gradient

    # At the end: what is in no layer is reduced, as bf16 (2 bytes each) and float32 (4). One GPU
    # alone copies it; the 9 bytes were fitted to the simulation.
    at_end = 0
    if all_trained:
        at_end = (6 if is_sharded else 9) * size.root_parameters + size.num_layers * reduced
    return int(max(at_head, at_layer, at_end))


def cache_bytes(size: ModelSize, num_requests: int, longest: int, tensor_parallel_size: int) -> int:
    """Return the KV cache in which so many requests have room at their full length."""
    blocks_of_request = math.ceil(longest / BLOCK) + 1  # one more, for the token that is computed
    blocks = num_requests * blocks_of_request + 1  # vLLM keeps one for itself
    kv_heads = math.ceil(size.num_kv_heads / tensor_parallel_size)
    # Keys and values, two bytes each, in every layer.
    return blocks * BLOCK * 2 * 2 * size.num_layers * kv_heads * size.head_size


# ---------------------------------------------------------------------------------------------
# The decision


def make_budget(size: ModelSize, setup: Setup, card: int) -> Budget:
    """Divide the memory of a card, and decide whether the cache stays while the policy is updated.

    `card` is what is free before anything is loaded, in bytes.
    """
    shards = setup.gpus_per_machine  # FSDP shards inside a machine
    engine = 2 * size.parameters // setup.tensor_parallel_size
    num_requests = min(setup.num_requests, MOST_AT_ONCE)
    parallel = setup.tensor_parallel_size
    needed = cache_bytes(size, num_requests, setup.longest, parallel)
    smallest = cache_bytes(size, 1, setup.longest, parallel)
    allowed = int(setup.most_of_card * card) - engine

    # Trained weights are float32. With LoRA all others are bf16, and the reference is the same.
    trained = size.parameters
    frozen = 0
    has_reference = not setup.offload_ref
    if setup.lora_rank > 0:
        trained = num_adapter_parameters(size, setup.lora_rank)
        frozen = size.parameters
        has_reference = False
    budget = Budget(
        weights=(4 * trained + 2 * frozen) // shards,
        gradients=4 * trained // shards,
        optimizer=8 * trained // shards,
        reference=2 * size.parameters // shards if has_reference else 0,
        activations=activations(size, setup),
        engine=engine,
        cache=max(smallest, min(needed, allowed)),
        gathered=4 * size.vocabulary * size.hidden if shards > 1 else 0,
        reserve=int(RESERVE_BYTES + RESERVE_SHARE * card),
        card=card,
        sleep_mode=False,
    )
    if budget.peak <= card:
        return budget
    # While the engine samples, there are neither gradients nor activations.
    room = card - (budget.sampling - budget.cache)
    cache = max(smallest, min(budget.cache, room))
    return budget._replace(cache=cache, sleep_mode=True)


def describe(budget: Budget) -> list[str]:
    """Write a budget for people, in two lines; a third one warns if it does not fit."""
    parts = []
    for name in (
        "weights",
        "gradients",
        "optimizer",
        "reference",
        "activations",
        "engine",
        "cache",
        "reserve",
    ):
        parts.append(f"{name} {getattr(budget, name) / GIB:.1f}")
    if budget.sleep_mode:
        decision = "the cache is released while the policy is updated (sleep mode)"
    else:
        decision = "the cache stays beside the trainer"
    total = f"{budget.peak / GIB:.1f} of {budget.card / GIB:.1f} that are free"
    lines = [
        f"GiB of each GPU, computed: {', '.join(parts)}",
        f"together at most {total}: {decision}",
    ]
    if budget.peak > budget.card:
        # Adapters have no reference of their own that could go to CPU memory.
        offload = "--offload-ref, --lora-rank, " if budget.reference > 0 else ""
        lines.append(
            "warning: this may not fit. Try --gradient-checkpointing, a smaller "
            f"--micro-batch-tokens, {offload}or more GPUs"
        )
    return lines


def engine_options(budget: Budget, total: int) -> dict[str, Any]:
    """Return the arguments of engine.start_engine that carry the decision out.

    With kv_cache_memory_bytes, vLLM makes a cache of just that size. gpu_memory_utilization is a
    share of `total`, which is all memory of the GPU, occupied or free. Here vLLM uses it for one
    thing only: it does not start unless that share is free.
    """
    of_total = (budget.engine + budget.cache) / total
    return {
        "gpu_memory_utilization": min(of_total, 1.0),
        "kv_cache_memory_bytes": budget.cache,
        "max_num_seqs": MOST_AT_ONCE,
        "enable_sleep_mode": budget.sleep_mode,
    }


def make_setup(
    args: argparse.Namespace, gpus_per_machine: int, num_machines: int, longest: int
) -> Setup:
    """Read the settings off stage 2's flags."""
    num_engines = gpus_per_machine * num_machines // args.tensor_parallel_size
    return Setup(
        gpus_per_machine=gpus_per_machine,
        num_machines=num_machines,
        micro_batch_tokens=args.micro_batch_tokens,
        gradient_checkpointing=args.gradient_checkpointing,
        offload_ref=args.offload_ref,
        tensor_parallel_size=args.tensor_parallel_size,
        num_requests=math.ceil(args.batch_size * args.samples_per_prompt / num_engines),
        longest=longest,
        most_of_card=args.gpu_memory_utilization,
        lora_rank=args.lora_rank,
    )


def plan_memory(args: argparse.Namespace, folder: Path, longest: int) -> dict[str, Any]:
    """Make the budget of this run and print it; return arguments of engine.start_engine.

    Without a GPU nothing is planned: the size of the cache is in engine.ENVIRONMENT. All ranks must
    call it together, before anything is on the GPU.
    """
    if not torch.cuda.is_available():
        return {"gpu_memory_utilization": args.gpu_memory_utilization}
    from transformers import AutoConfig

    free, total = torch.cuda.mem_get_info()
    # Every rank must decide alike, so the GPU with the least decides.
    least = torch.tensor(free)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    size = model_size(AutoConfig.from_pretrained(folder))
    gpus_per_machine = int(os.environ["LOCAL_WORLD_SIZE"])
    num_machines = dist.get_world_size() // gpus_per_machine
    setup = make_setup(args, gpus_per_machine, num_machines, longest)
    budget = make_budget(size, setup, int(least))
    if dist.get_rank() == 0:
        print("\n".join(describe(budget)), flush=True)
    return engine_options(budget, total)
