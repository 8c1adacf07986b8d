"""Drawing: numbers in, a matplotlib `Figure` out (object interface, no global state).

Shares are given in 0..1 and drawn in percent. The colours are safe for colour-blind readers, and every series
has its own marker. `svg` writes colours as CSS variables, so that a page can show them on a dark background.
"""

import dataclasses
import functools
import html
import io
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure

from mstar_jax.rewards import metrics

INK = "#1b2430"
GRID = "#d5dae1"
COLOURS = ("#0072b2", "#d55e00", "#008a63", "#a3478f", "#8a6d00", "#5b6673")
PATH = "#e0115f"  # visible on the colours of a grid, too
MARKERS = "osD^vP"
COLD_TO_HOT = LinearSegmentedColormap.from_list("temperature", ["#2f7fd1", "#8d8d8d", "#d9630f"])
INTERVAL = "Bars are 95 % intervals (Wilson) over the queries."
SIZE = (4.6, 3.4)  # inches: two side by side on a desktop, one on a phone

STYLE: Any = {
    "font.size": 10.5,
    "font.family": "sans-serif",
    "text.parse_math": False,  # a run's name may hold a dollar sign
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "xtick.labelsize": 9,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
}
styled = matplotlib.rc_context(STYLE)


@dataclasses.dataclass(frozen=True)
class Line:
    """A series.

    Attributes:
      label: its name in the legend; empty for none.
      x, y: its points; y are shares.
      n: number of queries per point, for the interval; 0 draws none.
      colour: index into COLOURS, or a colour.
      style, marker: matplotlib's; None is the marker that belongs to the colour.
      faint: draw pale points without a line.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    n: int = 0
    colour: int | str = 0
    style: str = "-"
    marker: str | None = None
    faint: bool = False


def _errors(shares: Sequence[float], ns: Sequence[int], scale: float) -> list[list[float]]:
    """[below, above] of the 95 % intervals, scaled, for `errorbar`."""
    ends = [metrics.wilson(min(max(share, 0.0), 1.0), n) for share, n in zip(shares, ns)]
    below = [scale * max(share - low, 0.0) for share, (low, _) in zip(shares, ends)]
    above = [scale * max(high - share, 0.0) for share, (_, high) in zip(shares, ends)]
    return [below, above]


def _new(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return figure, axes


def _legend(
    figure: Figure, axes: Axes, columns: int = 2, title: str | None = None, more: Axes | None = None
) -> None:
    """The legend of axes, and of those that share their x axis."""
    handles, labels = axes.get_legend_handles_labels()
    if more is not None:
        others = more.get_legend_handles_labels()
        handles, labels = [*handles, *others[0]], [*labels, *others[1]]
    if handles:
        labels = [label if len(label) <= 48 else label[:47] + "…" for label in labels]
        columns = 1 if max(map(len, labels)) > 24 else columns
        narrow = columns > 2
        figure.legend(
            handles,
            labels,
            loc="outside upper center",
            ncols=min(columns, len(handles)),
            title=title,
            columnspacing=0.9 if narrow else None,  # None: the style's
            handlelength=1.3 if narrow else None,
            handletextpad=0.4 if narrow else None,
            fontsize=9 if narrow else None,
        )


def _ticks(axes: Axes, ticks: Mapping[float, str]) -> None:
    places = sorted(ticks)
    step = -(-len(places) // 14)  # a long run has no room for the name of every stage
    shown = [place for place in places if step == 1 or (place >= 0 and place % step == 0)]
    axes.set_xticks(shown, [ticks[place].replace("-", "-\n") for place in shown])


def _colour(colour: int | str) -> str:
    return colour if isinstance(colour, str) else COLOURS[colour % len(COLOURS)]


def cold_to_hot(index: int, count: int) -> str:
    """The colour of temperature number `index` out of `count`."""
    return to_hex(COLD_TO_HOT(index / max(count - 1, 1)))


def _draw(axes: Axes, series: Sequence[Line], scale: float) -> None:
    """Draws curves; their values times `scale` are what the axis shows."""
    for line in series:
        if not len(line.y):
            continue
        marker = MARKERS[line.colour % len(MARKERS)] if isinstance(line.colour, int) else "o"
        draw: Callable = axes.plot
        if line.n > 0:
            errors = _errors(line.y, [line.n] * len(line.y), scale)
            draw = functools.partial(axes.errorbar, yerr=errors, elinewidth=0.9, capsize=2.5)
        draw(
            line.x,
            [scale * y for y in line.y],
            label=f" {line.label}" if line.label else "_",  # "_" hides it; so would a name that begins so
            color=_colour(line.colour),
            marker=marker if line.marker is None else line.marker,
            markersize=4.5,
            linewidth=1.8,
            linestyle="none" if line.faint else line.style,
            alpha=0.45 if line.faint else None,
        )


@styled
def lines(
    series: Sequence[Line],
    xlabel: str,
    ylabel: str,
    *,
    ticks: Mapping[float, str] | None = None,
    logarithmic: bool = False,
    shade: Sequence[tuple[int, int]] = (),
    columns: int = 2,
    title: str | None = None,
) -> Figure:
    """Curves with 95 % intervals.

    Args:
      series: the curves.
      xlabel, ylabel: labels of the axes.
      ticks: labels of the x axis by place.
      logarithmic: draw the x axis with a logarithmic scale.
      shade: pairs of series to fill the area between; both must have the same x.
      columns, title: of the legend.
    """
    figure, axes = _new(xlabel, ylabel)
    _draw(axes, series, 100)
    for a, b in shade:
        low = [100 * y for y in series[a].y]
        high = [100 * y for y in series[b].y]
        axes.fill_between(series[a].x, low, high, color=_colour(series[b].colour), alpha=0.13, linewidth=0)
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    if ticks:
        _ticks(axes, ticks)
    _legend(figure, axes, columns, title)
    return figure


@styled
def two_axes(
    shares: Sequence[Line],
    values: Sequence[Line],
    xlabel: str,
    ylabels: tuple[str, str],
    ticks: Mapping[float, str],
) -> Figure:
    """Curves of shares, in percent on the left axis, and of other values, on the right one; both begin at 0.

    Args:
      shares, values: the curves.
      xlabel, ylabels: labels of the axes; of y left and right.
      ticks: labels of the x axis by place.
    """
    figure, axes = _new(xlabel, ylabels[0])
    beside = axes.twinx()
    beside.set_ylabel(ylabels[1])
    beside.grid(False)
    beside.spines["right"].set_visible(True)
    _draw(axes, shares, 100)
    _draw(beside, values, 1)
    axes.set_ylim(bottom=0)
    beside.set_ylim(bottom=0)
    _ticks(axes, ticks)
    _legend(figure, axes, more=beside)
    return figure


@styled
def bars(
    names: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
) -> Figure:
    """Grouped bars in percent: every series has a (share, standard error) for each name."""
    figure, axes = _new(xlabel, ylabel)
    width = 0.8 / max(len(series), 1)
    for index, (label, values) in enumerate(series.items()):
        places = [i - 0.4 + width * (index + 0.5) for i in range(len(values))]
        heights = [100 * value for value, _ in values]
        errors = [100 * error for _, error in values]
        axes.bar(places, heights, 0.92 * width, label=label, color=COLOURS[index], alpha=0.85)
        if any(errors):
            axes.errorbar(places, heights, yerr=errors, fmt="none", ecolor=INK, elinewidth=1, capsize=3)
    axes.set_xticks(range(len(names)), list(names))
    axes.grid(False, axis="x")
    _legend(figure, axes)
    return figure


@styled
def temperatures(
    grids: Mapping[float, Mapping[float, float]],
    path: Mapping[float, float],
    chosen: Mapping[float, float],
    ticks: Mapping[float, str],
    label: str,
) -> Figure:
    """The path of the temperature over the run, on top of how far each temperature was below the best.

    Args:
      grids: for each place of an exploration, a share by temperature. The best share is written above.
      path: the temperature that each iteration sampled with.
      chosen: the temperature that each exploration chose.
      ticks: labels of the places.
      label: of the colour bar.
    """
    figure, axes = _new("stage of the run", "sampling temperature T")
    axes.grid(False)
    best = {x: max(grid.values()) for x, grid in grids.items() if grid}
    points = [(x, t, 100 * (share - best[x])) for x, grid in grids.items() for t, share in grid.items()]
    if points:
        xs, ts, shares = zip(*points)
        steps = sorted(set(ts))
        gap = min((b - a for a, b in zip(steps, steps[1:])), default=0.1)
        low = min(*shares, -0.1)
        colours = matplotlib.colormaps["cividis"]
        axes.bar(
            xs,
            [gap] * len(points),
            0.7,
            bottom=[t - gap / 2 for t in ts],
            color=[to_hex(colours(1 - share / low)) for share in shares],
        )
        for x, share in best.items():
            axes.annotate(
                f"{100 * share:.0f}",
                (x, max(ts) + gap / 2),
                (0, 3),
                textcoords="offset points",
                fontsize=9,
                ha="center",
            )
        scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(low, 0), "cividis")
        figure.colorbar(scale, ax=axes, label=label, pad=0.02)
    if path:
        axes.step(list(path), list(path.values()), where="mid", color=PATH, label="sampled with")
        axes.plot(list(path), list(path.values()), "o", color=PATH, markersize=5, label="_")
    if chosen:
        axes.plot(
            list(chosen),
            list(chosen.values()),
            "s",
            markersize=11,
            markerfacecolor="none",
            markeredgecolor=PATH,
            markeredgewidth=1.6,
            label="chosen here",
        )
    _ticks(axes, ticks)
    _legend(figure, axes)
    return figure


@styled
def calibration(bins: Sequence[tuple[float, float, int]]) -> Figure:
    """Reliability diagram of (mean score, mean label, number of steps) for every bin that is not empty."""
    figure, axes = _new("predicted score of a step (mean of the bin)", "Monte-Carlo label (mean of the bin)")
    axes.plot([0, 1], [0, 1], color=COLOURS[5], linestyle="--", linewidth=1.2, label="perfectly calibrated")
    if bins:
        scores, labels, counts = zip(*bins)
        error = _errors(labels, counts, 1)
        sizes = [20 + 160 * count / max(counts) for count in counts]
        axes.errorbar(scores, labels, yerr=error, fmt="none", ecolor=COLOURS[0], elinewidth=1, capsize=2.5)
        axes.plot(scores, labels, color=COLOURS[0], linewidth=1.4)
        axes.scatter(scores, labels, s=sizes, color=COLOURS[0], label="bin (area: number of steps)", zorder=3)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    _legend(figure, axes)
    return figure


@styled
def svg(figure: Figure, label: str) -> str:
    """The figure as an <svg> element for a page, without a width and without any URL.

    The page defines --ink, --grid and --c0 ... --c5. `label` is the text for screen readers.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[\d. ]+"', head)
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)  # the ids would repeat in every figure
    for index, colour in enumerate(COLOURS):
        rest = rest.replace(colour, f"var(--c{index})")
    rest = rest.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    return f'<svg {box[0] if box else ""} role="img" aria-label="{html.escape(label)}">{rest.strip()}'


@styled
def png(figure: Figure, path: pathlib.Path) -> None:
    """Writes the figure on white, about 900 pixels wide."""
    figure.savefig(path, format="png", dpi=184, facecolor="white")
    figure.set_layout_engine("none")  # the layout is done; `svg` need not repeat it
