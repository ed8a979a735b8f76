"""What a user can get wrong beyond the tables of the three test files of the scripts.

Each gets one sentence that names what is wrong, exit code 2 and no traceback, and nothing is
written or changed. `make test` tries one of each script, `make test-faults` all.
"""

import json
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
    read_weights,
    snapshot,
    stage1_arguments,
    write_lines,
)
from safetensors.torch import save_file
from test_evaluate import BAD as BAD_EVALUATE
from test_offline_value import BAD as BAD_OFFLINE_VALUE
from test_train_online import BAD as BAD_TRAIN_ONLINE

import problems

# A model that is not here, while HF_HUB_OFFLINE=1 says that none may be fetched.
HUB = "Qwen/Qwen2.5-0.5B"

# name: arguments, what the sentence says. {out} is a path in an empty folder.
OFFLINE_VALUE = {
    "a row that is a list": ("--dataset {files}/list.jsonl", "row 2"),
    "a question that is a number": ("--dataset {files}/number.jsonl", "row 2"),
    "a question of spaces": ("--dataset {files}/blank.jsonl", "row 2"),
    "an id twice": ("--dataset {files}/twice.jsonl", "row 3"),
    "a file without rows": ("--dataset {files}/empty.jsonl", "no rows"),
    "another encoding": ("--dataset {files}/latin.jsonl", "latin.jsonl"),
    "an object, not a list": ("--dataset {files}/object.json", "object.json"),
    "a parquet file that is none": ("--dataset {files}/damaged.parquet", "damaged.parquet"),
    "a folder named like a file": ("--dataset {files}/folder.jsonl", "folder.jsonl"),
    "a row nested too deep": ("--dataset {files}/deep.jsonl", "line 1"),
    "a dataset of the hub, offline": ("--dataset math", "offline"),
    "a model of the hub, offline": (f"--model {HUB}", "HF_HUB_OFFLINE"),
    "weights as a pickle only": ("--model {models}/pickled", "safetensors"),
    "no tokenizer": ("--model {models}/no-tokenizer", "tokenizer"),
    "config.json torn": ("--model {models}/torn-config", "config.json"),
    "config.json a list": ("--model {models}/list-config", "config.json"),
    "an unknown kind of model": ("--model {models}/odd-type", "nosuch"),
    "weights torn": ("--model {models}/torn-weights", "torn-weights"),
    "a shard missing": ("--model {models}/no-shard", "model-00002-of-00002.safetensors"),
    "no chat template": ("--chat-template", "chat template"),
    "more GPUs per engine than ranks": ("--tensor-parallel-size 2", "--tensor-parallel-size"),
    "no GPU per engine": ("--tensor-parallel-size 0", "--tensor-parallel-size"),
    "more than all memory": ("--gpu-memory-utilization 1.5", "--gpu-memory-utilization"),
    "infinite temperature": ("--temperature inf", "--temperature"),
    "a negative seed": ("--seed=-1", "--seed"),
    "half a sample": ("--num-value-samples 2.5", "--num-value-samples"),
    "an unknown flag": ("--beta3 1", "--beta3"),
    "every prompt too long": ("--max-prompt-tokens 1", "--max-prompt-tokens 1"),
    "out below a file": ("--out {files}/good.jsonl/values.json", "good.jsonl"),
}
TRAIN_ONLINE = {
    "rewards that are texts": ("--values {files}/texts.json", "rewards"),
    "rewards of unequal number": ("--values {files}/unequal.json", "rewards"),
    "rewards that are no numbers": ("--values {files}/nan.json", "rewards"),
    "a prompt without rewards": ("--values {files}/unrewarded.json", "rewards"),
    "a prompt that is a number": ("--values {files}/number-prompt.json", "prompt"),
    "an id twice": ("--values {files}/twice.json", "twice"),
    "prompts that are no list": ("--values {files}/prompts.json", "prompts"),
    "no prompts": ("--values {files}/no-prompts.json", "prompts"),
    "a header without temperature": ("--values {files}/temperature.json", "temperature"),
    "a header without beta1": ("--values {files}/beta1.json", "beta1"),
    "a header without chat_template": ("--values {files}/chat_template.json", "chat_template"),
    "a model of the hub, offline": ("--values {files}/hub.json", "HF_HUB_OFFLINE"),
    "values in a folder": ("--values {files}", "cannot read"),
    "an evaluation set torn": ("--eval-dataset {files}/torn.jsonl", "line 2"),
    "an evaluation set of the hub, offline": ("--eval-dataset math500", "offline"),
    "a number of steps in words": ("--num-steps many", "--num-steps"),
    "an unknown flag": ("--beta3 1", "--beta3"),
    "lr negative": ("--lr=-1e-6", "--lr"),
    "micro-batches of nothing": ("--micro-batch-tokens 0", "--micro-batch-tokens"),
    "checkpoints never": ("--save-every 0", "--save-every"),
    "no checkpoint kept": ("--keep-checkpoints 0", "--keep-checkpoints"),
    "evaluations never": ("--eval-every 0", "--eval-every"),
    "more than all memory": ("--gpu-memory-utilization 1.5", "--gpu-memory-utilization"),
    "more GPUs per engine than ranks": ("--tensor-parallel-size 2", "--tensor-parallel-size"),
    "out is a file": ("--out {files}/good.jsonl", "good.jsonl"),
    "out is a file, resumed": ("--out {files}/good.jsonl --resume", "good.jsonl"),
    "out below a file": ("--out {files}/good.jsonl/run", "good.jsonl"),
}
EVALUATE = {
    "grade a row that is a list": ("--grade {files}/list.jsonl", "row"),
    "grade an output that is a number": ("--grade {files}/number-output.jsonl", "row 2"),
    "grade tokens that are a text": ("--grade {files}/tokens.jsonl", "row 2"),
    "grade finished that is a text": ("--grade {files}/finished.jsonl", "row 2"),
    "grade an id that is a list": ("--grade {files}/id.jsonl", "row 2"),
    "grade a folder": ("--grade {files}", "{files}"),
    "grade an object": ("--grade {files}/object.json", "object.json"),
    "a benchmark twice": ("--benchmarks {dataset},{dataset}", "digits"),
    "two files of one name": ("--benchmarks {dataset},{files}/digits.jsonl", "digits"),
    "no benchmark": ("--benchmarks ,", "''"),
    "a benchmark of the hub, offline": ("--benchmarks math500", "offline"),
    "a question that is a number": ("--benchmarks {files}/number.jsonl", "row 2"),
    "an answer longer than the context": ("--max-tokens 4096", "--max-tokens"),
    "no tokens": ("--max-tokens 0", "--max-tokens"),
    "no nucleus": ("--top-p 0", "--top-p"),
    "a negative limit": ("--limit=-1", "--limit"),
    "a negative seed": ("--seed=-1", "--seed"),
    "half a sample": ("--num-samples 1.5", "--num-samples"),
    "an unknown flag": ("--beta3 1", "--beta3"),
    "a model of the hub, offline": (f"--model {HUB}", "HF_HUB_OFFLINE"),
    "weights as a pickle only": ("--model {models}/pickled", "safetensors"),
    "no tokenizer": ("--model {models}/no-tokenizer", "tokenizer"),
    "config.json torn": ("--model {models}/torn-config", "config.json"),
    "weights torn": ("--model {models}/torn-weights", "torn-weights"),
    "no chat template": ("--chat-template", "chat template"),
    "more GPUs per engine than ranks": ("--tensor-parallel-size 2", "--tensor-parallel-size"),
    "out is a file": ("--out {files}/good.jsonl", "good.jsonl"),
    "out below a file": ("--out {files}/good.jsonl/results", "good.jsonl"),
    "a summary torn": ("--out {files}/torn-results", "summary.json"),
    "a summary that is a list": ("--out {files}/list-results", "summary.json"),
    "a summary without a header": ("--out {files}/headless-results", "summary.json"),
}
TABLES = {
    "offline_value.py": (OFFLINE_VALUE, "--model {model} --dataset {dataset} --out {out} "),
    "train_online.py": (
        TRAIN_ONLINE,
        "--values {values} --out {out} --batch-size 6 --num-steps 1 ",
    ),
    "evaluate.py": (EVALUATE, "--model {model} --benchmarks {dataset} --out {out} --limit 4 "),
}
BASES = {
    "offline_value.py": "--max-prompt-tokens 160 --max-tokens 48 ",
    "train_online.py": "--num-steps 1 ",
    "evaluate.py": "--max-tokens 48 ",
}
CHEAP = {"an id twice", "grade tokens that are a text"}  # a few seconds each: in `make test` too
CASES = [
    pytest.param(script, name, marks=() if name in CHEAP else pytest.mark.faults)
    for script, (table, _) in TABLES.items()
    for name in table
]


@pytest.fixture(scope="module")
def places(model, dataset, stage1, tmp_path_factory) -> dict[str, Path]:
    """What the tables speak of."""
    files = tmp_path_factory.mktemp("files")
    good = {"question": "q", "answer": "1"}
    write_lines(files / "good.jsonl", [good])
    write_lines(files / "digits.jsonl", [good])
    write_lines(files / "list.jsonl", [good, ["q", "1"]])
    write_lines(files / "number.jsonl", [good, good | {"question": 5}])
    write_lines(files / "blank.jsonl", [good, good | {"question": " \t"}])
    write_lines(files / "twice.jsonl", [good | {"id": key} for key in ("a", "b", "a")])
    write_lines(files / "empty.jsonl", [])
    (files / "torn.jsonl").write_text(json.dumps(good) + '\n{"question": "q", "ans')
    (files / "latin.jsonl").write_bytes('{"question": "größe", "answer": "1"}'.encode("latin-1"))
    (files / "object.json").write_text(json.dumps(good | {"output": "1"}))
    (files / "damaged.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    (files / "folder.jsonl").mkdir()
    (files / "deep.jsonl").write_text("[" * 200_000)
    graded = {"answer": "1", "output": r"\boxed{1}"}
    write_lines(files / "number-output.jsonl", [graded, graded | {"output": 1}])
    write_lines(files / "tokens.jsonl", [graded, graded | {"tokens": "many"}])
    write_lines(files / "finished.jsonl", [graded, graded | {"finished": "no"}])
    write_lines(files / "id.jsonl", [graded, graded | {"id": [1]}])
    for name, text in {"torn": '{"header": {', "list": "[]", "headless": "{}"}.items():
        (files / f"{name}-results").mkdir()
        (files / f"{name}-results" / "summary.json").write_text(text)
    bad_values(stage1.file, files)
    models = bad_models(model, tmp_path_factory.mktemp("models"))
    places = {"model": model, "dataset": dataset, "values": stage1.file}
    return places | {"files": files, "models": models}


def bad_values(source: Path, files: Path) -> None:
    """Signed values files, each with one mistake."""

    def prompt(name: str, **change: object) -> None:
        edit_values(source, files / name, lambda values: values["prompts"][1].update(change))

    def header(name: str, **change: object) -> None:
        edit_values(source, files / name, lambda values: values["header"].update(change))

    prompt("texts.json", rewards=["right"] * 8)
    prompt("unequal.json", rewards=[1.0, 0.0])
    prompt("nan.json", rewards=[float("nan")] * 8)
    prompt("number-prompt.json", prompt=5)
    prompt("twice.json", id="p0")
    header("hub.json", model=HUB)
    edit = lambda name, change: edit_values(source, files / name, change)  # noqa: E731
    edit("unrewarded.json", lambda values: values["prompts"][1].pop("rewards"))
    edit(
        "prompts.json",
        lambda values: values.update(prompts={p["id"]: p for p in values["prompts"]}),
    )
    edit("no-prompts.json", lambda values: values.update(prompts=[]))
    for name in ("temperature", "beta1", "chat_template"):
        edit(f"{name}.json", lambda values: values["header"].pop(name))  # noqa: B023


def bad_models(model: Path, models: Path) -> Path:
    """Copies of a model, each with one mistake."""
    names = "pickled no-tokenizer torn-config list-config odd-type torn-weights no-shard other"
    for name in names.split():
        shutil.copytree(model, models / name)
    (models / "pickled" / "model.safetensors").rename(models / "pickled" / "pytorch_model.bin")
    for path in (models / "no-tokenizer").glob("*token*"):
        path.unlink()
    text = (model / "config.json").read_text()
    (models / "torn-config" / "config.json").write_text(text[: len(text) // 2])
    (models / "list-config" / "config.json").write_text("[1]")
    config = json.loads(text) | {"model_type": "nosuch", "architectures": ["NoSuchForCausalLM"]}
    (models / "odd-type" / "config.json").write_text(json.dumps(config))
    weights = (model / "model.safetensors").read_bytes()
    (models / "torn-weights" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    shard = models / "no-shard" / "model-00001-of-00002.safetensors"
    (models / "no-shard" / "model.safetensors").rename(shard)
    names = sorted(read_weights(model))
    index = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    index = {"metadata": {"total_size": len(weights)}, "weight_map": index}
    (models / "no-shard" / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = read_weights(model)
    tensors[names[0]] = tensors[names[0]] + 0.01 * torch.ones_like(tensors[names[0]])
    save_file(tensors, models / "other" / "model.safetensors", metadata={"format": "pt"})
    return models


def sentence(told: SimpleNamespace) -> str:
    """Return the one sentence with which a run refused, its own or argparse's."""
    assert told.code == 2, told.all
    assert "Traceback" not in told.all, told.all
    lines = [x for x in told.err.splitlines() if re.match(r"(\w+\.py: )?error: ", x)]
    assert len(lines) == 1, told.all
    print(lines[0])  # `pytest -rP` makes a table of it
    return lines[0]


def test_the_tables_have_40_cases_and_more():
    assert sum(map(len, (BAD_OFFLINE_VALUE, BAD_TRAIN_ONLINE, BAD_EVALUATE))) >= 40
    assert len(CASES) >= 80


@pytest.mark.parametrize("script, name", CASES)
def test_bad_input_is_one_sentence_and_code_2(script, name, run, places, tmp_path):
    table, base = TABLES[script]
    arguments, says = table[name]
    filled = {"out": tmp_path / "out"} | places
    words = (base + BASES.get(script, "") + arguments).format(**filled).split()
    before = snapshot(places["files"])
    told = run(script, *words)
    assert says.format(**filled).lower() in sentence(told).lower()
    assert list(tmp_path.iterdir()) == [] and snapshot(places["files"]) == before


# ---------------------------------------------------------------------------------------------
# What contradicts a run, values or results that are there

RESUME = {  # name: arguments, what the sentence names
    "every setting": (
        "--batch-size 10 --updates-per-batch 2 --samples-per-prompt 2 --lr 0.5 --beta1 2 --beta2 2 "
        "--seed 5 --eval-every 7 --filter-unsolved --eval-dataset {dataset}",
        "batch_size updates_per_batch samples_per_prompt lr beta1 beta2 seed eval_every "
        "filter_unsolved eval_dataset",
    ),
    "max_tokens": ("--max-tokens 40", "max_tokens"),
    "another values file": ("--values {files}/resigned.json", "values_sha256"),
    "config.json torn": ("", "config.json"),
    "config.json a list": ("", "config.json"),
}


@pytest.mark.faults
@pytest.mark.parametrize("name", RESUME)
def test_resume_that_contradicts_the_run_is_refused_by_field(name, run, one_rank, places, tmp_path):
    out, (arguments, says) = tmp_path / "run", RESUME[name]
    shutil.copytree(one_rank, out)
    shutil.rmtree(out / "final")
    change = lambda values: values["header"].update(seconds=0)  # noqa: E731
    edit_values(places["values"], tmp_path / "resigned.json", change)
    if "config.json" in name:
        text = (out / "config.json").read_text()
        (out / "config.json").write_text("[]" if "list" in name else text[: len(text) // 2])
    before = snapshot(out)
    words = arguments.format(**places | {"files": tmp_path}).split()
    base = ("--values", places["values"], "--out", out, *RAGGED.split(), "--resume")
    told = run("train_online.py", *base, *words, "--num-steps", "3")
    line = sentence(told)
    for field in says.split():
        assert re.search(rf"\b{re.escape(field)}\b", line), (field, line)
    assert snapshot(out) == before


@pytest.fixture(scope="module")
def finished(run: Callable, places, tmp_path_factory) -> dict[str, tuple]:
    """Commands of finished runs, by script: arguments without the place, and the place."""
    results = tmp_path_factory.mktemp("finished") / "results"
    data = places["files"] / "data"
    data.mkdir()
    shutil.copy(places["dataset"], data / "digits.jsonl")
    arguments = ("--model", places["model"], "--benchmarks", data / "digits.jsonl", "--limit", "6")
    told = run("evaluate.py", *arguments, "--max-tokens", "48", "--out", results)
    assert told.code == 0, told.all
    return {"evaluate.py": ((*arguments, "--max-tokens", "48"), results)}


@pytest.mark.faults
@pytest.mark.parametrize("difference", ["model", "copied model", "rows"])
def test_results_of_two_models_or_two_sets_do_not_share_a_folder(
    difference, run, finished, places, tmp_path
):
    """A table of two models, or last month's numbers for new questions, would look right."""
    arguments, results = finished["evaluate.py"]
    out, words = tmp_path / "results", [*arguments, "--out", tmp_path / "results"]
    shutil.copytree(results, out)
    if difference == "rows":
        other = write_lines(tmp_path / "digits.jsonl", [{"question": "2?", "answer": "2"}] * 8)
        words[words.index("--benchmarks") + 1] = other
        says = "digits|rows|benchmark"
    else:
        model = places["models"] / "other"
        if difference == "copied model":  # other weights where the first model was
            model = tmp_path / "model"
            shutil.copytree(places["models"] / "other", model)
        words[words.index("--model") + 1] = model
        says = "model_sha256"
    if difference == "copied model":
        summary = json.loads((out / "summary.json").read_text())
        summary["header"]["model"] = str(model)
        problems.write_json(out / "summary.json", summary)
    before = snapshot(out)
    assert re.search(says, sentence(run("evaluate.py", *words)))
    assert snapshot(out) == before


@pytest.mark.faults
@pytest.mark.parametrize("difference", ["model", "rows"])
def test_finished_values_of_another_model_or_dataset_are_not_taken(
    difference, run, stage1, places, tmp_path
):
    out, dataset, model = tmp_path / "values.json", places["dataset"], places["model"]
    shutil.copy(stage1.file, out)
    if difference == "model":
        model = places["models"] / "other"
    else:
        rows = [json.loads(line) for line in dataset.read_text().splitlines()]
        dataset = write_lines(tmp_path / "digits.jsonl", rows[:-5])
    before = snapshot(out)
    told = run("offline_value.py", *stage1_arguments(model, dataset), "--out", out)
    assert ("model_sha256" if difference == "model" else "dataset_sha256") in sentence(told)
    assert snapshot(out) == before
