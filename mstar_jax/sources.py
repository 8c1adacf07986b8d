"""The data of a run, from the values of a config: its queries, and responses of others to train on."""

import logging
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from mstar_jax.configure import EMBEDDED, trains_base
from mstar_jax.data import embedded, files, given, mathv360k, splits
from mstar_jax.data.rows import NAMES, Columns, named
from mstar_jax.rewards import custom
from mstar_jax.structs import Query

log = logging.getLogger(__name__)
IMAGES = "images"  # in the workdir: those that were inside of data files


class Data(NamedTuple):
    """The queries of a run.

    Attributes:
      labelled, unlabelled, validation, test: the four splits; those of `unlabelled` have no answer.
      hidden: the true answers of the unlabelled queries, by query id, to measure with.
      base: the narrow set, where a base stage is trained.
      base_validation: the queries that its base stage is measured on.
      rationales: of `warmup.data`.
      steps: responses with labelled steps, of `prm.data`.
    """

    labelled: Sequence[Query]
    unlabelled: Sequence[Query]
    validation: Sequence[Query]
    test: Sequence[Query]
    hidden: dict[str, str | None]
    base: Sequence[embedded.BaseExample] = ()
    base_validation: Sequence[Query] = ()
    rationales: Sequence[given.Given] = ()
    steps: Sequence[given.Given] = ()


def load_data(config: ConfigDict, workdir: pathlib.Path) -> Data:
    """Reads the data set, or makes the embedded one, and reads the responses that exist.

    Raises:
      ValueError: a file has no usable row.
    """
    data = _queries(config, workdir)
    found: dict[str, list[given.Given]] = {}
    parts = ("rationales", "warmup.data", config.warmup), ("steps", "prm.data", config.prm)
    for name, key, section in parts:
        if section.data:
            found[name], report = given.read(
                section.data,
                section.root or files.folder_of(section.data),
                name,
                folder=workdir / IMAGES,
                columns=named(section.columns),
                labelled=data.labelled,
                kept_apart=[*data.validation, *data.test],
                long=custom.is_users(config.reward),
            )
            (log.warning if report.dropped else log.info)("%s: %s", key, report)
            if not found[name]:
                raise ValueError(f"{key} = {section.data}: no usable row")
    return data._replace(rationales=found.get("rationales", ()), steps=found.get("steps", ()))


def _queries(config: ConfigDict, workdir: pathlib.Path) -> Data:
    c = config.data
    base: Sequence[embedded.BaseExample] = ()
    base_validation: Sequence[Query] = ()
    narrow = trains_base(config)
    if not c.labelled or narrow:
        folder = EMBEDDED[c.embedded](workdir / "figures", seed=c.seed, **c.figures)
        validation = read(folder / "validation.json", folder)
        if narrow:
            base = embedded.read_base(folder)
            base_validation = validation[: config.base.check_queries]
    if not c.labelled:
        answered = read(folder / "unlabelled.json", folder)
        return Data(
            labelled=read(folder / "train.json", folder),
            unlabelled=[splits.unlabelled(q) for q in answered],
            validation=validation[: c.validation],
            test=read(folder / "test.json", folder),
            hidden={q.id: q.answer for q in answered},
            base=base,
            base_validation=base_validation,
        )
    path, root = c.labelled, c.root or files.folder_of(c.labelled)
    queries = read(path, root, workdir / IMAGES, named(c.columns), custom.is_users(config.reward))
    parts = mathv360k.split(
        queries,
        seed=c.seed,
        validation=min(c.validation, len(queries) // 8),
        test=min(c.test, len(queries) // 4),
    )
    for name, part in parts.items():
        log.info("%s: %d queries", name, len(part))
    for name, share in (("validation", "eighth"), ("test", "quarter")):
        if (taken := len(parts[name])) < c[name]:
            text = "data.%s: %d queries instead of %d, for it is at most one %s of the %d usable rows"
            log.warning(text, name, taken, c[name], share, len(queries))
    if few := [name for name in ("labelled", "validation", "test") if not parts[name]]:
        raise ValueError(f"{path}: {len(queries)} usable rows are too few: none is left for {', '.join(few)}")
    answers = {q.id: q.answer for q in queries}
    return Data(
        labelled=parts["labelled"],
        unlabelled=parts["unlabelled"],
        validation=parts["validation"],
        test=parts["test"],
        hidden={q.id: answers[q.id] for q in parts["unlabelled"]},
        base=base,
        base_validation=base_validation,
    )


def read(
    path: str | os.PathLike,
    root: str | os.PathLike,
    folder: str | os.PathLike = "",
    columns: Columns = NAMES,
    long: bool = False,
) -> list[Query]:
    """The usable rows of a data set, if told also `long` answers; dropped rows are counted and logged. See
    `mathv360k.read`.

    Raises:
      ValueError: none is usable.
    """
    try:
        queries, report = mathv360k.read(path, root, folder=folder, columns=columns, long=long)
    except OSError as error:
        raise ValueError(f"data.labelled = {path}: cannot be read ({error})") from error
    (log.warning if report.dropped else log.info)("%s", report)
    if not queries:
        raise ValueError(f"{path}: no usable row; images are looked for under {root} (data.root)")
    return queries
