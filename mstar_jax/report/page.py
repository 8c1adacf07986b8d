"""The page: one HTML file that loads nothing, of sections that may each fail."""

import base64
import hashlib
import html
import logging
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from mstar_jax.report import figures
from mstar_jax.report.runs import Missing, Run

log = logging.getLogger(__name__)


class Page:
    """Sections in their order; one that cannot be made becomes a line that says why."""

    def __init__(self, output: pathlib.Path, several: bool):
        self.output, self.several = output, several
        self.parts: list[tuple[str, str, str]] = []  # anchor, title, HTML

    def section(self, anchor: str, title: str, make: Callable[[], str]) -> None:
        """Adds what `make` returns."""
        try:
            self.parts.append((anchor, title, make()))
        except Exception as error:  # of a broken run the rest is still worth showing
            self.parts.append((anchor, title, f'<p class="soft" data-absent>Left out: {reason(error)}.</p>'))

    def per_run(self, found: Sequence[Run], make: Callable[[Run, str], str]) -> str:
        """What `make(run, suffix of file names)` gives for every run; fails where it does for all."""
        parts, reasons = [], list[str]()
        for index, run in enumerate(found):
            head = f"<h3>{escape(run.name)}</h3>" if self.several else ""
            try:
                parts.append(head + make(run, f"_{index + 1}" if self.several else ""))
            except Exception as error:
                if len(found) == 1:
                    raise
                reasons.append(reason(error))
                parts.append(f'{head}<p class="soft">Left out: {reasons[-1]}.</p>')
        if len(reasons) == len(found) and len(set(reasons)) == 1:
            raise Missing(html.unescape(reasons[0]))
        return "".join(parts)

    def figure(self, name: str, drawn: Figure, caption: str) -> str:
        """A figure for the page, also written as a PNG."""
        figures.png(drawn, self.output / f"{name}.png")
        return f"<figure>{figures.svg(drawn, caption)}<figcaption>{escape(caption)}</figcaption></figure>"

    def html(self, title: str) -> str:
        """The whole page; nothing but its own script runs in it, and nothing is loaded."""
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
    """Why something is left out, as HTML."""
    if isinstance(error, Missing):
        return escape(error)
    log.debug("left out of the report", exc_info=error)
    return escape(f"{type(error).__name__}: {error}")


def escape(value: Any) -> str:
    """Text for a page."""
    return html.escape(str(value))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, kind: str = "") -> str:
    """A table in a box that scrolls; cells are HTML, and a row's first cell is its head."""
    text = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = [
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    ]
    inside = f"<thead><tr>{text}</tr></thead><tbody>{''.join(lines)}</tbody>"
    box = f'<div class="box" role="region" tabindex="0" aria-label="{escape(caption)}">'
    return f'<p class="soft">{escape(caption)}</p>{box}<table class="{kind}">{inside}</table></div>'
