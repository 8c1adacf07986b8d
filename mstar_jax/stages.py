"""The verbs of the algorithm in `evolve`: what stages do, through the stores and checkpoints of a workdir."""

import dataclasses
import functools
import logging
import pathlib
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mstar_jax import measures, metrics, models, prm, sampling, selection, setup, sharding, train
from mstar_jax.checkpoint import Checkpoints
from mstar_jax.data import figures, loader, prompts, splits
from mstar_jax.models import vlm
from mstar_jax.store import Store, read_rollout, rollout
from mstar_jax.structs import EvolveState, Prompt, Query, Response, Row, TrainState

log = logging.getLogger(__name__)


class Stopped(Exception):
    """The run was told to stop and has saved where it stands."""


@dataclasses.dataclass
class _Trained:
    """A stage's outcome while it is in memory."""

    stage: str
    state: TrainState


class Run:
    """What the stages share: data, policy, mesh, stores; its methods generate, lay out and improve."""

    def __init__(self, config, workdir: pathlib.Path, head: dict[str, Any], stop: Callable[[], bool]):
        self.config, self.workdir, self.stop = config, workdir, stop
        self.mesh = sharding.make_mesh(**config.mesh)
        setup.check(config, self.mesh)
        self.results = metrics.Results(workdir, head)
        self.checkpoints = Checkpoints(workdir / "checkpoints")
        self.data = setup.load_data(config, workdir)
        self.labelled, self.unlabelled = (
            splits.shuffled(self.data[name], config.seed, 0) for name in ("labelled", "unlabelled")
        )
        if config.evolve.unlabelled.mixin is not None and not self.unlabelled:
            raise ValueError("evolve.unlabelled.mixin is set, and the data has no unlabelled query")
        self.ask = config.prompts.direct if config.evolve.data == "answers" else config.prompts.cot
        self.policy = setup.make_policy(config, workdir, self.data.get("base", ()))
        self.make_model = functools.partial(self.policy.build, config.seed)
        self.processor = self.policy.processor()
        self.texts = sampling.token_texts(self.processor)
        train.check_frozen(jax.eval_shape(self.make_model), config.train.frozen)
        self.prm_loss = prm.make_loss(config.prm.mc_weight)
        self.key = jax.random.key(config.seed)
        self.started = time.time()
        self.done: _Trained | None = None
        count = config.evolve.iterations
        self.stages = ["base", "warmup", "prm", *(f"iteration_{t:02d}" for t in range(1, count + 1))]

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
                tx, _ = self._optimizer(stage)
                abstract = train.abstract_state(self._make(stage), tx, self.mesh)
                state = self.checkpoints.restore(stage, abstract)
            self.done = _Trained(stage, state)
        return self.done.state

    def check_stop(self, where: str) -> None:
        """Raises Stopped if the run was told to stop; what is on disk by now is whole."""
        if self.stop():
            raise Stopped(f"{where}: stopped")

    def lap(self) -> float:
        """Seconds since the last call, or since the start."""
        before, self.started = self.started, time.time()
        return round(self.started - before, 2)

    def forget(self, iteration: int) -> None:
        """Drops the checkpoint of an old iteration."""
        if iteration >= 1:
            self.checkpoints.drop(f"iteration_{iteration:02d}")

    def _make(self, stage: str) -> Callable[[], Any]:
        """What a stage trains: the policy, or the reward model around one."""
        make: Callable[[], Any] = self.make_model
        return (lambda: vlm.RewardModel(make())) if stage == "prm" else make

    def _optimizer(self, stage: str):
        settings = self.config.evolve if stage.startswith("iteration") else self.config[stage]
        return setup.optimizer(settings, self.config.train, "trunk." if stage == "prm" else "")

    # ------------------------------------------------------------------------------------- generate
    @functools.cache  # noqa: B019  (a Run lives as long as the process)
    def sampler(self, branches: int):
        """(settings, compiled function) that sample so many responses of a row."""
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
        batch: int | None = None,
    ) -> dict[str, list[Response]]:
        """Samples and judges responses through the rollout store; what is there is not sampled again.

        Args:
          name: of the pass; samples depend on it.
          state: the policy's, called only where something is missing.
          queries: what is asked.
          template: how.
          temperatures: one for every response of a query.
          iteration: written into the responses.
          batch: queries sampled together; None for `sampling.batch`.
        """
        c, batch = self.config, batch or self.config.sampling.batch
        settings, generate = self.sampler(len(temperatures))
        planned = self.plan([(q, prompts.render(template, q)) for q in queries], name)
        plans = loader.plan_batches([Row(p) for p in planned], batch, c.data.buckets)
        how = dataclasses.asdict(settings)
        how |= {"temperatures": list(temperatures), "prompt": template, "seed": c.seed}
        store = Store(self.workdir / "rollouts" / name, how | {"batch": batch})

        def sampled(groups, batches):
            found = sampling.rollouts(
                generate,
                train.for_sampling(state().params, self.mesh, jnp.dtype(c.sampling.dtype)),
                batches,
                self.processor,
                settings,
                key=jax.random.fold_in(self.key, zlib.crc32(name.encode())),
                temperatures=np.asarray(temperatures),
                iteration=iteration,
                mesh=self.mesh,
            )
            for rows, answered in zip(groups, found):
                asked = [row.prompt.query for row in rows]
                judged = [[selection.judge(q, r) for r in group] for q, group in zip(asked, answered)]
                yield [rollout(q, group) for q, group in zip(asked, judged)]

        self.fill(store, plans, f"{name}: rollouts", sampled, self.processor, batch)
        return dict(store.read(read_rollout))

    def fill(
        self,
        store: Store,
        plans: Sequence[tuple[int, list[Row]]],
        title: str,
        compute: Callable[[list[list[Row]], Iterator[Any]], Iterator[Iterable[dict[str, Any]]]],
        processor: Any,
        size: int,
    ) -> None:
        """Makes the missing shards of a store.

        Args:
          store: where the records go.
          plans: (bucket, rows) of every shard.
          title: of the progress bar.
          compute: (rows of every missing shard, iterator of them as arrays) -> each shard's records.
          processor: of the model that looks at the rows.
          size: rows of a device batch; a short plan is filled up with empty ones.
        """
        missing = store.missing(len(plans))
        if not missing:
            return
        rows, workers = [plans[i][1] for i in missing], self.config.data.workers
        batches = loader.row_batches([plans[i] for i in missing], processor, size, workers=workers)
        total = sum(len(plan) for _, plan in plans)
        with metrics.progress(total, title, total - sum(map(len, rows)), "row") as bar:
            for number, these, records in zip(missing, rows, compute(rows, batches)):
                store.write(number, records)
                bar.update(len(these))
                self.check_stop(title)

    def plan(self, pairs: Sequence[tuple[Query, str]], name: str, processor: Any = None) -> list[Prompt]:
        """The prompts that fit, for the policy or another model's processor; the others are reported."""
        longest = self.config.data.max_prompt
        planned, left_out = loader.plan_prompts(pairs, processor or self.processor, longest)
        if left_out:
            ids = ", ".join(q.id for q in left_out[:3])
            text = "%s: left out %d prompts (%s ...): over data.max_prompt = %d tokens, or no room to answer"
            log.warning(text, name, len(left_out), ids, longest)
        return planned

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
        rows, fitting = [], self.plan([(q, text) for q, text, _ in triples], "rows")[::-1]
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
        processor: Any = None,
        temperature: float = 0.0,
        inherit: tuple[bool, bool] = (False, False),
        until: Callable[[TrainState, int], bool] | None = None,
    ) -> TrainState:
        """Trains for `settings.steps` steps, or goes on with what the stage's checkpoint left.

        Args:
          stage: its name in the workdir.
          iteration: written into the checkpoint.
          start: parameters to start from; None initialises them.
          sources: weighted rows.
          settings: learning_rate, steps, warmup_steps, final_fraction, batch.
          processor: of the model that is trained; None for the policy's.
          temperature: what the responses were sampled at; written into the checkpoint.
          inherit: carry on (the optimizer's moments, the schedule) of the start, instead of new ones.
          until: asked before every `settings.check_every` steps; true ends the stage early.
        """
        c = self.config
        tx, schedule = self._optimizer(stage)
        saved = self.checkpoints.run(stage)
        if saved is not None and saved.done:
            return self.final(stage)
        if saved is not None:
            abstract = train.abstract_state(self._make(stage), tx, self.mesh)
            state = self.checkpoints.restore(stage, abstract)
        elif start is None:
            state = train.init_state(self.make_model, tx, self.mesh)
        else:
            state = train.carry_on(start, tx, self.mesh, moments=inherit[0], schedule=inherit[1])
        self.done = None  # the step donates its state
        cursor = saved.cursor if saved else 0
        steps = settings.steps if any(len(rows) for rows, _ in sources) else 0
        if not steps:
            log.warning("%s: no response was kept, so nothing is trained", stage)
        batches: Any = steps and loader.train_batches(
            sources,
            processor or self.processor,
            settings.batch,
            c.data.buckets,
            seed=(c.seed * 1_000_003 + zlib.crc32(stage.encode())) % 2**31,
            workers=c.data.workers,
            process=(jax.process_index(), jax.process_count()),
            state=saved.loader if saved else None,
        )
        step = self._train_step(stage, settings, tx)
        curve = metrics.StageLog(self.workdir, stage, cursor, saved.curve if saved else None)

        def save(done: bool, wait: bool = False) -> None:
            at = stage.split("_")[0], iteration, cursor, done, temperature, c.seed
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

    def _train_step(self, stage: str, settings, tx):
        c, loss = self.config.train, self.prm_loss if stage == "prm" else train.token_loss
        key = loss, *setup.schedule_values(settings)
        if getattr(self, "_step", (None, None))[0] != key:  # one program for all iterations
            how = {"accumulate": c.accumulate, "dtype": jnp.dtype(c.dtype), "remat": c.remat}
            self._step = key, train.make_train_step(tx, self.mesh, loss=loss, **how)
        return self._step[1]

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
