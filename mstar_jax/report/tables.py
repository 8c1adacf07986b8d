"""The report's tables: what was run, how it ended, every evaluated stage."""

import json
from collections.abc import Callable, Sequence

from mstar_jax.report import runs
from mstar_jax.report.markup import escape, table
from mstar_jax.report.runs import Missing, Record, RunRecord
from mstar_jax.rewards import metrics

COLUMNS = {  # of the table of stages; a column that no record has is left out
    "greedy_accuracy": "greedy %",
    "pass_at_k": "Pass@K %",
    "gap": "gap, points",
    "reward_pass_at_2": "Reward-Pass@2 %",
    "sampled_accuracy": "sampled %",
    "balance_score": "balance %",
    "all_right": "all steps right %",
    "unfaithful": "unfaithful %",
    "groups_all_right": "all samples right %",
    "groups_all_wrong": "none right %",
    "sampler_ess": "sampler's ESS %",
    "unparsed": "unparsed %",
    "truncated": "cut %",
}
NUMBERS = {  # of the same table, what is no share
    "entropy": "entropy, nats",
    "kl": "KL, nats",
    "distinct_correct": "distinct correct",
    "length_right": "tokens, right",
    "length_wrong": "tokens, wrong",
    "sampler_greatest": "sampler off, nats",
}
SMALL = "Small: 95 % interval (Wilson)."
HIGHLIGHTS = (
    *("seed", "policy.path", "data.labelled", "data.validation", "data.test", "prm.aggregate"),
    *(f"evolve.{name}" for name in ("iterations", "fraction", "k", "keep", "temperature", "data", "start")),
    *(f"evolve.{name}" for name in ("steps", "batch", "learning_rate")),
    *("eval.samples", "eval.k", "eval.temperature"),
)


def percent(record: Record, key: str, interval: bool = False) -> str:
    """A cell with a share in percent, if wanted with its interval below."""
    value = runs.number(record, key)
    if value is None:
        return "–"
    text = f"{100 * value:.1f}"
    n = record.get("n")
    if interval and isinstance(n, int) and n > 0:
        low, high = metrics.wilson(min(max(value, 0.0), 1.0), n)
        text += f"<small>{100 * low:.0f}–{100 * high:.0f}</small>"
    return text


def overview(found: Sequence[RunRecord]) -> str:
    """What was run: results at a glance, state, device, versions, config."""
    flat = [_flat(run.results.get("config") or {}) for run in found]
    other = (k for k in dict.fromkeys(k for each in flat for k in each) if len({e.get(k) for e in flat}) > 1)
    rows = [(name, [tell(run) for run in found]) for name, tell in FACTS.items()]
    for key in dict.fromkeys(key for run in found for key in run.results):  # what else is recorded
        if key not in ("config", "seed", "versions", "device", "stages"):
            rows.append((key, [json.dumps(run.results.get(key))[:300] for run in found]))
    for key in dict.fromkeys([*HIGHLIGHTS, *other]):
        cells = [each.get(key, "–") for each in flat]
        if any(cell not in ("", "–") for cell in cells):
            rows.append((key + (" (differs)" if len(set(cells)) > 1 else ""), cells))
    if len(found) == 1:
        facts = (f"<div><dt>{escape(name)}</dt><dd>{escape(cell)}</dd></div>" for name, (cell,) in rows)
        text = f'{_tiles(found[0])}<dl class="facts">{"".join(facts)}</dl>'
    else:
        lines = [[escape(name), *map(escape, cells)] for name, cells in rows]
        text = table(["", *(run.name for run in found)], lines, "The configs' main values", "words")
    for run in found:
        head = {k: v for k, v in run.results.items() if k != "stages"}
        shown = escape(json.dumps(head, indent=1)[:40_000])
        about = f"config and versions of {escape(run.name)}"
        text += f"<details><summary>{about}</summary><pre>{shown}</pre></details>"
    return text


def _tiles(run: RunRecord) -> str:
    """The change from the warm-up, or else the first stage, to the last one."""
    split = "test" if len(run.records("test")) > 1 else "validation"
    records = [r for r in run.records(split) if runs.place(r) != -1]
    if len(records) < 2:
        return ""
    first = records[0]
    last = records[-1]
    names = {"greedy_accuracy": "greedy accuracy", "pass_at_k": f"Pass@{last.get('k', 'K')}", "gap": "gap"}
    names |= {"reward_pass_at_2": "Reward-Pass@2", "all_right": "all steps right, greedy"}
    text = ""
    for key, name in names.items():
        if runs.number(first, key) is not None and runs.number(last, key) is not None:
            unit = "points" if key == "gap" else "%"
            text += f"<div><b>{percent(first, key)} → {percent(last, key)} {unit}</b>{escape(name)}</div>"
    about = (
        f"{split.capitalize()} split, {first.get('n', '?')} queries: from {stage(first)} to {stage(last)}."
    )
    return f'<p class="soft">{escape(about)}</p><div class="tiles">{text}</div>' if text else ""


def stage(record: Record) -> str:
    """The name of a record's stage."""
    at = runs.place(record) or 0
    return f"iteration {at}" if at > 0 else runs.title(at)


def _flat(values: object, name: str = "") -> dict[str, str]:
    """Nested values by their dotted names."""
    if not isinstance(values, dict):
        return {name: str(values)}
    inner = (_flat(v, f"{name}.{k}" if name else k) for k, v in values.items())
    return {k: v for each in inner for k, v in each.items()}


def _state(run: RunRecord) -> str:
    planned = run.config("evolve.iterations")
    last = run.records("validation")[-1:]
    at = runs.place(last[0]) if last else None
    if at is None:
        return "no stage was evaluated yet"
    unfinished = isinstance(planned, int) and at < planned
    return f"up to {runs.title(at)} of {planned} iterations" + (": not finished" if unfinished else "")


def _device(run: RunRecord) -> str:
    device = run.results.get("device") or {}
    return f"{device.get('count', '?')} × {device.get('kind', 'unknown')} ({device.get('platform', '?')})"


def _versions(run: RunRecord) -> str:
    return ", ".join(f"{name} {version}" for name, version in (run.results.get("versions") or {}).items())


FACTS: dict[str, Callable[[RunRecord], str]] = {
    "state": _state,
    "device": _device,
    "versions": _versions,
    "workdir": lambda run: str(run.workdir),
}


def comparison(found: Sequence[RunRecord]) -> str:
    """The last records of the runs side by side."""
    if len(found) < 2:
        raise Missing("there is one run; give several workdirs to compare them")
    text = ""
    for split in ("validation", "test"):
        ends = [(run, run.records(split)) for run in found if run.records(split)]
        keys = [key for key in COLUMNS if any(key in records[-1] for _, records in ends)]
        rows = []
        for run, records in ends:
            first = next((r for r in records if runs.place(r) != -1), records[0])
            cells = [escape(run.name), escape(stage(records[-1])), escape(records[-1].get("n", "–"))]
            cells.append(percent(first, "greedy_accuracy"))
            rows.append(cells + [percent(records[-1], key, key == "greedy_accuracy") for key in keys])
        head = ["run", "last stage", "n", "greedy at the start %", *(COLUMNS[key] for key in keys)]
        note = f"The last records on the {split} split; the start is the warm-up. {SMALL}"
        text += table(head, rows, note)
    return text


def benchmarks(run: RunRecord) -> str:
    """The benchmark scores of the run's policies."""
    rows = []
    for path in sorted((run.workdir / "benchmarks").glob("*/*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        for method in ("greedy", "majority", "weighted_vote", "best_of_n"):
            if method not in record:
                continue
            found = record[method]
            official = {"official": found["official"]["accuracy"], "fallback": found["fallback"]["accuracy"]}
            shown = official | {"unparsed": found["strict"]["unparsed"], "cut": found["truncated"]}
            values = {"strict": found["accuracy"], "n": found["strict"]["count"], **shown}
            cells = [record["policy"], record["benchmark"], method.replace("_", " "), values["n"]]
            shares = [percent(values, key, key == "strict") for key in ("strict", *shown)]
            rows.append([*map(escape, cells), *shares])
    if not rows:
        raise Missing("no benchmark was asked; set benchmarks.names, or see mstar_jax.evaluate")
    head = ["policy", "benchmark", "method", "n", "strict %", "official %", "with fallback %"]
    note = f"Benchmarks. strict: the answer has to be marked; n: questions. {SMALL}"
    return table([*head, "unparsed %", "cut %"], rows, note)


def stages(run: RunRecord) -> str:
    """The dynamics of all evaluated stages."""
    records = [r for split in ("validation", "test") for r in run.records(split)]
    if not records:
        raise Missing("results.json has no record of a stage yet")
    keys = [key for key in COLUMNS if any(runs.number(r, key) is not None for r in records)]
    numbers = [key for key in NUMBERS if any(runs.number(r, key) is not None for r in records)]
    ends = {"kept": "kept", "temperature": "T", "chosen": "T next"}
    ends = {key: name for key, name in ends.items() if any(r.get(key) is not None for r in records)}
    rows = []
    for r in sorted(records, key=lambda r: runs.place(r) or 0):
        cells = [stage(r), r.get("split"), r.get("n", "–")]
        shares = [percent(r, key, key == "greedy_accuracy") for key in keys]
        values = [runs.number(r, key) for key in numbers]
        plain = ["–" if value is None else f"{value:.3g}" for value in values]
        last = ["–" if r.get(key) is None else r[key] for key in ends]
        rows.append([*map(escape, cells), *shares, *plain, *map(escape, last)])
    head = ["stage", "split", "n", *(COLUMNS[k] for k in keys), *(NUMBERS[k] for k in numbers)]
    head += ends.values()
    ks = ", ".join(sorted({str(r.get("k", "?")) for r in records}))
    note = (
        f"Every evaluated stage. n: queries; K = {ks}; cut: at the length cap; entropy: of its samples, per "
        "token; KL, sampler: of the responses that trained it, from the warm-up, and against the trainer; "
        f"kept: how many they were; T: temperature that they were sampled at. {SMALL}"
    )
    return table(head, rows, note)
