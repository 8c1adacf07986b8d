r"""Where the final answer of a response is: after a marker, in a box or in an answer tag.

    marked(ending(r"<think>Is it 5?</think> So it is \boxed{4}."))   -> ("4", "boxed", ".")

What a think block or a program says never counts, and only the last TAIL characters of the rest are read.
"""

import re
from typing import NamedTuple

from mstar_jax.answers.context import BEFORE, retracted, unsaid
from mstar_jax.answers.text import LINE, sentence

TAIL = 8192  # characters at the end of a response that are read

_BOXES = r"\\(?:boxed|fbox)"
_BRACE = re.compile(rf"{_BOXES}\s{{0,9}}\{{|\\[{{}}]|[{{}}]")
_BOX_START = re.compile(rf"{_BOXES}\s{{0,9}}\{{?\s*$")
_BARE_BOX = re.compile(rf"{_BOXES}\s{{0,9}}(-?\d{{1,18}}|[A-Za-z])(?![A-Za-z0-9])")
_MARKER = re.compile(
    r"(?:\b(?:answer(?:\s+(?:choice|option|letter))?|correct\s+(?:option|choice)(?:\s+letter)?)"
    r"(?:\s+to\s+(?:the|this|your)\s+(?:question|problem))?[\s*_]*"
    r"(?:(?:is|equals|would\s+be|should\s+be|must\s+be)\b(?!\s+(?:in)?correct\b|\s+wrong\b)"
    r"(?:,?\s+(?:therefore|thus|hence|clearly|simply|then|indeed)\b,?)?|[:：→⇒]|=(?!\s?[\"'])>?)"
    r"|\bans\s?[:：]|答案\s*(?:选项)?\s*(?:(?:应该?|就)?[是为选]|[:：】\]])|(?:(?<=正)(?<!不正)确|(?<=正确)(?<!不正确)的)选项\s*(?:(?:应该?|就)?[是为]|[:：])"
    r"|(?<!不)[故应此以]选(?!项)择?|####\s?(?=\S[^\n]{0,80}\s*\Z)|(?P<heading>(?:answer|答案)[\s*_:：\]]*\n(?=\s*\S)|answer\]))"
    r"[\s*_:：]*(?:\$\$|\\\[)?\s*",
    re.IGNORECASE,
)
# Every marker contains one of these, from its second character on.
_KEYS = ("nswer", "NSWER", "orrect", "ORRECT", "ns:", "案", "选", "###")
_THINK = re.compile(
    r"(?:[<◁]|&lt;)\s{0,3}(?P<close>/)?\s{0,3}(?:think|thinking|thoughts?|reasoning|reflection|scratchpad)\s{0,3}(?:[>▷]|&gt;)"
    r"|\[(?P<end>/)?THINK\]|<\|(?:begin|(?P<last>end))_of_thought\|>",
    re.IGNORECASE,
)
_ANSWER_TAG = re.compile(r"<\s{0,3}(/?)\s{0,3}(?:final[ _-]?)?answer\s{0,3}>", re.IGNORECASE)
_TEMPLATE = re.compile(r"<answer>\s{0,3}:\s{0,3}<<([^\n]{1,200}?)>>", re.IGNORECASE)  # We-Math asks for it
_FENCE = re.compile(r"```|^~~~", re.MULTILINE)
_PROSE = ("", "text", "txt", "plaintext", "markdown", "md", "latex", "tex", "math")  # of a fence
_CODE = re.compile(  # a line break first, which is searched for fast
    r"\n[ \t]{0,80}(?:"
    r"(?:if|elif|for|while|with|def|class|switch|function)\b[^\n]*(?:[:{]\s{0,9}(?=\n|$)|:\s?\w{1,40}\s?=)"
    r"|(?:\}[ \t]?)?else\b[^\n]{0,40}[:{]|(?:let|const|var|int|float|double|string|bool)\s\w{1,40}\s?="
    r"|(?:try|finally|else|ELSE|do|begin)[ \t]{0,9}:?[ \t]{0,9}(?=\n|$)"
    r"|except\b[^\n]{0,60}:[ \t]{0,9}(?=\n|$)"
    r"|(?:IF\b[^\n]{0,80}\bTHEN|(?i:end[ \t]?if))[ \t]{0,9}(?=\n|$)"
    r"|case\s[^\n:]{1,40}:(?=[ \t]{0,9}\w{1,40}\s?=|[ \t]{0,9}(?:\n|$))[^\n]*"
    r"|(?:SELECT|select)\s[^\n]{1,80}\s(?:FROM|from)\s[^\n]*"
    r"|[a-z_]\w{0,40}:[ \t]?(?:int|float|str|bool|list|dict|tuple)\b[^\n]*"
    r"|(?:return|import)\s\S|from\s\w{1,40}\simport|print[ \t]?\(|console\.log|#include)[^\n]*"
)
_ASSIGNMENT = re.compile(
    r"\n[ \t]{0,80}(?:#(?!#)|//|--[ \t])[^\n]*"
    r"|\n[ \t]{0,80}[A-Za-z_][\w.\[\]]*[ \t]*(?:[-+*/]?=(?!=)|:[ \t]?[\"'])[^\n]*"
)
_END_TOKEN = re.compile(r"(?:\s*<(?:/s|\|[\w ]{1,20}\|)>)+\s*$")


def boxed(text: str) -> str | None:
    """Content of the last balanced \\boxed{...}, which may hold braces, or of a later `\\boxed 5`."""
    span = _box(text)
    return None if span is None else text[span[0] : span[1]]


def _box(text: str) -> tuple[int, int] | None:
    """Where the content of the last box is. One pass."""
    stack: list[int] = []
    best: tuple[int, int] | None = None
    for m in _BRACE.finditer(text):
        if m[0][-1] == "{" and len(m[0]) != 2:
            stack.append(m.end() if len(m[0]) > 2 else -1)
        elif m[0] == "}" and stack:
            start = stack.pop()
            if start >= 0 and (best is None or start > best[0]):
                best = (start, m.start())
    for m in _BARE_BOX.finditer(text):
        if best is None or m.start() > best[1]:
            best = m.span(1)
    return best


def _spoken(response: str) -> str:
    """A response without its think blocks; nothing where one is still open at the end.

    A closing tag without an opening one ends a block that began in the prompt.
    """
    kept: list[str] = []
    inside = False
    start = 0
    for m in _THINK.finditer(response):
        closes = bool(m["close"] or m["end"] or m["last"])
        if closes and not inside:
            kept.clear()
        elif not closes and not inside:
            kept.append(response[start : m.start()])
        inside = not closes
        start = m.end()
    return "" if inside else "\n".join([*kept, response[start:]])


def _unfenced(response: str) -> str:
    """A response without its fenced blocks, but for those that hold prose."""
    kept = []
    for i, part in enumerate(_FENCE.split(response)):
        language, _, content = part.partition("\n") if i % 2 and "\n" in part else ("", "", part)
        if not i % 2 or (language.strip().lower() in _PROSE and not _CODE.search("\n" + content)):
            kept.append(content)
    return "\n".join(kept)


def ending(response: str) -> str:
    """The end of what a response says: no thoughts, no code, no `</s>` or `<|im_end|>` of a tokenizer."""
    if ("<" in response or "◁" in response or "[" in response or "&lt;" in response) and _THINK.search(
        response
    ):
        response = _spoken(response)
    if "```" in response or "~~~" in response:
        response = _unfenced(response)
    end = response[-TAIL:]
    if _CODE.search("\n" + end):
        end = _ASSIGNMENT.sub("", _CODE.sub("", "\n" + end))
    if "<<" in end:
        end = _TEMPLATE.sub(r"Answer: \1", end)
    return _END_TOKEN.sub("", end) if ">" in end[-24:] else end


_ASKS = re.compile(  # `Let me know if this answer is helpful!`
    r"(?:\b(?:let me know|tell me|hope|feel free|wonder)\b[^.!?,;:\n]*"
    r"|\b(?:if|whether|that) (?:my|this|that|your) )$",
    re.IGNORECASE,
)
_PRAISE = re.compile(r"(?:helpful|clear|useful|understandable|satisfactory|what you)\b", re.IGNORECASE)


def _after_marker(text: str) -> int:
    """Where the last marker ends, -1 without one. Searches from the end, so most of a response is skipped."""
    last = {key: text.rfind(key) for key in _KEYS}
    while (at := max(last.values())) >= 0:
        key = next(k for k in last if last[k] == at)
        m = _MARKER.match(text, at - 1) if at else None
        before = text[max(0, at - 1 - BEFORE) : at - 1]
        asks = m and (_ASKS.search(before[-80:]) or _PRAISE.match(text, m.end()) or unsaid(before))
        if m and not asks and (not m["heading"] or _heads(text[: at - 1][-24:])):
            return m.end()
        last[key] = text.rfind(key, 0, at + len(key) - 1)
    return -1


def _heads(before: str) -> bool:
    """Whether the line is a heading: `## Answer`, `Final answer`, `[Answer]`, but not `this is my answer`."""
    before = before.rpartition("\n")[2].strip(" *_#>").lower()
    return before in ("", "the") or before.endswith(("final", "[", "[final"))


class Marked(NamedTuple):
    """A marked answer.

    Attributes:
      said: the answer up to the end of its line; of a box or tag, its content.
      rule: how it was found: `tag`, `boxed` or `marker`.
      rest: what the response says after it.
    """

    said: str
    rule: str
    rest: str


_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")
_LETTER = re.compile(r"\W*(?:option\s)?([A-Za-z])(?![\w'])[.)\]}*\"'$]*(?!\w)", re.IGNORECASE)


def following(found: Marked) -> str:
    """What a response says after the sentence of its answer, or after a letter that a period follows."""
    m = _LETTER.match(found.said)
    after = found.said[m.end() :] if m and "." in m[0] else found.said[len(sentence(found.said)) :]
    return f"{after}\n{found.rest[:LINE]}"


def marked(text: str, options: tuple[str, ...] = ()) -> Marked | None:
    """The marked answer, None where there is none or it is taken back.

    Args:
      text: the tail of a response.
      options: texts of the options; those that begin with `No` are no denial after a letter.
    """
    found = _marked(text)
    if found is None or not retracted(after := following(found)):
        return found
    no = any(option.lower().startswith(("no", "false")) for option in options)
    return None if not no or retracted(after, no=False) else found


def also_marked(found: Marked, text: str) -> Marked | None:
    """What is marked as the answer after a box or tag, or in the sentence before a marker's."""
    if found.rule != "marker":
        return _marked(found.rest) if len(found.rest) > 4 else None  # `}$.`
    end = len(text) - len(found.rest) - len(found.said)
    said = text[max(0, end - LINE) : end]
    if sum(map(said.count, _KEYS)) < 2:
        return None
    sentences = [part for part in _SENTENCE.split(said) if part.strip()]
    return _marked(sentences[-2]) if len(sentences) > 1 else None


def _marked(text: str) -> Marked | None:
    if "<" in text and (tags := list(_ANSWER_TAG.finditer(text))):
        return _tagged(text, tags)
    if (
        ("\\boxed" in text or "\\fbox" in text)
        and (span := _box(text))
        and (content := text[slice(*span)].strip())
    ):
        if unsaid(_BOX_START.sub("", text[max(0, span[0] - BEFORE) : span[0]])):
            return None
        return Marked(_joined(content[:LINE], text[: span[0]]), "boxed", text[span[1] :])
    start = _after_marker(text)
    if start < 0:
        return None
    line, _, rest = text[start:].partition("\n")
    line = line[:LINE].strip()
    return Marked(line, "marker", rest) if line.strip("*_$.:` ") else None


_JOINS = re.compile(  # two boxes: `\\boxed{3} \\text{ or } \\boxed{4}`
    r"[\s$\\)\]]*(?:\\text\s?\{)?\s*(or|and|,|;|/|或者?|和)[\s,}]*[\s$\\(\[]*(?:[A-Za-z]\s?=\s?)?"
    rf"{_BOXES}\s{{0,9}}\{{?$"
)


def _joined(content: str, before: str) -> str:
    """The content of a box, with that of the box that is joined to it: `3 or 4`, `3, 4`."""
    before = before[-LINE:]
    m = _JOINS.search(before, max(0, len(before) - 60))
    if m is None:
        return content
    at = before.rfind("}", 0, m.start() + 1)
    other = _box(before[: at + 1]) if at >= 0 else None
    if other is None or other[1] != at or before[at + 1 : m.start()].strip(" $"):
        return content
    return f"{before[slice(*other)].strip()} {m[1]} {content}".replace(" ,", ",")[:LINE]


def _tagged(text: str, tags: list[re.Match[str]]) -> Marked | None:
    """The content of the last answer tag, or what is marked in it; None where it is empty or left open."""
    if len(tags) < 2 or not tags[-1][1] or tags[-2][1]:
        return None
    if unsaid(text[max(0, tags[-2].start() - BEFORE) : tags[-2].start()]):
        return None
    content = text[tags[-2].end() : tags[-1].start()].strip()
    inner = _marked(content)
    line = inner.said if inner else " ".join(content[:LINE].split())
    return Marked(line, "tag", text[tags[-1].end() :]) if line.strip("*_$.:` ") else None


def last_line(text: str) -> str:
    return text.rstrip().rsplit("\n", 1)[-1].strip()[-LINE:]
