r"""The unit after a number: known units, counted things, and nothing else.

    unit(" cm^2")             -> "cm^2"
    unit(" red balls")        -> "red ball"
    unit(", since 2 + 2 = 4") -> ""
    unit(" lakhs or so")      -> None

A text that is not known to be a unit may change the value (`12 cubed`, `12万`) or deny it (`12, which is
wrong`, `3不对`), so that what comes before it is not a number. English words pass as a counted thing if they
end in a plural; of other languages only the units and counters listed here are known.
"""

import re

_UNIT_NAMES = """
m meter meters metre metres 米 公尺; cm centimeter centimeters centimetre centimetres 厘米 公分
km kilometer kilometers kilometre kilometres 千米 公里; mm millimeter millimeters millimetre millimetres 毫米
in inch inches 英寸; ft foot feet 英尺; yd yard yards; mi mile miles 英里; g gram grams 克
kg kilogram kilograms 千克 公斤; mg milligram milligrams 毫克; lb lbs pound pounds; oz ounce ounces
t ton tons 吨; cup cups; pint pints; quart quarts; gallon gallons
l liter liters litre litres 升; ml milliliter milliliters millilitre millilitres 毫升
s sec secs second seconds 秒; min mins minute minutes 分钟; h hr hrs hour hours 小时; day days 天
week weeks 周; month months 个月; year years 年; year-old years-old 岁
° deg degree degrees 度; % percent pct; $ dollar dollars usd us$ 美元
¢ cent cents; € euro euros eur 欧元; £ gbp
₹ rupee rupees rs rs. inr
¥ yuan 元 块 人民币; n newton newtons 牛; j joule joules; w watt watts; v volt volts; a amp amps
ω ohm ohms; hz; mph; °c c 摄氏度; °f f; pa; kpa; mol; nm; kj; n/m; m/s; km/h
kω; kw; kwh; kv; ma; kn; mpa; khz; mhz; ghz; ev; kev; kcal; rad radian radians; μm; μs; μf; μc
m^2 平方米; cm^2 平方厘米; m^3 立方米; cm^3 立方厘米
"""  # the first of each group is its canonical name
UNITS = {name: names.split()[0] for names in re.split("[;\n]", _UNIT_NAMES.strip()) for name in names.split()}
UNITS |= dict.fromkeys(("unit", "units", *"个只张条本件人名辆棵颗支枝位头匹把台间座朵根片份种"), "")
_SQUARE = re.compile(r"(?:sq(?:uare|\.)? (?P<a>[a-z]+)|(?P<b>[a-z]+?)(?: squared|\s?\^?\{?2\}?))$")
_CUBE = re.compile(r"(?:cubic (?P<a>[a-z]+)|(?P<b>[a-z]+?)(?: cubed|\s?\^?\{?3\}?))$")

REASON = re.compile(  # `, as 2+2=4`, but not `, as a percentage of 6`
    r",?\s?(?:\b(?:because|since)\b|因为)"
    r"|,\s?as\b(?=[^,;]*(?:=|\b(?:is|are|was|were|has|have|had|shown|seen|given|there|it|they|we|i)\b))"
)
DENIED = re.compile(
    r"\b(?:not|no|never|neither|nor|wrong|incorrect|false|impossible|unlikely|maybe|perhaps|cannot|if|unless)\b|n't\b"
    r"|[不没错非否]|\?",
    re.IGNORECASE,
)
_REMAINDER = re.compile(r"\bremainders?\b|\bdepending\b")
_REMARK = re.compile(  # after a number and its unit
    r"[,;]?\s?\(?(?:in (?:total|all|sum)|total|altogether|overall|left|remaining|respectively|exactly"
    r"|approximately|approx|rounded|shown|visible|not \S+|see|to the nearest|so|thus|therefore|hence"
    r"|(?:as|when) (?:shown|seen|given|required|expected|desired|stated|rounded)"
    r"|(?:which|that) (?:is|are|was) the"
    r" (?:\w+est|sum|total|number|value|difference|median|mean|average|same))\b[^,;()\d]*\)?"
)
_DEGREES = re.compile(r"°\s(?=[cf]\b)")  # `25^\circ C` comes with a space
_CLAUSE = re.compile(r"[,;(]|\b(?:because|since|as|so|which|with|where|in total|left)\b")
_NOT_UNIT = re.compile(
    r"\d|[\\^√π+*/=<>≤≥≠≈|!\[\]{}]"
    r"|\b(?:and|or|to|of|than|times|plus|minus|pi|sqrt|roots?|squared|halves|half|thirds?|quarters?"
    r"|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand|million)ths?|tens|hundreds?|(?:thous|mill|bill|trill)\w+|dozens?|pairs?|scores?|gross|factorials?"
    r"|if|unless|until|except|otherwise|else|remainders?|ago"
    r"|mistakes|errors|zero(?:e)?s|reciprocals|log(?:arithm)?s|inverses|opposites"
    r"|negatives?|exponents|fails|debts?"
    r"|powers?|cubes|squares of|sin|cos|tan|log|ln|over|by|x|y|n|others?"
    r"|january|february|march|april|may|june|july|august|september|october|november|december"
    r"|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
    r"|(?:thir|four|fif|six|seven|eigh|nine)teen|twenty)\b"
)
_PHRASE_END = re.compile(r"\s(?:in|on|at|for|from|who|that|there|are|is|were|was|have|has|shown|visible)\b")
_VOWEL = re.compile("[aeiouy]")
_NOUNS = re.compile(r"[a-z][a-z'-]*(?:\s[a-z][a-z'-]*){0,5}")
_IRREGULAR = ("people", "children", "men", "women", "feet", "teeth", "mice", "geese", "fish", "sheep", "dice")
_TOTAL = ("total", "altogether", "overall")
_MEASURED = (
    "long",
    "wide",
    "tall",
    "high",
    "deep",
    "thick",
    "away",
    "apart",
    "old",
)


def unit(tail: str, *, one: bool = False) -> str | None:
    """Canonical unit of the text after a number, '' for none; None where it is not known to be one.

    Args:
      tail: all that follows the number, in lower case.
      one: whether the number is 1, so that a counted thing need not be a plural.
    """
    if not tail.strip():
        return ""
    text = REASON.split(tail, maxsplit=1)[0]
    if DENIED.search(text):
        return None
    if _REMAINDER.search(text):
        return None
    text = _DEGREES.sub("°", text.strip())
    if (known := _known(text)) is not None:
        return known
    text = text.replace("per cent", "percent")
    if " per " in f" {text}" or (text[0].isalpha() and "/" in text):
        return _rate(text.replace("/", " per "), one)
    if _NOT_UNIT.search(text) or (text[0] < "\u2e80" and len(text) < 3):
        return None
    if remark := _CLAUSE.search(text):
        if not _REMARK.fullmatch(text, remark.start()):
            return None
        text = text[: remark.start()].strip()
    if not text:
        return ""
    if text[0] not in "%°$€£¥¢-" and (tail[0] != " " or not text[0].isalpha()) and text[0] < "\u2e80":
        return None
    words = text.strip(" -。")
    return _known(words) if text[0] == "-" else _counted(words, one)


def _known(text: str) -> str | None:
    """Canonical name of a unit, of its square or of its cube."""
    for pattern, power in ((_SQUARE, "^2"), (_CUBE, "^3")):
        if (m := pattern.fullmatch(text)) and (name := UNITS.get(m["a"] or m["b"])) is not None:
            return name and name + power
    return UNITS.get(text)


def _rate(text: str, one: bool) -> str | None:
    """`km/h` of `kilometers per hour`; None where a part is neither a unit nor a counted thing."""
    above, _, below = f" {text}".partition(" per ")
    first = _counted(above.strip(), one) if above.strip() else ""  # `$5 per hour`
    part = _CLAUSE.split(below, maxsplit=1)[0]
    second = _counted(part.strip(), True)
    rest = below if _known(part.strip()) is None else below[len(part) :]  # `s^2` is a unit
    return f"{first}/{second}" if first is not None and second and not _NOT_UNIT.search(rest) else None


def _counted(words: str, one: bool) -> str | None:
    """The unit that words begin with, or the thing that they count."""
    if not words or (known := _known(words)) is not None:
        return known if words else ""
    head, _, rest = words.partition(" ")
    if head in UNITS and rest.split(" ", 1)[0] in _MEASURED:
        return UNITS[head]
    things = _PHRASE_END.split(words, maxsplit=1)[0]
    last = things.rsplit(" ", 1)[-1]
    if last in _TOTAL:
        return _counted(things[: -len(last)].strip(), one)
    if last in UNITS and things != words:
        return None  # `5 units in the negative direction`
    plural = last in _IRREGULAR or (
        last.endswith("s") and not last.endswith("ss") and _VOWEL.search(last[:-1])
    )
    return things.rstrip("s") if _NOUNS.fullmatch(things) and (plural or one) else None
