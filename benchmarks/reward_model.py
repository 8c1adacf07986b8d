"""How well a run's reward model tells right steps from wrong ones, on questions that no run has seen.

    python benchmarks/reward_model.py runs/tiny [runs/other ...] [--queries=2000]

The warm-up policy of every run answers fresh questions, 16 times each at T = 1; the reward model and, as a
baseline, the warm-up policy's own likelihood score the different responses. Steps and responses are compared
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

from mstar_jax import configure, sharding
from mstar_jax.data import toy, truth
from mstar_jax.stages.reward_model import Reward
from mstar_jax.stages.run import Run


def measure(workdir: pathlib.Path, folder: pathlib.Path, count: int) -> dict[str, float]:
    config = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
    run = Run(config, workdir, {}, lambda: False)
    reward = Reward(run)
    reward.truth = truth.read_truth(folder / "truth.jsonl")
    queries = configure.read(folder / "test.json", folder)[:count]
    with tempfile.TemporaryDirectory() as scratch:  # nothing is added to the run
        run.workdir = pathlib.Path(scratch)
        found = run.generate("fresh", lambda: run.final("warmup"), queries, run.template, [1.0] * 16)
    out = {"queries": len(found)}
    for name, model in (("prm", reward.model), ("likelihood", reward.untrained_for_scoring())):
        scored = reward.scored(model, [q for q in queries if q.id in found], found)
        out |= {f"{key} {name}": value for key, value in reward.against_truth(scored).items()}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    parser.add_argument("--queries", type=int, default=2000)
    args = parser.parse_args()
    absl.logging.set_verbosity(absl.logging.WARNING)
    with tempfile.TemporaryDirectory() as scratch:
        none = {"train": 2, "unlabelled": 2, "validation": 2, "captions": 2, "arithmetic": 2, "instruct": 2}
        folder = toy.make(pathlib.Path(scratch) / "fresh", seed=1_000_003, test=args.queries, **none)
        for workdir in args.workdirs:
            jax.set_mesh(sharding.make_mesh())
            print(
                workdir,
                json.dumps({k: round(v, 4) for k, v in measure(workdir, folder, args.queries).items()}),
            )


if __name__ == "__main__":
    main()
