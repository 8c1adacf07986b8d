"""The report as a whole: its sections, and the sampled responses to browse."""

import functools
import pathlib
from collections.abc import Sequence

from mstar_jax.report import dynamics, figure2, gallery, relativity, runs, tables
from mstar_jax.report.page import Page, escape
from mstar_jax.report.runs import Missing, Run
from mstar_jax.store import write_text

SAMPLES, STORES = 4_500_000, 12  # characters of all responses and images to browse; stages of them


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
    page.section("figure3", "Accuracy and Pass@K (Figure 3)", lambda: dynamics.figure3(page, found))
    page.section("stages", "Stages", lambda: page.per_run(found, lambda run, _: tables.stages(run)))
    each = functools.partial(page.per_run, found)
    page.section(
        "figure4", "Temperatures (Figure 4)", lambda: each(functools.partial(dynamics.figure4, page))
    )
    page.section("figure5", "Static and adaptive (Figure 5)", lambda: dynamics.figure5(page, found))
    page.section(
        "temperature", "The temperature's path", lambda: each(functools.partial(dynamics.path, page))
    )
    page.section(
        "figure2",
        "Reward and rollouts (Figure 2)",
        lambda: each(functools.partial(figure2.figure2, page, judge=judge)),
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
