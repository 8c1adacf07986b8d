"""Whose a workdir is: one run's at a time, with the same values and the same inputs at every start.

<workdir>/config.json    the values
<workdir>/inputs.json    counts and digests of the data, their splits and the checkpoints
<workdir>/images.json    what is known of the image files, so that a later start need not decode them
<workdir>/lock           the process that holds it
"""

import fcntl
import hashlib
import json
import logging
import os
import pathlib
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from mstar_jax import processes
from mstar_jax.data import pictures
from mstar_jax.ranges import flat
from mstar_jax.store import digest, read_json, update_text, write_text
from mstar_jax.structs import Query

log = logging.getLogger(__name__)

# May differ from start to start: they say nothing about the method. What is done in microbatches, recomputed,
# or divided among other devices sums float32 in another order, so some of these change last bits.
FREE: tuple[str, ...] = ("data.workers", "eval.show", "evolve.keep_checkpoints")
FREE += ("train.accumulate", "train.log_every", "train.profile", "train.remat", "train.save_every")
FREE += ("train.offload_optimizer", "tracker", "mesh.data", "mesh.fsdp", "mesh.tensor")
BLOCK = 1 << 16  # bytes
IMAGES = "images.json"
held: list[IO[str]] = []  # until the process ends, and with it the locks


# ---- 1. one run at a time -----------------------------------------------------------------------------


def lock(workdir: pathlib.Path) -> None:
    """Makes the workdir this run's alone until its process 0 ends, in whatever way.

    Raises:
      OSError: another process holds it, or it cannot be written.
    """
    error: OSError | None = None
    if processes.first():
        try:
            _lock(workdir)
        except OSError as found:
            error = found
    if processes.agree(error is not None):
        raise error or OSError(f"{workdir}: process 0 may not use it")


def _lock(workdir: pathlib.Path) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise OSError(f"{workdir} is a file, not a folder: name another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    file = open(workdir / "lock", "a+")  # noqa: SIM115 - open until the process ends
    try:
        # the system frees it when the process ends; also over NFS, and not passed on to child processes
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise OSError(
            f"{workdir} is in use by {owner}: wait for its end, or name another --workdir"
        ) from error
    except OSError as error:
        log.warning("%s: its file system has no locks (%s): start no second run there", workdir, error)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    held.append(file)


# ---- 2. the same values -------------------------------------------------------------------------------


def claim(workdir: pathlib.Path, values: dict[str, object]) -> bool:
    """Writes the config into a new workdir; refuses a workdir that holds a run with other values.

    Returns:
      Whether the workdir is new.

    Raises:
      ValueError: with every value that differs, but for those that may.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    new = not path.exists()
    there = {} if new else read_json(path)
    changed = [] if new else list(changes(there, values))
    if refused := [f"{key}: {a} there, {b} now" for key, a, b in changed if key not in FREE]:
        raise ValueError(
            f"{workdir} holds a run with other values ({'; '.join(refused)}). "
            "Name another --workdir, or remove that one."
        )
    for key, before, now in changed:
        log.info("%s: %s until now, %s from now on", key, before, now)
    if (new or changed) and processes.first():
        write_text(path, json.dumps(values, indent=1))
    return new


def unclaim(workdir: pathlib.Path) -> None:
    """Frees a new workdir whose data or checkpoints were refused, for the corrected command."""
    if processes.first() and not (workdir / "inputs.json").exists():
        (workdir / "config.json").unlink(missing_ok=True)
        shutil.rmtree(workdir / "tokenizer", ignore_errors=True)  # made by that config


def changes(there: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, object, object]]:
    """(dotted key, value there, value now) of every value that differs."""
    one, two = flat(there), flat(now)
    for key in one | two:
        if one.get(key) != two.get(key):
            yield key, one.get(key), two.get(key)


# ---- 3. the same inputs -------------------------------------------------------------------------------


def check_inputs(workdir: pathlib.Path, inputs: Mapping[str, Mapping[str, object]]) -> None:
    """Notes what a run reads; at a later start, refuses what is no longer the same.

    Args:
      workdir: the run's.
      inputs: by name (a split, a checkpoint) its parts, such as the number of queries or their digest.

    Raises:
      ValueError: with everything that changed.
    """
    path = workdir / "inputs.json"
    if not path.exists():
        if processes.first():
            write_text(path, json.dumps(inputs, indent=1))
        return
    there = read_json(path)
    changed = []
    for name in there | dict(inputs):
        before, now = there.get(name, {}), inputs.get(name, {})
        parts = [part for part in {**before, **now} if before.get(part) != now.get(part)]
        told = [
            f"{part} ({before.get(part)} there, {now.get(part)} now)"
            if _is_count(before, now, part)
            else part
            for part in parts
        ]
        changed += [f"{name}: {', '.join(told)}"] if told else []
    if changed:
        raise ValueError(
            f"{workdir} holds a run on other inputs; changed since its start: {'; '.join(changed)}. "
            f"Restore them, or name another --workdir; to go on all the same, remove {path}"
        )


def recall_images(workdir: pathlib.Path) -> None:
    """Takes over what an earlier start, or process 0, has found out about the image files.

    It is kept with the run, not in the user's cache: a workdir outlives a container and a host, and all
    hosts of a run read it. A file that is damaged is no loss: the images are looked at again.
    """
    path = workdir / IMAGES
    if path.exists():
        try:
            pictures.recall(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            log.warning("%s: damaged (%s), so the images are looked at again", path, error)


def keep_images(workdir: pathlib.Path) -> None:
    """Writes what is known of the image files by now, for `recall_images`."""
    if processes.first():
        update_text(workdir / IMAGES, json.dumps(pictures.table()))


def _is_count(before: Mapping[str, object], now: Mapping[str, object], part: str) -> bool:
    return isinstance(before.get(part), int) and isinstance(now.get(part), int)


def of_queries(queries: Sequence[Query], workdir: pathlib.Path) -> dict[str, object]:
    """What tells a split from others, part by part."""
    images = sorted({image for query in queries for image in query.images})
    asked = [(query.question, query.options, query.answer_type, query.precision) for query in queries]
    own = f"{workdir.absolute()}{os.sep}"  # a copied workdir has the same images
    return {
        "queries": len(queries),
        "ids or their order": digest(query.id for query in queries),
        "questions": digest(asked),
        "gold answers": digest(query.answer for query in queries),
        "which images": digest([image.removeprefix(own) for image in query.images] for query in queries),
        "contents of images": digest(fingerprint(pathlib.Path(image), 2) for image in images),
    }


def of_checkpoint(folder: pathlib.Path) -> dict[str, object]:
    """What tells a checkpoint's folder from others, file by file."""
    found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".model"))
    return {path.name: fingerprint(path) for path in found}


def of_folder(folder: pathlib.Path, blocks: int = 64) -> str:
    """What tells a folder of many files from others: a digest of their names and contents."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest((str(path.relative_to(folder)), fingerprint(path, blocks)) for path in found)


def fingerprint(path: pathlib.Path, blocks: int = 64) -> str:
    """A digest of a file's size and of so many blocks, evenly spread; of a small file, of all its bytes.
    Times do not count: a copy is the same."""
    size = path.stat().st_size
    last = max(size - BLOCK, 0)
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for at in sorted({last * n // max(blocks - 1, 1) for n in range(blocks)}):
            file.seek(at)
            found.update(file.read(BLOCK))
    return found.hexdigest()[:16]
