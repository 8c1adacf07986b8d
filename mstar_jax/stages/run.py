"""The verbs of the algorithm in `evolve`: what stages do, through the stores and checkpoints of a workdir."""

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

from mstar_jax import configure, models, processes, progress, records, sharding
from mstar_jax.data import loader, prompts, splits, toy
from mstar_jax.inference.generate import Generator, Groups, Stopped
from mstar_jax.models import vlm
from mstar_jax.profiling import flops, speed
from mstar_jax.rewards import metrics, prm
from mstar_jax.structs import EvolveState, Query, Response, Row, TrainState
from mstar_jax.training import curves, optimizer
from mstar_jax.training.checkpoint import Checkpoints
from mstar_jax.training.step import Step, abstract_state, init_state, make_train_step, token_loss

log = logging.getLogger(__name__)


@dataclasses.dataclass
class _Trained:
    """A stage's outcome while it is in memory."""

    stage: str
    state: TrainState


class Run(Generator):
    """What the stages share: data, policy, mesh, stores; its methods generate, lay out and improve."""

    def __init__(self, config, workdir: pathlib.Path, head: dict[str, Any], stop: Callable[[], bool]):
        configure.check(config, sharding.make_mesh(**config.mesh))
        self.results = records.Results(workdir, head)
        self.checkpoints = Checkpoints(workdir / "checkpoints")
        with processes.first_alone("data"):  # makes the embedded data set
            self.data = configure.load_data(config, workdir)
        self.labelled = splits.shuffled(self.data.labelled, config.seed, 0)
        self.unlabelled = splits.shuffled(self.data.unlabelled, config.seed, 0)
        if config.evolve.unlabelled.mixin is not None and not self.unlabelled:
            raise ValueError("evolve.unlabelled.mixin is set, and the data has no unlabelled query")
        self.template = config.prompts.direct if config.evolve.data == "answers" else config.prompts.cot
        with processes.first_alone("policy"):  # and its tokenizer
            self.policy = configure.make_policy(config, workdir, self.data.base)
        super().__init__(config, workdir, self.policy.processor(), stop)
        self.make_model = functools.partial(self.policy.build, config.seed)
        optimizer.check_frozen(jax.eval_shape(self.make_model), config.train.frozen)
        self.prm_loss = prm.make_loss(config.prm.mc_weight)
        self.started = time.time()
        self.done: _Trained | None = None
        self.tx = configure.optimizer(config.train)
        self._steps: dict[tuple[bool, tuple[str, ...]], tuple[Step, Step]] = {}  # by loss and what is frozen
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
                how = {"mesh": self.mesh, "seed": self.config.seed}
                params = self.policy.load(configure.base_dtype(self.config.train), **how)
                state = TrainState(0, params, ())  # no optimizer yet
            else:
                state = self.checkpoints.restore(stage, self._abstract(stage))
            self.done = _Trained(stage, state)
        return self.done.state

    def lap(self) -> dict[str, Any]:
        """Seconds since the last call, or since the start, and the speeds of the passes in them."""
        before, self.started = self.started, time.time()
        return {"seconds": round(self.started - before, 2), "speed": self.speeds.lap()}

    def forget(self, iteration: int) -> None:
        """Drops the checkpoint of an old iteration."""
        if iteration >= 1:
            self.checkpoints.drop(f"iteration_{iteration:02d}")

    def _make(self, stage: str) -> Callable[[], Any]:
        """What a stage trains: the policy, or the reward model around one."""
        make: Callable[[], Any] = self.make_model
        return lambda: self._stored(stage, vlm.RewardModel(make()) if stage == "prm" else make())

    def _stored(self, stage: str, params: Any) -> Any:
        """With LoRA, what is frozen lies in its own dtype as soon as there is something to adapt."""
        c = self.config.train
        if stage == "base" or not c.lora.rank:
            return params
        return optimizer.cast_frozen(params, configure.frozen(c, stage), configure.base_dtype(c))

    def _abstract(self, stage: str) -> TrainState:
        frozen = configure.frozen(self.config.train, stage)
        return abstract_state(self._make(stage), self.tx, self.mesh, frozen=frozen)

    # ------------------------------------------------------------------------------------- generate
    def asked(self, queries: Sequence[Query], template: str = "") -> list[tuple[Query, str]]:
        """Queries with their prompts: what the policy is asked while it evolves, or by another template."""
        return [(q, prompts.render(template or self.template, q)) for q in queries]

    def generate(
        self,
        name: str,
        state: Callable[[], TrainState],
        queries: Sequence[Query],
        template: str,
        temperatures: Sequence[float],
        iteration: int = 0,
        batch: int | None = None,
        kind: str = "rollouts",
    ) -> Groups:
        """Samples and judges responses of queries that are asked by a template; see `sample`."""
        return self.sample(
            name,
            lambda: state().params,
            self.asked(queries, template),
            temperatures,
            how={"prompt": template},
            iteration=iteration,
            batch=batch,
            kind=kind,
        )

    def rows(self, queries: Sequence[Query], kept: Sequence[Sequence[Response]]) -> list[Row]:
        """Training rows: each query's prompt, without the answer, and its kept responses."""
        pairs = [(q, tuple(r.tokens for r in chosen)) for q, chosen in zip(queries, kept) if chosen]
        return self._rows([(q, prompts.render(self.config.prompts.cot, q), tokens) for q, tokens in pairs])

    def answer_rows(self, queries: Sequence[Query]) -> list[Row]:
        """Rows of SFT: the gold answer itself as the response."""
        direct, encode = self.config.prompts.direct, self.processor.encode_response
        golds = [(tuple(encode(f"{toy.ANSWER} {q.answer}")),) for q in queries]
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
        moments: bool = False,
        schedule: bool = False,
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
          moments: keep the optimizer's moments of `start`, instead of new ones.
          schedule: keep the position of `start` in the learning rate schedule, instead of its beginning.
          until: asked before every `settings.check_every` steps; true ends the stage early.
        """
        c = self.config
        frozen = configure.frozen(c.train, stage)
        saved = self.checkpoints.run(stage)
        if saved is not None and saved.done:
            return self.final(stage)
        if saved is not None:
            state = self.checkpoints.restore(stage, self._abstract(stage))
        elif start is None:
            state = init_state(self.make_model, self.tx, self.mesh, frozen=frozen)
        else:
            start = start._replace(params=self._stored(stage, start.params))
            state = optimizer.carry_on(
                start, self.tx, self.mesh, frozen=frozen, moments=moments, schedule=schedule
            )
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
            grouped=c.data.grouped,
            workers=c.data.workers,
            share=sharding.share_of(self.mesh),
            state=saved.loader if saved else None,
        )
        rates = optimizer.learning_rates(configure.schedule(settings), int(state.step) - cursor, steps)
        step, plain = self._train_step(stage)
        curve = curves.StageLog(self.workdir, stage, cursor, saved.curve if saved else None)

        def save(done: bool, wait: bool = False) -> None:
            at = stage.split("_")[0], iteration, cursor, done, temperature, c.seed
            where = EvolveState(*at, batches.get_state() if batches else {}, curve.pending())
            self.checkpoints.save(stage, state, where, wait)

        watch = self.speeds.of("train prm" if stage == "prm" else "train", stage)
        bar = progress.bar(steps, f"{stage}: train", cursor, "step")
        with bar, speed.profiler(self.workdir / "profile" / stage, c.train.profile) as profile:
            while cursor < steps:
                if until and cursor % settings.check_every == 0 and watch.apart(until, state, cursor):
                    break
                if profile(cursor, state):
                    watch.skip()
                batch = next(batches)
                rate = rates[cursor]
                state, values = step(state, sharding.put_batch(batch, self.mesh), rate)
                watch.begin(batch, functools.partial(flops.count, plain, state, batch, rate))
                cursor += 1
                curve.add(values)
                bar.update()
                if cursor % c.train.log_every == 0 or cursor == steps:
                    means = curve.write(cursor, float(rate), watch.done)
                    bar.set_postfix_str(f"loss {means['loss']:.3f}")
                if self.stopping(cursor, c.train.log_every):
                    save(done=False, wait=True)
                    raise Stopped(f"{stage}: stopped and saved after step {cursor} of {steps}")
                if cursor % c.train.save_every == 0 and cursor < steps:
                    watch.apart(save, False)
        curve.close()
        save(done=True, wait=True)
        self.done = _Trained(stage, state)
        return state

    def _train_step(self, stage: str) -> tuple[Step, Step]:
        """The program of all stages with one loss and one set of frozen parameters, and one without
        recomputation, which is only traced, to count FLOPs."""
        c = self.config.train
        frozen = configure.frozen(c, stage)
        key = stage == "prm", frozen
        if key not in self._steps:
            make = functools.partial(
                make_train_step,
                self.tx,
                self.mesh,
                loss=self.prm_loss if stage == "prm" else token_loss,
                frozen=frozen,
                dtype=jnp.dtype(c.dtype),
            )
            step = make(accumulate=c.accumulate, remat=c.remat)
            traced = c.accumulate == 1 and c.remat == "none"  # already
            self._steps[key] = step, step if traced else make()
        return self._steps[key]

    # ----------------------------------------------------------------------------------------- base
    def base(self) -> TrainState:
        """The policy to start from: a checkpoint's, or one trained here until it is good enough."""
        if isinstance(self.policy, models.Pretrained):
            return self.final("base")
        until = self.base_is_good_enough
        return self.improve("base", 0, None, self.base_sources(), self.config.base, until=until)

    def base_sources(self) -> list[tuple[list[Row], float]]:
        """The narrow set's rows by mode, with their weights."""
        modes = configure.base_examples(self.config, self.data.base, self.processor.encode_response)
        return [(self._rows(modes[mode]), weight) for mode, weight in self.config.base.mix.items()]

    def base_is_good_enough(self, state: TrainState, cursor: int) -> bool:
        """Validation accuracy on the narrow task has reached `base.target`, so there is room to evolve."""
        c = self.config
        if cursor < c.base.check_from:
            return False
        queries = self.data.base_validation
        name, kind = f"base_check_{cursor:05d}", "evaluation"
        found = self.generate(name, lambda: state, queries, c.prompts.cot, [0.0], kind=kind)
        accuracy = metrics.dynamics([found[q.id] for q in queries], 1)["greedy_accuracy"]
        goal = 100 * c.base.target
        log.info("base, step %d: greedy %.1f%% on validation, ends at %.1f%%", cursor, 100 * accuracy, goal)
        return accuracy >= c.base.target
