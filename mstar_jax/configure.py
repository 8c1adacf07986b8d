"""From the config's values to what a run works with: checks, policy, optimizer and data."""

import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import ml_collections
import optax

from mstar_jax import models, sharding
from mstar_jax.data import mathv360k, prompts, toy
from mstar_jax.evaluate import benchmarks
from mstar_jax.models import phi35
from mstar_jax.models.layers import ADAPTERS, DecoderConfig
from mstar_jax.models.vision import VitConfig
from mstar_jax.rewards import selection
from mstar_jax.store import write_text
from mstar_jax.structs import Query
from mstar_jax.training import step
from mstar_jax.training.optimizer import Schedule, make_optimizer, make_schedule

log = logging.getLogger(__name__)


CACHES = ("", "float32", "bfloat16", "float16", "int8")


def check_sampling(config: ml_collections.ConfigDict, mesh: Any) -> None:
    """Refuses settings with which nothing can be sampled.

    Raises:
      ValueError: with the setting and what it may be.
    """
    s = config.sampling
    sharding.check_divides("sampling.batch", s.batch, mesh)
    if not 0 < s.refill <= 1:
        raise ValueError(f"sampling.refill = {s.refill}: give a share of the batch, above 0 and at most 1")
    if s.shard < 1:
        raise ValueError(f"sampling.shard = {s.shard}: a file of rollouts holds at least 1 batch")
    if s.cache not in CACHES:
        raise ValueError(f"sampling.cache = {s.cache!r}: choose one of {CACHES}")


def check(config: ml_collections.ConfigDict, mesh: Any) -> None:
    """Refuses impossible values before anything is compiled or written.

    Raises:
      ValueError: with the value and what it may be.
    """
    c = config
    if not c.policy.path and "decoder" not in c.policy:
        raise ValueError("policy.path is not set: give a checkpoint's folder, --config.policy.path=/...")
    if not c.data.labelled and "figures" not in c.data:
        raise ValueError("data.labelled is not set: give a MathV360K file, --config.data.labelled=/...")
    trained = (
        "warmup",
        "evolve",
        *(() if c.policy.path else ("base",)),
        *(("prm",) if c.prm.queries else ()),
    )
    for name in trained:
        sharding.check_divides(f"{name}.batch", c[name].batch, mesh, c.train.accumulate)
    check_sampling(c, mesh)
    sharding.check_divides("prm.rows", c.prm.rows, mesh)
    sharding.check_divides("prm.batch", c.prm.batch, mesh)
    sharding.check_divides("explore.batch", c.explore.batch, mesh)
    for template in c.prompts.values():
        prompts.check(template)
    check_benchmarks(c)
    choices: list[tuple[str, Any, tuple[str, ...]]] = [
        ("evolve.data", c.evolve.data, ("rollouts", "answers", "warmup")),
        ("evolve.start", c.evolve.start, ("last", "initial")),
        ("train.remat", c.train.remat, tuple(sorted(step.REMAT))),
        ("train.lora.base_dtype", c.train.lora.base_dtype, ("float32", "bfloat16")),
        ("evolve.select", c.evolve.select, ("prm", "random", "likelihood", "frequency", "oracle")),
        ("prm.aggregate", c.prm.aggregate, tuple(selection.AGGREGATES)),
        ("explore.criterion", c.explore.criterion, ("reward_pass_at_2", "balance_score")),
    ]
    for name, value, known in choices:
        if value not in known:
            raise ValueError(f"{name} = {value!r}: choose one of {known}")
    if (c.evolve.data, c.evolve.select) == ("rollouts", "prm") and not (c.prm.queries or c.prm.path):
        raise ValueError("evolve.select = 'prm' needs a reward model: set prm.queries, or prm.path")
    if c.evolve.select == "oracle" and (c.data.labelled or "figures" not in c.data):
        raise ValueError("evolve.select = 'oracle' needs the embedded data set: only its steps are known")
    if c.evolve.threshold is not None and c.evolve.select not in ("prm", "likelihood"):
        raise ValueError(f"evolve.threshold is of the reward model's, not of {c.evolve.select!r} selection")
    if c.train.lora.rank < 0 or c.train.lora.alpha <= 0:
        raise ValueError(
            f"train.lora: rank = {c.train.lora.rank}, alpha = {c.train.lora.alpha}: a rank is 0 (no LoRA) or "
            "more, and alpha above 0"
        )
    if c.train.profile and not (len(c.train.profile) == 2 and 0 <= c.train.profile[0] < c.train.profile[1]):
        raise ValueError(f"train.profile = {c.train.profile}: give (first step, end), as in (10, 13), or ()")
    if c.prm.samples % c.prm.completions:
        raise ValueError(
            f"prm.samples = {c.prm.samples} has to be a multiple of prm.completions = {c.prm.completions}"
        )
    if 0 < c.eval.samples < c.eval.k:
        raise ValueError(
            f"eval.k = {c.eval.k}: Pass@k needs as many samples, eval.samples = {c.eval.samples}"
        )
    if c.evolve.keep_checkpoints < 2:
        kept = c.evolve.keep_checkpoints
        raise ValueError(
            f"evolve.keep_checkpoints = {kept}: a restart needs 2, an iteration starts from the last"
        )


def check_benchmarks(config: ml_collections.ConfigDict) -> None:
    """Refuses unknown benchmarks and prompts.

    Raises:
      ValueError: with those that there are.
    """
    b = config.benchmarks
    if unknown := sorted(set(b.names) - set(benchmarks.NAMES)):
        raise ValueError(f"benchmarks.names: {', '.join(unknown)}: there are {', '.join(benchmarks.NAMES)}")
    if b.prompt != "official" and b.prompt not in config.prompts:
        raise ValueError(f"benchmarks.prompt = {b.prompt!r}: choose official, {', '.join(config.prompts)}")


def schedule_values(settings: ml_collections.ConfigDict) -> tuple[float, int, int, float]:
    """Peak, steps, warm-up steps and final fraction of a stage's schedule; one for all iterations that
    inherit it."""
    rounds = settings.iterations if "iterations" in settings and not settings.reset_schedule else 1
    return settings.learning_rate, settings.steps * rounds, settings.warmup_steps, settings.final_fraction


def frozen(values: ml_collections.ConfigDict, stage: str = "") -> tuple[str, ...]:
    """Patterns of the parameters that a stage does not train, from `config.train`.

    With LoRA these are all of the policy's but its adapters. The base stage of a policy from scratch is the
    other way round: there is nothing to adapt yet, so the adapters wait, and add nothing.
    """
    patterns = list(values.frozen)
    if values.lora.rank:
        patterns.append(f"^{ADAPTERS}" if stage == "base" else f"^(?!{ADAPTERS})")
    inside = "^trunk." if stage == "prm" else "^"  # a reward model's own head is always trained
    return tuple(re.sub(r"^\^", inside, pattern) for pattern in patterns)


def base_dtype(values: ml_collections.ConfigDict) -> Any:
    """Of the parameters beside the adapters, from `config.train`."""
    return jnp.dtype(values.lora.base_dtype if values.lora.rank else "float32")


def optimizer(
    settings: ml_collections.ConfigDict, values: ml_collections.ConfigDict, stage: str = ""
) -> tuple[optax.GradientTransformation, Schedule]:
    """A stage's optimizer and schedule, from its settings and `config.train`.

    Args:
      settings: learning_rate, steps, warmup_steps, final_fraction.
      values: `config.train`.
      stage: see `frozen`.
    """
    schedule, v = make_schedule(*schedule_values(settings)), values
    how = {"b1": v.b1, "b2": v.b2, "weight_decay": v.weight_decay, "clip": v.clip}
    return make_optimizer(schedule, **how, frozen=frozen(values, stage)), schedule


def base_examples(
    config: ml_collections.ConfigDict, base: Sequence[toy.BaseExample], encode: Callable[[str], list[int]]
) -> dict[str, list[tuple[Query, str, tuple[tuple[int, ...], ...]]]]:
    """(query, prompt, responses) of the narrow set by mode: captions, arithmetic, and a few hundred
    examples asked in three ways (reason, rationalise a given answer, answer at once)."""
    modes: dict[str, list] = {mode: [] for mode in config.base.mix}
    for example in base:
        query, response = example.query, tuple(encode(example.response))
        if example.mode != "cot":
            modes[example.mode].append((query, query.question, (response,)))
            continue
        answer = tuple(encode(f"{toy.ANSWER} {query.answer}"))
        for mode, target in (("cot", response), ("hint", response), ("direct", answer)):
            modes[mode].append((query, prompts.render(config.prompts[mode], query), (target,)))
    return modes


def policy_config(values: ml_collections.ConfigDict) -> phi35.Phi35Config:
    """The dimensions of a policy from scratch, from the config's values."""
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


def adapted(dimensions: Any, values: ml_collections.ConfigDict) -> Any:
    """A policy's dimensions with the adapters that `config.train` asks for."""
    lora = values.get("lora")  # runs of before there was LoRA have none
    if not lora or not lora.rank:
        return dimensions
    how = {"lora_rank": lora.rank, "lora_alpha": lora.alpha}
    return dataclasses.replace(dimensions, decoder=dataclasses.replace(dimensions.decoder, **how))


def make_policy(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, base: Sequence[toy.BaseExample] = ()
) -> models.Pretrained | models.FromScratch:
    """The policy to start from: the checkpoint of `policy.path`, or one of the config's dimensions.

    The latter's tokenizer is made from the narrow set's text, once, and kept in the workdir.

    Raises:
      ValueError: the checkpoint is none of the three families.
    """
    values = config.policy
    if values.path:
        policy = models.Pretrained(values.path, max_crops=values.get("max_crops"))
        policy.config = adapted(policy.config, config.train)
        return policy
    folder = workdir / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        modes = base_examples(config, base, lambda response: [])
        asked = [prompt for examples in modes.values() for _, prompt, _ in examples]
        phi35.make_tokenizer([*asked, *(e.response for e in base)], folder, values.vocab_size)
    return models.FromScratch(phi35.FAMILY, adapted(policy_config(values), config.train), folder)


def load_data(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Reads (and where it is the embedded one, makes) the data set.

    Returns:
      labelled, unlabelled, validation and test queries, and `hidden`, the answers of the unlabelled ones by
      id; for a policy from scratch also base and base_validation, the narrow set.
    """
    c, own = config.data, dict[str, Any]()
    if not (c.labelled and config.policy.path):
        folder = toy.make(workdir / "figures", seed=c.seed, **c.figures)
        validation = read(folder / "validation.json", folder)
    if not config.policy.path:
        own = {"base": toy.read_base(folder), "base_validation": validation[: config.base.check_queries]}
    if not c.labelled:
        labelled, more, test = (read(folder / f"{s}.json", folder) for s in ("train", "unlabelled", "test"))
        own |= {"hidden": {q.id: q.answer for q in more}, "validation": validation[: c.validation]}
        more = [dataclasses.replace(q, answer=None) for q in more]
        return own | {"labelled": labelled, "unlabelled": more, "test": test}
    queries = read(pathlib.Path(c.labelled), pathlib.Path(c.root or pathlib.Path(c.labelled).parent))
    held_out = {"validation": min(c.validation, len(queries) // 8), "test": min(c.test, len(queries) // 4)}
    splits = mathv360k.split(queries, seed=c.seed, **held_out)
    write_text(workdir / "splits.json", _ids(splits))
    for name, part in splits.items():
        log.info("%s: %d queries", name, len(part))
    hidden = {q.id: q.answer for q in queries}
    return own | splits | {"hidden": {q.id: hidden[q.id] for q in splits["unlabelled"]}}


def _ids(splits: dict[str, list[Query]]) -> str:
    return json.dumps({name: [q.id for q in part] for name, part in splits.items()}, indent=1)


def read(path: pathlib.Path, root: pathlib.Path) -> list[Query]:
    """The usable rows of a MathV360K file; what is dropped is counted and logged.

    Raises:
      ValueError: none is usable.
    """
    queries, report = mathv360k.read(path, root)
    (log.warning if report.dropped else log.info)("%s", report)
    if not queries:
        raise ValueError(f"{path}: no usable row; images are looked for under {root} (data.root)")
    return queries
