r"""What equal means for two answers in LaTeX (docs/grading.md gives the reasons).

    spelling      \dfrac12 = 1/2 = {1 \over 2}; 1,234 = 1234; \text{Even} = even
    value         \sqrt{8} = 2\sqrt{2}; (x+1)^2 = x^2+2x+1; but 2^{2008} - 2 is not 2^{2008}
    decimal       0.333333 = 1/3: a decimal is right to all its digits, and to six at least
    percent       50\% = 50 = 0.5
    unit          5\text{ kg} = 5 kilograms = 5, but not 5 g; a base is a unit: 52_8 = 52
    name          x = 5 is 5, and so is 2 + 3 = 5; a right answer x + y = 5 is an equation
    equation      y = 2x + 3 is 2x - y + 3 = 0: equal up to a factor
    list          1, 2 = \{2, 1\} = 2 or 1, in any order; but 1, 1, 2 is not 1, 2, 2
    tuple         (1, 2) = x=1, y=2 = a column vector: brackets and order count
    inequality    x > 2 = 2 < x = (2, \infty)
    text          whatever else: the same words

A verdict is True, False or None. Text and plain numbers are compared at once. A pair that
takes algebra goes to the argument `algebra`: in the calling process this is `leave_open`, which
returns None, and in a worker process `by_algebra` of math_algebra.py.
"""

import math
import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction

from apo.math_spelling import (
    DENIAL,
    expand_characters,
    is_enclosed,
    levels,
    spell,
    split,
    split_list,
)
from apo.math_units import same_unit, split_unit

# A longer text, or one with more deeply nested brackets, equals only itself.
LONGEST = 500
DEEPEST = 10
PERCENT = r"%(?=$|[,)\]=]|\\text)"  # at the end of a value, or before a word
# A choice and its value, \textbf{(C)} 12, C) 12 or \text{C. Tuesday}; and \text{Option C}.
CHOICE = re.compile(
    r"""(?: \\text\{ \(? ([A-E]) [).:]+ [ ]* \}? | \(? ([A-E]) [).:]+ (?![\^_/*+]) )
    ((?: [^A-E] | (?<=[a-zA-Z]) [A-E] | [A-E] (?=[a-zA-Z]) )++)  # no second choice""",
    re.VERBOSE,
)
OPTION = re.compile(
    r"(?:\\text\{)?(?:[Oo]ption|[Cc]hoice|(?:[Tt]he )?(?:correct )?[Aa]nswer(?: is)?)"
    r"[: ]*\(?([A-E])\)?\.?\}?"
)
ARTICLE = r"^\\text\{(?:[Aa]n?|[Tt]he) (?=[a-zA-Z]{3})"  # \text{a parabola}
IN_TEXT = r"\\text\{\(?([^{}]*?)[).]*\}"  # \text{word}, \text{(word)}
Algebra = Callable[[str, str], bool | None]


def decide(gold: str, box: str, algebra: Algebra) -> bool | None:
    """Say whether two pieces of LaTeX are equal; None if `algebra` leaves it open."""
    # If the answer is the list `81, 256`, `81,256` is right. Further on it is read as 81256.
    as_written = box.strip()
    if as_written in (gold.strip(), re.sub(r",\s+", ",", gold.strip())):
        return True
    gold = expand_characters(gold)
    box = expand_characters(box)
    # Some patterns below take time quadratic in the length.
    if max(len(gold), len(box)) > LONGEST:
        return False
    gold = spell(gold)
    box = spell(box)
    if re.fullmatch(r"\d{1,3}(,\d{3})+", as_written) and same_items(gold, as_written):
        return True
    if re.fullmatch(r"(\\text\{)?\(?[A-E]\)?\}?", gold):
        box = chosen_letter(box)
    elif not CHOICE.fullmatch(gold):
        box = chosen_value(box)
    if max(len(gold), len(box)) > 2 * LONGEST or max(levels(gold + box)) > DEEPEST:
        return False
    if has_other_unit(gold, box):
        return False
    pairs = [(gold, box), (read_coefficients(gold), read_coefficients(box))]
    return any_of(compare_percentages(*pair, algebra) for pair in dict.fromkeys(pairs))


def compare_percentages(gold: str, box: str, algebra: Algebra) -> bool | None:
    """Compare two texts in which 50% may mean 50 or 0.5."""
    verdict = compare(re.sub(PERCENT, "", gold), re.sub(PERCENT, "", box), algebra)
    if verdict is False and "%" in gold + box:
        gold = re.sub(PERCENT, "/100", gold)
        box = re.sub(PERCENT, "/100", box)
        verdict = compare(gold, box, algebra)
    return verdict


def read_coefficients(text: str) -> str:
    """Read 1/2x as \\frac{1}{2}x: it may mean that, or \\frac{1}{2x}."""
    return re.sub(r"(?<![\w.^/}])(\d+)/(\d+)(?=[a-zA-Z(]|\\[a-z])", r"\\frac{\1}{\2}", text)


def has_other_unit(gold: str, box: str) -> bool:
    """Say whether one text is a percentage and the other has a unit: 20% is not $20.

    But 5% per year may be 0.05 per year.
    """
    is_percentage = [bool(re.search(PERCENT, text)) for text in (gold, box)]
    if is_percentage[0] == is_percentage[1]:
        return False
    percentage, other = (gold, box) if is_percentage[0] else (box, gold)
    unit_of_percentage = split_unit(re.sub(PERCENT, "", percentage))[1]
    return split_unit(other)[1] != "" and unit_of_percentage == ""


def chosen_letter(box: str) -> str:
    """Return C for \\textbf{(C)} 12 and for \\text{Option C}; any other text as it is."""
    option = OPTION.fullmatch(box)
    if option:
        return option[1]
    choice = CHOICE.fullmatch(box)
    return choice[1] or choice[2] if choice else box


def chosen_value(box: str) -> str:
    """Return 12 for \\textbf{(C)} 12; any other text, and a choice without a number, as it is."""
    choice = CHOICE.fullmatch(box)
    if choice and re.search(r"\d|\\pi", choice[3]):
        return choice[3]
    return box


def same_items(gold: str, box: str) -> bool:
    """Say whether two lists without brackets have the same items: 144,233 and 233,144."""
    return sorted(gold.strip("{}").split(",")) == sorted(box.split(","))


def leave_open(gold: str, pred: str) -> None:
    """Give no verdict on two expressions: the calling process does no algebra."""


# Comparison: the parts of two answers -------------------------------------------------------------


def compare(gold: str, pred: str, algebra: Algebra) -> bool | None:
    """Compare two texts that `spell` wrote: as lists, equations, tuples or single values."""
    golds = split_list(gold)
    preds = split_list(order_by_names(gold, pred))
    if golds == preds:
        return True
    # A response that offers several values has more items than the answer. In long lists, the
    # search for partners would take too long.
    if len(golds) != len(preds) or len(golds) > 20:
        return False
    if len(golds) > 1:
        return compare_lists(golds, preds, algebra)
    gold = golds[0]
    pred = preds[0]
    gold_sides = split(gold, "=")
    pred_sides = split(pred, "=")
    if len(gold_sides) > 1 or len(pred_sides) > 1:
        return compare_equations(gold_sides, pred_sides, algebra)
    if is_enclosed(gold) or is_enclosed(pred):
        return compare_tuples(gold, pred, algebra)
    return compare_values(gold, pred, algebra)


def order_by_names(gold: str, pred: str) -> str:
    """Return the values of k=3,n=5 in the order that the answer gives to their names.

    That is (5,3) for the answer (n,k)=(5,3), and n=5,k=3 for n=6,k=3. For an answer without names,
    A=3,B=5 is 3,5. Any other response is returned as it is.
    """
    items = split(pred, ",")
    values = dict(item.partition("=")[::2] for item in items)
    if len(values) < len(items) or "" in values.values():
        return pred
    is_plain_list = "=" not in gold and len(split(gold, ",")) > 1
    if is_plain_list and all(re.fullmatch(r"[A-Z]|\\[a-z]+", name) for name in values):
        return ",".join(values.values())
    tuple_of_names = re.match(r"\(([a-zA-Z](?:,[a-zA-Z])+)\)=", gold)
    if tuple_of_names:
        names = tuple_of_names[1].split(",")
        ordered = "(" + ",".join(values.get(name, "") for name in names) + ")"
    else:
        names = [item.partition("=")[0] for item in split(gold, ",")]
        ordered = ",".join(f"{name}={values.get(name)}" for name in names)
    return ordered if sorted(names) == sorted(values) else pred


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
    if None in verdicts:
        return None
    return True


def any_of(verdicts: Iterable[bool | None]) -> bool | None:
    """Combine verdicts of which one must be true; None if that is open."""
    verdicts = set(verdicts)
    if True in verdicts:
        return True
    if None in verdicts:
        return None
    return False


def compare_equations(golds: list[str], preds: list[str], algebra: Algebra) -> bool | None:
    """Compare two texts of which at least one has equals signs; both are split at these."""
    # x=5 accepts 5, and it accepts x=2+3=5. From here on it is 5.
    if len(golds) == 2 and is_name(golds[0]) and (len(preds) == 1 or preds[0] == golds[0]):
        golds = golds[1:]
    # y=2x+3 accepts 2x-y+3=0; x=5 rejects y=5; x+y=5 rejects 5.
    if len(golds) > 1 and any(symbols(split_unit(gold)[0]) for gold in golds):
        is_equation = len(golds) == len(preds) == 2
        return is_equation and compare_values("=".join(golds), "=".join(preds), algebra)
    # 5 accepts x=5 and x+y=5, but not 2x=5.
    if len(preds) > 1 and says_what(preds[0]):
        preds = preds[1:]
    # All sides that are left must equal the answer: 5 accepts 2+3=5 and rejects 6=5. If the answer
    # is one number in two spellings, such as 0.56=56%, each of them is right.
    return all_of(any_of(compare(gold, pred, algebra) for gold in golds) for pred in preds)


def is_name(text: str) -> bool:
    """Say whether a text is a name: x, y', a_{10}, f^{-1}(x), \\angle ABC, \\text{Area}, (x,y)."""
    text = re.sub(r"^(\\(vec|hat|bar|overline|overrightarrow) *)?\{(\w+)\}$", r"\3", text)
    function = re.sub(r"(\^\{-1\})?\([\w,|]+\)$", "", text)
    letter = re.sub(r"'*(_\{?\w+\}?)?$", "", function)
    is_letter = re.fullmatch(r"[a-zA-Z]|\\[a-z]+|\\text\{[^{}]*\}", letter)
    is_figure = re.fullmatch(r"(m?\\angle ?)?[\[|]?[A-Z]{1,4}[\]|]?", letter)
    is_ratio = re.fullmatch(r"\\(sin|cos|tan|cot|sec|csc) ?\(?\\?[a-zA-Z]+\)?", text)
    is_tuple = re.fullmatch(r"\([a-zA-Z](,[a-zA-Z])+\)", text)
    return bool(is_letter or is_figure or is_ratio or is_tuple)


# f(2), f'(3), f^{-1}(x), f^{(4)}(0), f(\frac{1}{2}) and P(X=2); but p(x-1) may be a product.
CALL = re.compile(
    r"""(?:\b[fghpqPE]|\\text\{P\}|\\mathbb\{P\}|\\Pr)'*(?:\^\{(?:-1|\(\d\))\})?
    \((?:[a-z]|-?[\d.,/]+|\\frac\{\d+\}\{\d+\}|[^()]*[=<>≤≥][^()]*)\)""",
    re.VERBOSE,
)


def says_what(left_side: str) -> bool:
    """Say whether a left side only says what has the value: x, a_{10}, f(2), \\sin A; but not 2x.

    A left side that denies it says something else: \\text{The answer is not }x. But P(\\neg A) and
    \\text{people not in line} do not deny it.
    """
    outside = re.sub(r"\(.*\)", "", left_side)
    if re.search(rf"\\l?not|\\neg|{DENIAL}", outside):
        return False
    without_calls = CALL.sub("f", left_side)
    without_indices = re.sub(r"_(\w|\{[^{}]*\})|(?<=\w)\([-\d,]+\)", "", without_calls)
    has_letter = re.search("[a-zA-Z]", without_indices)
    has_number = re.search(r"\d|^-", without_indices)
    return bool(has_letter and not has_number)


# Comparison: two values, as text and as plain numbers ---------------------------------------------


def compare_values(gold: str, pred: str, algebra: Algebra) -> bool | None:
    """Compare two values or two equations."""
    gold, gold_unit = split_unit(gold)
    pred, pred_unit = split_unit(pred)
    if gold_unit and pred_unit and not same_unit(gold_unit, pred_unit):
        return False
    if same_words(gold, pred):
        return True
    if gold_unit.startswith("base ") or pred_unit.startswith("base "):
        return gold.upper() == pred.upper()  # in 3e8 the e is a digit
    a = number(gold)
    b = number(pred)
    if a is not None and b is not None:
        return a == b or is_close(gold, pred, a, b)
    if is_text(gold) or is_text(pred):
        return False
    # Most wrong answers end here, which spares algebra. Price: x^0 and y^0 are not equal.
    if symbols(gold) != symbols(pred) or has_one_irrational(gold, pred):
        return False
    return algebra(read_euler(gold, pred), read_euler(pred, gold))


EULER = r"(?<![a-zA-Z\d])e(?![a-zA-Z])|\de(?![a-zA-Z]|-?\d)"  # as in 2e, but not in 2e-1


def read_euler(text: str, other: str) -> str:
    """Write 2e-1 as 2\\cdot e-1 where its e is Euler's number.

    It is, if the other text has Euler's number, or in a longer text: e^2-2e-1. Else 2e-1 is 0.2.
    1.5e-1 in a longer text stays 0.15.
    """
    if re.search(EULER, other):
        return re.sub(r"(?<=\d)e(?=-\d)", r"\\cdot e", text)
    if number(text) is None:
        return re.sub(r"(?<![\d.])(\d+)e(?=-\d)", r"\1\\cdot e", text)
    return text


def same_words(gold: str, pred: str) -> bool:
    """Say whether two values are the same text, with or without \\text{} and brackets.

    Capital letters count in products of symbols: mgh is not Mgh. They do not count in \\text{}, in
    a word of four letters or more, in yes, no and odd, and for the choices A to D.
    """
    gold_words = re.sub(IN_TEXT, r"\1", re.sub(ARTICLE, r"\\text{", gold))
    pred_words = re.sub(IN_TEXT, r"\1", re.sub(ARTICLE, r"\\text{", pred))
    # 420 million is 420\text{million}.
    gold_words = re.sub(r"(?<=\d) (?=[a-zA-Z])", "", gold_words)
    pred_words = re.sub(r"(?<=\d) (?=[a-zA-Z])", "", pred_words)
    if gold_words == pred_words:
        return True
    is_text = r"\text" in gold + pred
    is_word = re.fullmatch(r"[A-D]|[a-zA-Z]{4,}|(?i:yes|no|odd)", gold_words)
    return bool(is_text or is_word) and gold_words.casefold() == pred_words.casefold()


def number(text: str) -> Fraction | None:
    """Read 5, -1.5, 4.5e33, 3/4 or \\frac{3}{4}; None for all else."""
    plain = re.sub(r"^(-?)\\frac\{(-?\d+)\}\{(\d+)\}$", r"\1\2/\3", text)
    if not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)(e-?\d{1,3})?(/0*[1-9]\d*)?", plain):
        return None
    top, _, bottom = plain.partition("/")
    return Fraction(top) / int(bottom or 1)


def is_close(gold: str, pred: str, a: Fraction, b: Fraction) -> bool:
    """Say whether one text is a decimal that is right to all its digits, and to six at least.

    `a` and `b` are the values of the texts. 0.333333 is close to 1/3, and 0.33333 is not.
    """
    decimals = [text for text in (gold, pred) if re.fullmatch(r"-?\d*\.\d*", text)]
    is_whole = 1 in (a.denominator, b.denominator)  # a whole number has no rounded spelling
    if len(decimals) != 1 or is_whole:
        return False
    shown = Decimal(decimals[0])
    # Twelve digits are enough: a program's last digits are off by its rounding.
    digits = min(max(len(shown.as_tuple().digits), 6), 12)
    first_place = shown.adjusted()  # 1 for 12.34, whose first digit counts 10^1
    last_place = Fraction(10) ** (first_place + 1 - digits)
    return abs(a - b) <= last_place / 2


# The commands that the parser understands, and those that are symbols. All others are text.
FUNCTION_NAMES = """
    frac sqrt cdot times binom sin cos tan sec csc cot sinh cosh tanh arcsin arccos arctan log ln
    exp lfloor rfloor lceil rceil max min gcd sum circ pi
"""
SYMBOL_NAMES = """
    alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi psi
    omega Gamma Delta Theta Lambda Sigma Phi Psi Omega hbar ell partial nabla bar hat tilde dot ddot
    vec
"""
FUNCTIONS = set(FUNCTION_NAMES.split())
SYMBOLS = set(SYMBOL_NAMES.split())


def is_text(text: str) -> bool:
    """Say whether a value has nothing to compute with, or is too large for it."""
    commands = set(re.findall(r"\\([a-zA-Z]*)", text))
    has_other_sign = re.search(r"""[:#∞%≡≠<>≤≥~$"]""", text)
    # 1 2, the point A1, 52_8, and ABCD alone or at one side of an equation.
    has_other_name = re.search(r"(?<!\^)\d \d|[A-Z]\d|\d_|(^|=)[A-Z]{2,}(=|$)", text)
    # sympy takes the greatest common divisor of two symbols for 1.
    has_symbolic_gcd = re.search(r"\\gcd *\(?[^()]*[a-zA-Z]", text)
    # The order of a cross product counts.
    has_cross_product = r"\vec" in text and r"\times" in text
    is_known = commands <= FUNCTIONS | SYMBOLS and not has_cross_product
    if not text or not is_known or has_other_sign or has_other_name or has_symbolic_gcd:
        return True
    return is_too_large(text)


def is_too_large(text: str) -> bool:
    """Say whether a value is too large to compute: 99999!, 9!!, 2^{1000000} or 9^{9^{9^9}}."""
    has_factorial = re.search(r"\d{5} *!|!!|\\binom\D*\d{6}", text)
    has_power = re.search(r"[\^e]-?\{?\d{6}|(\^\{[^{}]*){2}\^", text)
    return bool(has_factorial or has_power)


def symbols(text: str) -> set[str]:
    """Return the letters of an expression except e, i and pi."""
    found = set(re.findall(r"\\[a-zA-Z]+|[a-zA-Z]", text))
    return {name for name in found if name.removeprefix("\\") not in FUNCTIONS | {"e", "i"}}


def has_one_irrational(gold: str, pred: str) -> bool:
    """Say whether an irrational number stands once in two values, and all else is rational.

    Then they are not equal: 5 cannot be 2\\sqrt{3}, and 1+i cannot be 2.
    """
    both = re.sub(r"\\frac|\\cdot", "/", f"{gold}={pred}")
    pieces = re.split(r"\\sqrt\{(\d+)\}|\\pi|i", both)
    if len(pieces) != 3:
        return False
    before, radicand, after = pieces
    rest = f"{before} {after}"
    is_rational = re.fullmatch(r"[-+\d{}()/= ]*", rest)
    if not is_rational or re.search(r"\b0", rest):  # a zero may cancel it
        return False
    if radicand is None:
        return True
    return math.isqrt(int(radicand)) ** 2 != int(radicand)  # \sqrt{25} is rational
