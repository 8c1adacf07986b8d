"""The sampling temperature, chosen from the dynamics on the validation split (Figures 4 and 5)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def choose(grid: Sequence[Mapping[str, Any]], criterion: str, present: float) -> float:
    """The temperature whose record has the greatest criterion.

    Of equal ones the nearest to the present temperature, then the lower: a flat criterion moves nothing.

    Args:
      grid: records of `metrics.by_temperature`.
      criterion: `reward_pass_at_2` (M-STaR) or `balance_score` (B-STaR).
      present: the temperature in force.

    Raises:
      ValueError: the grid is empty, or a record has no such number.
    """
    if not grid:
        raise ValueError(f"no temperature to choose by {criterion}: the grid is empty")
    for record in grid:
        if not math.isfinite(math.nan if (value := record.get(criterion)) is None else value):
            at = record.get("temperature")
            raise ValueError(f"temperature {at} has no {criterion} (were its samples scored?), got {value}")

    def rank(record: Mapping[str, Any]) -> tuple[float, float, float]:
        # rounded: 0.4 - 0.3 and 0.5 - 0.4 differ in the last bit
        return -record[criterion], round(abs(record["temperature"] - present), 6), record["temperature"]

    return min(grid, key=rank)["temperature"]


def smoothed(values: Sequence[float], window: int = 3) -> list[float]:
    """Centred moving average over an odd window, which shrinks on both sides near the ends."""
    if window < 1 or window % 2 == 0:
        raise ValueError(f"a centred window has an odd width, got {window}")
    out = []
    for at in range(len(values)):
        reach = min(window // 2, at, len(values) - 1 - at)
        out.append(math.fsum(values[at - reach : at + reach + 1]) / (2 * reach + 1))
    return out
