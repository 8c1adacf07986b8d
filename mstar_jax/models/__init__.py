"""The policies: shared layers, the vision transformer, checkpoint names, and one file per model family.

from mstar_jax import models
model, processor = models.load("/checkpoints/Phi-3.5-vision-instruct")
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from transformers import PreTrainedTokenizerFast

from mstar_jax import sharding
from mstar_jax.models import (
    head,
    hf,
    internvl_chat,
    internvl_hf,
    layers,
    minicpmv25,
    names,
    phi35,
    qwen3vl,
    qwen25vl,
    smolvlm,
    vlm,
)
from mstar_jax.structs import Processor

FAMILIES: dict[str, hf.Family[Any]] = {
    "phi3_v": phi35.FAMILY,
    "internvl_chat": internvl_chat.FAMILY,
    "internvl": internvl_hf.FAMILY,
    "minicpmv": minicpmv25.FAMILY,
    "smolvlm": smolvlm.FAMILY,
    "idefics3": smolvlm.FAMILY,
    "qwen2_5_vl": qwen25vl.FAMILY,
    "qwen3_vl": qwen3vl.FAMILY,
}


class Pretrained:
    """A policy's checkpoint folder, of any family. Only JSON files are read until `load`.

    Attributes:
      folder: the folder.
      family: see `hf.Family`.
      config: the family's config.
    """

    config: vlm.PolicyConfig

    def __init__(self, path: str | os.PathLike, *, max_crops: int | None = None):
        """Reads config.json.

        Args:
          path: a local folder, or a hub id.
          max_crops: the most crops, tiles or slices of an image; None keeps the checkpoint's number.

        Raises:
          ValueError: there is no such folder, or it holds none of the known families.
        """
        self.folder = hf.local_folder(path)
        kind = hf.read_json(self.folder / "config.json").get("model_type")
        if kind not in FAMILIES:
            raise ValueError(
                f"{self.folder}/config.json: model_type {kind!r} is none of {', '.join(FAMILIES)}"
            )
        self.family = FAMILIES[kind]
        try:
            self.config = self.family.read_config(self.folder)
        except KeyError as error:
            raise ValueError(f"{self.folder}/config.json: {error} is missing") from error
        except TypeError as error:
            raise ValueError(f"{self.folder}/config.json: {error}") from error
        if max_crops is not None:
            self.config = dataclasses.replace(self.config, num_crops=max_crops)

    def build(self, seed: int = 0) -> vlm.VisionLanguageModel:
        """The model with random parameters; under `jax.eval_shape`, its shapes."""
        return self.family.model(self.config, nnx.Rngs(seed))

    def tokenizer(self) -> hf.Tokenizer | PreTrainedTokenizerFast:
        """The policy's tokenizer."""
        return self.family.load_tokenizer(self.folder)

    def processor(self) -> Processor:
        """The policy's processor."""
        return self.family.processor(self.config, self.tokenizer())

    def load(
        self,
        dtype: DTypeLike = jnp.bfloat16,
        *,
        mesh: Mesh | None = None,
        rules: sharding.Rules = sharding.TRAIN,
        seed: int = 0,
        beside: Sequence[str] = (),
    ) -> vlm.VisionLanguageModel:
        """Reads the parameters directly into their sharding, see `hf.load_params`.

        If the config has adapters, they are initialised from the seed and are float32. Tensors `beside` the
        policy's are left out.
        """
        abstract = jax.eval_shape(self.build)
        layout = sharding.shardings(abstract, rules, mesh) if mesh else None
        return hf.load_params(
            self.folder,
            self.family.table(self.config),
            abstract,
            layout=layout,
            own=self._adapters(seed, layout),
            dtype=jnp.dtype(dtype),
            beside=beside,
        )

    def _adapters(self, seed: int, layout: vlm.VisionLanguageModel | None) -> dict[str, jax.Array]:
        def adapters(tree):
            return {n: x for n, x in sharding.named(tree).items() if re.search(layers.ADAPTERS, n)}

        init = jax.jit(lambda: adapters(self.build(seed)), out_shardings=layout and adapters(layout))
        return init() if self.config.decoder.lora_rank else {}

    def save(self, model: vlm.VisionLanguageModel | vlm.RewardModel, output: str | os.PathLike) -> None:
        """Writes a policy, or a reward model with a policy as its trunk, as a folder like this one: with the
        same files, tensor names and dtypes."""
        output = pathlib.Path(output)
        output.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            hf.copy_files(self.folder, output)
        _write(model, self.family.table(self.config), output, like=self.folder)

    def find_head(self, chosen: str = "") -> head.Foreign | None:
        """Where the reward model's head is, from the files' headers; see `head.find`.

        Raises:
          ValueError: the folder holds a policy only, several tensors that may be the head, or other ones.
        """
        trunk = hf.tensors(self.family.table(self.config), jax.eval_shape(self.build))
        found = head.find(self.folder, list(trunk), self.config.decoder.hidden_size, chosen)
        self._check_names(found.beside if found else ())
        return found

    def check_headless(self) -> None:
        """Checks that the folder holds a policy and no head of a reward model, by the files' headers.

        Raises:
          ValueError: it has a head, or other tensors than the policy's.
        """
        if (self.folder / hf.HEAD).exists():
            raise ValueError(
                f"{self.folder} has a head, {hf.HEAD}, so no token scores: leave prm.token empty"
            )
        self._check_names(())

    def _check_names(self, beside: Sequence[str]) -> None:
        trunk = hf.tensors(self.family.table(self.config), jax.eval_shape(self.build))
        stored = hf.stored_tensors(self.folder)
        hf.check_names(trunk, {name: x for name, x in stored.items() if name not in beside}, self.folder)

    def load_reward(
        self,
        dtype: DTypeLike = jnp.bfloat16,
        *,
        mesh: Mesh | None = None,
        rules: sharding.Rules = sharding.TRAIN,
        chosen: str = "",
    ) -> vlm.RewardModel:
        """Reads a reward model: one that `save` wrote here, or one of others, whose head is a scalar layer
        among the policy's tensors, the one named `chosen` or the only one. The head stays float32.

        Raises:
          ValueError: see `find_head`.
        """
        found = self.find_head(chosen)
        model = vlm.RewardModel(
            self.load(dtype, mesh=mesh, rules=rules, beside=found.beside if found else ())
        )
        layout = sharding.named(sharding.shardings(model, rules, mesh)) if mesh else {}
        for name, value in head.load(self.folder, found).items():
            getattr(model, name).set_value(jax.device_put(value, layout.get(name)))
        return model


def load(
    path: str | os.PathLike,
    dtype: DTypeLike = jnp.bfloat16,
    *,
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.TRAIN,
) -> tuple[vlm.VisionLanguageModel, Processor]:
    """Loads a policy of any family.

    Args:
      path: a folder with config.json, *.safetensors and tokenizer files, or a hub id.
      dtype: of the parameters.
      mesh, rules: the sharding to read into; without a mesh, the first device.

    Returns:
      The model and its processor.

    Raises:
      ValueError: the folder does not hold such a policy; the message lists everything that does not fit.
    """
    source = Pretrained(path)
    processor = source.processor()
    return source.load(dtype, mesh=mesh, rules=rules), processor


def pretrained(path: str | os.PathLike, family: hf.Family[Any] | None, max_crops: int | None) -> Pretrained:
    """A checkpoint, with a policy's `max_crops` if it is of the same model, in whichever format: others count
    something else.

    Raises:
      ValueError: it is of no known family.
    """
    found = Pretrained(path)
    same = family is not None and found.family.model is family.model
    return Pretrained(path, max_crops=max_crops) if max_crops and same else found


class FromScratch:
    """A policy without a checkpoint: a config, and a folder with its tokenizer.

    Attributes:
      family: see `hf.Family`.
      config: the family's config.
      folder: holds the tokenizer.
    """

    def __init__(self, family: hf.Family[Any], config: vlm.PolicyConfig, folder: str | os.PathLike):
        self.family = family
        self.config = config
        self.folder = pathlib.Path(folder)

    def build(self, seed: int = 0) -> vlm.VisionLanguageModel:
        """The model with random parameters; under `jax.eval_shape`, its shapes."""
        return self.family.model(self.config, nnx.Rngs(seed))

    def processor(self) -> Processor:
        """The policy's processor."""
        return self.family.processor(self.config, self.family.load_tokenizer(self.folder))

    def save(
        self,
        model: vlm.VisionLanguageModel | vlm.RewardModel,
        output: str | os.PathLike,
        dtype: str = "float32",
    ) -> None:
        """Writes a policy, or a reward model with a policy as its trunk, as a checkpoint folder in the
        family's format, which `load` can read."""
        output = pathlib.Path(output)
        output.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            hf.copy_files(self.folder, output)
            for name, values in self.family.config_files(self.config, dtype).items():
                (output / name).write_text(json.dumps(values, indent=2))
        _write(model, self.family.table(self.config), output, dtype=dtype)


def _write(
    model: vlm.VisionLanguageModel | vlm.RewardModel,
    table: list[names.Tensor],
    output: pathlib.Path,
    *,
    like: pathlib.Path | None = None,
    dtype: str = "float32",
) -> None:
    policy = model.trunk if isinstance(model, vlm.RewardModel) else model
    hf.save_params(policy.merged(), table, output, like=like, dtype=dtype)
    if isinstance(model, vlm.RewardModel):
        head.save({name: getattr(model, name)[...] for name in head.NAMES}, output)
