"""The readers of the benchmarks, on small files in their official shapes."""

import base64
import csv
import io
import json
import os
import pathlib
import subprocess
import sys
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mstar_jax.answers.check import grade
from mstar_jax.data import pictures
from mstar_jax.data.images import ImageError, load_image
from mstar_jax.evaluate import benchmarks, tables
from mstar_jax.evaluate.benchmarks import read
from mstar_jax.evaluate.items import Item

FORMATS = os.environ.get("MSTAR_FORMATS")  # a folder of small files in the official formats, if available
CHOICE = (
    "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
)


def image(seed=0, size=(40, 30), kind="PNG", mode="RGB"):
    """Bytes of a noisy image: not compressible."""
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def coded(data):
    return base64.b64encode(data).decode()


def tsv(path, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path.parent


def parquet(path, rows, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([pa.field(*column) for column in columns.items()]) if columns else None
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return path.parent


def mathvista(pid="1", **more):
    row = {"pid": pid, "question": "How long?", "image": f"images/{pid}.jpg", "choices": None, "unit": None}
    row |= {"decoded_image": {"bytes": image(int(pid)), "path": f"{pid}.jpg"}, "precision": None}
    row |= {"answer": "4", "question_type": "free_form", "answer_type": "integer"}
    about = {"category": "general-vqa", "context": "table", "grade": "college", "img_height": 30}
    about |= {"img_width": 40, "language": "english", "skills": ["arithmetic reasoning"], "source": "TabMWP"}
    about |= {"split": "testmini", "task": "math word problem"}
    row |= {"metadata": about, "query": f"Hint: as stored\nQuestion: How long? {pid}"}
    return row | more


def mcq(index, **more):
    row = {
        "index": index,
        "question": f"Which {index}?",
        "hint": "",
        "A": "a cat",
        "B": "a dog",
        "C": "a cow",
    }
    row |= {"D": "a hen", "answer": "B", "category": "image_topic", "image": coded(image(int(index) % 1000))}
    return row | {"source": "web", "l2-category": "coarse_perception", "comment": "", "split": "dev"} | more


def check(items, report, kept, dropped):
    assert (len(items), report.dropped) == (kept, dropped)
    assert report.kept == kept and report.rows == kept + sum(dropped.values())
    assert all(isinstance(item, Item) for item in items)
    for path in (path for item in items for path in item.query.images):
        assert os.path.isabs(path) and load_image(path).mode == "RGB"


# ---- MathVista ----------------------------------------------------------------------------------------


def test_mathvista_parquet(tmp_path):
    four = ["1.5", "2", "2", "3\nor so"]
    choice = {"choices": four, "question_type": "multi_choice", "answer_type": "text"}
    rows = [
        mathvista("1", answer="1.2", answer_type="float", precision=1.0, unit="cm"),
        mathvista("2", **choice, answer="2"),
        mathvista("3", answer="[2014, 2016]", answer_type="list"),
        mathvista("4", answer="4"),
        mathvista("5", answer="dog", answer_type="text"),
        mathvista("6", **choice, answer="7"),
        mathvista("7", **choice | {"choices": None}, answer="7"),
        mathvista("8", answer=None),
        mathvista("4"),
        mathvista("9", decoded_image={"bytes": image(9)[:300], "path": "9.jpg"}),
        mathvista("10", decoded_image={"bytes": b"", "path": None}, image=None),
        mathvista("11", decoded_image={"bytes": b"no image", "path": None}),
        mathvista("12", question=" "),
    ]
    folder = parquet(tmp_path / "data" / "testmini-00000-of-00001-725687bf7a18d64b.parquet", rows)
    items, report = read("mathvista", folder.parent, tmp_path / "cache")
    causes = {"options without gold": 1, "no options": 1, "no answer": 1, "duplicate id": 1, "no question": 1}
    check(items, report, 5, causes | {"undecodable image": 2, "no image": 1})
    one, two, three, four_, five = items
    assert (one.query.answer, one.query.answer_type, one.query.precision, one.unit) == (
        "1.2",
        "float",
        1,
        "cm",
    )
    assert one.query.question == "How long? (Unit: cm)"
    assert one.prompt == "Hint: as stored\nQuestion: How long? 1" and one.base == one.query.id == "1"
    assert two.query.options == tuple(four) and two.query.answer == "B" and two.query.answer_type == "choice"
    assert [i.query.answer_type for i in (three, four_, five)] == ["math", "integer", "text"]
    assert two.groups["task"] == ("MWP",) and two.groups["skills"] == ("arithmetic reasoning",)
    expected = {"language": "english", "source": "TabMWP", "category": "general-vqa", "context": "table"}
    expected |= {"question_type": "multi_choice", "answer_type": "text", "grade": "college"}
    assert {key: (value,) for key, value in expected.items()}.items() <= dict(two.groups).items()
    record = {"index": "2", "answer": "2", "answer_option": "B", "choices": repr(four), "A": "1.5"}
    record |= {"question": two.prompt, "task": "math word problem", "skills": "['arithmetic reasoning']"}
    assert record.items() <= dict(two.record).items()
    assert not {"image", "decoded_image"} & set(two.record)


def test_mathvista_json_with_image_folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(image(1, kind="JPEG"))
    (tmp_path / "images" / "3.jpg").write_bytes(b"")
    rows = {}
    for pid in "1234":
        row = mathvista(pid, precision=2.0, answer="0.25", answer_type="float")
        rows[pid] = {k: v for k, v in row.items() if k not in ("decoded_image", "query", "pid")}
    rows["4"]["image"] = "../secret.png"
    (tmp_path / "testmini.json").write_text(json.dumps(rows))
    items, report = read("mathvista", tmp_path, tmp_path / "cache")
    check(items, report, 1, {"missing image": 1, "empty image": 1, "image path leaves the root": 1})
    assert items[0].query.images == (str((tmp_path / "images" / "1.jpg").resolve()),)
    assert items[0].query.id == "1" and items[0].query.precision == 2
    hint = "with two decimal places and provide the final value, e.g., 1.23, 1.34, 1.45, at the end."
    number = "Hint: Please answer the question requiring a floating-point number"
    assert items[0].prompt == f"{number} {hint}\nQuestion: How long?"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("more", "hint"),
    [
        ({}, "requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end."),
        (
            {"answer_type": "float", "precision": 1.0},
            "requiring a floating-point number with one decimal place and provide the final value, "
            "e.g., 1.2, 1.3, 1.4, at the end.",
        ),
        (
            {"answer_type": "list"},
            "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], "
            "[1.2, 1.3, 1.4], at the end.",
        ),
    ],
)
def test_mathvista_query_is_built_where_it_is_not_stored(tmp_path, more, hint):
    folder = parquet(tmp_path / "testmini-0.parquet", [mathvista(**more, unit="$") | {"query": None}])
    (item,), _ = read("mathvista", folder, tmp_path / "cache")
    assert item.prompt == f"Hint: Please answer the question {hint}\nQuestion: How long? (Unit: $)"


def test_mathvista_vlmevalkit_table(tmp_path):
    options = ["it's 4", 'a "5"', "né"]
    query = f'{CHOICE}\nQuestion: How\nmany?\nChoices:\n(A) it\'s 4\n(B) a "5"\n(C) né'
    row = {"index": "7", "question": query, "image": coded(image()), "answer": "né", "answer_option": "C"}
    row |= {
        "choices": repr(options),
        "question_type": "multi_choice",
        "answer_type": "text",
        "skills": "['x']",
    }
    row |= {"task": "geometry problem solving", "precision": "", "unit": ""}
    bad = row | {"index": "8", "choices": "[__import__('os').system('touch pwned')]"}
    large = row | {"index": "9", "choices": repr(["x"] * 5000)}
    folder = tsv(tmp_path / "MathVista_MINI.tsv", [row, bad, large])
    items, report = read("mathvista", folder, tmp_path / "cache")
    check(items, report, 1, {"no options": 2})
    assert items[0].query.question == "How\nmany?" and items[0].prompt == query
    assert items[0].query.options == tuple(options) and items[0].query.answer == "C"
    assert items[0].groups["task"] == ("GPS",) and items[0].groups["skills"] == ("x",)
    assert not os.path.exists("pwned")


def test_single_letter_option_texts_are_texts(tmp_path):
    row = mathvista(choices=["C", "B", "A"], answer="A", question_type="multi_choice", answer_type="text")
    (item,), _ = read("mathvista", parquet(tmp_path / "testmini-0.parquet", [row]), tmp_path / "cache")
    assert item.query.answer == "C"


# ---- M3CoT --------------------------------------------------------------------------------------------


def m3cot(name, **more):
    row = {"id": name, "category": "magnets", "image_id": name, "question": "Which?", "choices": ["x", "y"]}
    row |= {"context": "", "answer": "A", "rationale": "...", "split": "test", "domain": "science"}
    return row | {"image": {"bytes": image(), "path": None}, "topic": "theory"} | more


def test_m3cot(tmp_path):
    rows = [m3cot("a-1"), m3cot("a-2", context="Look.", answer="B"), m3cot("a-1", answer="B")]
    rows += [m3cot("a-3", answer="C"), m3cot("a-4", choices=[]), m3cot("")]
    parquet(tmp_path / "data" / "test-00000-of-00002-aa.parquet", rows)
    parquet(tmp_path / "data" / "test-00001-of-00002-bb.parquet", [m3cot("b-1", answer="AB"), m3cot("b-2")])
    parquet(tmp_path / "data" / "train-00000-of-00001-cc.parquet", [m3cot("c-1")])
    items, report = read("m3cot", tmp_path, tmp_path / "cache")
    causes = {"duplicate id": 1, "options without gold": 2, "no options": 1, "no id": 1}
    check(items, report, 3, causes)
    assert report.examples["no id"] == ["test-00000-of-00002-aa.parquet row 5"]
    assert [item.query.id for item in items] == ["a-1", "a-2", "b-2"]
    assert items[0].prompt == "[Question]\nWhich?\n[Choices]\n(A) x\n(B) y"
    assert items[1].prompt == "[Context]\nLook.\n\n[Question]\nWhich?\n[Choices]\n(A) x\n(B) y"
    assert items[1].query.question == "Look.\nWhich?"
    assert items[0].groups == {"domain": ("science",), "topic": ("theory",)}
    assert len(os.listdir(tmp_path / "cache")) == 1  # one image, however many rows


def test_m3cot_jsonl(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(image())
    lines = [json.dumps(m3cot("a", image="images/a.png")), "{broken", "[]", '"text"']
    (tmp_path / "test.jsonl").write_text("\n".join(lines) + "\n")
    items, report = read("m3cot", tmp_path, tmp_path / "cache")
    check(items, report, 1, {"broken row": 3})


# ---- MMStar -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "question", "options"),
    [
        ("How?\nOptions: A: 6, 2, 8, B: 8, 6, 2, C: no, D: yes", "How?", ["6, 2, 8", "8, 6, 2", "no", "yes"]),
        ("How?\nOptions: A: x, B: y", "How?", ["x", "y"]),
        ("How? Options:\nA: x\nB: B: 1, C: z", "How? ", ["x", "B: 1", "z"]),
        ("Options: none\nWhat?\nOptions: A. x; B. y", "Options: none\nWhat?", ["x", "y"]),
        ("How?\nChoices:\n(A) 1\n(B) 2, or\n3\n(C) 4", "How?", ["1", "2, or\n3", "4"]),
        ("How?\nOptions: A: 選 B: ü C: ∠B: 3", "How?", ["選", "ü", "∠B: 3"]),
        ("How?\nOptions: A: , B: x", "How?", ["", "x"]),
        ("How many options: three?", "How many options: three?", []),
    ],
)
def test_options_in_the_question(text, question, options):
    assert tables.parse_options(text) == (question.rstrip(), options)


def mmstar(index, category="math", l2="geometry", **more):
    row = {"index": index, "question": f"Which {index}?\nOptions: A: one, B: two, C: three, D: four"}
    row |= {"image": {"bytes": image(index), "path": None}, "answer": "C", "category": category}
    about = {"source": "MMMU", "split": "val", "image_path": "images/x.png"}
    return row | {"l2_category": l2, "meta_info": about} | more


def test_mmstar_and_its_reasoning_part(tmp_path):
    rows = [mmstar(0), mmstar(1, "coarse perception", "image emotion"), mmstar(2, "logical reasoning", "x")]
    rows += [mmstar(3, question="Which?"), mmstar(4, answer="E")]
    folder = parquet(tmp_path / "mmstar.parquet", rows)
    items, report = read("mmstar", folder, tmp_path / "cache")
    check(items, report, 3, {"no options": 1, "options without gold": 1})
    one = items[0]
    assert one.query.options == ("one", "two", "three", "four") and one.query.question == "Which 0?"
    ask = "Please select the correct answer from the options above. \n"
    assert one.prompt == f"Question: Which 0?\nOptions:\nA. one\nB. two\nC. three\nD. four\n{ask}"
    assert one.groups == {"category": ("math",), "l2_category": ("geometry",)}
    record = {"index": "0", "question": "Which 0?", "A": "one", "D": "four", "answer": "C", "source": "MMMU"}
    assert (record | {"l2-category": "geometry"}).items() <= dict(one.record).items()
    reasoning, report = read("mmstar_r", folder, tmp_path / "cache")
    assert [item.query.id for item in reasoning] == ["0", "2"]
    assert report.dropped["not a reasoning question"] == 1


def test_mmstar_raw_bytes_and_letter_columns(tmp_path):
    folder = parquet(tmp_path / "mmstar.parquet", [mmstar(0, image=image())])
    raw, _ = read("mmstar", folder, tmp_path / "cache")
    os.remove(tmp_path / "mmstar.parquet")
    table = [mcq("0", question="Which 0?", A="one", B="two", C="three", D="four", answer="C")]
    columns, _ = read("mmstar", tsv(tmp_path / "MMStar.tsv", table), tmp_path / "cache")
    assert raw[0].query.options == columns[0].query.options and raw[0].prompt == columns[0].prompt
    assert raw[0].query.images == columns[0].query.images  # the same bytes, the same file


# ---- MMBench ------------------------------------------------------------------------------------------


def test_mmbench_rotations_and_images_of_other_rows(tmp_path):
    reason = {"l2-category": "logic_reasoning", "category": "future_prediction"}
    big = coded(image(1, (300, 200)))
    assert len(big) > 128 * 1024  # more than Python's csv takes by itself
    rows = [
        mcq("1000010", image="10", answer="A"),  # before the row that has the image
        mcq("10", image=big, hint="Use\nthis.", A="ca\nt", C="選 – ü"),
        mcq("2000010", image="10", C="nan", D=""),
        mcq("11", image="9", **reason),  # there is no row 9
        mcq("12", C="", **reason),
        mcq("13", D="", C="", **reason),
        mcq("1000014", **reason),
        mcq("15", image="@@@" * 40),
        mcq("17", answer="", **reason),
        mcq("18", image="/etc/hostname"),
        mcq("19", image="20"),  # whose own is broken
        mcq("20", image=coded(image()[:200])),
        mcq("13", **reason),
    ]
    folder = tsv(tmp_path / "MMBench_DEV_EN_V11.tsv", rows)
    items, report = read("mmbench", folder, tmp_path / "cache")
    causes = {"no such row's image": 2, "an option is missing before others": 1, "broken base64": 1}
    causes |= {"rotation without its question": 1, "no answer": 1, "undecodable image": 2, "duplicate id": 1}
    check(items, report, 4, causes)
    assert [(item.query.id, item.base) for item in items] == [
        ("1000010", "10"),
        ("10", "10"),
        ("2000010", "10"),
        ("13", "13"),
    ]
    first, base, second, two = items
    assert first.query.images == base.query.images == second.query.images != two.query.images
    assert base.query.options == ("ca\nt", "a dog", "選 – ü", "a hen")
    assert base.prompt.startswith("Hint: Use\nthis.\nQuestion: Which 10?\nOptions:\nA. ca\nt\nB. a dog\n")
    assert base.query.question == "Use\nthis.\nWhich 10?"
    assert len(second.query.options) == len(two.query.options) == 2
    assert (
        two.prompt.count("\n") == 5
        and two.record["C"] == ""
        and two.record["l2-category"] == "logic_reasoning"
    )
    assert set(mcq("1")) - {"image"} <= set(two.record)
    part, report = read("mmbench_r", folder, tmp_path / "cache")
    assert [item.query.id for item in part] == ["13"]


def test_mmbench_index_has_to_be_a_number(tmp_path):
    rows = [mcq("10") | {"index": "ten"}, mcq("10") | {"index": "9" * 5000}, mcq("1") | {"index": "1.5"}]
    items, report = read("mmbench", tsv(tmp_path / "MMBench_DEV_EN_V11.tsv", rows), tmp_path / "cache")
    check(items, report, 0, {"index is not a number": 3})


# ---- AI2D and MathV360K -------------------------------------------------------------------------------


def test_ai2d_counts_from_zero(tmp_path):
    row = {"question": "Which?", "options": ["2", "1", "3", "0"], "image": {"bytes": image(), "path": None}}
    rows = [row | {"answer": answer} for answer in ("2", "0", "4", "B", "99999")]
    items, report = read("ai2d", parquet(tmp_path / "data" / "test-0.parquet", rows), tmp_path / "cache")
    check(items, report, 3, {"options without gold": 2})
    assert [(item.query.id, item.query.answer) for item in items] == [("0", "C"), ("1", "A"), ("3", "B")]


def test_an_empty_first_option_of_ai2d_is_kept(tmp_path):
    """As row 83301 of the test set: B to D can be chosen, A is not shown."""
    tsv(tmp_path / "AI2D_TEST.tsv", [mcq("1", A="", answer="C"), mcq("2", A="", answer="A")])
    items, report = read("ai2d", tmp_path, tmp_path / "cache")
    check(items, report, 1, {"options without gold": 1})
    query = items[0].query
    assert (query.options[0], query.answer) == ("", "C") and "A. " not in items[0].prompt
    assert f"B. {query.options[1]}\nC. {query.options[2]}\n" in items[0].prompt
    for response, verdict in (
        ("C", "correct"),
        ("A", "wrong"),
        (query.options[2], "correct"),
        ("", "unparsed"),
    ):
        assert grade(f"The answer is {response}", "C", options=query.options).verdict == verdict


def test_ai2d_tables_are_told_apart(tmp_path):
    tsv(tmp_path / "AI2D_TEST.tsv", [mcq("1")])
    with pytest.raises(FileNotFoundError, match=r"AI2D_TEST_NO_MASK.tsv, test-\*.parquet"):
        read("ai2d_no_mask", tmp_path, tmp_path / "cache")
    tsv(tmp_path / "AI2D_TEST_NO_MASK.tsv", [mcq("1", A="7")])
    assert read("ai2d", tmp_path, tmp_path / "cache")[0][0].query.options[0] == "a cat"
    assert read("ai2d_no_mask", tmp_path, tmp_path / "cache")[0][0].query.options[0] == "7"


def test_mathv360k(tmp_path):
    (tmp_path / "TabMWP").mkdir()
    (tmp_path / "TabMWP" / "1.png").write_bytes(image())
    value = f"<image>\n{CHOICE}\nQuestion: Enough?\nChoices:\n(A) yes\n(B) no"
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "The answer is B"}]
    row = {"id": "t1", "image": "TabMWP/1.png", "conversations": turns}
    (tmp_path / "test.json").write_text(json.dumps([row, row | {"image": "TabMWP/2.png"}]))
    items, report = read("mathv360k", tmp_path, tmp_path / "cache")
    check(items, report, 1, {"missing image": 1})
    assert items[0].prompt == value.removeprefix("<image>\n") and items[0].query.answer == "B"
    groups = {"task": ("MWP",), "source": ("TabMWP",), "answer_type": ("choice",)}
    assert items[0].groups == groups and items[0].record["B"] == "no"


def test_every_source_has_one_task():
    names = [name for names in benchmarks.SOURCES.values() for name in names.split()]
    assert len(names) == len(set(names)) == 31
    assert set(benchmarks.SOURCES) == set(benchmarks.TASKS.values())


# ---- files, cells, images -----------------------------------------------------------------------------


def test_what_cannot_be_read_says_so(tmp_path):
    with pytest.raises(ValueError, match="unknown benchmark 'nonsense'; expected one of mathvista, "):
        read("nonsense", tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"looked for testmini-\*.parquet, MathVista_MINI.tsv"):
        read("mathvista", tmp_path, tmp_path)
    for name, text in (("testmini-0.parquet", "no parquet"), ("testmini.json", "{"), ("testmini.json", "3")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            read("mathvista", tmp_path / name, tmp_path)
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(ValueError, match="expected one of .parquet, .arrow"):
        read("mathvista", tmp_path / "x.csv", tmp_path)


def test_parquet_with_broken_text_or_pages(tmp_path):
    binary = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    picture = {"bytes": image(), "path": None}
    names = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary()).view(pa.string())  # not checked when written
    rows = {"id": names, "question": ["?"] * 3, "choices": [["x", "y"]] * 3, "answer": ["A"] * 3}
    table = pa.table(rows | {"image": pa.array([picture] * 3, binary)})
    path = tmp_path / "test-0.parquet"
    pq.write_table(table, path)
    items, report = read("m3cot", tmp_path, tmp_path / "cache")
    check(items, report, 2, {"broken row": 1})
    data = path.read_bytes()
    path.write_bytes(data[:40] + bytes(200) + data[240:])
    with pytest.raises(ValueError, match="test-0.parquet, from row 0: broken parquet"):
        read("m3cot", tmp_path, tmp_path / "cache")


def test_readers_import_neither_pyarrow_nor_rapidfuzz():
    code = "import sys, mstar_jax.evaluate.scoring\n"
    code += "assert not {'pyarrow', 'rapidfuzz', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_tsv_row_with_wrong_cells_is_dropped(tmp_path):
    folder = tsv(tmp_path / "AI2D_TEST.tsv", [mcq("1"), mcq("2")])
    with open(tmp_path / "AI2D_TEST.tsv", "ab") as file:
        file.write(b"3\tshort\r\n4\t\xff\xfe\r\n" + b"\t" * 40 + b"\r\n")
    items, report = read("ai2d", folder, tmp_path / "cache")
    check(items, report, 2, {"no options": 3})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (float("nan"), ""),
        ("NaN", ""),
        (" ", ""),
        (3.0, "3"),
        (2.5, "2.5"),
        (7, "7"),
        ("None", "None"),
    ]
    + [(" a ", " a "), ("\ud800x", "\ufffdx"), (float("inf"), "inf"), ("N/A", "N/A")],
)
def test_cell(value, text):
    assert tables.cell({"a": value}, "a") == text
    assert tables.cell({"a": value, "b": "z"}, "a", "b") == (text or "z")


def test_texts():
    assert tables.texts("['a', 1, None]") == ["a", "1", ""] and tables.texts(["x"]) == ["x"]
    for value in (None, "", "a", "{'a': 1}", "['a'", "[" * 5000, "[1" + ", 1" * 10_000 + "]", 3):
        assert tables.texts(value) == []


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "L", "1"])
def test_an_image_is_kept_as_it_is_and_written_once(tmp_path, mode):
    data = image(3, mode=mode)
    path = pathlib.Path(pictures.write(data, str(tmp_path)))
    assert path.read_bytes() == data and path.suffix == ".png"
    before = path.stat().st_mtime_ns, path.stat().st_ino
    assert pictures.write(data, str(tmp_path)) == str(path)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before
    path.write_bytes(data[:50])  # a broken copy is written again
    assert pathlib.Path(pictures.write(data, str(tmp_path))).read_bytes() == data
    assert os.listdir(tmp_path) == [path.name]


def test_ending_from_content(tmp_path):
    for kind, ending in (("JPEG", ".jpeg"), ("WEBP", ".webp"), ("GIF", ".gif"), ("BMP", ".bmp")):
        assert pictures.write(image(kind=kind), str(tmp_path)).endswith(ending)


def test_images_are_refused_before_they_are_decoded(tmp_path):
    small = image(size=(1, 1))
    for side in (8000, 60000):  # more than MAX_PIXELS, more than Pillow's own limit
        chunk = small[12:16] + side.to_bytes(4, "big") * 2 + small[24:29]
        large = small[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + small[33:]
        with pytest.raises(ImageError) as error:
            pictures.write(large, str(tmp_path))
        assert error.value.cause == "image too large"
    with pytest.raises(ImageError, match="0 bytes"):
        pictures.write(b"", str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_base64_with_prefix_and_line_ends():
    data = image()
    text = "\n".join(coded(data)[at : at + 76] for at in range(0, len(coded(data)), 76))
    assert pictures.unpack(text) == pictures.unpack("data:image/png;base64," + text) == data


# ---- real shapes --------------------------------------------------------------------------------------


@pytest.mark.skipif(not FORMATS, reason="MSTAR_FORMATS names no folder of files in official shape")
@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("mathvista", "mathvista_like_testmini.parquet", 60),
        ("mmstar", "mmstar_like.parquet", 60),
        ("mmstar_r", "mmstar_like.parquet", 40),
        ("mmbench", "mmbench_like_circular.tsv", 144),
        ("mmbench_r", "mmbench_like_circular.tsv", 72),
    ],
)
def test_official_shapes(tmp_path, name, file, count):
    items, report = read(name, os.path.join(FORMATS, file), tmp_path)
    assert len(items) == count == report.rows - report.dropped.get("not a reasoning question", 0)
    if name.startswith("mmbench"):
        assert all(
            sum(other.base == item.base for other in items) == len(item.query.options) for item in items
        )
    for item in items:
        assert item.query.options is None or item.query.answer in "ABCDEFGH"[: len(item.query.options)]
        assert load_image(item.query.images[0])
