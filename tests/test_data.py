"""Data in every format: the same queries come out, broken rows are counted, large files are streamed."""

import base64
import contextlib
import dataclasses
import functools
import gzip
import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import types
import uuid
import zlib
from decimal import Decimal

import jax
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import test_evolve
import tiny
from absl import flags
from absl.testing import flagsaver
from ml_collections import ConfigDict
from PIL import Image

from configs import tiny as tiny_config
from mstar_jax import configure, sharding
from mstar_jax.data import __main__ as look
from mstar_jax.data import arrow, files, given, images, mathv360k, pictures, prompts, rows, splits, turns
from mstar_jax.rewards import custom
from mstar_jax.stages import given as stage
from mstar_jax.structs import Query

ROOT = pathlib.Path(__file__).resolve().parents[1]
REAL = pathlib.Path(
    os.environ.get("MSTAR_REALDATA", "/nonexistent")
)  # real questions, where a machine has some
HINT = (
    "Hint: Please answer the question requiring an integer answer and provide the final value, e.g., 1, 2, 3."
)
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
PART = pa.struct([("type", pa.string()), ("text", pa.string())])
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.list_(PART))])


def drawn(number, size=(40, 30)):
    noise = np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def conversation(name, image, human, answer):
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": turns}


@pytest.fixture
def made_up(tmp_path):
    """Rows of MathV360K's format: choices, numbers, a hint, two images, a copied image; and their root."""
    for number in range(24):
        path = tmp_path / f"root/{'AB'[number % 2]}/images/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(drawn(number % 23))  # the last one is a copy of the first
    found = []
    for number in range(60):
        at = number % 24
        image = f"{'AB'[at % 2]}/images/{at}.png"
        if number % 5 == 0:
            text, answer = (
                f"<image>\nQuestion: Which of {number}?\nChoices:\n(A) yes\n(B) no",
                "The answer is B",
            )
        elif number % 5 == 1:
            text, answer = f"<image>\n{HINT}\nQuestion: How many of {number}?", f"The answer is {number}"
        elif number % 5 == 2:
            other = f"{'AB'[(at ^ 1) % 2]}/images/{at ^ 1}.png"
            image, text, answer = [image, other], f"Is <image> left of <image> in {number}?", "Yes"
        else:
            text, answer = f"{number}: how long is AB? <image>", f"{number}.5"
        found.append(conversation(f"q{number}", image, text, answer))
    return found, tmp_path / "root"


def paths_of(row):
    return row["image"] if isinstance(row["image"], list) else [row["image"]]


def inside(root, row):
    return [{"bytes": (root / path).read_bytes(), "path": path} for path in paths_of(row)]


def messages(row, part=lambda path: {"type": "image"}):
    """A row's turns with typed parts; its images stand where their marks are."""
    paths = iter(paths_of(row))

    def parts(text):
        head, *rest = text.split("<image>")
        found = [{"type": "text", "text": head}] if head else []
        for each in rest:
            found += [part(next(paths)), *([{"type": "text", "text": each}] if each else [])]
        return found

    human, gpt = (turn["value"] for turn in row["conversations"])
    return [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": parts(human)},
        {"role": "assistant", "content": parts(gpt)},
    ]


def as_columns(row):
    """A question without its options, and these as a column."""
    question, _, listed = row["conversations"][0]["value"].partition("\nChoices:\n")
    options = [line[4:] for line in listed.splitlines()] or None
    return {"problem": question, "choices": options, "answer": row["conversations"][1]["value"]}


def as_json(folder, root, found):
    (folder / "d.json").write_text(json.dumps(found))
    return folder / "d.json"


def as_lines(folder, root, found):
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder / "d.jsonl"


def as_zipped_lines(folder, root, found):
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(as_lines(folder, root, found).read_bytes()))
    return folder / "d.jsonl.gz"


def table_of(root, found):
    return pa.table(
        {
            "id": [row["id"] for row in found],
            "image": pa.array([inside(root, row) for row in found], pa.list_(IMAGE)),
            "conversations": pa.array([row["conversations"] for row in found], pa.list_(TURN)),
        }
    )


def as_parquet(folder, root, found):
    pq.write_table(table_of(root, found), folder / "d.parquet", row_group_size=7)
    return folder / "d.parquet"


def as_shards(folder, root, found):
    table, third = table_of(root, found), len(found) // 3
    (folder / "data").mkdir()
    for at, start in enumerate((0, third, 2 * third)):
        part = table.slice(start, third if at < 2 else None)
        pq.write_table(part, folder / f"data/train-{at:05d}-of-00003.parquet")
    return folder


def as_columns_of_bytes(folder, root, found):
    """Bytes without a path, and the source and the options as columns."""
    columns = {
        "pid": [row["id"] for row in found],
        "images": pa.array([[each["bytes"] for each in inside(root, row)] for row in found]),
        "data_source": [paths_of(row)[0].split("/")[0] for row in found],
    }
    columns |= {name: [as_columns(row)[name] for row in found] for name in ("problem", "choices", "answer")}
    pq.write_table(pa.table(columns), folder / "d.parquet")
    return folder / "d.parquet"


def as_dataset(folder, root, found):
    """As `Dataset.save_to_disk` writes it: two streams of Arrow, and which they are."""
    table, names = table_of(root, found), ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (table.slice(0, 31), table.slice(31))):
        with pa.ipc.new_stream(folder / name, part.schema) as writer:
            writer.write_table(part, max_chunksize=10)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def as_arrow_file(folder, root, found):
    table = table_of(root, found)
    with pa.ipc.new_file(folder / "d.arrow", table.schema) as writer:
        writer.write_table(table)
    return folder / "d.arrow"


def as_messages(folder, root, found):
    columns = {
        "id": [row["id"] for row in found],
        "images": pa.array([inside(root, row) for row in found], pa.list_(IMAGE)),
        "messages": pa.array([messages(row) for row in found], pa.list_(MESSAGE)),
    }
    pq.write_table(pa.table(columns), folder / "d.parquet")
    return folder / "d.parquet"


def as_messages_with_paths(folder, root, found):
    part = lambda path: {"type": "image", "image": path}  # noqa: E731
    lines = [{"id": row["id"], "messages": messages(row, part)} for row in found]
    (folder / "d.json").write_text("".join(json.dumps(line) + "\n" for line in lines))  # lines, called .json
    return folder / "d.json"


def as_messages_with_data(folder, root, found):
    def part(path):
        coded = base64.b64encode((root / path).read_bytes()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded}"}}

    lines = [
        {"id": row["id"], "source": paths_of(row)[0].split("/")[0], "messages": messages(row, part)}
        for row in found
    ]
    (folder / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "d.jsonl"


FORMATS = [
    as_lines,
    as_zipped_lines,
    as_parquet,
    as_shards,
    as_columns_of_bytes,
    as_dataset,
    as_arrow_file,
    as_messages,
    as_messages_with_paths,
    as_messages_with_data,
]


def real_rows(name):
    return json.loads((REAL / name / "train.json").read_text())


def told(queries):
    """Queries with what their images show in place of where they are."""
    shown = [tuple(map(pictures.content, query.images)) for query in queries]
    return [dataclasses.replace(query, images=images) for query, images in zip(queries, shown)]


def same_from(make, folder, root, found):
    folder.mkdir()
    expected, first = mathv360k.read(as_json(folder, root, found), root)
    (folder / "d.json").unlink()
    path = make(folder, root, found)
    queries, report = mathv360k.read(path, root, folder=folder / "kept")
    assert told(queries) == told(expected) and len(queries) > 20
    assert (report.rows, report.kept, report.dropped) == (first.rows, first.kept, first.dropped)
    sizes = {"seed": 0, "validation": 4, "test": 6}
    one, two = (splits.split(each, **sizes) for each in (expected, queries))
    assert {name: told(part) for name, part in one.items()} == {
        name: told(part) for name, part in two.items()
    }
    for a, b in zip(expected[:12], queries):
        for left, right in zip(a.images, b.images, strict=True):
            assert (np.asarray(images.load_image(left)) == np.asarray(images.load_image(right))).all()
    return queries


@pytest.mark.parametrize("make", FORMATS)
def test_every_format_gives_the_same_queries_and_splits(tmp_path, made_up, make):
    found, root = made_up
    queries = same_from(make, tmp_path / "data", root, found)
    assert queries[2].question == "Is image 1 left of image 2 in 2?" and len(queries[2].images) == 2


@pytest.mark.skipif(not REAL.is_dir(), reason="no real data next to the checkout")
@pytest.mark.parametrize("make", [as_parquet, as_columns_of_bytes, as_dataset, as_messages_with_data])
def test_every_format_gives_the_same_real_queries(tmp_path, make):
    found = [row for name in ("PuzzleVQA", "TabMWP") for row in real_rows(name)[::20]]
    same_from(make, tmp_path / "data", REAL, found)


# ---- what rows may say --------------------------------------------------------------------------------


def read_lines(tmp_path, *records, **more):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return mathv360k.read(tmp_path / "d.jsonl", tmp_path, folder=tmp_path / "kept", **more)


def test_the_last_user_turn_asks(tmp_path):
    said = [
        "Which?\nChoices:\n(A) red\n(B) blue",
        "The answer is B",
        "How many more?",
        "7 - 4 = 3. The answer is 3",
    ]
    found = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]
    system = {"role": "system", "content": "You are a helpful assistant."}
    [query], report = read_lines(tmp_path, {"id": "q", "messages": [system, *found]})
    before = "Question: Which?\nChoices:\n(A) red\n(B) blue\nAnswer: The answer is B"
    assert query.question == f"{before}\n\nHow many more?"
    assert (query.options, query.answer, report.dropped) == (None, "3", {})
    [query], _ = read_lines(tmp_path, {"id": "q", "messages": found[:3]}, unlabelled=True)
    assert query.answer is None and query.question.endswith("How many more?")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("<image>\n<image>\nWhich?", "<image>\n<image>\nWhich?"),
        ("Is <image> larger than <image>?", "Is image 1 larger than image 2?"),
        ("<image>\nand here: <image>.", "<image>\nand here: image 2."),
        ("See <image 2>, not <image 1>", "See image 2, not image 1"),
        ("Two<image><image>", "Two image 1 image 2"),
        ("1 (<image>) 2 (<image>)", "1 (image 1) 2 (image 2)"),
    ],
)
def test_marks_within_a_line_are_named(text, named):
    assert turns.name_marks([text], 2) == [named]
    assert turns.name_marks([text], 1) == [text]


def test_marks_are_counted_over_all_turns():
    assert turns.name_marks(["a <image>", "b", "c <image>"], 2) == ["a image 1", "b", "c image 2"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["(A) 1 cm", "(B) 2 cm"], ("1 cm", "2 cm")),
        (["1 cm", "2 cm"], ("1 cm", "2 cm")),
        (["A. 1", "2"], ("A. 1", "2")),  # one is no rule
        ({"A": "1", "B": 2, "C": None}, ("1", "2")),
        ({"B": "2", "A": "1"}, ("1", "2")),  # by letter, for the answer names one
        ([str(number) for number in range(27)], "too many options"),
        ([], None),
        ("1, 2", "options are no list"),
    ],
)
def test_options_of_a_column(tmp_path, options, expected):
    record = {"question": "Which?", "options": options, "answer": "B" if options else "2"}
    queries, report = read_lines(tmp_path, record)
    assert (queries[0].options if queries else next(iter(report.dropped))) == expected


def test_unusual_names_of_columns(tmp_path):
    record = {"key": "q", "ask": "How many?", "label": 3, "answer": "wrong", "gives": "4"}
    columns = rows.named("id=key, question=ask,answer=label")
    [query], _ = read_lines(tmp_path, record, columns=columns)
    assert (query.id, query.question, query.answer) == ("q", "How many?", "3")
    _, report = read_lines(tmp_path, record, columns=columns._replace(question="asks"))
    assert report.dropped == {"no column 'asks'": 1}
    found, report = read_lines(tmp_path, record, {"ask": "How few?", "label": 2}, columns=columns)
    assert [query.id for query in found] == ["q", "d_1"] and not report.dropped  # not every row has an id
    with pytest.raises(ValueError, match="no row has a column 'options of it'; see data.columns"):
        read_lines(tmp_path, record, columns=columns._replace(options="options of it"))
    with pytest.raises(ValueError, match="'ask=question' is not one of id, images, question"):
        rows.named("id=key,ask=question")


@pytest.mark.parametrize(
    ("given", "dropped"),
    [
        ({"answer_choices": ["x", "y"], "answer": "B"}, True),
        ({"A": "x", "B": "y", "answer": "(b)"}, True),
        ({"A": "x", "B": "y", "answer": "x"}, False),  # free-form, and the rest is something else
        ({"answer": "C"}, False),  # which point?
        ({"tags": ["x", "y"], "answer": "B"}, False),
        ({"answer_choices": [], "answer": "B"}, False),  # as of a table with both kinds of questions
        ({"choices_of": ["x", "y"], "answer": "B", "question": "Which?\nChoices:\n(A) x\n(B) y"}, False),
    ],
)
def test_a_letter_is_no_answer_where_options_were_not_read(tmp_path, given, dropped):
    """The policy would not see them, and would be rewarded for the letter."""
    record = {"question": "Which?"} | given
    queries, report = read_lines(tmp_path, record)
    assert report.dropped == ({"options in an unknown field": 1} if dropped else {})
    assert len(queries) == (not dropped)
    other = {"question": "How many?", "mine": ["3", "4"], "answer": "3"}
    assert len(read_lines(tmp_path, record, other, columns=rows.named("options=mine"))[0]) == 2


@pytest.mark.parametrize(
    ("images", "count"),
    [
        ({"image": {"bytes": None, "path": None}}, 0),
        ({"images": [""]}, 0),
        ({"images": [None]}, 0),
        ({"image_1": "1.png", "image_2": ""}, 1),
        ({"image": "", "image_path": "1.png"}, 1),
        ({"image": {"bytes": None, "path": ""}, "image_1": "1.png"}, 1),
    ],
)
def test_cells_without_an_image(tmp_path, images, count):
    """As tables write that a row has none, or fewer than others."""
    (tmp_path / "1.png").write_bytes(drawn(1))
    record = {"question": "How many?", "answer": "3"} | images
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "d.parquet")
    [query], _ = mathv360k.read(tmp_path / "d.parquet", tmp_path, folder=tmp_path / "images")
    assert len(query.images) == count


def test_numbered_columns_of_images(tmp_path):
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(drawn(number))
    record = {"question": "Is <image 1> left of <image 2>?", "answer": "yes"}
    record |= {"image_2": "2.png", "image_1": "1.png", "image_3": None}
    [query], _ = read_lines(tmp_path, record)
    assert [os.path.basename(path) for path in query.images] == ["1.png", "2.png"]


# ---- which files --------------------------------------------------------------------------------------


def test_which_files_are_meant(tmp_path):
    names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test-00000-of-00001.parquet"]
    (tmp_path / "data").mkdir()
    for name in names:
        pq.write_table(pa.table({"a": [1]}), tmp_path / "data" / name)
    with pytest.raises(ValueError, match="files of test, train: name some of them, as in '.*/data/train\\*'"):
        files.shards(str(tmp_path))
    found = files.shards(str(tmp_path / "data/train-*"))
    assert [os.path.basename(path) for path in found] == names[:2]
    assert files.folder_of(str(tmp_path / "data/train-*")) == str(tmp_path / "data")
    assert files.folder_of(str(tmp_path / "*/train-*")) == str(tmp_path)
    with pytest.raises(FileNotFoundError, match="no file has such a name"):
        files.shards(str(tmp_path / "data/valid-*"))
    (tmp_path / "two").mkdir()
    (tmp_path / "two/train-00000-of-00001.jsonl").write_text("{}")
    for name in ("test.jsonl", "my_test.jsonl", "geo_TEST_1k.jsonl"):
        (tmp_path / "two" / name).write_text("{}")
        with pytest.raises(ValueError, match="files of test, train: name some of them"):
            files.shards(str(tmp_path / "two"))
        (tmp_path / "two" / name).unlink()
    (tmp_path / "two/latest.jsonl").write_text("{}")
    assert len(files.shards(str(tmp_path / "two"))) == 2
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match="splits train, test: name the folder of one"):
        files.shards(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="neither here nor in data/"):
        files.shards(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        (
            "state.json",
            b'{"_data_files": [{"filename": "../x.arrow"}]}',
            "'../x.arrow' of a data file must be",
        ),
        ("state.json", b'{"_data_files": [{"filename": "/x.arrow"}]}', "'/x.arrow' of a data file must be"),
        ("state.json", b'{"_data_files": [{"filename": "link.arrow"}]}', "'link.arrow' of a data file must"),
        ("state.json", b'{"_data_files": [{"filename": "x\\u0000"}]}', r"'x.x00' of a data file must be"),
        (
            "state.json",
            b'{"_data_files": [{"filename": "absent.arrow"}]}',
            "no file 'absent.arrow' beside it",
        ),
        ("state.json", b'{"_data_files": [{"filename": 3}]}', "the name 3 of a data file must be"),
        ("state.json", b'{"_data_files": [{}]}', "the name None of a data file must be"),
        ("state.json", b'{"_data_files": ["a.arrow"]}', "the name None of a data file must be"),
        ("state.json", b'{"_data_files": {"filename": "a.arrow"}}', "an object with a list of '_data_files'"),
        ("state.json", b'{"_data_files": []}', "an object with a list of '_data_files'"),
        ("state.json", b"{}", "an object with a list of '_data_files'"),
        ("state.json", b"[]", "an object with a list of '_data_files'"),
        ("state.json", b"{", "cannot be read"),
        ("state.json", b"[" * 200_000, "cannot be read"),
        ("state.json", b'{"\xff": 1}', "cannot be read"),
        ("state.json", None, "cannot be read"),
        ("dataset_dict.json", b"[]", "an object with a list of 'splits'"),
        ("dataset_dict.json", b'{"splits": "train"}', "an object with a list of 'splits'"),
        ("dataset_dict.json", b"no", "cannot be read"),
        ("dataset_dict.json", None, "cannot be read"),
    ],
)
def test_odd_files_of_a_saved_data_set_are_named(tmp_path, name, text, cause):
    (tmp_path / "link.arrow").symlink_to(__file__)
    if text is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(text)
    with pytest.raises(ValueError, match=f"{name}: .*{cause}.*; save the data set again"):
        files.shards(str(tmp_path))


def test_what_is_said_about_a_saved_data_set_is_not_needed(tmp_path, made_up):
    found, root = made_up
    (as_dataset(tmp_path, root, found) / "dataset_info.json").write_bytes(b"\xff[")
    (tmp_path / "state.json").unlink()
    assert len(files.shards(str(tmp_path))) == 2


@pytest.mark.parametrize(
    ("data", "name", "kind"),
    [
        (b"PAR1....", "x.json", "parquet"),
        (b"ARROW1\0\0", "x", "arrow"),
        (b"\xff\xff\xff\xff\x10", "x.bin", "arrow"),
        (b"\x1f\x8b\x08", "x.json", "lines"),
        (b"[{}]", "x.txt", "json"),
        (b'\xef\xbb\xbf {"a": 1}', "x.txt", "lines"),
        (b"index\timage\n", "x.tsv", "tsv"),
        (b"version https://git-lfs.github.com/spec/v1", "x.parquet", "run git lfs pull"),
        (b"GIF89a", "x.gif", "expected one of .parquet"),
    ],
)
def test_the_format_of_a_file(tmp_path, data, name, kind):
    (tmp_path / name).write_bytes(data)
    try:
        assert files.kind(str(tmp_path / name)) == kind
    except ValueError as error:
        assert kind in str(error)


def test_files_that_would_need_much_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 1000)
    lines = [b'{"question": "1?", "answer": "1"}', b'{"question": "' + b"0" * 5000 + b'"}', b"{}"]
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    queries, report = mathv360k.read(tmp_path / "d.jsonl.gz", tmp_path)
    assert len(queries) == 1 and report.dropped == {"line too long": 1, "wrong types": 1}
    assert report.examples["line too long"] == ["line 2"]
    pq.write_table(pa.table({"image": [bytes(1 << 20)]}), tmp_path / "d.parquet", compression="zstd")
    monkeypatch.setattr(arrow, "INFLATED", (1 << 16, 50))
    with pytest.raises(ValueError, match="row group 0 of column image has .* so it is refused"):
        mathv360k.read(tmp_path / "d.parquet", tmp_path)


REPEATED = """
import json, resource, sys
from mstar_jax.data import files
before, seen = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, {}
for place, record in files.records(sys.argv[1]):
    said = str(record) if isinstance(record, Exception) else record["question"]
    seen[said] = seen.get(said, 0) + 1
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, json.dumps(seen))
"""


def one_value(count, size=10 << 20):
    """The same bytes, `count` times, stored once."""
    index = pa.array(np.zeros(count, np.int32))
    return pa.DictionaryArray.from_arrays(index, pa.array([os.urandom(size)]))


def write_dictionary(table, path):
    """A parquet or Arrow file of a table whose dictionaries stay such; the reader is not told of them."""
    if path.suffix == ".arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, path, store_schema=False, dictionary_pagesize_limit=1 << 30)
    assert path.stat().st_size < 12 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="the memory is counted in KiB there")
@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
def test_values_that_a_dictionary_repeats_take_no_memory(tmp_path, name):
    """An image of 10 MiB, 100,000 times in one row, which would be 1,000 GB, and once in 30 others."""
    lengths = np.concatenate([np.ones(30, np.int32), [100_000], np.zeros(969, np.int32)])
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    listed = pa.ListArray.from_arrays(offsets, one_value(int(lengths.sum())))
    table = pa.table({"images": listed, "question": ["Why?"] * len(lengths)})
    write_dictionary(table, tmp_path / name)
    command = [sys.executable, "-c", REPEATED, str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    more, seen = done.stdout.split(maxsplit=1)
    assert json.loads(seen) == {"Why?": 999, "row too large": 1}
    assert int(more) < 1 << 20, f"{more} KiB"


def test_as_many_rows_are_decoded_as_a_dictionary_allows(tmp_path):
    table = pa.table({"image": one_value(1000), "question": [str(n) for n in range(1000)]})
    write_dictionary(table, tmp_path / "d.parquet")
    with pq.ParquetFile(tmp_path / "d.parquet") as file:
        assert arrow._together("d", file, 0) == (25, [])  # 25 * 10 MiB are 250
    plain = pa.table({"image": one_value(100, 1 << 20).dictionary_decode()})
    pq.write_table(plain, tmp_path / "d.parquet", use_dictionary=False, compression="zstd")
    with pq.ParquetFile(tmp_path / "d.parquet") as file:
        assert arrow._together("d", file, 0) == (
            15,
            [],
        )  # 16 MiB of the 100 that are there, less their lengths


def test_lists_of_numbers_are_read_whatever_their_encoding(tmp_path):
    """Columns of labels are dictionaries as pyarrow writes them; a number takes its width, however stored."""
    labels = [[n % 17 / 16, n / 7] for n in range(5000)]
    steps = [[{"step": "a", "score": each[0]}] * 3 for each in labels]
    table = pa.table({"response": ["a"] * 5000, "labels": labels, "steps_with_score": steps})
    pq.write_table(table, tmp_path / "d.parquet")
    with pq.ParquetFile(tmp_path / "d.parquet") as file:
        of = file.metadata.row_group(0).column(1)
        assert of.has_dictionary_page and of.physical_type == "DOUBLE"
    assert [record for _, record in files.records(str(tmp_path / "d.parquet"))] == table.to_pylist()


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("coded", [False, True])
def test_compressed_batches_of_arrow_are_measured_before_they_are_read(tmp_path, monkeypatch, new, coded):
    values = pa.array([bytes(1 << 20)])
    if coded:
        values = pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), values)
    table = pa.table({"question": ["Why?"], "image": values})
    for name, old in ((None, False), ("zstd", False), ("lz4", False), ("lz4", True)):
        options = pa.ipc.IpcWriteOptions(compression=name, use_legacy_format=old)
        name = "old" if old else name
        with new(tmp_path / f"{name}.arrow", table.schema, options=options) as writer:
            writer.write_table(table)
        assert len(list(files.records(str(tmp_path / f"{name}.arrow")))) == 1
    monkeypatch.setattr(arrow, "INFLATED", (1 << 16, 50))
    assert len(list(files.records(str(tmp_path / "None.arrow")))) == 1
    for name in ("zstd", "lz4", "old"):
        path = tmp_path / f"{name}.arrow"
        with pytest.raises(
            ValueError, match=f"{name}.arrow: the batch at byte .* more than 50 times, so it is"
        ):
            list(files.records(str(path)))
        data = path.read_bytes()
        for end in range(8, min(len(data), 700), 7):  # wherever it was cut, or garbled
            path.write_bytes(data[:end] + b"\xf7" * 9 + data[end + 9 :] if end % 2 else data[:end])
            with contextlib.suppress(ValueError):
                list(files.records(str(path)))


@pytest.mark.parametrize("write", [pq.write_table, pa.feather.write_feather])
def test_views_are_read(tmp_path, write):
    """As polars writes strings and bytes."""
    short, long = pa.array(["1?", None, "3?"] * 9), pa.array([b"much longer than a view", b"", None] * 9)
    table = pa.table({"question": short.cast(pa.string_view()), "image": long.cast(pa.binary_view())})
    listed = pa.ListArray.from_arrays(pa.array(range(28), pa.int32()), table["question"].chunk(0))
    table = table.append_column("steps", listed)
    write(table, str(tmp_path / "d"))
    assert [record for _, record in files.records(str(tmp_path / "d"))] == table.to_pylist()


def test_arrays_that_share_memory_are_refused(tmp_path, monkeypatch):
    encoded = pa.RunEndEncodedArray.from_arrays([3], pa.array(["Why?"]))
    write_dictionary(pa.table({"question": encoded}), tmp_path / "d.arrow")
    with pytest.raises(ValueError, match="d.arrow: question is run_end_encoded.* cast it to"):
        list(files.records(str(tmp_path / "d.arrow")))
    coded = pa.DictionaryArray.from_arrays(pa.array([0, 0]), pa.array([["a"]], pa.list_view(pa.string())))
    write_dictionary(pa.table({"question": coded}), tmp_path / "d.arrow")
    with pytest.raises(ValueError, match="d.arrow: question is list_view.* cast it to"):
        list(files.records(str(tmp_path / "d.arrow")))
    monkeypatch.setattr(arrow, "MOST_VALUES", 1000)
    pq.write_table(pa.table({"images": [[None] * 1000, ["a"]]}), tmp_path / "d.parquet")
    with pytest.raises(
        ValueError, match="group 0 of column images.* may hold 1000 values .* so it is refused"
    ):
        list(files.records(str(tmp_path / "d.parquet")))


@pytest.mark.parametrize(
    ("array", "least", "most"),
    [
        (pa.array([1, 2]), 16, 200),
        (pa.array([b"0" * 1000]), 1000, 1200),
        (pa.array([[b"0" * 1000] * 3, None]), 3000, 4000),
        (pa.array([{"a": b"0" * 1000, "b": None}]), 1000, 2000),
        (pa.array([[("a", 1)] * 10, [("b", 2)]], pa.map_(pa.string(), pa.int8())).slice(1), 1, 400),
        (one_value(7, 1000), 7000, 8000),
        (one_value(7, 1000).slice(5), 2000, 3000),
        (pa.array([[None] * 1000], pa.list_(pa.null())), 8000, 80_000),
        (pa.array([b"0" * 1000, None, b"1" * 1000] * 2, pa.binary_view()).slice(1, 4), 2000, 3000),
        (one_value(7, 1000).cast(pa.dictionary(pa.int32(), pa.large_binary())), 7000, 8000),
        (pa.DictionaryArray.from_arrays(pa.array([0] * 9), pa.array(range(1000))), 9 * 8, 1000),
    ],
)
def test_what_values_take_in_python(array, least, most):
    assert least <= arrow._weight(array) <= most


def test_damaged_files_are_named(tmp_path, made_up):
    found, root = made_up
    for make in (as_parquet, as_arrow_file):
        path = make(tmp_path, root, found)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=f"{path.name}, from row .*: broken"):
            mathv360k.read(path, root, folder=tmp_path / "kept")


def test_an_arrow_file_whose_offsets_lead_out_of_it(tmp_path):
    """pyarrow checks none of them, and the process would end with a segmentation fault."""
    table = pa.table({"question": ["1?", "2?"], "image": pa.array([b"x" * 5, b"y" * 7], pa.binary())})
    with pa.OSFile(str(tmp_path / "d.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data, offsets = (tmp_path / "d.arrow").read_bytes(), np.array([0, 5, 12], np.int32).tobytes()
    assert data.count(offsets) == 1
    broken = data.replace(offsets, np.array([0, 1 << 30, 12], np.int32).tobytes())
    (tmp_path / "d.arrow").write_bytes(broken)
    code = "import sys; from mstar_jax.data import files; list(files.records(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "d.arrow")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "d.arrow, from row 0: broken Arrow file" in done.stderr


@pytest.mark.parametrize("lists", [False, True])
def test_a_text_that_is_not_utf8_hides_no_offset(tmp_path, lists):
    values = pa.array([b"\xff\xfe", b"no UTF-8"]).view(pa.string())
    other = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), values)
    table = pa.table({"question": ["1?", "2?"], "steps": other if lists else values})
    with pa.ipc.new_stream(tmp_path / "d.arrow", table.schema) as writer:
        writer.write_table(table)
    assert [str(record) for _, record in files.records(str(tmp_path / "d.arrow"))][0] == "text is not UTF-8"
    data = (tmp_path / "d.arrow").read_bytes()
    there = struct.pack("<3i", *((0, 1, 2) if lists else (0, 2, 10)))
    assert data.count(there) == 1
    (tmp_path / "d.arrow").write_bytes(data.replace(there, struct.pack("<3i", 0, 1, 1 << 30)))
    with pytest.raises(ValueError, match="from row 0: broken Arrow file.*1073741824"):
        list(files.records(str(tmp_path / "d.arrow")))


def test_compression_as_arrow_017_wrote_it_is_measured(tmp_path, monkeypatch):
    """It is in the batch's metadata, and the field that says it now is absent."""
    table, name = pa.table({"image": [bytes(1 << 20)]}), {"ARROW:experimental_compression": "zstd"}
    options = pa.ipc.IpcWriteOptions(compression="zstd", metadata_version=pa.ipc.MetadataVersion.V4)
    with pa.ipc.new_stream(tmp_path / "d.arrow", table.schema, options=options) as writer:
        writer.write_batch(table.to_batches()[0], custom_metadata=name)
    data = bytearray((tmp_path / "d.arrow").read_bytes())
    at = 16 + struct.unpack_from("<I", data, 4)[0]  # of the batch's header, behind the schema
    header = bytes(data[at:])
    batch = arrow._inner(header, struct.unpack_from("<I", header)[0], 2)
    known = batch - struct.unpack_from("<i", header, batch)[0]
    struct.pack_into("<H", data, at + known + 4 + 2 * 3, 0)
    (tmp_path / "d.arrow").write_bytes(data)
    assert pa.ipc.open_stream(tmp_path / "d.arrow").read_all() == table
    monkeypatch.setattr(arrow, "INFLATED", (1 << 16, 50))
    with pytest.raises(ValueError, match="d.arrow: the batch at byte .* more than 50 times, so it is"):
        list(files.records(str(tmp_path / "d.arrow")))


def test_a_batch_that_only_the_footer_names(tmp_path):
    table = pa.table({"question": ["1?"]})
    with pa.ipc.new_file(tmp_path / "d.arrow", table.schema) as writer:
        writer.write_table(table)
    data = (tmp_path / "d.arrow").read_bytes()
    at = 16 + struct.unpack_from("<I", data, 12)[0]  # of the batch, behind the schema
    moved = data[at:].replace(struct.pack("<q", at), struct.pack("<q", at + 8))
    (tmp_path / "d.arrow").write_bytes(data[:at] + b"\xff" * 4 + bytes(4) + moved)
    assert pa.ipc.open_file(tmp_path / "d.arrow").read_all() == table
    with pytest.raises(ValueError, match="broken Arrow file.*the footer names 1 batches more"):
        list(files.records(str(tmp_path / "d.arrow")))


def test_times_that_python_does_not_know_are_not_needed(tmp_path):
    """As pandas and others write them; a row is lost only where its question or answer is one."""
    times = pa.array([1_700_000_000_123_456_789, None], pa.timestamp("ns"))
    odd = pa.array([86_400_001, None], pa.date64())
    table = pa.table({"question": ["1?", "2?"], "answer": [1, 2], "seen": times, "day": odd})
    pa.feather.write_feather(table, str(tmp_path / "d.arrow"))
    pq.write_table(table, tmp_path / "d.parquet")
    for name in ("d.arrow", "d.parquet"):
        queries, report = mathv360k.read(tmp_path / name, tmp_path)
        assert [query.answer for query in queries] == ["1", "2"] and not report.dropped
        columns = rows.named("answer=seen")
        assert "wrong types" in mathv360k.read(tmp_path / name, tmp_path, columns=columns)[1].dropped


def test_images_inside_need_a_folder(tmp_path, made_up):
    found, root = made_up
    with pytest.raises(ValueError, match="there is no folder to write them to"):
        mathv360k.read(as_parquet(tmp_path, root, found), root)


# ---- broken rows --------------------------------------------------------------------------------------

SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>'


def bomb():
    data = drawn(0)
    header = data[12:16] + (60000).to_bytes(4) * 2 + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4) + data[33:]


BROKEN_IMAGES = {
    "undecodable image": {"bytes": drawn(1)[:400], "path": None},
    "empty image": {"bytes": b"", "path": None},
    "image too large": {"bytes": bomb(), "path": None},
    "SVG image": {"bytes": SVG, "path": "x.png"},
    "image is a URL": {"bytes": None, "path": "https://example.com/x.png"},
    "image path leaves the root": {"bytes": None, "path": "../x.png"},
    "missing image": {"bytes": None, "path": "A/none.png"},
}


def test_broken_rows_in_parquet(tmp_path):
    good = {"bytes": drawn(0), "path": None}
    kept = [(f"good{n}", [good], f"<image>\nHow many of {n}?", "3") for n in range(5)]
    broken = [(cause, [image], "<image>\nHow many?", "3") for cause, image in BROKEN_IMAGES.items()]
    broken += [
        ("no answer", [good], "<image>\nHow many?", ""),
        ("long text answer", [good], "<image>\nHow?", "By a train that left the city at noon"),
        ("options without gold", [good], "<image>\nWhich?\nChoices:\n(A) 1\n(B) 2", "The answer is E"),
        ("image marks do not match images", [good], "<image> <image>\nWhich?", "3"),
        ("turns are not questions and answers in turn", [good], None, "3"),
        ("no question", [good], "<image>", "3"),
    ]
    found = [row for pair in zip(broken, kept * 3) for row in pair]
    table = pa.table(
        {
            "id": [f"{number}: {name}" for number, (name, *_) in enumerate(found)],
            "image": pa.array([images for _, images, *_ in found], pa.list_(IMAGE)),
            "conversations": pa.array(
                [
                    [{"from": "human", "value": human}] * (human is not None)
                    + [{"from": "gpt", "value": gpt}]
                    for *_, human, gpt in found
                ],
                pa.list_(TURN),
            ),
        }
    )
    pq.write_table(table, tmp_path / "d.parquet")
    queries, report = mathv360k.read(tmp_path / "d.parquet", tmp_path, folder=tmp_path / "kept")
    repeated = len(broken) - len(kept)
    assert report.dropped == {cause: 1 for cause, *_ in broken} | {"duplicate": repeated}
    assert len(queries) == report.kept == 5 and report.rows == 2 * len(broken)
    assert report.examples["SVG image"] == ["row 6: 6: SVG image"]
    assert "1  image is a URL (row 8: 8: image is a URL)" in str(report)
    assert [name for name in os.listdir(tmp_path / "kept") if name.startswith(".")] == []
    assert len(os.listdir(tmp_path / "kept")) == 1  # one picture, whatever it is called


def test_values_that_are_too_large_or_too_deep(tmp_path):
    records = [{"question": f"{n}?", "answer": "1"} for n in range(3)]
    records[1]["id"] = records[2]["answer"] = 10**400  # no float is as large
    queries, report = read_lines(tmp_path, *records)
    assert [query.id for query in queries] == ["d_0", str(10**400), "d_2"] and not report.dropped
    assert queries[2].answer == str(10**400)
    nested: object = "x.png"
    for _ in range(sys.getrecursionlimit()):
        nested = {"path": nested}
    with pytest.raises(turns.Unreadable, match="wrong types"):
        rows.shown(nested)


def test_many_rows_of_one_id(tmp_path):
    """The work grows with the rows, not with their square."""
    looked = []

    class Names(set):
        def __contains__(self, name):
            looked.append(name)
            return super().__contains__(name)

    taken, tried = Names({"a", "a_3"}), {}
    for number in range(100):
        name = mathv360k.free_name("a", taken, tried)
        assert name == ("a_2" if number == 0 else f"a_{number + 3}")
        taken.add(name)
    assert len(looked) == 201
    queries, report = read_lines(
        tmp_path, *({"id": name, "question": f"{n}?", "answer": 1} for n, name in enumerate("aabaa"))
    )
    assert [query.id for query in queries] == ["a", "a_2", "b", "a_3", "a_4"] and report.renamed == 3


def test_text_that_is_not_utf8_in_parquet(tmp_path):
    answers = pa.array([b"1", b"\xff\xfe", b"3"], pa.binary()).view(pa.string())  # not checked when written
    pq.write_table(pa.table({"question": ["1?", "2?", "3?"], "answer": answers}), tmp_path / "d.parquet")
    queries, report = mathv360k.read(tmp_path / "d.parquet", tmp_path)
    assert [query.answer for query in queries] == ["1", "3"] and report.dropped == {"text is not UTF-8": 1}


def test_broken_messages(tmp_path):
    def asked(*parts, answer="3"):
        content = [*parts, {"type": "text", "text": "How many?"}]
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}

    def image(url):
        return {"type": "image_url", "image_url": {"url": url}}

    svg = "data:image/svg+xml;base64," + base64.b64encode(SVG).decode()
    broken = {
        "content part of an unknown type": asked({"type": "video", "video": "a.mp4"}),
        "image is a URL": asked(image("http://example.com/x.png")),
        "broken base64": asked(image("data:image/png;base64,???")),
        "SVG image": asked(image(svg)),
        "image path leaves the root": asked({"type": "image", "image": "/etc/passwd"}),
        "missing image": asked({"type": "image", "image": "none.png"}),
        "image marks do not match images": asked({"type": "image"}),
        "turns are not questions and answers in turn": {"messages": asked()["messages"][::-1]},
        "wrong types": {"messages": [{"role": "user", "content": 3}]},
        "no answer": asked(answer=[]),
        "long text answer": asked(answer=[{"type": "text", "text": "Many more than I would have thought"}]),
    }
    queries, report = read_lines(tmp_path, asked(), *broken.values())
    assert report.dropped == dict.fromkeys(broken, 1) and len(queries) == 1
    assert report.examples["image is a URL"] == ["line 3"]


# ---- responses that exist -----------------------------------------------------------------------------


def test_rationales(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(drawn(number))
    (tmp_path / "copy.png").write_bytes(drawn(2))

    def row(name, image, question, response, **more):
        return conversation(name, image, f"<image>\n{question}", response) | more

    labelled = Query("known", (str(tmp_path / "0.png"),), "How many?", answer="5", answer_type="integer")
    hidden = Query("hidden", (str(tmp_path / "2.png"),), "Which?", answer="red")
    found = [
        row("a", "0.png", "How many?", "2 + 2 = 4\nThe answer is 4"),  # the labelled query's gold is another
        row("b", "0.png", "How many?", "2 + 3 = 5\nThe answer is 5"),
        row("known", "0.png", "Please count.", "One more than 4.\nThe answer is 5"),  # its id, and its image
        row("c", "1.png", "How long?", "The answer is 7", answer="8"),  # its own column's
        row("d", "1.png", "How wide?", "3 * 3 = 9\nThe answer is 9"),  # what it ends in
        row("d", "1.png", "How high?", "The answer is 2"),
        row("e", "1.png", "How deep?", "The answer is 1"),
        row("f", "1.png", "How deep?", "The answer is 2"),  # one of the two is wrong
        row("g", "copy.png", "Where?", "The answer is there"),  # a copy of a validation image
        row("h", "1.png", "Why?", "I do not know at all, I fear."),
    ]
    (tmp_path / "d.json").write_text(json.dumps(found))
    more = {"folder": tmp_path, "labelled": [labelled], "kept_apart": [hidden]}
    rationales, report = given.read(tmp_path / "d.json", tmp_path, "rationales", **more)
    host = types.SimpleNamespace(
        grading=custom.grading("", 1.0),
        processor=types.SimpleNamespace(encode_response=lambda text: [1] * len(text)),
        sampling=types.SimpleNamespace(max_new_tokens=30),
    )
    queries, responses = stage.judged(host, rationales)
    assert [query.id for query in queries] == ["known", "c", "d", "d_2"]
    verdicts = {name: [(r.verdict, r.truncated) for r in group] for name, group in responses.items()}
    assert verdicts == {
        "known": [("wrong", False), ("correct", False), ("correct", True)],
        "c": [("wrong", False)],
        "d": [("correct", False)],
        "d_2": [("correct", False)],
    }
    assert [r.sample for r in responses["known"]] == [0, 1, 2]
    cause = "image of the validation or test split"
    assert report.dropped == {"conflicting answers": 2, cause: 1, "long text answer": 1}


def test_questions_without_images_are_kept_apart_too(tmp_path):
    hidden = Query("hidden", (), "How many?", answer="5")
    lines = [{"question": asked, "response": "2 + 3 = 5\nThe answer is 5"} for asked in ("How many?", "Why?")]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, report = given.read(
        tmp_path / "d.jsonl", tmp_path, "rationales", folder=tmp_path, kept_apart=[hidden]
    )
    assert [row.query.question for row in found] == ["Why?"]
    assert report.dropped == {"question of the validation or test split": 1}


def steps(tmp_path, *records, **more):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return given.read(tmp_path / "d.jsonl", tmp_path, "steps", folder=tmp_path, **more)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"steps": ["a", "b"], "labels": [1, 0.25]}, ("a\nb", (1.0, 0.25))),
        ({"steps": ["a\nmore", "b"], "labels": ["+", "-"]}, ("a more\nb", (1.0, 0.0))),
        ({"steps": "a\n\nb", "labels": [True, False]}, ("a\nb", (1.0, 0.0))),
        ({"steps_with_score": [{"step": "a", "score": 0.5}]}, ("a", (0.5,))),
        ({"steps": [{"text": "a", "label": "-"}]}, ("a", (0.0,))),
        ({"steps": ["a", "b"], "labels": [1]}, "not a label for each step"),
        ({"steps": ["a", "b"]}, "not a label for each step"),
        ({"steps": [], "labels": []}, "not a label for each step"),
        ({"steps": ["a", " "], "labels": [1, 1]}, "empty step"),
        ({"steps": ["a"], "labels": [1.5]}, "label outside of 0..1"),
        ({"steps": ["a"], "labels": [float("nan")]}, "label outside of 0..1"),
        ({"steps": ["a"], "labels": ["good"]}, "wrong types"),
        ({"labels": [1]}, "no steps"),
    ],
)
def test_labelled_steps(tmp_path, record, expected):
    found, report = steps(tmp_path, {"question": "How many?", **record})
    assert ([(row.response, row.labels) for row in found] or list(report.dropped)) == [expected]


def judged(*said):
    """A conversation of VisualPRM400K, each step with its sign after it."""
    turns = [{"from": "system", "value": "You are an advanced AI assistant, ..."}]
    for step in said:
        turns += [{"from": "human", "value": step[:-1]}, {"from": "gpt", "value": step[-1]}]
    return {
        "id": -1,
        "image": "train/1471/img_diagram.png",
        "conversations": turns,
    }


def placed(folder, name):
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_bytes(drawn(0))


HEAD = "### Question:\n<image>\nFind x.\nA. 26\nB. 52\n\n### Solution Process:\n"


@pytest.mark.parametrize(
    ("record", "labels", "answer"),
    [
        (judged(f"{HEAD}Half of it is 26.+", "Twice 26 is 52.+", "Final answer: A-"), (1, 1, 0), None),
        (
            {
                "image": "VisualPRM400K-v1.1-Raw/Geometry3K/train/1471/img_diagram.png",
                "question": "<image>\nFind x.\nA. 26\nB. 52",
                "answer": "B",
                "response": "Half of it is 26.\n\nTwice 26 is 52.\n\nFinal answer: A",
                "steps_with_score": [
                    {"step": "Half of it is 26.", "score": 0.9375, "num_mc_correct": 15, "num_mc_total": 16},
                    {"step": "Twice 26 is 52.", "score": 1.0, "num_mc_correct": 16, "num_mc_total": 16},
                    {"step": "Final answer: A", "score": 0.0, "num_mc_correct": 0, "num_mc_total": 16},
                ],
                "num_mc_sequences": 16,
            },
            (0.9375, 1, 0),
            "B",
        ),
    ],
)
def test_rows_of_visualprm400k(tmp_path, record, labels, answer):
    placed(tmp_path, record["image"])
    [row], report = steps(tmp_path, record)
    assert (row.query.question, row.query.options, row.query.answer) == ("Find x.", ("26", "52"), answer)
    assert row.response == "Half of it is 26.\nTwice 26 is 52.\nFinal answer: A" and row.labels == labels
    assert row.query.images == (str(tmp_path / record["image"]),) and report.dropped == {}
    named = {"talk" if key == "conversations" else key: value for key, value in record.items()}
    columns = rows.named("turns=talk,question=ask" if "talk" in named else "")
    assert steps(tmp_path, named, columns=columns)[0] == [row]


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        (judged("Find x.+"), "no steps"),  # no question and first step
        (judged(f"{HEAD}a+", "b5"), "no steps"),
        (judged(f"{HEAD}a+", " -"), "empty step"),
        (judged(f"{HEAD}a+", "b+") | {"image": ["a.png", "b.png"]}, "image marks do not match images"),
        ({"conversations": [{"from": "gpt", "value": "+"}]}, "turns are not questions and answers in turn"),
        ({"conversations": "x"}, "wrong types"),
    ],
)
def test_conversations_without_labelled_steps_are_counted(tmp_path, record, cause):
    assert steps(tmp_path, record)[1].dropped == {cause: 1}


def test_columns_of_steps_count_where_a_conversation_says_them_too(tmp_path):
    """As in VL-PRM300K."""
    more = {"question": "<image>\nFind y.", "steps_with_score": [{"step": "c", "score": 0.0625}]}
    record = judged(f"{HEAD}a+", "b-") | more
    placed(tmp_path, record["image"])
    [row], _ = steps(tmp_path, record)
    assert (row.query.question, row.response, row.labels) == ("Find y.", "c", (0.0625,))


def test_rows_of_mmpr_are_rationales(tmp_path):
    record = {
        "image": "train/1471/img_diagram.png",
        "question": "<image>\nFind x.\nA. 26\nB. 52",
        "chosen": "Half of it is 26.\n\nTwice 26 is 52.\n\nFinal answer: B",
        "rejected": "It is 26.\n\nFinal answer: A",
    }
    placed(tmp_path, record["image"])
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    columns = rows.named("response=chosen")
    [row], report = given.read(tmp_path / "d.jsonl", tmp_path, "rationales", folder=tmp_path, columns=columns)
    assert (row.query.question, row.query.answer, row.response) == ("Find x.", "B", record["chosen"])
    assert report.dropped == {}


def test_types_of_arrow_that_json_has_not(tmp_path):
    """Decimals, as DuckDB and Spark write numbers; UUIDs; a Sequence of structs, as `datasets` stores it."""
    exact = pa.array([Decimal("0.5"), Decimal(0)], pa.decimal128(38, 9))
    names = [uuid.UUID(int=number) for number in range(2)]
    ids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([each.bytes for each in names], pa.binary(16)))
    told = [{"from": ["human", "gpt"], "value": [f"{n}?", "So it is"]} for n in range(2)]
    scored = pa.StructArray.from_arrays(
        [
            pa.array([["a"], ["b"]]),
            pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), exact),
        ],
        ["step", "score"],
    )
    pq.write_table(pa.table({"id": ids, "conversations": told, "answer": exact}), tmp_path / "d.parquet")
    queries, report = mathv360k.read(tmp_path / "d.parquet", tmp_path, columns=rows.named("answer=answer"))
    found = [(query.id, query.question, query.answer) for query in queries]
    expected = ("0.5", "0")
    assert found == [(str(names[n]), f"{n}?", expected[n]) for n in range(2)] and not report.dropped
    pq.write_table(pa.table({"question": ["0?", "1?"], "steps_with_score": scored}), tmp_path / "s.parquet")
    judged, _ = given.read(tmp_path / "s.parquet", tmp_path, "steps", folder=tmp_path)
    assert [(row.response, row.labels) for row in judged] == [("a", (0.5,)), ("b", (0.0,))]


def test_labelled_responses_train_and_are_held_out_by_image(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(drawn(number))
    found = [
        {"image": f"{n % 4}.png", "question": f"{n // 4}?", "steps": ["a", text], "labels": [1, label]}
        for n in range(16)
        for text, label in (("The answer is 1", 1), ("The answer is 2", 0.4))
    ]
    found[0]["answer"] = "2"
    data, _ = steps(tmp_path, *found)
    config = ConfigDict({"prm": {"held_out": 3}, "warmup": {"queries": 3}})
    sampling = types.SimpleNamespace(max_new_tokens=99)
    run = types.SimpleNamespace(
        steps=data,
        seed=0,
        grading=custom.grading("", 1.0),
        sampling=sampling,
        config=config,
        processor=types.SimpleNamespace(encode_response=lambda text: [1] * len(text)),
        rationales=(),
        labelled=[],
    )
    labelled = stage.given_labels(run)
    assert len(labelled.held_out) == 3
    hidden = {image for query in labelled.held_out for image in query.images}
    assert not hidden & {image for query in labelled.trained for image in query.images}
    assert len(labelled.trained) == 4 * (4 - len(hidden)) and len(labelled.labels) == 32
    for query in [*labelled.trained, *labelled.held_out]:
        verdicts = [r.verdict for r in labelled.responses[query.id]]
        assert verdicts == (["wrong", "correct"] if query.answer == "2" else ["correct", "wrong"])
        assert [labelled.labels[query.id, sample] for sample in (0, 1)] == [(1.0, 1.0), (1.0, 0.4)]
    warmup = [row.query for row in data if not row.query.images[0].endswith("3.png")]
    run.labelled = [dataclasses.replace(query, id=f"warmup {n}") for n, query in enumerate(warmup)]
    config.warmup.queries = len(warmup)
    held_out = stage.given_labels(run).held_out
    assert [pathlib.Path(query.images[0]).name for query in held_out] == ["3.png"] * 3


# ---- the command --------------------------------------------------------------------------------------


def test_the_command_shows_what_was_understood(tmp_path, made_up, capsys, monkeypatch):
    judged, of_a_row = [], look.facts
    monkeypatch.setattr(look, "facts", lambda *row: judged.append(row) or of_a_row(*row))
    found, root = made_up
    path = as_parquet(tmp_path, root, [*found, conversation("bad", [], "Why?", "")])
    with flagsaver.flagsaver():
        flags.FLAGS(["data", f"--page={tmp_path / 'look.html'}"])
        look.main(["data", str(path)])
    shown = capsys.readouterr().out
    assert len(judged) == 10  # a response to judge takes long
    assert shown.count("question  ") == 10 and "kept 60 of 61 rows" in shown
    assert "dropped      1  no answer (row 60: bad)" in shown
    assert "options   (A) yes\n          (B) no\ngold      B (choice)" in shown
    assert "questions: 60, about 23 images" in shown and "sources: A 30, B 30" in shown
    page = (tmp_path / "look.html").read_text()
    assert page.count("data:image/png;base64,") == 12 and "no answer (row 60: bad)" in page


def test_lengths_in_tokens(tmp_path, made_up, monkeypatch):
    """Those of the prompts as they are encoded for training."""
    found, root = made_up
    processor = tiny.processor(tmp_path / "tokenizer")
    monkeypatch.setattr(
        configure, "make_policy", lambda *_: types.SimpleNamespace(processor=lambda: processor)
    )
    config = tiny_config.get_config()
    queries, report = mathv360k.read(as_json(tmp_path, root, found), root)
    with pytest.raises(ValueError, match="name a --workdir of its run"):
        look.lengths(queries, config, None)
    planned = look.lengths(queries, config, tmp_path)
    texts = [prompts.render(config.prompts.cot, query) for query in queries]
    encoded = [
        processor.prefix(text, [pictures.size(image) for image in query.images])
        for text, query in zip(texts, queries)
    ]
    lengths = sorted(len(each.tokens) for each in encoded)
    assert sorted(prompt.length for prompt in planned if prompt) == lengths
    config.data.max_prompt = lengths[40]
    about = dict(look.summary([given.Given(q, "") for q in queries], report, planned, config))
    over = sum(length > lengths[40] for length in lengths)
    assert about["prompts"].startswith(f"{lengths[0]} to {lengths[-1]} tokens, ")
    assert about["prompts"].endswith(f"; {over} of 60 over data.max_prompt = {lengths[40]}")


# ---- large files --------------------------------------------------------------------------------------

STREAMED = """
import itertools, json, sys, time
from mstar_jax.data import mathv360k, pixels
start = time.monotonic()
stream = mathv360k.stream(sys.argv[1], sys.argv[2], folder=sys.argv[2])
rows = list(itertools.islice(stream, 16))
pictures = [pixels.load_image(row.query.images[0]) for row in rows]
first = time.monotonic() - start
count = len(rows) + sum(isinstance(row, mathv360k.Found) for row in stream)
peak = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")][0] * 1024
print(json.dumps({"first": first, "all": time.monotonic() - start, "rows": count, "peak": peak}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the memory is read from /proc")
@pytest.mark.parametrize("group", [100, 500])
def test_a_file_larger_than_the_memory_it_may_take(tmp_path, group):
    """3 GB of PNG files in parquet, in row groups of 0.1 and 0.5 GB: the first images are there within
    10 s, and all of them are read in less than 1.5 GB."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG", compress_level=0)
    data, path, count = file.getvalue(), tmp_path / "d.parquet", 0
    turns = [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "3"}]
    schema = pa.schema({"image": IMAGE, "conversations": pa.list_(TURN)})
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        while path.stat().st_size < 3e9:
            some = [{"bytes": data + n.to_bytes(8), "path": None} for n in range(count, count + group)]
            columns = [pa.array(some, IMAGE), pa.array([turns] * len(some), pa.list_(TURN))]
            writer.write_table(pa.table(columns, schema=schema), row_group_size=group)
            count += len(some)
    command = [sys.executable, "-c", STREAMED, str(path), str(tmp_path / "kept")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found = json.loads(done.stdout)
    print(found)
    assert found["rows"] == count and found["first"] < 10 and found["peak"] < 1.5e9


# ---- whole runs ---------------------------------------------------------------------------------------

LONGER = {"data.max_prompt": 320, "data.buckets": (344,), "data.validation": 4, "data.test": 4}


@pytest.fixture
def one_device(monkeypatch):
    one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])  # compiles sooner than eight
    monkeypatch.setattr(sharding, "make_mesh", one)


def finished(workdir, path, root, **values):
    """The records of a run on a file, and the tokens of all its rollouts."""
    config = test_evolve.small()
    config.update_from_flattened_dict(LONGER | {"data.labelled": str(path), "data.root": str(root)})
    config.update_from_flattened_dict(values)
    test_evolve.run(config, workdir)
    lines = [json.loads(line) for p in sorted(workdir.glob("rollouts/*/*.jsonl")) for line in p.open()]
    return test_evolve.results(workdir), [[r["tokens"] for r in line["responses"]] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("real", [False, True])
def test_a_run_is_the_same_from_every_format(tmp_path, made_up, one_device, real):
    found, root = made_up
    if real:
        if not REAL.is_dir():
            pytest.skip("no real data next to the checkout")
        root, found = REAL, [row for name in ("PuzzleVQA", "TabMWP") for row in real_rows(name)[::20]]
    expected = finished(tmp_path / "json", as_json(tmp_path, root, found), root)
    assert len(expected[1]) > 20
    for make in (as_parquet, as_dataset, as_messages_with_data):
        (folder := tmp_path / make.__name__).mkdir()
        assert finished(folder / "run", make(folder, root, found), root) == expected


@pytest.mark.slow
def test_a_run_on_rationales_and_labels_that_exist(tmp_path, made_up, one_device):
    found, root = made_up
    path = as_json(tmp_path, root, found)
    rationales, labelled = [], []
    for row in found:
        human, gpt = (turn["value"] for turn in row["conversations"])
        right, wrong = (
            f"I see.\n{gpt if 'answer' in gpt else f'The answer is {gpt}'}",
            "I see.\nThe answer is 77",
        )
        rationales += [conversation(row["id"], row["image"], human, text) for text in (right, wrong)]
        for text, label in ((right, 1.0), (wrong, "-")):
            more = {"question": human, "steps": text.split("\n"), "labels": [0.5, label]}
            labelled.append({"id": row["id"], "image": row["image"], **more})
    (tmp_path / "rationales").mkdir()
    (tmp_path / "steps").mkdir()
    values = {"warmup.data": str(as_parquet(tmp_path / "rationales", root, rationales))}
    values |= {"prm.data": str(as_lines(tmp_path / "steps", root, labelled)), "prm.root": str(root)}
    values |= {"sampling.max_new_tokens": 24}
    records, _ = finished(tmp_path / "run", path, root, **values)
    assert not (tmp_path / "run/labels").exists()
    names = {each.name for each in (tmp_path / "run/rollouts").iterdir()}
    assert not names & {"warmup", "prm"} and {"warmup_validation", "iteration_01"} <= names
    warmup = next(record for record in records if record["stage"] == "warmup")
    given = warmup["given"]
    assert given["wrong"] > 10 and given["correct"] > 10 and warmup["kept"] == given["correct"]
    [held_out] = [record for record in records if record["stage"] == "prm"]
    assert held_out["n"] == 4 and held_out["responses"] == 8 and held_out["steps"] == 16
