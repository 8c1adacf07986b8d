"""The rollout store: what is written comes back, whole or not at all."""

import dataclasses
import json
import os

import pytest

from mstar_jax import store
from mstar_jax.structs import Query, Response

ASKED = ("a", "b", "c", "d")  # what each shard answers
SETTINGS = {"branches": 4, "temperatures": (0.0, 0.7), "prompt": "{question}", "seed": 0}


def records(*args):
    return [store.rollout(*group) for group in groups(*args)]


def groups(first, count, text="Sum 1 + 2 = 3"):
    out = []
    for i in range(first, first + count):
        query = Query(f"q{i}", (f"/images/{i}.png",), "How many?", answer=None if i % 2 else "3")
        bare = Response(query.id, 0, text, (5, 9, 7), -0.1 - i / 3, i % 2 == 0)
        full = dataclasses.replace(
            bare,
            sample=1,
            answer="3",
            verdict="correct",
            step_scores=(0.1, 1 / 3),
            iteration=2,
            temperature=0.7,
        )
        out.append((query, [bare, full]))
    return out


@pytest.mark.parametrize("text", ["", 'a\nb\t"c" ½', "cut\u2028here\x85and\u2029there\x0c\x1e", "\ufffd\x00"])
def test_round_trip(tmp_path, text):
    one = store.Store(tmp_path / "iteration_01", SETTINGS)
    one.write(1, records(2, 3, text), ASKED[1])
    one.write(0, records(0, 2, text), ASKED[0])
    again = store.Store(tmp_path / "iteration_01", SETTINGS)
    assert list(again.read(2, store.read_rollout)) == [
        (query.id, responses) for query, responses in groups(0, 5, text)
    ]
    assert again.missing(ASKED) == [2, 3]


def test_a_person_can_read_a_shard(tmp_path):
    store.Store(tmp_path, SETTINGS).write(0, records(0, 1, "½"), ASKED[0])
    record = json.loads((tmp_path / "00000.jsonl").read_text("utf-8"))
    assert {k: record[k] for k in ("query", "question", "images", "gold")} == {
        "query": "q0",
        "question": "How many?",
        "images": ["/images/0.png"],
        "gold": "3",
    }
    assert "½" in (tmp_path / "00000.jsonl").read_text("utf-8")


def test_a_shard_is_whole_or_absent(tmp_path, monkeypatch):
    one = store.Store(tmp_path, SETTINGS)
    one.write(0, records(0, 1), ASKED[0])

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        one.write(1, records(1, 2), ASKED[1])
    monkeypatch.undo()
    assert [p.name for p in tmp_path.glob("00001.*.part*")]  # left by the kill
    again = store.Store(tmp_path, SETTINGS)
    assert again.missing(ASKED[:2]) == [1]
    assert [name for name, _ in again.read(1, store.read_rollout)] == ["q0"]
    again.write(1, records(1, 2), ASKED[1])
    assert [name for name, _ in again.read(2, store.read_rollout)] == ["q0", "q1", "q2"]


def test_what_is_no_shard_is_not_read(tmp_path, caplog):
    """A copy under another name, and a shard beyond the last one, as of another run."""
    made = store.Store(tmp_path, SETTINGS)
    made.write(0, records(0, 2), ASKED[0])
    made.write(1, records(2, 1), ASKED[1])
    for name in ("00000 copy.jsonl", "00000_2.jsonl", "00007.jsonl"):
        (tmp_path / name).write_bytes((tmp_path / "00000.jsonl").read_bytes())
    made.complete(2)
    assert [query for query, _ in made.read(2, store.read_rollout)] == ["q0", "q1", "q2"]
    assert len(caplog.records) == 3 and "00007.jsonl: no shard of this store, which has 2" in caplog.text


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"a": 1}'])
def test_json_that_is_no_such_object_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="x.json: damaged, not an object with stages; restore it"):
        store.read_json(tmp_path / "x.json", "stages")


def test_other_settings_are_refused(tmp_path):
    store.Store(tmp_path, SETTINGS)
    changed = SETTINGS | {"temperatures": (0.0, 1.0), "top_k": 5}
    with pytest.raises(ValueError) as error:
        store.Store(tmp_path, changed)
    assert "'temperatures': ([0.0, 0.7], [0.0, 1.0])" in str(error.value)
    assert "'top_k': (None, 5)" in str(error.value) and "seed" not in str(error.value)


@pytest.mark.parametrize(
    "broken",
    ['{"query": "q1", "resp', '{"query": "q1"}', "[1]", "3", "null", "", '{"query": "q1", "responses": [3]}'],
)
def test_broken_line_is_named(tmp_path, broken):
    one = store.Store(tmp_path, SETTINGS)
    one.write(0, records(0, 1), ASKED[0])
    path = tmp_path / "00000.jsonl"
    path.write_text(path.read_text() + broken + "\n" + path.read_text())
    with pytest.raises(
        ValueError, match=r"00000\.jsonl, line 2: not what this store holds .*remove the file"
    ):
        list(one.read(1, store.read_rollout))


def cut_at_a_line(data):
    return data[: data.index(b"\n") + 1]


def cut_within_a_line(data):
    return data[:-7]


def swapped(data):
    return data.replace(b"How many?", b"How much?")


@pytest.mark.parametrize("damage", [cut_at_a_line, cut_within_a_line, swapped, lambda data: b""])
def test_a_damaged_shard_is_made_again_and_named(tmp_path, caplog, damage):
    one = store.Store(tmp_path, SETTINGS)
    one.write(0, records(0, 2), ASKED[0])
    one.write(1, records(2, 2), ASKED[1])
    path = tmp_path / "00001.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    again = store.Store(tmp_path, SETTINGS)
    assert again.missing(ASKED[:3]) == [1, 2]
    [line] = caplog.messages
    assert str(path) in line and "of 2 whole lines), so it is made again" in line
    again.write(1, records(2, 2), ASKED[1])
    assert again.missing(ASKED[:2]) == []
    assert [name for name, _ in again.read(2, store.read_rollout)] == ["q0", "q1", "q2", "q3"]


def test_an_empty_shard_that_was_meant_is_whole(tmp_path):
    store.Store(tmp_path, SETTINGS).write(0, [], ASKED[0])
    assert store.Store(tmp_path, SETTINGS).missing(ASKED[:1]) == []


def test_a_shard_without_its_sum_is_made_again(tmp_path, caplog):
    store.Store(tmp_path, SETTINGS).write(0, records(0, 2), ASKED[0])
    (tmp_path / "00000.sum").unlink()
    assert store.Store(tmp_path, SETTINGS).missing(ASKED[:1]) == [0]
    assert "00000.jsonl: how much it should hold is not known" in caplog.text


def test_a_shard_that_answers_something_else_is_made_again(tmp_path, caplog):
    """As one does whose questions have changed since, or of a pass that asked more or fewer of them."""
    one = store.Store(tmp_path, SETTINGS)
    for number in range(3):
        one.write(number, records(number, 1), ASKED[number])
    again = store.Store(tmp_path, SETTINGS)
    assert again.missing(["a", "other"]) == [1]
    [line] = caplog.messages
    assert line.startswith(f"{tmp_path}/00001.jsonl: it answers something else than is asked now")
    again.write(1, records(7, 1), "other")
    assert again.missing(["a", "other"]) == []
    assert [name for name, _ in again.read(2, store.read_rollout)] == ["q0", "q7"]  # 2 is not of this pass
    assert again.missing(["a", "other", "c"]) == []


def test_damaged_settings_are_named(tmp_path):
    store.Store(tmp_path, SETTINGS)
    (tmp_path / "settings.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match=r"settings\.json: damaged, not valid JSON"):
        store.Store(tmp_path, SETTINGS)
