"""generate: y_1 .. y_K ~ pi( . | x, o; T)."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mstar_jax.inference.generate import Groups, ask, sample
from mstar_jax.rewards import custom
from mstar_jax.stages.policy import Policy
from mstar_jax.stages.run import Run
from mstar_jax.store import complete
from mstar_jax.structs import Query, Stage

log = logging.getLogger(__name__)


def generate(
    run: Run,
    stage: Stage,
    policy: Policy,
    queries: Sequence[Query],
    temperature: float,
    k: int,
    *,
    template: str = "",
    part: str = "",
    logprobs: bool = False,
) -> Groups:
    """Samples K responses of every query, and judges them by `config.reward`.

    Args:
      run: see `Run`.
      stage: what the responses are for; they are kept in `rollouts/<stage>`.
      policy: what is sampled from.
      queries: what is asked; one whose prompt does not fit gets no responses.
      temperature: of all K responses.
      k: how many.
      template: of the prompt; empty for the run's.
      part: tells several passes of a stage apart: `rollouts/<stage>_<part>`.
      logprobs: whether they keep the log probability of each token.
    """
    return respond(
        run, stage, policy, queries, [temperature] * k, template=template, part=part, logprobs=logprobs
    )


def respond(
    run: Run,
    stage: Stage,
    policy: Policy,
    queries: Sequence[Query],
    temperatures: Sequence[float],
    *,
    template: str = "",
    part: str = "",
    batch: int = 0,
    kind: str = "rollouts",
    logprobs: bool = False,
) -> Groups:
    """As `generate`, with a temperature for each response; 0 is greedy. See `sample` for batch and kind."""
    template = template or run.template
    return sample(
        run,
        pass_name(stage, part),
        lambda: policy.params,
        ask(queries, template),
        temperatures,
        settings={"prompt": template, **run.grading.identity},
        iteration=stage.number,
        batch=batch,
        kind=kind,
        judge=run.grading.judge,
        logprobs=logprobs,
    )


def pass_name(stage: Stage, part: str = "") -> str:
    """The name of a stage's pass in the stores."""
    return f"{stage}_{part}" if part else stage.name


def stored(run: Run, name: str) -> Groups:
    """The responses of a pass that is complete; none where there was no such pass."""
    folder = run.workdir / "rollouts" / name
    if not folder.exists():
        return {}
    store, shards = complete(folder)
    return store.groups(shards)


def failures(run: Run, stage: Stage, counted: Callable[[], Mapping[str, custom.Failures]]) -> dict[str, Any]:
    """For a stage's record, where a user's reward failed, by the kind of the responses; empty if it never
    did. They are counted only if there is such a reward."""
    found = counted() if custom.is_users(run.config.reward) else {}
    for kind, each in found.items():
        if each["failed"] and each["failed"] == each["responses"]:
            text = "%s: reward %s FAILED FOR EVERY ONE of its %d responses (%s): none counts as right"
            log.warning(text, stage, run.config.reward, each["failed"], kind)
    told = {kind: each for kind, each in found.items() if each["failed"]}
    return {"reward_failed": told} if told else {}
