"""What a config's programs cost on a machine, before it is rented.

    python -m mstar_jax.plan --config=configs/phi35.py --topology=v5e:4x4
    python -m mstar_jax.plan --config=configs/tiny.py                      # the local devices

Compiles the real programs of the full-size model, without a weight and, for a TPU topology, without a TPU
(`pip install libtpu`): the train step, the prefill and one step of the decoding of rollouts, and the scoring
of the reward model. Printed for each of them, per chip: memory by kind against what the chip has, FLOPs,
bytes, collectives, and the time that the slowest of compute, memory and network would take at its peak: a
bound, not a forecast. What does not fit is tried again with other settings until it does.

Without `policy.path` the released model's dimensions are taken (`policy.family`).
"""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import ml_collections
from absl import app, flags
from flax import nnx
from jax.experimental import topologies

from mstar_jax import draws, flops, hlo, inference, models, prm, sampling, setup, sharding, train
from mstar_jax.data import loader
from mstar_jax.flops import Chip, chip_of
from mstar_jax.main import CONFIG
from mstar_jax.models import official, vlm
from mstar_jax.structs import Batch

TOPOLOGY = flags.DEFINE_string("topology", None, "A TPU's, e.g. v5e:4x4; default the local devices.")
PROGRAMS = flags.DEFINE_list("programs", ["train", "rollouts", "score"], "Which of them.")
ADVISE = flags.DEFINE_bool("advise", True, "Look for settings with which a program fits.")

GB, TERA = 1e9, 1e12
# There is no TPU that libtpu could ask about itself, or keep from others; a type and a host end its search.
COMPILE_ONLY = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
COMPILE_ONLY |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}


@dataclasses.dataclass(frozen=True)
class Cost:
    """One program on one device.

    Attributes:
      memory: bytes by kind: arguments, outputs, temporary, code; `shared` of the outputs lie in arguments.
      work: FLOPs, bytes and collectives of one run; None where the compiler does not show its program.
      model: FLOPs of the model itself on all devices, by part, without what is computed twice.
    """

    memory: dict[str, float]
    work: hlo.Work | None
    model: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def peak(self) -> float:
        """Bytes that have to be there at once."""
        return sum(self.memory.values()) - 2 * self.memory["shared"]


# ---- 1. the programs ----------------------------------------------------------------------------------


def policy_of(config: ml_collections.ConfigDict) -> tuple[models.hf.Family, Any]:
    """The family and the dimensions of the config's policy, without a weight.

    Raises:
      ValueError: it names none.
    """
    values = config.policy
    if values.path:
        source = models.Pretrained(values.path, max_crops=values.get("max_crops"))
        return source.family, setup.adapted(source.config, config.train)
    if "decoder" in values:
        return models.phi35.FAMILY, setup.adapted(setup.policy_config(values), config.train)
    if values.get("family") not in official.OFFICIAL:
        known = ", ".join(official.OFFICIAL)
        raise ValueError(f"policy.family = {values.get('family')!r}: give policy.path, or one of {known}")
    found = setup.adapted(official.OFFICIAL[values.family], config.train)
    crops = values.get("max_crops")
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
        (tx, _), frozen, dtype = setup.optimizer(e, c), setup.frozen(c), setup.base_dtype(c)
        state = train.abstract_state(lambda: train.store(self.build(), frozen, dtype), tx, self.mesh)
        how = {"accumulate": c.accumulate, "dtype": jnp.dtype(c.dtype), "remat": c.remat}
        step: Any = train.make_train_step(tx, self.mesh, frozen=frozen, **how)
        kept = (e.keep or e.k) * self.config.sampling.max_new_tokens
        length = loader.bucket(
            min(self.config.data.max_prompt + kept, max(self.config.data.buckets)), self.config.data.buckets
        )
        batch = self._batch(e.batch, length)

        def loss(trained: Any, fixed: Any, batch: Batch) -> jax.Array:
            return train.token_loss(sharding.cast(train.join(trained, fixed), how["dtype"]), batch)[0]

        own = flops.count(jax.grad(loss), *train.split(state.params, frozen), batch)
        yield f"train step, {e.batch} rows of {length}", step.lower(state, batch), own

    def _rollouts(self) -> Iterator[tuple[str, Any, dict[str, float]]]:
        c, k = self.config.sampling, self.config.evolve.k
        sharding.check_divides("sampling.batch", c.batch, self.mesh)
        length = loader.bucket(self.config.data.max_prompt, self.config.data.buckets)
        settings = draws.SamplingConfig(k, c.max_new_tokens, c.top_k, c.top_p, c.min_p, cache=c.cache)
        shards = sharding.batch_shards(self.mesh)
        sampler = sampling.Sampler(_Host(self.dimensions.decoder.vocab_size), settings, c.batch, shards)
        size = inference.entering(c.batch, c.refill, shards)
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


# ---- 2. what they cost --------------------------------------------------------------------------------


class TooLarge(Exception):
    """A program that the device's memory does not hold; says how much it wanted."""


def compile_(lowered: Any) -> Cost:
    """Compiles a program.

    Raises:
      TooLarge: it does not fit.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", str(error)):
            raise TooLarge(f"needs {found[1]} of {found[2]}") from error
        if "RESOURCE_EXHAUSTED" in str(error):
            raise TooLarge(str(error).splitlines()[0]) from error
        raise
    m = compiled.memory_analysis()
    memory = {"arguments": m.argument_size_in_bytes, "outputs": m.output_size_in_bytes}
    memory |= {"temporary": m.temp_size_in_bytes, "code": m.generated_code_size_in_bytes}
    memory |= {"shared": m.alias_size_in_bytes}
    try:
        return Cost(memory, hlo.work(compiled.as_text()))
    except jax.errors.JaxRuntimeError:  # seen for TPU v5p: a compiler that cannot read what it wrote
        return Cost(memory, None)


def times(work: hlo.Work, chip: Chip) -> dict[str, float]:
    """Seconds that computing, memory and network take at their peak."""
    moved = sum(work.moved().values())
    found = {"compute": work.flops / chip.flops, "memory": work.bytes / chip.bandwidth}
    return found | {"network": moved / chip.network}


# ---- 3. the table -------------------------------------------------------------------------------------


def shown(name: str, cost: Cost, chip: Chip | None, count: int) -> str:
    """A program's lines."""
    kinds = {kind: size for kind, size in cost.memory.items() if kind != "shared"}
    parts = ", ".join(f"{kind} {size / GB:.2f}" for kind, size in kinds.items())
    of = f" of {chip.memory / GB:.0f}" if chip else ""
    lines = [
        name,
        f"  memory    {cost.peak / GB:.2f}{of} GB: {parts}, in place {cost.memory['shared'] / GB:.2f}",
    ]
    whole = sum(cost.model.values())
    if whole:
        each = ", ".join(f"{part} {100 * size / whole:.0f} %" for part, size in cost.model.items())
        lines.append(f"  model     {whole / count / TERA:.3f} TFLOP of its own: {each}")
    if cost.work is None:
        return "\n".join([*lines, "  work      not known: the compiler does not show this program"])
    moved = {kind: size for kind, size in cost.work.moved().items() if size}
    text = ", ".join(f"{kind} {size / GB:.3f}" for kind, size in sorted(moved.items())) or "none"
    lines.append(
        f"  work      {cost.work.flops / TERA:.3f} TFLOP, {cost.work.bytes / GB:.2f} GB read and written"
    )
    lines.append(f"  network   {sum(moved.values()) / GB:.3f} GB received: {text}")
    if chip:
        found = times(cost.work, chip)
        slowest = max(found, key=found.__getitem__)
        each = ", ".join(f"{kind} {1000 * value:.1f}" for kind, value in found.items())
        best = whole / count / chip.flops / max(found.values())
        lines.append(f"  at peak   {each} ms: bound by {slowest}; MFU at most {100 * best:.0f} %")
    return "\n".join(lines)


def smaller(name: str, config: ml_collections.ConfigDict, mesh: Any) -> Iterator[dict[str, Any]]:
    """Settings to try in turn for a program that does not fit; each keeps what the one before it changed."""
    shards, c = sharding.batch_shards(mesh), config
    if name == "train":
        if c.train.remat != "full":
            yield {"train.remat": "full"}
        accumulate = 2 * c.train.accumulate
        while c.evolve.batch % (accumulate * shards) == 0:
            yield {"train.accumulate": accumulate}
            accumulate *= 2
    else:
        key = {"rollouts": "sampling.batch", "score": "prm.batch"}[name]
        size = (c.sampling if name == "rollouts" else c.prm).batch // 2
        while size >= shards and size % shards == 0:
            yield {key: size}
            size //= 2
    for tensor in (2, 4, 8):
        if mesh.size % tensor == 0:
            yield {"mesh.tensor": tensor}


def planned(config: ml_collections.ConfigDict, name: str, devices: list[Any], advise: bool) -> Iterator[str]:
    """The lines of one of PROGRAMS, and of what makes it fit."""
    mesh, changes = sharding.make_mesh(**config.mesh, devices=devices), dict[str, Any]()
    chip, steps = chip_of(devices[0].device_kind), smaller(name, config, mesh)
    while True:
        tried = config.copy_and_resolve_references()
        tried.update_from_flattened_dict(changes)
        mesh = sharding.make_mesh(**tried.mesh, devices=devices)
        try:
            with jax.set_mesh(mesh):
                for title, lowered, own in Programs(tried, mesh).lower(name):
                    try:
                        cost = dataclasses.replace(compile_(lowered), model=own)
                    except TooLarge as error:
                        yield f"{title}\n  does not fit: {error}"
                        raise
                    yield shown(title, cost, chip, len(devices))
        except TooLarge:
            change = next(steps, None) if advise else None
            if change is None:
                if advise:
                    yield f"{name}: nothing that was tried makes it fit; more chips, or train.lora, would"
                return
            changes |= change
            yield "with " + " ".join(f"--config.{key}={value}" for key, value in changes.items())
            continue
        return


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


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    absl.logging.set_verbosity(absl.logging.WARNING)
    config = CONFIG.value
    try:
        if TOPOLOGY.value:
            devices = devices_of(TOPOLOGY.value)
        else:
            devices = jax.devices()
        _, dimensions = policy_of(config)
        mesh = sharding.make_mesh(**config.mesh, devices=devices)
        axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        abstract = jax.eval_shape(Programs(config, mesh).build)
        size = sum(leaf.size for leaf in jax.tree.leaves(abstract))
        what = f"{type(dimensions).__name__.removesuffix('Config')}, {size:,} parameters"
        print(f"{len(devices)} x {devices[0].device_kind} ({axes}), {what}")
        for name in PROGRAMS.value:
            for text in planned(config, name, devices, ADVISE.value):
                print(f"\n{text}", flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
