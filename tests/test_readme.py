"""README.md and docs/ tell the truth: every command, flag, file, link and name in them exists."""

import ast
import functools
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_lines, read_metrics
from test_train_online import KEYS
from torch.distributed.run import get_args_parser

import evaluate
import offline_value
import train_online
from apo import problems

STAGES = {
    "offline_value.py": offline_value,
    "train_online.py": train_online,
    "evaluate.py": evaluate,
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [page for page in [ROOT / "experiments" / "README.md"] if page.exists()]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)

BLOCK = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


@functools.cache
def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the code blocks of a page, each with its language."""
    return BLOCK.findall(page.read_text("utf-8"))


@functools.cache
def text_of(page: Path) -> str:
    """Return a page without its code blocks."""
    return BLOCK.sub("", page.read_text("utf-8"))


@functools.cache
def commands(page: Path) -> list[list[str]]:
    """Return the commands of a page, as words, from its code blocks and from `code` in its text."""
    lines = []
    for language, block in blocks(page):
        if language in ("bash", "sh", "console"):
            lines += block.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:python|python3|torchrun|make) [^`\n]*)`", text_of(page))
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [line for line in words if line]


def python_file(words: list[str]) -> tuple[int, str] | None:
    """Find our script in a command: its place, and its file."""
    for i, word in enumerate(words):
        if word.endswith(".py") and word != "X.py":  # X stands for any of them
            return i, word
        if words[i - 1] == "-m" and word.startswith("experiments."):
            return i, word.replace(".", "/") + ".py"
    return None


@functools.cache
def flags_of(file: str) -> set[str]:
    """Return the flags of a stage, or those that an experiment's source names."""
    if file in STAGES:
        parser = STAGES[file].make_parser()
        return {flag for action in parser._actions for flag in action.option_strings}
    source = (ROOT / file).read_text("utf-8")
    flags = set(re.findall(r"""["'](--[a-z][a-z0-9-]*)["']""", source))
    for stage, module in STAGES.items():  # as experiments/baselines.py adds to train_online.py's
        if f"{module.__name__}.make_parser" in source:
            flags |= flags_of(stage)
    return flags


@each_page
def test_commands_name_what_exists(page: Path) -> None:
    for words in commands(page):
        found = python_file(words)
        if found is None:
            continue
        place, file = found
        assert (ROOT / file).is_file(), words
        for word in words[place + 1 :]:
            if word.startswith("--"):
                assert word.split("=")[0] in flags_of(file), (word, words)


def test_the_commands_of_the_readme_are_found_at_all() -> None:
    """If the README wrote its commands in another form, the test above would test nothing."""
    found = [words for words in commands(ROOT / "README.md") if python_file(words)]
    files = {python_file(words)[1] for words in found}
    assert files >= set(STAGES) and len(found) > 5


EXPERIMENTS = []
for path in sorted((ROOT / "experiments").glob("*.py")):
    # gpu_parts.py is started by gpu_check.py alone.
    if "\ndef main(" in path.read_text("utf-8") and path.stem != "gpu_parts":
        EXPERIMENTS.append(path.stem)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module = importlib.import_module(f"experiments.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    try:
        module.main()
    except SystemExit as end:  # of argparse
        assert end.code == 0
    out = capsys.readouterr().out
    assert out.startswith("usage:") or out.strip() == module.__doc__.strip()


@each_page
def test_flags_in_the_text_exist(page: Path) -> None:
    torchrun = get_args_parser()
    known = {flag for action in torchrun._actions for flag in action.option_strings}
    known = known.union(*(flags_of(file) for file in STAGES))
    for path in (ROOT / "experiments").glob("*.py"):
        known |= flags_of(str(path.relative_to(ROOT)))
    for flag in re.findall(r"`(--[a-z0-9-]+)", text_of(page)):
        assert flag in known, flag


@each_page
def test_make_targets_and_variables_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z]+) *[:?]?=", makefile, re.MULTILINE))
    for words in commands(page):
        if words[0] == "make":
            for word in words[1:]:
                name, is_variable, _ = word.partition("=")
                assert name in (variables if is_variable else targets), words


def heading_anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    anchors = set()
    for heading in re.findall(r"^#+ +(.+)$", text_of(page), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.lower().replace("\\", ""))
        anchors.add(plain.strip().replace(" ", "-"))
    return anchors


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    """Also the line numbers and headings in them: `losses.f` at #L9 is a function of line 9."""
    links = re.findall(r"\[([^\]]*)\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text_of(page))
    for label, target, anchor in links:
        path = (page.parent / target) if target else page
        assert path.exists(), target
        if re.fullmatch(r"L\d+", anchor):
            name = label.strip("`").split(".")[-1].removesuffix("()")
            line = path.read_text("utf-8").splitlines()[int(anchor[1:]) - 1]
            assert re.match(rf" *(def|class) {name}\b|{name}\b", line), (target, anchor, line)
        elif anchor:
            assert anchor in heading_anchors(path), (target, anchor)


MODULES = {path.stem: path.stem for path in ROOT.glob("*.py")}
MODULES |= {path.stem: f"apo.{path.stem}" for path in (ROOT / "apo").glob("[a-z]*.py")}


@each_page
def test_functions_in_the_text_exist(page: Path) -> None:
    pattern = rf"`(?:apo\.)?({'|'.join(MODULES)})\.(\w+)(?:\.\w+)*[`(]"
    for module, name in re.findall(pattern, text_of(page)):
        if name not in ("py", "json", "jsonl", "md", "txt"):
            assert hasattr(importlib.import_module(MODULES[module]), name), f"{module}.{name}"


@each_page
def test_files_in_the_text_exist(page: Path) -> None:
    for name in re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|txt|toml))`", text_of(page)):
        folders = ("", "apo", "docs", "experiments", "experiments/results", "tests")
        places = [ROOT / folder / name for folder in folders]
        assert any(place.exists() for place in places), name


@each_page
def test_python_in_the_text_is_python(page: Path) -> None:
    for language, block in blocks(page):
        if language == "python":
            ast.parse(block)


def python_blocks() -> list[str]:
    return [block for language, block in blocks(ROOT / "README.md") if language == "python"]


def test_the_readmes_task_scores_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "reverse-train.jsonl").write_text('{"word": "apple"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(problems, "DATASETS", dict(problems.DATASETS))
    exec(python_blocks()[0], vars(problems) | {"DATASETS": problems.DATASETS})
    [row] = problems.load_problems("reverse", "train")
    assert row["question"] == "Write this word backwards: apple"
    assert problems.reward("Here it is:\nelppa\n", row) == 1.0
    assert problems.reward("elppa\nor so", row) == 0.0
    assert problems.DATASETS["reverse"].test_set == "reverse"


def test_the_readmes_forks_pass_make_lint() -> None:
    task, loss = python_blocks()
    problems_text = (ROOT / "apo/problems.py").read_text("utf-8")
    stage_text = (ROOT / "train_online.py").read_text("utf-8")
    before_main, after = stage_text.split("def main() -> None:")
    forks = {
        "apo/problems.py": f"{problems_text}\n\n{task}",
        "train_online.py": f"{before_main}{loss}\n\ndef main() -> None:{after}",
    }
    for name, text in forks.items():
        for command in (["check"], ["format", "--check"]):
            line = [sys.executable, "-m", "ruff", *command, "--stdin-filename", name, "-"]
            done = subprocess.run(line, input=text, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr


def test_the_readmes_loss_is_that_of_policy_gradient() -> None:
    names = dict(vars(train_online))
    exec(python_blocks()[1], names)
    algorithm = names["policy_gradient"]()
    batch = SimpleNamespace(
        lengths=torch.tensor([2, 1]),
        ref_logp=torch.tensor([-1.0, -1.0, -2.0]),
        rewards=torch.tensor([1.0, 0.0]),
        numbers={"v_star": torch.tensor([0.25, 0.5])},
    )
    loss, statistics = algorithm.loss(batch, torch.tensor([-1.0, -2.0, -4.0]))
    assert loss.tolist() == [0.75 * 3, -0.5 * 4]
    assert statistics["logratio"].tolist() == [-1.0, -2.0]


def documented_keys(page: Path, heading: str) -> set[str]:
    """Return the keys in the first column of the tables below a heading."""
    section = page.read_text("utf-8").split(f"\n{heading}\n")[1].split("\n## ")[0]
    keys = set()
    for cell in re.findall(r"^\| ([^|]*`) *\|", section, re.MULTILINE):
        keys.update(re.findall(r"`(\w+)`", cell))
    return keys


def test_every_key_of_a_run_is_explained(straight: SimpleNamespace) -> None:
    """And what is explained is there. A fork may add keys: they are its own to explain."""
    page = ROOT / "docs" / "metrics.md"
    keys = set().union(*read_metrics(straight.folder))
    assert {*KEYS.split(), "eval_accuracy"} <= documented_keys(page, "## metrics.jsonl") <= keys
    sample_keys = set(read_lines(straight.folder / "samples.jsonl")[0])
    assert documented_keys(page, "## samples.jsonl") <= sample_keys
    assert len(documented_keys(page, "## samples.jsonl")) > 5
