"""The embedded data set: deterministic, in MathV360K's format, and right by an independent computation."""

import collections
import json
import re

import numpy as np
import PIL.Image
import pytest

from mstar_jax.data import embedded, toy
from mstar_jax.data import truth as truth_module

SIZES = {"train": 240, "unlabelled": 61, "validation": 40, "test": 300}
BASE = {"captions": 60, "arithmetic": 1100, "instruct": 50}
FAMILIES = {**toy.BAR_FAMILIES, **toy.SCENE_FAMILIES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.make(tmp_path_factory.mktemp("data") / "figures", seed=3, **SIZES, **BASE)


@pytest.fixture(scope="module")
def truths(folder):
    return truth_module.read_truth(folder / "truth.jsonl")


def rows_of(folder, split):
    return json.loads((folder / f"{split}.json").read_text())


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def question_of(row):
    return re.search(r"\nQuestion: (.*)", row["conversations"][0]["value"]).group(1)


def compute(question, objects):
    """The answer, from the question's text and the objects alone."""
    words = question.rstrip("?").split()
    values = [value for _, value in objects]
    if question.startswith("How many"):
        target = words[2] if words[3] == "shapes" else words[2].removesuffix("s")
        return str([word for shape in objects for word in shape].count(target))
    if "more circles or rings" in question:
        balance = sum({"circle": 1, "ring": -1}.get(kind, 0) for kind in values)
        assert balance != 0
        return "A" if balance > 0 else "B"
    if question.startswith("What is the value of"):
        return str(dict(objects)[words[-2]])
    if match := re.fullmatch(r"What is the (sum|difference) of the (\w+) and the (\w+) bar\?", question):
        a, b = (dict(objects)[match.group(i)] for i in (2, 3))
        return str(a + b if match.group(1) == "sum" else abs(a - b))
    if "half" in question:
        a, b, c, d = values
        return str(abs(a + b - c - d))
    if "range" in question:
        return str(max(values) - min(values))
    if "divided by 3" in question:
        return str(sum(values) % 3)
    if "odd or even" in question:
        return "A" if sum(values) % 2 else "B"
    assert question == "What is the total of all bars?"
    return str(sum(values))


def test_same_parameters_give_the_same_bytes(folder, tmp_path):
    again = toy.make(tmp_path / "again", seed=3, **SIZES, **BASE)
    assert contents(again) == contents(folder)
    other = toy.make(tmp_path / "other", seed=4, **SIZES, **BASE)
    assert (other / "train.json").read_bytes() != (folder / "train.json").read_bytes()


def test_a_set_that_is_there_is_left_alone_and_an_unfinished_one_is_remade(tmp_path):
    small = {"train": 5, "unlabelled": 4, "validation": 3, "test": 3}
    small |= {"captions": 2, "arithmetic": 3, "instruct": 2}
    folder = toy.make(tmp_path / "set", **small)
    whole, stamp = contents(folder), (folder / "figures.json").stat().st_mtime_ns
    assert toy.make(folder, **small) == folder
    assert (folder / "figures.json").stat().st_mtime_ns == stamp

    (folder / "figures.json").unlink()  # as if the writing had been cut off
    (folder / "test.json").unlink()
    toy.make(folder, **small)
    assert contents(folder) == whole
    toy.make(folder, **small | {"train": 3})
    assert len(rows_of(folder, "train")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_run_that_dies_while_writing_leaves_nothing_in_place(tmp_path, monkeypatch):
    def die(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(toy, "_base_records", die)
    with pytest.raises(KeyboardInterrupt):
        toy.make(tmp_path / "set", **SIZES, **BASE)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        toy.make(tmp_path, **SIZES, **BASE)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_a_set_that_a_run_has_used_is_not_replaced(tmp_path):
    """By a later version of the program, say; the run could not go on with the new one, nor find the old."""
    small = dict.fromkeys(SIZES | BASE, 4)
    folder = toy.make(tmp_path / "figures", **small)
    (tmp_path / "inputs.json").write_text("{}")
    whole = contents(folder)
    with pytest.raises(ValueError, match=r"a run has used it \(train: 4 there, 5 now\)"):
        toy.make(folder, **small | {"train": 5})
    assert contents(folder) == whole
    (folder / "figures.json").write_text("{")  # cut off
    with pytest.raises(ValueError, match=r"figures\.json cannot be read"):
        toy.make(folder, **small)
    (folder / "figures.json").unlink()  # as if it was being made
    toy.make(folder, **small)
    assert contents(folder) == whole


def test_rows_are_mathv360k_rows(folder):
    for split, size in SIZES.items():
        rows = rows_of(folder, split)
        assert len(rows) == len({row["id"] for row in rows}) == size
        for row in rows:
            assert list(row) == ["id", "image", "conversations"]
            human, gpt = row["conversations"]
            assert (human["from"], gpt["from"]) == ("human", "gpt")
            assert row["image"].startswith(f"figures/images/{split}_")
            choice = re.fullmatch(
                r"<image>\nHint: Please answer the question and provide the correct option letter, e\.g\., "
                r"A, B, C, D, at the end\.\nQuestion: .+\?\nChoices:\n\(A\) \w+\n\(B\) \w+",
                human["value"],
            )
            integer = re.fullmatch(
                r"<image>\nHint: Please answer the question requiring an integer answer and provide the "
                r"final value, e\.g\., 1, 2, 3, at the end\.\nQuestion: .+\?",
                human["value"],
            )
            assert re.fullmatch(r"The answer is [AB]" if choice else r"The answer is \d+", gpt["value"])
            assert choice or integer


def test_rows_read_without_a_drop(folder, truths):
    mathv360k = pytest.importorskip("mstar_jax.data.mathv360k")
    for split, size in SIZES.items():
        queries, _ = mathv360k.read(folder / f"{split}.json", folder)
        assert len(queries) == size
        for query in queries:
            family = truths[query.id].family
            assert query.answer == truths[query.id].answer
            assert query.answer_type == ("choice" if family in ("parity", "compare") else "integer")
            assert query.source == "figures"


def test_images_decode_and_belong_to_one_split(folder):
    used = {split: {row["image"] for row in rows_of(folder, split)} for split in SIZES}
    used["base"] = {
        e.query.images[0].split("/figures/images/")[1] for e in embedded.read_base(folder) if e.query.images
    }
    used["base"] = {f"figures/images/{name}" for name in used["base"]}
    assert sum(map(len, used.values())) == len(set.union(*used.values()))
    assert {len(used["train"]), len(used["test"])} == {120, 300}  # two questions an image, and one
    pixels = set()
    for image in set.union(*used.values()):
        with PIL.Image.open(folder / image) as opened:
            assert (opened.format, opened.mode, opened.size) == ("PNG", "RGB", (64, 64))
            pixels.add(opened.tobytes())
    assert len(pixels) == sum(map(len, used.values()))
    for first, second in zip(*[iter(rows_of(folder, "train"))] * 2, strict=True):
        assert first["image"] == second["image"]
        assert question_of(first) != question_of(second)


def slots_of(image):
    """Per column slot: which pixels above the axis differ from the background, and their mean colour."""
    for slot in np.split(image[:60].astype(float), 4, axis=1):
        mask = np.abs(slot - image[0, 0]).sum(-1) > 120
        if mask.any():
            yield mask, slot[mask].mean(0)


def nearest_colour(rgb):
    return min(toy.COLOURS, key=lambda name: np.abs(rgb - toy.COLOURS[name]).sum())


def test_bars_have_the_colour_and_height_that_is_written(monkeypatch):
    monkeypatch.setattr(toy, "NOISE_SD", 0)
    rng = np.random.default_rng(0)
    for _ in range(30):
        objects = toy.draw_objects(rng, scene=False)
        slots = list(slots_of(toy.render(rng, objects)))
        assert tuple((nearest_colour(rgb), mask.any(1).sum() // toy.UNIT) for mask, rgb in slots) == objects
        assert all(mask.any(1)[-1] and 8 <= mask.any(0).sum() <= 14 for mask, _ in slots)


def test_shapes_have_the_colour_and_kind_that_is_written(monkeypatch):
    monkeypatch.setattr(toy, "NOISE_SD", 0)
    rng = np.random.default_rng(0)
    kinds = {(True, True): "circle", (True, False): "cross", (False, True): "ring"}  # centre, quarter
    for _ in range(30):
        objects = toy.draw_objects(rng, scene=True)
        seen = []
        for mask, rgb in slots_of(toy.render(rng, objects)):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert 11 <= len(columns) <= 14
            centre, quarter = len(rows) // 2, 3
            shape = mask[rows[0] :, columns[0] :]
            seen.append(
                (nearest_colour(rgb), kinds[bool(shape[centre, centre]), bool(shape[quarter, quarter])])
            )
        assert tuple(seen) == objects


def test_answers_and_steps_agree_with_the_objects(folder, truths):
    rows = {row["id"]: row for split in SIZES for row in rows_of(folder, split)}
    assert rows.keys() == truths.keys()
    for name, truth in truths.items():
        answer = compute(question_of(rows[name]), truth.objects)
        assert truth.answer == answer
        assert rows[name]["conversations"][1]["value"] == f"The answer is {answer}"
        assert len(truth.variants) == len(set(truth.variants)) <= 2
        for variant in truth.variants:
            assert variant[0].split()[1:] == [str(word) for pair in truth.objects for word in pair]
            last = variant[-1].split()
            said = {"A": ("odd", "circles"), "B": ("even", "rings")}.get(answer, (answer,))
            assert (last[1] if truth.family == "count" else last[-1]) in said
            for line in variant:
                assert re.fullmatch(r"[A-Z][a-z]+( \S+)+", line)
                if match := re.fullmatch(r"\w+ (\d+) (\S+) (\d+) = (\d+)", line):
                    a, b, result = (int(match.group(i)) for i in (1, 3, 4))
                    assert {"+": a + b, "-": a - b, "by": a % b}[match.group(2)] == result


def test_families_follow_the_weights_and_no_answer_dominates(tmp_path):
    assert sum(FAMILIES.values()) == pytest.approx(1)
    assert sum(share for share, _ in toy.ARITHMETIC.values()) == pytest.approx(1)
    for k in (1, 2):
        rng = np.random.default_rng(k)
        drawn = [toy._draw(rng, k) for _ in range(12000 // k)]
        problems = [problem for _, pair in drawn for problem in pair]
        counts = collections.Counter(problem.family for problem in problems)
        for family, weight in FAMILIES.items():
            assert counts[family] / len(problems) == pytest.approx(weight, abs=0.02)
            answers = collections.Counter(p.answer for p in problems if p.family == family)
            assert len(answers) >= 2
            assert max(answers.values()) < 0.6 * counts[family]


def test_the_base_set(folder):
    base = embedded.read_base(folder)
    counts = collections.Counter(example.mode for example in base)
    assert counts == {"caption": 60, "arithmetic": 1100, "cot": 50}
    assert len({example.query.id for example in base}) == len(base)
    lines, readings = set(), 0
    for example in base:
        query, response = example.query, example.response
        assert (query.images == ()) == (example.mode == "arithmetic")
        if example.mode == "caption":
            described, *read = response.split("\n")
            assert re.fullmatch(r"(Bars|Shapes)( (red|green|blue|yellow|purple|orange) \w+){3,4}", described)
            asked = re.fullmatch(r"Describe the image\.|Read the (\w+) bar\.", query.question).group(1)
            words = described.split()
            assert read == ([f"Read {asked} {words[words.index(asked) + 1]}"] if asked else [])
            readings += len(read)
        elif example.mode == "arithmetic":
            lines.add(response)
            numbers = re.findall(r"\d+", query.question)
            assert numbers == re.findall(r"\d+", response)[: len(numbers)]
        else:
            objects = [w if not w.isdigit() else int(w) for w in response.split("\n")[0].split()[1:]]
            objects = list(zip(objects[::2], objects[1::2], strict=True))
            assert response.split("\n")[-1] == f"The answer is {query.answer}"
            assert query.answer == compute(query.question, objects)
            assert (query.options is not None) == (query.answer_type == "choice")
    assert 10 <= readings <= 35
    # Every line of arithmetic that the splits need is taught, once the set is large enough.
    for truth in truth_module.read_truth(folder / "truth.jsonl").values():
        needed = {line for v in truth.variants for line in v if "=" in line or line.startswith("Parity")}
        assert needed <= lines


def test_check_steps():
    objects = (("red", 9), ("purple", 7), ("yellow", 6))
    problem = toy.pose(np.random.default_rng(0), "remainder", objects)
    truth = truth_module.Truth("x", "test", "remainder", objects, problem.variants, problem.answer)
    desc, end = "Bars red 9 purple 7 yellow 6\n", "The answer is 1"

    def check(text):
        return truth_module.check_steps(text, truth), truth_module.all_right(text, truth)

    right = [True] * 4
    assert check(desc + "Sum 9 + 7 = 16\nSum 16 + 6 = 22\nRemainder 22 by 3 = 1\n" + end) == (right, True)
    assert check(desc + "Sum 6 + 7 = 13\n\n Sum  13 + 9 = 22 \nRemainder 22 by 3 = 1") == (right, True)
    # The two orders do not mix, a wrong step spoils what follows, and a missing step is incomplete.
    mixed = desc + "Sum 9 + 7 = 16\nSum 13 + 9 = 22\nRemainder 22 by 3 = 1\n" + end
    assert check(mixed) == ([True, True, False, False], False)
    blind = "Bars red 8 purple 7 yellow 6\nSum 9 + 7 = 16\nSum 16 + 6 = 22\nRemainder 22 by 3 = 1\n" + end
    assert check(blind) == ([False] * 4, False)
    assert check(desc + "Sum 9 + 7 = 16\n" + end) == ([True, True], False)
    assert check(end) == ([], False)
    assert check("") == ([], False)
