"""The loader: planned shapes hold, nothing is cut, and a stream continues with the very next batch."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mstar_jax import sharding
from mstar_jax.data import images, loader, pixels, workers
from mstar_jax.structs import Prompt, Query, Row
from tests import tiny

SIZES = ((16, 16), (40, 12), (12, 40), (70, 64))  # px


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return tiny.processor(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def queries(tmp_path_factory):
    """Two queries per kind of image, two without one, two with two."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = []
    for width, height in SIZES:
        path = folder / f"{width}x{height}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    images = [(), *((path,) for path in paths), (paths[0], paths[1])]
    return [
        Query(f"q{i}{n}", each, "area " * (3 * n + i), answer="3")
        for i, each in enumerate(images)
        for n in (0, 1)
    ]


@pytest.fixture(scope="module")
def prompts(processor, queries):
    planned = loader.plan_prompts([(q, q.question) for q in queries], processor, 10_000)
    assert None not in planned
    return planned


def text_rows(processor, count, name="t", length=3):
    """Rows without images; the first response token tells which one it is."""
    found = [Query(f"{name}{i}", (), "area") for i in range(count)]
    planned = loader.plan_prompts([(q, q.question) for q in found], processor, 1000)
    return [Row(p, ((20 + i,) * length,)) for i, p in enumerate(planned)]


def encode_row(row, processor, length, crops):
    """A batch of one row, without its leading dimension."""
    return jax.tree.map(lambda x: x[0], loader.encode_rows([row], processor, length, crops))


def stream(sources, processor, size=4, **how):
    return loader.train_batches(sources, processor, size, (64, 128, 256), **({"seed": 5} | how))


def marks(batch):
    """The first response token of every row."""
    first = np.argmax(batch.branch == 1, axis=1)
    return batch.tokens[np.arange(len(first)), first].tolist()


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_equal(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b):
        for name in one._fields:
            jax.tree.map(np.testing.assert_array_equal, getattr(one, name), getattr(other, name))


# ---- plans -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(longest=st.integers(10, 140))
def test_a_long_prompt_is_left_out_whole(processor, queries, longest):
    pairs = [(q, q.question) for q in queries]
    found = loader.plan_prompts(pairs, processor, longest)
    planned = [prompt for prompt in found if prompt is not None]
    left_out = [query for query, prompt in zip(queries, found, strict=True) if prompt is None]
    assert [q for q in queries if q not in left_out] == [p.query for p in planned]
    for query in left_out:
        sizes = [Image.open(path).size for path in query.images]
        assert processor.prefix_shapes([query.question], [sizes])[0][0] > longest
    for prompt in planned:
        assert prompt.length <= longest
        row = encode_row(Row(prompt, ((7, 8),)), processor, longest + 2, 20)
        encoded = processor.encode(prompt.text, [images.load_image(path) for path in prompt.query.images])
        span = encoded.image_index[encoded.image_index >= 0]
        assert np.sum(row.image_index >= 0) == len(span) > 0 or not prompt.query.images
        np.testing.assert_array_equal(row.image_index[: prompt.length], encoded.image_index)
        np.testing.assert_array_equal(row.tokens[: prompt.length], encoded.tokens)
        assert (row.branch == 0).sum() == prompt.length and (row.image_index[row.branch != 0] == -1).all()
        assert len(encoded.pixels.pixels) == prompt.crops
        assert not any(x[prompt.crops :].any() for x in row.pixels)


def test_sizes_are_those_of_the_rotated_image(processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown rotated by a quarter
    Image.new("RGB", (70, 12)).save(tmp_path / "rotated.jpg", exif=exif)
    query = Query("rotated", (str(tmp_path / "rotated.jpg"),), "area")
    [prompt] = loader.plan_prompts([(query, "area")], processor, 1000)
    encode_row(Row(prompt, ()), processor, prompt.length, prompt.crops)


def test_an_image_changed_on_disk_names_the_query(processor, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (16, 16)).save(path)
    query = Query("train_000012_0", (str(path),), "area")
    [prompt] = loader.plan_prompts([(query, "area")], processor, 1000)
    Image.new("RGB", (80, 16)).save(path)
    with pytest.raises(
        ValueError, match=r"query train_000012_0: planned \d+ prompt tokens .*did one of its images change"
    ):
        encode_row(Row(prompt, ()), processor, 1000, 50)


def test_a_row_that_does_not_fit_names_the_query(processor, prompts):
    prompt = prompts[4]
    with pytest.raises(ValueError, match=f"query {prompt.query.id}: .* do not fit"):
        encode_row(Row(prompt, ((7,),)), processor, prompt.length, prompt.crops)
    with pytest.raises(ValueError, match=f"query {prompt.query.id}: .* do not fit"):
        encode_row(Row(prompt, ()), processor, prompt.length, prompt.crops - 1)


def test_encode_row(processor, prompts):
    prompt = prompts[2]
    n = prompt.length
    row = encode_row(Row(prompt, ((5, 6, 7), (8, 9))), processor, n + 8, prompt.crops + 1)
    assert row.branch.tolist() == [0] * n + [1, 1, 1, 2, 2, -1, -1, -1]
    assert row.tokens[n:].tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert row.loss_mask.tolist() == [0] * n + [1] * 5 + [0] * 3
    assert row.pixels.pixels.shape == (prompt.crops + 1, tiny.SIZE, tiny.SIZE, 3)


def test_buckets():
    assert [loader.bucket(n, (64, 16, 32)) for n in (1, 16, 17, 64)] == [16, 16, 32, 64]
    with pytest.raises(ValueError, match="65 tokens do not fit into the largest bucket, 64"):
        loader.bucket(65, (64, 16, 32))


def test_plan_batches_groups_by_shape(prompts):
    buckets = (32, 64, 96, 128, 256)
    rows = [Row(p, ((7,),) * i) for i, p in enumerate(prompts * 3)]
    plans = loader.plan_batches(rows, 4, buckets)
    assert sorted(id(row) for _, group in plans for row in group) == sorted(map(id, rows))
    groups = {}
    for length, group in plans:
        assert 1 <= len(group) <= 4
        shapes = {(loader.bucket(row.length, buckets), row.prompt.crops) for row in group}
        assert len(shapes) == 1 and next(iter(shapes))[0] == length
        groups.setdefault(next(iter(shapes)), []).append(group)
    for shape, parts in groups.items():  # only the last of a shape is short, and the order is kept
        assert all(len(part) == 4 for part in parts[:-1])
        expected = [row for row in rows if (loader.bucket(row.length, buckets), row.prompt.crops) == shape]
        assert [row for part in parts for row in part] == expected


def test_full_batches_leave_one_short_batch(processor, prompts):
    buckets = (32, 64, 96, 128, 256)
    rows = [Row(p, ((7,),) * i) for i, p in enumerate(prompts * 3)][1:]
    plans = loader.full_batches(rows, 4, buckets)
    assert sorted(id(row) for _, group in plans for row in group) == sorted(map(id, rows))
    assert [len(group) for _, group in plans[:-1]] == [4] * (len(rows) // 4)
    lengths = [loader.bucket(row.length, buckets) for _, group in plans for row in group]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 1
    assert [length for length, _ in plans] == lengths[::4]
    mixed = [group for _, group in plans if len({row.prompt.crops for row in group}) > 1]
    assert mixed
    for (length, group), (found, batch) in zip(plans, loader.row_batches(plans, processor, 4), strict=True):
        crops = max(row.prompt.crops for row in group)
        assert list(found) == group
        assert batch.tokens.shape == (4, length) and batch.pixels.pixels.shape[:2] == (4, crops)
    assert loader.full_batches([], 4, buckets) == []


def test_row_batches(processor, prompts):
    labels = (((0, 0.25), (2, 1.0)), ((1, 0.0),))
    rows = [
        Row(p, ((5, 6, 7), (8, 9)), (0.5, 0.0), labels) if i % 2 else Row(p) for i, p in enumerate(prompts)
    ]
    plans = loader.plan_batches(rows, 3, (64, 128, 256))
    batches = list(loader.row_batches(plans, processor, 3))
    assert len(batches) == len(plans) and any(len(group) < 3 for _, group in plans)
    for (length, group), (found, batch) in zip(plans, batches):
        assert list(found) == group
        assert batch.tokens.shape == (3, length) and batch.pixels.pixels.shape[:2] == (
            3,
            group[0].prompt.crops,
        )
        for i, row in enumerate(group):
            n = row.prompt.length
            if row.responses:
                assert batch.loss_mask[i].tolist() == [0.0] * n + [0.5] * 3 + [0.0] * (length - n - 3)
                assert batch.labels[i, n : n + 5].tolist() == [0.25, -1.0, 1.0, -1.0, 0.0]
            assert (batch.labels[i] >= 0).sum() == (3 if row.responses else 0)
            alone = encode_row(row, processor, length, row.prompt.crops)
            for name in batch._fields:
                own = jax.tree.map(lambda x, i=i: x[i], getattr(batch, name))
                jax.tree.map(np.testing.assert_array_equal, own, getattr(alone, name))
        empty = slice(len(group), None)
        assert (batch.branch[empty] == -1).all() and (batch.image_index[empty] == -1).all()
        assert not batch.loss_mask[empty].any() and not any(x[empty].any() for x in batch.pixels)
        assert (batch.labels[empty] == -1).all()
    assert list(loader.row_batches([], processor, 3)) == []


def test_rows_with_log_probabilities(processor):
    """Weights for each token, signs included; what one row of a batch has, the batch has."""
    [asked] = loader.plan_prompts([(Query("q", (), "area"), "area")], processor, 1000)
    weights = ((0.5, -1.0, 0.0), (-2.0, 1.5))
    old, reference = ((-1.0, -2.0, -3.0), (-4.0, -5.0)), ((-6.0, -7.0, -8.0), (-9.0, -10.0))
    row = Row(asked, ((5, 6, 7), (8, 9)), weights, old=old, reference=reference, temperature=0.7)
    n, rows = asked.length, [row, Row(asked, ((5,),))]
    batch = loader.encode_rows(rows, processor, 32, 0, share=range(3))
    for name, values in (("loss_mask", weights), ("old", old), ("reference", reference)):
        found = getattr(batch, name)
        assert found[0].tolist() == [0.0] * n + [*values[0], *values[1]] + [0.0] * (32 - n - 5), name
        assert not found[2].any() and found.dtype == np.float32
    assert not batch.old[1].any() and batch.loss_mask[1, n] == 1.0
    np.testing.assert_array_equal(batch.temperature, np.array([0.7, 1.0, 1.0], np.float32))
    plain = loader.encode_rows(rows[1:], processor, 32, 0)
    assert plain.old is plain.reference is plain.temperature is None
    first, second = loader.split_rows([row], n + 4)
    assert (first.weights, second.weights) == (weights[:1], weights[1:])
    assert (first.old, second.reference, second.temperature) == (old[:1], reference[1:], 0.7)


# ---- the training stream -----------------------------------------------------------------------------


def test_stream_is_a_function_of_its_seed(processor):
    rows = [(text_rows(processor, 24), 1.0)]
    first = take(stream(rows, processor), 8)
    assert_equal(first, take(stream(rows, processor), 8))
    assert [marks(b) for b in first] != [marks(b) for b in take(stream(rows, processor, seed=6), 8)]


def test_every_epoch_is_another_permutation(processor):
    drawn = [marks(b) for b in take(stream([(text_rows(processor, 12), 1.0)], processor), 9)]
    epochs = [sum(drawn[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(20, 32)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize("at", [1, 5, 7])
def test_stream_continues_with_the_very_next_batch(processor, prompts, at):
    image_rows = [Row(p, ((7, 8, 9), (6,))) for p in prompts if p.length < 100]
    sources = [(text_rows(processor, 7), 0.5), (image_rows, 0.5)]
    whole = take(stream(sources, processor), 10)
    iterator = stream(sources, processor)
    take(iterator, at)
    state = json.loads(json.dumps(iterator.get_state()))  # as a checkpoint keeps it
    assert_equal(whole[at:], take(stream(sources, processor, state=state), 10 - at))


def test_shares_of_the_sources(processor):
    sources = [(text_rows(processor, 30), 0.75), (text_rows(processor, 3, "u"), 0.25)]
    rare = text_rows(processor, 3, "u")
    rare = [Row(row.prompt, ((200 + i,) * 3,)) for i, row in enumerate(rare)]
    sources[1] = (rare, 0.25)
    drawn = sum((marks(b) for b in take(stream(sources, processor), 100)), [])
    assert np.mean(np.array(drawn) >= 200) == pytest.approx(0.25, abs=0.02)
    assert set(drawn) == {*range(20, 50), 200, 201, 202}


@pytest.mark.parametrize("grouped", [False, True])
def test_batches_of_one_row(processor, grouped):
    """The rows of larger batches one by one, from one source and from two."""
    sources = [(text_rows(processor, 9), 0.75), (text_rows(processor, 3, "u"), 0.25)]
    for some in (sources[:1], sources):
        one = [marks(batch) for batch in take(stream(some, processor, 1, grouped=grouped), 12)]
        assert all(len(each) == 1 for each in one)
        assert sum(one, []) == sum((marks(b) for b in take(stream(some, processor, 4), 3)), [])


def test_sources_without_rows_or_weight_are_left_out(processor):
    rows, others = text_rows(processor, 8), [Row(r.prompt, ((99,),)) for r in text_rows(processor, 4)]
    alone = take(stream([(rows, 1.0)], processor), 4)
    assert_equal(alone, take(stream([([], 0.5), (rows, 0.3), (others, 0.0)], processor), 4))
    with pytest.raises(ValueError, match="nothing to train on"):
        stream([([], 1.0), (rows, 0.0)], processor)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch(processor, count):
    sources = [(text_rows(processor, 10), 0.7), (text_rows(processor, 5, "u"), 0.3)]
    whole = take(stream(sources, processor, 8), 6)
    parts = [take(stream(sources, processor, 8, share=sharding.Share((i,), count)), 6) for i in range(count)]
    for step, batch in enumerate(whole):
        assert all(len(part[step].tokens) == 8 // count for part in parts)
        shared = np.concatenate([part[step].tokens for part in parts])
        assert sorted(map(tuple, shared.tolist())) == sorted(map(tuple, batch.tokens.tolist()))
    with pytest.raises(ValueError, match="global batch of 9 rows cannot be split into 2 shards"):
        stream(sources, processor, 9, share=sharding.Share((0,), 2))


def test_sources_of_different_shapes_take_turns(processor, prompts):
    """Short rows without images keep batches of their own, in their share."""
    short = text_rows(processor, 9)
    long = [Row(p, ((7, 8),)) for p in prompts if p.crops]
    sources = [(short, 0.75), (long, 0.25)]
    batches = take(stream(sources, processor), 40)
    shapes = [(batch.tokens.shape[1], batch.pixels.pixels.shape[1]) for batch in batches]
    assert len(set(shapes)) == 2 and shapes.count((64, 0)) == 30
    for batch, (length, _) in zip(batches, shapes):
        assert (7 in marks(batch)) == (length != 64), "a batch holds rows of one shape only"
    iterator = stream(sources, processor)
    take(iterator, 7)
    assert_equal(batches[7:12], take(stream(sources, processor, state=iterator.get_state()), 5))


def test_a_source_has_one_shape(processor, prompts):
    rows = [Row(p, ((7, 8),)) for p in prompts if p.length < 200]
    shapes = {
        tuple(x.shape for x in jax.tree.leaves(batch)) for batch in take(stream([(rows, 1.0)], processor), 6)
    }
    assert len(shapes) == 1
    length, crops = shapes.pop()[0][1], max(row.prompt.crops for row in rows)
    assert length == loader.bucket(max(row.length for row in rows), (64, 128, 256)) and crops > 1


def test_grouped_rows_keep_their_share(processor, prompts):
    """Every row as often as without groups, in batches of its own bucket; a stream continues where it was."""
    short = [Row(p, ((7,) * (i + 1),)) for i, p in enumerate(prompts[:1] * 12)]
    longer = [Row(p, ((8,) * 40, (9,) * (60 + i))) for i, p in enumerate(prompts[:1] * 4)]
    other = [Row(prompts[0], ((6,) * 70,))] * 4
    sources = [(short + longer, 0.8), (other, 0.2)]
    batches = take(stream(sources, processor, grouped=True), 40)
    (brief, _), (long, _) = sorted({(b.tokens.shape[1], b.pixels.pixels.shape[1]) for b in batches})
    assert brief < long
    seen = [
        (tuple(tokens[branch > 0].tolist()), batch.tokens.shape[1])
        for batch in batches
        for tokens, branch in zip(batch.tokens, batch.branch)
    ]
    assert sum(6 in row for row, _ in seen) == 32
    for responses, marks_of, length in ((short, 7, brief), (longer, 8, long)):
        mine = [row for row, _ in seen if marks_of in row]
        assert all(at == length for row, at in seen if marks_of in row)
        counts = [mine.count(row) for row in set(mine)]
        assert len(counts) == len(responses) and max(counts) - min(counts) <= 1
    iterator = stream(sources, processor, grouped=True)
    take(iterator, 7)
    assert_equal(batches[7:12], take(stream(sources, processor, grouped=True, state=iterator.get_state()), 5))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40), size=st.integers(1, 9))
def test_groups_fill_a_batch(lengths, size):
    """All rows, each once; shortest first; several groups only where each fills a batch."""
    rows = [Row(Prompt(Query(str(i), (), "area"), "area", n, 0)) for i, n in enumerate(lengths)]
    groups = loader.by_bucket(rows, size, (64, 128, 256, 300))
    assert sorted(r.prompt.query.id for g in groups for r in g) == sorted(r.prompt.query.id for r in rows)
    assert len(groups) == 1 or min(map(len, groups)) >= size
    tops = [{loader.bucket(r.length, (64, 128, 256, 300)) for r in g} for g in groups]
    assert all(max(one) < min(other) for one, other in zip(tops, tops[1:]))
    if size == 1:
        assert all(len(top) == 1 for top in tops)


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12), room=st.integers(30, 80))
def test_split_rows_never_cuts_a_response(lengths, room):
    prompt = Prompt(Query("q", (), "area"), "area", 10, 0)
    responses = tuple((i,) * n for i, n in enumerate(lengths))
    parts = loader.split_rows([Row(prompt, responses)], 10 + room)
    assert tuple(r for part in parts for r in part.responses) == responses
    assert all(part.length <= 10 + room and part.responses for part in parts)
    for one, other in zip(parts, parts[1:]):  # no more rows than needed
        assert one.length + len(other.responses[0]) > 10 + room


def test_a_response_that_never_fits_names_the_query():
    prompt = Prompt(Query("q9", (), "area"), "area", 10, 0)
    with pytest.raises(ValueError, match="query q9: 10 prompt and 31 response tokens do not fit into 40"):
        loader.split_rows([Row(prompt, ((1,) * 5, (1,) * 31))], 40)


def test_prompts_are_measured_once_and_in_parts(processor, queries, prompts, monkeypatch):
    """A prompt's shape depends on its text and its images' sizes: the same ones again ask nothing."""
    measured, measure = [], processor.prefix_shapes

    def noted(texts, sizes):
        measured.append(list(zip(texts, map(tuple, sizes))))
        return measure(texts, sizes)

    monkeypatch.setattr(processor, "prefix_shapes", noted)
    monkeypatch.setattr(loader, "TOGETHER", 5)
    pairs, shapes = [(query, query.question) for query in queries], {}
    assert loader.plan_prompts([*pairs, *pairs], processor, 10_000, shapes) == [*prompts, *prompts]
    asked = [each for part in measured for each in part]
    assert len(asked) == len(set(asked)) == len(shapes) and max(map(len, measured)) == 5
    assert loader.plan_prompts(pairs, processor, 10_000, shapes) == prompts
    assert sum(map(len, measured)) == len(asked)
    changed = [(pairs[-1][0], "another text")]
    assert loader.plan_prompts(changed, processor, 10_000, shapes) != prompts[-1:]
    assert measured[-1][0][0] == "another text"


# ---- processes that decode ---------------------------------------------------------------------------


def test_worker_processes_give_the_same_batches(processor, prompts):
    """And a stream goes on with another number of them, or with none."""
    sources = [(text_rows(processor, 7), 0.5), ([Row(p, ((7, 8),)) for p in prompts], 0.5)]
    whole = take(stream(sources, processor), 6)
    iterator = stream(sources, processor, workers=2)
    assert_equal(whole[:3], take(iterator, 3))
    state = json.loads(json.dumps(iterator.get_state()))
    assert_equal(whole[3:5], take(stream(sources, processor, workers=2, state=state), 2))
    assert_equal(whole[3:5], take(stream(sources, processor, workers=0, state=state), 2))
    plans = loader.plan_batches([Row(p) for p in prompts], 3, (64, 128, 256))
    threads, processes = (list(loader.row_batches(plans, processor, 3, workers=n)) for n in (0, 2))
    assert [queries for queries, _ in threads] == [queries for queries, _ in processes]
    assert_equal([batch for _, batch in threads], [batch for _, batch in processes])
    assert workers.workers(2) is workers.workers(2), "they serve one stream after the other"


def test_a_worker_names_an_image_that_is_gone(processor, tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (16, 16)).save(path)
    [prompt] = loader.plan_prompts([(Query("q", (str(path),), "area"), "area")], processor, 1000)
    path.unlink()
    pool = workers.workers(2)
    for _ in range(2):  # it goes on after an error
        with pytest.raises(images.ImageError, match=f"{path}: no such image file") as error:
            loader.encode_rows([Row(prompt)], processor, 1000, 5, find=pool.find)
        assert error.value.cause == "missing image"


def test_a_worker_that_was_killed_is_replaced(processor, prompts):
    pool = workers.Workers(1)
    want = encode_row(Row(prompts[4]), processor, 256, 5)
    for _ in range(2):
        got = loader.encode_rows([Row(prompts[4])], processor, 256, 5, find=pool.find)
        assert_equal([want], [jax.tree.map(lambda x: x[0], got)])
        worker = pool.idle.queue[0]
        os.kill(worker.process.pid, signal.SIGTERM)  # as a scheduler that ends the job; it is not for them
        os.kill(worker.process.pid, signal.SIGKILL)
    pool.close()


def test_a_job_that_ends_two_workers_is_an_error(prompts):
    pool = workers.Workers(1)
    job = pixels.Job(sys.exit, [prompts[4].query.images], [prompts[4].crops], 5, 1)
    with pytest.raises(RuntimeError, match=r"two of data.workers=1 .* exit code 1 .* 1 images, .*40x12"):
        pool.find(job)


def test_workers_import_nothing_slow():
    """No jax above all: it takes seconds to start and, on an accelerator, memory."""
    names = ("data.pixels", *(f"crops.{name}" for name in ("hd", "tiles", "slicing", "splitting")))
    code = "".join(f"import mstar_jax.{name}\n" for name in names) + "import sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert {"numpy", "PIL", "mstar_jax"} <= loaded
    assert not loaded & {"jax", "jaxlib", "flax", "optax", "grain", "transformers", "tokenizers", "torch"}
