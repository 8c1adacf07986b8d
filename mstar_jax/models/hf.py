"""Checkpoints in Hugging Face format, both ways: safetensors, read and written tensor by tensor."""

import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
from safetensors.numpy import save_file

from mstar_jax import sharding
from mstar_jax.models.names import Part, Tensor, layer_of, tensors

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")
HEAD = "reward_head.safetensors"  # a reward model's head lies beside its trunk
HEAD_NAMES = ("weight", "bias", "likelihood")
SHARD = 5 * 10**9  # bytes; the largest file that is written


# ------------------------------------------------------------------------------------------- folders
def local_folder(path: str | os.PathLike) -> pathlib.Path:
    """The folder itself, or a hub id's snapshot (weights, configs and tokenizer files; never code).

    Raises:
      ValueError: there is neither.
    """
    folder = pathlib.Path(path)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(path).count("/") != 1:
        raise ValueError(f"{path}: there is no such folder, and a hub id would be owner/name")
    import huggingface_hub

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(str(path), allow_patterns=wanted))
    except Exception as error:
        raise ValueError(f"{path}: no such folder, and it cannot be had from the hub: {error}") from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file of the folder.

    Raises:
      ValueError: naming the file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a JSON object")
    return values


class Stored(NamedTuple):
    """Where a checkpoint tensor lies."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(folder: pathlib.Path) -> dict[str, Stored]:
    """What the folder's safetensors hold, from their headers, file by file in the order of their names.

    Raises:
      ValueError: there is no safetensors file, one is damaged, or two hold the same tensor.
    """
    found: dict[str, Stored] = {}
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != HEAD)
    if not files:
        raise ValueError(f"{folder}: there is no *.safetensors file (no other format is read)")
    for path in files:
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118  (not a dictionary)
                    part = file.get_slice(name)
                    if name in found:
                        raise ValueError(f"{path}: {name} is also in {found[name].file}")
                    found[name] = Stored(path.name, part.get_dtype(), tuple(part.get_shape()))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: {error}; is the file whole?") from error
    return found


def check_names(named: dict[str, Tensor], stored: dict[str, Stored], folder: pathlib.Path) -> None:
    """Compares what the model needs with what the folder holds.

    Raises:
      ValueError: every missing, unexpected, misshapen and unreadable tensor, at once.
    """
    faults = [f"missing: {name}" for name in named if name not in stored]
    faults += [f"unexpected: {name}" for name in stored if name not in named]
    for name, entry in named.items():
        there = stored.get(name)
        if there is not None and there.shape != entry.shape:
            faults.append(f"misshapen: {name} is {there.shape}, the config says {entry.shape}")
        if there is not None and there.dtype not in DTYPES:
            faults.append(f"unreadable: {name} holds {there.dtype}, not one of {', '.join(DTYPES)}")
    if faults:
        shown = "\n  ".join(faults[:50])
        more = f"\n  ... and {len(faults) - 50} more" if len(faults) > 50 else ""
        raise ValueError(f"{folder}: {len(faults)} tensors do not fit the model\n  {shown}{more}")


# ------------------------------------------------------------------------------------------ reading
def load_params(
    folder: pathlib.Path,
    table: Sequence[Tensor],
    abstract: Any,
    own: Mapping[str, jax.Array],
    *,
    dtype: Any,
    mesh: Any,
    rules: Any,
) -> Any:
    """Reads a model straight into its sharding, one checkpoint tensor in memory at a time.

    Args:
      folder: holds *.safetensors.
      table: the family's names.
      abstract: the model's shapes (`jax.eval_shape`).
      own: parameters that no checkpoint holds, by name, taken as they are.
      dtype: of the parameters.
      mesh, rules: the target sharding; without a mesh everything goes to the first device. A process
        reads and holds its own shards only.

    Raises:
      ValueError: the names or shapes do not fit, see `check_names`.
    """
    stored, named = stored_tensors(folder), tensors(table, abstract)
    check_names(named, stored, folder)
    sources: dict[str, list[tuple[str, Part]]] = {}  # our parameter -> tensors that hold it, layer by layer
    for name, entry in named.items():
        for part in entry.parts:
            sources.setdefault(part.ours, []).append((name, part))

    def read(name: str) -> np.ndarray:
        # opened anew for every tensor, so that no more of the file than this stays mapped
        with safetensors.safe_open(folder / stored[name].file, framework="numpy") as file:
            return file.get_tensor(name)

    def place(path: Any, leaf: Any, target: Any) -> jax.Array:
        name = sharding.parameter_name(path)
        if name in own:
            return own[name]
        found = sources[name]
        stacked = layer_of(named[found[0][0]], found[0][0]) is not None
        shape = leaf.shape[1:] if stacked else leaf.shape
        values = (part.extract(read(name), shape) for name, part in found)
        return _scatter(values, leaf.shape, stacked, dtype, target)

    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    layout = sharding.shardings(abstract, rules, mesh) if mesh else jax.tree.map(lambda _: one, abstract)
    return jax.tree_util.tree_map_with_path(place, abstract, layout)


def _scatter(
    values: Iterator[np.ndarray], shape: tuple[int, ...], stacked: bool, dtype: Any, target: Any
) -> jax.Array:
    """Cuts values (layer by layer where stacked) into this process's shards and puts them on its devices."""
    devices = target.addressable_devices_indices_map(shape)
    spans = {d: tuple(s.indices(n) for s, n in zip(index, shape)) for d, index in devices.items()}
    buffers = {
        span: np.empty([stop - start for start, stop, _ in span], dtype) for span in set(spans.values())
    }
    for layer, value in enumerate(values):
        for span, buffer in buffers.items():
            index = tuple(slice(start, stop) for start, stop, _ in span)
            if not stacked:
                buffer[...] = value[index]
            elif index[0].start <= layer < index[0].stop:
                buffer[layer - index[0].start] = value[index[1:]]
    shards = [jax.device_put(buffers[span], device) for device, span in spans.items()]
    return jax.make_array_from_single_device_arrays(shape, target, shards)


# ------------------------------------------------------------------------------------------ writing
def save_params(
    model: Any, table: Sequence[Tensor], output: pathlib.Path, *, like: pathlib.Path | None, dtype: Any = None
) -> None:
    """Writes a model's safetensors under the official names.

    Args:
      model: the parameters; sharded ones are gathered a parameter at a time. Process 0 writes.
      table: the family's names.
      output: an existing folder.
      like: the checkpoint that the model came from: the same files with the same tensors in the same
        dtypes are written. Without it, files of at most 5 GB of `dtype`, with an index.
      dtype: used without `like`.
    """
    named = tensors(table, model)
    if like is not None:
        stored = stored_tensors(like)
        check_names(named, stored, like)
        dtypes = {name: np.dtype(_np_dtype(DTYPES[there.dtype])) for name, there in stored.items()}
        files: dict[str, list[str]] = {}
        for name, there in stored.items():
            files.setdefault(there.file, []).append(name)
    else:
        dtypes = dict.fromkeys(named, np.dtype(_np_dtype(dtype)))
        sizes = {name: math.prod(entry.shape) * dtypes[name].itemsize for name, entry in named.items()}
        files = split(sizes)
        if len(files) > 1:
            index: dict[str, Any] = {"metadata": {"total_size": sum(sizes.values())}}
            index["weight_map"] = {name: file for file, names in files.items() for name in names}
            (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    leaves = sharding.named(model)
    for file, names in files.items():
        written = {}
        for name in names:
            entry = named[name]
            layer = layer_of(entry, name)
            tensor = np.empty(entry.shape, dtypes[name])
            for part in entry.parts:
                value = leaves[part.ours] if layer is None else leaves[part.ours][layer]
                part.insert(_gathered(value), tensor)
            written[name] = tensor
        if jax.process_index() == 0:
            save_file(written, output / file, metadata={"format": "pt"})
            (output / file).chmod(0o644)  # safetensors writes for its owner only


def _np_dtype(name: Any) -> Any:
    return jax.numpy.dtype(name)


def _gathered(value: jax.Array) -> np.ndarray:
    if value.is_fully_addressable:
        return np.asarray(value)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(value, tiled=True))


def load_head(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """A reward model's head: float32, weight [D], bias [] and likelihood [].

    Raises:
      ValueError: the folder holds none: it is a policy's.
    """
    try:
        with safetensors.safe_open(folder / HEAD, framework="numpy") as file:
            values = {name: file.get_tensor(f"score.{name}") for name in HEAD_NAMES}
            return {name: value[0] for name, value in values.items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder / HEAD}: {error}; a policy's folder has no head") from error


def save_head(head: dict[str, jax.Array], output: pathlib.Path) -> None:
    """Writes a reward model's head (see `load_head`), each with a leading 1. Process 0 writes."""
    values = {f"score.{name}": _gathered(value)[None] for name, value in head.items()}
    if jax.process_index() == 0:
        save_file(values, output / HEAD, metadata={"format": "pt"})
        (output / HEAD).chmod(0o644)


def split(sizes: dict[str, int]) -> dict[str, list[str]]:
    """File names and the tensors in each, from the tensors' sizes in bytes: at most `SHARD` a file."""
    groups: list[list[str]] = [[]]
    room = SHARD
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = SHARD
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": names for i, names in enumerate(groups, start=1)}


def copy_files(source: pathlib.Path, output: pathlib.Path) -> list[str]:
    """Takes along everything that is not weights, unchanged: configs, tokenizer, processor, licence.

    Returns:
      The names, sorted.
    """
    names = []
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in WEIGHTS and not path.name.startswith("."):
            shutil.copyfile(path, output / path.name)
            names.append(path.name)
    return names


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family's file offers.

    Attributes:
      read_config: (folder) -> the family's config, from its JSON files.
      config_files: (config, dtype name) -> {file name: JSON values}, for a policy that has no folder.
      table: (config) -> names of its checkpoint tensors.
      model: (config, nnx.Rngs) -> the model.
      processor: (config, tokenizer) -> its host side.
      load_tokenizer: (folder) -> the tokenizer.
      pixels: (config, crops) -> shapes of the pixels of a prompt with so many crops.
    """

    read_config: Callable[[pathlib.Path], Any]
    config_files: Callable[[Any, str], dict[str, Any]]
    table: Callable[[Any], list[Tensor]]
    model: Callable[..., Any]
    processor: Callable[..., Any]
    load_tokenizer: Callable[[pathlib.Path], Any]
    pixels: Callable[[Any, int], Any]
