"""What the numbers and words of a config may be, by key. Keys of a part that a run does not use may be
anything."""

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from mstar_jax.data import prompts

FLOATS = ("float32", "bfloat16", "float16")
COUNT = "[1, inf)"
SOME = "[0, inf)"  # or none
SHARE = "[0, 1]"
FEW = "(0, inf)"

# in the notation of intervals; a value that is None is not set
ALWAYS = {
    "seed": "[0, 2147483647]",
    "reward_seconds": "(0, 1000000]",  # poll takes milliseconds as a C int
    "policy.max_crops": COUNT,
    "data.seed": SOME,
    "data.labelled_share": "(0, 1]",
    "data.validation": COUNT,
    "data.test": COUNT,
    "data.max_prompt": COUNT,
    "data.workers": SOME,
    "warmup.queries": COUNT,
    "warmup.k": COUNT,
    "warmup.keep": SOME,
    "warmup.temperature": SOME,
    "warmup.steps": SOME,
    "warmup.learning_rate": SOME,
    "warmup.warmup_steps": SOME,
    "warmup.final_fraction": SHARE,
    "evolve.iterations": SOME,
    "evolve.fraction": "(0, 1]",
    "evolve.k": COUNT,
    "evolve.keep": SOME,
    "evolve.temperature": SOME,
    "evolve.steps": COUNT,
    "evolve.learning_rate": SOME,
    "evolve.warmup_steps": SOME,
    "evolve.final_fraction": SHARE,
    "evolve.remeasure": "[0, 0.5]",  # twice this share of an iteration: as much for queries never measured
    "evolve.keep_checkpoints": "[2, inf)",  # an iteration starts from the checkpoint of the one before
    "evolve.process_weight": SOME,
    "evolve.truncate": SOME,
    "evolve.clip_low": SHARE,
    "evolve.clip_high": SOME,
    "evolve.kl": SOME,
    "evolve.kl_queries": SOME,
    "evolve.unlabelled.mixin": SHARE,
    "evolve.unlabelled.threshold": SHARE,
    "evolve.unlabelled.weight": SOME,
    "prm.queries": SOME,
    "prm.held_out": SOME,
    "prm.labelled": SOME,
    "prm.k": COUNT,
    "prm.temperature": FEW,
    "prm.completions": COUNT,
    "prm.samples": COUNT,
    "prm.mc_weight": SOME,
    "prm.score_batch": SOME,
    "prm.longest": COUNT,
    "prm.chunk": COUNT,
    "prm.steps": SOME,
    "prm.learning_rate": SOME,
    "prm.warmup_steps": SOME,
    "prm.final_fraction": SHARE,
    "explore.every": SOME,
    "explore.alpha": SHARE,
    "explore.samples": COUNT,
    "explore.queries": COUNT,
    "train.b1": "[0, 1)",
    "train.b2": "[0, 1)",
    "train.weight_decay": SOME,
    "train.clip": SOME,
    "train.accumulate": COUNT,
    "train.lora.rank": SOME,
    "train.lora.alpha": FEW,
    "train.log_every": COUNT,
    "train.save_every": COUNT,
    "eval.samples": SOME,
    "eval.k": COUNT,
    "eval.temperature": SOME,
    "eval.every": COUNT,
    "eval.show": SOME,
    "benchmarks.limit": SOME,
    "benchmarks.samples": SOME,
    "benchmarks.temperature": SOME,
}
SAMPLING = {
    "sampling.places": SOME,
    "sampling.shard": COUNT,
    "sampling.max_new_tokens": COUNT,
    "sampling.top_k": SOME,
    "sampling.top_p": "(0, 1]",
    "sampling.min_p": SHARE,
}
FROM_SCRATCH = {
    "policy.vocab_size": COUNT,
    "policy.num_crops": COUNT,
    "policy.decoder.hidden_size": COUNT,
    "policy.decoder.intermediate_size": COUNT,
    "policy.decoder.num_heads": COUNT,
    "policy.decoder.num_kv_heads": COUNT,
    "policy.decoder.rope_theta": FEW,
    "policy.decoder.unroll": COUNT,
    "policy.vision.num_layers": COUNT,
    "policy.vision.hidden_size": COUNT,
    "policy.vision.intermediate_size": COUNT,
    "policy.vision.num_heads": COUNT,
    "policy.vision.image_size": COUNT,
    "policy.vision.patch_size": COUNT,
}
BASE = {
    "base.steps": COUNT,
    "base.learning_rate": SOME,
    "base.warmup_steps": SOME,
    "base.final_fraction": SHARE,
    "base.mix.caption": SOME,
    "base.mix.arithmetic": SOME,
    "base.mix.cot": SOME,
    "base.mix.hint": SOME,
    "base.mix.direct": SOME,
    "base.target": SHARE,
    "base.check_from": SOME,
    "base.check_every": COUNT,
    "base.check_queries": COUNT,
    "align.steps": SOME,
    "align.learning_rate": SOME,
    "align.warmup_steps": SOME,
    "align.final_fraction": SHARE,
}
FIGURES = {
    "data.figures.unlabelled": COUNT,
    "data.figures.validation": COUNT,
    "data.figures.test": COUNT,
    "data.figures.captions": SOME,
    "data.figures.arithmetic": SOME,
    "data.figures.instruct": SOME,
}


def flat(values: Mapping[str, object], start: str = "") -> dict[str, object]:
    """Nested values by their dotted keys."""
    found: dict[str, object] = {}
    for key, value in values.items():
        if hasattr(value, "items"):
            found |= flat(value, f"{start}{key}.")  # type: ignore[arg-type]
        else:
            found[start + key] = value
    return found


def outside(values: Mapping[str, object], intervals: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with numbers: the key, its value and what it may be.

    Args:
      values: by dotted key.
      intervals: by dotted key, such as `(0, 1]`; `inf` and NaN are in none.
    """
    for key, interval in intervals.items():
        if values[key] is not None and not _within(values[key], interval):
            yield f"{key} = {values[key]}: must be {_words(interval)}"


def not_among(key: str, value: object, known: Collection[str]) -> list[str]:
    """What is wrong with a word: nothing if it is one of those known."""
    return [] if value in known else [f"{key} = {value!r}: choose one of {', '.join(map(repr, known))}"]


def lengths(buckets: Sequence[int], longest: Mapping[str, int]) -> list[str]:
    """What is wrong with the lengths of rows, `data.buckets`, and with what a row has to hold (by key)."""
    rising = all(a < b for a, b in itertools.pairwise(buckets))
    if not buckets or buckets[0] < 1 or not rising:
        return [f"data.buckets = {buckets}: give lengths of at least 1, each longer than the one before"]
    found = [
        f"{key} = {value}: must be at most the largest of data.buckets, {buckets[-1]}"
        for key, value in longest.items()
        if value > buckets[-1]
    ]
    if not found and sum(longest.values()) > buckets[-1]:
        text = " and ".join(f"{key} = {value}" for key, value in longest.items())
        found.append(f"{text}: together at most the largest of data.buckets, {buckets[-1]}: a row has both")
    return found


def judging(prm: Mapping[str, Any], of_folder: bool) -> Iterator[str]:
    """What is wrong with how a reward model is read and asked.

    Args:
      prm: `config.prm`.
      of_folder: whether it is that of a folder, and not a run's own.
    """
    for key in ("head", "token", "against", "mark", "open", "prompt"):
        if prm[key] and not of_folder:
            yield f"prm.{key} = {prm[key]!r}: is said of a reward model in a folder, so set prm.path"
    if prm["token"] and prm["head"]:
        yield f"prm.token = {prm['token']!r}: a token or prm.head scores, so one of them must be empty"
    if prm["against"] and not prm["token"]:
        yield f"prm.against = {prm['against']!r}: needs prm.token, of which it is the opposite"
    if prm["between"] != "\n" and not prm["mark"] and not prm["token"]:
        yield f"prm.between = {prm['between']!r}: needs prm.mark, which it is written after"
    yield from refusal(prompts.check, prm["prompt"])
    if "{answer" in prm["prompt"]:  # also with a format
        yield f"prm.prompt = {prm['prompt']!r}: must not show the answer to what judges responses"


def method(values: Mapping[str, Any], figures: bool) -> Iterator[str]:
    """What does not fit together in a method.

    Args:
      values: of the config, by dotted key.
      figures: whether there is an embedded data set.
    """
    select, data, objective = (values[f"evolve.{key}"] for key in ("select", "data", "objective"))
    trained = bool(values["prm.queries"] or values["prm.data"] or values["prm.path"])
    if data == "rollouts" and objective == "sft" and select == "prm" and not trained:
        yield "evolve.select = 'prm': needs a reward model, so set prm.queries, prm.data or prm.path"
    if values["prm.data"] and values["prm.path"]:
        name = values["prm.data"]
        yield f"prm.data = {name!r}: nothing is trained on it, for prm.path names a reward model"
    if select == "likelihood" and values["prm.path"]:
        yield "evolve.select = 'likelihood': the warm-up selects, so prm.path must be empty"
    if select == "oracle" and (values["data.labelled"] or not figures):
        yield "evolve.select = 'oracle': needs the embedded data set, whose true steps are known"
    if values["evolve.threshold"] is not None and select not in ("prm", "likelihood"):
        rule = f"must be None, for evolve.select = {select!r} has no rewards"
        yield f"evolve.threshold = {values['evolve.threshold']}: {rule}"
    if values["evolve.curriculum"] == "informative" and values["evolve.k"] < 2:
        asked = f"evolve.k = {values['evolve.k']}"
        yield f"{asked}: evolve.curriculum = 'informative' goes by how many of 2 or more samples are right"
    if objective == "sft":
        return
    if values["evolve.process_weight"] and not trained and select != "likelihood":
        yield (
            f"evolve.process_weight = {values['evolve.process_weight']}: needs step scores, so set "
            "prm.queries or prm.path, or evolve.select = 'likelihood'"
        )
    only: dict[str, object] = {"evolve.data": "rollouts", "evolve.start": "last"}
    only |= {"evolve.unlabelled.mixin": None, "sampling.stop_strings": ()}
    only |= {"evolve.threshold": None, "evolve.distinct": False}  # all responses train, none is selected
    for key, value in only.items():
        if values[key] != value:
            yield f"{key} = {values[key]!r}: must be {value!r} with evolve.objective = {objective!r}"
    if values["evolve.temperature"] == 0 or values["evolve.k"] < 2:
        asked = f"evolve.temperature = {values['evolve.temperature']}, evolve.k = {values['evolve.k']}"
        yield f"{asked}: evolve.objective = {objective!r} compares 2 or more samples, drawn above 0"


def refusal(refuses: Callable[..., object], *arguments: object) -> list[str]:
    """What a function that refuses values says."""
    try:
        refuses(*arguments)
    except ValueError as error:
        return [str(error)]
    return []


def refuse(found: Sequence[str]) -> None:
    """Refuses a config with problems.

    Raises:
      ValueError: there are some; the message has all of them.
    """
    if found:
        raise ValueError("; ".join(found))


def _ends(interval: str) -> tuple[float, float]:
    low, _, high = interval[1:-1].partition(", ")
    return float(low), float(high)


def _within(value: object, interval: str) -> bool:
    if not isinstance(value, int | float):
        return False
    low, high = _ends(interval)
    above = value > low if interval[0] == "(" else value >= low
    return above and (value < high if interval[-1] == ")" else value <= high)


def _words(interval: str) -> str:
    low, high = _ends(interval)
    start = f"{'above' if interval[0] == '(' else 'at least'} {low:.10g}"
    if math.isinf(high):
        return start
    return f"{start} and {'below' if interval[-1] == ')' else 'at most'} {high:.10g}"
