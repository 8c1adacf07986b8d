"""The programs of a config for a mesh that need not be there, lowered from shapes alone."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.experimental import topologies

from mstar_jax import configure, models, sharding
from mstar_jax.data import loader
from mstar_jax.inference import draw, generate
from mstar_jax.inference.sampler import Sampler
from mstar_jax.models import vlm
from mstar_jax.plan import official
from mstar_jax.profiling import flops
from mstar_jax.rewards import prm
from mstar_jax.structs import Batch
from mstar_jax.training import optimizer
from mstar_jax.training.step import abstract_state, make_train_step, token_loss

# There is no TPU that libtpu could ask about itself, or keep from others; a type and a host end its search.
COMPILE_ONLY = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
COMPILE_ONLY |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}


def policy_of(config: ml_collections.ConfigDict) -> tuple[models.hf.Family, Any]:
    """The family and the dimensions of the config's policy, without a weight.

    Raises:
      ValueError: it names none.
    """
    values = config.policy
    if values.path:
        source = models.Pretrained(values.path, max_crops=values.max_crops)
        return source.family, configure.adapted(source.config, config.train)
    if values.decoder.num_layers:
        return models.phi35.FAMILY, configure.adapted(configure.policy_config(values), config.train)
    if values.family not in official.OFFICIAL:
        known = ", ".join(official.OFFICIAL)
        raise ValueError(f"policy.family = {values.family!r}: give policy.path, or one of {known}")
    found = configure.adapted(official.OFFICIAL[values.family], config.train)
    crops = values.max_crops
    return models.FAMILIES[values.family], dataclasses.replace(found, num_crops=crops) if crops else found


class Programs:
    """The programs of a config for a mesh, lowered from shapes alone."""

    def __init__(self, config: ml_collections.ConfigDict, mesh: Any):
        self.config, self.mesh = config, mesh
        self.family, self.dimensions = policy_of(config)
        self.crops = self.dimensions.num_crops + 1  # and the image as a whole
        self.build = lambda: self.family.model(self.dimensions, nnx.Rngs(0))

    def lower(self, name: str) -> Iterator[tuple[str, Any, dict[str, float]]]:
        """(program, lowered, FLOPs of the model by part) of one of train, rollouts and score."""
        yield from {"train": self._train, "rollouts": self._rollouts, "score": self._score}[name]()

    def _placed(self, tree: Any, layout: Any) -> Any:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layout)

    def _weights(self, build: Callable[[], Any]) -> Any:
        """Parameters as they are sampled with."""
        c = self.config.sampling
        abstract = jax.eval_shape(lambda: build().merged(jnp.dtype(c.dtype)))
        return self._placed(abstract, sharding.shardings(abstract, sharding.SAMPLE, self.mesh))

    def _batch(self, rows: int, length: int) -> Batch:
        """A batch of rows, each with an image of the greatest number of crops."""
        number = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        value = jax.ShapeDtypeStruct((rows, length), jnp.float32)
        pixels = self.family.pixels(self.dimensions, self.crops)
        pixels = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype), pixels)
        batch = Batch(number, number, value, number, pixels, value)
        return self._placed(batch, jax.tree.map(lambda _: sharding.batch_sharding(self.mesh), batch))

    def _train(self) -> Iterator[tuple[str, Any, dict[str, float]]]:
        c, e = self.config.train, self.config.evolve
        sharding.check_divides("evolve.batch", e.batch, self.mesh, c.accumulate)
        tx = configure.optimizer(c)
        frozen = configure.frozen(c)
        dtype = configure.base_dtype(c)
        state = abstract_state(
            lambda: optimizer.cast_frozen(self.build(), frozen, dtype), tx, self.mesh, frozen=frozen
        )
        how = {"accumulate": c.accumulate, "dtype": jnp.dtype(c.dtype), "remat": c.remat}
        step: Any = make_train_step(tx, self.mesh, frozen=frozen, **how)
        kept = (e.keep or e.k) * self.config.sampling.max_new_tokens
        length = loader.bucket(
            min(self.config.data.max_prompt + kept, max(self.config.data.buckets)), self.config.data.buckets
        )
        batch = self._batch(e.batch, length)

        def loss(trained: Any, fixed: Any, batch: Batch) -> jax.Array:
            return token_loss(
                sharding.cast(optimizer.join(optimizer.Parts(trained, fixed)), how["dtype"]), batch
            )[0]

        own = flops.count(jax.grad(loss), *optimizer.split(state.params, frozen), batch)
        yield f"train step, {e.batch} rows of {length}", step.lower(state, batch, np.float32(0)), own

    def _rollouts(self) -> Iterator[tuple[str, Any, dict[str, float]]]:
        c, k = self.config.sampling, self.config.evolve.k
        sharding.check_divides("sampling.batch", c.batch, self.mesh)
        length = loader.bucket(self.config.data.max_prompt, self.config.data.buckets)
        settings = draw.SamplingConfig(k, c.max_new_tokens, c.top_k, c.top_p, c.min_p, cache=c.cache)
        shards = sharding.batch_shards(self.mesh)
        host: Any = _Host(self.dimensions.decoder.vocab_size)
        sampler = Sampler(host, settings, c.batch, shards)
        size = generate.entering(c.batch, c.refill, shards)
        batch, model = self._batch(size, length), self._weights(self.build)
        rows = sharding.batch_sharding(self.mesh)

        def per_row(dtype, *shape):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

        slots = jax.eval_shape(sampler.blank, model, batch, None)
        slots = self._placed(slots, sampler.layout(slots, self.mesh))
        key = jax.eval_shape(lambda: jax.random.key(0))
        keys, limits = per_row(jnp.uint32, size), per_row(jnp.int32, size, k)
        samples, source = per_row(jnp.uint32, size, k), per_row(jnp.int32, c.batch)
        entering: tuple[Any, ...] = batch, keys, key, limits, samples, None, source
        enter, advance = sampler.enter, sampler.advance
        own = flops.count(enter, model, slots, *entering)
        title = f"prefill, {size} rows of {length} into {c.batch}"
        yield title, enter.lower(model, slots, *entering), own
        rest = jax.ShapeDtypeStruct((k,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
        own = flops.count(advance, model, slots, *rest)
        title = f"decoding step, {c.batch} rows of {k} samples, {c.max_new_tokens} tokens"
        yield title, advance.lower(model, slots, *rest), own

    def _score(self) -> Iterator[tuple[str, Any, dict[str, float]]]:
        v = self.config.prm
        sharding.check_divides("prm.batch", v.batch, self.mesh)
        length = max(self.config.data.buckets)
        model = self._weights(lambda: vlm.RewardModel(self.build()))
        batch, score = self._batch(v.batch, length), prm.token_scores
        yield (
            f"score, {v.batch} rows of {length}",
            score.lower(model, batch),
            flops.count(score, model, batch),
        )


class _Host:
    """As much of a processor as sampling is compiled from."""

    stop_ids, forbidden_ids = (0,), ()

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size


def devices_of(topology: str) -> list[Any]:
    """The devices of a TPU that is not there.

    Raises:
      ValueError: libtpu is not installed, or does not know it.
    """
    for name, value in COMPILE_ONLY.items():
        os.environ.setdefault(name, value)
    try:
        found: list[Any] = list(topologies.get_topology_desc(topology, "tpu").devices)
    except Exception as error:  # whatever a compiler for another machine may raise
        first = str(error).splitlines()[0]
        text = (
            f"--topology={topology}: {first}; one like v5e:4x4 or v5p:2x2x4 is wanted, and pip install libtpu"
        )
        raise ValueError(text) from error
    if any(device.core_on_chip for device in found):
        raise ValueError(f"--topology={topology}: chips of two devices each, as of TPU v4, cannot be planned")
    return found
