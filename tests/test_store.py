"""The rollout store: what is written comes back, whole or not at all."""

import dataclasses
import json
import os

import numpy as np
import pytest

from mstar_jax import store
from mstar_jax.structs import Query, Response, float32, int32

asked = ("a", "b", "c", "d").__getitem__  # what each shard answers
SETTINGS = {"branches": 4, "temperatures": (0.0, 0.7), "prompt": "{question}", "seed": 0}


def records(*args):
    return [store.line(store.rollout(*group)) for group in groups(*args)]


def groups_by_id(*args):
    return [(query.id, responses) for query, responses in groups(*args)]


def groups(first, count, text="Sum 1 + 2 = 3"):
    out = []
    for i in range(first, first + count):
        query = Query(f"q{i}", (f"/images/{i}.png",), "How many?", answer=None if i % 2 else "3")
        bare = Response(query.id, 0, text, int32((5, 9, 70_000)), -0.1 - i / 3, i % 2 == 0)
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
    one.write(1, records(2, 3, text), asked)
    one.write(0, records(0, 2, text), asked)
    again = store.Store(tmp_path / "iteration_01", SETTINGS)
    assert list(again.read(2, store.read_rollout)) == [
        (query.id, responses) for query, responses in groups(0, 5, text)
    ]
    assert again.missing(4, asked) == [2, 3]


def test_groups_are_read_when_they_are_asked_for(tmp_path, monkeypatch):
    """Only ids and places are in memory; of a query that was asked twice, the last record counts."""
    one = store.Store(tmp_path, SETTINGS)
    one.write(0, records(0, 2, "½\u2028"), asked)
    one.write(1, [*records(2, 2), *records(1, 1, "again")], asked)
    found = one.groups(2)
    want = dict([*groups_by_id(0, 2, "½\u2028"), *groups_by_id(2, 2), *groups_by_id(1, 1, "again")])
    assert list(found) == list(want) and len(found) == 4 and found == want
    assert found["q3"] is not found["q3"] and found.get("q9", []) == []
    parsed: list[str] = []
    monkeypatch.setattr(store, "read_rollout", parsed.append)
    assert "q1" in found and "q9" not in found and not parsed


def test_a_broken_record_is_named_when_it_is_asked_for(tmp_path):
    one = store.Store(tmp_path, SETTINGS)
    one.write(0, [*records(0, 1), b'{"query": "q7", "responses": [3]}\n'], asked)
    found = one.groups(1)
    assert len(found["q0"]) == 2
    for ask in (found.__getitem__, found.get):
        with pytest.raises(
            ValueError, match=r"00000\.jsonl, line 2: not what this store holds .*remove the file"
        ):
            ask("q7")


def test_a_line_of_a_shard_has_the_form_that_older_ones_have():
    """As `json.dumps` wrote `dataclasses.asdict`: a run that began before goes on with the same digests."""
    [(query, responses)] = groups(0, 1, "½")
    shown = [dataclasses.asdict(r) | {"tokens": list(r.tokens)} for r in responses]
    for each in shown:
        del each["query_id"], each["score"], each["logprobs"]  # the last two none of them has
    whole = {
        "query": "q0",
        "question": "How many?",
        "options": None,
        "images": ["/images/0.png"],
        "gold": "3",
    }
    text = json.dumps(whole | {"responses": shown}, ensure_ascii=False) + "\n"
    assert store.line(store.rollout(query, responses)) == text.encode()
    assert store.digest([[r.tokens for r in responses]]) == store.digest(
        [[list(r.tokens) for r in responses]]
    )


def test_log_probabilities_of_tokens_come_back_to_the_last_bit(tmp_path):
    [(query, responses)] = groups(0, 1)
    values = np.array([-0.1, -1e-30, -17.25], np.float32)
    kept = [dataclasses.replace(r, logprobs=float32(values)) for r in responses]
    record = json.loads(store.line(store.rollout(query, kept)))
    assert len(record["responses"][0]["logprobs"]) == 16  # 4 bytes each, in base64
    found = store.read_rollout(record)[1]
    assert found == kept and np.asarray(found[0].logprobs).tobytes() == values.tobytes()
    record["responses"][1]["tokens"].append(3)
    with pytest.raises(ValueError, match="sample 1: not as many log probabilities as tokens"):
        store.read_rollout(record)


def test_tokens_are_int32():
    tokens = int32([5, 70_000])
    assert memoryview(tokens).nbytes == 8 and np.asarray(tokens).dtype == np.int32
    with pytest.raises(OverflowError):
        int32([2**31])


def test_a_digest_is_made_only_of_shards_that_exist(tmp_path):
    one = store.Store(tmp_path, SETTINGS)
    one.write(1, records(0, 1), asked)
    of: list[int] = []
    assert one.missing(3, lambda number: of.append(number) or asked(number)) == [0, 2]
    assert of == [1]


def test_a_person_can_read_a_shard(tmp_path):
    store.Store(tmp_path, SETTINGS).write(0, records(0, 1, "½"), asked)
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
    one.write(0, records(0, 1), asked)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        one.write(1, records(1, 2), asked)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.glob("00001.*.part*")]  # left by the kill
    again = store.Store(tmp_path, SETTINGS)
    assert again.missing(2, asked) == [1]
    assert [name for name, _ in again.read(1, store.read_rollout)] == ["q0"]
    again.write(1, records(1, 2), asked)
    assert [name for name, _ in again.read(2, store.read_rollout)] == ["q0", "q1", "q2"]


def test_what_is_no_shard_is_not_read(tmp_path, caplog):
    """A copy under another name, and a shard beyond the last one, as of another run."""
    made = store.Store(tmp_path, SETTINGS)
    made.write(0, records(0, 2), asked)
    made.write(1, records(2, 1), asked)
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
    one.write(0, records(0, 1), asked)
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
    one.write(0, records(0, 2), asked)
    one.write(1, records(2, 2), asked)
    path = tmp_path / "00001.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    again = store.Store(tmp_path, SETTINGS)
    assert again.missing(3, asked) == [1, 2]
    [line] = caplog.messages
    assert str(path) in line and "of 2 whole lines), so it is made again" in line
    again.write(1, records(2, 2), asked)
    assert again.missing(2, asked) == []
    assert [name for name, _ in again.read(2, store.read_rollout)] == ["q0", "q1", "q2", "q3"]


def test_an_empty_shard_that_was_meant_is_whole(tmp_path):
    store.Store(tmp_path, SETTINGS).write(0, [], asked)
    assert store.Store(tmp_path, SETTINGS).missing(1, asked) == []


def test_a_shard_without_its_sum_is_made_again(tmp_path, caplog):
    store.Store(tmp_path, SETTINGS).write(0, records(0, 2), asked)
    (tmp_path / "00000.sum").unlink()
    assert store.Store(tmp_path, SETTINGS).missing(1, asked) == [0]
    assert "00000.jsonl: how much it should hold is not known" in caplog.text


def test_a_shard_that_answers_something_else_is_made_again(tmp_path, caplog):
    """As one does whose questions have changed since, or of a pass that asked more or fewer of them."""
    one = store.Store(tmp_path, SETTINGS)
    for number in range(3):
        one.write(number, records(number, 1), asked)
    again = store.Store(tmp_path, SETTINGS)
    assert again.missing(2, ["a", "other"].__getitem__) == [1]
    [line] = caplog.messages
    assert line.startswith(f"{tmp_path}/00001.jsonl: it answers something else than is asked now")
    again.write(1, records(7, 1), ["", "other"].__getitem__)
    assert again.missing(2, ["a", "other"].__getitem__) == []
    assert [name for name, _ in again.read(2, store.read_rollout)] == ["q0", "q7"]  # 2 is not of this pass
    assert again.missing(3, ["a", "other", "c"].__getitem__) == []


def test_damaged_settings_are_named(tmp_path):
    store.Store(tmp_path, SETTINGS)
    (tmp_path / "settings.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match=r"settings\.json: damaged, not valid JSON"):
        store.Store(tmp_path, SETTINGS)
