"""From the config's values to what a run works with: checks, policy, optimizer and data."""

import json
import logging
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import optax
import transformers
from flax import nnx

from mstar_jax import sharding, train
from mstar_jax.data import figures, mathv360k, prompts
from mstar_jax.models import phi35
from mstar_jax.models.layers import DecoderConfig
from mstar_jax.models.vision import VitConfig
from mstar_jax.store import write_text
from mstar_jax.structs import Query

log = logging.getLogger(__name__)


def check(config: ml_collections.ConfigDict, mesh: Any) -> None:
    """Refuses impossible values before anything is compiled or written.

    Raises:
      ValueError: with the value and what it may be.
    """
    c = config
    for name in ("base", "warmup", "evolve"):
        sharding.check_divides(f"{name}.batch", c[name].batch, mesh, c.train.accumulate)
    sharding.check_divides("sampling.batch", c.sampling.batch, mesh)
    for template in c.prompts.values():
        prompts.check(template)
    choices: list[tuple[str, Any, tuple[str, ...]]] = [
        ("evolve.data", c.evolve.data, ("rollouts", "answers", "warmup")),
        ("evolve.start", c.evolve.start, ("last", "initial")),
        ("train.remat", c.train.remat, tuple(sorted(train.REMAT))),
    ]
    for name, value, known in choices:
        if value not in known:
            raise ValueError(f"{name} = {value!r}: choose one of {known}")
    if c.evolve.keep_checkpoints < 2:
        kept = c.evolve.keep_checkpoints
        raise ValueError(
            f"evolve.keep_checkpoints = {kept}: a restart needs 2, an iteration starts from the last"
        )


def schedule_values(settings: ml_collections.ConfigDict) -> tuple[float, int, int, float]:
    """Peak, steps, warm-up steps and final fraction of a stage's schedule; one for all iterations that
    inherit it."""
    rounds = settings.iterations if "iterations" in settings and not settings.reset else 1
    return settings.learning_rate, settings.steps * rounds, settings.warmup_steps, settings.final_fraction


def optimizer(
    settings: ml_collections.ConfigDict, values: ml_collections.ConfigDict
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """A stage's optimizer and schedule, from its settings and `config.train`."""
    schedule, v = train.make_schedule(*schedule_values(settings)), values
    how = {"b1": v.b1, "b2": v.b2, "weight_decay": v.weight_decay, "clip": v.clip}
    return train.make_optimizer(schedule, **how, frozen=tuple(v.frozen)), schedule


def base_examples(
    config: ml_collections.ConfigDict, base: Sequence[figures.BaseExample], encode: Callable[[str], list[int]]
) -> dict[str, list[tuple[Query, str, tuple[tuple[int, ...], ...]]]]:
    """(query, prompt, responses) of the narrow set by mode: captions, arithmetic, and a few hundred
    examples asked in three ways (reason, rationalise a given answer, answer at once)."""
    modes: dict[str, list] = {mode: [] for mode in config.base.mix}
    for example in base:
        query, response = example.query, tuple(encode(example.response))
        if example.mode != "cot":
            modes[example.mode].append((query, query.question, (response,)))
            continue
        answer = tuple(encode(f"{figures.ANSWER} {query.answer}"))
        for mode, target in (("cot", response), ("hint", response), ("direct", answer)):
            modes[mode].append((query, prompts.render(config.prompts[mode], query), (target,)))
    return modes


def build_policy(policy: phi35.Phi35Config, seed: int) -> phi35.Phi35Vision:
    """The policy, freshly initialised."""
    return phi35.Phi35Vision(policy, nnx.Rngs(seed))


def policy_config(values: ml_collections.ConfigDict) -> phi35.Phi35Config:
    """The policy's dimensions from the config's values."""
    heads, width = values.decoder.num_heads, values.decoder.hidden_size
    ones = (1.0,) * (width // heads // 2)
    decoder = DecoderConfig(
        vocab_size=values.vocab_size,
        head_dim=width // heads,
        short_factor=ones,
        long_factor=ones,
        **values.decoder,
    )
    return phi35.Phi35Config(decoder, VitConfig(**values.vision), values.num_crops)


def make_processor(
    config: ml_collections.ConfigDict, base: Sequence[figures.BaseExample], folder: pathlib.Path
) -> phi35.Phi35Processor:
    """Makes the tokenizer from the narrow set's text, once, and loads it as any HF tokenizer."""
    policy = policy_config(config.policy)
    if not (folder / "tokenizer.json").exists():
        modes = base_examples(config, base, lambda response: [])
        asked = [prompt for examples in modes.values() for _, prompt, _ in examples]
        phi35.make_tokenizer([*asked, *(e.response for e in base)], folder, config.policy.vocab_size)
    return phi35.Phi35Processor(policy, transformers.AutoTokenizer.from_pretrained(os.fspath(folder)))


def load_data(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Reads (and where it is the embedded one, makes) the data set.

    Returns:
      labelled, validation and test queries; base and base_validation, the narrow set.
    """
    c = config.data
    folder = figures.make(workdir / "figures", seed=c.seed, **c.figures)
    base, base_validation = figures.read_base(folder), _read(folder / "validation.json", folder)
    own = {"base": base, "base_validation": base_validation[: config.base.check_queries]}
    if not c.labelled:
        labelled, test = _read(folder / "train.json", folder), _read(folder / "test.json", folder)
        return own | {"labelled": labelled, "validation": base_validation[: c.validation], "test": test}
    queries = _read(pathlib.Path(c.labelled), pathlib.Path(c.root or pathlib.Path(c.labelled).parent))
    held_out = {"validation": min(c.validation, len(queries) // 8), "test": min(c.test, len(queries) // 4)}
    splits = mathv360k.split(queries, seed=c.seed, **held_out)
    write_text(workdir / "splits.json", _ids(splits))
    for name, part in splits.items():
        log.info("%s: %d queries", name, len(part))
    return own | splits


def _ids(splits: dict[str, list[Query]]) -> str:
    return json.dumps({name: [q.id for q in part] for name, part in splits.items()}, indent=1)


def _read(path: pathlib.Path, root: pathlib.Path) -> list[Query]:
    queries, report = mathv360k.read(path, root)
    (log.warning if report.dropped else log.info)("%s", report)
    if not queries:
        raise ValueError(f"{path}: no usable row; images are looked for under {root} (data.root)")
    return queries
