"""What equal means for two answers in LaTeX (docs/grading.md gives the reasons).

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

The calling process compares text and plain numbers, and imports nothing heavy. If a pair takes
algebra, the verdict is None there instead of True or False, and a worker process of math_reward.py
compares the pair once more.
"""

import contextlib
import functools
import math
import re
import zlib
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from apo.math_spelling import (
    LETTERS,
    PERCENT,
    TRIGONOMETRY,
    is_enclosed,
    levels,
    spell,
    split,
    split_list,
    split_unit,
)

# A longer text, or one with more deeply nested brackets, equals only itself.
LONGEST = 500
DEEPEST = 10
# Compares two expressions: `by_algebra` in a worker, `leave_open` in the calling process.
Algebra = Callable[[str, str], bool | None]


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
