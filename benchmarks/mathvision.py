"""How far the official score of MATH-Vision agrees with the verdicts that its authors published.

    python benchmarks/mathvision.py FOLDER [--show=20]

FOLDER is a checkout of mathllm/MATH-V: its `data/test.jsonl`, and its `outputs`, JSON lines with responses of
models, the answers extracted from them (`model_answer`) and the verdicts (`correct`). No image is needed.
"""

import argparse
import json
import pathlib

from mstar_jax.answers.check import Grade
from mstar_jax.evaluate import examiners, exams

NOTHING = Grade("unparsed", None, "none")  # the scorer reads the text alone


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("folder", type=pathlib.Path)
    flags.add_argument("--show", type=int, default=0, help="verdicts that differ")
    args = flags.parse_args()
    lines = (args.folder / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    items = {row["id"]: exams.mathvision("mathvision", row, number) for number, row in enumerate(rows)}
    answers = verdicts = right = ours = count = 0
    for path in sorted((args.folder / "outputs").rglob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if "correct" not in row or "model_answer" not in row:
                continue
            text, published = row.get("response") or "", bool(row["correct"])
            found, _ = examiners.mathvision(items[str(row["id"])], text, NOTHING)
            count, right, ours = count + 1, right + published, ours + found
            answers += examiners.stated(text) == row["model_answer"]
            verdicts += found == published
            if found != published and args.show:
                args.show -= 1
                gold = items[str(row["id"])].record["answer"]
                print(f"published {published}, here {found}: {row['model_answer']!r}, gold {gold!r}")
    print(f"{count} responses: {answers} equal answers, {verdicts} equal verdicts")
    print(f"right: {right} as published, {ours} here")


if __name__ == "__main__":
    main()
