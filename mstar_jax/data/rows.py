r"""One row from a record of any common shape: its images, its turns, its answer.

A conversation, as in LLaVA-OneVision-Data's parquet files; MathV360K's rows (mathv360k.py) are such too:

    {"id": "134", "image": {"bytes": b"\x89PNG\r\n...", "path": "geos/134.png"}, "data_source": "geos",
     "conversations": [
       {"from": "human", "value": "<image>\nHint: Please answer the question and provide the correct option
          letter, e.g., A, B, C, D, at the end.\nQuestion: What is the area of the triangle?\nChoices:\n(A) 6
          \n(B) 12"},
       {"from": "gpt", "value": "The answer is A"}]}

Messages with typed content; here the images have a column of their own, and their parts are marks:

    {"images": ["charts/0.png", "charts/1.png"], "messages": [
       {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
       {"role": "user", "content": [{"type": "image"}, {"type": "image"},
          {"type": "text", "text": "Which of the two charts has more bars?"}]},
       {"role": "assistant", "content": [{"type": "text", "text": "The second one, with 7 bars."}]},
       {"role": "user", "content": [{"type": "text", "text": "How many more?"}]},
       {"role": "assistant", "content": [{"type": "text", "text": "7 - 4 = 3. The answer is 3"}]}]}

A part may also hold its image: `{"type": "image", "image": "charts/0.png"}` or `{"type": "image_url",
"image_url": {"url": "data:image/png;base64,iVBO..."}}`. The last user turn asks. The turns before it are
told in front of its question; a system turn is left out, since the prompt is the config's.

Columns, as in geometry3k's parquet files:

    {"images": [{"bytes": b"\x89PNG\r\n...", "path": None}], "answer": "3",
     "problem": "<image>Chords $\\overline{A C}$ and $\\overline{D F}$ are equidistant from the center. If the
       radius of $\\odot G$ is 26, find $A C$"}

Options may be a column too, as a list of texts. A `Columns` says which columns these are where they have
other names than usual. An image is its bytes, a struct of bytes and path, a path, or a `data:` URI; a URL
elsewhere is refused, for nothing is downloaded.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mstar_jax.data import pictures
from mstar_jax.data.images import ImageError
from mstar_jax.data.turns import Unreadable, image_marks, name_marks, plain_number, structs


class Columns(NamedTuple):
    """The names of columns; an empty one stands for the usual names (`USUAL`)."""

    id: str = ""
    images: str = ""
    question: str = ""
    options: str = ""
    answer: str = ""
    response: str = ""
    turns: str = ""
    source: str = ""
    steps: str = ""
    labels: str = ""


NAMES = Columns()
OPTIONAL = ("id", "images", "options", "source")  # of rows that are none the worse without


def named(text: str) -> Columns:
    """The columns of a text such as `question=ask,answer=label`; those that it does not name are usual ones.

    Raises:
      ValueError: it names something else.
    """
    pairs = [each.strip().partition("=") for each in text.split(",") if each.strip()]
    if wrong := [
        f"{role}{sign}{name}" for role, sign, name in pairs if role not in NAMES._fields or not name
    ]:
        known = ", ".join(NAMES._fields)
        raise ValueError(
            f"columns {text!r}: {wrong[0]!r} is not one of {known} with = and the name of a column"
        )
    return NAMES._replace(**{role: name for role, _, name in pairs})


USUAL = {
    "id": ("id", "pid", "question_id"),
    "question": ("question", "problem", "query", "prompt"),
    "options": ("options", "choices"),
    "answer": ("answer", "gold", "ground_truth"),
    "response": ("response", "rationale", "solution"),
    "turns": ("conversations", "messages"),
    "source": ("source", "data_source"),
    "steps": ("steps", "steps_with_score"),
    "labels": ("labels", "scores"),
}


class Shown(NamedTuple):
    """An image of a row: its bytes, or its path; `path` may also be what the bytes were called."""

    data: bytes | None
    path: str


class Row(NamedTuple):
    """What a record says.

    Attributes:
      id: as it is there; None if it is not.
      images: in the order of their marks.
      question: the turn that asks, with its hint and options.
      earlier: the turns before it, a question and its answer in turn.
      response: the turn after it, or the column of responses; empty if there is none.
      gold: the column of answers; empty if there is none.
      answer: that of the two which says the gold answer, as a rule the turn.
      options: those of a column; None if it has none.
      source: what the record says it is from.
      unread: whether there are no options, but a column that may hold some.
    """

    id: object
    images: tuple[Shown, ...]
    question: str
    earlier: tuple[str, ...]
    response: str
    gold: str
    answer: str
    options: tuple[str, ...] | None
    source: str
    unread: bool = False


_SPEAKERS = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
_TEXTS = ("text", "input_text", "output_text")  # types of content parts
_PICTURES = ("image", "image_url", "input_image")
_IMAGE_FIELD = re.compile(r"(?:image|img)s?(?:_?(?:paths?|files?|names?|file_?names?))?", re.IGNORECASE)
_NUMBERED_FIELD = re.compile(r"image_?(\d{1,2})", re.IGNORECASE)
_IMAGE_LIKE = re.compile(r"image(?!_?id)|img(?!_?id)|picture|photo", re.IGNORECASE)
_OPTION_LIKE = re.compile(r"option|choice|candidate", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
MOST_OPTIONS = 26  # a letter for each
_LABELLED = r"[(\[]?{}\s?[)\].:]\s*(?=\S)"


def parse(record: object, columns: Columns) -> Row:
    """What a record says.

    Raises:
      Unreadable: it is no row; the message is the cause.
    """
    if isinstance(record, Unreadable):
        raise record
    if not isinstance(record, dict):
        raise Unreadable("wrong types")
    turns, response = column(record, columns, "turns"), column(record, columns, "response")
    gold, options = column(record, columns, "answer"), column(record, columns, "options")
    images = _images(record, columns)
    if turns is not None:
        texts, images, response = dialogue(turns, images)
        sound = isinstance(gold, str) or plain_number(gold) is not None
        gold = gold if columns.answer or sound else None
        options = options if columns.options or isinstance(options, list) else None
    else:
        texts = [string(column(record, columns, "question", "wrong types"))]
    if image_marks("\n".join(texts)) not in (0, len(images)):
        raise Unreadable("image marks do not match images")
    *earlier, question = name_marks(texts, len(images))
    said, known = text(response), text(gold)
    source = column(record, columns, "source")
    return Row(
        id=column(record, columns, "id"),
        images=tuple(images),
        question=question,
        earlier=tuple(earlier),
        response=said or known,
        gold=known,
        answer=known if known and (columns.answer or turns is None) else said,
        options=_listed(options),
        source=source if isinstance(source, str) else "",
        unread=options is None and turns is None and not columns.options and _options_elsewhere(record),
    )


def column(record: Mapping[str, Any], columns: Columns, role: str, cause: str = "") -> Any:
    """The value of a column; None if the record has none.

    Raises:
      Unreadable: it has no column of the name that was given, and not every row needs one; or, with a cause,
        of any usual name.
    """
    if name := getattr(columns, role):
        if name not in record and role not in OPTIONAL:
            raise Unreadable(f"no column {name!r}")
        return record.get(name)
    for name in USUAL[role]:
        if record.get(name) is not None:
            return record[name]
    if cause:
        raise Unreadable(cause)
    return None


def string(value: object) -> str:
    """A text.

    Raises:
      Unreadable: it is none, or cannot be encoded as UTF-8.
    """
    if not isinstance(value, str):
        raise Unreadable("wrong types")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise Unreadable("wrong types")  # an unpaired surrogate
    return value


def text(value: object) -> str:
    """A text or a number as text; empty for None.

    Raises:
      Unreadable: it is neither.
    """
    if (known := plain_number(value)) is not None:
        return known
    return "" if value is None else string(value)


# ---- 1. turns -----------------------------------------------------------------------------------------


def dialogue(value: object, images: Sequence[Shown]) -> tuple[list[str], list[Shown], object]:
    """(the texts of the turns up to the last that asks, the images, what answers it) of a conversation.

    Raises:
      Unreadable: it is none.
    """
    if not isinstance(value := structs(value), list) or not all(isinstance(turn, dict) for turn in value):
        raise Unreadable("wrong types")
    speakers, said = [], list[object]()
    own = list[Shown | None]()
    for turn in value:
        name = turn.get("role") if turn.get("from") is None else turn["from"]
        speaker = _SPEAKERS.get(str(name).lower())
        content = structs(turn.get("content") if turn.get("value") is None else turn["value"])
        if speaker != "system":
            speakers.append(speaker)
            said.append(_joined(content, own) if isinstance(content, list) else content)
    if not speakers or any(s != ("human", "gpt")[at % 2] for at, s in enumerate(speakers)):
        raise Unreadable("turns are not questions and answers in turn")
    answer = said.pop() if speakers[-1] == "gpt" else None
    if any(part is not None for part in own):  # a part without an image of its own takes the next one
        rest = iter(images)
        filled = [part if part is not None else next(rest, None) for part in own]
        images = [*(part for part in filled if part is not None), *rest]
    return [text(each) if at % 2 else string(each) for at, each in enumerate(said)], list(images), answer


def _joined(parts: Sequence[object], own: list[Shown | None]) -> str:
    """The text of typed parts, with a mark for each image; the images, or None, are added to `own`."""
    found = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            found.append(part)
        elif isinstance(part, dict) and (kind in _TEXTS or kind is None and part.get("text") is not None):
            found.append(string(part.get("text")))
        elif isinstance(part, dict) and kind in _PICTURES:
            image = next((part[key] for key in ("image", "image_url", "url", "path") if part.get(key)), None)
            image = part.get("bytes") if image is None else image
            own.append(None if image is None else shown(image))
            found.append("<image>")
        else:
            raise Unreadable("content part of an unknown type")
    return "".join(found)


def _listed(value: object) -> tuple[str, ...] | None:
    """Options of a column, a list of texts or {letter: text}; letters before all of them are removed."""
    if isinstance(value, dict):  # a struct of Arrow's has all letters, with None for those that are absent
        there = {name: each for name, each in value.items() if each is not None}
        letters_only = all(len(name) == 1 for name in there)
        value = [there[name] for name in (sorted(there) if letters_only else there)]
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise Unreadable("options are no list")
    if len(value) > MOST_OPTIONS:
        raise Unreadable("too many options")
    texts = [text(each) for each in value]
    letters = [re.match(_LABELLED.format(chr(ord("A") + at)), each) for at, each in enumerate(texts)]
    if all(letters):
        return tuple(each[mark.end() :] for each, mark in zip(texts, letters) if mark)
    return tuple(texts)


def _options_elsewhere(record: Mapping[str, Any]) -> bool:
    """Whether a record may have options in columns that are not read: A, B, ..., or one called like them."""
    lettered = all(isinstance(record.get(letter), str) for letter in "AB")
    named = (value for key, value in record.items() if _OPTION_LIKE.search(key))
    return lettered or any(isinstance(value, list | dict) and len(value) > 1 for value in named)


# ---- 2. images ----------------------------------------------------------------------------------------


def _images(record: Mapping[str, Any], columns: Columns) -> list[Shown]:
    if columns.images:
        value = column(record, columns, "images")
        named = [value] if value else []
    elif record.get("decoded_image"):  # MathVista's, beside a name in `image`
        named = [record["decoded_image"]]
    else:
        named = [value for key, value in record.items() if _IMAGE_FIELD.fullmatch(key) and value]
    listed = (value if isinstance(value, list) else [value] for value in named)
    found = [values for each in listed if (values := [value for value in each if not _blank(value)])]
    if any(values != found[0] for values in found):
        raise Unreadable("several image fields")
    if not found:
        numbered = [(int(m[1]), key) for key in record if (m := _NUMBERED_FIELD.fullmatch(key))]
        found = [[record[key] for _, key in sorted(numbered) if not _blank(record[key])]]
        known = columns.images or numbered or any(map(_IMAGE_FIELD.fullmatch, record))
        kinds = str | bytes | list | dict
        if not known and any(_IMAGE_LIKE.search(k) and isinstance(v, kinds) for k, v in record.items()):
            raise Unreadable("image in an unknown field")
    return [shown(value) for value in found[0]]


def _blank(value: object) -> bool:
    """Whether a cell holds no image, as writers of tables say it."""
    if isinstance(value, dict):
        return value.get("bytes") is None and not value.get("path") and not value.get("url")
    return value is None or value == ""


def shown(value: object) -> Shown:
    """An image of a record.

    Raises:
      Unreadable: it is neither bytes nor a path.
    """
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path") or value.get("url") or ""
        if data is None and not isinstance(path, dict):
            return shown(path)
        if not isinstance(data, bytes):
            raise Unreadable("wrong types")
        return Shown(data, string(path))
    if isinstance(value, bytes):
        return Shown(value, "")
    path = string(value)
    if path.startswith("data:"):
        try:
            return Shown(pictures.unpack(path), "")
        except ImageError as error:
            raise Unreadable(error.cause) from error
    if _URL.match(path):
        raise Unreadable("image is a URL")
    return Shown(None, path)
