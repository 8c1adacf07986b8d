"""The policy against transformers' own InternVLVisionModel and LlamaForCausalLM, random weights, fp32.

Our side reads their weights from a checkpoint in the official format. It is written here, names and fused
tensors spelled out, apart from the library's name table, so that the two can disagree.
"""

import copy
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from close import REFERENCE, close, likeliest
from safetensors.numpy import load_file, save_file
from test_internvl2 import CONFIG, SIZE, VOCAB

from mstar_jax import models, sharding
from mstar_jax.crops import tiles
from mstar_jax.inference.draw import SamplingConfig
from mstar_jax.models import internvl_chat

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only cost at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randomise(model, seed):
    """Every parameter random, biases, norm weights and layer scales too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


@pytest.fixture(scope="module")
def llama():
    c = CONFIG.decoder
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_position,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        bos_token_id=None,
        eos_token_id=None,  # generation runs to its cap
        attn_implementation="eager",
    )
    return randomise(transformers.LlamaForCausalLM(config), 0)


@pytest.fixture(scope="module")
def vit():
    v = CONFIG.vision
    config = transformers.InternVLVisionConfig(
        hidden_size=v.hidden_size,
        intermediate_size=v.intermediate_size,
        num_hidden_layers=v.num_layers,
        num_attention_heads=v.num_heads,
        image_size=[v.image_size] * 2,
        patch_size=[v.patch_size] * 2,
        layer_norm_eps=v.layer_norm_eps,
        hidden_act="gelu",
        norm_type="layer_norm",
        attention_bias=True,
        use_qk_norm=False,
        use_absolute_position_embeddings=True,
        use_mean_pooling=True,  # no norm after the last block
        attn_implementation="eager",
    )
    return randomise(transformers.InternVLVisionModel(config), 1)


@pytest.fixture(scope="module")
def projector():
    merged, width = 4 * CONFIG.vision.hidden_size, CONFIG.decoder.hidden_size
    norm, up, out = torch.nn.LayerNorm(merged), torch.nn.Linear(merged, width), torch.nn.Linear(width, width)
    mlp = torch.nn.Sequential(norm, up, torch.nn.GELU(), out)
    mlp = randomise(mlp, 2)
    with torch.no_grad():
        norm.weight.add_(1.0)
    return mlp


def fused(w, at):
    """InternLM2's wqkv: for each key/value head the rows of its queries, of its key, of its value."""
    n, group = CONFIG.decoder.head_dim, CONFIG.decoder.num_heads // CONFIG.decoder.num_kv_heads
    q, k, v = (w[f"{at}self_attn.{name}_proj.weight"] for name in "qkv")
    rows = []
    for head in range(CONFIG.decoder.num_kv_heads):
        rows += [q[head * group * n : (head + 1) * group * n], k[head * n : (head + 1) * n]]
        rows += [v[head * n : (head + 1) * n]]
    return torch.cat(rows)


@pytest.fixture(scope="module")
def folder(llama, vit, projector, tmp_path_factory):
    """Their weights under the official names."""
    w, out = llama.state_dict(), {}
    for i in range(CONFIG.decoder.num_layers):
        theirs, at = f"model.layers.{i}.", f"language_model.model.layers.{i}."
        out[f"{at}attention.wqkv.weight"] = fused(w, theirs)
        out[f"{at}attention.wo.weight"] = w[f"{theirs}self_attn.o_proj.weight"]
        for name, number in (("gate", 1), ("up", 3), ("down", 2)):
            out[f"{at}feed_forward.w{number}.weight"] = w[f"{theirs}mlp.{name}_proj.weight"]
        out[f"{at}attention_norm.weight"] = w[f"{theirs}input_layernorm.weight"]
        out[f"{at}ffn_norm.weight"] = w[f"{theirs}post_attention_layernorm.weight"]
    out["language_model.model.tok_embeddings.weight"] = w["model.embed_tokens.weight"]
    out["language_model.model.norm.weight"] = w["model.norm.weight"]
    out["language_model.output.weight"] = w["lm_head.weight"]
    w = vit.state_dict()
    for i in range(CONFIG.vision.num_layers):
        theirs, at = f"encoder.layer.{i}.", f"vision_model.encoder.layers.{i}."
        for kind in ("weight", "bias"):
            parts = [w[f"{theirs}attention.{name}_proj.{kind}"] for name in "qkv"]
            out[f"{at}attn.qkv.{kind}"] = torch.cat(parts)
            out[f"{at}attn.proj.{kind}"] = w[f"{theirs}attention.projection_layer.{kind}"]
            out[f"{at}norm1.{kind}"] = w[f"{theirs}layernorm_before.{kind}"]
            out[f"{at}norm2.{kind}"] = w[f"{theirs}layernorm_after.{kind}"]
            out[f"{at}mlp.fc1.{kind}"] = w[f"{theirs}mlp.fc1.{kind}"]
            out[f"{at}mlp.fc2.{kind}"] = w[f"{theirs}mlp.fc2.{kind}"]
        out[f"{at}ls1"], out[f"{at}ls2"] = w[f"{theirs}lambda_1"], w[f"{theirs}lambda_2"]
    at = "vision_model.embeddings."
    out[f"{at}class_embedding"] = w["embeddings.cls_token"]
    out[f"{at}position_embedding"] = w["embeddings.position_embeddings"]
    for kind in ("weight", "bias"):
        out[f"{at}patch_embedding.{kind}"] = w[f"embeddings.patch_embeddings.projection.{kind}"]
    out |= {f"mlp1.{name}": value for name, value in projector.state_dict().items()}
    path = tmp_path_factory.mktemp("official")
    save_file({name: value.numpy() for name, value in out.items()}, path / "model.safetensors")
    for name, values in internvl_chat.config_files(CONFIG, "float32").items():
        (path / name).write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def policy(folder):
    return models.Pretrained(folder).load(jnp.float32)


def row(length, grids=(), seed=0):
    """One prompt of random tokens and tiles; the spans of images of these (rows, columns) follow its
    first two tokens, a newline's width apart."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(12, VOCAB, length).astype(np.int32)
    index, at, first = np.full(length, -1, np.int32), 2, 0
    for grid in grids:
        features = 4 * tiles.tile_count(*grid, thumbnail=True)
        index[at : at + features] = np.arange(first, first + features)
        at, first = at + features + 1, first + features
    pixels = rng.normal(size=(first // 4, SIZE, SIZE, 3)).astype(np.float32)
    return {
        "tokens": np.where(index < 0, tokens, 0).astype(np.int32),
        "branch": np.zeros(length, np.int32),
        "image_index": index,
        "pixels": pixels,
    }


def embeddings(llama, vit, projector, row):
    """[1, T, D] in torch: the tiles' features in the places of the images, in order."""
    with torch.no_grad():
        x = llama.model.embed_tokens(torch.tensor(row["tokens"][None], dtype=torch.long))
        if len(row["pixels"]) == 0:
            return x
        pixels = torch.tensor(row["pixels"]).permute(0, 3, 1, 2).to(x.dtype)
        patches = vit(pixels).last_hidden_state[:, 1:]
        tiles, count, channels = patches.shape
        side = CONFIG.vision.side
        image = patches.transpose(1, 2).reshape(tiles, channels, side, side)
        squares = torch.nn.functional.unfold(image, 2, stride=2)  # [tiles, (channel, dy, dx), squares]
        merged = squares.reshape(tiles, channels, 4, count // 4).permute(0, 3, 2, 1)
        features = projector(merged.reshape(tiles, count // 4, 4 * channels))
        x[0, torch.tensor(row["image_index"] >= 0)] = features.reshape(-1, features.shape[-1])
        return x


def error(ours, theirs):
    """Greatest difference, as a share of the greatest value."""
    ours, theirs = np.asarray(ours, np.float64), theirs.detach().double().numpy()
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


CASES = {
    "text": (),
    "two by three and a thumbnail": ((2, 3),),
    "one tile and several": ((1, 1), (1, 2), (2, 1)),
}


def test_every_weight_is_read_and_written_back(policy, folder, tmp_path):
    """So the reference classes find in the exported folder what was taken from them."""
    models.Pretrained(folder).save(policy, tmp_path)
    there, here = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert there.keys() == here.keys()
    assert all(there[name].tobytes() == here[name].tobytes() for name in there)


@pytest.mark.parametrize("grids", CASES.values(), ids=CASES)
def test_image_features_and_logits(llama, vit, projector, policy, grids):
    one = row(48, grids, seed=len(grids))
    embedded = embeddings(llama, vit, projector, one)
    args = (one["tokens"][None], one["image_index"][None], one["pixels"][None])
    close(jax.jit(lambda m, *a: m.embed(*a))(policy, *args), embedded, REFERENCE)
    with torch.no_grad():
        theirs = llama(inputs_embeds=embedded).logits
    close(tiny.raw_logits(policy, one["tokens"], one["image_index"], one["pixels"]), theirs, REFERENCE)


def test_greedy_generation_token_for_token(llama, vit, projector, policy):
    """64 tokens after texts, after several tiles, and after several images.

    Each must be the likeliest for Llama after all those before it, which is its greedy continuation.
    """
    steps, longest = 64, 60
    plans = [(5, ()), (longest, ()), (40, ((2, 3),)), (48, ((1, 1), (1, 2)))]
    rows = [row(length, grids, seed) for seed, (length, grids) in enumerate(plans)]
    padded = [tiny.prefix(one, longest) for one in rows]
    # no stop and nothing forbidden, on both sides
    processor = types.SimpleNamespace(vocab_size=VOCAB, forbidden_ids=(), stop_ids=())
    config = SamplingConfig(branches=2, max_new_tokens=steps)
    out = tiny.generate(processor, config, policy, tiny.stack(padded))
    for r, one in enumerate(rows):
        ours = np.asarray(out.tokens)[r]
        assert ours[0].tolist() == ours[1].tolist()
        assert len(set(ours[0].tolist())) > 3, "a constant sequence would prove little"
        prompt = embeddings(llama, vit, projector, one)
        with torch.no_grad():
            added = llama.model.embed_tokens(torch.tensor(ours[:1], dtype=torch.long))
            logits = llama(inputs_embeds=torch.cat([prompt, added], dim=1)).logits[0]
        likeliest(ours[0], logits[prompt.shape[1] - 1 : -1])


def test_bfloat16_drifts_no_further_than_theirs(llama, vit, projector, policy):
    """Against fp32. The roundings of the two differ, so the bound is loose."""
    one = row(48, ((2, 3),))
    rounding = [copy.deepcopy(module).to(torch.bfloat16) for module in (llama, vit, projector)]
    with torch.no_grad():
        exact = llama(inputs_embeds=embeddings(llama, vit, projector, one)).logits
        rounded = rounding[0](inputs_embeds=embeddings(*rounding, one)).logits
    half = sharding.cast(policy, jnp.bfloat16)
    ours = error(tiny.raw_logits(half, one["tokens"], one["image_index"], one["pixels"]), exact)
    theirs = error(rounded.float().numpy(), exact)
    print(f"\nbfloat16 logits, share of the greatest: ours {ours:.2e}, theirs {theirs:.2e}")
    assert 1e-3 < ours < 2 * theirs
