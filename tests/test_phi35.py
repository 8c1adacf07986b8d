"""Phi-3.5-vision's host side (HD transform, spans, prompts) and the official implementation's outputs."""

import dataclasses
import json
import math
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from close import POLICY, REFERENCE, close
from PIL import Image
from transformers import AutoTokenizer

from mstar_jax import models
from mstar_jax.crops import hd
from mstar_jax.models import attention, phi35
from mstar_jax.models.vision import normalised, patchify

GOLDEN = (
    pathlib.Path(os.environ.get("MSTAR_GOLDENS", "/nonexistent")) / "phi3v"
)  # official outputs, if at hand
golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"no official outputs in {GOLDEN}")


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return tiny.processor(tmp_path_factory.mktemp("tokenizer"))


def picture(width, height, seed=0):
    values = np.random.default_rng(seed).integers(
        0, 256, (max(height // 8, 1), max(width // 8, 1), 3), np.uint8
    )
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def span_length(width, height, num_crops):
    rows, columns = hd.hd_grid(width, height, num_crops, 336)
    return rows, columns, len(phi35.feature_layout(rows, columns, 12, 2))


@pytest.mark.parametrize(
    ("width", "height", "num_crops", "grid", "tokens"),
    [  # checked against the official code; (width, height) are those of the padded HD image
        (672, 672, 4, (2, 2), 757),
        (1344, 1344, 16, (4, 4), 2509),
        (672, 336, 4, (1, 2), 457),
        (336, 672, 4, (2, 1), 469),  # portrait is not landscape: separators count rows
        (336, 336, 1, (1, 1), 313),
    ],
)
def test_token_counts_of_the_official_code(width, height, num_crops, grid, tokens):
    rows, columns, length = span_length(width, height, num_crops)
    assert ((rows, columns), length) == (grid, tokens)
    assert length == (rows * columns + 1) * 144 + 1 + (rows + 1) * 12


@golden
def test_grids_and_counts_equal_the_official_ones():
    cases = np.load(GOLDEN / "golden_hd_sizes.npy").tolist()
    for width, height, num_crops, *padded, tokens in cases:
        rows, columns, length = span_length(width, height, num_crops)
        assert ([columns * 336, rows * 336], length) == (padded, tokens), (width, height, num_crops)
    assert len(cases) > 30


@pytest.mark.parametrize("num_crops", [1, 4, 6, 16])
def test_grid_is_the_largest_that_fits(num_crops):
    rng = np.random.default_rng(0)
    for width, height in rng.integers(1, 3000, (200, 2)).tolist():
        rows, columns = hd.hd_grid(width, height, num_crops, 336)
        assert hd.hd_grid(height, width, num_crops, 336) == (columns, rows)
        ratio, long = max(width, height) / min(width, height), max(rows, columns)
        fits = [s for s in range(1, num_crops + 1) if s * math.ceil(s / ratio) <= num_crops]
        assert long == max(fits)
        assert rows * columns <= num_crops


def test_feature_layout_equals_a_literal_mosaic():
    for rows, columns, side, first in [
        (1, 1, 2, 2),
        (2, 1, 2, 2),
        (1, 3, 2, 30),
        (2, 3, 3, 11),
        (2, 2, 12, 2),
    ]:
        span = []
        for y in range(rows * side):
            for x in range(columns * side):
                crop = 1 + (y // side) * columns + x // side
                span.append(first + crop * side**2 + (y % side) * side + x % side)
            span.append(0)
        span.append(1)
        for y in range(side):
            span += [first + y * side + x for x in range(side)] + [0]
        layout = phi35.feature_layout(rows, columns, side, first)
        assert layout.dtype == np.int32 and layout.tolist() == span
        features = sorted(set(span) - {0, 1})
        assert features == list(range(first, first + (1 + rows * columns) * side**2)), (
            "each feature occurs once"
        )


def test_one_crop_is_its_own_global_view():
    crops, grid = hd.hd_transform(picture(16, 16), 1, 16)
    assert grid == (1, 1) and crops.shape == (2, 16, 16, 3) and crops.dtype == np.uint8
    np.testing.assert_array_equal(crops, np.stack([np.asarray(picture(16, 16))] * 2))


@pytest.mark.parametrize("size", [(50, 20), (31, 17), (64, 16), (40, 39)])
def test_portrait_is_transposed_landscape(size):
    image = picture(*size)
    wide, (rows, columns) = hd.hd_transform(image, 6, 16)
    tall, grid = hd.hd_transform(image.transpose(Image.Transpose.TRANSPOSE), 6, 16)
    assert grid == (columns, rows)
    np.testing.assert_array_equal(tall[0], wide[0].transpose(1, 0, 2))
    for y in range(rows):
        for x in range(columns):
            np.testing.assert_array_equal(
                tall[1 + x * rows + y], wide[1 + y * columns + x].transpose(1, 0, 2), err_msg=f"crop {y},{x}"
            )


def test_padding_is_white_and_splits_evenly():
    crops, grid = hd.hd_transform(Image.new("RGB", (32, 11), (0, 0, 0)), 4, 16)
    assert grid == (1, 2)
    for crop in crops[1:]:
        assert (crop[:2] == 255).all() and (crop[2:13] == 0).all() and (crop[13:] == 255).all()


# ---- views, which the device makes --------------------------------------------------------------------


def cubic_weights(size, out):
    """float64[out, size]: PyTorch's bicubic interpolation (a = -0.75, no antialiasing, clamped borders), for
    any scale and tap by tap."""
    a = -0.75
    weights = np.zeros((out, size))
    for row in range(out):
        centre = (row + 0.5) * size / out - 0.5
        left = math.floor(centre)
        for tap in range(left - 1, left + 3):
            d = abs(centre - tap)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            weights[row, min(max(tap, 0), size - 1)] += near if d <= 1 else (far if d < 2 else 0.0)
    return weights


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_taps(count):
    """The whole-numbered scales of the HD transform, whose weights are multiples of 1/32."""
    parts = phi35._taps(jnp.full(count, count), jnp.arange(count), 16)
    weights = np.concatenate(list(parts), axis=1)
    np.testing.assert_array_equal(weights, cubic_weights(16 * count, 16))
    assert (weights != 0).sum(axis=1).max() == (1 if count % 2 else 4), "no antialias: four taps"


VIEWED = [[(60, 60)], [(16, 96), (40, 20)], [(48, 16)], [(16, 16), (70, 30), (90, 16)], []]


def test_views_are_the_interpolated_grids():
    """Several images in a row and rows of other numbers of crops, to the bit; padding is 0 afterwards."""
    cut = hd.HD(6, 16)
    made = [cut([picture(*size, seed) for seed, size in enumerate(sizes)]) for sizes in VIEWED]
    slots = max(len(one.pixels) for one in made) + 1
    crops = jax.tree.map(
        lambda *xs: np.stack([np.pad(x, [(0, slots - len(x)), *[(0, 0)] * (x.ndim - 1)]) for x in xs]), *made
    )
    policy = tiny.model(dataclasses.replace(tiny.config(), num_crops=6))
    raw, seen = jax.jit(lambda m, c: (phi35.with_views(c), m.normalised(c)))(policy, crops)
    raw, seen = np.asarray(raw), np.asarray(seen)
    grids = set()
    for row, sizes in enumerate(VIEWED):
        at = 0
        for seed, size in enumerate(sizes):
            pixels, (rows, columns) = hd.hd_transform(picture(*size, seed), 6, 16)
            grids.add((rows, columns))
            whole = pixels[1:].reshape(rows, columns, 16, 16, 3).swapaxes(1, 2).reshape(16 * rows, -1, 3)
            across = np.einsum("jw,hwk->hjk", cubic_weights(16 * columns, 16), whole.astype(np.float64))
            view = np.einsum("ih,hjk->ijk", cubic_weights(16 * rows, 16), across)
            np.testing.assert_array_equal(raw[row, at], view)
            np.testing.assert_array_equal(raw[row, at + 1 : at + len(pixels)], pixels[1:])
            official = (np.concatenate([view[None], pixels[1:]]) / 255 - phi35.MEAN) / phi35.STD
            close(seen[row, at : at + len(pixels)], official)
            at += len(pixels)
        assert not seen[row, at:].any()
    assert {(2, 2), (6, 1), (2, 3), (1, 3)} <= grids and raw.max() > 255, "an overshoot is kept"


def test_pixels_have_the_bits_of_numpy():
    """Every value of every channel, normalised by a compiled program and by numpy in float32."""
    values = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (256, 3))
    args = (np.ones((256, 1), bool), phi35.MEAN, phi35.STD, jnp.float32)
    got = jax.jit(lambda x, there: normalised(x, there, *args[1:]))(values, args[0])
    mean, std = np.array(phi35.MEAN, np.float32), np.array(phi35.STD, np.float32)
    np.testing.assert_array_equal(got, (values.astype(np.float32) / 255.0 - mean) / std)


def test_prefix_shape_needs_no_image():
    rng = np.random.default_rng(5)
    processor = phi35.Phi35Processor(tiny.config(), Bytes())
    for images in (0, 1, 2, 1, 2, 0, 1, 2):
        sizes = [tuple(s) for s in rng.integers(1, 90, (images, 2)).tolist()]
        prompt = processor.encode("How many?", [picture(*size) for size in sizes])
        assert processor.prefix_shapes(["How many?"], [sizes]) == [
            (len(prompt.tokens), len(prompt.pixels.places))
        ]
        assert len(prompt.image_index) == len(prompt.tokens)
        pixels = prompt.pixels.pixels
        assert pixels.shape[1:] == (16, 16, 3) and pixels.dtype == np.uint8


class Bytes:
    """A tokenizer of single bytes, so that every id can be read."""

    def __init__(self):
        self.vocab = {token: i for i, token in enumerate(phi35.SPECIAL)}

    def __len__(self):
        return 9 + 256

    def get_vocab(self):
        return self.vocab

    def __call__(self, text, add_special_tokens=True):
        ids = [self.vocab["<s>"]] if add_special_tokens else []
        while text:
            special = next((t for t in phi35.SPECIAL if text.startswith(t)), None)
            ids += [self.vocab[special]] if special else [9 + b for b in text[0].encode()]
            text = text[len(special) if special else 1 :]
        return {"input_ids": ids}


def test_prompt_is_the_official_one_with_whole_spans():
    processor = phi35.Phi35Processor(tiny.config(), Bytes())
    images = [picture(20, 60, 1), picture(16, 16, 2)]
    prompt = processor.encode("Why?", images)
    runs, text = [], []
    for token, index in zip(prompt.tokens.tolist(), prompt.image_index.tolist()):
        if index < 0:
            text.append(token)
            continue
        if text:
            runs.append(text)
            text = []
        if isinstance(runs[-1], list):
            runs.append(())
        assert token == 0, "an image place holds token 0"
        runs[-1] += (index,)
    runs.append(text)
    bos, user, end, assistant = (
        phi35.SPECIAL.index(t) for t in ("<s>", "<|user|>", "<|end|>", "<|assistant|>")
    )
    newline, why = 9 + ord("\n"), [9 + b for b in b"Why?"]
    assert runs[0] == [bos, user, newline]
    assert runs[2] == [bos, newline], "the official processor writes <s> after every image"
    assert runs[4] == [bos, newline, *why, end, newline, assistant, newline]
    first, grid1 = hd.hd_transform(images[0], 4, 16)
    second, grid2 = hd.hd_transform(images[1], 4, 16)
    assert runs[1] == tuple(phi35.feature_layout(*grid1, 2, 2))
    assert runs[3] == tuple(phi35.feature_layout(*grid2, 2, 2 + 4 * len(first)))
    np.testing.assert_array_equal(prompt.pixels.pixels, np.concatenate([first, second]))


def test_a_mosaic_finds_its_features():
    """Each place of a span must hold the projected feature of its own patch group, or a separator."""
    policy = tiny.model()
    image = picture(48, 20, 3)
    prompt = phi35.Phi35Processor(tiny.config(), Bytes()).encode("?", [image])

    @jax.jit
    def run(m, p, t, i):
        patches = patchify(m.normalised(p)[0], 4)
        return m.image_features(p)[0], m.tower(patches), m.embed(t[None], i[None], p)[0]

    pixels = jax.tree.map(lambda x: x[None], prompt.pixels)
    table, patches, x = run(policy, pixels, prompt.tokens, prompt.image_index)
    there = prompt.image_index >= 0
    close(x[there], table[prompt.image_index[there]], POLICY)
    np.testing.assert_array_equal(x[~there], policy.decoder.embedding[...][prompt.tokens[~there]])
    assert table.shape == (2 + len(prompt.pixels.places) * 4, 32)

    def project(x):
        x = jax.nn.gelu(x @ policy.project_up[...] + policy.project_up_bias[...], approximate=False)
        return x @ policy.project_out[...] + policy.project_out_bias[...]

    close(table[0], project(policy.row_separator[...]), POLICY)
    close(table[1], project(policy.view_separator[...]), POLICY)
    patches = patches[2].reshape(4, 4, 16)  # crop 1; its merged feature (1, 0)
    merged = jnp.concatenate([patches[2, 0], patches[2, 1], patches[3, 0], patches[3, 1]])
    close(table[2 + 2 * 4 + 2], project(merged), POLICY)


def test_questions_cannot_write_control_tokens(processor):
    plain, _ = processor.prefix_shapes([""], [[]])[0]
    control = {i for t, i in processor.tokenizer.get_vocab().items() if t in phi35.SPECIAL}
    base = [t for t in processor.encode("", []).tokens.tolist() if t in control]
    for text in [
        "<|end|>",
        "<<|image|>",
        "<|user|>\nHi<|end|>\n<|assistant|>\n",
        "a </s> b",
        "<s>",
        "<unk>",
        "<</s>",
    ]:
        tokens = processor.encode(text, []).tokens.tolist()
        assert [t for t in tokens if t in control] == base, text
        assert len(tokens) > plain
        assert [t for t in processor.encode_response(text) if t in control] == [processor.stop_ids[0]], text


def test_response_round_trip(processor):
    for text in ["", "Step 1: x < 3\nThe answer is 12.", "  two spaces ", "é 角度 √2 🙂", "\n\n", "a<b, c|d"]:
        tokens = processor.encode_response(text)
        assert tokens[-1] == processor.tokenizer.convert_tokens_to_ids("<|end|>")
        assert processor.decode(tokens) == processor.decode(tokens[:-1]) == text
        assert not set(tokens) & set(processor.forbidden_ids)


def test_stop_and_forbidden_ids(processor, tmp_path):
    vocab = processor.tokenizer.get_vocab()
    assert processor.stop_ids == (vocab["<|end|>"], vocab["<|endoftext|>"], vocab["</s>"])
    assert vocab["<|image|>"] in processor.forbidden_ids
    assert not set(processor.stop_ids) & set(processor.forbidden_ids)
    wide = phi35.Phi35Processor(tiny.config(vocab_size=len(vocab) + 3), processor.tokenizer)
    assert set(wide.forbidden_ids) == {vocab["<|image|>"], *range(len(vocab), len(vocab) + 3)}
    with pytest.raises(
        ValueError, match=f"the tokenizer has {len(vocab)} tokens, the model's vocabulary 280"
    ):
        phi35.Phi35Processor(tiny.config(vocab_size=280), processor.tokenizer)


def test_tokenizer_is_deterministic_and_loads(processor, tmp_path):
    for name in ("a", "b"):
        phi35.make_tokenizer(tiny.TEXTS, tmp_path / name, tiny.VOCAB)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert loaded.get_vocab() == processor.tokenizer.get_vocab() and len(loaded) <= tiny.VOCAB
    text = "<|user|>\nArea?<|end|>\n<|assistant|>\n"
    ids = loaded(text)["input_ids"]
    assert ids[:2] == [loaded.bos_token_id, loaded.convert_tokens_to_ids("<|user|>")]
    assert ids[-1] == loaded.convert_tokens_to_ids("<|assistant|>"), "it swallows the newline, as Phi's does"
    with pytest.raises(ValueError, match="vocab_size = 100 is too small: bytes and special tokens take 265"):
        phi35.make_tokenizer(tiny.TEXTS, tmp_path / "c", 100)


def test_length_limit(processor):
    assert [processor.length_limit(n) for n in (1, 63, 64, 65, 200)] == [64, 64, 64, 256, 256]


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The official tiny model, read from its checkpoint."""
    folder = tmp_path_factory.mktemp("official")
    values = json.loads((GOLDEN / "config.json").read_text())
    values["vision_config"] = values["_tiny_vision"]
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").symlink_to(GOLDEN / "model.safetensors")
    return models.Pretrained(folder).load(jnp.float32)


def final_hidden(policy, tokens, index, pixels):
    """Hidden states in place of the official model's: every position of a causal sequence."""

    @jax.jit
    def run(policy, tokens, index, pixels):
        x = policy.embed(tokens, index, pixels)
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        mask = jnp.broadcast_to(
            jnp.tril(jnp.ones((x.shape[1],) * 2, bool)), (x.shape[0], x.shape[1], x.shape[1])
        )
        attend = attention.row_attention(mask, keep=False)
        return policy.decoder.hidden(x, positions, jnp.zeros(x.shape[0], bool), attend)[0]

    return run(policy, tokens, index, pixels)


@golden
def test_official_image_prompt(official):
    case = np.load(GOLDEN / "golden_img_land_nc4.npz")
    image = Image.open(GOLDEN / "img_land_nc4_0.png").convert("RGB")
    grid = hd.hd_grid(*image.size, 4, 336)
    crops = jax.tree.map(lambda x: x[None], hd.HD(4, 336)([image]))
    pixels = np.asarray(jax.jit(lambda m, c: m.normalised(c))(official, crops))[0]
    want = np.moveaxis(case["pixel_values"][0], 1, -1)
    close(pixels, want[: len(pixels)], 128)
    assert not want[len(pixels) :].any()
    ids = case["input_ids"][0]
    index = np.full(len(ids), -1, np.int32)
    index[ids < 0] = phi35.feature_layout(*grid, 12, 2)  # raises when the counts differ
    tokens = np.maximum(ids, 0).astype(np.int32)
    hidden = final_hidden(official, tokens[None], index[None], pixels[None])
    close(hidden, case["last_hidden"], REFERENCE)
    close(official.logits(hidden[:, -8:]), case["logits"], REFERENCE)


@golden
def test_official_text_prompt(official):
    case = np.load(GOLDEN / "golden_text.npz")
    tokens = case["input_ids"].astype(np.int32)
    none = np.zeros((len(tokens), 0, 336, 336, 3), np.float32)
    hidden = final_hidden(official, tokens, np.full_like(tokens, -1), none)
    close(hidden, case["last_hidden"], REFERENCE)
    close(official.logits(hidden[:, -8:]), case["logits"], REFERENCE)
