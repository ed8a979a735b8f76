"""Stage 2 as a user runs it: ranks, nodes, weight sync, resuming, and what it leaves on disk."""

import json
import math
import os
import signal
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    RAGGED,
    assert_refused,
    edit_values,
    free_port,
    kill,
    read_metrics,
    read_weights,
    snapshot,
    spawn,
    torchrun,
    wait_until,
)

from losses import optimal_value
from train_online import step_jobs

SECONDS = "seconds_generate seconds_grade seconds_ref seconds_update seconds_sync seconds_total"
COLUMNS = f"""step loss reward v_star adv logratio kl_per_token response_tokens truncated grad_norm
lr logprob_gap {SECONDS} tokens_per_second peak_gib"""
TIMING = {*SECONDS.split(), "tokens_per_second", "peak_gib"}
LONG = """--batch-size 6 --updates-per-batch 2 --samples-per-prompt 2 --lr 1e-4 --beta2 0.1
--beta1 1 --eval-every 3"""


def untimed(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def moved(folder: Path, model: Path) -> torch.Tensor:
    """All that training added to the reference's weights, as one vector in float64."""
    start, end = read_weights(model), read_weights(folder)
    assert start.keys() == end.keys()
    return torch.cat([(end[k].double() - start[k].double()).flatten() for k in sorted(start)])


# ---------------------------------------------------------------------------------------------
# One rank, two ranks, two nodes


@pytest.fixture(scope="module")
def two_ranks(run, stage1, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ranks") / "run"
    command = (*torchrun(2), "train_online.py", "--values", stage1.file, "--out", out)
    told = run(*command, *RAGGED.split())
    assert told.code == 0, told.all
    return out


@pytest.fixture(scope="module")
def two_nodes(stage1, tmp_path_factory) -> Path:
    """Two torchrun agents on loopback: weights replicated across nodes, a mesh of (2, 1)."""
    out, port = tmp_path_factory.mktemp("nodes") / "run", free_port()
    nodes = []
    for rank in range(2):
        agent = f"--nnodes 2 --nproc-per-node 1 --node-rank {rank} --master-addr 127.0.0.1".split()
        script = ("train_online.py", "--values", stage1.file, "--out", out, *RAGGED.split())
        launcher = ("-m", "torch.distributed.run", *agent, "--master-port", port)
        nodes.append(spawn(*launcher, *script))
    try:
        told = [node.communicate(timeout=240) for node in nodes]
    finally:
        for node in nodes:
            kill(node)
    assert [node.returncode for node in nodes] == [0, 0], told
    return out


@pytest.mark.parametrize("other", ["two_ranks", "two_nodes"])
def test_ranks_and_nodes_change_nothing_but_rounding(other, one_rank, model, request):
    """A mean per rank in place of the global one is off by a tenth here, a lost rank by half."""
    folder = request.getfixturevalue(other)
    ours, theirs = read_metrics(folder), read_metrics(one_rank)
    assert [row["step"] for row in ours] == [1, 2] and theirs[1]["logratio"] != 0
    for a, b in zip(ours, theirs, strict=True):
        for key in ("reward", "v_star", "adv", "response_tokens", "truncated"):
            assert a[key] == b[key], key  # the same tokens
        for key in ("loss", "grad_norm", "logratio", "kl_per_token"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
    for name in ("checkpoints/step-1", "final"):
        ours, theirs = moved(folder / name, model), moved(one_rank / name, model)
        # Adam divides by |g|, so that where |g| is mere rounding it makes rounding visible.
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()
        assert ((ours - theirs).abs() < 1e-6).double().mean() > 0.99


# ---------------------------------------------------------------------------------------------
# The log-probs of sampler and trainer


@pytest.fixture(scope="module")
def cool_values(stage1, tmp_path_factory) -> Path:
    """Stage 1's file as if it had been sampled at temperature 0.5."""
    to = tmp_path_factory.mktemp("cool") / "values.json"
    return edit_values(stage1.file, to, lambda values: values["header"].update(temperature=0.5))


@pytest.fixture(scope="module")
def straight(run, cool_values, dataset, tmp_path_factory) -> SimpleNamespace:
    """Eight steps at temperature 0.5, two updates and one evaluation now and then."""
    out = tmp_path_factory.mktemp("straight") / "run"
    arguments = ("--values", cool_values, "--eval-dataset", dataset, *LONG.split())
    told = run("train_online.py", *arguments, "--num-steps", "8", "--save-every", "3", "--out", out)
    assert told.code == 0, told.all
    return SimpleNamespace(**vars(told), out_folder=out, arguments=arguments)


def test_sampler_and_trainer_agree_after_every_sync(one_rank, straight, two_ranks):
    """At temperature 1 and 0.5: stale weights, another temperature, another mask all show."""
    for folder in (one_rank, straight.out_folder, two_ranks):
        for row in read_metrics(folder):
            assert row["logprob_gap"] < 1e-4, (folder, row)


def test_without_the_sync_they_do_not(run, stage1, tmp_path):
    """The test above means something: with all syncs lost, the gap is seen."""
    lose_sync = """
import runpy, sys
import torch.distributed as dist
join = dist.init_process_group
def join_and_break(*args, **kwargs):
    from vllm import LLM
    LLM.collective_rpc = lambda *args, **kwargs: None
    return join(*args, **kwargs)
dist.init_process_group = join_and_break
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = (
        "train_online.py",
        "--values",
        stage1.file,
        "--out",
        tmp_path / "run",
        *RAGGED.split(),
    )
    told = run("-c", lose_sync, *command)
    assert told.code == 0, told.all
    first, second = read_metrics(tmp_path / "run")
    assert first["logprob_gap"] < 1e-4 and second["logprob_gap"] > 1e-3


def test_policy_starts_as_the_reference(one_rank, straight):
    for folder in (one_rank, straight.out_folder):
        first, second, *_ = read_metrics(folder)
        assert first["logratio"] == first["kl_per_token"] == 0.0
        assert second["logratio"] != 0.0


# ---------------------------------------------------------------------------------------------
# What a run writes


def test_metrics_hold_what_the_contract_promises(straight, cool_values):
    rows, prompts = (
        read_metrics(straight.out_folder),
        json.loads(cool_values.read_text())["prompts"],
    )
    assert [row["step"] for row in rows] == list(range(1, 9))
    rewards = torch.tensor([p["rewards"] for p in prompts], dtype=torch.float64)
    v_star = optimal_value(rewards, beta1=1.0)  # --beta1 1, where the file has 0.5
    for row in rows:
        assert set(COLUMNS.split()) <= row.keys()
        assert ("eval_accuracy" in row) == (row["step"] in (3, 6, 8))
        chosen = asked(len(prompts), 6, row["step"], seed=0)
        assert row["v_star"] == pytest.approx(v_star[chosen].mean().item())
        assert row["adv"] == pytest.approx(row["reward"] - row["v_star"])
        assert row["reward"] * 12 == pytest.approx(round(row["reward"] * 12))  # of 6 x 2 responses
        assert 1 <= row["response_tokens"] <= 48 and row["lr"] == 1e-4
        assert 0 < row["grad_norm"] < math.inf
    assert len({row["response_tokens"] for row in rows}) > 1
    log = [line.split() for line in straight.out.splitlines() if line.startswith("step ")]
    assert [int(words[1]) for words in log] == list(range(1, 9))
    assert {*COLUMNS.split(), "eval_accuracy"} == set(log[-1][::2])


def test_checkpoints_load_as_any_model_does(straight, model, dataset):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = straight.out_folder
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["step-6", "step-8"], "the newest two of 3, 6 and 8 are kept"
    for saved in (folder / "checkpoints" / "step-8", folder / "final"):
        lm = AutoModelForCausalLM.from_pretrained(saved, dtype="auto")
        assert {p.dtype for p in lm.parameters()} == {torch.float32}
        assert AutoTokenizer.from_pretrained(saved)("a").input_ids == [
            *AutoTokenizer.from_pretrained(model)("a").input_ids
        ]
        assert moved(saved, model).norm() > 0.05, "it has learned"
    last = read_weights(folder / "checkpoints" / "step-8")
    assert all(torch.equal(last[k], v) for k, v in read_weights(folder / "final").items())
    config = json.loads((folder / "config.json").read_text())
    assert (config["lr"], config["temperature"], config["beta1"]) == (1e-4, 0.5, 1.0)


def jobs_of(num_prompts: int, batch_size: int, step: int, seed: int, **others: float) -> list:
    args = {"samples_per_prompt": 1, "updates_per_batch": 1, "temperature": 0.5} | others
    prompts = [{"id": i} for i in range(num_prompts)]
    return step_jobs(prompts, SimpleNamespace(batch_size=batch_size, seed=seed, **args), step)


def asked(num_prompts: int, batch_size: int, step: int, seed: int) -> list[int]:
    return [prompt["id"] for prompt, _ in jobs_of(num_prompts, batch_size, step, seed)]


def test_each_epoch_asks_every_prompt_once_and_in_another_order():
    epochs = [[asked(12, 4, 3 * epoch + i, 7) for i in (1, 2, 3)] for epoch in range(3)]
    flat = [list(chain(*epoch)) for epoch in epochs]
    assert all(sorted(epoch) == list(range(12)) for epoch in flat)
    assert flat[0] != flat[1] != flat[2] != list(range(12))
    assert asked(12, 4, 5, 7) == asked(12, 4, 5, 7) != asked(12, 4, 5, 8)
    with_remainder = [asked(13, 4, step, 0) for step in (1, 2, 3)]
    assert len(set(chain(*with_remainder))) == 12 and len(asked(13, 4, 4, 0)) == 4


def test_each_response_of_a_step_has_its_own_seed_and_the_first_updates_their_log_probs():
    jobs = jobs_of(12, 4, 5, 7, samples_per_prompt=3, updates_per_batch=2)
    assert [prompt["id"] for prompt, _ in jobs] == [i for i in asked(12, 4, 5, 7) for _ in range(3)]
    assert [how["logprobs"] for _, how in jobs] == [0] * 6 + [None] * 6
    assert {how["temperature"] for _, how in jobs} == {0.5}
    steps = [jobs, jobs_of(12, 4, 8, 7, samples_per_prompt=3)]
    assert len({how["seed"] for step in steps for _, how in step}) == 24


# ---------------------------------------------------------------------------------------------
# Stopping and going on


def test_stopped_damaged_and_resumed_is_as_if_it_had_not_been(run, straight, model, tmp_path):
    """SIGTERM saves the last whole step; a broken checkpoint costs the steps since its elder."""
    out = tmp_path / "run"
    arguments = (*straight.arguments, "--save-every", "1", "--out", out)
    process = spawn("train_online.py", *arguments, "--num-steps", "1000")
    metrics = out / "metrics.jsonl"
    try:
        wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 3, process)
        os.kill(process.pid, signal.SIGTERM)
        told = process.communicate(timeout=60)
    finally:
        kill(process)
    assert process.returncode == 143, told
    rows, whole = read_metrics(out), read_metrics(straight.out_folder)
    last = rows[-1]["step"]
    assert 3 <= last < 8 and not (out / "final").exists(), "stopped too late: this tests nothing"
    assert untimed(rows) == untimed(whole)[:last]
    kept = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert kept == [f"step-{last - 1}", f"step-{last}"]

    weights = out / "checkpoints" / kept[-1] / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1000] ^= 1
    weights.write_bytes(damaged)
    told = run("train_online.py", *arguments, "--num-steps", "8", "--resume")
    assert told.code == 0, told.all
    assert f"step-{last}" in told.err and "damaged" in told.err
    assert untimed(read_metrics(out)) == untimed(whole)
    for name in ("final", "checkpoints/step-8"):
        ours, theirs = read_weights(out / name), read_weights(straight.out_folder / name)
        assert all(torch.equal(ours[k], v) for k, v in theirs.items())


def test_resume_of_a_finished_run_changes_nothing(run, straight):
    out, before = straight.out_folder, snapshot(straight.out_folder)
    arguments = (*straight.arguments, "--out", out, "--save-every", "3", "--num-steps", "8")
    told = run("train_online.py", *arguments, "--resume")
    assert told.code == 0 and "Traceback" not in told.all
    assert snapshot(out) == before


def test_resume_with_another_setting_names_it(run, straight):
    out, before = straight.out_folder, snapshot(straight.out_folder)
    arguments = (*straight.arguments, "--out", out, "--num-steps", "9", "--resume", "--lr", "0.5")
    told = run("train_online.py", *arguments)
    assert told.code == 2 and "lr 0.0001, not 0.5" in told.err, told.all
    assert snapshot(out) == before


def test_gradient_that_is_no_number_stops_the_run(run, stage1, tmp_path):
    """At a learning rate of 1e38 the first update ruins the weights; the second step shows it."""
    command = (
        "train_online.py",
        "--values",
        stage1.file,
        "--out",
        tmp_path / "run",
        *RAGGED.split(),
    )
    told = run(*command, "--lr", "1e38")
    assert told.code == 1, told.all
    (line,) = [x for x in told.err.splitlines() if "step 2" in x]
    assert "nan" in line or "inf" in line, line
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    assert len(read_metrics(tmp_path / "run")) == 1 and not (tmp_path / "run" / "final").exists()


def test_box_without_eos_earns_nothing(run, cut_short, tmp_path):
    """Nine tokens hold a box but not the EOS after it: as in stages 1 and 3, the reward is 0."""
    command = ("train_online.py", "--values", cut_short, "--out", tmp_path / "run", *RAGGED.split())
    told = run(*command, "--num-steps", "1", "--batch-size", "40")
    assert told.code == 0, told.all
    (row,) = read_metrics(tmp_path / "run")
    assert row["reward"] == 0.0 and row["truncated"] > 0.8 and row["response_tokens"] <= 9


# ---------------------------------------------------------------------------------------------
# Bad input

BAD = {  # name: arguments, what the error says
    "missing values": ("--values {files}/none.json", "none.json"),
    "truncated values": ("--values {files}/truncated.json", "truncated.json"),
    "values that are none": ("--values {files}/list.json", "list.json"),
    "edited values": ("--values {files}/edited.json", "sha256"),
    "values of another template": ("--values {files}/template.json", "prompt_template"),
    "values of another model": ("--values {files}/model.json", "model_sha256"),
    "another model": ("--model {files}", "model"),
    "another temperature": ("--temperature 0.7", "temperature 1.0, not 0.7"),
    "values of a model that is gone": ("--values {files}/gone.json", "gone"),
    "beta1 0": ("--beta1 0", "--beta1"),
    "beta2 0": ("--beta2 0", "--beta2"),
    "beta2 negative": ("--beta2=-0.001", "--beta2"),
    "beta2 not a number": ("--beta2 nan", "--beta2"),
    "batch and updates": ("--batch-size 5 --updates-per-batch 2", "--updates-per-batch"),
    "all prompts filtered": ("--values {files}/unsolved.json --filter-unsolved", "solved"),
    "batch larger than the prompts": ("--batch-size 42", "--batch-size 42"),
    "no steps": ("--num-steps 0", "--num-steps"),
    "unknown evaluation set": ("--eval-dataset nosuch", "'nosuch'"),
}


@pytest.fixture(scope="module")
def bad(bad_runs, stage1, tmp_path_factory):
    files, folder = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("bad")

    def edited(name: str, **header: str) -> None:
        change = lambda values: values["header"].update(header)  # noqa: E731
        edit_values(stage1.file, files / name, change)

    text = stage1.file.read_text()
    (files / "truncated.json").write_text(text[: len(text) // 2])
    (files / "list.json").write_text("[1, 2]")
    values = json.loads(text)
    values["prompts"][0]["rewards"][0] = 1.0 - values["prompts"][0]["rewards"][0]
    (files / "edited.json").write_text(json.dumps(values))
    edited("template.json", prompt_template="{question}")
    edited("model.json", model_sha256="0" * 64)
    edited("gone.json", model="gone")

    def unsolve(values: dict) -> None:
        for prompt in values["prompts"]:
            prompt["rewards"] = [0.0] * len(prompt["rewards"])

    edit_values(stage1.file, files / "unsolved.json", unsolve)
    base = "--values {values} --out {out} --batch-size 6 "
    table = {name: (base + arguments, says) for name, (arguments, says) in BAD.items()}
    return bad_runs("train_online.py", table, folder, files=files, values=stage1.file)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_code_2(case, bad):
    assert_refused(bad[case], BAD[case][1])


def test_folder_in_use_is_refused_and_left_alone(run, stage1, straight):
    out, before = straight.out_folder, snapshot(straight.out_folder)
    told = run("train_online.py", "--values", stage1.file, "--out", out, "--batch-size", "6")
    told.left = []
    assert_refused(told, "--resume")
    assert snapshot(out) == before
