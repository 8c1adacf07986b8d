"""We-Math's score in four dimensions: how a model does on a problem and on the steps that it is made of.

    steps        problem    strict                     loose
    all right    right      complete mastery           complete mastery
    some wrong   right      rote memorisation          complete mastery
    all wrong    right      rote memorisation          rote memorisation
    all right    wrong      inadequate generalisation  the same
    some wrong   wrong      insufficient knowledge     the same

    score = 1 - (inadequate generalisation / 2 + rote memorisation + insufficient knowledge) / problems

Source: We-Math/We-Math (evaluation/four_dimensional_metrics.py), which divides by 525, the problems of the
whole file; a problem of which a part was left out counts for neither here nor there.
"""

from collections.abc import Sequence
from typing import TypedDict

from mstar_jax.evaluate.items import Item


class Setting(TypedDict):
    """The dimensions on which strict and loose differ: shares of the problems, but rote memorisation of those
    that are solved, None where none is; the score is None without problems."""

    complete_mastery: float
    rote_memorization: float | None
    score: float


class Dimensions(TypedDict):
    """The number of whole problems, and shares of them."""

    problems: int
    insufficient_knowledge: float
    inadequate_generalization: float
    strict: Setting
    loose: Setting


def dimensions(items: Sequence[Item], right: Sequence[bool]) -> Dimensions | None:
    """The score of a run over We-Math.

    Args:
      items: problems and steps, in any order.
      right: for each, whether it was answered correctly.

    Returns:
      None if no problem is there with all its steps.
    """
    problems: dict[str, dict[str, bool]] = {}
    for item, hit in zip(items, right, strict=True):
        problems.setdefault(item.record["ID"], {})[item.record["key"]] = hit
    pairs = []  # (its steps, itself)
    for parts in problems.values():
        kind = next(iter(parts)).partition("_")[0]  # 2steps
        whole = parts.pop(f"{kind}_multi", None)
        if whole is not None and len(parts) == int(kind[0]):
            pairs.append((list(parts.values()), whole))
    if not pairs:
        return None
    count = len(pairs)
    unknown = sum(not whole and not all(steps) for steps, whole in pairs)
    narrow = sum(not whole and all(steps) for steps, whole in pairs)

    def setting(mastered: int, solved: int) -> Setting:
        rote = solved - mastered
        return {
            "complete_mastery": mastered / count,
            "rote_memorization": rote / solved if solved else None,
            "score": (count - narrow / 2 - rote - unknown) / count,
        }

    solved = sum(whole for _, whole in pairs)
    return {
        "problems": count,
        "insufficient_knowledge": unknown / count,
        "inadequate_generalization": narrow / count,
        "strict": setting(sum(whole and all(steps) for steps, whole in pairs), solved),
        "loose": setting(sum(whole and any(steps) for steps, whole in pairs), solved),
    }
