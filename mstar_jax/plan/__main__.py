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
import re
import sys
from collections.abc import Iterator
from typing import Any

import absl.logging
import jax
import ml_collections
from absl import app, flags

from mstar_jax import sharding
from mstar_jax.cli import CONFIG
from mstar_jax.plan import hlo
from mstar_jax.plan.programs import Programs, devices_of, policy_of
from mstar_jax.profiling.flops import Chip, chip_of

TOPOLOGY = flags.DEFINE_string("topology", None, "A TPU's, e.g. v5e:4x4; default the local devices.")
PROGRAMS = flags.DEFINE_list("programs", ["train", "rollouts", "score"], "Which of them.")
ADVISE = flags.DEFINE_bool("advise", True, "Look for settings with which a program fits.")

GB, TERA = 1e9, 1e12


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


# ---- 1. what a program costs -------------------------------------------------------------------------------


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


# ---- 2. the table -------------------------------------------------------------------------------------


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
