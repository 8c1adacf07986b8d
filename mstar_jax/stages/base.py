"""base: the policy to start from."""

import functools
import logging

from mstar_jax import configure, models
from mstar_jax.inference.generate import Asked, ask, sample
from mstar_jax.rewards import metrics
from mstar_jax.stages.improve import train
from mstar_jax.stages.policy import Policy, builder, frozen_in, policy_after
from mstar_jax.stages.run import Run
from mstar_jax.stages.select import training_rows
from mstar_jax.structs import Model, Source, Stage
from mstar_jax.training.step import init_state

log = logging.getLogger(__name__)


def base(run: Run) -> Policy:
    """The policy of a checkpoint; one from scratch is trained here on narrow data until it is good enough."""
    if isinstance(run.source, models.Pretrained):
        return policy_after(run, Stage.base)
    build = builder(run, Stage.base)
    return train(
        run,
        Stage.base,
        lambda: init_state(build, run.tx, run.mesh, frozen=frozen_in(run, Stage.base)),
        narrow_data(run),
        until=functools.partial(good_enough, run),
    )


def narrow_data(run: Run) -> list[Source]:
    """The narrow data's rows by mode, with their weights."""
    modes = configure.base_examples(run.config, run.base_set, run.processor.encode_response)
    sources = []
    for mode, weight in run.config.base.mix.items():
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
    accuracy = metrics.dynamics([found[q.id] for q in run.base_validation], 1)["greedy_accuracy"]
    text = "base, step %d: greedy %.1f%% on validation; training ends at %.1f%%"
    log.info(text, cursor, 100 * accuracy, 100 * c.target)
    return accuracy >= c.target
