r"""Comparing two expressions by algebra: are they equal at each of a few test points?

    by_algebra("(x+1)^2", "x^2+2x+1")  ->  True
    by_algebra("2^{2008}-2", "2^{2008}")  ->  False: values that are close are not equal

math-verify's parser reads the expressions, and sympy computes them. We do not use math-verify's
`verify`: it takes close values for equal, and it reads 5x as a word.

Either may hang or take all memory, so all this runs in a worker process of math_reward.py. The
calling process imports this file, but neither sympy nor the parser.
"""

import functools
import re
import zlib
from fractions import Fraction
from typing import Any

from apo.math_equality import FUNCTIONS, is_close, number, symbols
from apo.math_spelling import split
from apo.math_units import TRIGONOMETRY

# The points at which two expressions are compared, by the scale of their coordinates. Those of the
# last one lie between -1 and 1.
POINTS = ("1", "-1", "small")
# More points for what may have a kink far from 0, as |x-10| has, or jumps, as \lfloor n/2\rfloor.
# At whole numbers alone, \lceil n/2\rceil differs from \lfloor n/2\rfloor+1.
KINKS = re.compile(r"\\(lfloor|lceil|max|min|sqrt)|\||\^\{1/2\}")
FAR_POINTS = ("9", "-9", *(f"whole {n}" for n in range(1, 9)))
# But these have too many digits there: a factorial, a binomial, a symbol in an exponent or a root.
FAST_GROWTH = re.compile(r"!|\\binom|\\exp|\^\{?[^{}]*[a-zA-Z]|\\sqrt\[[^]]*[a-zA-Z]")


# \lfloor n/2\rfloor is compared at whole numbers alone, since n is one by custom.
WHOLE_PART = re.compile(r"\\[lr](floor|ceil)")
WHOLE_SYMBOLS = {"k", "m", "n"}
WHOLE_POINTS = tuple(f"whole {n}" for n in range(1, 41))


def by_algebra(gold: str, pred: str) -> bool:
    """Compare two values, or two equations up to a factor, at POINTS; at FAR_POINTS if need be."""
    both = f"{gold} {pred}"
    is_whole = WHOLE_PART.search(both) and symbols(gold) and symbols(gold) <= WHOLE_SYMBOLS
    is_whole = is_whole and not FAST_GROWTH.search(both)
    points = WHOLE_POINTS if is_whole else POINTS
    golds = [evaluate(gold, point) for point in points]
    preds = [evaluate(pred, point) for point in points]
    is_equation = len(split(gold, "=")) > 1
    if KINKS.search(both) and symbols(gold) and not is_whole and not FAST_GROWTH.search(both):
        for point in FAR_POINTS:
            a = evaluate(gold, point)
            b = evaluate(pred, point)
            # Both may have a pole there, or two equations a solution: that says nothing.
            if (a, b) != (None, None) and not (is_equation and a == b == 0):
                golds.append(a)
                preds.append(b)
    if None in golds + preds:
        return False
    if is_equation:
        return are_multiples(golds, preds)
    if are_close_numbers(gold, pred, golds[0], preds[0]):
        return True
    return are_equal(golds, preds)


def are_close_numbers(gold: str, pred: str, a: Any, b: Any) -> bool:
    """Say whether one text is a decimal, and right to all its digits: 1.41421 for \\sqrt{2}.

    `a` and `b` are the values of the texts.
    """
    has_number = number(gold) is not None or number(pred) is not None
    if not has_number or not a.is_real or not b.is_real:
        return False
    return is_close(gold, pred, Fraction(str(a.evalf(30))), Fraction(str(b.evalf(30))))


def are_multiples(golds: list[Any], preds: list[Any]) -> bool:
    """Say whether two equations are the same up to a factor, from l-r of both at each point.

    l-r of one must be the same multiple of l-r of the other: a1/b1 = a2/b2, without division.
    """
    if 0 in golds + preds:  # 0=0 is no answer
        return False
    return are_equal([golds[0] * b for b in preds], [preds[0] * a for a in golds])


def are_equal(golds: list[Any], preds: list[Any]) -> bool:
    """Say whether two expressions have the same value at each point."""
    return all(is_equal(a, b) for a, b in zip(golds, preds, strict=True))


def is_equal(a: Any, b: Any) -> bool:
    """Compare rational numbers exactly, others to 50 digits more than `size` counts.

    They are computed to 100 more, since computing may lose some of the last ones.
    """
    from sympy import Rational

    if a.is_Rational and b.is_Rational:
        return a == b
    digits = min(100 + max(size(a), size(b)), 20_000)
    a = a.evalf(digits)
    b = b.evalf(digits)
    if not a.is_finite or not b.is_finite:
        return False
    return bool(abs(a - b) <= abs(a) / Rational(10) ** (digits - 50))


def size(value: Any) -> int:
    """Return about how many digits the parts of a value have, before and behind the point.

    Two terms can differ by so many: 1-e^{-200} is very close to 1, but is not 1.
    """
    from sympy import Function, Pow, Rational
    from sympy.functions.elementary.hyperbolic import HyperbolicFunction

    bits = 0
    for part in value.atoms(Rational):
        bits += int(part.p * part.q).bit_length()
    for part in value.atoms(Pow, Function):
        near = abs(part.evalf(5))
        if near.is_Float and near > 0:
            bits += 2 * abs(near._mpf_[2] + near._mpf_[3])  # the exponent of its first bit
    # \tanh 200 is 1 to more than 170 digits.
    for part in value.atoms(HyperbolicFunction):
        for argument in part.args:
            near = abs(argument.evalf(5))
            if near.is_Float:
                bits += 6 * int(min(near, 10_000))
    return min(bits // 3, 20_000)


def evaluate(text: str, point: str) -> Any:
    """Compute an expression with numbers for its symbols; None if the result is no number."""
    tree = parse(text)
    if tree is None:
        return None
    numbers = {}
    for symbol in tree.free_symbols:
        numbers[symbol] = coordinate(str(symbol), point)
    try:
        value = tree.xreplace(numbers).doit()
        if value.is_number and value.is_finite is not False:
            return value
    except Exception:  # sympy has no common type
        return None
    return None


def coordinate(symbol: str, point: str) -> Any:
    """Return the number of a symbol at a point, which depends on its name alone.

    With both signs, and numbers on both sides of 1, |x| differs from x and |x^2-4| from x^2-4.
    """
    from sympy import Rational

    drawn = 1 + zlib.crc32(f"{symbol} {point}".encode()) % 9973
    if point.startswith("whole"):
        return Rational(1 + drawn % 60)
    place = Rational(drawn, 1994)  # from 0 to 5
    if point == "small":
        return place * 2 / 5 - 1  # from -1 to 1
    return place * int(point)


@functools.lru_cache(10_000)
def parse(text: str) -> Any:
    """Parse an expression, l=r as l-r, decimals as fractions; None if the parser refuses."""
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from sympy import Float, I, Rational, Symbol

    config = ConversionConfig(lowercase_symbols=False)
    sides = split(in_grammar(text), "=")
    difference = "(" + ")-(".join(sides) + ")"
    exact = {Symbol("i"): I}
    try:
        tree = latex2sympy(difference, normalization_config=None, conversion_config=config)
        for decimal in tree.atoms(Float):
            exact[decimal] = Rational(str(decimal))
        return tree.xreplace(exact)
    except Exception:  # the parser raises a dozen types
        return None


# A function whose argument has no brackets: in \ln 2\cdot 3, \ln 3/2 and \sin x/\cos x it ends
# before the sign, where the parser would go on. But \sin\pi/6 is the sine of \pi/6.
CALLED = r"\\(?:sinh?|cosh?|tanh?|sec|csc|cot|ln|log(?:_\{\w+\})?)(?:\^(?:\d|\{\d+\}))?(?![a-zA-Z])"
NAME = r"\\(?!cdot|times)[a-z]+"
FACTOR = (
    rf"\d+(?:\.\d+)?(?:[a-zA-Z]|{NAME})?|[a-zA-Z]|\\frac\{{[^{{}}]*\}}\{{[^{{}}]*\}}"
    rf"|\{{[^{{}}]*\}}|{NAME}"
)
ARGUMENT = rf"(?:{FACTOR})(?:\\cdot\\frac\{{\\pi\}}\{{180\}})?"
ENDS_ARGUMENT = rf"\\cdot|\\times|/(?:{CALLED}|\w\^)"
NUMBER = r"[\d.]+|\\frac\{\d+\}\{\d+\}"


def in_grammar(text: str) -> str:
    """Return an expression for math-verify's parser, each symbol under a name that is only a name.

    Left to itself, the parser reads I as the imaginary unit, gamma as a number, f(x+1) as a call
    and dv as a differential.
    """
    # A degree is \pi/180 only inside of sines and the like; 180^\circ-x is 180-x.
    degree = ""
    if TRIGONOMETRY.search(text):
        degree = r"\\cdot\\frac{\\pi}{180}"
    text = re.sub(r"\^\\circ", degree, text)
    text = re.sub(r"(?<=\d)e(-?\d+)", r"\\cdot 10^{\1}", text)
    text = re.sub(r"(?<![\w.}^)])(\d+)\\frac\{(\d+)\}\{(\d+)\}", add_mixed, text)
    text = re.sub(r"\)(?=\\frac)", r")\\cdot ", text)  # else (3)\frac{1}{2} is 3+1/2
    text = re.sub(r"([\d)}]|\\pi *)?\|([^|]+)\|", multiply_absolute, text)
    text = re.sub(r"((?<![_^\d])\d+|\)|\\pi *)(?=\()", r"\1\\cdot ", text)  # else 2(3) is 2+3
    text = re.sub(r"((?<![_^\d])\d+|\))(?=\\binom)", r"\1\\cdot ", text)  # likewise
    text = re.sub(r"(\\binom\{[^{}]*\}\{[^{}]*\})(?=\d|\\frac|\\binom)", r"\1\\cdot ", text)
    text = re.sub(rf"({CALLED} *(?>{ARGUMENT}))(?={ENDS_ARGUMENT})", r"(\1)", text)
    text = re.sub(rf"(\\l(?:n|og(?:_\{{\w+\}})?) *(?>{ARGUMENT}))(?=/)", r"(\1)", text)
    text = re.sub(r"(?<=\d)\{(\d+)\}", r"\1", text)  # 1{2} is printed as 12
    # The real root, not the first one of the complex ones.
    text = re.sub(rf"\\sqrt\[([3579])\]\{{-({NUMBER})\}}", r"(-\\sqrt[\1]{\2})", text)
    accent = r"\\(?:bar|hat|tilde|d?dot|vec) *\{?[a-zA-Z]\}?"
    subscript = r"'*(?:_(?:\w|\{[^{}]*\}))?'*"
    return re.sub(rf"({accent}|\\[a-zA-Z]+|[a-zA-Z]){subscript}", rename_symbol, text)


def add_mixed(found: re.Match) -> str:
    """Return the mixed number 3\\frac{1}{3} as (3+\\frac{1}{3}); a product as it is."""
    whole, top, bottom = found.groups()
    if int(top) >= int(bottom):
        return found[0]
    return rf"({whole}+\frac{{{top}}}{{{bottom}}})"


def multiply_absolute(found: re.Match) -> str:
    """Return 2|x| as 2\\cdot |x|: the parser would take |x|+2|y| for a product."""
    before = found.string[: found.end(1)] if found[1] else ""
    if not before or re.search(f"{CALLED}$", before):  # \log_{2}|x| is no product
        return found[0]
    return f"{found[1]}\\cdot |{found[2]}|"


def rename_symbol(found: re.Match) -> str:
    """Return x_1 as a variable whose name is v and the code of x_1; e, i and \\sin stay."""
    if found[0] in ("e", "i") or found[1].removeprefix("\\") in FUNCTIONS:
        return found[0]
    return r"\variable{v" + re.sub("[ {}]", "", found[0]).encode().hex() + "}"
