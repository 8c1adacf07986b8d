"""The rows of the ablations' tables: what each of them changes in the config of a policy (see `ablate`)."""

from typing import NamedTuple

from ml_collections import ConfigDict

from configs.variants import NEW_OPTIMIZER, VARIANTS, Values, resolve


class Row(NamedTuple):
    """A row of a table.

    Attributes:
      name: of its folder.
      title: in the tables.
      values: what it changes in the config: a variant's values, and what differs from the variant.
      paper: accuracy on MathV360K and MathVista in the paper, %, with MiniCPM-V-2.5; "-" where it has none.
    """

    name: str
    title: str
    values: Values
    paper: tuple[float | str, float] | None = None


class Table(NamedTuple):
    """A table.

    Attributes:
      title: its heading.
      against: name of the row that the others are compared with.
      rows: from top to bottom.
    """

    title: str
    against: str
    rows: tuple[Row, ...]


CONTINUOUS = VARIANTS["continuous"]
ADAPTIVE = {"explore.adapt": True, "explore.every": 2}
RANDOM_2 = VARIANTS["random_2"]
NEW_MOMENTS: Values = {"evolve.reset_moments": True}
NEW_SCHEDULE: Values = {"evolve.reset_schedule": True}
CONSTANT: Values = {"evolve.final_fraction": 1.0}
TRUE_ANSWERS: Values = {"evolve.unlabelled.mixin": 0.0, "evolve.unlabelled.oracle": True}


def every(fraction: float) -> Values:
    """The share of the labelled queries in an iteration."""
    return {"evolve.fraction": fraction}


def top(select: str) -> Values:
    """Top-2 by something other than the reward model."""
    return {"evolve.select": select, "prm.queries": 0}


def votes(mixin: float) -> Values:
    """Unlabelled queries with voted answers, from this fraction of the iterations on."""
    return {"evolve.unlabelled.mixin": mixin}


TABLES_BY_NUMBER = {
    "1": Table("Table 1: training methods (no reward model)", "continuous_25", (
        Row("sft", "SFT", VARIANTS["sft"], (44.3, 54.8)),
        Row("iterative_rft", "Iterative RFT", VARIANTS["iterative_rft"], (42.3, 55.7)),
        Row("rest_em", "ReST^EM", VARIANTS["rest_em"], (42.3, 55.1)),
        Row("continuous_100", "Continuous, 100 %", CONTINUOUS | every(1.0), (42.2, 56.7)),
        Row("continuous_50", "Continuous, 50 %", CONTINUOUS | every(0.5), (43.1, 56.2)),
        Row("continuous_25", "Continuous, 25 %", CONTINUOUS | every(0.25), (43.1, 57.2)),
        Row("continuous_12", "Continuous, 12.5 %", CONTINUOUS | every(0.125), (42.3, 56.1)),
        Row("continuous_6", "Continuous, 6.25 %", CONTINUOUS | every(0.0625), (41.0, 56.8)),
    )),
    "2": Table("Table 2: selection of the correct responses (continuous, 25 %)", "random_2", (
        Row("continuous_25", "no PRM: all correct", CONTINUOUS | every(0.25), (43.1, 57.2)),
        Row("random_2", "Random-2", RANDOM_2, (41.0, 55.5)),
        Row("above", "PRM > 0.25", {"evolve.keep": 0, "evolve.threshold": 0.25}, (43.8, 57.5)),
        Row("top_1", "PRM Top-1", {"evolve.keep": 1}, (43.0, 59.0)),
        Row("top_2", "PRM Top-2", {}, (45.3, 59.2)),
        Row("top_4", "PRM Top-4", {"evolve.keep": 4}, (44.0, 58.4)),
        Row("likelihood_2", "likelihood under the warm-up policy, Top-2", top("likelihood")),
        Row("frequency_2", "most frequent, Top-2", top("frequency")),
        Row("oracle_2", "true steps of the generator, Top-2", top("oracle")),
        Row("adaptive", "PRM Top-2, adaptive T (M-STaR)", ADAPTIVE, ("-", 59.5)),
    )),
    "3": Table("Table 3: unlabelled queries (continuous, 25 %)", "top_2", (
        Row("continuous_25", "labelled only, no PRM", CONTINUOUS | every(0.25), (43.1, 57.2)),
        Row("top_2", "labelled only, PRM", {}, (45.3, 59.2)),
        Row("oracle_mix", "true answers, no PRM, from 0 %", CONTINUOUS | TRUE_ANSWERS, (42.5, 58.2)),
        Row("oracle_mix_prm", "true answers, PRM, from 0 %", TRUE_ANSWERS, (42.9, 59.1)),
        Row("mix_0", "votes, PRM, from 0 %", votes(0.0), (43.3, 58.2)),
        Row("mix_25", "votes, PRM, from 25 %", votes(0.25), (42.4, 57.6)),
        Row("mix_50", "votes, PRM, from 50 %", votes(0.5), (42.9, 58.2)),
        Row("mix_75", "votes, PRM, from 75 %", votes(0.75), (45.0, 58.8)),
    )),
    "4": Table("Continuous training, one part at a time (Random-2, 25 %)", "random_2", (
        Row("random_2", "moments and schedule carried on, cosine over the run", RANDOM_2),
        Row("new_moments", "new moments, cosine over the run", RANDOM_2 | NEW_MOMENTS),
        Row("new_schedule", "moments carried on, a cosine in each iteration", RANDOM_2 | NEW_SCHEDULE),
        Row("new_both", "new moments, a cosine in each iteration", RANDOM_2 | NEW_OPTIMIZER),
        Row("constant", "moments carried on, constant rate", RANDOM_2 | CONSTANT),
        Row("constant_new_moments", "new moments, constant rate", RANDOM_2 | CONSTANT | NEW_MOMENTS),
    )),
    "5": Table("Table 5: objectives and curricula, on as many rollouts and in as many steps", "top_2", (
        Row("top_2", "SFT on the PRM's Top-2 (M-STaR, T = 1)", {}),
        Row("continuous_25", "SFT on all correct", CONTINUOUS | every(0.25)),
        Row("rloo", "RLOO", VARIANTS["rloo"]),
        Row("grpo", "GRPO", VARIANTS["grpo"]),
        Row("grpo_process", "GRPO, with the PRM's steps", VARIANTS["grpo_process"]),
        Row("informative", "PRM's Top-2, informative queries", {"evolve.curriculum": "informative"}),
    )),
}  # fmt: skip
SHARED = Row("shared", "warm-up", {"evolve.iterations": 0}, (38.8, 52.6))


def values_of(config: ConfigDict, row: Row, seed: int) -> Values:
    """What a row changes in the config, by key.

    All rows see as many queries and take as many optimizer steps in all as the config says.

    Raises:
      ValueError: that is impossible with the row's `evolve.fraction`.
    """
    values: Values = {"seed": seed, "data.seed": seed, "explore.adapt": False, "explore.every": 0}
    if config.data.figures.train:  # as many queries without answers as with them
        values["data.figures.unlabelled"] = config.data.figures.train
    try:
        values |= resolve(config, row.values)
    except ValueError as error:
        raise ValueError(f"{row.name}: {error}") from error
    iterations = values.get("evolve.iterations", config.evolve.iterations)
    return values | {"eval.every": max(1, iterations // 4)}
