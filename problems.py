"""The task: datasets, prompt and reward, on which the three stages must agree.

To train on another task, edit this file: add a row to `DATASETS` or change `reward`. Nothing heavy
is imported at the top, as the file is also run as a grading worker (section 4), several at a time.
"""

import contextlib
import ctypes
import datetime
import fcntl
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any, TextIO


class UserError(ValueError):
    """A mistake of the user's, told in one sentence: `run` prints it and exits with code 2."""


@contextlib.contextmanager
def explain(what: str, kind: type[Exception] = UserError) -> Iterator[None]:
    """Tell whatever goes wrong inside in one sentence: what was tried, and the cause."""
    try:
        yield
    except Exception as error:  # the hub, datasets and safetensors each raise a dozen types
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise kind(f"{what}: {cause}") from error


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
    ("olympiadbench", "test"): (
        *("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "question", "final_answer"),
    ),
    ("amc23", "test"): ("math-ai/amc23", None, "test", "question", "answer"),
    ("aime24", "test"): ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    ("aime25", "test"): ("math-ai/aime25", None, "test", "problem", "answer"),
    ("hmmt_feb_2024", "test"): ("MathArena/hmmt_feb_2024", None, "train", "problem", "answer"),
    ("hmmt_feb_2025", "test"): ("MathArena/hmmt_feb_2025", None, "train", "problem", "answer"),
}


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
    for number, row in enumerate(rows, start=1):
        where = f"{name}, row {number}"
        if not isinstance(row, dict) or not row.keys() >= {ask, tell}:
            raise UserError(f"{where} lacks {ask!r} or {tell!r}: {row!r:.80}")
        question, answer, key = row[ask], row[tell], f"{path.stem}/{number - 1}"
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"{where}: the question is not a text: {question!r:.60}")
        if tell == "solution":
            answer = last_box(str(answer))
        elif tell == "final_answer":  # OlympiadBench: a list of one
            answer = answer[0] if answer else None
        elif name == "gsm8k":
            answer = str(answer).split("####")[-1].strip()
        if path.suffix and row.get("id") is not None:
            key = str(row["id"])
        if key in problems:
            raise UserError(f"{where}: its id {key!r} is also that of a row before it")
        question = question.encode(errors="replace").decode()  # no tokenizer takes lone surrogates
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


def write_prompts(rows: list[dict], tokenizer: Any, chat_template: bool) -> None:
    """Give each row its "prompt", if it has none, and "prompt_ids"."""
    for row in rows:
        row.setdefault("prompt", format_prompt(row["question"], chat_template and tokenizer))
        # a chat template has already written the special tokens (BOS) itself
        row["prompt_ids"] = tokenizer(row["prompt"], add_special_tokens=not chat_template).input_ids


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
    gold, box, verify = _tidy(gold), _tidy(box), verify or _verify
    shares = ["", "/100"] if ("%" in gold) != ("%" in box) else [""]
    return float(any(_same(gold.replace("%", s), box.replace("%", s), verify) for s in shares))


def check_answer(answer: Any) -> str:
    """Return an answer as text; ValueError says why it cannot be graded."""
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise ValueError(f"neither a string nor a number but {answer!r:.60}")
    text = last_box(str(answer)) or str(answer)
    empty = not text.strip(" \t\r\n$.") or text in ("nan", "inf", "-inf")
    if empty or last_box(rf"\boxed{{{text}}}") != text:
        raise ValueError(f"nothing to compare or unbalanced braces in {answer!r:.60}")
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
_LETTERS = {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "½": r"\frac12", "√": r"\sqrt ",
            "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "°": r"^\circ ", "≤": r"\le ",
            "≥": r"\ge ", "&": ","}  # fmt: skip
_BARE = r"[a-zA-Z]{4,}|[ckm]m|kg|ft|in|mph|m/s|[aApP]\.?[mM]\.?"  # where x is none
_RULES = [  # in this order, each with the case that demands it
    (r"\\\$ *([\d,.{}\\!]*\d)", r"\1\\text{dollar}"),  # \$18.90
    (r"\\(left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z])\.?|\\?\$|\\[()!]", ""),  # \left(
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\((math|text)(rm|bf|it|sf|normal)|mbox|operatorname|boldsymbol)(?![a-z])", r"\\text"),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-z])|\s+", " "),  # 1\,234
    (r"\\text *\{ *([ei]|[\dA-Z]*\d[\dA-Z]*) *\}", r"\1"),  # 5\mathrm{i} has no unit
    (r"\\([lg])eq?(slant)?(?![a-z])", lambda m: "≤≥"[m[1] == "g"]),
    (r"\\frac *(?:(\w)|\{([^{}]*)\}) *(?:(\w)|\{([^{}]*)\})", r"\\frac{\1\2}{\3\4}"),  # \frac12
    (r"(?<![\\a-zA-Z])(?=(sqrt|pi|sin|cos|tan|log|ln|infty)(?![a-zA-Z]))", r"\\"),  # 2pi
    (r"\\sqrt *(?:(\d+|[a-z])|\(([^()]*)\))", r"\\sqrt{\1\2}"),  # \sqrt2, sqrt(3)
    (r"(?<=\d)[eE]\+?(-?\d+)", r"\\cdot 10^{\1}"),  # 4.5e33
    (r"(\d*\.\d*)\\overline *\{(\d+)\}", lambda m: (m[1] + m[2] * 15)[:15]),  # 0.\overline{3}
    (r"(\\text *\{ *)?(\\?%|\bper ?cent(age)?\b)( *\})?", "%"),  # 50 percent
    (r"\^ *(\\circ|\{ *\\circ *\})|\\degrees?(?![a-z])", r"\\text{degree}"),  # 60^{\circ}
    (r"\\approx", "="),  # x \approx 2.45
    (r"(^|[,(\[])[ =+]+|( |[.,;:]|\\\\)+$", r"\1"),  # 5., [0, +\infty)
    (r"^\(?(-?[\dA-Z]*\d[\dA-Z]*)\)?_\{?(\d+)\}?$", r"\1\\text{base \2}"),  # 204_5
    (r",? *(\\text *\{ *,? *(and|or) *\}|\b(and|or)\b),?|\\cup(?![a-z])|;", ","),  # 1 and 2
    (r"^ *\(?\\text *\{([^{}]*)\}\)?$", r"\1"),  # \text{(C)}, \text{12 or 13}
    (rf"(?<=[\d}})]) *(({_BARE})( [a-zA-Z]+)*(\^\d)?)$", r"\\text{\1}"),  # 5 square cm
    (r"^\\\{ *[a-z] *(\\in *\\mathbb *\{R\} *)?(:|\\mid|\|)", ""),  # {x : 0 <= x <= 1}
    (r"^ *\w+ *\\in(?![a-z])", ""),  # x \in [0, 1]
    # a matrix is the tuple of its rows
    (r"[(\[]?\\begin\{(?:array\}\{[^{}]*|[pb]?matrix)}(.*?)(\\\\ *)?\\end\{\w+\}[)\]]?", r"((\1))"),
    (r"\\\\", "),("),
    (r"(?<![\d.^])(\d+) *(\\frac\{\d+\}\{\d+\}|(?<= )\d+/\d+)(?! *([a-z(]|\\(?!text)))",
     r"(\1+\2)"),  # 4 2/3
    (r"(?<![\d.,{])[1-9]\d{0,2}((\{,\}|[ ,])\d{3})+(?![\d,])(?!.*([)\]]|\\\}))",
     lambda m: re.sub(r"\D", "", m[0])),  # 1,234 and 24{,}000, but (1,234) is a point
    (r"([a-zA-Z] (?=[a-zA-Z])|\d (?=\d))| |\\[{}]", r"\1"),  # {1, 2}
    (r"(^|,)([^,]*?)\\pm(?!od)([^,]*?)(?=,|$)", r"\1\2+\3,\2-\3"),  # 1 \pm \sqrt{2}
    (r"([^,>≥]+)([>≥])([^,>≥]+)(?:([>≥])([^,>≥]+))?",
     lambda m: "".join(filter(None, m.groups()[::-1])).replace(">", "<").replace("≥", "≤")),
    (r"(^|,)([a-zA-Z]|\\theta)(?=[<≤])", r"\1-\\infty<\2"),  # x < 2
    (r"([<≤]([a-zA-Z]|\\theta))(?=,|$)", r"\1<\\infty"),
    (r"([^,<≤]+)([<≤])(?:[a-zA-Z]|\\theta)([<≤])([^,<≤]+)",
     lambda m: f"{'(['[m[2] == '≤']}{m[1]},{m[4]}{')]'[m[3] == '≤']}"),
    (r"(^|(?<=[(,]))[({]([^(){},]*)[)}](?=$|[,)])", r"\2"),  # (C)
]  # fmt: skip
_NAMED = re.compile(r"(?:((?=[^=]*[a-zA-Z])(?:_\{?\w+\}?|(?<=\w)\([-\d,]+\)|[^\d_=])*+)=)?(.*)")
_UNITS = dict(square="2", sq="2", cubic="3", feet="ft", foot="ft", inch="in", inche="in", meter="m",
              centimeter="cm", kilometer="km", second="s", hour="h", usd="dollar")  # fmt: skip
_NO_UNIT = re.compile(r"\b(?:not|least|most|than|about|hundred|thousand|[mbt]r?illion|dozen)s?\b")
# Nothing for math-verify, which reads words as products of letters, 1:58 as 1/58 and 3 5 as 8.
_WORDS = re.compile(r"\\text|(?<![\\a-zA-Z{])[a-zA-Z]{4,}|^[A-Z]{2,}$|[A-Z]\d|:|\b\d+ \d")


@functools.lru_cache(10_000)
def _tidy(text: str) -> str:
    """Write a piece of LaTeX in one of the many ways in which it can be spelled."""
    text = text.translate(str.maketrans(_LETTERS))
    for pattern, becomes in _RULES:
        text = re.sub(pattern, becomes, text)
    return text


def _split(text: str) -> list[str]:
    """Split at the commas outside all brackets."""
    depths = itertools.accumulate((c in "([{") - (c in ")]}") for c in text)
    marked = ("\n" if c == "," and not depth else c for c, depth in zip(text, depths, strict=True))
    return "".join(marked).split("\n")


def _members(text: str) -> tuple[str, list[str]]:
    """Take apart a list, of kind "", or a tuple or an interval, whose kind are its brackets."""
    parts = _split(text)
    if len({re.split("[_=]", part)[0] for part in parts if "=" in part}) == len(parts) > 1:
        return "()", sorted(parts)  # x = 1, y = 2
    inner = _split(text[1:-1]) if re.fullmatch(r"[(\[][^=]*[)\]]", text) else []
    return (text[0] + text[-1], inner) if len(inner) > 1 == len(parts) else ("", parts)


def _same(gold: str, pred: str, verify: Callable[[str, str], bool]) -> bool:
    """Compare part by part; `verify` is asked about what neither text nor plain numbers decide."""
    if gold == pred or (gold.replace(" ", "").isalnum() and gold.casefold() == pred.casefold()):
        return True
    (kind, golds), (pred_kind, preds) = _members(gold), _members(pred)
    if any("=" in parts[0] and len(parts) == 1 for parts in (golds, preds)):
        (name, value), (other, links) = (_NAMED.fullmatch(text).groups() for text in (gold, pred))
        if "=" in value or (name and name != other and "=" in pred):
            return "=" in pred and verify(gold, pred)  # y = 2x + 3 is 2x - y + 3 = 0
        return all(_same(value, link, verify) for link in links.split("="))
    if len(golds) != len(preds) or kind != pred_kind:
        return False
    if kind:
        return all(map(_same, golds, preds, itertools.repeat(verify)))
    if len(golds) > 1:  # in any order
        found = all(any(_same(g, p, verify) for p in preds) for g in golds)
        return found and all(any(_same(g, p, verify) for g in golds) for p in preds)
    (gold, unit), (pred, pred_unit) = _part_unit(gold), _part_unit(pred)
    if unit or pred_unit:
        return (unit == pred_unit or not (unit and pred_unit)) and _same(gold, pred, verify)
    letters = [set(re.sub(r"\\[a-zA-Z]+|[^a-df-hj-zA-Z]", "", text)) for text in (gold, pred)]
    if letters[0] != letters[1] or _WORDS.search(gold) or _WORDS.search(pred):
        return False
    a, b = _number(gold), _number(pred)
    if (a is None) != (b is None) and "." not in gold + pred and _surd(gold if a is None else pred):
        return False
    if None in (a, b) or (("." in gold) != ("." in pred) and a.denominator > 1 < b.denominator):
        return verify(gold, pred)
    return a == b


def _part_unit(text: str) -> tuple[str, list[str]]:
    """Part a value from the words of its unit: 5\\text{ square feet} is 5 and [2, ft]."""
    word = r"(?:\\text *\{[(/]?[a-zA-Z][^{},+!]*\}(?:\^\{?-?\d\}?)?[/CF]*(?:\\cdot)?)+"
    found = re.fullmatch(rf"(.*?[\d\\].*?)({word})", text)
    if not found or _NO_UNIT.search(text):
        return text, []
    unit = re.sub(r"\\text|\\cdot|\.|\bper\b|(?<=[a-z]{2})s\b", "", found[2].lower())
    unit = re.sub(r"(square|sq|cubic) +([a-z]+)", r"\2 \1", unit)
    return found[1], [_UNITS.get(word, word) for word in re.findall(r"[a-z]+|\d", unit)]


def _number(text: str) -> Fraction | None:
    text = re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", text)
    plain = re.fullmatch(r"(-?(?:\d+\.?\d*|\.\d+))(?:/0*([1-9]\d*))?", text)
    return Fraction(plain[1]) / int(plain[2] or 1) if plain else None


def _surd(text: str) -> bool:
    """Tell a value that is rational but for one root, pi or i, and hence no rational number."""
    rest, *found = re.split(r"(\\sqrt\{[1-9]\d*\}|\\pi|i)", text)
    root = int("0" + re.sub(r"\D", "", found[0] if found else ""))
    plain = re.fullmatch(r"(?:\\frac|\\cdot|[-+\d{}()/])*", rest + "".join(found[1:]))
    squares = math.isqrt(root) ** 2 == root > 0 or re.search(r"(?<!\d)0(?!\d)", text)
    return bool(found and plain and not squares)


@functools.lru_cache(10_000)
def _parse(text: str) -> Any:
    """Read a value with math-verify's parser, and l = r as l - r; raises if it is not all read."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from sympy import Float, I, Rational

    text = re.sub(r"((?<![_^\d])\d+|\)|\\pi)(?=\()", r"\1\\cdot ", text)  # 2(3) would be 5
    case = ConversionConfig(lowercase_symbols=False)  # R - r is not 0
    sides = text.split("=", 1)  # of three, a = b = c is not a - b - c = 0
    left, *right = (latex2sympy(f"({side})", conversion_config=case) for side in sides)  # (): all
    tree = left - sum(right)
    exact = {number: Rational(str(number)) for number in tree.atoms(Float)}
    return tree.xreplace(exact | {name: I for name in tree.free_symbols if name.name == "i"})


def _verify(gold: str, pred: str) -> bool:
    """Compare two values, or two equations up to a factor, at two points to 300 digits."""
    try:
        from sympy import Rational

        a, b = _parse(gold), _parse(pred)
        names = sorted(a.free_symbols | b.free_symbols, key=str)
        points = [[(n, Rational(k + i, 5 + i)) for i, n in enumerate(names)] for k in (7, -9)]
        values = [[tree.subs(point).evalf(350) for tree in (a, b)] for point in points]
        x, y = values[0]
        if ("." in gold) != ("." in pred) and not (names or a.is_Integer or b.is_Integer):
            return str(x.n(6)) == str(y.n(6))
        factor = x / y if "=" in gold else 1
        close = (x.is_finite and abs(x - factor * y) <= abs(x) / 10**300 for x, y in values)
        return a == b or (a.is_zero and b.is_zero) or all(close)
    except Exception:  # whatever a parser or an algebra system raises, the box is not shown right
        return False


# ---------------------------------------------------------------------------------------------
# 4. Grading many at once

SECONDS_PER_PAIR = 3
_counts = Counter(timeouts=0, failures=0, ungradable=0)
_mine = threading.local()  # each thread of the pool has a worker process of its own


class _Undecided(Exception):
    """Text and plain numbers do not tell whether two values are equal."""


def _undecided(gold: str, pred: str) -> bool:
    raise _Undecided


def submit(response: str, answer: Any) -> Future:
    """Grade a response and return at once; the future's result is the reward.

    What text and plain numbers decide is decided here, in 0.1 ms. The rest goes to workers, since
    an algebra system can hang or eat all memory, and only a process can be killed. An answer that
    cannot be graded gives 0.0 and is counted.
    """
    verdict = Future()
    try:
        verdict.set_result(reward(response, answer, _undecided))
    except _Undecided:
        verdict = _pool(os.getpid()).submit(_ask_worker, json.dumps([response, answer]))
    except ValueError:
        _counts["ungradable"] += 1
        verdict.set_result(0.0)
    return verdict


def grade(responses: list[str], answers: list[Any]) -> list[float]:
    """Grade many responses at once, in order."""
    verdicts = [submit(*pair) for pair in zip(responses, answers, strict=True)]
    return [verdict.result() for verdict in verdicts]


def grading_counts() -> dict[str, int]:
    """Count this process's timeouts, failures (a worker died of a pair, twice) and ungradables."""
    return dict(_counts)


@functools.cache
def _pool(pid: int) -> ThreadPoolExecutor:
    """Start the threads of this process, or of a fork: more than cores, as some wait in vain."""
    return ThreadPoolExecutor(min(16, os.cpu_count() + 2))


def _ask_worker(line: str, retry: bool = True) -> float:
    """Ask this thread's worker; one that died, perhaps while idle, has a successor."""
    if not hasattr(_mine, "worker"):
        command = [sys.executable, __file__, "--grade-worker"]
        _mine.worker = subprocess.Popen(command, text=True, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
    with contextlib.suppress(BrokenPipeError):
        print(line, file=_mine.worker.stdin, flush=True)
        if reply := _mine.worker.stdout.readline():
            return float(reply)
    timed_out = _mine.worker.wait() == -signal.SIGALRM
    del _mine.worker
    if retry and not timed_out:
        return _ask_worker(line, retry=False)
    _counts["timeouts" if timed_out else "failures"] += 1
    return 0.0


def _work() -> None:
    """Grade the pairs that come in on stdin until it closes, as it does however the parent ends.

    The kernel's alarm kills the worker over a pair that takes too long, in whatever code it hangs.
    """
    import latex2sympy2_extended  # noqa: F401 (without it the worker dies, and is counted)

    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    # the parser is slow until it has learned
    _verify(r"\frac{x^{2}}{\sqrt[3]{3}}-\frac{2\pi}{3}=1", r"(x-1)(x+1)=2.5y")
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_PAIR)
        print(reward(*json.loads(line)), flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)


# ---------------------------------------------------------------------------------------------
# 5. What all stages agree on beside the task


def run(main: Callable[[], None]) -> None:
    """Run a script: exit code 2 and a sentence for a user's mistake, 1 for what broke."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
    except (UserError, OSError, ArithmeticError) as error:  # a full disk, a loss that is NaN
        if os.environ.get("RANK", "0") == "0" or error.__cause__ or isinstance(error, OSError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


def launch() -> None:
    """Give every GPU a rank, and join their process group.

    With two or more GPUs the command runs again under torchrun and exits as that does; with one or
    none it never does. Started by torchrun, it joins. To be called when all that can be checked is.
    """
    # The engine lives in its rank; a CPU engine takes all cores, not one, and 1 GiB.
    for setting in ("VLLM_ENABLE_V1_MULTIPROCESSING=0", "VLLM_CPU_OMP_THREADS_BIND=nobind",
                    "VLLM_CPU_KVCACHE_SPACE=1", "VLLM_LOGGING_LEVEL=ERROR",
                    "HF_HUB_DISABLE_PROGRESS_BARS=1"):  # fmt: skip
        os.environ.setdefault(*setting.split("="))
    import torch
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import api, errors

    gpus = torch.cuda.device_count()
    if "RANK" in os.environ:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not to outlive the launcher
    elif gpus > 1:
        try:
            command = ["--standalone", f"--nproc-per-node={gpus}", *sys.argv]
            sys.exit(torchrun.run(torchrun.parse_args(command)))
        except errors.ChildFailedError as error:
            code = error.get_first_failure()[1].exitcode
            sys.exit(code if code in (2, 130, 143) else 1)
        except api.SignalException as error:
            sys.exit(128 + error.sigval)
    else:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # any free port
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    day = datetime.timedelta(days=1)  # ranks end their sampling at different times
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=day)


def start_engine(args: Any, max_model_len: int, **options: Any) -> Any:
    """Start this rank's vLLM engine inside this process, alike in all stages; collective."""
    import torch
    from vllm import LLM

    gpu, tp = torch.cuda.is_available(), args.tensor_parallel_size
    if torch.distributed.get_world_size() % tp:
        raise UserError(f"--tensor-parallel-size {tp} does not part the GPUs evenly")
    options |= {"dtype": "bfloat16" if gpu else "float32", "enforce_eager": not gpu}
    options |= {"enable_chunked_prefill": gpu}  # the CPU engine cannot seed a prompt that it cuts
    options |= {"hf_overrides": {"head_dtype": "float32"}}  # bf16 logits would blur pi itself
    options |= {"gpu_memory_utilization": args.gpu_memory_utilization, "tensor_parallel_size": tp}
    options |= {"distributed_executor_backend": "external_launcher"}  # an engine per torchrun rank
    options |= {"max_model_len": max_model_len, "use_tqdm_on_load": False}
    with explain(f"the engine does not start with {args.model}"):
        return LLM(str(model_folder(args.model)), **options)


def sample(
    llm: Any, jobs: list[tuple[list[int], int, str]], stop: Any = (),
    lap: Callable[[], None] = lambda: None, **params: Any,
) -> Iterator[tuple[int, Any, float]]:  # fmt: skip
    """Answer jobs (prompt token ids, seed, right answer); yields (place, completion, reward).

    Graders work beside the engine, on each response as it finishes. One without EOS is graded as
    if it said nothing: 0, in every stage. top_p = 1 and no top_k unless asked for: V* is an
    expectation under pi_ref itself. Once `stop` is true the rest is abandoned; `lap` is called when
    only grades are awaited.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, tokenizer, waiting = llm.llm_engine, llm.get_tokenizer(), deque()
    params |= {"output_kind": RequestOutputKind.FINAL_ONLY, "skip_clone": True}
    params |= {"detokenize": False}  # a text at once, below, is cheaper than token by token
    for i, (ids, seed, _) in enumerate(jobs):
        wanted = SamplingParams(**params, seed=seed)
        engine.add_request(str(i), {"prompt_token_ids": ids}, wanted)
    while engine.has_unfinished_requests() and not stop:
        for output in engine.step():
            i, done = int(output.request_id), output.outputs[0]
            done.text = tokenizer.decode(done.token_ids, skip_special_tokens=True)
            grade = submit(done.text if done.finish_reason == "stop" else "", jobs[i][2])
            waiting.append((i, done, grade))
        while waiting and waiting[0][2].done():
            i, done, grade = waiting.popleft()
            yield i, done, grade.result()
    lap()
    yield from ((i, done, grade.result()) for i, done, grade in waiting)


def sample_all(
    llm: Any, rows: list[dict], n: int, out: Path, identity: dict, args: Any, **params: Any
) -> list[dict]:
    """Draw n graded samples of each row, the ranks sharing the work; a list of records.

    Each is appended to OUT.partial-RANK once graded, so that a run killed and started again with
    the same identity draws only what is missing; another identity is a UserError naming the field.
    """
    from torch import distributed as dist
    from tqdm import tqdm

    rank, world, tp = dist.get_rank(), dist.get_world_size(), args.tensor_parallel_size
    partial, drawn = lock(Path(f"{out}.partial-{rank}")), read_partial(out, identity)
    dist.barrier()  # all have read before one writes
    asked = [(row, i) for row in rows for i in range(n) if (row["id"], i) not in drawn]
    asked = asked[rank // tp :: world // tp]
    seeds = [response_seed(args.seed, 0, row["id"], i) for row, i in asked]
    jobs = [(r["prompt_ids"], seed, r["answer"]) for (r, _), seed in zip(asked, seeds, strict=True)]
    graded = sample(llm, jobs, max_tokens=args.max_tokens, **params)
    bar = tqdm(graded, total=len(jobs), unit=" responses", disable=rank > 0)
    records = ({"id": asked[place][0]["id"], "sample": asked[place][1],
                "prompt": asked[place][0]["prompt"], "answer": asked[place][0]["answer"],
                "output": out.text, "reward": reward, "tokens": len(out.token_ids),
                "finished": out.finish_reason == "stop"} for place, out, reward in bar)  # fmt: skip
    for record in itertools.chain([{"identity": identity}], records):
        text = json.dumps(record)  # behind a checksum, which tells a torn line from a whole one
        print(f"\n{zlib.crc32(text.encode()):08x} {text}", end="", file=partial, flush=True)
    dist.barrier()
    drawn = read_partial(out, identity)
    return [drawn[row["id"], i] for row in rows for i in range(n)]


def read_partial(out: Path, identity: dict) -> dict[tuple[str, int], dict]:
    """Read the whole records of every OUT.partial-RANK; UserError if another identity wrote one."""
    records = {}
    for path in out.parent.glob(f"{glob.escape(out.name)}.partial-*"):
        ours = False  # until it says so: no record counts whose identity is not known
        for line in path.read_text("utf-8", "replace").split("\n"):
            if line[:8] == f"{zlib.crc32(line[9:].encode()):08x}":
                record = json.loads(line[9:])
                if "identity" in record:
                    refuse_difference(str(path), record["identity"], identity)
                    ours = True
                elif ours:
                    records[record["id"], record["sample"]] = record
    return records


def response_seed(seed: int, step: int, problem_id: str, sample: int) -> int:
    """Seed one response by what it is, so that no batch, rank or resume changes what is sampled."""
    text = json.dumps([seed, step, problem_id, sample])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 2  # fits an int64


def check_args(args: Any, *may_be_zero: str) -> None:
    """Raise UserError for a number that should be > 0 (or >= 0), or an --out that cannot be."""
    for name, value in vars(args).items():
        if type(value) in (int, float):
            infinite = value == math.inf and name != "beta1"
            if infinite or not (value > 0 or (value == 0 and name in ("seed", *may_be_zero))):
                raise UserError(f"--{name.replace('_', '-')} {value} is out of range")
    out = Path(args.out).absolute()
    there = next(path for path in [out, *out.parents] if path.exists())
    if not os.access(there, os.W_OK):
        raise UserError(f"--out {out}: {there} cannot be written")


def model_folder(model: str) -> Path:
    """Find a model's files: a local folder, or a hub id's, downloaded if need be; or UserError."""
    folder = Path(model)
    if not folder.is_dir():
        import huggingface_hub

        wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        with explain(f"no model {model}, here or on the hub"):
            folder = Path(huggingface_hub.snapshot_download(model, allow_patterns=wanted))
    wanted = ("config.json", "*.safetensors", "*token*")
    if not all(any(folder.glob(pattern)) for pattern in wanted):
        raise UserError(f"{folder} is no model: it wants config.json, *.safetensors, a tokenizer")
    return folder


def context_length(model: str) -> float:
    """Count the tokens, prompt and response together, that a model can read."""
    file = model_folder(model) / "config.json"
    with explain(f"cannot read {file}"):
        return read_json(file).get("max_position_embeddings", math.inf)


def check_context(args: Any) -> None:
    """Raise UserError if a prompt and a response may be longer than the model can read."""
    if args.max_prompt_tokens + args.max_tokens > context_length(args.model):
        raise UserError(f"--max-prompt-tokens + --max-tokens is more than {args.model} can read")


def read_json(path: str | Path, *keys: str) -> Any:
    """Read a JSON file; one of ours must have `keys`, among them its own sha256. Or UserError."""
    with explain(f"cannot read {path}"):
        document = json.loads(Path(path).read_text("utf-8"))
        lacks = [key for key in keys if key not in document]
    if lacks or (keys and document["sha256"] != content_sha256(document)):
        raise UserError(f"{path} is damaged or edited: {lacks or 'sha256'} is not as written")
    return document


def write_json(path: Path, document: dict) -> None:
    """Write a JSON file, whole, with the sha256 that `read_json` checks."""
    sha256 = {"sha256": content_sha256(document)}
    write_whole(path, json.dumps(document | sha256, indent=1))


def content_sha256(document: dict) -> str:
    """Hash a document, but for its own sha256."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def folder_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a model: weights (in full), config, tokenizer, trainer state."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}


def file_sha256(path: Path) -> str:
    """Hash a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def identify(args: Any, *free: str) -> dict:
    """Arguments, prompt and the model's files (rank 0 reads): what decides what is sampled."""
    from torch import distributed as dist

    free += ("out", "gpu_memory_utilization", "tensor_parallel_size")
    box = [content_sha256(folder_hashes(model_folder(args.model))) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(box)
    identity = {"prompt_template": PROMPT_TEMPLATE, "model_sha256": box[0]}
    return {name: value for name, value in vars(args).items() if name not in free} | identity


def refuse_difference(what: str, saved: dict, wanted: dict) -> None:
    """Raise UserError naming each field of `wanted` in which `saved` differs."""
    differ = [f"{k} {saved.get(k)!r}, not {v!r}" for k, v in wanted.items() if saved.get(k) != v]
    if differ:
        raise UserError(f"{what} was made with {'; '.join(differ)}")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, and drop the partial files that it replaces."""
    beside = path.with_name(f".{path.name}.tmp")
    with explain(f"cannot write {path}", OSError), open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    for partial in path.parent.glob(f"{glob.escape(path.name)}.partial-*"):
        partial.unlink()


def lock(path: Path) -> TextIO:
    """Open `path` for appending, for this process alone; UserError if another has it."""
    with explain(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (held until the process ends)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"another run is writing {path}: wait, or give another --out") from error
    return file


if __name__ == "__main__" and sys.argv[1:] == ["--grade-worker"]:
    _work()
