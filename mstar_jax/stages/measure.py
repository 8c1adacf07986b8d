"""The dynamics of a run (greedy accuracy, Pass@K, gap, Reward-Pass@2), and the temperature that follows."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mstar_jax.data import truth
from mstar_jax.evaluate.evaluation import Evaluation, Policy, Voter
from mstar_jax.inference.generate import Groups
from mstar_jax.records import write_samples
from mstar_jax.rewards import metrics, selection
from mstar_jax.stages import explore
from mstar_jax.stages.reward_model import Reward
from mstar_jax.stages.run import Run
from mstar_jax.structs import Query, Response, TrainState

log = logging.getLogger(__name__)


class Dynamics:
    """Measures the policy after every stage, and chooses the sampling temperature (Figures 3 to 5)."""

    def __init__(self, run: Run, reward: Reward):
        self.run, self.reward = run, reward
        self.evaluation = Evaluation(run.workdir, run.config.benchmarks)

    def benchmark(self, stage: str, policy: Callable[[], TrainState]) -> None:
        """Asks a stage's policy the configured benchmarks; the reward model votes over samples."""
        run, reward, voter = self.run, self.reward, None
        if run.config.benchmarks.samples and reward.exists:
            voter = Voter(reward.scorer, lambda: reward.model, {"path": reward.values.path})
        asked = Policy(stage, run, lambda: policy().params, {"policy": stage})
        self.evaluation.evaluate(asked, voter)

    def temperature(self, iteration: int) -> float:
        """What an iteration samples at: the last one that was chosen before it, else the config's."""
        records = [r for r in self.run.results.data["stages"] if r["iteration"] < iteration]
        chosen = [r["chosen"] for r in records if r.get("chosen") is not None]
        return chosen[-1] if chosen else self.run.config.evolve.temperature

    def explores(self, iteration: int) -> bool:
        """Whether several temperatures are measured after an iteration (0: after the warm-up)."""
        every = self.run.config.explore.every
        return bool(self.reward.exists and every and iteration % every == 0)

    def measure(
        self,
        stage: str,
        iteration: int,
        policy: Callable[[], TrainState],
        kept: int | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Measures a stage on the validation split, and at the ends of the run on the test split.

        Args:
          stage: `base`, `warmup` or `iteration`.
          iteration: from 1; 0 for the other stages.
          policy: the stage's outcome.
          kept: responses that it was trained on.
          extra: more to say in its record.
        """
        run, c = self.run, self.run.config
        name = stage if stage != "iteration" else f"iteration_{iteration:02d}"
        splits = ["validation"]
        if stage in c.eval.test_at or (stage == "iteration" and iteration == c.evolve.iterations):
            splits.append("test")
        for split in splits:
            if run.results.find(stage, iteration, split):
                continue
            where, queries = f"{name}_{split}", getattr(run.data, split)
            groups = self._sampled(where, queries, policy, c.eval.temperature, iteration)
            measured = metrics.dynamics(groups, c.eval.k, aggregate=c.prm.aggregate, alpha=c.explore.alpha)
            used = {"warmup": c.warmup.temperature, "iteration": self.temperature(iteration)}.get(stage)
            record = {"stage": stage, "iteration": iteration, "split": split, "n": len(groups), **measured}
            record |= {"k": c.eval.k, "temperature": used, "kept": kept} | (extra or {})
            record |= self.steps(groups)
            if split == "validation":
                record |= self._explored(name, iteration, policy) if stage != "base" else {}
            record |= run.lap()
            by_id = {q.id: q for q in queries}
            asked = [by_id[group[0].query_id] for group in groups]
            write_samples(run.workdir / "samples" / f"{where}.md", asked, groups, c.eval.show)
            run.results.add(record)
            shown = ("greedy_accuracy", "pass_at_k", "gap", "reward_pass_at_2")
            text = ", ".join(f"{key} {100 * measured[key]:.1f}%" for key in shown if key in measured)
            log.info("%s, %s: %s", name, split, text)

    def _sampled(
        self,
        name: str,
        queries: Sequence[Query],
        policy: Callable[[], TrainState],
        temperature: float,
        iteration: int,
    ) -> list[list[Response]]:
        """Per query its greedy response and its samples, scored where there is a reward model."""
        run, temperatures = self.run, [0.0] + [temperature] * self.run.config.eval.samples
        found: Groups = run.generate(
            name, policy, queries, run.template, temperatures, iteration, kind="evaluation"
        )
        if self.reward.exists and not name.startswith("base"):
            found = self.reward.score(name, queries, found)
        return [found[q.id] for q in queries if q.id in found]

    def _explored(self, name: str, iteration: int, policy: Callable[[], TrainState]) -> dict[str, Any]:
        """The dynamics at a list of temperatures, and the one that is chosen, where it is time for that."""
        run, e = self.run, self.run.config.explore
        if not self.explores(iteration):
            return {}
        queries = run.data.validation[: e.queries]
        temperatures = np.repeat(list(e.temperatures), e.samples)
        where = f"{name}_temperatures"
        sampled = [0.0, *temperatures.tolist()]
        found = run.generate(
            where, policy, queries, run.template, sampled, iteration, e.batch, kind="evaluation"
        )
        scored = self.reward.score(where, queries, found)
        groups = [scored[q.id] for q in queries if q.id in scored]
        k = min(run.config.eval.k, e.samples)
        how = {"aggregate": run.config.prm.aggregate, "alpha": e.alpha}
        grid = [row | {"k": k, "n": len(groups)} for row in metrics.by_temperature(groups, k, **how)]
        present = self.temperature(iteration + 1)
        chosen = explore.choose(grid, e.criterion, present) if e.adapt else None
        if chosen is not None:
            log.info("%s: temperature %g, chosen by %s (it was %g)", name, chosen, e.criterion, present)
        return {"grid": grid, "chosen": chosen}

    def steps(self, groups: Sequence[Sequence[Response]]) -> dict[str, float]:
        """On the embedded data, of the greedy responses: all_right, the share with all steps right, and
        unfaithful, the share of the correct ones that have a wrong step."""
        greedy = [r for group in groups for r in group if r.temperature == 0]
        if not self.reward.truth or not greedy:
            return {}
        right = [truth.all_right(r.text, self.reward.truth[r.query_id]) for r in greedy]
        correct = [x for x, r in zip(right, greedy) if selection.correct([r])]
        unfaithful = {"unfaithful": 1 - sum(correct) / len(correct)} if correct else {}
        return {"all_right": sum(right) / len(right)} | unfaithful
