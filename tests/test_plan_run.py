"""The estimate of a whole run: calls of programs against the loop that makes them, stages by hand."""

import dataclasses
import types
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from configs import tiny as tiny_config
from mstar_jax import sharding
from mstar_jax.inference import rollouts
from mstar_jax.inference.draw import SamplingConfig
from mstar_jax.inference.sampler import Generated, Sampler
from mstar_jax.plan import __main__ as plan
from mstar_jax.plan import calls, hlo, measure, whole
from mstar_jax.plan.calls import Assumed
from mstar_jax.plan.cost import Cost
from mstar_jax.plan.programs import Program, Programs
from mstar_jax.profiling.flops import Chip
from mstar_jax.report import hours
from mstar_jax.report.runs import RunRecord
from mstar_jax.structs import Batch, Prompt, Query, Row

ASSUMED = Assumed(
    queries=1000,
    prompt=60,
    response=20,
    spread=0,
    right=0.5,
    distinct=1.0,
    distinct_warm_up=1.0,
    prefixes=4,
)


class Cache(NamedTuple):
    age: np.ndarray
    clock: int

    def rotated(self):
        return self


class Slots(NamedTuple):
    done: np.ndarray
    out: Generated
    cache: Cache
    left: np.ndarray  # steps of the sample in each place
    waiting: tuple[list[int], ...]  # of each slot, the lengths of the samples that have not started


class Counted(Sampler):
    """A sampler whose samples end after known numbers of steps, without a model."""

    def __init__(self, lengths, slots, shards, config):
        self.config, self.slots, self.shards = config, slots, shards
        self.lengths = {zlib.crc32(name.encode()): length for name, length in lengths.items()}
        self.steps = self.segments = self.prefills = 0
        self.share = 0.0

    def blank(self, model, batch, starts):
        none, places = np.zeros((self.slots, self.config.branches), int), (self.slots, self.config.places)
        out = Generated(none[:, :, None], none[:, :, None], none, none > 0)
        empty = np.zeros(places, int)
        return Slots(empty == 0, out, Cache(empty, 0), empty, tuple([] for _ in empty))

    def enter(self, model, slots, key, entry):
        self.prefills += 1
        source, keys = np.asarray(entry.source), np.asarray(entry.query_keys)
        each, size, places = self.slots // self.shards, len(keys) // self.shards, self.config.places
        left, age, done = slots.left.copy(), slots.cache.age.copy(), slots.done.copy()
        for slot in np.flatnonzero(source >= 0):
            lengths = self.lengths[int(keys[slot // each * size + source[slot]])]
            left[slot], slots.waiting[slot][:] = lengths[:places], lengths[places:]
            age[slot], done[slot] = 0, False
        return slots._replace(left=left, done=done, cache=slots.cache._replace(age=age))

    def advance(self, model, slots, temperatures, free, chunks=0):
        count, size = rollouts.ring(self.config.max_new_tokens)
        clock, age, done = slots.cache.clock, slots.cache.age.copy(), slots.done.copy()
        left = slots.left.copy()
        self.segments += 1
        full = (clock // size + 1) * size if count > 1 else 10**9
        while done.all(axis=1).reshape(self.shards, -1).sum(1).min() < free and clock < full:
            oldest = np.where(done, 0, age).max()
            if chunks and oldest > clock % size + (chunks - 1) * size:
                break
            clock, age, left = clock + 1, age + 1, left - 1
            self.steps += 1
            self.share += (chunks or count) / count
            for slot, place in np.argwhere(~done & (left == 0)):
                if slots.waiting[slot]:
                    left[slot, place], age[slot, place] = slots.waiting[slot].pop(0), 0
                else:
                    done[slot, place] = True
        return slots._replace(done=done, cache=Cache(age, clock), left=left)


@pytest.mark.parametrize(
    ("rows", "slots", "entering", "parts", "room", "longest"),
    [(40, 8, 2, 1, 16, 16), (40, 8, 4, 2, 200, 180), (21, 16, 4, 4, 44, 44), (5, 8, 8, 1, 300, 290)],
)
@pytest.mark.parametrize(("samples", "places"), [(1, 1), (3, 3), (5, 2)])
def test_rows_are_played_through_the_slots_as_the_loop_does(
    rows, slots, entering, parts, room, longest, samples, places
):
    """Steps, prefills and calls of the real loop of rollouts, with a sampler that only counts."""
    lengths = np.random.default_rng(rows).integers(1, longest + 1, (rows, samples))
    named = {f"q{at}": each.tolist() for at, each in enumerate(lengths)}
    sampler = Counted(named, slots, parts, SamplingConfig(samples, room, places))
    mesh = sharding.make_mesh(data=parts, devices=jax.devices()[:parts])
    processor: Any = types.SimpleNamespace(
        length_limit=lambda prompt: prompt + room, decode=lambda tokens: ""
    )
    made = [Row(Prompt(Query(name, (), ""), "", 4, 0)) for name in named]

    def batches():
        for at in range(0, rows, entering):
            yield tuple(made[at : at + entering]), Batch(*[np.zeros((entering, 4))] * 6)

    with jax.set_mesh(mesh):
        [_] = rollouts.rollouts(
            sampler,
            None,
            [made],
            batches(),
            processor,
            key=jax.random.key(0),
            temperatures=np.ones(samples),
            iteration=0,
            mesh=mesh,
        )
    found = calls.sampled(lengths, slots, places, entering, parts, room)
    assert found.prefills == sampler.prefills == -(-rows // entering)
    assert found.steps == sampler.steps
    assert found.segments == sampler.segments
    assert found.share == pytest.approx(sampler.share / sampler.steps)


# ---- stages -------------------------------------------------------------------------------------------


def estimated(changes, assumed=ASSUMED, seconds=1.0):
    """Uses of a shrunk config's programs by stage, each call and each step of decoding taking `seconds`."""
    config = tiny_config.get_config("smoke")
    config.update_from_flattened_dict(
        {
            "data.buckets": (64, 128, 256),
            "data.max_prompt": 120,
            "data.figures.train": 0,
            "sampling.batch": 8,
            "explore.batch": 8,
            "prm.rows": 8,
            "prm.queries": 500,
            "prm.labelled": 500,
            "prm.longest": 256,
            "evolve.batch": 8,
            "warmup.batch": 16,
            "evolve.k": 4,
            "warmup.k": 4,
        }
        | changes
    )
    mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        programs = Programs(config, mesh)
        made = {kind: programs.make(kind) for kind in programs.kinds()}
        for kind, each in made.items():  # FLOPs in proportion to a row's length, as without a tower
            made[kind] = [program._replace(own=lambda: {"language": 1e18}) for program in each]
        speeds = {kind: [whole.Speed(seconds, 0.0)] * len(each) for kind, each in made.items()}
        uses = whole.estimate(programs, assumed, made, speeds)
    return programs, {use.stage: use for use in uses}


def test_stages_by_hand():
    """Responses of exactly 20 tokens to prompts of 60, half of them right."""
    programs, uses = estimated({"sampling.max_new_tokens": 40, "sampling.refill": 1.0})
    c = programs.config
    warmup = uses["warm-up, rationales"]  # 64 queries, 8 at a time, prefilled in rows of 64 of 128 tokens
    assert (warmup.read, warmup.written) == (64 * 64, 64 * c.warmup.k * 20)
    weights, suffixes = (programs.make("rollouts")[1].least()[name] for name in ("weights", "responses"))
    prompts = programs.make("rollouts")[1].least()["prompts"]
    assert suffixes > 0 and weights > 0 and prompts > 0
    assert warmup.seconds == pytest.approx(8 * (64 / 128) + 8 * 20)  # of a step all is read: one chunk
    train = uses["warm-up, train"]  # rows of twice the batch, of 2 responses: 100 tokens in rows of 128
    assert train.seconds == pytest.approx(c.warmup.steps * 2 * 128 / 256)
    assert train.read == c.warmup.steps * 16 * 128
    labels = uses["reward model, labels"]  # 508 queries x 4 x 4 prefixes, 8 in a row, half a row more each
    rows = round((500 + c.prm.held_out) * 2.5)
    assert labels.responses == rows * c.prm.samples
    generate = uses["iterations, generate"]
    assert generate.times == 2 and generate.written == 2 * 250 * 4 * 20
    score = uses["iterations, select"]  # of 250 queries, in chunks of 64
    assert score.times == 2 and 2 * 250 * 64 < score.read < 2 * 250 * 256
    assert uses["iterations, improve"].seconds == pytest.approx(2 * c.evolve.steps * 128 / 256)
    assert uses["temperatures, samples"].times == 2  # after the warm-up and the second iteration


def test_of_more_responses_fewer_are_no_copies():
    """What is known of K samples holds for them, and of one response none is a copy."""
    assumed = dataclasses.replace(ASSUMED, distinct=0.45, distinct_warm_up=0.71)
    assert assumed.distinct_of(16, 16) == pytest.approx(0.45)
    assert assumed.distinct_of(16, 16, warm_up=True) == pytest.approx(0.71)
    assert assumed.distinct_of(1, 16) == 1.0
    assert 16 * 0.45 / 57 < assumed.distinct_of(57, 16) < 0.45
    assert ASSUMED.distinct_of(57, 16) == 1.0
    _, plain = estimated({}, ASSUMED)
    _, uses = estimated({}, dataclasses.replace(ASSUMED, distinct_warm_up=0.3))
    of_warm_up = {"warm-up, measure: scores", "reward model, report"}
    assert all((uses[stage].read < plain[stage].read) == (stage in of_warm_up) for stage in plain)


def test_scores_that_are_timed_by_length():
    """A row counts as the shortest program that holds it, at its own speed; the plan compiles the longest."""
    programs, plain = estimated({})
    mesh = programs.mesh
    with jax.set_mesh(mesh):
        made = {kind: programs.make(kind) for kind in programs.kinds()}
        made["score"] = programs.scores()
        assert [each.length for each in made["score"]] == [128, 256]  # prompts have at most 120 tokens
        assert [each.length for each in programs.make("score")] == [256]
        for kind, each in made.items():
            made[kind] = [program._replace(own=lambda: {"language": 1e18}) for program in each]
        speeds = {kind: [whole.Speed(1.0, 0.0)] * len(each) for kind, each in made.items()}
        speeds["score"] = [whole.Speed(0.5, 0.0), whole.Speed(1.0, 0.0)]
        exact = {use.stage: use for use in whole.estimate(programs, ASSUMED, made, speeds)}
        speeds["score"] = [whole.Speed(0.8, 0.0), whole.Speed(1.0, 0.0)]
        slower = {use.stage: use for use in whole.estimate(programs, ASSUMED, made, speeds)}
    for stage, use in exact.items():
        assert use.read == plain[stage].read and use.seconds == pytest.approx(plain[stage].seconds)
        short = stage == "iterations, select"  # of 4 responses; the others' rows hold 5 and more
        assert (slower[stage].seconds > use.seconds) == short


@pytest.mark.parametrize(
    ("changes", "there", "absent"),
    [
        (
            {},
            {"reward model, labels", "iterations, select", "temperatures, samples"},
            {"iterations, unlabelled, votes"},
        ),
        (
            {"prm.queries": 0, "evolve.select": "random", "explore.every": 0},
            {"iterations, generate", "last, test: samples"},
            {"reward model, labels", "iterations, select", "temperatures, samples", "last, test: scores"},
        ),
        ({"evolve.data": "answers"}, {"iterations, improve"}, {"iterations, generate", "iterations, select"}),
        ({"evolve.unlabelled.mixin": 0.5}, {"iterations, unlabelled, votes"}, set()),
        ({"prm.path": "elsewhere"}, {"iterations, select"}, {"reward model, train"}),
    ],
)
def test_stages_of_a_method(changes, there, absent):
    _, uses = estimated(changes)
    assert there <= set(uses) and not absent & set(uses)


def test_unlabelled_queries_are_asked_as_often():
    _, plain = estimated({"evolve.iterations": 8})
    _, mixed = estimated({"evolve.iterations": 8, "evolve.unlabelled.mixin": 0.5})
    assert plain["iterations, generate"].times == mixed["iterations, generate"].times == 8
    stages = ("generate", "votes", "select")
    for stage in stages:
        assert mixed[f"iterations, unlabelled, {stage}"].times == 4
        assert f"iterations, unlabelled, {stage}" not in plain
    asked = mixed["iterations, generate"].responses / 8
    assert mixed["iterations, unlabelled, generate"].responses == 4 * asked
    changes = {"data.figures.train": 1000, "data.figures.unlabelled": 40}
    _, few = estimated(changes | {"evolve.iterations": 8, "evolve.unlabelled.mixin": 0.5})
    assert few["iterations, unlabelled, generate"].responses == 4 * 10 * 4  # a quarter of 40, 4 of each


def test_stages_that_only_some_configs_have():
    """The test split after every iteration, no votes where answers are known, and the embedded set's sizes:
    there an untrained reward model scores beside the trained one."""
    _, uses = estimated({"evolve.iterations": 4, "eval.test_at": ("iteration",)})
    assert uses["iterations, test: samples"].times == uses["iterations, test: scores"].times == 3
    _, uses = estimated({})
    assert "iterations, test: samples" not in uses and uses["reward model, report"].times == 1
    changes = {"evolve.unlabelled.mixin": 0.5, "evolve.unlabelled.oracle": True}
    assert "iterations, unlabelled, votes" not in estimated(changes)[1]
    changes = {"data.figures.train": 1000, "data.validation": 40, "data.figures.validation": 30}
    _, uses = estimated(changes | {"eval.test_at": ()})
    assert uses["reward model, report"].times == 2
    assert uses["base, measure: samples"].responses == 30 * 5


def test_stages_whose_programs_fit_on_another_mesh():
    """Their rows enter the slots of that mesh's shards, whatever the config's mesh is."""
    config = tiny_config.get_config("smoke")
    config.sampling.batch, devices = 8, jax.devices()
    wide = sharding.make_mesh(data=8, devices=devices)
    tall = sharding.make_mesh(data=4, tensor=2, devices=devices)
    written = []
    for mesh in (wide, tall):
        with jax.set_mesh(tall):
            made = {"rollouts": Programs(config, tall).make("rollouts")}
        made["rollouts"] = [each._replace(own=lambda: {"language": 1e18}) for each in made["rollouts"]]
        speeds = {"rollouts": [whole.Speed(1.0, 0.0)] * 2}
        estimate = whole.Estimate(Programs(config, mesh), ASSUMED, made, speeds)
        written.append(estimate.sample("generate", "rollouts", 64, 4))
    assert written[0] == written[1]


def test_a_lower_bound_is_that_of_the_slowest_part():
    chip = Chip(memory=1e9, flops=1e12, bandwidth=1e10, network=1e9)
    memory = dict.fromkeys(("arguments", "outputs", "temporary", "code", "shared"), 0.0)
    step = hlo.Work(5e11, 2e10, (hlo.Collective("all-gather", 8 * 10**8, 8, 2),))  # 0.5, 2 and 1.4 s
    once = hlo.Work(3e12, 0.0, ())
    own, least = {"language": 2e12}, {"weights": 3 * 10**9}
    program = Program("a program", None, (), lambda: own, lambda: least, 8, 128)
    assert whole.bound(program, Cost(memory, step, once), chip, 8) == whole.Speed(2.0, 3.0)
    hidden = Cost(memory, None)  # what the model computes and what has to be moved are known all the same
    assert whole.bound(program, hidden, chip, 8) == whole.Speed(0.3, 0.0)
    assert whole.bound(program, hidden, chip, 2) == whole.Speed(1.0, 0.0)


def test_what_a_reader_reads_off():
    programs, uses = estimated({}, seconds=3600.0)
    total = sum(use.seconds for use in uses.values()) / 3600
    text = whole.describe(list(uses.values()), programs, ASSUMED, 0.5, 2.5, "Phi35")
    most = max(uses.values(), key=lambda use: use.seconds)
    assert f"M-STaR of Phi35 on 1 x cpu: at least {total / 24:,.2f} days" in text
    assert f"{2.5 * total:,.0f} at 2.5 each; `{most.stage}` takes most" in text
    assert f"at 50 % of these rates: {2 * total / 24:,.2f} days" in text
    one, count = whole.checkpoint_bytes(programs)
    size = sum(x.size for x in jax.tree.leaves(jax.eval_shape(programs.build)))
    assert 12 * size <= one <= 12 * size + 16 and count == 6  # float32, two moments; and two counts
    assert "left out: the base stage, compilation" in text
    for iterations, there in ((3, 6), (4, 7)):  # while 4 trains, 2 and 3 are there, and 1 may be best
        config = programs.config.copy_and_resolve_references()
        config.evolve.iterations = iterations
        assert whole.checkpoint_bytes(Programs(config, programs.mesh))[1] == there


def test_the_parts_of_a_run_add_up_to_it():
    named = ("base, measure", "warm-up, train", "reward model, labels", "temperatures, scores", "last, test")
    uses = [whole.Use(name, 4 if name[0] == "t" else 1, 0, 0, 0, 3600.0) for name in named]
    assert whole.hours(uses, 1) == {"base": 1, "warm-up and reward model": 2.25, "iterations": 1.75}
    _, uses = estimated({}, seconds=3600.0)
    found = whole.hours(list(uses.values()), 0.5)
    assert sum(found.values()) == pytest.approx(2 * sum(use.seconds for use in uses.values()) / 3600)
    assert set(found) == set(hours.PARTS.values()) and min(found.values()) > 0


def test_the_report_finds_the_hours_of_a_plan(tmp_path, monkeypatch):
    programs, uses = estimated({}, seconds=3600.0)
    monkeypatch.setattr(measure, "speeds", lambda *_: [])
    monkeypatch.setattr(whole, "estimate", lambda *_: list(uses.values()))
    flags = {"MEASURE": True, "REACH": 0.5, "PRICE": 0.0, "OUT": str(tmp_path / "run/plan.json")}
    for name, value in flags.items():
        monkeypatch.setattr(plan, name, types.SimpleNamespace(value=value))
    plan.check_output(tmp_path / "run/plan.json")
    found = dict.fromkeys(programs.kinds(), plan.Fitting(programs, [], {}))
    plan.run_of(programs, found, ASSUMED, "Phi35")
    found, about = hours.planned(RunRecord("run", tmp_path / "run", {}))
    assert found == whole.hours(list(uses.values()), 1.0)  # of measured times, whatever --reach says
    run = f"Phi35, {programs.config.evolve.iterations} iterations, 1,000 queries"
    assert about.startswith(f"Planned: for 1 x cpu ({run}), without the base stage, compilation")


def test_lengths_are_those_assumed():
    assumed = dataclasses.replace(ASSUMED, response=20, spread=6)
    lengths = calls.lengths_of(np.random.default_rng(0), (20_000,), assumed, 44)
    assert abs(lengths.mean() - 20) < 5 * 6 / 20_000**0.5 and abs(lengths.std() - 6) < 0.2
    assert lengths.min() >= 1 and calls.lengths_of(np.random.default_rng(0), (99,), assumed, 10).max() == 10


def test_responses_of_a_query_share_rows():
    assert list(calls.packed(np.array([50, 50, 50]), 100, 200)) == [200, 150]
    assert list(calls.packed(np.array([], int), 100, 200)) == []
    assert list(calls.packed(np.array([50, 50]), 180, 200)) == [200, 200]  # no row is longer


@pytest.mark.slow
def test_programs_are_timed_on_local_devices():
    """A call, and a step of decoding that really decodes: with random weights no row ends at once."""
    config = tiny_config.get_config("smoke")
    changes = {"policy.decoder.num_layers": 1, "policy.decoder.unroll": 1, "policy.vision.num_layers": 1}
    changes |= {"data.buckets": (160,), "data.max_prompt": 120, "sampling.batch": 8, "prm.batch": 8}
    config.update_from_flattened_dict(changes | {"sampling.max_new_tokens": 8})
    mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        programs = Programs(config, mesh)
        [score] = measure.speeds(programs.make("score"), mesh)
        prefill, decode = measure.speeds(programs.make("rollouts"), mesh)
    assert score.each > 0 and prefill.each > 0 and 0 < decode.each < prefill.each
    assert score.once == prefill.once == decode.once == 0.0
