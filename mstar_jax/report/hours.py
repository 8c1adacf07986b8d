"""The hours that `plan --out=WORKDIR/plan.json` expects, beside those that a run has spent."""

import json
import math
from collections.abc import Sequence

from mstar_jax.report.markup import escape, table
from mstar_jax.report.runs import Missing, Record, RunRecord, number

PARTS = {"base": "base", "warmup": "warm-up and reward model", "prm": "warm-up and reward model"}
PARTS |= {"iteration": "iterations"}  # of the plan, by the stage of a record
FILE = "plan.json"


def planned(run: RunRecord) -> tuple[dict[str, float], str]:
    """(hours by part, a sentence about them) of the plan in a run's workdir.

    Raises:
      Missing: there is none, or it is not what `plan` writes.
    """
    path = run.workdir / FILE
    if not path.exists():
        raise Missing(f"there is no {FILE}: python -m mstar_jax.plan --out={path}")
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        found = {part: float(plan["hours"][part]) for part in dict.fromkeys(PARTS.values())}
        about = f"Planned: for {plan['on']}, without {plan['left_out']}."
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise Missing(f"{FILE} is not what plan --out writes ({type(error).__name__}: {error})") from error
    if not all(math.isfinite(value) and value >= 0 for value in found.values()):
        raise Missing(f"{FILE} is not what plan --out writes (hours {found})")
    return found, about


def spent(records: Sequence[Record]) -> dict[str, float]:
    """Hours by part that the records say."""
    found = dict.fromkeys(PARTS.values(), 0.0)
    for record in records:
        if (part := PARTS.get(str(record.get("stage")))) is not None:
            found[part] += (number(record, "seconds") or 0.0) / 3600
    return found


def beside(run: RunRecord, count: int) -> str:
    """What is planned beside the hours of the first `count` records, the last one's part in brackets; nothing
    without a plan: ` of 12.50 h planned (iterations 2.10 of 10.00)`."""
    try:
        hours, _ = planned(run)
    except Missing:  # the page says why, if it shows a plan at all
        return ""
    records = run.results["stages"][:count]
    part = PARTS.get(str(records[-1].get("stage")))
    about = f" ({part} {spent(records)[part]:.2f} of {hours[part]:.2f})" if part else ""
    return f" of {sum(hours.values()):.2f} h planned{about}"


def compared(run: RunRecord) -> str:
    """A table of both.

    Raises:
      Missing: see `planned`.
    """
    hours, about = planned(run)
    used = spent(run.results["stages"])
    rows = [[part, f"{hours[part]:.2f}", f"{used[part]:.2f}"] for part in hours]
    rows.append(["all", f"{sum(hours.values()):.2f}", f"{sum(used.values()):.2f}"])
    return table(
        ["part of the run", "hours planned", "spent so far"], [[*map(escape, r)] for r in rows], about
    )
