"""The programs of a config, made from shapes alone for a mesh whose devices need not exist."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from mstar_jax import configure, models, sharding
from mstar_jax.data import loader
from mstar_jax.inference import draw, generate
from mstar_jax.inference.sampler import Entry, Sampler
from mstar_jax.models import vlm
from mstar_jax.plan import official
from mstar_jax.profiling import flops
from mstar_jax.rewards import prm
from mstar_jax.structs import Batch, TrainState
from mstar_jax.training import optimizer
from mstar_jax.training.step import REMAT, Loss, abstract_state, make_train_step, token_loss

Tree = TypeVar("Tree")  # any pytree
KINDS = ("train", "train prm", "rollouts", "evaluation", "exploration", "labels", "score")


class Program(NamedTuple):
    """A program that is ready to be lowered.

    Attributes:
      title: what it is, with its sizes.
      call: the jitted function, and its arguments' shapes.
      args: see `call`.
      own: FLOPs of the model, by part, on all devices.
      least: bytes that a device has to move for it, by what they are; of decoding, in a step. Of the others
        what the matrix products read and write, as if all else were part of them.
      rows: of all devices.
      length: tokens of a row.
    """

    title: str
    call: Any
    args: tuple[Any, ...]
    own: Callable[[], dict[str, float]]
    least: Callable[[], dict[str, int]]
    rows: int
    length: int


class Sampling(NamedTuple):
    """A pass of sampling: branches of a row, rows together, tokens of a row before its samples."""

    branches: int
    rows: int
    length: int
    stems: bool = False  # samples continue responses


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
    family = models.FAMILIES[values.family.partition(":")[0]]
    return family, dataclasses.replace(found, num_crops=crops) if crops else found


def own_bytes(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def trained(config: ml_collections.ConfigDict) -> int:
    """The most responses to a query that an iteration trains on; a policy gradient takes all of them, and of
    gold answers there is one."""
    evolve, warmup = config.evolve, config.warmup
    if evolve.data == "rollouts":
        return evolve.k if evolve.objective != "sft" else evolve.keep or evolve.k
    return 1 if evolve.data == "answers" else warmup.keep or warmup.k


class Programs:
    """The programs of a config for a mesh."""

    def __init__(self, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh):
        self.config = config
        self.mesh = mesh
        self.family, self.dimensions = policy_of(config)

    def build(self) -> vlm.VisionLanguageModel:
        """The policy with random parameters; meant for `jax.eval_shape`."""
        return self.family.model(self.dimensions, nnx.Rngs(0))

    def kinds(self) -> list[str]:
        """Those of KINDS that a run with this config has."""
        c = self.config
        absent = set()
        if not configure.trains_reward_model(c):
            absent |= {"train prm", "labels"}
        if c.prm.data:
            absent.add("labels")
        if not (configure.trains_reward_model(c) or c.prm.path or c.evolve.select == "likelihood"):
            absent |= {"score", "exploration"}
        if not c.explore.every:
            absent.add("exploration")
        generates = c.evolve.data == "rollouts" and c.evolve.iterations > 0
        if c.warmup.data and "labels" in absent and not generates:
            absent.add("rollouts")
        return [kind for kind in KINDS if kind not in absent]

    def make(self, kind: str) -> list[Program]:
        """The programs of one of KINDS; sampling has two, prefill and a decoding step.

        Raises:
          ValueError: the mesh does not divide a batch.
        """
        if kind == "train":
            return [self._train()]
        if kind == "train prm":
            return [self._train_reward()]
        return self.scores()[-1:] if kind == "score" else self._sample(kind)

    # ---- what lies on a device ----

    def train_state(self) -> TrainState:
        """The state of the policy's training, in its layout."""
        return self._state(self.build)

    def weights(self, reward: bool = False) -> Any:
        """The parameters as they are sampled from or, those of the reward model, scored with."""
        dtype = jnp.dtype(self.config.sampling.dtype)

        def build() -> Any:
            model = self.build()
            return vlm.RewardModel(model).merged(dtype) if reward else model.merged(dtype)

        abstract = jax.eval_shape(build)
        return self._placed(abstract, sharding.shardings(abstract, sharding.SAMPLE, self.mesh))

    def sampling(self, kind: str) -> Sampling:
        """The sizes of a pass of sampling, with the longest prompts."""
        c = self.config
        samples = c.sampling.batch
        longest = c.data.max_prompt
        found = {
            "rollouts": Sampling(c.evolve.k, samples, longest),
            "evaluation": Sampling(1 + c.eval.samples, samples, longest),
            "exploration": Sampling(
                1 + len(c.explore.temperatures) * c.explore.samples, c.explore.batch, longest
            ),
            "labels": Sampling(c.prm.samples, c.prm.rows, self._stem(), stems=True),
        }[kind]
        return found._replace(length=loader.bucket(found.length, c.data.buckets))

    def _stem(self) -> int:
        """Tokens of a prompt and the responses that a row of labels continues, at most."""
        c = self.config
        prefixes = c.prm.samples // max(c.prm.completions, 1)
        return min(c.data.max_prompt + prefixes * c.sampling.max_new_tokens, max(c.data.buckets))

    def _placed(self, tree: Tree, layout: Tree) -> Tree:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layout)

    def _state(self, build: Callable[[], Any]) -> TrainState:
        c = self.config.train
        frozen, dtype = configure.frozen(c), configure.base_dtype(c)
        tx = configure.optimizer(c)

        def cast() -> Any:
            return optimizer.cast_frozen(build(), frozen, dtype)

        return abstract_state(cast, tx, self.mesh, frozen=frozen)

    def _batch(self, rows: int, length: int) -> Batch:
        """A batch of rows, each with an image of the maximum number of crops."""
        number = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        value = jax.ShapeDtypeStruct((rows, length), jnp.float32)
        pixels = self.family.pixels(self.dimensions, self.dimensions.most_crops)
        pixels = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype), pixels)
        turned = self.dimensions.decoder.rope_sections is not None
        positions = jax.ShapeDtypeStruct((rows, 3, length), jnp.int32) if turned else None
        batch = Batch(number, number, value, number, pixels, value, positions)
        return self._placed(batch, jax.tree.map(lambda _: sharding.batch_sharding(self.mesh), batch))

    # ---- the programs ----

    def _train(self) -> Program:
        e, buckets = self.config.evolve, self.config.data.buckets
        warmup = self.config.warmup
        kept = max(trained(self.config), warmup.keep or warmup.k) * self.config.sampling.max_new_tokens
        length = loader.bucket(min(self.config.data.max_prompt + kept, max(buckets)), buckets)
        return self._step("train step", "evolve.batch", self.build, token_loss, e.batch, length)

    def _train_reward(self) -> Program:
        c = self.config.prm
        buckets = self.config.data.buckets
        whole = c.labelled < c.queries  # the right responses to a query without labels are one row
        least = self.config.data.max_prompt + (c.k if whole else 1) * self.config.sampling.max_new_tokens
        length = loader.bucket(min(max(c.longest, least), max(buckets)), buckets)
        loss = prm.make_loss(c.mc_weight)
        title = "train step of the reward model"

        def build() -> Any:
            return vlm.RewardModel(self.build())

        return self._step(title, "prm.batch", build, loss, c.batch, length)

    def _step(
        self, title: str, key: str, build: Callable[[], Any], loss: Loss, rows: int, length: int
    ) -> Program:
        c = self.config.train
        sharding.check_divides(key, rows, self.mesh, c.accumulate)
        frozen = configure.frozen(c)
        compute = jnp.dtype(c.dtype)
        state = self._state(build)
        step = make_train_step(
            configure.optimizer(c),
            self.mesh,
            loss=loss,
            frozen=frozen,
            accumulate=c.accumulate,
            dtype=compute,
            remat=c.remat,
        )
        batch = self._batch(rows, length)

        def value(trained: nnx.Module, fixed: nnx.Module, batch: Batch) -> jax.Array:
            model = optimizer.join(optimizer.Parts(trained, fixed))
            return loss(sharding.cast(model, compute), batch, None)[0]

        parts = optimizer.split(state.params, frozen)
        count = functools.cache(functools.partial(flops.count, jax.grad(value), *parts, batch))
        alone = self._alone(batch, c.accumulate)

        def again(trained: nnx.Module, fixed: nnx.Module, batch: Batch) -> jax.Array:
            model = optimizer.join(optimizer.Parts(trained, fixed))
            return loss(sharding.cast(model, compute), batch, REMAT[c.remat])[0]

        def least() -> dict[str, int]:
            touched = c.accumulate * flops.touched(jax.grad(again), *parts, alone)
            return {"state": 2 * own_bytes(state), "products": self._shared(touched)}

        args = state, batch, np.float32(0)
        return Program(f"{title}, {rows} rows of {length}", step, args, count, least, rows, length)

    def _alone(self, batch: Batch, times: int = 1) -> Batch:
        """A device's rows of a batch, or of one of `times` microbatches."""
        parts = times * sharding.batch_shards(self.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(x) // parts, *x.shape[1:]), x.dtype), batch)

    def _shared(self, touched: float) -> int:
        """A device's part of the bytes that its tensor-parallel neighbours touch with it."""
        return round(touched / self.mesh.shape["tensor"])

    def _sample(self, kind: str) -> list[Program]:
        c = self.config.sampling
        k, rows, length, stems = self.sampling(kind)
        key = {"exploration": "explore.batch", "labels": "prm.rows"}.get(kind, "sampling.batch")
        sharding.check_divides(key, rows, self.mesh)
        places = generate.places(c.places, k)
        settings = draw.SamplingConfig(k, c.max_new_tokens, places, c.top_k, c.top_p, c.min_p, cache=c.cache)
        shards = sharding.batch_shards(self.mesh)
        host: Any = _Host(self.dimensions.decoder.vocab_size)
        sampler = Sampler(host, settings, rows, shards)
        size = generate.entering(rows, c.refill, shards)
        batch = self._batch(size, length)
        model = self.weights()
        layout = sharding.batch_sharding(self.mesh)

        def per_row(dtype: jnp.dtype, *shape: int) -> Any:  # a shape in an array's place
            return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

        starts = (per_row(jnp.int32, size, k), per_row(jnp.int32, size, k)) if stems else None
        slots = jax.eval_shape(sampler.blank, model, batch, starts)
        slots = self._placed(slots, sampler.layout(slots, self.mesh))
        entry = Entry(
            batch,
            per_row(jnp.uint32, size),
            per_row(jnp.int32, size, k),
            per_row(jnp.uint32, size, k),
            starts,
            per_row(jnp.int32, rows),
        )
        entering = (model, slots, jax.eval_shape(lambda: jax.random.key(0)), entry)
        temperatures = jax.ShapeDtypeStruct((k,), jnp.float32)
        decoding = (
            model,
            slots,
            temperatures,
            jax.ShapeDtypeStruct((), jnp.int32),
        )  # the last: slots to free
        cache = slots.cache
        prefix = own_bytes((cache.prefix_k, cache.prefix_v))

        def prefill(model: Any, batch: Batch) -> Any:
            return model.prefill(batch, k, places, c.max_new_tokens, None, c.cache)[0]

        decoder = own_bytes(model.decoder)
        if not self.dimensions.decoder.tie_word_embeddings:
            decoder -= own_bytes(model.decoder.embedding)
        suffix = own_bytes((cache.suffix_k, cache.suffix_v))
        at_a_time = f"{places} at a time, " if places < k else ""
        return [
            Program(
                f"{kind}: prefill, {size} rows of {length} into {rows}",
                sampler.enter,
                entering,
                functools.cache(functools.partial(flops.count, sampler.enter, *entering)),
                lambda: {"products": self._shared(flops.touched(prefill, model, self._alone(batch)))},
                size,
                length,
            ),
            Program(
                f"{kind}: decoding step, {rows} rows of {k} samples, {at_a_time}{c.max_new_tokens} tokens",
                sampler.advance,
                decoding,
                functools.cache(functools.partial(flops.count, sampler.advance, *decoding)),
                lambda: {"weights": decoder, "prompts": prefix, "responses": suffix},
                rows,
                length,
            ),
        ]

    def scores(self) -> list[Program]:
        """The scores of rows of every length that holds more than a prompt, the shortest first."""
        prompt, buckets = self.config.data.max_prompt, sorted(self.config.data.buckets)
        return [self._score(length) for length in buckets if length > prompt or length == buckets[-1]]

    def _score(self, length: int) -> Program:
        rows = self.config.prm.score_batch or self.config.prm.batch
        sharding.check_divides("prm.score_batch", rows, self.mesh)
        model = self.weights(reward=True)
        args = model, self._batch(rows, length)
        count = functools.cache(functools.partial(flops.count, prm.token_scores, *args))
        title = f"score, {rows} rows of {length}"

        def least() -> dict[str, int]:
            alone = self._alone(args[1])
            return {"products": self._shared(flops.touched(prm.token_scores, model, alone))}

        return Program(title, prm.token_scores, args, count, least, rows, length)


class _Host:
    """The part of a processor that a sampler is compiled from."""

    stop_ids = (0,)
    forbidden_ids = ()

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
