"""The programs of a config, lowered from shapes alone for a mesh whose devices need not exist."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.experimental import topologies

from mstar_jax import configure, models, sharding
from mstar_jax.data import loader
from mstar_jax.inference import draw, generate
from mstar_jax.inference.sampler import Entry, Sampler
from mstar_jax.models import vlm
from mstar_jax.plan import official
from mstar_jax.profiling import flops
from mstar_jax.rewards import prm
from mstar_jax.structs import Batch
from mstar_jax.training import optimizer
from mstar_jax.training.step import abstract_state, make_train_step, token_loss

# Without a TPU, libtpu must not query the metadata server or lock the device; a type and a host name end its
# search for both.
COMPILE_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

Tree = TypeVar("Tree")  # any pytree


class Program(NamedTuple):
    """A lowered program.

    Attributes:
      title: what it is, with its sizes.
      lowered: ready to be compiled.
      flops: of the model, by part, on all devices.
    """

    title: str
    lowered: jax.stages.Lowered
    flops: dict[str, float]


def policy_of(config: ml_collections.ConfigDict) -> tuple[models.hf.Family, official.Dimensions]:
    """The family and the dimensions of the config's policy, without its weights.

    Raises:
      ValueError: the config names no policy.
    """
    values = config.policy
    if values.path:
        source = models.Pretrained(values.path, max_crops=values.max_crops)
        return source.family, configure.adapted(source.config, config.train)
    if values.decoder.num_layers:
        return models.phi35.FAMILY, configure.adapted(configure.policy_config(values), config.train)
    if values.family not in official.OFFICIAL:
        known = ", ".join(official.OFFICIAL)
        raise ValueError(f"policy.family = {values.family!r}: set policy.path, or one of {known}")
    found = configure.adapted(official.OFFICIAL[values.family], config.train)
    crops = values.max_crops
    return models.FAMILIES[values.family], dataclasses.replace(found, num_crops=crops) if crops else found


class Programs:
    """The programs of a config for a mesh, lowered from shapes alone."""

    def __init__(self, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh):
        self.config = config
        self.mesh = mesh
        self.family, self.dimensions = policy_of(config)
        self.crops = self.dimensions.num_crops + 1  # one more for the whole image

    def build(self) -> vlm.VisionLanguageModel:
        """The policy with random parameters; meant for `jax.eval_shape`."""
        return self.family.model(self.dimensions, nnx.Rngs(0))

    def lower(self, name: str) -> Iterator[Program]:
        """The programs of one of train, rollouts and score."""
        yield from {"train": self._train, "rollouts": self._rollouts, "score": self._score}[name]()

    def _placed(self, tree: Tree, layout: Tree) -> Tree:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layout)

    def _weights(
        self, build: Callable[[], vlm.VisionLanguageModel | vlm.RewardModel]
    ) -> vlm.VisionLanguageModel | vlm.RewardModel:
        """The parameters as the sampler uses them."""
        dtype = jnp.dtype(self.config.sampling.dtype)
        abstract = jax.eval_shape(lambda: build().merged(dtype))
        return self._placed(abstract, sharding.shardings(abstract, sharding.SAMPLE, self.mesh))

    def _batch(self, rows: int, length: int) -> Batch:
        """A batch of rows, each with an image of the maximum number of crops."""
        number = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        value = jax.ShapeDtypeStruct((rows, length), jnp.float32)
        pixels = self.family.pixels(self.dimensions, self.crops)
        pixels = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype), pixels)
        batch = Batch(number, number, value, number, pixels, value)
        return self._placed(batch, jax.tree.map(lambda _: sharding.batch_sharding(self.mesh), batch))

    def _train(self) -> Iterator[Program]:
        c = self.config.train
        e = self.config.evolve
        sharding.check_divides("evolve.batch", e.batch, self.mesh, c.accumulate)
        tx = configure.optimizer(c)
        frozen = configure.frozen(c)
        dtype = configure.base_dtype(c)
        compute = jnp.dtype(c.dtype)
        state = abstract_state(
            lambda: optimizer.cast_frozen(self.build(), frozen, dtype), tx, self.mesh, frozen=frozen
        )
        step = make_train_step(
            tx, self.mesh, frozen=frozen, accumulate=c.accumulate, dtype=compute, remat=c.remat
        )
        kept = (e.keep or e.k) * self.config.sampling.max_new_tokens
        length = loader.bucket(
            min(self.config.data.max_prompt + kept, max(self.config.data.buckets)), self.config.data.buckets
        )
        batch = self._batch(e.batch, length)

        def loss(trained: nnx.Module, fixed: nnx.Module, batch: Batch) -> jax.Array:
            model = optimizer.join(optimizer.Parts(trained, fixed))
            return token_loss(sharding.cast(model, compute), batch)[0]

        own = flops.count(jax.grad(loss), *optimizer.split(state.params, frozen), batch)
        lowered = step.lower(state, batch, np.float32(0))
        yield Program(f"train step, {e.batch} rows of {length}", lowered, own)

    def _rollouts(self) -> Iterator[Program]:
        c = self.config.sampling
        k = self.config.evolve.k
        sharding.check_divides("sampling.batch", c.batch, self.mesh)
        length = loader.bucket(self.config.data.max_prompt, self.config.data.buckets)
        settings = draw.SamplingConfig(k, c.max_new_tokens, c.top_k, c.top_p, c.min_p, cache=c.cache)
        shards = sharding.batch_shards(self.mesh)
        host: Any = _Host(self.dimensions.decoder.vocab_size)
        sampler = Sampler(host, settings, c.batch, shards)
        size = generate.entering(c.batch, c.refill, shards)
        batch = self._batch(size, length)
        model = self._weights(self.build)
        rows = sharding.batch_sharding(self.mesh)

        def per_row(dtype: jnp.dtype, *shape: int) -> Any:  # a shape in an array's place
            return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

        slots = jax.eval_shape(sampler.blank, model, batch, None)
        slots = self._placed(slots, sampler.layout(slots, self.mesh))
        key = jax.eval_shape(lambda: jax.random.key(0))
        entry = Entry(
            batch,
            per_row(jnp.uint32, size),
            per_row(jnp.int32, size, k),
            per_row(jnp.uint32, size, k),
            None,
            per_row(jnp.int32, c.batch),
        )
        entering = (model, slots, key, entry)
        title = f"prefill, {size} rows of {length} into {c.batch}"
        own = flops.count(sampler.enter, *entering)
        yield Program(title, sampler.enter.lower(*entering), own)
        temperatures = jax.ShapeDtypeStruct((k,), jnp.float32)
        iteration = jax.ShapeDtypeStruct((), jnp.int32)
        decoding = (model, slots, temperatures, iteration)
        title = f"decoding step, {c.batch} rows of {k} samples, {c.max_new_tokens} tokens"
        own = flops.count(sampler.advance, *decoding)
        yield Program(title, sampler.advance.lower(*decoding), own)

    def _score(self) -> Iterator[Program]:
        rows = self.config.prm.batch
        sharding.check_divides("prm.batch", rows, self.mesh)
        length = max(self.config.data.buckets)
        model = self._weights(lambda: vlm.RewardModel(self.build()))
        batch = self._batch(rows, length)
        own = flops.count(prm.token_scores, model, batch)
        yield Program(f"score, {rows} rows of {length}", prm.token_scores.lower(model, batch), own)


class _Host:
    """The part of a processor that a sampler is compiled from."""

    stop_ids = (0,)
    forbidden_ids = ()

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size


def devices_of(topology: str) -> list[jax.Device]:
    """The devices of a TPU topology, which need not be present.

    Raises:
      ValueError: libtpu is not installed, or does not know the topology.
    """
    for name, value in COMPILE_ONLY.items():
        os.environ.setdefault(name, value)
    try:
        found = list(topologies.get_topology_desc(topology, "tpu").devices)
    except Exception as error:  # a compiler for another machine may raise anything
        first = str(error).splitlines()[0]
        hint = "expected one like v5e:4x4 or v5p:2x2x4, and libtpu installed (pip install libtpu)"
        raise ValueError(f"--topology={topology}: {first}; {hint}") from error
    if any(getattr(device, "core_on_chip", 0) for device in found):
        raise ValueError(f"--topology={topology}: chips of two devices each, as of TPU v4, cannot be planned")
    return found
