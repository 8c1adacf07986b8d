"""The page from top to bottom: which sections the report has, and what makes each of them."""

import pathlib
from collections.abc import Callable, Sequence

from mstar_jax.report import dynamics, figure2, gallery, hours, relativity, tables
from mstar_jax.report.markup import Page, escape
from mstar_jax.report.runs import Missing, RunRecord, read_runs
from mstar_jax.store import write_text

SAMPLES = 4_500_000  # characters of all responses and images to browse
STORES = 12  # stages to browse


def write(
    workdirs: Sequence[pathlib.Path],
    output: pathlib.Path | None = None,
    names: Sequence[str] = (),
    judge: relativity.Judge | None = None,
) -> pathlib.Path:
    """Writes `report.html` and its figures.

    Args:
      workdirs: of one or several runs, finished or not.
      output: the folder to write to; None for report/ in the first workdir.
      names: of the runs; empty for the names of their folders.
      judge: gives the relativity score of Figure 2c; without one the score is left out.

    Returns:
      The HTML file.

    Raises:
      ValueError: there is no workdir, one of them is not a run, or the numbers of names and workdirs differ.
    """
    if not workdirs:
        raise ValueError("a report needs at least one workdir")
    workdirs = [pathlib.Path(workdir) for workdir in workdirs]
    runs = read_runs(workdirs, names)
    output = pathlib.Path(output) if output else workdirs[0] / "report"
    output.mkdir(parents=True, exist_ok=True)
    page = Page(output, several=len(runs) > 1)

    def each(make: Callable[[RunRecord, str], str]) -> Callable[[], str]:
        """A section with a part for every run, from the run and a suffix for file names."""
        return lambda: page.per_run(runs, make)

    if page.several:
        page.section("comparison", "Comparison", lambda: tables.comparison(runs))
    page.section("runs", "Runs" if page.several else "Run", lambda: tables.overview(runs))
    page.section("figure3", "Accuracy and Pass@K (Figure 3)", lambda: dynamics.figure3(page, runs))
    page.section("narrowing", "Pass@K and entropy", lambda: dynamics.narrowing(page, runs))
    page.section("stages", "Stages", each(lambda run, _: tables.stages(run)))
    if any((run.workdir / hours.FILE).exists() for run in runs):
        page.section("hours", "Hours planned and spent", each(lambda run, _: hours.compared(run)))
    page.section("figure4", "Temperatures (Figure 4)", each(lambda run, at: dynamics.figure4(page, run, at)))
    page.section("figure5", "Static and adaptive (Figure 5)", lambda: dynamics.figure5(page, runs))
    page.section("temperature", "The temperature's path", each(lambda run, at: dynamics.path(page, run, at)))
    page.section(
        "figure2",
        "Reward and rollouts (Figure 2)",
        each(lambda run, at: figure2.figure2(page, run, at, judge)),
    )
    page.section("prm", "Process reward model", each(lambda run, at: figure2.reward_model(page, run, at)))
    if any(any((run.workdir / "benchmarks").glob("*/*.json")) for run in runs):
        page.section("benchmarks", "Benchmarks", each(lambda run, _: tables.benchmarks(run)))
    page.section("samples", "Sampled responses", lambda: samples(runs))
    target = output / "report.html"
    title = "M-STaR: " + ", ".join(run.name for run in runs)
    text = page.html(title).encode("utf-8", "replace").decode()  # a path may not be valid UTF-8
    write_text(target, text)
    return target


def samples(runs: Sequence[RunRecord]) -> str:
    """Sampled responses to browse; the script of the page shows them."""
    shown = gallery.Gallery()
    folders = [(run, folder) for run in runs for folder in gallery.folders(run, max(STORES // len(runs), 2))]
    left_out = list[str]()
    budget = SAMPLES
    for index, (run, folder) in enumerate(folders):
        name = folder.name if len(runs) == 1 else f"{run.name}: {folder.name}"
        share = 2 / (len(folders) - index + 1)  # the first store pays for images that later ones reuse
        try:
            budget -= shown.add(run, folder, name, round(budget * share))
        except Exception as error:  # see Page.section
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
