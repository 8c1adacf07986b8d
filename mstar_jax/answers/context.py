r"""What is said around a marked answer: that it is denied or supposed before it, taken back after it.

    unsaid("I do not think that the ")           -> True     before `answer is 5`
    unsaid("It is not 4, so the ")               -> False
    retracted(". Hold on, it is 6.")             -> True     after `The answer is 5`
    retracted(". It follows from 2 + 3.")        -> False

One rule for markers, boxes and tags. In doubt there is no answer: a missed reward is better than a false one.
"""

import re

BEFORE = 160  # characters before a mark that are read
_AFTER = 400  # characters after an answer that are read
_UNITS = 4  # sentences or lines after an answer that may take it back

# ---- 1. before ----------------------------------------------------------------------------------------

_SENTENCE = re.compile(r"[.!?。！？](?=\s|$|[\"')*])|[。！？\n]")
_CLAUSE = re.compile(
    r"[,;:，；：]|\b(?:so|therefore|thus|hence|but|then|and|because|since|means|gives|implies|conclude)\b",
    re.IGNORECASE,
)
_STRUCK = re.compile(r"(?:\\(?:x|b)?cancel|\\sout|\\st)\s?\{[\s$]*$|~~[\s$]*$|<(?:s|del|strike)>[\s$]*$")
_UNSAID = re.compile(
    r"\b(?:not|never|no|nobody|none|cannot|without|neither|nor|if|whether|unless|suppos\w+|imagin\w+|assum\w+"
    r"|doubt\w*|unlikely|untrue|false|wrong\w*|incorrect\w*|impossible|disagree\w*|den(?:y|ied|ies)|reject\w*"
    r"|tempting|invalid|worst|previous|initial)\b|n['’]t\b"
    r"|\b(?:user|student|teacher|author|friend|people|someone|somebody|others?|they|he|she|you)(?:['’]s?)?\s"
    r"(?:\w+\s){0,2}?(?:claim|say|said|think|thought|believe|state|suggest|answer|argue|guess|wrote|write)\w*\b"
    r"|\b(?:student|user|teacher|model)(?:['’]?s)?['’]?\s*$"
    r"|^\W*(?:do|does|did|is|are|could|would|can|should)\s(?:you|i|we|it|that|this|they|the)\b"
    r"|错误的?$|不正确的?$|如果|假设|假如|若|并?不是?$|并非",
    re.IGNORECASE,
)


def unsaid(before: str) -> bool:
    """Whether the words before a mark say that what follows is not the answer, or not said to be it.

    Only the last clause counts: `It is not 4, so the answer is 5` says 5.
    """
    before = before[-BEFORE:].rpartition("\n")[2]
    if before.rstrip(" $")[-1:] in ("{", "~", ">") and _STRUCK.search(before):
        return True
    said = _SENTENCE.split(before)[-1]
    return bool(_UNSAID.search(said) and _UNSAID.search(_CLAUSE.split(said)[-1]))  # most have no such word


# ---- 2. after -----------------------------------------------------------------------------------------

_WRONG = (
    r"(?:wrong|incorrect|false|impossible|invalid|untrue|mistaken|(?:a|an|my)\s(?:\w+\s)?(?:mistake|error|typo)"
    r"|(?:not|n['’]t|never)\s(?:be\s|quite\s|actually\s)*(?:right|correct|true|possible|it\b|the\s(?:\w+\s)?answer|what)"
    r"|right\?)"
)
_BE = (
    r"(?:['’]s|\s(?:is|was|seems|looks|cannot|can['’]t|could|couldn['’]t|can|must|would|isn['’]t|wasn['’]t))"
)
_RETRACTION = re.compile(  # at the beginning of a sentence after the answer
    r"(?:(?:oh|ah|but|and|so|um+|uh+|well|however)\b\W*)*"
    r"(?:no\b(?=\W*$|\s?[,.!;:…—-]|\s(?:it|that|this|wait)\b)|nope|(?:no\s)?wait\b|hold on"
    r"|actually\b|correction"
    r"|edit\b|scratch that|on second thought|oops|sorry|apolog|i\sapologi|my\s(?:mistake|bad|error|apolog)"
    r"|h+m+\b|just kidding|wrong\b|false\b|incorrect\b|not\b|n?or\b|alternatively"
    r"|let\sme\s(?:re|double|fix|correct|try\sagain|think\sagain)"
    r"|i\s(?:mis\w+|mean|meant|take\s(?:that|it)\sback|(?:made|was|am)\b.{0,30}(?:mistake|error|wrong|mistaken))\b"
    rf"|.{{0,30}}\b(?:that|this|it|which|answer){_BE}\s?(?:\w+\s){{0,2}}?{_WRONG}"
    r"|(?:that|this|it|which)\s(?:contradicts|fails|violates|cannot|can['’]t)\b"
    r"|.{0,30}\b(?:answer|it)\s(?:could|might|may)\b"
    r"|-?\d\S*\s(?:is|was)\s(?:not|wrong|incorrect)\b"
    r"|(?:is|was|seems|cannot|can['’]t|isn['’]t)\b\s?.{0,24}(?:wrong|incorrect|false|impossible|not\b)"
    r"|不对|等等|等一下|错了|更正|不[，,。]|算错|×|[✗✘❌]|\?)",
    re.IGNORECASE,
)
_NO = re.compile(r"(?:no|false)\b", re.IGNORECASE)
_UNIT_END = re.compile(r"\n+|(?<=[.!?])\s+|(?<=[。！？])|\.\.\.|…")
_FONT = re.compile(r"\\(?:text|math)[a-z]*\s?\{|\\[ ,;:!]")
_FIRST = "\u2022 \t\r\n*_$`\"'()[]{}.,;:!-—–\\~>"  # what may stand before the first word of a sentence


def units(after: str) -> list[str]:
    """The first sentences or lines of what follows an answer, without what is around their words."""
    if not after[:_AFTER].strip(_FIRST):
        return []
    parts = (part.strip(_FIRST) for part in _UNIT_END.split(_FONT.sub(" ", after[:_AFTER])))
    return [part for part in parts if part][:_UNITS]


def retracted(after: str, *, no: bool = True) -> bool:
    """Whether what follows an answer takes it back, denies it, or asks whether it is.

    Args:
      after: all that follows the answer's words.
      no: whether a lone `no` or `false` denies the answer; not where they are its option's text.
    """
    head = after[:24].lstrip(_FIRST)
    if not head and len(after) <= 24:
        return False
    if head.startswith(("?", "？")):
        return True
    return any(_RETRACTION.match(unit) and (no or not _NO.match(unit)) for unit in units(after))
