"""generate: y_1 .. y_K ~ pi( . | x, o; T)."""

from collections.abc import Sequence

from mstar_jax.inference.generate import Groups, ask, sample
from mstar_jax.stages.policy import Policy
from mstar_jax.stages.run import Run
from mstar_jax.structs import Query, Stage


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
) -> Groups:
    """Samples K responses of every query, and judges them by the gold answer.

    Args:
      run: see `Run`.
      stage: what the responses are for; they are kept in `rollouts/<stage>`.
      policy: what is sampled from.
      queries: what is asked; one whose prompt does not fit gets no responses.
      temperature: of all K responses.
      k: how many.
      template: of the prompt; empty for the run's.
      part: tells several passes of a stage apart: `rollouts/<stage>_<part>`.
    """
    return respond(run, stage, policy, queries, [temperature] * k, template=template, part=part)


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
) -> Groups:
    """As `generate`, with a temperature for each response; 0 is greedy. See `sample` for batch and kind."""
    template = template or run.template
    return sample(
        run,
        pass_name(stage, part),
        lambda: policy.params,
        ask(queries, template),
        temperatures,
        settings={"prompt": template},
        iteration=stage.number,
        batch=batch,
        kind=kind,
    )


def pass_name(stage: Stage, part: str = "") -> str:
    """The name of a stage's pass in the stores."""
    return f"{stage}_{part}" if part else stage.name
