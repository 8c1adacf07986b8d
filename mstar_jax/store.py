"""The rollout store: append-only, readable, and the reason that a restart samples nothing twice.

    <workdir>/rollouts/<name>/settings.json    what the samples depend on
    <workdir>/rollouts/<name>/00012.jsonl      one shard per device batch, renamed into place when whole

A line of a shard is one query with its responses:

    {"query": "train_000012_0", "question": "What is the total of all bars?", "images": ["..."], "gold": "22",
     "responses": [{"sample": 0, "text": "Bars ...", "verdict": "correct", "tokens": [311, 9], ...}, ...]}
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from mstar_jax.structs import Query, Response


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(path.name + f".part{os.getpid()}")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


class RolloutStore:
    """Rollouts of one pass, e.g. of one iteration."""

    def __init__(self, folder: str | os.PathLike, settings: dict[str, Any]):
        """Opens or begins a store.

        Raises:
          ValueError: the folder holds rollouts that were sampled with other settings.
        """
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        if path.exists():
            there = json.loads(path.read_text())
            if there != settings:
                pairs = {k: (there.get(k), settings.get(k)) for k in there | settings}
                changed = {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}
                raise ValueError(f"{self.folder} was sampled with other settings (there, now): {changed}")
        else:
            write_text(path, json.dumps(settings, indent=1))

    def _shard(self, number: int) -> pathlib.Path:
        return self.folder / f"{number:05d}.jsonl"

    def missing(self, shards: int) -> list[int]:
        """Which of the shards 0..shards-1 are not there yet."""
        return [number for number in range(shards) if not self._shard(number).exists()]

    def write(self, number: int, groups: Iterable[tuple[Query, list[Response]]]) -> None:
        """Writes shard `number`."""
        lines = []
        for query, responses in groups:
            head: dict[str, Any] = {"query": query.id, "question": query.question}
            head |= {"images": query.images, "gold": query.answer}
            shown = [{k: v for k, v in dataclasses.asdict(r).items() if k != "query_id"} for r in responses]
            lines.append(json.dumps(head | {"responses": shown}, ensure_ascii=False))
        write_text(self._shard(number), "".join(line + "\n" for line in lines))

    def read(self) -> Iterator[tuple[str, list[Response]]]:
        """(query id, its responses), shard by shard.

        Raises:
          ValueError: a shard that is not whole, naming the file and line.
        """
        for path in sorted(self.folder.glob("[0-9]*.jsonl")):
            # not splitlines(): sampled text may hold U+2028 and the like, which JSON leaves as they are
            lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line)
                    found = record["query"], [_response(record["query"], r) for r in record["responses"]]
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    where = f"{path}, line {number}"
                    raise ValueError(
                        f"{where}: not a rollout ({error}); remove the file to redo it"
                    ) from error
                yield found


def _response(query_id: str, record: dict[str, Any]) -> Response:
    scores = record["step_scores"]
    listed = {"tokens": tuple(record["tokens"]), "step_scores": None if scores is None else tuple(scores)}
    return Response(query_id=query_id, **record | listed)
