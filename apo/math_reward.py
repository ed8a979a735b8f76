"""The mathematical reward: is the answer in a response's last box equal to the reference answer?

What equal means (docs/grading.md gives the reasons):

    spelling      \\dfrac12 = 1/2 = {1 \\over 2}; 1,234 = 1234; \\text{Even} = even
    value         \\sqrt{8} = 2\\sqrt{2}; (x+1)^2 = x^2+2x+1; but 2^{2008} - 2 is not 2^{2008}
    decimal       0.333333 = 1/3: a decimal is right to all its digits, and to six at least
    percent       50\\% = 50 = 0.5
    unit          5\\text{ kg} = 5 kilograms = 5, but not 5 g; a base is a unit: 52_8 = 52
    name          x = 5 is 5, and so is 2 + 3 = 5; but x + y = 5 is an equation
    equation      y = 2x + 3 is 2x - y + 3 = 0: equal up to a factor
    list          1, 2 = \\{2, 1\\} = 2 or 1, in any order; but 1, 1, 2 is not 1, 2, 2
    tuple         (1, 2) = x=1, y=2 = a column vector: brackets and order count
    inequality    x > 2 = 2 < x = (2, \\infty)
    text          whatever else: the same words

A comparison is True, False or None: None means that only algebra can tell. Text and plain numbers
decide in the calling process. Algebra may hang or take all memory, so worker processes do it, and
the kernel kills one that needs too long. The calling process imports nothing heavy.
"""

import contextlib
import functools
import json
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
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from decimal import Decimal
from fractions import Fraction
from itertools import accumulate
from typing import Any

# Longer texts, and more deeply nested brackets, are only compared as they stand.
LONGEST = 500
DEEPEST = 10
# For the algebra of one pair. CPU time counts, so that a busy machine loses no answer. The limit
# of wall time stands behind it, should a worker sleep.
CPU_SECONDS = 3
WALL_SECONDS = 60
# Of this process. A failure is a pair of which two workers died, other than by these limits.
counts = {"timeouts": 0, "failures": 0, "ungradable": 0}
# What answers where text and plain numbers do not: in a worker `by_algebra`, elsewhere None.
Algebra = Callable[[str, str], bool | None]


def reward(response: str, answer: Any) -> float:
    """Return 1.0 if the last box equals the answer, else 0.0; ValueError if nothing could."""
    check_answer(answer)
    return submit(response, answer).result()


def grade(responses: list[str], answers: list[Any]) -> list[float]:
    """Grade many responses at once, in order; an answer that cannot be graded counts 0.0."""
    verdicts = [submit(*pair) for pair in zip(responses, answers, strict=True)]
    return [verdict.result() for verdict in verdicts]


def check_answer(answer: Any) -> str:
    """Return an answer as text; ValueError if it is neither text nor number, empty or broken."""
    text = last_box(str(answer)) or str(answer)
    is_empty = text.strip(" \t\r\n$.") in ("", "nan", "inf", "-inf")
    if type(answer) not in (str, int, float) or is_empty or last_box(f"\\boxed{{{text}}}") != text:
        raise ValueError(f"no text or number, empty, or unbalanced braces: {answer!r:.60}")
    return text


def last_box(text: str) -> str | None:
    """Return what the last balanced \\boxed{} or \\fbox{} holds, None if there is none."""
    opened = []  # where the content of each open brace starts; 0 if it is no box
    last = slice(0, 0)
    for token in re.finditer(r"(\\(?:boxed|fbox)\s*)?\{|\\.|\}", text, re.DOTALL):
        if token[0].endswith("{") and token[0] != r"\{":
            opened.append(token.end() if token[1] else 0)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start > last.start:
                last = slice(start, token.start())
    return text[last] if last.start else None


def decide(gold: str, box: str, algebra: Algebra) -> bool | None:
    """Compare two pieces of LaTeX; None where `algebra` gives no verdict."""
    if gold.strip() == box.strip():
        return True
    # ½ becomes nine characters, and some replacements take quadratic time.
    if max(len(gold.translate(LETTERS)), len(box.translate(LETTERS))) > LONGEST:
        return False
    gold, box = spell(gold), spell(box)
    if max(len(gold), len(box)) > 2 * LONGEST or max(levels(gold + box)) > DEEPEST:
        return False
    # A percent sign fits 50 and 0.5: both signs are dropped, or both are read.
    verdicts = []
    for percent in ("", "/100"):
        gold_value = re.sub(PERCENT, percent, gold)
        box_value = re.sub(PERCENT, percent, box)
        verdicts.append(compare(gold_value, box_value, algebra))
    if True in verdicts:
        return True
    return all_of(verdicts)


# Spelling: replacements that change no meaning ----------------------------------------------------

# A character, and what it is in LaTeX.
CHARACTERS = r"""
    − -   – -   × \times   · \cdot   ⋅ \cdot   ÷ /   √ \sqrt   π \pi   ∞ \infty   ° ^\circ   ， ,
    ² ^{2}   ³ ^{3}   ½ \frac12   ¼ \frac14   ¾ \frac34   ⅓ \frac13   ⅔ \frac23   ⁄ /   € \$   £ \$
    θ \theta   α \alpha   β \beta   γ \gamma   λ \lambda   μ \mu   φ \phi   ω \omega   Δ \Delta
    ∪ \cup   ∅ \emptyset   ∈ \in   ≠ \ne   ≈ \approx   … \ldots   ℝ \mathbb{R}   （ (   ） )   ： :
"""
# A command, and the one that this file uses for it.
COMMANDS = r"""
    \dfrac \frac   \tfrac \frac   \cfrac \frac   \dbinom \binom   \tbinom \binom   \$ $
    \lt <   \gt >   \le ≤   \leq ≤   \leqslant ≤   \ge ≥   \geq ≥   \geqslant ≥   \ne ≠   \neq ≠
    \infty ∞   \in =   \approx =   \cup ,   \{ {   \} }   \lbrace {   \rbrace }   \mid |   \% %
    \langle (   \rangle )   \lvert |   \rvert |   \vert |   \dots \ldots   \cdots \ldots
    \varphi \phi   \varepsilon \epsilon   \varnothing \emptyset   \degree ^\circ   \degrees ^\circ
    \pmod \mod   \bmod \mod   \setminus \backslash   \mathrm \text   \textbf \text   \textrm \text
    \textit \text   \textnormal \text   \mathsf \text   \mbox \text   \operatorname \text
    \div /   \nicefrac \frac
"""
DROPPED = r"""
    \left \right \big \Big \bigl \bigr \Bigl \Bigr \bigg \Bigg \displaystyle \textstyle \limits
    \mathbf \boldsymbol \bm \mathit \underline \! \( \)
"""
SPACES = [r"\quad", r"\qquad", r"\,", r"\;", r"\:", r"\>", r"\ "]
# A pattern, what replaces it, and an example. Words come first, then numbers, the arguments of
# commands, spaces, and what the whole text may be.
SPELLINGS = [
    (r"_\{? *\\text *\{ *([^{} ]*) *\}\}?", r"_{\1}"),  # v_\text{max}
    (r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln|exp)(?![a-zA-Z])", r"\\\1"),  # 2pi
    (r"\\text *\{(sin|cos|tan|log|ln|exp|gcd|max|min|arc\w+)\}", r"\\\1 "),
    (r"\\text *\{( ?(?:[ei]|[\dA-Z]*\d[\dA-Z]*) ?)\}", r"\1"),  # \mathrm{3}, \text{i}
    (r"^\\text *\{([^{}]*[\d,][^{}]*)\}$", r"\1"),  # \text{5 cm}
    (r"^\\text *\{[^{}]*(is|are|:) *\}", ""),  # \text{The answer is } 5
    (r"\\text *\{ *\(?(since|because|where|for any)\b.*", ""),  # 3 \text{ (since } x > 0)
    (r" *(\\text *\{ *(%|per ?cent) *\}|%|\bper ?cent\b)", "%"),
    (r"\$ *([\d,.{}]*\d)|(?<=\d) *\$", r"\1\\text{dollar}"),  # \$18.90
    (r"[ ,]*(\\text *\{[ ,]*(and|or) *\}|\b(and|or)\b|;|&)[ ,]*", ", "),  # 1, 2, and 3
    (r"(\d*\.\d*)\\overline *\{(\d+)\}", r"\1" + 13 * r"\2"),  # 0.\overline{3}
    (r"(?<![\d.^])(\d+) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),  # 1 1/2
    (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\\sqrt *(\d+|[a-z])", r"\\sqrt{\1}"),
    (r"\\sqrt *\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\frac *(\w)", r"\\frac{\1}"),
    (r"(\\frac *\{(?:[^{}]|\{[^{}]*\})*\}) *(\w)", r"\1{\2}"),  # \frac12
    (r"\\frac\{(\\text[^{}]*\{[^{}]*\})\}\{(\\text[^{}]*\{[^{}]*\}[^{}]*)\}", r"\1/\2"),
    (r"\\(text)?color *\{\w+\}", ""),
    (r"\*\*", "^"),
    (r"\^\{?\\prime\}?", "'"),
    (r"\^ *\{?\\circ\}?", r"^\\circ "),
    (r"C_\{?(\w+)\}?\^\{?(\w+)\}?", r"\\binom{\1}{\2}"),  # C_n^3
    (r"(?<![\w}\]^_*])\{(\w*)\}", r"\1"),  # {5}
    (r"([_^]) *\{(\w)\}", r"\1\2"),  # x^{2}
    (r"\\log_(\w) *", r"\\log_{\1}"),
    (r"(?<![a-zA-Z\d]) +| +(?![a-zA-Z\d])", ""),
    (r"(?<![\w.])(\d*\.?\d+)\\(?:cdot|times) *10\^\{?\+?(-?\d{1,3})\}?(?!\d)", r"\1e\2"),  # 2 10^5
    (r"(?<=\d)E\+?(?=-?\d)", "e"),
    (r"(?<![\w)}\]!|'])\+", ""),  # +5
    (r"^=+|(\\\\|[\s.,;:])+$", ""),
    (r"^(\\mathbb\{R\}|(\\text\{)?all real numbers\}?)$", "(-∞,∞)"),
    (r"^([a-z]=)?\\mathbb\{R\}\\backslash\{([^{},]*)\}$", r"(-∞,\2),(\2,∞)"),
    (r"^(?:\([^()]*\)|[^=,]*)=(\{.*\})$", r"\1"),  # x \in \{1, 2\}
]
PERCENT = r"%(?=$|[,)\]])"  # at the end of a value
THOUSANDS = r"(?<![\d.,])[1-9]\d{0,2}(?:(?:\{,\}|[ ,])\d{3})+(?![\d,])(?![^(){}\[\]]*[)\]}])"
MATRIX = r"([^,=]*?)[(\[]? ?\\begin\{(?:array\}\{[^{}]*|[pb]?matrix)\}(.*?)\\end\{\w+\} ?[)\]]?"


def table(rows: str) -> dict[str, str]:
    """Read a table of two words each."""
    words = rows.split()
    return dict(zip(words[::2], words[1::2], strict=True))


LETTERS = str.maketrans({letter: word + " " for letter, word in table(CHARACTERS).items()})
COMMAND = table(COMMANDS) | dict.fromkeys(DROPPED.split(), "") | dict.fromkeys(SPACES, " ")


@functools.lru_cache(10_000)
def spell(text: str) -> str:
    """Write LaTeX in one of the many ways in which the same thing can be spelled."""
    text = re.sub(r"(?<!\\)\$", "", text.translate(LETTERS))
    text = re.sub(r"\\[a-zA-Z]+|\\.", lambda found: COMMAND.get(found[0], found[0]), text)
    text = re.sub(r"[\s~]+", " ", text).strip()
    text = re.sub(THOUSANDS, lambda found: re.sub(r"\D", "", found[0]), text)  # but not (1,234)
    text = re.sub(MATRIX, read_matrix, text)
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    return text


def read_matrix(found: re.Match) -> str:
    """Write a matrix as [[its],[rows]], a column as a tuple; a factor in front goes inside."""
    factor = found[1].strip()
    body = found[2].strip().removesuffix(r"\\")
    if factor:
        body = (
            rf"{factor}\cdot("
            + re.sub(r"&|\\\\", lambda cut: rf"){cut[0]}{factor}\cdot(", body)
            + ")"
        )
    if "&" in body:
        return "[[" + body.replace("&", ",").replace(r"\\", "],[") + "]]"
    return "(" + body.replace(r"\\", ",") + ")"


# Parts: brackets, lists, inequalities, units ------------------------------------------------------

# How many levels deeper a bracket leads. They need not match in kind: [0, 1) is an interval.
BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


def levels(text: str) -> list[int]:
    """Count the open brackets after each character."""
    return list(accumulate(BRACKETS.get(character, 0) for character in text)) or [0]


def split(text: str, separator: str) -> list[str]:
    """Split a text where a separator stands outside of all brackets."""
    parts = []
    start = 0
    for place, level in enumerate(levels(text)):
        if level == 0 and text[place : place + 1] == separator:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]


def is_enclosed(text: str) -> bool:
    """Say whether one pair of brackets holds the whole text."""
    *before, last = levels(text)
    return text.startswith(("(", "[", "{")) and last == 0 and 0 not in before


def unwrap(text: str) -> str:
    """Take off the brackets around a single value and the braces around a set."""
    while is_enclosed(text) and text[0] != "[" and text[-1] != "]":
        if text[0] == "(" and len(split(text[1:-1], ",")) > 1:
            break
        text = text[1:-1]
    return text


def split_list(text: str) -> list[str]:
    """Split a list or a set; x = 1, y = 2 is one tuple, 1 \\pm 2 and x ≠ 2 are two items each."""
    text = re.sub(r"^[a-z](=[^:|]*)?[:|](?=.*[<>≤≥])", "", unwrap(text))  # {x | x > 0}
    items = []
    for part in split(text, ","):
        part = re.sub(r"^([a-z])≠(.+)$", r"(-∞,\2),(\2,∞)", part)
        if r"\pm" in part:
            plus = re.sub(r"(^|=)\\pm", r"\1", part)
            items += [plus.replace(r"\pm", "+"), part.replace(r"\pm", "-")]
        else:
            items += split(read_inequality(part), ",")
    # Other names, in their order, are a tuple; the same name again is a list of solutions.
    names = {item[0] for item in items if re.match("[a-z]=", item)}
    if len(items) == len(names) > 1:
        return ["(" + ",".join(item[2:] for item in sorted(items)) + ")"]
    return [unwrap(item) for item in items]


VARIABLE = r"(?:[a-zA-Z]|\\[a-z]+|[a-z]\([a-z]\))"
# a < x, x < b or a < x < b, once > and ≥ are mirrored.
INEQUALITY = re.compile(rf"(?:([^<≤]+)([<≤]))?{VARIABLE}(?:([<≤])([^<≤]+))?")


def read_inequality(text: str) -> str:
    """Write 2 < x as (2,∞), 3 ≥ x > 1 as (1,3], |x| < 1 as (-1,1), and b > a as a < b."""
    if not re.search("[<>≤≥]", text):
        return text
    if not re.search("[<≤]", text):
        text = "".join(reversed(re.split("([>≥])", text))).replace(">", "<").replace("≥", "≤")
    text = re.sub(r"^\|([a-z])\|([<≤])(.+)$", r"-(\3)\2\1\2\3", text)
    # Between two variables, a < b, it stays an inequality.
    found = INEQUALITY.fullmatch(text)
    if found is None or re.fullmatch(VARIABLE, found[1] or found[4]):
        return text
    opening = {"≤": "["}.get(found[2], "(")
    closing = {"≤": "]"}.get(found[3], ")")
    return f"{opening}{found[1] or '-∞'},{found[4] or '∞'}{closing}"


# A unit, and other words for it; three spaces or more separate the rows.
UNIT_TABLE = """
    m meter metre   cm centimeter centimetre   mm millimeter millimetre   km kilometer kilometre
    ft foot feet   in inch inche   yd yard   mi mile   kg kilogram   g gram   mg milligram
    lb pound   oz ounce   l liter litre   ml milliliter   s sec second   min minute   h hr hour
    degree deg circ   dollar usd   2 square sq   3 cubic   km/h kmh   mi/h mph   n newton
    j joule   w watt   hz hertz   rad radian   cent   am   pm   unit   / per
"""
UNITS = {}
for row in re.split(r"\s{3,}", UNIT_TABLE.strip()):
    for word in row.split():
        UNITS[word] = row.split()[0]
# What may stand at the end of a value: \text{ cm}, a degree, '' for inches, letters outside of
# \text, a slash or a dot between these, and an exponent after each.
UNIT = re.compile(
    r"(?:(?:\\text\{[^{},\d+!^-](?:[^{},\d+!]|\^\{?-?\d\}?)*\}|\^\\circ *[CF]?|/|\\cdot| |"
    r"(?<=\d)''?$|(?<![\\a-zA-Z])(?:m/s|[a-zA-Z]{2,}))(?:\^\{?-?\d\}?)?)+$"
)
# After these words a number is another number, or not one number any more.
NO_UNIT = re.compile(
    r"\b(\w*illion|hundred|thousand|dozen|score|squared|cubed|factorial|hal[fv]e?|third|quarter|"
    r"(four|fif|six|seven|eigh|nin|ten|hundred|thousand)th|plus|minus|times|over|to|or|and|not|is|"
    r"if|pi|more|less|least|most|than|about|maybe|but|percent|root|below|above|else|only)s?\b"
)
BASE = re.compile(r"\(?([\dA-Z]*\d[\dA-Z]*)\)?_\{?\(?(\d+)\)?\}?")
TRIGONOMETRY = re.compile(r"\\(sin|cos|tan|sec|csc|cot)(?![a-z])")


def split_unit(text: str) -> tuple[str, str]:
    """Split 5\\text{ square feet} into 5 and ft2, and 204_5 into 204 and base 5."""
    base = BASE.fullmatch(text)
    if base:
        return base[1], "base " + base[2]
    unit = UNIT.search(text)
    if unit is None or unit.start() == 0 or TRIGONOMETRY.search(text):
        return text, ""
    words = re.sub(r"(\w\w)\.", r"\1 ", unit[0].lower()).replace("''", "in").replace("'", "ft")
    words = re.sub(r"\\text|\\cdot|\.", "", words)
    words = re.sub(r"(square|sq|cubic) (\w+)", r"\2 \1", words)
    names = []
    for name in re.findall(r"[^\W\d_]+|[-/\d]", words):
        singular = name.removesuffix("s")
        names.append(UNITS.get(name) or UNITS.get(singular) or singular)
    # Words outside of \text are letters to multiply, unless the first is a unit or a plural.
    is_product = unit[0].strip()[:1].isalpha() and not re.match(r" *[a-z]{3,}s\b", unit[0])
    if NO_UNIT.search(words) or (is_product and names[0] not in UNITS.values()):
        return text, ""
    return text[: unit.start()], "".join(names)


# Comparison: as text, as plain numbers, by algebra ------------------------------------------------


def all_of(verdicts: Iterable[bool | None]) -> bool | None:
    """Combine verdicts that must all be true."""
    verdicts = set(verdicts)
    if False in verdicts:
        return False
    if None in verdicts:
        return None
    return True


def compare(gold: str, pred: str, algebra: Algebra) -> bool | None:
    """Compare two spelled texts: as lists, equations, tuples or values."""
    golds, preds = split_list(gold), split_list(pred)
    # A list that hedges has more items than the answer, and one number is no list of two.
    if golds == preds or len(golds) != len(preds):
        return golds == preds
    if len(golds) > 1:
        return compare_lists(golds, preds, algebra)
    gold, pred = golds[0], preds[0]
    if len(split(gold, "=")) > 1 or len(split(pred, "=")) > 1:
        return compare_equations(split(gold, "="), split(pred, "="), algebra)
    # What is still enclosed is a tuple, an interval or a matrix.
    if not is_enclosed(gold) and not is_enclosed(pred):
        return compare_values(gold, pred, algebra)
    golds, preds = split(gold[1:-1], ","), split(pred[1:-1], ",")
    if gold[:1] + gold[-1:] != pred[:1] + pred[-1:] or len(golds) != len(preds):
        return False
    return all_of(compare(*pair, algebra) for pair in zip(golds, preds, strict=True))


def compare_lists(golds: list[str], preds: list[str], algebra: Algebra) -> bool | None:
    """Find a partner for each item, in any order."""
    if len(golds) > 20:
        return sorted(golds) == sorted(preds)
    # Long lists are compared as they are spelled: partners are sought in quadratic time.
    left = list(preds)
    verdict = True
    for gold in golds:
        verdicts = [compare(gold, pred, algebra) for pred in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            verdict = None
        else:
            return False
    return verdict


NAME = re.compile(  # x, f(x), a_{10}, AB, (x,y), |S|, \angle A, \text{Area}
    r"(?:[A-Z]+|[a-z]|\\[a-z]+)'*(?:_\{?\w+\}?)?(?:\([\w,]+\))?|\([a-z](?:,[a-z])*\)|\|[A-Z]\||"
    r"m?\\angle ?\w+|\\(?:text|overline|vec)\{[^{}]*\}"
)


def compare_equations(golds: list[str], preds: list[str], algebra: Algebra) -> bool | None:
    """Compare what equals signs link: a name and its value, steps to a value, an equation."""
    is_named = len(golds) == 2 and NAME.fullmatch(golds[0]) is not None
    # A name may be left out, but not replaced by another: x = 5 is not y = 5. An expression on the
    # left is no name: x + y = 5 is not 5.
    if len(golds) > 1 and not (is_named and (len(preds) == 1 or preds[0] == golds[0])):
        is_equation = len(golds) == len(preds) == 2
        return is_equation and compare_values("=".join(golds), "=".join(preds), algebra)
    # The first link may be a name, x + y too, but not 2x; every other link must be the value.
    name = re.sub(r"_\{?\w+\}?|(?<=\w)\([-\d,]+\)", "", preds[0])
    if len(preds) > 1 and re.search("[a-zA-Z]", name) and not re.search(r"\d", name):
        preds = preds[1:]
    return all_of(compare(golds[-1], link, algebra) for link in preds)


def compare_values(gold: str, pred: str, algebra: Algebra) -> bool | None:
    """Compare two values or two equations."""
    gold, gold_unit = split_unit(gold)
    pred, pred_unit = split_unit(pred)
    if gold_unit and pred_unit and gold_unit != pred_unit:
        return False
    if words(gold) == words(pred):
        return True
    a, b = number(gold), number(pred)
    if a is not None and b is not None:
        return a == b or is_close(gold, pred, a, b)
    # Words that differ are wrong. Expressions in other letters are too, and most wrong answers end
    # here; x^0 and y^0 are the price.
    if is_text(gold) or is_text(pred) or symbols(gold) != symbols(pred):
        return False
    if has_one_irrational(gold, pred):
        return False
    return algebra(gold, pred)


# Whole numbers and fractions, and among them one root, pi or i; no 0, which could cancel it.
ONE_IRRATIONAL = re.compile(
    r"(?!.*\b0)[-+\d{}()/=]*(?:\\sqrt\{(\d+)\}|\\pi|i)[-+\d{}()/=]*",
)


def has_one_irrational(gold: str, pred: str) -> bool:
    """Say whether two values cannot be equal, as 5 and 2\\sqrt{3}; it spares much algebra."""
    both = re.sub(r"\\frac|\\cdot", "/", f"{gold}={pred}")
    found = ONE_IRRATIONAL.fullmatch(both)
    if found is None:
        return False
    radicand = int(found[1] or 2)
    return math.isqrt(radicand) ** 2 != radicand


def words(text: str) -> str:
    """Drop what makes no difference between words."""
    text = re.sub(r"\\text *\{\(?([^{}]*?)\)?\}", r"\1", text)
    text = re.sub(r"(?<!\d) | (?!\d)|\.$", "", text)
    return text.casefold() if re.fullmatch(r"[A-D]|[a-zA-Z,]{2,}", text) else text


# The commands that the parser understands, and those that are symbols. All others are text.
FUNCTIONS = """
    frac sqrt cdot times binom sin cos tan sec csc cot sinh cosh tanh arcsin arccos arctan log ln
    exp lfloor rfloor lceil rceil max min gcd sum circ pi
"""
SYMBOLS = """
    alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi psi
    omega Gamma Delta Theta Lambda Sigma Phi Psi Omega hbar ell partial nabla bar hat tilde dot vec
"""
# Words, ratios, 1 2, A5, ABCD, all other commands; then what is too large to compute.
TEXT = re.compile(
    r"\\text|[:#∞%≡≠<>≤≥~$\"]|\d \d|[A-Z]\d|(^|=)[A-Z]{2,}(=|$)|"
    rf"\\(?!(?:{'|'.join((FUNCTIONS + SYMBOLS).split())})(?![a-zA-Z]))|"
    r"(\^\{[^{}]*){2}\^|\d{5} *!|!!|\\binom\D*\d{6}|[\^e]-?\{?\d{7}"
)


def is_text(text: str) -> bool:
    """Say whether there is nothing to compute."""
    return TEXT.search(text) is not None


def symbols(text: str) -> set[str]:
    """Return the letters of an expression but for e, i and pi."""
    found = set(re.findall(r"\\[a-zA-Z]+|[a-zA-Z]", text))
    return found - {"e", "i"} - {"\\" + name for name in FUNCTIONS.split()}


def number(text: str) -> Fraction | None:
    """Read 5, -1.5, 4.5e33, 3/4 or \\frac{3}{4}; None for all else."""
    plain = re.sub(r"^(-?)\\frac\{(-?\d+)\}\{(\d+)\}$", r"\1\2/\3", text)
    if not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)(e-?\d{1,3})?(/0*[1-9]\d*)?", plain):
        return None
    top, _, bottom = plain.partition("/")
    return Fraction(top) / int(bottom or 1)


def is_close(gold: str, pred: str, a: Fraction, b: Fraction) -> bool:
    """Say whether one is a decimal that is right to all its digits, and to six at least."""
    # Twelve digits are enough: a program's last digits are off by its rounding.
    decimals = [text for text in (gold, pred) if re.fullmatch(r"-?\d*\.\d*", text)]
    if len(decimals) != 1 or 1 in (a.denominator, b.denominator):
        return False
    shown = Decimal(decimals[0])
    digits = min(max(len(shown.as_tuple().digits), 6), 12)
    return abs(a - b) <= Fraction(10) ** (shown.adjusted() + 1 - digits) / 2


# Algebra, in a worker -----------------------------------------------------------------------------


def in_grammar(text: str) -> str:
    """Write an expression for math-verify's parser, each symbol under a name that is only a name.

    Left to itself, the parser reads I as the imaginary unit, gamma as a number, f(x + 1) as a call
    and dv as a differential.
    """

    def name(found: re.Match) -> str:
        if found[0] in ("e", "i") or found[1].removeprefix("\\") in FUNCTIONS.split():
            return found[0]
        return r"\variable{v" + re.sub("[ {}]", "", found[0]).encode().hex() + "}"

    # Degrees are radians only inside of sines and the like; 180^\circ - x is 180 - x.
    degree = r"\\cdot\\frac{\\pi}{180}" if TRIGONOMETRY.search(text) else ""
    text = re.sub(r"\^\\circ", degree, text)
    text = re.sub(r"(?<=\d)e(-?\d+)", r"\\cdot 10^{\1}", text)
    text = re.sub(r"((?<![_^\d])\d+|\)|\\pi *)(?=\()", r"\1\\cdot ", text)  # 2(3) is not 2 + 3
    accent = r"\\(?:bar|hat|tilde|d?dot|vec) *\{?[a-zA-Z]\}?"
    subscript = r"'*(?:_(?:\w|\{[^{}]*\}))?'*"
    return re.sub(rf"({accent}|\\[a-zA-Z]+|[a-zA-Z]){subscript}", name, text)


@functools.lru_cache(10_000)
def parse(text: str) -> Any:
    """Parse an expression, l = r as l - r, decimals as fractions; None if the parser refuses."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from sympy import Float, I, Rational, Symbol

    config = ConversionConfig(lowercase_symbols=False)
    text = "(" + ")-(".join(split(in_grammar(text), "=")) + ")"
    with contextlib.suppress(Exception):  # the parser raises a dozen types
        tree = latex2sympy(text, normalization_config=None, conversion_config=config)
        decimals = {decimal: Rational(str(decimal)) for decimal in tree.atoms(Float)}
        return tree.xreplace(decimals | {Symbol("i"): I})


def evaluate(text: str, point: int) -> Any:
    """Compute an expression with numbers for its symbols; None if the result is no number."""
    from sympy import Rational

    tree = parse(text)
    if tree is None:
        return None
    numbers = {}
    for symbol in tree.free_symbols:
        place = Rational(1 + zlib.crc32(f"{symbol} {point}".encode()) % 9973, 1994)
        # From 0 to 5, from -5 to 0, from -1 to 1: |x| is not x, and |x^2 - 4| is not x^2 - 4.
        numbers[symbol] = (place, -place, place / Rational(5, 2) - 1)[point]
    with contextlib.suppress(Exception):  # sympy has no common type either
        value = tree.xreplace(numbers).doit()
        return value if value.is_number and value.is_finite is not False else None


def is_equal(a: Any, b: Any) -> bool:
    """Compare rational numbers exactly, others to 50 digits more than the numbers in them have."""
    from sympy import Rational

    if a.is_Rational and b.is_Rational:
        return a == b
    bits = sum(int(part.p * part.q).bit_length() for part in (a + b).atoms(Rational))
    digits = min(100 + bits // 3, 20_000)
    a, b = a.evalf(digits), b.evalf(digits)
    is_finite = a.is_finite and b.is_finite
    return bool(is_finite and abs(a - b) <= abs(a) / Rational(10) ** (digits - 50))


def by_algebra(gold: str, pred: str) -> bool:
    """Compare two values, or two equations up to a factor, at three points."""
    golds = [evaluate(gold, point) for point in range(3)]
    preds = [evaluate(pred, point) for point in range(3)]
    if None in golds + preds:
        return False
    if "=" in gold:
        # 0 = 0 is no answer. Else l - r must be the same multiple of the other at every point.
        if 0 in golds + preds:
            return False
        golds, preds = [golds[0] * b for b in preds], [preds[0] * a for a in golds]
    elif (number(gold) or number(pred)) and golds[0].is_real and preds[0].is_real:
        a, b = (Fraction(str(value.evalf(30))) for value in (golds[0], preds[0]))
        if is_close(gold, pred, a, b):
            return True
    return all(is_equal(*pair) for pair in zip(golds, preds, strict=True))


# Workers ------------------------------------------------------------------------------------------


def submit(response: str, answer: Any) -> Future:
    """Grade a response and return at once; the future's result is 1.0 or 0.0.

    A worker is asked only what text and plain numbers leave open. An answer that cannot be graded
    gives 0.0 and is counted.
    """
    verdict = Future()
    is_right = False
    box = last_box(response.rpartition("</think>")[2].partition("<think>")[0])
    try:
        gold = check_answer(answer)
    except ValueError:
        counts["ungradable"] += 1
        box = None
    if box is not None:
        is_right = decide(gold, box, lambda gold, pred: None)
    if is_right is None:
        jobs_of(os.getpid()).put((verdict, json.dumps([gold, box])))
    else:
        verdict.set_result(float(is_right))
    return verdict


class Worker:
    """A process that does algebra on one pair at a time.

    It is this file as a script: multiprocessing would import the main script again, with torch and
    vLLM. It ends when its stdin closes, however the parent ends. Ctrl-C does not reach its process
    group. What it prints on stderr, a traceback for example, is seen.
    """

    process: subprocess.Popen | None = None  # started when the first pair comes

    def start(self) -> None:
        """Start the process and wait for the parser; RuntimeError if it does not come."""
        command = [sys.executable, "-P", __file__, "--worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        for _ in range(2):  # a second time if somebody kills it meanwhile
            self.process = subprocess.Popen(command, process_group=0, **pipes)
            if self.process.stdout.readline() == "ready\n":
                return
            if self.kill() >= 0:
                break
        raise RuntimeError("the grading worker does not start; its error is printed above")

    def kill(self) -> int:
        """Kill the process, if it still runs, and return how it ended."""
        process = self.process
        self.process = None
        process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        return process.wait()

    def ask(self, pair: str) -> float:
        """Return 1.0 or 0.0; a worker that died of anything but its limits has a successor."""
        for _ in range(2):
            if self.process is None:
                self.start()
            with contextlib.suppress(BrokenPipeError):
                print(pair, file=self.process.stdin, flush=True)
            reply = self.process.stdout.readline()
            if reply:
                return float(reply)
            if self.kill() in (-signal.SIGPROF, -signal.SIGALRM):
                counts["timeouts"] += 1
                return 0.0
        counts["failures"] += 1
        return 0.0


@functools.cache
def jobs_of(pid: int) -> queue.SimpleQueue:
    """Return the queue that the workers of this process, or of a fork, serve."""
    jobs = queue.SimpleQueue()
    for _ in range(min(8, os.cpu_count() or 1)):
        # Daemons, for the interpreter waits for other threads before it exits.
        threading.Thread(target=serve, args=(jobs,), daemon=True).start()
    return jobs


def serve(jobs: queue.SimpleQueue) -> None:
    """Answer jobs with a worker of this thread."""
    worker = Worker()
    while True:
        verdict, pair = jobs.get()
        try:
            verdict.set_result(worker.ask(pair))
        except Exception as error:  # for the thread that wants the result
            verdict.set_exception(error)


def work() -> None:
    """Do algebra on the pairs that come in, until stdin closes."""
    # More than 4 GB raises MemoryError here, before the machine runs out.
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    # The parser is slow until it has seen most of its grammar.
    by_algebra(r"\frac{x^{2}}{\sqrt[3]{8}}-\frac{2\pi}{3}=1", r"(x-1)(x+1)=\frac{4\pi}{3}+\sin x")
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # the kernel kills this process then
        signal.alarm(WALL_SECONDS)
        verdict = float(decide(*json.loads(line), by_algebra))
        with contextlib.suppress(BrokenPipeError):  # the parent has ended meanwhile
            print(verdict, flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    work()
