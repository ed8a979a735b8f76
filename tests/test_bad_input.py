"""What a user can get wrong: one sentence that names it, exit code 2, and nothing is written.

Most mistakes are found before anything starts. Those are tried in this process, which takes no
time. The others need the engine, the hub or a run that is there; `make test` starts the scripts for
one of each kind, and `make test-faults` for all.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    RAGGED,
    edit_values,
    read_metrics,
    read_weights,
    snapshot,
    stage1_arguments,
    write_lines,
)
from safetensors.torch import save_file

import evaluate
import offline_value
import train_online
from apo import command_line, files

# A model that is not here, while HF_HUB_OFFLINE=1 says that none may be fetched.
HUB = "Qwen/Qwen2.5-0.5B"

# ---------------------------------------------------------------------------------------------
# Mistakes that are found before anything starts
#
# name: arguments, what the sentence says. {out} is a path in an empty folder.

OFFLINE_VALUE = {
    "a row that is a list": ("--dataset {files}/list.jsonl", "line 2"),
    "a question that is a number": ("--dataset {files}/number.jsonl", "row 2"),
    "a question of spaces": ("--dataset {files}/blank.jsonl", "row 2"),
    "an id twice": ("--dataset {files}/twice.jsonl", "row 3"),
    "a file without rows": ("--dataset {files}/empty.jsonl", "no rows"),
    "another encoding": ("--dataset {files}/latin.jsonl", "latin.jsonl"),
    "an object, not a list": ("--dataset {files}/object.json", "object.json"),
    "no parquet file": ("--dataset {files}/damaged.parquet", "damaged.parquet"),
    "a folder named like a file": ("--dataset {files}/folder.jsonl", "folder.jsonl"),
    "a row nested too deep": ("--dataset {files}/deep.jsonl", "line 1"),
    "no answer that can be graded": ("--dataset {files}/ungradable.jsonl", "ungradable.jsonl"),
    "an unknown dataset": ("--dataset imagenet", "'imagenet'"),
    "a benchmark without training rows": ("--dataset math500", "to train on"),
    "weights as a pickle only": ("--model {models}/pickled", "safetensors"),
    "no tokenizer": ("--model {models}/no-tokenizer", "token"),
    "weights that are torn": ("--model {models}/torn-weights", "is damaged"),
    "weights that are a pointer": ("--model {models}/pointer", "not downloaded whole"),
    "a part of the weights missing": ("--model {models}/no-shard", "model-00002-of-00002"),
    "a model with too long a name": ("--model " + 300 * "m", "mmm"),
    "config.json torn": ("--model {models}/torn-config", "config.json"),
    "config.json a list": ("--model {models}/list-config", "config.json"),
    "an architecture of another library": ("--model {models}/odd-type", "nosuch"),
    "a length that is a text": ("--model {models}/text-length", "max_position_embeddings"),
    "a width that is a text": ("--model {models}/text-width", "hidden_size"),
    "an unknown kind of layer": ("--model {models}/odd-layers", "layer_types"),
    "an unknown dtype": ("--model {models}/odd-dtype", "bf15"),
    "an unknown activation": ("--model {models}/odd-activation", "nosuch"),
    "tokenizer.json torn": ("--model {models}/torn-tokenizer", "tokenizer"),
    "generation_config.json torn": ("--model {models}/torn-end", "generation_config.json"),
    "a folder that vLLM cannot name": ("--model {models}/lr[1]", "/lr[1]: rename it"),
    "a mixture of experts": ("--model {models}/experts", "mixture of experts"),
    "a window that is too short": ("--model {models}/window", "sees 8 tokens"),
    "quantised weights": ("--model {models}/quantised", "quantised"),
    "no model that continues a text": ("--model {models}/encoder", "continues a text"),
    "a response longer than the model reads": ("--max-tokens 4096", "--max-tokens 4096"),
    "no GPU per engine": ("--tensor-parallel-size 0", "--tensor-parallel-size"),
    "more than all memory": ("--gpu-memory-utilization 1.5", "--gpu-memory-utilization"),
    "infinite temperature": ("--temperature inf", "--temperature"),
    "no temperature": ("--temperature 0", "--temperature"),
    "a temperature that vLLM raises": ("--temperature 0.005", "--temperature"),
    "a negative seed": ("--seed=-1", "--seed"),
    "a seed of 64 bits": ("--seed 20251129123456", "--seed"),
    "half a sample": ("--num-value-samples 2.5", "--num-value-samples"),
    "beta1 of nothing": ("--beta1 0", "--beta1"),
    "an unknown flag": ("--beta3 1", "--beta3"),
    "an abbreviated flag": ("--temp 1", "--temp"),
    "a system prompt without a chat": ("--system-prompt Hi", "--chat-template"),
    "a chat argument that is no JSON": (
        "--chat-template --chat-template-kwargs {{thinking",
        "{{thinking",
    ),
    "chat arguments nested too deep": (
        "--chat-template --chat-template-kwargs " + 100_000 * "[",
        "--chat-template-kwargs",
    ),
    "no chat template": ("--chat-template", "chat template"),
    "out below a file": ("--out {files}/good.jsonl/values.json", "good.jsonl"),
    "out is a folder": ("--out {files}", "is a folder"),
    "out is the root": ("--out /", "is a folder"),
    "partial results where a file is": ("--out {files}/taken.json", "taken.json.partial"),
    "more tokens than can be counted": ("--max-tokens " + 400 * "9", "--max-tokens"),
    "a temperature of billions": ("--temperature 2e9", "--temperature"),
    "solutions of GSM8K": ("--dataset {files}/solutions.jsonl", "####"),
    "out with too long a name": ("--out {out}" + 250 * "v", "too long"),
}
TRAIN_ONLINE = {
    "values in a folder": ("--values {files}", "cannot read"),
    "values that are torn": ("--values {files}/torn.json", "torn.json"),
    "values that are a list": ("--values {files}/list.json", "list.json"),
    "rewards that are texts": ("--values {files}/texts.json", "prompt 2"),
    "rewards that are no numbers": ("--values {files}/nan.json", "prompt 2"),
    "rewards that are missing": ("--values {files}/unrewarded.json", "prompt 2"),
    "no rewards": ("--values {files}/no-rewards.json", "prompt 2"),
    "a reward beyond all numbers": ("--values {files}/huge.json", "prompt 2"),
    "a reward whose square is too large": ("--values {files}/large.json", "prompt 2"),
    "an empty prompt": ("--values {files}/empty-prompt.json", "n1"),
    "a solution of GSM8K": ("--values {files}/solution.json", "####"),
    "more steps than can be counted": ("--num-steps " + 400 * "9", "--num-steps"),
    "a beta1 beyond all numbers": ("--values {files}/huge-beta1.json", "beta1"),
    "a template without a question": ("--values {files}/no-question.json", "{{question}}"),
    "tokenizer.json torn": ("--values {files}/torn-tokenizer.json", "tokenizer"),
    "a prompt that is a number": ("--values {files}/number-prompt.json", "prompt 2"),
    "a prompt that is a list": ("--values {files}/list-prompt.json", "prompt 2"),
    "a row that is a list": ("--values {files}/list-row.json", "prompt 2"),
    "an id twice": ("--values {files}/twice.json", "prompt 2"),
    "prompts that are no list": ("--values {files}/prompts.json", "prompts"),
    "no prompts": ("--values {files}/no-prompts.json", "prompts"),
    "no header": ("--values {files}/headless.json", "header"),
    "a header without temperature": ("--values {files}/temperature.json", "temperature"),
    "a header without beta1": ("--values {files}/beta1.json", "beta1"),
    "a header without a model": ("--values {files}/model.json", "model"),
    "a temperature that is a text": ("--values {files}/text-temperature.json", "temperature"),
    "responses without end": ("--values {files}/endless.json", "max_tokens"),
    "responses longer than the model reads": ("--values {files}/long.json", "max_tokens"),
    "a template that is a number": ("--values {files}/template.json", "prompt_template"),
    "a chat template that is a text": ("--values {files}/chat.json", "chat_template"),
    "an unknown task": ("--values {files}/task.json", "'chess'"),
    "another reward": ("--values {files}/reward.json", "reward"),
    "a temperature that vLLM raises": ("--values {files}/cold.json", "0.005"),
    "an empty answer": ("--values {files}/no-answer.json", "n1"),
    "a mixture of experts": ("--values {files}/experts.json", "mixture of experts"),
    "a model that changed": ("--values {files}/changed.json", "model.safetensors"),
    "an evaluation set torn": ("--eval-dataset {files}/torn.jsonl", "line 2"),
    "an unknown evaluation set": ("--eval-dataset imagenet", "'imagenet'"),
    "a batch larger than the data": ("--batch-size 9", "--batch-size 9"),
    "updates of unequal size": ("--updates-per-batch 4", "--updates-per-batch 4"),
    "a number of steps in words": ("--num-steps many", "--num-steps"),
    "an unknown flag": ("--beta3 1", "--beta3"),
    "lr negative": ("--lr=-1e-6", "--lr"),
    "micro-batches of nothing": ("--micro-batch-tokens 0", "--micro-batch-tokens"),
    "checkpoints never": ("--save-every 0", "--save-every"),
    "no checkpoint kept": ("--keep-checkpoints 0", "--keep-checkpoints"),
    "evaluations never": ("--eval-every 0", "--eval-every"),
    "an unknown tracker": ("--tracker tensorboard", "--tracker"),
    "a tracker that is not installed": ("--tracker wandb", "pip install wandb"),
    "more than all memory": ("--gpu-memory-utilization 1.5", "--gpu-memory-utilization"),
    "out is a file": ("--out {files}/good.jsonl", "good.jsonl"),
    "out is not empty": ("--out {files}", "not empty"),
    "out below a file": ("--out {files}/good.jsonl/run", "good.jsonl"),
    "out with too long a name": ("--out {out}/" + 300 * "v", "too long"),
}
EVALUATE = {
    "grade a row that is a list": ("--grade {files}/list.jsonl", "line 2"),
    "grade an output that is a number": ("--grade {files}/number-output.jsonl", "row 2"),
    "grade tokens that are a text": ("--grade {files}/tokens.jsonl", "row 2"),
    "grade finished that is a text": ("--grade {files}/finished.jsonl", "row 2"),
    "grade an id that is a list": ("--grade {files}/id.jsonl", "row 2"),
    "grade solutions of GSM8K": ("--grade {files}/graded-solutions.jsonl", "####"),
    "grade a file without rows": ("--grade {files}/empty.jsonl", "empty.jsonl"),
    "grade a folder": ("--grade {files}", "{files}"),
    "grade an object": ("--grade {files}/object.json", "object.json"),
    "a benchmark twice": ("--benchmarks {dataset},{dataset}", "digits"),
    "two files of one name": ("--benchmarks {dataset},{files}/digits.jsonl", "digits"),
    "no benchmark": ("--benchmarks ,", "''"),
    "an unknown benchmark": ("--benchmarks imagenet", "'imagenet'"),
    "a training set": ("--benchmarks math", "to test on"),
    "a question that is a number": ("--benchmarks {files}/number.jsonl", "row 2"),
    "a response longer than the model reads": ("--max-tokens 4096", "--max-tokens 4096"),
    "no tokens": ("--max-tokens 0", "--max-tokens"),
    "a temperature that vLLM raises": ("--temperature 0.005", "--temperature"),
    "no nucleus": ("--top-p 0", "--top-p"),
    "a negative limit": ("--limit=-1", "--limit"),
    "a negative seed": ("--seed=-1", "--seed"),
    "half a sample": ("--num-samples 1.5", "--num-samples"),
    "an unknown flag": ("--beta3 1", "--beta3"),
    "weights as a pickle only": ("--model {models}/pickled", "safetensors"),
    "no tokenizer": ("--model {models}/no-tokenizer", "token"),
    "weights that are torn": ("--model {models}/torn-weights", "is damaged"),
    "weights that are a pointer": ("--model {models}/pointer", "not downloaded whole"),
    "a part of the weights missing": ("--model {models}/no-shard", "model-00002-of-00002"),
    "config.json torn": ("--model {models}/torn-config", "config.json"),
    "out below a file": ("--out {files}/good.jsonl/results", "good.jsonl"),
    "a run's max_tokens in words": ("--model {models}/words/final", "max_tokens"),
    "a run's template that is a number": ("--model {models}/number/final", "prompt_template"),
}
BASES = {
    "offline_value": "--model {model} --dataset {dataset} --out {out} --max-prompt-tokens 160 "
    "--max-tokens 48 ",
    "train_online": "--values {files}/values.json --out {out} --batch-size 6 --num-steps 1 ",
    "evaluate": "--model {model} --benchmarks {dataset} --out {out} --limit 4 --max-tokens 48 ",
}


def cases(tables: dict[str, dict[str, tuple]], samples: tuple[str, ...] | None = None) -> list:
    """List (stage, name, arguments, says); only the samples are in `make test` if there are any."""
    found = []
    for stage, table in tables.items():
        for name, (arguments, says) in table.items():
            marks = ()
            if samples is not None and f"{stage}: {name}" not in samples:
                marks = pytest.mark.faults
            found.append(
                pytest.param(stage, name, arguments, says, marks=marks, id=f"{stage}: {name}")
            )
    return found


@pytest.fixture(scope="module")
def places(model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the tables speak of: {model}, {dataset}, {files} and {models}."""
    folder = tmp_path_factory.mktemp("files")
    good = {"question": "q", "answer": "1"}
    write_lines(folder / "good.jsonl", [good])
    write_lines(folder / "digits.jsonl", [good])
    write_lines(folder / "list.jsonl", [good, ["q", "1"]])
    write_lines(folder / "number.jsonl", [good, good | {"question": 5}])
    write_lines(folder / "blank.jsonl", [good, good | {"question": " \t"}])
    write_lines(folder / "twice.jsonl", [good | {"id": key} for key in ("a", "b", "a")])
    write_lines(folder / "ungradable.jsonl", [good | {"answer": ""}, good | {"answer": "{1"}])
    write_lines(folder / "empty.jsonl", [])
    (folder / "torn.jsonl").write_text(json.dumps(good) + '\n{"question": "q", "ans')
    (folder / "latin.jsonl").write_bytes('{"question": "größe", "answer": "1"}'.encode("latin-1"))
    (folder / "object.json").write_text(json.dumps(good | {"output": "1"}))
    (folder / "damaged.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    (folder / "folder.jsonl").mkdir()
    (folder / "deep.jsonl").write_text("[" * 200_000)
    (folder / "taken.json.partial").touch()
    solution = "Half of 4 is 4/2 = 2.\n#### 2"
    write_lines(folder / "solutions.jsonl", [good | {"answer": solution}])
    graded = {"answer": "1", "output": r"\boxed{1}"}
    write_lines(folder / "graded-solutions.jsonl", [graded | {"answer": solution}])
    write_lines(folder / "number-output.jsonl", [graded, graded | {"output": 1}])
    write_lines(folder / "tokens.jsonl", [graded, graded | {"tokens": "many"}])
    write_lines(folder / "finished.jsonl", [graded, graded | {"finished": "no"}])
    write_lines(folder / "id.jsonl", [graded, graded | {"id": [1]}])
    make_values(model, folder)
    models = make_models(model, tmp_path_factory.mktemp("models"))
    edit_values(
        folder / "values.json",
        folder / "experts.json",
        lambda values: values["header"].update(model=str(models / "experts")),
    )
    edit_values(
        folder / "values.json",
        folder / "torn-tokenizer.json",
        lambda values: values["header"].update(model=str(models / "torn-tokenizer")),
    )
    return {"model": model, "dataset": dataset, "files": folder, "models": models}


def values_by_hand(model: Path) -> dict:
    """Return what a person would write: the least that stage 2 needs."""
    prompts = []
    for i in range(8):
        entry = {"id": f"n{i}", "prompt": f"Say {i}. ", "answer": str(i % 4), "rewards": [0, 1.0]}
        prompts.append(entry)
    header = {"model": str(model), "beta1": 0.5, "temperature": 1}
    return {"header": header | {"max_prompt_tokens": 160, "max_tokens": 48}, "prompts": prompts}


def make_values(model: Path, folder: Path) -> None:
    """Write a good values file, and copies of it with one mistake each."""
    good = folder / "values.json"
    files.write_json(good, values_by_hand(model))
    text = good.read_text()
    (folder / "torn.json").write_text(text[: len(text) // 2])
    (folder / "list.json").write_text(f"[{text}]")

    prompts = {
        "texts": {"rewards": ["right", "wrong"]},
        "nan": {"rewards": [float("nan"), 1.0]},
        "unrewarded": {"rewards": None},
        "no-rewards": {"rewards": []},
        "huge": {"rewards": [0, 10**400]},
        "large": {"rewards": [0, 1e200]},
        "empty-prompt": {"prompt": ""},
        "solution": {"answer": "4/2 = 2\n#### 2"},
        "number-prompt": {"prompt": 5},
        "list-row": {"row": [1]},
        "twice": {"id": "n0"},
        "no-answer": {"answer": ""},
    }
    for name, change in prompts.items():
        edit_values(good, folder / f"{name}.json", lambda v: v["prompts"][1].update(change))  # noqa: B023

    headers = {
        "temperature": {"temperature": None},
        "beta1": {"beta1": None},
        "huge-beta1": {"beta1": 10**400},
        "no-question": {"prompt_template": "Solve it."},
        "model": {"model": None},
        "text-temperature": {"temperature": "1.0"},
        "cold": {"temperature": 0.005},
        "endless": {"max_tokens": float("inf")},
        "long": {"max_tokens": 1000},
        "template": {"prompt_template": 5},
        "chat": {"chat_template": "yes"},
        "task": {"task": "chess"},
        "reward": {"reward": "chess.wins"},
        "changed": {"model_fingerprint": {"model.safetensors": "0"}},
        "hub": {"model": HUB},
    }
    for name, change in headers.items():
        edit_values(good, folder / f"{name}.json", lambda v: v["header"].update(change))  # noqa: B023

    documents = {
        "headless": {"header": None},
        "prompts": {"prompts": {"n0": values_by_hand(model)["prompts"][0]}},
        "no-prompts": {"prompts": []},
        "list-prompt": {"prompts": [values_by_hand(model)["prompts"][0], ["n1"]]},
    }
    for name, change in documents.items():
        edit_values(good, folder / f"{name}.json", lambda v: v.update(change))  # noqa: B023


# Models that cannot be trained, by what their config.json has.
CONFIGS = {
    "odd-type": {"model_type": "nosuch", "architectures": ["NoSuchForCausalLM"]},
    "experts": {"num_experts": 4},
    "window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    "quantised": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "encoder": {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
    "text-length": {"max_position_embeddings": "512"},
    "text-width": {"hidden_size": "64"},
    "odd-layers": {"layer_types": ["sideways_attention"]},
    "odd-dtype": {"dtype": "bf15", "torch_dtype": "bf15"},
    "odd-activation": {"hidden_act": "nosuch"},
}
# What somebody has made of the config.json of a run, whose final model stage 3 is given.
RUNS = {
    "words": {"values_digest": "0", "max_tokens": "lots"},
    "number": {"values_digest": "0", "max_tokens": 48, "prompt_template": 5},
}


def make_models(model: Path, models: Path) -> Path:
    """Copy a model several times, each with one mistake; `other` has other weights."""
    names = "pickled no-tokenizer torn-config list-config torn-weights pointer no-shard other"
    names += " torn-tokenizer torn-end lr[1]"
    for name in (*names.split(), *CONFIGS):
        shutil.copytree(model, models / name)
    (models / "pickled" / "model.safetensors").rename(models / "pickled" / "pytorch_model.bin")
    for path in (models / "no-tokenizer").glob("*token*"):
        path.unlink()
    text = (model / "config.json").read_text()
    (models / "torn-config" / "config.json").write_text(text[: len(text) // 2])
    (models / "list-config" / "config.json").write_text("[1]")
    for name, change in CONFIGS.items():
        config = json.loads(text)
        config.pop("layer_types", None)
        config |= change
        (models / name / "config.json").write_text(json.dumps(config))
    for name, change in RUNS.items():
        shutil.copytree(model, models / name / "final")
        files.write_json(models / name / "config.json", change)
    (models / "torn-tokenizer" / "tokenizer.json").write_text('{"version": "1.0", "mod')
    (models / "torn-end" / "generation_config.json").write_text('{"eos_token')
    weights = (model / "model.safetensors").read_bytes()
    (models / "torn-weights" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 42\n"
    (models / "pointer" / "model.safetensors").write_text(pointer)
    shard = models / "no-shard" / "model-00001-of-00002.safetensors"
    (models / "no-shard" / "model.safetensors").rename(shard)
    tensors = read_weights(model)
    weight_map = {}
    for i, name in enumerate(sorted(tensors)):
        weight_map[name] = f"model-0000{1 + i % 2}-of-00002.safetensors"
    index = {"metadata": {"total_size": len(weights)}, "weight_map": weight_map}
    (models / "no-shard" / "model.safetensors.index.json").write_text(json.dumps(index))
    first = min(tensors)
    tensors[first] = tensors[first] + 0.01 * torch.ones_like(tensors[first])
    save_file(tensors, models / "other" / "model.safetensors", metadata={"format": "pt"})
    return models


def only_sentence(result: SimpleNamespace) -> str:
    """Return the one sentence with which a run refused, its own or argparse's."""
    assert result.code == 2, result.all
    assert "Traceback" not in result.all, result.all
    lines = [line for line in result.err.splitlines() if re.match(r"(\S+: )?error: ", line)]
    assert len(lines) == 1, result.all
    print(lines[0])  # `pytest -rP` makes a table of it
    return lines[0]


MODULES = {"offline_value": offline_value, "train_online": train_online, "evaluate": evaluate}
EARLY = {"offline_value": OFFLINE_VALUE, "train_online": TRAIN_ONLINE, "evaluate": EVALUATE}


def fill(
    stage: str, arguments: str, says: str, places: dict[str, Path], out: Path
) -> tuple[str, str]:
    """Return a command line, and what its sentence says, with all paths in place."""
    paths = places | {"out": out}
    return (BASES[stage] + arguments).format(**paths), says.format(**paths)


@pytest.mark.parametrize("stage, name, arguments, says", cases(EARLY))
def test_mistake_is_one_sentence_before_anything_starts(
    stage, name, arguments, says, assert_refused, places, tmp_path
):
    words, says = fill(stage, arguments, says, places, tmp_path / "out")
    before = snapshot(places["files"])
    assert_refused(MODULES[stage], words, says)
    assert list(tmp_path.iterdir()) == [] and snapshot(places["files"]) == before


# ---------------------------------------------------------------------------------------------
# Mistakes that are found later, or only by a script in its own process

# The hub is asked, which HF_HUB_OFFLINE=1 forbids in the scripts' environment.
STARTED = {
    "offline_value": {
        "an id twice": OFFLINE_VALUE["an id twice"],
        "a dataset of the hub, offline": ("--dataset math", "offline"),
        "a model of the hub, offline": (f"--model {HUB}", "HF_HUB_OFFLINE"),
        "every prompt too long": ("--max-prompt-tokens 1", "--max-prompt-tokens 1"),
        "more GPUs per engine than ranks": ("--tensor-parallel-size 2", "--tensor-parallel-size"),
        "out is finished and torn": ("--out {results}/torn.json", "torn.json"),
        "out is a list": ("--out {results}/list.json", "list.json"),
        "out is another file": ("--out {results}/other.json", "other.json"),
        "out without prompts": ("--out {results}/no-prompts.json", "no-prompts.json"),
    },
    "train_online": {
        "an id twice": TRAIN_ONLINE["an id twice"],
        "a model of the hub, offline": ("--values {files}/hub.json", "HF_HUB_OFFLINE"),
        "an evaluation set of the hub, offline": ("--eval-dataset math500", "offline"),
        "more GPUs per engine than ranks": ("--tensor-parallel-size 2", "--tensor-parallel-size"),
    },
    "evaluate": {
        "an id twice": ("--benchmarks {files}/twice.jsonl", "row 3"),
        "a benchmark of the hub, offline": ("--benchmarks math500", "offline"),
        "a model of the hub, offline": (f"--model {HUB}", "HF_HUB_OFFLINE"),
        "no chat template": ("--chat-template", "chat template"),
        "an architecture of another library": ("--model {models}/odd-type", "nosuch"),
        "more GPUs per engine than ranks": ("--tensor-parallel-size 2", "--tensor-parallel-size"),
        "a summary torn": ("--out {results}/torn", "summary.json"),
        "a summary that is a list": ("--out {results}/list", "summary.json"),
        "a summary without a header": ("--out {results}/headless", "summary.json"),
        "a summary with a list of benchmarks": ("--out {results}/listed", "summary.json"),
        "a summary with a number for scores": ("--out {results}/scored", "digits has no scores"),
    },
}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Results of stages 1 and 3, each with one mistake."""
    folder = tmp_path / "results"
    texts = {"torn": '{"header": {', "list": "[]", "headless": "{}"}
    texts["listed"] = '{"header": {}, "benchmarks": []}'
    texts["scored"] = '{"header": {}, "benchmarks": {"digits": 5}}'
    for name, text in texts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "summary.json").write_text(text)
    (folder / "torn.json").write_text('{"header": {')
    (folder / "list.json").write_text("[]")
    (folder / "other.json").write_text('{"question": "q", "answer": "1"}')
    (folder / "no-prompts.json").write_text('{"header": {}}')
    return folder


@pytest.mark.parametrize(
    "stage, name, arguments, says", cases(STARTED, samples=("train_online: an id twice",))
)
def test_script_that_refuses_says_one_sentence_and_writes_nothing(
    stage, name, arguments, says, run, places, results, tmp_path
):
    words, says = fill(stage, arguments, says, places | {"results": results}, tmp_path / "out")
    before = snapshot(places["files"]) | snapshot(tmp_path)
    sentence = only_sentence(run(f"{stage}.py", *words.split()))
    assert says.lower() in sentence.lower()
    # The engine's start may have left a folder for the records, without a record.
    shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
    assert snapshot(places["files"]) | snapshot(tmp_path) == before


def test_values_written_by_hand_are_trained_on(run, model, tmp_path):
    """The least that is needed, with another number of rewards for each prompt."""
    values = values_by_hand(model)
    values["prompts"][3]["rewards"] = [1, 1, 0.5, -2]
    (tmp_path / "values.json").write_text(json.dumps(values, indent=4))
    arguments = ("--values", tmp_path / "values.json", "--out", tmp_path / "run")
    result = run("train_online.py", *arguments, "--batch-size", "8", "--num-steps", "1")
    assert result.code == 0 and "Traceback" not in result.all, result.all
    (row,) = read_metrics(tmp_path / "run")
    config = files.read_json(tmp_path / "run" / "config.json")
    assert row["step"] == 1 and config["model"] == str(model)
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


# ---------------------------------------------------------------------------------------------
# What contradicts a run, values or results that are there

RESUME = {  # name: arguments, what the sentence names
    "every setting": (
        "--batch-size 10 --updates-per-batch 2 --samples-per-prompt 2 --lr 0.5 --beta1 2 --beta2 2 "
        "--seed 5 --eval-every 7 --filter-unsolved --eval-dataset {dataset} --max-grad-norm 2",
        "max_grad_norm batch_size updates_per_batch samples_per_prompt lr beta1 beta2 seed "
        "eval_every filter_unsolved eval_digest",
    ),
    "other values": ("--values {changed}/values.json", "values_digest"),
    "config.json torn": ("", "config.json"),
    "config.json a list": ("", "config.json"),
}


@pytest.fixture
def resumable(one_rank: Path, stage1: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A copy of a run of two steps without its final model, and the command that resumes it."""
    out = tmp_path / "run"
    shutil.copytree(one_rank, out)
    shutil.rmtree(out / "final")
    command = ("train_online.py", "--values", stage1.file, "--out", out, *RAGGED.split())
    return SimpleNamespace(out=out, command=(*command, "--resume"))


@pytest.mark.faults
@pytest.mark.parametrize("name", RESUME)
def test_resume_that_contradicts_the_run_is_refused_by_field(
    name, run, resumable, stage1, dataset, tmp_path
):
    arguments, says = RESUME[name]

    def change(values: dict) -> None:
        values["prompts"][0]["rewards"][0] += 1

    edit_values(stage1.file, tmp_path / "values.json", change)
    config = resumable.out / "config.json"
    if name == "config.json torn":
        config.write_text(config.read_text()[:100])
    elif name == "config.json a list":
        config.write_text("[]")
    before = contents(resumable.out)
    words = arguments.format(dataset=dataset, changed=tmp_path).split()
    sentence = only_sentence(run(*resumable.command, "--num-steps", "3", *words))
    for field in says.split():
        assert re.search(rf"\b{re.escape(field)}\b", sentence), (field, sentence)
    assert contents(resumable.out) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path: content for path, (_, content) in snapshot(folder).items()}


@pytest.mark.faults
def test_resume_may_change_how_long_and_on_what_a_run_runs(run, resumable, stage1, tmp_path):
    """The values file may move, and what no step reads may change in it."""

    def change(values: dict) -> None:
        values["header"]["seconds"] = 0

    values = edit_values(stage1.file, tmp_path / "moved.json", change)
    flags = """--num-steps 4 --save-every 3 --keep-checkpoints 1 --log-samples 2
    --micro-batch-tokens 90 --gradient-checkpointing --gpu-memory-utilization 0.3"""
    before = read_metrics(resumable.out)
    result = run(*resumable.command, "--values", values, *flags.split())
    assert result.code == 0 and "Traceback" not in result.all, result.all
    rows = read_metrics(resumable.out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[:2] == before
    samples = (resumable.out / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in samples] == [1] * 5 + [2] * 5 + [3] * 2 + [4] * 2
    assert os.listdir(resumable.out / "checkpoints") == ["step-4"]
    config = files.read_json(resumable.out / "config.json")
    assert config["num_steps"] == 4 and config["gradient_checkpointing"] is True


@pytest.fixture(scope="module")
def finished(
    run: Callable, places: dict, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """A finished evaluation: `.arguments` but for the place, and `.out`."""
    out = tmp_path_factory.mktemp("finished") / "results"
    arguments = ["--model", places["model"], "--benchmarks", places["dataset"], "--limit", "6"]
    arguments += ["--max-tokens", "48", "--temperature", "1"]
    result = run("evaluate.py", *arguments, "--out", out)
    assert result.code == 0, result.all
    return SimpleNamespace(arguments=arguments, out=out)


@pytest.mark.faults
@pytest.mark.parametrize("difference", ["model", "rows", "top_p"])
def test_results_of_two_evaluations_do_not_share_a_folder(
    difference, run, finished, places, tmp_path
):
    """A table of two models, or last month's numbers for new questions, would look right."""
    out = tmp_path / "results"
    shutil.copytree(finished.out, out)
    words = [*finished.arguments, "--out", out]
    says = difference
    if difference == "rows":
        rows = [{"question": "2?", "answer": "2"}] * 8
        words[words.index("--benchmarks") + 1] = write_lines(tmp_path / "digits.jsonl", rows)
        says = "digits"
    elif difference == "model":
        words[words.index("--model") + 1] = places["models"] / "other"
        says = "model_fingerprint (model.safetensors)"
    else:
        words += ["--top-p", "0.5"]
        says = "top_p 1.0, not 0.5"
    before = snapshot(out)
    assert says in only_sentence(run("evaluate.py", *words))
    assert snapshot(out) == before


@pytest.mark.faults
@pytest.mark.parametrize("difference", ["model", "rows", "samples"])
def test_finished_values_of_other_settings_are_not_taken(difference, run, stage1, places, tmp_path):
    out = tmp_path / "values.json"
    shutil.copy(stage1.file, out)
    model, dataset, more = places["model"], places["dataset"], ()
    if difference == "model":
        model = places["models"] / "other"
        says = "model_fingerprint (model.safetensors)"
    elif difference == "rows":
        rows = [json.loads(line) for line in dataset.read_text().splitlines()]
        dataset = write_lines(tmp_path / "digits.jsonl", rows[:-5])
        says = "dataset_digest"
    else:
        more = ("--num-value-samples", "4")
        says = "num_value_samples 8, not 4"
    before = snapshot(tmp_path)
    result = run("offline_value.py", *stage1_arguments(model, dataset), *more, "--out", out)
    assert says in only_sentence(result)
    assert snapshot(tmp_path) == before


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    """wandb leaves a folder of its name where it has run; Python would import it as a package."""
    (tmp_path / "runs_of_nobody").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not command_line.is_installed("runs_of_nobody")
    assert not command_line.is_installed("no_such_package")
    assert command_line.is_installed("torch")
