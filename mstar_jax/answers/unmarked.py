"""The option that an unmarked response settles on: for the fallback, which never rewards.

search(["So it is option B."], ("10 cm", "12 cm"))     -> "B"
lettered(["(A) 10 cm", "(B) 12 cm"], options)          -> None
"""

import re

from mstar_jax.answers.choices import NEGATION, Table, choice, mentioned, table
from mstar_jax.answers.values import boolean

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
        if len(bracketed) == 1 and bracketed <= known.texts.keys() and not NEGATION.search(line):
            return bracketed.pop()
    return mentioned("\n".join(sentences), options)


def _line(line: str, known: Table) -> str | None:
    m = _LINE_LETTER.match(line)
    if m is None or m[1] not in known.texts:
        return None
    rest = known.text(line[m.end() :])
    return m[1] if not rest or rest == known.texts[m[1]] else None
