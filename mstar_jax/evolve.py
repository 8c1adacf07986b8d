"""Self-evolving training (M-STaR, arXiv 2412.17451), from a base model to an evolved one.

    base       a policy to start from: a checkpoint; the tiny one is trained here, on a narrow data set
    warm-up    prompted with the answer, the policy writes rationales; the correct ones teach it to reason
    iteration  generate:  y_1..y_K ~ pi_t( . | x, o; T)      for a share of the labelled queries
               reward:    H( 1(a = a*) )                     the correct responses, Random-k or all
               improve:   pi_t+1 = SFT(pi_t)                 optimizer and schedule inherited, or reset
               evaluate:  greedy accuracy, Pass@K, their gap

Iterative RFT, ReST^EM and SFT are the same loop with other values (`configs/tiny.py`).
"""

import dataclasses
import functools
import logging
import pathlib
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mstar_jax import measures, metrics, models, sampling, selection, setup, sharding, train
from mstar_jax.checkpoint import Checkpoints
from mstar_jax.data import figures, loader, prompts, splits
from mstar_jax.store import RolloutStore
from mstar_jax.structs import EvolveState, Prompt, Query, Response, Row, TrainState

log = logging.getLogger(__name__)


class Stopped(Exception):
    """The run was told to stop and has saved where it stands."""


def run(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, head: dict[str, Any], stop: Callable[[], bool]
):
    """Runs all stages, or what is left of them, and returns the records of results.json.

    Args:
      config: see `configs/tiny.py`.
      workdir: everything the run writes; a second start with the same config goes on from there.
      head: what results.json says above its stages.
      stop: asked between device batches and steps; once true, the run saves and raises `Stopped`.

    Raises:
      ValueError: a config value is impossible, before anything is compiled.
      Stopped: see `stop`.
    """
    r = Run(config, workdir, head, stop)
    warmup, evolve = config.warmup, config.evolve

    # ---------------------------------------------------------------------------------------- base
    if not r.beyond("base"):
        state = r.base()
        r.evaluate("base", 0, state, kept=None)

    # ------------------------------------------------------------------------------------- warm-up
    queries = r.labelled[: warmup.queries]
    hinted = r.generate(
        "warmup", lambda: r.final("base"), queries, config.prompts.hint, [warmup.temperature] * warmup.k
    )
    rationales = r.rows(queries, [r.keep("warmup", q, hinted, warmup.keep, True) for q in queries])
    if not r.beyond("warmup"):
        state = r.improve("warmup", 0, r.final("base"), [(rationales, 1.0)], config.warmup)
        r.evaluate("warmup", 0, state, kept=sum(len(row.responses) for row in rationales))

    # -------------------------------------------------------------------------------------- evolve
    for t in range(1, evolve.iterations + 1):
        stage, before = f"iteration_{t:02d}", "warmup" if t == 1 else f"iteration_{t - 1:02d}"
        if r.beyond(stage):
            continue

        # generate: y_1..y_K ~ pi_t( . | x, o; T), for this iteration's share of the queries
        queries = splits.share(r.labelled, evolve.fraction, t, config.seed)
        if evolve.data == "rollouts":
            policy = functools.partial(r.final, before)
            responses = r.generate(
                stage, policy, queries, r.ask, [evolve.temperature] * evolve.k, iteration=t
            )
            # reward: H( 1(a = a*) )
            kept = [r.keep(stage, q, responses, evolve.keep, evolve.distinct) for q in queries]
            rows = r.rows(queries, kept)
        elif evolve.data == "answers":  # SFT: the labelled answers themselves, no sampling
            rows = r.answer_rows(queries)
        else:  # control: the same steps on what the warm-up had
            rows = rationales

        # improve: pi_t+1 = SFT(pi_t); continuous training inherits the optimizer state and the schedule
        start = r.final("warmup" if evolve.start == "initial" else before)
        state = r.improve(stage, t, start, [(rows, 1.0)], evolve, inherit=not evolve.reset and t > 1)
        r.evaluate("iteration", t, state, kept=sum(len(row.responses) for row in rows))
        r.forget(t - evolve.keep_checkpoints)

    r.checkpoints.wait()
    return r.results.data["stages"]


@dataclasses.dataclass
class _Trained:
    """A stage's outcome while it is in memory."""

    stage: str
    state: TrainState


class Run:
    """What the stages share: data, policy, mesh, stores. Its methods are the verbs of `run`."""

    def __init__(self, config, workdir: pathlib.Path, head: dict[str, Any], stop: Callable[[], bool]):
        self.config, self.workdir, self.stop = config, workdir, stop
        self.mesh = sharding.make_mesh(**config.mesh)
        setup.check(config, self.mesh)
        self.results = metrics.Results(workdir, head)
        self.checkpoints = Checkpoints(workdir / "checkpoints")
        self.data = setup.load_data(config, workdir)
        self.labelled = splits.shuffled(self.data["labelled"], config.seed, 0)
        self.ask = config.prompts.direct if config.evolve.data == "answers" else config.prompts.cot
        self.policy = setup.make_policy(config, workdir, self.data.get("base", ()))
        self.make_model = functools.partial(self.policy.build, config.seed)
        self.processor = self.policy.processor()
        train.check_frozen(jax.eval_shape(self.make_model), config.train.frozen)
        self.key = jax.random.key(config.seed)
        self.started = time.time()
        self.done: _Trained | None = None
        count = config.evolve.iterations
        self.stages = ["base", "warmup", *(f"iteration_{t:02d}" for t in range(1, count + 1))]

    # ------------------------------------------------------------------------------ where it stands
    def beyond(self, stage: str) -> bool:
        """A later stage has begun to train, so this one is over."""
        return any(self.checkpoints.has(later) for later in self.stages[self.stages.index(stage) + 1 :])

    def final(self, stage: str) -> TrainState:
        """The TrainState that a finished stage ended with, from memory or from its checkpoint."""
        if self.done is None or self.done.stage != stage:
            if stage == "base" and isinstance(self.policy, models.Pretrained):
                state = TrainState(0, self.policy.load(jnp.float32, mesh=self.mesh), ())  # no optimizer yet
            else:
                tx, _ = setup.optimizer(self._settings(stage), self.config.train)
                state = self.checkpoints.restore(stage, train.abstract_state(self.make_model, tx, self.mesh))
            self.done = _Trained(stage, state)
        return self.done.state

    def forget(self, iteration: int) -> None:
        """Drops the checkpoint of an old iteration."""
        if iteration >= 1:
            self.checkpoints.drop(f"iteration_{iteration:02d}")

    def _settings(self, stage: str):
        return self.config.evolve if stage.startswith("iteration") else self.config[stage]

    # ------------------------------------------------------------------------------------- generate
    @functools.cache  # noqa: B019  (a Run lives as long as the process)
    def _sampler(self, branches: int):
        s = self.config.sampling
        settings = sampling.SamplingConfig(
            branches, s.max_new_tokens, s.top_k, s.top_p, s.min_p, tuple(s.stop_strings)
        )
        return settings, sampling.make_generate(self.processor, settings)

    def generate(
        self,
        name: str,
        state: Callable[[], TrainState],
        queries: Sequence[Query],
        template: str,
        temperatures: Sequence[float],
        iteration: int = 0,
    ) -> dict[str, list[Response]]:
        """Samples and judges responses through the rollout store; what is there is not sampled again."""
        c = self.config
        settings, generate = self._sampler(len(temperatures))
        planned = [Row(p) for p in self._plan([(q, prompts.render(template, q)) for q in queries], name)]
        plans = loader.plan_batches(planned, c.sampling.batch, c.data.buckets)
        how = dataclasses.asdict(settings)
        how |= {"temperatures": list(temperatures), "prompt": template, "seed": c.seed}
        store = RolloutStore(self.workdir / "rollouts" / name, how | {"batch": c.sampling.batch})
        missing = store.missing(len(plans))
        if missing:
            model = train.for_sampling(state().params, self.mesh, jnp.dtype(c.sampling.dtype))
            batches = loader.row_batches(
                [plans[i] for i in missing], self.processor, c.sampling.batch, workers=c.data.workers
            )
            queries_of = [[row.prompt.query for row in plans[i][1]] for i in missing]
            sampled = sampling.rollouts(
                generate,
                model,
                batches,
                self.processor,
                settings,
                key=jax.random.fold_in(self.key, zlib.crc32(name.encode())),
                temperatures=np.asarray(temperatures),
                iteration=iteration,
                mesh=self.mesh,
            )
            there = len(planned) - sum(map(len, queries_of))
            with metrics.progress(len(planned), f"{name}: rollouts", there, "query") as bar:
                for number, these, groups in zip(missing, queries_of, sampled):
                    judged = [[selection.judge(q, r) for r in group] for q, group in zip(these, groups)]
                    store.write(number, zip(these, judged))
                    bar.update(len(these))
                    if self.stop():
                        stored = len(plans) - len(store.missing(len(plans)))
                        raise Stopped(f"{name}: stopped after {stored} of {len(plans)} shards of rollouts")
        return dict(store.read())

    def _plan(self, pairs: Sequence[tuple[Query, str]], name: str) -> list[Prompt]:
        planned, left_out = loader.plan_prompts(pairs, self.processor, self.config.data.max_prompt)
        if left_out:
            ids, longest = ", ".join(q.id for q in left_out[:3]), self.config.data.max_prompt
            text = "%s: left out %d prompts (%s ...): over data.max_prompt = %d tokens, or no room to answer"
            log.warning(text, name, len(left_out), ids, longest)
        return planned

    # --------------------------------------------------------------------------------------- reward
    def keep(
        self, name: str, query: Query, responses: dict[str, list[Response]], k: int, distinct: bool
    ) -> list[Response]:
        """The responses of a query that train the policy: correct ones, at most k of them by lot."""
        found = selection.correct(responses.get(query.id, []))
        if distinct:
            found = selection.distinct(found)
        lot = [self.config.seed, zlib.crc32(name.encode()), zlib.crc32(query.id.encode())]
        return selection.random_k(found, k, np.random.default_rng(lot))

    def rows(self, queries: Sequence[Query], kept: Sequence[Sequence[Response]]) -> list[Row]:
        """Training rows: each query's prompt, without the answer, and its kept responses."""
        pairs = [(q, tuple(r.tokens for r in chosen)) for q, chosen in zip(queries, kept) if chosen]
        return self._rows([(q, prompts.render(self.config.prompts.cot, q), tokens) for q, tokens in pairs])

    def answer_rows(self, queries: Sequence[Query]) -> list[Row]:
        """Rows of SFT: the gold answer itself as the response."""
        direct, encode = self.config.prompts.direct, self.processor.encode_response
        golds = [(tuple(encode(f"{figures.ANSWER} {q.answer}")),) for q in queries]
        return self._rows([(q, prompts.render(direct, q), gold) for q, gold in zip(queries, golds)])

    def _rows(self, triples: Sequence[tuple[Query, str, tuple[tuple[int, ...], ...]]]) -> list[Row]:
        # a query may come several times (base modes), so prompts are matched in order, not by id
        rows, fitting = [], self._plan([(q, text) for q, text, _ in triples], "rows")[::-1]
        for query, text, responses in triples:
            if fitting and fitting[-1].query is query and fitting[-1].text == text:
                rows.append(Row(fitting.pop(), responses))
        return rows

    # -------------------------------------------------------------------------------------- improve
    def improve(
        self,
        stage: str,
        iteration: int,
        start: TrainState | None,
        sources: Sequence[tuple[Sequence[Row], float]],
        settings: ml_collections.ConfigDict,
        *,
        inherit: bool = False,
        until: Callable[[TrainState, int], bool] | None = None,
    ) -> TrainState:
        """Trains for `settings.steps` steps, or goes on with what the stage's checkpoint left.

        Args:
          stage: its name in the workdir.
          iteration: written into the checkpoint.
          start: parameters to start from; None initialises them.
          sources: weighted rows.
          settings: learning_rate, steps, warmup_steps, final_fraction, batch.
          inherit: carry optimizer state and schedule on instead of resetting both.
          until: asked before every `settings.check_every` steps; true ends the stage early.
        """
        c = self.config
        tx, schedule = setup.optimizer(settings, c.train)
        saved = self.checkpoints.run(stage)
        if saved is not None and saved.done:
            return self.final(stage)
        if saved is not None:
            state = self.checkpoints.restore(stage, train.abstract_state(self.make_model, tx, self.mesh))
        elif start is None:
            state = train.init_state(self.make_model, tx, self.mesh)
        else:
            state = start if inherit else train.fresh_optimizer(start.params, tx, self.mesh)
        self.done = None  # the step donates its state
        cursor = saved.cursor if saved else 0
        steps = settings.steps if any(len(rows) for rows, _ in sources) else 0
        if not steps:
            log.warning("%s: no response was kept, so nothing is trained", stage)
        batches: Any = steps and loader.train_batches(
            sources,
            self.processor,
            settings.batch,
            c.data.buckets,
            seed=(c.seed * 1_000_003 + zlib.crc32(stage.encode())) % 2**31,
            workers=c.data.workers,
            process=(jax.process_index(), jax.process_count()),
            state=saved.loader if saved else None,
        )
        step = self._train_step(settings)
        curve = metrics.StageLog(self.workdir, stage, cursor, saved.curve if saved else None)

        def save(done: bool, wait: bool = False) -> None:
            at = stage.split("_")[0], iteration, cursor, done, c.evolve.temperature, c.seed
            where = EvolveState(*at, batches.get_state() if batches else {}, curve.pending())
            self.checkpoints.save(stage, state, where, wait)

        with metrics.progress(steps, f"{stage}: train", cursor, "step") as bar:
            while cursor < steps:
                if until is not None and cursor % settings.check_every == 0 and until(state, cursor):
                    break
                state, values = step(state, sharding.put_batch(next(batches), self.mesh))
                cursor += 1
                curve.add(values)
                bar.update()
                if cursor % c.train.log_every == 0 or cursor == steps:
                    means = curve.write(cursor, float(schedule(state.step - 1)))
                    bar.set_postfix_str(f"loss {means['loss']:.3f}")
                if self.stop():
                    save(done=False, wait=True)
                    raise Stopped(f"{stage}: stopped and saved after step {cursor} of {steps}")
                if cursor % c.train.save_every == 0 and cursor < steps:
                    save(done=False)
        curve.close()
        save(done=True, wait=True)
        self.done = _Trained(stage, state)
        return state

    def _train_step(self, settings):
        c = self.config.train
        key = setup.schedule_values(settings)
        if getattr(self, "_step", (None, None))[0] != key:  # one program for all iterations
            tx, _ = setup.optimizer(settings, c)
            dtype = jnp.dtype(c.dtype)
            built = train.make_train_step(tx, self.mesh, accumulate=c.accumulate, dtype=dtype, remat=c.remat)
            self._step = (key, built)
        return self._step[1]

    # ------------------------------------------------------------------------------------- evaluate
    def evaluate(self, stage: str, iteration: int, state: TrainState, kept: int | None) -> None:
        """Measures the dynamics on the validation split, and at the ends of the run on the test split."""
        c = self.config
        name = stage if stage != "iteration" else f"iteration_{iteration:02d}"
        splits = ["validation"]
        if stage in c.eval.test_at or (stage == "iteration" and iteration == c.evolve.iterations):
            splits.append("test")
        for split in splits:
            if self.results.find(stage, iteration, split):
                continue
            queries = self.data[split]
            temperatures = [0.0] + [c.eval.temperature] * c.eval.samples
            where = f"{name}_{split}"
            found = self.generate(where, lambda: state, queries, self.ask, temperatures, iteration)
            groups = [found[q.id] for q in queries if q.id in found]
            measured = measures.dynamics(groups, c.eval.k)
            used = {"warmup": c.warmup.temperature, "iteration": c.evolve.temperature}.get(stage)
            record = {"stage": stage, "iteration": iteration, "split": split, "n": len(groups), **measured}
            record |= {"k": c.eval.k, "temperature": used, "kept": kept}
            record |= {"seconds": round(time.time() - self.started, 2)}
            asked = [q for q in queries if q.id in found]
            metrics.write_samples(self.workdir / "samples" / f"{where}.md", asked, groups, c.eval.show)
            self.results.add(record)
            self.started = time.time()
            shown = ("greedy_accuracy", "pass_at_k", "gap")
            text = ", ".join(f"{key} {100 * measured[key]:.1f}%" for key in shown if key in measured)
            log.info("%s, %s: %s", name, split, text)

    # ----------------------------------------------------------------------------------------- base
    def base(self) -> TrainState:
        """The policy to start from: a checkpoint's, or one trained here until it is good enough."""
        if isinstance(self.policy, models.Pretrained):
            return self.final("base")
        until = self.base_is_good_enough
        return self.improve("base", 0, None, self.base_sources(), self.config.base, until=until)

    def base_sources(self) -> list[tuple[list[Row], float]]:
        """The narrow set's rows by mode, with their weights."""
        modes = setup.base_examples(self.config, self.data["base"], self.processor.encode_response)
        return [(self._rows(modes[mode]), weight) for mode, weight in self.config.base.mix.items()]

    def base_is_good_enough(self, state: TrainState, cursor: int) -> bool:
        """Validation accuracy on the narrow task has reached `base.target`, so there is room to evolve."""
        c = self.config
        if cursor < c.base.check_from:
            return False
        queries = self.data["base_validation"]
        found = self.generate(f"base_check_{cursor:05d}", lambda: state, queries, c.prompts.cot, [0.0])
        accuracy = measures.dynamics([found[q.id] for q in queries], 1)["greedy_accuracy"]
        goal = 100 * c.base.target
        log.info("base, step %d: greedy %.1f%% on validation, ends at %.1f%%", cursor, 100 * accuracy, goal)
        return accuracy >= c.base.target
