"""The data of a run, from the values of a config: its queries, and responses of others to train on."""

import dataclasses
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
    own = {name: _own(config, name, workdir) for name in ("test", "validation") if c[f"{name}_file"]}
    for name, part in own.items():
        before, queries = len(queries), splits.apart(queries, part)
        text = "%s: %d queries; %d of data.labelled left out, which show the same images"
        log.info(text, c[f"{name}_file"], len(part), before - len(queries))
    if len(own) == 2:  # temperatures are chosen on validation
        own["validation"] = splits.apart(own["validation"], own["test"])
    shares = {"validation": 8, "test": 4}
    parts = mathv360k.split(
        queries,
        seed=c.seed,
        labelled=c.labelled_share,
        **{name: 0 if name in own else min(c[name], len(queries) // shares[name]) for name in shares},
    )
    parts |= own
    for name, part in parts.items():
        log.info("%s: %d queries", name, len(part))
    for name, share in (("validation", "eighth"), ("test", "quarter")):
        if name not in own and (taken := len(parts[name])) < c[name]:
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


def _own(config: ConfigDict, split: str, workdir: pathlib.Path) -> list[Query]:
    """The queries of `data.validation_file` or `data.test_file`, `data.<split>` of them at most. Their ids
    name the split, for another file may have the same ones."""
    c, path = config.data, config.data[f"{split}_file"]
    root, users = c.root or files.folder_of(path), custom.is_users(config.reward)
    found = read(path, root, workdir / IMAGES, named(c.columns), users)
    if len(found) > c[split]:  # a file may be sorted
        log.info("%s: %d of %d queries, drawn at random (data.%s)", path, c[split], len(found), split)
        found = splits.shuffled(found, c.seed, 0)[: c[split]]
    return [dataclasses.replace(query, id=f"{split}_{query.id}") for query in found]


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
        raise ValueError(f"data: {path}: cannot be read ({error})") from error
    (log.warning if report.dropped else log.info)("%s", report)
    if not queries:
        raise ValueError(f"{path}: no usable row; images are looked for under {root} (data.root)")
    return queries
