"""A reward model's head in a checkpoint: a file of its own beside the trunk, or a tensor among the trunk's.

The second is how others save theirs: the family's tensors and a linear layer with one output, under any name.
"""

import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
import safetensors
from safetensors.numpy import save_file

from mstar_jax.models import hf

log = logging.getLogger(__name__)

NAMES = ("weight", "bias", "likelihood")  # of `vlm.RewardModel`


class Foreign(NamedTuple):
    """The names of a scalar head's tensors among those of a checkpoint.

    Attributes:
      weight: the head's.
      bias: the head's; empty if it has none.
      beside: the tensors of this head and of those that were not chosen.
    """

    weight: str
    bias: str
    beside: tuple[str, ...]


def find(folder: pathlib.Path, known: Sequence[str], width: int, chosen: str = "") -> Foreign | None:
    """Looks for the head by the headers of the files; None if it is in a file of its own.

    Args:
      folder: of the checkpoint.
      known: names of the trunk's tensors.
      width: D, of the trunk's hidden states.
      chosen: name of the head's weight [D], [1, D] or [D, 1], where there are several; see `prm.head`.

    Raises:
      ValueError: there is no head, or there are several and none is chosen.
    """
    if (folder / hf.HEAD).exists() and not chosen:
        return None
    stored = hf.stored_tensors(folder)
    further = {name: there.shape for name, there in stored.items() if name not in set(known)}
    heads = [name for name, shape in further.items() if shape in ((width,), (1, width), (width, 1))]
    scalars = [name for name, shape in further.items() if shape in ((), (1,))]
    told = ", ".join(heads) or "none"
    if chosen and chosen not in heads:
        raise ValueError(f"{folder}: prm.head={chosen} is no further tensor of {width} values; such: {told}")
    if not heads:
        raise ValueError(
            f"{folder}: no {hf.HEAD}, and no tensor besides the policy's that maps {width} values to one: "
            f"a policy's folder has no head; if a token scores, name it by prm.token"
        )
    if len(heads) > 1 and not chosen:
        raise ValueError(f"{folder}: several tensors may be the head: {told}; choose one by prm.head")
    weight = chosen or heads[0]
    biases = {name: [s for s in scalars if s.rpartition(".")[0] == name.rpartition(".")[0]] for name in heads}
    near = biases[weight]
    if len(near) > 1:
        raise ValueError(f"{folder}: several tensors may be the bias of {weight}: {', '.join(near)}")
    if others := [name for name in heads if name != weight]:
        log.warning("%s: %s is the head; %s is not read", folder, weight, ", ".join(others))
    beside = {*heads, *(bias for each in biases.values() for bias in each)}
    return Foreign(weight, near[0] if near else "", tuple(beside))


def load(folder: pathlib.Path, found: Foreign | None) -> dict[str, np.ndarray]:
    """Reads a head: float32 weight [D], bias [] and likelihood []. A foreign one weighs no likelihood.

    Raises:
      ValueError: the file is damaged, or a value is NaN or infinite.
    """
    if found is None:
        try:
            with safetensors.safe_open(folder / hf.HEAD, framework="numpy") as file:
                values = {name: file.get_tensor(f"score.{name}")[0] for name in NAMES}
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{folder / hf.HEAD}: {error}") from error
        return {name: hf.check_finite(value, f"score.{name}", folder) for name, value in values.items()}
    stored = hf.stored_tensors(folder)

    def read(name: str) -> np.ndarray:
        value = hf.tensor(folder, stored[name], name).astype(np.float32)
        return hf.check_finite(value, name, folder).reshape(-1)

    weight = read(found.weight)
    bias = read(found.bias)[0] if found.bias else np.float32(0)
    # `vlm.RewardModel` divides by the root of the width
    return {
        "weight": weight * np.float32(len(weight) ** 0.5),
        "bias": np.asarray(bias),
        "likelihood": np.zeros((), np.float32),
    }


def save(head: Mapping[str, jax.Array], output: pathlib.Path) -> None:
    """Writes a head (see `load`) into a file of its own, each array with a leading 1. Process 0 writes."""
    values = {f"score.{name}": hf.gathered(value)[None] for name, value in head.items()}
    if jax.process_index() == 0:
        save_file(values, output / hf.HEAD, metadata={"format": "pt"})
        (output / hf.HEAD).chmod(0o644)
