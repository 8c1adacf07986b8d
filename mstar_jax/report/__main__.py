"""One HTML file that shows what one or several runs did, with the paper's Figures 2 to 5.

    python -m mstar_jax.report runs/tiny
    python -m mstar_jax.report runs/static runs/adaptive --names=static,adaptive --output=compare
    python -m mstar_jax.report runs/tiny --serve --follow        # while the run goes
    python -m mstar_jax.report runs/phi35 --judge_url=http://localhost:8000 --judge_model=Qwen3-8B

The file embeds its images and loads nothing, so it can be mailed; the figures are also written as PNG files.
--output is the folder to write to; the default is report/ in the first workdir. The report is made from the
files of the runs and needs no accelerator. What a run does not have is left out, with the reason. --serve
shows it in a browser of this machine and makes it anew when a stage has ended; --follow prints the stages.
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Sequence

from absl import app, flags

from mstar_jax import cli
from mstar_jax.report import live, page, relativity

NAMES = flags.DEFINE_list("names", [], "Names of the runs; default the names of their folders.")
JUDGE_URL = flags.DEFINE_string("judge_url", None, "An OpenAI-compatible endpoint, for Figure 2c.")
JUDGE_MODEL = flags.DEFINE_string("judge_model", None, "Name of the judge model there.")
JUDGE_CALLS = flags.DEFINE_integer("judge_calls", 200, "Maximum number of responses to judge.")
SERVE = flags.DEFINE_bool("serve", False, "Show the report in a browser of this machine while the run goes.")
PORT = flags.DEFINE_integer("port", 8717, "Of --serve; 0 for any free one.", lower_bound=0, upper_bound=65535)
FOLLOW = flags.DEFINE_bool("follow", False, "Print the stages as they end.")


def main(argv: Sequence[str]) -> None:
    cli.show_log()
    with cli.explained():
        judge = _judge()
        names = [name.strip() for name in NAMES.value]
        output = pathlib.Path(cli.OUTPUT.value) if cli.OUTPUT.value else None
        workdirs = [pathlib.Path(workdir) for workdir in argv[1:]]
        if SERVE.value or FOLLOW.value:
            _watch(workdirs, functools.partial(page.write, workdirs, output, names, judge))
            return
        try:
            target = page.write(workdirs, output, names, judge)
        except OSError as error:
            raise ValueError(f"the report cannot be written: {error}") from error
    size = target.stat().st_size / 1e6
    print(f"{target.absolute()} ({size:.1f} MB); its figures are next to it as PNG files")


def _watch(workdirs: Sequence[pathlib.Path], make: Callable[[], pathlib.Path]) -> None:
    """Checks what can be checked before a run has begun, and watches until Ctrl-C."""
    if not workdirs:
        raise ValueError("--serve and --follow need at least one workdir")
    with contextlib.suppress(KeyboardInterrupt):
        live.watch(workdirs, make, PORT.value if SERVE.value else None, FOLLOW.value)


def _judge() -> relativity.Judge | None:
    if not JUDGE_URL.value and not JUDGE_MODEL.value:
        return None
    if not JUDGE_URL.value or not JUDGE_MODEL.value:
        raise ValueError("--judge_url and --judge_model must be given together")
    judge = relativity.Judge(JUDGE_URL.value, JUDGE_MODEL.value, JUDGE_CALLS.value)
    judge.endpoint()  # fails on a bad URL before anything is drawn
    return judge


if __name__ == "__main__":
    flags.FLAGS.set_gnu_getopt(True)  # flags may follow the workdirs
    app.run(main)
