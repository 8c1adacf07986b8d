"""A run to watch while it goes: its report on a page of this machine, and its stages as lines.

    python -m mstar_jax.report runs/tiny --serve      # http://127.0.0.1:8717/, until Ctrl-C
    python -m mstar_jax.report runs/tiny --follow     # prints each stage as it ends, until the last one

Only files are read, so the run does not notice. The report is made anew when a stage has ended, and a page
that is open reloads itself then. The server answers this machine only and knows two addresses, the page and
its version; it has no folder to list.
"""

import base64
import hashlib
import http
import http.server
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from mstar_jax.report import hours
from mstar_jax.report.markup import escape
from mstar_jax.report.runs import Record, number, read_runs

EVERY = 2.0  # seconds between two looks at results.json
SCRIPT = """
setInterval(async () => {
  try {
    const answer = await fetch("version", {cache: "no-store"});
    if (answer.ok && (await answer.text()) !== "%s") location.reload();
  } catch (error) {}  // the server has ended: the page stays
}, 3000);
"""
WAITING = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src ">
<title>%s</title></head>
<body><h1>%s</h1><p>No stage has ended yet. The report comes with the first one.</p></body></html>
"""


def version(workdirs: Sequence[pathlib.Path]) -> str:
    """What changes when a stage of one of the runs ends."""
    found = []
    for path in (workdir / "results.json" for workdir in workdirs):
        known = path.stat() if path.exists() else None
        found.append(f"{known.st_mtime_ns}-{known.st_size}" if known else "none")
    return " ".join(found)


# ---- 1. the page --------------------------------------------------------------------------------------


def live(page: str, at: str) -> str:
    """The page with a script that reloads it once its version is no longer `at`. Its content security policy
    allows this script, and to ask this server, besides what it allowed."""
    script = SCRIPT % at
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = page.replace("script-src ", f"connect-src 'self'; script-src 'sha256-{digest}' ", 1)
    head, end, tail = page.rpartition("</body>")
    return f"{head}<script>{script}</script>{end}{tail}"


class Server(http.server.ThreadingHTTPServer):
    """Serves `page` and `at`, its version, to this machine.

    A page of another site may have its name resolve to this machine, so requests that name another host are
    refused.
    """

    daemon_threads = True

    def __init__(self, port: int):
        """Binds to a port of 127.0.0.1, any free one for 0.

        Raises:
          OSError: it is taken.
        """
        super().__init__(("127.0.0.1", port), _Handler)
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}
        self.page, self.at = "", ""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        found = {"/": (self.server.page, "html"), "/version": (self.server.at, "plain")}.get(self.path)
        if self.headers.get("Host") not in self.server.hosts:
            self.send_error(http.HTTPStatus.MISDIRECTED_REQUEST, "this server is for this machine only")
        elif found is None:
            self.send_error(http.HTTPStatus.NOT_FOUND, "there is only / and /version")
        else:
            body = found[0].encode("utf-8", "replace")
            self.send_response(http.HTTPStatus.OK)
            self.send_header("Content-Type", f"text/{found[1]}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("X-Frame-Options", "DENY")
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Requests are not worth a line."""


# ---- 2. the stages ------------------------------------------------------------------------------------


def ended(workdirs: Sequence[pathlib.Path], printed: set[str]) -> Iterator[str]:
    """A line for every record, and for every temperature that was chosen, that is not among those printed."""
    for run in read_runs([each for each in workdirs if (each / "results.json").exists()]):
        spent = 0.0
        for at, record in enumerate(run.results["stages"], start=1):
            spent += number(record, "seconds") or 0.0
            planned = hours.beside(run, at)
            for line in _lines(record):
                text = f"{run.name}: {line}" if len(workdirs) > 1 else line
                if text not in printed:
                    printed.add(text)
                    yield f"{text}; {spent / 3600:.2f} h so far{planned}"


def _lines(record: Record) -> Iterator[str]:
    stage, t = record.get("stage"), record.get("iteration")
    name = f"{stage} {t}" if stage == "iteration" else f"{stage}"
    shown = {"greedy": "greedy_accuracy", "pass@k": "pass_at_k", "reward-pass@2": "reward_pass_at_2"}
    parts = [
        f"{title} {100 * value:.1f}%"
        for title, key in shown.items()
        if (value := number(record, key)) is not None
    ]
    if (auc := number(record, "label_auc")) is not None:
        parts.append(f"AUC of step labels {auc:.3f}")
    if record.get("kept") is not None:
        parts.append(f"trained on {record['kept']} responses")
    yield f"{name}, {record.get('split')}: {', '.join(parts)}"
    if (chosen := number(record, "chosen")) is not None:
        yield f"{name}: temperature {chosen:g} from here on"


def complete(workdirs: Sequence[pathlib.Path]) -> bool:
    """Whether every run has the record with which it ends, that of its last iteration on the test split."""
    if not all((each / "results.json").exists() for each in workdirs):
        return False
    return all(
        any(
            (r.get("stage"), r.get("iteration"), r.get("split"))
            == ("iteration", run.config("evolve.iterations"), "test")
            for r in run.results["stages"]
        )
        for run in read_runs(workdirs)
    )


# ---- 3. both ------------------------------------------------------------------------------------------


def watch(
    workdirs: Sequence[pathlib.Path], make: Callable[[], pathlib.Path], port: int | None, follow: bool
) -> None:
    """Serves the report, prints the stages, or both: until Ctrl-C, or without a server until the runs end.

    Args:
      workdirs: of runs that may not have begun.
      make: writes the report and returns its file; called when a stage has ended.
      port: of the server, any free one for 0; None for no server.
      follow: whether stages are printed.

    Raises:
      OSError: the port is taken.
    """
    printed: set[str] = set()
    server = Server(port) if port is not None else None
    if server:
        title = escape(", ".join(workdir.absolute().name for workdir in workdirs))
        server.at = "waiting"
        server.page = live(WAITING % (title, title), server.at)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"http://127.0.0.1:{server.server_port}/  (this machine only; Ctrl-C ends it)", flush=True)
    seen = version(())
    while True:
        if (now := version(workdirs)) != seen:
            seen = now
            if follow:
                for line in ended(workdirs, printed):
                    print(line, flush=True)
            if server and all((workdir / "results.json").exists() for workdir in workdirs):
                server.at, server.page = now, live(make().read_text(encoding="utf-8"), now)
        if not server and complete(workdirs):
            return
        time.sleep(EVERY)
