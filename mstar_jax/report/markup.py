"""HTML: a page that loads nothing, made of sections of which each may fail; tables; escaping."""

import base64
import hashlib
import html
import logging
import pathlib
import re
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from mstar_jax.report import figures
from mstar_jax.report.runs import Missing, RunRecord

log = logging.getLogger(__name__)


class Page:
    """The sections in order. One that cannot be made is replaced by a line that says why.

    Attributes:
      output: the folder that figures are written to.
      several: whether the page compares several runs.
    """

    def __init__(self, output: pathlib.Path, several: bool):
        self.output = output
        self.several = several
        self.parts: list[tuple[str, str, str]] = []  # anchor, title, HTML

    def section(self, anchor: str, title: str, make: Callable[[], str]) -> None:
        """Adds a section with the HTML that `make` returns."""
        try:
            self.parts.append((anchor, title, make()))
        except Exception as error:  # the rest of a broken run is still worth showing
            self.parts.append((anchor, title, f'<p class="soft" data-absent>Left out: {reason(error)}.</p>'))

    def per_run(self, runs: Sequence[RunRecord], make: Callable[[RunRecord, str], str]) -> str:
        """The HTML of `make(run, suffix for file names)` for every run; fails only if it fails for all."""
        parts = list[str]()
        reasons = list[str]()
        for index, run in enumerate(runs):
            head = f"<h3>{escape(run.name)}</h3>" if self.several else ""
            try:
                parts.append(head + make(run, f"_{index + 1}" if self.several else ""))
            except Exception as error:
                if len(runs) == 1:
                    raise
                reasons.append(reason(error))
                parts.append(f'{head}<p class="soft">Left out: {reasons[-1]}.</p>')
        if len(reasons) == len(runs) and len(set(reasons)) == 1:
            raise Missing(html.unescape(reasons[0]))
        return "".join(parts)

    def figure(self, name: str, drawn: Figure, caption: str) -> str:
        """The HTML of a figure, which is also written as a PNG."""
        figures.png(drawn, self.output / f"{name}.png")
        return f"<figure>{figures.svg(drawn, caption)}<figcaption>{escape(caption)}</figcaption></figure>"

    def html(self, title: str) -> str:
        """The whole page. Its content security policy allows only its own script and loads nothing."""
        template = pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        script = re.findall(r"<script>(.*?)</script>", template, re.DOTALL)[0]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
        sections = ""
        for anchor, name, body in self.parts:
            kind = ' class="absent"' if "data-absent" in body[:40] else ""
            sections += f'<section id="{anchor}"{kind}>\n<h2>{escape(name)}</h2>\n{body}\n</section>\n'
        links = " ".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in self.parts)
        values = {"policy": policy, "title": escape(title), "links": links, "sections": sections}
        return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def reason(error: Exception) -> str:
    """Why a part is left out, as HTML."""
    if isinstance(error, Missing):
        return escape(error)
    log.debug("left out of the report", exc_info=error)
    return escape(f"{type(error).__name__}: {error}")


def escape(value: object) -> str:
    """Text that is safe in HTML."""
    return html.escape(str(value))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, kind: str = "") -> str:
    """A table in a scrolling box. Cells are HTML; the first cell of a row is its header."""
    text = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = [
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    ]
    inside = f"<thead><tr>{text}</tr></thead><tbody>{''.join(lines)}</tbody>"
    box = f'<div class="box" role="region" tabindex="0" aria-label="{escape(caption)}">'
    return f'<p class="soft">{escape(caption)}</p>{box}<table class="{kind}">{inside}</table></div>'
