"""Multiple choice: which option a text names, by its letter or by its text.

choice("(B) 12 cm because ...", ("10 cm", "12 cm"))    -> "B"
choice("B or A", ("10 cm", "12 cm"))                   -> None
mentioned("so it is option B.", ("10 cm", "12 cm"))    -> "B"   (for the fallback: anywhere in a text)
"""

import functools
import re
from typing import NamedTuple

from mstar_jax.answers.equality import same
from mstar_jax.answers.formulas import arithmetic
from mstar_jax.answers.units import DENIED, REASON, UNITS
from mstar_jax.answers.values import Number, boolean, number, plain, same_number, sentence, tidy

SENTENCE = 24  # characters: a longer text may mention an option without choosing it
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_LETTER = re.compile(
    r"(?P<named>(?i:(?:the\s)?(?:correct\s)?(?:option|choice|answer|letter)\s(?:is\s)?:?\s?)|选项\s?[为是]?\s?)?"
    r"(?:[(\[{]\s?(?P<bracketed>[A-Za-z])\s?[)\]}]|(?P<bare>[A-Za-z])(?![A-Za-z0-9_']))\s?(?P<rest>.*)$"
)
_QUOTED = re.compile(r"^\W{0,3}(?:['‘](?=[A-Z]['’])|[\"`“]?(?=[A-Z][\"`”]))([A-Z])\S(?=\s)")  # `"B" because`
_HEDGE = re.compile(  # before a letter only: `I think it is C`
    r"I(?:'d| would)? (?:think|believe|say|guess|choose|pick)(?: that)?"
    r"(?: (?:it is|it's|it should be))? (?=\(?[A-Z]\)?\W*$)"
)
_AFTER_LETTER = re.compile(r"(?:because|since|as|is|in|for|which|with|rather than|instead of)\b|[(-]")
_WRONG = r"(?:not|wrong|incorrect|false|unlikely|impossible|invalid|eliminated|excluded|rejected|ruled out)"
_DENIED = re.compile(
    rf"\W*(?:is|was|seems?|(?:can|could|would|should|must) be|has been|gets?)\b.{{0,24}}\b{_WRONG}\b"
    r"|\W*(?:isn't|can't|cannot|doesn't)|\W*(?:but |only )?(?:if|unless)\b|\W*\?"
    r"|\s?(?:是?[不错非]|以外|之外|除外|吗)"
)
_THAT_IS = r"(?:which is|that is|so|or|i\.?e\.?,?)\s"
_NAME = r"(?:the\s)?(?i:option|choice|answer|letter)\s"
_LATE = re.compile(  # a letter after a value: `12 cm (C)`, `12 cm, option C`, `12 cm: C`
    rf"(?<=\S)\s?[,;:]?\s?(?:{_THAT_IS})?(?:\(?{_NAME})?[(\[]([A-H])[)\]]\W*$"
    rf"|(?<=\S)[\s,;:(]+(?:{_THAT_IS})?{_NAME}([A-H])\)?\W*$"
    rf"|(?<=\S)(?:\s?[,;:=→]\s?|\s-\s?|,?\s{_THAT_IS})([A-H])\W*$"
)
_NOT_LETTER = re.compile(r"\b(?:not|rather than|instead of)\s(?:option\s|choice\s)?\(?[A-Z]\)?(?![a-z])")
_REFUSED = re.compile(
    rf"\b(?:which|that|it|this)\s(?:is|was|seems|(?:can|could|would|should|must) be|has been)\b"
    rf".{{0,24}}\b{_WRONG}\b"
    r"|\b(?:wrong|incorrect|eliminated|excluded|ruled out|maybe|perhaps)\W*$"
    r"|\b(?:which|that|it|this)\s(?:cannot|can't|isn't|doesn't)\b"
)
_DASH = re.compile(r"^(?:[,\s]|-(?!\s?[\d.$]))+")  # after a letter; a minus sign is not a dash
_OR = re.compile(r"\W*(?:or|and)\b")
_EQUALS = re.compile(
    r"[\s,;:.)=≈-]*(?:(?:(?:which|that)\s(?:is|equals|has|means)|i\.?e\.?,?|with|namely|meaning|at|of)\s)?"
)
_ALSO = re.compile(  # a second letter: `B, C`, `B as well as C`, `B, or in the other case C`, `B或C`
    r"(?:\b(?:and|n?or|but|also|else|otherwise|alternatively|maybe|perhaps|possibly|both|either|plus|then|than"
    r"|as well as)\b[\s,:]*|(?:或者|以及|还是|[,;/&=+→⋯或和与、，；(\[])\s*|(?:^|\s)-\s?)"
    r"(?:(?:option|choice|answer)\s)?[(\[]?([A-Z])(?=$|[)\].,:;/&→⋯，。；、]|[\u4e00-\u9fff]|\s(?!(?<=[AI]\s)[a-z])"
    r"|\s(?:is|could|can|may|might|would|if|in|for|with|when|too|also)\b)"
)
_ACTUALLY = re.compile(  # `B, no, C`
    r"(?:\b(?:actually|wait|no|correction|rather)\b[\s,.!⋯:-]*)+(?:it(?:'s| is| should be)\s)?"
    r"(?:option\s)?\(?([A-Z])\)?(?![\w'])"
)
_MENTION = re.compile(r"\(([A-Z])\)|(?:\b[Oo]ption|\b[Cc]hoice|选项[为是]?)\s?([A-Z])(?![A-Za-z0-9_'])")
_STATING = re.compile(
    r"the|an?|is|are|was|be|been|it|its|s|they|all|both|this|that|these|those|there|one|so|then|must|should|would|will"
    r"|can|could|may|might|most|very|likely|probably|clearly|definitely|indeed|actually|simply|just|only"
    r"|option|choice|answer|letter|figure|image|picture|shape|object|called|named|labeled|labelled|shown|showing"
    r"|says|said|saying|read|reads|i|we|think|believe|conclude|say|see|choose|pick|select|correct|right|best"
    r"|closest|therefore|thus|hence|of|in|to|by|as|for|with|from|on|at",
    re.IGNORECASE,
)
_FOLLOWING = re.compile(r"[,;:.()]|(?:because|since|as|which|who|in|on|at|for|from|with|due)$", re.IGNORECASE)
_REASON = re.compile(r",|\b(?:because|since|as)\b")
_NEGATION = re.compile(r"\b(?:not|no|neither|nor|except|cannot)\b|n't", re.IGNORECASE)
_NOT_WORD = re.compile(r"(?:[^\w%°.+/^√π<>≤≥≠!-]|(?<!\d)!)+")
_VALUE = re.compile(  # a ratio, time, point, list or formula: nothing that is a word
    r"(?=.*\d)(?:[^A-Za-z]|(?<![A-Za-z])(?:[A-Za-z]|[A-Z]{2}|sqrt|sin|cos|tan|log)(?![A-Za-z]))+"
)
_UNIT_NAMES = frozenset(UNITS.values())
_RELATION = re.compile(r"[=<>≤≥≠≈]")
_TALKS = re.compile(r"answer|option|choice|correct|\([A-Za-z]\)|答案|选项", re.IGNORECASE)


class Table(NamedTuple):
    """What options are compared by; dictionaries are keyed by letter.

    Attributes:
      texts: plain text; only tidied where options differ in nothing but case (`Aa`, `AA`, `aa`).
      numbers: numbers of the options that are one.
      words: words; empty where one option contains another.
      talk: matches the options that talk about options (`the answer is option C`) after their letter, where
        their text is not read.
      exact: whether `texts` keep their case.
      asked: options that end in a question mark, tidied.
    """

    texts: dict[str, str]
    numbers: dict[str, Number]
    words: dict[str, str]
    talk: re.Pattern | None
    exact: bool
    asked: frozenset[str]

    def text(self, answer: str) -> str:
        return tidy(answer) if self.exact else plain(answer)


@functools.lru_cache(8192)
def table(options: tuple[str, ...]) -> Table:
    tidied = list(map(tidy, options))
    plains = list(map(plain, options))
    exact = len(set(map(str.casefold, tidied))) < len(set(tidied))
    texts = dict(zip(LETTERS, tidied if exact else plains, strict=False))
    numbers = {letter: n for letter, text in zip(LETTERS, options, strict=False) if (n := number(text))}
    words = {letter: _words(text) for letter, text in zip(LETTERS, options, strict=False)}
    nested = any(a != b and words[a] in words[b] for a in words for b in words)
    talking = [
        rf"(?<![A-Za-z])\(?{letter}[).:]?\s{{0,3}}{re.escape(text.strip().rstrip('.'))}"
        for letter, text in zip(LETTERS, options, strict=False)
        if _TALKS.search(text) and len(text) > 3
    ]
    talk = re.compile("|".join(talking), re.IGNORECASE) if talking else None
    words = {} if nested or exact or "  " in words.values() else words
    return Table(texts, numbers, words, talk, exact, frozenset(t for t in tidied if t.endswith("?")))


def _words(text: str) -> str:
    return f" {_NOT_WORD.sub(' ', plain(text)).strip(' .')} "


def hushed(text: str, options: tuple[str, ...]) -> str:
    """The text with `(A) the answer is option C` shortened to `(A)`, where that is option A."""
    talk = table(options).talk
    return talk.sub(lambda m: f"({m[0].lstrip('(')[0].upper()})", text) if talk else text


@functools.lru_cache(65536)
def choice(text: str, options: tuple[str, ...], loose: bool = False) -> str | None:
    """The letter of the option that a marked answer names, None where it names none or more than one.

    `B`, `(B)`, `b)`, `option B`, `B: text`, the option's text, a number equal to exactly one option, or a
    sentence that states one option. A letter with another option's text names none. For unmarked
    answers, `loose` also takes one that mentions one option and holds no negation.
    """
    known = table(options)
    texts = known.texts
    numbers = known.numbers
    text = _HEDGE.sub("", tidy(_QUOTED.sub(r"(\1)", sentence(text), count=1)), count=1)
    if text.endswith("?") and not text.endswith(tuple(known.asked)):
        return None
    letter = text.strip("()[]")
    upper = len(letter) == 1 and letter.isupper() and letter in texts  # (E) is a letter, (e) may be a text
    if not upper:
        exact = [letter for letter in texts if texts[letter] and texts[letter] == known.text(text)]
        if exact:
            return exact[0]
    m = _LETTER.match(text)
    if m and m["bracketed"] and m["bracketed"].isupper() and m["bracketed"] not in texts:
        return None  # (D) of two options, whatever follows it
    if m and (letter := (m["bracketed"] or m["bare"]).upper()) in texts:
        rest = m["rest"]
        own = bool(rest) and known.text(rest) == texts[letter]
        delimited = not rest or rest[0] in ").:,;/&=" or rest[0] > "\u2e80"
        capital = bool(m["bracketed"] or m["named"] or m["bare"].isupper())
        if capital and not own and (_DENIED.match(rest) or _OR.match(rest)):
            return None
        because = m["bare"] and capital and _AFTER_LETTER.match(rest)
        if m["named"] or m["bracketed"] or own or delimited or because:
            return _agreed(letter, rest, known)
    if upper:
        return next((letter for letter in texts if texts[letter] == known.text(text)), None)
    if late := _LATE.search(REASON.split(text, maxsplit=1)[0]):
        confirmed = _confirmed(text[: late.start()], late[1] or late[2] or late[3], options)
        if confirmed or not loose:
            return confirmed
    if n := number(text):
        equal = [letter for letter in numbers if same_number(numbers[letter], n, None, None)]
        return equal[0] if len(equal) == 1 else None
    said = boolean(text)  # "no, there are not fewer ..."
    if said is not None and sorted(texts.values()) == ["no", "yes"]:
        return next(letter for letter in texts if boolean(texts[letter]) is said)
    one = mentioned(text, options)
    return one if one and ((loose and len(text) > SENTENCE) or _stated(text, one, known)) else None


def _confirmed(before: str, letter: str, options: tuple[str, ...]) -> str | None:
    """`letter` where the text before it says the same, as in `12 cm (B)`; None where it does not."""
    known = table(options)
    before = before.strip(" ,;:([")
    if letter not in known.texts or (before != letter and before in known.texts):  # `A → B`
        return None
    begins = len(before) >= 3 and known.texts[letter].startswith(known.text(before))
    states = all(_STATING.fullmatch(word) for word in _words(before).split())
    return letter if states or begins or choice(before, options) == letter else None


def mentions_only(text: str, options: tuple[str, ...]) -> bool:
    """Whether a marked sentence mentions one option without choosing it: `everything but the blue cube`."""
    text = tidy(sentence(text))
    m = _LETTER.match(text)
    if len(text) <= SENTENCE or DENIED.search(text) or (m and (m["bracketed"] or m["named"])):
        return False
    if choice(text, options):
        return False
    return mentioned(text, options) is not None


def _stated(text: str, letter: str, known: Table) -> bool:
    """Whether a sentence says that it is this option, as `it must be the red ball`, not only mentions it.

    Before the option there may be words that state it, after it nothing or the beginning of an aside.
    """
    text = REASON.split(text, maxsplit=1)[0]
    if DENIED.search(text):
        return False
    m = next((m for m in _MENTION.finditer(text) if letter in m.groups()), None)
    if m is not None:
        before, after = text[: m.start()], text[m.end() :]
        if known.text(after) == known.texts[letter]:
            after = ""
    else:
        before, found, after = _words(text).partition(known.words.get(letter, " "))
        if not found:
            return False
    following = after.split()[:1]
    return all(_STATING.fullmatch(word) for word in _words(before).split()) and (
        not following or bool(_FOLLOWING.match(following[0]))
    )


def _agreed(letter: str, rest: str, known: Table) -> str | None:
    """`letter` unless the text after it names another option, by its letter, its text or its number."""
    texts = known.texts
    numbers = known.numbers
    stripped = rest.lstrip(").:;= ")
    whole = _DASH.sub("", stripped)
    clause = _REASON.split(whole, maxsplit=1)[0]
    for text in (known.text(whole), known.text(clause)):
        if text and text in texts.values() and text != texts[letter]:
            return None
        if text and text == known.text(whole) == texts[letter]:
            return letter
    said = _NOT_LETTER.sub("", REASON.split(rest, maxsplit=1)[0])
    named = {a or b for a, b in _MENTION.findall(said)} & texts.keys() - {letter}
    if _REFUSED.search(said) or any(not _named_in(x, texts[letter]) for x in named):
        return None
    if (yes := boolean(stripped)) is not None and boolean(texts[letter]) is (not yes):
        return None
    if known.text(clause) and known.text(clause) == texts[letter]:
        return letter
    if re.search(r"\bor\b", clause) and any(
        words in _words(clause) for other, words in known.words.items() if other != letter
    ):
        return None
    for begun in (known.text(whole), known.text(clause) if "," not in texts[letter] else ""):
        if len(begun) >= 8 and [t for t in texts if texts[t].startswith(begun)] == [letter]:
            return letter
    others = _ALSO.findall(said) + _ACTUALLY.findall(_NOT_LETTER.sub("", rest))
    others += [a or b for a, b in _MENTION.findall(_NOT_LETTER.sub("", stripped))]
    if any(x in texts and x != letter and not _named_in(x, texts[letter]) for x in others):
        return None
    value = _EQUALS.sub("", rest, count=1)
    if any(_words(value).startswith(words) for other, words in known.words.items() if other != letter):
        return None
    n = number(stripped) or number(value)
    equal = [other for other in numbers if n and same_number(numbers[other], n, None, None)]
    if equal and letter in numbers and letter not in equal:
        return None
    values = (stripped, value) if "," in texts[letter] else (stripped, value, clause)
    return None if any(_differs(each, texts[letter]) for each in values) else letter


def _named_in(letter: str, option: str) -> bool:
    return bool(re.search(rf"\b{letter}\b", option, re.IGNORECASE))


def _differs(said: str, option: str) -> bool:
    """Whether both are values, and not the same one: `13 cm` and `12 cm`. Prose differs from nothing."""
    said = tidy(_EQUALS.sub("", REASON.split(said, maxsplit=1)[0], count=1)).rstrip(" ,;")
    own = _quantity(option)
    sides = [said, *said.split("="), *([said[2:]] if said.startswith("- ") else [])]
    quantities = [n for side in sides if (n := _quantity(side))]  # of `2.9 km = 2900 m` or `- 12 cm` any
    if own and quantities:
        unsolved = "=" in said and _quantity(said) is None and len(quantities) < len(said.split("="))
        return not unsolved and not any(_same_quantity(own, n) for n in quantities)
    if not (_VALUE.fullmatch(said) and _VALUE.fullmatch(option)):
        return False
    if _RELATION.search(said) and not _RELATION.search(option):
        return False  # `(B) x² = 4` may be on the way to the option's 2
    begins = plain(said).startswith(plain(option)) and not plain(said)[len(plain(option)) :][:1].isalnum()
    return not begins and not same(option, said, None, None)


def _same_quantity(option: Number, said: Number) -> bool:
    """Whether they are equal, one a rounding of the other, or equal numbers of differently named things."""
    physical = option.unit in _UNIT_NAMES and said.unit in _UNIT_NAMES
    equal = same_number(option, said, None, None) or (option.value == said.value and not physical)
    return equal or same_number(said, option, "float", said.places or None)


def _quantity(text: str) -> Number | None:
    """The number that a text is, or the value of its arithmetic, as 12 of `3·4`."""
    if n := number(text):
        return n
    value = None if _RELATION.search(text) else arithmetic(text)
    return None if value is None else Number(value, "", None)


def mentioned(text: str, options: tuple[str, ...]) -> str | None:
    """The one option that a sentence mentions, as `(B)`, as `option B` or by its text; None in doubt."""
    if _NEGATION.search(text):
        return None
    known = table(options)
    found = {a or b for a, b in _MENTION.findall(text)}
    if not found <= known.texts.keys():
        return None
    if known.words:
        spaced = _words(text)
        found |= {letter for letter in known.words if known.words[letter] in spaced}
    return found.pop() if len(found) == 1 else None


# ---- fallback -------------------------------------------------------------------------------------------

_LINE_LETTER = re.compile(r"\W{0,4}(?:[Oo]ption |[Aa]nswer:? )?\W{0,3}([A-Z])(?:[).:]\W{0,4}|\W{0,4}$)")
_VERDICT = re.compile(
    r"(?<![A-Za-z(])\(?([A-Z])\)?\s(?:is|would be|must be|seems to be)\s(?:the\s|most likely the\s)?"
    r"(?:correct|right|best)\b(?! if)"
)
_BRACKETED = re.compile(r"\(([A-Z])\)")
THEREFORE = re.compile(r"\b(?:so|therefore|thus|hence|conclusion|consequently)\b|所以|因此|故", re.IGNORECASE)


def lettered(sentences: list[str], options: tuple[str, ...]) -> str | None:
    """The one option that has a line of its own: its letter, followed by nothing or by its own text."""
    known = table(options)
    named = {letter for line in sentences if (letter := _line(line, known))}
    return named.pop() if len(named) == 1 else None


def search(sentences: list[str], options: tuple[str, ...]) -> str | None:
    """The option that an unmarked response settles on; None in doubt.

    In this order: `B is the correct option`; the last conclusion (therefore, so ...) that mentions one
    option; a yes or no at the end or the beginning; one option, or one letter in brackets, in the last
    sentence, in the first, or in the whole.
    """
    known = table(options)
    said = {letter for line in sentences for letter in _VERDICT.findall(line)} & known.texts.keys()
    if len(said) == 1:
        return said.pop()
    for line in reversed(sentences):
        if THEREFORE.search(line) and (letter := mentioned(line, options)):
            return letter
    ends = sentences[-1:] + sentences[:1]
    if sorted(known.texts.values()) == ["no", "yes"]:
        for line in ends:
            if (yes := boolean(line)) is not None:
                return next(letter for letter in known.texts if boolean(known.texts[letter]) is yes)
    for line in ends:
        if letter := choice(line, options, loose=True):
            return letter
        bracketed = set(_BRACKETED.findall(line))
        if len(bracketed) == 1 and bracketed <= known.texts.keys() and not _NEGATION.search(line):
            return bracketed.pop()
    return mentioned("\n".join(sentences), options)


def _line(line: str, known: Table) -> str | None:
    m = _LINE_LETTER.match(line)
    if m is None or m[1] not in known.texts:
        return None
    rest = known.text(line[m.end() :])
    return m[1] if not rest or rest == known.texts[m[1]] else None
