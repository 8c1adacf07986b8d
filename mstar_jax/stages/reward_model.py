"""R(y) = H( 1(a = a*) R_p(y) ): the reward of a run, from its reward model to the responses that are kept."""

import dataclasses
import functools
import logging
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mstar_jax import models, sharding
from mstar_jax.data import loader, truth
from mstar_jax.inference import sampler
from mstar_jax.inference.generate import Groups
from mstar_jax.inference.score import Scorer
from mstar_jax.models import vlm
from mstar_jax.rewards import metrics, prm, selection
from mstar_jax.stages.run import Run
from mstar_jax.structs import Query, Response, Row, TrainState

log = logging.getLogger(__name__)


class Reward:
    """The answer checker, the process reward model, and how they select."""

    def __init__(self, run: Run):
        self.run, self.values = run, run.config.prm
        self.likelihood = run.config.evolve.select == "likelihood"  # control: the warm-up policy, untrained
        self.trained = bool(self.values.queries) and not self.values.path and not self.likelihood
        self.exists = self.trained or self.likelihood or bool(self.values.path)
        self.source = models.Pretrained(self.values.path) if self.values.path else None
        self.scorer = Scorer(run, self.source.processor() if self.source else None)
        path = run.workdir / "figures" / "truth.jsonl"
        embedded = path.exists() and not run.config.data.labelled
        self.truth: dict[str, truth.Truth] = truth.read_truth(path) if embedded else {}
        known = run.config.warmup.queries  # by heart: they come last
        order = [*run.labelled[known:], *run.labelled[:known]]
        held_out = min(self.values.held_out, len(order) // 4)
        self.held_out, self.queries = order[:held_out], order[held_out : held_out + self.values.queries]
        if self.trained and held_out + self.values.queries > len(run.labelled) - known:
            text = "prm: %d labelled queries are few: %d of them to train on, some of them the warm-up's"
            log.warning(text, len(order), len(self.queries))

    # --------------------------------------------------------------------------------- reward model
    def train(self) -> None:
        """Labels the steps of the warm-up policy's responses and trains the reward model on them."""
        run, v = self.run, self.values
        if not self.trained or run.beyond("prm"):
            return
        asked = [*self.queries, *self.held_out]
        policy = functools.partial(run.final, "warmup")
        responses = run.generate("prm", policy, asked, run.template, [v.temperature] * v.k)
        labelled = self.label([*self.queries[: v.labelled], *self.held_out], responses)
        rows = self._rows(self.queries, responses, labelled)
        start = TrainState(0, vlm.RewardModel(run.final("warmup").params), ())
        run.improve(
            "prm", 0, start, [(rows, 1.0)], v, processor=self.scorer.processor, temperature=v.temperature
        )
        if not run.results.find("prm", 0, "held-out"):
            record = self.report(responses, labelled)
            run.results.add(record)
            shown = {"labels": record["label_auc_within"]} | record.get("truth", {})
            text = ", ".join(f"{key} {value:.3f}" for key, value in shown.items() if value is not None)
            log.info("prm: AUC within held-out queries: %s", text)

    def label(self, queries: Sequence[Query], responses: Groups) -> dict[tuple[str, int], tuple[float, ...]]:
        """Monte-Carlo labels of the steps of every response, by query id and sample."""
        run, v, c = self.run, self.values, self.run.config
        rows = list[Row]()
        for prompt in run.plan(run.asked(queries), "prm"):
            found = prm.prefixes(responses[prompt.query.id], run.texts)
            rows += prm.stems(prompt, found, v.completions, v.samples, max(c.data.buckets))
        store = run.rollouts(
            "labels/prm",
            run.sampler(v.samples, v.rows),
            rows,
            lambda: run.final("warmup").params,
            jax.random.fold_in(run.key, zlib.crc32(b"labels")),
            [v.temperature] * v.samples,
            lambda rows, found: [self._labels(row, group) for row, group in zip(rows, found)],
            {"completions": v.completions, "samples": v.samples, "temperature": v.temperature},
            kind="labels",
        )
        values: dict[str, dict[prm.Prefix, float]] = {q.id: {} for q in queries}
        for query, reached in store.read(_read_labels):
            values[query].update(reached)
        return {
            (q.id, r.sample): prm.label(r, values[q.id], run.texts, hard=v.hard)
            for q in queries
            for r in responses.get(q.id, ())
        }

    def _labels(self, row: Row, group: Sequence[Response]) -> dict[str, Any]:
        """A record of the store of labels: how many completions of each prefix reached the gold answer."""
        query, of = row.prompt.query, self.values.completions
        records = []
        for at in range(0, len(row.starts), of):
            branch, kept, _ = row.starts[at]
            if kept:
                judged = [selection.judge(query, r) for r in group[at : at + of]]
                tokens = row.responses[branch - 1][:kept]
                reached = len(selection.correct(judged))
                text = self.run.processor.decode(tokens)
                records.append({"text": text, "reached": reached, "of": of, "tokens": tokens})
        return {"query": query.id, "question": query.question, "gold": query.answer, "steps": records}

    def _rows(self, queries: Sequence[Query], responses: Groups, labelled: dict) -> list[Row]:
        """Rows to train the reward model on: the distinct responses of each query, of those whose steps have
        no labels the correct ones."""
        rows, left_out = list[Row](), 0
        asked, processor, texts = self.run.asked(queries), self.scorer.processor, self.scorer.texts
        for prompt in self.run.plan(asked, "prm", processor):
            found = selection.distinct(responses.get(prompt.query.id, []))
            labels = [labelled[r.query_id, r.sample] for r in found if (r.query_id, r.sample) in labelled]
            encode = processor.encode_response
            try:
                if labels:
                    row = prm.row(prompt, found, encode, texts, labels)
                    least = prompt.length + max(map(len, row.responses))  # a long prompt makes a longer row
                    rows += loader.split_rows([row], max(self.values.longest, least))
                elif right := selection.correct(found):
                    rows.append(Row(prompt, tuple(tuple(encode(r.text)) for r in right)))
            except ValueError as error:
                left_out += 1
                log.warning("prm: left out: %s", error)
        if left_out:
            log.warning("prm: %d of %d queries left out", left_out, len(asked))
        return rows

    @functools.cached_property
    def model(self) -> Any:
        """The reward model, laid out for scoring."""
        run, dtype = self.run, jnp.dtype(self.run.config.sampling.dtype)
        if self.source:
            return self.source.load_reward(dtype, mesh=run.mesh, rules=sharding.SAMPLE)
        params = run.final("prm").params if self.trained else self.untrained()
        return sampler.for_sampling(params, run.mesh, dtype)

    def untrained(self) -> Any:
        """The warm-up policy as a reward model: its scores order responses by likelihood."""
        return vlm.RewardModel(self.run.final("warmup").params)

    # ---------------------------------------------------------------------------------------- scores
    def score(
        self, name: str, queries: Sequence[Query], responses: Groups, *, only_correct: bool = False
    ) -> Groups:
        """The responses with their step scores; see `Scorer.score`."""
        how, asked = {"path": self.values.path, "likelihood": self.likelihood}, self.run.asked(queries)
        return self.scorer.score(
            name, lambda: self.model, asked, responses, how=how, only_correct=only_correct
        )

    def scored(self, model: Any, queries: Sequence[Query], responses: Groups) -> Groups:
        """The responses with their step scores by another reward model, without a store."""
        return self.scorer.scored(model, self.run.asked(queries), responses)

    # ------------------------------------------------------------------------------------- selection
    def keep(self, name: str, queries: Sequence[Query], responses: Groups) -> list[list[Response]]:
        """H: the responses of every query that train the policy, of the correct ones (Table 2).

        Args:
          name: of the rollouts; a lot depends on it.
          queries: with the answers that count, gold or voted.
          responses: judged by these.
        """
        e, how = self.run.config.evolve, self.values.aggregate
        found = [selection.correct(responses.get(q.id, [])) for q in queries]
        if e.distinct:
            found = [selection.distinct(group) for group in found]
        if e.select == "random":
            return [self.by_lot(name, q, group, e.keep) for q, group in zip(queries, found)]
        if e.select in ("prm", "likelihood"):
            scored = self.score(name, queries, responses, only_correct=True)
            rewards = [self._rewards(group, scored, how) for group in found]
        elif e.select == "frequency":
            rewards = [selection.frequencies(group) for group in found]
        else:  # oracle: what the generator knows, a bound that no method can use
            rewards = [
                [float(truth.all_right(r.text, self.truth[r.query_id])) for r in group] for group in found
            ]
        if e.threshold is not None:
            found = [selection.above(group, values, e.threshold) for group, values in zip(found, rewards)]
            rewards = [[value for value in values if value > e.threshold] for values in rewards]
        return [selection.top_k(group, values, e.keep) for group, values in zip(found, rewards)]

    def rationales(
        self, name: str, queries: Sequence[Query], responses: Groups, k: int
    ) -> list[list[Response]]:
        """What the warm-up trains on: k different correct responses of every query, by lot."""
        found = [selection.distinct(selection.correct(responses.get(q.id, []))) for q in queries]
        return [self.by_lot(name, q, group, k) for q, group in zip(queries, found)]

    def by_lot(self, name: str, query: Query, found: Sequence[Response], k: int) -> list[Response]:
        """Random-K; the lot depends on the run's seed, the pass and the query alone."""
        lot = [self.run.config.seed, zlib.crc32(name.encode()), zlib.crc32(query.id.encode())]
        return selection.random_k(found, k, np.random.default_rng(lot))

    def _rewards(self, group: Sequence[Response], scored: Groups, how: str) -> list[float]:
        by_sample = {(r.query_id, r.sample): r for r in (s for g in group[:1] for s in scored[g.query_id])}
        return [selection.reward(by_sample[r.query_id, r.sample], how) for r in group]

    def pseudo_label(
        self, name: str, queries: Sequence[Query], responses: Groups
    ) -> tuple[list[Query], Groups, dict[str, float]]:
        """Gives unlabelled queries the answer that their responses vote for, weighted by the reward.

        Returns:
          The queries that got an answer, their responses judged by it, and pseudo_coverage (share of the
          queries) with, against the hidden answers, pseudo_precision.
        """
        u, hidden = self.run.config.evolve.unlabelled, self.run.data.hidden
        scored = (
            self.score(f"{name}_votes", queries, responses) if self.exists and not u.oracle else responses
        )
        answered, right = list[Query](), 0
        for query in queries:
            group, gold = scored.get(query.id, []), dataclasses.replace(query, answer=hidden[query.id])
            if u.oracle:
                answered.append(gold)
                continue
            weights = [selection.reward(r, self.values.aggregate) if self.exists else 1.0 for r in group]
            if (voted := selection.pseudo_label(query, group, weights, u.threshold)) is not None:
                answered.append(voted)
                right += selection.checker(query)(voted.answer or "", gold.answer or "")
        judged = {q.id: [selection.judge(q, r) for r in scored.get(q.id, [])] for q in answered}
        shares = {"pseudo_coverage": len(answered) / max(len(queries), 1)}
        shares["pseudo_precision"] = 1.0 if u.oracle else right / max(len(answered), 1)
        return answered, judged, shares

    # ---------------------------------------------------------------------------------------- report
    def report(self, responses: Groups, labelled: dict[tuple[str, int], tuple[float, ...]]) -> dict[str, Any]:
        """How good the reward model is on held-out queries: against their Monte-Carlo labels, as a verifier,
        and, on the embedded data, against what the generator knows, beside the untrained one."""
        asked = [q for q in self.held_out if q.id in responses]
        scored = self.score("prm_held_out", asked, {q.id: responses[q.id] for q in asked})
        groups = [(q, scored[q.id]) for q in asked]
        pairs = [
            (q.id, step, score, label)
            for q, group in groups
            for r in selection.distinct(group)
            if r.step_scores is not None
            for step, (score, label) in enumerate(zip(r.step_scores, labelled[q.id, r.sample]))
        ]
        flat = [score for *_, score, _ in pairs], [float(label >= 0.5) for *_, label in pairs]
        within: dict[tuple[str, int], tuple[list[float], list[float]]] = {}
        for query, step, score, label in pairs:
            values = within.setdefault((query, step), ([], []))
            values[0].append(score)
            values[1].append(float(label >= 0.5))
        found = metrics.calibration([p[2] for p in pairs], [p[3] for p in pairs]) if pairs else {}
        record = {"stage": "prm", "iteration": 0, "split": "held-out", "n": len(asked)}
        record |= {"responses": sum(len(g) for _, g in groups), "steps": len(pairs)}
        record |= {"label_auc": metrics.auc(*flat), "label_auc_within": metrics.within_auc(within.values())}
        record |= {"ece": found.get("ece"), "brier": found.get("brier"), "calibration": found.get("bins")}
        ns = [n for n in (1, 2, 4, 8, 16, 32) if n <= self.values.k]
        record["curve"] = metrics.curve(groups, ns, aggregate=self.values.aggregate) if groups else []
        if self.truth and asked:
            plain = self.scored(self.untrained_for_scoring(), asked, {q.id: responses[q.id] for q in asked})
            record["truth"] = self.against_truth(scored) | {
                f"{name}_likelihood": value for name, value in self.against_truth(plain).items()
            }
        return record | {"temperature": self.values.temperature, "kept": None} | self.run.lap()

    def untrained_for_scoring(self) -> Any:
        run = self.run
        return sampler.for_sampling(self.untrained(), run.mesh, jnp.dtype(run.config.sampling.dtype))

    def against_truth(self, scored: Groups) -> dict[str, float | None]:
        """AUCs of scores within queries, on distinct responses, against the generator's knowledge:

        step_auc: is this step, and all before it, right; pairs of the same query and step number.
        all_right_auc: of the correct responses, which have all steps right; pairs of the same query.
        """
        steps: dict[tuple[str, int], tuple[list[float], list[bool]]] = {}
        whole: dict[str, tuple[list[float], list[bool]]] = {}
        for key, group in scored.items():
            for r in selection.distinct(group):
                if r.step_scores is None:
                    continue
                known = self.truth[key]
                for step, (score, right) in enumerate(zip(r.step_scores, truth.check_steps(r.text, known))):
                    into = steps.setdefault((key, step), ([], []))
                    into[0].append(score)
                    into[1].append(right)
                if selection.correct([r]):
                    into = whole.setdefault(key, ([], []))
                    into[0].append(selection.reward(r, self.values.aggregate))
                    into[1].append(truth.all_right(r.text, known))
        return {
            "step_auc": metrics.within_auc(steps.values()),
            "all_right_auc": metrics.within_auc(whole.values()),
        }


def _read_labels(record: dict[str, Any]) -> tuple[str, list[tuple[prm.Prefix, float]]]:
    return record["query"], [(tuple(s["tokens"]), s["reached"] / s["of"]) for s in record["steps"]]
