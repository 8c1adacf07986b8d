"""Dimensions of the released models, by `model_type` of their config.json, for plans without a checkpoint."""

import dataclasses

from mstar_jax.models.internvl2 import InternVL2Config
from mstar_jax.models.layers import DecoderConfig
from mstar_jax.models.minicpmv25 import MiniCPMV25Config
from mstar_jax.models.phi35 import CLIP, Phi35Config
from mstar_jax.models.smolvlm import SmolVLMConfig
from mstar_jax.models.vision import VitConfig, gelu, tanh_gelu

PHI35 = Phi35Config(
    DecoderConfig(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=96,
        short_factor=(1.0,) * 48,  # the actual ones come with the checkpoint
        long_factor=(1.0,) * 48,
        max_position=131072,
        original_max_position=4096,
    ),
    CLIP,
)
INTERNVL2 = InternVL2Config(
    DecoderConfig(
        vocab_size=92553,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=24,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=1e6,
        max_position=32768,
        original_max_position=32768,
    ),
    VitConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=24,
        num_heads=16,
        image_size=448,
        patch_size=14,
        layer_norm_eps=1e-6,
        activation=gelu,
        select_layer=-1,
        patch_bias=True,
        pre_norm=False,
        post_norm=False,
        layer_scale=True,
    ),
)
MINICPMV25 = MiniCPMV25Config(
    DecoderConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=500000.0,
        max_position=8192,
        original_max_position=8192,
    ),
    VitConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_layers=27,
        num_heads=16,
        image_size=980,
        patch_size=14,
        layer_norm_eps=1e-6,
        activation=tanh_gelu,
        select_layer=-1,
        patch_bias=True,
        class_token=False,
        pre_norm=False,
    ),
)
SMOLVLM2_256M = SmolVLMConfig(
    DecoderConfig(
        vocab_size=49280,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=100000.0,
        max_position=8192,
        original_max_position=8192,
    ),
    dataclasses.replace(
        MINICPMV25.vision,
        hidden_size=768,
        intermediate_size=3072,
        num_layers=12,
        num_heads=12,
        image_size=512,
        patch_size=16,
    ),
    num_crops=16,
)

Dimensions = Phi35Config | InternVL2Config | MiniCPMV25Config | SmolVLMConfig
OFFICIAL: dict[str, Dimensions] = {
    "phi3_v": PHI35,
    "internvl_chat": INTERNVL2,
    "minicpmv": MINICPMV25,
    "smolvlm": SMOLVLM2_256M,
}
