"""Training methods: what each of them changes in the config of a policy.

    python -m mstar_jax.main --config=configs/phi35.py:rest_em ...

`ablate` builds the rows of the paper's tables from the same entries.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

Values = dict[str, Any]  # values by dotted key, e.g. {"evolve.keep": 0}


class Times(NamedTuple):
    """A value in place of a number: the config's own, times this."""

    factor: float


ALL_CORRECT: Values = {  # trains on all correct responses, without a reward model
    "evolve.select": "random",
    "evolve.keep": 0,
    "prm.queries": 0,
    "explore.every": 0,
}
POLICY_GRADIENT: Values = {"evolve.learning_rate": Times(0.1)}  # see docs/objectives.md
NEW_OPTIMIZER: Values = {"evolve.reset_moments": True, "evolve.reset_schedule": True}

VARIANTS: dict[str, Values] = {
    "mstar": {},
    "continuous": ALL_CORRECT,
    "random_2": ALL_CORRECT | {"evolve.keep": 2},
    "iterative_rft": ALL_CORRECT | NEW_OPTIMIZER | {"evolve.fraction": 1.0},
    "rest_em": ALL_CORRECT | NEW_OPTIMIZER | {"evolve.fraction": 1.0, "evolve.start": "warmup"},
    "sft": ALL_CORRECT | {"evolve.data": "answers"},  # the labelled answers themselves, without rollouts
    "control": ALL_CORRECT | {"evolve.data": "warmup"},  # the same steps, without new rollouts
    # right and wrong responses by their advantage, without a reward model; and with its steps' rewards
    "rloo": ALL_CORRECT | POLICY_GRADIENT | {"evolve.objective": "reinforce"},
    "grpo": ALL_CORRECT | POLICY_GRADIENT | {"evolve.objective": "grpo"},
    "grpo_process": POLICY_GRADIENT
    | {
        "evolve.objective": "grpo",
        "evolve.process_weight": 0.2,
        "evolve.keep": 0,
        "explore.every": 0,
    },
    "smoke": {  # all stages, shrunk to see that they run
        "data.figures.train": 128,
        "data.figures.unlabelled": 8,
        "data.figures.validation": 64,
        "data.figures.test": 64,
        "data.figures.captions": 128,
        "data.figures.arithmetic": 100,
        "data.figures.instruct": 64,
        "data.validation": 32,
        "base.steps": 60,
        "base.learning_rate": 3e-3,
        "base.target": 0.0,
        "base.check_from": 50,
        "base.check_queries": 32,
        "warmup.queries": 64,
        "warmup.steps": 6,
        "warmup.warmup_steps": 2,
        "evolve.iterations": 2,
        "evolve.k": 4,
        "evolve.steps": 6,
        "evolve.warmup_steps": 2,
        "prm.queries": 24,
        "prm.held_out": 8,
        "prm.k": 4,
        "prm.labelled": 12,
        "prm.completions": 2,
        "prm.samples": 16,
        "prm.steps": 6,
        "prm.warmup_steps": 2,
        "explore.temperatures": (0.5, 1.0),
        "explore.samples": 2,
        "explore.queries": 16,
        "eval.samples": 4,
        "eval.k": 4,
        "train.save_every": 5,
    },
}


def resolve(config: ConfigDict, changes: Mapping[str, Any]) -> Values:
    """The changes as plain values, with what follows from a new `evolve.fraction`.

    A method that samples for other shares of the queries sees as many queries and takes as many steps in all:
    evolve.iterations and evolve.steps are those of the config (or of the changes) for its own fraction.

    Raises:
      ValueError: the queries seen in all cannot be divided into iterations with the new fraction.
    """
    values = {
        key: value.factor * functools.reduce(getattr, key.split("."), config)
        if isinstance(value, Times)
        else value
        for key, value in changes.items()
    }
    before = config.evolve.fraction
    after = values.get("evolve.fraction", before)
    if after == before:
        return values
    iterations = values.get("evolve.iterations", config.evolve.iterations)
    steps = values.get("evolve.steps", config.evolve.steps)
    passes = iterations * before
    count = round(passes / after)
    if not math.isclose(count * after, passes):
        raise ValueError(
            f"evolve.fraction = {after}: evolve.iterations x evolve.fraction = {iterations} x {before} = "
            f"{passes:g} passes over the queries cannot be divided into iterations of this size"
        )
    return values | {"evolve.iterations": count, "evolve.steps": iterations * steps // max(count, 1)}


def apply(config: ConfigDict, variant: str, own: Mapping[str, Values] | None = None) -> ConfigDict:
    """Changes a policy's config to a variant's, and returns it.

    Args:
      config: the policy's values for M-STaR.
      variant: one of VARIANTS or of `own`.
      own: what the policy changes beyond that, by variant.

    Raises:
      ValueError: there is no such variant, or see `resolve`.
    """
    own = own or {}
    if variant not in VARIANTS | dict(own):
        known = ", ".join(VARIANTS | dict(own))
        raise ValueError(f"unknown variant {variant!r}: choose one of {known}")
    changes = VARIANTS.get(variant, {}) | own.get(variant, {})
    config.update_from_flattened_dict(resolve(config, changes))
    return config
