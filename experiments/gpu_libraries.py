"""Import apo where libraries are missing or old: some GPU machines have only torch 2.11.

Import this before apo. What is missing then fails where it is used, and not at the start.
"""

import importlib.util
import inspect
import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from torch import Tensor


class Skipped(Exception):
    """A part cannot be run here; the text says why."""


def need_vllm() -> None:
    """Raise Skipped unless the engine and the scripts can run."""
    if MISSING:
        raise Skipped(f"{', '.join(MISSING)} not installed")


def import_apo() -> list[str]:
    """Import apo.environment, which ends the process if a library is missing; list these.

    An empty module takes the place of such a library for a moment.
    """
    missing = []
    for name in ("vllm", "datasets", "tqdm", "math_verify"):
        if importlib.util.find_spec(name) is None:
            missing.append(name)
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__spec__ = ModuleSpec(name, None)
    from apo import environment  # noqa: F401

    for name in missing:
        del sys.modules[name]
    return missing


def substitute_varlen() -> list[str]:
    """Give an older torch's varlen_attn the arguments of torch 2.13; say what was replaced.

    `apo.policy` imports the function when it is called, and so gets this one.
    """
    from torch.nn.attention import varlen

    parameters = inspect.signature(varlen.varlen_attn).parameters
    if "enable_gqa" in parameters:
        return []
    original = varlen.varlen_attn

    def with_repeated_heads(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *bounds: Any,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Tensor:
        repeats = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(repeats, dim=1)
        value = value.repeat_interleave(repeats, dim=1)
        causal = {"is_causal": True}
        if "window_size" in parameters:
            causal = {"window_size": window_size}
        if "scale" in parameters:
            return original(query, key, value, *bounds, scale=scale, **causal)
        # Without the argument it divides by the root of the head's size.
        query = query * (scale * query.shape[-1] ** 0.5)
        return original(query, key, value, *bounds, **causal)

    varlen.varlen_attn = with_repeated_heads
    return [f"torch {torch.__version__}: varlen_attn has no enable_gqa, so heads are repeated"]


MISSING = import_apo()
SUBSTITUTED = substitute_varlen()
