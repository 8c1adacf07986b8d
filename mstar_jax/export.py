"""A run's policy, or its reward model, as a Hugging Face checkpoint.

    python -m mstar_jax.export --workdir=runs/phi35 --output=/checkpoints/phi35-evolved [--stage=warmup]
    python -m mstar_jax.export --workdir=runs/phi35 --output=/checkpoints/phi35-prm --stage=prm

Weights go out under the official names, in the files and dtypes of the checkpoint that the run started
from; its config, generation_config, tokenizer and processor files are taken along unchanged. A reward model
is a policy's checkpoint with one file more, reward_head.safetensors; `prm.path` of a config takes it.
"""

import argparse
import json
import pathlib
import sys

import absl.logging
import jax
import ml_collections

from mstar_jax import setup, sharding
from mstar_jax.checkpoint import Checkpoints
from mstar_jax.models import vlm


def export(workdir: pathlib.Path, output: pathlib.Path, stage: str = "") -> str:
    """Writes a stage's policy.

    Args:
      workdir: of a run.
      output: a new or empty folder.
      stage: which policy, or `prm`; empty for the last policy whose training is complete.

    Returns:
      The stage's name.

    Raises:
      ValueError: there is no such run or stage, or `output` holds something.
    """
    if not (workdir / "config.json").exists():
        raise ValueError(f"{workdir} is no run: it holds no config.json")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there and not empty: nothing is overwritten")
    values = json.loads((workdir / "config.json").read_text())
    config = ml_collections.ConfigDict(values)
    done = {path.parent.name for path in (workdir / "checkpoints").glob("*/done.json")}
    first = ("base", "prm", "warmup")  # the default is the last policy, never the reward model
    finished = [*(name for name in first if name in done), *sorted(done - set(first))]
    if not finished or (stage and stage not in finished):
        there = ", ".join(finished) or "none"
        raise ValueError(f"{workdir}: no finished training of {stage or 'any stage'}; there is {there}")
    stage = stage or finished[-1]
    policy = setup.make_policy(config, workdir)
    abstract = jax.eval_shape(policy.build)
    if stage == "prm":
        abstract = jax.eval_shape(vlm.RewardModel, abstract)
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    layout = sharding.shardings(abstract, sharding.TRAIN, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout)
    params = Checkpoints(workdir / "checkpoints").params(stage, abstract)
    policy.save(params, output)
    return stage


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a run's policy as a Hugging Face checkpoint.")
    parser.add_argument("--workdir", required=True, help="a run of mstar_jax.main")
    parser.add_argument("--output", required=True, help="the folder to write; new or empty")
    parser.add_argument(
        "--stage", default="", help="base, warmup, prm, iteration_07; default the last policy"
    )
    args = parser.parse_args()
    absl.logging.set_verbosity(absl.logging.WARNING)  # Orbax reports through absl
    output = pathlib.Path(args.output)
    try:
        stage = export(pathlib.Path(args.workdir), output, args.stage)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    names = ", ".join(sorted(path.name for path in output.iterdir()))
    print(f"{stage} of {args.workdir} -> {output.absolute()}: {names}")
    how = (
        f"models.Pretrained({str(output)!r}).load_reward()"
        if stage == "prm"
        else f"models.load({str(output)!r})"
    )
    print(f"load it with mstar_jax.{how}")


if __name__ == "__main__":
    main()
