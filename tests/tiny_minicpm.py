"""A tiny MiniCPM-V 2.5: the real code at the smallest sizes that still show every axis.

Patches are 4 px and a 16 px square fills the encoder, so images of a few dozen pixels are sliced. The
resampler's heads are 128 wide, so the decoder is 256 wide for two of them. All parameters are random,
biases and norm weights too, so that none can be lost unnoticed.
"""

import dataclasses

import jax
import numpy as np
import tiny
from flax import nnx
from PIL import Image

from mstar_jax.models import minicpmv25, tokenizer
from mstar_jax.models.layers import DecoderConfig
from mstar_jax.models.vision import VitConfig, tanh_gelu

DECODER = DecoderConfig(
    vocab_size=300,
    hidden_size=256,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rope_theta=500000.0,
    max_position=512,
    original_max_position=512,
)
SIGLIP = VitConfig(
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    image_size=28,
    patch_size=4,
    layer_norm_eps=1e-6,
    activation=tanh_gelu,
    select_layer=-1,
    patch_bias=True,
    class_token=False,
    pre_norm=False,
)


def config(**changes) -> minicpmv25.MiniCPMV25Config:
    """The tiny config."""
    base = minicpmv25.MiniCPMV25Config(DECODER, SIGLIP, query_num=3, scale_resolution=16)
    return dataclasses.replace(base, **changes)


def model(seed: int = 0) -> minicpmv25.MiniCPMV25:
    """A policy whose every parameter is random."""
    return tiny.randomised(lambda: minicpmv25.MiniCPMV25(config(), nnx.Rngs(0)), seed)


def processor(folder, cfg: minicpmv25.MiniCPMV25Config | None = None) -> minicpmv25.MiniCPMV25Processor:
    """A processor with a tokenizer trained into `folder`."""
    tokenizer.make(
        tiny.TEXTS,
        folder,
        DECODER.vocab_size,
        special=minicpmv25.SPECIAL,
        bos=minicpmv25.BOS,
        eos=minicpmv25.EOS,
        unk=minicpmv25.UNK,
    )
    return minicpmv25.MiniCPMV25Processor(cfg or config(), tokenizer.load(folder))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A noise image."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def stacked(prompts) -> minicpmv25.Slices:
    """The pixels of encoded prompts as a batch, every array padded to the largest."""

    def stack(*parts):
        shape = tuple(map(max, zip(*(x.shape for x in parts))))
        return np.stack([np.pad(x, [(0, n - m) for n, m in zip(shape, x.shape)]) for x in parts])

    return jax.tree.map(stack, *(prompt.pixels for prompt in prompts))
