"""The mathematical reward: is the answer in a response's last box equal to the reference answer?

Two answers are equal when one of these lines says so (docs/grading.md has the reasons):

    spelling        \\dfrac12 = 1/2 = {1 \\over 2},   1,234 = 1234,   \\text{Even} = even
    exact value     \\sqrt{8} = 2\\sqrt{2},   (x+1)^2 = x^2+2x+1,   2^{2008} - 2 is not 2^{2008}
    decimal         1/3 = 0.333333: six digits or more, each of them right
    percent         50\\% = 50 = 0.5
    unit            5\\text{ kg} = 5 kilograms = 5, but not 5 g; a base is a unit: 52_8 = 52
    name            x = 5 is 5, and 2 + 3 = 5 is 5; x + y = 5 is an equation
    equation        y = 2x + 3 is 2x - y + 3 = 0: equal up to a factor
    list            1, 2 = \\{2, 1\\} = 2 or 1, in any order; 1, 1, 2 is not 1, 2, 2
    tuple           (1, 2) = x=1, y=2 = a column vector; brackets and order count
    inequality      x > 2 = 2 < x = (2, \\infty)
    text            everything else is equal when it is spelled the same

A comparison is True, False or None: None means that only algebra can tell. Text and plain numbers
decide in the calling process. Algebra can hang or take all memory, so it runs in worker processes
that are killed after 3 seconds of CPU time. Nothing heavy is imported in the calling process.
"""

import functools
import json
import os
import queue
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from decimal import Decimal
from fractions import Fraction
from typing import Any

LONGEST = 500  # characters; longer boxes and answers are only compared as text
DEEPEST = 10  # nested brackets
CPU_SECONDS = 3  # of one comparison by algebra; a busy machine changes nothing
WALL_SECONDS = 60  # behind that limit, should a worker sleep

# Of this process. A failure is a worker that died of a pair twice.
counts = {"timeouts": 0, "failures": 0, "ungradable": 0}

Algebra = Callable[[str, str], bool | None]


# ---------------------------------------------------------------------------------------------
# The reward


def reward(response: str, answer: Any) -> float:
    """Return 1.0 if the response's last box equals the answer, else 0.0; ValueError: see below."""
    check_answer(answer)
    return submit(response, answer).result()


def grade(responses: list[str], answers: list[Any]) -> list[float]:
    """Grade many responses at once, in order; an answer that cannot be graded counts 0.0."""
    verdicts = [submit(*pair) for pair in zip(responses, answers, strict=True)]
    return [verdict.result() for verdict in verdicts]


def check_answer(answer: Any) -> str:
    """Return an answer as text; ValueError if it is neither text nor number, empty or broken."""
    text = str(answer)
    text = last_box(text) or text
    is_empty = text.strip(" \t\r\n$.") in ("", "nan", "inf", "-inf")
    if type(answer) not in (str, int, float) or is_empty or last_box(f"\\boxed{{{text}}}") != text:
        raise ValueError(f"no text or number, empty, or unbalanced braces: {answer!r:.60}")
    return text


def last_box(text: str) -> str | None:
    """Return what the last balanced \\boxed{} or \\fbox{} holds, None if there is none."""
    opened = []  # where each open brace's content starts; 0 if it is not a box
    last_start, last_end = 0, 0
    for token in re.finditer(r"(\\(?:boxed|fbox)\s*)?\{|\\.|\}", text, re.DOTALL):
        if token[0].endswith("{") and token[0] != r"\{":
            opened.append(token.end() if token[1] else 0)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start > last_start:
                last_start, last_end = start, token.start()
    return text[last_start:last_end] if last_start else None


def decide(gold: str, box: str, algebra: Algebra) -> bool | None:
    """Compare two pieces of LaTeX: True, False, or None where `algebra` does not know."""
    if gold.strip() == box.strip():
        return True
    if len(gold) > LONGEST or len(box) > LONGEST:
        return False
    gold, box = spell(gold), spell(box)
    if max(len(gold), len(box)) > 2 * LONGEST or max(depth(gold), depth(box)) > DEEPEST:
        return False
    if "%" not in gold + box:
        return compare(gold, box, algebra)
    ignored = compare(read_percent(gold, ""), read_percent(box, ""), algebra)
    hundredths = compare(read_percent(gold, "/100"), read_percent(box, "/100"), algebra)
    return None if None in (ignored, hundredths) else ignored or hundredths


# ---------------------------------------------------------------------------------------------
# Spelling: what changes no meaning


def pairs(table: str) -> dict[str, str]:
    """Read a table of two words each."""
    words = table.split()
    return dict(zip(words[::2], words[1::2], strict=True))


CHARACTERS = pairs(r"""
    − -   – -   × \times   · \cdot   ⋅ \cdot   ÷ /   √ \sqrt   π \pi   ∞ \infty   ° ^\circ
    θ \theta   α \alpha   β \beta   γ \gamma   λ \lambda   μ \mu   φ \phi   ω \omega   Δ \Delta
    ² ^{2}   ³ ^{3}   ½ \frac12   ¼ \frac14   ¾ \frac34   ⅓ \frac13   ⅔ \frac23   ⅛ \frac18
    ∪ \cup   ∅ \emptyset   ∈ \in   ≠ \ne   ≈ \approx   … \ldots   ℝ \mathbb{R}   € \$   £ \$
    （ (   ） )   ， ,   ： :   ； ;   ⁄ /
""")
LETTERS = str.maketrans({character: word + " " for character, word in CHARACTERS.items()})
COMMANDS = pairs(r"""
    \dfrac \frac   \tfrac \frac   \cfrac \frac   \nicefrac \frac   \dbinom \binom   \tbinom \binom
    \lt <   \gt >   \le ≤   \leq ≤   \leqslant ≤   \ge ≥   \geq ≥   \geqslant ≥   \ne ≠   \neq ≠
    \infty ∞   \in =   \approx =   \cup ,   \{ {   \} }   \lbrace {   \rbrace }   \langle (
    \rangle )   \mid |   \vert |   \lvert |   \rvert |   \lbrack [   \rbrack ]   \$ $   \% %
    \varphi \phi   \varepsilon \epsilon   \varnothing \emptyset   \dots \ldots   \cdots \ldots
    \degree ^\circ   \degrees ^\circ   \pmod \mod   \bmod \mod   \setminus \backslash   \div /
    \mathrm \text   \textbf \text   \textrm \text   \textit \text   \textnormal \text
    \mathsf \text   \mbox \text   \operatorname \text   \widehat \hat   \widetilde \tilde
""")
DROPPED = r"""
    \left \right \big \Big \bigl \bigr \Bigl \Bigr \bigg \Bigg \displaystyle \textstyle \limits
    \mathbf \boldsymbol \bm \mathit \underline \! \( \)
"""
COMMANDS |= dict.fromkeys(DROPPED.split(), "")
COMMANDS |= dict.fromkeys([r"\quad", r"\qquad", r"\,", r"\;", r"\:", r"\>", r"\ "], " ")

THOUSANDS = r"(?<![\d.,])[1-9]\d{0,2}(?:(?:\{,\}|[ ,])\d{3})+(?![\d,])(?![^(){}\[\]]*[)\]}])"
SPELLINGS = [
    # words
    (r"(?<![\\a-zA-Z])(sqrt|pi|sin|cos|tan|log|ln|exp)(?![a-zA-Z])", r"\\\1"),  # 2pi
    (r"\\text *\{(sin|cos|tan|log|ln|exp|gcd|max|min|arc\w+)\}", r"\\\1 "),
    (r"\\text *\{( ?(?:[ei]|[\dA-Z]*\d[\dA-Z]*) ?)\}", r"\1"),  # \text{3}, \mathrm{i}
    (r"^\\text *\{([^{}]*[\d,][^{}]*)\}$", r"\1"),  # \text{5 cm}
    (r"^\\text *\{[^{}]*(is|are|:) *\}", ""),  # \text{The answer is } 5
    (r"\\text *\{ *\(?(since|because|where|for any)\b.*", ""),  # 3 \text{ (since x > 0)}
    (r" *(\\text *\{ *(%|per ?cent) *\}|%|\bper ?cent\b)", "%"),
    (r"\$ *([\d,.{}]*\d)|(?<=\d) *\$", r"\1\\text{dollar}"),  # $18.90
    (r"[ ,]*(\\text *\{[ ,]*(and|or) *\}|\b(and|or)\b|;|&)[ ,]*", ", "),  # 1, 2, and 3
    # numbers
    (THOUSANDS, lambda number: re.sub(r"\D", "", number[0])),  # 1,234 but not (1,234)
    (r"(\d*\.\d*)\\overline *\{(\d+)\}", lambda number: (number[1] + 15 * number[2])[:18]),
    (r"(?<![\d.^])(\d+) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),  # 1 1/2
    (r"(?<=\d)[eE]\+?(-?\d+)", r"\\cdot 10^{\1}"),  # 4.5e33
    # arguments
    (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\\sqrt *(\d+|[a-z])", r"\\sqrt{\1}"),
    (r"\\sqrt *\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\frac *(\w)", r"\\frac{\1}"),
    (r"(\\frac *\{(?:[^{}]|\{[^{}]*\})*\}) *(\w)", r"\1{\2}"),  # \frac12
    (r"\\frac\{(\\text[^{}]*\{[^{}]*\})\}\{(\\text[^{}]*\{[^{}]*\}[^{}]*)\}", r"\1/\2"),  # m over s
    (r"\^\{?\\prime\}?", "'"),
    (r"\^ *\{?\\circ\}?", r"^\\circ "),
    (r"C_\{?(\w+)\}?\^\{?(\w+)\}?", r"\\binom{\1}{\2}"),  # C_n^3
    (r"_\{? *\\text *\{ *([^{} ]*) *\}\}?", r"_{\1}"),  # v_\text{max}
    (r"(?<![\w}\]^_*])\{(\w*)\}", r"\1"),  # {5}
    (r"([_^]) *\{(\w)\}", r"\1\2"),  # x^{2}
    (r"\\log_(\w) *", r"\\log_{\1}"),
    # spaces and the end of the sentence
    (r"(?<![a-zA-Z\d]) +| +(?![a-zA-Z\d])", ""),
    (r"^=+|(\\\\|[\s.,;:])+$", ""),
    (r"(?<![\w)}\]!|'])\+", ""),  # +5
    # sets
    (r"^(\\mathbb\{R\}|(\\text\{)?all real numbers\}?)$", "(-∞,∞)"),
    (r"^([a-z]=)?\\mathbb\{R\}\\backslash\{([^{},]*)\}$", r"(-∞,\2),(\2,∞)"),
    (r"^(?:\([^()]*\)|[^=,]*)=(\{.*\})$", r"\1"),  # x \in \{1, 2\}
]


@functools.lru_cache(10_000)
def spell(text: str) -> str:
    """Write LaTeX in one of the many ways in which the same thing can be spelled."""
    text = re.sub(r"(?<!\\)\$", "", text.translate(LETTERS))
    text = re.sub(r"\\[a-zA-Z]+|\\.", lambda command: COMMANDS.get(command[0], command[0]), text)
    text = re.sub(r"[\s~]+", " ", text).strip()
    text = read_matrix(text)
    for pattern, replacement in SPELLINGS:
        text = re.sub(pattern, replacement, text)
    return text


MATRIX = r"([^,=]*?)[(\[]? ?\\begin\{(?:array\}\{[^{}]*|[pb]?matrix)\}(.*?)\\end\{\w+\} ?[)\]]?"


def read_matrix(text: str) -> str:
    """Write a matrix as [[its], [rows]] and a column as a tuple; a factor in front goes inside."""

    def rows(matrix: re.Match) -> str:
        lines = matrix[2].strip().removesuffix(r"\\").split(r"\\")
        entries = [line.split("&") for line in lines]
        if matrix[1].strip():
            entries = [[rf"{matrix[1]}\cdot({entry})" for entry in line] for line in entries]
        lines = [",".join(line) for line in entries]
        if "&" in matrix[2]:
            return "[[" + "],[".join(lines) + "]]"
        return "(" + ",".join(lines) + ")"

    return re.sub(MATRIX, rows, text)


def read_percent(text: str, replacement: str) -> str:
    """Replace the percent sign after a value."""
    return re.sub(r"%(?=$|[,)\]])", replacement, text)


# ---------------------------------------------------------------------------------------------
# Parts: brackets, lists, inequalities, units

BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


def depth(text: str) -> int:
    """Count how deep brackets are nested."""
    level, deepest = 0, 0
    for character in text:
        level += BRACKETS.get(character, 0)
        deepest = max(deepest, level)
    return deepest


def split(text: str, separator: str) -> list[str]:
    """Split a text where a separator stands outside of all brackets."""
    parts = [""]
    level = 0
    for character in text:
        level += BRACKETS.get(character, 0)
        if character == separator and level == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def is_enclosed(text: str) -> bool:
    """Say whether one pair of brackets holds the whole text."""
    level = 0
    for place, character in enumerate(text):
        level += BRACKETS.get(character, 0)
        if level == 0:
            return 0 < place == len(text) - 1
    return False


def unwrap(text: str) -> str:
    """Take off brackets that hold a single value, and braces that hold a set."""
    while is_enclosed(text):
        if (
            text[0] == "["
            or text[-1] == "]"
            or (text[0] == "(" and len(split(text[1:-1], ",")) > 1)
        ):
            break
        text = text[1:-1]
    return text


def split_list(text: str) -> list[str]:
    """Split a list or set; x = 1, y = 2 is the one tuple (1,2), and 1 \\pm 2 is two items."""
    text = re.sub(r"^[a-z](=[^:|]*)?[:|](?=.*[<>≤≥])", "", unwrap(text))  # {x | x > 0}
    items = []
    for part in split(text, ","):
        if "≠" in part or re.search("[<>≤≥]", part):
            items += split(read_inequality(part), ",")
        elif r"\pm" in part:
            items += [part.replace(r"\pm", "+").lstrip("+"), part.replace(r"\pm", "-")]
        else:
            items.append(part)
    names = [item[0] for item in items if re.match("[a-z]=", item)]
    if len(items) == len(set(names)) > 1:
        return ["(" + ",".join(item[2:] for item in sorted(items)) + ")"]
    return [unwrap(item) for item in items]


VARIABLE = re.compile(r"[a-zA-Z]|\\[a-z]+|[a-z]\([a-z]\)")
MIRRORED = {"<": "<", "≤": "≤", ">": "<", "≥": "≤"}


def read_inequality(text: str) -> str:
    """Write 2 < x as (2,∞), |x| < 1 as (-1,1), and x ≠ 2 as (-∞,2),(2,∞)."""
    text = re.sub(r"^(\\?[a-z]+)≠(.+)$", r"(-∞,\2),(\2,∞)", text)
    text = re.sub(r"^\|([a-z])\|([<≤])(.+)$", r"-(\3)\2\1\2\3", text)
    parts = re.split("([<>≤≥])", text)
    values, signs = parts[::2], parts[1::2]
    if set(signs) <= {">", "≥"}:
        values.reverse()
        signs = [MIRRORED[sign] for sign in reversed(signs)]
        text = values[0] + "".join(map("".join, zip(signs, values[1:], strict=True)))
    is_variable = [VARIABLE.fullmatch(value) is not None for value in values]
    if ">" in signs or "≥" in signs or is_variable.count(True) != 1:
        return text
    opening = {"<": "(", "≤": "["}
    closing = {"<": ")", "≤": "]"}
    if is_variable == [True, False]:
        return f"(-∞,{values[1]}{closing[signs[0]]}"
    if is_variable == [False, True]:
        return f"{opening[signs[0]]}{values[0]},∞)"
    if is_variable == [False, True, False]:
        return f"{opening[signs[0]]}{values[0]},{values[2]}{closing[signs[1]]}"
    return text


UNIT_TABLE = """
    m meter metre   cm centimeter centimetre   mm millimeter millimetre   km kilometer kilometre
    ft foot feet   in inch inche   yd yard   mi mile   kg kilogram   g gram   mg milligram
    lb pound   oz ounce   l liter litre   ml milliliter   s sec second   min minute   h hr hour
    degree deg circ   dollar usd   2 square sq   3 cubic   km/h kmh   mi/h mph   n newton
    j joule   w watt   hz hertz   rad radian   cent   am   pm   unit   / per
"""
UNITS = {}
for row in re.split(r"\s{3,}", UNIT_TABLE.strip()):
    for name in row.split():
        UNITS[name] = row.split()[0]
UNIT = re.compile(
    r"(?:(?:\\text\{[^{},\d+!^-](?:[^{},\d+!]|\^\{?-?\d\}?)*\}|\^\\circ *[CF]?|(?<![\\a-zA-Z])(?:m/s|[a-zA-Z]{2,})|"
    r"/|\\cdot| |(?<=\d)''?$)(?:\^\{?-?\d\}?)?)+$"
)
NOT_A_UNIT = re.compile(
    r"\b(\w*illion|hundred|thousand|dozen|score|squared|cubed|factorial|hal[fv]e?|third|quarter|"
    r"(four|fif|six|seven|eigh|nin|ten|hundred|thousand)th|plus|minus|times|over|to|or|and|not|is|"
    r"if|pi|more|less|least|most|than|about|maybe|but|percent|root|below|above|else|only)s?\b"
)
TRIGONOMETRY = re.compile(r"\\(sin|cos|tan|sec|csc|cot)(?![a-z])")


def split_unit(text: str) -> tuple[str, str]:
    """Split 5\\text{ square feet} into 5 and ft2, and 204_5 into 204 and base 5."""
    base = re.fullmatch(r"\(?([\dA-Z]*\d[\dA-Z]*)\)?_\{?\(?(\d+)\)?\}?", text)
    if base:
        return base[1], "base " + base[2]
    unit = UNIT.search(text)
    if unit is None or unit.start() == 0 or TRIGONOMETRY.search(text):
        return text, ""
    words = re.sub(r"(\w\w)\.", r"\1 ", unit[0].lower())
    words = re.sub(r"\\text|\\cdot|\.", "", words).replace("''", "in").replace("'", "ft")
    words = re.sub(r"(square|sq|cubic) (\w+)", r"\2 \1", words)
    names = []
    for name in re.findall(r"[^\W\d_]+|[-/\d]", words):
        singular = name.removesuffix("s") or name
        names.append(UNITS.get(name) or UNITS.get(singular, singular))
    is_bare = unit[0].strip()[0].isalpha()
    is_known = names[0] in UNITS or re.match(r" *[a-z]{3,}s\b", unit[0])
    if NOT_A_UNIT.search(words) or (is_bare and not is_known):
        return text, ""
    return text[: unit.start()], "".join(names)


# ---------------------------------------------------------------------------------------------
# Comparison: as text, as plain numbers, by algebra


def all_of(verdicts: Iterable[bool | None]) -> bool | None:
    """Combine verdicts that must all be true."""
    verdicts = set(verdicts)
    if False in verdicts:
        return False
    return None if None in verdicts else True


def compare(gold: str, pred: str, algebra: Algebra) -> bool | None:
    """Compare two spelled texts: as lists, equations, tuples or values."""
    golds, preds = split_list(gold), split_list(pred)
    if golds == preds:
        return True
    if len(golds) > 1 or len(preds) > 1:
        return compare_lists(golds, preds, algebra)
    gold, pred = golds[0], preds[0]
    if len(split(gold, "=")) > 1 or len(split(pred, "=")) > 1:
        return compare_equations(gold, pred, algebra)
    gold_is_tuple = is_enclosed(gold)
    if gold_is_tuple or is_enclosed(pred):
        return compare_tuples(gold, pred, algebra)
    return compare_values(gold, pred, algebra)


def compare_lists(golds: list[str], preds: list[str], algebra: Algebra) -> bool | None:
    """Find a partner for each item, in any order."""
    if len(golds) != len(preds):
        return False
    if len(golds) > 20:
        return sorted(golds) == sorted(preds)
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
    """Compare tuples, intervals and matrices: the same brackets, and each item with its own."""
    if not (is_enclosed(gold) and is_enclosed(pred)):
        return False
    golds, preds = split(gold[1:-1], ","), split(pred[1:-1], ",")
    if gold[0] + gold[-1] != pred[0] + pred[-1] or len(golds) != len(preds):
        return False
    return all_of(compare(a, b, algebra) for a, b in zip(golds, preds, strict=True))


NAME = re.compile(
    r"(?:[A-Z]+|[a-z]|\\[a-z]+)'*(?:_\{?\w+\}?)?(?:\([\w,]+\))?|\([a-z](?:,[a-z])*\)|\|[A-Z]\||"
    r"m?\\angle ?\w+|\\(?:text|overline|vec)\{[^{}]*\}"
)


def compare_equations(gold: str, pred: str, algebra: Algebra) -> bool | None:
    """Compare where at least one side has an equals sign: x = 5, 2 + 3 = 5, y = 2x + 3."""
    golds, preds = split(gold, "="), split(pred, "=")
    has_name = len(golds) == 2 and NAME.fullmatch(golds[0]) is not None
    if len(golds) > 1 and not (has_name and (len(preds) == 1 or preds[0] == golds[0])):
        both = len(golds) == len(preds) == 2
        return compare_values(gold, pred, algebra) if both else False
    # What is left of the first sign may be a name; everything else must equal the value.
    without_arguments = re.sub(r"_\{?\w+\}?|(?<=\w)\([-\d,]+\)", "", preds[0])
    if (
        len(preds) > 1
        and re.search("[a-zA-Z]", without_arguments)
        and not re.search(r"\d", without_arguments)
    ):
        preds = preds[1:]
    return all_of(compare(golds[-1], link, algebra) for link in preds)


def compare_values(gold: str, pred: str, algebra: Algebra) -> bool | None:
    """Compare two single values, or two equations."""
    gold, gold_unit = split_unit(gold)
    pred, pred_unit = split_unit(pred)
    if gold_unit and pred_unit and gold_unit != pred_unit:
        return False
    if words(gold) == words(pred):
        return True
    a, b = number(gold), number(pred)
    if a is not None and b is not None:
        if ("." in gold) == ("." in pred):
            return a == b
        return a == b or is_close(gold, b) or is_close(pred, a)
    if is_text(gold) or is_text(pred):
        return False
    if symbols(gold) != symbols(pred):
        return False
    return algebra(gold, pred)


def words(text: str) -> str:
    """Drop what makes no difference between words."""
    text = re.sub(r"\\text *\{\(?([^{}]*?)\)?\}", r"\1", text)
    text = re.sub(r"(?<!\d) | (?!\d)|[.]$", "", text)
    return text.casefold() if re.fullmatch(r"[A-Z]|[a-zA-Z,]{2,}", text) else text


FUNCTIONS = r"""frac sqrt cdot times binom sin cos tan sec csc cot sinh cosh tanh arcsin arccos arctan
    log ln exp lfloor rfloor lceil rceil max min gcd sum circ pi""".split()
SYMBOLS = r"""alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi
    psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega hbar ell partial nabla bar hat tilde dot
    ddot vec variable""".split()
TEXT = re.compile(
    r"\\text|[:#∞%≡≠<>≤≥~$\"]|\d \d|[A-Z]\d|(^|=)[A-Z]{2,}(=|$)|"
    rf"\\(?!(?:{'|'.join(FUNCTIONS + SYMBOLS)})(?![a-zA-Z]))"
)
TOO_LARGE = re.compile(r"(\^\{[^{}]*){2}\^|\d{5} *!|!!|\\binom\D*\d{6}|\^\{?\d{7}")


def is_text(text: str) -> bool:
    """Say whether a text is nothing to compute with: words, ratios, unknown commands, huge numbers."""
    return TEXT.search(text) is not None or TOO_LARGE.search(text) is not None


def symbols(text: str) -> set[str]:
    """Return the letters and Greek letters of an expression, but for e, i and pi."""
    found = set(re.findall(r"\\[a-zA-Z]+|[a-zA-Z]", text))
    return found - {"e", "i"} - {"\\" + name for name in FUNCTIONS}


NUMBER = re.compile(
    r"(-?)(?:(\d*)\\frac\{(-?\d+)\}\{(\d+)\}|(\d+\.?\d*|\.\d+)(?:/(\d+))?"
    r"(?:\\(?:cdot|times)10\^\{?(-?\d{1,3})\}?)?)"
)


def number(text: str) -> Fraction | None:
    """Read 5, -1.5, 3/4, \\frac{3}{4}, 2\\frac{1}{2} and 4.5 \\cdot 10^{33}; None for the rest."""
    found = NUMBER.fullmatch(text)
    if found is None:
        return None
    sign, whole, top, bottom, decimal, divisor, exponent = found.groups()
    if 0 in (int(bottom or 1), int(divisor or 1)):
        return None
    if decimal:
        value = Fraction(decimal) / int(divisor or 1) * Fraction(10) ** int(exponent or 0)
    else:
        value = int(whole or 0) + Fraction(int(top), int(bottom))
    return -value if sign else value


def is_close(decimal: str, exact: Fraction) -> bool:
    """Say whether a decimal shows six or more digits of an exact value, each of them right."""
    if not re.fullmatch(r"-?\d*\.\d*", decimal) or exact.denominator == 1:
        return False
    shown = Decimal(decimal)
    digits = min(max(len(shown.as_tuple().digits), 6), 12)
    last_place = Fraction(10) ** (shown.adjusted() + 1 - digits)
    return abs(Fraction(shown) - exact) <= last_place / 2


# ---------------------------------------------------------------------------------------------
# Algebra, in a worker


def in_grammar(text: str) -> str:
    """Write an expression in the grammar of math-verify's parser, each symbol by a safe name.

    The parser takes I for the imaginary unit, gamma for a constant, f(x + 1) for a call, dv for a
    differential. As \\variable{...} each symbol is only itself, and a product is a product.
    """

    def safe(symbol: re.Match) -> str:
        if symbol[0] in ("e", "i") or symbol[1].lstrip("\\") in FUNCTIONS:
            return symbol[0]
        spelled = re.sub(r"[ {}]", "", symbol[0])
        return r"\variable{v" + spelled.encode().hex() + "}"

    degree = r"\\frac{\\pi}{180}" if TRIGONOMETRY.search(text) else ""
    text = re.sub(r"\^\\circ", degree and r"\\cdot" + degree, text)
    text = re.sub(r"((?<![_^\d])\d+|\)|\\pi *)(?=\()", r"\1\\cdot ", text)  # 2(3) is no mixed number
    accent = r"\\(?:bar|hat|tilde|d?dot|vec) *\{?[a-zA-Z]\}?"
    subscript = r"'*(?:_(?:\w|\{[^{}]*\}))?'*"
    return re.sub(rf"({accent}|\\[a-zA-Z]+|[a-zA-Z]){subscript}", safe, text)


@functools.lru_cache(10_000)
def evaluate(text: str, point: int) -> Any:
    """Put numbers for the symbols; l = r is the value of l - r. None if that makes no number."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from sympy import Float, I, Rational, Symbol

    config = ConversionConfig(lowercase_symbols=False)
    text = "(" + ")-(".join(split(in_grammar(text), "=")) + ")"
    try:
        tree = latex2sympy(text, normalization_config=None, conversion_config=config)
    except Exception:  # the parser raises a dozen types
        return None
    numbers = {decimal: Rational(str(decimal)) for decimal in tree.atoms(Float)}
    for symbol in tree.free_symbols:
        # All symbols are positive at the first point and negative at the second: |x| is not x.
        place = 1 + zlib.crc32(f"{symbol} {point}".encode()) % 9973
        numbers[symbol] = Rational(place, 1994) + (0, -5, Rational(-5, 2))[point]
    numbers[Symbol("i")] = I
    try:
        value = tree.xreplace(numbers).doit()
    except Exception:
        return None
    return value if value.is_number and value.is_finite is not False else None


def is_equal(a: Any, b: Any) -> bool:
    """Compare two numbers: rational ones exactly, others to 50 digits more than their sizes have."""
    from sympy import Rational

    if a.is_Rational and b.is_Rational:
        return a == b
    bits = 0
    for rational in (a + b).atoms(Rational):
        bits += int(rational.p).bit_length() + int(rational.q).bit_length()
    digits = min(100 + bits // 3, 20_000)
    a, b = a.evalf(digits), b.evalf(digits)
    if not (a.is_finite and b.is_finite):
        return False
    return bool(abs(a - b) <= abs(a) / Rational(10) ** (digits - 50))


def by_algebra(gold: str, pred: str) -> bool:
    """Compare two values, or two equations up to a factor, at two points."""
    golds = [evaluate(gold, point) for point in range(3)]
    preds = [evaluate(pred, point) for point in range(3)]
    if None in golds + preds:
        return False
    if "=" in gold:
        is_trivial = 0 in golds + preds
        ratios = [(golds[0] * pred, gold * preds[0]) for gold, pred in zip(golds, preds)]
        return not is_trivial and all(is_equal(*ratio) for ratio in ratios)
    for decimal, exact in [(gold, preds[0]), (pred, golds[0])]:
        if number(decimal) is not None and exact.is_real:
            if is_close(decimal, Fraction(str(exact.evalf(30)))):
                return True
    return all(is_equal(a, b) for a, b in zip(golds, preds, strict=True))


# ---------------------------------------------------------------------------------------------
# Worker processes


def undecided(gold: str, pred: str) -> None:
    """Stand for algebra in the calling process."""


def submit(response: str, answer: Any) -> Future:
    """Grade a response and return at once; the future's result is 1.0 or 0.0.

    What text and plain numbers decide is decided here. The rest goes to a worker process. An answer
    that cannot be graded gives 0.0 and is counted.
    """
    verdict = Future()
    try:
        gold = check_answer(answer)
    except ValueError:
        counts["ungradable"] += 1
        verdict.set_result(0.0)
        return verdict
    box = last_box(response.rpartition("</think>")[2].partition("<think>")[0])
    is_right = box is not None and decide(gold, box, undecided)
    if is_right is None:
        worker_queue(os.getpid()).put((verdict, gold, box))
    else:
        verdict.set_result(float(is_right))
    return verdict


class Worker:
    """A process that compares by algebra, one pair at a time, and is killed if it takes too long.

    It is this file, run as a script: multiprocessing would import the main script again, torch and
    vLLM included. It ends when its standard input closes, however the parent ends. Ctrl-C does not
    reach it, as it has a process group of its own. Its tracebacks go to the parent's stderr.
    """

    def __init__(self) -> None:
        self.process = None

    def start(self) -> None:
        """Start the process and wait until it has imported the parser; RuntimeError if it cannot."""
        command = [sys.executable, "-P", __file__, "--worker"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, process_group=0
        )
        if self.process.stdout.readline() != "ready\n":
            self.kill()
            raise RuntimeError("the grading worker does not start, its error is above")

    def kill(self) -> int:
        """Kill the process and return its exit status."""
        self.process.kill()
        status = self.process.wait()
        self.process = None
        return status

    def reply(self, line: str) -> str:
        """Send a line and return the reply; empty if the process died or slept too long."""
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        try:
            print(line, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return ""
        return self.process.stdout.readline() if poll.poll(1000 * WALL_SECONDS) else ""

    def ask(self, gold: str, box: str) -> float:
        """Return 1.0 or 0.0; a worker that dies of anything but its limit has a second try."""
        for _ in range(2):
            if self.process is None:
                self.start()
            reply = self.reply(json.dumps([gold, box]))
            if reply:
                return float(reply)
            self.process.poll()
            if self.kill() in (-signal.SIGPROF, -signal.SIGKILL):
                counts["timeouts"] += 1
                return 0.0
        counts["failures"] += 1
        return 0.0


@functools.cache
def worker_queue(pid: int) -> queue.SimpleQueue:
    """Return the queue of this process, or of a fork, served by a thread for each worker."""
    jobs = queue.SimpleQueue()
    for _ in range(min(8, os.cpu_count() or 1)):
        # Daemons: the interpreter does not wait for them when it exits.
        threading.Thread(target=serve, args=(jobs,), daemon=True).start()
    return jobs


def serve(jobs: queue.SimpleQueue) -> None:
    """Answer jobs with a worker of this thread."""
    worker = Worker()
    while True:
        verdict, gold, box = jobs.get()
        try:
            verdict.set_result(worker.ask(gold, box))
        except Exception as error:  # raised where the result is used
            verdict.set_exception(error)


def work() -> None:
    """Compare the pairs that come in on stdin until it closes."""
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    # The parser is slow until it has seen what the grammar has.
    by_algebra(r"\frac{x^{2}}{\sqrt[3]{8}}-\frac{2\pi}{3}=1", r"(x-1)(x+1)=\frac{4\pi}{3}+\sin x")
    print("ready", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # the kernel kills this process then
        print(float(decide(*json.loads(line), by_algebra)), flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    work()
