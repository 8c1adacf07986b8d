"""The stores: append-only and readable. What they hold is not computed again after a restart.

    <workdir>/rollouts/<name>/settings.json    what the samples depend on
    <workdir>/rollouts/<name>/00012.jsonl      one shard per device batch, renamed into place when whole
    <workdir>/rollouts/<name>/00012.sum        how many records it holds, their digest, and what they answer
    <workdir>/labels/<name>/...                Monte-Carlo labels of steps, in the same layout
    <workdir>/scores/<name>/...                responses with the reward model's step scores

A line of a shard of rollouts or scores is one query with its responses:

    {"query": "train_000012_0", "question": "What is the total of all bars?", "images": ["..."], "gold": "22",
     "responses": [{"sample": 0, "text": "Bars ...", "verdict": "correct", "tokens": [311, 9], ...}, ...]}
"""

import base64
import hashlib
import json
import logging
import os
import pathlib
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mstar_jax import processes
from mstar_jax.structs import Array, Query, Response, float32, int32

T = TypeVar("T")
log = logging.getLogger(__name__)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file atomically: whole or not at all."""
    write_bytes(path, text.encode())


def update_text(path: pathlib.Path, text: str) -> None:
    """Writes a file as `write_text` does, unless it holds this text already."""
    if not path.exists() or path.read_bytes() != text.encode():
        write_text(path, text)


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes a file atomically: whole or not at all."""
    part = path.with_name(f"{path.name}.part{uuid.uuid4().hex[:8]}")  # several hosts may write the same
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_json(path: pathlib.Path, *keys: str) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
      ValueError: it is not whole, no object, or lacks one of the keys; the message names the file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged, not valid JSON ({error}); restore it from a copy") from error
    if not isinstance(found, dict) or set(keys) - found.keys():
        what = f"not an object with {', '.join(keys)}" if keys else "not a JSON object"
        raise ValueError(f"{path}: damaged, {what}; restore it from a copy")
    return found


def digest(values: Iterable[object]) -> str:
    """A digest of values that JSON can hold; an array counts as the list of its numbers."""
    found = hashlib.sha256()
    for value in values:
        found.update(json.dumps(value, default=list).encode() + b"\n")
    return found.hexdigest()[:16]


class Place(NamedTuple):
    """Where a record is: the number of its shard, and the bytes of its line, without the line break."""

    shard: int
    start: int
    end: int


class Store:
    """Records in shards. A shard counts as absent if it was damaged, or if something else is asked now."""

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, object]):
        """Opens or creates a store.

        Raises:
          ValueError: the folder holds records that were made with other settings.
        """
        self.folder = pathlib.Path(folder)
        path = self.folder / "settings.json"
        now = json.loads(json.dumps(settings))
        if processes.first():
            self.folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            there = read_json(path)
            if there != now:
                pairs = {k: (there.get(k), now.get(k)) for k in there | now}
                changed = {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}
                raise ValueError(
                    f"{self.folder} was made with other settings (there, now): {changed}. "
                    "Remove this folder to make it again, or name another --workdir."
                )
        elif processes.first():
            write_text(path, json.dumps(now, indent=1))

    def _shard(self, number: int) -> pathlib.Path:
        return self.folder / f"{number:05d}.jsonl"

    def missing(self, shards: int, asked: Callable[[int], str]) -> list[int]:
        """Which shards do not exist yet, are damaged or answer something else; the last two kinds are named
        in the log. Each is read by one process only.

        Args:
          shards: how many there should be.
          asked: of a shard by number, a digest of what its records answer; called for those that exist.
        """
        there = processes.shared(lambda number: b"+" if self._is_whole(number, asked) else b"", shards)
        return [number for number, whole in enumerate(there) if not whole]

    def _is_whole(self, number: int, asked: Callable[[int], str]) -> bool:
        path = self._shard(number)
        if not path.exists():
            return False
        try:
            noted = json.loads(path.with_suffix(".sum").read_text())
            records = noted["records"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            log.warning("%s: how much it should hold is not known, so it is made again", path)
            return False
        now = asked(number)
        if noted.get("asked") != now:
            log.warning("%s: it answers something else than is asked now, so it is made again", path)
            return False
        data = path.read_bytes()
        if noted == _sum(data, now):
            return True
        lines = data.count(b"\n")
        log.warning("%s: damaged (%d of %d whole lines), so it is made again", path, lines, records)
        return False

    def write(self, number: int, lines: Iterable[bytes], asked: Callable[[int], str]) -> None:
        """Writes the records of shard `number`, each as its `line`, if this is process 0; for `asked` see
        `missing`."""
        if processes.first():
            data = b"".join(lines)
            path = self._shard(number)
            path.unlink(missing_ok=True)  # a damaged one; the sum below is not its own
            write_text(path.with_suffix(".sum"), json.dumps(_sum(data, asked(number))))
            write_bytes(path, data)

    def complete(self, shards: int) -> None:
        """Waits until all shards can be read here.

        Raises:
          ValueError: another process wrote one where this one does not see it.
        """
        own = {self._shard(number) for number in range(shards)}
        for path in sorted(set(self.folder.glob("*.jsonl")) - own):
            log.warning("%s: no shard of this store, which has %d, so it is not read", path, shards)
        processes.barrier(f"{self.folder.name}: complete")
        processes.visible(lambda: all(self._shard(n).exists() for n in range(shards)), self.folder)

    def read(self, shards: int, parse: Callable[[dict[str, Any]], T]) -> Iterator[T]:
        """Every record of the shards 0..shards-1, as `parse` reads it; later ones are of a longer pass.

        Raises:
          ValueError: a shard that is not whole, naming the file and line.
        """
        for place, line in self._lines(shards):
            yield self._parsed(place, line, lambda line: parse(json.loads(line)))

    def groups(self, shards: int) -> "Groups":
        """The responses in the shards 0..shards-1, by query id; where they stand is all that is kept.

        Raises:
          ValueError: as `read`, now or when the responses are asked for.
        """
        places = {self._parsed(place, line, _query_id): place for place, line in self._lines(shards)}

        def read(query_id: str) -> list[Response]:
            place = places[query_id]
            with open(self._shard(place.shard), "rb") as file:
                file.seek(place.start)
                line = file.read(place.end - place.start)
            found, responses = self._parsed(place, line, lambda line: read_rollout(json.loads(line)))
            if found != query_id:
                raise ValueError(f"{self._shard(place.shard)}: changed since it was opened; start again")
            return responses

        return Groups(places, read)

    def _lines(self, shards: int) -> Iterator[tuple[Place, bytes]]:
        for shard in range(shards):
            data, start = self._shard(shard).read_bytes(), 0
            while start < len(data):
                end = data.find(b"\n", start)
                end = len(data) if end < 0 else end
                yield Place(shard, start, end), data[start:end]
                start = end + 1

    def _parsed(self, place: Place, line: bytes, parse: Callable[[bytes], T]) -> T:
        try:
            return parse(line)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            path = self._shard(place.shard)
            number = path.read_bytes().count(b"\n", 0, place.start) + 1
            raise ValueError(
                f"{path}, line {number}: not what this store holds ({error}); remove the file to redo it"
            ) from error


class Groups(Mapping[str, list[Response]]):
    """Responses by query id that are read, or made, anew whenever they are asked for. An iteration's may be
    more than fit into memory, so whoever goes through them keeps what is needed."""

    def __init__(self, ids: Iterable[str], make: Callable[[str], list[Response]]):
        """The responses to these queries, each query's as `make` gives them; it raises no KeyError."""
        self.ids = dict.fromkeys(ids)
        self.make = make

    def __getitem__(self, query_id: str) -> list[Response]:
        if query_id not in self.ids:
            raise KeyError(query_id)
        return self.make(query_id)

    def __contains__(self, query_id: object) -> bool:  # by default it would make them
        return query_id in self.ids

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


def complete(folder: pathlib.Path) -> tuple[Store, int]:
    """A store that has all of its shards, with the settings that it was made with, and how many they are."""
    return Store(folder, read_json(folder / "settings.json")), len(list(folder.glob("*.jsonl")))


def _sum(data: bytes, asked: str) -> dict[str, object]:
    """What a shard's `.sum` says of it."""
    return {"records": data.count(b"\n"), "sha256": hashlib.sha256(data).hexdigest(), "asked": asked}


def line(record: Mapping[str, object]) -> bytes:
    """A record as a line of a shard."""
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def rollout(query: Query, responses: Sequence[Response]) -> dict[str, object]:
    """The record of a query with its responses."""
    shown = [{**vars(r), "tokens": list(r.tokens)} for r in responses]
    for each in shown:
        del each["query_id"]
        if each["score"] is None:
            del each["score"]
        logprobs = each.pop("logprobs")
        if logprobs is not None:  # absent otherwise: what an objective does not need changes no store
            each["logprobs"] = packed(logprobs)
    return {
        "query": query.id,
        "question": query.question,
        "options": query.options,
        "images": query.images,
        "gold": query.answer,
        "responses": shown,
    }


def read_rollout(record: dict[str, Any]) -> tuple[str, list[Response]]:
    """(query id, its responses) of such a record."""
    return record["query"], [_response(record["query"], r) for r in record["responses"]]


_ID = re.compile(rb'\{"query": ("(?:[^"\\]|\\.)*")')


def _query_id(line: bytes) -> str:
    """The query of a record, without reading the rest of it."""
    found = _ID.match(line)
    return json.loads(found[1]) if found else json.loads(line)["query"]


def _response(query_id: str, record: dict[str, Any]) -> Response:
    scores = record["step_scores"]
    listed = {"tokens": int32(record["tokens"]), "step_scores": None if scores is None else tuple(scores)}
    logprobs = unpacked(record["logprobs"]) if "logprobs" in record else None
    if logprobs is not None and len(logprobs) != len(record["tokens"]):
        raise ValueError(f"sample {record['sample']}: not as many log probabilities as tokens")
    return Response(query_id=query_id, **record | listed | {"logprobs": logprobs})


def packed(values: Array) -> str:
    """Float32 numbers as base64 of their little-endian bytes: exact, and 5.3 characters each."""
    return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()


def unpacked(text: str) -> Sequence[float]:
    """The float32 array that `packed` wrote."""
    return float32(np.frombuffer(base64.b64decode(text), "<f4"))
