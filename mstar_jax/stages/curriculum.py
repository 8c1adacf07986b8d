"""curriculum: which labelled queries an iteration asks, by what earlier responses to them say.

<workdir>/rollouts/<stage>/pass_rates.json    by query, the share of its responses that are right
"""

import json
from collections.abc import Sequence

from mstar_jax import processes
from mstar_jax.data import splits
from mstar_jax.inference.generate import ask, plan
from mstar_jax.rewards import selection
from mstar_jax.stages.generate import stored
from mstar_jax.stages.run import Run
from mstar_jax.store import read_json, write_text
from mstar_jax.structs import Query, Response, Stage


def next_queries(run: Run, t: int) -> list[Query]:
    """The labelled queries of iteration t: a share `evolve.fraction` of them, by `evolve.curriculum`. They
    depend on the seed and on what is stored of the stages before, nothing else: a restart asks the same."""
    c = run.config.evolve
    if c.curriculum == "uniform":
        return splits.share(run.labelled, c.fraction, t, run.seed)  # the next ones of an epoch
    return splits.informative(
        askable(run),
        c.fraction,
        t,
        run.seed,
        known=measured(run, t),
        bounds=tuple(c.informative),
        remeasure=c.remeasure,
    )


def askable(run: Run) -> list[Query]:
    """The labelled queries whose prompts fit. Others get no response, so they would count as never measured
    for ever, and take the places that are kept for such queries."""
    prompts = plan(run, ask(run.labelled, run.template), "curriculum")
    return [query for query, prompt in zip(run.labelled, prompts, strict=True) if prompt is not None]


def worth(run: Run, stage: Stage) -> dict[str, object]:
    """For an iteration's record, what its choice of queries was worth (`splits.spared`); empty if uniform."""
    c = run.config.evolve
    if c.curriculum == "uniform" or not stage.number:
        return {}
    known, bounds = measured(run, stage.number), tuple(c.informative)
    found = splits.spared(askable(run), pass_rates(run, stage), c.k, known=known, bounds=bounds)
    return {"curriculum": found}


def measured(run: Run, t: int) -> dict[str, splits.Measured]:
    """By query, the last pass rate before iteration t: of responses in an iteration, or to the reward model's
    queries. The warm-up's rationales say nothing: their prompts show the answer."""
    stages = [Stage.reward_model, *(Stage.iteration(number) for number in range(1, t))]
    return {
        query: splits.Measured(stage.place, rate)
        for stage in stages
        for query, rate in pass_rates(run, stage).items()
    }


def pass_rates(run: Run, stage: Stage) -> dict[str, float]:
    """The pass rates of a stage whose rollouts are complete; empty where it has none. They are kept in its
    store, so that responses are read once."""
    folder = run.workdir / "rollouts" / stage.name
    if not folder.exists():
        return {}
    path = folder / "pass_rates.json"
    with processes.first_alone(f"{stage}: pass rates"):
        if processes.first() and not path.exists():
            rates = {query: _rate(group) for query, group in stored(run, stage.name).items() if group}
            write_text(path, json.dumps(rates, indent=0))
    processes.visible(path.exists, path)
    return read_json(path)


def _rate(group: Sequence[Response]) -> float:
    return sum(map(selection.is_correct, group)) / len(group)
