"""What a run of a config would need and cost on a machine, before it is rented.

    python -m mstar_jax.plan --config=configs/phi35.py --topology=h100:8  # h200, a100, rtx3090, rtx3070
    python -m mstar_jax.plan --config=configs/phi35.py --topology=v5e:4x4 --price=1.2
    python -m mstar_jax.plan --config=configs/tiny.py --measure               # the local devices

Compiles the actual programs of the full-size model, without weights and, for a topology, without a chip
(`pip install 'mstar_jax[plan-gpu]'` or `'mstar_jax[plan-tpu]'`): the train steps of the policy and of the
reward model, prefill and a decoding step of every pass that samples, and the reward model's scores. It prints

    each program  memory by kind, FLOPs, bytes moved and bytes that have to be, collectives, and the time that
                  compute, memory and network would take at their peak rates: a bound, not a forecast
    each stage    what lies on a chip: the programs, and what stays beside them
    the run       tokens, FLOPs and time of every stage, chip-hours, disk and, with --price, what it costs

With --out=runs/phi35/plan.json, `report` shows these hours beside those that the run has spent.

What does not fit is tried again with other settings until it does. Without `policy.path` the dimensions are
those of the released model of `policy.family`.
"""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import ml_collections
from absl import app, flags

from mstar_jax import cli, ranges
from mstar_jax.cli import CONFIG
from mstar_jax.plan import measure, residency, whole
from mstar_jax.plan.advice import Settings, as_flags, smaller_settings, with_settings
from mstar_jax.plan.calls import Assumed
from mstar_jax.plan.cost import Cost, TooLarge, compile_cost, peak_times
from mstar_jax.plan.hlo import Work
from mstar_jax.plan.programs import KINDS, Program, Programs
from mstar_jax.plan.topology import devices_of, without_driver
from mstar_jax.profiling.flops import Chip, chip_of
from mstar_jax.store import write_text

TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "A host with GPUs, e.g. h100:8, or a TPU slice, e.g. v5e:4x4; default the local devices.",
)
PROGRAMS = flags.DEFINE_list("programs", list(KINDS), "Which programs to compile.")
ADVISE = flags.DEFINE_bool("advise", True, "Look for settings with which a program fits.")
MEASURE = flags.DEFINE_bool(
    "measure", False, "Run the programs on the local devices, for their actual times."
)
PRICE = flags.DEFINE_float("price", 0.0, "Of a chip-hour, in any currency; 0 for no amount.")
REACH = flags.DEFINE_float("reach", 0.5, "Share of the bounds' rates that a run reaches, for the forecast.")
QUERIES = flags.DEFINE_integer("queries", 180_000, "Labelled queries, if the config does not say it.")
PROMPT = flags.DEFINE_integer("prompt", 0, "Tokens of a prompt, image included; default data.max_prompt.")
RESPONSE = flags.DEFINE_float("response", None, "Mean tokens of a response; default 177, or fewer.")
SPREAD = flags.DEFINE_float("spread", 60, "Standard deviation of this number.")
RIGHT = flags.DEFINE_float("right", 0.5, "Share of the responses that are right, copies not counted.")
DISTINCT = flags.DEFINE_float(
    "distinct", 1.0, "Share of a query's evolve.k responses that are no copies of another."
)
DISTINCT_WARM_UP = flags.DEFINE_float(
    "distinct_warm_up", None, "The same of the warm-up policy; default --distinct."
)
PREFIXES = flags.DEFINE_float(
    "prefixes", 5, "Labelled steps of a response: all but the last and shared ones."
)

OUT = flags.DEFINE_string("out", None, "File for the run's hours: WORKDIR/plan.json, for `report` to show.")

# what these numbers may be, in the notation of `ranges`
INTERVALS = {
    "price": ranges.SOME,
    "reach": "(0, 1]",
    "queries": ranges.COUNT,
    "prompt": ranges.SOME,
    "response": ranges.FEW,
    "spread": ranges.SOME,
    "right": ranges.SHARE,
    "distinct": "(0, 1]",
    "distinct_warm_up": "(0, 1]",
    "prefixes": ranges.SOME,
}

GB = 1e9
TERA = 1e12


class Fitting(NamedTuple):
    """Programs that fit, with the settings that they fit with, and which of these are not the config's."""

    programs: Programs
    costs: list[tuple[Program, Cost]]
    changes: Settings


# ---- 1. a program -------------------------------------------------------------------------------------


class Peak(NamedTuple):
    """The least time of a program's call in seconds, what bounds it, and the MFU that it allows."""

    slowest: str
    seconds: float
    mfu: float


def peak_of(work: Work, chip: Chip, own: float) -> Peak:
    """Of a program that does this work for `own` FLOPs of the model, both on one device."""
    found = peak_times(work, chip)
    slowest = max(found, key=found.__getitem__)
    # a causal kernel computes less than the model's full square
    return Peak(slowest, found[slowest], min(own, work.flops) / chip.flops / found[slowest])


def describe(program: Program, cost: Cost, chip: Chip | None, count: int, own: float = 0.0) -> str:
    """The lines of output about a program of `own` FLOPs of the model, on `count` devices."""
    kinds = {kind: size for kind, size in cost.memory.items() if kind != "shared"}
    parts = ", ".join(f"{kind} {size / GB:.2f}" for kind, size in kinds.items())
    of = f" of {chip.memory / GB:.0f}" if chip else ""
    lines = [
        program.title,
        f"  memory    {cost.peak / GB:.2f}{of} GB: {parts}, in place {cost.memory['shared'] / GB:.2f}",
    ]
    if cost.note:
        lines.append(f"  compiled  with {cost.note}, for the device to choose tiles on is not here")
    if own:
        lines.append(f"  model     {own / count / TERA:.3f} TFLOP of its own")
    least = sum(program.least().values())
    if cost.work is None:
        lines.append(
            f"  work      not known, the compiler does not show it; {least / GB:.2f} GB have to be moved"
        )
        return "\n".join(lines)
    moved = {kind: size for kind, size in cost.work.moved().items() if size}
    text = ", ".join(f"{kind} {size / GB:.3f}" for kind, size in sorted(moved.items())) or "none"
    parts = ", ".join(f"{kind} {size / GB:.2f}" for kind, size in program.least().items())
    lines += [
        f"  work      {cost.work.flops / TERA:.3f} TFLOP",
        f"  moved     {cost.work.bytes / GB:.2f} GB read and written, {cost.work.bytes / least:.2f} times "
        f"the {least / GB:.2f} that have to be: {parts}",
    ]
    if cost.once:
        lines.append(f"  a call    of any number of steps moves {cost.once.bytes / GB:.2f} GB besides")
    if cost.work.unknown:
        lines.append(f"  left out  the FLOPs of {', '.join(cost.work.unknown)}")
    lines.append(f"  network   {sum(moved.values()) / GB:.3f} GB received: {text}")
    if chip:
        each = ", ".join(f"{kind} {1000 * s:.1f}" for kind, s in peak_times(cost.work, chip).items())
        peak = peak_of(cost.work, chip, own / count)
        lines.append(f"  at peak   {each} ms: bound by {peak.slowest}; MFU at most {100 * peak.mfu:.0f} %")
    return "\n".join(lines)


def costs_of(programs: Programs, kind: str, chip: Chip | None) -> Iterator[tuple[Program, Cost]]:
    """Compiles the programs of a kind.

    Raises:
      TooLarge: one does not fit beside what else lies on the device.
    """
    device = programs.mesh.devices.flat[0]
    others = sum(residency.beside(programs, kind))
    for program in programs.make(kind):
        try:
            cost = compile_cost(program.call, program.args, device, loop="decoding" in program.title)
        except TooLarge as error:
            raise TooLarge(f"{program.title}\n  does not fit: {error}") from error
        if chip and cost.peak + others > chip.memory:
            need = f"{cost.peak / GB:.2f} GB, and {others / GB:.2f} beside them, of {chip.memory / GB:.0f}"
            raise TooLarge(f"{program.title}\n  does not fit: needs {need}")
        yield program, cost


def plan(
    config: ml_collections.ConfigDict,
    kind: str,
    devices: Sequence[jax.Device],
    advise: bool,
    found: dict[str, Fitting],
) -> Iterator[str]:
    """Output about the programs of a kind and, if they do not fit, about the settings that were tried; those
    that fit are added to `found`."""
    chip = chip_of(devices[0].device_kind)
    changes: Settings = {}
    programs = with_settings(config, changes, devices)
    steps = smaller_settings(kind, config, programs.mesh)
    while True:
        costs: list[tuple[Program, Cost]] = []
        try:
            with jax.set_mesh(programs.mesh):
                for program, cost in costs_of(programs, kind, chip):
                    costs.append((program, cost))
                    yield describe(program, cost, chip, len(devices), sum(program.own().values()))
        except TooLarge as error:
            yield str(error)
            for change in steps if advise else ():
                try:  # the other stages have to work with it as well
                    programs = with_settings(config, changes | change, devices)
                    break
                except ValueError:
                    continue
            else:
                if advise:
                    yield f"{kind}: no setting that was tried makes it fit; use more chips, or train.lora"
                return
            changes |= change
            yield f"with {as_flags(changes)}"
            continue
        found[kind] = Fitting(programs, costs, changes)
        return


# ---- 2. the stages and the run ------------------------------------------------------------------------


def stages_table(found: Mapping[str, Fitting], chip: Chip | None) -> str:
    """A Markdown table: of each program what it moves, of each stage what lies on a device."""
    of = f" of {chip.memory / GB:.0f}" if chip else ""
    lines = [
        f"| stage | program | parameters + moments + program, GB a chip{of} | moved | has to be | ratio "
        "| at peak | MFU at most |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for kind, (programs, costs, _) in found.items():
        others = residency.beside(programs, kind)
        for program, cost in costs:
            parts = *others, cost.peak
            memory = " + ".join(f"{part / GB:.1f}" for part in parts) + f" = {sum(parts) / GB:.1f}"
            least = sum(program.least().values())
            cells = [kind, program.title.removeprefix(f"{kind}: "), memory]
            moved, ratio, times = "not shown", "", ["", ""]
            if cost.work is not None:
                moved, ratio = f"{cost.work.bytes / GB:.1f} GB", f"{cost.work.bytes / least:.2f}"
            if cost.work is not None and chip:
                peak = peak_of(cost.work, chip, sum(program.own().values()) / programs.mesh.size)
                times = [f"{1000 * peak.seconds:.1f} ms, {peak.slowest}", f"{100 * peak.mfu:.0f} %"]
            cells += [moved, f"{least / GB:.1f} GB", ratio, *times]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run_of(programs: Programs, found: Mapping[str, Fitting], assumed: Assumed, name: str) -> str:
    """Output about the whole run, or why there is none."""
    devices = programs.mesh.devices.flat
    chip = chip_of(devices[0].device_kind)
    missing = [kind for kind in programs.kinds() if kind not in found]
    why = []
    if left := [kind for kind in missing if kind not in PROGRAMS.value]:
        why.append(f"--programs leaves out {', '.join(left)}")
    if large := [kind for kind in missing if kind in PROGRAMS.value]:
        why.append(f"{', '.join(large)} did not fit")
    if chip is None and not MEASURE.value:
        known = "" if TOPOLOGY.value else " (try --measure)"
        why.append(f"the rates of {devices[0].device_kind!r} are not known{known}")
    if why:
        why += [f"{OUT.value} is not written"] * bool(OUT.value)
        return f"without an estimate of the whole run: {'; '.join(why)}"
    made = {kind: [program for program, _ in each.costs] for kind, each in found.items()}
    speeds: dict[str, list[whole.Speed]] = {}
    if MEASURE.value:
        if "score" in made:  # a device takes longer for each token of short rows than FLOPs say
            made["score"] = found["score"].programs.scores()
        for kind, each in made.items():
            with jax.set_mesh(found[kind].programs.mesh):
                speeds[kind] = measure.speeds(each, found[kind].programs.mesh)
            for program, speed in zip(each, speeds[kind]):
                print(f"{program.title}: measured {1000 * speed.each:.2f} ms", flush=True)
    elif chip:
        for kind, fitting in found.items():
            speeds[kind] = [whole.bound(*each, chip, len(devices)) for each in fitting.costs]
    if changed := {kind: each.changes for kind, each in found.items() if each.changes}:
        settings = "; ".join(f"{kind} with {as_flags(changes)}" for kind, changes in changed.items())
        print(f"each stage with the settings that fit ({settings}); plan the run again with all of them")
    uses = whole.estimate(programs, assumed, made, speeds)
    reach = 1.0 if MEASURE.value else REACH.value
    if OUT.value:
        run = f"{name}, {programs.config.evolve.iterations} iterations, {assumed.queries:,} queries"
        on = f"{len(devices)} x {devices[0].device_kind} ({run})"  # tells a plan of another config
        plan = {"on": on, "hours": whole.hours(uses, reach), "left_out": whole.left_out(programs)}
        write_text(pathlib.Path(OUT.value), json.dumps(plan, indent=1))
    return whole.describe(uses, programs, assumed, reach, PRICE.value, name)


def assumptions(config: ml_collections.ConfigDict) -> Assumed:
    """What the flags say of the data.

    Raises:
      ValueError: a flag is outside of its range; the message has all of them.
    """
    given = (PRICE, REACH, QUERIES, RESPONSE, SPREAD, RIGHT, DISTINCT, DISTINCT_WARM_UP, PREFIXES, PROMPT)
    values = {flag.name: flag.value for flag in given}
    found = list(ranges.outside(values, INTERVALS))
    for name, section, key in (("prompt", "data", "max_prompt"), ("response", "sampling", "max_new_tokens")):
        if (values[name] or 0) > config[section][key]:
            found.append(f"{name} = {values[name]}: the most is {section}.{key} = {config[section][key]}")
    if RIGHT.value > DISTINCT.value:
        found.append(f"right = {RIGHT.value}: copies count as wrong, so at most distinct = {DISTINCT.value}")
    ranges.refuse([f"--{problem}" for problem in found])
    embedded = 0 if config.data.labelled else config.data.figures.train
    return Assumed(
        queries=embedded or QUERIES.value,
        prompt=PROMPT.value or config.data.max_prompt,
        response=RESPONSE.value or min(177, config.sampling.max_new_tokens),
        spread=SPREAD.value,
        right=RIGHT.value,
        distinct=DISTINCT.value,
        distinct_warm_up=DISTINCT_WARM_UP.value or DISTINCT.value,
        prefixes=PREFIXES.value,
    )


def check_output(path: pathlib.Path) -> None:
    """Makes the folder of --out, before anything is compiled.

    Raises:
      ValueError, OSError: a file cannot be written there.
    """
    if path.is_dir():
        raise ValueError(f"--out={path}: is a folder; name a file in it, {path / 'plan.json'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--out={path}: the folder {path.parent} cannot be made: {error}") from error
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"--out={path}: no file can be written to {path.parent}")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    cli.show_log()
    config = CONFIG.value
    with cli.explained():
        unknown = [kind for kind in PROGRAMS.value if kind not in KINDS]
        if unknown or not PROGRAMS.value:
            named = f"there is no {', '.join(unknown)}" if unknown else "none is named"
            raise ValueError(f"--programs: {named}; choose of {', '.join(KINDS)}")
        if MEASURE.value and TOPOLOGY.value:
            raise ValueError("--measure runs programs on local devices, and those of --topology are not here")
        assumed = assumptions(config)
        if MEASURE.value:  # times of the shapes that the run has, not of the longest
            config.data.max_prompt = assumed.prompt
        if OUT.value:
            check_output(pathlib.Path(OUT.value))
        devices = devices_of(TOPOLOGY.value) if TOPOLOGY.value else jax.devices()
        programs = with_settings(config, {}, devices)
        axes = ", ".join(f"{axis} {size}" for axis, size in programs.mesh.shape.items())
        if not set(PROGRAMS.value) & set(programs.kinds()):
            raise ValueError(f"--programs: a run of this config has no {', '.join(PROGRAMS.value)}")
        size = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(programs.build)))
        name = type(programs.dimensions).__name__.removesuffix("Config")
        print(f"{len(devices)} x {devices[0].device_kind} ({axes}), {name}, {size:,} parameters")
        found: dict[str, Fitting] = {}
        with without_driver(devices[0]), jax.set_mesh(programs.mesh):
            for kind in programs.kinds():
                if kind in PROGRAMS.value:
                    for text in plan(config, kind, devices, ADVISE.value, found):
                        print(f"\n{text}", flush=True)
            print(f"\n{stages_table(found, chip_of(devices[0].device_kind))}", flush=True)
            print(f"\n{run_of(programs, found, assumed, name)}", flush=True)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
