"""LoRA (--lora-rank): the weights stay as they are; small adapters beside them are trained.

Every linear layer of the decoder layers gets an adapter, two matrices A (r, in) and B (out, r), and
computes W x + 2 B A x in place of W x (Hu et al. 2021, arXiv 2106.09685; alpha = 2 r, no dropout).
Below, r is called lora_rank: a rank is a process of the run, and R counts response tokens.
B starts at 0, so that the policy starts as the reference. Embedding, norms, biases and head are not
trained.

With its adapters off the policy is the reference, so one copy of the weights serves both. Outside
the trainer nobody sees adapters: the engine, checkpoints and final/ get W + 2 B A as a weight like
any other.

peft makes the adapters and runs them. It is imported here alone, and only if it is asked for.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh

from apo import command_line
from apo.files import UserError
from apo.policy import COMPUTE_DTYPE, Policy, gather_weight, load_lm, shard

SCALE = 2  # alpha / r: what B A x is multiplied by
# peft's names of an adapted layer's parts: its own weight, and the two matrices.
BASE = "base_layer."
A = "lora_A.default.weight"
B = "lora_B.default.weight"


def check(lora_rank: int, offload_ref: bool) -> None:
    """Raise UserError if --lora-rank cannot be used here."""
    if lora_rank == 0:
        return
    if not command_line.is_installed("peft"):
        raise UserError(f"--lora-rank {lora_rank}: install peft first (pip install peft)")
    if offload_ref:
        raise UserError(
            "--offload-ref cannot be used with --lora-rank: there is no second model to offload"
        )


class LoraPolicy(Policy):
    """A policy whose weights are frozen, and whose adapters are trained."""

    # A resumed run reads the reference's weights, and the adapters in float32. The merged weights
    # of a checkpoint are for vLLM and from_pretrained, so they may be rounded.
    checkpoint_dtype = COMPUTE_DTYPE

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Put the weights together one at a time, each with its adapter added in float32.

        Names and shapes are those of the plain model. On GPUs the sum is rounded to bf16, where the
        policy itself adds W x and 2 B A x: sampler and policy then differ by that rounding, and a
        change of less than half a step of bf16 does not reach the sampler at all.
        """
        state = self.lm.state_dict()
        for name, weight in state.items():
            layer = name.removesuffix(BASE + "weight")
            if name.endswith((A, B)):
                continue
            if layer == name:  # no adapter belongs to it
                yield name.replace(BASE, ""), gather_weight(weight, dtype)
                continue
            a = gather_weight(state[layer + A], torch.float32)
            b = gather_weight(state[layer + B], torch.float32)
            merged = gather_weight(weight, COMPUTE_DTYPE).float() + SCALE * (b @ a)
            yield layer + "weight", merged.to(dtype)

    def adapters(self) -> dict[str, Tensor]:
        """Return all A and B, by name: this rank's slices, which share memory with the model's."""
        adapters = {}
        for name, tensor in self.lm.state_dict().items():
            if name.endswith((A, B)):
                adapters[name] = tensor
        return adapters


class Reference:
    """The policy with its adapters off: the model before training. It is called as a policy is.

    peft's own switch, disable_adapter, also sets requires_grad. FSDP has two copies of each
    parameter, the slice and the gathered one, each with its own requires_grad. After the switch the
    two can disagree: adapters then get no gradient. So the scale is 0 for a while instead:
    W x + 0 B A x is exactly W x.
    """

    def __init__(self, policy: LoraPolicy) -> None:
        self.policy = policy

    def __call__(self, **inputs: Any) -> Tensor:
        """Return ln pi_ref of each response token, (R,) float32; see Policy.forward."""
        from peft.helpers import rescale_adapter_scale

        with rescale_adapter_scale(self.policy.lm, 0.0):
            return self.policy(**inputs)


def load_lora_policy(
    reference: Path,
    mesh: DeviceMesh,
    lora_rank: int,
    seed: int,
    checkpoint: Path | None = None,
    gradient_checkpointing: bool = False,
) -> LoraPolicy:
    """Load the reference's weights, add adapters and shard all of it over the mesh.

    The adapters are those of the checkpoint; without one A is drawn from the seed, and B is 0.
    """
    lm = load_lm(reference, COMPUTE_DTYPE, gradient_checkpointing)
    add_adapters(lm, lora_rank, seed)
    policy = LoraPolicy(lm)
    shard([*lm.base_model.layers, policy], mesh)
    if checkpoint is not None:
        # It writes into the memory of the adapters.
        dcp.load({"adapters": policy.adapters()}, checkpoint_id=checkpoint / "trainer")
    return policy


def add_adapters(lm: torch.nn.Module, lora_rank: int, seed: int) -> None:
    """Freeze a model's weights, and add an adapter to each linear layer but the head.

    Adapters are float32 whatever the weights are; FSDP computes with them in COMPUTE_DTYPE.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=lora_rank, lora_alpha=SCALE * lora_rank, target_modules="all-linear")
    # Every rank must draw the same A, of which it then keeps its slice.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, lm)
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
