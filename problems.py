"""The task: datasets, prompt and reward, on which the three stages must agree.

To train on another task, edit this file: add a row to `DATASETS` or change `reward`. Nothing heavy
is imported at the top, as the file is also run as a grading worker (section 4), several at a time.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import resource
import signal
import socket
import sys
import threading
import zlib
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any, TextIO


class UserError(ValueError):
    """A mistake of the user's, told in one sentence: `run` prints it and exits with code 2."""


@contextlib.contextmanager
def explain(what: str, kind: type[Exception] = UserError) -> Iterator[None]:
    """Tell whatever goes wrong inside in one sentence: what was tried, and the cause."""
    try:
        yield
    except Exception as error:  # the hub, datasets and safetensors each raise a dozen types
        cause = " ".join(str(error).split()) or type(error).__name__
        raise kind(f"{what}: {cause:.400}") from error


# ---------------------------------------------------------------------------------------------
# 1. Datasets

# (name, what it serves): hub id, config, split on the hub, columns of question and answer.
# Stage 1 takes only what serves "train"; the hub calls the one split of some test sets "train" too.
DATASETS = {
    ("math", "train"): ("DigitalLearningGmbH/MATH-lighteval", None, "train", "problem", "solution"),
    ("gsm8k", "train"): ("openai/gsm8k", "main", "train", "question", "answer"),
    ("gsm8k", "test"): ("openai/gsm8k", "main", "test", "question", "answer"),
    ("math500", "test"): ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    ("minerva", "test"): ("math-ai/minervamath", None, "test", "question", "answer"),
    ("amc23", "test"): ("math-ai/amc23", None, "test", "question", "answer"),
    ("aime24", "test"): ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    ("aime25", "test"): ("math-ai/aime25", None, "test", "problem", "answer"),
    ("hmmt_feb_2024", "test"): ("MathArena/hmmt_feb_2024", None, "train", "problem", "answer"),
    ("hmmt_feb_2025", "test"): ("MathArena/hmmt_feb_2025", None, "train", "problem", "answer"),
    ("olympiadbench", "test"): ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train",
                                "question", "final_answer")}  # fmt: skip


def load_problems(name: str, serves: str | None = None) -> list[dict]:
    """Load a registered dataset or a .jsonl, .json or .parquet file: {"id", "question", "answer"}.

    `serves` is "train" or "test" (some names have both); None takes the first. What cannot be
    loaded is a UserError; an answer that cannot be graded is kept, for `split_gradable` to find.
    """
    path, keys = Path(name), [k for k in DATASETS if k[0] == name and serves in (None, k[1])]
    ask, tell, problems = "question", "answer", {}
    if path.suffix in (".jsonl", ".json", ".parquet"):
        rows = read_rows(path)
    elif keys:
        hub_id, config, split, ask, tell = DATASETS[keys[0]]
        import datasets  # here and not above: it takes a second

        with explain(f"cannot load {name} from the hub ({hub_id})"):
            rows = datasets.load_dataset(hub_id, config, split=split)
    else:
        known = ", ".join(sorted({n for n, role in DATASETS if serves in (None, role)}))
        raise UserError(f"no dataset {name!r}: give a .jsonl, .json or .parquet file, or {known}")
    for i, row in enumerate(rows, start=1):
        with explain(f"{name}, row {i} wants a text {ask!r} and {tell!r}: {row!r:.80}"):
            # no tokenizer takes lone surrogates
            question, answer = row[ask].encode(errors="replace").decode(), row[tell]
            if not question.strip():
                raise ValueError("it is empty")
        answer = (answer or [None])[0] if tell == "final_answer" else answer  # a list of one
        answer = last_box(str(answer)) if tell == "solution" else answer
        answer = str(answer).split("####")[-1].strip() if name == "gsm8k" else answer
        key = row["id"] if path.suffix and row.get("id") is not None else f"{path.stem}/{i - 1}"
        key = str(key).encode(errors="replace").decode()
        if key in problems:
            raise UserError(f"{name}, row {i}: its id {key!r} is also that of a row before it")
        problems[key] = {"id": key, "question": question, "answer": answer}
    if not problems:
        raise UserError(f"{name} has no rows")
    return list(problems.values())


def read_rows(path: Path) -> list:
    """Read a local file's rows; UserError says what is wrong and where."""
    with explain(f"cannot read {path}"):
        if path.suffix == ".parquet":
            import datasets

            return datasets.Dataset.from_parquet(str(path)).to_list()
        text, rows = path.read_text("utf-8-sig"), []  # -sig: a byte-order mark is dropped
        if path.suffix == ".json":
            return list(json.loads(text))
    for number, line in enumerate(text.split("\n"), start=1):
        with explain(f"cannot read {path}, line {number}"):
            rows += [json.loads(line)] if line.strip() else []
    return rows


def split_gradable(name: str | Path, rows: list[dict], fate: str) -> list[dict]:
    """Take the rows that can be graded, answers made texts, and print the others' ids and reasons.

    `fate` is what becomes of the others ("is dropped"). UserError if no row can be graded.
    """
    gradable = []
    for row in rows:
        try:
            gradable.append(row | {"answer": check_answer(row["answer"])})
        except ValueError as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"{row['id']} {fate}: its answer is {error}")
    if not gradable:
        raise UserError(f"{name}: no answer can be graded")
    return gradable


# ---------------------------------------------------------------------------------------------
# 2. The prompt

PROMPT_TEMPLATE = "{question}\nLet's think step by step, and put the final answer in \\boxed{}.\n"


def format_prompt(question: str, chat_tokenizer: Any = None) -> str:
    """Write the prompt for a question; given a tokenizer, as a user's turn in its chat template."""
    prompt = PROMPT_TEMPLATE.replace("{question}", question)  # not str.format: braces abound
    if not chat_tokenizer:
        return prompt
    turn = [{"role": "user", "content": prompt}]
    with explain("--chat-template"):
        return chat_tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def write_prompts(rows: list[dict], llm: Any, args: Namespace, longest: int = 0) -> None:
    """Give each row its "prompt", if it has none, and the last `longest` (0: all) "prompt_ids"."""
    tokenizer, chat = llm.get_tokenizer(), args.chat_template
    for row in rows:
        row.setdefault("prompt", format_prompt(row["question"], chat and tokenizer))
        # a chat template has already written the special tokens (BOS) itself
        row["prompt_ids"] = tokenizer.encode(row["prompt"], add_special_tokens=not chat)[-longest:]


# ---------------------------------------------------------------------------------------------
# 3. The reward


def reward(response: str, answer: Any, verify: Callable[[str, str], bool] | None = None) -> float:
    """Grade a response: 1.0 if what its last balanced box holds equals the answer, else 0.0.

    A box before `</think>` does not count; no box, no reward. No response makes it raise, an answer
    that cannot be graded is a ValueError. What equal means:

    - A percent sign is ignored on either side, and 50\\% also equals 0.5.
    - Units, degrees, currency and the base in 204_5 must agree, unless one side has none.
    - A decimal equals a fraction or a root to 6 significant digits; other numbers must be equal.
    - `x = 5` is 5, and every link of a chain must be: neither `6 = 5` nor `x = 6 = 5` is 5.
    - "1, 2" is {1, 2} in any order, but neither the tuple (1, 2) nor a longer list that hedges.
    - An inequality equals its interval; "x = 1, y = 2" and a column vector equal their tuple.
    - Words are compared as text, and so is what math-verify does not read to its end.

    `verify` compares two values where text and plain numbers do not decide; the default uses the
    parser of math-verify, but not its `verify`, which takes what is close for equal.
    """
    gold = check_answer(answer)
    box = last_box(response.rpartition("</think>")[2].partition("<think>")[0])
    if box is None or len(box) > 1000 or len(gold) > 1000 or _HOPELESS.search(box):
        return float(box == gold)  # no right answer is so long, and all that follows is fast
    pairs = {tuple(_tidy(text).replace("%", by) for text in (gold, box)) for by in ("", "/100")}
    return float(any(_same(*pair, verify or _verify) for pair in pairs))


def check_answer(answer: Any) -> str:
    """Return an answer as text; ValueError if it is neither text nor number, empty or broken."""
    text = last_box(str(answer)) or str(answer)
    bare = type(answer) in (str, int, float) and text.strip(" \t\r\n$.")
    if bare in (False, "", "nan", "inf", "-inf") or last_box(rf"\boxed{{{text}}}") != text:
        raise ValueError(f"no text or number, empty, or of unbalanced braces: {answer!r:.60}")
    return text


def last_box(text: str) -> str | None:
    """Cut out what the last balanced \\boxed{} or \\fbox{} holds, in one pass; None if none is."""
    opened, last = [], (0, 0)  # where the contents of boxes start; 0 for other braces
    for token in re.finditer(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", text, re.DOTALL):
        if token[0][-1] == "{" and token[0] != r"\{":
            opened.append(token.end() if len(token[0]) > 1 else 0)
        elif token[0] == "}" and opened:
            last = max(last, (opened.pop(), token.start()))
    return text[slice(*last)] if last[0] else None


# Brackets ten deep, and numbers too large to compute: compared as text.
_HOPELESS = re.compile(r"([({[][^](){}[]*){10}|(\^\{[^{}]*){2}\^|\d{5} *!|!!|\\binom\D*\d{6}")
_LETTERS = str.maketrans({"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "½": r"\frac12",
                          "√": r"\sqrt ", "π": r"\pi ", "°": r"^\circ ", "@": "#"})  # fmt: skip
_UNITS = dict(square="2", sq="2", cubic="3", feet="ft", foot="ft", inch="in", inche="in", meter="m",
              centimeter="cm", kilometer="km", second="s", hour="h", usd="dollar")  # fmt: skip


def _unit(found: re.Match) -> str:
    """Spell the unit of a value: \\text{ square feet} and \\text{ft}^2 become @ft 2."""
    words = re.sub(r"\\text|\\cdot|\.|\bper\b|(?<=[a-z]{2})s\b", "", found[0].lower())
    words = re.sub(r"(square|sq|cubic) +([a-z]+)", r"\2 \1", words)
    return "@" + " ".join(_UNITS.get(word, word) for word in re.findall(r"[a-z]+|\d", words))


_RULES = [  # in this order, each with the case that demands it
    (r"\\\$ *([\d,.{}\\!]*\d)", r"\1\\text{dollar}"),  # \$18.90
    (r"\\(left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z])\.?|(?<=\\)[dtc](?=frac)|\\?\$|\\[()!]"
     r"|[\s.,;:\\$]+$", ""),  # \left(, \dfrac, $5$, 5.
    # \textbf{(C)}, \mathrm{cm}
    (r"\\((math|text)(rm|bf|it|sf|up|normal)|mbox|operatorname|boldsymbol)(?![a-z])", r"\\text"),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-z])|\s+", " "),  # 1\,234
    # \le, \geqslant, \infty
    (r"\\([lg])eq?(slant)?(?![a-z])|\\?infty\b", lambda m: {"l": "≤", "g": "≥"}.get(m[1], "∞")),
    (r",? *(\\text *\{ *,? *(and|or) *\}|\b(and|or)\b),?|\\cup(?![a-z])|[∪;&]", ","),  # 1 and 2
    (r"(\\text *\{ *)?(\\?%|\bper ?cent(age)?\b)( *\})?", "%"),  # 50 percent
    (r"([a-zA-Z] (?=[a-zA-Z])|\d (?=\d))| ", r"\1"),  # 1 1/2 is not 11/2
    # \mathrm{3} is no unit, \text{(C)} is C
    (r"\\text\{([ei]|[\dA-Z]*\d[\dA-Z]*)\}|^\(?\\text\{([^{}]*)\}\)?$", r"\1\2"),
    (r"\\frac(?:(\w)|\{([^{}]*)\}) ?(?:(\w)|\{([^{}]*)\})", r"\\frac{\1\2}{\3\4}"),  # \frac12
    (r"(?<![\\a-zA-Z])(?=(sqrt|pi|sin|cos|tan|log|ln)(?![a-zA-Z]))", r"\\"),  # 2pi
    (r"\\sqrt(?:(\d+|[a-z])|\(([^()]*)\))", r"\\sqrt{\1\2}"),  # \sqrt2, sqrt(3)
    (r"(?<=\d)[eE]\+?(-?\d+)", r"\\cdot 10^{\1}"),  # 4.5e33
    (r"(\d*\.\d*)\\overline\{(\d+)\}", lambda m: (m[1] + m[2] * 15)[:15]),  # 0.\overline{3}
    (r"\^(\\circ|\{\\circ\})|\\degrees?(?![a-z])", r"\\text{degree}"),  # 60^{\circ}
    (r"\\approx|\\in(?![a-z])", "="),  # x \approx 2.45, x \in [0, 1]
    (r"^\(?(-?[\dA-Z]*\d[\dA-Z]*)\)?_\{?(\d+)\}?$", r"\1\\text{base \2}"),  # 204_5
    # 5 square cm, where x is no unit
    (r"(?i)(?<=[\d})])(([a-z]{4}[a-z ]*|[ckm]m|kg|ft|in|mph|m/s|[ap]\.?m)(\^\d)?)$", r"\\text{\1}"),
    # a matrix is the tuple of its rows, and a column of numbers their tuple
    (r"[(\[]?\\begin\{(?:array\}\{[^{}]*|[pb]?matrix)}(.*?)(\\\\)?\\end\{\w+\}[)\]]?", r"((\1))"),
    (r"\\\\", "),("),
    # 4 2/3
    (r"(?<![\d.^])(\d+) ?(\\frac\{\d+\}\{\d+\}|(?<= )\d+/\d++)(?![a-z(]|\\(?!text))", r"(\1+\2)"),
    (r"(?<![\d.,{])[1-9]\d{0,2}((\{,\}|[ ,])\d{3})+(?![\d,])(?!.*([)\]]|\\\}))",
     lambda m: re.sub(r"\D", "", m[0])),  # 1,234 and 24{,}000, but (1,234) is a point
    (r"\\\{[a-z](=\\mathbb\{R\})?(:|\\mid|\|) ?|\\[{}]", ""),  # {x : 0 <= x <= 1}, {1, 2}
    (r"(^|,)([^,]*?)\\pm(?!od)([^,]*?)(?=,|$)", r"\1\2+\3,\2-\3"),  # 1 \pm \sqrt{2}
    (r"[^,>≥]+([>≥][^,>≥]+)+",
     lambda m: "".join(re.split("([>≥])", m[0])[::-1]).translate({62: "<", 8805: "≤"})),  # 2 > x
    # x < 2 is (-\infty, 2)
    (r"(?<![^,])(?=[^,]*[<≤])(?:([^,<≤]+)([<≤]))?(?:[a-zA-Z]|\\theta)(?:([<≤])([^,<≤]+))?(?![^,])",
     lambda m: f"{'(['[m[2] == '≤']}{m[1] or '-∞'},{m[4] or '∞'}{')]'[m[3] == '≤']}"),
    # 20\text{ cm}^2, but no unit in 5\text{ million}
    (r"(?!.*\b(not|least|most|than|about|hundred|thousand|[mbt]r?illion|dozen)s?\b)(?<=[\w)}|!])"
     r"(\\text\{[(/]?[a-zA-Z][^{},+!]*\}(\^\{?-?\d\}?)?[/CF]*(\\cdot)?)+(?=$|[,)=])", _unit),
    (r"^([a-z])=[^,=]+(,(?!\1)[a-z]=[^,=]+)+$",
     lambda m: f"({','.join(part[2:] for part in sorted(m[0].split(',')))})"),  # x = 1, y = 2
    # [0, +\infty), (C)
    (r"(^|(?<=[(,\[]))([=+]+|[({]([^(){},]*)[)}](?=$|[,)]))", r"\3")]  # fmt: skip
_COMMA = re.compile(r",(?!(?:[^]()\[]|[(\[][^]()\[]*[])])*+[])])")  # outside of all brackets
_NAME = re.compile(r"(?:((?=[^=]*[a-zA-Z])(?:_\{?\w+\}?|(?<=\w)\([-\d,]+\)|[^\d_=])*+)=)?(.*)")
# Nothing for math-verify, which reads words as products of letters, 1:58 as 1/58 and 3 5 as 8. And
# 5 = 2\sqrt{3} cannot be true, nor what else holds one root, pi or i, otherwise rational, and no 0
# (no square ends in 2, 3, 7 or 8).
_ODD = re.compile(r"\\text|(?<![\\a-zA-Z{])[a-zA-Z]{4,}|(^|=)[A-Z]{2,}(=|$)|[A-Z]\d|\b\d+ \d|"
    r"[:#∞]|^(?!.*\b0)[-+\d{}()/=]*(\\sqrt\{(\d*[2378]|[56])\}|\\pi|i)[-+\d{}()/=]*$")  # fmt: skip


@functools.lru_cache(10_000)
def _tidy(text: str) -> str:
    """Write a piece of LaTeX in one of the many ways in which it can be spelled."""
    return functools.reduce(lambda t, rule: re.sub(*rule, t), _RULES, text.translate(_LETTERS))


def _same(gold: str, pred: str, verify: Callable[[str, str], bool]) -> bool:
    """Compare part by part; `verify` is asked about what neither text nor plain numbers decide."""
    if gold == pred or (gold.replace(" ", "").isalnum() and gold.casefold() == pred.casefold()):
        return True
    golds, preds = _COMMA.split(gold), _COMMA.split(pred)
    if len(golds) > 1 or len(preds) > 1:  # lists, in any order
        table = [[_same(g, p, verify) for p in preds] for g in golds if len(golds) == len(preds)]
        return bool(table) and all(map(any, table)) and all(map(any, zip(*table, strict=True)))
    if "=" in gold + pred:
        (name, value), (other, links) = (_NAME.fullmatch(text).groups() for text in (gold, pred))
        if "=" in value or (name and name != other and "=" in pred):
            return "=" in pred and verify(gold, pred)  # y = 2x + 3 is 2x - y + 3 = 0
        return all(_same(value, link, verify) for link in links.split("="))
    if "," in gold + pred:  # tuples and intervals, in order
        golds, preds = (_COMMA.split(text[1:-1]) for text in (gold, pred))
        alike = gold[:1] + gold[-1:] == pred[:1] + pred[-1:] and len(golds) == len(preds)
        return alike and all(_same(g, p, verify) for g, p in zip(golds, preds, strict=True))
    (gold, _, unit), (pred, _, other) = gold.partition("@"), pred.partition("@")
    if unit or other:
        return (unit == other or "" in (unit, other)) and _same(gold, pred, verify)
    a, b = _number(gold), _number(pred)
    if None not in (a, b) and (("." in gold) == ("." in pred) or not (a % 1 and b % 1)):
        return a == b
    letters = [set(re.sub(r"\\[a-zA-Z]+|[^a-df-hj-zA-Z]", "", text)) for text in (gold, pred)]
    both = re.sub(r"\\frac|\\cdot", "/", f"{gold}={pred}")
    return letters[0] == letters[1] and not _ODD.search(both) and verify(gold, pred)


def _number(text: str) -> Fraction | None:
    plain = re.fullmatch(r"(-?)(?:\\frac\{)?(\d+\.?\d*|\.\d+)(?:(?:\}\{|/)0*([1-9]\d*)\}?)?", text)
    return Fraction(plain[1] + plain[2]) / int(plain[3] or 1) if plain else None


@functools.lru_cache(10_000)
def _values(text: str) -> list[Any]:
    """Evaluate a value, or l - r for l = r, at two points; raises if the parser stops midway."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from sympy import Float, I, Integer, Rational, Symbol

    text = re.sub(r"((?<![_^\d])\d+|\)|\\pi)(?=\()", r"\1\\cdot ", text)  # 2(3) would be 5
    case = ConversionConfig(lowercase_symbols=False)  # R - r is not 0
    tree = latex2sympy(f"({text.replace('=', ')-(', 1)})", conversion_config=case)  # (): all of it
    exact = {x: Rational(str(x)) for x in tree.atoms(Float)} | {Symbol("i"): I}
    spots = {x: zlib.crc32(x.name.encode()) % 9973 for x in tree.free_symbols}
    points = ({x: Rational(at - k, 2000) for x, at in spots.items()} | exact for k in (0, 5000))
    return [Integer(0) if x.is_zero else x.evalf(350) for x in map(tree.xreplace, points)]


def _verify(gold: str, pred: str) -> bool:
    """Compare two values, or two equations up to a factor, at two points to 300 digits."""
    with contextlib.suppress(Exception):  # whatever a parser raises, the box is not shown right
        (a, b), (c, d) = _values(gold), _values(pred)
        if ("." in gold) != ("." in pred) and a == b and c == d and 0 not in (a % 1, c % 1):
            return str(a.n(6)) == str(c.n(6))
        pairs = [(a / c, b / d)] if "=" in gold else [(a, c), (b, d)]
        return all(x.is_finite and abs(x - y) <= abs(x) / 10**300 for x, y in pairs)
    return False


# ---------------------------------------------------------------------------------------------
# 4. Grading many at once

SECONDS_PER_PAIR = 3
# Of this process. A failure is a worker that died of a pair, twice.
grading_counts = {"timeouts": 0, "failures": 0, "ungradable": 0}
_mine = threading.local()  # each thread of the pool has a worker process of its own


def _undecided(gold: str, pred: str) -> bool:
    raise NotImplementedError("text and plain numbers do not tell whether two values are equal")


def submit(response: str, answer: Any) -> Future:
    """Grade a response and return at once; the future's result is the reward.

    What text and plain numbers decide is decided here, in 0.1 ms. The rest goes to workers, since
    an algebra system can hang or eat all memory, and only a process can be killed. An answer that
    cannot be graded gives 0.0 and is counted.
    """
    verdict = Future()
    try:
        verdict.set_result(reward(response, answer, _undecided))
    except NotImplementedError:
        return _pool(os.getpid()).submit(_ask_worker, json.dumps([response, answer]))
    except ValueError:
        grading_counts["ungradable"] += 1
        verdict.set_result(0.0)
    return verdict


def grade(responses: list[str], answers: list[Any]) -> list[float]:
    """Grade many responses at once, in order."""
    return [v.result() for v in [submit(*pair) for pair in zip(responses, answers, strict=True)]]


# The threads of this process, or of a fork: more than cores, as some wait in vain.
_pool = functools.cache(lambda pid: ThreadPoolExecutor(min(16, os.cpu_count() + 2)))


def _ask_worker(line: str, retry: bool = True) -> float:
    """Ask this thread's worker; one that died, perhaps while idle, has a successor."""
    command = [sys.executable, __file__, "--grade-worker"]
    # a process group of its own: Ctrl-C is for the parent
    how = {"stdin": PIPE, "stdout": PIPE, "stderr": DEVNULL, "text": True, "process_group": 0}
    worker = _mine.worker = vars(_mine).get("worker") or Popen(command, **how)
    with contextlib.suppress(BrokenPipeError):
        print(line, file=worker.stdin, flush=True)
        if reply := worker.stdout.readline():
            return float(reply)
    _mine.worker, timed_out = None, worker.wait() == -signal.SIGALRM
    if retry and not timed_out:
        return _ask_worker(line, retry=False)
    grading_counts["timeouts" if timed_out else "failures"] += 1
    return 0.0


# ---------------------------------------------------------------------------------------------
# 5. What all stages agree on beside the task

STOPS = (signal.SIGINT, signal.SIGTERM)


def run(main: Callable[[], None]) -> None:
    """Run a script: exit code 2 and a sentence for a user's mistake, 1 for what broke.

    SIGINT or SIGTERM ends it in good order, the same once more at once.
    """

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        sys.exit(128 + number)

    for each in STOPS:
        signal.signal(each, stop)
    try:
        main()
    except (UserError, OSError, ArithmeticError) as error:  # a full disk, a loss that is NaN
        if os.environ.get("RANK", "0") == "0" or error.__cause__ or isinstance(error, OSError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UserError) else 1)


# A lone rank takes any free port. A CPU engine takes all cores, not one, and 1 GiB.
ALONE = "RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 LOCAL_WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=0"
UNLESS_SET = dict(VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="1",
                  VLLM_LOGGING_LEVEL="ERROR", HF_HUB_DISABLE_PROGRESS_BARS="1")  # fmt: skip


def launch(tensor_parallel_size: int = 1) -> None:
    """Give every GPU a rank, and join their process group.

    With two or more GPUs the command runs again under torchrun and exits as that does; with one or
    none it never does. Started by torchrun, it joins. To be called when all that can be checked is.
    """
    os.environ |= UNLESS_SET | os.environ  # what the user has set stays
    import torch
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import api, errors

    gpus = torch.cuda.device_count()
    if "RANK" in os.environ:
        torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # not to outlive the launcher
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # or is it dead already?
            agent = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            socket.create_connection(agent, timeout=60).close()
    elif gpus > 1:
        try:
            sys.exit(torchrun.main(["--standalone", f"--nproc-per-node={gpus}", *sys.argv]))
        except errors.ChildFailedError as error:
            code = error.get_first_failure()[1].exitcode
            sys.exit(code if code in (2, 130, 143) else 1)
        except api.SignalException as error:
            sys.exit(128 + error.sigval)
    else:
        os.environ |= dict(setting.split("=") for setting in ALONE.split())
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    # A day, not half an hour, for ranks end their sampling at different times.
    torch.distributed.init_process_group(backend, timeout=48 * torch.distributed.default_pg_timeout)
    if torch.distributed.get_world_size() % tensor_parallel_size:
        raise UserError(f"--tensor-parallel-size {tensor_parallel_size} does not part the GPUs")


def start_engine(args: Namespace, longest_prompt: int, **options: Any) -> Any:
    """Start this rank's vLLM engine inside this process, alike in all stages; collective."""
    import torch
    from vllm import LLM

    gpu, tp = torch.cuda.is_available(), args.tensor_parallel_size
    torch._dynamo.config.disable = not gpu  # a CPU would compile for seconds to gain microseconds
    options |= {"dtype": "bfloat16" if gpu else "float32", "enforce_eager": not gpu}
    # The CPU engine cannot seed a prompt that it cuts; bf16 logits would blur pi itself.
    options |= {"enable_chunked_prefill": gpu, "hf_overrides": {"head_dtype": "float32"}}
    options |= {"max_model_len": longest_prompt + args.max_tokens, "seed": args.seed}
    options |= {"gpu_memory_utilization": args.gpu_memory_utilization, "tensor_parallel_size": tp}
    # An engine in each rank.
    options |= {"distributed_executor_backend": "external_launcher", "use_tqdm_on_load": False}
    with explain(f"the engine does not start with {args.model}"):
        return LLM(str(model_folder(args.model)), **options)


def sample(llm: Any, jobs: list, args: Namespace, stop=(), lap=lambda: None) -> Iterator[tuple]:
    """Answer this engine's share of jobs (row, sampling parameters); yields (place, response).

    A row has "prompt_ids" and "answer". A response is {"ids" (EOS included), "output" (as text),
    "finished" (by EOS), "sampler_logp" (per token; empty unless the job asks for "logprobs":
    0), "reward"}. Graders work beside the engine, on each response as it finishes; one without EOS
    is graded as if it said nothing: 0, in every stage. top_p = 1 and no top_k unless asked for: V*
    is an expectation under pi_ref itself. Once `stop` is true the rest is abandoned, where an
    engine has one rank; `lap` is called when only grades are awaited.
    """
    from torch import distributed as dist
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    engine, tokenizer, waiting = llm.llm_engine, llm.get_tokenizer(), []
    alike = {"max_tokens": args.max_tokens, "output_kind": RequestOutputKind.FINAL_ONLY}
    # A text at once, below, is cheaper than token by token.
    alike |= {"skip_clone": True, "detokenize": False, "flat_logprobs": True}
    tp = args.tensor_parallel_size
    for i in range(dist.get_rank() // tp, len(jobs), dist.get_world_size() // tp):
        prompt = {"prompt_token_ids": jobs[i][0]["prompt_ids"]}
        engine.add_request(str(i), prompt, SamplingParams(**alike, **jobs[i][1]))
    while engine.has_unfinished_requests() and not (stop and tp == 1):
        for output in engine.step():
            i, done = int(output.request_id), output.outputs[0]
            drawn = {"ids": list(done.token_ids), "finished": done.finish_reason == "stop"}
            drawn["output"] = tokenizer.decode(drawn["ids"], skip_special_tokens=True)
            drawn["sampler_logp"] = list(done.logprobs.logprobs) if done.logprobs else []
            said = drawn["output"] if drawn["finished"] else ""
            waiting.append((i, drawn, submit(said, jobs[i][0]["answer"])))
        while waiting and waiting[0][2].done():
            i, drawn, grade = waiting.pop(0)
            yield i, drawn | {"reward": grade.result()}
    lap()
    yield from ((i, drawn | {"reward": grade.result()}) for i, drawn, grade in waiting)


def sample_all(llm, rows: list, n: int, out: Path, identity: dict, args, **params) -> list[dict]:
    """Draw n graded samples of each row, the engines sharing the work; a list of records.

    Each is appended to OUT.partial/RANK.jsonl once graded, so that a run killed and started again
    with the same identity draws only what is missing; another one is a UserError naming the field.
    The caller, who saves the records, deletes OUT.partial after it.
    """
    from torch import distributed as dist
    from tqdm import tqdm

    rank, world, folder = dist.get_rank(), dist.get_world_size(), Path(f"{out}.partial")
    dist.broadcast_object_list(box := [identity])  # rank 0's, should nodes have other files
    partial, whose = lock(folder / f"{rank}.jsonl"), content_sha256(box[0])
    left_by(folder / "identity.json", box[0])
    had = read_partial(folder, whose)
    dist.barrier()  # all have read before one writes
    if rank == 0:
        write_json(folder / "identity.json", box[0])
    jobs = [(row | {"sample": i}, params | {"seed": response_seed(args.seed, 0, row["id"], i)})
            for row in rows for i in range(n) if (row["id"], i) not in had]  # fmt: skip
    share = -(-len(jobs) * args.tensor_parallel_size // world)  # rounded up
    kept = ("id", "sample", "prompt", "answer", "output", "reward", "finished", "tokens")
    # `with`, for an error has a line of its own then
    with tqdm(sample(llm, jobs, args), total=share, unit=" responses", disable=rank > 0) as bar:
        for i, drawn in bar:
            known = jobs[i][0] | drawn | {"tokens": len(drawn["ids"])}
            text = json.dumps({key: known[key] for key in kept})
            with explain(f"cannot write {partial.name}", OSError):
                print(f"\n{sha256(whose + text)} {text}", end="", file=partial, flush=True)
    dist.barrier()
    had = read_partial(folder, whose)
    dist.barrier()  # all have read before the caller deletes
    return [had[row["id"], i] for row in rows for i in range(n)]


def read_partial(folder: Path, whose: str) -> dict[tuple[str, int], dict]:
    """Read every rank's records by id and sample; torn ones and other runs' fail their hash."""
    lines = "\n".join(p.read_text("utf-8", "replace") for p in folder.glob("*.jsonl")).split("\n")
    whole = [json.loads(line[65:]) for line in lines if line[:64] == sha256(whose + line[65:])]
    return {(record["id"], record["sample"]): record for record in whole}


def response_seed(seed: int, step: int, problem_id: str, sample: int) -> int:
    """Seed one response by what it is, so that no batch, rank or resume changes what is sampled."""
    return int(sha256(json.dumps([seed, step, problem_id, sample]))[:16], 16) >> 2  # fits an int64


def command_line(about: str, engine_share: float) -> ArgumentParser:
    """Begin a script's command line: what it is about, and the flags that all stages share."""
    parser = ArgumentParser(description=about, formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("in all stages").add_argument
    add("--seed", type=int, default=0, help="of sampling; in stage 2 of the order of prompts, too")
    add("--gpu-memory-utilization", type=float, default=engine_share, help="the engine's GPU share")
    add("--tensor-parallel-size", type=int, default=1, help="GPUs per engine")
    return parser


MOST = {"beta1": float("inf"), "top_p": 1, "gpu_memory_utilization": 1}  # others are finite


def check_args(args: Namespace, *may_be_zero: str) -> None:
    """Raise UserError for a number out of range, or an --out that cannot be written."""
    for name, value in vars(args).items():
        zero, most = value == 0 and name in ("seed", *may_be_zero), MOST.get(name, 1e300)
        if type(value) in (int, float) and not (zero or 0 < value <= most):
            raise UserError(f"--{name.replace('_', '-')} {value} is out of range")
    there = next(path for path in Path(args.out, "in").absolute().parents if path.exists())
    if not os.access(there, os.W_OK):
        raise UserError(f"--out {args.out}: {there} cannot be written")


def model_folder(model: str) -> Path:
    """Find a model's files: a local folder, or a hub id's, downloaded if need be; or UserError."""
    folder = Path(model)
    if not folder.is_dir():
        import huggingface_hub

        wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        with explain(f"no model {model}, here or on the hub"):
            folder = Path(huggingface_hub.snapshot_download(model, allow_patterns=wanted))
    if not all(any(folder.glob(name)) for name in ("config.json", "*.safetensors", "*token*")):
        raise UserError(f"{folder} is no model: it wants config.json, *.safetensors, a tokenizer")
    return folder


def context_length(model: str) -> float:
    """Count the tokens, prompt and response together, that a model can read."""
    return read_json(model_folder(model) / "config.json").get("max_position_embeddings", 1e300)


def check_context(args: Namespace) -> None:
    """Raise UserError if a prompt and a response may be longer than the model can read."""
    if args.max_prompt_tokens + args.max_tokens > context_length(args.model):
        raise UserError(f"--max-prompt-tokens + --max-tokens is more than {args.model} can read")


def read_json(path: str | Path, ours: bool = False) -> dict:
    """Read a JSON file; one of `ours` must be as `write_json` wrote it. UserError if not."""
    with explain(f"cannot read {path}"):
        document = dict(json.loads(Path(path).read_text("utf-8")))  # a list is refused here
        if ours and document.get("sha256") != content_sha256(document):
            raise ValueError("damaged or edited, its sha256 is not that of the rest")
    return document


def left_by(path: Path, identity: dict) -> dict:
    """Read what an earlier run left at `path`, {} if none; UserError if it was not `identity`'s."""
    document = read_json(path, ours=True) if path.exists() else {}
    what = f"{path} (give another --out, or remove it)"
    refuse_difference(what, document.get("header", document), identity if document else {})
    return document


def write_json(path: Path, document: dict) -> None:
    """Write a JSON file, whole, with the sha256 that `read_json` checks."""
    write_whole(path, json.dumps(document | {"sha256": content_sha256(document)}, indent=1))


def content_sha256(document: dict) -> str:
    """Hash a document, but for its own sha256."""
    return sha256(json.dumps({key: value for key, value in document.items() if key != "sha256"}))


def sha256(text: str) -> str:
    """Hash a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def folder_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a model: weights (in full), config, tokenizer, trainer state."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}


def file_sha256(path: Path) -> str:
    """Hash a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identify(args: Namespace, *free: str) -> dict:
    """Arguments, prompt and the model's files: what decides what is sampled."""
    free += ("out", "gpu_memory_utilization", "tensor_parallel_size")
    identity = {name: value for name, value in vars(args).items() if name not in free}
    identity["model_sha256"] = content_sha256(folder_hashes(model_folder(args.model)))
    return identity | {"prompt_template": PROMPT_TEMPLATE}


def refuse_difference(what: str, saved: dict, wanted: dict) -> None:
    """Raise UserError naming each field of `wanted` in which `saved` differs."""
    differ = [f"{k} {saved.get(k)!r}, not {v!r}" for k, v in wanted.items() if saved.get(k) != v]
    if differ:
        raise UserError(f"{what} was made with {'; '.join(differ)}")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp")
    with explain(f"cannot write {path}", OSError):
        beside.write_text(text, "utf-8")
        os.sync()  # all that is written, before it gets its name
        os.replace(beside, path)


def lock(path: Path) -> TextIO:
    """Open `path` for appending, for this process alone; UserError if another has it."""
    with explain(f"cannot write {path}; if another run does, wait or give another --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (held as long as it is open)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


# A grading worker: the pairs come in on stdin until it closes, as it does however the parent ends.
if __name__ == "__main__" and sys.argv[1:] == ["--grade-worker"]:
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    # the parser is slow until it has learned; where it is missing the worker dies, and is counted
    assert _verify(r"\frac{x^{2}}{\sqrt[3]{8}}-\frac{2\pi}{3}=1", r"(x-1)(x+1)=\frac{4\pi}{3}+1")
    for line in sys.stdin:
        signal.alarm(SECONDS_PER_PAIR)  # the kernel kills it then, in whatever code it hangs
        print(reward(*json.loads(line)), flush=True)
        signal.alarm(0)
