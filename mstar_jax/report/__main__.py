"""One HTML file that shows what one or several runs did, with the paper's Figures 2 to 5.

    python -m mstar_jax.report runs/tiny
    python -m mstar_jax.report runs/static runs/adaptive --names=static,adaptive --output=compare
    python -m mstar_jax.report runs/phi35 --judge_url=http://localhost:8000 --judge_model=Qwen3-8B

It holds its images and loads nothing, so it can be mailed; the figures are beside it as PNG files. It reads
what the runs wrote and needs no accelerator. What a run does not have is left out, with the reason.
"""

import argparse
import pathlib
import sys

from mstar_jax.report import document, relativity


def main() -> None:
    parser = argparse.ArgumentParser(
        "mstar_jax.report", description="Shows what one or several runs did, as one HTML file."
    )
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
        target = document.write([pathlib.Path(w) for w in args.workdirs], output, names, judge)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{target.absolute()} ({target.stat().st_size / 1e6:.1f} MB), its figures beside it as PNG files")


if __name__ == "__main__":
    main()
