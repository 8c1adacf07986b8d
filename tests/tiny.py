"""A tiny policy and rows for it: the real code at the smallest sizes that still show every axis.

4 heads share 2 key/value heads; an image is 16 px = 4 x 4 patches = 2 x 2 merged features; the LongRoPE
switch is at 64 tokens. All parameters are random, biases and norm weights too, so that none can be lost
unnoticed.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import AutoTokenizer

from mstar_jax.inference.sampler import Entry, Sampler
from mstar_jax.models import attention, phi35
from mstar_jax.models.layers import DecoderConfig
from mstar_jax.models.vision import VitConfig
from mstar_jax.sharding import parameter_name
from mstar_jax.structs import Batch

VOCAB, SIZE, SIDE = 300, 16, 2
TEXTS = ["What is the area of the triangle?\nStep 1: the answer is 12.", "(A) 3 cm (B) 4 cm (C) 5 cm"] * 4

DECODER = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    short_factor=(1.0, 1.1, 1.3, 1.5),
    long_factor=(1.2, 2.0, 5.0, 9.0),
    max_position=256,
    original_max_position=64,
)
VISION = VitConfig(
    hidden_size=16, intermediate_size=32, num_layers=3, num_heads=2, image_size=SIZE, patch_size=4
)


def config(**decoder) -> phi35.Phi35Config:
    """The tiny config, with changes to its decoder."""
    return phi35.Phi35Config(dataclasses.replace(DECODER, **decoder), VISION, num_crops=4)


def randomised(make, seed: int = 0):
    """A model of these shapes whose every parameter is random; from numpy, which compiles nothing."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = parameter_name(path)
        centre = 1.0 if "norm" in name and not name.endswith("bias") else 0.0
        return jnp.asarray(centre + 0.2 * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(make))


def model(cfg: phi35.Phi35Config | None = None, seed: int = 0) -> phi35.Phi35Vision:
    """A policy with random parameters."""
    return randomised(lambda: abstract(cfg), seed)


def abstract(cfg: phi35.Phi35Config | None = None) -> phi35.Phi35Vision:
    """The policy's shapes."""
    return jax.eval_shape(lambda: phi35.Phi35Vision(config() if cfg is None else cfg, nnx.Rngs(0)))


def with_config(policy: phi35.Phi35Vision, cfg: phi35.Phi35Config) -> phi35.Phi35Vision:
    """The same parameters under another config of the same shapes."""
    return jax.tree.structure(abstract(cfg)).unflatten(jax.tree.leaves(policy))


def processor(folder, cfg: phi35.Phi35Config | None = None) -> phi35.Phi35Processor:
    """A processor with a tokenizer trained into `folder`."""
    phi35.make_tokenizer(TEXTS, folder, VOCAB)
    return phi35.Phi35Processor(config() if cfg is None else cfg, AutoTokenizer.from_pretrained(folder))


def row(rng, layout: list[tuple[int, int]], length: int, grids=()) -> dict[str, np.ndarray]:
    """One row.

    Args:
      rng: numpy generator.
      layout: (branch number, tokens) runs in order, e.g. [(0, 9), (1, 3), (-1, 2), (2, 4)].
      length: the row is padded to this with branch -1. Padding holds random tokens, which must not matter.
      grids: (rows, columns) of the images whose spans follow the prefix's first two tokens.
    """
    runs = [*layout, (-1, length - sum(n for _, n in layout))]
    branch = np.concatenate([np.full(n, number, np.int32) for number, n in runs])
    tokens = rng.integers(9, VOCAB, length).astype(np.int32)
    index, crops, at = np.full(length, -1, np.int32), 0, 2
    for grid in grids:
        span = phi35.feature_layout(*grid, SIDE, 2 + crops * SIDE**2)
        index[at : at + len(span)], tokens[at : at + len(span)] = span, 0
        crops, at = crops + 1 + grid[0] * grid[1], at + len(span) + 1
    assert at < np.sum(branch == 0) or not grids, "the prefix is too short for its images"
    return {"tokens": tokens, "branch": branch, "image_index": index, "pixels": pixels(rng, crops)}


def pixels(rng, crops: int) -> np.ndarray:
    """Random normalised crops."""
    return rng.normal(size=(crops, SIZE, SIZE, 3)).astype(np.float32)


def stack(rows: list[dict[str, np.ndarray]], size: int | None = None) -> Batch:
    """Rows of one length as a Batch of `size` rows; the loss is on every branch token."""
    length, size = len(rows[0]["tokens"]), size or len(rows)
    crops = max(len(one["pixels"]) for one in rows)
    empty = {"tokens": 0, "branch": -1, "image_index": -1}
    out = {k: np.full((size, length), fill, np.int32) for k, fill in empty.items()}
    out["pixels"] = np.zeros((size, crops, SIZE, SIZE, 3), np.float32)
    for i, one in enumerate(rows):
        for k in empty:
            out[k][i] = one[k]
        out["pixels"][i, : len(one["pixels"])] = one["pixels"]
    return Batch(loss_mask=(out["branch"] > 0).astype(np.float32), **out)


def alone(one: dict[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """The row that holds the prefix and one branch only, as branch 1."""
    places = np.flatnonzero((one["branch"] == 0) | (one["branch"] == number))
    out = {k: np.full_like(one[k], fill) for k, fill in (("tokens", 0), ("branch", -1), ("image_index", -1))}
    for k in out:
        out[k][: len(places)] = one[k][places]
    out["branch"][: len(places)] = one["branch"][places] > 0
    return out | {"pixels": one["pixels"]}


def prefix(one: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """The row's prompt only, padded to `length`."""
    size = int(np.sum(one["branch"] == 0))
    out = {
        k: np.full(length, fill, np.int32) for k, fill in (("tokens", 0), ("branch", -1), ("image_index", -1))
    }
    for k in out:
        out[k][:size] = one[k][:size]
    return out | {"pixels": one["pixels"]}


@jax.jit
def logits(policy: phi35.Phi35Vision, batch: Batch) -> jax.Array:
    """float32[B, T, V] that predicts every token of the rows."""
    return policy.logits(policy(batch))


@jax.jit
def _causal_logits(policy, tokens, image_index, pixels):
    length = tokens.shape[0]
    x = policy.embed(tokens[None], image_index[None], pixels[None])
    attend = attention.row_attention(jnp.tril(jnp.ones((1, length, length), bool)), keep=False)
    long = jnp.array([length > policy.decoder.config.original_max_position])
    hidden, _ = policy.decoder.hidden(x, jnp.arange(length)[None], long, attend)
    return policy.logits(hidden)


def raw_logits(policy: phi35.Phi35Vision, tokens, image_index=None, pixels=None) -> jax.Array:
    """float32[1, T, V] of one plain causal sequence, each place predicting the next token."""
    image_index = np.full(len(tokens), -1, np.int32) if image_index is None else image_index
    pixels = np.zeros((0, SIZE, SIZE, 3), np.float32) if pixels is None else pixels
    return _causal_logits(policy, np.asarray(tokens, np.int32), image_index, pixels)


# Weights of PyTorch models, by our parameters' names: `load` for the parity tests, spelled out apart from
# the library's own importer so that the two can disagree.


def assemble(shapes: phi35.Phi35Vision, values: dict[str, np.ndarray]) -> phi35.Phi35Vision:
    """A model of these shapes from a value for every parameter."""

    def take(path, leaf):
        value = values.pop(parameter_name(path))
        assert value.shape == leaf.shape, (parameter_name(path), value.shape, leaf.shape)
        return jnp.asarray(value)

    policy = jax.tree_util.tree_map_with_path(take, shapes)
    assert not values, f"not used: {sorted(values)}"
    return policy


def phi3_values(cfg: phi35.Phi35Config, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The decoder's parameters from Phi3ForCausalLM's."""
    c = cfg.decoder
    d, h, g, n, f = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size

    def stack(name, change):
        return np.stack([change(w[f"model.layers.{i}.{name}.weight"]) for i in range(c.num_layers)])

    def rows(start, heads):
        return lambda x: x[start * n : (start + heads) * n].T.reshape(d, heads, n)

    blocks = {
        "q": stack("self_attn.qkv_proj", rows(0, h)),
        "k": stack("self_attn.qkv_proj", rows(h, g)),
        "v": stack("self_attn.qkv_proj", rows(h + g, g)),
        "o": stack("self_attn.o_proj", lambda x: x.T.reshape(h, n, d)),
        "gate": stack("mlp.gate_up_proj", lambda x: x[:f].T),
        "up": stack("mlp.gate_up_proj", lambda x: x[f:].T),
        "down": stack("mlp.down_proj", lambda x: x.T),
        "input_norm": stack("input_layernorm", lambda x: x),
        "post_norm": stack("post_attention_layernorm", lambda x: x),
    }
    top = {
        "decoder.embedding": w["model.embed_tokens.weight"],
        "decoder.norm": w["model.norm.weight"],
        "decoder.head": w["lm_head.weight"].T,
    }
    return {f"decoder.blocks.{k}": v for k, v in blocks.items()} | top


def clip_values(cfg: phi35.Phi35Config, w: dict[str, np.ndarray], at: str) -> dict[str, np.ndarray]:
    """The tower's parameters from CLIPVisionModel's, whose names begin with `at`."""
    c = cfg.vision
    d, h = c.hidden_size, c.num_heads

    def stack(name, change=lambda x: x):
        return np.stack([change(w[f"{at}encoder.layers.{i}.{name}"]) for i in range(c.num_layers)])

    blocks = {}
    for name in "qkv":
        blocks[name] = stack(f"self_attn.{name}_proj.weight", lambda x: x.T.reshape(d, h, d // h))
        blocks[f"{name}_bias"] = stack(f"self_attn.{name}_proj.bias", lambda x: x.reshape(h, d // h))
    blocks["o"] = stack("self_attn.out_proj.weight", lambda x: x.T.reshape(h, d // h, d))
    blocks["o_bias"] = stack("self_attn.out_proj.bias")
    for ours, theirs in (("norm1", "layer_norm1"), ("norm2", "layer_norm2")):
        blocks[ours], blocks[f"{ours}_bias"] = stack(f"{theirs}.weight"), stack(f"{theirs}.bias")
    for ours, theirs in (("up", "mlp.fc1"), ("down", "mlp.fc2")):
        blocks[ours], blocks[f"{ours}_bias"] = (
            stack(f"{theirs}.weight", np.transpose),
            stack(f"{theirs}.bias"),
        )
    top = {
        "tower.patch": w[f"{at}embeddings.patch_embedding.weight"].reshape(d, -1).T,
        "tower.class_embedding": w[f"{at}embeddings.class_embedding"],
        "tower.position": w[f"{at}embeddings.position_embedding.weight"],
        "tower.pre_norm": w[f"{at}pre_layrnorm.weight"],
        "tower.pre_norm_bias": w[f"{at}pre_layrnorm.bias"],
        "tower.post_norm": w[f"{at}post_layernorm.weight"],
        "tower.post_norm_bias": w[f"{at}post_layernorm.bias"],
    }
    return {f"tower.blocks.{k}": v for k, v in blocks.items()} | top


def glue_values(w: dict[str, np.ndarray], at: str) -> dict[str, np.ndarray]:
    """Separators and projector."""
    return {
        "row_separator": w[f"{at}sub_GN"].reshape(-1),
        "view_separator": w[f"{at}glb_GN"].reshape(-1),
        "project_up": w[f"{at}img_projection.0.weight"].T,
        "project_up_bias": w[f"{at}img_projection.0.bias"],
        "project_out": w[f"{at}img_projection.2.weight"].T,
        "project_out_bias": w[f"{at}img_projection.2.bias"],
    }


def replicated(tree, mesh):
    """The tree on every device of a mesh."""
    return jax.device_put(tree, jax.NamedSharding(mesh, jax.P()))


def generate(processor, config, policy, batch, *, key=0, query_keys=None, limits=None, temperature=0.0):
    """All rows of a batch sampled to their ends, as `sampler.Generated`."""
    rows, shape = len(batch.tokens), (len(batch.tokens), config.branches)
    sampler, numbers = Sampler(processor, config, rows), np.arange(rows)
    samples = np.broadcast_to(np.arange(config.branches, dtype=np.uint32), shape)
    keys = numbers.astype(np.uint32) if query_keys is None else query_keys
    limits = np.full(shape, config.max_new_tokens, np.int32) if limits is None else limits
    slots = sampler.blank(policy, batch, None)
    source = numbers.astype(np.int32)
    entry = Entry(batch, keys, limits, samples, None, source)
    slots = sampler.enter(policy, slots, jax.random.key(key), entry)
    return sampler.advance(policy, slots, np.full(config.branches, temperature, np.float32), rows).out
