"""InternVL2's checkpoints, its features' order, and the official implementation's outputs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from close import POLICY, REFERENCE, close
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file
from test_internvl2 import CONFIG, GOLDEN, golden, make_words, picture

from mstar_jax import models, sharding
from mstar_jax.crops import tiles
from mstar_jax.models import attention, hf, internvl, internvl_chat
from mstar_jax.models.vision import patchify
from mstar_jax.plan.official import INTERNVL2


def model(seed=0):
    """A policy whose every parameter is random."""
    return tiny.randomised(lambda: internvl.InternVL(CONFIG, nnx.Rngs(0)), seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny policy in the official format, in bfloat16."""
    path, words = tmp_path_factory.mktemp("policy"), make_words(tmp_path_factory.mktemp("words"))
    models.FromScratch(internvl_chat.FAMILY, CONFIG, words).save(model(), path, "bfloat16")
    return path


def leaves(policy):
    return {name: np.asarray(leaf) for name, leaf in sharding.named(policy).items()}


# ---- names --------------------------------------------------------------------------------------------


def test_config_is_read_back(folder, tmp_path):
    assert models.Pretrained(folder).config == CONFIG
    assert models.Pretrained(folder, max_crops=3).config == dataclasses.replace(CONFIG, num_crops=3)
    files = internvl_chat.config_files(INTERNVL2, "bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(files["config.json"]))
    assert internvl_chat.read_config(tmp_path) == INTERNVL2


@golden
def test_config_of_the_official_code():
    decoder = dataclasses.replace(
        INTERNVL2.decoder,
        hidden_size=64,
        intermediate_size=128,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
    )
    vision = dataclasses.replace(
        INTERNVL2.vision, hidden_size=32, intermediate_size=64, num_layers=3, num_heads=4
    )
    assert internvl_chat.read_config(GOLDEN) == internvl_chat.InternVLChatConfig(decoder, vision, 12, 1, True)


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("", "ps_version", "v1"),
        ("", "force_image_size", 448),
        ("vision_config", "norm_type", "batch_norm"),
        ("vision_config", "use_moe", True),
        ("llm_config", "model_type", "internlm3"),
    ],
)
def test_siblings_of_another_architecture_are_refused(folder, tmp_path, part, key, value):
    values = hf.read_json(folder / "config.json")
    (values[part] if part else values)[key] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"config.json: .*{key} is {value!r}, only .* is supported"):
        models.Pretrained(tmp_path)


# ---- in and out ---------------------------------------------------------------------------------------


def test_what_is_written_is_what_was_there(folder):
    policy, processor = models.load(folder, jnp.float32)
    want = {k: v.astype(jnp.bfloat16).astype(np.float32) for k, v in leaves(model()).items()}
    got = leaves(policy)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    assert processor.decode(processor.encode_response("Step 1: 12.")) == "Step 1: 12."


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_then_export_is_bit_for_bit(folder, tmp_path, dtype):
    source = models.Pretrained(folder)
    source.save(source.load(dtype), tmp_path / "out")
    there, here = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert there.keys() == here.keys()
    for name in there:
        assert there[name].dtype == here[name].dtype
        assert there[name].tobytes() == here[name].tobytes(), name
    same = [p.name for p in folder.iterdir() if p.suffix != ".safetensors"]
    assert {"tokenizer.model", "tokenizer_config.json", "added_tokens.json", "config.json"} == set(same)
    for name in same:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_a_row_of_wqkv_is_a_group_s_query_key_or_value(folder, tmp_path):
    """Two groups of two queries, a key and a value of 8 rows each: rows 8 to 16 are query head 1, rows 40 to
    48 query head 3, rows 48 to 56 key head 1, rows 56 to 64 value head 1."""
    values = load_file(folder / "model.safetensors")
    name = "language_model.model.layers.1.attention.wqkv.weight"
    values[name] = np.zeros_like(values[name])
    for start, number in ((8, 1), (40, 3), (48, 5), (56, 7)):
        values[name][start : start + 8] = number
    hf.copy_files(folder, tmp_path)
    save_file(values, tmp_path / "model.safetensors")
    got = leaves(models.load(tmp_path, jnp.float32)[0])
    q, k, v = (got[f"decoder.blocks.{part}"][1] for part in "qkv")
    for head, number in enumerate((0, 1, 0, 3)):
        assert (q[:, head] == number).all()
    assert (k[:, 0] == 0).all() and (k[:, 1] == 5).all() and (v[:, 0] == 0).all() and (v[:, 1] == 7).all()
    for part, before in leaves(models.load(folder, jnp.float32)[0]).items():
        changed = part.split(".")[-1] in "qkv" and part.startswith("decoder")
        np.testing.assert_array_equal(got[part][0 if changed else ...], before[0 if changed else ...])


def test_straight_into_a_sharding(folder):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    whole, _ = models.load(folder, jnp.float32)
    policy = models.Pretrained(folder).load(jnp.float32, mesh=mesh)
    cut, parts = 0, [sharding.named(whole), sharding.named(policy)]
    for name, leaf in parts[0].items():
        np.testing.assert_array_equal(np.asarray(parts[1][name]), np.asarray(leaf), err_msg=name)
        cut += parts[1][name].addressable_shards[0].data.size < leaf.size
    assert cut > 15


# ---- features -----------------------------------------------------------------------------------------


def test_tiles_are_normalised_on_the_device():
    """With ImageNet's mean and deviation; what is no tile is 0."""
    crops = tiles.Tiles(1, 6, 16, True)([picture(48, 32), picture(16, 16)])
    assert crops.places.tolist() == [
        *([2, 3, row, column] for row in range(2) for column in range(3)),
        *([2, 3, -1, -1], [1, 1, 0, 0]),
    ]
    padded = jax.tree.map(lambda x: np.pad(x, [(0, 2), *[(0, 0)] * (x.ndim - 1)])[None], crops)
    seen = np.asarray(jax.jit(lambda m, c: m.normalised(c))(model(), padded))[0]
    want = (crops.pixels / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    close(seen[:8], want, scale=3.0)
    assert not seen[8:].any()


def test_each_place_finds_its_feature(folder):
    """Feature 4 t + 2 i + j of the table is the merged patches (2i, 2j), (2i, 2j+1), (2i+1, 2j), (2i+1, 2j+1)
    of tile t, projected."""
    policy, processor = models.load(folder, jnp.float32)
    prompt = processor.encode("?", [picture(48, 32)])
    assert len(prompt.pixels.places) == 7

    @jax.jit
    def run(m, p, t, i):
        patches = patchify(m.normalised(p)[0], 4)
        return m.image_features(p)[0], m.tower(patches), m.embed(t[None], i[None], p)[0]

    pixels = jax.tree.map(lambda x: x[None], prompt.pixels)
    table, patches, x = run(policy, pixels, prompt.tokens, prompt.image_index)
    there = prompt.image_index >= 0
    assert table.shape == (28, 32)
    close(x[there], table, POLICY)  # of one program, but fused differently
    np.testing.assert_array_equal(x[~there], policy.decoder.embedding[...][prompt.tokens[~there]])
    patches = np.asarray(patches).reshape(7, 4, 4, 16)
    for t, i, j in ((0, 0, 1), (4, 1, 0), (6, 1, 1)):
        square = patches[t, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        merged = np.concatenate([square[0, 0], square[0, 1], square[1, 0], square[1, 1]])
        y = (merged - merged.mean()) / np.sqrt(merged.var() + 1e-5)
        y = y * policy.project_norm[...] + policy.project_norm_bias[...]
        y = jax.nn.gelu(y @ policy.project_up[...] + policy.project_up_bias[...], approximate=False)
        y = y @ policy.project_out[...] + policy.project_out_bias[...]
        close(table[4 * t + 2 * i + j], y, POLICY)


def test_the_projector_s_norm_has_its_own_epsilon():
    """Seen where features are as small as it: a tower of zeros whose positions are all that it hands out."""
    policy = model()
    tower = jax.tree.map(jnp.zeros_like, policy.tower)
    tower.position[...] = 1e-3 * policy.tower.position[...]
    policy.tower = tower
    table = jax.jit(lambda m, p: m.image_features(p))(policy, jnp.ones((1, 1, 16, 16, 3)))
    merged = np.asarray(tower.position[...])[1:][[0, 1, 4, 5]].reshape(-1)
    y = (merged - merged.mean()) / np.sqrt(merged.var() + 1e-5)
    y = y * policy.project_norm[...] + policy.project_norm_bias[...]
    y = jax.nn.gelu(y @ policy.project_up[...] + policy.project_up_bias[...], approximate=False)
    y = y @ policy.project_out[...] + policy.project_out_bias[...]
    close(table[0, 0], y, POLICY)


def test_the_branches_of_an_image_prompt_do_not_see_each_other(folder):
    """A shared row's logits are those of its branches alone, with two images in the prefix."""
    policy, processor = models.load(folder, jnp.float32)
    prompt = processor.encode("Area?", [picture(16, 16), picture(30, 16)])
    answers = [processor.encode_response(text) for text in ("12", "Step 1: 3 cm")]
    crops = jax.tree.map(lambda x: x[None], prompt.pixels)
    seen = np.asarray(jax.jit(lambda m, p: m.normalised(p))(policy, crops))[0]

    def row(*branches):
        tokens = np.concatenate([prompt.tokens, *branches]).astype(np.int32)
        number = np.repeat(np.arange(len(branches) + 1), [len(prompt.tokens), *map(len, branches)])
        index = np.pad(prompt.image_index, (0, len(tokens) - len(prompt.tokens)), constant_values=-1)
        return {"tokens": tokens, "branch": number, "image_index": index, "pixels": seen}

    both = np.asarray(tiny.logits(policy, tiny.stack([row(*answers)])))[0]
    one = np.asarray(tiny.logits(policy, tiny.stack([row(answers[1])])))[0]
    end = len(answers[1])
    close(both[-end:], one[-end:], POLICY)


# ---- official outputs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official():
    return models.Pretrained(GOLDEN).load(jnp.float32)


@jax.jit
def final_hidden(policy, tokens, index, pixels):
    """Hidden states of every position of plain causal sequences."""
    x = policy.embed(tokens, index, pixels)
    rows, length = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (rows, length, length))
    attend = attention.row_attention(mask, keep=False)
    return policy.decoder.hidden(x, positions, jnp.zeros(rows, bool), attend)[0]


@golden
def test_official_image_prompt(official):
    case = np.load(GOLDEN / "golden_img_1tile.npz")
    image = Image.open(GOLDEN / "img_1tile.png").convert("RGB")
    crops = jax.tree.map(lambda x: x[None], tiles.Tiles(1, 12, 448, True)([image]))
    pixels = np.asarray(jax.jit(lambda m, p: m.normalised(p))(official, crops))[0]
    close(pixels, np.moveaxis(case["pixel_values"], 1, -1), 128)
    features = jax.jit(lambda m, p: m.image_features(p))(official, pixels[None])
    close(features, case["vit_proj"], REFERENCE)
    there = case["input_ids"] == 92546
    index = np.where(there, np.cumsum(there) - 1, -1).astype(np.int32)
    tokens = np.where(there, 0, case["input_ids"]).astype(np.int32)
    hidden = final_hidden(official, tokens, index, pixels[None])
    close(hidden, case["last_hidden"], REFERENCE)
    close(official.logits(hidden[:, -8:]), case["logits"], REFERENCE)


@golden
def test_official_text_prompt(official):
    """Two whole rows; none of our rows is ever padded on the left."""
    case = np.load(GOLDEN / "golden_text.npz")
    tokens = case["input_ids"].astype(np.int32)
    none = np.zeros((len(tokens), 0, 448, 448, 3), np.float32)
    hidden = final_hidden(official, tokens, np.full_like(tokens, -1), none)
    close(hidden, case["last_hidden"], REFERENCE)
    close(official.logits(hidden[:, -8:]), case["logits"], REFERENCE)
