"""The report on small made-up workdirs: what is there is shown, what is not is left out, nothing is run."""

import base64
import dataclasses
import hashlib
import html.parser
import http.server
import json
import logging
import re
import subprocess
import sys
import threading

import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from mstar_jax import records
from mstar_jax.report import __main__ as report
from mstar_jax.report import figure2, gallery, markup, page, relativity, runs, tables
from mstar_jax.rewards import metrics
from mstar_jax.store import Store, line, rollout
from mstar_jax.structs import Query, Response

EVIL = '</script><script>alert("x")</script><img src=x onerror=alert(1)>'
STEPS = ["Bars red 4 blue 2", "Sum 4 + 2 = 6"]
SECTIONS = ("runs", "figure3", "narrowing", "stages", "figure4", "figure5", "temperature", "figure2", "prm")
SECTIONS += ("samples",)


def response(sample, steps, answer, gold="6", temperature=1.0, scores=None, truncated=False):
    text = "\n".join([*steps, f"The answer is {answer}"])
    verdict = "correct" if answer == gold else "wrong"
    return Response("", sample, text, (1, 2), -1.0, truncated, answer, verdict, scores, 0, temperature)


def groups(scored):
    """Two queries; of the first, correct responses with 3, 3, 4 and 2 steps and rewards .9, .8, .3, .2."""
    first = [
        response(0, STEPS, "6", temperature=0.0, scores=(0.9, 0.9, 0.9)),
        response(1, STEPS, "6", scores=(0.95, 0.9, 0.99)),
        response(2, STEPS, "6", scores=(0.8, 0.9, 0.9)),
        response(3, ["Bars red 4 blue 2", "Sum 4 + 3 = 7", EVIL], "6", scores=(0.9, 0.3, 0.4, 0.5)),
        response(4, ["Bars red 6"], "6", scores=(0.2, 0.6)),
    ]
    second = [response(0, STEPS, "7", temperature=0.0, scores=(0.5, 0.4, 0.3))]
    second += [response(i, STEPS, str(8 + i), scores=(0.5, 0.4, 0.1 * i)) for i in (1, 2, 3)]
    second += [response(4, STEPS, "6", scores=(0.9, 0.9, 0.9), truncated=True)]
    bare = [[Response(**{**vars(r), "step_scores": None}) for r in group] for group in (first, second)]
    return (first, second) if scored else bare


def record(stage, iteration, split, accuracy, **more):
    numbers = {"greedy_accuracy": accuracy, "pass_at_k": 0.9, "gap": 0.9 - accuracy, "entropy": 1 - accuracy}
    head = {"stage": stage, "iteration": iteration, "split": split, "n": 50, "k": 4}
    return {**head, **numbers, "temperature": 0.7, "kept": 12, "unparsed": 0.01, "seconds": 1.0, **more}


def grid():
    rows = [
        {"temperature": t, "pass_at_k": 0.8, "gap": 0.3, "reward_pass_at_2": 1 - t / 2} for t in (0.3, 0.7)
    ]
    return [row | {"greedy_accuracy": 0.5, "sampled_accuracy": 0.4, "balance_score": 0.2} for row in rows]


def make_run(path, prm=True, iterations=3, name="<b>run</b>"):
    """A finished run of the embedded data set, with a reward model and exploration or without both."""
    stages = [record("base", 0, "validation", 0.4, temperature=None, kept=None)]
    stages += [record("warmup", 0, split, 0.45) for split in ("validation", "test")]
    for t in range(1, iterations + 1):
        stages.append(record("iteration", t, "validation", 0.45 + 0.05 * t))
    stages.append(record("iteration", iterations, "test", 0.61))
    if prm:
        for stage in stages:
            stage |= {"reward_pass_at_2": 0.7, "balance_score": 0.3, "all_right": 0.4, "unfaithful": 0.2}
        stages[1] |= {"grid": grid(), "chosen": 0.3}
        stages[4] |= {"grid": grid(), "chosen": 0.3}
        bins = metrics.calibration([0.1, 0.2, 0.9, 0.8], [0.0, 0.5, 1.0, 0.75])["bins"]
        known = {"step_auc": 0.71, "step_auc_likelihood": 0.68, "all_right_auc": 0.66}
        head = {"stage": "prm", "iteration": 0, "split": "held-out", "n": 2, "responses": 8, "steps": 20}
        about = {"label_auc": 0.8123, "label_auc_within": 0.66, "ece": 0.04, "brier": 0.1}
        curve = [
            {"n": n, "greedy": 0.5, "best_of_n": 0.4, "majority": 0.5, "weighted_vote": 0.6} for n in (1, 4)
        ]
        stages.append({**head, **about, "calibration": bins, "curve": curve, "truth": known})
    config = {
        "seed": 1,
        "evolve": {"iterations": iterations, "k": 4, "keep": 2},
        "eval": {"temperature": 1.0},
    }
    results = {"config": config | {"note": EVIL}, "seed": 1, "versions": {"jax": "0"}}
    device = {"kind": "cpu", "platform": "cpu", "count": 1}
    path.mkdir(parents=True, exist_ok=True)
    (path / "results.json").write_text(json.dumps(results | {"device": device, "stages": stages}))
    picture = path / "figures" / "a.png"
    picture.parent.mkdir()
    Image.new("RGB", (8, 8), "red").save(picture)
    truth = {"id": "q0", "split": "validation", "family": "sum", "objects": [["red", 4], ["blue", 2]]}
    lines = [truth | {"id": q, "variants": [STEPS], "answer": "6"} for q in ("q0", "q1")]
    (path / "figures" / "truth.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    stores = {"rollouts": ["warmup_validation", f"iteration_{iterations:02d}_validation", "iteration_01"]}
    if prm:
        stores["scores"] = [f"iteration_{iterations:02d}_validation"]
    for kind, names in stores.items():
        for each in names:
            store = Store(path / kind / each, {"seed": 1})
            images = [str(picture)], ["/nowhere/figures/a.png", "/nowhere/else.png"]
            queries = [Query(f"q{i}", images[i], f"{name} How many? {EVIL}", None, "6") for i in (0, 1)]
            records = [line(rollout(q, group)) for q, group in zip(queries, groups(kind == "scores"))]
            store.write(0, records, str)
    return path


class Tags(html.parser.HTMLParser):
    """Start tags with their attributes, and the text of the sections."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.data, self.inside = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = dict(attrs).get("id") or "title" if tag in ("section", "title") else self.inside

    def handle_data(self, data):
        self.data[self.inside] = self.data.get(self.inside, "") + data


def read(path):
    text = path.read_text(encoding="utf-8")
    return text, Tags(text)


def browsed(text):
    """The value that the page's script reads."""
    found = re.findall(r'<script type="application/json" id="samples-data">(.*?)</script>', text, re.DOTALL)
    assert len(found) == 1
    return json.loads(found[0])


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return page.write([make_run(tmp_path_factory.mktemp("runs") / "run <1> $x$")])


# ---- the page -----------------------------------------------------------------------------------------


def test_every_section_is_there(full):
    text, shown = read(full)
    assert [a["id"] for tag, a in shown.tags if tag == "section"] == list(SECTIONS)
    assert "data-absent" not in text.split("<main>")[1]
    assert len([1 for tag, _ in shown.tags if tag == "figure"]) == 14
    assert shown.data["title"].startswith("M-STaR: run <1> $x$\n")
    assert {p.name for p in full.parent.glob("*.png")} >= {"figure3.png", "figure2a.png", "temperature.png"}
    assert all(Image.open(p).width > 600 for p in full.parent.glob("*.png"))
    assert "0.812" in shown.data["prm"] and "0.680" in shown.data["prm"]
    assert "45.0 → 61.0 %" in shown.data["runs"]


def test_page_loads_nothing_and_runs_only_its_own_script(full):
    text, shown = read(full)
    assert not re.search(r"https?:|//\w+\.\w+", text.replace("/nowhere/", ""))
    assert not [a for tag, a in shown.tags if tag in ("link", "iframe", "object", "base", "form")]
    for _, attributes in shown.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/"))
    scripts = [a for tag, a in shown.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "samples-data"}, {}]
    policy = next(a["content"] for tag, a in shown.tags if tag == "meta" and "http-equiv" in a)
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(script) == 1 and "innerHTML" not in script[0]
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"'sha256-{digest}'" in policy


def test_text_of_a_model_stays_text(full):
    text, shown = read(full)
    assert EVIL not in text and "onerror=alert(1)>" not in text.replace("onerror=alert(1)&gt;", "")
    assert "alert(" in shown.data["runs"]  # in the config that is shown
    data = browsed(text)
    assert EVIL in data["stages"][0]["queries"][0]["question"]
    stage = next(s for s in data["stages"] if s["name"] == "iteration_03_validation")
    assert EVIL in [step for r in stage["queries"][0]["responses"] for step in r["steps"]]


def test_same_run_gives_the_same_bytes(full, tmp_path):
    again = page.write([full.parent.parent], tmp_path / "again")
    assert again.read_bytes() == full.read_bytes()


def test_run_without_reward_model_and_exploration(tmp_path):
    text, shown = read(page.write([make_run(tmp_path / "plain", prm=False)]))
    absent = re.findall(r'<section id="(\w+)" class="absent">', text)
    assert absent == ["figure4", "temperature", "figure2", "prm"]
    assert "the temperature is static, T = 0.7" in shown.data["temperature"]
    assert "no record has Reward-Pass@2" in shown.data["figure5"]
    assert "Reward-Pass@2" not in shown.data["stages"]


def test_broken_and_missing_parts_do_not_crash(tmp_path):
    run = make_run(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    results["stages"][1]["greedy_accuracy"] = float("nan")
    results["stages"][2] |= {"n": None, "pass_at_k": "?"}
    results["stages"][-1] |= {"calibration": "?", "truth": None}
    results["stages"] += [None, {}, {"stage": "iteration", "iteration": None, "split": "validation"}]
    results["config"] = None
    (run / "results.json").write_text(json.dumps(results))
    (run / "scores" / "iteration_03_validation" / "00001.jsonl").write_text("{broken\n")
    (run / "figures" / "truth.jsonl").write_text("[]\n")
    (run / "figures" / "a.png").write_bytes(b"no image")
    text, shown = read(page.write([run]))
    assert re.findall(r'<section id="(\w+)" class="absent">', text) == ["figure2", "prm"]
    assert "00001.jsonl" in shown.data["figure2"] and "iteration_03_validation" in shown.data["samples"]
    names = [stage["name"] for stage in browsed(text)["stages"]]
    assert names == ["warmup_validation", "iteration_01"]
    assert browsed(text)["stages"][0]["queries"][0]["missing"] == 1


def test_benchmarks(tmp_path):
    folder = tmp_path / "run" / "benchmarks" / "warmup"
    folder.mkdir(parents=True)
    part = {"accuracy": 0.5, "count": 8}
    greedy = {"accuracy": 0.25, "strict": part | {"unparsed": 0.125}, "official": part, "fallback": part}
    shown = {"policy": "warmup", "benchmark": "m3cot", "greedy": greedy | {"truncated": 0.0}}
    (folder / "m3cot.json").write_text(json.dumps(shown))
    make_run(tmp_path / "run")
    assert '<section id="benchmarks">' in read(page.write([tmp_path / "run"]))[0]
    text = tables.benchmarks(runs.RunRecord("run", tmp_path / "run", {"stages": []}))
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", text.partition("<tbody>")[2])
    assert cells[:4] == ["warmup", "m3cot", "greedy", "8"]
    assert cells[4].startswith("25.0<small>7–59") and cells[5:] == ["50.0", "50.0", "12.5", "0.0"]


def test_run_that_has_only_begun(tmp_path):
    (tmp_path / "results.json").write_text('{"stages": []}')
    text, _ = read(page.write([tmp_path]))
    assert re.findall(r'<section id="(\w+)" class="absent">', text) == list(SECTIONS[1:])
    assert "no stage was evaluated yet" in text


def test_no_run_is_an_error(tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "results.json").write_text('{"stages": 3')
    for workdirs, names in (([tmp_path], ()), ([tmp_path / "half"], ()), ([], ()), ([tmp_path], ("a", "b"))):
        with pytest.raises(ValueError):
            page.write(workdirs, names=names)


def test_two_runs_are_compared(tmp_path):
    workdirs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", prm=False, iterations=2)]
    text, shown = read(page.write(workdirs, tmp_path / "out"))
    assert "M-STaR: run, run (2)" in shown.data["title"]
    assert "comparison" in [a.get("id") for tag, a in shown.tags if tag == "section"]
    assert "evolve.iterations (differs)" in shown.data["runs"]
    assert "static T: run (2)" in shown.data["figure5"] and "adaptive T: run" in shown.data["figure5"]
    assert "Left out: no stage was explored" in shown.data["figure4"]  # of the second, the first has it
    names = {stage["name"] for stage in browsed(text)["stages"]}
    assert {"run: warmup_validation", "run (2): warmup_validation"} <= names
    assert (tmp_path / "out" / "figure3_gap.png").exists() and (tmp_path / "out" / "figure2a_1.png").exists()


@pytest.fixture
def command():
    """Parsed flags; undoes what a command does to the log of the package."""
    log = logging.getLogger("mstar_jax")
    handlers, propagate = list(log.handlers), log.propagate
    flags.FLAGS.mark_as_parsed()
    yield
    flags.FLAGS.unparse_flags()
    log.handlers[:], log.propagate = handlers, propagate


@pytest.mark.usefixtures("command")
def test_command(tmp_path, capsys):
    run = make_run(tmp_path / "run", prm=False)
    with flagsaver.as_parsed(output=str(tmp_path / "out"), names="mine"):
        report.main(["report", str(run)])
    assert "report.html" in capsys.readouterr().out
    assert "M-STaR: mine" in (tmp_path / "out" / "report.html").read_text()
    bad_url = {"judge_url": "file:///etc", "judge_model": "m"}
    for workdirs, values, message in (
        ([], {}, "at least one workdir"),
        (["nowhere"], {}, "nowhere is not a readable run"),
        ([str(run)], bad_url, "must begin with http"),
        ([str(run)], {"judge_model": "m"}, "must be given together"),
        ([str(run)], {"output": str(run / "results.json")}, "cannot be written"),
    ):
        with flagsaver.as_parsed(**values), pytest.raises(SystemExit) as stopped:
            report.main(["report", *workdirs])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_no_backend_is_started():
    code = "import jax, mstar_jax.report.page; from jax._src import xla_bridge as x; assert not x._backends"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the numbers --------------------------------------------------------------------------------------


def test_curve_by_hand():
    curve = runs.rollouts_curve(groups(True), (1, 2, 4, 8), "min")
    assert curve.n == [1, 2, 4]
    # the second query: rewards .1 .2 .3 and 0 for the truncated one, answers 9 10 11 6
    names = ("greedy", "best_of_n", "majority", "weighted_vote")
    assert curve.accuracy == {name: [0.5] * 3 for name in names}


def test_curve_is_that_of_measures_where_answers_need_no_options():
    scored = [[Response(**{**vars(r), "query_id": f"q{i}"}) for r in g] for i, g in enumerate(groups(True))]
    queries = [Query(f"q{i}", (), "?", None, "6", "integer") for i in range(2)]
    expected = metrics.curve(list(zip(queries, scored)), (1, 2, 4))
    found = runs.rollouts_curve(scored, (1, 2, 4), "min")
    for name in ("greedy", "best_of_n", "majority", "weighted_vote"):
        assert found.accuracy[name] == [row[name] for row in expected]


def test_equal_answers_vote_together():
    spelled = [("1/2", "correct"), ("0.5", "correct"), ("3", "wrong"), ("3.0", "wrong"), ("3", "wrong")]
    group = [
        Response("q", i, "", (), 0.0, False, answer, verdict, (0.9,) if verdict == "correct" else (0.1,))
        for i, (answer, verdict) in enumerate(spelled)
    ]
    found = runs.rollouts_curve([group], (4, 5), "min").accuracy
    assert found["majority"] == [1.0, 0.0] and found["weighted_vote"] == [1.0, 1.0] and not found["greedy"]


def test_top_two_against_the_rest_by_hand():
    pairs = runs.top_and_rest(groups(True), "min")
    assert [([r.sample for r in top], [r.sample for r in rest]) for top, rest in pairs] == [([1, 2], [3, 4])]
    top, rest, difference = runs.compare(pairs * 2, lambda r: len(r.text.split("\n")))
    assert (top, rest, difference) == ((3, 0), (3, 0), (0, 0))
    assert runs.mean([1.0, 3.0]) == (2.0, 1.0)
    with pytest.raises(runs.Missing):
        runs.mean([])


def test_exploration_is_read_at_the_temperature_of_evaluation(tmp_path):
    run = runs.read_runs([make_run(tmp_path / "run")])[0]
    mixed = [[response(i, STEPS, "6", temperature=t) for i, t in enumerate((0, 0.3, 0.3, 1.0))]]
    assert runs._at_one_temperature(run, mixed) == (1.0, [[mixed[0][0], mixed[0][3]]])
    run.results["config"]["eval"]["temperature"] = 0.5
    assert runs._at_one_temperature(run, mixed)[0] == 0.3


# ---- the gallery --------------------------------------------------------------------------------------


def test_gallery_shows_scores_truth_and_images(full):
    data = browsed(full.read_text())
    assert [stage["name"] for stage in data["stages"]] == [
        "warmup_validation",
        "iteration_01",
        "iteration_03_validation",
    ]
    first, second = data["stages"][2]["queries"]
    assert first["responses"][3]["scores"] == [0.9, 0.3, 0.4, 0.5] and first["responses"][3]["reward"] == 0.3
    assert first["responses"][3]["right"] == [True, False, False]
    assert first["responses"][0]["steps"] == [*STEPS, "The answer is 6"]
    assert second["responses"][4]["truncated"] and second["responses"][4]["reward"] is None
    # the second query's images were copied from elsewhere: one is found inside the workdir, one is not
    assert len(second["images"]) == 1 and second["missing"] == 1
    assert all(image.startswith("data:image/png;base64,") for image in data["images"])


def test_gallery_keeps_to_its_budget_and_to_the_run(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "secret.png").write_bytes((run / "figures" / "a.png").read_bytes())
    store = Store(run / "rollouts" / "warmup_test", {})
    queries = [Query(f"q{i}", ("../secret.png", "figures/../../secret.png"), "?" * 9000) for i in range(60)]
    store.write(0, [line(rollout(q, groups(False)[0])) for q in queries], str)
    found = runs.read_runs([run])[0]
    shown = gallery.Gallery()
    assert shown.add(found, store.folder, "all", 10**7) > gallery.QUERIES * 4000
    shown.add(found, store.folder, "few", 12_000)
    assert [len(stage["queries"]) for stage in shown.stages] == [gallery.QUERIES, 3]
    assert not shown.images and shown.stages[0]["queries"][0]["missing"] == 2
    assert len(shown.stages[0]["queries"][0]["question"]) == gallery.TEXT


def test_gallery_shows_the_options_of_a_question(tmp_path):
    """Without them, a gold answer "B" says nothing. Runs of older versions have none in their rollouts."""
    run = make_run(tmp_path / "run")
    store = Store(run / "rollouts" / "warmup_test", {})
    query = Query("q", (), "Which?", ("red <b>", "blue"), "B", "choice")
    store.write(0, [line(rollout(query, groups(False)[0]) | {"options": query.options})], str)
    shown = gallery.Gallery()
    shown.add(runs.read_runs([run])[0], store.folder, "all", 10**6)
    (found,) = shown.stages[0]["queries"]
    assert (found["question"], found["gold"]) == ("Which?\nChoices:\n(A) red <b>\n(B) blue", "B")
    assert "<b>" not in shown.json()


def test_samples_show_the_options_of_a_question(tmp_path):
    query = Query("q", (), "Which?", ("red | pink", "blue"), "B", "choice")
    records.write_samples(tmp_path / "s.md", [query, Query("r", (), "Sum?", None, "3")], groups(False)[:2], 2)
    lines = (tmp_path / "s.md").read_text().splitlines()
    assert any("| Which?<br>Choices:<br>(A) red \\| pink<br>(B) blue | B |" in line for line in lines)
    assert any("| Sum? | 3 |" in line for line in lines)


def test_samples_are_a_table_whatever_a_model_wrote(tmp_path):
    """Line breaks of all kinds, markup, a name of a picture with spaces and brackets."""
    query = Query("q|1", (str(tmp_path / "S/a (1).png"),), "Which <b>?", None, "3")
    said = "one\rtwo\u2028three `x` <script>alert(1)</script> | &"
    response = dataclasses.replace(groups(False)[0][0], text=said)
    records.write_samples(tmp_path / "s.md", [query], [[response]], 2)
    rows = (tmp_path / "s.md").read_text().split("\n")[4:]
    assert len(rows) == 2 and not rows[1]
    assert rows[0].startswith(r"| q\|1 | [a (1).png](S/a%20%281%29.png) | Which &lt;b&gt;? | 3 |")
    assert rows[0].endswith(
        r"| one<br>two<br>three &#96;x&#96; &lt;script&gt;alert(1)&lt;/script&gt; \| &amp; |"
    )


def test_gallery_chooses_the_ends_of_a_long_run(tmp_path):
    names = [f"iteration_{t:02d}{kind}" for t in range(1, 21) for kind in ("", "_validation")]
    for name in [
        "base_validation",
        "warmup",
        "base_check_00500",
        "iteration_20_test",
        "prm_held_out",
        *names,
    ]:
        (tmp_path / "rollouts" / name).mkdir(parents=True)
        (tmp_path / "rollouts" / name / "00000.jsonl").write_text("")
    chosen = [f.name for f in gallery.folders(runs.RunRecord("r", tmp_path, {"stages": []}), 12)]
    assert len(chosen) == 12 and chosen[0] == "base_validation" and chosen[-1] == "iteration_20_validation"
    assert "prm_held_out" in chosen and "base_check_00500" not in chosen


# ---- the judge ----------------------------------------------------------------------------------------


class Stub(http.server.BaseHTTPRequestHandler):
    """Answers what `server.answer(request's JSON)` gives: (status, body)."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body, self.headers.get("Authorization")))
        status, answer = self.server.answer(body)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def log_message(self, *_):
        pass


def reply(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.asked, server.answer = [], lambda body: reply("4")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def judge(server, **values):
    url = f"http://127.0.0.1:{server.server_address[1]}"
    return relativity.Judge(**{"url": url, "model": "stub", "pause": 0.0, "timeout": 2.0, **values})


@pytest.mark.parametrize(
    ("text", "score"),
    [("4", 4), (" **5** ", 5), ("Score: 3/5", 3), ("2 out of 5.", 2), ("<think>1 or 2</think>\n4", 4)]
    + [
        ("0", None),
        ("6", None),
        ("4.5", None),
        ("-3", None),
        ("4 or 5", None),
        ("relevant", None),
        ("", None),
    ],
)
def test_reply_is_read_or_counted(text, score):
    assert relativity.parse(text) == score


def test_judge_rates(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    server.answer = lambda body: reply("5" if "good" in body["messages"][0]["content"] else "hm")
    found = relativity.rate(
        judge(server, calls=3), [("q {x}", "good"), ("q", "bad"), ("q", "good"), ("q", "more")]
    )
    assert found == relativity.Ratings([5, None, 5], unparsable=1, failed=0, error="")
    path, body, key = server.asked[0]
    assert (path, key, body["temperature"], body["model"]) == (
        "/v1/chat/completions",
        "Bearer key",
        0,
        "stub",
    )


def test_judge_tries_again_and_gives_up(server):
    answers = iter([(500, b""), (200, b"no JSON"), reply("2")])
    server.answer = lambda body: next(answers)
    assert relativity.rate(judge(server, workers=1), [("q", "r")]).scores == [2]
    server.answer, server.asked[:] = (lambda body: (302, b"")), []
    found = relativity.rate(judge(server, workers=1, broken=2), [("q", "r")] * 9)
    assert (found.failed, found.error) == (9, "HTTP status 302") and len(server.asked) == 2
    assert {path for path, *_ in server.asked} == {"/v1/chat/completions"}  # it does not follow


def test_figure_2c(server, tmp_path):
    run = runs.read_runs([make_run(tmp_path / "run")])[0]
    drawn = markup.Page(tmp_path, several=False)
    server.answer = lambda body: reply("5" if "Sum 4 + 2" in body["messages"][0]["content"] else "2")
    text = figure2.figure2(drawn, run, "", judge(server))
    assert "Top-2, mean 5.00" in text and "the rest, mean 2.00" in text and "by stub" in text
    assert len(server.asked) == 4 and (tmp_path / "figure2c.png").exists()
    server.answer = lambda body: (401, b"")
    text = figure2.figure2(drawn, run, "", judge(server))
    assert "4 without a reply of 4. HTTP status 401" in text and "Figure 2b of the paper" in text
