"""Checkpoints in Hugging Face format: safetensors, read and written one tensor at a time."""

import dataclasses
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import jax
import numpy as np
import safetensors
from flax import nnx
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from mstar_jax import sharding, structs
from mstar_jax.models.names import JSON, Part, Tensor, layer_of, only, tensors
from mstar_jax.models.vlm import PolicyConfig, VisionLanguageModel

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")
HEAD = "reward_head.safetensors"  # a reward model's head, in the same folder as its trunk
EMBEDDINGS = ("decoder.embedding", "decoder.head")  # what tools save a second time
SHARD = 5 * 10**9  # bytes; the size limit of a file that is written


# ------------------------------------------------------------------------------------------- folders
def local_folder(path: str | os.PathLike) -> pathlib.Path:
    """The folder itself, or the snapshot of a hub id (weights, configs and tokenizer files, never code).

    Raises:
      ValueError: neither exists.
    """
    folder = pathlib.Path(path)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or str(path).count("/") != 1:
        raise ValueError(f"{path}: no such folder, and a hub id would be owner/name")
    import huggingface_hub

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return pathlib.Path(huggingface_hub.snapshot_download(str(path), allow_patterns=wanted))
    except Exception as error:
        raise ValueError(f"{path}: no such folder, and the hub could not provide it: {error}") from error


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      ValueError: the file is missing or is not a JSON object; the message names it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def read_images(folder: pathlib.Path, wanted: JSON) -> JSON:
    """How images are processed: the values of preprocessor_config.json or, as transformers 5 writes it, of
    `image_processor` in processor_config.json; without either, none.

    Raises:
      ValueError: another value than a wanted one; the message names the file and the key.
    """
    found: JSON = {}
    for name, part in (("processor_config.json", "image_processor"), ("preprocessor_config.json", "")):
        if (folder / name).exists():
            values = read_json(folder / name)
            values = (values.get(part) or {}) if part else values
            only(values, wanted, f"{folder}/{name}:")
            found |= values
    return found


class Stored(NamedTuple):
    """Where a checkpoint tensor is stored."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def stored_tensors(folder: pathlib.Path) -> dict[str, Stored]:
    """The tensors of a folder's safetensors files, from their headers; files in the order of their names.

    Raises:
      ValueError: there is no safetensors file, one is damaged, or two hold the same tensor.
    """
    found: dict[str, Stored] = {}
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != HEAD)
    if not files:
        raise ValueError(f"{folder}: no *.safetensors file, and no other format is read")
    for path in files:
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118  (not a dictionary)
                    part = file.get_slice(name)
                    if name in found:
                        raise ValueError(f"{path}: {name} is also in {found[name].file}")
                    found[name] = Stored(path.name, part.get_dtype(), tuple(part.get_shape()))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: {error}; is the file complete?") from error
    return found


def check_names(named: dict[str, Tensor], stored: dict[str, Stored], folder: pathlib.Path) -> dict[str, str]:
    """Checks that the folder holds exactly the tensors that the model needs.

    Returns:
      {name of a further tensor: the embedding or head that it equals}: some tools save tied or shared
      embeddings twice.

    Raises:
      ValueError: lists all tensors that are missing, unexpected, of a wrong shape or of an unknown dtype.
    """
    faults = [f"missing: {name}" for name in named if name not in stored]
    tables = [name for name, entry in named.items() if entry.parts[0].ours in EMBEDDINGS and name in stored]
    copies: dict[str, str] = {}
    for name in (name for name in stored if name not in named):
        same = (other for other in tables if _equal(folder, stored[name], name, stored[other], other))
        if (other := next(same, None)) is not None:
            copies[name] = other
        else:
            faults.append(f"unexpected: {name}")
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
    return copies


def _equal(folder: pathlib.Path, one: Stored, name: str, two: Stored, other: str) -> bool:
    if one[1:] != two[1:]:
        return False
    return np.array_equal(tensor(folder, one, name), tensor(folder, two, other))


def tensor(folder: pathlib.Path, there: Stored, name: str) -> np.ndarray:
    """One tensor of a checkpoint."""
    # the file is opened for every tensor, so that only this tensor stays mapped into memory
    with safetensors.safe_open(folder / there.file, framework="numpy") as file:
        return file.get_tensor(name)


def check_finite(value: np.ndarray, name: str, folder: pathlib.Path) -> np.ndarray:
    """Returns the value.

    Raises:
      ValueError: it holds NaN or infinite numbers.
    """
    if bad := value.size - np.count_nonzero(np.isfinite(value)):
        raise ValueError(
            f"{folder}: {bad} of {value.size} values of {name} are NaN or infinite; the checkpoint was "
            "damaged, or saved from a diverged run or with too narrow a dtype"
        )
    return value


# ------------------------------------------------------------------------------------------ reading
def load_params(
    folder: pathlib.Path,
    table: Sequence[Tensor],
    abstract: VisionLanguageModel,
    *,
    layout: VisionLanguageModel | None,
    own: Mapping[str, jax.Array],
    dtype: np.dtype,
    beside: Sequence[str] = (),
) -> VisionLanguageModel:
    """Reads a model directly into its sharding, with one checkpoint tensor in memory at a time.

    Args:
      folder: holds *.safetensors.
      table: the family's names.
      abstract: the model's shapes (`jax.eval_shape`).
      layout: the model's shardings; None puts everything on the first device. A process holds its own shards
        only.
      own: parameters that are not in the checkpoint, by name; they are used as they are.
      dtype: of the parameters.
      beside: tensors of the checkpoint that belong to something else.

    Raises:
      ValueError: the names or shapes do not fit, see `check_names`, or a value is NaN or infinite.
    """
    stored, named = stored_tensors(folder), tensors(table, abstract)
    check_names(named, {name: there for name, there in stored.items() if name not in beside}, folder)
    sources: dict[str, list[tuple[str, Part]]] = {}  # our parameter -> tensors that hold it, layer by layer
    for name, entry in named.items():
        for part in entry.parts:
            sources.setdefault(part.ours, []).append((name, part))

    def read(name: str, part: Part, shape: tuple[int, ...]) -> np.ndarray:
        return check_finite(part.extract(tensor(folder, stored[name], name), shape), name, folder)

    def place(path, leaf: jax.ShapeDtypeStruct, target: jax.sharding.Sharding) -> jax.Array:
        name = sharding.parameter_name(path)
        if name in own:
            return own[name]
        found = sources[name]
        stacked = layer_of(named[found[0][0]], found[0][0]) is not None
        shape = leaf.shape[1:] if stacked else leaf.shape
        values = (read(name, part, shape) for name, part in found)
        return _scatter(values, leaf.shape, stacked, dtype, target)

    if layout is None:
        first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        layout = jax.tree.map(lambda _: first, abstract)
    return jax.tree_util.tree_map_with_path(place, abstract, layout)


def _scatter(
    values: Iterator[np.ndarray],
    shape: tuple[int, ...],
    stacked: bool,
    dtype: np.dtype,
    target: jax.sharding.Sharding,
) -> jax.Array:
    """Copies values (one per layer if `stacked`) into this process's shards and puts them on its devices."""
    spans = {
        device: tuple(s.indices(n) for s, n in zip(index or (), shape))
        for device, index in target.addressable_devices_indices_map(shape).items()
    }
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
    model: VisionLanguageModel,
    table: Sequence[Tensor],
    output: pathlib.Path,
    *,
    like: pathlib.Path | None,
    dtype: str,
) -> None:
    """Writes a model's safetensors under the official names.

    Args:
      model: the parameters; sharded ones are gathered one parameter at a time. Process 0 writes.
      table: the family's names.
      output: an existing folder.
      like: the checkpoint that the model came from: the same files are written, with the same tensors in the
        same dtypes. If None, files of at most 5 GB are written, with an index.
      dtype: of the files, if `like` is None.
    """
    named = tensors(table, model)
    if like is not None:
        stored = stored_tensors(like)
        named |= {name: named[other] for name, other in check_names(named, stored, like).items()}
        dtypes = {name: jax.numpy.dtype(DTYPES[there.dtype]) for name, there in stored.items()}
        files: dict[str, list[str]] = {}
        for name, there in stored.items():
            files.setdefault(there.file, []).append(name)
    else:
        dtypes = dict.fromkeys(named, jax.numpy.dtype(dtype))
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
                part.insert(gathered(value), tensor)
            written[name] = tensor
        if jax.process_index() == 0:
            save_file(written, output / file, metadata={"format": "pt"})
            (output / file).chmod(0o644)  # safetensors makes files that only their owner can read


def gathered(value: jax.Array) -> np.ndarray:
    """The whole of an array that may be sharded over processes."""
    if value.is_fully_addressable:
        return np.asarray(value)
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))


def split(sizes: dict[str, int]) -> dict[str, list[str]]:
    """{file name: tensors in it}, from the tensors' sizes in bytes; a file has at most `SHARD` bytes."""
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
    """Copies all files except weights: configs, tokenizer, processor, licence.

    Returns:
      Their names, sorted.
    """
    names = []
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in WEIGHTS and not path.name.startswith("."):
            shutil.copyfile(path, output / path.name)
            names.append(path.name)
    return names


class Tokenizer(Protocol):
    """What a processor needs of a tokenizer."""

    def __len__(self) -> int: ...

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Mapping[str, list[int]]:
        """{"input_ids": ids}."""

    def get_vocab(self) -> dict[str, int]:
        """{token: id}."""

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of these ids."""


Config = TypeVar("Config", bound=PolicyConfig)
Shapes = jax.ShapeDtypeStruct | tuple[jax.ShapeDtypeStruct, ...]


@dataclasses.dataclass(frozen=True)
class Family(Generic[Config]):
    """What the file of a model family provides.

    Attributes:
      read_config: (folder) -> the family's config, from the folder's JSON files.
      config_files: (config, dtype name) -> {file name: JSON values}, for a policy that has no folder.
      table: (config) -> the names of its checkpoint tensors.
      model: (config, rngs) -> the model.
      processor: (config, tokenizer) -> its processor.
      load_tokenizer: (folder) -> the tokenizer.
      pixels: (config, crops) -> the shapes of the pixels of a prompt with this many crops.
    """

    read_config: Callable[[pathlib.Path], Config]
    config_files: Callable[[Config, str], dict[str, dict[str, Any]]]
    table: Callable[[Config], list[Tensor]]
    model: Callable[[Config, nnx.Rngs], VisionLanguageModel]
    processor: Callable[[Config, Any], structs.Processor]
    load_tokenizer: Callable[[pathlib.Path], Any]
    pixels: Callable[[Config, int], Shapes]
