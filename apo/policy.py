"""The model being trained: loaded, sharded with FSDP2, run on packed sequences, saved.

Packed means that sequences lie end to end in one row, without padding. Axes: B sequences and R
response tokens, as in losses.py, and T tokens of all sequences, prompts included.

FSDP2 cuts every weight into slices, one for each rank. Such a weight is a DTensor: a rank's slice
together with the knowledge of how to find the others. full_tensor() puts the slices together, on
every rank. While a layer runs, FSDP holds its whole weights as ordinary tensors.
"""

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed import fsdp
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import losses
from apo import files
from apo.engine import Response
from apo.files import UserError

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Weights are kept in float32 and used in bf16. On a CPU bf16 is slow, and float32 is exact.
COMPUTE_DTYPE = torch.bfloat16 if ON_GPU else torch.float32
# The engine and the trainer round differently. If their ln pi differ by more than this, in nats a
# token on average, something else is wrong. In float32 1e-8 (the toy) to 1e-6 are usual. The bound
# for bf16 is a guess until it is measured on a GPU.
LARGEST_GAP = 0.1 if ON_GPU else 1e-2

# ---------------------------------------------------------------------------------------------
# Packed sequences


@dataclasses.dataclass
class MicroBatch:
    """The sequences that pass through the model at once on this rank."""

    responses: list[Response]  # B of them
    inputs: dict[str, Any]  # arguments of Policy.forward, on the CPU: FSDP moves them to the GPU
    lengths: Tensor  # (B,) response tokens of each sequence; it stays on the CPU
    rewards: Tensor  # (B,) float64
    numbers: dict[str, Tensor]  # (B,) float64 each: what Response.numbers holds, as "v_star"
    sampler_logp: Tensor | None  # (R,) ln pi by the engine, where it was asked for
    weight: float  # 1; or 0 for a copy that only keeps this rank in step with the others
    num_sequences: int  # in the whole update, over all its micro-batches and ranks
    num_tokens: int  # response tokens in the whole update
    ref_logp: Tensor | None = None  # (R,) ln pi_ref
    extra: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # what an algorithm adds
    statistics: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # (B,) each, see update


def pack(prompts: list[list[int]], responses: list[list[int]]) -> tuple[dict[str, Any], Tensor]:
    """Lay B sequences end to end.

    Returns the inputs of `Policy.forward`, without the temperature, and the lengths of the
    responses (B,). `rows` (R,) are the places whose hidden state predicts the response tokens
    `targets` (R,). The last token of a response predicts nothing and is left out.

    Example: prompts [[1, 2]], responses [[3, 4]] -> input_ids [[1, 2, 3]], rows [1, 2],
    targets [3, 4].
    """
    input_ids = []
    position_ids = []
    rows = []
    targets = []
    bounds = [0]
    for prompt, response in zip(prompts, responses, strict=True):
        sequence = prompt + response[:-1]
        input_ids += sequence
        # Positions start again at 0 in every sequence.
        position_ids += range(len(sequence))
        # The token before a response token predicts it: the prompt's last one predicts the first.
        end = len(input_ids)
        rows += range(end - len(response), end)
        targets += response
        bounds.append(end)
    longest = max(end - start for start, end in pairwise(bounds))
    inputs = {
        "input_ids": torch.tensor([input_ids]),
        "position_ids": torch.tensor([position_ids]),
        "rows": torch.tensor(rows),
        "targets": torch.tensor(targets),
        # transformers' names for the bounds and the longest sequence; they reach packed_attention.
        "cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32),
        "max_length_q": longest,
    }
    lengths = torch.tensor([len(response) for response in responses])
    return inputs, lengths


def assign_to_ranks(lengths: list[int], num_ranks: int, budget: int) -> list[list[list[int]]]:
    """Assign groups of sequences to ranks and micro-batches: [rank][micro-batch] -> indices.

    `lengths` has the number of tokens of each group, and the indices point into it. A group may be
    one sequence. A micro-batch has at most `budget` tokens, or one group. FSDP wants the same
    number of forward passes on every rank, so all ranks get the same number of micro-batches: the
    smallest number with which `distribute` stays within the budget. Each forward pass gathers all
    weights, so that a small micro-batch costs about as much time as a full one. A rank with few
    groups can have empty ones.
    """
    indices_of_ranks = distribute(range(len(lengths)), lengths, num_ranks)
    num_batches = 1
    while True:
        assigned = []
        for indices in indices_of_ranks:
            assigned.append(distribute(indices, lengths, num_batches))
        if all(fits(batch, lengths, budget) for batches in assigned for batch in batches):
            return assigned
        num_batches += 1


def fits(batch: list[int], lengths: list[int], budget: int) -> bool:
    """Say whether a micro-batch has at most `budget` tokens, or one group."""
    return len(batch) <= 1 or sum(lengths[index] for index in batch) <= budget


def distribute(indices: Iterable[int], lengths: list[int], num_parts: int) -> list[list[int]]:
    """Divide groups of sequences into parts of about equally many tokens.

    The longest come first, each to the part with the fewest tokens.
    """
    parts = [[] for _ in range(num_parts)]
    num_tokens = [0] * num_parts
    for index in sorted(indices, key=lambda i: -lengths[i]):
        smallest = num_tokens.index(min(num_tokens))
        parts[smallest].append(index)
        num_tokens[smallest] += lengths[index]
    return parts


def make_micro_batches(
    responses: list[Response], temperature: float, budget: int, group_size: int = 1
) -> list[MicroBatch]:
    """Pack this rank's part of one update into micro-batches of at most `budget` tokens.

    `responses` are those of all ranks. Each `group_size` responses that follow each other stay
    together, for losses that compare the responses of a prompt; a group may exceed the budget.
    """
    groups = []
    group_tokens = []
    for start in range(0, len(responses), group_size):
        group = responses[start : start + group_size]
        groups.append(group)
        group_tokens.append(sum(num_input_tokens(response) for response in group))
    assigned = assign_to_ranks(group_tokens, dist.get_world_size(), budget)

    num_tokens = sum(len(response.ids) for response in responses)
    batches = []
    for indices in assigned[dist.get_rank()]:
        # An empty micro-batch becomes a copy of the first group, with weight 0.
        chosen = []
        for index in indices or [0]:
            chosen += groups[index]
        weight = 1.0 if indices else 0.0
        batches.append(make_micro_batch(chosen, temperature, weight, len(responses), num_tokens))
    return batches


def num_input_tokens(response: Response) -> int:
    """Count the tokens that a prompt and its response put into the model."""
    return len(response.prompt.ids) + len(response.ids) - 1


def make_micro_batch(
    responses: list[Response],
    temperature: float,
    weight: float,
    num_sequences: int,
    num_tokens: int,
) -> MicroBatch:
    """Pack these responses into one micro-batch."""
    inputs, lengths = pack([r.prompt.ids for r in responses], [r.ids for r in responses])
    inputs["temperature"] = temperature
    numbers = {}
    for name in responses[0].numbers:
        values = [r.numbers[name] for r in responses]
        numbers[name] = torch.tensor(values, dtype=torch.float64, device=DEVICE)
    # None unless the engine gave log-probs for every one of these responses.
    sampler_logp = None
    all_logp = []
    for response in responses:
        all_logp += response.sampler_logp
    if len(all_logp) == len(inputs["targets"]):
        sampler_logp = torch.tensor(all_logp, device=DEVICE)
    return MicroBatch(
        responses=responses,
        inputs=inputs,
        lengths=lengths,
        rewards=torch.tensor([r.reward for r in responses], dtype=torch.float64, device=DEVICE),
        numbers=numbers,
        sampler_logp=sampler_logp,
        weight=weight,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
    )


def register_packed_attention() -> None:
    """Make `packed_attention` known to transformers, under the name "packed"."""
    from transformers import AttentionInterface

    AttentionInterface.register("packed", packed_attention)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed sequence, in the form that transformers calls.

    Takes (1, heads, T, dim) and returns (1, T, heads, dim). It is given the bounds of the
    sequences. transformers' own attention functions guess them from position_ids, and do so only
    without a cache and a mask. Where they do not, each sequence also attends to those before it,
    and nothing warns of it.
    """
    # (T, heads, dim)
    query = query[0].transpose(0, 1)
    key = key[0].transpose(0, 1)
    value = value[0].transpose(0, 1)
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            query,
            key,
            value,
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(-1, 0),  # causal; the default is not
            enable_gqa=True,
        )
        return out[None], None

    # There is no such kernel for CPUs. So the sequences are padded to one length, for the attention
    # alone. Padding comes last, and causal attention never looks ahead, so it changes nothing.
    sequence_lengths = cu_seq_lens_q.diff()
    is_token = torch.arange(max_length_q) < sequence_lengths[:, None]  # (B, longest)

    def pad(tokens: Tensor) -> Tensor:
        padded = tokens.new_zeros(is_token.shape + tokens.shape[1:])
        padded.index_put_((is_token,), tokens)
        return padded.transpose(1, 2)  # (B, heads, longest, dim)

    out = torch.nn.functional.scaled_dot_product_attention(
        pad(query), pad(key), pad(value), is_causal=True, enable_gqa=True, scale=scaling
    )
    return out.transpose(1, 2)[is_token][None], None


# ---------------------------------------------------------------------------------------------
# The model


class Policy(torch.nn.Module):
    """A causal language model that gives the log-probs of response tokens, and never its logits.

    Here all weights are trained. With --lora-rank they are not: see LoraPolicy in lora.py.
    """

    # In which dtype a checkpoint has the model's weights: the one in which they are trained.
    checkpoint_dtype = torch.float32

    def __init__(self, lm: torch.nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, rows: Tensor, targets: Tensor, temperature: float, **inputs: Any) -> Tensor:
        """Run packed sequences (see `pack`); ln pi of each response token, (R,) float32."""
        hidden = self.lm.base_model(use_cache=False, **inputs).last_hidden_state[0]
        # FSDP holds the whole head here, since this is the forward pass of its outermost module.
        head = self.lm.get_output_embeddings().weight
        return losses.token_logprob(hidden[rows], head, targets, temperature)

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Put the weights together one at a time, so that no second copy of the model is made.

        They have the names and shapes of the plain model. All ranks must walk through them
        together. A head that is tied to the embedding comes twice.
        """
        for name, weight in self.lm.state_dict().items():
            yield name, gather_weight(weight, dtype)

    def adapters(self) -> dict[str, Tensor]:
        """Return what is trained beside the model's weights, by name: nothing here."""
        return {}

    def load_into(self, llm: Any) -> None:
        """Stream the weights into the engine, in bf16 on GPUs; all ranks must call it together.

        A tied head is sent twice, because the CPU engine keeps its own copy of the head in another
        layout.
        """
        arguments = {"weights_iterator": self.weights(COMPUTE_DTYPE)}
        llm.collective_rpc("reload_weights", kwargs=arguments)


def gather_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Put a weight's slices together, in `dtype`. Buffers have no slices, and may be integers."""
    if weight.is_floating_point():
        weight = weight.to(dtype)
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def make_mesh() -> DeviceMesh:
    """Lay out the ranks: weights are sharded inside a machine and replicated across machines."""
    ranks_per_machine = int(os.environ["LOCAL_WORLD_SIZE"])
    num_machines = dist.get_world_size() // ranks_per_machine
    if num_machines == 1:
        return init_device_mesh(DEVICE, (ranks_per_machine,), mesh_dim_names=("shard",))
    shape = (num_machines, ranks_per_machine)
    return init_device_mesh(DEVICE, shape, mesh_dim_names=("replicate", "shard"))


def load_policy(
    folder: Path,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    offload: bool = False,
    gradient_checkpointing: bool = False,
) -> Policy:
    """Load a model, with weights kept in `dtype`, and shard it over the mesh.

    Every rank first loads the whole model into CPU memory, and then keeps only its slices. Whether
    the model is one that this file computes right is checked in self_check.py.
    """
    policy = Policy(load_lm(folder, dtype, gradient_checkpointing))
    shard([*policy.lm.base_model.layers, policy], mesh, offload)
    return policy


def load_lm(folder: Path, dtype: torch.dtype, gradient_checkpointing: bool) -> torch.nn.Module:
    """Load a model into CPU memory, to be run on packed sequences."""
    from transformers import AutoModelForCausalLM

    register_packed_attention()
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="packed")
    # Never training mode: it would switch dropout on, and ln pi would be another one each time.
    lm.eval()
    if gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers checkpoints a layer only if its own `training` is true. The modules inside it
        # stay in evaluation mode.
        for layer in lm.base_model.layers:
            layer.training = True
    return lm


def shard(modules: list[torch.nn.Module], mesh: DeviceMesh, offload: bool = False) -> None:
    """Shard modules with FSDP2: the layers first, and last the module that holds them all.

    The last one takes what is in no layer: embedding, last norm and head. Slices move to the GPU
    here; with `offload` they stay in CPU memory.

    FSDP gathers a layer's weights just before they are used, and frees them after. Weights are used
    in COMPUTE_DTYPE; gradients are averaged over the ranks in float32.

    On a CPU, memory is cheap and gathering is slow, so gathered weights are kept. On a GPU they are
    freed after the forward pass (`reshard_after_forward`). By default FSDP would keep those of the
    outermost module, which are the embedding and the head, until the backward pass. The reference
    never runs one, so they would never be freed.
    """
    options = {
        "mesh": mesh,
        "mp_policy": fsdp.MixedPrecisionPolicy(
            param_dtype=COMPUTE_DTYPE, reduce_dtype=torch.float32
        ),
        "reshard_after_forward": ON_GPU,
    }
    if offload:
        options["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=ON_GPU)
    for module in modules:
        fsdp.fully_shard(module, **options)


def reshard(policy: Policy) -> None:
    """Free the gathered weights, as FSDP does after a backward pass.

    On a CPU they would otherwise stay after a forward pass, and the parameters would be no DTensors
    until the next backward pass.
    """
    for module in policy.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def add_ref_logp(ref: Callable[..., Tensor], updates: list[list[MicroBatch]]) -> None:
    """Give every micro-batch of every update its ln pi_ref.

    `ref` is called as a Policy is: a policy of its own, or lora.Reference.

    The reference runs in the very shapes in which the policy will: only then is the log-ratio
    exactly 0 before the first update.
    """
    with torch.no_grad():
        for batches in updates:
            for batch in batches:
                batch.ref_logp = ref(**batch.inputs)


# ---------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(
    folder: Path,
    step: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    reference: Path,
) -> None:
    """Save what a run continues from; all ranks must call it together.

    The weights are in `policy.checkpoint_dtype`. trainer/ has the optimizer's state and, with
    --lora-rank, the adapters, both in float32. Every rank writes its own part of trainer/.
    """
    unfinished = begin_folder(folder)
    state = {
        "optimizer": dcp_state.get_optimizer_state_dict(policy, optimizer),
        "adapters": policy.adapters(),
    }
    dcp.save(state, checkpoint_id=unfinished / "trainer")
    write_model(unfinished, policy, policy.checkpoint_dtype, reference)
    finish_folder(unfinished, folder, step)


def save_final_model(folder: Path, step: int, policy: Policy, reference: Path) -> None:
    """Save the finished model, in bf16 on GPUs; all ranks must call it together."""
    unfinished = begin_folder(folder)
    write_model(unfinished, policy, COMPUTE_DTYPE, reference)
    finish_folder(unfinished, folder, step)


def begin_folder(folder: Path) -> Path:
    """Make an empty folder under another name, for what will be `folder`; return its path."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    return unfinished


def finish_folder(unfinished: Path, folder: Path, step: int) -> None:
    """Give a folder its name, when everything in it is on the disk."""
    if dist.get_rank() == 0:
        write_manifest(unfinished, step)
        remove_folder(folder)
        os.replace(unfinished, folder)
        files.sync_folder(folder.parent)
    dist.barrier()


def write_model(folder: Path, policy: Policy, dtype: torch.dtype, reference: Path) -> None:
    """Write a model that from_pretrained and vLLM load as it is, adapters added to its weights.

    Config and tokenizer are the reference's.
    """
    # A head that is tied to the embedding is in the state twice, and in the file once.
    parameters = {name for name, _ in policy.lm.named_parameters(remove_duplicate=False)}
    tied = parameters - {name for name, _ in policy.lm.named_parameters()}
    weights = {}
    for name, weight in policy.weights(dtype):
        if name not in tied and dist.get_rank() == 0:
            weights[name] = weight.cpu()
    if dist.get_rank() == 0:
        copy_model_files(reference, folder, dtype)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def copy_model_files(reference: Path, folder: Path, dtype: torch.dtype) -> None:
    """Copy what a model needs beside its weights: config and tokenizer."""
    for path in files.model_files(reference):
        if not path.name.endswith((".safetensors", ".safetensors.index.json")):
            # Without the file's mode: a shared model may be read-only.
            shutil.copyfile(path, folder / path.name)
    config = files.read_json(reference / "config.json")
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_manifest(folder: Path, step: int) -> None:
    """Flush every file of a folder to the disk, and list their sizes in manifest.json."""
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            sizes[str(path.relative_to(folder))] = path.stat().st_size
    files.write_json(folder / "manifest.json", {"step": step, "files": sizes})


def saved_step(folder: Path) -> int | None:
    """Return the step at which a folder was saved; None if it is missing or damaged.

    Damaged means that a file is missing, has another size than at saving, or that the manifest
    is not one. A changed byte inside a file is not seen. Raises UserError if the disk does not
    answer, or if the folder is a link to nothing: then it may be whole, and only out of reach.
    """
    try:
        files.refuse_broken_link(folder)
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        for name, size in manifest["files"].items():
            if (folder / name).stat().st_size != size:
                return None
        return int(manifest["step"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error}") from error
    except (KeyError, ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        return None


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints step-N in a folder, the newest first."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def is_whole_checkpoint(path: Path) -> bool:
    """Say whether a folder step-N is undamaged and was saved at step N."""
    return saved_step(path) == int(path.name.removeprefix("step-"))


def find_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint. A damaged one is renamed damaged-*, with a message."""
    for path in list_checkpoints(folder):
        if is_whole_checkpoint(path):
            return path
        damaged = path.with_name(f"damaged-{time.time():.0f}-{path.name}")
        path.rename(damaged)
        print(
            f"{path} is damaged: it is called {damaged.name} now, and is not used",
            file=sys.stderr,
        )
    return None


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, and what a kill left unfinished."""
    for path in [*list_checkpoints(folder)[keep:], *folder.glob(".*.unfinished")]:
        remove_folder(path)


def remove_folder(folder: Path) -> None:
    """Remove a folder if it exists. If a user replaced it by a link, remove only the link."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def load_optimizer(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer's state from a checkpoint, which any number of ranks may have saved."""
    state = {"optimizer": dcp_state.get_optimizer_state_dict(policy, optimizer)}
    dcp.load(state, checkpoint_id=folder / "trainer")
    dcp_state.set_optimizer_state_dict(policy, optimizer, state["optimizer"])
