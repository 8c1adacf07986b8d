"""Numbers in words, English and Chinese.

spelled("twenty-five apples")   -> (25, 11)     the value, and where the words end
spelled("two thirds")           -> (2/3, 10)
spelled("十二个")                -> (12, 2)
spelled("third")                -> None         an ordinal
"""

import re
from fractions import Fraction

NUMBER_WORDS = (  # the index of each is its value
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_PARTS = {"half": 2, "halves": 2, "quarter": 4, "quarters": 4, "fourth": 4, "fourths": 4}
_PARTS |= {
    name + plural: i
    for i, name in enumerate(("third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"), 3)
    for plural in ("", "s")
}


def _any(names: tuple[str, ...] | dict[str, int]) -> str:
    return "|".join(sorted(names, key=len, reverse=True))


_ENGLISH = re.compile(
    rf"(?:(?P<tens>{_any(_TENS)})(?:[- ](?P<ones>{_any(NUMBER_WORDS[1:10])}))?"
    rf"|(?P<word>{_any(NUMBER_WORDS)}|an?))\b"
    rf"(?:[- ](?P<part>{_any(_PARTS)})\b)?(?!-)|(?P<half>half)\b(?!-)"
)
_DIGITS = "零一二三四五六七八九"
_CHINESE_NUMBER = r"[一二两三四五六七八九]?十[一二三四五六七八九]?|[零〇一二两三四五六七八九]"
_CHINESE = re.compile(
    rf"(?:(?P<below>{_CHINESE_NUMBER})分之)?(?P<number>{_CHINESE_NUMBER})(?![零〇一二两三四五六七八九十])"
)


def spelled(text: str) -> tuple[Fraction, int] | None:
    """(value, length in characters) of the number that a lower-case text begins with in words; else None."""
    if m := _CHINESE.match(text):
        below = _chinese(m["below"]) if m["below"] else 1
        return (Fraction(_chinese(m["number"]), below), m.end()) if below else None
    m = _ENGLISH.match(text)
    if m is None or (m["word"] in ("a", "an") and not m["part"]):
        return None
    if m["half"]:
        return Fraction(1, 2), m.end()
    if m["tens"]:
        value = 10 * (_TENS.index(m["tens"]) + 2) + (NUMBER_WORDS.index(m["ones"]) if m["ones"] else 0)
    else:
        value = 1 if m["word"] in ("a", "an") else NUMBER_WORDS.index(m["word"])
    return Fraction(value, _PARTS[m["part"]] if m["part"] else 1), m.end()


def _chinese(digits: str) -> int:
    """12 of `十二`: numbers up to 99."""
    digits = digits.replace("两", "二").replace("〇", "零")
    tens, ten, ones = digits.rpartition("十")
    return (10 * (_DIGITS.index(tens) if tens else 1) if ten else 0) + (_DIGITS.index(ones) if ones else 0)
