"""One HTML file that shows what one or several runs did, with the paper's Figures 2 to 5.

    python -m mstar_jax.report runs/tiny
    python -m mstar_jax.report runs/static runs/adaptive --names=static,adaptive --output=compare
    python -m mstar_jax.report runs/phi35 --judge_url=http://localhost:8000 --judge_model=Qwen3-8B

It holds its images and loads nothing, so it can be mailed; the figures are beside it as PNG files. It reads
what the runs wrote and needs no accelerator. What a run does not have is left out, with the reason.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from mstar_jax import explore
from mstar_jax.reporting import figure2, gallery, plots, relativity, runs, tables
from mstar_jax.reporting.page import Page, escape
from mstar_jax.reporting.plots import Line
from mstar_jax.reporting.runs import Missing, Run
from mstar_jax.store import write_text

SAMPLES, STORES = 4_500_000, 12  # characters of all responses and images to browse; stages of them
STAGE_AXIS = "stage of the run (iteration)"
WINDOW = 3  # stages that a smoothed curve averages over


# ---- 1. the dynamics: Figures 3 to 5 ------------------------------------------------------------------


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
        picture = plots.lines(drawn, STAGE_AXIS, "queries (%)", ticks=ticks, shade=shade)
        note = f"Figure 3 of the paper: greedy accuracy and Pass@{k}, gap shaded. {about} {plots.INTERVAL}"
        text = page.figure("figure3", picture, note)
        drawn = [_line(found[0], "gap", f"gap: Pass@{k} − greedy", 1, "--", bars=False)]
        drawn += [_line(found[0], "sampled_accuracy", "accuracy of a sample", 0)]
        drawn += [_line(found[0], "reward_pass_at_2", "Reward-Pass@2", 2)]
        drawn += [_line(found[0], "all_right", "all steps right, greedy", 3)]
        drawn = [line for line in drawn if line.x]
        if drawn:
            picture = plots.lines(drawn, STAGE_AXIS, "queries (%), gap (points)", ticks=ticks)
            note = f"Beside it: {', '.join(line.label for line in drawn)}. {about} {plots.INTERVAL}"
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
        picture = plots.lines(drawn, STAGE_AXIS, unit, ticks=ticks)
        note = f"Figure 3 of the paper, {name} of every run. {about}"
        note += "" if key == "gap" else f" {plots.INTERVAL}"
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
            colour = plots.cold_to_hot(i, len(every))
            drawn.append(Line(f"{t:g}", [x for x, _ in rows], [y for _, y in rows], 0, colour))
        if any(line.x for line in drawn):
            unit = "(points)" if key == "gap" else "(% of queries)"
            picture = plots.lines(drawn, STAGE_AXIS, f"{name} {unit}", ticks=ticks, columns=7, title="T")
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
                drawn.append(Line(label, xs, explore.smoothed(ys, WINDOW), colour=i, marker=""))
        if drawn:
            picture = plots.lines(drawn, STAGE_AXIS, f"{name} (% of queries)", ticks=ticks)
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
    picture = plots.temperatures(grids, used, chosen, ticks, "below the best of the stage (points)")
    note = (
        "The sampling temperature of every iteration. Columns: how far Reward-Pass@2 of the policy after the "
        "stage is below its best, at each temperature; above: the best, in %. A square marks the temperature "
        f"used from then on. Validation split, n = {_grid_size(_grids(run))[1]} queries."
    )
    return f'<div class="figures">{page.figure(f"temperature{suffix}", picture, note)}</div>'


# ---- 2. the samples, the whole, the command -------------------------------------------------------------


def samples(found: Sequence[Run]) -> str:
    """Sampled responses to browse; the page's script shows them."""
    shown, each = gallery.Gallery(), max(STORES // len(found), 2)
    folders = [(run, folder) for run in found for folder in gallery.folders(run, each)]
    left_out, budget = [], SAMPLES
    for index, (run, folder) in enumerate(folders):
        name = folder.name if len(found) == 1 else f"{run.name}: {folder.name}"
        share = 2 / (len(folders) - index + 1)  # the first one brings the images that later ones show again
        try:
            budget -= shown.add(run, folder, name, round(budget * share))
        except Exception as error:  # as in Page.section
            left_out.append(f"{name} ({error})")
    if not shown.stages:
        raise Missing("; ".join(left_out) or "the run has stored no responses")
    names = ("correct", "wrong", "unparsed", "gold-unparsed")
    verdicts = "".join(f"<option>{name}</option>" for name in names)
    about = (
        f"The first {gallery.QUERIES} queries of a stage and up to {gallery.RESPONSES} responses of each, as "
        "stored. A bar before a step is its score by the reward model."
    )
    if left_out:
        about += f" Left out: {'; '.join(left_out)}."
    return (
        f'<p class="soft">{escape(about)}</p><noscript><p>Browsing them needs JavaScript.</p></noscript>'
        '<div class="controls"><label>stage <select id="stage"></select></label>'
        f'<label>verdict <select id="verdict"><option value="">all</option>{verdicts}</select></label>'
        '<button id="previous" type="button">Previous</button><button id="next" type="button">Next</button>'
        '<span id="where" class="soft" aria-live="polite"></span></div><div id="cards"></div>'
        f'<script type="application/json" id="samples-data">{shown.json()}</script>'
    )


def write(
    workdirs: Sequence[pathlib.Path],
    output: pathlib.Path | None = None,
    names: Sequence[str] = (),
    judge: relativity.Judge | None = None,
) -> pathlib.Path:
    """Writes `report.html` and its figures.

    Args:
      workdirs: of one or several runs, finished or not.
      output: the folder to write into; None for report/ in the first workdir.
      names: of the runs; empty for their folders' names.
      judge: gives the relativity score of Figure 2c; None asks nobody.

    Returns:
      The HTML file.

    Raises:
      ValueError: there is no workdir, or one is no run; the numbers of names and workdirs differ.
    """
    if not workdirs:
        raise ValueError("a report needs at least one workdir")
    workdirs = [pathlib.Path(workdir) for workdir in workdirs]
    found = runs.read_runs(workdirs, names)
    output = pathlib.Path(output) if output else workdirs[0] / "report"
    output.mkdir(parents=True, exist_ok=True)
    page = Page(output, several=len(found) > 1)
    if page.several:
        page.section("comparison", "Comparison", lambda: tables.comparison(found))
    page.section("runs", "Runs" if page.several else "Run", lambda: tables.overview(found))
    page.section("figure3", "Accuracy and Pass@K (Figure 3)", lambda: figure3(page, found))
    page.section("stages", "Stages", lambda: page.per_run(found, lambda run, _: tables.stages(run)))
    each = functools.partial(page.per_run, found)
    page.section("figure4", "Temperatures (Figure 4)", lambda: each(functools.partial(figure4, page)))
    page.section("figure5", "Static and adaptive (Figure 5)", lambda: figure5(page, found))
    page.section("temperature", "The temperature's path", lambda: each(functools.partial(path, page)))
    page.section(
        "figure2",
        "Reward and rollouts (Figure 2)",
        lambda: each(functools.partial(figure2.figures, page, judge=judge)),
    )
    page.section("prm", "Process reward model", lambda: each(functools.partial(figure2.reward_model, page)))
    if any(any((run.workdir / "benchmarks").glob("*/*.json")) for run in found):
        page.section("benchmarks", "Benchmarks", lambda: each(lambda run, _: tables.benchmarks(run)))
    page.section("samples", "Sampled responses", lambda: samples(found))
    target = output / "report.html"
    title = "M-STaR: " + ", ".join(run.name for run in found)
    text = page.html(title).encode("utf-8", "replace").decode()  # a path may hold what UTF-8 has not
    write_text(target, text)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description="Shows what one or several runs did, as one HTML file.")
    parser.add_argument("workdirs", nargs="+", help="runs of mstar_jax.main")
    parser.add_argument("--output", default="", help="folder; default report/ in the first workdir")
    parser.add_argument("--names", default="", help="names of the runs, separated by commas")
    parser.add_argument("--judge_url", default="", help="an OpenAI-compatible endpoint, for Figure 2c")
    parser.add_argument("--judge_model", default="", help="the judge's name there")
    parser.add_argument("--judge_calls", type=int, default=200, help="at most that many responses are judged")
    args = parser.parse_args()
    if bool(args.judge_url) != bool(args.judge_model):
        parser.error("--judge_url and --judge_model belong together")
    judge = relativity.Judge(args.judge_url, args.judge_model, args.judge_calls) if args.judge_url else None
    names = [name.strip() for name in args.names.split(",")] if args.names else []
    try:
        if judge:
            judge.endpoint()
        output = pathlib.Path(args.output) if args.output else None
        target = write([pathlib.Path(w) for w in args.workdirs], output, names, judge)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{target.absolute()} ({target.stat().st_size / 1e6:.1f} MB), its figures beside it as PNG files")


if __name__ == "__main__":
    main()
