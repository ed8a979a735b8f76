"""The reward and its graders: what counts as equal, and that no text hangs, crashes or games them.

Each test names what it guards against; the tables hold real MATH, GSM8K and Minerva answers.
answer_pairs.jsonl came with the task; near_misses.jsonl was written by hand: other spellings that
must be accepted, and answers off by one digit, sign, exponent, bracket, base or order, which must
not.
"""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import problems
from problems import check_answer, grade, grading_counts, last_box, reward, submit

HERE = Path(__file__).parent
PAIRS, TABLE = (
    [json.loads(line) for line in (HERE / name).read_text("utf-8").splitlines()]
    for name in ("answer_pairs.jsonl", "near_misses.jsonl")
)
# The three that issue 3 allows to differ, each to be argued here; none is needed.
ARGUED: dict[tuple[str, str], str] = {}

PATHOLOGICAL = [
    r"9^{9^{9^9}}",
    "10000000!",
    "(" * 3000 + "5" + ")" * 3000,
    "(" * 60 + "5" + ")" * 60,
    "10!!!!",
    r"\binom{1000000000}{500000000}",
    r"e^{e^{e^{e^{e}}}}",
    "1e999999999",
    r"\sqrt{" * 60 + "2" + "}" * 60,
    r"\text{" * 90 + "}" * 90,
    "_a" * 450 + "5",
    "1," * 490,
]
# Texts that make a careless regular expression backtrack for ever, in the caller's own thread.
SLOW_FOR_PATTERNS = ["5" * 999, "5" * 900 + "!", "_a" * 450 + "5", "a " * 490, "1 " * 490]
SLOW_FOR_PATTERNS += ["12," * 330, r"\pm" * 300, "=" * 900, "<" * 900, r"\%" * 400, "^" * 900]
SLOW_FOR_PATTERNS += [r"\frac" * 190, r"\text{" * 100 + "}" * 100, "5 cm " * 190, "." * 999]
SLOW_FOR_PATTERNS += ["-" * 900 + "x", "{}" * 45, r"\text{a}" * 99, "\n" * 999, "\\" * 998]
SLOW = r"\sin(10^{10^{7}})"  # nothing sees it coming, and its digits take over 3 s


def boxed(text: str) -> str:
    return rf"Hence the answer is $\boxed{{{text}}}$."


# What is equal


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair['answer']} {pair['output']}")
def test_pairs_of_the_task(pair: dict) -> None:
    assert len(ARGUED) <= 3
    expected = (pair["answer"], pair["output"]) not in ARGUED
    assert (reward(pair["output"], pair["answer"]) == pair["label"]) == expected


@pytest.mark.parametrize("pair", TABLE, ids=lambda pair: f"{pair['answer']} {pair['box']}")
def test_other_spellings_and_near_misses(pair: dict) -> None:
    assert reward(boxed(pair["box"]), pair["answer"]) == pair["label"]


INTEGERS = st.integers(-(10**12), 10**12)


@settings(max_examples=300, deadline=None)
@given(INTEGERS, INTEGERS)
def test_integers_equal_only_themselves(a: int, b: int) -> None:
    spellings = [str(a), f"{a:,}", f"{a}.0", f"x = {a}", rf"{a}\%", rf"{a}\text{{ cm}}", f"${a}$"]
    for spelling in spellings:
        assert reward(boxed(spelling), a) == 1
        assert reward(boxed(spelling), b) == (a == b)


@settings(max_examples=300, deadline=None)
@given(st.integers(-999, 999), st.integers(1, 999), st.integers(-999, 999), st.integers(1, 999))
def test_fractions_equal_as_rational_numbers(a: int, b: int, c: int, d: int) -> None:
    equal = Fraction(a, b) == Fraction(c, d)
    assert reward(boxed(rf"\dfrac{{{c}}}{{{d}}}"), rf"\frac{{{a}}}{{{b}}}") == equal
    assert reward(boxed(f"{c}/{d}"), rf"\frac{{{a}}}{{{b}}}") == equal


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-99, 99), min_size=2, max_size=5, unique=True), st.randoms())
def test_lists_have_no_order_and_tuples_do(numbers: list[int], random) -> None:
    shuffled = random.sample(numbers, len(numbers))
    text, other = ", ".join(map(str, numbers)), ", ".join(map(str, shuffled))
    assert reward(boxed(other), text) == 1
    assert reward(boxed(rf"\{{{other}\}}"), text) == 1
    assert reward(boxed(f"({other})"), f"({text})") == (numbers == shuffled)
    assert reward(boxed(f"({text})"), text) == 0
    assert reward(boxed(f"{text}, 100"), text) == 0


@pytest.mark.parametrize(
    ("gold", "box", "equal"),
    [
        ("5", r"16\sqrt{3}", 0),
        ("63", "6+9i", 0),
        (r"\frac{20000}{\pi}", "8", 0),
        ("2", r"\sqrt{4}", 1),
        ("-1", r"e^{i\pi}", 1),
        ("-1", "i^2", 1),
        ("6", "6+0i", 1),
        ("3.14159", r"\pi", 1),
        (r"2\sqrt5", r"\sqrt{20}", 1),
    ],
)
def test_roots_pi_and_i_beside_plain_numbers(gold: str, box: str, equal: int) -> None:
    """Most wrong answers to a number are told from it without the algebra; no right one may be."""
    assert reward(boxed(box), gold) == equal


@pytest.mark.parametrize("hundredths", [1, 5, 12.5, 50, 99, 150])
def test_percent_is_ignored_or_a_hundredth(hundredths: float) -> None:
    number, share = str(hundredths), str(hundredths / 100)
    for gold, box in [
        (number, rf"{number}\%"),
        (rf"{number}\%", number),
        (rf"{number}\%", share),
        (share, rf"{number}\%"),
        (rf"{number}\%", f"{number} percent"),
    ]:
        assert reward(boxed(box), gold) == 1
    assert reward(boxed(share), number) == 0
    assert reward(boxed(rf"{share}\%"), rf"{number}\%") == 0


# Where the answer is looked for


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("The answer is 5.", 0),  # no box: math-verify would take the last stray number
        (r"\boxed{5", 0),
        (r"\boxed{\frac{5}{1}", 0),
        (r"\boxed{}", 0),
        (r"\boxed 5", 0),
        (r"\boxed{4} no, \boxed{5}", 1),
        (r"\boxed{5} no, \boxed{4}", 0),
        (r"\boxed{5} no, \boxed{4", 1),  # the last one that is balanced
        (r"\boxed{4}, \boxed{5}", 1),  # not the set {4, 5}
        (r"\boxed{x = \boxed{5}}", 1),
        (r"\fbox{5}", 1),
        (r"\boxed {5}", 1),
        ("\\boxed{\n5\n}", 1),
        (r"<think>\boxed{5}</think> It is five.", 0),
        (r"\boxed{4}</think>\boxed{5}", 1),
        (r"<think>\boxed{4}</think> \boxed{5}", 1),
        (r"<think> so \boxed{5}", 0),  # never stopped thinking
    ],
)
def test_the_last_balanced_box_after_thinking(response: str, expected: int) -> None:
    assert reward(response, "5") == expected


def test_escaped_braces_do_not_close_a_box() -> None:
    assert last_box(r"\boxed{\{1,2\}}") == r"\{1,2\}"
    assert last_box(r"\boxed{5\}") is None
    assert last_box("") is None


# Answers that cannot be graded


@pytest.mark.parametrize(
    "answer", [None, True, [], ["5"], {}, b"5", "", "  ", "$$", r"\frac{1}{2", "}{", float("nan")]
)
def test_ungradable_answers_raise_and_are_counted(answer: object) -> None:
    with pytest.raises(ValueError):
        check_answer(answer)
    with pytest.raises(ValueError):
        reward(r"\boxed{5}", answer)
    before = grading_counts["ungradable"]
    assert grade([r"\boxed{5}"], [answer]) == [0.0]
    assert grading_counts["ungradable"] == before + 1


@pytest.mark.parametrize(
    ("answer", "box"),
    [
        (5, "5"),
        (-3, "-3"),
        (0.5, r"\frac12"),
        (1e-7, "10^{-7}"),
        ("the dog", "the dog"),
        (r"\boxed{5}", "5"),
    ],
)
def test_gradable_answers(answer: object, box: str) -> None:
    assert reward(boxed(box), answer) == 1


def test_checking_answers_needs_no_math_verify_and_little_time() -> None:
    code = (
        "import sys, time, problems; start = time.time()\n"
        r"for i in range(10000): problems.check_answer('\\frac{%d}{7}' % i)"
        "\n"
        "assert time.time() - start < 5; "
        "assert not {'sympy', 'math_verify', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=HERE.parent)


# Nothing hangs, crashes or escapes


@pytest.mark.parametrize("text", PATHOLOGICAL, ids=lambda text: text[:20])
def test_pathological_boxes_are_recognised(text: str) -> None:
    """Each costs plain math-verify 5 to 30 s or all memory; here they do not even cost a worker."""
    before = grading_counts["failures"]
    assert grade([boxed(text)] * 2, ["5", "x^2+1"]) == [0, 0]
    assert grading_counts["failures"] == before


@pytest.mark.parametrize("text", [r"9^{9^{9^9}}", "10000000!", "10!!!!", r"2^{10^{7}}"])
def test_huge_numbers_are_not_computed(text: str) -> None:
    """Whether recognised or only estimated, they cost this process next to nothing."""
    assert reward(boxed("y+x"), "x+y") == 1  # imports sympy
    start = time.process_time()
    assert reward(boxed(text), "5") == 0
    assert reward(boxed(text), r"\sqrt{2}+1") == 0
    assert time.process_time() - start < 2


@pytest.mark.parametrize("text", SLOW_FOR_PATTERNS, ids=lambda text: text[:20])
def test_submit_returns_quickly(text: str) -> None:
    for answer in ("5", "x^2+1", text[:50].replace("{", "").replace("}", "") + "5"):
        start = time.time()
        verdict = submit(boxed(text), answer)
        assert time.time() - start < 10  # some 0.1 s; the guard is against hanging
        assert verdict.result(60) in (0, 1)


def test_a_box_equal_to_a_huge_answer_is_right() -> None:
    assert reward(boxed("9^{9^{9^9}}"), "9^{9^{9^9}}") == 1
    assert reward(boxed("7" * 5000), "7" * 5000) == 1


@settings(max_examples=300, deadline=None)
@given(
    st.text(),
    st.sampled_from(["5", r"\frac{1}{2}", r"\text{even}", "(1,2)", "x^2", "x<2", r"50\%"]),
)
def test_no_text_makes_it_raise(text: str, answer: str) -> None:
    assert submit(text, answer).result(30) == 0
    assert submit(boxed(text), answer).result(30) in (0, 1)


PIECES = [r"\frac", r"\sqrt", r"\boxed", r"\text", r"\left", r"\right", r"\{", r"\}", r"\%"]
PIECES += [r"\circ", r"\pm", r"\cup", r"\infty", r"\begin{pmatrix}", r"\end{pmatrix}"]
PIECES += [*"0123456789xyie{}()[]^_,;:=<>+-*/!.$%& \\'", "and", "cm", "√", "½", "°", "\0", "\ud800"]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_no_latex_makes_it_raise(text: str) -> None:
    """Through the workers, whose limit a random tower of powers may run into."""
    verdict = submit(boxed(text), "x^2+1").result(30)
    assert verdict in (0, 1)


@pytest.mark.parametrize(
    "response",
    [
        "x" * 1_000_000 + r"\boxed{5}",
        r"\boxed{" * 150_000 + r"\boxed{5}",
        "{" * 1_000_000 + r"\boxed{5}",
        "\\" * 1_000_000 + r"\boxed{5}",
        "<think>" + "</think>" * 100_000 + r"\boxed{5}",
        "\ud800 \udfff \0 \x1b" + r"\boxed{5}",
    ],
    ids=lambda response: repr(response[:10]),
)
def test_long_and_broken_responses(response: str) -> None:
    start = time.time()
    assert reward(response, "5") == 1
    assert submit(response, "5").result(30) == 1
    assert submit(response, r"\frac{25}{\sqrt{25}}").result(30) == 1  # by a worker
    assert submit(response, "6").result(30) == 0
    assert time.time() - start < 30


@pytest.mark.parametrize("junk", ["\ud800", "\0", "\x1b[0m", "\u202e"])
def test_junk_in_a_box_is_wrong(junk: str) -> None:
    assert submit(boxed(f"5{junk}"), r"\frac{25}{\sqrt{25}}").result(30) in (0, 1)
    assert submit(boxed(f"{junk}6"), "5").result(30) == 0


def test_results_come_in_order() -> None:
    answers = [str(n) if n % 3 else rf"\sqrt{{{n * n}}}" for n in range(150)]
    responses = [boxed(str(n if n % 2 else n + 1)) for n in range(150)]
    assert grade(responses, answers) == [float(n % 2) for n in range(150)]
    assert grade([], []) == []


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError):
        grade([boxed("5")], ["5", "6"])


def test_a_timeout_is_counted_and_costs_only_itself() -> None:
    before, start = grading_counts["timeouts"], time.time()
    hard = submit(boxed(SLOW), "5")
    assert grade([boxed("y+x")], ["x+y"]) == [1]
    assert hard.result(30) == 0
    assert time.time() - start < 20
    assert grading_counts["timeouts"] == before + 1


def workers() -> list[int]:
    """The pids of this process's graders."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            if parent == os.getpid() and b"--grade-worker" in command:
                found.append(int(entry.name))
    return found


def test_killed_workers_lose_no_answer() -> None:
    """Every worker is killed while a batch is under way, and again while idle."""
    count = 100
    answers = [rf"\sqrt{{{n * n}}}" for n in range(1, count + 1)]
    verdicts = [submit(boxed(str(n)), answer) for n, answer in enumerate(answers, 1)]
    while not any(verdict.done() for verdict in verdicts):
        time.sleep(0.01)
    for pid in workers():
        os.kill(pid, signal.SIGKILL)
    assert [verdict.result(60) for verdict in verdicts] == [1.0] * count
    for pid in workers():
        os.kill(pid, signal.SIGKILL)
    assert grade([boxed("y+x")] * 20, ["x+y"] * 20) == [1.0] * 20


def test_grade_from_threads() -> None:
    """math-verify's own timeouts raise outside the main thread."""
    results = {}

    def work(n: int) -> None:
        results[n] = grade([boxed("y+x"), boxed(str(n))], ["x+y", r"\sqrt{4}"])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert results == {n: [1.0, float(n == 2)] for n in range(8)}


def test_the_callers_alarm_is_left_alone() -> None:
    handler = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        reward(boxed("y+x"), "x+y")
        grade([boxed("y+x")], ["x+y"])
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


@pytest.mark.parametrize("ending", ["return", "SIGKILL", "SIGINT"])
def test_workers_do_not_outlive_their_parent(ending: str, tmp_path: Path) -> None:
    """Even SIGKILLed, and with pairs under way that would take for ever."""
    script = tmp_path / "parent.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(HERE.parent)!r})\n"
        "import os, signal, time, problems\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # `make test &` ignores it
        "assert problems.grade([r'\\boxed{y+x}'], ['x+y']) == [1.0]\n"
        f"problems.submit(r'\\boxed{{{SLOW}}}', '5')\n"
        "print('ready', flush=True)\n" + ("" if ending == "return" else "time.sleep(60)\n")
    )
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    ) as parent:
        assert parent.stdout.readline() == "ready\n"
        if ending != "return":
            os.kill(parent.pid, getattr(signal, ending))
        parent.wait(20)
    deadline = time.time() + 20
    while (left := [line for line in _sessions(parent.pid)]) and time.time() < deadline:
        time.sleep(0.2)
    assert not left


def _sessions(session: int) -> list[str]:
    """The processes left of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def test_a_forked_child_grades_with_workers_of_its_own() -> None:
    grade([boxed("y+x")], ["x+y"])
    pid = os.fork()
    if pid == 0:
        os._exit(0 if grade([boxed("y+x")], ["x+y"]) == [1.0] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_thousand_pairs_of_which_twenty_are_pathological() -> None:
    """A guard against hanging; experiments/reward_speed.py logs the time."""
    hard = [PATHOLOGICAL[n % len(PATHOLOGICAL)] for n in range(20)]
    responses = [boxed(hard[n // 50] if n % 50 == 0 else str(n)) for n in range(1000)]
    start = time.time()
    rewards = grade(responses, [str(n) for n in range(1000)])
    print(f"1,000 pairs, 20 of them pathological: {time.time() - start:.1f} s")
    assert rewards == [float(n % 50 != 0) for n in range(1000)]
    assert time.time() - start < 120


# One reward


def test_all_stages_use_this_reward() -> None:
    """Stages 1 to 3 get their rewards from problems.sample, which submits; none defines its own."""
    assert "submit(" in inspect.getsource(problems.sample)
    assert "reward(" in inspect.getsource(problems.submit)
    assert "sample(" in inspect.getsource(problems.sample_all).partition(":")[2]
    for name in ("offline_value.py", "train_online.py", "evaluate.py"):
        source = (HERE.parent / name).read_text("utf-8")
        assert re.search(r"problems\.sample(_all)?\(", source), name
        assert not re.search(r"math_verify|last_box|def .*(reward|verify)", source), name
