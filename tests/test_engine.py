"""Generation: what is sampled depends on the request alone, and nothing sampled is lost.

The engine below is the real one, inside this process.
"""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, make_tokenizer, read_lines, write_lines
from hypothesis import given
from hypothesis import strategies as st

from apo import engine, files, problems
from apo.engine import Request, Response
from apo.files import UserError
from apo.problems import Prompt

# ---------------------------------------------------------------------------------------------
# Seeds

KEY = st.tuples(st.integers(0, 99), st.integers(0, 999), st.text(max_size=9), st.integers(0, 99))


@given(st.lists(KEY, min_size=2, max_size=2, unique=True))
def test_every_response_has_its_own_seed(keys: list[tuple]) -> None:
    first, second = (engine.response_seed(*key) for key in keys)
    assert first != second and first == engine.response_seed(*keys[0])
    assert 0 <= first < 2**63, "vLLM takes an int64"


def test_a_seed_is_the_same_tomorrow() -> None:
    """Python's own hash() differs from process to process, and a resumed run with it."""
    assert engine.response_seed(0, 1, "math/2", 3) == 2335572564966504370


# ---------------------------------------------------------------------------------------------
# Sampling


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[Any]:
    """Start an engine in this process, as stage 2 does."""
    environment = dict(os.environ)
    engine.launch()
    llm = engine.start_engine(
        str(model),
        256,
        seed=0,
        gpu_memory_utilization=0.5,
        tensor_parallel_size=1,
        enable_prefix_caching=False,
    )
    yield llm
    engine.stop_engine(llm)
    os.environ.clear()
    os.environ.update(environment)


def make_prompts(count: int) -> list[Prompt]:
    tokenizer = make_tokenizer()
    prompts = []
    for i in range(count):
        row = {"id": f"p{i}", "question": "Give a digit. " * (1 + i % 3), "answer": str(i % 4)}
        row["_task"] = "math"
        prompts.append(problems.make_prompt(row, problems.PLAIN, tokenizer))
    return prompts


def make_requests(prompts: list[Prompt], logprobs: bool = False) -> list[Request]:
    requests = []
    for prompt, number in itertools.product(prompts, range(3)):
        seed = engine.response_seed(0, 1, prompt.row["id"], number)
        requests.append(Request(prompt, number, seed, logprobs))
    return requests


def test_every_request_has_one_response(llm: Any) -> None:
    requests = make_requests(make_prompts(5))
    responses = engine.gather(list(engine.sample(llm, requests, 1.0, 11)))
    assert [response.index for response in responses] == list(range(15))
    tokenizer = llm.get_tokenizer()
    for request, response in zip(requests, responses, strict=True):
        assert response.prompt == request.prompt
        assert response.sample == request.sample
        assert 1 <= len(response.ids) <= 11
        assert response.finished == (response.ids[-1] == tokenizer.eos_token_id)
        assert response.text == tokenizer.decode(response.ids).removesuffix("<|endoftext|>")
        assert response.sampler_logp == [] and response.numbers == {}
        right = response.finished and problems.reward(response.text, request.prompt.row)
        assert response.reward == float(right)
    assert any(response.reward for response in responses), "the model should be right now and then"
    assert not all(response.finished for response in responses), "and fail to stop now and then"


def test_what_is_sampled_depends_on_the_request_alone(llm: Any) -> None:
    """The batch, the order and what was sampled before change nothing."""
    requests = make_requests(make_prompts(5))
    texts = {}
    for response in engine.sample(llm, requests, 1.0, 40):
        texts[response.prompt.row["id"], response.sample] = response.text
    assert len(set(texts.values())) > 5
    random.Random(0).shuffle(requests)
    for some in (requests, requests[:4]):
        for response in engine.sample(llm, some, 1.0, 40):
            assert response.text == texts[response.prompt.row["id"], response.sample]


def test_greedy_decoding_needs_no_seed(llm: Any) -> None:
    requests = [Request(prompt) for prompt in make_prompts(3)] * 2
    texts = [r.text for r in engine.gather(list(engine.sample(llm, requests, 0.0, 12)))]
    assert texts[:3] == texts[3:]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampler_log_probs_are_those_of_the_model_at_its_temperature(
    llm: Any, model: Path, temperature: float
) -> None:
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model)
    requests = make_requests(make_prompts(2), logprobs=True)
    for response in engine.sample(llm, requests, temperature, 20):
        ids = torch.tensor([response.prompt.ids + response.ids])
        with torch.no_grad():
            ln_pi = (lm(ids).logits[0] / temperature).log_softmax(dim=1)
        start = len(response.prompt.ids) - 1
        expected = [ln_pi[start + i, token].item() for i, token in enumerate(response.ids)]
        assert response.sampler_logp == pytest.approx(expected, abs=1e-4)


def thinking_tokenizer() -> Any:
    """Make a tokenizer in which the marks of a thought are special tokens, as EOS is."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<think>", "</think>", "<|im_end|>"]}
    )
    return tokenizer


@pytest.mark.parametrize(
    "prompt, output, text, reward",
    [
        ("Q", "<think>\\boxed{1}</think>\\boxed{5}<|im_end|>", None, 1.0),
        ("Q", "<think>\\boxed{5}</think>\\boxed{1}<|im_end|>", None, 0.0),
        ("Q", "<think>\\boxed{5}<|endoftext|>", "<think>\\boxed{5}", 0.0),
        # The chat template has opened the thought.
        ("Q<think>\n", "\\boxed{5}</think>\\boxed{1}<|im_end|>", None, 0.0),
        ("Q<think>\n", "so \\boxed{5}<|im_end|>", "<think>so \\boxed{5}", 0.0),
        ("Q<think>\n", "so</think> \\boxed{5}<|im_end|>", "<think>so</think> \\boxed{5}", 1.0),
        ("Q<think>\n\n</think>", "\\boxed{5}<|im_end|>", "\\boxed{5}", 1.0),
    ],
)
def test_the_marks_of_a_thought_reach_the_reward(
    prompt: str, output: str, text: str | None, reward: float
) -> None:
    """A box inside of a thought is no answer. EOS and the like are no part of the text."""
    tokenizer = thinking_tokenizer()
    ids = tokenizer(output, add_special_tokens=False).input_ids
    silent = engine.silent_tokens(tokenizer)
    found = engine.response_text(Prompt({"id": "a"}, prompt, [1]), ids, silent, tokenizer)
    assert text is None or found == text
    assert "<|" not in found
    row = {"id": "a", "answer": "5", "_task": "math"}
    assert problems.submit_reward(found, row).result() == reward


def test_a_model_that_never_ends_its_responses_is_noticed_early() -> None:
    """Only when so many have ended or not, and not if some of them do."""
    ends = [False] * engine.NUM_FIRST
    with pytest.raises(UserError, match="--max-tokens 48"):
        engine.check_endings(ends, 48, Path("out.partial"))
    engine.check_endings(ends[:-1], 48, Path("out.partial"))
    engine.check_endings([True] * 5 + ends[5:], 48, Path("out.partial"))


def test_sampling_stops_where_nearly_nothing_ends(llm: Any, tmp_path: Path) -> None:
    """In two tokens no response of the fixture's model can end.

    It stops at the last of NUM_FIRST responses, so that the engine is empty for other tests.
    """
    prompts = make_prompts(5)
    counts = [engine.NUM_FIRST // 5] * 5
    with pytest.raises(UserError, match="--max-tokens 2"):
        engine.sample_all(
            llm, prompts, counts, tmp_path / "values", {}, 0, 1.0, 2, must_finish=True
        )


def test_a_continued_run_is_not_judged_by_its_long_responses(llm: Any, tmp_path: Path) -> None:
    """What a kill leaves missing are mostly the longest ones. What it has saved counts as well."""
    prompts = make_prompts(2)
    counts = [engine.NUM_FIRST, engine.NUM_FIRST]

    def sample(finished: bool) -> list[dict]:
        record = {"answer": "1", "output": "", "reward": 0.0, "tokens": 2}
        record |= {"id": prompts[0].row["id"], "prompt": prompts[0].text, "finished": finished}
        lines = [json.dumps(record | {"sample": i}) + "\n" for i in range(engine.NUM_FIRST)]
        out = tmp_path / f"{finished}"
        files.write_json(tmp_path / f"{finished}.partial" / "identity.json", {"seed": 0})
        (tmp_path / f"{finished}.partial" / "0.jsonl").write_text("".join(lines))
        return engine.sample_all(
            llm, prompts, counts, out, {"seed": 0}, 0, 1.0, 2, must_finish=True
        )

    records = sample(finished=True)
    assert len(records) == sum(counts)
    ended = sum(record["finished"] for record in records[counts[0] :])
    assert ended <= 2, "hardly any ends in two tokens, and yet they are sampled"
    with pytest.raises(UserError, match="--max-tokens 2"):
        sample(finished=False)


def test_an_old_python_is_told() -> None:
    code = "import sys; sys.version_info = (3, 10); import apo.environment"
    command = [sys.executable, "-S", "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "3.11" in result.stderr


@pytest.mark.parametrize(
    "available, capability, says",
    [(True, (8, 0), None), (True, (7, 5), "compute capability 7.5"), (False, (9, 0), "driver")],
)
def test_a_gpu_that_cannot_be_used_is_told(
    available: bool, capability: tuple, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A T4 lacks bf16, and the driver's library also counts GPUs that CUDA cannot use."""

    def init() -> None:
        if not available:
            raise RuntimeError("The NVIDIA driver on your system is too old")

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "a card")
    asked = []
    monkeypatch.setattr(engine, "check_compiler", lambda: asked.append(True))
    engine.check_hardware(0)
    if says is None:
        engine.check_hardware(2)
        assert asked == [True]
    else:
        with pytest.raises(UserError, match=says):
            engine.check_hardware(2)


def test_a_missing_compiler_for_a_gpu_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slim container has no compiler, and Debian's python3 no header files."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt install gcc"):
        engine.check_compiler()
    (tmp_path / "clang").touch(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(engine.sysconfig, "get_path", lambda *names: str(tmp_path))
    engine.check_compiler()
    (tmp_path / "Python.h").unlink()
    with pytest.raises(UserError, match=r"Python\.h: apt install python3\.\d+-dev"):
        engine.check_compiler()


@pytest.mark.parametrize(
    "capability, attention", [((8, 6), None), ((9, 0), None), ((10, 0), "FLASH_ATTN")]
)
def test_vllm_takes_the_options_for_gpus(
    capability: tuple, attention: str | None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are arguments that it knows. On a B200 its own choice would need nvcc."""
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    args = EngineArgs(model=str(model), **engine.gpu_options())
    assert args.compilation_config.pass_config.fuse_allreduce_rms is False
    assert args.disable_custom_all_reduce
    assert args.attention_backend == attention
    given = {}
    monkeypatch.setattr("vllm.LLM", lambda **options: given.update(options))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with torch._dynamo.config.patch(disable=False):
        engine.start_engine(str(model), 16, 0, 0.5, 1)
    assert engine.gpu_options().items() <= given.items()


def test_a_missing_library_of_the_cpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(engine.ctypes, "CDLL", load)
    with pytest.raises(UserError, match="apt install libnuma1"):
        engine.check_hardware(0)
    monkeypatch.setattr(engine, "is_vllm_for_cpus", lambda: False)
    with pytest.raises(UserError, match="no NVIDIA GPU is visible"):
        engine.check_hardware(0)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_engine_is_drained_before_its_cache_is_released(
    llm: Any, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM refuses while the scheduler still holds an id, or while a batch is in flight."""
    list(engine.sample(llm, make_requests(make_prompts(2)), 1.0, 20))
    core = llm.llm_engine.engine_core.engine_core
    assert core.scheduler.has_requests(), "nothing is left to drain: this tests nothing"
    if asynchronous:
        in_flight = ["a batch"]
        monkeypatch.setattr(core, "batch_queue", in_flight)
        step = llm.llm_engine.step

        def step_and_finish() -> list:
            if not core.scheduler.has_requests():
                in_flight.clear()
                return []
            return step()

        monkeypatch.setattr(llm.llm_engine, "step", step_and_finish)
    calls = []

    def record(name: str, **arguments: object) -> None:
        assert not core.scheduler.has_requests() and not core.batch_queue
        calls.append((name, arguments))

    # The two GPU calls.
    monkeypatch.setattr(llm, "sleep", lambda **a: record("sleep", **a))
    monkeypatch.setattr(llm, "release_kv_cache_memory", lambda: record("release"))
    monkeypatch.setattr(llm, "wake_up", lambda **a: record("wake_up", **a))
    engine.release_cache(llm)
    engine.restore_cache(llm)
    assert calls == [], "the cache stays where it is"
    monkeypatch.setattr(llm.llm_engine.vllm_config.model_config, "enable_sleep_mode", True)
    engine.release_cache(llm)
    engine.restore_cache(llm)
    monkeypatch.undo()
    names = [name for name, _ in calls]
    assert names == ["sleep", "release", "wake_up"]
    assert calls[0][1] == {"level": 0}, "weights must stay"
    assert calls[2][1] == {"tags": ["kv_cache"]}
    assert len(list(engine.sample(llm, make_requests(make_prompts(1)), 1.0, 9))) == 3


# ---------------------------------------------------------------------------------------------
# Sampling that survives a kill


def sample_all(llm: Any, out: Path, **changes: object) -> list[dict]:
    identity = {"seed": 0, "temperature": 1.0} | changes
    return engine.sample_all(llm, make_prompts(4), [3] * 4, out, identity, 0, 1.0, 20)


def test_what_was_sampled_is_not_sampled_again(llm: Any, tmp_path: Path) -> None:
    whole = sample_all(llm, tmp_path / "whole.json")
    keys = [(record["id"], record["sample"]) for record in whole]
    assert keys == list(itertools.product(["p0", "p1", "p2", "p3"], range(3)))
    saved = read_lines(tmp_path / "whole.json.partial" / "0.jsonl")
    assert sorted(saved, key=lambda r: keys.index((r["id"], r["sample"]))) == whole

    # As two ranks left it when they were killed: seven records, and half of an eighth.
    folder = tmp_path / "cut.json.partial"
    folder.mkdir()
    lines = [json.dumps(record) for record in whole]
    (folder / "0.jsonl").write_text("\n".join([lines[11], lines[3], lines[7], lines[5][:20]]))
    # Two more that do not count: a prompt of another day, and a line that somebody has edited.
    of_another_day = json.dumps(whole[1] | {"prompt": "Today is Monday."})
    edited = json.dumps({"id": "p0", "sample": 2, "output": "5"})
    rest = [lines[0], lines[4], of_another_day, edited, lines[8], lines[10], ""]
    (folder / "1.jsonl").write_text("\n".join(rest))
    (folder / "identity.json").write_text('{"temperature": 1.0, "seed": 0}')
    assert sample_all(llm, tmp_path / "cut.json") == whole
    saved = read_lines(folder / "0.jsonl")
    new = {(record["id"], record["sample"]) for record in saved[3:]}
    assert new == {keys[i] for i in (1, 2, 5, 6, 9)} and len(saved) == 3 + 5

    engine.remove_partial(tmp_path / "cut.json")
    engine.remove_partial(tmp_path / "whole.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [{"reward": None}, {"reward": float("nan")}, {"tokens": "12"}, {"finished": "false"}],
    ids=str,
)
def test_a_record_that_somebody_has_broken_is_sampled_again(change: dict, tmp_path: Path) -> None:
    record = {"id": "p0", "sample": 0, "prompt": "p", "answer": "1", "output": "2"}
    record |= {"reward": 0.0, "finished": True, "tokens": 3}
    files.write_json(tmp_path / "identity.json", {"seed": 0})
    write_lines(tmp_path / "0.jsonl", [record, record | {"sample": 1} | change])
    assert engine.read_partial(tmp_path, {"seed": 0}) == [record]


def test_without_a_saved_response_other_settings_are_taken(tmp_path: Path) -> None:
    """The first start ended before anything was sampled."""
    files.write_json(tmp_path / "identity.json", {"seed": 0})
    (tmp_path / "0.jsonl").touch()
    assert engine.read_partial(tmp_path, {"seed": 1}) == []
    assert files.read_json(tmp_path / "identity.json") == {"seed": 1}


def test_a_slow_reward_keeps_no_other_record_from_the_disk(
    llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "values.json.partial" / "0.jsonl"
    slow = Future()

    def sample_with_one_slow_reward(llm: Any, requests: list[Request], *_: object) -> Iterator:
        for response in sample(llm, requests, 1.0, 20):
            response.grade = Future()
            response.grade.set_result(0.0)
            if response.index == 0:
                response.grade = slow
            yield response
        numbers = [(record["id"], record["sample"]) for record in read_lines(saved)]
        assert len(numbers) == 11 and ("p0", 0) not in numbers
        slow.set_result(1.0)

    sample = engine.sample
    monkeypatch.setattr(engine, "sample", sample_with_one_slow_reward)
    records = sample_all(llm, tmp_path / "values.json")
    assert [record["reward"] for record in records] == [1.0] + [0.0] * 11


def test_what_another_run_left_is_refused_by_name(llm: Any, tmp_path: Path) -> None:
    sample_all(llm, tmp_path / "values.json")
    before = (tmp_path / "values.json.partial" / "0.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"temperature 1\.0, not 0\.5"):
        sample_all(llm, tmp_path / "values.json", temperature=0.5)
    assert (tmp_path / "values.json.partial" / "0.jsonl").read_bytes() == before


# ---------------------------------------------------------------------------------------------
# Ranks


@pytest.mark.parametrize("ranks_per_engine", [1, 2])
def test_each_request_belongs_to_one_engine(
    ranks_per_engine: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=ranks_per_engine))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    shares = []
    for rank in range(4):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        shares.append(list(engine.share_of_requests(llm, 11)))
    assert all(shares[rank] == shares[rank - rank % ranks_per_engine] for rank in range(4))
    of_engines = itertools.chain(*shares[::ranks_per_engine])
    assert sorted(of_engines) == list(range(11))


def make_response(index: int) -> Response:
    row = {"id": f"p{index}", "answer": str(index), "_task": "math"}
    text = rf"\boxed{{{index % 2}}}"
    response = Response(index, Prompt(row, "", []), 0, [1], text, finished=True, sampler_logp=[])
    engine.start_grading(response)
    return response


def test_responses_of_all_ranks_come_in_the_order_of_the_requests(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of one engine have the same responses: each counts once."""
    here = [make_response(i) for i in (4, 0, 2)]
    other = [make_response(i) for i in (3, 1)]
    for response in other:
        engine.wait_for_reward(response)

    def all_gather_object(into: list, sampled: list[Response]) -> None:
        assert all(response.reward is not None for response in sampled)
        into[:] = [sampled, list(sampled), other, other]

    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    responses = engine.gather(here)
    assert [response.index for response in responses] == [0, 1, 2, 3, 4]
    assert [response.reward for response in responses] == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_a_mistake_on_rank_0_is_raised(llm: Any) -> None:
    assert engine.on_rank_0(max, 1, 2) == 2

    def refuse() -> None:
        raise UserError("another temperature")

    with pytest.raises(UserError, match="another temperature"):
        engine.on_rank_0(refuse)


@pytest.mark.parametrize(
    ("variables", "size", "says"),
    [
        ({"WORLD_SIZE": "8"}, 8, "the number of GPUs (1)"),  # nobody started ranks: it says nothing
        ({"WORLD_SIZE": "many"}, 2, "the number of GPUs (1)"),
        (engine.SINGLE_PROCESS | {"RANK": "0", "WORLD_SIZE": "8"}, 3, "the number of GPUs (8)"),
        ({"RANK": "0"}, 1, "with torchrun"),
    ],
)
def test_an_engine_wants_as_many_ranks_as_it_has_parts(
    variables: dict, size: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_by_others = {"RANK", *engine.SINGLE_PROCESS}
    environment = {name: os.environ[name] for name in os.environ.keys() - set_by_others}
    monkeypatch.setattr(os, "environ", environment | variables)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(engine, "check_hardware", lambda num_gpus: None)
    with pytest.raises(UserError, match=re.escape(says)):
        engine.launch(size)


def test_ranks_without_a_launcher_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in engine.SINGLE_PROCESS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="torchrun"):
        engine.check_launcher()


def test_a_python_without_the_libraries_says_what_to_do() -> None:
    """As when the environment has not been activated: without -S torch would be found."""
    for script in ("offline_value.py", "train_online.py", "evaluate.py"):
        command = [sys.executable, "-S", ROOT / script]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2 and "Traceback" not in result.stderr
        assert "activate" in result.stderr.lower() and len(result.stderr.splitlines()) == 1
