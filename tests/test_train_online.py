"""Stage 2 as a user runs it: ranks, weight sync, resuming, what it writes, and what a fork adds."""

import contextlib
import functools
import json
import math
import os
import signal
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    RAGGED,
    assert_one_error,
    at_once,
    edit_values,
    kill,
    make_tokenizer,
    read_lines,
    read_metrics,
    read_weights,
    snapshot,
    spawn,
    torchrun,
    wait_until,
)
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import train_online
from apo import files, problems
from apo.engine import Response
from apo.files import UserError
from apo.problems import Prompt
from apo.run_folder import RunLog, describe_seconds
from losses import optimal_value

SECONDS = "seconds_generate seconds_grade seconds_ref seconds_update seconds_sync seconds_total"
KEYS = f"""step loss reward v_star adv logratio kl_per_token response_tokens truncated grad_norm
lr logprob_gap {SECONDS} tokens_per_second peak_gib"""
TIMING = {*SECONDS.split(), "tokens_per_second", "peak_gib"}


def untimed(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def moved(folder: Path, model: Path) -> torch.Tensor:
    """All that training added to the reference's weights, as one vector in float64."""
    start, end = read_weights(model), read_weights(folder)
    assert start.keys() == end.keys()
    return torch.cat([(end[k].double() - start[k].double()).flatten() for k in sorted(start)])


# ---------------------------------------------------------------------------------------------
# One rank and two


@pytest.fixture(scope="module")
def two_ranks(
    run: Callable, stage1: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("ranks") / "run"
    command = (*torchrun(2), "train_online.py", "--values", stage1.file, "--out", out)
    result = run(*command, *RAGGED.split())
    assert result.code == 0, result.all
    return out


def test_two_ranks_change_nothing_but_rounding(
    two_ranks: Path, one_rank: Path, model: Path
) -> None:
    """A mean per rank in place of the global one is off by a tenth here, a lost rank by half."""
    rows, expected = read_metrics(two_ranks), read_metrics(one_rank)
    assert [row["step"] for row in rows] == [1, 2] and expected[1]["logratio"] != 0
    for a, b in zip(rows, expected, strict=True):
        for key in ("reward", "v_star", "adv", "response_tokens", "truncated"):
            assert a[key] == b[key], key  # the same tokens
        for key in ("loss", "grad_norm", "logratio", "kl_per_token"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
    for a, b in zip(
        read_lines(two_ranks / "samples.jsonl"), read_lines(one_rank / "samples.jsonl"), strict=True
    ):
        assert a.pop("logratio") == pytest.approx(b.pop("logratio"), rel=1e-4, abs=1e-5)
        assert a == b
    for name in ("checkpoints/step-1", "final"):
        move, expected_move = moved(two_ranks / name, model), moved(one_rank / name, model)
        # Adam divides by |g|, so that where |g| is mere rounding it makes rounding visible.
        assert (move - expected_move).norm() < 1e-3 * expected_move.norm()
        assert ((move - expected_move).abs() < 1e-6).double().mean() > 0.99


# ---------------------------------------------------------------------------------------------
# Sampling


def as_sampled(index: int, reward: float, num_tokens: int, finished: bool = True) -> Response:
    prompt = Prompt({"id": f"p{index}"}, "", [1])
    ids = [2] * num_tokens
    return Response(index, prompt, 0, ids, "", finished, [], reward, {"v_star": 0.25})


def test_training_samples_as_stage_1_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """V* is of the distribution that is in the header of the values file."""

    class Sampled(Exception):
        pass

    def sample(llm: None, requests: list, temperature: float, max_tokens: int) -> None:
        assert (len(requests), temperature, max_tokens) == (2, 0.7, 9)
        raise Sampled

    prompts = [Prompt({"id": f"p{n}"}, "", [1]) for n in range(4)]
    run = SimpleNamespace(llm=None, prompts=prompts, eval_prompts=[], first_step=1)
    monkeypatch.setattr(train_online, "set_up", lambda *args: run)
    monkeypatch.setattr(train_online.engine, "sample", sample)
    header = {"temperature": 0.7, "max_tokens": 9}
    data = SimpleNamespace(values=SimpleNamespace(header=header))
    words = ["--batch-size", "2", "--num-steps", "1", "--updates-per-batch", "1"]
    args = train_online.make_parser().parse_args(words)
    with pytest.raises(Sampled):
        train_online.train(args, data, train_online.a_star_po(args.beta2))


def test_evaluation_is_the_mean_reward_of_greedy_responses(
    process_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(llm: None, requests: list, temperature: float, max_tokens: int) -> list[Response]:
        assert (temperature, max_tokens) == (0.0, 9)
        responses = []
        for n in range(len(requests)):
            responses.append(as_sampled(n, reward=float(n > 0), num_tokens=3, finished=n > 0))
        return responses

    monkeypatch.setattr(train_online.engine, "sample", sample)
    run = SimpleNamespace(llm=None, eval_prompts=[Prompt({"id": "a"}, "", [1])] * 4)
    assert train_online.evaluate(run, 9) == {"eval_accuracy": 0.75, "eval_truncated": 0.25}


def test_the_metrics_of_responses_by_hand() -> None:
    responses = [as_sampled(0, 1.0, 2), as_sampled(1, 0.0, 7, finished=False)]
    responses += [as_sampled(2, 0.5, 3), as_sampled(3, 0.0, 4)]
    assert train_online.summarize(responses, seconds=8.0) == pytest.approx(
        {
            "reward": 0.375,
            "v_star": 0.25,
            "adv": 0.125,
            "response_tokens": 4.0,
            "truncated": 0.25,
            "tokens_per_second": 2.0,
        }
    )


def test_a_test_set_gets_the_template_of_the_training() -> None:
    header = {"reward": problems.reward_name("math")}
    values = SimpleNamespace(style=problems.PromptStyle("Q: {question}"), header=header)
    row = {"id": "a", "question": "abc", "answer": "1", "_task": "math"}
    [prompt] = train_online.make_eval_prompts([row], values, make_tokenizer())
    assert prompt.text == "Q: abc"


@pytest.mark.parametrize("check", ["check_policy", "check_model"])
def test_nothing_is_trained_before_the_checks(
    check: str,
    stage1: SimpleNamespace,
    process_group: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Refused(Exception):
        pass

    def refuse(*args: object) -> None:
        raise Refused

    weight = torch.nn.Parameter(torch.zeros(3))
    policy = SimpleNamespace(parameters=lambda: [weight], load_into=lambda llm: None)
    llm = SimpleNamespace(get_tokenizer=make_tokenizer)
    monkeypatch.setattr(train_online.engine, "start_engine", lambda *args, **options: llm)
    monkeypatch.setattr(train_online.engine, "has_sleep_mode", lambda llm: False)
    monkeypatch.setattr(train_online, "load_models", lambda *args: (policy, None))
    monkeypatch.setattr(train_online.self_check, "sample_for_check", lambda *args: [])
    for name in ("check_policy", "check_model"):
        monkeypatch.setattr(train_online.self_check, name, lambda *args: None)
    monkeypatch.setattr(train_online.self_check, check, refuse)
    words = ["--values", str(stage1.file), "--batch-size", "6", "--out", str(tmp_path / "run")]
    args = train_online.make_parser().parse_args(words)
    data = train_online.check(args)
    with pytest.raises(Refused):
        train_online.set_up(args, data, train_online.a_star_po(args.beta2))


def test_prompts_that_cannot_be_continued_are_refused_before_anything_starts(
    stage1: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--values", str(stage1.file), "--batch-size", "6", "--out", str(tmp_path / "run")]
    args = train_online.make_parser().parse_args(words)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="embedding"):
        patch.setattr(train_online.self_check, "vocabulary_size", lambda folder: 10)
        train_online.check(args)

    def empty_one(values: dict) -> None:
        values["prompts"][3]["prompt"] = ""

    args.values = str(edit_values(stage1.file, tmp_path / "values.json", empty_one))
    with pytest.raises(UserError, match="p3 has no tokens"):
        train_online.check(args)


def test_the_optimizer_is_the_published_one(straight: SimpleNamespace, tmp_path: Path) -> None:
    """AdamW with torch's own defaults, at the rate of --lr: read off a checkpoint."""
    [checkpoint, *_] = sorted((straight.folder / "checkpoints").iterdir())
    dcp_to_torch_save(checkpoint / "trainer", tmp_path / "trainer.pt")
    state = torch.load(tmp_path / "trainer.pt", weights_only=False)
    for group in state["optimizer"]["param_groups"]:
        assert group["lr"] == 1e-4 and group["weight_decay"] == 0.01
        assert tuple(group["betas"]) == (0.9, 0.999) and group["eps"] == 1e-8


# ---------------------------------------------------------------------------------------------
# The log-probs of sampler and trainer


def test_sampler_and_trainer_agree_after_every_sync(
    one_rank: Path, straight: SimpleNamespace, two_ranks: Path
) -> None:
    """At temperature 1 and 0.5: stale weights and another mask show."""
    for folder in (one_rank, straight.folder, two_ranks):
        for row in read_metrics(folder):
            assert row["step"] == 0 or row["logprob_gap"] < 1e-4, (folder, row)


LOSE_SYNC = """
import runpy, sys
import torch.distributed as dist
join = dist.init_process_group
def join_and_break(*args, **kwargs):
    from vllm import LLM
    sync = LLM.collective_rpc
    calls = []
    def lose(llm, name, **options):
        calls.append(name)
        weights = options["kwargs"]["weights_iterator"]
        if sys.argv[-1].endswith("partly"):
            # One tensor does not arrive.
            weights = (pair for i, pair in enumerate(weights) if i != 5)
        elif len(calls) > 1:
            return None
        return sync(llm, name, kwargs={"weights_iterator": weights})
    LLM.collective_rpc = lose
    return join(*args, **kwargs)
dist.init_process_group = join_and_break
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def broken(
    run: Callable, stage1: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """Run stage 2 with lost weights, and with a learning rate that ruins the weights."""
    folder = tmp_path_factory.mktemp("broken")
    command = ("train_online.py", "--values", stage1.file, *RAGGED.split())
    later, partly, ruined = at_once(
        lambda: run("-c", LOSE_SYNC, *command, "--out", folder / "later"),
        lambda: run("-c", LOSE_SYNC, *command, "--out", folder / "partly"),
        lambda: run(*command, "--lr", "1e38", "--out", folder / "ruined"),
    )
    return SimpleNamespace(folder=folder, later=later, partly=partly, ruined=ruined)


def test_without_the_sync_they_do_not(broken: SimpleNamespace) -> None:
    """The test above means something: where syncs are lost, the gap is seen, and ends the run."""
    assert broken.later.code == 2, broken.later.all
    assert_one_error(broken.later.err, "step 2: logprob_gap")
    (first,) = read_metrics(broken.folder / "later")
    assert first["logprob_gap"] < 1e-4
    folder = broken.folder / "later" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-1"]


def test_a_tensor_that_does_not_arrive_ends_the_run_before_a_step(broken: SimpleNamespace) -> None:
    """At the start the policy is the reference, so an engine that had read it would agree."""
    assert broken.partly.code == 2, broken.partly.all
    assert_one_error(broken.partly.err, "weights")
    assert read_metrics(broken.folder / "partly") == []


@pytest.mark.parametrize(
    "gap, temperature, stops",
    [
        (0.9, 1.0, False),
        (1.1, 1.0, True),
        (1.9, 0.5, False),
        (2.1, 0.5, True),
        (math.nan, 1.0, True),
    ],
)
def test_a_large_gap_stops_the_run(gap: float, temperature: float, stops: bool) -> None:
    """Given in units of the bound, which a temperature below 1 raises as it raises the gap."""
    metrics = {"step": 3, "loss": 0.1, "grad_norm": 0.1}
    metrics["logprob_gap"] = gap * train_online.LARGEST_GAP
    expected = pytest.raises(UserError, match="step 3: logprob_gap")
    with expected if stops else contextlib.nullcontext():
        train_online.check_metrics(metrics, temperature)


def test_beta1_may_be_named_as_it_was_used(stage1: SimpleNamespace, tmp_path: Path) -> None:
    """--resume compares what is used, not what is typed."""
    words = ["--values", str(stage1.file), "--batch-size", "6", "--out", str(tmp_path / "run")]
    configs = []
    for more in ([], ["--beta1", "0.5"]):
        args = train_online.make_parser().parse_args([*words, *more])
        data = train_online.check(args)
        configs.append(train_online.make_config(args, data, train_online.a_star_po(args.beta2)))
    assert configs[0] == configs[1]


def test_responses_that_are_compared_must_be_to_one_prompt() -> None:
    in_pairs = train_online.a_star_po(1e-3)._replace(group_size=2)
    with pytest.raises(UserError, match="--samples-per-prompt 3"):
        train_online.train(SimpleNamespace(samples_per_prompt=3), None, in_pairs)


def test_a_gradient_that_is_no_number_stops_the_run(broken: SimpleNamespace) -> None:
    """At a learning rate of 1e38 the first update ruins the weights; the second step shows it."""
    assert broken.ruined.code == 1, broken.ruined.all
    (line,) = [line for line in broken.ruined.err.splitlines() if "Error: step 2" in line]
    assert "nan" in line or "inf" in line, line
    folder = broken.folder / "ruined"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-1"]
    assert len(read_metrics(folder)) == 1 and not (folder / "final").exists()


def test_policy_starts_as_the_reference(one_rank: Path, straight: SimpleNamespace) -> None:
    for folder in (one_rank, straight.folder):
        first, second, *_ = [row for row in read_metrics(folder) if row["step"] > 0]
        assert first["logratio"] == first["kl_per_token"] == 0.0
        assert second["logratio"] != 0.0


# ---------------------------------------------------------------------------------------------
# What a run writes


def test_metrics_hold_what_the_contract_promises(straight: SimpleNamespace) -> None:
    untrained, *rows = read_metrics(straight.folder)
    assert untrained.keys() >= {"step", "eval_accuracy", "eval_truncated"}
    assert "loss" not in untrained
    assert untrained["step"] == 0
    assert [row["step"] for row in rows] == list(range(1, 9))
    prompts = straight.values["prompts"]
    rewards = torch.tensor([p["rewards"] for p in prompts], dtype=torch.float64)
    v_star = optimal_value(rewards, beta1=1.0)  # --beta1 1, where the file has 0.5
    for row in rows:
        assert set(KEYS.split()) <= row.keys()
        assert ("eval_accuracy" in row) == (row["step"] in (3, 6, 8))
        chosen = asked(len(prompts), 6, row["step"], seed=0)
        assert row["v_star"] == pytest.approx(v_star[chosen].mean().item())
        assert row["adv"] == pytest.approx(row["reward"] - row["v_star"])
        assert row["reward"] * 12 == pytest.approx(round(row["reward"] * 12))  # of 6 x 2 responses
        assert 1 <= row["response_tokens"] <= 48 and row["lr"] == 1e-4
        assert 0 < row["grad_norm"] < math.inf
        parts = [row[name] for name in SECONDS.split()]
        assert sum(parts[:-1]) <= parts[-1]
        speed = row["response_tokens"] * 12 / row["seconds_total"]
        assert row["tokens_per_second"] == pytest.approx(speed)
    assert len({row["response_tokens"] for row in rows}) > 1


def test_each_step_is_one_line_of_at_most_100_columns(straight: SimpleNamespace) -> None:
    lines = [line for line in straight.out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == [f"{step}/8" for step in range(9)]
    for line, row in zip(lines, read_metrics(straight.folder), strict=True):
        assert len(line) <= 100
        if row["step"] > 0:
            assert f"{row['reward']:.3f}" in line and f"{row['v_star']:.3f}" in line
            assert "left" in line
        if "eval_accuracy" in row:
            assert f"{row['eval_accuracy']:.1%}" in line
        if row["step"] > 0:
            assert f"truncated {row['truncated']:.0%}" in line


@pytest.mark.parametrize("evaluated", [True, False])
@pytest.mark.parametrize("seconds", [0.5, 99.94, 4000.0])
@pytest.mark.parametrize("logratio", [0.0, -1.234e-05, 0.000987, -99.9, 123.456])
def test_a_long_run_fits_into_100_columns(
    evaluated: bool, seconds: float, logratio: float, tmp_path: Path
) -> None:
    log = RunLog(tmp_path, 5000)
    row = {
        "step": 1234,
        "reward": -0.12345,
        "v_star": -0.54321,
        "logratio": logratio,
        "response_tokens": 16384.4,
        "seconds_total": seconds,
        "truncated": 1.0,
    }
    if evaluated:
        row["eval_accuracy"] = 1.0
    assert len(log.describe(row)) <= 100, log.describe(row)


def test_times_are_written_for_a_person() -> None:
    assert describe_seconds(44.6) == "45 s"
    assert describe_seconds(720) == "12 min"
    assert describe_seconds(12000) == "3 h 20 min"
    assert describe_seconds(111111) == "31 h"


def test_samples_can_be_read_beside_their_numbers(straight: SimpleNamespace) -> None:
    samples = read_lines(straight.folder / "samples.jsonl")
    rows = read_metrics(straight.folder)
    prompts = {p["id"]: p for p in straight.values["prompts"]}
    assert [sample["step"] for sample in samples] == [step for step in range(1, 9) for _ in "8" * 8]
    for sample in samples:
        prompt = prompts[sample["id"]]
        assert sample["prompt"] == prompt["prompt"]
        rewards = torch.tensor([prompt["rewards"]], dtype=torch.float64)
        assert sample["v_star"] == pytest.approx(optimal_value(rewards, 1.0).item())
        right = sample["finished"] and problems.reward(sample["output"], prompt["answer"])
        assert sample["reward"] == float(right)
    for step in range(1, 9):
        of_step = [sample for sample in samples if sample["step"] == step]
        # The first of the two updates has six responses. Its log-ratios are those of metrics.jsonl.
        logratios = [sample["logratio"] for sample in of_step]
        # The others are of the second update, for which the policy has moved once.
        assert all(math.isfinite(logratio) and logratio != 0 for logratio in logratios[6:])
        assert sum(logratios[:6]) / 6 == pytest.approx(rows[step]["logratio"], rel=1e-5, abs=1e-7)
        assert (step == 1) == all(logratio == 0 for logratio in logratios[:6])


def test_checkpoints_load_as_any_model_does(straight: SimpleNamespace, model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = straight.folder
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-6", "step-8"], "the newest two of 3, 6 and 8 are kept"
    for saved in (folder / "checkpoints" / "step-8", folder / "final"):
        lm = AutoModelForCausalLM.from_pretrained(saved, dtype="auto")
        assert {p.dtype for p in lm.parameters()} == {torch.float32}
        ids = AutoTokenizer.from_pretrained(saved)("a").input_ids
        assert ids == AutoTokenizer.from_pretrained(model)("a").input_ids
        assert moved(saved, model).norm() > 0.05, "it has learned"
    last = read_weights(folder / "checkpoints" / "step-8")
    assert all(torch.equal(last[k], v) for k, v in read_weights(folder / "final").items())


def test_config_has_the_flags_and_what_the_values_decide(
    straight: SimpleNamespace, dataset: Path
) -> None:
    config = json.loads((straight.folder / "config.json").read_text())
    assert (config["lr"], config["beta1"], config["eval_dataset"]) == (1e-4, 1.0, str(dataset))
    assert (config["temperature"], config["max_tokens"]) == (0.5, 48)
    assert config["prompt_template"] == problems.BOXED_TEMPLATE and config["task"] == "math"
    assert config["model_fingerprint"] == straight.values["header"]["model_fingerprint"]
    assert config["algorithm_name"] == "a_star_po", "so that another loss cannot --resume the run"


def test_algorithms_that_share_a_loss_have_names_of_their_own() -> None:
    def credit(responses: list[Response]) -> None: ...

    a_star_po = train_online.a_star_po(0.001)
    name = train_online.name_of(a_star_po._replace(credit=credit))
    assert name.startswith("a_star_po+") and name != train_online.name_of(a_star_po)
    assert (
        train_online.name_of(train_online.Algorithm(functools.partial(a_star_po.loss))) == "partial"
    )


# ---------------------------------------------------------------------------------------------
# What is asked


def make_requests(
    num_prompts: int, batch_size: int, step: int, seed: int, **changes: object
) -> list[train_online.Request]:
    args = SimpleNamespace(samples_per_prompt=1, updates_per_batch=1, seed=seed)
    vars(args).update(changes)
    prompts = [Prompt({"id": str(i)}, "", [i]) for i in range(num_prompts)]
    batch = train_online.next_batch(prompts, batch_size, seed, step)
    return train_online.make_requests(batch, args, step)


def asked(num_prompts: int, batch_size: int, step: int, seed: int) -> list[int]:
    requests = make_requests(num_prompts, batch_size, step, seed)
    return [int(request.prompt.row["id"]) for request in requests]


def test_each_epoch_asks_every_prompt_once_and_in_another_order() -> None:
    epochs = []
    for epoch in range(3):
        steps = [asked(12, 4, 3 * epoch + i, 7) for i in (1, 2, 3)]
        epochs.append(list(chain(*steps)))
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != list(range(12))
    assert asked(12, 4, 5, 7) == asked(12, 4, 5, 7) != asked(12, 4, 5, 8)
    with_remainder = [asked(13, 4, step, 0) for step in (1, 2, 3)]
    assert len(set(chain(*with_remainder))) == 12 and len(asked(13, 4, 4, 0)) == 4


def test_each_response_of_a_step_has_its_own_seed_and_the_first_updates_their_log_probs() -> None:
    requests = make_requests(12, 4, 5, 7, samples_per_prompt=3, updates_per_batch=2)
    ids = [int(request.prompt.row["id"]) for request in requests]
    assert ids == [i for i in asked(12, 4, 5, 7) for _ in range(3)]
    assert [request.sample for request in requests] == [0, 1, 2] * 4
    assert [request.logprobs for request in requests] == [True] * 6 + [False] * 6
    other_step = make_requests(12, 4, 8, 7, samples_per_prompt=3)
    assert len({request.seed for request in requests + other_step}) == 24
    again = make_requests(12, 4, 5, 7, samples_per_prompt=3)
    assert [request.seed for request in again] == [request.seed for request in requests]


# ---------------------------------------------------------------------------------------------
# Stopping and going on


def test_stopped_damaged_and_resumed_is_as_if_it_had_not_been(
    run: Callable, straight: SimpleNamespace, tmp_path: Path
) -> None:
    """SIGTERM saves the last whole step. A damaged one costs the steps since the one before."""
    out = tmp_path / "run"
    arguments = ("train_online.py", *straight.arguments, "--save-every", "1", "--out", out)
    process = spawn(*arguments, "--num-steps", "1000")
    metrics = out / "metrics.jsonl"
    try:
        wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 4, process)
        os.kill(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=900)
    finally:
        kill(process)
    assert process.returncode == 143, output
    rows, whole = read_metrics(out), read_metrics(straight.folder)
    last = rows[-1]["step"]
    assert 3 <= last < 8 and not (out / "final").exists(), "stopped too late: this tests nothing"
    assert untimed(rows) == untimed(whole)[: last + 1]
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert kept == [f"step-{last - 1}", f"step-{last}"]

    weights = out / "checkpoints" / kept[-1] / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    result = run(*arguments, "--num-steps", "8", "--resume")
    assert result.code == 0, result.all
    assert f"step-{last}" in result.err and "damaged" in result.err
    first_line = next(line for line in result.out.splitlines() if line.startswith("step "))
    assert first_line.startswith(f"step {last}/8 ")
    assert untimed(read_metrics(out)) == untimed(whole)
    assert read_lines(out / "samples.jsonl") == read_lines(straight.folder / "samples.jsonl")
    for name in ("final", "checkpoints/step-8"):
        weights, expected = read_weights(out / name), read_weights(straight.folder / name)
        assert all(torch.equal(weights[k], v) for k, v in expected.items())


def test_resume_of_a_finished_run_or_with_another_setting_changes_nothing(
    run: Callable, straight: SimpleNamespace
) -> None:
    before = snapshot(straight.folder)
    arguments = ("train_online.py", *straight.arguments, "--out", straight.folder, "--resume")
    again = run(*arguments, "--num-steps", "8", "--save-every", "4")
    other = run(*arguments, "--num-steps", "9", "--lr", "0.5")
    assert again.code == 0 and "finished" in again.out, again.all
    assert other.code == 2, other.all
    assert_one_error(other.err, "lr 0.0001, not 0.5")
    assert snapshot(straight.folder) == before


def test_steps_that_run_again_are_logged_once(tmp_path: Path) -> None:
    """After a kill, the log can be ahead of the last checkpoint, and its last line torn."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = [json.dumps({"step": step, "x": step / 3}) for step in (0, 1, 2, 2, 3)]
        (tmp_path / name).write_text("\n".join(lines) + '\n{"step": 4, "re')
    log = RunLog(tmp_path, 9)
    log.open()
    log.forget_after(2)
    log.metrics_file.close()
    log.samples_file.close()
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = read_lines(tmp_path / name)
        assert [row["step"] for row in rows] == [0, 1, 2, 2] and rows[1]["x"] == 1 / 3
    log.open()
    log.forget_after(0)  # no checkpoint is left: all of it runs again
    assert (tmp_path / "metrics.jsonl").read_text() == ""


# ---------------------------------------------------------------------------------------------
# What a fork adds: a task, a loss, a statistic, a tracker (tests/fork/)


def test_a_task_and_a_metric_of_a_fork_run_through_stage_2(fork: SimpleNamespace) -> None:
    untrained, *rows = read_metrics(fork.run)
    assert [row["step"] for row in rows] == [1, 2]
    for row in (untrained, *rows[1:]):  # its own test set, by default, before and after
        assert -0.5 <= row["eval_accuracy"] <= 1.5
    samples = read_lines(fork.run / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [1, 1, 1, 2, 2, 2]  # --log-samples 3
    assert {sample["reward"] for sample in samples} <= {1.5, -0.5, 0.0}
    for sample in samples:
        assert sample["prompt"].startswith("Digit ")
    for row in rows:
        # The mean of twice the parity over the two responses of the first update.
        parity = [
            fork.rows[int(sample["id"][1:])]["rule"]["parity"]
            for sample in samples
            if sample["step"] == row["step"]
        ]
        assert row["twice_parity"] == pytest.approx(parity[0] + parity[1])
    config = json.loads((fork.run / "config.json").read_text())
    assert config["task"] == "parity" and config["eval_dataset"] == "parity"


def test_a_tracker_gets_what_metrics_jsonl_has(fork: SimpleNamespace) -> None:
    calls = read_lines(fork.tracker_calls)
    names = [name for name, _ in calls]
    assert names == ["init", "log", "log", "log", "finish"]
    _, started = calls[0]
    assert started["name"] == "run" and started["config"]["task"] == "parity"
    for (_, logged), row in zip(calls[1:4], read_metrics(fork.run), strict=True):
        assert logged == {"metrics": row, "step": row["step"]}


# ---------------------------------------------------------------------------------------------
# Checks before anything starts


@pytest.mark.parametrize(
    "training_set, test_set",
    [("math", "math500"), ("gsm8k", "gsm8k"), ("own.jsonl", "none"), ("gone", "none")],
)
def test_the_default_evaluation_set_belongs_to_the_training_set(
    training_set: str,
    test_set: str,
    stage1: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = []

    def load_problems(name: str, serves: str) -> list[dict]:
        loaded.append((name, serves))
        return [{"id": "a", "question": "q", "answer": "1", "_task": name}]

    monkeypatch.setattr(problems, "load_problems", load_problems)
    values = edit_values(
        stage1.file,
        tmp_path / "values.json",
        lambda document: document["header"].update(dataset=training_set),
    )
    out = str(tmp_path / "run")
    flags = ["--values", str(values), "--batch-size", "4", "--out", out]
    for more, expected in (([], test_set), (["--eval-dataset", "none"], "none")):
        loaded.clear()
        args = train_online.make_parser().parse_args([*flags, *more])
        data = train_online.check(args)
        assert args.eval_dataset == expected
        assert loaded == ([] if expected == "none" else [(expected, "test")])
        assert len(data.eval_rows) == len(loaded)


def test_the_published_run_is_the_default() -> None:
    args = train_online.make_parser().parse_args([])
    assert (args.beta2, args.lr, args.batch_size, args.num_steps) == (1e-3, 1e-6, 256, 725)
    assert (args.samples_per_prompt, args.updates_per_batch) == (1, 2)
    assert args.beta1 is None  # the one of the values file


def test_filter_unsolved_drops_prompts_that_the_reference_never_solved(
    stage1: SimpleNamespace, tmp_path: Path
) -> None:
    def unsolve(values: dict) -> None:
        for prompt in values["prompts"][:30]:
            prompt["rewards"] = [0.0] * 8
        for prompt in values["prompts"][30:]:
            prompt["rewards"] = [1.0] + [0.0] * 7

    values = edit_values(stage1.file, tmp_path / "values.json", unsolve)
    flags = ["--values", str(values), "--batch-size", "6", "--out", str(tmp_path / "run")]
    args = train_online.make_parser().parse_args([*flags, "--filter-unsolved"])
    assert len(train_online.check(args).prompts) == 10
    args = train_online.make_parser().parse_args([*flags, "--beta1", "inf"])
    data = train_online.check(args)
    assert len(data.prompts) == 40
    assert data.v_star["p0"] == 0.0 and data.v_star["p39"] == pytest.approx(1 / 8)


BAD = {  # name: arguments, what the error says
    "missing values": ("--values {files}/none.json", "none.json"),
    "truncated values": ("--values {files}/truncated.json", "truncated.json"),
    "values that are none": ("--values {files}/list.json", "list.json"),
    "values of another model": ("--values {files}/model.json", "model_fingerprint"),
    "values of a model that is gone": ("--values {files}/gone.json", "gone"),
    "values of another reward": ("--values {files}/reward.json", "score_parity"),
    "a reward that is none": ("--values {files}/nan.json", "prompt 1 (p0)"),
    "beta1 0": ("--beta1 0", "--beta1"),
    "beta2 0": ("--beta2 0", "--beta2"),
    "beta2 negative": ("--beta2=-0.001", "--beta2"),
    "beta2 not a number": ("--beta2 nan", "--beta2"),
    "a flag that is gone": ("--temperature 0.7", "--temperature"),
    "batch and updates": ("--batch-size 5 --updates-per-batch 2", "--updates-per-batch"),
    "all prompts filtered": ("--values {files}/unsolved.json --filter-unsolved", "solved"),
    "batch larger than the prompts": ("--batch-size 42", "--batch-size 42"),
    "no steps": ("--num-steps 0", "--num-steps"),
    "unknown evaluation set": ("--eval-dataset nosuch", "'nosuch'"),
    "tracker that is not installed": ("--tracker wandb", "pip install wandb"),
    "folder in use": ("--out {files}", "--resume"),
}


@pytest.fixture(scope="module")
def bad_files(stage1: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    text = stage1.file.read_text()
    (folder / "truncated.json").write_text(text[: len(text) // 2])
    (folder / "list.json").write_text("[1, 2]")
    (folder / "nan.json").write_text(text.replace('"rewards": [\n', '"rewards": [NaN,\n', 1))
    values = json.loads(text)
    for name, changes in {
        "model": {"model_fingerprint": {"config.json": "0"}},
        "gone": {"model": "gone"},
        "reward": {"reward": "fork.score_parity"},
    }.items():
        edited = values | {"header": values["header"] | changes}
        files.write_json(folder / f"{name}.json", edited)
    for prompt in values["prompts"]:
        prompt["rewards"] = [0.0] * len(prompt["rewards"])
    files.write_json(folder / "unsolved.json", values)
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_code_2(
    case: str,
    assert_refused: Callable,
    stage1: SimpleNamespace,
    bad_files: Path,
    tmp_path: Path,
) -> None:
    flags, says = BAD[case]
    base = f"--values {stage1.file} --out {tmp_path / 'out'} --batch-size 6 "
    assert_refused(train_online, base + flags.replace("{files}", str(bad_files)), says)
    assert list(tmp_path.iterdir()) == []
