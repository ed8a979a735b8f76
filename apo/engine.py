"""Generation: one process per GPU, each with a vLLM engine; requests in, scored responses out.

The engine runs inside the process that trains, so that new weights reach it without a second copy.
(vLLM calls this external_launcher: the processes are torchrun's, and vLLM starts none.) The ranks
divide the requests among themselves.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import shutil
import signal
import socket
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from apo import command_line, files, math_reward, problems
from apo.files import UserError
from apo.problems import Prompt

# ---------------------------------------------------------------------------------------------
# Processes

# The settings that torchrun would make, for one process alone. Port 0 means any free port.
SINGLE_PROCESS = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}

# Used where the user has set nothing else.
ENVIRONMENT = {
    # On a CPU the engine would bind itself to one core, and take half of the memory for its cache.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    # FlashInfer's sampler is compiled at start-up, which needs nvcc. Seeded requests do not use it.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # So is FlashInfer's all-reduce among the GPUs of one engine. NCCL does it instead.
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",  # and in place of torch's all-reduce over NVLink
    # After a stop signal torchrun kills its ranks when so many seconds have passed, by default 30.
    # Stage 2 needs the time of a step and a checkpoint.
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300",
}


def launch(tensor_parallel_size: int = 1) -> None:
    """Make this process one rank of a process group, with one rank for every visible GPU.

    On a machine with two or more GPUs the command starts itself again under torchrun, and this
    process exits as `restart_under_torchrun` says. Each rank runs the script from the top, comes
    here with RANK in its environment, and goes on. So call this when everything that can be checked
    is checked.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch

    num_gpus = torch.cuda.device_count()
    # On a CPU, vLLM warns of a dozen things at each start, all of them known and harmless.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if num_gpus > 0 else "ERROR")
    check_hardware(num_gpus)
    num_ranks = max(1, num_gpus)
    if "RANK" in os.environ:
        check_launcher()
        num_ranks = int(os.environ["WORLD_SIZE"])
    check_tensor_parallel_size(tensor_parallel_size, num_ranks)
    if "RANK" in os.environ:
        end_with_launcher()
    elif num_gpus > 1:
        restart_under_torchrun(num_gpus)
    else:
        os.environ.update(SINGLE_PROCESS)

    if num_gpus > 0:
        if int(os.environ["LOCAL_WORLD_SIZE"]) > num_gpus:
            raise UserError(
                f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes, and {num_gpus} GPUs "
                "are visible: give it one process per GPU"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Objects and barriers travel over gloo, tensors on GPUs over NCCL. NCCL gives up when a rank
    # has hung for 30 minutes (torch's 10 minutes hold only where NCCL is the one backend). gloo
    # waits 48 times as long, a day: one rank may finish its sampling hours before another.
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if num_gpus > 0 else "gloo")
    gloo = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    gloo._set_default_timeout(48 * torch.distributed.default_pg_timeout)


def check_tensor_parallel_size(size: int, num_gpus: int) -> None:
    """Raise UserError if the GPUs cannot be divided into groups of `size`."""
    if num_gpus % size != 0:
        raise UserError(
            f"--tensor-parallel-size {size} does not divide the number of GPUs ({num_gpus})"
        )


def check_hardware(num_gpus: int) -> None:
    """Raise UserError for GPUs that this code cannot use, or for a CPU on which vLLM cannot run."""
    import torch

    if num_gpus == 0:
        if not is_vllm_for_cpus():
            raise UserError(
                "no NVIDIA GPU is visible (nvidia-smi, CUDA_VISIBLE_DEVICES, docker --gpus all), "
                "and this vLLM is built for GPUs. For the CPU: make demo KIND=cpu"
            )
        try:
            ctypes.CDLL("libnuma.so.1")
        except OSError as error:  # vLLM would go on, and fail later at its first operation
            raise UserError(
                "on a CPU, vLLM needs the library libnuma.so.1: apt install libnuma1"
            ) from error
        return
    # The driver's own library counts GPUs; whether CUDA works with them is another question.
    try:
        torch.cuda.init()
    except RuntimeError as error:
        reason = files.one_line(error)
        raise UserError(
            f"CUDA {torch.version.cuda} does not start ({reason}). If the driver is too old, "
            "update it (CUDA 13 needs 580 or newer). For the CPU: make demo KIND=cpu"
        ) from error
    for number in range(num_gpus):
        major, minor = torch.cuda.get_device_capability(number)
        if major < 8:
            raise UserError(
                f"GPU {number} ({torch.cuda.get_device_name(number)}) has compute capability "
                f"{major}.{minor}: 8.0 is needed for bf16 and the attention kernel (A100, RTX 30 "
                "and newer). Choose other GPUs with CUDA_VISIBLE_DEVICES"
            )
    check_compiler()


def check_compiler() -> None:
    """Raise UserError if Triton, which compiles kernels for vLLM, lacks what it needs itself.

    Where it runs for the first time, it compiles a small C library (triton/runtime/build.py).
    """
    if "CC" not in os.environ and shutil.which("gcc") is None and shutil.which("clang") is None:
        raise UserError("on a GPU, vLLM's Triton needs a C compiler: apt install gcc")
    header = Path(sysconfig.get_path("include", "posix_prefix")) / "Python.h"
    if not header.exists():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        raise UserError(f"on a GPU, vLLM's Triton needs {header}: apt install {package}")


def is_vllm_for_cpus() -> bool:
    """Say whether the installed vLLM is a build for CPUs; vLLM itself looks at its version."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return "cpu" in importlib.metadata.version("vllm")
    return True


def check_launcher() -> None:
    """Raise UserError if whatever started the ranks did not tell each its place."""
    for name in SINGLE_PROCESS:
        if name not in os.environ:
            raise UserError(f"RANK is set and {name} is not: start several processes with torchrun")


def end_with_launcher() -> None:
    """Make the kernel end this rank when its launcher dies.

    A rank that is left alone would wait for the others, and hold its GPU.
    """
    import torch

    # Linux sends this process a SIGKILL when its parent, the launcher, dies.
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)
    # If the launcher died before that call, no signal will come. But on the first machine its port
    # is closed then, so that this connection fails and ends the rank with an error.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        socket.create_connection(address, timeout=60).close()


def restart_under_torchrun(num_gpus: int) -> None:
    """Run this very command once per GPU, and exit.

    The code is 0 if all ranks end well, 2 for a user's mistake, and 128 + the number of a stop
    signal. It is 1 for any other failure.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import api, errors

    # torchrun would set this as well, and warn.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # orig_argv is the command as it was typed, so that `python -m experiments.x` works as well.
    command = [sys.executable, *sys.orig_argv[1:]]
    # Not SIGHUP where `nohup` has set that it is ignored: torchrun would pass it on to the ranks.
    names = [signal.Signals(number).name for number in command_line.stop_signals()]
    flags = ["--standalone", f"--nproc-per-node={num_gpus}", "--no-python"]
    flags.append("--signals-to-handle=" + ",".join(names))
    try:
        torchrun.main([*flags, *command])
    except errors.ChildFailedError as error:
        _, failure = error.get_first_failure()
        sys.exit(failure.exitcode if failure.exitcode in (2, 129, 130, 143) else 1)
    except api.SignalException as error:
        sys.exit(128 + error.sigval)
    sys.exit(0)


# ---------------------------------------------------------------------------------------------
# The engine


def start_engine(
    model: str,
    max_model_len: int,
    seed: int,
    gpu_memory_utilization: float,
    tensor_parallel_size: int,
    **options: Any,
) -> Any:
    """Start this rank's vLLM engine. Every rank must call it together.

    `max_model_len` is the number of tokens of the longest prompt and response together; `options`
    are further arguments of vllm.LLM, such as the size of the KV cache (memory_budget.py).
    """
    # Known and harmless: Triton is not used on a CPU, and vLLM uses a name that torch has renamed.
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    import torch
    from pydantic import ValidationError
    from vllm import LLM
    from vllm.model_executor.models.transformers.base import Base

    # Architectures that vLLM does not have itself, it builds from transformers' classes. To compile
    # them it would change these classes for the whole process, and the trainer could no longer make
    # its own model from them. So they are not compiled.
    Base._decorate_for_torch_compile = lambda self: None

    on_gpu = torch.cuda.is_available()
    # On a CPU vLLM would compile for seconds to gain microseconds.
    torch._dynamo.config.disable = not on_gpu
    # Mistral's repositories have weights and tokenizer in a second format, which vLLM would prefer.
    options.setdefault("load_format", "safetensors")
    options |= dict(
        model=str(files.model_folder(model)),
        config_format="hf",
        tokenizer_mode="hf",
        max_model_len=int(max_model_len),
        seed=seed,
        dtype="bfloat16" if on_gpu else "float32",
        # The policy's log-probs come from float32 logits, so the sampler must use them as well.
        hf_overrides={"head_dtype": "float32"},
        # The CPU engine cannot seed a request whose prompt it has cut into chunks.
        enable_chunked_prefill=on_gpu,
        # Log-probs are those of the distribution that is sampled from, at its temperature.
        logprobs_mode="processed_logprobs",
        enforce_eager=not on_gpu,
        gpu_memory_utilization=gpu_memory_utilization,
        tensor_parallel_size=tensor_parallel_size,
        # One engine inside each rank, or inside each group of --tensor-parallel-size ranks.
        distributed_executor_backend="external_launcher",
        use_tqdm_on_load=False,
    )
    if on_gpu:
        options |= gpu_options()
    try:
        return LLM(**options)
    except ValidationError as error:  # by vLLM's check of the model's config
        reason = files.one_line(error.errors()[0]["msg"])
        raise UserError(f"vLLM does not take {model}: {reason}") from error
    except ValueError as error:
        # vLLM has no type of its own for too little memory. It names it, and what would help.
        if "memory" not in str(error) and "KV cache" not in str(error):
            raise
        reason = files.one_line(error, longest=400)
        raise UserError(f"vLLM has too little memory for {model}: {reason}") from error


def gpu_options() -> dict[str, Any]:
    """Return arguments of LLM that keep it from code which not every machine can run."""
    import torch

    options: dict[str, Any] = {
        # FlashInfer would do this, with kernels that are compiled with nvcc.
        "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},
        # vLLM's own all-reduce ends the process if PYTORCH_ALLOC_CONF has expandable segments.
        "disable_custom_all_reduce": True,
        # FlashInfer's kernels are not used, so there is nothing to tune at the start.
        "enable_flashinfer_autotune": False,
    }
    if torch.cuda.get_device_capability()[0] == 10:
        # On a B200, vLLM would choose FlashInfer's attention, which is compiled with nvcc as well.
        options["attention_backend"] = "FLASH_ATTN"
    return options


def has_sleep_mode(llm: Any) -> bool:
    """Say whether the cache is released while the policy is updated; see memory_budget.py."""
    return llm.llm_engine.vllm_config.model_config.enable_sleep_mode


def release_cache(llm: Any) -> None:
    """Give the memory of the KV cache to the trainer; the weights stay. Only in vLLM's sleep mode.

    memory_budget.py decides on sleep mode. vLLM refuses to sleep while a request is left. After the
    last response is out, the scheduler still holds the request's id for one more step, and with
    asynchronous scheduling a batch can still be in flight. So the engine is stepped until nothing
    is left.
    """
    if not has_sleep_mode(llm):
        return
    core = llm.llm_engine.engine_core.engine_core
    while core.scheduler.has_requests() or core.batch_queue:
        llm.llm_engine.step()
    # This frees nothing: it stops the scheduler, as release_kv_cache_memory requires.
    llm.sleep(level=0)
    llm.release_kv_cache_memory()


def restore_cache(llm: Any) -> None:
    """Take the memory of the KV cache back, and let the scheduler run. Only in sleep mode."""
    import torch

    if has_sleep_mode(llm):
        # The engine takes it from the driver, so torch must give back what it no longer uses.
        torch.cuda.empty_cache()
        llm.wake_up(tags=["kv_cache"])  # this starts the scheduler as well


def stop_engine(llm: Any) -> None:
    """Shut the engine down. It destroys the process group as well, so this comes last."""
    import torch

    torch.distributed.barrier()
    llm.llm_engine.engine_core.shutdown()


# ---------------------------------------------------------------------------------------------
# Sampling


@dataclasses.dataclass
class Request:
    """One response to be sampled."""

    prompt: Prompt
    sample: int = 0  # the number of this response among the prompt's responses, from 0
    seed: int | None = None  # may be None for greedy decoding, which draws nothing
    logprobs: bool = False  # whether the sampler's log-probs are wanted


@dataclasses.dataclass
class Response:
    """One response of the model, with its reward and whatever numbers an algorithm adds."""

    index: int  # the place of its request in the list of requests
    prompt: Prompt
    sample: int
    ids: list[int]  # its tokens, EOS included
    text: str  # its tokens decoded, without EOS and the like
    finished: bool  # whether it ended by itself (EOS), not at max_tokens
    sampler_logp: list[float]  # ln pi of each token by the engine; empty unless asked for
    reward: float | None = None  # None while it is being graded
    numbers: dict[str, float] = dataclasses.field(default_factory=dict)  # such as "v_star"
    grade: Future | None = None  # the reward to come


def response_seed(seed: int, step: int, problem_id: str, sample: int) -> int:
    """Seed one response by what it is: no batch, rank or resume changes what is sampled."""
    name = json.dumps([seed, step, problem_id, sample])
    digest = hashlib.sha256(name.encode()).hexdigest()
    return int(digest[:16], 16) >> 2  # 62 bits: a positive int64


def sample(
    llm: Any,
    requests: list[Request],
    temperature: float,
    max_tokens: int,
    top_p: float = 1.0,
) -> Iterator[Response]:
    """Call `generate`, and start to grade each response.

    Grading runs beside the sampling: `wait_for_reward` puts the result into the response.
    """
    for response in generate(llm, requests, temperature, max_tokens, top_p):
        start_grading(response)
        yield response


def generate(
    llm: Any,
    requests: list[Request],
    temperature: float,
    max_tokens: int,
    top_p: float = 1.0,
) -> Iterator[Response]:
    """Sample this rank's share of the requests; yield each response when it has ended.

    V* is an expectation under pi_ref itself, so that top_p is 1 and top_k is off in stages 1 and 2.
    """
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    engine = llm.llm_engine
    tokenizer = llm.get_tokenizer()
    silent = silent_tokens(tokenizer)
    for i in share_of_requests(llm, len(requests)):
        request = requests[i]
        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            seed=request.seed,
            logprobs=0 if request.logprobs else None,  # 0: of the sampled token alone
            output_kind=RequestOutputKind.FINAL_ONLY,
            flat_logprobs=True,  # in one list, not in a dict for each token
            detokenize=False,  # decoding all tokens at once, below, is cheaper than one by one
            skip_clone=True,  # these parameters are used for this request alone
        )
        engine.add_request(str(i), {"prompt_token_ids": request.prompt.ids}, params)

    while engine.has_unfinished_requests():
        for output in engine.step():
            index = int(output.request_id)
            completion = output.outputs[0]
            response = Response(
                index=index,
                prompt=requests[index].prompt,
                sample=requests[index].sample,
                ids=list(completion.token_ids),
                text=response_text(requests[index].prompt, completion.token_ids, silent, tokenizer),
                finished=completion.finish_reason == "stop",
                sampler_logp=list(completion.logprobs.logprobs) if completion.logprobs else [],
            )
            yield response


def silent_tokens(tokenizer: Any) -> set[int]:
    """Return the special tokens that are no part of a response's text, such as EOS.

    A box inside of <think> ... </think> is no answer, so the reward must see these marks. Some
    tokenizers count them as special tokens; here they are text.
    """
    marks = {mark for pair in math_reward.THOUGHTS for mark in pair}
    return {
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content not in marks
    }


def response_text(prompt: Prompt, ids: list[int], silent: set[int], tokenizer: Any) -> str:
    """Decode a response.

    If the prompt ends with an opened thought, by the chat template, the text begins with its mark.
    """
    text = tokenizer.decode([token for token in ids if token not in silent])
    for opening, _ in math_reward.THOUGHTS:
        if prompt.text.rstrip().endswith(opening):
            return opening + text
    return text


def share_of_requests(llm: Any, num_requests: int) -> range:
    """Return the places of the requests that this rank's engine answers.

    Ranks that form one engine (--tensor-parallel-size) get the same requests, as vLLM wants.
    """
    import torch

    ranks_per_engine = llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size
    num_engines = torch.distributed.get_world_size() // ranks_per_engine
    engine_number = torch.distributed.get_rank() // ranks_per_engine
    return range(engine_number, num_requests, num_engines)


def start_grading(response: Response) -> None:
    """Start scoring a response. One that did not finish earns 0, in every stage."""
    if response.finished:
        response.grade = problems.submit_reward(response.text, response.prompt.row)
    else:
        response.reward = 0.0


def is_graded(response: Response) -> bool:
    """Say whether `wait_for_reward` would return at once."""
    return response.grade is None or response.grade.done()


def wait_for_reward(response: Response) -> None:
    """Wait until a response is graded."""
    if response.grade is not None:
        response.reward = response.grade.result()
        response.grade = None


def gather(sampled: list[Response]) -> list[Response]:
    """Wait for the rewards and return the responses of all ranks, in the order of the requests.

    Every rank must call it together.
    """
    for response in sampled:
        wait_for_reward(response)
    # The ranks of one engine have the same responses; each counts once.
    by_index = {}
    for responses in from_all_ranks(sampled):
        for response in responses:
            by_index[response.index] = response
    return [by_index[index] for index in sorted(by_index)]


def from_all_ranks(thing: Any) -> list[Any]:
    """Return what each rank passes, by rank; all ranks call it together."""
    import torch

    things = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(things, thing)
    return things


# ---------------------------------------------------------------------------------------------
# Sampling that survives a kill: stages 1 and 3

# What `make_record` writes of each response, and of which type. An answer may have any type.
RECORD_FIELDS = {
    "id": str,
    "sample": int,
    "prompt": str,
    "answer": object,
    "output": str,
    "reward": float,
    "finished": bool,
    "tokens": int,
}
# This many responses, saved ones first, tell whether the model ends its responses at all.
NUM_FIRST = 100


def sample_all(
    llm: Any,
    prompts: list[Prompt],
    counts: list[int],
    out: Path,
    identity: dict,
    seed: int,
    temperature: float,
    max_tokens: int,
    top_p: float = 1.0,
    must_finish: bool = False,
) -> list[dict]:
    """Draw counts[i] graded samples of prompt i, and return one record for each, in order.

    A record is {"id", "sample", "prompt", "answer", "output", "reward", "finished", "tokens"}.
    Every rank appends its records to OUT.partial/RANK.jsonl, each soon after it is graded. A run
    that was killed and is started again with the same `identity` samples only what is missing;
    another identity is a UserError that names the difference. With `must_finish` it is also a
    UserError if nearly none of the first responses ends by itself. The caller saves the records and
    then calls `remove_partial`. Every rank must call it together.
    """
    import torch
    from tqdm import tqdm

    rank = torch.distributed.get_rank()
    folder = partial_folder(out)
    file = files.open_locked(folder / f"{rank}.jsonl")
    # Rank 0 reads what an earlier run left, for all: other machines may not see its files yet.
    done = {}
    for record in on_rank_0(read_partial, folder, identity):
        done[record["id"], record["sample"]] = record

    requests = missing_requests(prompts, counts, done, seed)

    own_places = share_of_requests(llm, len(requests))
    # Saved responses count as well. After a kill mostly long ones are missing, which alone would
    # look as if no response ended.
    ends_of_first = [record["finished"] for record in done.values()][:NUM_FIRST]
    first = set()
    if must_finish:
        check_endings(ends_of_first, max_tokens, folder)
        first = set(own_places[: NUM_FIRST - len(ends_of_first)])
    ungraded = []
    new_records = []
    with tqdm(total=len(own_places), unit=" responses", disable=rank > 0) as progress:

        def save(response: Response) -> None:
            wait_for_reward(response)
            record = make_record(response)
            new_records.append(record)
            file.write(json.dumps(record, default=str) + "\n")
            file.flush()
            progress.update()

        for response in sample(llm, requests, temperature, max_tokens, top_p):
            if response.index in first:
                ends_of_first.append(response.finished)
                check_endings(ends_of_first, max_tokens, folder)
            waiting = [*ungraded, response]
            ungraded = []
            for other in waiting:
                if is_graded(other):
                    save(other)
                else:
                    ungraded.append(other)
        for response in ungraded:
            save(response)
    file.close()

    for records in from_all_ranks(new_records):
        for record in records:
            done[record["id"], record["sample"]] = record
    return [
        done[prompt.row["id"], number]
        for prompt, count in zip(prompts, counts, strict=True)
        for number in range(count)
    ]


def missing_requests(
    prompts: list[Prompt], counts: list[int], done: dict[tuple, dict], seed: int
) -> list[Request]:
    """Ask for each sample of each prompt that is not done; `done` is by problem id and sample."""
    requests = []
    for prompt, count in zip(prompts, counts, strict=True):
        for number in range(count):
            record = done.get((prompt.row["id"], number))
            # A chat template may write the date, and so another prompt on another day.
            if record is None or record["prompt"] != prompt.text:
                # Step 0: no training step samples the same.
                request_seed = response_seed(seed, 0, prompt.row["id"], number)
                requests.append(Request(prompt, number, request_seed))
    return requests


def check_endings(ends: list[bool], max_tokens: int, folder: Path) -> None:
    """Raise UserError if nearly none of NUM_FIRST responses ended by itself: all would earn 0.

    `folder` has the records so far.
    """
    if len(ends) == NUM_FIRST and sum(ends) <= 0.02 * NUM_FIRST:
        raise UserError(
            f"{NUM_FIRST - sum(ends)} of the first {NUM_FIRST} responses did not end within "
            f"--max-tokens {max_tokens}, and would earn 0. Raise it; or use --chat-template for an "
            "instruct model; or add the token that ends its turns to eos_token_id in the model's "
            f"generation_config.json. Then remove {folder}"
        )


def make_record(response: Response) -> dict:
    """Write a graded response as the record that stages 1 and 3 keep."""
    return {
        "id": response.prompt.row["id"],
        "sample": response.sample,
        "prompt": response.prompt.text,
        "answer": response.prompt.row["answer"],
        "output": response.text,
        "reward": response.reward,
        "finished": response.finished,
        "tokens": len(response.ids),
    }


def partial_folder(out: Path) -> Path:
    """Return the folder of the records that a run towards `out` has so far."""
    return out.with_name(f"{out.name}.partial")


def read_partial(folder: Path, identity: dict) -> list[dict]:
    """Read the records that an earlier run left; if there are none, write this run's identity.json.

    Raises UserError if identity.json says that they are another run's.
    """
    note = folder / "identity.json"
    paths = sorted(folder.glob("*.jsonl"))
    if not any(path.stat().st_size > 0 for path in paths):
        # No response was saved, so nothing can be mixed up.
        files.write_json(note, identity)
        return []
    if not note.exists():
        raise UserError(f"{folder} has lost its identity.json: remove it, or give another --out")
    what = f"{folder} (remove it, or give another --out)"
    files.refuse_difference(what, files.read_json(note), identity)
    records = []
    for path in paths:
        records += [record for record in files.read_whole_lines(path) if is_whole(record)]
    return records


def is_whole(record: dict) -> bool:
    """Say whether a record has all fields, of the right types. If not, it is sampled again."""
    for name, kind in RECORD_FIELDS.items():
        if name not in record or not isinstance(record[name], kind):
            return False
    return math.isfinite(record["reward"])


def remove_partial(out: Path) -> None:
    """Remove the records of a run whose result is saved, if there are any."""
    folder = partial_folder(out)
    # identity.json goes last: a kill in between must not leave records without their identity.
    for path in [*folder.glob("*.jsonl"), folder / "identity.json"]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not there, or has what is not ours
        folder.rmdir()


def on_rank_0(function: Callable, *arguments: Any) -> Any:
    """Call a function on rank 0 alone, and give every rank its result, or its UserError.

    Any other exception ends rank 0, and then the launcher ends the others.
    """
    import torch

    result = None
    error = None
    if torch.distributed.get_rank() == 0:
        try:
            result = function(*arguments)
        except UserError as user_error:
            error = user_error
    both = [result, error]
    torch.distributed.broadcast_object_list(both)
    result, error = both
    if error is not None:
        raise error
    return result
