"""The embedded data set: rendered figures with questions, stored in MathV360K's format.

There are two kinds of image, bar charts and scenes of shapes, both 64 x 64 px with four column slots of 16
px. Every question except `read` depends on several objects, so that misreading one matters. The text suits a
byte-level BPE: a line starts with a capitalised word, and a single space precedes every number.

    <folder>/figures.json                manifest: the parameters of the set
    <folder>/figures/images/<split>_<n>.png
    <folder>/{train,unlabelled,validation,test}.json    MathV360K rows, images relative to <folder>
    <folder>/truth.jsonl                 ground truth of every query, for evaluation only
    <folder>/base.jsonl                  the small set that the tiny base model is trained on

A record of `truth.jsonl` (the variants are the valid orders of the steps) and one of `base.jsonl`:

    {"id": "train_000002_0", "split": "train", "family": "total",
     "objects": [["red", 9], ["blue", 7], ["green", 6]],
     "variants": [["Bars red 9 blue 7 green 6", "Sum 9 + 7 = 16", "Sum 16 + 6 = 22"],
                  ["Bars red 9 blue 7 green 6", "Sum 6 + 7 = 13", "Sum 13 + 9 = 22"]], "answer": "22",
     "part": "", "free": false}
    {"id": "base_004096", "image": null, "mode": "arithmetic", "question": "Compute 13 + 9.", "options": null,
     "answer": null, "response": "Sum 13 + 9 = 22"}
"""

import dataclasses
import itertools
import json

import numpy as np
import PIL.Image

from mstar_jax.data import embedded
from mstar_jax.data.truth import ANSWER, COLOURS, Truth

FORMAT = 2  # incremented whenever the same parameters give different data
SPLITS = {"train": 2, "unlabelled": 2, "validation": 1, "test": 1}  # questions per image
STREAMS = (*SPLITS, "captions", "arithmetic", "instruct")  # each has its own random stream
BAR_FAMILIES = {"read": 0.08, "sum": 0.22, "difference": 0.18, "range": 0.14, "total": 0.18}
BAR_FAMILIES |= {
    "split": 0.04,
    "remainder": 0.05,
    "parity": 0.03,
}  # rare: more steps, or an answer that is easily guessed
SCENE_FAMILIES = {"count": 0.05, "compare": 0.03}
SCENE_CAPTIONS = 0.3  # more than their share of questions: the base model learns to see from captions
READ_CAPTIONS = 0.5  # fraction of chart captions that also read one bar
ARITHMETIC = {  # share, question
    "Sum": (0.5, "Compute {} + {}."),
    "Difference": (0.2, "Compute {} - {}."),
    "Range": (0.1, "Compute range {} - {}."),
    "Remainder": (0.1, "Compute {} by {}."),
    "Parity": (0.1, "Compute parity {}."),
}

SIZE = 64  # px
SLOT = 16  # px
UNIT = 8  # px of height per unit of a bar
BASELINE = 60  # px; bars end above this row
TALLEST = 7  # units; the largest value of a bar
KINDS = ("circle", "ring", "cross")
BACKGROUND = (238, 238, 234)
AXIS = (70, 70, 76)
COLOUR_SD = 7.0  # of 255, per object and channel
NOISE_SD = 10.0  # of 255, per pixel

LETTER_HINT = f"{embedded.HINT}and provide the correct option letter, e.g., A, B, C, D, at the end."


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question about a figure, with all valid sequences of steps (without the final answer line)."""

    family: str
    question: str
    options: tuple[str, ...] | None
    answer: str  # the letter if there are options
    variants: tuple[tuple[str, ...], ...]


# ---- figures ----


def draw_objects(rng, scene, families=()):
    """Three or four objects that suit the families: four bars for `split`, no tie for `compare`."""
    n = 4 if "split" in families else int(rng.integers(3, 5))
    colours = rng.permutation(list(COLOURS)).tolist()
    if not scene:
        return tuple(zip(colours[:n], rng.integers(1, TALLEST + 1, n).tolist(), strict=True))
    palette = colours[: rng.integers(2, 4)]  # few, so that colours repeat
    while True:
        kinds = rng.choice(KINDS, n).tolist()
        if "compare" not in families or kinds.count("circle") != kinds.count("ring"):
            return tuple(zip(rng.choice(palette, n).tolist(), kinds, strict=True))


def describe(objects):
    """The description of a figure, the first step of every response: `Bars red 9 purple 7 yellow 6`."""
    kind = "Shapes" if objects[0][1] in KINDS else "Bars"
    return " ".join([kind, *(f"{colour} {value}" for colour, value in objects)])


def render(rng, objects):
    """Draws the objects, one per slot, with jitter and noise: uint8[64, 64, 3]."""
    jitter = rng.normal(0, COLOUR_SD, (len(objects) + 1, 3)).astype(np.float32)
    image = np.full((SIZE, SIZE, 3), BACKGROUND, np.float32) + jitter[-1]
    slots = np.sort(rng.permutation(4)[: len(objects)])
    chart = objects[0][1] not in KINDS
    for slot, (colour, value), shift in zip(slots, objects, jitter[:-1], strict=True):
        if chart:
            width, height = int(rng.integers(8, 15)), UNIT * value
            top, cover = BASELINE - height, np.ones((height, width))
        else:
            width = height = int(rng.integers(12, 15))
            top = SLOT * int(rng.integers(4)) + int(rng.integers(1, SLOT - height))  # within one of four rows
            cover = _cover(value, width)
        left = SLOT * slot + int(rng.integers(1, SLOT - width))
        area = image[top : top + height, left : left + width]
        area += cover[..., None] * (COLOURS[colour] + shift - area)
    if chart:
        image[BASELINE, 1:-1] = AXIS
    image += NOISE_SD * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def _cover(kind, size):
    """The fraction of every pixel that the shape covers, soft at its edge: float[size, size]."""
    y, x = np.abs(np.mgrid[:size, :size] - (size - 1) / 2)
    disc = size / 2 - np.hypot(x, y)
    inside = {"circle": disc, "ring": np.minimum(disc, 3 - disc), "cross": 2 - np.minimum(x, y)}[kind]
    return np.clip(inside + 0.5, 0, 1)


# ---- problems ----


def draw_families(rng, scene, k):
    """k families for the questions about one figure, drawn in proportion to their weights.

    Systematic sampling: k points, evenly spaced on the cumulative weights. A family is drawn twice only if
    its share exceeds 1/k, which for k = 2 holds for `count` alone, and that family has several questions.
    """
    weights = SCENE_FAMILIES if scene else BAR_FAMILIES
    names = rng.permutation(list(weights)).tolist()
    edges = np.cumsum([weights[name] for name in names])
    return [names[i] for i in np.searchsorted(edges[:-1], (rng.random() + np.arange(k)) / k * edges[-1])]


def pose(rng, family, objects):
    """A question of the family about the objects: Problem."""
    options, values = None, [value for _, value in objects]
    first, second, end = [], [], []  # the steps in two orders, and the steps that follow both
    if family in ("total", "remainder", "parity"):
        first, second, total = _sums(values), _sums(values[::-1]), sum(values)
        question, answer = "What is the total of all bars?", total
        if family == "remainder":
            question, answer = "What remains when the total is divided by 3?", total % 3
            end = [step("Remainder", total, 3)]
        elif family == "parity":
            question, answer, options = "Is the total odd or even?", "BA"[total % 2], ("odd", "even")
            end = [step("Parity", total)]
    elif family in ("sum", "difference"):
        (one, a), (two, b) = (objects[i] for i in sorted(rng.permutation(len(objects))[:2]))
        question = f"What is the {family} of the {one} and the {two} bar?"
        reads = [f"Read {one} {a}", f"Read {two} {b}"]
        if family == "sum":
            first, second, answer = [*reads, step("Sum", a, b)], [*reads[::-1], step("Sum", b, a)], a + b
        else:
            end, answer = [step("Difference", max(a, b), min(a, b))], abs(a - b)
            first, second = reads, reads[::-1]
    elif family == "split":
        question = "What is the difference between the left half and the right half?"
        left, right = _sums(values[:2]), _sums(values[2:])
        low, high = sorted([sum(values[:2]), sum(values[2:])])
        first, second, end, answer = left + right, right + left, [step("Difference", high, low)], high - low
    elif family == "range":
        question, low, high = "What is the range of the bars?", min(values), max(values)
        first, end, answer = [f"Highest {high}", f"Lowest {low}"], [step("Range", high, low)], high - low
        second = first[::-1]
    elif family == "read":
        colour, answer = objects[int(rng.integers(len(objects)))]
        question, end = f"What is the value of the {colour} bar?", [f"Read {colour} {answer}"]
    elif family == "count":
        target = str(rng.choice(sorted({word for shape in objects for word in shape})))
        question = f"How many {target + 's' if target in KINDS else target + ' shapes'} are there?"
        found = [" ".join(shape) for shape in objects if target in shape]
        first = [f"Count {i} {shape}" for i, shape in enumerate(found, 1)]
        second = [f"Count {i} {shape}" for i, shape in enumerate(found[::-1], 1)]
        answer = len(found)
    else:
        question, options = "Are there more circles or rings?", ("circles", "rings")
        circles, rings = values.count("circle"), values.count("ring")
        first, answer = [f"Circles {circles}", f"Rings {rings}"], "A" if circles > rings else "B"
        second, end = first[::-1], [f"More {options['AB'.index(answer)]}"]
    variants = dict.fromkeys((describe(objects), *order, *end) for order in (first, second))
    return Problem(family, question, options, str(answer), tuple(variants))


def step(name, a, b=None):
    """One line of arithmetic, such as `Sum 13 + 9 = 22`; `Parity 17 odd` has no b."""
    if name == "Parity":
        return f"Parity {a} {'odd' if a % 2 else 'even'}"
    sign, result = {"Sum": ("+", a + b), "Remainder": ("by", a % b)}.get(name, ("-", a - b))
    return f"{name} {a} {sign} {b} = {result}"


def _sums(values):
    return [step("Sum", a, b) for a, b in zip(itertools.accumulate(values), values[1:], strict=False)]


def draw_arithmetic(rng, count):
    """Yields `count` pairs (question, step), evenly over the numbers that can occur in the charts' steps."""
    n, one = TALLEST, range(1, TALLEST + 1)
    facts = {
        # sums of two bars are three times as frequent as running sums, because every running sum needs one
        "Sum": [(a, b) for a in range(1, 3 * n + 1) for b in one for _ in range(3 if a <= n else 1)],
        "Difference": [(a, b) for a in range(1, 2 * n + 1) for b in range(1, a + 1)],
        "Range": [(a, b) for a in one for b in range(1, a + 1)],
        "Remainder": [(a, 3) for a in range(3, 4 * n + 1)],
        "Parity": [(a,) for a in range(3, 4 * n + 1)],
    }
    decks = {name: itertools.cycle(rng.permutation(facts[name]).tolist()) for name in ARITHMETIC}
    for name in rng.choice(list(ARITHMETIC), count, p=[share for share, _ in ARITHMETIC.values()]).tolist():
        numbers = next(decks[name])
        yield ARITHMETIC[name][1].format(*numbers), step(name, *numbers)


# ---- writing ----


def make(
    folder,
    *,
    seed=0,
    train=4096,
    unlabelled=1024,
    validation=512,
    test=1024,
    captions=4096,
    arithmetic=2000,
    instruct=400,
):
    """Writes the data set (see the module's docstring), unless it exists already, and returns its folder.

    The same parameters give the same bytes. The set is written next to `folder` and then renamed; a set with
    other parameters is replaced.

    Args:
      folder: does not exist yet, or holds an earlier set and nothing else.
      seed: of every random stream.
      train, unlabelled, validation, test: numbers of queries.
      captions, arithmetic, instruct: numbers of base examples (`instruct` for mode `cot`).

    Raises:
      FileExistsError: the folder holds other files.
    """
    sizes = {"train": train, "unlabelled": unlabelled, "validation": validation, "test": test}
    base = {"captions": captions, "arithmetic": arithmetic, "instruct": instruct}
    manifest = {"format": FORMAT, "seed": seed, **sizes, **base}

    def write(new):
        rngs = {name: np.random.default_rng([seed, stream]) for stream, name in enumerate(STREAMS)}
        truths = [t for split in SPLITS for t in _write_split(new, split, sizes[split], rngs[split])]
        embedded.write_lines(new / "truth.jsonl", map(dataclasses.asdict, truths))
        embedded.write_lines(new / "base.jsonl", _base_records(new, rngs, **base))

    return embedded.publish(folder, manifest, write)


def _draw(rng, k):
    """Draws a figure with k different questions: (objects, problems)."""
    scene = rng.random() < sum(SCENE_FAMILIES.values())
    families = draw_families(rng, scene, k)
    objects, problems = draw_objects(rng, scene, families), {}
    for family in families:
        while (problem := pose(rng, family, objects)).question in problems:
            pass
        problems[problem.question] = problem
    return objects, list(problems.values())


def _write_split(root, split, size, rng):
    rows, truths = [], []
    for n in range(-(-size // SPLITS[split])):
        objects, problems = _draw(rng, SPLITS[split])
        image = embedded.save(root, f"{split}_{n:06d}", PIL.Image.fromarray(render(rng, objects)))
        for i, p in enumerate(problems[: size - len(rows)]):
            query_id = f"{split}_{n:06d}_{i}"
            text = f"<image>\n{LETTER_HINT if p.options else embedded.INTEGER_HINT}\nQuestion: {p.question}"
            if p.options:
                text += "\nChoices:\n(A) {}\n(B) {}".format(*p.options)
            turns = [{"from": "human", "value": text}, {"from": "gpt", "value": f"{ANSWER} {p.answer}"}]
            rows.append({"id": query_id, "image": image, "conversations": turns})
            truths.append(Truth(query_id, split, p.family, objects, p.variants, p.answer))
    (root / f"{split}.json").write_text(json.dumps(rows, indent=1) + "\n")
    return truths


def _base_records(root, rngs, captions, arithmetic, instruct):
    ids = (f"base_{n:06d}" for n in itertools.count())
    asked = {"options": None, "answer": None}
    rng = rngs["captions"]
    for _ in range(captions):
        objects, name = draw_objects(rng, scene=rng.random() < SCENE_CAPTIONS), next(ids)
        record = {
            "id": name,
            "image": embedded.save(root, name, PIL.Image.fromarray(render(rng, objects))),
            "mode": "caption",
        }
        question, lines = "Describe the image.", [describe(objects)]
        if objects[0][1] not in KINDS and rng.random() < READ_CAPTIONS:
            colour, value = objects[rng.integers(len(objects))]
            question, lines = f"Read the {colour} bar.", [*lines, f"Read {colour} {value}"]
        yield record | {"question": question, **asked, "response": "\n".join(lines)}
    for question, line in draw_arithmetic(rngs["arithmetic"], arithmetic):
        record = {"id": next(ids), "image": None, "mode": "arithmetic"}
        yield record | {"question": question, **asked, "response": line}
    rng = rngs["instruct"]
    for _ in range(instruct):
        (objects, (p,)), name = _draw(rng, 1), next(ids)
        steps = p.variants[rng.integers(len(p.variants))]
        record = {
            "id": name,
            "image": embedded.save(root, name, PIL.Image.fromarray(render(rng, objects))),
            "mode": "cot",
        }
        record |= {"question": p.question, "options": p.options, "answer": p.answer}
        yield record | {"response": "\n".join([*steps, f"{ANSWER} {p.answer}"])}
