"""The larger embedded data set: figures of 128 x 128 px with printed numbers, asked about in natural words.

A figure is a bar chart, a price list or a scene of shapes, whose numbers are printed or have to be counted.
`data.questions` asks about them. The files are those of `data.embedded`. A record of `truth.jsonl`:

    {"id": "test_new_figures_000004", "split": "test", "family": "left",
     "objects": [["green", 437], ["blue", 77], ["purple", 385]],
     "variants": [
         ["The purple bar is at 385 and the green bar at 437.", "385 + 437 = 822", "999 - 822 = 177"],
         ["The purple bar is at 385 and the green bar at 437.", "999 - 385 = 614", "614 - 437 = 177"]],
     "answer": "177", "part": "new figures", "free": true}

(without two variants, which read the blue bar too). The test split tells what was learned from what was
memorised. It has three parts of one size:

    new figures     families that were trained on, about figures that nothing was trained on
    new questions   families that nothing was trained on, about figures of the train split
    both            families and figures that nothing was trained on
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from mstar_jax.data import embedded
from mstar_jax.data.questions import (
    KNOWN,
    LARGEST,
    UNSEEN,
    WORDS,
    Family,
    Pairs,
    Problem,
    Step,
    problems,
    say,
)
from mstar_jax.data.truth import ANSWER, COLOURS, SHAPES, Truth

FORMAT = 2  # incremented whenever the same parameters give different data
SIZE = 128  # px
MOST = 7  # of one kind of shape in a scene
PARTS = ("new figures", "new questions", "both")
QUESTIONS = 2  # about a figure of the train or unlabelled split
STREAMS = ("train", "unlabelled", "validation", "test", "captions", "arithmetic", "instruct")
KINDS = {"bars": 0.4, "list": 0.4, "scene": 0.2}  # shares

# ---- 1. figures -------------------------------------------------------------------------------------------


def draw_objects(rng: np.random.Generator) -> tuple[str, Pairs]:
    """The kind of a figure and its names with their numbers, which add up to 999 at most."""
    kind = str(rng.choice(list(KINDS), p=list(KINDS.values())))
    if kind == "scene":
        pairs = list(itertools.product(COLOURS, SHAPES))
        chosen = sorted(rng.permutation(len(pairs))[:3].tolist())  # in one order, so that captions have one
        names = [" ".join(pairs[i]) for i in chosen]
        return kind, tuple((name, int(rng.integers(1, MOST + 1))) for name in names)
    count = int(rng.integers(3, 5))
    names = rng.permutation(list(COLOURS if kind == "bars" else SHAPES))[:count].tolist()
    shares = rng.dirichlet([2.0] * count) * rng.uniform(40, LARGEST - 2 * count)
    return kind, tuple((name, 2 + int(share)) for name, share in zip(names, shares, strict=True))


@functools.cache
def font(size: int) -> PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont:
    """Pillow's own font."""
    return PIL.ImageFont.load_default(size)


class Mark(NamedTuple):
    """A digit of a figure, or a shape of a scene.

    Attributes:
      x, y: the pixel of its middle.
      name: of the object whose number the digit belongs to, or of the shape.
      digit: None for a shape.
      place: of the digit: 0 for units, 1 for tens, 2 for hundreds.
    """

    x: float
    y: float
    name: str
    digit: int | None = None
    place: int | None = None


def render(
    rng: np.random.Generator, kind: str, objects: Pairs, marks: list[Mark] | None = None
) -> PIL.Image.Image:
    """Draws a figure, with jitter in places, sizes and colours; `marks` gets what is to be read in it."""

    def near(colour: Sequence[int]) -> tuple[int, ...]:
        return tuple(np.clip(np.asarray(colour) + rng.normal(0, 8, 3), 0, 255).astype(int).tolist())

    def between(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    image = PIL.Image.new("RGB", (SIZE, SIZE), near((238, 238, 234)))
    draw = PIL.ImageDraw.Draw(image)
    ink = near((40, 40, 46))

    def write(at: tuple[int, int], name: str, value: int, size: int, anchor: str) -> None:
        text, type_ = str(value), font(size)
        draw.text(at, text, fill=ink, font=type_, anchor=anchor)
        if marks is not None:
            left, top, _, bottom = draw.textbbox(at, text, font=type_, anchor=anchor)
            ends = [left + type_.getlength(text[:n]) for n in range(len(text) + 1)]
            middles = [(start + end) / 2 for start, end in itertools.pairwise(ends)]
            for n, (digit, x) in enumerate(zip(text, middles, strict=True), start=1):
                marks.append(Mark(x, (top + bottom) / 2, name, int(digit), len(text) - n))

    slot = SIZE // len(objects)
    if kind == "bars":
        base, size = between(116, 124), between(13, 15)
        tallest = max(value for _, value in objects)
        for at, (name, value) in enumerate(objects):
            middle, half = slot * at + slot // 2 + between(-2, 2), between(8, 12)
            top = base - 4 - round((base - 30) * value / tallest)
            draw.rectangle((middle - half, top, middle + half, base), fill=near(COLOURS[name]))
            write((middle, top - 3), name, value, size, "mb")
        draw.line((2, base, SIZE - 3, base), fill=ink)
    elif kind == "list":
        left, right, size = between(14, 24), between(98, 120), between(14, 17)
        for at, (name, value) in enumerate(objects):
            middle = slot * at + slot // 2 + between(-1, 1)
            shape(draw, name, (left, middle), between(8, 10), near((90, 110, 150)))
            write((right, middle), name, value, size, "rm")
    else:
        everything = [name for name, count in objects for _ in range(count)]
        cells = rng.permutation(25)[: len(everything)].tolist()
        for cell, name in zip(cells, everything, strict=True):
            colour, form = name.split()
            place = (14 + 25 * (cell % 5) + between(-2, 2), 14 + 25 * (cell // 5) + between(-2, 2))
            shape(draw, form, place, between(8, 10), near(COLOURS[colour]))
            if marks is not None:
                marks.append(Mark(*place, name))
    return image


def shape(
    draw: PIL.ImageDraw.ImageDraw, name: str, place: tuple[int, int], size: int, fill: tuple[int, ...]
) -> None:
    """Draws a shape of this name; `size` is half its width in px."""
    x, y = place
    if name == "circle":
        draw.ellipse((x - size, y - size, x + size, y + size), fill=fill)
        return
    corners, turn, inner = {
        "square": (4, 0.25 * np.pi, 1.0),
        "diamond": (4, 0.0, 1.0),
        "triangle": (3, -0.5 * np.pi, 1.0),
        "star": (10, -0.5 * np.pi, 0.42),
    }[name]
    angles = turn + 2 * np.pi * np.arange(corners) / corners
    radius = size * np.where(np.arange(corners) % 2, inner, 1.0)
    points = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)
    draw.polygon([tuple(point) for point in points.tolist()], fill=fill)


# ---- 2. writing -------------------------------------------------------------------------------------------


def make(
    folder: str | os.PathLike,
    *,
    seed: int = 0,
    train: int,
    unlabelled: int,
    validation: int,
    test: int,
    captions: int,
    arithmetic: int,
    instruct: int,
) -> pathlib.Path:
    """Writes the data set, unless it exists already, and returns its folder; see `embedded.publish`."""
    sizes = {"train": train, "unlabelled": unlabelled, "validation": validation, "test": test}
    base = {"captions": captions, "arithmetic": arithmetic, "instruct": instruct}
    manifest = {"set": "figures", "format": FORMAT, "seed": seed, **sizes, **base}

    def write(new: pathlib.Path) -> None:
        rngs = {name: np.random.default_rng([seed, stream]) for stream, name in enumerate(STREAMS)}
        rows: dict[str, list[Row]] = {}
        for split in ("train", "unlabelled", "validation"):
            rows[split] = list(_rows(new, split, sizes[split], rngs[split]))
        rows["test"] = _test_rows(new, test, rngs["test"], rows["train"])
        for split, found in rows.items():
            text = json.dumps([row.record() for row in found], indent=1)
            (new / f"{split}.json").write_text(text + "\n")
        truths = (row.truth() for found in rows.values() for row in found)
        embedded.write_lines(new / "truth.jsonl", map(dataclasses.asdict, truths))
        embedded.write_lines(new / "base.jsonl", _base_records(new, rngs, base))

    return embedded.publish(folder, manifest, write)


class Row(NamedTuple):
    """A query of a split."""

    id: str
    split: str
    part: str
    image: str
    kind: str
    objects: Pairs
    problem: Problem

    def record(self) -> dict[str, object]:
        """The row in MathV360K's format."""
        turns = [
            {
                "from": "human",
                "value": f"<image>\n{embedded.INTEGER_HINT}\nQuestion: {self.problem.question}",
            },
            {"from": "gpt", "value": f"{ANSWER} {self.problem.answer}"},
        ]
        return {"id": self.id, "image": self.image, "conversations": turns}

    def truth(self) -> Truth:
        """What is known of it."""
        p = self.problem
        variants = tuple(tuple(say(step, self.kind) for step in order) for order in p.orders)
        return Truth(
            self.id, self.split, p.family, self.objects, variants, p.answer, part=self.part, free=True
        )


def _figure(root: pathlib.Path, name: str, rng: np.random.Generator) -> tuple[str, str, Pairs]:
    """Draws a new figure: (its image, its kind, its objects)."""
    kind, objects = draw_objects(rng)
    return embedded.save(root, name, render(rng, kind, objects)), kind, objects


def _rows(
    root: pathlib.Path,
    split: str,
    size: int,
    rng: np.random.Generator,
    part: str = "",
    families: Mapping[str, Family] = KNOWN,
    figures: Iterator[tuple[str, str, Pairs]] | None = None,
) -> Iterator[Row]:
    """Yields `size` queries about new figures, or those given; a figure that suits no family has none."""
    count = QUESTIONS if split in ("train", "unlabelled") else 1
    stem = f"{split}_{part}".strip("_").replace(" ", "_")
    new = (_figure(root, f"{stem}_{n:06d}", rng) for n in itertools.count())
    asked = (
        (image, kind, objects, problem)
        for image, kind, objects in figures or new
        for problem in problems(rng, list(families), count, kind, objects)
    )
    for n, (image, kind, objects, problem) in enumerate(itertools.islice(asked, size)):
        yield Row(f"{stem}_{n:06d}", split, part, image, kind, objects, problem)


def _test_rows(root: pathlib.Path, size: int, rng: np.random.Generator, train: Sequence[Row]) -> list[Row]:
    """The parts of the test split.

    Raises:
      ValueError: the train split has too few figures for a part.
    """
    known = list(dict.fromkeys((row.image, row.kind, row.objects) for row in train))
    again = (known[i] for i in rng.permutation(len(known)))
    rows: list[Row] = []
    for n, part in enumerate(PARTS):
        share = size // len(PARTS) + (n < size % len(PARTS))
        families = KNOWN if part == "new figures" else UNSEEN
        found = list(
            _rows(root, "test", share, rng, part, families, again if part == "new questions" else None)
        )
        if len(found) < share:
            text = f"data.figures.test = {size} asks {share} {part}, and there are only {len(found)}: raise"
            raise ValueError(f"{text} data.figures.train = {len(train)}, whose figures they are about")
        rows += found
    return rows


CAPTIONS = (
    "Describe the image.",
    "What does the figure show?",
    "Read all numbers of the figure.",
    "What can be seen?",
)
ONE = ("What is the {value} of {one}?", "Read the {value} of {one}.")
EXTREMES = ("What are the largest and the smallest {value}?",)


def _caption(rng: np.random.Generator, kind: str, objects: Pairs) -> tuple[str, list[Step]]:
    """A description of a figure, of one of its numbers, or of its extremes: (what is asked, the steps)."""
    words, what = WORDS[kind], rng.random()
    if what < 0.25:
        name, value = objects[int(rng.integers(len(objects)))]
        asked = ONE[int(rng.integers(len(ONE)))].format(value=words.value, one=words.one.format(name))
        return asked, [("read", ((name, value),))]
    if what < 0.35:
        numbers = [value for _, value in objects]
        steps: list[Step] = [("read", objects), ("ends", max(numbers), min(numbers))]
        return EXTREMES[0].format(value=words.value), steps
    return CAPTIONS[int(rng.integers(len(CAPTIONS)))], [("read", objects)]


def _arithmetic(rng: np.random.Generator) -> Step:
    """A sum or a difference of numbers up to 999, small ones as often as large ones."""
    top = int(np.exp(rng.uniform(np.log(9), np.log(LARGEST))))
    a, b = sorted(rng.integers(0, top + 1, 2).tolist(), reverse=True)
    if rng.random() < 0.5:
        return ("-", a, b)
    return ("+", a - b, b) if rng.random() < 0.5 else ("+", b, a - b)


def _base_records(
    root: pathlib.Path, rngs: Mapping[str, np.random.Generator], sizes: Mapping[str, int]
) -> Iterator[dict[str, object]]:
    """The narrow set; no question of it is of an unseen family."""
    ids = (f"base_{n:06d}" for n in itertools.count())
    asked: dict[str, object] = {"options": None, "answer": None}
    rng = rngs["captions"]
    for _ in range(sizes["captions"]):
        name = next(ids)
        image, kind, objects = _figure(root, name, rng)
        question, steps = _caption(rng, kind, objects)
        record: dict[str, object] = {"id": name, "image": image, "mode": "caption", "question": question}
        yield record | asked | {"response": "\n".join(say(step, kind, rng) for step in steps)}
    rng = rngs["arithmetic"]
    for _ in range(sizes["arithmetic"]):
        step = _arithmetic(rng)
        question = "Compute {1} {0} {2}.".format(*step)
        record = {"id": next(ids), "image": None, "mode": "arithmetic", "question": question}
        yield record | asked | {"response": say(step, "bars", rng)}
    rng = rngs["instruct"]
    for row in _rows(root, "base_instruct", sizes["instruct"], rng):
        p = row.problem
        order = p.orders[int(rng.integers(len(p.orders)))]
        lines = [*(say(step, row.kind, rng) for step in order), f"{ANSWER} {p.answer}"]
        record = {"id": next(ids), "image": row.image, "mode": "cot", "question": p.question}
        yield record | {"options": None, "answer": p.answer, "response": "\n".join(lines)}
