"""From the values of a config to what a run works with: checks, policy, optimizer and data."""

import dataclasses
import logging
import math
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mstar_jax import models, ranges, sharding
from mstar_jax.data import embedded, figures, prompts, rows, splits, toy, truth
from mstar_jax.models import phi35
from mstar_jax.models.layers import ADAPTERS, DecoderConfig
from mstar_jax.models.vision import VitConfig
from mstar_jax.rewards import custom, selection
from mstar_jax.structs import Query, Stage
from mstar_jax.training import objectives, step
from mstar_jax.training.optimizer import Schedule, make_optimizer, make_schedule

log = logging.getLogger(__name__)

# ---- 1. checks ----------------------------------------------------------------------------------------


def check(config: ConfigDict, mesh: Mesh) -> None:
    """Refuses impossible values before anything is compiled or written.

    Raises:
      ValueError: with every such key, its value and what it may be.
    """
    ranges.refuse(problems(config, mesh))


def problems(config: ConfigDict, mesh: Mesh) -> list[str]:
    """What is impossible: each key, its value and what it may be."""
    return [*_sources(config), *impossible(config, mesh)]


def impossible(config: ConfigDict, mesh: Mesh) -> list[str]:
    """As `problems`, whether or not a checkpoint and data are named: what a plan has to ask."""
    found = [*_words(config), *_numbers(config), *_batches(config, mesh)]
    found += [*sampling_problems(config, mesh), *ranges.judging(config.prm, bool(config.prm.path))]
    for template in config.prompts.values():
        found += ranges.refusal(prompts.check, template)
    longest = {"data.max_prompt": config.data.max_prompt}
    longest |= {"sampling.max_new_tokens": config.sampling.max_new_tokens}
    found += ranges.lengths(config.data.buckets, longest)
    return [*found, *_schedules(config), *ranges.method(ranges.flat(config), _has_figures(config))]


def sampling_problems(config: ConfigDict, mesh: Mesh) -> list[str]:
    """Sampling settings with which nothing can be sampled."""
    s = config.sampling
    found = [*ranges.outside(ranges.flat(config), ranges.SAMPLING)]
    found += ranges.refusal(sharding.check_divides, "sampling.batch", s.batch, mesh)
    if not 0 < s.refill <= 1:
        found.append(f"sampling.refill = {s.refill}: must be a fraction of the batch, above 0, at most 1")
    if "" in s.stop_strings:
        found.append(f"sampling.stop_strings = {s.stop_strings!r}: an empty one would end every response")
    found += ranges.not_among("sampling.cache", s.cache, ("", *ranges.FLOATS, "int8"))
    return found + ranges.not_among("sampling.dtype", s.dtype, ranges.FLOATS)


def _sources(config: ConfigDict) -> Iterator[str]:
    """There is a policy and data."""
    if not config.policy.path and not _has_dimensions(config):
        yield "policy.path is not set: give a checkpoint's folder, --config.policy.path=/..."
    if not config.data.labelled and not _has_figures(config):
        yield "data.labelled is not set: give a file of questions, --config.data.labelled=/..."
    for key in ("validation_file", "test_file"):
        if config.data[key] and not config.data.labelled:
            yield f"data.{key} = {config.data[key]!r}: needs data.labelled; the embedded data has its own"


def _words(config: ConfigDict) -> Iterator[str]:
    """Values that are words."""
    c, choose = config, ranges.not_among
    yield from choose("evolve.data", c.evolve.data, ("rollouts", "answers", "warmup"))
    yield from choose("evolve.objective", c.evolve.objective, ("sft", *objectives.ADVANTAGES))
    yield from choose("tracker", c.tracker, ("", "wandb", "mlflow"))
    yield from choose("data.embedded", c.data.embedded, tuple(EMBEDDED))
    yield from ranges.refusal(custom.check, c.reward)
    yield from ranges.refusal(splits.check_choice, c.evolve.curriculum, c.evolve.informative, c.evolve.data)
    yield from choose("evolve.start", c.evolve.start, ("last", "warmup"))
    rules = ("prm", "random", "likelihood", *selection.RANKINGS, "oracle")
    yield from choose("evolve.select", c.evolve.select, rules)
    yield from choose("prm.aggregate", c.prm.aggregate, tuple(selection.AGGREGATES))
    yield from choose("explore.criterion", c.explore.criterion, ("reward_pass_at_2", "balance_score"))
    yield from choose("train.remat", c.train.remat, tuple(step.REMAT))
    yield from choose("train.dtype", c.train.dtype, ranges.FLOATS)
    yield from choose("train.lora.base_dtype", c.train.lora.base_dtype, ("float32", "bfloat16"))
    for text in (c.data.columns, c.warmup.columns, c.prm.columns):
        yield from ranges.refusal(rows.named, text)
    for kind in c.eval.test_at:
        yield from choose("eval.test_at", kind, ("base", "warmup", "iteration"))
    for pattern in c.train.frozen:
        try:
            re.compile(pattern)
        except re.error as error:
            yield f"train.frozen = {pattern!r}: no regular expression ({error})"


def _numbers(config: ConfigDict) -> Iterator[str]:
    """Values that are numbers."""
    c, values = config, ranges.flat(config)
    yield from ranges.outside(values, ranges.ALWAYS)
    if not c.policy.path and _has_dimensions(c):
        yield from ranges.outside(values, ranges.FROM_SCRATCH)
    if trains_base(c):
        yield from ranges.outside(values, ranges.BASE)
        if not any(share > 0 for share in c.base.mix.values()):
            yield "base.mix: one of its shares must be above 0"
    if not c.data.labelled and _has_figures(c):
        yield from ranges.outside(values, ranges.FIGURES)
    profile = c.train.profile
    if profile and not (len(profile) == 2 and 0 <= profile[0] < profile[1]):
        yield f"train.profile = {profile}: give (first step, end), as in (10, 13), or ()"
    if c.prm.completions > 0 and c.prm.samples % c.prm.completions:
        yield f"prm.samples = {c.prm.samples}: must be a multiple of prm.completions = {c.prm.completions}"
    if 0 < c.eval.samples < c.eval.k:
        yield f"eval.k = {c.eval.k}: Pass@k needs k samples, and eval.samples = {c.eval.samples}"
    temperatures = c.explore.temperatures
    if c.explore.every and not (temperatures and all(0 < t < math.inf for t in temperatures)):
        yield f"explore.temperatures = {temperatures}: give some, each above 0"


def _schedules(config: ConfigDict) -> Iterator[str]:
    """No warm-up of a learning rate is longer than its stage."""
    stages = ["warmup"]
    stages += ["base"] if trains_base(config) else []
    stages += ["align"] if trains_base(config) and config.align.steps > 0 else []
    stages += ["prm"] if trains_reward_model(config) else []
    stages += ["evolve"] if config.evolve.iterations > 0 else []
    for name in stages:
        values = config[name]
        if min(values.steps, values.warmup_steps) >= 0:
            for problem in ranges.refusal(schedule, values):
                yield f"{name}.warmup_steps = {values.warmup_steps}, {name}.steps = {values.steps}: {problem}"


def _batches(config: ConfigDict, mesh: Mesh) -> Iterator[str]:
    """Global batches can be divided among the devices."""
    c = config
    accumulate = max(c.train.accumulate, 1)
    sizes = [("base.batch", c.base.batch, accumulate)] if trains_base(c) else []
    sizes += [("align.batch", c.align.batch, accumulate)] if trains_base(c) and c.align.steps > 0 else []
    sizes += [
        ("warmup.batch", c.warmup.batch, accumulate),
        ("evolve.batch", c.evolve.batch, accumulate),
        ("prm.batch", c.prm.batch, accumulate if c.prm.queries or c.prm.data else 1),
        ("prm.score_batch", c.prm.score_batch or c.prm.batch, 1),
        ("prm.rows", c.prm.rows, 1),
        ("explore.batch", c.explore.batch, 1),
    ]
    for key, size, parts in sizes:
        yield from ranges.refusal(sharding.check_divides, key, size, mesh, parts)


def trains_base(config: ConfigDict) -> bool:
    """Whether the base policy is trained on narrow data first: one from scratch, or as `base.tune` says."""
    return bool(config.base.tune if config.policy.path else _has_dimensions(config))


def trains_reward_model(config: ConfigDict) -> bool:
    """Whether the run trains one: on steps that it labels itself, or on those of a file."""
    c = config
    return bool(c.prm.queries or c.prm.data) and not c.prm.path and c.evolve.select != "likelihood"


def _has_dimensions(config: ConfigDict) -> bool:
    """The config has a policy from scratch."""
    return config.policy.decoder.num_layers > 0


def _has_figures(config: ConfigDict) -> bool:
    """The config has an embedded data set."""
    return config.data.figures.train > 0


# ---- 2. training --------------------------------------------------------------------------------------


def optimizer(values: ConfigDict) -> optax.GradientTransformation:
    """The optimizer of all stages, from `config.train`."""
    return make_optimizer(b1=values.b1, b2=values.b2, weight_decay=values.weight_decay, clip=values.clip)


def schedule(settings: ConfigDict) -> Schedule:
    """A stage's learning rate schedule, from its section of the config.

    All iterations have one schedule, as long as all of them together, unless each starts its own.
    """
    carried_on = "iterations" in settings and not settings.reset_schedule
    return make_schedule(
        peak=settings.learning_rate,
        steps=settings.steps * (settings.iterations if carried_on else 1),
        warmup_steps=settings.warmup_steps,
        final_fraction=settings.final_fraction,
    )


def frozen(values: ConfigDict, stage: Stage | None = None) -> tuple[str, ...]:
    """Patterns of the parameters that a stage does not train, from `config.train`.

    With LoRA these are all parameters of the policy but its adapters. Until the base stage is done they are
    the adapters alone: there is nothing to adapt yet, so they keep their initial values, which have no
    effect. While a vision tower is aligned, the decoder is frozen.
    """
    patterns = list(values.frozen)
    if stage == Stage.align:
        patterns.append("^decoder")
    if values.lora.rank:
        patterns.append(f"^{ADAPTERS}" if stage in (Stage.align, Stage.base) else f"^(?!{ADAPTERS})")
    return tuple(patterns)


def base_dtype(values: ConfigDict) -> jnp.dtype:
    """The dtype of frozen parameters, from `config.train`."""
    return jnp.dtype(values.lora.base_dtype if values.lora.rank else "float32")


# ---- 3. policy ----------------------------------------------------------------------------------------


def policy_config(values: ConfigDict) -> phi35.Phi35Config:
    """The dimensions of a policy from scratch, from `config.policy`."""
    head_dim = values.decoder.hidden_size // values.decoder.num_heads
    ones = (1.0,) * (head_dim // 2)
    decoder = DecoderConfig(
        vocab_size=values.vocab_size,
        head_dim=head_dim,
        short_factor=ones,
        long_factor=ones,
        **values.decoder,
    )
    return phi35.Phi35Config(decoder, VitConfig(**values.vision), values.num_crops)


def adapted(dimensions: Any, values: ConfigDict) -> Any:
    """The dimensions of a policy (any family's config) with the LoRA adapters of `config.train`."""
    if not values.lora.rank:
        return dimensions
    decoder = dataclasses.replace(
        dimensions.decoder, lora_rank=values.lora.rank, lora_alpha=values.lora.alpha
    )
    return dataclasses.replace(dimensions, decoder=decoder)


def make_policy(
    config: ConfigDict, workdir: pathlib.Path, base: Sequence[embedded.BaseExample] | None = None
) -> models.Pretrained | models.FromScratch:
    """The policy to start from: the checkpoint of `policy.path`, or one with the config's dimensions.

    The tokenizer of the latter is trained once, on the text of `base`, and kept in the workdir.

    Raises:
      ValueError: the checkpoint is of no family of `models`, or a finished run has lost its tokenizer.
    """
    values = config.policy
    if values.path:
        policy = models.Pretrained(values.path, max_crops=values.max_crops)
        policy.config = adapted(policy.config, config.train)
        return policy
    folder = workdir / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        if base is None:
            raise ValueError(f"{folder}: the run's tokenizer is not there; restore it from a copy")
        modes = base_examples(config, base, lambda response: [])
        asked = [example.prompt for examples in modes.values() for example in examples]
        part = workdir / "tokenizer.part"  # whole, or not there
        phi35.make_tokenizer([*asked, *(e.response for e in base)], part, values.vocab_size)
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    return models.FromScratch(phi35.FAMILY, adapted(policy_config(values), config.train), folder)


# ---- 4. data ------------------------------------------------------------------------------------------

EMBEDDED = {"toy": toy.make, "figures": figures.make}


class Example(NamedTuple):
    """A query, the prompt that asks it, and the tokens of responses to train on."""

    query: Query
    prompt: str
    responses: tuple[tuple[int, ...], ...]


def base_examples(
    config: ConfigDict, base: Sequence[embedded.BaseExample], encode: Callable[[str], list[int]]
) -> dict[str, list[Example]]:
    """The narrow set by mode: captions, arithmetic, and examples that are asked in three ways (reason,
    rationalise a given answer, answer at once)."""
    modes: dict[str, list[Example]] = {mode: [] for mode in config.base.mix}
    for example in base:
        query = example.query
        response = tuple(encode(example.response))
        if example.mode != "cot":
            modes[example.mode].append(Example(query, query.question, (response,)))
            continue
        answer = tuple(encode(f"{truth.ANSWER} {query.answer}"))
        for mode, target in (("cot", response), ("hint", response), ("direct", answer)):
            prompt = prompts.render(config.prompts[mode], query)
            modes[mode].append(Example(query, prompt, (target,)))
    return modes
