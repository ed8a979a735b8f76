"""What the parts of the GPU check run on: models of random weights, prompts, responses, an engine.

The model is a Qwen2 with the toy's tokenizer: 0.5B, and 1.5B where speed and memory are measured.
On a CPU it is tiny. Nothing is downloaded.
"""

from experiments.gpu_libraries import need_vllm  # first: apo needs it on some machines

# isort: split
import functools
import random
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config

from apo import engine, files, memory_budget
from apo.engine import Response
from apo.policy import ON_GPU
from apo.problems import Prompt
from experiments.memory import SHAPES, make_config
from experiments.speed import make_random_model
from experiments.toy import dataset_text, draw_sets, make_tokenizer

GIB = 2**30
MAX_TOKENS = 256 if ON_GPU else 16  # of a response
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 300,
    "tie_word_embeddings": True,
}


def choose_shape(wanted: str) -> Qwen2Config:
    """Return the config of a published shape; a tiny one on a CPU."""
    if not ON_GPU:
        return Qwen2Config(**TINY, initializer_range=0.1)
    # Larger weights than Qwen2's own give distributions that are far from uniform.
    return Qwen2Config(**SHAPES[wanted]._asdict(), initializer_range=0.05)


def choose_large_shape() -> str:
    """Return the 1.5B shape, or the 0.5B one if this GPU is too small for it."""
    if ON_GPU:
        size = memory_budget.model_size(make_config("1.5b"))
        setup = memory_budget.Setup(1, 1, 8192, True, False, 1, 64, 512, 0.6)
        card = torch.cuda.mem_get_info()[0]
        if memory_budget.make_budget(size, setup, card).peak > card:
            return "qwen2.5-0.5b"
    return "qwen2.5-1.5b"


def model_at(work: Path, shape: str) -> Path:
    """Make the random model and its values file, once; return its folder."""
    folder = work / shape
    if not (folder / "values.json").is_file():
        torch.manual_seed(0)
        make_random_model(choose_shape(shape), 64, MAX_TOKENS, folder)
    return folder


def made_up_prompts(count: int) -> list[Prompt]:
    """Make prompts of bytes, of unequal lengths."""
    prompts = []
    for number in range(count):
        text = "abcdefgh" * (1 + number % 5)
        prompts.append(Prompt({"id": str(number), "answer": "1"}, text, make_ids(text)))
    return prompts


@functools.cache
def make_ids(text: str) -> list[int]:
    """Tokenize a text with the toy's tokenizer."""
    return make_tokenizer()(text).input_ids


def make_up_responses(prompts: list[Prompt], num_samples: int, length: int) -> list[Response]:
    """Make responses of random tokens and rewards, those of a prompt next to each other."""
    torch.manual_seed(0)
    responses = []
    for prompt in prompts:
        for number in range(num_samples):
            ids = torch.randint(256, (length,)).tolist()
            response = Response(len(responses), prompt, number, ids, "", True, [])
            response.reward = float(len(responses) % 3 == 0)
            response.numbers["v_star"] = 0.5
            responses.append(response)
    return responses


def write_toy_problems(path: Path) -> None:
    """Write 16 of the toy's problems."""
    train_set, _ = draw_sets(random.Random(0), 16, 1)
    files.write_text(path, dataset_text(path.stem, train_set))


@functools.cache
def start_process_group() -> None:
    """Make this process the only rank."""
    engine.launch()


@functools.cache
def started_engine(folder: Path, sleep_mode: bool) -> Any:
    """Start the engine once; the parts that need it share it. On a GPU its cache has 4 GiB."""
    need_vllm()
    start_process_group()
    options = {"enable_prefix_caching": False, "enable_sleep_mode": sleep_mode}
    if ON_GPU:
        options["kv_cache_memory_bytes"] = 4 * GIB
    return engine.start_engine(
        str(folder),
        max_model_len=1024,
        seed=0,
        gpu_memory_utilization=0.3,
        tensor_parallel_size=1,
        **options,
    )
