"""The GPU check, as a user runs it, on a CPU with tiny shapes; and on machines that lack things."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import at_once
from torch.nn.attention import varlen

from experiments import gpu_check, gpu_libraries

HERE = ("host", "attention", "logprob", "engine", "cache", "weights", "mfu", "methods")
SCRIPTS = ("scripts", "resume", "step")


@pytest.fixture(scope="module")
def checks(run: Callable, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Run all parts, half of them beside the other half; return the records by name."""
    folder = tmp_path_factory.mktemp("gpu-check")

    def check(*parts: str) -> SimpleNamespace:
        out = folder / parts[0]
        only = ("--only", ",".join(parts))
        return run("-m", "experiments.gpu_check", *only, "--out", out, timeout=3600)

    records = {}
    for parts, result in zip(
        (HERE, SCRIPTS), at_once(lambda: check(*HERE), lambda: check(*SCRIPTS)), strict=True
    ):
        assert result.code == 0, result.all
        results = json.loads((folder / parts[0] / "results.json").read_text())
        log = (folder / parts[0] / "log.txt").read_text()
        for record in results["parts"]:
            records[record["part"]] = record
            assert gpu_check.describe(record) in result.out
            assert gpu_check.describe(record) in log
    return records


def test_every_part_works_here(checks: dict[str, dict]):
    assert checks.keys() == set(gpu_check.NAMES)
    for name, record in checks.items():
        assert record["ok"] is True, (name, record)


def test_what_needs_a_gpu_says_so(checks: dict[str, dict]):
    assert checks["cache"]["figures"]["released_gib"] == "skipped: needs a GPU"
    assert checks["mfu"]["figures"]["mfu"] == "skipped: needs a GPU"


def test_the_figures_are_of_what_was_run(checks: dict[str, dict]):
    weights = checks["weights"]["figures"]
    assert weights["gap_after"] < 1e-4 < weights["gap_before"]
    assert checks["scripts"]["figures"]["grad_norm"][0] > 1e-6, "nothing was learnt"
    assert checks["resume"]["figures"]["logratio"] == pytest.approx(
        checks["resume"]["figures"]["logratio_unbroken"], abs=1e-4
    )
    step = checks["step"]["figures"]
    parts = sum(step[f"seconds_{part}"] for part in ("generate", "ref", "update", "sync"))
    assert parts > 0
    methods = checks["methods"]["figures"]
    numbers = {name: methods[name]["responses"] for name in ("a_star_po", "grpo", "rebel", "ppo")}
    assert numbers == {"a_star_po": 4, "grpo": 32, "rebel": 8, "ppo": 4}


# ---------------------------------------------------------------------------------------------
# Machines that lack something

# A Python that finds no vllm and no math_verify, as on a machine that has only torch.
WITHOUT_VLLM = """
import importlib.util, json, pathlib, sys
real = importlib.util.find_spec
def find_spec(name, *package):
    hidden = name in ("vllm", "math_verify") and name not in sys.modules
    return None if hidden else real(name, *package)
importlib.util.find_spec = find_spec
from experiments import gpu_parts
folder = pathlib.Path(sys.argv[1])
names = ("host", "engine", "scripts", "mfu", "methods")
print(json.dumps([gpu_parts.run_part(name, folder) for name in names]))
"""


def test_without_vllm_the_trainer_is_still_checked(run: Callable, tmp_path: Path):
    result = run("-c", WITHOUT_VLLM, tmp_path)
    assert result.code == 0, result.all
    host, engine, scripts, mfu, methods = json.loads(result.out.splitlines()[-1])
    assert host["figures"]["missing"] == ["vllm", "math_verify"]
    assert "vllm" in engine["skipped"] and "vllm" in scripts["skipped"]
    assert mfu["ok"] and mfu["figures"]["seconds_update"] > 0
    assert methods["ok"] and not methods["figures"]["generates"]
    assert methods["figures"]["ppo"]["seconds"] > 0


@pytest.mark.parametrize("names", [("is_causal",), ("scale", "window_size")])
def test_an_older_varlen_attn_gets_what_it_knows(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    """It gets as many key heads as query heads, causal, and the scale in one way or the other."""
    got = {}

    def causal_only(query, key, value, bounds_q, bounds_k, max_q, max_k, is_causal=False):
        got.update(query=query, key=key, is_causal=is_causal)
        return query

    def with_scale(
        query, key, value, bounds_q, bounds_k, max_q, max_k, scale=None, window_size=(-1, -1)
    ):
        got.update(query=query, key=key, scale=scale, window_size=window_size)
        return query

    old = causal_only if names == ("is_causal",) else with_scale
    monkeypatch.setattr(varlen, "varlen_attn", old)
    assert len(gpu_libraries.substitute_varlen()) == 1
    query = torch.randn(3, 4, 16)
    key = torch.randn(3, 2, 16)
    bounds = torch.tensor([0, 3])
    varlen.varlen_attn(
        query, key, key, bounds, bounds, 3, 3, scale=0.5, window_size=(-1, 0), enable_gqa=True
    )
    assert torch.equal(got["key"], key[:, [0, 0, 1, 1]])
    if old is causal_only:
        assert got["is_causal"]
        torch.testing.assert_close(got["query"], query * 0.5 * math.sqrt(16))
    else:
        assert got["scale"] == 0.5 and got["window_size"] == (-1, 0)
    # The present torch needs nothing.
    monkeypatch.undo()
    assert gpu_libraries.substitute_varlen() == []


# ---------------------------------------------------------------------------------------------
# What goes wrong


def test_a_part_that_fails_or_dies_costs_no_other(monkeypatch, tmp_path: Path, capfd):
    """Here the process of a group writes one record, and then it is killed."""
    record = {"part": "engine", "ok": False, "error": "Traceback ...", "seconds": 1.0}
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\nprintf '%s\\n' '{json.dumps(record)}' > $4\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(gpu_check.sys, "executable", str(script))
    with open(tmp_path / "log.txt", "w") as log:
        records = gpu_check.run_group(["engine", "cache", "weights"], tmp_path, log, 10.0)
    assert records[0] == record
    assert [r["ok"] for r in records] == [False, False, False]
    assert "-9" in records[1]["error"]


def test_it_ends_in_time(monkeypatch, tmp_path: Path):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nsleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(gpu_check.sys, "executable", str(script))
    with open(tmp_path / "log.txt", "w") as log:
        (record,) = gpu_check.run_group(["step"], tmp_path, log, 0.5)
    assert not record["ok"] and "stopped" in record["error"]
