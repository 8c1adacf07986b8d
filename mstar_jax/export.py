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
from typing import Any

import absl.logging
import jax
import ml_collections

from mstar_jax import configure, sharding
from mstar_jax.models import vlm
from mstar_jax.training.checkpoint import Checkpoints


def restore(workdir: pathlib.Path, stage: str = "", mesh: Any = None) -> tuple[Any, str, Any]:
    """Reads a stage's parameters back.

    Args:
      workdir: of a run.
      stage: which policy, or `prm`; empty for the last policy whose training is complete.
      mesh: where they go; None for the first device.

    Returns:
      The run's policy (`models.Pretrained` or `models.FromScratch`), the stage's name, the parameters.

    Raises:
      ValueError: there is no such run or stage.
    """
    policy, stage = policy_of(workdir), finished(workdir, stage)
    abstract = jax.eval_shape(policy.build)
    if stage == "prm":
        abstract = jax.eval_shape(vlm.RewardModel, abstract)
    mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
    layout = sharding.shardings(abstract, sharding.TRAIN, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, layout)
    return policy, stage, Checkpoints(workdir / "checkpoints").params(stage, abstract)


def policy_of(workdir: pathlib.Path) -> Any:
    """A run's policy, without its parameters.

    Raises:
      ValueError: there is no such run.
    """
    if not (workdir / "config.json").exists():
        raise ValueError(f"{workdir} is no run: it holds no config.json")
    config = ml_collections.ConfigDict(json.loads((workdir / "config.json").read_text()))
    try:
        return configure.make_policy(config, workdir)
    except (AttributeError, KeyError) as error:
        raise ValueError(
            f"{workdir}/config.json has other keys than this version of mstar_jax ({error}): "
            "use the version that wrote it"
        ) from error


def finished(workdir: pathlib.Path, stage: str = "") -> str:
    """The stage itself if its training is complete; for '' the last policy's.

    Raises:
      ValueError: it is not.
    """
    done = {path.parent.name for path in (workdir / "checkpoints").glob("*/done.json")}
    first = ("base", "prm", "warmup")  # the default is the last policy, never the reward model
    found = [*(name for name in first if name in done), *sorted(done - set(first))]
    if not found or (stage and stage not in found):
        there = ", ".join(found) or "none"
        raise ValueError(f"{workdir}: no finished training of {stage or 'any stage'}; there is {there}")
    return stage or found[-1]


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
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there and not empty: nothing is overwritten")
    policy, stage, params = restore(workdir, stage)
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
