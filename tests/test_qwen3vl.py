"""Qwen3-VL: what differs from Qwen2.5-VL and needs no reference implementation."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import test_qwen25vl
import tiny
from close import POLICY, close
from flax import nnx
from safetensors.numpy import load_file
from test_qwen25vl import UNIT, batch, loss, make_words, pictures

from mstar_jax import models, sharding
from mstar_jax.models import hf, layers, native, qwen, qwen3vl
from mstar_jax.models.vision import tanh_gelu

CONFIG = qwen3vl.Qwen3VLConfig(
    dataclasses.replace(
        test_qwen25vl.CONFIG.decoder,
        hidden_size=32,  # not heads times their width
        num_layers=3,
        rope_sections=(2, 2, 2),
        rope_interleaved=True,
        qkv_bias=False,
        qk_norm=True,
    ),
    dataclasses.replace(
        test_qwen25vl.CONFIG.vision, image_size=UNIT, activation=tanh_gelu, patch_bias=True, num_layers=4
    ),
    num_crops=48,
    min_pixels=128,
    max_pixels=3072,
    mean=(0.4, 0.5, 0.45),
    std=(0.25, 0.3, 0.2),
    image_token_id=test_qwen25vl.CONFIG.image_token_id,
    positions=5,
    deep_layers=(0, 2),
)
TIED = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, tie_word_embeddings=True))


def model(config=CONFIG, seed=0):
    """A policy whose every parameter is random."""
    return tiny.randomised(lambda: qwen3vl.Qwen3VL(config, nnx.Rngs(0)), seed)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return make_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def processor(words):
    return qwen.QwenProcessor(CONFIG, qwen.load_tokenizer(words))


@pytest.fixture(scope="module")
def folder(words, tmp_path_factory):
    path = tmp_path_factory.mktemp("policy")
    models.FromScratch(qwen3vl.FAMILY, CONFIG, words).save(model(), path, "bfloat16")
    return path


def test_a_crop_is_a_feature(processor):
    prompt = processor.encode("How many?", pictures([(40, 24), (9, 9)]))
    index = prompt.image_index[prompt.image_index >= 0]
    assert index.tolist() == list(range(15 + 4)) and len(prompt.pixels.places) == 24


def test_positions_are_stretched_to_the_image():
    """Corners lie on corners, and what is linear in the table is linear in the image."""
    down, across = np.indices((5, 5)).reshape(2, -1)
    table = np.stack([down, across, 0 * down + 1], axis=-1).astype(np.float32)
    row, column = np.indices((8, 3)).reshape(2, 1, -1)
    grid = np.broadcast_to(np.array([8, 3]), (1, 24, 2))
    patches = native.Patches(None, None, row, column, grid)
    found = np.asarray(qwen3vl.stretched(table, patches, 5))[0]
    close(found, np.stack([row[0] * 4 / 7, column[0] * 4 / 2, 0 * row[0] + 1], axis=-1), 4)


def test_deepstack_adds_after_the_first_blocks():
    """By hand: each block is run alone, and the next part of the input is added to what it returns."""
    policy = model()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3 * 32)).astype(np.float32)
    positions = np.broadcast_to(np.arange(5), (2, 5))
    long = np.zeros(2, bool)
    rope = layers.rope_tables(CONFIG.decoder, positions, long)
    attend = layers.attention.row_attention(np.tril(np.ones((2, 5, 5), bool)), keep=False)
    hidden, _ = policy.decoder.hidden(x, positions, long, attend)
    first, *deep = np.split(x, 3, axis=-1)
    for number in range(3):
        block = jax.tree.map(lambda p, n=number: p[n], policy.decoder.blocks)
        first, _ = block(first, rope, attend)
        first = first + deep[number] if number < 2 else first
    close(hidden, layers.rms_norm(first, policy.decoder.norm[...], 1e-6), POLICY)


def test_config_and_weights_come_back(words, folder, tmp_path):
    source = models.Pretrained(folder)
    assert source.config == CONFIG
    source.save(source.load("float32"), tmp_path / "out")
    there, here = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert there.keys() == here.keys() and len(there) == 3 * 11 + 3 + 4 * 12 + 3 + 3 * 6
    assert all(there[name].tobytes() == here[name].tobytes() for name in there)
    models.FromScratch(qwen3vl.FAMILY, TIED, words).save(model(TIED), tmp_path / "tied")
    assert models.Pretrained(tmp_path / "tied").config == TIED


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vision_config", "hidden_act", "gelu"),
        ("vision_config", "num_position_embeddings", 24),
        ("vision_config", "deepstack_visual_indexes", [2, 0]),
        ("vision_config", "deepstack_visual_indexes", [4]),
        ("vision_config", "deepstack_visual_indexes", []),
        ("text_config", "attention_bias", True),
        ("text_config", "rope_scaling", {"mrope_section": [2, 2, 2], "mrope_interleaved": False}),
    ],
)
def test_siblings_of_another_architecture_are_refused(folder, tmp_path, part, key, value):
    hf.copy_files(folder, tmp_path)
    values = hf.read_json(folder / "config.json")
    values[part][key] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    key = "mrope_interleaved" if key == "rope_scaling" else key
    with pytest.raises(ValueError, match=f"{key} is "):
        models.Pretrained(tmp_path)


def test_shared_rows_padding_and_recomputation(processor):
    """A shared row's branches are as alone, beside a row with more crops too; and so are gradients."""
    prompt = processor.encode("Area?", pictures([(30, 20)]))
    other = processor.encode("Area of the triangle?", pictures([(60, 30)]))
    answers = [processor.encode_response(text) for text in ("12", "Step 1: 3 cm")]
    policy, n, m = model(), len(prompt.tokens), len(answers[0])
    rows = batch([prompt, other], [answers, answers[:1]])
    both = np.asarray(tiny.logits(policy, rows))[0]
    alone = np.asarray(tiny.logits(policy, batch([prompt, prompt], [answers[:1], answers[1:]])))
    close(both[: n + m], alone[0, : n + m], POLICY)
    close(both[n + m : n + m + len(answers[1])], alone[1, n:], POLICY)


@pytest.mark.slow
def test_recomputation_and_sharding_change_no_gradient(processor):
    prompt = processor.encode("Area?", pictures([(30, 20)]))
    rows = batch([prompt] * 4, [[processor.encode_response("Step 1: 3 cm")]] * 4)
    remat = jax.checkpoint_policies.nothing_saveable
    kept = sharding.named(jax.jit(jax.grad(loss))(model(), rows))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        layout = sharding.shardings(model(), sharding.TRAIN, mesh)
        cut = jax.device_put((model(), rows), (layout, sharding.batch_sharding(mesh)))
        recomputed = sharding.named(jax.jit(jax.grad(loss), static_argnums=2)(*cut, remat))
    scale = max(float(np.abs(value).max()) for value in kept.values())
    for name, value in kept.items():
        close(recomputed[name], value, POLICY, scale=scale, err_msg=name)
        assert np.abs(value).max() > 1e-4 or name.endswith("k_bias"), name  # which changes no softmax
