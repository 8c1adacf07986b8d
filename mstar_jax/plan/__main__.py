"""What the programs of a config would cost on a machine, before it is rented.

    python -m mstar_jax.plan --config=configs/phi35.py --topology=v5e:4x4
    python -m mstar_jax.plan --config=configs/tiny.py                      # the local devices

Compiles the actual programs of the full-size model, without weights and, for a TPU topology, without a TPU
(`pip install libtpu`): the train step, prefill and one decoding step of the rollouts, and the reward model's
scoring. For each it prints, per chip: memory by kind against what the chip has, FLOPs, bytes, collectives,
and the time that compute, memory and network would take at their peak rates. The largest of these is a lower
bound, not a forecast. A program that does not fit is tried again with other settings until it does.

Without `policy.path` the dimensions are those of the released model of `policy.family`.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

import jax
import ml_collections
from absl import app, flags

from mstar_jax import cli, sharding
from mstar_jax.cli import CONFIG
from mstar_jax.plan import hlo
from mstar_jax.plan.programs import Programs, devices_of, policy_of
from mstar_jax.profiling.flops import Chip, chip_of

TOPOLOGY = flags.DEFINE_string("topology", None, "A TPU topology, e.g. v5e:4x4; default the local devices.")
PROGRAMS = flags.DEFINE_list("programs", ["train", "rollouts", "score"], "Which programs to compile.")
ADVISE = flags.DEFINE_bool("advise", True, "Look for settings with which a program fits.")

GB = 1e9
TERA = 1e12


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one program on one device.

    Attributes:
      memory: bytes by kind: arguments, outputs, temporary, code; `shared` outputs alias arguments.
      work: FLOPs, bytes and collectives of one run; None if the compiler does not show the program.
      model: FLOPs of the model itself on all devices, by part, without recomputation.
    """

    memory: dict[str, float]
    work: hlo.Work | None
    model: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def peak(self) -> float:
        """Bytes that are needed at the same time."""
        return sum(self.memory.values()) - 2 * self.memory["shared"]


# ---- 1. what a program costs -------------------------------------------------------------------------------


class TooLarge(Exception):
    """A program that does not fit into the memory of the device; the message says how much it needs."""


def compile_cost(lowered: jax.stages.Lowered) -> Cost:
    """Compiles a program and reads off its cost.

    Raises:
      TooLarge: the program does not fit.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", str(error)):
            raise TooLarge(f"needs {found[1]} of {found[2]}") from error
        if "RESOURCE_EXHAUSTED" in str(error):
            raise TooLarge(str(error).splitlines()[0]) from error
        raise
    sizes = compiled.memory_analysis()
    if sizes is None:
        raise ValueError(f"the {jax.default_backend()} backend does not report the memory of programs")
    memory = {
        "arguments": sizes.argument_size_in_bytes,
        "outputs": sizes.output_size_in_bytes,
        "temporary": sizes.temp_size_in_bytes,
        "code": sizes.generated_code_size_in_bytes,
        "shared": sizes.alias_size_in_bytes,
    }
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # seen for TPU v5p: the compiler cannot parse its own output
        text = None
    return Cost(memory, hlo.work(text) if text else None)


def peak_times(work: hlo.Work, chip: Chip) -> dict[str, float]:
    """Seconds that compute, memory and network take at their peak rates."""
    moved = sum(work.moved().values())
    found = {"compute": work.flops / chip.flops, "memory": work.bytes / chip.bandwidth}
    return found | {"network": moved / chip.network}


# ---- 2. the table -------------------------------------------------------------------------------------


def describe(name: str, cost: Cost, chip: Chip | None, count: int) -> str:
    """The lines of output about a program that runs on `count` devices."""
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
        found = peak_times(cost.work, chip)
        slowest = max(found, key=found.__getitem__)
        each = ", ".join(f"{kind} {1000 * value:.1f}" for kind, value in found.items())
        best = whole / count / chip.flops / max(found.values())
        lines.append(f"  at peak   {each} ms: bound by {slowest}; MFU at most {100 * best:.0f} %")
    return "\n".join(lines)


Settings = dict[str, str | int]  # by dotted name


def smaller_settings(
    name: str, config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh
) -> Iterator[Settings]:
    """Settings to try one after the other if a program does not fit; each is added to those before it."""
    shards = sharding.batch_shards(mesh)
    if name == "train":
        if config.train.remat != "full":
            yield {"train.remat": "full"}
        accumulate = 2 * config.train.accumulate
        while config.evolve.batch % (accumulate * shards) == 0:
            yield {"train.accumulate": accumulate}
            accumulate *= 2
    else:
        key = {"rollouts": "sampling.batch", "score": "prm.batch"}[name]
        size = (config.sampling if name == "rollouts" else config.prm).batch // 2
        while size >= shards and size % shards == 0:
            yield {key: size}
            size //= 2
    for tensor in (2, 4, 8):
        if mesh.size % tensor == 0:
            yield {"mesh.tensor": tensor}


def plan(
    config: ml_collections.ConfigDict, name: str, devices: list[jax.Device], advise: bool
) -> Iterator[str]:
    """Output about one of the PROGRAMS and, if it does not fit, about the settings that were tried."""
    chip = chip_of(devices[0].device_kind)
    steps = smaller_settings(name, config, sharding.make_mesh(**config.mesh, devices=devices))
    changes: Settings = {}
    while True:
        tried = config.copy_and_resolve_references()
        tried.update_from_flattened_dict(changes)
        mesh = sharding.make_mesh(**tried.mesh, devices=devices)
        try:
            with jax.set_mesh(mesh):
                for title, lowered, own in Programs(tried, mesh).lower(name):
                    try:
                        cost = dataclasses.replace(compile_cost(lowered), model=own)
                    except TooLarge as error:
                        yield f"{title}\n  does not fit: {error}"
                        raise
                    yield describe(title, cost, chip, len(devices))
        except TooLarge:
            change = next(steps, None) if advise else None
            if change is None:
                if advise:
                    yield f"{name}: no setting that was tried makes it fit; use more chips, or train.lora"
                return
            changes |= change
            yield "with " + " ".join(f"--config.{key}={value}" for key, value in changes.items())
            continue
        return


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    cli.show_log()
    config = CONFIG.value
    with cli.explained():
        devices = devices_of(TOPOLOGY.value) if TOPOLOGY.value else jax.devices()
        _, dimensions = policy_of(config)
        mesh = sharding.make_mesh(**config.mesh, devices=devices)
        axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        abstract = jax.eval_shape(Programs(config, mesh).build)
        size = sum(leaf.size for leaf in jax.tree.leaves(abstract))
        what = f"{type(dimensions).__name__.removesuffix('Config')}, {size:,} parameters"
        print(f"{len(devices)} x {devices[0].device_kind} ({axes}), {what}")
        for name in PROGRAMS.value:
            for text in plan(config, name, devices, ADVISE.value):
                print(f"\n{text}", flush=True)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
