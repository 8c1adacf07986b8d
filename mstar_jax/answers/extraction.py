r"""Where the final answer of a response is: after a marker, in a box or in an answer tag.

    marked(ending(r"<think>Is it 5?</think> So it is \boxed{4}."))   -> ("4", "boxed")

What a think block or a program says never counts, and only the last TAIL characters of the rest are read.
"""

import re

from mstar_jax.answers.values import LINE

TAIL = 8192  # characters at the end of a response that are read

_BRACE = re.compile(r"\\boxed\s{0,9}\{|\\[{}]|[{}]")
_MARKER = re.compile(
    r"(?:\b(?:answer(?:\s+(?:choice|option|letter))?|correct\s+(?:option|choice)(?:\s+letter)?)"
    r"(?:\s+to\s+(?:the|this|your)\s+(?:question|problem))?[\s*_]*"
    r"(?:(?:is|would\s+be|should\s+be|must\s+be)\b(?!\s+(?:in)?correct\b|\s+wrong\b)"
    r"(?:\s+(?:therefore|thus|hence|clearly|simply|then|indeed)\b,?)?|[:：]|=(?!\s?[\"']))"
    r"|答案\s*(?:选项)?\s*[是为选:：]|(?P<heading>answer[\s*_\]]*\n(?=\s*\S)|answer\]))[\s*_:：]*(?:\$\$|\\\[)?\s*",
    re.IGNORECASE,
)
# Every marker contains one of these, from its second character on.
_KEYS = ("nswer", "NSWER", "orrect", "ORRECT", "案")
_THINK = re.compile(
    r"[<◁]\s{0,3}(?P<close>/)?\s{0,3}(?:think|thinking|thoughts?|reasoning|reflection|scratchpad)\s{0,3}[>▷]"
    r"|\[(?P<end>/)?THINK\]|<\|(?:begin|(?P<last>end))_of_thought\|>",
    re.IGNORECASE,
)
_ANSWER_TAG = re.compile(r"<\s{0,3}(/?)\s{0,3}(?:final[ _-]?)?answer\s{0,3}>", re.IGNORECASE)
_PROSE = ("", "text", "txt", "plaintext", "markdown", "md", "latex", "tex", "math")  # of a fence
_CODE = re.compile(  # a line break first, which is searched for fast
    r"\n[ \t]{0,80}(?:"
    r"(?:if|elif|for|while|with|def|class|switch|function)\b[^\n]*(?:[:{]\s{0,9}(?=\n|$)|:\s?\w{1,40}\s?=)"
    r"|(?:\}[ \t]?)?else\b[^\n]{0,40}[:{]|(?:let|const|var|int|float|double|string|bool)\s\w{1,40}\s?="
    r"|(?:return|import)\s\S|from\s\w{1,40}\simport|print[ \t]?\(|console\.log|#include)[^\n]*"
)
_ASSIGNMENT = re.compile(r"\n[ \t]{0,80}[A-Za-z_][\w.\[\]]*[ \t]*(?:[-+*/]?=(?!=)|:[ \t]?[\"'])[^\n]*")
_END_TOKEN = re.compile(r"(?:\s*<(?:/s|\|[\w ]{1,20}\|)>)+\s*$")


def boxed(text: str) -> str | None:
    """Content of the last balanced \\boxed{...}, which may hold further braces. One pass."""
    stack: list[int] = []
    best: tuple[int, int] | None = None
    for m in _BRACE.finditer(text):
        if m[0][-1] == "{" and len(m[0]) != 2:
            stack.append(m.end() if len(m[0]) > 2 else -1)
        elif m[0] == "}" and stack:
            start = stack.pop()
            if start >= 0 and (best is None or start > best[0]):
                best = (start, m.start())
    return text[best[0] : best[1]] if best else None


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
    for i, part in enumerate(response.split("```")):
        language, _, content = part.partition("\n") if i % 2 and "\n" in part else ("", "", part)
        if not i % 2 or (language.strip().lower() in _PROSE and not _CODE.search("\n" + content)):
            kept.append(content)
    return "\n".join(kept)


def ending(response: str) -> str:
    """The end of what a response says: no thoughts, no code, no `</s>` or `<|im_end|>` of a tokenizer."""
    if ("<" in response or "◁" in response or "[" in response) and _THINK.search(response):
        response = _spoken(response)
    if "```" in response:
        response = _unfenced(response)
    end = response[-TAIL:]
    if _CODE.search("\n" + end):
        end = _ASSIGNMENT.sub("", _CODE.sub("", "\n" + end))
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
        asks = m and (_ASKS.search(text[max(0, at - 81) : at - 1]) or _PRAISE.match(text, m.end()))
        if m and not asks and (not m["heading"] or _heads(text[: at - 1][-24:])):
            return m.end()
        last[key] = text.rfind(key, 0, at + len(key) - 1)
    return -1


def _heads(before: str) -> bool:
    """`Final answer` and `[Answer]` before a line break are markers, `this is my answer` is not."""
    return before.rstrip(" *_").lower().endswith(("final", "[", "[final"))


def marked(text: str) -> tuple[str, str] | None:
    """(the marked answer up to the end of its line, rule), or None; `text` is the tail of a response."""
    if "<" in text and (tags := list(_ANSWER_TAG.finditer(text))):
        return _tagged(text, tags)
    if "\\boxed" in text and (content := (boxed(text) or "").strip()):
        return content[:LINE], "boxed"
    start = _after_marker(text)
    if start < 0:
        return None
    line = text[start : start + LINE].split("\n", 1)[0].strip()
    return (line, "marker") if line.strip("*_$.:` ") else None


def _tagged(text: str, tags: list[re.Match[str]]) -> tuple[str, str] | None:
    """The content of the last answer tag, or what is marked in it; None where it is empty or left open."""
    if len(tags) < 2 or not tags[-1][1] or tags[-2][1]:
        return None
    content = text[tags[-2].end() : tags[-1].start()].strip()
    line, _ = marked(content) or (" ".join(content[:LINE].split()), "")
    return (line, "tag") if line.strip("*_$.:` ") else None


def last_line(text: str) -> str:
    return text.rstrip().rsplit("\n", 1)[-1].strip()[-LINE:]
