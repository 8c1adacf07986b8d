"""Benchmarks: what a policy answers, how that scores, and what a published harness can score again.

<workdir>/rollouts/<policy>_<benchmark>/              every response; a restart continues after the last
<workdir>/scores/<policy>_<benchmark>/                the samples' step scores, where a reward model votes
<workdir>/benchmarks/images/                          images that came inside the official files
<workdir>/benchmarks/<policy>/<benchmark>.json        scores, by category too, and how they came about
<workdir>/benchmarks/<policy>/<benchmark>.jsonl       an item a line: prompt, gold, response, verdicts
<workdir>/benchmarks/<policy>/<policy>_<VLMEvalKit's name>.xlsx, .tsv
<workdir>/benchmarks/table.md                         the paper's table, with paired comparisons
<workdir>/benchmarks/visualprocessbench_<reward model>.json, .jsonl, .md     see process.py
"""

import csv
import importlib.util
import io
import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections

from mstar_jax import processes
from mstar_jax.data import prompts
from mstar_jax.evaluate import benchmarks, process, scoring
from mstar_jax.evaluate.items import Item
from mstar_jax.evaluate.summary import Result, Results, line, table
from mstar_jax.inference.generate import Asked, Groups, Inference, plan, sample
from mstar_jax.inference.score import Scorer, score
from mstar_jax.ranges import not_among
from mstar_jax.records import speeds
from mstar_jax.rewards import metrics, selection
from mstar_jax.store import write_text
from mstar_jax.structs import Model, Response, Stage
from mstar_jax.workdir import of_checkpoint, of_folder

log = logging.getLogger(__name__)

Items = Mapping[str, Sequence[Item]]  # by benchmark
Methods = Mapping[str, Sequence[Response | None]]  # by method, the response that every item is answered with
VLMEVALKIT = {  # the names of the data sets there; it has no M3CoT and MathV360K, and MMMU in another form
    "mathvista": "MathVista_MINI",
    "mmstar": "MMStar",
    "mmstar_r": "MMStar",
    "mmbench": "MMBench_DEV_EN_V11",
    "mmbench_r": "MMBench_DEV_EN_V11",
    "ai2d": "AI2D_TEST",
    "ai2d_no_mask": "AI2D_TEST_NO_MASK",
    "mathverse": "MathVerse_MINI",
    "mathvision": "MathVision",
    "wemath": "WeMath",
}


class Candidate(NamedTuple):
    """A policy that is asked.

    Attributes:
      name: in the files and in the table.
      params: its parameters, called only where a response is missing.
      identity: what tells these parameters from others of the same name.
    """

    name: str
    params: Callable[[], Model]
    identity: Mapping[str, object]


class Benchmarks(NamedTuple):
    """What is asked, and how.

    Attributes:
      items: the questions by benchmark.
      settings: `config.benchmarks`: names, root, limit, prompt, samples, temperature, paper.
      templates: `config.prompts`.
      folder: where scores and tables go.
      solutions: what a reward model is asked about, if VisualProcessBench is named.
    """

    items: Items
    settings: ml_collections.ConfigDict
    templates: Mapping[str, str]
    folder: pathlib.Path
    solutions: Sequence[process.Solution] = ()


def problems(config: ml_collections.ConfigDict) -> list[str]:
    """Unknown benchmarks and prompts: each key, its value and what it may be; a package that is missing."""
    b = config.benchmarks
    found = [
        text
        for name in b.names
        for text in not_among("benchmarks.names", name, (*benchmarks.NAMES, process.NAME))
    ]
    fuzzy = [name for name in b.names if name in ("mathvista", "mathv360k")]
    if fuzzy and importlib.util.find_spec("rapidfuzz") is None:  # asked for once everything is sampled
        found.append(f"benchmarks.names: {fuzzy[0]} needs rapidfuzz, pip install 'mstar_jax[benchmarks]'")
    return found + not_among("benchmarks.prompt", b.prompt, ("official", *config.prompts))


def read(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> Benchmarks:
    """Reads the benchmarks that `config.benchmarks` names; images inside their files go to the workdir.

    Raises:
      ValueError: an unknown benchmark, or its files are not there.
    """
    settings, folder = config.benchmarks, workdir / "benchmarks"
    items: dict[str, list[Item]] = {}
    solutions: list[process.Solution] = []
    for name in settings.names:
        own = pathlib.Path(settings.root) / name.removesuffix("_r")
        place = own if own.is_dir() else pathlib.Path(settings.root)
        found: list[Item] = []
        try:
            if name == process.NAME:
                solutions, report = process.read(place, folder / "images")
                solutions = solutions[: settings.limit or None]
            else:
                found, report = benchmarks.read(name, place, folder / "images")
        except OSError as error:
            raise ValueError(f"{name}: {error}") from error
        log.info("%s", report)
        if not report.kept:
            raise ValueError(f"{name}: no usable item in {place} (benchmarks.root)")
        if name == process.NAME:
            continue
        some = set(list(dict.fromkeys(item.base for item in found))[: settings.limit or None])
        items[name] = [item for item in found if item.base in some]
    return Benchmarks(items, settings, config.prompts, folder, solutions)


def evaluate(
    host: Inference, asked: Benchmarks, policy: Candidate, scorer: Scorer | None = None
) -> dict[str, Result]:
    """Asks a policy all the questions, writes what came of it, and returns the results by benchmark.

    Args:
      host: the policy's host side.
      asked: what is asked.
      policy: who is asked.
      scorer: a reward model that votes over the samples.
    """
    results = {}
    for name, items in asked.items.items():
        pairs = [Asked(item.query, _prompt(asked, item)) for item in items]
        found = _responses(host, asked, policy, scorer, f"{policy.name}_{name}", pairs)
        samples = asked.settings.samples
        aggregate = host.prm.aggregate if samples and scorer else None
        methods = _methods(items, found, samples > 0, aggregate)
        results[name] = _result(host, asked, policy.name, name, found, methods)
        if processes.first():
            _write(asked, policy.name, name, results[name].record, pairs, methods)
        log.info("%s, %s: %s", policy.name, name, line(results[name].record))
    if shown := speeds([{"speed": host.speeds.lap()}]):
        log.info("%s:\n%s", policy.name, shown)
    return results


def judge_steps(host: Inference, asked: Benchmarks, scorer: Scorer, name: str) -> dict:
    """Has a reward model score the steps of solutions; writes and returns how it tells right from wrong.

    Args:
      host: see `Inference`.
      asked: what is asked.
      scorer: the reward model.
      name: of it, in files and tables.
    """
    longest = max(host.data.buckets)
    how = asked.settings.prompt
    template = scorer.template or asked.templates.get(how, "{question}{choices}")
    settings: dict[str, object] = {"template": template, "reward": dict(scorer.identity)}
    texts = {s.query.id: "\n".join(s.steps) for s in asked.solutions}
    pairs = [Asked(s.query, prompts.render(template, s.query)) for s in asked.solutions]
    planned = plan(host, pairs, process.NAME, processor=scorer.processor, longest=longest)
    fitting = [
        pair
        for pair, prompt in zip(pairs, planned)
        if prompt and prompt.length + len(scorer.encode(texts[pair.query.id]).tokens) <= longest
    ]
    responses = {q.id: [Response(q.id, 0, texts[q.id], (), 0.0, False)] for q, _ in fitting}
    stem = f"{process.NAME}_{name}"
    found = score(host, scorer, stem, fitting, responses, settings=settings, longest=longest)
    scores = {key: group[0].step_scores for key, group in found.items()}
    record = {"reward_model": name, **process.measure(asked.solutions, scores), "template": template}
    if processes.first():
        asked.folder.mkdir(parents=True, exist_ok=True)
        lines = [
            {"id": s.query.id, "source": s.query.source, "labels": s.labels, "scores": scores.get(s.query.id)}
            for s in asked.solutions
        ]
        write_text(asked.folder / f"{stem}.jsonl", "".join(json.dumps(each) + "\n" for each in lines))
        write_text(asked.folder / f"{stem}.json", json.dumps(record, indent=1, ensure_ascii=False))
        write_text(asked.folder / f"{stem}.md", process.table(name, record) + "\n")
    log.info("%s", process.table(name, record))
    return record


def write_table(asked: Benchmarks, results: Results) -> None:
    """Writes the table of the policies that were asked so far."""
    if processes.first() and asked.items:
        write_text(asked.folder / "table.md", table(results, asked.settings.paper) + "\n")


def _prompt(asked: Benchmarks, item: Item) -> str:
    how = asked.settings.prompt
    return item.prompt if how == "official" else prompts.render(asked.templates[how], item.query)


def _responses(
    host: Inference,
    asked: Benchmarks,
    policy: Candidate,
    scorer: Scorer | None,
    name: str,
    pairs: Sequence[Asked],
) -> Groups:
    """Per query its greedy response, then its samples, scored where there is a reward model."""
    s, longest = asked.settings, max(host.data.buckets)
    settings: dict[str, object] = {**policy.identity, "prompt": s.prompt}
    if s.prompt != "official":
        settings |= {"template": asked.templates[s.prompt]}
    found = sample(
        host,
        name,
        policy.params,
        pairs,
        [0.0] + [s.temperature] * s.samples,
        settings=settings,
        longest=longest,
        kind="evaluation",
    )
    if scorer is None or not s.samples:
        return found
    settings |= {"reward": dict(scorer.identity)}
    return score(host, scorer, name, pairs, found, settings=settings, longest=longest)


def _methods(items: Sequence[Item], found: Groups, sampled: bool, aggregate: str | None) -> Methods:
    """By method, the response that every item is answered with; with `aggregate`, by rewards too."""
    groups = [found.get(item.query.id, []) for item in items]
    out: dict[str, list[Response | None]] = {"greedy": [group[0] if group else None for group in groups]}
    if sampled:
        out["majority"] = [_voted(item, group[1:], None) for item, group in zip(items, groups)]
    if aggregate:
        rewards = [[selection.reward(r, aggregate) for r in group[1:]] for group in groups]
        out["weighted_vote"] = [
            _voted(item, group[1:], each) for item, group, each in zip(items, groups, rewards)
        ]
        out["best_of_n"] = [
            next(iter(selection.top_k(group[1:], each, 1)), None) for group, each in zip(groups, rewards)
        ]
    return out


def _voted(item: Item, samples: Sequence[Response], weights: Sequence[float] | None) -> Response | None:
    """The first sample of the class of answers that won."""
    won = selection.vote(samples, weights or [1.0] * len(samples), selection.checker(item.query))
    return next((r for r in samples if won and r.answer == won.answer and not r.truncated), None)


def _result(
    host: Inference, asked: Benchmarks, policy: str, name: str, found: Groups, methods: Methods
) -> Result:
    s, items = asked.settings, asked.items[name]
    record: dict[str, Any] = {"policy": policy, "benchmark": name}
    for method, chosen in methods.items():
        record[method] = scoring.summarise(name, items, judged(name, items, chosen))
    if s.samples:
        groups = [found[item.query.id] for item in items if item.query.id in found]
        measured = metrics.dynamics(groups, s.samples, aggregate=host.prm.aggregate)
        record["samples"] = measured | {"k": s.samples}
    device = jax.devices()[0]
    record["left_out"] = sum(item.query.id not in found for item in items)
    record["settings"] = {
        "prompt": s.prompt,
        "max_new_tokens": host.sampling.max_new_tokens,
        "dtype": host.sampling.dtype,
        "top_k": host.sampling.top_k,
        "top_p": host.sampling.top_p,
        "min_p": host.sampling.min_p,
        "stop": list(host.sampling.stop_strings),
        "samples": s.samples,
        "temperature": s.temperature,
        "seed": host.seed,
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {device.device_kind}",
    }
    return Result(record, hits(judged(name, items, methods["greedy"])))


def _write(
    asked: Benchmarks,
    policy: str,
    name: str,
    record: Mapping[str, object],
    pairs: Sequence[Asked],
    methods: Methods,
) -> None:
    folder, items = asked.folder / policy, asked.items[name]
    folder.mkdir(parents=True, exist_ok=True)
    scores = {method: judged(name, items, chosen) for method, chosen in methods.items()}
    lines = []
    for at, (query, prompt) in enumerate(pairs):
        out: dict[str, object] = {
            "id": query.id,
            "prompt": prompt,
            "images": query.images,
            "gold": query.answer,
        }
        for method, chosen in methods.items():
            r, found = chosen[at], scores[method][at]
            out[method] = {
                "response": r.text if r else None,
                "answer": found.answer,
                "verdict": found.strict,
                "fallback": found.fallback,
                "official": found.official,
            }
        lines.append(json.dumps(out, ensure_ascii=False) + "\n")
    write_text(folder / f"{name}.jsonl", "".join(lines))
    if name in VLMEVALKIT and not (name.endswith("_r") and name[:-2] in asked.items):
        answered = [(item.record, r.text if r else "") for item, r in zip(items, methods["greedy"])]
        write_vlmevalkit(folder / f"{policy}_{VLMEVALKIT[name]}", answered)
    write_text(folder / f"{name}.json", json.dumps(record, indent=1, ensure_ascii=False))


def judged(name: str, items: Sequence[Item], chosen: Sequence[Response | None]) -> list[scoring.Score]:
    """The scores of one response for every item; an item without one is unparsed."""
    return [
        scoring.judge(name, item, r.text if r else "", r.truncated if r else False)
        for item, r in zip(items, chosen)
    ]


def hits(scores: Sequence[scoring.Score]) -> dict[str, bool]:
    """By question: is the strict verdict right, in all of its rotations."""
    out: dict[str, bool] = {}
    for each in scores:
        out[each.base] = out.get(each.base, True) and each.strict == "correct"
    return out


def write_vlmevalkit(stem: pathlib.Path, answered: Sequence[tuple[Mapping[str, str], str]]) -> None:
    """`stem`.tsv and, where openpyxl is installed, `stem`.xlsx in VLMEvalKit's layout: the columns of its
    data set without the images, and `prediction`."""
    names = [*dict.fromkeys(name for record, _ in answered for name in record), "prediction"]
    rows = [[*(record.get(name, "") for name in names[:-1]), text] for record, text in answered]
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows([names, *rows])
    write_text(stem.with_name(stem.name + ".tsv"), text.getvalue())
    try:
        import openpyxl
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError:
        log.warning("no %s.xlsx: openpyxl is missing (pip install 'mstar_jax[benchmarks]')", stem.name)
        return
    book = openpyxl.Workbook()
    sheet = book.active
    for at, row in enumerate([names, *rows], start=1):
        for column, value in enumerate(row, start=1):
            cell = sheet.cell(at, column)
            if names[column - 1] == "index" and value.isdigit():
                cell.value = int(value)
            else:  # as a string, even where it begins like a formula
                cell.value = ILLEGAL_CHARACTERS_RE.sub("", value)[:32767]
                cell.data_type = "s"
    part = stem.with_name(stem.name + ".part.xlsx")
    book.save(part)
    part.replace(stem.with_name(stem.name + ".xlsx"))


def identity(path: pathlib.Path, stage: Stage | None = None) -> dict[str, object]:
    """What tells a policy, or a reward model, from others in the same place: path, stage, contents."""
    found: dict[str, object] = {"policy": str(path.absolute()), "stage": stage.name if stage else ""}
    if stage is None:
        return found | {"files": of_checkpoint(path)}
    tokenizer = of_folder(path / "tokenizer")  # of a policy from scratch
    return found | {"files": of_folder(path / "checkpoints" / stage.name), "tokenizer": tokenizer}
