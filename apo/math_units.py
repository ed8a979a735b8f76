r"""Units of an answer: what stands behind a number and names what it counts.

split_unit(r"5\text{square feet}")  ->  5 and ft2
split_unit("204_5")                 ->  204 and base 5
split_unit("5xy")                   ->  5xy and nothing
"""

import re

# Units, each followed by other words for it, without the s of the plural: "inche" is inches.
UNIT_TABLE = """
    m meter metre; ohm; cm centimeter centimetre; mm millimeter millimetre; km kilometer kilometre;
    ft foot feet; in inch inche; yd yard; mi mile; kg kilogram kilos; g gram; mg milligram;
    lb pound; oz ounce; l liter litre; ml milliliter millilitre; gal gallon; s sec second;
    ms millisecond; min minute; h hr hour; day d; wk week; yr year y; km/h kmh; mi/h mph;
    degree deg circ; c celsius coulomb;
    f fahrenheit farad; k kelvin; n newton; j joule; w watt; hz hertz; v volt; a amp ampere;
    pa pascal; mol mole; t tesla; molar; å angstrom; rad radian; dollar usd; euro eur; cent; am; pm;
    unit; / per; squares; points; roots
"""
UNITS = {}
for row in UNIT_TABLE.split(";"):
    for word in row.split():
        UNITS[word] = row.split()[0]
# Words that are no units. With one of them the value is another one (5 dozen), or there is no
# single value any more (5 or more).
NO_UNIT_WORDS = """
    ten tens dozen score hundred hundreds thousand thousands million billion trillion quadrillion
    quintillion lakh crore point
    half halve third quarter fourth fifth sixth seventh eighth ninth tenth hundredth thousandth
    millionth billionth trillionth square squared cubed factorial power exponent base root inverse
    reciprocal negative plus minus times over mod modulo choose pi percent double doubled triple
    tripled halved twice eleventh twelfth thirteenth fourteenth fifteenth sixteenth seventeenth
    eighteenth nineteenth twentieth thirtieth fortieth fiftieth sixtieth seventieth eightieth
    ninetieth gross kilo mega giga milli micro repeating recurring to or and not is if but
    only else least most than out extraneous rejected invalid about approx approximately roughly
    nearly maybe below above divided multiplied wrong incorrect false cannot never excluded
    except basis bn
"""
NO_UNIT = set(NO_UNIT_WORDS.split())
# A unit at the end of a text.
UNIT = re.compile(
    r"""(?:
        (?: \\text\{ [^{},\d+!^-] (?: [^{},\d+!] | \^\{?-?\d\}? )* \}  # \text{cm^2}
          | \^\\circ (?: [ ]* [CF] )?                                   # degrees
          | (?<=\d) ''? $                                              # 5'' is 5 inches
          | (?<![\\a-zA-Z]) (?: m/s | [a-zA-Z]{2,} )                   # 5 cm
          | / | \\cdot | [ ]
        ) (?: \^\{?-?\d\}? )?                                          # an exponent
    )+ $""",
    re.VERBOSE,
)
# Units with a command, and what they become behind a number.
NUMBER = re.compile(r"(?:[-\d.,{}^ ]|\\(?:times|cdot|frac|sqrt|pi)(?![a-z]))*(?<=[\d}])")
SYMBOL_UNITS = (
    # \text{k\Omega}, then \Omega and \text{k}\Omega
    (r"\\text\{ ?([kMGm]?) ?\\Omega ?\}", r"\\text{\1ohm}"),
    (r"(?:\\text\{ ?([kMGm]) ?\})?(?<!\{)\\Omega(?![a-zA-Z_])", r"\\text{\1ohm}"),
    # \mu\text{m}
    (r"\\mu ?\\text\{", r"\\text{\\mu "),
    # M_\odot, the mass of the sun
    (r"^ ?(?:\\text\{ ?)?([MLR])\}?_\{?\\?(odot|oplus|sun|Jup)\}?$", r"\\text{\1 \2}"),
    (r"\\mathring *\{?A\}?", r"\\text{å}"),
)
BASE = re.compile(r"\(?(-?[\dA-Z.]*\d[\dA-Z.]*)\)?_\{?\(?(\d+)\)?\}?")
TRIGONOMETRY = re.compile(r"\\(sin|cos|tan|sec|csc|cot)(?![a-z])")


def split_unit(text: str) -> tuple[str, str]:
    """Split 5\\text{square feet} into 5 and ft2, and 204_5 into 204 and base 5."""
    base = BASE.fullmatch(text)
    if base:
        return base[1], "base " + base[2]
    value, unit = split_words(write_out_symbols(text))
    return (value, unit) if unit else (text, "")


def write_out_symbols(text: str) -> str:
    """Return 10\\text{ohm} for 10\\Omega, and the same for SYMBOL_UNITS behind other numbers."""
    number = NUMBER.match(text)
    if number is None:
        return text
    rest = text[number.end() :]
    # Behind a whole number, \mu m may be a coefficient of friction times a mass.
    if re.search(r"\.|10\^", number[0]):
        rest = re.sub(r"^\\mu ?([a-zA-Z])$", r"\\text{\\mu \1}", rest)
    for symbol, unit in SYMBOL_UNITS:
        rest = re.sub(symbol, unit, rest)
    return number[0] + rest


def split_words(text: str) -> tuple[str, str]:
    """Split 5\\text{square feet} into 5 and ft2; the unit is empty if there is none."""
    found = UNIT.search(text)
    if found is None or found.start() == 0 or TRIGONOMETRY.search(text):
        return text, ""
    # 5\text{ isn't the answer} and 5\text{ square roots}
    if re.search(r"n['’]t\b|\b(square|cube) (root|point)s", found[0]):
        return text, ""
    if re.search(r"\\text\{ *k\b", found[0]):  # $5k is 5000
        return text, ""
    words = unit_words(found[0])
    names = []
    for name in words:
        singular = name.removesuffix("s") if len(name) > 2 else name  # ms is not the plural of m
        known = UNITS.get(name) or UNITS.get(singular)
        is_counted = re.fullmatch(r"\\text\{ *(times|point|root) *\}", found[0].strip())
        if known is None and (name in NO_UNIT or singular in NO_UNIT) and not is_counted:
            return text, ""
        if known is None and words == [name] and len(name) == 1:  # 2\text{R} is a product
            return text, ""
        names.append(known or singular)
    value = text[: found.start()]
    # Letters outside of \text are a product, 5xy, unless they are a known unit or a plural.
    is_bare = found[0].strip()[:1].isalpha()
    is_plural = re.match(r" *([a-z]{3,}s|people|children|men|women)\b", found[0])
    is_known = bool(names) and names[0] in UNITS.values()
    if is_bare and not is_plural and (not is_known or is_product(value, names[0])):
        return text, ""
    if found[0].startswith("'") and not re.fullmatch(r"-?[\d./]+", value):  # x_1' is a name
        return text, ""
    return value, re.sub(r" ?([/\d]) ?", r"\1", " ".join(names))  # right triangle, but m/s2


def same_unit(first: str, second: str) -> bool:
    """Say whether two units are one: right triangle is triangle, but cm/s is not m/s."""
    short, long = sorted((first, second), key=len)
    words = long.split()
    is_counted = all(word.isalpha() and word not in UNITS.values() for word in words)
    return first == second or (is_counted and long.endswith(f" {short}"))


def is_product(value: str, unit: str) -> bool:
    """Say whether a unit is rather a product: \\frac{1}{3}ml^2 and 2\\pi hr are, 5 ml is not."""
    if unit in ("mg", "ml"):
        return re.fullmatch(r"-?[\d.,]+", value) is None
    return unit == "h" and r"\pi" in value


def unit_words(unit: str) -> list[str]:
    """Return the words and powers of a unit: ft 2 for \\text{sq.ft}, and m / s for m s^{-1}."""
    unit = re.sub(r"\bM(?=([A-Z]|Hz|Pa|m|ohm)\b)", "mega", unit)  # MW is not mW
    unit = re.sub(r"(\w\w)\.", r"\1 ", unit.lower())  # sq.ft
    unit = re.sub(r"\\text|\\cdot|\.", "", unit)
    unit = unit.replace("''", "in").replace("'", "ft")
    unit = re.sub(r"(square|sq) (\w+)|(\w+) squared", r"\2\3 2", unit)
    unit = re.sub(r"cubic (\w+)|(\w+) cubed", r"\1\2 3", unit)
    unit = re.sub(r"(\w+)\}?\^\{?-", r"/\1 ", unit)
    return re.findall(r"[^\W\d_]+|[/2-9]", unit)  # a power of 1 says nothing
