"""The dynamics of training: Figures 3 to 5 of the paper, and the path of the temperature."""

import dataclasses
from collections.abc import Sequence

from mstar_jax.report import figures, runs
from mstar_jax.report.figures import Line
from mstar_jax.report.markup import Page
from mstar_jax.report.runs import Missing, Record, RunRecord
from mstar_jax.rewards import temperature

STAGE_AXIS = "stage of the run (iteration)"
WINDOW = 3  # stages that a smoothed curve averages over

Grids = dict[float, dict[float, Record]]  # by place of an exploration, then by temperature: the dynamics


# ---- 1. what the curves show --------------------------------------------------------------------------


def _ticks(found: Sequence[RunRecord]) -> dict[float, str]:
    places = {x for run in found for x, _, _ in run.series("validation", "greedy_accuracy")}
    return {float(x): runs.title(x) for x in sorted(places)}


def _k(found: Sequence[RunRecord]) -> str:
    ks = {str(r["k"]) for run in found for r in run.records("validation") if "k" in r}
    return ks.pop() if len(ks) == 1 else "K"


def _n(found: Sequence[RunRecord]) -> str:
    ns = sorted({n for run in found for _, _, n in run.series("validation", "greedy_accuracy") if n})
    return ", ".join(map(str, ns)) or "unknown"


def _line(run: RunRecord, key: str, label: str, colour: int, style: str = "-", bars: bool = True) -> Line:
    rows = run.series("validation", key)
    counts = {n for _, _, n in rows}
    n = counts.pop() if bars and len(counts) == 1 else 0
    return Line(label, [x for x, _, _ in rows], [y for _, y, _ in rows], n, colour, style)


def _grids(run: RunRecord) -> Grids:
    found: Grids = {}
    for record in run.records("validation"):
        rows = {runs.number(row, "temperature"): row for row in record.get("grid") or ()}
        if grid := {t: row for t, row in rows.items() if t is not None}:
            found[float(runs.place(record) or 0)] = grid
    return found


def _grid_size(grids: Grids) -> tuple[str, str]:
    """(K of Pass@K, number of queries) that the temperatures were measured with."""
    rows = [row for grid in grids.values() for row in grid.values()]
    k, n = ({str(row[key]) for row in rows if key in row} for key in ("k", "n"))
    return (k.pop() if len(k) == 1 else "K"), ", ".join(sorted(n)) or "unknown"


# ---- 2. the figures -----------------------------------------------------------------------------------


def figure3(page: Page, found: Sequence[RunRecord]) -> str:
    """Greedy accuracy against Pass@K: one figure for a single run, one figure a metric for several."""
    if not _ticks(found):
        raise Missing("no stage was evaluated on the validation split")
    about = f"K = {_k(found)}, validation split, n = {_n(found)} queries."
    text = _one_run(page, found[0], about) if len(found) == 1 else _several_runs(page, found, about)
    return f'<div class="figures">{text}</div>'


def _one_run(page: Page, run: RunRecord, about: str) -> str:
    ticks = _ticks([run])
    k = _k([run])
    greedy = _line(run, "greedy_accuracy", "greedy accuracy", 0)
    passed = _line(run, "pass_at_k", f"Pass@{k}", 1)
    shade = [(0, 1)] if greedy.x == passed.x else []
    picture = figures.lines([greedy, passed], STAGE_AXIS, "queries (%)", ticks=ticks, shade=shade)
    note = f"Figure 3 of the paper: greedy accuracy and Pass@{k}, gap shaded. {about} {figures.INTERVAL}"
    text = page.figure("figure3", picture, note)
    others = [
        _line(run, "gap", f"gap: Pass@{k} − greedy", 1, "--", bars=False),
        _line(run, "sampled_accuracy", "accuracy of a sample", 0),
        _line(run, "reward_pass_at_2", "Reward-Pass@2", 2),
        _line(run, "all_right", "all steps right, greedy", 3),
    ]
    drawn = [line for line in others if line.x]
    if drawn:
        picture = figures.lines(drawn, STAGE_AXIS, "queries (%), gap (points)", ticks=ticks)
        note = f"Further metrics: {', '.join(line.label for line in drawn)}. {about} {figures.INTERVAL}"
        text += page.figure("figure3_beside", picture, note)
    return text


def _several_runs(page: Page, found: Sequence[RunRecord], about: str) -> str:
    text = ""
    names = {"greedy_accuracy": "greedy accuracy", "pass_at_k": f"Pass@{_k(found)}", "gap": "gap"}
    for key, name in names.items():
        drawn = []
        for i, run in enumerate(found):  # shifted a little, so that the bars can be told apart
            line = _line(run, key, run.name, i, bars=key != "gap")
            shift = 0.07 * (i - (len(found) - 1) / 2)
            drawn.append(dataclasses.replace(line, x=[x + shift for x in line.x]))
        unit = "Pass@K − greedy (points)" if key == "gap" else f"{name} (% of queries)"
        picture = figures.lines(drawn, STAGE_AXIS, unit, ticks=_ticks(found))
        note = f"Figure 3 of the paper, {name} of every run. {about}"
        note += "" if key == "gap" else f" {figures.INTERVAL}"
        text += page.figure(f"figure3_{key}", picture, note)
    return text


def narrowing(page: Page, found: Sequence[RunRecord]) -> str:
    """Pass@K and the entropy of the samples in one figure: how a policy narrows while it improves."""
    ticks, k = _ticks(found), _k(found)
    shares, values = list[Line](), list[Line]()
    for at, run in enumerate(found):
        entropy = _line(run, "entropy", "", at, "--", bars=False)
        if entropy.x:
            one = len(found) == 1
            name = "" if one else f": {run.name}"
            shares.append(_line(run, "pass_at_k", f"Pass@{k}{name}", at, bars=one))
            right = dataclasses.replace(entropy, label=f"entropy{name}", colour=1 if one else at)
            values.append(dataclasses.replace(right, marker="" if not one else None))
    if not values:
        raise Missing("no record has an entropy; runs of earlier versions did not measure it")
    units = (f"Pass@{k} (% of queries)", "entropy (nats per token)")
    picture = figures.two_axes(shares, values, STAGE_AXIS, units, ticks)
    note = (
        f"Pass@{k}, and the entropy of the samples' distribution: the mean of −log p over their tokens. "
        f"Validation split, n = {_n(found)} queries."
    )
    return f'<div class="figures">{page.figure("narrowing", picture, note)}</div>'


def figure4(page: Page, run: RunRecord, suffix: str) -> str:
    """The dynamics at each temperature of the exploration's grid."""
    grids = _grids(run)
    if not grids:
        raise Missing("no stage was explored at several temperatures")
    ticks = {float(x): runs.title(x) for x in grids}
    k, n = _grid_size(grids)
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


def figure5(page: Page, found: Sequence[RunRecord]) -> str:
    """Static against adaptive exploration, from the warm-up on."""
    ticks = {x: name for x, name in _ticks(found).items() if x >= 0}
    n = _n(found)
    text = ""
    absent = []
    for key, name in (("pass_at_k", f"Pass@{_k(found)}"), ("reward_pass_at_2", "Reward-Pass@2")):
        drawn = []
        for i, run in enumerate(found):
            rows = [(x, y) for x, y, _ in run.series("validation", key) if x >= 0]
            if rows:
                xs = [x for x, _ in rows]
                ys = [y for _, y in rows]
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


def path(page: Page, run: RunRecord, suffix: str) -> str:
    """The temperature that each iteration sampled with, and why it was chosen."""
    records = run.records("validation")
    iterations = [r for r in records if (runs.place(r) or 0) > 0]
    used = {float(r["iteration"]): t for r in iterations if (t := runs.number(r, "temperature")) is not None}
    grids = {
        x: {t: y for t, row in grid.items() if (y := runs.number(row, "reward_pass_at_2")) is not None}
        for x, grid in _grids(run).items()
    }
    if not used:
        raise Missing("no iteration was evaluated yet")
    if not grids and len(set(used.values())) == 1:
        raise Missing(f"the temperature is static, T = {used.popitem()[1]:g}; nothing was explored")
    chosen = {float(runs.place(r) or 0): t for r in records if (t := runs.number(r, "chosen")) is not None}
    ticks = {x: runs.title(x) for x in sorted({*used, *grids, *chosen})}
    picture = figures.temperatures(grids, used, chosen, ticks, "below the best of the stage (points)")
    note = (
        "The sampling temperature of every iteration. Columns: how far Reward-Pass@2 of the policy after the "
        "stage is below its best, at each temperature; above: the best, in %. A square marks the temperature "
        f"used from then on. Validation split, n = {_grid_size(_grids(run))[1]} queries."
    )
    return f'<div class="figures">{page.figure(f"temperature{suffix}", picture, note)}</div>'
