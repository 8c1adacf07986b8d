"""Evaluation: methods, tables and files on prepared responses; and the command on a small policy."""

import csv
import dataclasses
import json
import os
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import openpyxl
import pytest
from ml_collections import ConfigDict

from configs import tiny as tiny_config
from mstar_jax import configure, models, sharding
from mstar_jax.data import embedded, toy
from mstar_jax.evaluate import __main__ as evaluate
from mstar_jax.evaluate import evaluation, summary
from mstar_jax.evaluate.items import Item
from mstar_jax.inference import generate
from mstar_jax.inference.generate import Asked, inference
from mstar_jax.inference.score import Scorer, check, score_with
from mstar_jax.models import vlm
from mstar_jax.profiling import speed
from mstar_jax.stages import benchmark as verb
from mstar_jax.structs import Batch, Query, Response, Stage

OPTIONS = ("red", "blue", "green")
SETTINGS = {
    "names": (),
    "root": "",
    "limit": 0,
    "prompt": "cot",
    "samples": 0,
    "temperature": 1.0,
    "paper": "",
}


def item(name, answer="B", base=None, options=OPTIONS, **groups):
    query = Query(name, (), "Which?", options, answer, "choice" if options else "integer")
    record = {"index": name, "question": "=1+1", "answer": answer, "category": "a"}
    return Item(query, f"official {name}", {k: (v,) for k, v in groups.items()}, base or name, record)


def answers(name, *texts, scores=()):
    """A greedy response and samples; 'x' ends truncated."""
    return [
        Response(
            name,
            i,
            text.removeprefix("x"),
            (1,) * len(text),
            0.0,
            text.startswith("x"),
            answer=text.rpartition(" ")[2].rstrip(".") or None,
            verdict="correct",
            step_scores=(scores[i],) if scores else None,
            temperature=float(i > 0),
        )
        for i, text in enumerate(texts)
    ]


class Host:
    """What an evaluation reads of `Inference`; it answers as prepared, and remembers how it was asked."""

    def __init__(self, found, aggregate="min"):
        sampling = {"max_new_tokens": 8, "dtype": "float32", "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        self.sampling = ConfigDict(sampling | {"stop_strings": ()})
        self.data, self.seed, self.found, self.asked = ConfigDict({"buckets": (64,)}), 0, found, []
        self.prm = ConfigDict({"aggregate": aggregate})
        self.speeds = speed.Speeds(chips=1)


def sample(host, name, params, asked, temperatures, *, settings, longest, kind):
    assert kind == "evaluation"
    host.asked.append((name, {q.id: text for q, text in asked}, list(temperatures), settings, longest))
    return {q.id: host.found[q.id] for q, _ in asked if q.id in host.found}


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """A function that evaluates prepared policies, and returns the results by policy and benchmark."""
    monkeypatch.setattr(evaluation, "sample", sample)
    monkeypatch.setattr(evaluation, "score", lambda host, scorer, name, asked, found, **_: found)

    def evaluated(items, hosts, scores=False, folder=tmp_path, **settings):
        settings = ConfigDict(SETTINGS | settings)
        templates = {"cot": "{question}{choices} Think."}
        asked = evaluation.Benchmarks(items, settings, templates, folder / "benchmarks")
        scorer = Scorer(lambda: None, {}, None, lambda text: None) if scores else None
        results = {}
        for name, host in hosts.items():
            candidate = evaluation.Candidate(name, lambda: None, {"policy": name})
            results[name] = evaluation.evaluate(host, asked, candidate, scorer)
            evaluation.write_table(asked, results)
        return results

    return evaluated


ITEMS = {"m3cot": [item("1", "B"), item("2", "A"), item("3", "C"), item("4", "B")]}
FIRST = {
    "1": answers("1", "The answer is B"),
    "2": answers("2", "The answer is B"),
    "3": answers("3", "C, I think"),  # no mark
}  # 4 did not fit
SECOND = FIRST | {"2": answers("2", "The answer is A"), "4": answers("4", "x The answer is B")}


def test_scores_files_and_the_paired_test(tmp_path, evaluated):
    hosts = {"base": Host(FIRST), "final": Host(SECOND)}
    out = evaluated(ITEMS, hosts, paper="InternVL2-2B")
    record = json.loads((tmp_path / "benchmarks/base/m3cot.json").read_text())
    greedy = record["greedy"]
    assert greedy["n"] == 4 and greedy["strict"]["correct"] == 1 and record["left_out"] == 1
    assert greedy["strict"]["unparsed"] == 0.5 and greedy["fallback"]["correct"] == 2
    assert record["settings"]["max_new_tokens"] == 8 and record["settings"]["prompt"] == "cot"
    lines = [json.loads(x) for x in (tmp_path / "benchmarks/base/m3cot.jsonl").read_text().splitlines()]
    assert [x["greedy"]["verdict"] for x in lines] == ["correct", "wrong", "unparsed", "unparsed"]
    assert lines[3]["greedy"]["response"] is None
    assert lines[0]["prompt"] == "Which?\nChoices:\n(A) red\n(B) blue\n(C) green Think."
    assert out["final"]["m3cot"].hits == {"1": True, "2": True, "3": False, "4": True}
    table = summary.table(out, "InternVL2-2B")
    assert table == (tmp_path / "benchmarks/table.md").read_text().rstrip("\n")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line]
    assert rows[0] == ["", "M3CoT"] and rows[2] == ["base", "25.0"] and rows[3] == ["final", "75.0"]
    assert rows[4] == ["the paper's InternVL2-2B, base", "16.7"]
    assert [row for row in rows if row[0] == "final"][-1][2:] == ["+50.0", "+1.0 to +99.0", "2", "0", "0.5"]


def test_five_benchmarks_have_a_mean(evaluated):
    items = {name: [item("1"), item("2")] for name in summary.FIVE}
    right = {"1": answers("1", "The answer is B"), "2": answers("2", "The answer is C")}
    rows = summary.table(evaluated(items, {"policy": Host(right)}), "Phi-3.5-vision").splitlines()
    assert rows[0].endswith("| AI2D | mean of five |")
    assert rows[2].endswith("| 50.0 | 50.0 |")
    assert rows[5] == "| the paper's Phi-3.5-vision, M-STaR | 54.5 | 51.3 | 48.8 | 73.6 | 67.9 | 59.2 |"


def test_the_papers_means():
    """As its table prints them."""
    printed = {"MiniCPM-V-2.5": (55.0, 57.7, 61.6), "Phi-3.5-vision": (46.5, 55.3, 59.2)}
    printed["InternVL2-2B"] = (26.2, 52.8, 53.3)
    for name, means in printed.items():
        found = [sum(row) / 5 for row in summary.PAPER[name].values()]
        assert found == pytest.approx(means, abs=0.051)


def test_votes(tmp_path, evaluated):
    texts = ("The answer is A", "The answer is C", "The answer is B", "The answer is C", "xThe answer is B")
    found = {"1": answers("1", *texts, scores=(0.0, 0.2, 0.9, 0.3, 0.99))}
    host, items = Host(found), {"m3cot": [item("1", "B")]}
    record = evaluated(items, {"p": host}, scores=True, samples=4)["p"]["m3cot"].record
    chosen = json.loads((tmp_path / "benchmarks/p/m3cot.jsonl").read_text())
    # majority: C twice; weighted: B .9 against C .5; best of n: B .9 (the truncated one has no reward)
    assert [chosen[m]["answer"] for m in ("greedy", "majority", "weighted_vote", "best_of_n")] == list("ACBB")
    assert [record[m]["accuracy"] for m in ("greedy", "majority", "weighted_vote", "best_of_n")] == [
        0,
        0,
        1,
        1,
    ]
    assert host.asked[0][2] == [0.0, 1.0, 1.0, 1.0, 1.0]
    plain = evaluated(items, {"p": Host(found)}, folder=tmp_path / "plain", samples=4)["p"]["m3cot"].record
    assert "majority" in plain and "best_of_n" not in plain


@pytest.mark.parametrize(("aggregate", "best", "two_best"), [("min", "C", 0.0), ("last", "B", 1.0)])
def test_rewards_are_aggregated_as_the_config_says(tmp_path, evaluated, aggregate, best, two_best):
    group = answers("1", "The answer is A", "The answer is B", "The answer is C", "So: the answer is C")
    scores = [None, (0.1, 0.9), (0.5, 0.5), (0.5, 0.5)]
    verdicts = ["wrong", "correct", "wrong", "wrong"]
    group = [
        dataclasses.replace(r, step_scores=each, verdict=verdict)
        for r, each, verdict in zip(group, scores, verdicts)
    ]
    host = Host({"1": group}, aggregate)
    record = evaluated({"m3cot": [item("1", "B")]}, {"p": host}, scores=True, samples=3)["p"]["m3cot"].record
    chosen = json.loads((tmp_path / "benchmarks/p/m3cot.jsonl").read_text())
    assert chosen["best_of_n"]["answer"] == best
    assert record["samples"]["reward_pass_at_2"] == two_best


def test_parts_of_a_benchmark(evaluated):
    items = [item("1", domain="science"), item("2", domain="science"), item("3", domain="algebra")]
    found = {name: answers(name, f"The answer is {letter}") for name, letter in zip("123", "BCB")}
    lines = summary.table(evaluated({"m3cot": items}, {"p": Host(found)}), "").splitlines()
    at = lines.index("| M3CoT | algebra (1) | science (2) |")
    assert lines[at + 2] == "| p | 100.0 | 50.0 |"


def test_a_question_counts_where_all_its_rotations_do(evaluated):
    rotations = [item("7"), item("1000007", "C", base="7"), item("8")]
    texts = {"7": "The answer is B", "1000007": "The answer is B", "8": "The answer is B"}
    found = {name: answers(name, text) for name, text in texts.items()}
    out = evaluated({"mmbench": rotations}, {"p": Host(found)})["p"]["mmbench"]
    assert out.hits == {"7": False, "8": True}
    assert out.record["greedy"]["accuracy"] == 0.5


def test_official_prompts_and_identity_reach_the_store(evaluated):
    host = Host(FIRST)
    evaluated(ITEMS, {"p": host}, prompt="official")
    name, asked, _, how, longest = host.asked[0]
    assert name == "p_m3cot" and asked["1"] == "official 1" and longest == 64
    assert how == {"policy": "p", "prompt": "official"}


def test_vlmevalkit_layout(tmp_path, evaluated):
    found = {"7": answers("7", "=The answer is\x07 B\n\tdone")}
    evaluated({"mmstar": [item("7")]}, {"p": Host(found)})
    stem = tmp_path / "benchmarks/p/p_MMStar"
    sheet = openpyxl.load_workbook(f"{stem}.xlsx").active
    head, row = sheet.iter_rows(values_only=True)
    assert head == ("index", "question", "answer", "category", "prediction")
    assert row == (7, "=1+1", "B", "a", "=The answer is B\n\tdone")  # an index is a number, a text no formula
    assert sheet["B2"].data_type == "s"
    with open(f"{stem}.tsv", newline="") as file:
        assert list(csv.reader(file, delimiter="\t"))[1][-1] == "=The answer is\x07 B\n\tdone"


def test_wemath_of_a_policy(tmp_path, evaluated):
    """A problem of two steps, of which one is wrong: rote memorisation, in the strict setting."""
    items, found = [], {}
    for part, letter in (("1", "B"), ("2", "C"), ("multi", "B")):
        one = item(f"2steps_1/{part}", steps="one step" if part.isdigit() else "two steps")
        record = {"index": part, "ID": "2steps_1", "key": f"2steps_{part}", "knowledge concept": "Area"}
        items.append(dataclasses.replace(one, record=record | {"answer": "B"}))
        text = f"<Thought process>: <<so>> <Answer>: <<{letter}>>"
        found[one.query.id] = answers(one.query.id, text)
    out = evaluated({"wemath": items}, {"p": Host(found)}, prompt="official")
    for kind in ("strict", "official"):
        own = out["p"]["wemath"].record["greedy"]["four_dimensions"][kind]
        assert own["strict"] == {"complete_mastery": 0.0, "rote_memorization": 1.0, "score": 0.0}
        assert own["loose"] == {"complete_mastery": 1.0, "rote_memorization": 0.0, "score": 1.0}
    shown = (tmp_path / "benchmarks/table.md").read_text()
    assert "| p | loose | 1 | 100.0 | 0.0 | 0.0 | 100.0 | 0.0 |" in shown and "two steps (1)" in shown
    with open(tmp_path / "benchmarks/p/p_WeMath.tsv", newline="") as file:
        head, *rows = csv.reader(file, delimiter="\t")
    assert head == ["index", "ID", "key", "knowledge concept", "answer", "prediction"] and len(rows) == 3


# ---- the command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two policies and a reward model of random weights, as checkpoints, and questions."""
    folder = tmp_path_factory.mktemp("evaluate")
    small = {"train": 2, "unlabelled": 2, "validation": 2, "test": 12, "captions": 2, "arithmetic": 2}
    data = toy.make(folder / "data", seed=0, instruct=2, **small)
    config = tiny_config.get_config("smoke")
    changes = {"policy.decoder.num_layers": 1, "policy.decoder.unroll": 1, "policy.vision.num_layers": 1}
    changes |= {"sampling.batch": 8, "sampling.max_new_tokens": 6, "data.buckets": (160,), "prm.batch": 8}
    config.update_from_flattened_dict(changes | {"benchmarks.names": ("mathv360k",)})
    config.benchmarks.root = str(data)
    (folder / "tokenizer").mkdir()
    policy = configure.make_policy(config, folder, embedded.read_base(data))
    for name, seed in (("first", 0), ("second", 1)):
        policy.save(policy.build(seed), folder / name)
    policy.save(vlm.RewardModel(policy.build(2)), folder / "reward")
    return folder, config


def test_a_stopped_evaluation_ends_like_an_unbroken_one(place, tmp_path):
    folder, config = place
    config = config.copy_and_resolve_references()
    config.benchmarks.samples = 2
    names, prm = [str(folder / "first"), str(folder / "second")], str(folder / "reward")
    whole = evaluate.run(config, tmp_path / "whole", names, prm, lambda: False)
    asked = 0

    def stop_now_and_then() -> bool:
        nonlocal asked
        asked += 1
        return asked & (asked - 1) == 0  # at 1, 2, 4, ...: what is stopped within a shard begins it again

    for _ in range(10):
        try:
            again = evaluate.run(config, tmp_path / "broken", names, prm, stop_now_and_then)
            break
        except generate.Stopped:
            continue
    assert asked > 4
    assert summary.table(again, "") == summary.table(whole, "")
    for path in (tmp_path / "whole").rglob("*.json*"):
        other = tmp_path / "broken" / path.relative_to(tmp_path / "whole")
        assert other.read_text() == path.read_text(), path
    record = json.loads((tmp_path / "whole/benchmarks/first/mathv360k.json").read_text())
    assert record["greedy"]["n"] == 12 and {"majority", "weighted_vote", "best_of_n"} <= set(record)
    lines = (tmp_path / "whole/benchmarks/first/mathv360k.jsonl").read_text().splitlines()
    assert len({json.loads(line)["greedy"]["response"] for line in lines}) > 1


def test_a_reward_model_of_the_hub(place, monkeypatch):
    """As `prm.path`: its snapshot's files, and its own name in place of the snapshot's."""
    snapshot = {"OpenGVLab/VisualPRM": str(place[0] / "second")}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: snapshot[name])
    found = evaluate.Checkpoint("OpenGVLab/VisualPRM", Stage.reward_model)
    assert (found.path, found.name, found.stage) == (place[0] / "second", "VisualPRM", None)
    with pytest.raises(ValueError, match="OpenGVLab/Other: no such folder, and the hub could not provide it"):
        evaluate.Checkpoint("OpenGVLab/Other", Stage.reward_model)


def test_a_policy_judges_by_a_token(place, tmp_path, caplog):
    """Through the scorer that votes; what it says of a step is the softmax of two tokens of its logits."""
    folder, config = place
    config = config.copy_and_resolve_references()
    mark, between = "<|end|>\n<|assistant|>\n", "+<|end|>\n<|user|>\n"
    asked_for = {"token": "+", "against": "-", "mark": mark, "between": between}
    config.prm.update({**asked_for, "open": True, "prompt": "Judge. {question}\n"})
    mesh = sharding.make_mesh(**config.mesh)
    judge = evaluate.Checkpoint(str(folder / "second"))
    scorer = evaluate.scorer_of(judge, mesh, jnp.float32, config)
    assert scorer.identity["mark"] == mark and scorer.identity["open"]
    query = Query("q", (), "What is the total of all bars?", answer="6")
    texts = ["Bars red 4\nSum 4 + 2 = 6\nThe answer is 6", "The answer is 6", ""]
    some = [*texts, "area 6\n" * 18]  # the last has room without its marks only
    found = {"q": [Response("q", i, text, (), 0.0, False) for i, text in enumerate(some)]}
    host = inference(config, tmp_path, scorer.processor)
    with jax.set_mesh(mesh):
        scored = score_with(host, scorer, scorer.load(), [Asked(query, "what it answered")], found)
    assert scored["q"].pop().step_scores == ()
    assert "1 responses get 0: with their prompt over 160 tokens" in caplog.text
    policy, processor = models.load(folder / "second", jnp.float32)
    pair = [processor.tokenizer.get_vocab()[token] for token in "+-"]
    ids = processor.tokenizer("<|user|>\nJudge. What is the total of all bars?\n")["input_ids"]
    parts = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (mark, between)]

    @jax.jit
    def odds(policy, tokens, branch):
        batch = Batch(tokens, branch, None, jnp.full_like(tokens, -1), np.zeros((1, 0)))
        return policy.logits(policy.hidden(batch))[0, :, pair]

    for text, each in zip(texts, scored["q"], strict=True):
        row, places = list(ids), []
        for line in text.splitlines():
            row += parts[1] if places else []
            row += [*processor.tokenizer(line, add_special_tokens=False)["input_ids"], *parts[0]]
            places.append(len(row) - 1)
        branch = np.where(np.arange(160) < len(row), 0, -1)[None]
        good, bad = np.asarray(odds(policy, np.resize(row, (1, 160)), branch), np.float64)[:, places]
        np.testing.assert_allclose(each.step_scores, 1 / (1 + np.exp(bad - good)), atol=1e-5)
    config.prm.token = "+-"
    with pytest.raises(ValueError, match=r"prm.token: '\+-' is not one token of this vocabulary"):
        evaluate.scorer_of(judge, mesh, jnp.float32, config)
    config.prm.token = "-"
    with pytest.raises(ValueError, match=r"prm.token = '-', prm.against = '-': both are \d+"):
        evaluate.scorer_of(judge, mesh, jnp.float32, config)
    config.prm.update({"token": "+", "mark": "<|end|>\n<|im_start|>"})
    with pytest.raises(ValueError, match=r"prm.mark = .*: <\|im_start\|> is no token of this vocabulary"):
        evaluate.scorer_of(judge, mesh, jnp.float32, config)


def test_a_reward_model_without_its_tokenizer_is_refused_at_the_start(place, tmp_path):
    """By the check that a run begins with, and not after the warm-up."""
    folder, config = place
    check(models.Pretrained(folder / "reward"), config.prm)
    shutil.copytree(folder / "reward", tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"bare.*tokenizer"):
        check(models.Pretrained(tmp_path / "bare"), config.prm)


def test_other_weights_of_the_same_name_are_refused(place, tmp_path):
    folder, config = place
    evaluate.run(config, tmp_path / "work", [str(folder / "first")], None, lambda: False)
    shutil.copytree(folder / "second", tmp_path / "first")
    with pytest.raises(ValueError, match="made with other settings"):
        evaluate.run(config, tmp_path / "work", [str(tmp_path / "first")], None, lambda: False)


def another_question(data):
    rewrite(data, "question", lambda text: "Is it so? " + text)


def another_answer(data):
    rewrite(data, "answer", lambda text: "12" if text != "12" else "13")


def another_picture(data):
    rows = json.loads((data / "test.json").read_text())
    pictures = sorted({row["image"] for row in rows})
    shutil.copyfile(data / pictures[0], data / pictures[-1])


def rewrite(data, key, change):
    """Changes the first row of the file, as a later release of a benchmark corrects one."""
    rows = json.loads((data / "test.json").read_text())
    turn, mark = {"question": (0, "Question: "), "answer": (1, "The answer is ")}[key]
    value = rows[0]["conversations"][turn]["value"]
    head, _, tail = value.partition(mark)
    rows[0]["conversations"][turn]["value"] = head + mark + change(tail)
    (data / "test.json").write_text(json.dumps(rows))


@pytest.mark.parametrize(
    ("first", "then", "change"),
    [
        (5, 0, None),
        (0, 5, None),
        (0, 0, another_question),
        (0, 0, another_answer),
        (0, 0, another_picture),
    ],
)
def test_questions_that_changed_are_asked_again(place, tmp_path, caplog, first, then, change):
    """A second evaluation in the same workdir ends as one in a new workdir: no old response answers a
    question that is another one now, and none is missing or left over."""
    folder, config = place
    config = config.copy_and_resolve_references()
    shutil.copytree(folder / "data", tmp_path / "data")
    config.benchmarks.root = str(tmp_path / "data")
    names = [str(folder / "first")]
    config.benchmarks.limit = first
    evaluate.run(config, tmp_path / "again", names, None, lambda: False)
    config.benchmarks.limit = then
    if change:
        change(tmp_path / "data")
    caplog.clear()
    evaluate.run(config, tmp_path / "again", names, None, lambda: False)
    assert "it answers something else than is asked now" in caplog.text
    evaluate.run(config, tmp_path / "new", names, None, lambda: False)
    for name in ("mathv360k.json", "mathv360k.jsonl"):
        one, two = (tmp_path / run / "benchmarks" / "first" / name for run in ("again", "new"))
        assert one.read_text() == two.read_text()
    assert json.loads(two.with_suffix(".json").read_text())["left_out"] == 0


def test_another_dtype_of_sampling_is_refused(place, tmp_path):
    folder, config = place
    config = config.copy_and_resolve_references()
    evaluate.run(config, tmp_path, [str(folder / "first")], None, lambda: False)
    config.sampling.dtype = "bfloat16"
    with pytest.raises(ValueError, match="made with other settings .*'dtype': ..float32', 'bfloat16'"):
        evaluate.run(config, tmp_path, [str(folder / "first")], None, lambda: False)


@pytest.mark.parametrize("which", ["policy", "reward"])
def test_other_weights_in_the_same_place_are_refused(place, tmp_path, which):
    """Whatever their times say."""
    folder, config = place
    config = config.copy_and_resolve_references()
    config.benchmarks.samples = 1
    shutil.copytree(folder / "first", tmp_path / "policy")
    shutil.copytree(folder / "reward", tmp_path / "reward")
    names, prm = [str(tmp_path / "policy")], str(tmp_path / "reward")
    evaluate.run(config, tmp_path / "work", names, prm, lambda: False)
    weights = tmp_path / which / "model.safetensors"
    if not weights.exists():
        weights = sorted((tmp_path / which).glob("*.safetensors"))[0]
    before = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-4:] = bytes([1, 2, 3, 4])
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match="made with other settings"):
        evaluate.run(config, tmp_path / "work", names, prm, lambda: False)


def test_a_run_that_was_trained_again_is_another_policy(tmp_path):
    """In the same folder, of the same stage, after as many steps; so is its reward model."""
    for stage in (Stage.iteration(2), Stage.reward_model):
        state = tmp_path / "run" / "checkpoints" / stage.name / "6" / "state"
        state.mkdir(parents=True)
        (state / "d").write_bytes(b"first")
        before = evaluation.identity(tmp_path / "run", stage)
        os.utime(state / "d", (0, 0))
        assert evaluation.identity(tmp_path / "run", stage) == before
        (state / "d").write_bytes(b"other")
        assert evaluation.identity(tmp_path / "run", stage) != before
        (state / "d").write_bytes(b"first")
        (tmp_path / "run" / "tokenizer").mkdir(exist_ok=True)
        (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_text(stage.name)
        assert evaluation.identity(tmp_path / "run", stage) != before


def test_a_reward_model_on_labelled_steps(place, tmp_path):
    """VisualProcessBench needs no policy; its scores are those that the votes use, and a restart scores none
    again. A solution that does not fit is left out and counted."""
    folder, config = place
    config = config.copy_and_resolve_references()
    data = tmp_path / "visualprocessbench"
    data.mkdir()
    figure = sorted((folder / "data").rglob("*.png"))[0]
    shutil.copyfile(figure, data / "1.png")
    rows = []
    for number in range(5):
        steps = [f"Bars red {number} blue 2", "", "Sum 4 + 2 = 6", f"The answer is {number}"]
        labels = [1, 1, 0 if number == 1 else -1, 1 - 2 * (number % 2)]
        response = {"steps": steps if number < 4 else [*steps[:3], "6 " * 400], "process_correctness": labels}
        rows.append({"image": ["1.png"], "question": f"How many? {number}", "answer": "3"})
        rows[-1] |= {"response": response, "policy_model": "p", "data_source": ["MMMU", "WeMath"][number % 2]}
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.benchmarks.names, config.benchmarks.root = ("visualprocessbench",), str(tmp_path)
    reward = str(folder / "reward")
    assert evaluate.run(config, tmp_path / "work", [], reward, lambda: False) == {}
    stem = tmp_path / "work" / "benchmarks" / "visualprocessbench_reward"
    record = json.loads(stem.with_suffix(".json").read_text())
    assert (record["solutions"], record["left_out"]) == (5, 1)
    assert record["steps"] == {"right": 6, "wrong": 5, "neutral": 1, "blank": 4}
    lines = [json.loads(line) for line in stem.with_suffix(".jsonl").read_text().splitlines()]
    scored = [line for line in lines if line["scores"]]
    assert [len(line["scores"]) for line in scored] == [3] * 4 and lines[4]["scores"] is None
    assert len({score for line in scored for score in line["scores"]}) > 6
    pairs = [pair for line in scored for pair in zip(line["scores"], line["labels"]) if pair[1]]
    hits = sum((score >= 0.5) == (label > 0) for score, label in pairs)
    of_right = 2 * sum(score >= 0.5 and label > 0 for score, label in pairs)
    assert record["given"]["right"] == of_right / max(of_right + len(pairs) - hits, 1)
    before = stem.with_suffix(".json").read_bytes()
    evaluate.run(config, tmp_path / "work", [], reward, lambda: True)  # stops where anything is left to score
    assert stem.with_suffix(".json").read_bytes() == before
    for names, prm, message in (
        (("visualprocessbench",), None, "visualprocessbench measures a reward model"),
        (("mathv360k", "visualprocessbench"), reward, "no policy is named"),
    ):
        config.benchmarks.names = names
        with pytest.raises(ValueError, match=message):
            evaluate.run(config, tmp_path / "other", [], prm, lambda: False)


def test_the_main_job_asks_its_reward_model(monkeypatch, caplog):
    asked = []
    monkeypatch.setattr(
        evaluation, "judge_steps", lambda host, what, scorer, name: asked.append((scorer, name))
    )
    run = ConfigDict({"benchmarks": {"solutions": (1,)}})
    scorer = Scorer(lambda: None, {}, None, ())
    verb.benchmark(run, [], scorer)
    verb.benchmark(run, [], None)
    assert asked == [(scorer, "prm")] and "no reward model" in caplog.text


@pytest.mark.parametrize(
    ("changes", "checkpoints", "prm", "message"),
    [
        ({"names": ()}, ["first"], None, "no benchmark is named"),
        ({"names": ("mathvista",)}, ["first"], None, "mathvista: .*looked for testmini"),
        ({"names": ("nonsense",)}, ["first"], None, "'nonsense': choose one of 'mathvista'"),
        ({"prompt": "nonsense"}, ["first"], None, "choose one of 'official', "),
        ({}, ["nowhere"], None, "nowhere: no such folder, and a hub id would be owner/name"),
        ({}, ["nowhere:warmup"], None, "neither a run nor a checkpoint's folder"),
        ({"samples": 2}, ["first"], "nothing", "nothing: no such folder, and a hub id would be owner/name"),
        ({}, ["first", "./first"], None, "have the same name"),
        ({}, ["first"], "reward", "--samples=16"),
    ],
)
def test_refuses(place, tmp_path, changes, checkpoints, prm, message):
    folder, config = place
    config = config.copy_and_resolve_references()
    config.benchmarks.update(changes)
    names = [f"{folder}/{name}" for name in checkpoints]
    with pytest.raises(ValueError, match=message):
        evaluate.run(config, tmp_path, names, prm and f"{folder}/{prm}", lambda: False)
