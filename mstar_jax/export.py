"""A run's policy, or its reward model, as a Hugging Face checkpoint.

    python -m mstar_jax.export --workdir=runs/phi35 --output=/checkpoints/phi35-evolved [--stage=best]
    python -m mstar_jax.export --workdir=runs/phi35 --output=/checkpoints/phi35-prm --stage=prm

`--stage=best` is the iteration with the highest greedy accuracy on validation; a run keeps its checkpoint.

Weights go out under the official names, in the files and dtypes of the checkpoint that the run started
from; its config, tokenizer and processor files are copied unchanged. Servers (docs/export.md) have to end
responses where the policy was taught to and to write the prompts that it knows: generation_config.json gets
the stop tokens that it lacks, and a folder without a chat template the one that prompts were written with.
A reward model is a policy's checkpoint with one more file, reward_head.safetensors; `prm.path` of a config
takes it.
"""

import json
import pathlib

import jax.numpy as jnp
from absl import flags

from mstar_jax import cli, finished, sharding
from mstar_jax.cli import OUTPUT, WORKDIR
from mstar_jax.store import read_json, write_text
from mstar_jax.structs import Stage

STAGE = flags.DEFINE_string("stage", "", "base, warmup, prm, iteration_07, best; default the last policy.")


def export(workdir: pathlib.Path, output: pathlib.Path, stage: Stage | None = None) -> Stage:
    """Writes a stage's policy, or the reward model.

    Args:
      workdir: of a run.
      output: a new or empty folder.
      stage: which one; None for the last policy whose training is complete.

    Returns:
      The stage.

    Raises:
      ValueError: there is no such run or stage, `output` holds something, or a parameter is not finite.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty: nothing is overwritten")
    found = finished.restore(workdir, stage)
    named = sharding.named(found.params)
    if bad := [name for name, value in named.items() if not jnp.isfinite(value).all()]:
        raise ValueError(
            f"{workdir}: {found.stage} has values that are not finite in {len(bad)} of {len(named)} "
            f"parameters, such as {bad[0]}: its training diverged. Export an earlier stage with --stage"
        )
    found.policy.save(found.params, output)
    complete(found.policy, output)
    return found.stage


def complete(policy: finished.Policy, output: pathlib.Path) -> None:
    """Adds to an exported folder what servers need to know and its files do not say.

    Args:
      policy: what was exported.
      output: holds its config and tokenizer. generation_config.json keeps its values, and its `eos_token_id`
        the ids that it has.
    """
    path = output / "generation_config.json"
    there = read_json(path) if path.exists() else {}
    known = there.get("eos_token_id")
    ids = known if isinstance(known, list) else [] if known is None else [known]
    if missing := [int(token) for token in policy.processor().stop_ids if token not in ids]:
        write_text(path, json.dumps({**there, "eos_token_id": [*ids, *missing]}, indent=2) + "\n")
    template = getattr(policy.family.load_tokenizer(policy.folder), "chat_template", None)
    settings = output / "tokenizer_config.json"
    has = settings.exists() and read_json(settings).get("chat_template")
    if template and not (has or any(output.glob("chat_template.*"))):
        write_text(output / "chat_template.jinja", template)


def main(argv: list[str]) -> None:
    cli.start(argv)
    workdir, output = pathlib.Path(WORKDIR.value or ""), pathlib.Path(OUTPUT.value or "")
    with cli.explained():
        wanted = finished.stage_of(workdir, STAGE.value) if STAGE.value else None
        stage = export(workdir, output, wanted)
    names = ", ".join(sorted(path.name for path in output.iterdir()))
    print(f"{stage} of {workdir} -> {output.absolute()}: {names}")
    path = str(output)
    reward = stage == Stage.reward_model
    call = f"models.Pretrained({path!r}).load_reward()" if reward else f"models.load({path!r})"
    print(f"load it with mstar_jax.{call}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "output"])
    cli.main(main)
