r"""Reading LaTeX: one spelling for all that mean the same, and the parts of an answer.

    spell(r"\left( \dfrac12,\; 1{,}234 \right)")  ->  (\frac{1}{2},1234)
    split_list("{1,(2,3)}")                       ->  1 and (2,3)
    read_inequality("3≥x>1")                      ->  (1,3]

Nothing here compares: math_equality.py does.
"""

import functools
import re
from itertools import accumulate, pairwise

# Tables -------------------------------------------------------------------------------------------

# A character, and what it is in LaTeX.
CHARACTER_TABLE = r"""
    − -   – -   × \times   · \cdot   ⋅ \cdot   ÷ /   √ \sqrt   π \pi   ∞ \infty   ° ^\circ   ， ,
    ½ \frac12   ¼ \frac14   ¾ \frac34   ⅓ \frac13   ⅔ \frac23   ⁄ /   € \euro   £ \$
    ± \pm   ‐ -   ‑ -   ¢ \text{cent}
    θ \theta   α \alpha   β \beta   γ \gamma   λ \lambda   μ \mu   φ \phi   ω \omega   Δ \Delta
    σ \sigma   ε \epsilon   ϵ \epsilon   ρ \rho   τ \tau   δ \delta   η \eta   ν \nu   κ \kappa
    ξ \xi   ψ \psi   χ \chi   ζ \zeta   ϕ \phi   µ \mu   Ω \Omega   Σ \Sigma   Φ \Phi   Ψ \Psi
    Γ \Gamma   Λ \Lambda   Θ \Theta   Π \Pi   Ξ \Xi
    ∪ \cup   ∅ \emptyset   ∈ \in   ≠ \ne   ≈ \approx   … \ldots   ∕ /   （ (   ） )   ： :
    ⩽ \le   ⩾ \ge   ≦ \le   ≧ \ge   ⟨ \langle   ⟩ \rangle   ⌊ \lfloor   ⌋ \rfloor   º ^\circ
    ⅕ \frac15   ⅖ \frac25   ⅗ \frac35   ⅘ \frac45   ⅙ \frac16   ⅜ \frac38   ⅝ \frac58   ⅞ \frac78
    ⅛ \frac18   ⅚ \frac56   ∶ :   ∖ \setminus   ′ '
    ℝ \mathbb{R}   ℤ \mathbb{Z}   ℕ \mathbb{N}   ℚ \mathbb{Q}   ｛ \{   ｝ \}   － -   ＋ +   ＝ =
"""
RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉ₙ", "0123456789n", strict=True))
# A command or a word, and what this file uses for it. ~ stands for a space. x \in A is read as
# x = A, and a union as a list.
NAME_TABLE = r"""
    \dfrac \frac   \tfrac \frac   \cfrac \frac   \dbinom \binom   \tbinom \binom   \$ $
    \lt <   \gt >   \le ≤   \leq ≤   \leqslant ≤   \ge ≥   \geq ≥   \geqslant ≥   \ne ≠   \neq ≠
    \infty ∞   \in =   \approx =   \cup ,   \{ {   \} }   \lbrace {   \rbrace }   \mid |   \% %
    \langle (   \rangle )   \lvert |   \rvert |   \vert |   \dots \ldots   \cdots \ldots
    \varphi \phi   \varepsilon \epsilon   \varnothing \emptyset   \degree ^\circ   \degrees ^\circ
    \pmod \mod   \bmod \mod   \setminus \backslash   \mathrm \text   \textbf \text   \textrm \text
    \textit \text   \textnormal \text   \mathsf \text   \mbox \text   \operatorname \text
    \div /   \nicefrac \frac   \R \mathbb{R}   \quad ~   \qquad ~   \, ~   \; ~   \: ~   \> ~
    sqrt \sqrt   pi \pi   sin \sin   cos \cos   tan \tan   cot \cot   log \log   ln \ln   exp \exp
    arcsin \arcsin   arccos \arccos   arctan \arctan   gcd \gcd   percent %   and ~,~   or ~,~
    \leqq ≤   \geqq ≥   \lbrack [   \rbrack ]   \lparen (   \rparen )   \enspace ~   \textup \text
    \lor ~,~   \vee ~,~   \land \wedge   \space ~   \sfrac \frac   \mathtt \text   \texttt \text
"""
DROPPED = r"""
    \left \right \big \Big \bigl \bigr \Bigl \Bigr \bigg \Bigg \biggl \biggr \Biggl \Biggr
    \large \Large \displaystyle \textstyle \limits
    \rm \bf \middle \! \( \)
"""
STYLES = r"\mathbf \boldsymbol \bm \mathit \underline"  # dropped as well


def table(rows: str) -> dict[str, str]:
    """Read a table of two words each."""
    words = rows.split()
    return dict(zip(words[::2], words[1::2], strict=True))


LATEX_OF = str.maketrans({letter: word + " " for letter, word in table(CHARACTER_TABLE).items()})
NEW_NAME = table(NAME_TABLE) | dict.fromkeys(f"{DROPPED} {STYLES}".split(), "") | {r"\ ": " "}

# Spelling: replacements that change no meaning ----------------------------------------------------

STYLED = "|".join(map(re.escape, STYLES.split())) + r"|\\textcolor *\{\w*\}"
ORDER = r"(?:[<>≤≥]|\\[lg](?:t|eq?|eqslant)(?![a-z]))"
BOTH = r"\1\\wedge "  # x>1 and x<3 is not x>1 or x<3


def expand_characters(text: str) -> str:
    """Write characters that LaTeX has commands for as LaTeX: ½ is \\frac12, and x²⁰ is x^{20}."""
    if text.isascii():
        return text
    for sign, characters in (("^", RAISED), ("_", LOWERED)):
        run = f"([{''.join(characters)}]+)"
        text = re.sub(run, sign + r"{\1}", text).translate(str.maketrans(characters))
    return text.translate(LATEX_OF)


@functools.lru_cache(10_000)
def spell(text: str) -> str:
    """Return LaTeX in the one spelling that the rest of the reward reads."""
    text = rename(text)
    text = read_matrices(text)
    text = drop_remarks(text)
    text = read_text(text)
    text = read_numbers(text)
    text = separate_items(text)
    text = add_braces(text)
    text = tighten(text)
    return read_set(text)


def rename(text: str) -> str:
    """Use one name for each command: \\dfrac is \\frac, the word pi is \\pi, \\left is nothing."""
    text = re.sub(r"(?<!\\)\$", "", text)  # $ around mathematics; \$ is a dollar
    # Bold or coloured: \mathbf{1,234} is 1,234, but the braces of x^\mathbf{10} are needed.
    text = re.sub(rf"(?<![\^_}}\]a-zA-Z])(?:{STYLED}) *\{{([^{{}}]*)\}}", take_out, text)
    text = re.sub(r"\\not *=|(?<=\s)!=", "≠", text)  # 5!=120 is a factorial
    text = re.sub(r"\\not *\\", r"\\not", text)  # \not\in is \notin
    text = text.replace(">=", "≥").replace("<=", "≤")
    text = re.sub(r"(?<=\d),\\!\s*(?=\d{3})", "{,}", text)  # 1,\! 234 is one number
    text = re.sub(r"\\phantom *(\{[-+]\}|[-+])", "", text)  # an unseen sign, to align numbers
    text = re.sub(rf"({ORDER}[^,;]*?)(\\text *\{{ *and *\}}|\band\b)(?=[^,;]*?{ORDER})", BOTH, text)
    text = re.sub(r"\\?[a-zA-Z]+|\\.", lambda name: NEW_NAME.get(name[0], name[0]), text)
    text = re.sub(r"\\(text)?color *\{\w*\}", "", text)
    text = re.sub(r"\^ *(?:\{((?: *\\prime)+) *\}|(\\prime))", count_primes, text)
    text = re.sub(r"\( *\\text *\{ *([A-E]) *\} *\)", r"\\text{(\1)}", text)  # (\textbf{C})
    if "mod" not in text:
        text = re.sub(r"\\equiv(?![a-z])", "=", text)
    text = re.sub(r"\b([ap])\. ?m\b\.?", r"\1m", text, flags=re.IGNORECASE)  # 3 p.m.
    text = re.sub(r"[\s~]+", " ", text).strip()
    text = re.sub(r"\\mathbb *([A-Z])", r"\\mathbb{\1}", text)
    return text.replace(r"\text {", r"\text{")


def count_primes(found: re.Match) -> str:
    """Write y^{\\prime\\prime} as y''."""
    return "'" * found[0].count(r"\prime")


def take_out(found: re.Match) -> str:
    """Return what is in the braces, with a space behind a command: \\mathbf{\\pi}r is \\pi r."""
    return found[1] + (" " if re.search(r"\\[a-zA-Z]+$", found[1]) else "")


def read_matrices(text: str) -> str:
    """Write a matrix as [[1,2],[3,4]] and a column as (1,2); a factor in front goes inside."""
    begin, end = r"\begin{matrix}", r"\end{matrix}"
    text = re.sub(r"\\\\ ?\[[\d.]+ *(pt|ex|em|mm)\]", r"\\\\", text)  # the height of a row
    text = re.sub(r"\\begin\{(cases|aligned)\}(.*?)\\end\{\1\}", read_cases, text)
    text = re.sub(r"[(\[]? ?\\begin\{(array\}\{[^{}]*|[pb]?matrix)\}", lambda _: begin, text)
    text = re.sub(r"\\end\{(array|[pb]?matrix)\} ?[)\]]?", lambda _: end, text)
    *pieces, rest = text.split(end)
    done = ""
    for piece in pieces:
        before, _, content = piece.partition(begin)
        factor = re.split("[,=]", before)[-1]
        done += before.removesuffix(factor) + bracket_rows(content, factor.strip())
    return done + rest


def read_cases(found: re.Match) -> str:
    """Write a system that names values, x=1\\\\y=2, as a list; any other as it is."""
    rows = [row.strip(" ,") for row in found[2].split(r"\\") if row.strip()]
    if not all(re.fullmatch(r"[a-zA-Z](_\w)? *&?=[^=&,]*", row) for row in rows):
        return found[0]
    return ",".join(rows).replace("&", "")


def bracket_rows(content: str, factor: str) -> str:
    """Write the rows of one matrix: 1&2\\\\3&4 and the factor x give [[x\\cdot(1),...],[...]]."""
    if factor == "-":
        factor = "-1"
    rows = []
    for row in content.strip().removesuffix(r"\\").split(r"\\"):
        cells = row.split("&")
        if factor:
            cells = [rf"{factor}\cdot({cell})" for cell in cells]
        rows.append(",".join(cells))
    if "&" in content:
        return "[[" + "],[".join(rows) + "]]"
    return "(" + ",".join(rows) + ")"


# Words that say the opposite: "is not", "Not the answer:", "isn't", "Wrong answer:". But "students
# not in line are" and "who don't are" deny nothing.
DENIAL = r"""(?xi: \b(?:is|are|can)[ ]?not\b | \{[ ]*not\b | \bnot[ ]*[:}] | n['’]t[ ]*[:}]
    | \b(?:wrong|incorrect|never|but)\b )"""


# The range of a variable behind an answer. rename writes x \in A as x = A.
RANGE = re.compile(
    r"""\ * (?: \\text\{ [ ]* (?: for | with | where | \( )? [ ]* \} | \\forall | \( | , )
    [ ]* ([a-zA-Z]) [ ]* = [ ]* \\mathbb\{([ZR])\} [ ]* (?: \) | \\text\{ [ ]* \) [ ]* \} )? $""",
    re.VERBOSE,
)


def drop_remarks(text: str) -> str:
    """Drop words around the answer: \\text{The answer is } 5, and 5 \\text{ since } x > 0."""
    if not re.match(rf"\\text[^}}]*{DENIAL}", text):
        # \text{C: } is a choice.
        text = re.sub(r"^\\text\{(?!\(?[A-E]\)?:)[^{}]*(\bis|\bare|:) *\}", "", text)
        text = re.sub(r"^\\text\{[^{}\d]*(?:\bis|\bare|:) *(-?\d[\d.,/]*)\.?\}$", r"\1", text)
    text = re.sub(r", *[a-z] *\\text\{ *(is|are|is an|is any) integers? *\}$", "", text)
    # k\pi\text{ for }k\in\mathbb{Z} and k\pi (k\in\mathbb{Z}) are k\pi,k\in\mathbb{Z}.
    text = re.sub(RANGE, r",\1=\\mathbb{\2}", text)
    return re.sub(
        r"\\text\{ *\(?(since|because|where|for (any|all|every|some|integers?))\b.*", "", text
    )


def read_text(text: str) -> str:
    """Take mathematics out of \\text{}: \\text{3}, \\text{i}, \\text{sin}, all of \\text{5 cm}."""

    def read(found: re.Match) -> str:
        word = found[1].strip()
        if re.fullmatch(r"\\[a-z]+", word):
            return word + " "
        is_number = re.fullmatch(r"[\dA-Z]*\d[\dA-Z]*", word)  # 3A has base 16
        if is_number or word.strip(" ,") in ("", "%", "e", "i"):
            return found[1]
        return found[0]

    text = re.sub(r"_\{?\\text\{ *(\w*) *\}\}?", r"_{\1}", text)  # v_{\text{max}}
    text = re.sub(r"_\{\\(max|min)\}", r"_{\1}", text)
    text = re.sub(r"\\text\{([^{}]*)\}", read, text)
    return re.sub(r"^\\text\{([^{}]*[\d,][^{}]*)\}$", r"\1", text)


def read_numbers(text: str) -> str:
    """Give each kind of number one spelling: 1,234 is 1234, and 3.2E5 is 3.2e5."""
    text = join_thousands(text)
    text = re.sub(r"(?<=\d)\^\{?\\text\{ *(?:th|st|nd|rd) *\}\}?", "", text)  # 12^{\text{th}}
    text = re.sub(r"^(\d*(?:1st|2nd|3rd|[04-9]th|1[1-3]th))$", lambda n: n[0][:-2], text)  # 12th
    text = re.sub(r" *\\text\{ *\(?(?:in )?base[ -]?(\d+)\)? *\}$", r"_{\1}", text)
    power = r"(?: *\\(?:times|cdot) *10\^(?:\{-?\d+\}|\d))?"
    text = re.sub(rf"\$ *(-?[\d,.{{}}]*\d{power})", r"\1\\text{dollar}", text)  # $18.90
    text = re.sub(r"\\euro *([\d,.{}]*\d)", r"\1\\euro", text)  # €18.90
    text = text.replace(r"\euro", r"\text{euro}")
    text = re.sub(r"\$ *(?=\\frac)", "", text)
    text = re.sub(r"(?<=\d) *\$", r"\\text{dollar}", text)
    text = re.sub(r" *(%|per cent)", "%", text)
    text = re.sub(r"(?<!\d)0(?=\d:\d\d)", "", text)  # 05:00 is 5:00
    text = re.sub(r"(?<=\d)(?: to | *\\text\{ *to *\} *)(?=\d)", ":", text)  # 3 to 2 is 3:2
    # 0.\overline{3} is 0.333..., with more digits than any comparison looks at.
    repeating = r"(\d*\.\d*)\\(?:overline|bar|dot(?!.*\\dot)) *(?:\{(\d+)\}|(\d))"
    text = re.sub(repeating, lambda found: found[1] + 13 * (found[2] or found[3]), text)
    text = re.sub(r"(?<![\d.^])(\d+) (\d+)/(\d+)", r"\1\\frac{\2}{\3}", text)  # 1 1/2
    text = end_denominators(text)
    # 2e - 1 has Euler's number. `read_euler` of math_equality.py decides on 2e-1.
    text = re.sub(r"(?<=\d)e(?= +-| *- +\d)", r"\\cdot e", text)
    text = re.sub(r"(\d\.\d+)e\+(?=\d\d)|(\d)e\+(?=0\d)", r"\1\2e", text)  # 4.5e+33, 1e+05
    # But in 3E8_{16} the E is a digit.
    return re.sub(r"(?<=\d)E\+?(?=-?\d)(?![\dA-Z]*\)?_)", "e", text)


FUNCTION = r"\\(?:sin|cos|tan|cot|sec|csc|ln|log|exp)(?![a-z])"
NEXT_FACTOR = rf"[a-zA-Z(]|{FUNCTION}|\\(?:frac|sqrt|pi|theta|omega|alpha|beta|mu|lambda)(?![a-z])"
LETTER = r"(?:[a-zA-Z]|\\[a-z]+)(?:_\{?\w+\}?)?"


def end_denominators(text: str) -> str:
    """Say where a denominator ends: 1/2 x is \\frac{1}{2}x, and g/k \\sin t is g/k\\cdot\\sin t.

    A number ends before a space, and a letter before a function and before a space and a bracket.
    """
    text = re.sub(r"(?<![\w.^/}])(\d+)/(\d+) +(?=[a-zA-Z\\])", r"\\frac{\1}{\2}", text)
    text = re.sub(rf"(/ *\d+) +(?={NEXT_FACTOR})", r"\1\\cdot ", text)
    text = re.sub(rf"(/ *{LETTER}) *(?={FUNCTION})", r"\1\\cdot ", text)
    return re.sub(rf"(/ *{LETTER}) +(?=\()", r"\1\\cdot ", text)


def join_thousands(text: str) -> str:
    """Write 1,234 and 1 234 as 1234; but (1,234) is a pair, and 5, 100, 200 are three numbers."""
    text = re.sub(r"(?<=\d)\{,\}(?=\d{3})", "", text)
    depth = levels(text)
    thousands = r"[1-9]\d{0,2}([ ,]\d{3})+"

    def join(found: re.Match) -> str:
        return re.sub(r"[ ,]", "", found[0])

    def join_outside(found: re.Match) -> str:
        return found[0] if depth[found.start()] else join(found)

    text = re.sub(rf"(?<![\d.,]){thousands}(?!\d|,\d)", join_outside, text)
    return re.sub(rf"[\w}}^]\{{{thousands}\}}", join, text)  # an argument: \frac{1}{1,234}


def separate_items(text: str) -> str:
    """Separate the items of a list by commas: 1; 2, and 3 is 1,2,3."""
    return re.sub(r" *[,;&][ ,;&]*", ",", text)


GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"  # braces that hold no more than one level of other braces
# A command without arguments, such as \pi.
SYMBOL = r"\\(?!frac|binom|sqrt|text)[a-zA-Z]+(?![a-zA-Z]| *\{)"
UNIT_TEXT = r"\\text\{[^{}]*\}"
UNIT_PRODUCT = rf"(?:{UNIT_TEXT}(?: *\^ *(?:\{{-?\d\}}|\d))?(?: *\\cdot)? *)+"


def add_braces(text: str) -> str:
    """Put the arguments of a command in braces: \\frac12 is \\frac{1}{2}, \\sqrt2 is \\sqrt{2}."""
    text = re.sub(r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\{([^{}]*)\\choose([^{}]*)\}", r"\\binom{\1}{\2}", text)
    text = re.sub(rf"\\sqrt *(\d+|[a-zA-Z]|{SYMBOL})", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt *\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(rf"(\\frac|\\binom) *(\w|{SYMBOL})", r"\1{\2}", text)
    text = re.sub(rf"((?:\\frac|\\binom) *{GROUP}) *(\w|{SYMBOL})", r"\1{\2}", text)
    text = re.sub(rf"\\sqrt *(\\frac{GROUP}{GROUP})", r"\\sqrt{\1}", text)
    # A fraction of units: m over s is m/s.
    text = re.sub(rf"\\frac *\{{ *({UNIT_PRODUCT})\}} *\{{ *({UNIT_PRODUCT})\}}", r"\1/\2", text)
    text = re.sub(rf"(?<=\}})/ *\( *({UNIT_PRODUCT})\)", r"/\1", text)  # J/(mol K)
    text = re.sub(rf"\^ *(\\frac{GROUP}{GROUP})", r"^{\1}", text)
    text = re.sub(r"\^ *(-(?:\d+(?:\.\d+)?|[a-zA-Z]))", r"^{\1}", text)  # 10^-3
    # x^(n+1), but f^(4) is a derivative.
    text = re.sub(r"(?<![fghpq'])\^ *\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"(\\sqrt\[\w+\]) *(\w)", r"\1{\2}", text)
    text = re.sub(r"(\\(?:max|min|gcd)) *\{([^{}]*)\}", r"\1(\2)", text)
    text = re.sub(r"([_^]) *\{(\w)\}(?=\d)", r"\1\2 ", text)  # x^{2}3 is x^2 3, and not x^23
    text = re.sub(r"([_^]) *\{(\w)\}", r"\1\2", text)  # x^{2} is x^2
    # C_n^3 is a binomial, but C_1^2 may be the square of a constant.
    text = re.sub(r"\bC_([a-z]|\{\d+\})\^(\w|\{\d+\})", r"\\binom{\1}{\2}", text)
    text = re.sub(r"\(\\text\{ *mod *\} *(\w+)\)", r"\\mod \1", text)
    text = re.sub(r"\\mod *\{(\w+)\}", r"\\mod \1", text)
    text = re.sub(r"\\log +_", r"\\log_", text)
    return re.sub(r"\\log_(\w) *", r"\\log_{\1}", text)


def tighten(text: str) -> str:
    """Drop what changes nothing: most spaces, the sign of +5, a full stop at the end."""
    text = text.replace("**", "^")
    text = re.sub(r"\^ *(\{ *(\\circ|o) *\}|\\circ|o\b)", r"^\\circ ", text)
    text = re.sub(r"(?<![a-zA-Z\d]) +| +(?![a-zA-Z\d])", "", text)  # all but 1 2 and \sin x
    text = re.sub(r"(?<![\w)}\]!|'])\+", "", text)
    return text.lstrip("=").rstrip("\\ .,;:")


REALS = r"\mathbb{R}"


def read_set(text: str) -> str:
    """Write real numbers as intervals, x≠2 as (-∞,2),(2,∞), and x=\\{1,2\\} as the set alone."""
    if re.fullmatch(r"(?i:(\\text\{)?all real numbers\}?)", text):
        return "(-∞,∞)"
    text = re.sub(r"^[a-z]=(?=\\mathbb)", "", text)
    text = re.sub(r"^[a-z]=\\mathbb\{R\},(?=[a-z]≠)", "", text)
    text = re.sub(r"^(([a-z])≠[^≠]*),\2≠(?=[^≠]*$)", r"\1,", text)  # x≠2,x≠3
    without = re.fullmatch(
        r"[a-z]≠([^=≠]*)"
        r"|(?:\\mathbb\{R\}|\(-∞,∞\))(?:\\backslash|-)\{([^=≠]*)\}"
        r"|\{[a-z](?:=\\mathbb\{R\})?[|:][a-z]≠([^=≠]*)\}",
        text,
    )
    if without:
        bounds = ["-∞", *holes(without[without.lastindex]), "∞"]
        return ",".join(f"({a},{b})" for a, b in pairwise(bounds))
    whole = re.search(r",([a-z])=\\mathbb\{Z\}$", text)
    # The range of the k in 2k\pi says nothing. But of whole numbers above 2 it does.
    if whole and not re.search(rf"(?<![\w}}]){whole[1]}[<>≤≥]|[<>≤≥]{whole[1]}(?![\w+\\-])", text):
        text = text[: whole.start()]
    # Nor does that of a real number: f(x)=x+1 for all real x.
    text = re.sub(r"(?<=.),[a-z]=\\mathbb\{R\}$", "", text)
    if text == REALS:
        return "(-∞,∞)"
    if text == "{}":
        return r"\emptyset"
    # x=\{1,2\} and A\cap B=\{1,2\} are the set, but 2x=\{1,2\} and x^2=\{1,4\} are not.
    found = re.fullmatch(r"(\([^()]*\)|[^=,]*)=(\{.*\})", text)
    if found and not re.search(rf"^-|(?<![-_{{(\d])\d|\^\d|{DENIAL}", found[1]):
        return found[2]
    return text


def holes(text: str) -> list[str]:
    """Split the numbers that a set leaves out, the smallest first if all are plain numbers."""
    items = text.split(",")
    if all(re.fullmatch(r"-?\d+(\.\d+)?", item) for item in items):
        items.sort(key=float)
    return items


# Brackets and lists -------------------------------------------------------------------------------

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
        if inner == r"\emptyset":  # the set that holds the empty set
            break
        text = inner
    return text


def split_list(text: str) -> list[str]:
    """Split a list, a set or a union: 1,2 and {1,2} and 1\\pm2 have two items each."""
    text = without_brackets(text)
    items = []
    rule = re.match(r"[a-z](?:=([^:|]*))?[:|](?=.*[<>≤≥])", text)
    if rule:  # {x|x>0} is x>0
        text = text[rule.end() :]
        if rule[1] not in (None, REALS, "R"):
            items.append(rule[1])  # of whole numbers it is another set
    for part in split(text, ","):
        for condition in split_conditions(part):
            items += both_signs(condition)
    systems = read_systems(items)
    if systems:
        return systems
    return [without_brackets(read_inequality(item)) for item in items]


def split_conditions(text: str) -> list[str]:
    """Split x>1\\wedge y<3, conditions on different variables; x>1\\wedge x<3 stays."""
    conditions = [condition.strip() for condition in text.split(r"\wedge")]
    names = [set(re.findall(r"\\?[a-zA-Z]+", condition)) for condition in conditions]
    return [text] if all(name == names[0] for name in names) else conditions


def both_signs(text: str) -> list[str]:
    """Return 1+2 and 1-2 for 1\\pm2, and 2 and -2 for \\pm2; each \\pm has its own sign."""
    before, sign, after = text.partition(r"\pm")
    if not sign or text.count(sign) > 4:
        return [text]
    plus = "" if before.endswith(("=", "(", ",", "[")) or not before else "+"
    return both_signs(f"{before}{plus}{after}") + both_signs(f"{before}-{after}")


# Names that stand in this order in a tuple, however they are written: y=2,x=1 is (1,2).
ORDERED_NAMES = ("abcdefgh", "ijk", "mn", "pq", "rst", "uvw", "xyz", "ABCDEFGH", "MN", "PQ", "XYZ")
ORDERED_COMMANDS = {r"\alpha", r"\beta", r"\gamma"}


def read_systems(items: list[str]) -> list[str]:
    """Return (1,2) for y=2,x=1, and (1,2) and (3,4) for x=1,y=2,x=3,y=4; [] for other lists.

    x=1,x=2 gives two values to one name, which is a list. Other names than ORDERED_NAMES stay in
    the order in which they are written: m=3,b=1 is (3,1).
    """
    pairs = [re.fullmatch(r"([a-zA-Z]|\\[a-z]+)=(.*)", item) for item in items]
    if None in pairs:
        return []
    names = {pair[1] for pair in pairs}
    size = len(names)
    is_ordered = any(names <= set(ordered) for ordered in (*ORDERED_NAMES, ORDERED_COMMANDS))
    systems = []
    for start in range(0, len(pairs), size):
        system = {pair[1]: pair[2] for pair in pairs[start : start + size]}
        if size == 1 or len(system) < size:
            return []
        values = [system[name] for name in sorted(system)] if is_ordered else system.values()
        systems.append("(" + ",".join(values) + ")")
    return systems


# Inequalities -------------------------------------------------------------------------------------

MIRRORED = {">": "<", "≥": "≤"}


def read_inequality(text: str) -> str:
    """Return 2<x as (2,∞), 3≥x>1 as (1,3] and |x|<1 as (-(1),1); b>a becomes a<b."""
    if r"\wedge" in text:
        return intersect([read_inequality(part.strip()) for part in text.split(r"\wedge")], text)
    if any(c in "<>≤≥" and level > 0 for c, level in zip(text, levels(text), strict=False)):
        return text  # P(X>4)
    parts = re.split("([<>≤≥])", text)  # 3, ≥, x, > and 1
    upwards = {"<", "≤"} & set(parts)
    downwards = {">", "≥"} & set(parts)
    if len(parts) == 1 or (upwards and downwards):  # 1<x>2 is no interval
        return text
    if downwards:
        parts = [MIRRORED.get(part, part) for part in reversed(parts)]
    bounds = add_bounds(parts)
    # Between two variables, a<b, it stays an inequality.
    if len(bounds) != 5 or not is_variable(bounds[2]) or is_variable(bounds[0]):
        return "".join(parts)
    lower, lower_sign, _, upper_sign, upper = bounds
    opening = "[" if lower_sign == "≤" else "("
    closing = "]" if upper_sign == "≤" else ")"
    return f"{opening}{lower},{upper}{closing}"


def intersect(intervals: list[str], text: str) -> str:
    """Return [3,5] for [3,∞) and (-∞,5]; the text as it is for what has no such numbers."""
    ends = "".join(sorted(intervals, key=lambda interval: "-∞" in interval))
    number = r"-?\d+(?:\.\d+)?"
    found = re.fullmatch(rf"([\[(]{number}),∞\)\(-∞,({number}[\])])", ends)
    if found and float(found[1][1:]) < float(found[2][:-1]):
        return f"{found[1]},{found[2]}"
    return text


def add_bounds(parts: list[str]) -> list[str]:
    """Return the parts of x<5 as those of -∞<x<5, and of |x|<5 as those of -(5)<x<5."""
    if len(parts) != 3:
        return parts
    left, sign, right = parts
    if re.fullmatch(r"\|[a-z]\|", left):
        return [f"-({right})", sign, left[1], sign, right]
    if is_variable(right):
        return [left, sign, right, "<", "∞"]
    return ["-∞", "<", left, sign, right]


def is_variable(text: str) -> bool:
    """Say whether a text is a name that may have any value: x, \\theta, f(x)."""
    is_name = re.fullmatch(r"[a-zA-Z]|\\[a-z]+|[a-z]\([a-z]\)", text)
    return bool(is_name) and text not in ("e", r"\pi")
