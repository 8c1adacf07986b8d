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

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from mstar_jax import processes
from mstar_jax.structs import Query, Response

T = TypeVar("T")
log = logging.getLogger(__name__)


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file atomically: whole or not at all."""
    part = path.with_name(f"{path.name}.part{uuid.uuid4().hex[:8]}")  # several hosts may write the same
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
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
    """A digest of values that JSON can hold."""
    found = hashlib.sha256()
    for value in values:
        found.update(json.dumps(value).encode() + b"\n")
    return found.hexdigest()[:16]


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

    def missing(self, asked: Sequence[str]) -> list[int]:
        """Which shards do not exist yet, are damaged or answer something else, as process 0 sees it; the
        last two kinds are named in the log.

        Args:
          asked: of each shard, a digest of what its records answer.
        """
        there = np.array([self._is_whole(number, each) for number, each in enumerate(asked)])
        return np.flatnonzero(~processes.from_first(there)).tolist() if asked else []

    def _is_whole(self, number: int, asked: str) -> bool:
        path = self._shard(number)
        if not path.exists():
            return False
        try:
            noted = json.loads(path.with_suffix(".sum").read_text())
            records = noted["records"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            log.warning("%s: how much it should hold is not known, so it is made again", path)
            return False
        if noted.get("asked") != asked:
            log.warning("%s: it answers something else than is asked now, so it is made again", path)
            return False
        data = path.read_bytes()
        if noted == _sum(data, asked):
            return True
        lines = data.count(b"\n")
        log.warning("%s: damaged (%d of %d whole lines), so it is made again", path, lines, records)
        return False

    def write(self, number: int, records: Iterable[Mapping[str, object]], asked: str) -> None:
        """Writes shard `number`, a record a line, if this is process 0; for `asked` see `missing`."""
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        if processes.first():
            path = self._shard(number)
            path.unlink(missing_ok=True)  # a damaged one; the sum below is not its own
            write_text(path.with_suffix(".sum"), json.dumps(_sum(text.encode(), asked)))
            write_text(path, text)

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
        for path in map(self._shard, range(shards)):
            # not splitlines(): sampled text may hold U+2028 and the like, which JSON leaves as they are
            lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
            for number, line in enumerate(lines if lines != [""] else [], start=1):
                try:
                    found = parse(json.loads(line))
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    where = f"{path}, line {number}"
                    raise ValueError(
                        f"{where}: not what this store holds ({error}); remove the file to redo it"
                    ) from error
                yield found


def _sum(data: bytes, asked: str) -> dict[str, object]:
    """What a shard's `.sum` says of it."""
    return {"records": data.count(b"\n"), "sha256": hashlib.sha256(data).hexdigest(), "asked": asked}


def rollout(query: Query, responses: Sequence[Response]) -> dict[str, object]:
    """The record of a query with its responses."""
    shown = [{k: v for k, v in dataclasses.asdict(r).items() if k != "query_id"} for r in responses]
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


def _response(query_id: str, record: dict[str, Any]) -> Response:
    scores = record["step_scores"]
    listed = {"tokens": tuple(record["tokens"]), "step_scores": None if scores is None else tuple(scores)}
    return Response(query_id=query_id, **record | listed)
