"""The larger embedded data set: right by an independent computation, its parts apart, every step verified."""

import collections
import json
import re

import numpy as np
import PIL.Image
import pytest

from mstar_jax.data import embedded, figures, mathv360k, questions, truth
from mstar_jax.data.truth import Truth, all_right, check_steps, facts

SIZES = {"train": 200, "unlabelled": 21, "validation": 40, "test": 100}
BASE = {"captions": 80, "arithmetic": 200, "instruct": 100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return figures.make(tmp_path_factory.mktemp("data") / "figures", seed=3, **SIZES, **BASE)


@pytest.fixture(scope="module")
def truths(folder):
    return truth.read_truth(folder / "truth.jsonl")


@pytest.fixture(scope="module")
def queries(folder):
    return {split: mathv360k.read(folder / f"{split}.json", folder)[0] for split in SIZES}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def value(question, objects):
    """What is asked for, from the words of the question and the figure alone."""
    text = question.lower()
    numbers = [number for _, number in objects]
    longest_first = sorted(dict(objects), key=len, reverse=True)
    names = re.findall(rf"\b({'|'.join(longest_first)})s?\b", text)  # as they come
    named = [dict(objects)[name] for name in dict.fromkeys(names)]
    budget = [int(number) for number in re.findall(r"\d+", text)]
    if re.search(r"largest|highest|greatest|extremes|\brange", text):
        if re.search("sum|make together|add the", text):
            return max(numbers) + min(numbers)
        return max(numbers) - min(numbers)
    if re.search("except|leave out|everything but", text):
        return sum(numbers) - named[0]
    if "three times" in text:
        return 3 * named[0]
    if budget:
        return budget[0] - sum(named or numbers)
    if not named:
        return sum(numbers)
    if re.search("two times|twice|double|again", text):
        once, double = named if "to two times" in text else named[::-1]
        return once + 2 * double
    if len(named) == 4:
        return abs(named[0] + named[1] - named[2] - named[3])
    if len(named) == 3:
        return named[0] + named[1] - named[2]
    if re.search("difference|apart|differ|between|gap|separates", text):
        return abs(named[0] - named[1])
    return named[0] + named[1]


def test_same_parameters_give_the_same_bytes(folder, tmp_path):
    again = figures.make(tmp_path / "again", seed=3, **SIZES, **BASE)
    assert contents(again) == contents(folder)
    other = figures.make(tmp_path / "other", seed=4, **SIZES, **BASE)
    assert (other / "train.json").read_bytes() != (folder / "train.json").read_bytes()


def test_rows_read_without_a_drop(folder, queries, truths):
    for split, size in SIZES.items():
        assert len(queries[split]) == size == sum(t.split == split for t in truths.values())
        for query in queries[split]:
            assert query.answer_type == "integer" and query.answer == truths[query.id].answer
            with PIL.Image.open(query.images[0]) as image:
                assert image.size == (128, 128) and image.mode == "RGB"


def test_answers_follow_from_question_and_figure(queries, truths):
    asked = [query for split in queries.values() for query in split]
    for query in asked:
        assert int(query.answer) == value(query.question, truths[query.id].objects), query
    families = collections.Counter(truths[query.id].family for query in asked)
    assert set(families) == {*questions.KNOWN, *questions.UNSEEN}


def test_too_few_figures_for_a_part_are_said(tmp_path):
    with pytest.raises(
        ValueError, match=r"data.figures.test = 60 asks 20 new questions, .* only 1?\d: raise"
    ):
        figures.make(tmp_path / "figures", **SIZES | {"train": 20, "test": 60}, **BASE)


def test_splits_and_parts_are_apart(folder, queries, truths):
    """New figures are nowhere else; unseen families are in the test split alone; their figures of the train
    split are figures that were trained on, with their own numbers."""
    part = collections.defaultdict(set)
    for split, some in queries.items():
        for query in some:
            part[truths[query.id].part or split].add(query.images[0])
    base = embedded.read_base(folder)
    part["base"] = {image for example in base for image in example.query.images}
    assert part.pop("new questions") <= part["train"]
    everything = [image for images in part.values() for image in images]
    assert len(everything) == len(set(everything))
    known = {query.images[0]: truths[query.id].objects for query in queries["train"]}
    again = []
    for query in queries["test"]:
        found = truths[query.id]
        assert (found.family in questions.KNOWN) == (found.part == "new figures")
        assert (found.family in questions.UNSEEN) == (found.part in ("new questions", "both"))
        if found.part == "new questions":
            assert found.objects == known[query.images[0]]
            again.append(query.images[0])
    assert len(again) == len(set(again)) == 33  # each figure once
    others = [t.family for t in truths.values() if t.split != "test"]
    assert set(others) == set(questions.KNOWN)
    everything = "(all bars|all items|all shapes)"
    unseen = [
        wording.format(**dict.fromkeys("abcd", ".+"), all=everything, value=".+", n=".+").replace("?", r"\?")
        for family in questions.UNSEEN.values()
        for wording in family.wordings
    ]
    asked = [example.query.question for example in base]
    assert not [question for question in asked if re.fullmatch("|".join(unseen), question)]
    counts = collections.Counter(truths[query.id].part for query in queries["test"])
    assert set(counts) == set(figures.PARTS) and max(counts.values()) - min(counts.values()) <= 1


def test_numbers_and_steps(truths):
    lengths = set()
    for found in truths.values():
        assert all(0 <= number <= 999 for _, number in found.objects)
        lengths |= {len(variant) + 1 for variant in found.variants}  # with the line of the answer
        for variant in found.variants:
            for line in variant[1:]:
                name, *numbers = facts(line)
                assert name in ("+", "-", "ends") and all(0 <= number <= 999 for number in numbers)
            assert facts(variant[-1])[-1] == int(found.answer)
    assert min(lengths) == 3 and max(lengths) >= 6
    assert max(number for found in truths.values() for _, number in found.objects) > 400


@pytest.mark.parametrize("kind", figures.KINDS)
def test_marks_are_where_they_are_said_to_be(kind):
    """They are the digits of the objects' numbers, in order, on ink, with place and owner; or the shapes of a
    scene, on colour. The image is the same whether they are asked for or not."""
    objects = (("red", 417), ("green", 98), ("blue", 5))
    if kind == "scene":
        objects = (("red circle", 3), ("blue star", 1))
    if kind == "list":
        objects = (("star", 417), ("circle", 98), ("square", 5))
    marks = []
    image = figures.render(np.random.default_rng(2), kind, objects, marks)
    assert image == figures.render(np.random.default_rng(2), kind, objects)
    if kind == "scene":
        assert [mark.name for mark in marks] == ["red circle"] * 3 + ["blue star"]
        assert {(mark.digit, mark.place) for mark in marks} == {(None, None)}
        for mark in marks:
            red, _, blue = np.asarray(image)[round(mark.y), round(mark.x)].astype(int)
            assert (red > blue + 80) == (mark.name == "red circle") == (red + 80 > blue)
        return
    names = [name for name, _ in objects]
    assert [mark.digit for mark in marks] == [4, 1, 7, 9, 8, 5]
    assert [mark.place for mark in marks] == [2, 1, 0, 1, 0, 0]
    assert [mark.name for mark in marks] == [names[0]] * 3 + [names[1]] * 2 + [names[2]]
    dark = np.asarray(image.convert("L")) < 110
    for mark in marks:
        x, y = round(mark.x), round(mark.y)
        assert 0.1 < dark[y - 4 : y + 5, x - 3 : x + 4].mean() < 0.9
    assert all(a.x + 4 < b.x for a, b in zip(marks[:3], marks[1:3]))


@pytest.mark.parametrize("kind", list(questions.WORDS))
@pytest.mark.parametrize("family", [*questions.KNOWN, *questions.UNSEEN])
def test_every_step_is_verified_in_all_wordings(kind, family):
    """A response in any wording is right; with any one number changed, the steps from that line on are
    wrong, and those before it are right."""
    rng = np.random.default_rng(sum(map(ord, kind + family)))
    said = set()
    tried = 0
    while tried < 12:
        drawn, objects = figures.draw_objects(rng)
        problem = questions.pose(rng, family, kind, objects) if drawn == kind else None
        if problem is None:
            if kind == "scene" and family == "pairs":
                return  # a scene has three names
            continue
        tried += 1
        variants = tuple(tuple(questions.say(step, kind) for step in order) for order in problem.orders)
        known = Truth("q", "test", family, objects, variants, problem.answer, free=True)
        order = problem.orders[int(rng.integers(len(problem.orders)))]
        lines = [questions.say(step, kind, rng) for step in order]
        said.update(re.sub(r"\d+", "#", line) for line in lines)
        text = "\n".join([*lines, f"The answer is {problem.answer}"])
        assert all_right(text, known) and check_steps(text, known) == [True] * len(lines), text
        at = int(rng.integers(len(lines)))
        numbers = list(re.finditer(r"\d+", lines[at]))
        number = numbers[int(rng.integers(len(numbers)))]
        changed = str(int(number.group()) + 1000)  # no number of a figure
        lines[at] = lines[at][: number.start()] + changed + lines[at][number.end() :]
        assert check_steps("\n".join(lines), known) == [j < at for j in range(len(lines))], lines
        assert not all_right("\n".join(lines), known)
    assert len(said) > 3


@pytest.mark.parametrize(("read", "right"), [
    ("The prices are 103 for the diamond and 88 for the circle.", True),
    ("I read diamond 103, circle 88 and diamond 103.", True),  # the same twice
    ("The square costs 16, the circle 88 and the diamond 103.", True),  # one that is not asked about
    ("I read circle 88, diamond 103, star 56 and square 16.", True),
    ("The circle costs 88.", False),  # the diamond is missing
    ("The square costs 17, the circle 88 and the diamond 103.", False),
    ("I read circle 88, diamond 103 and triangle 5.", False),  # there is none
    ("I read circle 88, diamond 103 and diamond 104.", False),
    ("There are four prices.", False),
])  # fmt: skip
def test_a_reading_may_tell_more_than_is_asked(read, right):
    objects = (("diamond", 103), ("circle", 88), ("star", 56), ("square", 16))
    readings = (objects, objects[:2])
    variants = tuple((questions.say(("read", pairs), "list"), "103 + 88 = 191") for pairs in readings)
    known = Truth("q", "test", "pair", objects, variants, "191", free=True)
    text = f"{read}\n88 + 103 = 191\nThe answer is 191"
    assert check_steps(text, known) == [right, right] and all_right(text, known) == right


def test_facts():
    assert facts("Together: 45 + 120 = 165.") == facts("120+45 = 165") == ("+", 45, 120, 165)
    assert facts("165 - 45 = 120") == ("-", 165, 45, 120) != facts("45 - 165 = 120")
    assert (
        facts("The largest is 120, the smallest 45.") == facts("Least 45 and most 120") == ("ends", 120, 45)
    )
    read = ("read", ("blue", 45), ("red", 120))
    assert (
        facts("The red bar is at 120, the blue bar at 45.")
        == facts("I read 45 for Blue, 120 for red")
        == read
    )
    shapes = ("read", ("blue star", 3), ("red circle", 1))
    assert facts("I see 1 red circle and 3 blue stars.") == facts("3 blue stars and 1 red circle") == shapes


@pytest.mark.parametrize("line", [
    "", "The chart has bars.", "3 + 4 = 7 = 7", "3 + 4 =", "1 + 2 = 3 and 4 + 5 = 9", "red 3 blue",
    "red blue 3 4", "The largest is 3.", "1 + 2 + 3 = 6",
])  # fmt: skip
def test_a_line_without_a_claim_is_its_own_text(line):
    assert facts(line) == (line,)


def test_a_gold_step_is_never_taken_for_another(truths):
    """Different first lines of valid sequences make different claims, unless they say the same."""
    for found in truths.values():
        for variant in found.variants:
            claims = [facts(line) for line in variant]
            assert all(len(claim) > 1 for claim in claims)
            pairs = dict(claims[0][1:])
            assert pairs.items() <= dict(found.objects).items()


def test_the_narrow_set(folder):
    examples = embedded.read_base(folder)
    modes = collections.Counter(example.mode for example in examples)
    assert modes == {"caption": 80, "arithmetic": 200, "cot": 100}
    for example in examples:
        lines = example.response.splitlines()
        if example.mode == "cot":
            assert lines[-1] == f"The answer is {example.query.answer}"
            assert facts(lines[-2])[-1] == int(example.query.answer)
        if example.mode == "arithmetic":
            a, sign, b = example.query.question.removeprefix("Compute ").rstrip(".").split()
            right = int(a) + int(b) if sign == "+" else int(a) - int(b)
            assert facts(example.response)[-1] == right and 0 <= right <= 999
            continue
        assert facts(lines[0])[0] == "read"


def test_images_show_what_is_said():
    """A scene has as much of a colour as its count says: two of the same seed and one shape more."""
    areas = []
    for count in (2, 3):
        image = figures.render(np.random.default_rng(5), "scene", (("red square", count), ("blue star", 1)))
        pixels = np.asarray(image).astype(int)
        areas.append(((pixels[..., 0] > 150) & (pixels[..., 1:] < 110).all(axis=-1)).sum())
    one = areas[1] - areas[0]
    assert 0.6 < areas[0] / 2 / one < 1.6 and one > 80


def test_truths_are_plain_json(folder):
    for line in (folder / "truth.jsonl").read_text().splitlines():
        assert json.loads(line)["free"] is True
