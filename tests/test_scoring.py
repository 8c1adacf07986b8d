"""Scores: the official ones against straightforward readings of their rules, sums against brute force."""

import contextlib
import gzip
import json
import os
import pathlib
import random
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mstar_jax.answers import check
from mstar_jax.evaluate import official
from mstar_jax.evaluate.benchmarks import NAMES
from mstar_jax.evaluate.items import Item
from mstar_jax.evaluate.official import infer, normalize
from mstar_jax.evaluate.scoring import Score, judge, summarise
from mstar_jax.rewards import metrics
from mstar_jax.structs import Query

pytest.importorskip("rapidfuzz")
REAL = pathlib.Path(os.environ.get("MSTAR_REALDATA", "/nonexistent"))  # real responses, if available


def item(
    answer="B", options=("cat", "dog", "cow"), kind="choice", id="1", base=None, precision=None, **groups
):
    members = {key: value if isinstance(value, tuple) else (value,) for key, value in groups.items()}
    kind = kind if not options else "choice"
    query = Query(id, ("/x.png",), "?", options, answer, kind, precision=precision)
    return Item(query, "?", members, base or id, {"answer": answer})


# ---- the official rules, read again -------------------------------------------------------------------


def distance(a, b):
    """Edit distance, by the textbook's table."""
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            replaced = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, replaced)
    return table[len(a), len(b)]


def mathvista_normal(extraction, choices, answer_type, precision):
    """Bracketed letters first, then a letter by itself, then the nearest option; numbers through float."""
    if choices:
        extraction = extraction.strip()
        bracketed = [c for a, c, b in zip(extraction, extraction[1:], extraction[2:]) if a + b == "()"]
        bracketed = [c for c in bracketed if c.isascii() and c.isalpha()]
        if bracketed:
            extraction = bracketed[0].upper()
        for at, choice in enumerate(choices):
            if extraction == chr(65 + at):
                return choice
        lengths = [distance(extraction, choice) for choice in choices]
        return choices[lengths.index(min(lengths))]
    try:
        if answer_type == "integer":
            return str(int(float(extraction)))
        if answer_type == "float":
            return str(round(float(extraction), precision))
    except (ValueError, OverflowError):
        return None
    return extraction


def m3cot_letter(text, choices):
    """After the last [Answer]: last bracketed letter; last option said; last letter, large, then small."""
    if "[Answer]" in text:
        text = text[text.rindex("[Answer]") + len("[Answer]") :]
        for end in ("[Rationale]", "[Context]"):
            text = text[: text.index(end)] if end in text else text
    bracketed = [text[m.start() + 1] for m in re.finditer(r"\([A-Za-z]\)", text)]
    if bracketed:
        return bracketed[-1].upper()
    found = None
    for letter, choice in zip("ABCDEF", choices):
        if text.lower().find(choice.lower()) >= 0:
            found = letter
    tokens = re.split(" ", re.sub("[\n.,!?]", " ", text))
    for alphabet in ("ABCDEF", "abcdef"):
        if found is None:
            for letter in alphabet[: len(choices)]:
                found = letter.upper() if letter in tokens else found
    return found


def vlmevalkit_letter(text, choices):
    """Refusal; one letter late in the reply; `Z`; `answer is B`; one option's text in a short reply."""
    letters = "ABCDEFGH"[: len(choices)]
    if "Failed to obtain answer via API" not in text:
        if any(phrase in text for phrase in official._REFUSALS):
            return "Z"
        cleaned = "".join(" " if c in ".()[],:;!*#{}" else c for c in text)
        tokens = cleaned.split()
        present = set(tokens) & set(letters)
        if len(present) == 1:
            (only,) = present
            if only not in tokens[: max(0, len(tokens) - 4)]:
                return only
        if not present and "Z" in tokens:
            return "Z"
        said = re.findall(r"(?i)(?:correct\s+)?answer\s+is\s+\**([a-d])", text)
        if said and said[0].upper() in letters:
            return said[0].upper()
    if len(text.lower()) <= 2 * len("".join(choices)):
        inside = [letter for letter, choice in zip(letters, choices) if choice.lower() in text.lower()]
        if len(inside) == 1:
            return inside[0]
    return None


WORDS = [
    "A",
    "B",
    "C",
    "D",
    "a",
    "b",
    "Z",
    "(A)",
    "(b)",
    "(C)",
    "(x)",
    "B.",
    "**C**",
    "cat",
    "Dog",
    "no",
    "is",
]
WORDS += [
    "answer is B",
    "The correct answer is **A**",
    "answer is",
    "[Answer]",
    "[Rationale]",
    "[Context]",
    "é",
]
WORDS += [
    official._FAILED,
    *official._REFUSALS,
    "1",
    "3.9",
    "-2",
    "1,000",
    "nan",
    "\\boxed{B}",
    "\\boxed{cat}",
    "?",
]
replies = st.lists(st.sampled_from(WORDS), max_size=9).flatmap(
    lambda words: st.sampled_from([" ", "\n", ", ", ""]).map(lambda gap: gap.join(words))
)
texts = st.text("abcdAB()0123. -é", min_size=1, max_size=8)
choices = st.lists(
    st.one_of(st.sampled_from(["cat", "dog", "Dog food", "1", "yes", "no", "A"]), texts), min_size=2
)
choices = choices.map(lambda found: tuple(found[:6]))
numbers = st.one_of(
    replies, st.floats().map(str), st.integers().map(str), st.sampled_from([" 7 ", "1_0", "1e400"])
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(replies, texts), choices)
@example("a A b c d e", ("x", "y"))
def test_vlmevalkit_matching(text, options):
    assert infer(text, options) == vlmevalkit_letter(text, options)
    for letter in "ABCDEF"[: len(options)]:
        found = judge("mmstar", item(letter, options), text, False)
        marked = check.extract(text)
        assert found.official == (vlmevalkit_letter(text if marked is None else marked, options) == letter)
        assert found.variants == {"whole_reply": vlmevalkit_letter(text, options) == letter}


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("(B) dog", "B"),
        ("B. dog", "B"),
        ("It is a dog", "B"),  # by its text
        ("A small dog", "A"),  # the article counts
        ("I see a large animal here, B", "B"),
        ("B because it has a tail and barks at cats", None),  # too early, and too long for the texts
        ("The answer is **B** because it has a tail and barks", "B"),
        ("A or B", None),
        ("Z", "Z"),
        ("Cannot determine the answer: B", "Z"),
        ("", None),
    ],
)
def test_vlmevalkit_matching_by_hand(reply, letter):
    assert infer(reply, ("cat", "dog")) == letter


def test_a_long_reply_counts_by_its_marked_answer():
    text = "A cat has whiskers. " * 20 + "The answer is (B) dog, since it barks at A and at C."
    found = judge("mmstar", item(), text.replace(", since it barks at A and at C", ""), False)
    assert found.official and found.strict == "correct"
    assert judge("mmbench", item(), "Reasons.\n\\boxed{B}\nA and C are not.", False).official


@settings(max_examples=300, deadline=None)
@given(st.one_of(replies, texts), choices)
def test_m3cot_judge(text, options):
    for letter in "ABCDEF"[: len(options)]:
        assert judge("m3cot", item(letter, options), text, False).official == (
            m3cot_letter(text, options) == letter
        )


@settings(max_examples=300, deadline=None)
@given(st.one_of(replies, texts), choices)
def test_mathvista_normal_form_of_options(text, options):
    assert normalize(text, item("A", options)) == mathvista_normal(text, options, "text", None)


@settings(max_examples=300, deadline=None)
@given(numbers, st.sampled_from(["integer", "float", "math", "text"]), st.sampled_from([1, 2]))
@example("3.9", "integer", 1)
@example("2.675", "float", 2)
@example("[1, 2]", "math", 1)
def test_mathvista_normal_form_of_values(text, kind, precision):
    one = item("4", None, kind, precision=precision)
    assert normalize(text, one) == mathvista_normal(text, None, kind, precision)


def mathvista_right(one, text):
    """The official extraction, with our own in place of GPT's, then normal form and equality."""
    query = one.query
    how = {"options": query.options, "answer_type": query.answer_type, "precision": one.query.precision}
    extraction = check.grade(text, query.answer, fallback=True, **how).answer or ""
    if query.options:
        gold = query.options["ABCDEF".index(query.answer)]
        extraction = text if text in ("", *query.options) else extraction
    else:
        gold = query.answer
        for kind, to in (("integer", int), ("float", float)):
            if query.answer_type == kind:
                with contextlib.suppress(ValueError):
                    extraction = str(to(text))
        extraction = extraction if text else ""
    return mathvista_normal(extraction, query.options, query.answer_type, one.query.precision) == gold


@settings(max_examples=200, deadline=None)
@given(st.one_of(replies, texts), choices, st.integers(0, 5))
def test_mathvista_options(text, options, at):
    one = item("ABCDEF"[at % len(options)], options)
    found = judge("mathvista", one, text, False)
    assert found.official == mathvista_right(one, text)
    assert found.official or not found.variants["ignore_empty"]


@settings(max_examples=200, deadline=None)
@given(numbers, st.sampled_from([("integer", "4"), ("float", "3.9"), ("math", "[1, 2]")]))
def test_mathvista_values(text, gold):
    one = item(gold[1], None, gold[0], precision=1)
    assert judge("mathvista", one, text, False).official == mathvista_right(one, text)


@pytest.mark.parametrize(
    ("one", "text", "strict", "official", "vlmevalkit"),
    [
        (item(), "The answer is (B).", "correct", True, True),
        (item(), "dog", "unparsed", True, True),
        (item(), "dogs, I guess", "unparsed", True, True),  # nearest; contained in a short reply
        (item(), "I am not sure about any of that", "unparsed", False, False),
        (item("A", ("8 cm", "10 m")), "", "unparsed", True, False),  # nothing is nearest to the shortest
        (item("3", None, "integer"), "The answer is 3.", "correct", True, True),
        (item("3", None, "integer"), "3.9", "unparsed", True, False),  # officially cut to 3
        (item("0.3", None, "float", precision=1), "0.33", "unparsed", True, False),  # rounded, and not
        (item("0.3", None, "float", precision=1), "\\boxed{0.3}", "correct", True, True),
        (item("[1, 2]", None, "math"), "The answer is [1,2]", "correct", False, False),  # spaces count
    ],
)
def test_mathvista_by_hand(one, text, strict, official, vlmevalkit):
    found = judge("mathvista", one, text, False)
    assert (found.strict, found.official, found.variants["vlmevalkit"]) == (strict, official, vlmevalkit)


def test_equal_options_are_equal():
    assert judge("mathvista", item("A", ("4", "5", "4")), "C", False).official


def test_mathvista_needs_rapidfuzz(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rapidfuzz.distance", None)
    with pytest.raises(ImportError, match=r"pip install 'mstar_jax\[benchmarks\]'"):
        judge("mathvista", item(), "dogs", False)
    assert judge("mmstar", item(), "dogs", False)


@pytest.mark.parametrize(
    ("gold", "kind", "text", "right"),
    [
        ("2.5", "float", "The answer is 2.5", True),
        ("2.0", "float", "The answer is 2", True),
        ("2.5", "float", "The answer is 2", False),
        ("12 cm", "integer", "The answer is 12 cm", True),
        ("12", "integer", "The answer is 13", False),
    ],
)
def test_numbers_of_own_rows_need_no_precision(gold, kind, text, right):
    """MathVista's rows say to how many places its numbers are rounded; those of MathV360K do not."""
    found = judge("mathv360k", item(gold, None, kind), text, False)
    assert (found.official, found.variants["ignore_empty"]) == (right, right)


@pytest.mark.parametrize("name", NAMES)
def test_strict_and_fallback_are_the_checker_s(name):
    for text in ("The answer is B.", "The answer is C.", "It is a dog", "no", ""):
        found = judge(name, item(), text, truncated=not text)
        grades = [check.grade(text, "B", options=("cat", "dog", "cow"), fallback=f) for f in (False, True)]
        assert [found.strict, found.fallback] == [grade.verdict for grade in grades]
        assert found.answer == grades[0].answer and found.truncated == (not text)
        assert found.hit("strict") == (found.strict == "correct") and found.hit("official") == found.official


def test_what_cannot_be_judged_says_so():
    with pytest.raises(ValueError, match="benchmark 'nonsense'"):
        judge("nonsense", item(), "B", False)
    with pytest.raises(ValueError, match="item '1' has no gold answer"):
        judge("mmstar", item(answer=None), "B", False)
    with pytest.raises(ValueError, match="benchmark 'nonsense'"):
        summarise("nonsense", [], [])
    score = judge("mmstar", item(id="2"), "B", False)
    with pytest.raises(ValueError, match="1 scores do not match the 1 items"):
        summarise("mmstar", [item()], [score])


# ---- sums ---------------------------------------------------------------------------------------------


def scored(one, strict, official=False, truncated=False):
    return Score(one.query.id, one.base, strict, strict, official, None, truncated, {"v": not official})


def random_scores(items, seed):
    draw = random.Random(seed)
    verdicts = ["correct", "wrong", "unparsed", "gold-unparsed"]
    return [scored(i, draw.choice(verdicts), draw.random() < 0.4, draw.random() < 0.2) for i in items]


def test_pooled_sums_and_groups_equal_brute_force():
    draw = random.Random(0)
    skills = ["algebra", "logic", "scientific reasoning"]
    items = []
    for at in range(300):
        own = tuple(sorted(draw.sample(skills, draw.randint(0, 3))))
        items.append(item(id=str(at), task=draw.choice(["FQA", "GPS"]), skills=own))
    scores = random_scores(items, 1)
    out = summarise("mathvista", items, scores)
    right = [s.strict == "correct" for s in scores]
    assert out["n"] == 300 and out["expected"] == 1000 and out["aggregation"] == "pooled"
    assert out["accuracy"] == out["strict"]["accuracy"] == sum(right) / 300
    assert out["interval"] == list(metrics.wilson(sum(right) / 300, 300))
    assert out["strict"]["unparsed"] == sum(s.strict == "unparsed" for s in scores) / 300
    assert out["strict"]["gold_unparsed"] == sum(s.strict == "gold-unparsed" for s in scores) / 300
    assert (
        out["official"]["correct"] == sum(s.official for s in scores) == 300 - out["variants"]["v"]["correct"]
    )
    assert "rules in place of GPT" in out["official"]["scorer"]
    assert out["truncated"] == sum(s.truncated for s in scores) / 300
    for key in ("task", "skills"):
        for member, part in out["groups"][key].items():
            own = [s for i, s in zip(items, scores) if member in i.groups[key]]
            hits = [s.strict == "correct" for s in own]
            assert (part["correct"], part["count"]) == (sum(hits), len(own))
            assert part["accuracy"] == sum(hits) / len(own)
            assert part["interval"] == list(metrics.wilson(sum(hits) / len(own), len(own)))
            assert part["unparsed"] == sum(s.strict == "unparsed" for s in own) / len(own)
            assert part["truncated"] == sum(s.truncated for s in own) / len(own)
            assert part["official"] == sum(s.official for s in own) / len(own)
            assert part["fallback"] == part["accuracy"]
    assert sum(part["count"] for part in out["groups"]["task"].values()) == 300
    assert list(out["groups"]["skills"]) == skills
    assert json.loads(json.dumps(out)) == out


def test_mmstar_names_every_way_of_adding_up():
    sizes = {("math", "geometry"): 5, ("math", "statistical reasoning"): 1, ("logical reasoning", "x"): 2}
    items = [
        item(id=f"{l2}{at}", category=category, l2_category=l2)
        for (category, l2), count in sizes.items()
        for at in range(count)
    ]
    verdicts = ["correct"] * 3 + ["wrong"] * 2 + ["correct"] + ["correct", "wrong"]
    scores = [scored(i, verdict) for i, verdict in zip(items, verdicts)]
    out = summarise("mmstar", items, scores)
    pooled, categories, l2 = 5 / 8, (4 / 6 + 1 / 2) / 2, (3 / 5 + 1 + 1 / 2) / 3
    assert out["accuracy"] == out["aggregates"]["pooled"]["strict"]["accuracy"] == pooled
    assert out["aggregates"]["mean_of_categories"]["strict"] == {
        "accuracy": pytest.approx(categories),
        "count": 2,
    }
    assert out["aggregates"]["mean_of_l2_categories"]["strict"] == {"accuracy": pytest.approx(l2), "count": 3}
    part = summarise("mmstar_r", items, scores)["aggregates"]
    assert set(part) == {"pooled", "mean_of_categories"}
    assert part["mean_of_categories"] == out["aggregates"]["mean_of_categories"]


@pytest.mark.parametrize("name", ["mmbench", "mmbench_r"])
@pytest.mark.parametrize("seed", range(5))
def test_circular_needs_all_rotations(name, seed):
    draw = random.Random(seed)
    items = []
    for base in range(40):
        dimension = draw.choice(["logic_reasoning", "relation_reasoning", "attribute_reasoning"])
        for turn in range(draw.randint(2, 4)):
            id = str(base + turn * 1_000_000)
            items.append(item(id=id, base=str(base), l2_category=dimension, category=f"c{base % 3}"))
    draw.shuffle(items)
    scores = [scored(i, draw.choice(["correct"] * 4 + ["unparsed"]), draw.random() < 0.8) for i in items]
    out = summarise(name, items, scores)
    for kind in ("strict", "official"):
        hit = {s.id: s.strict == "correct" if kind == "strict" else s.official for s in scores}
        circle = {b: all(hit[i.query.id] for i in items if i.base == b) for b in {i.base for i in items}}
        dimension = {i.base: i.groups["l2_category"][0] for i in items}
        assert out[kind]["correct"] == sum(circle.values()) and out[kind]["count"] == 40
        assert out[kind]["interval"] == list(metrics.wilson(sum(circle.values()) / 40, 40))
        ways = {"circular": circle, "rotation_0": {b: hit[b] for b in circle}, "all_rows": hit}
        for way, hits in ways.items():
            assert out["aggregates"][way][kind]["accuracy"] == sum(hits.values()) / len(hits)
            means = []
            for each in set(dimension.values()):
                own = [h for id, h in hits.items() if dimension[str(int(id) % 1_000_000)] == each]
                means.append(sum(own) / len(own))
            mean = out["aggregates"][f"{way}_mean_of_dimensions"][kind]
            assert mean == {"accuracy": pytest.approx(sum(means) / len(means)), "count": len(means)}
    assert out["accuracy"] == out["aggregates"]["circular"]["strict"]["accuracy"]
    assert out["aggregation"] == "circular" and out["n"] == len(items)
    assert out["strict"]["unparsed"] == sum(s.strict == "unparsed" for s in scores) / len(items)
    counts = [part["count"] for part in out["groups"]["l2_category"].values()]
    assert sum(counts) == 40  # questions, not rows


def test_one_wrong_rotation_fails_the_question():
    items = [item(id=id, base="5") for id in ("5", "1000005", "2000005")]
    scores = [
        judge("mmbench", i, f"The answer is {'C' if i.query.id == '1000005' else 'B'}", False) for i in items
    ]
    assert summarise("mmbench", items, scores)["accuracy"] == 0.0
    assert summarise("mmbench", items[::2], scores[::2])["accuracy"] == 1.0


def test_nothing_adds_up_to_nothing():
    out = summarise("mmstar", [], [])
    assert out["accuracy"] is None and out["interval"] is None and out["groups"] == {}
    assert json.dumps(out)


# ---- real responses -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="MSTAR_REALDATA names no folder")
def test_m3cot_judge_on_real_responses():
    with gzip.open(REAL / "answers" / "m3cot_outputs.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file][::4]
    for row in rows:
        one = item(row["answer"], tuple(row["choices"]))
        expected = m3cot_letter(row["response"], row["choices"]) == row["answer"]
        assert judge("m3cot", one, row["response"], False).official == expected


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="MSTAR_REALDATA names no folder")
def test_mathvista_normal_form_on_real_extractions():
    """The published verdicts follow from the published extractions, but for an older rule for integers."""
    with gzip.open(REAL / "answers" / "mathvista_outputs.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        options = tuple(row["choices"] or ())
        kinds = {"list": "math"}
        kind = kinds.get(row["answer_type"], row["answer_type"])
        one = item("A", options or None, kind, precision=int(row["precision"] or 0) or None)
        extraction = row["extraction"] if isinstance(row["extraction"], str) else str(row["extraction"])
        if kind != "integer" or "." not in extraction:  # those were made by int(), now it is int(float())
            assert (normalize(extraction, one) == row["answer"]) == row["true_false"], row
