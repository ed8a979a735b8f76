"""Reading LaTeX: one spelling for what means the same, and the parts of an answer."""

import functools
import re
from itertools import accumulate

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
