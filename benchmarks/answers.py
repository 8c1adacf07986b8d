"""How far the answer checker agrees with official verdicts on real responses, and how fast it is.

    python benchmarks/answers.py FOLDER [--show=20] [--only=letter]

FOLDER holds mathvista_outputs.jsonl.gz and m3cot_outputs.jsonl.gz: responses of released models and the
verdicts of the benchmarks' own scorers (M3CoT's judge is reimplemented below). A hash of its id assigns a
question to the development part (about 60 %), whose disagreements `--show` lists, or to the part kept apart,
which is only counted. The subsets:

  numeric   integer and float questions where the official extraction is a number
  letter    multiple choice where the official extraction names a letter or is an option's text
  luck      multiple choice that the official scorer resolved by edit distance, by a lower-case letter token
            (`a`) or not at all: chance credit, no target
  empty     MathVista responses without any text, whatever the official extraction invented
  other     free-form questions without a readable extraction, and lists

Speed is measured in processor time on synthetic responses in the form that training asks for: distinct ones,
eight a query.
"""

import argparse
import collections
import gc
import gzip
import hashlib
import json
import pathlib
import random
import re
import time
from collections.abc import Iterator
from typing import Any

from mstar_jax.answers.check import LETTERS, Grade, grade

PARTS = ("development", "kept apart")


def part(question: str) -> str:
    return PARTS[hashlib.sha256(question.encode()).digest()[0] >= 154]  # 154 / 256 = 60 %


def read(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        yield from map(json.loads, file)


# ---- 1. the official verdicts ---------------------------------------------------------------------------


def mathvista_subset(row: dict[str, Any]) -> str:
    """How the official scorer reached its verdict; the subsets are explained above."""
    extraction = str(row["extraction"]).strip()
    if not row["response"].strip():
        return "empty"
    if row["question_type"] == "multi_choice":
        bracketed = re.search(r"\(([A-Za-z])\)", extraction)
        letter = bracketed[1].upper() if bracketed else extraction
        letters = LETTERS[: len(row["choices"])]
        return "letter" if (len(letter) == 1 and letter in letters) or letter in row["choices"] else "luck"
    return "numeric" if row["answer_type"] != "list" and row["prediction"] is not None else "other"


def m3cot_judge(text: str, choices: list[str]) -> tuple[str | None, str]:
    """(letter, how it was found) by the rules of M3CoT's evaluate.py; BENCHMARKS: section 3."""
    text = text.split("[Answer]")[-1].split("[Rationale]")[0].split("[Context]")[0]
    if found := re.findall(r"\(([A-Za-z])\)", text):
        return found[-1].upper(), "bracketed letter"
    letters = "ABCDEF"[: len(choices)]
    if held := [letter for letter, c in zip(letters, choices) if c.lower() in text.lower()]:
        return held[-1], "option text"
    tokens = re.sub(r"[\n.,!?]", " ", text).split(" ")
    if upper := [letter for letter in letters if letter in tokens]:
        return upper[-1], "bare letter"
    if lower := [letter for letter in letters if letter.lower() in tokens]:
        return lower[-1], "lower-case token"
    return None, "none"


def items(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """One item per response: benchmark, id, subset, official verdict and the arguments of `grade`."""
    for row in read(folder / "mathvista_outputs.jsonl.gz"):
        choice = row["question_type"] == "multi_choice"
        yield {
            "benchmark": "MathVista", "run": row["run"], "id": row["pid"], "subset": mathvista_subset(row),
            "official": bool(row["true_false"]), "said": row["extraction"], "response": row["response"],
            "gold": row["answer"],
            "kwargs": {
                "options": row["choices"] if choice else None,
                "answer_type": "choice" if choice else row["answer_type"],
                "precision": None if row["precision"] is None else int(row["precision"]),
            },
        }  # fmt: skip
    for row in read(folder / "m3cot_outputs.jsonl.gz"):
        letter, how = m3cot_judge(row["response"], row["choices"])
        yield {
            "benchmark": "M3CoT", "run": row["run"], "id": row["id"],
            "subset": "luck" if how in ("lower-case token", "none") else "letter",
            "official": letter == row["answer"], "said": f"{letter} by {how}", "response": row["response"],
            "gold": row["answer"], "kwargs": {"options": row["choices"], "answer_type": "choice"},
        }  # fmt: skip


# ---- 2. agreement ---------------------------------------------------------------------------------------


def agreement(folder: pathlib.Path, show: int, only: str) -> None:
    """Prints agreement by part, benchmark and subset, and disagreements of the development part."""
    counts: dict[tuple, collections.Counter] = collections.defaultdict(collections.Counter)
    disagreements = []
    for item in items(folder):
        strict = grade(item["response"], item["gold"], **item["kwargs"])
        loose = grade(item["response"], item["gold"], **item["kwargs"], fallback=True)
        where, official = part(item["id"]), item["official"]
        right = loose.verdict == "correct"
        counts[where, item["benchmark"], item["subset"]].update(
            n=1, marker=(strict.verdict == "correct") == official, fallback=right == official,
            fp=right and not official, fn=official and not right, marked=strict.verdict != "unparsed",
            official=official,
        )  # fmt: skip
        if right != official and where == PARTS[0] and item["subset"] in ("numeric", "letter"):
            disagreements.append((f"{item['benchmark']} {item['subset']}", item, loose))
    print("part          benchmark  subset       n   agree  marker only    FP    FN  official right   marked")
    for (where, benchmark, subset), c in sorted(counts.items()):
        n = c["n"]
        print(
            f"{where:12}  {benchmark:9}  {subset:7}  {n:5}  {c['fallback'] / n:6.2%}  "
            f"     {c['marker'] / n:6.2%}  {c['fp']:4}  {c['fn']:4}  "
            f"        {c['official'] / n:6.1%}   {c['marked'] / n:6.1%}"
        )
    classes = collections.Counter((name, fate(item, g)) for name, item, g in disagreements)
    for (name, what), n in sorted(classes.items()):
        pids = [i["id"] for where, i, g in disagreements if (where, fate(i, g)) == (name, what)][:2]
        print(f"{n:5}  {name:18}  {what}  e.g. {', '.join(pids)}")
    chosen = [d for d in disagreements if only in f"{d[0]} {fate(d[1], d[2])}"]
    for name, item, g in random.Random(0).sample(chosen, min(show, len(chosen))):
        print(f"\n---- {name} {item['run']} {item['id']}: {fate(item, g)}")
        print(f"gold {item['gold']!r}, official {item['said']!r} {item['official']}, ours {g}")
        print(f"options {item['kwargs']['options']}")
        print(item["response"][-500:])


def fate(item: dict[str, Any], g: Grade) -> str:
    return f"official {'right' if item['official'] else 'wrong'}, ours {g.verdict} by {g.rule}"


# ---- 3. speed -------------------------------------------------------------------------------------------


def ordinary(rng: random.Random, count: int = 8) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(response, gold, arguments) of so many responses to a query: a few steps, then the marked answer."""
    kind, value = rng.choice(("choice", "integer", "float")), rng.randint(2, 10**6)
    options = tuple(f"{value + i} cm" for i in range(4)) if kind == "choice" else None
    gold = {"choice": "B", "integer": str(value), "float": f"{value / 100:.2f}"}[kind]
    for _ in range(count):
        steps = [
            f"Step {i + 1}: the table lists {rng.randint(2, 9999)} and {rng.randint(2, 9999)}, so I compare "
            f"the two values of row {rng.randint(1, 99)} and add {rng.randint(2, 99)} to the first one."
            for i in range(rng.randint(2, 8))
        ]
        if options:
            at = rng.randrange(4)
            last = rng.choice((f"({LETTERS[at]}) {options[at]}", LETTERS[at], options[at]))
        else:
            last = gold if rng.random() < 0.5 else str(rng.randint(2, 10**6))
        end = (f"The answer is {last}.", rf"So it is \boxed{{{last}}}.", f"**Final answer:** {last}")
        yield "\n".join([*steps, rng.choice(end)]), gold, {"options": options, "answer_type": kind}


def speed(number: int) -> None:
    rng = random.Random(0)
    made = [response for _ in range(number // 8) for response in ordinary(rng)]
    gc.collect()
    gc.freeze()  # the cost of collecting `made` is not the checker's
    start = time.process_time()
    slowest = 0.0
    for response, gold, kwargs in made:
        begun = time.thread_time()
        grade(response, gold, **kwargs)
        slowest = max(slowest, time.thread_time() - begun)
    spent = time.process_time() - start
    length = sum(len(response) for response, *_ in made) / len(made)
    print(
        f"\n{len(made)} distinct responses to {len(made) // 8} queries, {length:.0f} characters on average: "
        f"{len(made) / spent:,.0f} a second of one core; the slowest {slowest * 1e3:.2f} ms"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--show", type=int, default=0, help="disagreements of the development part to print")
    parser.add_argument("--only", default="", help="of these, the ones whose class contains this")
    parser.add_argument("--responses", type=int, default=50_000, help="of the speed test")
    args = parser.parse_args()
    agreement(args.folder, args.show, args.only)
    speed(args.responses)
