r"""Units of an answer: what stands behind a number and names what it counts.

split_unit(r"5\text{square feet}")  ->  5 and ft2
split_unit("204_5")                 ->  204 and base 5
split_unit("5xy")                   ->  5xy and nothing
"""

import re

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
# With one of these words a number is another number, or not one number any more.
NO_UNIT = """
    million billion trillion hundred thousand dozen score half halve third quarter fourth fifth
    sixth seventh eighth ninth tenth hundredth thousandth squared cubed factorial plus minus times
    over to or and not is if pi more less least most than about maybe but percent root below above
    else only
"""
# A unit at the end of a text.
UNIT = re.compile(
    r"""(?:
        (?: \\text\{ [^{},\d+!^-] (?: [^{},\d+!] | \^\{?-?\d\}? )* \}  # \text{cm^2}
          | \^\\circ [ ]* [CF]?                                        # degrees
          | (?<=\d) ''? $                                              # 5'' is 5 inches
          | (?<![\\a-zA-Z]) (?: m/s | [a-zA-Z]{2,} )                   # 5 cm
          | / | \\cdot | [ ]
        ) (?: \^\{?-?\d\}? )?                                          # an exponent
    )+ $""",
    re.VERBOSE,
)
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
    names = []
    for name in unit_words(found[0]):
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


def unit_words(unit: str) -> list[str]:
    """Return the words of a unit, an exponent after its word: ft and square for \\text{sq.ft}."""
    unit = re.sub(r"(\w\w)\.", r"\1 ", unit.lower())  # sq.ft
    unit = re.sub(r"\\text|\\cdot|\.", "", unit)
    unit = unit.replace("''", "in").replace("'", "ft")
    unit = re.sub(r"(square|sq|cubic) (\w+)", r"\2 \1", unit)
    return re.findall(r"[^\W\d_]+|[-/\d]", unit)
