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
import logging
import math
import os
import queue
import re
import resource
import signal
import subprocess
import sys
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from fractions import Fraction
from pathlib import Path
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

    `verify` compares two values where text and plain numbers do not decide; by default math-verify.
    """
    gold = check_answer(answer)
    box = last_box(response.rpartition("</think>")[2].partition("<think>")[0])
    if box is None or len(box) > 1000 or len(gold) > 1000 or _NESTED.search(box):
        return float(box == gold)  # no right answer is so long, and all that follows is fast
    return float(_same(_tidy(gold), _tidy(box), verify or _verify))


def check_answer(answer: Any) -> str:
    """Return an answer as text; ValueError says why it cannot be graded."""
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise ValueError(f"neither a string nor a number but {answer!r:.60}")
    text = last_box(str(answer)) or str(answer)
    if not text.strip(" \t\r\n$.") or text in ("nan", "inf", "-inf"):
        raise ValueError(f"nothing to compare in {answer!r:.60}")
    if last_box(rf"\boxed{{{text}}}") != text:
        raise ValueError(f"unbalanced braces in {answer!r:.60}")
    return text


def last_box(text: str) -> str | None:
    """Cut out what the last balanced \\boxed{} or \\fbox{} holds, in one pass; None if none is."""
    opened, last, first = [], None, re.search(r"\\(?:boxed|fbox)", text)
    token_pattern = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
    for token in token_pattern.finditer(text, first.start()) if first else ():
        if token[0] == "}" and opened:
            opener = opened.pop()
            if len(opener[0]) > 1 and (last is None or opener.end() > last[0]):
                last = opener.end(), token.start()
        elif token[0][-1] == "{" and token[0] != r"\{":
            opened.append(token)
    return text[slice(*last)] if last else None


_LETTERS = {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "⁄": "/", "π": r"\pi "}
_LETTERS |= {"∞": r"\infty ", "∪": r"\cup", "²": "^2", "³": "^3", "½": r"\frac12", "°": r"^\circ "}
_NESTED = re.compile(r"(?:[({[] *){10}|(?:[({[][^({[]*){100}")


def _no_commas(found: re.Match) -> str:
    return found[0].replace(",", "")


_BREAK = r"\\"
_BARE = r"[a-zA-Z]{4,}|[ckm]m|kg|ft|in|mph|m/s|[aApP]\.?[mM]\.?"  # units, where x is none
_RULES = [  # in this order, each with the case that demands it
    (re.compile(pattern), becomes)
    for pattern, becomes in [
        (r"√ *(\d*)", lambda m: rf"\sqrt{{{m[1]}}}" if m[1] else r"\sqrt "),  # √10, √(x+1)
        (r"\\(left|right|[bB]igg?[lr]?|displaystyle)(?![a-zA-Z])\.?|\\!", ""),  # \left( 1
        (r"\\((math|text)(rm|bf|it|sf|normal)|mbox|operatorname)(?![a-z])", r"\\text"),
        (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-z])|\s+", " "),  # 1\,234
        (r"\\text *\{ *([ei]|[\dA-Z]*\d[\dA-Z]*) *\}", r"\1"),  # 5\mathrm{i} has no unit
        (r"\{,\}", ","),  # 24{,}000
        (r"\\leq?(slant)?(?![a-z])|≤", "<="),
        (r"\\geq?(slant)?(?![a-z])|≥", ">="),
        (r"\\([lr])angle(?![a-z])", lambda m: "()"[m[1] == "r"]),  # \langle 1, 2 \rangle
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\frac *(\d|[a-z]|\\[a-z]+)", r"\\frac{\1}"),  # \frac12
        (r"(\\frac\{[^{}]*\}) *(\d|[a-z])", r"\1{\2}"),  # \frac{3}4
        (r"(?<![\\a-zA-Z])(?=(sqrt|pi|sin|cos|tan|log|ln|infty)(?![a-zA-Z]))", r"\\"),  # 2pi
        (r"\\sqrt *(?:(\d|[a-z])|\(([^()]*)\))", r"\\sqrt{\1\2}"),  # \sqrt2, sqrt(3)
        (r"(?<=\d)[eE]\+?(-?\d+)", r"\\cdot 10^{\1}"),  # 4.5e33
        # 0.\overline{3}
        (r"(\d+)\.(\d*)\\overline *\{(\d+)\}", lambda m: f"{m[1]}.{m[2]}{m[3] * 12}"[:15]),
        (r"(\\text *\{ *)?(\\?%|\bper ?cent(age)?\b)( *\})?", r"\\text{%}"),
        (r"\^ *\{? *\\circ *\}?|\\degrees?(?![a-z])", r"\\text{degree}"),  # 60^{\circ}
        (r"(\\(?:sin|cos|tan)[ (]*)(\d+)\\text\{degree\}", r"\1(\2\\cdot\\frac{\\pi}{180})"),
        (r"\\\$ *([\d,.]*\d)", r"\1\\text{dollar}"),  # \$18.90
        (r"\\?\$|\\[()]", ""),
        (r"^\(?(-?[\dA-Z]*\d[\dA-Z]*)\)?_\{?(\d+)\}?$", r"\1\\text{base \2}"),  # 204_5
        (r",? *(\\text *\{ *,? *(and|or) *\}|\b(and|or)\b),?", ","),  # 1 \text{ and } -2
        (r"^ *\\text *\{([^{}]*)\}[ .,]*$", r"\1"),  # \text{(C)}, \text{12 or 13}
        # 5 square cm
        (rf"(?<=[\d}})]) *(({_BARE})( [a-zA-Z]+)*(\^\d)?)$", r"\\text{\1}"),
        (r"\\\{ *\w+ *(\\in *\\mathbb *\{R\} *)?(:|\\mid|\|)(.*)\\\}$", r"\3"),  # {x : 0 <= x <= 1}
        (r"^ *\w+ *\\in(?![a-z])", ""),  # x \in [0, 1]
        (r"\\approx", "="),  # x \approx 2.45
        (r"(^(?!\\\{)|,|\\\{)([^,]*?)\\pm([^,]*?)(?=,|\\\}|$)", r"\1\2+\3,\2-\3"),  # 1 \pm \sqrt{2}
        # a matrix is the tuple of its rows, a column that of its numbers
        (r"\\begin *\{array\} *\{[^{}]*\}", r"\\begin{matrix}"),
        (
            r"(^|=) *[(\[]? *\\begin *\{[pbB]?matrix\}((?:(?!\\begin).)*)\\end *\{\w+\} *[)\]]?$",
            lambda m: f"{m[1]}(({'),('.join(m[2].strip(_BREAK).split(_BREAK))}))".replace("&", ","),
        ),
        (r"(?<![\d.])(\d+) (\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),  # 4 2/3
        (r"(?<![\d.^])(\d+) *(\\frac *\{\d+\} *\{\d+\})(?! *([a-z(]|\\(?!text)))", r"(\1+\2)"),
        (r"(?<![\d.])\d{1,3}( \d{3})+(?!\d)", lambda m: m[0].replace(" ", "")),  # 1 234
        # 12,345, but (1,234) is a point
        (r"(?<![\d.,{])\d{1,3}(,\d{3})+(?![\d,])(?!.*([)\]]|\\}))", _no_commas),
        (r"^[ =+]+|( |[.,;:]|\\\\)*$", ""),
    ]
]
# A name may stand before "=": x, E_1, f(x), AB, (x, y), but not 2x.
_NAME = re.compile(r"(?=.*[a-zA-Z])(?:_\{?[a-zA-Z0-9]+|[^\d_])*+")
# Plurals and other spellings of units.
_UNITS = {r"(?<=[a-z]{2})s\b": "", r"\b(?:(c)enti|(k)ilo|(m)illi)?met(er|re)": r"\1\2\3m"}
_UNITS |= {"inche?": "in", "f(ee|oo)t": "ft", "usd": "dollar", "second": "s", "hour": "h"}
_UNITS |= {r"\b(square|sq) (\w+)": r"\2^2", r"\bcubic (\w+)": r"\1^3"}
_UNITS |= {r" *(\bper\b|/) *": "/", r" *\^ *": "^"}
# No units, and nothing for math-verify, which reads words as products of letters and 1:58 as 1/58.
_WORDS = re.compile(r"\\text|(?<![\\a-zA-Z{])[a-zA-Z]{4,}|^[A-Z]{2,}$|[A-Z]\d|:")
_NO_UNIT = re.compile(r"\b(?:not|least|most|than|about|hundred|thousand|million|billion|dozen)\b")


def _tidy(text: str) -> str:
    """Write a piece of LaTeX in one of the many ways in which it can be spelled."""
    text = text.translate(str.maketrans(_LETTERS))
    for pattern, becomes in _RULES:
        text = pattern.sub(becomes, text)
    return text


def _squash(text: str) -> str:
    text = re.sub(r"\\text *\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<!\d) +| +(?!\d)", "", text)  # 1 1/2 is not 11/2
    text = re.sub(r"^\(([^(),]*)\)$", r"\1", text)  # (C)
    return text if "\\" in text else text.casefold()


def _split(text: str, separator: str) -> list[str]:
    """Split at what stands outside all brackets; the separators are at the odd places."""
    parts, depth, start = [], 0, 0
    for token in re.finditer(rf"(?P<cut>{separator})|\\?[({{\[]|\\?[)}}\]]", text):
        if token["cut"] is None:
            depth += 1 if token[0][-1] in "({[" else -1
        elif depth == 0:
            parts += [text[start : token.start()].strip(), token[0]]
            start = token.end()
    return [*parts, text[start:].strip()]


def _same(gold: str, pred: str, verify: Callable[[str, str], bool]) -> bool:
    """Compare part by part; `verify` is asked about what neither text nor plain numbers decide."""
    gold, pred = _interval(gold), _interval(pred)
    if _squash(gold) == _squash(pred):
        return True
    (kind, golds), (pred_kind, preds) = _members(gold), _members(pred)
    if "=" in (kind, pred_kind):
        golds, preds = golds if kind == "=" else [gold], preds if pred_kind == "=" else [pred]
        names = [
            _squash(links.pop(0)) if len(links) > 1 and _NAME.fullmatch(links[0]) else ""
            for links in (golds, preds)
        ]
        if len(golds) > 1 or (kind == pred_kind and names[0] not in ("", names[1])):
            return kind == pred_kind and verify(gold, pred)  # y = 2x + 3 is 2x - y + 3 = 0
        return all(_same(golds[0], link, verify) for link in preds)
    if kind == pred_kind == "":
        return _same_value(gold, pred, verify)
    if len(golds) != len(preds) or (kind != pred_kind and {kind, pred_kind} != {"", ","}):
        return False
    if kind not in (",", "U", ""):
        return all(map(_same, golds, preds, [verify] * len(golds)))
    for gold in golds:  # in any order
        match = next((pred for pred in preds if _same(gold, pred, verify)), None)
        if match is None:
            return False
        preds.remove(match)
    return True


def _interval(text: str) -> str:
    """Write an inequality for one name as its interval, x < 2 as (-oo, 2)."""
    parts = _split(text, "[<>]=?|,")
    if len(parts) > 1 and ">" in parts[1]:
        parts = [part.replace(">", "<") for part in parts[::-1]]
    if len(parts) == 3:
        parts = [r"-\infty", "<", *parts] if _NAME.fullmatch(parts[0]) else [*parts, "<", r"\infty"]
    if len(parts) != 5 or not ("<" in parts[1] and "<" in parts[3] and _NAME.fullmatch(parts[2])):
        return text
    return f"{'(['['=' in parts[1]]}{parts[0]},{parts[4]}{')]'['=' in parts[3]]}"


def _members(text: str) -> tuple[str, list[str]]:
    """Take apart what is composed: its kind and its members.

    The kind is "," for a list or set, "U" for a union, "=" for a chain, the brackets of a tuple or
    an interval, and "" for a single value.
    """
    parts = [part for part in _split(text, "[,;]")[::2] if part]
    if len(parts) > 1:
        names = {part.partition("=")[0] for part in parts if "=" in part}
        if len(names) == len(parts):
            return "()", sorted(parts)  # x = 1, y = 2
        one_of = all(re.search("[<>]", part) for part in parts)  # x < 2 or x > 3
        return "U" if one_of else ",", parts
    for kind, separator in (("U", r"\\cup(?![a-z])"), ("=", "(?<![<>!])=")):
        parts = _split(text, separator)[::2]
        if len(parts) > 1:
            return kind, parts
    found = re.fullmatch(r"(\\\{|[(\[])(.*)(\\\}|[)\]])", text)
    if found and len(_split(text, r"(?<=[)\]}])(?=.)")) == 1:
        parts = _split(found[2], "[,;]")[::2]
        if len(parts) > 1 or found[1] == r"\{":
            return "," if found[1] == r"\{" else found[1] + found[3], parts
    return "", [text]


def _same_value(gold: str, pred: str, verify: Callable[[str, str], bool]) -> bool:
    (gold, gold_unit), (pred, pred_unit) = _part_unit(gold), _part_unit(pred)
    gold_words, pred_words = gold_unit - {"%"}, pred_unit - {"%"}
    if gold_words and pred_words and not (gold_words <= pred_words or pred_words <= gold_words):
        return False
    if "%" in gold_unit - pred_unit and _same_value(rf"\frac{{{gold}}}{{100}}", pred, verify):
        return True
    if "%" in pred_unit - gold_unit and _same_value(gold, rf"\frac{{{pred}}}{{100}}", verify):
        return True
    if _squash(gold) == _squash(pred):
        return True
    if _WORDS.search(gold) or _WORDS.search(pred):
        return False
    values = _number(gold), _number(pred)
    if None not in values and (
        ("." in gold) == ("." in pred) or 1 in [value.denominator for value in values]
    ):
        return values[0] == values[1]
    return verify(gold, pred)


def _part_unit(text: str) -> tuple[str, set[str]]:
    """Part a value from the words of its unit: 5\\text{ square feet} is 5 and {ft^2}."""
    word = r"\\text *\{[^{}]+\}(?:\^\{?-?\d\}?)?[ /CF]*(?:\\cdot *)?"
    found = re.fullmatch(rf"(.*?[\d\\].*?) *((?:{word})+)", text)
    if not found or _NO_UNIT.search(text):
        return text, set()
    unit = re.sub(r"\\text|\\cdot|[{} ]+", " ", found[2].lower().replace(".", ""))
    for pattern, short in _UNITS.items():
        unit = re.sub(pattern, short, unit)
    return found[1], set(unit.split())


def _number(text: str) -> Fraction | None:
    text = re.sub(r"^(-?) *\\frac *\{(\d+)\} *\{(\d+)\}$", r"\1\2/\3", text)
    plain = re.fullmatch(r"-?(?:\d+\.?\d*|\.\d+|\d+/0*[1-9]\d*)", text)
    return Fraction(text) if plain else None


@functools.lru_cache(maxsize=1000)
def _parse(text: str) -> Any:
    """Read a value with math-verify; raises unless it is read to its end and can be computed."""
    from math_verify import LatexExtractionConfig, parse
    from sympy import Float, I, Rational, Symbol

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that it keeps no time
    if re.search(r"\\binom\D*\d{6}|(?<![_^\d])\d+ \d", text):
        raise ValueError(text)  # computed at once; read as a sum
    text = re.sub(r"((?<![_^\d])\d+|\)|\\pi) *(?=\()", r"\1\\cdot ", text)  # 2(3) would be 5
    # in brackets, each side is read to its end or not at all
    sides = _split(text, "(?<![<>!])=|[<>]=?")
    sides[::2] = [f"({side})" for side in sides[::2]]
    config = LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0)
    box = rf"\boxed{{{''.join(sides)}}}"
    [tree] = parse(box, [config], fallback_mode="no_fallback", parsing_timeout=None)
    _size(tree)
    new = {old: Symbol(old.name, real=True) if old.name != "i" else I for old in tree.free_symbols}
    return tree.xreplace(new | {number: Rational(str(number)) for number in tree.atoms(Float)})


def _size(tree: Any) -> float:
    """Bound the digits of a number before it is computed; OverflowError for 9^{9^{9^9}}."""
    if not tree.args:
        return math.log10(abs(int(tree)) + 2) if tree.is_Number and tree.is_finite else 0.5
    sizes = [_size(part) for part in tree.args]
    size = sum(sizes)
    if tree.is_Pow or type(tree).__name__ in ("exp", "factorial"):
        size += sizes[0] * 10 ** sizes[-1]
    if size > 50_000:
        raise OverflowError("too large to compute")
    return size


def _verify(gold: str, pred: str) -> bool:
    """Compare numbers to 25 digits; the rest with math-verify, and at a point to 25 digits."""
    try:
        from math_verify import verify
        from sympy import Expr, Rational

        trees = _parse(gold), _parse(pred)
        names = sorted(trees[0].free_symbols, key=str)
        if trees[0].free_symbols != trees[1].free_symbols:
            return False
        has_values = all(isinstance(tree, Expr) for tree in trees)
        if (names or not has_values) and not verify(*trees, timeout_seconds=None):
            return False
        if not has_values:
            return True
        point = {name: Rational(7 + 4 * i, 5 + 2 * i) for i, name in enumerate(names)}
        a, b = (tree.subs(point).evalf(30) for tree in trees)
        if not (a.is_number and b.is_number and a.is_finite and b.is_finite):
            return bool(names) or trees[0] == trees[1]
        if ("." in gold) != ("." in pred) and not any(tree.is_Integer for tree in trees):
            return str(a.n(6)) == str(b.n(6))
        difference = (trees[0] - trees[1]).subs(point).doit()
        if difference.is_Rational:
            return difference == 0  # 2^{100} + 1 is not 2^{100}
        return bool(abs(a - b) <= abs(a) * Rational(1, 10**25))
    except Exception:  # whatever a parser or an algebra system raises, the box is not shown right
        return False


# ---------------------------------------------------------------------------------------------
# 4. Grading many at once

SECONDS_PER_PAIR = 3
_counts = Counter(timeouts=0, failures=0, ungradable=0)


class _Undecided(Exception):
    """Text and plain numbers do not tell whether two values are equal."""


def _undecided(gold: str, pred: str) -> bool:
    raise _Undecided


def submit(response: str, answer: Any) -> Future:
    """Grade a response and return at once; the future's result is the reward.

    What text and plain numbers decide is decided here, in 0.2 ms. The rest goes to workers, since
    math-verify can hang or eat all memory, and only a process can be killed. An answer that cannot
    be graded gives 0.0 and is counted.
    """
    verdict = Future()
    try:
        verdict.set_result(reward(response, answer, _undecided))
    except _Undecided:
        _pool(os.getpid()).put((verdict, json.dumps([response, answer]).encode() + b"\n"))
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
def _pool(pid: int) -> queue.SimpleQueue:
    """Start this process's threads, one a worker; more than cores, as some wait for what hangs."""
    tasks = queue.SimpleQueue()
    for _ in range(min(16, os.cpu_count() + 2)):
        threading.Thread(target=_drive_worker, args=(tasks,), daemon=True).start()
    return tasks


def _drive_worker(tasks: queue.SimpleQueue) -> None:
    command = [sys.executable, os.path.abspath(__file__), "--grade-worker"]
    worker = None
    while True:
        verdict, line = tasks.get()
        for ending in ("", "failures"):  # a worker that died, perhaps while idle, has one successor
            worker = worker or subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-3)
            try:
                worker.stdin.write(line)
                worker.stdin.flush()
                reply = worker.stdout.readline()
            except BrokenPipeError:
                reply = b""
            if reply:
                break
            ending = "timeouts" if worker.wait() == -signal.SIGALRM else ending
            worker = None
            if ending:
                _counts[ending] += 1
                break
        verdict.set_result(float(reply or 0))


def _work() -> None:
    """Grade the pairs that come in on stdin until it closes, as it does however the parent ends.

    The kernel's alarm kills the worker over a pair that takes too long, in whatever code it hangs.
    """
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    _verify(
        r"\frac{x^{2}}{\sqrt{3}}=1", r"(x-1)(x+1)=2y"
    )  # the parser is slow until it has learned
    _verify(r"\sqrt[3]{x}-1.5\cdot 2!", r"\frac{2\pi}{3}+x^{2}")
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
        if os.environ.get("RANK", "0") == "0" or isinstance(error, OSError):
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

    engine, waiting = llm.llm_engine, deque()
    params["output_kind"] = RequestOutputKind.FINAL_ONLY
    for i, (ids, seed, _) in enumerate(jobs):
        wanted = SamplingParams(**params, seed=seed)
        engine.add_request(str(i), {"prompt_token_ids": ids}, wanted)
    while engine.has_unfinished_requests() and not stop:
        for output in engine.step():
            i, done = int(output.request_id), output.outputs[0]
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

    def have() -> dict[tuple[str, int], dict]:
        records = {}
        for path in out.parent.glob(f"{glob.escape(out.name)}.partial-*"):
            for line in path.read_text("utf-8", "replace").split("\n"):
                if line[:8] == f"{zlib.crc32(line[9:].encode()):08x}":
                    record = json.loads(line[9:])
                    refuse_difference(str(path), record.get("identity", identity), identity)
                    records[record.get("id"), record.get("sample")] = record
        return records

    rank, world, tp = dist.get_rank(), dist.get_world_size(), args.tensor_parallel_size
    partial, drawn = lock(Path(f"{out}.partial-{rank}")), have()
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
    drawn = have()
    return [drawn[row["id"], i] for row in rows for i in range(n)]


def response_seed(seed: int, step: int, problem_id: str, sample: int) -> int:
    """Seed one response by what it is, so that no batch, rank or resume changes what is sampled."""
    text = json.dumps([seed, step, problem_id, sample])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 2  # fits an int64


def check_args(args: Any, *may_be_zero: str) -> None:
    """Raise UserError for a number that should be > 0 (or >= 0), or an --out that cannot be."""
    for name, value in vars(args).items():
        if type(value) in (int, float) and name != "seed":
            infinite = value == math.inf and name != "beta1"
            if infinite or not (value > 0 or (value == 0 and name in may_be_zero)):
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
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} is no model: it wants config.json and *.safetensors files")
    return folder


def context_length(model: str) -> float:
    """Count the tokens, prompt and response together, that a model can read."""
    return read_json(model_folder(model) / "config.json").get("max_position_embeddings", math.inf)


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
        raise UserError(
            f"{path} is damaged or edited: {lacks or 'sha256'} is not as it was written"
        )
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
    hashes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"):
        with open(path, "rb") as file:
            name = str(path.relative_to(folder))
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def identify(args: Any, *free: str) -> dict:
    """All that decides what is sampled: arguments, prompt, and the model's files (rank 0 reads)."""
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
