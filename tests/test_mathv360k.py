"""The reader of the MathV360K format, its images and its splits."""

import gzip
import json
import os
import pathlib
import random
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from mstar_jax.data import images, mathv360k
from mstar_jax.rewards import selection
from mstar_jax.structs import Query, Response

REAL = pathlib.Path(
    os.environ.get("MSTAR_REALDATA", "/nonexistent")
)  # real image questions, where a machine has some
HINT = "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."


def row(name, image, question="How many?", answer="The answer is 3", choices=(), mark="<image>\n", hint=HINT):
    lines = [hint, f"Question: {question}"] if hint else [f"Question: {question}"]
    if choices:
        lines += ["Choices:", *(f"({chr(65 + i)}) {choice}" for i, choice in enumerate(choices))]
    turns = [{"from": "human", "value": mark + "\n".join(lines)}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}


def picture(path, size=(64, 64), color=(10, 200, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    noise[0, 0] = color
    Image.fromarray(noise).save(path)
    return path


def png_header(width, height):
    """A PNG that claims width x height and holds almost nothing."""

    def chunk(kind, data):
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"0"))
        + chunk(b"IEND", b"")
    )


def write(path, rows):
    path.write_text(json.dumps(rows))
    return str(path)


def read_one(tmp_path, data, **kwargs):
    queries, report = mathv360k.read(write(tmp_path / "d.json", [data]), str(tmp_path), **kwargs)
    assert len(queries) + sum(report.dropped.values()) == report.rows == 1
    return queries[0] if queries else next(iter(report.dropped))


def test_two_hundred_broken_rows_of_a_thousand(tmp_path):
    good = picture(tmp_path / "Src/images/good.png").read_bytes()
    lines = []
    for i in range(800):
        (tmp_path / f"Src/images/{i}.png").write_bytes(good)
        lines.append(json.dumps(row(f"good_{i}", f"Src/images/{i}.png", f"How many of {i}?")))
    outside = tmp_path.parent / f"{tmp_path.name}_outside.png"
    outside.write_bytes(good)
    (tmp_path / "link.png").symlink_to(outside)
    escapes = ["../x.png", str(outside), "Src/../../x.png", "link.png"]
    for i in range(20):
        name, ok = f"bad_{i}", "Src/images/0.png"
        (tmp_path / f"cut_{i}.png").write_bytes(good[: len(good) // 2 + i])
        (tmp_path / f"empty_{i}.png").write_bytes(b"")
        (tmp_path / f"bomb_{i}.png").write_bytes(png_header(*((9000, 9000) if i % 2 else (60000, 60000))))
        wrong = [["a", "list"], {**row(name, ok), "conversations": "text"}, row(name, 7), row({}, ok)]
        lines += [
            json.dumps(row(name, f"cut_{i}.png")),
            json.dumps(row(name, f"empty_{i}.png")),
            json.dumps(row(name, escapes[i % 4])),
            json.dumps(row(name, f"bomb_{i}.png")),
            json.dumps(row(name, ok, f"a{i}", answer=["", "The answer is ", "The answer is:"][i % 3])),
            json.dumps(row(name, ok, f"b{i}", mark="<image>\n<image>\n")),
            json.dumps(row(name, ok, f"c{i}"))[: -1 - i],
            json.dumps(row(name, f"Src/images/none_{i}.png")),
            json.dumps(row(name, ok, f"d{i}", answer="The answer is E", choices=("1", "2"))),
            json.dumps(wrong[i % 4]),
        ]
    random.Random(0).shuffle(lines)
    (tmp_path / "pool.jsonl").write_text("\n".join(lines) + "\n")
    queries, report = mathv360k.read(str(tmp_path / "pool.jsonl"), str(tmp_path))
    assert (len(queries), report.kept, report.rows) == (800, 800, 1000)
    assert report.dropped == {
        "undecodable image": 20,
        "empty image": 20,
        "image path leaves the root": 20,
        "image too large": 20,
        "no answer": 20,
        "image marks do not match images": 20,
        "bad JSON line": 20,
        "missing image": 20,
        "options without gold": 20,
        "wrong types": 20,
    }
    assert all(len(examples) == 3 for examples in report.examples.values())
    assert "kept 800 of 1000" in str(report) and "20  missing image (line " in str(report)
    (tmp_path / "pool.jsonl.gz").write_bytes(gzip.compress((tmp_path / "pool.jsonl").read_bytes()))
    assert mathv360k.read(str(tmp_path / "pool.jsonl.gz"), str(tmp_path))[0] == queries


def test_a_row_becomes_a_query(tmp_path):
    path = picture(tmp_path / "TabMWP/images/1.png")
    query = read_one(tmp_path, row("q", "TabMWP/images/1.png", "Odd?", "The answer is B", ("yes", "no")))
    assert query == Query(
        "q", (str(path),), "Odd?", ("yes", "no"), "B", "choice", "TabMWP", asked_type="choice"
    )


@pytest.mark.parametrize(
    ("answer", "choices", "hint", "expected"),
    [
        ("The answer is B", ("1", "2"), HINT, ("B", "choice")),
        ("The answer is (B).", ("1", "2"), HINT, ("B", "choice")),
        ("The answer is (B) 2", ("1", "2"), HINT, ("B", "choice")),
        ("Answer: Red Ball", ("blue ball", "red ball"), HINT, ("B", "choice")),
        ("The answer is C", ("1", "2"), HINT, "options without gold"),
        ("The answer is (B) 1", ("1", "2"), HINT, "options without gold"),
        ("The answer is 4,656.", (), "", ("4,656", "integer")),
        ("3.30", (), "", ("3.30", "float")),
        ("The answer is 3", (), "Hint: requiring a floating-point number with one decimal", ("3", "float")),
        ("The answer is Yes.", (), "", ("Yes", "boolean")),
        ("The answer is 10^4", (), "", ("10^4", "math")),
        ("The answer is 3/10", (), "", ("3/10", "math")),
        (r"The answer is $\frac{1}{2}\sqrt{3}$", (), "", (r"$\frac{1}{2}\sqrt{3}$", "math")),
        ("The answer is unanswerable", (), "", ("unanswerable", "text")),
        ("The answer is 7:30", (), "", ("7:30", "text")),
        ("The answer is a man in a red and blue coat", (), "", "long text answer"),
        ("The answer is .", (), "", "no answer"),
    ],
)
def test_gold(tmp_path, answer, choices, hint, expected):
    picture(tmp_path / "a.png")
    found = read_one(tmp_path, row("q", "a.png", answer=answer, choices=choices, hint=hint))
    assert (found if isinstance(found, str) else (found.answer, found.answer_type)) == expected


def test_shapes_of_rows(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    assert read_one(tmp_path, row("q", "a.png", mark="")).images == (str(tmp_path / "a.png"),)
    assert len(read_one(tmp_path, row("q", ["a.png", "b.png"], mark="<image><image>\n")).images) == 2
    assert read_one(tmp_path, row("q", ["a.png", "b.png"])) == "image marks do not match images"
    text_only = row("q", "a.png", mark="")
    del text_only["image"], text_only["id"]
    assert read_one(tmp_path, text_only) == Query("d_0", (), "How many?", None, "3", "integer", "")
    bare = row("q", "a.png")
    bare["conversations"][0]["value"] = "How many?\n<image>"
    assert read_one(tmp_path, bare).question == "How many?"
    unordered = row("q", "a.png", "x\nChoices:\n(A) 1\n(C) 2")
    assert read_one(tmp_path, unordered) == "options not lettered (A), (B), ..."
    several = row("q", "a.png", "x\nChoices:\n(A) 1\nmore\n(B) 2", "The answer is A")
    assert read_one(tmp_path, several).options == ("1\nmore", "2")
    assert read_one(tmp_path, row("\ud800", "a.png")) == "wrong types"
    nothing = {**row("q", "a.png"), "conversations": []}
    assert read_one(tmp_path, nothing) == "turns are not questions and answers in turn"


@pytest.mark.parametrize(
    "key", ["images", "Image", "image_path", "image_paths", "img", "IMAGES", "image_file"]
)
@pytest.mark.parametrize("several", [False, True])
def test_other_names_of_the_image_field(tmp_path, key, several):
    path = picture(tmp_path / "a.png")
    data = row("q", None)
    del data["image"]
    assert read_one(tmp_path, data | {key: ["a.png"] if several else "a.png"}).images == (str(path),)


def test_images_that_are_not_understood_are_counted(tmp_path):
    picture(tmp_path / "a.png")
    bare = row("q", None, mark="")
    del bare["image"]
    assert read_one(tmp_path, bare | {"image_url": "http://a/b.png"}) == "image in an unknown field"
    assert read_one(tmp_path, bare | {"picture": {"bytes": "x"}}) == "image in an unknown field"
    assert read_one(tmp_path, bare | {"image": "a.png", "images": ["b.png"]}) == "several image fields"
    assert read_one(tmp_path, bare | {"image": "a.png", "images": ["a.png"]}).images
    assert read_one(tmp_path, bare | {"image": {"bytes": "x"}}) == "wrong types"
    assert read_one(tmp_path, bare | {"image": None, "image_id": "7", "image_width": 3}).images == ()
    assert read_one(tmp_path, bare | {"image_id": "7"}).images == ()


@pytest.mark.parametrize(
    ("choices", "options"),
    [
        ("Options:\n(A) 1\n(B) 2", ("1", "2")),
        ("choices:\n(A) 1\n(B) 2", ("1", "2")),
        ("Choices: (A) 1 (B) 2 (C) 3", ("1", "2", "3")),
        ("Options: A. 1 cm, B. 2 cm, C. 3 cm", ("1 cm", "2 cm", "3 cm")),
        ("OPTIONS:\nA) one\nB) two", ("one", "two")),
        ("Choices: (A) 1\n(B) 2", ("1", "2")),
        ("Choices:\n(A) 1 (B) 2\n(C) 3 (D) 4", ("1", "2", "3", "4")),
        ("Choices:\n(A) both (B) and (C)\n(B) 2\n(C) 3", ("both (B) and (C)", "2", "3")),
        ("Choices:\n(A) C. elegans\nB. subtilis\n(B) 2", ("C. elegans\nB. subtilis", "2")),
        ("Choices:\n(A) 1\n(B) 2\nPlease answer with the letter.", ("1", "2")),
        ("Choices:\n(A) 1\n(B) 2\n\nAnswer with the option's letter from the given choices.", ("1", "2")),
        ("Options: (A) 1 (B) 2. Select the correct option.", ("1", "2.")),
        ("Choices:\n(A) 1\n(B) 2\nAnswer:", ("1", "2")),
        ("Choices:\n(A) cat\n(B) dog Please select the correct option.", ("cat", "dog")),
        ("Choices:\n(A) cat\n(B) dog\nOnly output the letter.", ("cat", "dog")),
        ("Choices:\n(A) cat\n(B) dog\nLet's think step by step.", ("cat", "dog")),
        ("Choices:\n(A) cat\n(B) dog\n请用字母回答。", ("cat", "dog")),
        ("Choices:\n(A) they think\n(B) only answers please him", ("they think", "only answers please him")),
        ("Choices:\n(A) 1\n(B) the answer with two parts", ("1", "the answer with two parts")),
        ("Choices:\n(A)\n(B) 2\n(C) 3", ("", "2", "3")),
        ("(A) 1\n(B) 2", ("1", "2")),
        ("A. 1\nB. 2\nC. 3", ("1", "2", "3")),
        ("(A) 1 (B) 2", ("1", "2")),
        ("A. 1 B. 2", ("1", "2")),
        ("**Choices:**\n(A) 1\n(B) 2", ("1", "2")),
        ("Choices：\n（A）1\n（B）2", ("1", "2")),
        ("选项：\nA. 1\nB. 2", ("1", "2")),
        ("Choices:\n(a) 1\n(b) 2", ("1", "2")),
        ("Choices:\n* A. 1\n* B. 2", ("1", "2")),
        ("Choices:\n[A] 1\n[B] 2", ("1", "2")),
        ("Choices:\nA: 1\nB: 2", ("1", "2")),
        ("Choices: ['1', \"2\"]", ("1", "2")),
        ("Choices:\r(A) 1\r(B) 2", ("1", "2")),
        ("Choices:\n\u200b(A) 1\n\u200b(B) 2", ("1", "2")),
    ],
)
def test_lists_of_options(tmp_path, choices, options):
    picture(tmp_path / "a.png")
    query = read_one(tmp_path, row("q", "a.png", f"Which?\n{choices}", "The answer is B"))
    assert (query.question, query.options, query.answer) == ("Which?", options, "B")


@pytest.mark.parametrize(
    "question",
    [
        r"Which?\nChoices:\n(A) 1\n(B) 2",  # line breaks that were escaped twice
        "Which?<br>A. 1<br>B. 2",
        "Options: red, blue",
        "Which? (1) red (2) blue Choices: 1, 2",
    ],
)
def test_options_that_are_not_understood_are_counted(tmp_path, question):
    picture(tmp_path / "a.png")
    data = row("q", "a.png", question, "The answer is B")
    assert read_one(tmp_path, data) == "options not lettered (A), (B), ..."


@pytest.mark.parametrize("question", ["Which point is highest?", "Is point A. or point B. higher?"])
def test_a_letter_may_be_an_answer_without_options(tmp_path, question):
    picture(tmp_path / "a.png")
    found = read_one(tmp_path, row("q", "a.png", question, "The answer is B"))
    assert (found.question, found.options, found.answer) == (question, None, "B")


@pytest.mark.parametrize(
    "mark",
    ["<IMAGE>", "<img>", "<image_1>", "<image 1>", "<ImageHere>", "<|image_1|>", "<image_placeholder>"],
)
def test_other_image_marks(tmp_path, mark):
    picture(tmp_path / "a.png")
    assert read_one(tmp_path, row("q", "a.png", mark=mark + "\n")).question == "How many?"
    assert read_one(tmp_path, row("q", [], mark=mark + "\n")) == "image marks do not match images"


def test_numbered_marks_may_be_named_twice(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    text = "Is <image 2> left of <image 1>? See <image 1>."
    assert len(read_one(tmp_path, row("q", ["a.png", "b.png"], text, mark="")).images) == 2
    assert read_one(tmp_path, row("q", "a.png", text, mark="")) == "image marks do not match images"


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "3"}],
        [{"from": "user", "value": "How many?"}, {"from": "assistant", "value": "3"}],
        [{"from": "Human", "value": "How many?"}, {"from": "GPT", "value": 3}],
    ],
)
def test_other_names_of_the_turns(tmp_path, turns):
    for key in ("conversations", "messages"):
        found = read_one(tmp_path, {"id": "q", key: turns})
        assert (found.question, found.answer) == ("How many?", "3")
    system = [{"role": "system", "content": "Be short."}, *turns]
    assert read_one(tmp_path, {"id": "q", "messages": system}) == found  # the prompt is the config's


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"2 + 3 = 5, so \boxed{5}.", "5"),
        (r"Half: $\boxed{\frac{1}{2}}$", "1/2"),
        ("<think>2 + 3</think><answer>5</answer>", "5"),
        ("The answer is 4.</think> The answer is 5", "5"),
        ("<think>2 + 3", "no answer"),
        ("N/A", "no answer"),
        ("nan", "no answer"),
        ("None", "None"),
    ],
)
def test_answers_in_boxes_and_tags(tmp_path, answer, expected):
    picture(tmp_path / "a.png")
    found = read_one(tmp_path, row("q", "a.png", answer=answer, hint=""))
    assert (found if isinstance(found, str) else found.answer) == expected


@pytest.mark.parametrize(
    "answer",
    ["B. no", "B)", "Option B", "b", "Answer: B: no", r"So \boxed{B}", "<answer>(B)</answer>", "No."],
)
def test_answers_that_name_an_option(tmp_path, answer):
    picture(tmp_path / "a.png")
    found = read_one(tmp_path, row("q", "a.png", answer=answer, choices=("yes", "no")))
    assert (found.answer, found.answer_type) == ("B", "choice")


def test_answers_to_a_picture_with_two_names_may_not_differ(tmp_path):
    first = picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(first.read_bytes())
    picture(tmp_path / "c.png", color=(1, 2, 3))
    rows = [row(name, f"{name}.png") for name in "abc"]
    queries, report = mathv360k.read(write(tmp_path / "d.json", rows), str(tmp_path))
    assert [q.id for q in queries] == ["a", "b", "c"] and not report.dropped
    rows[1] = row("b", "b.png", answer="The answer is 4")
    queries, report = mathv360k.read(write(tmp_path / "d.json", rows), str(tmp_path))
    assert [q.id for q in queries] == ["c"] and report.dropped == {"conflicting answers": 2}


def test_options_within_a_sentence(tmp_path):
    picture(tmp_path / "a.png")
    query = read_one(tmp_path, row("q", "a.png", "Which? Choices: (A) 1 (B) 2", "(B)"))
    assert (query.question, query.options, query.answer) == ("Which?", ("1", "2"), "B")
    query = read_one(tmp_path, row("q", "a.png", "Of the options: red, blue?", "blue"))
    assert (query.question, query.options) == ("Of the options: red, blue?", None)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("There are three rows, so 5 + 5 + 5 = 15. The answer is 15", "15"),
        ("5 + 5 + 5 = 15.\nThe answer is: 15.", "15"),
        ("2+3=5, therefore 5", "5"),
        ("5+5=10，答案是10", "10"),
        ("First 3, then 4.\n#### 7", "7"),
        ("So x = 3. The final answer is $3$.", "$3$"),
        ("Final answer: 3/10", "3/10"),
        ("We add all of the rows and get 5 + 5 + 5 = 15", "long text answer"),
        ("It is 5. Therefore nothing else", "long text answer"),
        ("The answer is St. Louis", "St. Louis"),
        (r"The answer is $\frac{1}{2} \text{ of all the red balls in it}$", None),
        (15, "15"),
        (0.5, "0.5"),
        (True, "wrong types"),
        (float("nan"), "wrong types"),
    ],
)
def test_answers_with_a_solution_and_numbers(tmp_path, answer, expected):
    picture(tmp_path / "a.png")
    found = read_one(tmp_path, row("q", "a.png", answer=answer, hint=""))
    assert (found if isinstance(found, str) else found.answer) == (expected or answer[14:])


def test_long_answers_are_kept_and_counted_where_they_can_be_judged(tmp_path):
    picture(tmp_path / "a.png")
    long = "a man in a red and blue coat"
    rows = [
        row("a", "a.png", "Who is it?", f"The answer is {long}", hint=""),
        row("b", "a.png", "How many men?", "The answer is 3", hint=""),
        row("c", "a.png", f"Who? Choices: (A) {long} (B) nobody", "(A)", hint=""),
    ]
    path = write(tmp_path / "d.json", rows)
    queries, report = mathv360k.read(path, str(tmp_path))
    assert ([q.id for q in queries], report.long, report.dropped) == (["b", "c"], 0, {"long text answer": 1})
    queries, report = mathv360k.read(path, str(tmp_path), long=True)
    assert [q.answer for q in queries] == [long, "3", "A"] and queries[0].answer_type == "text"
    assert (report.long, report.dropped) == (1, {})
    assert "  of them      1  long text answers, kept for your own reward" in str(report).splitlines()


def test_an_id_may_be_null(tmp_path):
    picture(tmp_path / "a.png")
    assert read_one(tmp_path, row(None, "a.png")).id == "d_0"
    assert read_one(tmp_path, row(0, "a.png")).id == "0"


def test_an_image_folder_may_be_a_link(tmp_path):
    picture(tmp_path / "elsewhere/Src/a.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/images").symlink_to(tmp_path / "elsewhere")
    path = write(tmp_path / "d.json", [row("q", "images/Src/a.png")])
    queries, _ = mathv360k.read(path, str(tmp_path / "root"))
    assert queries[0].images == (str(tmp_path / "elsewhere/Src/a.png"),)


def test_unlabelled(tmp_path):
    picture(tmp_path / "a.png")
    data = row("q", "a.png", choices=("1", "2"))
    del data["conversations"][1]
    assert read_one(tmp_path, data) == "no answer"
    query = read_one(tmp_path, data, unlabelled=True)
    assert (query.answer, query.answer_type) == (None, "choice")
    assert read_one(tmp_path, row("q", "a.png"), unlabelled=True).answer is None


def test_duplicates_conflicts_and_ids(tmp_path):
    picture(tmp_path / "a.png")
    rows = [
        row("q", "a.png", "one", "The answer is 3"),
        row("q", "a.png", "one", "3.0"),  # the same answer: a duplicate
        row("q", "a.png", "two", "The answer is 3"),  # other content, same id
        row("q_2", "a.png", "three", "The answer is 3"),
        row("x", "a.png", "four", "The answer is 3"),
        row("y", "a.png", "four", "The answer is 4"),  # conflicts: both go
    ]
    queries, report = mathv360k.read(write(tmp_path / "d.json", rows), str(tmp_path))
    assert [(q.id, q.question) for q in queries] == [("q", "one"), ("q_3", "two"), ("q_2", "three")]
    assert report.dropped == {"duplicate": 1, "conflicting answers": 2} and report.renamed == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"id": "a"},\n{"id": }\n]', "line 3"),
        ('{"id": "a"}', "expected a JSON list"),
        ("", "line 1"),
        ("[" * 100_000, "line 1"),
    ],
)
def test_a_broken_list_names_file_and_line(tmp_path, text, message):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        mathv360k.read(str(tmp_path / "broken.json"), str(tmp_path))
    assert "broken.json" in str(error.value)


def test_broken_gzip(tmp_path):
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b"{}\n" * 1000)[:-12])
    with pytest.raises(ValueError, match=r"d\.jsonl\.gz"):
        mathv360k.read(str(tmp_path / "d.jsonl.gz"), str(tmp_path))


# ---- images -------------------------------------------------------------------------------------------


def test_transparency_becomes_white(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0] = (255, 0, 0, 255)
    rgba[0, 1] = (0, 0, 0, 128)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    pixels = np.asarray(images.load_image(str(tmp_path / "rgba.png")))
    assert pixels[0, 0].tolist() == [255, 0, 0] and pixels[1, 1].tolist() == [255] * 3
    assert abs(int(pixels[0, 1, 0]) - 127) <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=0)
    assert np.asarray(images.load_image(str(tmp_path / "p.png"))).tolist() == [[[255] * 3, [0, 0, 255]]]
    Image.new("LA", (1, 1), (0, 0)).save(tmp_path / "la.png")
    assert np.asarray(images.load_image(str(tmp_path / "la.png"))).tolist() == [[[255] * 3]]


def test_content_counts_not_the_name(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").rename(tmp_path / "x.png")
    image = images.load_image(str(tmp_path / "x.png"))
    assert image.mode == "RGB" and image.getpixel((4, 4))[0] > 250


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was rotated: rotate by 270 degrees
    Image.new("RGB", (20, 10)).save(tmp_path / "e.jpg", exif=exif)
    assert images.load_image(str(tmp_path / "e.jpg")).size == (10, 20)


def test_sixteen_bit_and_cmyk(tmp_path):
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "g.png")
    pixels = np.asarray(images.load_image(str(tmp_path / "g.png")))
    assert pixels[0, :, 0].tolist() == [0, 128, 255]
    for top in (1.0, 255.0, 65535.0):  # floating-point gray
        Image.fromarray(np.array([[0, top / 2, top]], np.float32)).save(tmp_path / "f.tif")
        values = np.asarray(images.load_image(str(tmp_path / "f.tif")))[0, :, 0]
        assert abs(values.astype(int) - [0, 128, 255]).max() <= 1
    for values in (np.array([[0, 70000]], np.int32), np.array([[0, np.nan]], np.float32)):
        Image.fromarray(values).save(tmp_path / "x.tif")
        with pytest.raises(images.ImageError, match="gray values"):
            images.load_image(str(tmp_path / "x.tif"))
    deep = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    deep.save(tmp_path / "t.png", transparency=0)  # black stands for transparent
    assert np.asarray(images.load_image(str(tmp_path / "t.png")))[0, :, 0].tolist() == [255, 128, 255]
    Image.new("CMYK", (4, 4), (0, 0, 0, 0)).save(tmp_path / "c.jpg")
    assert images.load_image(str(tmp_path / "c.jpg")).getpixel((1, 1)) == (255, 255, 255)


def test_image_errors_name_the_file(tmp_path):
    limit = Image.MAX_IMAGE_PIXELS
    good = picture(tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(good[:-2000])
    (tmp_path / "bomb.png").write_bytes(png_header(30000, 30000))
    (tmp_path / "text.png").write_text("no image")
    for name, pattern in (
        ("cut", "decoded"),
        ("text", "decoded"),
        ("none", "no such"),
        ("bomb", "900000000"),
    ):
        with pytest.raises(ValueError, match=pattern) as error:
            images.load_image(str(tmp_path / f"{name}.png"))
        assert f"{name}.png" in str(error.value)
    with pytest.raises(ValueError, match="64 x 64 = 4096 pixels, at most 4000"):
        images.load_image(str(tmp_path / "good.png"), max_pixels=4000)
    assert limit == Image.MAX_IMAGE_PIXELS


def test_resolve(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "root_other").mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path / "root_other")
    assert images.resolve(str(tmp_path / "in"), "a/b.png") == str(tmp_path / "in/a/b.png")
    assert images.resolve(str(tmp_path / "in"), "link/a.png") == str(tmp_path / "root_other/a.png")
    (tmp_path / "in/a.png").symlink_to(tmp_path / "root_other/a.png")
    (tmp_path / "in/b.png").symlink_to("here/c.png")
    assert images.resolve(str(tmp_path / "in"), "b.png") == str(tmp_path / "in/here/c.png")
    for relative in ("/etc/passwd", "../in/a.png", "a/../b.png", "a.png", "a\0.png", ".", "", "./"):
        with pytest.raises(ValueError, match="image"):
            images.resolve(str(tmp_path / "in"), relative)


# ---- splits -------------------------------------------------------------------------------------------


def pool(count=6000, per_image=9):
    sources = ("TabMWP", "IconQA", "GEOS")
    return [
        Query(
            id=f"q{i}",
            images=(f"/data/{i // per_image}.png",),
            question=str(i),
            answer="1",
            source=sources[(i // per_image % 8) // 3],
        )
        for i in range(count)
    ]


def test_split_by_image():
    queries = pool()
    splits = mathv360k.split(queries, seed=0)
    assert (len(splits["validation"]), len(splits["test"])) == (250, 750)
    assert abs(len(splits["labelled"]) - 3000) <= 9
    assert sum(map(len, splits.values())) >= 6000 - 18
    seen = [{image for query in split for image in query.images} for split in splits.values()]
    assert sum(map(len, seen)) == len(set().union(*seen))
    assert all(query.answer is None for query in splits["unlabelled"])
    assert all(query.answer == "1" for name in ("labelled", "test") for query in splits[name])
    for name in ("labelled", "test", "validation"):
        share = sum(query.source == "GEOS" for query in splits[name]) / len(splits[name])
        assert abs(share - 0.25) < 0.04


def test_split_depends_on_seed_and_ids_only():
    queries = pool()
    ids = {name: {query.id for query in part} for name, part in mathv360k.split(queries, seed=3).items()}
    shuffled = random.Random(1).sample(queries, len(queries))
    assert ids == {name: {q.id for q in part} for name, part in mathv360k.split(shuffled, seed=3).items()}
    assert ids["test"] != {query.id for query in mathv360k.split(queries, seed=4)["test"]}
    code = (
        "from mstar_jax.data import splits; from tests.test_mathv360k import pool;"
        "print(sorted(q.id for q in splits.split(pool(), seed=3)['test']))"
    )
    root = pathlib.Path(__file__).resolve().parents[1]
    environment = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(sorted(ids["test"]))


def test_split_keeps_connected_images_together():
    chain = [Query(f"c{i}", (f"{i}.png", f"{i + 1}.png"), "q", answer="1") for i in range(50)]
    single = [Query(f"s{i}", (), "q", answer="1") for i in range(50)]
    splits = mathv360k.split(chain + single, seed=0, validation=5, test=5)
    assert len({name for name, part in splits.items() for q in part if q.id.startswith("c")}) == 1
    assert [len(splits[name]) for name in ("validation", "test")] == [5, 5]


def test_the_same_picture_under_several_names_is_one_image(tmp_path):
    queries = []
    for i in range(60):
        for copy in range(3):
            path = tmp_path / f"{copy}/{i}.png"
            picture(path, (8, 8), (i, copy * 0, 7))
            queries.append(Query(f"q{i}_{copy}", (str(path),), str(copy), answer="1"))
    splits = mathv360k.split(queries, seed=0, validation=9, test=18)
    seen = [{pathlib.Path(q.images[0]).read_bytes() for q in part} for part in splits.values()]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 60


def test_split_errors():
    with pytest.raises(ValueError, match=r"250 validation \+ 750 test .* has \d+ of 900"):
        mathv360k.split(pool(900), seed=0)
    with pytest.raises(ValueError, match="needs answers"):
        mathv360k.split([Query("a", (), "q")], seed=0, validation=0, test=0)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real data next to the checkout")
@pytest.mark.parametrize(("name", "kept"), [("PuzzleVQA", 200), ("TabMWP", 450)])
def test_real_rows(name, kept):
    queries, report = mathv360k.read(str(REAL / name / "train.json"), str(REAL))
    assert len(queries) == kept == report.rows - sum(report.dropped.values())


def test_nothing_of_a_hidden_answer_is_left(tmp_path):
    """With the unlabelled rows' answers shuffled, the same queries are asked and the same answers voted."""
    golds = ["12", "2.5", "yes", "red", "x^2", "{1, 2}"] * 20
    hints = ["", "Hint: Please answer the question requiring an integer answer and provide it.\n"]

    def read(golds):
        rows = [
            {
                "id": f"q{i}",
                "conversations": [{"value": f"{hints[i % 3 == 0]}Question: {i}?"}, {"value": gold}],
            }
            for i, gold in enumerate(golds)
        ]
        for row in rows:
            row["conversations"][0]["from"], row["conversations"][1]["from"] = "human", "gpt"
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(rows))
        found, _ = mathv360k.read(path, tmp_path)
        assert len(found) == len(golds)
        return mathv360k.split(found, seed=0, validation=5, test=5)

    before = read(golds)
    hidden = [int(q.id[1:]) for q in before["unlabelled"]]
    shuffled = list(golds)
    for i, j in zip(hidden, random.Random(0).sample(hidden, len(hidden))):
        shuffled[i] = golds[j]
    after = read(shuffled)
    assert before == after and shuffled != golds and len(hidden) > 40
    assert {q.answer for q in before["unlabelled"]} == {None}
    assert {q.answer_type for q in before["unlabelled"]} == {"text", "integer"}  # what the hints say
    assert {q.answer_type for q in before["labelled"]} > {"integer", "boolean", "text"}  # what the golds are
    responses = [Response("", i, "", (), 0.0, False, answer=a) for i, a in enumerate(["12", "12.0", "red"])]
    voted = [
        [selection.pseudo_label(q, responses, [1.0] * 3, 0.5) for q in s["unlabelled"]]
        for s in (before, after)
    ]
    assert voted[0] == voted[1] and {q.answer for q in voted[0]} == {"12"}
