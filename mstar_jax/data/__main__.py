"""What is understood of a data file: ten rows, the others by cause, and how long prompts are.

    python -m mstar_jax.data /data/geometry3k --columns=answer=label
    python -m mstar_jax.data "/data/mathv360k/train-*.parquet" --config=configs/phi35.py --page=look.html \
        --config.policy.path=/checkpoints/Phi-3.5-vision-instruct
    python -m mstar_jax.data /data/rationales.jsonl --image_root=/data/images --what=rationales

Nothing is trained. Images inside of the file are decoded as a run would decode them, into a temporary folder;
with --workdir they go where a run in that folder looks for them. With --config the prompts are measured in
tokens of its policy, and its `data.root` and `data.columns` count. docs/data.md says what may be in a file.
"""

import collections
import math
import os
import pathlib
import statistics
import tempfile
from collections.abc import Sequence

import ml_collections
from absl import app, flags

from mstar_jax import cli, configure, sources
from mstar_jax.data import files, given, loader, mathv360k, pictures, prompts
from mstar_jax.data.given import Given
from mstar_jax.data.mathv360k import Report
from mstar_jax.data.rows import named
from mstar_jax.inference.generate import ask
from mstar_jax.report import gallery, markup
from mstar_jax.rewards import selection
from mstar_jax.store import write_text
from mstar_jax.structs import Prompt, Query, Response

WHAT = flags.DEFINE_enum(
    "what",
    "answers",
    ["answers", "questions", "rationales", "steps"],
    "What the rows hold besides questions.",
)
IMAGE_ROOT = flags.DEFINE_string("image_root", None, "Folder of image paths; default that of the file.")
COLUMNS = flags.DEFINE_string("columns", "", "Unusual names of columns, such as question=ask,answer=label.")
PAGE = flags.DEFINE_string("page", None, "An HTML file to write, with the images.")
SHOWN = flags.DEFINE_integer("shown", 10, "How many rows are shown.")
LONGEST = 600  # characters of a text that is shown

Facts = list[tuple[str, str]]  # (name, text)


def main(argv: Sequence[str]) -> None:
    cli.show_log()
    with cli.explained():
        if len(argv) != 2:
            raise ValueError(f"name one file, folder or pattern, in quotes; got {argv[1:]}")
        config: ml_collections.ConfigDict | None = cli.CONFIG.value
        workdir = pathlib.Path(cli.WORKDIR.value) if cli.WORKDIR.value else None
        with tempfile.TemporaryDirectory(prefix="mstar_jax-") as scratch:
            found, report = read(argv[1], config, str(workdir or scratch))
            planned = lengths([row.query for row in found], config, workdir) if config else None
            some = found[: SHOWN.value]  # to judge all responses would take long
            shown = [(row, facts(row, prompt)) for row, prompt in zip(some, planned or [None] * len(some))]
            for _, each in shown:
                print("\n".join(f"{name:9} {text}" for name, text in each), end="\n\n")
            about = summary(found, report, planned, config)
            print("\n".join(f"{name}: {text}" for name, text in about))
            if PAGE.value:
                write_text(pathlib.Path(PAGE.value), page(argv[1], shown, about))
                print(f"{pathlib.Path(PAGE.value).absolute()} shows the same with images")


def read(path: str, config: ml_collections.ConfigDict | None, folder: str) -> tuple[list[Given], Report]:
    """The rows of a file as a run would read them, and what became of the others.

    Raises:
      ValueError: the file cannot be read.
    """
    columns = named(COLUMNS.value or (config.data.columns if config else ""))
    images = pathlib.Path(folder) / sources.IMAGES
    root = IMAGE_ROOT.value or (config.data.root if config else "") or files.folder_of(path)
    if WHAT.value in ("rationales", "steps"):
        return given.read(path, root, WHAT.value, folder=images, columns=columns)
    unlabelled = WHAT.value == "questions"
    queries, report = mathv360k.read(path, root, folder=images, columns=columns, unlabelled=unlabelled)
    return [Given(query, "") for query in queries], report


def lengths(
    queries: Sequence[Query], config: ml_collections.ConfigDict, workdir: pathlib.Path | None
) -> list[Prompt | None]:
    """The prompts of a config's policy, measured; None for one that leaves no room for a response.

    Raises:
      ValueError: the policy is one from scratch, and `workdir` has no tokenizer of it.
    """
    if not config.policy.path and workdir is None:
        raise ValueError(
            "the policy is one from scratch: name a --workdir of its run, which has its tokenizer"
        )
    processor = configure.make_policy(config, workdir or pathlib.Path()).processor()
    return loader.plan_prompts(ask(queries, config.prompts.cot), processor, max_length=1 << 30)


def facts(row: Given, prompt: Prompt | None) -> Facts:
    """What is understood of a row."""
    query = row.query
    sizes = [(os.path.basename(path), *pictures.size(path)) for path in query.images]
    found = [
        ("id", f"{query.id}{f', from {query.source}' if query.source else ''}"),
        ("images", ", ".join(f"{name} ({width} x {height})" for name, width, height in sizes) or "none"),
        ("question", query.question),
        ("options", prompts.listed(query.options).partition(":\n")[2] or "none"),
        ("gold", "none" if query.answer is None else f"{query.answer} ({query.answer_type})"),
    ]
    if row.response:
        judged = selection.judge(query, Response(query.id, 0, row.response, (), 0.0, False))
        verdict = f" ({judged.verdict}: {judged.answer})" if judged.verdict else ""
        found.append(("response", f"{row.response[:LONGEST]}{verdict}"))
    found += [("labels", ", ".join(f"{label:g}" for label in row.labels))] if row.labels else []
    found += [("prompt", f"{prompt.length} tokens, {prompt.crops} crops")] if prompt else []
    return [(name, f"\n{'':10}".join(text[: 2 * LONGEST].split("\n"))) for name, text in found]


def summary(
    found: Sequence[Given],
    report: Report,
    planned: Sequence[Prompt | None] | None,
    config: ml_collections.ConfigDict | None,
) -> Facts:
    """What is understood of all rows."""
    queries = list({row.query.id: row.query for row in found}.values())
    images = [image for query in queries for image in query.images]
    about = [
        ("rows", str(report)),
        ("questions", f"{len(queries)}, about {len(set(images))} images"),
        ("answers", counted([query.answer_type for query in queries])),
        ("sources", counted([query.source or "unknown" for query in queries])),
    ]
    if planned is not None and config is not None and planned:
        known = sorted(prompt.length for prompt in planned if prompt is not None)
        most = config.data.max_prompt
        over = len(planned) - sum(length <= most for length in known)
        text = "no room for a response in any"
        if known:
            middle, long = statistics.median(known), known[math.ceil(0.95 * len(known)) - 1]
            text = f"{known[0]} to {known[-1]} tokens, median {middle:g}, 95 % up to {long}"
        about.append(("prompts", f"{text}; {over} of {len(planned)} over data.max_prompt = {most}"))
    return about


def counted(names: Sequence[str]) -> str:
    """How often each name occurs, the most frequent ones first."""
    return (
        ", ".join(f"{name} {count}" for name, count in collections.Counter(names).most_common(12)) or "none"
    )


def page(title: str, shown: Sequence[tuple[Given, Facts]], about: Facts) -> str:
    """The HTML page, which loads nothing."""
    made = markup.Page(pathlib.Path(), several=False)

    def lines(text: str) -> str:
        return markup.escape(text).replace("\n", "<br>")

    def rows() -> str:
        cells = []
        for row, each in shown:
            pictures = [gallery.thumbnail(pathlib.Path(path)) for path in row.query.images]
            texts = dict(each)
            drawn = "".join(f'<img src="{uri}" alt="image {n}">' for n, uri in enumerate(pictures, 1))
            rest = [lines(texts.get(name, "")) for name in names]
            cells.append([lines(texts["id"]), drawn, *rest])
        return markup.table(["id", "images", *names], cells, f"The first {len(shown)} rows", "words")

    names = list(dict.fromkeys(name for _, each in shown for name, _ in each if name not in ("id", "images")))
    made.section("rows", "Rows", rows)
    told = [[markup.escape(name), lines(text)] for name, text in about]
    made.section("file", "File", lambda: markup.table(["", ""], told, "All rows", "words"))
    return made.html(f"Data: {title}")


if __name__ == "__main__":
    flags.FLAGS.set_gnu_getopt(True)  # flags may follow the file
    app.run(main)
