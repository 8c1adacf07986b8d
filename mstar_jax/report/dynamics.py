"""The dynamics of training: Figures 3 to 5 of the paper, and the temperature's path."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mstar_jax.report import figures, runs
from mstar_jax.report.figures import Line
from mstar_jax.report.page import Page
from mstar_jax.report.runs import Missing, Run
from mstar_jax.rewards import temperature

STAGE_AXIS = "stage of the run (iteration)"
WINDOW = 3  # stages that a smoothed curve averages over


def _ticks(found: Sequence[Run]) -> dict[float, str]:
    places = {x for run in found for x, _, _ in run.series("validation", "greedy_accuracy")}
    return {float(x): runs.title(x) for x in sorted(places)}


def _k(found: Sequence[Run]) -> str:
    ks = {str(r["k"]) for run in found for r in run.records("validation") if "k" in r}
    return ks.pop() if len(ks) == 1 else "K"


def _n(found: Sequence[Run]) -> str:
    ns = sorted({n for run in found for _, _, n in run.series("validation", "greedy_accuracy") if n})
    return ", ".join(map(str, ns)) or "unknown"


def _line(run: Run, key: str, label: str, colour: int, style: str = "-", bars: bool = True) -> Line:
    rows = run.series("validation", key)
    counts = {n for _, _, n in rows}
    n = counts.pop() if bars and len(counts) == 1 else 0
    return Line(label, [x for x, _, _ in rows], [y for _, y, _ in rows], n, colour, style)


def figure3(page: Page, found: Sequence[Run]) -> str:
    """Greedy accuracy against Pass@K."""
    ticks, k = _ticks(found), _k(found)
    if not ticks:
        raise Missing("no stage was evaluated on the validation split")
    about = f"K = {k}, validation split, n = {_n(found)} queries."
    if len(found) == 1:
        drawn = [_line(found[0], "greedy_accuracy", "greedy accuracy", 0)]
        drawn += [_line(found[0], "pass_at_k", f"Pass@{k}", 1)]
        shade = [(0, 1)] if drawn[0].x == drawn[1].x else []
        picture = figures.lines(drawn, STAGE_AXIS, "queries (%)", ticks=ticks, shade=shade)
        note = f"Figure 3 of the paper: greedy accuracy and Pass@{k}, gap shaded. {about} {figures.INTERVAL}"
        text = page.figure("figure3", picture, note)
        drawn = [_line(found[0], "gap", f"gap: Pass@{k} − greedy", 1, "--", bars=False)]
        drawn += [_line(found[0], "sampled_accuracy", "accuracy of a sample", 0)]
        drawn += [_line(found[0], "reward_pass_at_2", "Reward-Pass@2", 2)]
        drawn += [_line(found[0], "all_right", "all steps right, greedy", 3)]
        drawn = [line for line in drawn if line.x]
        if drawn:
            picture = figures.lines(drawn, STAGE_AXIS, "queries (%), gap (points)", ticks=ticks)
            note = f"Beside it: {', '.join(line.label for line in drawn)}. {about} {figures.INTERVAL}"
            text += page.figure("figure3_beside", picture, note)
        return f'<div class="figures">{text}</div>'
    text = ""
    for key, name in (("greedy_accuracy", "greedy accuracy"), ("pass_at_k", f"Pass@{k}"), ("gap", "gap")):
        drawn = []
        for i, run in enumerate(found):  # a little beside each other, that the bars can be told apart
            line = _line(run, key, run.name, i, bars=key != "gap")
            beside = 0.07 * (i - (len(found) - 1) / 2)
            drawn.append(dataclasses.replace(line, x=[x + beside for x in line.x]))
        unit = "Pass@K − greedy (points)" if key == "gap" else f"{name} (% of queries)"
        picture = figures.lines(drawn, STAGE_AXIS, unit, ticks=ticks)
        note = f"Figure 3 of the paper, {name} of every run. {about}"
        note += "" if key == "gap" else f" {figures.INTERVAL}"
        text += page.figure(f"figure3_{key}", picture, note)
    return f'<div class="figures">{text}</div>'


def figure4(page: Page, run: Run, suffix: str) -> str:
    """The dynamics for each temperature of the exploration's grid."""
    grids = _grids(run)
    if not grids:
        raise Missing("no stage was explored at several temperatures")
    ticks, (k, n) = {float(x): runs.title(x) for x in grids}, _grid_size(grids)
    every = sorted({t for grid in grids.values() for t in grid})
    names = {"pass_at_k": f"Pass@{k}", "gap": f"Pass@{k} − greedy", "reward_pass_at_2": "Reward-Pass@2"}
    text = ""
    for key, name in names.items():
        drawn = []
        for i, t in enumerate(every):
            rows = [(x, y) for x, g in grids.items() if (y := runs.number(g.get(t, {}), key)) is not None]
            colour = figures.cold_to_hot(i, len(every))
            drawn.append(Line(f"{t:g}", [x for x, _ in rows], [y for _, y in rows], 0, colour))
        if any(line.x for line in drawn):
            unit = "(points)" if key == "gap" else "(% of queries)"
            picture = figures.lines(drawn, STAGE_AXIS, f"{name} {unit}", ticks=ticks, columns=7, title="T")
            note = f"Figure 4 of the paper: {name} for each temperature, validation split, n = {n}."
            text += page.figure(f"figure4_{key}{suffix}", picture, note)
    return f'<div class="figures">{text}</div>'


def _grid_size(grids: dict[float, dict[float, dict[str, Any]]]) -> tuple[str, str]:
    """(K of Pass@K, queries) that the temperatures were measured with."""
    rows = [row for grid in grids.values() for row in grid.values()]
    k, n = ({str(row[key]) for row in rows if key in row} for key in ("k", "n"))
    return (k.pop() if len(k) == 1 else "K"), ", ".join(sorted(n)) or "unknown"


def _grids(run: Run) -> dict[float, dict[float, dict[str, Any]]]:
    """By place of an exploration: its records by temperature."""
    found: dict[float, dict[float, dict[str, Any]]] = {}
    for record in run.records("validation"):
        rows = {runs.number(row, "temperature"): row for row in record.get("grid") or ()}
        if grid := {t: row for t, row in rows.items() if t is not None}:
            found[float(runs.place(record) or 0)] = grid
    return found


def figure5(page: Page, found: Sequence[Run]) -> str:
    """Static against adaptive exploration, from the warm-up on."""
    ticks = {x: name for x, name in _ticks(found).items() if x >= 0}
    k, n, text = _k(found), _n(found), ""
    absent = []
    for key, name in (("pass_at_k", f"Pass@{k}"), ("reward_pass_at_2", "Reward-Pass@2")):
        drawn = []
        for i, run in enumerate(found):
            rows = [(x, y) for x, y, _ in run.series("validation", key) if x >= 0]
            if rows:
                xs, ys = [x for x, _ in rows], [y for _, y in rows]
                label = f"{'adaptive' if _grids(run) else 'static'} T: {run.name}"
                drawn.append(Line("", xs, ys, colour=i, faint=True))
                drawn.append(Line(label, xs, temperature.smoothed(ys, WINDOW), colour=i, marker=""))
        if drawn:
            picture = figures.lines(drawn, STAGE_AXIS, f"{name} (% of queries)", ticks=ticks)
            note = (
                f"Figure 5 of the paper: {name}, smoothed over {WINDOW} stages; the points are as measured. "
                f"Validation split, n = {n} queries."
            )
            text += page.figure(f"figure5_{key}", picture, note)
        else:
            absent.append(name)
    if not text:
        raise Missing("no stage was evaluated on the validation split")
    notes = "".join(f'<p class="soft">Left out: no record has {name}.</p>' for name in absent)
    return f'<div class="figures">{text}</div>{notes}'


def path(page: Page, run: Run, suffix: str) -> str:
    """The temperature that each iteration sampled with, and why."""
    records = [r for r in run.records("validation") if (runs.place(r) or 0) > 0]
    used = {float(r["iteration"]): t for r in records if (t := runs.number(r, "temperature")) is not None}
    grids = {
        x: {t: y for t, row in grid.items() if (y := runs.number(row, "reward_pass_at_2")) is not None}
        for x, grid in _grids(run).items()
    }
    if not used:
        raise Missing("no iteration was evaluated yet")
    if not grids and len(set(used.values())) == 1:
        raise Missing(f"the temperature is static, T = {used.popitem()[1]:g}; nothing was explored")
    chosen = {
        float(runs.place(r) or 0): t
        for r in run.records("validation")
        if (t := runs.number(r, "chosen")) is not None
    }
    ticks = {x: runs.title(x) for x in sorted({*used, *grids, *chosen})}
    picture = figures.temperatures(grids, used, chosen, ticks, "below the best of the stage (points)")
    note = (
        "The sampling temperature of every iteration. Columns: how far Reward-Pass@2 of the policy after the "
        "stage is below its best, at each temperature; above: the best, in %. A square marks the temperature "
        f"used from then on. Validation split, n = {_grid_size(_grids(run))[1]} queries."
    )
    return f'<div class="figures">{page.figure(f"temperature{suffix}", picture, note)}</div>'
