"""Stage 1 as a user runs it: the values file, V*, what is dropped, and that no sample is lost."""

import argparse
import inspect
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    NUM_PROMPTS,
    NUM_VALUE_SAMPLES,
    assert_one_error,
    at_once,
    kill,
    make_tokenizer,
    read_lines,
    spawn,
    stage1_arguments,
    torchrun,
    wait_until,
    write_lines,
)

import offline_value
from apo import problems
from apo.files import UserError
from apo.problems import Prompt
from losses import optimal_value, value_standard_error

HEADER = """model dataset task reward num_value_samples beta1 temperature max_prompt_tokens
max_tokens limit seed prompt_template chat_template system_prompt chat_template_kwargs
model_fingerprint dataset_digest versions seconds tokens_per_second truncated dropped_long
dropped_ungradable mean_v_star pass_at_1 pass_at_n"""
# What differs between two runs that sample the same.
TIMING = ("seconds", "tokens_per_second", "out", "grading")


@pytest.fixture(scope="module")
def values(stage1: SimpleNamespace) -> dict:
    return json.loads(stage1.file.read_text())


def test_values_file_has_what_the_contract_promises(
    values: dict, model: Path, dataset: Path
) -> None:
    header, prompts = values["header"], values["prompts"]
    assert header.keys() >= set(HEADER.split())
    assert header["prompt_template"] == problems.BOXED_TEMPLATE
    assert header["task"] == "math" and header["chat_template"] is False
    assert header["versions"].keys() >= {"torch", "transformers"}
    assert (header["model"], header["dataset"]) == (str(model), str(dataset))
    assert [p["id"] for p in prompts] == [f"p{i}" for i in range(NUM_PROMPTS)]
    for i, p in enumerate(prompts):
        assert p["prompt"] == problems.format_prompt(p["question"])
        assert p["answer"] == str(i % 4)
        assert len(p["rewards"]) == len(p["lengths"]) == NUM_VALUE_SAMPLES
        assert set(p["rewards"]) <= {0.0, 1.0} and all(1 <= n <= 48 for n in p["lengths"])
        assert 0 <= p["truncated"] <= p["lengths"].count(48)


def test_v_star_is_that_of_the_raw_rewards(values: dict) -> None:
    rewards = torch.tensor([p["rewards"] for p in values["prompts"]], dtype=torch.float64)
    v_star = torch.tensor([p["v_star"] for p in values["prompts"]], dtype=torch.float64)
    torch.testing.assert_close(v_star, optimal_value(rewards, 0.5), rtol=0, atol=1e-9)
    closed = 0.5 * torch.log((rewards * (math.e**2 - 1) + 1).mean(dim=1))
    torch.testing.assert_close(v_star, closed, rtol=0, atol=1e-9)
    assert 0.05 < rewards.mean() < 0.6, "the fixture's model should be right now and then"
    assert values["header"]["mean_v_star"] == pytest.approx(v_star.mean().item())
    assert values["header"]["pass_at_1"] == pytest.approx(rewards.mean().item())
    assert values["header"]["pass_at_n"] == pytest.approx(rewards.amax(dim=1).mean().item())


def test_what_is_dropped_is_counted_and_named(stage1: SimpleNamespace, values: dict) -> None:
    assert (values["header"]["dropped_long"], values["header"]["dropped_ungradable"]) == (1, 2)
    for key in ("empty-answer", "open-brace"):
        assert [line for line in stage1.all.splitlines() if key in line], stage1.all


def test_summary_shows_a_person_what_the_reference_can_do(
    stage1: SimpleNamespace, values: dict
) -> None:
    assert f"{values['header']['pass_at_1']:.1%}" in stage1.out
    assert f"{values['header']['pass_at_n']:.1%}" in stage1.out
    assert f"{values['header']['mean_v_star']:.3f}" in stage1.out
    solved = [int(sum(p["rewards"])) for p in values["prompts"]]
    rows = [line.split()[:2] for line in stage1.out.splitlines()]
    for k in range(NUM_VALUE_SAMPLES + 1):  # the histogram: k, prompts, bar
        assert [str(k), str(solved.count(k))] in rows, (k, stage1.out)


def test_every_response_has_its_own_seed(values: dict) -> None:
    """One seed for all would draw the same response 8 times, and V* would be 0 or 1."""
    assert all(len(set(p["lengths"])) > 1 for p in values["prompts"])
    assert any(0 < sum(p["rewards"]) < NUM_VALUE_SAMPLES for p in values["prompts"])


def test_killed_on_two_ranks_and_continued_on_one_gives_the_same_file(
    run: Callable, model: Path, dataset: Path, values: dict, tmp_path: Path
) -> None:
    """SIGKILL of the launcher takes the ranks along. What they had graded is not drawn again."""
    out = tmp_path / "values.json"
    arguments = ("offline_value.py", *stage1_arguments(model, dataset), "--out", out)
    process = spawn(*torchrun(2), *arguments)

    def num_saved() -> list[int]:
        return [p.read_bytes().count(b'"reward"') for p in tmp_path.glob("*.partial/*.jsonl")]

    try:
        wait_until(lambda: len(num_saved()) == 2 and min(num_saved()) >= 5, process)
        os.kill(process.pid, signal.SIGKILL)
        time.sleep(1)
        drawn = sum(num_saved())
        total = NUM_PROMPTS * NUM_VALUE_SAMPLES
        assert not out.exists() and drawn < total, "killed too late: this tests nothing"
    finally:
        kill(process)
    with open(next(tmp_path.glob("*.partial/*.jsonl")), "a") as torn:
        torn.write('\n{"id": "p0", "sam')  # what a power cut leaves
    again = run(*arguments)
    assert again.code == 0, again.all
    assert f"/{total - drawn} " in again.err, "it drew again what it had"
    continued = json.loads(out.read_text())
    assert continued["prompts"] == values["prompts"]
    for header in (continued["header"], values["header"]):
        for name in TIMING:
            header.pop(name)
    assert continued["header"] == values["header"]
    assert [p.name for p in tmp_path.iterdir()] == ["values.json"], "it leaves nothing else behind"


def test_hard_prompts_get_more_samples(
    run: Callable, model: Path, dataset: Path, values: dict, tmp_path: Path
) -> None:
    """--max-value-samples: at least 2, at most M, and no more once V* is exact enough."""
    most, wanted = NUM_VALUE_SAMPLES, 0.25
    out = tmp_path / "values.json"
    adaptive = ("--max-value-samples", most, "--value-error", wanted, "--out", out)
    result = run("offline_value.py", *stage1_arguments(model, dataset), *adaptive)
    assert result.code == 0, result.all
    prompts = json.loads(out.read_text())["prompts"]
    counts = [len(entry["rewards"]) for entry in prompts]
    assert min(counts) >= 2 and max(counts) <= most and len(set(counts)) > 1, counts

    def error(rewards: list[float]) -> float:
        return value_standard_error(torch.tensor([rewards], dtype=torch.float64), 0.5).item()

    for entry, of_all in zip(prompts, values["prompts"], strict=True):
        count = len(entry["rewards"])
        # A sample's seed does not depend on how many there are.
        assert entry["rewards"] == of_all["rewards"][:count]
        assert entry["lengths"] == of_all["lengths"][:count]
        assert count == most or error(entry["rewards"]) <= wanted
        assert all(error(entry["rewards"][:n]) > wanted for n in range(2, count, 2))
    bars = [line.split()[:2] for line in result.out.splitlines() if line.startswith("  ")]
    assert sum(int(prompts_with) for _, prompts_with in bars) == NUM_PROMPTS


def test_one_sample_has_no_error(run: Callable, model: Path, dataset: Path) -> None:
    result = run("offline_value.py", *stage1_arguments(model, dataset), "--max-value-samples", 1)
    assert result.code == 2
    assert_one_error(result.err, says="--max-value-samples 1")


def test_an_error_to_reach_needs_more_samples(run: Callable, model: Path, dataset: Path) -> None:
    result = run("offline_value.py", *stage1_arguments(model, dataset), "--value-error", 0.1)
    assert result.code == 2
    assert_one_error(result.err, says="--max-value-samples")


@pytest.fixture
def started(
    model: Path,
    dataset: Path,
    process_group: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Let `offline_value.main` come as far as its checks, without an engine."""
    monkeypatch.setattr(offline_value.engine, "launch", lambda size: None)
    llm = SimpleNamespace(get_tokenizer=make_tokenizer)
    monkeypatch.setattr(offline_value.engine, "start_engine", lambda *args: llm)
    monkeypatch.setattr(offline_value.self_check, "sample_for_check", lambda *args: [])
    words = [*stage1_arguments(model, dataset), "--out", tmp_path / "values.json"]
    monkeypatch.setattr("sys.argv", ["offline_value.py", *map(str, words)])


def test_the_model_is_checked_before_anything_is_sampled(
    started: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path, responses: list) -> None:
        raise UserError("computed in another way")

    monkeypatch.setattr(offline_value.self_check, "check_model", refuse)

    def sample_all(*args: object, **options: object) -> None:
        pytest.fail("sampled")

    monkeypatch.setattr(offline_value.engine, "sample_all", sample_all)
    with pytest.raises(UserError, match="another way"):
        offline_value.main()


def test_a_model_that_never_ends_is_noticed_in_stage_1(
    started: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sampled(Exception):
        pass

    def sample_all(*args: object, **options: object) -> None:
        assert options["must_finish"]
        raise Sampled

    monkeypatch.setattr(offline_value.self_check, "check_model", lambda *args: None)
    monkeypatch.setattr(offline_value.engine, "sample_all", sample_all)
    with pytest.raises(Sampled):
        offline_value.main()


def test_responses_are_sampled_as_asked(started: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the whole distribution, at the temperature that the file will name."""

    class Sampled(Exception):
        pass

    signature = inspect.signature(offline_value.engine.sample_all)
    given = {}

    def sample_all(*args: object, **options: object) -> None:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        given.update(bound.arguments)
        raise Sampled

    monkeypatch.setattr(offline_value.self_check, "check_model", lambda *args: None)
    monkeypatch.setattr(offline_value.engine, "sample_all", sample_all)
    flags = ["--temperature", "0.7", "--max-tokens", "9", "--seed", "3"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, *flags])
    with pytest.raises(Sampled):
        offline_value.main()
    assert (given["temperature"], given["top_p"]) == (0.7, 1.0)
    assert (given["max_tokens"], given["seed"]) == (9, 3)


def test_tokens_without_an_embedding_are_refused(
    started: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offline_value.self_check, "vocabulary_size", lambda folder: 10)
    with pytest.raises(UserError, match="embedding"):
        offline_value.main()


def test_finished_file_is_not_made_again_and_never_overwritten(
    run: Callable, model: Path, dataset: Path, stage1: SimpleNamespace
) -> None:
    before = stage1.file.read_bytes()
    arguments = ("offline_value.py", *stage1_arguments(model, dataset), "--out", stage1.file)
    again, other = at_once(lambda: run(*arguments), lambda: run(*arguments, "--temperature", "0.5"))
    assert again.code == 0 and "pass@1" in again.out, again.all
    assert other.code == 2, other.all
    assert_one_error(other.err, "temperature 1.0, not 0.5")
    assert stage1.file.read_bytes() == before


# ---------------------------------------------------------------------------------------------
# What decides what is sampled


def identity(model: Path, dataset: Path, *flags: str) -> dict:
    """Make the identity of a run with these flags, as main does."""
    command = [str(word) for word in stage1_arguments(model, dataset)]
    args = offline_value.make_parser().parse_args([*command, *flags])
    args.chat_template = bool(args.chat_template)
    rows = problems.load_problems(args.dataset, "train")
    style = problems.prompt_style(
        problems.BOXED_TEMPLATE, args.chat_template, args.system_prompt, args.chat_template_kwargs
    )
    return offline_value.make_identity(args, rows, style)


DECIDES = [
    ("temperature", "--temperature=0.5"),
    ("seed", "--seed=1"),
    ("beta1", "--beta1=inf"),
    ("num_value_samples", "--num-value-samples=4"),
    ("max_tokens", "--max-tokens=47"),
    ("max_prompt_tokens", "--max-prompt-tokens=80"),
    ("chat_template", "--chat-template"),
    ("system_prompt", "--chat-template", "--system-prompt=Be brief."),
    ("chat_template_kwargs", "--chat-template", '--chat-template-kwargs={"think": false}'),
]


@pytest.mark.parametrize("case", DECIDES, ids=[case[0] for case in DECIDES])
def test_settings_that_decide_what_is_sampled(case: tuple, model: Path, dataset: Path) -> None:
    """With another value a killed run does not continue, nor is a finished file taken."""
    name, *flags = case
    before = identity(model, dataset)
    after = identity(model, dataset, *flags)
    assert after[name] != before[name]
    changed = {key for key in before if before[key] != after[key]}
    assert changed <= {name, "chat_template"}


def test_settings_that_decide_nothing(model: Path, dataset: Path, tmp_path: Path) -> None:
    flags = ("--gpu-memory-utilization=0.5", "--tensor-parallel-size=2", "--out=elsewhere.json")
    assert identity(model, dataset, *flags) == identity(model, dataset)
    (tmp_path / "moved").symlink_to(model)
    assert identity(model, dataset, "--model", str(tmp_path / "moved")) == identity(model, dataset)


def test_an_entry_keeps_the_columns_of_its_row_and_counts_what_was_cut() -> None:
    row = {"id": "a", "question": "q", "answer": 3, "_task": "countdown", "numbers": [1, 2]}
    records = []
    for reward, finished, tokens in ((1.0, True, 5), (0.0, False, 9), (0.0, True, 7)):
        records.append({"reward": reward, "finished": finished, "tokens": tokens})
    entry = offline_value.make_entry(Prompt(row, "Q: q", []), records, 0.5)
    assert entry["row"] == {"numbers": [1, 2]}
    assert (entry["id"], entry["question"], entry["prompt"]) == ("a", "q", "Q: q")
    assert entry["rewards"] == [1.0, 0.0, 0.0] and entry["lengths"] == [5, 9, 7]
    assert entry["truncated"] == 1
    closed = 0.5 * math.log((math.exp(2) + 2) / 3)
    assert entry["v_star"] == pytest.approx(closed, abs=1e-9)


# ---------------------------------------------------------------------------------------------
# A task that a fork adds (tests/fork/parity.py)


def test_a_task_of_a_fork_runs_through_stage_1(fork: SimpleNamespace) -> None:
    values = json.loads(fork.values.read_text())
    header, prompts = values["header"], values["prompts"]
    assert header["task"] == "parity" and header["reward"].endswith("score_parity")
    assert header["prompt_template"] == "{question} Put it in \\boxed{}.\n"
    for i, p in enumerate(prompts):
        assert p["id"] == f"r{i}" and p["answer"] == i % 2
        assert p["prompt"] == f"Digit {i}? Put it in \\boxed{{}}.\n"
        assert p["row"] == {"ask": f"Digit {i}", "rule": {"parity": i % 2}}
        assert set(p["rewards"]) <= {1.5, -0.5, 0.0}
    rewards = torch.tensor([p["rewards"] for p in prompts], dtype=torch.float64)
    assert {1.5, -0.5} <= set(rewards.flatten().tolist())
    v_star = [p["v_star"] for p in prompts]
    assert v_star == pytest.approx(optimal_value(rewards, 0.5).tolist(), abs=1e-9)


def test_a_fault_in_the_reward_of_a_fork_stops_stage_1_with_its_traceback(
    fork: SimpleNamespace,
) -> None:
    """It never becomes a zero, and what had been graded is not lost."""
    assert fork.fails.code == 1, fork.fails.all
    assert "Traceback" in fork.fails.err and "'r5'" in fork.fails.err
    assert "LookupError: a fault in the reward function" in fork.fails.err
    folder = fork.values.parent
    assert not (folder / "failing.json").exists()
    saved = read_lines(folder / "failing.json.partial" / "0.jsonl")
    assert "r5" not in {record["id"] for record in saved}


# ---------------------------------------------------------------------------------------------
# Bad input

BAD = {  # name: arguments, what the error says
    "unknown dataset": ("--dataset nosuch", "'nosuch'"),
    "dataset that is a benchmark": ("--dataset math500", "'math500'"),
    "missing file": ("--dataset {files}/none.jsonl", "none.jsonl"),
    "missing column": ("--dataset {files}/column.jsonl", "row 2"),
    "torn file": ("--dataset {files}/torn.jsonl", "line 2"),
    "no answer to grade": ("--dataset {files}/ungradable.jsonl", "answer that can be graded"),
    "missing model": ("--model {files}/nothing", "/nothing"),
    "folder without weights": ("--model {files}", "config.json"),
    "beta1 0": ("--beta1 0", "--beta1"),
    "beta1 negative": ("--beta1=-1", "--beta1"),
    "beta1 not a number": ("--beta1 nan", "--beta1"),
    "greedy": ("--temperature 0", "--temperature"),
    "no samples": ("--num-value-samples 0", "--num-value-samples"),
    "negative limit": ("--limit=-1", "--limit"),
    "context too short": ("--max-tokens 4096", "--max-tokens"),
    "out below a file": ("--out {files}/torn.jsonl/values.json", "--out"),
    "system prompt alone": ("--system-prompt brief", "--chat-template"),
    "kwargs that are none": ("--chat-template --chat-template-kwargs {{}", "JSON"),
    "a flag cut short": ("--temp 1", "--temp"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    good = {"question": "q", "answer": "1"}
    write_lines(folder / "column.jsonl", [good, {"question": "q", "solution": "1"}])
    write_lines(folder / "ungradable.jsonl", [good | {"answer": ""}, good | {"answer": "{"}])
    (folder / "torn.jsonl").write_text(json.dumps(good) + '\n{"question": "q", "ans')
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_code_2(
    case: str, assert_refused: Callable, model: Path, dataset: Path, bad_files: Path, tmp_path: Path
) -> None:
    flags, says = BAD[case]
    out = tmp_path / "out" / "values.json"
    base = f"--model {model} --dataset {dataset} --out {out} --max-prompt-tokens 160 "
    assert_refused(offline_value, base + flags.replace("{files}", str(bad_files)), says)
    assert list(tmp_path.iterdir()) == []


def test_good_input_is_not_refused(
    monkeypatch: pytest.MonkeyPatch, model: Path, dataset: Path, tmp_path: Path
) -> None:
    """The flags that all the cases above share reach the start: what is refused is the rest."""

    class Started(Exception):
        pass

    def launch(tensor_parallel_size: int) -> None:
        raise Started

    monkeypatch.setattr(offline_value.engine, "launch", launch)
    words = [*stage1_arguments(model, dataset), "--out", tmp_path / "values.json"]
    monkeypatch.setattr("sys.argv", ["offline_value.py", *map(str, words)])
    with pytest.raises(Started):
        offline_value.main()


def test_the_defaults_are_the_published_ones() -> None:
    args: argparse.Namespace = offline_value.make_parser().parse_args([])
    assert args.model == "Qwen/Qwen2.5-1.5B" and args.dataset == "math"
    assert (args.num_value_samples, args.beta1, args.temperature) == (8, 0.5, 1.0)
    assert args.max_tokens == 1024
