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

The calling process compares text and plain numbers, and imports nothing heavy. If a pair takes
algebra, the verdict is None there instead of True or False, and a worker process compares the pair
once more. Algebra may hang or take all memory, so the kernel kills a worker that needs too long.
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
import traceback
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from decimal import Decimal
from fractions import Fraction
from itertools import accumulate
from typing import Any

# A longer text, or one with more deeply nested brackets, equals only itself.
LONGEST = 500
DEEPEST = 10
# The limits for the algebra of one pair. The first counts the CPU time of the worker, which does
# not pass while other processes have the CPU. The second ends a worker that sleeps.
CPU_SECONDS = 3
WALL_SECONDS = 60
# How many pairs took too long, how many could not be computed for another reason, and how many
# answers could not be graded.
counts = {"timeouts": 0, "failures": 0, "ungradable": 0}
# Compares two expressions: `by_algebra` in a worker, `leave_open` in the calling process.
Algebra = Callable[[str, str], bool | None]


def reward(response: str, answer: Any) -> float:
    """Return 1.0 if the last box equals the answer, else 0.0.

    Raises ValueError for an answer that cannot be graded, see `check_answer`.
    """
    check_answer(answer)
    return submit(response, answer).result()


def grade(responses: list[str], answers: list[Any]) -> list[float]:
    """Grade many responses at once, in order; an answer that cannot be graded gives 0.0."""
    rewards = []
    for response, answer in zip(responses, answers, strict=True):
        rewards.append(submit(response, answer))
    return [reward.result() for reward in rewards]


def submit(response: str, answer: Any) -> Future:
    """Return a future that will hold the reward, so that many pairs are graded at once.

    An answer that cannot be graded gives 0.0 and is counted.
    """
    future = Future()
    try:
        gold = check_answer(answer)
    except ValueError:
        counts["ungradable"] += 1
        future.set_result(0.0)
        return future
    box = last_box(response.rpartition("</think>")[2].partition("<think>")[0])
    verdict = False
    if box is not None:
        verdict = decide(gold, box, leave_open)
    if verdict is None:
        waiting_jobs().put((future, json.dumps([gold, box])))
    else:
        future.set_result(float(verdict))
    return future


def check_answer(answer: Any) -> str:
    """Return the answer as text, without a box around it.

    Raises ValueError if it is neither text nor number, if it is empty, and if its braces do not
    match, since no box could hold it then.
    """
    text = last_box(str(answer)) or str(answer)
    is_empty = text.strip(" \t\r\n$.") in ("", "nan", "inf", "-inf")
    is_broken = last_box(rf"\boxed{{{text}}}") != text
    if type(answer) not in (str, int, float) or is_empty or is_broken:
        raise ValueError(f"no text or number, empty, or unbalanced braces: {answer!r:.60}")
    return text


def last_box(text: str) -> str | None:
    """Return the content of the last closed \\boxed{} or \\fbox{}, None if there is none."""
    open_braces = []  # for each, where the content of its box starts; 0 if it opens no box
    content = None
    content_start = 0
    for token in re.finditer(r"(\\(?:boxed|fbox)\s*)?\{|\\.|\}", text, re.DOTALL):
        if token[1]:
            open_braces.append(token.end())
        elif token[0] == "{":
            open_braces.append(0)
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            # In \boxed{x = \boxed{5}} the inner box closes first but starts last: it counts.
            if start > content_start:
                content_start = start
                content = text[start : token.start()]
    return content


def decide(gold: str, box: str, algebra: Algebra) -> bool | None:
    """Say whether two pieces of LaTeX are equal; None if `algebra` leaves it open."""
    if gold.strip() == box.strip():
        return True
    # A character such as ½ becomes nine, and some patterns take time quadratic in the length.
    if max(len(gold.translate(LETTERS)), len(box.translate(LETTERS))) > LONGEST:
        return False
    gold = spell(gold)
    box = spell(box)
    if max(len(gold), len(box)) > 2 * LONGEST or max(levels(gold + box)) > DEEPEST:
        return False
    verdict = compare(re.sub(PERCENT, "", gold), re.sub(PERCENT, "", box), algebra)
    # 50% may mean 50, as above, or 0.5.
    if verdict is False and "%" in gold + box:
        gold = re.sub(PERCENT, "/100", gold)
        box = re.sub(PERCENT, "/100", box)
        verdict = compare(gold, box, algebra)
    return verdict


def leave_open(gold: str, pred: str) -> None:
    """Give no verdict on two expressions: the calling process does no algebra."""


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
    \div /   \nicefrac \frac   \quad ~   \qquad ~   \, ~   \; ~   \: ~   \> ~
"""
DROPPED = r"""
    \left \right \big \Big \bigl \bigr \Bigl \Bigr \bigg \Bigg \displaystyle \textstyle \limits
    \mathbf \boldsymbol \bm \mathit \underline \! \( \)
"""
# Pattern, replacement and, where the pattern is not plain, an example of what it finds. The order:
# words, numbers, arguments of commands, spaces, then what may stand at the ends of the text.
SPELLINGS = [
    (r"_\{? *\\text *\{ *([^{} ]*) *\}\}?", r"_{\1}"),  # v_\text{max}
    (r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln|exp)(?![a-zA-Z])", r"\\\1"),  # 2pi
    (r"\\text *\{(sin|cos|tan|log|ln|exp|gcd|max|min|arc\w+)\}", r"\\\1 "),
    (r"\\text *\{( ?(?:[ei]|[\dA-Z]*\d[\dA-Z]*) ?)\}", r"\1"),  # \text{3}, \text{i}
    (r"^\\text *\{([^{}]*[\d,][^{}]*)\}$", r"\1"),  # \text{5 cm}
    (r"^\\text *\{[^{}]*(is|are|:) *\}", ""),  # \text{The answer is } 5
    (r"\\text *\{ *\(?(since|because|where|for any)\b.*", ""),  # 3 \text{ (since } x > 0)
    (r" *(\\text *\{ *(%|per ?cent) *\}|%|\bper ?cent\b)", "%"),
    (r"\$ *([\d,.{}]*\d)|(?<=\d) *\$", r"\1\\text{dollar}"),  # $18.90
    (r"[ ,]*(\\text *\{[ ,]*(and|or) *\}|\b(and|or)\b|;|&)[ ,]*", ", "),  # 1, 2, and 3
    (r"(\d*\.\d*)\\overline *\{(\d+)\}", r"\1" + 13 * r"\2"),  # 0.\overline{3}: 13 times 3
    (r"(?<![\d.^])(\d+) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),  # 1 1/2
    (r"(?<=\d)E\+?(?=-?\d)", "e"),  # 3.2E5
    (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\\sqrt *(\d+|[a-z])", r"\\sqrt{\1}"),
    (r"\\sqrt *\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\frac *(\w)", r"\\frac{\1}"),
    (r"(\\frac *\{(?:[^{}]|\{[^{}]*\})*\}) *(\w)", r"\1{\2}"),  # \frac{1}2
    (r"\\frac\{(\\text[^{}]*\{[^{}]*\})\}\{(\\text[^{}]*\{[^{}]*\}[^{}]*)\}", r"\1/\2"),  # m over s
    (r"\*\*", "^"),
    (r"\^ *\{?\\circ\}?", r"^\\circ "),
    (r"([_^]) *\{(\w)\}", r"\1\2"),  # x^{2}
    (r"\\log_(\w) *", r"\\log_{\1}"),
    (r"(?<![a-zA-Z\d]) +| +(?![a-zA-Z\d])", ""),
    (r"(?<![\w)}\]!|'])\+", ""),  # the sign of +5
    (r"^=+|(\\\\|[\s.,;:])+$", ""),
    (r"^(\\mathbb\{R\}|(\\text\{)?all real numbers\}?)$", "(-∞,∞)"),
    (r"^(?:([a-z]=)?\\mathbb\{R\}\\backslash\{|[a-z]≠)([^{},]*)\}?$", r"(-∞,\2),(\2,∞)"),  # x≠2
    (r"^(?:\([^()]*\)|[^=,]*)=(\{.*\})$", r"\1"),  # x \in \{1, 2\}
]
PERCENT = r"%(?=$|[,)\]])"  # at the end of a value
# 1,234 and 1 234, but not in brackets: (1,234) is a pair of numbers.
THOUSANDS = r"(?<![\d.,])[1-9]\d{0,2}(?:(?:\{,\}|[ ,])\d{3})+(?![\d,])(?![^(){}\[\]]*[)\]}])"
# What stands before a matrix, and what stands in it.
MATRIX = r"([^,=]*?)[(\[]? ?\\begin\{(?:array\}\{[^{}]*|[pb]?matrix)\}(.*?)\\end\{\w+\} ?[)\]]?"


def table(rows: str) -> dict[str, str]:
    """Read a table of two words each."""
    words = rows.split()
    return dict(zip(words[::2], words[1::2], strict=True))


LETTERS = str.maketrans({letter: word + " " for letter, word in table(CHARACTERS).items()})
COMMAND = table(COMMANDS) | dict.fromkeys(DROPPED.split(), "") | {r"\ ": " "}


@functools.lru_cache(10_000)
def spell(text: str) -> str:
    """Return LaTeX in the one spelling that the rest of this file reads."""
    text = re.sub(r"(?<!\\)\$", "", text.translate(LETTERS))
    text = re.sub(r"\\[a-zA-Z]+|\\.", lambda found: COMMAND.get(found[0], found[0]), text)
    text = re.sub(r"[\s~]+", " ", text).strip()
    text = re.sub(THOUSANDS, lambda found: re.sub(r"\D", "", found[0]), text)
    text = re.sub(MATRIX, read_matrix, text)
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    return text


def read_matrix(found: re.Match) -> str:
    """Return a matrix as [[1,2],[3,4]] and a column as (1,2); a factor in front goes inside."""
    factor = found[1].strip()
    rows = []
    for row in found[2].strip().removesuffix(r"\\").split(r"\\"):
        cells = row.split("&")
        if factor:
            cells = [rf"{factor}\cdot({cell})" for cell in cells]
        rows.append(",".join(cells))
    if "&" in found[2]:
        return "[[" + "],[".join(rows) + "]]"
    return "(" + ",".join(rows) + ")"


# Parts: brackets, lists, inequalities, units ------------------------------------------------------

# How many levels deeper a bracket leads. They need not match in kind: [0, 1) is an interval.
BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


def levels(text: str) -> list[int]:
    """Count the open brackets after each character: 1 1 1 0 for (12); [0] for no text."""
    return list(accumulate(BRACKETS.get(character, 0) for character in text)) or [0]


def split(text: str, separator: str) -> list[str]:
    """Split a text where a separator stands outside of all brackets: 1 and (2,3) for 1,(2,3)."""
    parts = [""]
    for character, level in zip(text, levels(text), strict=False):
        if level == 0 and character == separator:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def is_enclosed(text: str) -> bool:
    """Say whether one pair of brackets holds the whole text: (1,2) but not (1)+(2)."""
    *before, last = levels(text)
    return text.startswith(("(", "[", "{")) and last == 0 and 0 not in before


def without_brackets(text: str) -> str:
    """Take off brackets that only group: (5) is 5 and {1,2} is 1,2, but (1,2) and [5] stay."""
    while is_enclosed(text) and text[0] + text[-1] in ("()", "{}"):
        inner = text[1:-1]
        if text[0] == "(" and len(split(inner, ",")) > 1:
            break
        text = inner
    return text


def split_list(text: str) -> list[str]:
    """Split a list, a set or a union: 1,2 and {1,2} and 1\\pm2 have two items each."""
    text = without_brackets(text)
    text = re.sub(r"^[a-z](=[^:|]*)?[:|](?=.*[<>≤≥])", "", text)  # {x|x>0} is x>0
    items = []
    for part in split(text, ","):
        if r"\pm" in part:
            plus = re.sub(r"(^|=)\\pm", r"\1", part)
            items += [plus.replace(r"\pm", "+"), part.replace(r"\pm", "-")]
        else:
            items += split(read_inequality(part), ",")
    # y=2,x=1 gives a value to each of two names, which is the tuple (1,2). But x=1,x=2 gives two
    # values to one name, which is a list.
    names = [item[0] for item in items if re.match("[a-z]=", item)]
    if len(items) > 1 and len(set(names)) == len(items):
        values = [item[2:] for item in sorted(items)]
        return ["(" + ",".join(values) + ")"]
    return [without_brackets(item) for item in items]


VARIABLE = r"(?:[a-zA-Z]|\\[a-z]+|[a-z]\([a-z]\))"
# a<x, x<b or a<x<b, once > and ≥ are mirrored.
INEQUALITY = re.compile(rf"(?:([^<≤]+)([<≤]))?{VARIABLE}(?:([<≤])([^<≤]+))?")


def read_inequality(text: str) -> str:
    """Return 2<x as (2,∞), 3≥x>1 as (1,3] and |x|<1 as (-(1),1); b>a becomes a<b."""
    if not re.search("[<>≤≥]", text):
        return text
    if not re.search("[<≤]", text):
        text = "".join(reversed(re.split("([>≥])", text))).replace(">", "<").replace("≥", "≤")
    text = re.sub(r"^\|([a-z])\|([<≤])(.+)$", r"-(\3)\2\1\2\3", text)
    found = INEQUALITY.fullmatch(text)
    # Between two variables, a<b, it stays an inequality.
    if found is None or re.fullmatch(VARIABLE, found[1] or found[4]):
        return text
    opening = "[" if found[2] == "≤" else "("
    closing = "]" if found[3] == "≤" else ")"
    return f"{opening}{found[1] or '-∞'},{found[4] or '∞'}{closing}"


# Units, each followed by other words for it.
UNIT_TABLE = """
    m meter metre; cm centimeter centimetre; mm millimeter millimetre; km kilometer kilometre;
    ft foot feet; in inch inche; yd yard; mi mile; kg kilogram; g gram; mg milligram; lb pound;
    oz ounce; l liter litre; ml milliliter; s sec second; min minute; h hr hour; degree deg circ;
    dollar usd; 2 square sq; 3 cubic; km/h kmh; mi/h mph; n newton; j joule; w watt; hz hertz;
    rad radian; cent; am; pm; unit; / per
"""
UNITS = {}
for row in UNIT_TABLE.split(";"):
    for word in row.split():
        UNITS[word] = row.split()[0]
UNIT = re.compile(
    r"""(?:
        (?: \\text\{ [^{},\d+!^-] (?: [^{},\d+!] | \^\{?-?\d\}? )* \}  # \text{cm^2}
          | \^\\circ [ ]* [CF]?
          | (?<=\d) ''? $                                              # 5'' is 5 inches
          | (?<![\\a-zA-Z]) (?: m/s | [a-zA-Z]{2,} )                   # 5 cm
          | / | \\cdot | [ ]
        ) (?: \^\{?-?\d\}? )?                                          # an exponent
    )+ $""",
    re.VERBOSE,
)
# With one of these words a number is another number, or not one number any more.
NO_UNIT = """
    million billion trillion hundred thousand dozen score half halve third quarter fourth fifth
    sixth seventh eighth ninth tenth hundredth thousandth squared cubed factorial plus minus times
    over to or and not is if pi more less least most than about maybe but percent root below above
    else only
"""
BASE = re.compile(r"\(?([\dA-Z]*\d[\dA-Z]*)\)?_\{?\(?(\d+)\)?\}?")
TRIGONOMETRY = re.compile(r"\\(sin|cos|tan|sec|csc|cot)(?![a-z])")


def split_unit(text: str) -> tuple[str, str]:
    """Split 5\\text{square feet} into 5 and ft2, and 204_5 into 204 and base 5."""
    base = BASE.fullmatch(text)
    if base:
        return base[1], "base " + base[2]
    found = UNIT.search(text)
    if found is None or found.start() == 0 or TRIGONOMETRY.search(text):
        return text, ""
    unit = re.sub(r"(\w\w)\.", r"\1 ", found[0].lower())  # sq.ft
    unit = re.sub(r"\\text|\\cdot|\.", "", unit)
    unit = unit.replace("''", "in").replace("'", "ft")
    unit = re.sub(r"(square|sq|cubic) (\w+)", r"\2 \1", unit)
    names = []
    for name in re.findall(r"[^\W\d_]+|[-/\d]", unit):
        singular = name.removesuffix("s")
        if name in NO_UNIT.split() or singular in NO_UNIT.split():
            return text, ""
        names.append(UNITS.get(name) or UNITS.get(singular) or singular)
    # Letters outside of \text are a product, 5xy, unless they are a known unit or a plural.
    is_bare = found[0].strip()[:1].isalpha()
    is_plural = re.match(r" *[a-z]{3,}s\b", found[0])
    if is_bare and not is_plural and names[0] not in UNITS.values():
        return text, ""
    return text[: found.start()], "".join(names)


# Comparison: as text, as plain numbers, by algebra ------------------------------------------------


def compare(gold: str, pred: str, algebra: Algebra) -> bool | None:
    """Compare two texts that `spell` wrote: as lists, equations, tuples or single values."""
    golds = split_list(gold)
    preds = split_list(pred)
    if golds == preds:
        return True
    # A response that offers several values has more items than the answer. In long lists, the
    # search for partners would take too long.
    if len(golds) != len(preds) or len(golds) > 20:
        return False
    if len(golds) > 1:
        return compare_lists(golds, preds, algebra)
    gold, pred = golds[0], preds[0]
    if len(split(gold, "=")) > 1 or len(split(pred, "=")) > 1:
        return compare_equations(split(gold, "="), split(pred, "="), algebra)
    if is_enclosed(gold) or is_enclosed(pred):
        return compare_tuples(gold, pred, algebra)
    return compare_values(gold, pred, algebra)


def compare_lists(golds: list[str], preds: list[str], algebra: Algebra) -> bool | None:
    """Find a partner for each item, in any order."""
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


def compare_tuples(gold: str, pred: str, algebra: Algebra) -> bool | None:
    """Compare tuples, intervals and matrices: the same brackets, and equal items in order."""
    golds = split(gold[1:-1], ",")
    preds = split(pred[1:-1], ",")
    if gold[:1] + gold[-1:] != pred[:1] + pred[-1:] or len(golds) != len(preds):
        return False
    return all_of(compare(*pair, algebra) for pair in zip(golds, preds, strict=True))


def all_of(verdicts: Iterable[bool | None]) -> bool | None:
    """Combine verdicts which must all be true; None if that is open."""
    verdicts = set(verdicts)
    if False in verdicts:
        return False
    return None if None in verdicts else True


NAME = re.compile(r"([a-zA-Z]|\\[a-z]+)'*(_\{?\w+\}?)?(\([\w,]+\))?")  # x, f(x), a_{10}


def compare_equations(golds: list[str], preds: list[str], algebra: Algebra) -> bool | None:
    """Compare two texts of which one has equals signs; both are split at these."""
    # x=5 accepts 5, and it accepts x=2+3=5. From here on it is 5.
    is_named = len(golds) == 2 and NAME.fullmatch(golds[0])
    if is_named and (len(preds) == 1 or preds[0] == golds[0]):
        golds = golds[1:]
    # y=2x+3 accepts 2x-y+3=0; x=5 rejects y=5; x+y=5 rejects 5.
    if len(golds) > 1:
        is_equation = len(golds) == len(preds) == 2
        return is_equation and compare_values("=".join(golds), "=".join(preds), algebra)
    # 5 accepts x=5 and x+y=5, whose left side only says what has the value; but not 2x=5.
    left_side = re.sub(r"_\{?\w+\}?|(?<=\w)\([-\d,]+\)", "", preds[0])
    if len(preds) > 1 and re.search("[a-zA-Z]", left_side) and not re.search(r"\d", left_side):
        preds = preds[1:]
    # 5 accepts 2+3=5 and rejects 6=5: everything else must have the value.
    return all_of(compare(golds[0], pred, algebra) for pred in preds)


def compare_values(gold: str, pred: str, algebra: Algebra) -> bool | None:
    """Compare two values or two equations."""
    gold, gold_unit = split_unit(gold)
    pred, pred_unit = split_unit(pred)
    if gold_unit and pred_unit and gold_unit != pred_unit:
        return False
    if words(gold) == words(pred):
        return True
    a = number(gold)
    b = number(pred)
    if a is not None and b is not None:
        return a == b or is_close(gold, pred, a, b)
    if TEXT.search(gold) or TEXT.search(pred):
        return False
    # Most wrong answers end here, which spares algebra. Price: x^0 and y^0 are not equal.
    if symbols(gold) != symbols(pred) or has_one_irrational(gold, pred):
        return False
    return algebra(gold, pred)


# Digits, fractions, one \sqrt{}, \pi or i, digits, fractions; no 0, which could cancel it.
ONE_IRRATIONAL = re.compile(
    r"(?!.*\b0)[-+\d{}()/=]*(?:\\sqrt\{(\d+)\}|\\pi|i)[-+\d{}()/=]*",
)


def has_one_irrational(gold: str, pred: str) -> bool:
    """Say whether an irrational number stands in one of two values: 5 cannot be 2\\sqrt{3}."""
    both = re.sub(r"\\frac|\\cdot", "/", f"{gold}={pred}")
    found = ONE_IRRATIONAL.fullmatch(both)
    if found is None:
        return False
    radicand = int(found[1] or 2)
    return math.isqrt(radicand) ** 2 != radicand  # \sqrt{25} is rational


def words(text: str) -> str:
    """Drop what makes no difference between words: \\text{}, brackets, capital letters."""
    text = re.sub(r"\\text *\{\(?([^{}]*?)\)?\}", r"\1", text)
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
KNOWN_COMMAND = "|".join((FUNCTIONS + SYMBOLS).split())
# What there is nothing to compute with.
TEXT = re.compile(
    rf"""\\text | [:\#∞%≡≠<>≤≥~$"] | \d[ ]\d | [A-Z]\d
    | (?:^|=) [A-Z]{{2,}} (?:=|$)                    # ABCD
    | \\ (?! (?:{KNOWN_COMMAND}) (?![a-zA-Z]) )      # an unknown command
    | (?: \^\{{ [^{{}}]* ){{2}} \^                   # too large to compute: 9^{{9^{{9^9}}}}
    | \d{{5}}[ ]*! | !! | \\binom\D*\d{{6}} | [\^e]-?\{{?\d{{7}}""",
    re.VERBOSE,
)


def symbols(text: str) -> set[str]:
    """Return the letters of an expression except e, i and pi."""
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
    """Say whether one text is a decimal that is right to all its digits, and to six at least.

    `a` and `b` are the values of the texts.
    """
    decimals = [text for text in (gold, pred) if re.fullmatch(r"-?\d*\.\d*", text)]
    is_whole = 1 in (a.denominator, b.denominator)  # a whole number has no rounded spelling
    if len(decimals) != 1 or is_whole:
        return False
    shown = Decimal(decimals[0])
    # Twelve digits are enough: a program's last digits are off by its rounding.
    digits = min(max(len(shown.as_tuple().digits), 6), 12)
    return abs(a - b) <= Fraction(10) ** (shown.adjusted() + 1 - digits) / 2


# Algebra, in a worker -----------------------------------------------------------------------------


def in_grammar(text: str) -> str:
    """Return an expression for math-verify's parser, each symbol under a name that is only a name.

    Left to itself, the parser reads I as the imaginary unit, gamma as a number, f(x+1) as a call
    and dv as a differential.
    """

    def rename(found: re.Match) -> str:
        if found[0] in ("e", "i") or found[1].removeprefix("\\") in FUNCTIONS.split():
            return found[0]
        return r"\variable{v" + re.sub("[ {}]", "", found[0]).encode().hex() + "}"

    # A degree is \pi/180 only inside of sines and the like; 180^\circ-x is 180-x.
    degree = r"\\cdot\\frac{\\pi}{180}" if TRIGONOMETRY.search(text) else ""
    text = re.sub(r"\^\\circ", degree, text)
    text = re.sub(r"(?<=\d)e(-?\d+)", r"\\cdot 10^{\1}", text)
    text = re.sub(r"((?<![_^\d])\d+|\)|\\pi *)(?=\()", r"\1\\cdot ", text)  # else 2(3) is 2+3
    accent = r"\\(?:bar|hat|tilde|d?dot|vec) *\{?[a-zA-Z]\}?"
    subscript = r"'*(?:_(?:\w|\{[^{}]*\}))?'*"
    return re.sub(rf"({accent}|\\[a-zA-Z]+|[a-zA-Z]){subscript}", rename, text)


@functools.lru_cache(10_000)
def parse(text: str) -> Any:
    """Parse an expression, l=r as l-r, decimals as fractions; None if the parser refuses."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from sympy import Float, I, Rational, Symbol

    config = ConversionConfig(lowercase_symbols=False)
    text = "(" + ")-(".join(split(in_grammar(text), "=")) + ")"
    with contextlib.suppress(Exception):  # the parser raises a dozen types
        tree = latex2sympy(text, normalization_config=None, conversion_config=config)
        decimals = {decimal: Rational(str(decimal)) for decimal in tree.atoms(Float)}
        return tree.xreplace(decimals | {Symbol("i"): I})


def evaluate(text: str, point: int) -> Any:
    """Compute an expression with numbers for its symbols; None if the result is no number.

    Each symbol gets a number that depends on its name and the point: from 0 to 5 at point 0, from
    -5 to 0 at point 1, from -1 to 1 at point 2. So |x| differs from x, and |x^2-4| from x^2-4.
    """
    from sympy import Rational

    tree = parse(text)
    if tree is None:
        return None
    numbers = {}
    for symbol in tree.free_symbols:
        place = Rational(1 + zlib.crc32(f"{symbol} {point}".encode()) % 9973, 1994)
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
    a = a.evalf(digits)
    b = b.evalf(digits)
    is_finite = a.is_finite and b.is_finite
    return bool(is_finite and abs(a - b) <= abs(a) / Rational(10) ** (digits - 50))


def by_algebra(gold: str, pred: str) -> bool:
    """Compare two values, or two equations up to a factor, at three points."""
    golds = [evaluate(gold, point) for point in range(3)]
    preds = [evaluate(pred, point) for point in range(3)]
    if None in golds + preds:
        return False
    if "=" in gold:
        # 0=0 is no answer. Otherwise l-r of one must be the same multiple of l-r of the other at
        # every point: a1/b1 = a2/b2, without division.
        if 0 in golds + preds:
            return False
        golds, preds = [golds[0] * b for b in preds], [preds[0] * a for a in golds]
    elif (number(gold) or number(pred)) and golds[0].is_real and preds[0].is_real:
        a = Fraction(str(golds[0].evalf(30)))
        b = Fraction(str(preds[0].evalf(30)))
        if is_close(gold, pred, a, b):
            return True
    return all(is_equal(*pair) for pair in zip(golds, preds, strict=True))


# Workers ------------------------------------------------------------------------------------------


class Worker:
    """A process that does algebra on one pair at a time; it starts when the first pair comes.

    It is this file as a script: multiprocessing would import the main script again, with torch and
    vLLM. It ends when its stdin closes, which happens however the calling process ends. It has a
    process group of its own, so that Ctrl-C does not reach it. Its errors appear on stderr.
    """

    process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the process."""
        command = [sys.executable, "-P", __file__, "--worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, process_group=0, **pipes)

    def ask(self, pair: str) -> float:
        """Return 1.0 or 0.0 for a pair; if the worker is killed from outside, ask another once."""
        for _ in range(2):
            if self.process is None:
                self.start()
            with contextlib.suppress(BrokenPipeError):  # a worker that has ended: no reply comes
                print(pair, file=self.process.stdin, flush=True)
            reply = self.process.stdout.readline()
            if reply == "error\n":
                break
            if reply:
                return float(reply)
            self.process.communicate()  # the process has ended: close its pipes
            status = self.process.returncode  # -9 after signal 9
            self.process = None
            if status in (-signal.SIGPROF, -signal.SIGALRM):
                counts["timeouts"] += 1
                return 0.0
            if status > 0:
                raise RuntimeError("the grading worker does not start; its error is printed above")
        counts["failures"] += 1
        return 0.0


@functools.cache
def waiting_jobs() -> queue.SimpleQueue:
    """Return the queue of the pairs that wait for a worker; the first call starts the threads."""
    jobs = queue.SimpleQueue()
    for _ in range(min(8, os.cpu_count() or 1)):
        # Daemons, since the interpreter waits for other threads before it exits.
        threading.Thread(target=serve, args=(jobs,), daemon=True).start()
    return jobs


# A forked process has none of the threads, so it starts its own.
os.register_at_fork(after_in_child=waiting_jobs.cache_clear)


def serve(jobs: queue.SimpleQueue) -> None:
    """Take pairs from the queue and give them to the worker of this thread."""
    worker = Worker()
    while True:
        future, pair = jobs.get()
        try:
            future.set_result(worker.ask(pair))
        except Exception as error:  # raised again where the result is asked for
            future.set_exception(error)


def work() -> None:
    """Run as a worker: read pairs from stdin, write a reward for each, until stdin closes."""
    # More than 4 GB raises MemoryError here, before the machine runs out.
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    # The parser is slow until it has seen most of its grammar.
    by_algebra(r"\frac{x^{2}}{\sqrt[3]{8}}-\frac{2\pi}{3}=1", r"(x-1)(x+1)=\frac{4\pi}{3}+\sin x")
    for line in sys.stdin:
        # The signals of these timers end this process.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.alarm(WALL_SECONDS)
        try:
            reply = float(decide(*json.loads(line), by_algebra))
        except Exception:
            traceback.print_exc()
            reply = "error"
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        with contextlib.suppress(BrokenPipeError):  # the calling process has ended meanwhile
            print(reply, flush=True)


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    work()
