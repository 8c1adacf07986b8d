"""The policy against torch, random weights, fp32: Idefics2's vision tower, nn.MultiheadAttention, Llama.

The torch weights are written under the official names and read by the library's own importer.
"""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_minicpm as tiny
from close import REFERENCE, likeliest
from close import close as near
from safetensors.numpy import load_file, save_file
from tiny import generate

from mstar_jax import models, sharding
from mstar_jax.crops import slicing
from mstar_jax.inference.draw import SamplingConfig
from mstar_jax.models import attention, minicpmv25
from mstar_jax.structs import Batch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

CONFIG = tiny.config()
D, QUERIES, EPS = CONFIG.decoder.hidden_size, CONFIG.query_num, 1e-6


def randomise(model, seed):
    """Every parameter random, biases and norm weights too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = any(part.startswith("ln_") or "norm" in part for part in name.split("."))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if norm and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


class Resampler(torch.nn.Module):
    """The official resampler's parameters under their names, and what it computes, image by image."""

    def __init__(self, width):
        super().__init__()
        self.query = torch.nn.Parameter(torch.zeros(QUERIES, D))
        self.proj = torch.nn.Parameter(torch.zeros(D, D))
        self.kv_proj = torch.nn.Linear(width, D, bias=False)
        self.attn = torch.nn.MultiheadAttention(D, D // 128)
        self.ln_q, self.ln_kv, self.ln_post = (torch.nn.LayerNorm(D, eps=EPS) for _ in range(3))

    def forward(self, x, sizes):
        """x [B, L, V] with (rows, columns) of every image -> [B, QUERIES, D]."""
        x = self.ln_kv(self.kv_proj(x)).transpose(0, 1)
        place = torch.zeros_like(x)
        padding = torch.ones(x.shape[1], x.shape[0], dtype=torch.bool)
        for i, (rows, columns) in enumerate(sizes):
            own = torch.cartesian_prod(torch.arange(float(rows)), torch.arange(float(columns)))
            omega = 10000.0 ** (-torch.arange(D // 4) / (D // 4))
            row, column = (own[:, i, None] * omega for i in range(2))
            parts = [column.sin(), column.cos(), row.sin(), row.cos()]
            place[: len(own), i] = torch.cat(parts, dim=1)
            padding[i, : len(own)] = False
        query = self.ln_q(self.query)[:, None].expand(-1, x.shape[1], -1)
        out, _ = self.attn(query, x + place, x, key_padding_mask=padding)
        return self.ln_post(out.transpose(0, 1)) @ self.proj


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
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,  # generation runs to its cap
        pad_token_id=None,
        attn_implementation="eager",
    )
    return randomise(transformers.LlamaForCausalLM(config), 0)


@pytest.fixture(scope="module")
def vit():
    from transformers.models.idefics2 import modeling_idefics2

    v = CONFIG.vision
    config = transformers.models.idefics2.Idefics2VisionConfig(
        hidden_size=v.hidden_size,
        intermediate_size=v.intermediate_size,
        num_hidden_layers=v.num_layers,
        num_attention_heads=v.num_heads,
        image_size=v.image_size,
        patch_size=v.patch_size,
        layer_norm_eps=v.layer_norm_eps,
        hidden_act="gelu_pytorch_tanh",
        attn_implementation="eager",
    )
    return randomise(modeling_idefics2.Idefics2VisionTransformer(config), 1)


@pytest.fixture(scope="module")
def resampler():
    return randomise(Resampler(CONFIG.vision.hidden_size), 2)


@pytest.fixture(scope="module")
def folder(llama, vit, resampler, tmp_path_factory):
    """All weights under the official names."""
    path = tmp_path_factory.mktemp("official")
    tiny.processor(path)
    values = {}
    for prefix, module in (("llm", llama), ("vpm", vit), ("resampler", resampler)):
        values |= {f"{prefix}.{k}": v.detach().numpy().copy() for k, v in module.state_dict().items()}
    save_file(values, path / "model.safetensors")
    files = minicpmv25.config_files(CONFIG, "float32")
    (path / "config.json").write_text(json.dumps(files["config.json"]))
    return path


@pytest.fixture(scope="module")
def policy(folder):
    return models.Pretrained(folder).load(jnp.float32)


@pytest.fixture(scope="module")
def processor(folder):
    return models.Pretrained(folder).processor()


def close(ours, theirs):
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    near(ours, theirs, REFERENCE)


def tower(vit, patches):
    """torch's tower on patches [B, L, 3 * p * p] as images of 1 x L patches, nothing masked."""
    p, (rows, length, _) = CONFIG.vision.patch_size, patches.shape
    x = torch.tensor(patches).reshape(rows, length, 3, p, p).permute(0, 2, 3, 1, 4)
    return vit(x.reshape(rows, 3, p, length * p)).last_hidden_state


def official_features(vit, resampler, crops):
    """Features [C, QUERIES, D] of a conversation's images: padded to the longest, padding attended."""
    longest = max(len(patches) for patches, _ in crops)
    patches = np.stack([np.pad(x, [(0, longest - len(x)), (0, 0)]) for x, _ in crops])
    with torch.no_grad():
        return resampler(tower(vit, patches), [size for _, size in crops])


def sliced(image):
    """Patches and grids of an image and its slices, normalised as officially."""
    c = CONFIG
    found = slicing.slice_image(image, c.num_crops, c.scale_resolution, c.vision.patch_size)
    return [((patches.astype(np.float32) / 255 - 0.5) / 0.5, grid) for patches, grid in found]


@jax.jit
def causal_logits(policy, rows):
    x = policy.embed(rows.tokens, rows.image_index, rows.pixels)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    attend = attention.row_attention(jnp.tril(jnp.ones((len(x), x.shape[1], x.shape[1]), bool)), keep=False)
    return policy.logits(policy.decoder.hidden(x, positions, jnp.zeros(len(x), bool), attend)[0])


def test_every_weight_is_read_and_written_back(policy, folder, tmp_path):
    models.Pretrained(folder).save(policy, tmp_path)
    there, here = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert there.keys() == here.keys()
    assert all(there[name].tobytes() == here[name].tobytes() for name in there)


@pytest.mark.parametrize("length", [11, 16, 20])
def test_tower(vit, policy, length):
    later = np.minimum(np.arange(length, dtype=np.float32) * np.float32(1 / length), np.float32(1 - 1e-6))
    ids = slicing.position_ids(length, 7)
    boundaries = torch.arange(1 / 7, 1.0, 1 / 7).numpy()
    assert (ids == np.searchsorted(boundaries, later, side="right")).all(), "torch's formula is another here"
    patches = np.random.default_rng(length).normal(size=(2, length, 48)).astype(np.float32)
    ours = jax.jit(lambda m, x: m.tower(x, positions=np.stack([ids, ids])))(policy, patches)
    with torch.no_grad():
        close(ours, tower(vit, patches))


def test_resampler(resampler, policy):
    """Images of other shapes than square, padded with what must not matter."""
    sizes = [(2, 9), (5, 3), (1, 1), (9, 2)]
    x = np.random.default_rng(0).normal(size=(4, 20, CONFIG.vision.hidden_size)).astype(np.float32)
    ours = jax.jit(lambda m, *a: m.resampler(*a))(policy, x, np.array(sizes, np.int32))
    with torch.no_grad():
        close(ours, resampler(torch.tensor(x), sizes))


SIZES = [[(30, 9)], [(33, 30), (7, 3)], []]


@pytest.mark.parametrize("sizes", SIZES)
def test_logits_of_a_conversation(llama, vit, resampler, policy, processor, sizes):
    """Prompt, features and decoder together, sliced and several images."""
    images = [tiny.picture(*size, seed=i) for i, size in enumerate(sizes)]
    prompt = processor.encode("How many?", images)
    ids = torch.tensor(prompt.tokens.astype(np.int64))
    with torch.no_grad():
        embedded = llama.model.embed_tokens(ids)
        if images:
            theirs = official_features(vit, resampler, [crop for image in images for crop in sliced(image)])
            embedded[torch.tensor(prompt.image_index >= 0)] = theirs.reshape(-1, D)
            assert len(theirs) == len(prompt.pixels.patches)
        want = llama(inputs_embeds=embedded[None]).logits
    rows = jax.tree.map(lambda x: x[None], prompt)
    close(causal_logits(policy, rows), want)


def test_corrected_mask_is_every_image_alone(vit, resampler, policy, processor):
    config = tiny.config(corrected_mask=True)
    own = minicpmv25.MiniCPMV25Processor(config, processor.tokenizer)
    images = [tiny.picture(33, 30), tiny.picture(7, 3, 1), tiny.picture(16, 16, 2)]
    pixels = tiny.stacked([own.encode("?", images)])
    ours = np.asarray(jax.jit(lambda m, p: m.image_features(p))(policy, pixels))[0]
    crops = [crop for image in images for crop in sliced(image)]
    assert len({len(patches) for patches, _ in crops}) > 1
    theirs = torch.cat([official_features(vit, resampler, [crop]) for crop in crops])
    close(ours, theirs.reshape(-1, D))
    together = official_features(vit, resampler, crops).reshape(-1, D).numpy()
    assert np.abs(ours - together).max() > 0.1, "officially they do depend on each other"


def test_greedy_generation_token_for_token(llama, vit, resampler, policy, processor):
    """64 tokens with the shared-prefix cache, for prompts of different lengths with and without images.

    Each must be the likeliest for Llama after all those before it, which is its greedy continuation.
    """
    steps, cases = 64, [("Why?", []), ("How many cm is the triangle?", [(30, 9)]), ("A", [(16, 16)])]
    images = [[tiny.picture(*size) for size in sizes] for _, sizes in cases]
    prompts = [processor.encode(text, own) for (text, _), own in zip(cases, images)]
    length = max(len(prompt.tokens) for prompt in prompts)
    tokens, branch, index = (np.full((3, length), fill, np.int32) for fill in (0, -1, -1))
    for i, prompt in enumerate(prompts):
        n = len(prompt.tokens)
        tokens[i, :n], branch[i, :n], index[i, :n] = prompt.tokens, 0, prompt.image_index
    batch = Batch(tokens, branch, np.zeros((3, length), np.float32), index, tiny.stacked(prompts))
    # no stop and nothing forbidden, on both sides
    free = types.SimpleNamespace(vocab_size=CONFIG.decoder.vocab_size, forbidden_ids=(), stop_ids=())
    out = generate(free, SamplingConfig(branches=2, max_new_tokens=steps), policy, batch)
    for ours, prompt, own in zip(np.asarray(out.tokens), prompts, images):
        assert ours[0].tolist() == ours[1].tolist()
        assert len(set(ours[0].tolist())) > 3, "a constant sequence would prove little"
        with torch.no_grad():
            ids = np.concatenate([prompt.tokens, ours[0]]).astype(np.int64)
            embedded = llama.model.embed_tokens(torch.tensor(ids))
            if own:
                theirs = official_features(vit, resampler, sliced(own[0])).reshape(-1, D)
                embedded[np.flatnonzero(prompt.image_index >= 0)] = theirs
            logits = llama(inputs_embeds=embedded[None]).logits[0]
        likeliest(ours[0], logits[len(prompt.tokens) - 1 : -1])


def test_bfloat16_stays_near(policy, processor):
    """Drift of the logits in bfloat16, as a share of their standard deviation."""
    rows = jax.tree.map(lambda x: x[None], processor.encode("How many?", [tiny.picture(30, 9)]))
    exact = np.asarray(causal_logits(policy, rows))
    rough = np.asarray(causal_logits(sharding.cast(policy, jnp.bfloat16), rows))
    assert rough.dtype == np.float32
    drift = np.sqrt(np.mean((rough - exact) ** 2)) / exact.std()
    assert 1e-4 < drift < 0.2, drift
