"""How often a policy of configs/smollm2.py describes a figure rightly, on figures that no run has seen.

    python benchmarks/describe_figures.py runs/base-cpu:base [CHECKPOINT ...] [--figures=400] [--show=10]

CHECKPOINT is a folder in SmolVLM's format, or a run and its stage. Each is asked in one of four wordings what
a figure shows, and answers greedily. Whatever the words of the answer, its claims are compared with what the
generator drew:

  whole     of the figures, those with all names and numbers right, and nothing else
  names     of the figures, those with the right names, whatever their numbers
  numbers   of all numbers of the figures, those given to their own name
"""

import argparse
import collections
import functools
import pathlib
import random
import tempfile
from collections.abc import Callable

import absl.logging
import jax
import jax.numpy as jnp

from configs import smollm2
from mstar_jax import configure, ranges, sharding
from mstar_jax.data import embedded, figures, truth
from mstar_jax.evaluate.__main__ import Checkpoint
from mstar_jax.inference.generate import Asked, inference, sample

SEED = 1_000_003  # no run's


def drawn(folder: pathlib.Path, count: int) -> list[embedded.BaseExample]:
    """New figures, each with what is asked and the description."""
    none = {"train": 8, "unlabelled": 0, "validation": 0, "test": 0, "arithmetic": 0, "instruct": 0}
    made = figures.make(folder / "figures", seed=SEED, captions=2 * count + 50, **none)  # a third ask less
    whole = [each for each in embedded.read_base(made) if each.query.question in figures.CAPTIONS]
    return whole[:count]


def kind_of(said: truth.Fact) -> str:
    """The kind of figure that a description is of."""
    name, _ = said[1]
    return "scenes" if " " in name else "bar charts" if name in truth.COLOURS else "price lists"


def judged(examples: list[embedded.BaseExample], said: Callable[[str], str]) -> dict[str, dict[str, float]]:
    """The table's rows by kind of figure: {"bar charts": {"figures": n, "whole": share, ...}, ...}.

    Args:
      examples: from `drawn`.
      said: (query id) -> the policy's text.
    """
    counts: dict[str, collections.Counter[str]] = {}
    for each in examples:
        right, claimed = truth.facts(each.response), truth.facts(said(each.query.id))
        pairs = set(claimed[1:]) if claimed[0] == "read" else set()
        count = counts.setdefault(kind_of(right), collections.Counter())
        count["figures"] += 1
        count["whole"] += claimed == right
        count["names"] += {name for name, _ in pairs} == {name for name, _ in right[1:]}
        count["all"] += len(right) - 1
        count["numbers"] += len(pairs & set(right[1:]))
    return {
        kind: {
            "figures": n["figures"],
            "whole": n["whole"] / n["figures"],
            "names": n["names"] / n["figures"],
            "numbers": n["numbers"] / n["all"],
        }
        for kind, n in sorted(counts.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--figures", type=int, default=400)
    parser.add_argument("--show", type=int, default=0, help="how many of the descriptions, chosen at random")
    parser.add_argument("--batch", type=int, default=16, help="figures at a time")
    args = parser.parse_args()
    absl.logging.set_verbosity(absl.logging.WARNING)
    config = smollm2.get_config()
    config.sampling.batch = args.batch
    mesh = sharding.make_mesh(**config.mesh)
    ranges.refuse(configure.sampling_problems(config, mesh))
    checkpoints = [Checkpoint(text) for text in args.checkpoints]  # a wrong one is told first
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        examples = drawn(folder, args.figures)
        asked = [Asked(each.query, each.query.question) for each in examples]
        print("| | figures | whole | names | numbers |\n|---|---:|---:|---:|---:|")
        for number, (text, checkpoint) in enumerate(zip(args.checkpoints, checkpoints)):
            host = inference(config, folder / str(number), checkpoint.processor(config))
            with jax.set_mesh(mesh):
                params = functools.partial(checkpoint.load, mesh, jnp.dtype(config.sampling.dtype))
                found = sample(
                    host,
                    "described",
                    params,
                    asked,
                    [0.0],
                    settings=checkpoint.identity,
                    longest=max(config.data.buckets),
                )
            texts = {query: responses[0].text for query, responses in found.items()}
            for kind, row in judged(examples, texts.__getitem__).items():
                shares = " | ".join(f"{100 * row[name]:.1f} %" for name in ("whole", "names", "numbers"))
                print(f"| {text}, {kind} | {row['figures']} | {shares} |")
            for each in random.Random(0).sample(examples, min(args.show, len(examples))):
                said = texts[each.query.id].strip()
                print(f"\n{each.query.question}\n  shown: {each.response}\n  said:  {said}")


if __name__ == "__main__":
    main()
