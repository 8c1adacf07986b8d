"""Decoding against the full forward pass, draws against their probabilities, stops, limits, and independence
of a sample from everything but its own key."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from close import POLICY, close, tolerance

from mstar_jax import sharding
from mstar_jax.inference import draw, rollouts
from mstar_jax.inference.draw import SamplingConfig, filter_logits, stop_table, token_texts
from mstar_jax.inference.sampler import Generated, Sampler, for_sampling
from mstar_jax.models import attention
from mstar_jax.rewards import prm, steps
from mstar_jax.structs import Prompt, Query, Row

LENGTH, ROOM, BRANCHES = 80, 10, 4
TEMPERATURES = np.array([0.0, 0.7, 1.0, 1.6], np.float32)
PREFIXES = (20, 33, 61, 70, 5, 64, 9, 40)  # the LongRoPE switch is at 64
LIMITS = [ROOM, ROOM, 3, ROOM, ROOM, 0, ROOM, ROOM]
LOGIT = tolerance(POLICY, scale=4.0)  # the tiny policy's logits stay below 4
LOGPROB = 2 * ROOM * LOGIT / 0.7  # of a response: two logits a token, at the lowest temperature


def filtered(logits, top_k=0, top_p=1.0, min_p=0.0):
    """Brute force over one row, in float64: which tokens may be drawn, and their log probabilities."""
    x = np.asarray(logits, np.float64)
    if top_k and top_k < len(x):
        x = np.where(x >= sorted(x)[-top_k], x, -np.inf)
    if top_p < 1.0:
        p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
        mass, least = 0.0, np.inf
        for i in np.argsort(-x, kind="stable"):
            if mass < top_p:
                least = x[i]
            mass += p[i]
        x = np.where(x >= least, x, -np.inf)
    if min_p > 0.0:
        x = np.where(np.exp(x - x.max()) >= min_p, x, -np.inf)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"top_k": 5},
        {"top_k": 400},
        {"top_p": 0.6},
        {"top_p": 0.05},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.03},
    ],
    ids=str,
)
def test_filter_logits_equals_brute_force(setting):
    rng = np.random.default_rng(0)
    logits = np.concatenate([rng.normal(size=(20, 64)), rng.integers(0, 6, (20, 64)) / 2]).astype(
        np.float32
    )  # ties
    logits[::3, rng.permutation(64)[:30]] = -np.inf
    ours = jax.nn.log_softmax(filter_logits(jnp.asarray(logits), SamplingConfig(1, 1, **setting)))
    for row, got in zip(logits, np.asarray(ours)):
        close(got, filtered(row, **setting), 64)


def test_settings_are_checked():
    for wrong in [
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"top_k": -1},
        {"stop_strings": ("",)},
    ]:
        with pytest.raises(ValueError, match="need 0 < top_p|empty stop"):
            SamplingConfig(1, 1, **wrong)
    for branches, room in [(0, 1), (1, 0)]:
        with pytest.raises(ValueError, match="must be at least 1"):
            SamplingConfig(branches, room)
    for places in (-1, 3):
        with pytest.raises(ValueError, match="places must be at most branches"):
            SamplingConfig(2, 1, places)
    assert SamplingConfig(2, 1).places == 2 and SamplingConfig(2, 1, 1).places == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_probabilities(temperature):
    """For evenly spaced numbers, so without luck: counts are exact, up to one at each end of an interval."""
    count, config = 20_000, SamplingConfig(1, 1, top_k=9)
    logits = jnp.asarray(np.random.default_rng(1).normal(size=12) * 2, jnp.float32)
    uniform = (jnp.arange(count) + 0.5) / count
    tokens, logprobs = draw.draw(jnp.tile(logits, (count, 1)), uniform, jnp.full(count, temperature), config)
    want = np.exp(filtered(np.asarray(logits) / temperature, top_k=9))
    counts = np.bincount(np.asarray(tokens), minlength=12)
    assert (want == 0).sum() == 3 and (counts[want == 0] == 0).all()
    assert (np.abs(counts - want * count) <= 2).all(), (counts, want)
    close(logprobs, np.log(want[np.asarray(tokens)]), 12)


def test_temperature_zero_is_greedy_per_row():
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(50, 30)), jnp.float32)
    temperature = jnp.asarray(np.arange(50) % 2, jnp.float32)
    tokens, logprobs = draw.draw(logits, jnp.full(50, 0.97), temperature, SamplingConfig(1, 1))
    best = np.asarray(jnp.argmax(logits, axis=-1))
    np.testing.assert_array_equal(tokens[::2], best[::2])
    mass = np.cumsum(np.asarray(jax.nn.softmax(logits), np.float64), axis=-1)
    drawn = [np.searchsorted(row, 0.97, side="right") for row in mass]
    np.testing.assert_array_equal(tokens[1::2], drawn[1::2])
    want = np.asarray(jax.nn.log_softmax(logits))
    close(logprobs, want[np.arange(50), np.asarray(tokens)], 30)


@pytest.mark.parametrize("vocab", [50, 300, 4096])
def test_tokens_without_probability_are_never_drawn(vocab):
    """At both ends of [0, 1), and where rounding of the cumulative sum is nearest to letting one through."""
    rng, size = np.random.default_rng(4), 16
    logits = (rng.normal(size=(size, vocab)) * 2).astype(np.float32)
    logits[rng.random((size, vocab)) < 0.5] = -np.inf
    logits[:, :3] = logits[:, -7:] = -np.inf  # special ids, and ids past the tokenizer's end
    possible = np.isfinite(logits)
    mass = np.asarray(jnp.cumsum(jax.nn.softmax(jnp.asarray(logits), axis=-1), axis=-1))
    uniforms = [np.full(size, u) for u in (0.0, 2.0**-24, 1 - 2.0**-22, 1 - 2.0**-23, 1 - 2.0**-24)]
    rises = (np.diff(mass, axis=-1, prepend=0.0) > 0) & ~possible  # a cumulative sum that rises over nothing
    for row, at in np.argwhere(rises)[::7][:40]:
        uniforms += [np.full(size, mass[row, at] + step) for step in (-(2.0**-24), -(2.0**-25))]
    if vocab == 4096:
        assert len(uniforms) > 10, "this case is here because such sums do occur"
    pick = jax.jit(lambda u: draw.draw(jnp.asarray(logits), u, jnp.ones(size), SamplingConfig(1, 1)))
    for uniform in uniforms:
        tokens, logprobs = pick(np.clip(uniform, 0, 1 - 2.0**-24).astype(np.float32))
        assert possible[np.arange(size), np.asarray(tokens)].all() and np.isfinite(logprobs).all()
    first, _ = pick(np.zeros(size, np.float32))
    np.testing.assert_array_equal(first, possible.argmax(axis=-1))


def test_stop_table_equals_a_search():
    rng = np.random.default_rng(5)
    for _ in range(60):
        texts = ["".join(rng.choice(list("aab."), int(rng.integers(0, 4)))) for _ in range(8)]
        stop = "".join(rng.choice(list("aab."), int(rng.integers(1, 6))))
        table = stop_table(texts, stop)
        assert table.shape == (len(stop) + 1, 8)
        for _ in range(20):
            state, text = 0, ""
            for token in rng.integers(0, 8, 12):
                state, text = table[state, token], text + texts[token]
                assert (state == len(stop)) == (stop in text), (stop, text)
                if stop not in text:
                    assert state == max(n for n in range(len(stop) + 1) if text.endswith(stop[:n]))


# From here on: the compiled sampler.


@pytest.fixture(scope="module")
def policy():
    return tiny.model()


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=8)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """Many ids end a response, so that some do, and many are forbidden."""
    out = copy.copy(tiny.processor(tmp_path_factory.mktemp("tokenizer")))
    out.stop_ids = tuple(range(20, 50))
    out.forbidden_ids = (*out.forbidden_ids, *range(60, 120))
    return out


@pytest.fixture(scope="module")
def rows():
    """A query with an image, and seven of text; two are long already."""
    rng = np.random.default_rng(6)
    return [tiny.row(rng, [(0, n)], LENGTH, [(1, 1)] if i == 0 else []) for i, n in enumerate(PREFIXES)]


def query(name):
    return Query(id=name, images=(), question="")


NAMES = tuple(f"query-{i}" for i in range(8))


@functools.cache
def sampler_for(processor, config, mesh, slots=8):
    """One for each setting, so that its programs are compiled once."""
    return Sampler(processor, config, slots, sharding.batch_shards(mesh))


def run(policy, processor, rows, names, mesh, config, size=None, sampler=None, temperatures=TEMPERATURES):
    sampler = sampler or sampler_for(processor, config, mesh, size or 8)
    lengths = [int((row["branch"] == 0).sum()) for row in rows]
    asked = tuple(Row(Prompt(query(name), "", n, 0)) for name, n in zip(names, lengths, strict=True))
    out = rollouts.rollouts(
        sampler,
        policy,
        [asked],
        iter([(asked, tiny.stack(rows, size))]),
        processor,
        key=jax.random.key(11),
        temperatures=temperatures,
        iteration=3,
        mesh=mesh,
    )
    return {responses[0].query_id: responses for batch in out for responses in batch}


CONFIG = SamplingConfig(BRANCHES, ROOM, top_k=60, top_p=0.95, min_p=0.01)


@pytest.fixture(scope="module")
def sampler(processor, mesh):
    return sampler_for(processor, CONFIG, mesh)


@pytest.fixture(scope="module")
def responses(policy, processor, rows, mesh, sampler):
    return run(tiny.replicated(policy, mesh), processor, rows, NAMES, mesh, CONFIG, sampler=sampler)


@pytest.fixture(scope="module")
def full(policy, rows, responses):
    """Logits of the full forward pass over every query's prompt with its responses as branches."""
    whole, length = [], LENGTH + BRANCHES * ROOM
    for row, name, size in zip(rows, NAMES, PREFIXES):
        layout = [(0, size), *((k + 1, len(r.tokens)) for k, r in enumerate(responses[name]))]
        one = tiny.row(np.random.default_rng(0), layout, length)
        for k in ("tokens", "image_index"):
            one[k][:size] = row[k][:size]
        one["tokens"][one["branch"] > 0] = [t for r in responses[name] for t in r.tokens]
        whole.append(one | {"pixels": row["pixels"]})
    logits = np.asarray(tiny.logits(policy, tiny.stack(whole)))
    return {
        name: [logits[b][whole[b]["branch"] == k + 1] for k in range(BRANCHES)]
        for b, name in enumerate(NAMES)
    }


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_refused(policy, processor, rows, mesh, sampler, value):
    """As those of float16 are above 65504: no temperature makes tokens of them."""
    bad = jax.tree.map(lambda x: jnp.full_like(x, value), policy)
    with pytest.raises(ValueError, match=r"query 'query-\d', sample \d: .* is nan, so the policy's logits"):
        run(tiny.replicated(bad, mesh), processor, rows, NAMES, mesh, CONFIG, sampler=sampler)


def test_tokens_and_logprobs_are_those_of_the_full_forward(processor, responses, full):
    forbidden, tempting = list(processor.forbidden_ids), 0
    for name in NAMES:
        for response, logits, temperature in zip(responses[name], full[name], TEMPERATURES):
            total = 0.0
            for token, step in zip(response.tokens, logits, strict=True):
                tempting += int(np.argmax(step)) in forbidden
                step = step.copy()
                step[forbidden] = -np.inf
                want = filtered(step / (temperature or 1.0), top_k=60, top_p=0.95, min_p=0.01)
                assert np.isfinite(want[token])
                assert temperature > 0.0 or step[token] >= step.max() - LOGIT
                total += want[token]
            assert response.logprob == pytest.approx(total, abs=LOGPROB)
    assert tempting > 5, "forbidden ids must have been the likeliest somewhere"


def test_endings(processor, responses):
    stopped = 0
    for name, limit in zip(NAMES, LIMITS):
        for k, response in enumerate(responses[name]):
            assert (response.query_id, response.sample, response.iteration) == (name, k, 3)
            assert response.temperature == pytest.approx(float(TEMPERATURES[k]))
            assert response.text == processor.decode(response.tokens)
            assert not set(response.tokens) & set(processor.forbidden_ids)
            ends = [token in processor.stop_ids for token in response.tokens]
            assert not any(ends[:-1]) and len(response.tokens) <= limit
            assert response.truncated == (not (ends and ends[-1]))
            assert len(response.tokens) == limit or not response.truncated
            stopped += not response.truncated
    assert 3 < stopped < 28 - 3, "both endings must occur"
    assert all(len(r.tokens) == 0 and r.truncated and r.logprob == 0.0 for r in responses[NAMES[5]])


def test_limits_are_the_processors(processor):
    assert [min(processor.length_limit(n) - n, ROOM) for n in PREFIXES] == LIMITS


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        for one, other in zip(ours[name], theirs[name], strict=True):
            assert (one.tokens, one.text, one.truncated) == (other.tokens, other.text, other.truncated)
            assert one.logprob == pytest.approx(other.logprob, abs=LOGPROB)


def test_samples_do_not_depend_on_order(policy, processor, rows, mesh, sampler, responses):
    order = np.random.default_rng(7).permutation(8)
    moved = [rows[i] for i in order], [NAMES[i] for i in order]
    same(run(tiny.replicated(policy, mesh), processor, *moved, mesh, CONFIG, sampler=sampler), responses)


@pytest.mark.slow  # slots and entering rows of other sizes are below
def test_samples_do_not_depend_on_the_batch(policy, processor, rows, mesh, responses):
    everything = run(tiny.replicated(policy, mesh), processor, rows, NAMES, mesh, CONFIG, 16)
    same(everything, responses)


def test_samples_do_not_depend_on_the_devices(policy, processor, rows, responses):
    """The same samples on eight devices, on a cube and, below, on one and on four."""
    cube = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    lower = for_sampling(policy, cube, jnp.float32)
    assert lower.decoder.blocks.gate[...].sharding.spec[2] == "tensor"
    same(run(lower, processor, rows, NAMES, cube, CONFIG), responses)


def test_branches_differ_and_keys_matter(responses):
    for name, limit in zip(NAMES, LIMITS):
        if limit == ROOM:
            assert len({tuple(r.tokens) for r in responses[name]}) == BRANCHES
    assert rollouts.query_key("123456789") == 0xCBF43926, "CRC-32's check value; stored rollouts depend on it"


def test_temperatures_do_not_recompile(policy, processor, rows, mesh, sampler, responses):
    programs, policy = (sampler.enter, sampler.advance), tiny.replicated(policy, mesh)
    compiled = [program._cache_size() for program in programs]
    hot = np.array([0.0, 3.0, 3.0, 0.0], np.float32)
    out = run(policy, processor, rows, NAMES, mesh, CONFIG, sampler=sampler, temperatures=hot)
    assert [program._cache_size() for program in programs] == compiled
    for name in NAMES:  # branch 0 is greedy in both; branch 3 is greedy now and says the same
        assert out[name][0].tokens == out[name][3].tokens == responses[name][0].tokens
    assert any(out[name][1].tokens != responses[name][1].tokens for name in NAMES)
    with pytest.raises(ValueError, match="need 4 temperatures"):
        run(policy, processor, rows, NAMES, mesh, CONFIG, sampler=sampler, temperatures=hot[:2])


def test_stop_strings_end_a_branch_where_they_end(policy, processor, rows):
    """Sampling ASCII only, so that a text is the texts of its tokens one after another."""
    texts = token_texts(processor)
    ascii_only = copy.copy(processor)
    ascii_only.stop_ids = (
        processor.tokenizer.convert_tokens_to_ids("<|end|>"),
    )  # its text is empty: forbidden
    ascii_only.forbidden_ids = tuple(
        i for i, text in enumerate(texts) if not (text.isascii() and text.isprintable() and text)
    )
    one = sharding.make_mesh(devices=jax.devices()[:1])
    free = run(policy, ascii_only, rows, NAMES, one, SamplingConfig(BRANCHES, ROOM))
    assert all(r.truncated for name in NAMES for r in free[name])
    whole = [texts[t] for t in free[NAMES[0]][1].tokens]
    across = whole[3][-1] + whole[4][0]
    stops = (across, whole[7] + whole[8][0])
    config = SamplingConfig(BRANCHES, ROOM, 2, stop_strings=stops)  # states begin anew in a place
    cut = run(policy, ascii_only, rows, NAMES, one, config)
    found = 0
    for name in NAMES:
        for r, want in zip(cut[name], free[name]):
            assert want.text == "".join(texts[t] for t in want.tokens)
            so_far = ["".join(texts[t] for t in want.tokens[: i + 1]) for i in range(len(want.tokens))]
            ends = [i + 1 for i, text in enumerate(so_far) if any(stop in text for stop in stops)]
            size = ends[0] if ends else len(want.tokens)
            text = so_far[size - 1] if size else ""
            assert r.text == min((text.split(stop)[0] for stop in stops), key=len)
            kept = ascii_only.encode_response(r.text) if ends else want.tokens
            assert list(r.tokens) == list(kept) and r.truncated == (not ends)
            found += bool(ends)
    assert found >= 1 and len(cut[NAMES[0]][1].tokens) <= 6


@pytest.mark.parametrize(
    "written", ["area 4\nThe answer is 6\n### area", "area\n\n6###\nbase", "###", "6 ###6"]
)
def test_what_a_stop_string_cuts_has_the_same_steps_everywhere(tmp_path, written):
    """Also where it begins a line; its tokens are those of the text that is left, closed by the stop id."""
    processor = tiny.processor(tmp_path)  # with the real stop ids
    texts = token_texts(processor)
    ids = processor.encode_response(written)[:-1]
    host = Generated(np.array([ids]), np.zeros((1, len(ids))), np.array([len(ids)]), np.array([True]))
    row = Row(Prompt(Query("q", (), "area?", answer="6"), "area?", 5, 0))
    config = SamplingConfig(1, len(ids), stop_strings=("###",))
    [found] = rollouts._responses(row, host, [0.0], processor, config, np.ones(1, np.float32), 0)
    left = written.partition("###")[0]
    assert found.text == left and list(found.tokens) == processor.encode_response(left)
    assert found.tokens[-1] == processor.stop_ids[0] and not found.truncated
    encode = prm.as_written(processor, texts)
    assert prm.same_steps(found.text, encode(found.text)) and encode(found.text).tokens == list(found.tokens)
    prefixes = prm.prefixes([found], texts)
    labels = prm.label(found, dict.fromkeys(prefixes, 0.5), texts)
    assert len(labels) == len(steps.split(left)) == max(len(prefixes) + 1, 1) * bool(left.strip())
    if labels:  # it stays in the reward model's training
        prm.row(row.prompt, [found], encode, [labels])


def test_token_texts(processor):
    texts = token_texts(processor)
    assert len(texts) == tiny.VOCAB
    ids = processor.encode_response("the area (A)")[:-1]
    assert "".join(texts[i] for i in ids) == "the area (A)"
    assert texts[processor.tokenizer.convert_tokens_to_ids("<|end|>")] == ""


# ---- rows that leave and rows that enter ---------------------------------------------------------------


def refilled(
    policy,
    processor,
    rows,
    mesh,
    slots,
    entering,
    config=CONFIG,
    order=range(8),
    each=None,
    sampler=None,
    logprobs=False,
):
    """The rows as one shard, `entering` at a time into so many slots; and how many ended in every segment."""
    asked = [Row(Prompt(query(NAMES[i]), "", PREFIXES[i], 0)) for i in order]
    parts = [list(order)[at : at + entering] for at in range(0, len(rows), entering)]
    batches = [
        (tuple(asked[list(order).index(i)] for i in part), tiny.stack([rows[i] for i in part], entering))
        for part in parts
    ]
    counts: list[int] = []
    [groups] = rollouts.rollouts(
        sampler or sampler_for(processor, config, mesh, slots),
        policy,
        [asked],
        iter(batches),
        processor,
        key=jax.random.key(11),
        temperatures=TEMPERATURES,
        iteration=3,
        mesh=mesh,
        each=each or (lambda ended, *_: counts.append(ended)),
        logprobs=logprobs,
    )
    return {group[0].query_id: group for group in groups}, counts


@pytest.mark.parametrize(
    ("slots", "entering", "count", "places"),
    [
        (3, 2, 3, 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (3, 2, 3, 4),
                (3, 2, 4, 4),
                (2, 1, 4, 4),
                (8, 8, 3, 4),
                (8, 8, 2, 4),
                (8, 8, 3, 2),
                (2, 1, 4, 1),
            ]
        ),
    ],
)
def test_what_holds_no_token_is_not_read(
    policy, processor, rows, responses, monkeypatch, slots, entering, count, places
):
    """In rings of several chunks, of which only those with tokens of samples still there are read."""

    def small(room):
        return count, -(-room // count)

    for module in ("inference.sampler", "inference.rollouts", "models.vlm"):
        monkeypatch.setattr(f"mstar_jax.{module}.ring", small)
    used, chunks = [], Sampler.chunks
    monkeypatch.setattr(Sampler, "chunks", lambda self, *args: used.append(chunks(self, *args)) or used[-1])
    one = sharding.make_mesh(devices=jax.devices()[:1])
    config = dataclasses.replace(CONFIG, places=places)
    fresh = sampler_for.__wrapped__(processor, config, one, slots)  # a cached one has other rings
    found, _ = refilled(policy, processor, rows, one, slots, entering, sampler=fresh)
    same(found, responses)
    assert used[0] == 1 and set(used) == set(range(count))
    assert {type(each) for each in used} == {int}  # to jit, 1 and NumPy's 1 are two programs


@pytest.mark.parametrize(
    ("slots", "entering"),
    [(2, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, 1), (3, 2), (4, 3), (5, 1)])],
)
def test_refilled_slots_give_the_same_samples(policy, processor, rows, responses, slots, entering):
    one = sharding.make_mesh(devices=jax.devices()[:1])
    found, counts = refilled(policy, processor, rows, one, slots, entering)
    same(found, responses)
    assert sum(counts) == 8 and len(counts) > 1 and max(counts) <= slots


@pytest.fixture(scope="module")
def lower(policy):
    """The policy as four devices sample with it."""
    mesh = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    return mesh, for_sampling(policy, mesh, jnp.float32)


def test_refilled_slots_on_several_devices(lower, processor, rows, responses):
    """Rows enter where their own device has room."""
    mesh, policy = lower
    for order in (range(8), (5, 2, 7, 0, 1, 6, 3, 4)):
        found, counts = refilled(policy, processor, rows, mesh, 4, 4, order=order)
        same(found, responses)
        assert len(counts) > 1
    six, _ = refilled(policy, processor, rows[:6], mesh, 4, 4, order=range(6))  # the last batch is not full
    same(six, {name: responses[name] for name in NAMES[:6]})


@pytest.mark.slow  # samples that begin where others end are below, and several devices above
def test_fewer_places_on_several_devices(lower, processor, rows, responses):
    mesh, policy = lower
    config = dataclasses.replace(CONFIG, places=3)
    six, _ = refilled(policy, processor, rows[:6], mesh, 4, 4, config, order=range(6))
    same(six, {name: responses[name] for name in NAMES[:6]})


@pytest.mark.parametrize("places", [2, *(pytest.param(places, marks=pytest.mark.slow) for places in (1, 3))])
def test_a_sample_starts_where_another_one_ends(policy, processor, rows, responses, full, places):
    """The same samples, in as many steps as the schedule by hand needs for one row after the other; each
    token's log probability is its own."""
    one, clocks = sharding.make_mesh(devices=jax.devices()[:1]), []
    config = dataclasses.replace(CONFIG, places=places)

    def each(ended, clock, tokens):
        clocks.append(clock)

    found, _ = refilled(policy, processor, rows, one, 1, 1, config, each=each, logprobs=True)
    same(found, responses)
    for name in NAMES:
        for response, logits, temperature in zip(found[name], full[name], TEMPERATURES, strict=True):
            kept = logits.copy()
            kept[:, list(processor.forbidden_ids)] = -np.inf
            want = [filtered(step / (temperature or 1.0), top_k=60, top_p=0.95, min_p=0.01) for step in kept]
            own = [float(each[token]) for each, token in zip(want, response.tokens, strict=True)]
            assert list(response.logprobs) == pytest.approx(own, abs=LOGPROB)
    steps = 0
    for name in NAMES:
        ends = [0] * places
        for response in responses[name]:
            ends[ends.index(min(ends))] += len(response.tokens)
        steps += max(ends)
    assert clocks[-1] == steps


def test_a_slot_is_taken_before_the_longest_row_has_ended(policy, processor, rows, responses):
    """With two slots and rows one by one, as many steps as the schedule by hand needs, not the sum of the
    longest of every pair."""
    one = sharding.make_mesh(devices=jax.devices()[:1])
    steps = [max(len(r.tokens) for r in responses[name]) for name in NAMES]
    ends = [0, 0]  # of the two slots
    for size in steps:
        at = int(np.argmin(ends))
        ends[at] += size
    sampler, counted = copy.copy(sampler_for(processor, CONFIG, one, 2)), []
    advance = sampler.advance

    def count(*args, chunks):
        counted.append(advance(*args, chunks=chunks))
        return counted[-1]

    sampler.advance = count
    asked = [Row(Prompt(query(name), "", n, 0)) for name, n in zip(NAMES, PREFIXES)]
    batches = iter([((row,), tiny.stack([array])) for row, array in zip(asked, rows)])
    clocks = []
    sampled = rollouts.rollouts(
        sampler,
        policy,
        [asked],
        batches,
        processor,
        key=jax.random.key(11),
        temperatures=TEMPERATURES,
        iteration=3,
        mesh=one,
        each=lambda *_: clocks.append(1),
    )
    for _ in sampled:
        assert int(counted[-1].cache.clock) == max(ends) < sum(max(steps[i : i + 2]) for i in range(0, 8, 2))
    assert len(clocks) == len(counted)


def test_processes_share_the_rows(policy, processor, rows, responses, monkeypatch):
    """Each makes the text of its own rows, and all together what one makes."""
    one, found = sharding.make_mesh(devices=jax.devices()[:1]), {}
    asked = tuple(Row(Prompt(query(name), "", n, 0)) for name, n in zip(NAMES, PREFIXES))
    for index in range(2):
        monkeypatch.setattr(rollouts.processes, "mine", lambda number, index=index: number % 2 == index)
        [groups] = rollouts.rollouts(
            sampler_for(processor, CONFIG, one),
            policy,
            [asked],
            iter([(asked, tiny.stack(rows))]),
            processor,
            key=jax.random.key(11),
            temperatures=TEMPERATURES,
            iteration=3,
            mesh=one,
        )
        assert [bool(group) for group in groups] == [number % 2 == index for number in range(8)]
        found |= {group[0].query_id: group for group in groups if group}
    same(found, responses)


def test_stopping_between_segments(policy, processor, rows):
    one, seen = sharding.make_mesh(devices=jax.devices()[:1]), []

    def stop(count, *_):
        seen.append(count)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refilled(policy, processor, rows, one, 2, 1, each=stop)
    assert len(seen) == 2


# ---- caches of other dtypes ----------------------------------------------------------------------------


def test_int8_is_the_array_to_half_a_step():
    x = jnp.asarray(np.random.default_rng(8).normal(size=(3, 5, 16)) * [[[1e-3]], [[1]], [[40]]], jnp.float32)
    kept = attention.stored(x.at[0, 0].set(0.0), "int8")
    assert kept.values.dtype == jnp.int8 and kept.scale.shape == (3, 5)
    back = kept.values * kept.scale[..., None]
    assert (jnp.abs(back - x.at[0, 0].set(0.0)) <= kept.scale[..., None] / 2 + 1e-9).all()
    assert attention.stored(x, "") is x or attention.stored(x, "").dtype == x.dtype
    assert attention.stored(x, "bfloat16").dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("dtype", "bound"), [("int8", 0.05), pytest.param("bfloat16", 0.03, marks=pytest.mark.slow)]
)
def test_a_smaller_cache_samples_nearly_the_same(policy, processor, rows, responses, dtype, bound):
    """Greedy branches of the free policy agree, and what was drawn has nearly the probability it had."""
    one = sharding.make_mesh(devices=jax.devices()[:1])
    config = dataclasses.replace(CONFIG, cache=dtype, places=2)
    found, _ = refilled(policy, processor, rows, one, 4, 2, config)
    equal, gaps = 0, []
    for name in NAMES:
        for ours, theirs in zip(found[name], responses[name], strict=True):
            if ours.tokens == theirs.tokens and theirs.tokens:
                equal += 1
                gaps.append(abs(ours.logprob - theirs.logprob) / len(theirs.tokens))
    assert equal >= 20, equal
    assert 0 < max(gaps) < bound, max(gaps)


# ---- continuing from the steps of a response -----------------------------------------------------------


def continued(policy, processor, rows, starts_of, held, mesh, config, each):
    """Continuations of the responses that every row holds; the batch is prompt and responses."""
    length, stems, arrays = LENGTH + BRANCHES * ROOM, [], []
    for row, name, size in zip(rows, NAMES, PREFIXES):
        layout = [(0, size), *((k + 1, len(tokens)) for k, tokens in enumerate(held[name]))]
        one = tiny.row(np.random.default_rng(0), layout, length)
        for k in ("tokens", "image_index"):
            one[k][:size] = row[k][:size]
        one["tokens"][one["branch"] > 0] = [t for tokens in held[name] for t in tokens]
        arrays.append(one | {"pixels": row["pixels"]})
        stems.append(Row(Prompt(query(name), "", size, 0), tuple(held[name]), starts=starts_of(name)))
    out = rollouts.rollouts(
        sampler_for(processor, config, mesh),
        policy,
        [stems],
        iter([(tuple(stems), tiny.stack(arrays))]),
        processor,
        key=jax.random.key(5),
        temperatures=TEMPERATURES,
        iteration=0,
        mesh=mesh,
        each=each,
    )
    [groups] = list(out)
    return {group[0].query_id: group for group in groups}


@pytest.mark.parametrize("places", [BRANCHES, 2])
def test_continuations(policy, processor, rows, responses, places):
    one, rng = sharding.make_mesh(devices=jax.devices()[:1]), np.random.default_rng(3)
    held = {name: [tuple(r.tokens) for r in responses[name]] for name in NAMES}
    parents = {name: rng.integers(1, BRANCHES + 1, BRANCHES) for name in NAMES}
    kept = {name: [int(rng.integers(0, len(held[name][p - 1]) + 1)) for p in parents[name]] for name in NAMES}

    def starts(name):
        return tuple(
            (int(p) if n else 0, n, 100 + k) for k, (p, n) in enumerate(zip(parents[name], kept[name]))
        )

    told: list[int] = []
    config = dataclasses.replace(CONFIG, places=places)
    found = continued(policy, processor, rows, starts, held, one, config, lambda *seen: told.append(seen[-1]))
    added = 0
    for name, limit in zip(NAMES, LIMITS):
        for (parent, n, _), response in zip(starts(name), found[name], strict=True):
            assert tuple(response.tokens[:n]) == (held[name][parent - 1][:n] if n else ())
            assert len(response.tokens) <= limit and response.text == processor.decode(response.tokens)
            added += len(response.tokens) - n
    assert added > 20 and sum(told) == added  # only the new tokens count as decoded
    # what was drawn, each alone after its prompt in a full forward pass, has the same probabilities
    length = LENGTH + BRANCHES * ROOM
    whole = []
    for row, name, size in zip(rows, NAMES, PREFIXES):
        layout = [(0, size), *((k + 1, len(r.tokens)) for k, r in enumerate(found[name]))]
        one_row = tiny.row(np.random.default_rng(0), layout, length)
        for k in ("tokens", "image_index"):
            one_row[k][:size] = row[k][:size]
        one_row["tokens"][one_row["branch"] > 0] = [t for r in found[name] for t in r.tokens]
        whole.append(one_row | {"pixels": row["pixels"]})
    logits, forbidden = np.asarray(tiny.logits(policy, tiny.stack(whole))), list(processor.forbidden_ids)
    for b, name in enumerate(NAMES):
        for k, (response, temperature) in enumerate(zip(found[name], TEMPERATURES)):
            n, total = kept[name][k], 0.0
            for token, step in zip(
                response.tokens[n:], logits[b][whole[b]["branch"] == k + 1][n:], strict=True
            ):
                step = step.copy()
                step[forbidden] = -np.inf
                want = filtered(step / (temperature or 1.0), top_k=60, top_p=0.95, min_p=0.01)
                assert temperature > 0 or step[token] >= step.max() - LOGIT
                total += want[token]
            assert response.logprob == pytest.approx(total, abs=LOGPROB)
