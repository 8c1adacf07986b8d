"""base: the policy to start from."""

import functools
import logging
from collections.abc import Mapping

import jax.numpy as jnp

from mstar_jax import configure, models
from mstar_jax.inference.generate import Asked, ask, sample
from mstar_jax.rewards import metrics
from mstar_jax.stages.improve import NOTHING, carried, train
from mstar_jax.stages.policy import Policy, builder, frozen_in, given, policy_after
from mstar_jax.stages.run import Run
from mstar_jax.stages.select import training_rows
from mstar_jax.structs import Model, Source, Stage, TrainState
from mstar_jax.training.step import init_state

log = logging.getLogger(__name__)


def base(run: Run) -> Policy:
    """The policy of a checkpoint. One from scratch, and a checkpoint with `base.tune`, is trained here on
    narrow data until it is good enough."""
    if not configure.trains_base(run.config):
        return policy_after(run, Stage.base)

    def begin() -> TrainState:
        if isinstance(run.source, models.Pretrained):
            return carried(run, Stage.base, align(run).take(), NOTHING)
        build = builder(run, Stage.base)
        return init_state(build, run.tx, run.mesh, frozen=frozen_in(run, Stage.base))

    return train(
        run,
        Stage.base,
        begin,
        narrow_data(run, run.config.base.mix),
        until=functools.partial(good_enough, run),
    )


def align(run: Run) -> Policy:
    """The policy of a checkpoint whose vision tower and connector have learned, from captions, to speak to
    its decoder, which is frozen."""
    source = Policy(Stage.align, lambda: given(run, jnp.dtype("float32")))
    if not run.config.align.steps:
        return source
    captions = narrow_data(run, {"caption": 1.0})
    return train(run, Stage.align, lambda: carried(run, Stage.align, source.take(), NOTHING), captions)


def narrow_data(run: Run, mix: Mapping[str, float]) -> list[Source]:
    """The narrow data's rows by mode, with their weights."""
    modes = configure.base_examples(run.config, run.base_set, run.processor.encode_response)
    sources = []
    for mode, weight in mix.items():
        asked = [Asked(query, prompt) for query, prompt, _ in modes[mode]]
        rows = training_rows(run, asked, [responses for _, _, responses in modes[mode]])
        sources.append(Source(rows, weight))
    return sources


def good_enough(run: Run, params: Model, cursor: int) -> bool:
    """Whether greedy accuracy on the narrow data's validation queries has reached `base.target`: a better
    base leaves little to evolve."""
    c = run.config.base
    if cursor < c.check_from:
        return False
    found = sample(
        run,
        f"base_check_{cursor:05d}",
        lambda: params,
        ask(run.base_validation, run.config.prompts.cot),
        [0.0],
        settings={"prompt": run.config.prompts.cot},
        kind="evaluation",
    )
    groups = [found[query.id] for query in run.base_validation if query.id in found]
    accuracy = metrics.dynamics(groups, 1).get("greedy_accuracy", 0.0)  # none fits: warned of
    text = "base, step %d: greedy %.1f%% on validation; training ends at %.1f%%"
    log.info(text, cursor, 100 * accuracy, 100 * c.target)
    return accuracy >= c.target
