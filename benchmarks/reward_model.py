"""How well a run's reward model tells right steps from wrong ones, on questions that no run has seen.

    python benchmarks/reward_model.py runs/tiny [runs/other ...] [--queries=2000]

The warm-up policy of every run answers new questions, 16 times each at T = 1; the reward model and, as a
baseline, the warm-up policy's own likelihood score the distinct responses. Steps and responses are compared
within a query only, by what the data's generator knows:

  step       is this step, and all before it, right; pairs of the same query and step number
  all right  of the correct responses, which have all their steps right; pairs of the same query
"""

import argparse
import json
import pathlib
import tempfile

import absl.logging
import jax
import ml_collections

from mstar_jax import configure, sharding, sources
from mstar_jax.data import truth
from mstar_jax.inference.generate import ask, inference, sample
from mstar_jax.inference.score import score_with
from mstar_jax.stages.policy import policy_after
from mstar_jax.stages.reward_model import against_truth, own_scorer
from mstar_jax.stages.run import start
from mstar_jax.structs import Stage


def measure(workdir: pathlib.Path, fresh: pathlib.Path, count: int) -> dict[str, float]:
    config = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
    none = {"train": 2, "unlabelled": 2, "validation": 2, "captions": 2, "arithmetic": 2, "instruct": 2}
    make = configure.EMBEDDED[config.data.embedded]
    folder = make(fresh / config.data.embedded, seed=1_000_003, test=count, **none)
    run = start(config, workdir, {}, lambda: False)
    known = truth.read_truth(folder / "truth.jsonl")
    asked = ask(sources.read(folder / "test.json", folder)[:count], run.template)
    warmup = policy_after(run, Stage.warmup)
    with tempfile.TemporaryDirectory() as scratch:  # nothing is added to the run
        host = inference(config, pathlib.Path(scratch), run.processor)
        settings = {"prompt": run.template}
        found = sample(host, "fresh", lambda: warmup.params, asked, [1.0] * 16, settings=settings)
    asked = [each for each in asked if each.query.id in found]
    out = {"queries": len(found)}
    for name in ("prm", "likelihood"):
        scorer = own_scorer(run, likelihood=name == "likelihood")
        scored = score_with(run, scorer, scorer.load(), asked, found)
        values = against_truth(scored, known, config.prm.aggregate)
        out |= {f"{key} {name}": value for key, value in values.items()}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    parser.add_argument("--queries", type=int, default=2000)
    args = parser.parse_args()
    absl.logging.set_verbosity(absl.logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        for workdir in args.workdirs:
            jax.set_mesh(sharding.make_mesh())
            print(
                workdir,
                json.dumps(
                    {k: round(v, 4) for k, v in measure(workdir, pathlib.Path(scratch), args.queries).items()}
                ),
            )


if __name__ == "__main__":
    main()
