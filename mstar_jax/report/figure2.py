"""The reward model: as a verifier and as a re-ranker of correct responses (Figure 2), and its own metrics."""

import itertools
from collections.abc import Callable, Sequence

from mstar_jax.data import truth
from mstar_jax.report import relativity, runs
from mstar_jax.report.figures import INTERVAL, Line, bars, calibration, lines
from mstar_jax.report.markup import Page, escape, reason, table
from mstar_jax.report.runs import Missing, Record, RunRecord
from mstar_jax.rewards import steps
from mstar_jax.structs import Response

NS = (1, 2, 4, 8, 16)  # rollouts of Figure 2a


def figure2(page: Page, run: RunRecord, suffix: str, judge: relativity.Judge | None) -> str:
    """The reward model as a verifier, and as a re-ranker of correct responses."""
    found = runs.scored(run)
    where = f"{found.folder.name}, T = {found.temperature:g}"
    curve = runs.rollouts_curve(found.groups, NS, run.aggregate)
    parts: list[Callable[[], str]] = [
        lambda: _accuracy(page, f"figure2a{suffix}", curve, len(found.groups), where)
    ]
    pairs = runs.top_and_rest(found.groups, run.aggregate)
    about = f"{where}; n = {len(pairs)} queries with more than two correct responses, each counting once"
    if pairs:
        parts += [
            lambda: _step_counts(page, suffix, pairs, about),
            lambda: _faithfulness(page, suffix, run, pairs, about),
            lambda: _relativity(page, suffix, found, pairs, judge, about),
        ]
    text = ""
    reasons = [] if pairs else ["no query has more than two correct responses to choose from"]
    for part in parts:
        try:
            text += part()
        except Exception as error:  # see Page.section
            reasons.append(reason(error))
    notes = "".join(f'<p class="soft">Left out: {why}.</p>' for why in reasons)
    return f'<div class="figures">{text}</div>{notes}'


def _accuracy(page: Page, name: str, curve: runs.Curve, n: int, about: str) -> str:
    names = {"greedy": "greedy", "best_of_n": "best of N by the PRM", "majority": "majority vote"}
    names["weighted_vote"] = "PRM-weighted vote"
    drawn = []
    for i, (key, label) in enumerate(names.items()):
        if accuracy := curve.accuracy[key]:
            x = [x * 1.03 ** (i - 2) for x in curve.n]  # shifted a little, so that the bars can be told apart
            flat = key == "greedy"
            drawn.append(Line(label, x, accuracy, 0 if flat else n, i, "--" if flat else "-"))
    if not drawn:
        raise Missing("the scored responses have no samples")
    ticks = {float(x): str(x) for x in curve.n}
    axis = "rollouts per query (log scale)"
    picture = lines(drawn, axis, "accuracy (% of queries)", ticks=ticks, logarithmic=True)
    note = f"Figure 2a of the paper: accuracy against the number of rollouts. {about}, n = {n} queries. "
    return page.figure(name, picture, note + INTERVAL)


def _step_counts(page: Page, suffix: str, pairs: Sequence[runs.Pair], about: str) -> str:
    def count(response: Response) -> int:
        return len(steps.split(response.text))

    every = [count(r) for pair in pairs for side in pair for r in side]
    first = min(every)
    last = min(max(every), first + 14)  # the last bar also counts what is longer
    names = [str(i) for i in range(first, last)] + [f"{last}+" if max(every) > last else str(last)]
    means = runs.compare(pairs, count)
    shares = _histogram(pairs, lambda r: min(count(r), last), range(first, last + 1), means)
    picture = bars(names, shares, "steps of a response", "correct responses (%)")
    note = (
        "Figure 2b of the paper: number of steps of the Top-2 by the PRM among correct responses against the "
        f"rest. {about}. Difference of the means {_signed(means.difference)}. Bars: standard errors."
    )
    return page.figure(f"figure2b{suffix}", picture, note)


def _histogram(
    pairs: Sequence[runs.Pair], measure: Callable[[Response], int], values: range, means: runs.Contrast
) -> dict[str, list[runs.Mean]]:
    """The share of responses with each value of a measure, for the Top-2 and for the rest."""

    def share(value: int) -> runs.Contrast:
        return runs.compare(pairs, lambda response: measure(response) == value)

    shares = [share(value) for value in values]
    return {
        f"Top-2, mean {means.top.value:.2f}": [each.top for each in shares],
        f"the rest, mean {means.rest.value:.2f}": [each.rest for each in shares],
    }


def _signed(difference: runs.Mean, scale: float = 1.0) -> str:
    value = scale * difference.value
    return f"{value:+.2f} ± {scale * difference.error:.2f} (standard error, paired by query)"


def _faithfulness(page: Page, suffix: str, run: RunRecord, pairs: Sequence[runs.Pair], about: str) -> str:
    known = runs.truths(run)
    pairs = [pair for pair in pairs if pair[0][0].query_id in known]

    def right(response: Response) -> float:
        found = truth.check_steps(response.text, known[response.query_id])
        return sum(found) / max(len(found), 1)

    def whole(response: Response) -> bool:
        return truth.all_right(response.text, known[response.query_id])

    shares = {"right steps": runs.compare(pairs, right), "all steps right": runs.compare(pairs, whole)}
    series = {
        "Top-2": [each.top for each in shares.values()],
        "the rest": [each.rest for each in shares.values()],
    }
    picture = bars(list(shares), series, "", "share of correct responses (%)")
    differences = "; ".join(f"{name} {_signed(each.difference, 100)}" for name, each in shares.items())
    note = (
        "In place of Figure 2c of the paper, as this data set knows every right step: faithfulness of the "
        f"Top-2 by the PRM among correct responses against the rest. {about}. Differences in points: "
        f"{differences}. Bars: standard errors."
    )
    return page.figure(f"figure2c_faithfulness{suffix}", picture, note)


def _relativity(
    page: Page,
    suffix: str,
    found: runs.Scored,
    pairs: Sequence[runs.Pair],
    judge: relativity.Judge | None,
    about: str,
) -> str:
    if judge is None:
        raise Missing("the relativity score (Figure 2c) needs --judge_url and --judge_model")
    # at most four responses of a query, so that the calls reach many queries
    asked = [[*top, *rest[:2]] for top, rest in pairs][: max(judge.calls // 4, 1)]
    responses = list(itertools.chain(*asked))[: judge.calls]
    questions = found.questions()
    ratings = relativity.rate(judge, [(questions.get(r.query_id, ""), r.text) for r in responses])
    score = {id(r): s for r, s in zip(responses, ratings.scores) if s is not None}
    rated = [([r for r in top if id(r) in score], [r for r in rest if id(r) in score]) for top, rest in pairs]
    rated = [pair for pair in rated if all(pair)]
    counts = f"{ratings.unparsable} unreadable replies, {ratings.failed} without a reply of {len(responses)}"
    if not rated:
        raise Missing(f"relativity score (Figure 2c): {counts}. {ratings.error}".rstrip(". "))
    means = runs.compare(rated, lambda r: score[id(r)])
    values = range(relativity.LOWEST, relativity.HIGHEST + 1)
    series = _histogram(rated, lambda r: score[id(r)], values, means)
    axis = "relativity score (5: every step serves the question)"
    picture = bars([str(v) for v in values], series, axis, "correct responses (%)")
    note = (
        f"Figure 2c of the paper: relativity score, by {judge.model}, which reads text only, of the Top-2 by "
        f"the PRM among correct responses against the rest. {about}, {len(rated)} of them rated; {counts}. "
        f"Difference of the means {_signed(means.difference)}."
    )
    return page.figure(f"figure2c{suffix}", picture, note)


def reward_model(page: Page, run: RunRecord, suffix: str) -> str:
    """The metrics of the reward model on held-out queries."""
    record = run.record("prm")
    known: Record = record.get("truth") or {}
    rows = []
    for values, key, name in (
        (record, "label_auc", "label AUC, all steps"),
        (record, "label_auc_within", "label AUC within a query"),
        (known, "step_auc", "AUC within a query: is the step right"),
        (known, "all_right_auc", "AUC within a query: are all steps right, of correct responses"),
        (record, "ece", "expected calibration error"),
        (record, "brier", "Brier score"),
    ):
        value = runs.number(values, key)
        other = runs.number(values, f"{key}_likelihood")
        if value is not None:
            rows.append([escape(name), f"{value:.3f}", "–" if other is None else f"{other:.3f}"])
    names = {"n": "queries", "responses": "responses", "steps": "steps"}
    counts = [f"{record[key]} {name}" for key, name in names.items() if key in record]
    note = f"The process reward model on held-out queries ({', '.join(counts)}); an AUC of 0.5 is chance"
    text = table(["measure", "PRM", "likelihood"], rows, note, "words") if rows else ""
    bins = [
        (b["score"], b["label"], b["count"])
        for b in record.get("calibration") or ()
        if all(runs.number(b, key) is not None for key in ("score", "label", "count")) and b["count"] > 0
    ]
    figures = ""
    if bins:
        count = sum(count for *_, count in bins)
        note = f"Calibration of the PRM on {count} held-out steps. Bars are 95 % intervals."
        figures += page.figure(f"prm_calibration{suffix}", calibration(bins), note)
    rows_of_n = [row for row in record.get("curve") or () if isinstance(row, dict)]
    n = record.get("n")
    if rows_of_n and isinstance(n, int):
        keys = ("greedy", "best_of_n", "majority", "weighted_vote")
        accuracy = {key: [row[key] for row in rows_of_n] if key in rows_of_n[0] else [] for key in keys}
        curve = runs.Curve([row["n"] for row in rows_of_n], accuracy)
        figures += _accuracy(page, f"prm_rollouts{suffix}", curve, n, "Held-out queries of the PRM")
    if not text and not figures:
        raise Missing("the record of the reward model holds no numbers")
    return f'{text}<div class="figures">{figures}</div>'
