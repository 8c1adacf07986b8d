"""The informative curriculum on stores: which queries follow, at whatever moment a run begins again."""

import json
import shutil
import types

import numpy as np
import pytest

from configs import tiny
from mstar_jax.data import splits
from mstar_jax.stages import curriculum
from mstar_jax.store import Store, line, rollout
from mstar_jax.structs import Query, Response, Stage

QUERIES = [Query(f"q{n}", (), "How many?", answer="1") for n in range(40)]
K = 4


class Processor:
    """A token a character; there are no images."""

    def prefix_shapes(self, texts, sizes):
        return [(len(text), 0) for text in texts]

    def length_limit(self, prefix_tokens):
        return 1000


def run_in(workdir, seed=3, labelled=QUERIES, **values):
    config = tiny.get_config()
    config.seed = seed
    config.evolve.update({"curriculum": "informative", "fraction": 0.25, "k": K, **values})
    return types.SimpleNamespace(
        config=config,
        seed=seed,
        workdir=workdir,
        labelled=labelled,
        template="{question}",
        processor=Processor(),
        data=types.SimpleNamespace(max_prompt=20),
        shapes={},
    )


def write(workdir, stage, queries, seed=0):
    """A finished pass: of each query K responses, some right, some cut off."""
    store = Store(workdir / "rollouts" / stage.name, {"k": K})
    rng = np.random.default_rng([seed, stage.place])

    def response(query, i):
        verdict = ["correct", "wrong", "unparsed"][rng.integers(3)]
        return Response(query.id, i, "", (1,), 0.0, bool(rng.integers(2)), verdict=verdict)

    groups = [[response(query, i) for i in range(K)] for query in queries]
    lines = [line(rollout(query, group)) for query, group in zip(queries, groups)]
    half = len(lines) // 2
    for number, part in enumerate((lines[:half], lines[half:])):
        store.write(number, part, lambda number: "")
    return {g[0].query_id: sum(r.verdict == "correct" and not r.truncated for r in g) / K for g in groups}


@pytest.fixture
def whole(tmp_path):
    """Four iterations after a reward model: the run, the queries of each one, its notes, all pass rates."""
    run = run_in(tmp_path / "run")
    rates = [write(run.workdir, Stage.reward_model, QUERIES[:12])]
    asked, notes = [], []
    for t in range(1, 5):
        asked.append([query.id for query in curriculum.next_queries(run, t)])
        rates.append(write(run.workdir, Stage.iteration(t), [q for q in QUERIES if q.id in asked[-1]]))
        notes.append(curriculum.worth(run, Stage.iteration(t)))
    return run, asked, notes, rates


def test_pass_rates_are_those_of_the_responses(whole):
    run, asked, _, rates = whole
    for stage, found in zip((Stage.reward_model, *map(Stage.iteration, range(1, 5))), rates):
        assert curriculum.pass_rates(run, stage) == found
        assert json.loads((run.workdir / "rollouts" / stage.name / "pass_rates.json").read_text()) == found
    known = curriculum.measured(run, 3)
    for query, last in known.items():
        at = [t for t in (1, 2) if query in asked[t - 1]]
        place = Stage.iteration(at[-1]) if at else Stage.reward_model
        assert last == splits.Measured(place.place, rates[at[-1] if at else 0][query])
    assert set(known) == {q.id for q in QUERIES[:12]} | {*asked[0], *asked[1]}


def test_informative_queries_are_asked_again(whole):
    run, asked, notes, rates = whole
    for t in range(1, 5):
        known = curriculum.measured(run, t)
        good = [query for query, last in known.items() if 0 < last.rate < 1]
        assert len(asked[t - 1]) == 10  # one of them new, one settled
        assert len(set(good) & set(asked[t - 1])) >= min(8, len(good))
        told = notes[t - 1]["curriculum"]
        assert told["groups"] == 10 and sum(told["asked"].values()) == 10
        assert told["informative"] == sum(0 < rate < 1 for rate in rates[t].values())


@pytest.mark.parametrize("boundary", range(1, 5))
def test_a_restart_asks_the_same(whole, tmp_path, boundary):
    """A run that was killed before an iteration, or in it: the stores of the stages before are there, with or
    without the files of their pass rates, and of the iteration itself some of its store."""
    run, asked, notes, _ = whole
    for files in (True, False):
        again = run_in(tmp_path / f"again{files}")
        shutil.copytree(run.workdir, again.workdir)
        for t in range(boundary, 5):
            folder = again.workdir / "rollouts" / f"iteration_{t:02d}"
            if t > boundary:
                shutil.rmtree(folder)
            else:
                (folder / "00001.jsonl").unlink()
                (folder / "pass_rates.json").unlink()
        if not files:
            for path in again.workdir.glob("rollouts/*/pass_rates.json"):
                path.unlink()
        assert [q.id for q in curriculum.next_queries(again, boundary)] == asked[boundary - 1]
        for t in range(1, boundary):
            assert curriculum.worth(again, Stage.iteration(t)) == notes[t - 1]
    assert [q.id for q in curriculum.next_queries(run_in(run.workdir, seed=4), boundary)] != asked[
        boundary - 1
    ]


def test_uniform_reads_nothing(tmp_path):
    run = run_in(tmp_path, curriculum="uniform")
    assert curriculum.next_queries(run, 2) == splits.share(QUERIES, 0.25, 2, 3)
    assert curriculum.worth(run, Stage.iteration(2)) == {} and not list(tmp_path.iterdir())


def test_without_any_store_it_is_the_first_share(tmp_path):
    assert curriculum.next_queries(run_in(tmp_path), 1) == splits.share(QUERIES, 0.25, 1, 3)


def test_a_query_whose_prompt_is_too_long_takes_no_place(tmp_path):
    """It can never be measured: where all others have been, no query is new."""
    long = [Query(f"long{n}", (), "How many of them are there?", answer="1") for n in range(20)]
    run = run_in(tmp_path, labelled=[*QUERIES, *long])
    write(tmp_path, Stage.reward_model, QUERIES)
    for t in (1, 2):
        asked = curriculum.next_queries(run, t)
        assert len(asked) == 10 and set(asked) <= set(QUERIES)  # a fraction of those that can be asked
        write(tmp_path, Stage.iteration(t), asked)
        told = curriculum.worth(run, Stage.iteration(t))["curriculum"]
        assert told["asked"]["new"] == 0 and told["uniform"] > 0
