"""The folder of an embedded data set, in MathV360K's format: written whole or not at all, and its narrow set.

<folder>/figures.json                manifest: the parameters of the set
<folder>/figures/images/<name>.png
<folder>/{train,unlabelled,validation,test}.json    MathV360K rows, images relative to <folder>
<folder>/truth.jsonl                 ground truth of every query, for evaluation only
<folder>/base.jsonl                  the narrow set that a base stage is trained on
"""

import dataclasses
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Mapping

import PIL.Image

from mstar_jax.structs import Query

SPLITS = ("train", "unlabelled", "validation", "test")
OURS = {"figures.json", "figures", "truth.jsonl", "base.jsonl", *(f"{split}.json" for split in SPLITS)}
HINT = "Hint: Please answer the question "
INTEGER_HINT = HINT + "requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end."


@dataclasses.dataclass(frozen=True)
class BaseExample:
    """An example of the base set; `mode` is `caption`, `arithmetic` (without an image) or `cot`."""

    query: Query
    mode: str
    response: str


def publish(
    folder: str | os.PathLike, manifest: Mapping[str, object], write: Callable[[pathlib.Path], None]
) -> pathlib.Path:
    """Makes a data set next to `folder` and renames it; one with the same manifest is left as it is.

    Args:
      folder: does not exist yet, or holds an earlier set and nothing else.
      manifest: the parameters of the set, written into figures.json.
      write: (folder) -> None, writes all other files; images into <folder>/figures/images.

    Raises:
      FileExistsError: the folder holds other files.
      ValueError: it holds another set, of a workdir whose run has begun.
    """
    folder = pathlib.Path(folder).absolute()
    there = _manifest(folder)
    if there == manifest:
        return folder
    if (folder / "figures.json").exists() and (folder.parent / "inputs.json").exists():
        told = _differences(there, manifest)
        text = f"{folder} was made with other values, and a run has used it ({told}): name another --workdir"
        raise ValueError(f"{text}, or go on with those values; another `format` is one of another version")
    foreign = sorted({path.name for path in folder.iterdir()} - OURS) if folder.exists() else []
    if foreign:
        raise FileExistsError(f"{folder} is for the figures data set, but holds other files: {foreign[:5]}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        new = pathlib.Path(temporary) / "new"
        (new / "figures" / "images").mkdir(parents=True)
        write(new)
        (new / "figures.json").write_text(json.dumps(manifest, indent=1) + "\n")
        if folder.exists():
            os.rename(folder, pathlib.Path(temporary) / "old")
        try:
            os.rename(new, folder)
        except OSError:  # another process may have written the same set
            if _manifest(folder) != manifest:
                raise
    return folder


def _manifest(folder: pathlib.Path) -> object:
    try:
        return json.loads((folder / "figures.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _differences(there: object, now: Mapping[str, object]) -> str:
    if not isinstance(there, dict):
        return "figures.json cannot be read"
    keys = [key for key in {**there, **now} if there.get(key) != now.get(key)]
    return "; ".join(f"{key}: {there.get(key)} there, {now.get(key)} now" for key in keys)


def write_lines(path: pathlib.Path, records: Iterable[Mapping[str, object]]) -> None:
    """Writes JSON records, one a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def save(root: pathlib.Path, name: str, image: PIL.Image.Image) -> str:
    """Writes an image of a set, and returns its path in it."""
    image.save(root / f"figures/images/{name}.png", compress_level=1)
    return f"figures/images/{name}.png"


def read_base(folder: str | os.PathLike) -> list[BaseExample]:
    """Reads the base set of a folder that `make` wrote, with absolute image paths."""
    root = pathlib.Path(folder).absolute()
    examples = []
    for r in map(json.loads, (root / "base.jsonl").read_text().splitlines()):
        images = (str(root / r["image"]),) if r["image"] else ()
        options = tuple(r["options"]) if r["options"] else None
        kind = "choice" if options else "integer" if r["answer"] else "text"
        query = Query(r["id"], images, r["question"], options, r["answer"], kind, "figures")
        examples.append(BaseExample(query, r["mode"], r["response"]))
    return examples
