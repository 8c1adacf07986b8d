"""Dimensions of the released models, for plans without a checkpoint.

Their keys are the `model_type` of their config.json or, for a family of several sizes, that and the model's
name: `internvl_chat:InternVL3-8B`.
"""

import dataclasses

from mstar_jax.models.internvl_chat import InternVLChatConfig
from mstar_jax.models.layers import DecoderConfig
from mstar_jax.models.minicpmv25 import MiniCPMV25Config
from mstar_jax.models.phi35 import CLIP, Phi35Config
from mstar_jax.models.qwen3vl import Qwen3VLConfig
from mstar_jax.models.qwen25vl import Qwen25VLConfig
from mstar_jax.models.smolvlm import SmolVLMConfig
from mstar_jax.models.vision import VitConfig, gelu, silu, tanh_gelu

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
INTERNVL2 = InternVLChatConfig(
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


def _internvl(
    layers: int, width: int, mlp: int, heads: int, kv_heads: int, *, like: DecoderConfig, head_dim: int = 128
) -> InternVLChatConfig:
    """InternVL2.5, 3 or 3.5 with a decoder of these sizes, and otherwise `like` this one."""
    decoder = dataclasses.replace(
        like,
        num_layers=layers,
        hidden_size=width,
        intermediate_size=mlp,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
    )
    return dataclasses.replace(INTERNVL2, decoder=decoder, template="internvl2_5")


_INTERNLM2 = INTERNVL2.decoder
_QWEN25 = dataclasses.replace(_INTERNLM2, vocab_size=151674, rms_norm_eps=1e-6, qkv_bias=True)
_QWEN3 = dataclasses.replace(_QWEN25, vocab_size=151936, qkv_bias=False, qk_norm=True)
_QWEN3 = dataclasses.replace(_QWEN3, max_position=40960, original_max_position=40960)
INTERNVL = {  # layers, width, MLP, heads, key/value heads
    "InternVL2_5-1B": _internvl(24, 896, 4864, 14, 2, head_dim=64, like=_QWEN25),
    "InternVL2_5-2B": _internvl(24, 2048, 8192, 16, 8, like=_INTERNLM2),
    "InternVL2_5-4B": _internvl(36, 2048, 11008, 16, 2, like=_QWEN25),
    "InternVL2_5-8B": _internvl(32, 4096, 14336, 32, 8, like=_INTERNLM2),
    "InternVL3-1B": _internvl(24, 896, 4864, 14, 2, head_dim=64, like=_QWEN25),
    "InternVL3-2B": _internvl(28, 1536, 8960, 12, 2, like=_QWEN25),
    "InternVL3-8B": _internvl(28, 3584, 18944, 28, 4, like=_QWEN25),
    "InternVL3_5-1B": _internvl(28, 1024, 3072, 16, 8, like=_QWEN3),
    "InternVL3_5-2B": _internvl(28, 2048, 6144, 16, 8, like=_QWEN3),
    "InternVL3_5-4B": _internvl(36, 2560, 9728, 32, 8, like=_QWEN3),
    "InternVL3_5-8B": _internvl(36, 4096, 12288, 32, 8, like=_QWEN3),
}
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
QWEN25VL_3B = Qwen25VLConfig(
    DecoderConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_layers=36,
        num_heads=16,
        num_kv_heads=2,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_sections=(16, 24, 24),
        max_position=128000,
        original_max_position=128000,
        tie_word_embeddings=True,
        qkv_bias=True,
    ),
    VitConfig(
        hidden_size=1280,
        intermediate_size=3420,
        num_layers=32,
        num_heads=16,
        image_size=112,
        patch_size=14,
        layer_norm_eps=1e-6,
        activation=silu,
        select_layer=-1,
        class_token=False,
        pre_norm=False,
        post_norm=False,
    ),
    num_crops=1024,
    max_pixels=12845056,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
QWEN3VL_4B = Qwen3VLConfig(
    dataclasses.replace(
        QWEN25VL_3B.decoder,
        hidden_size=2560,
        intermediate_size=9728,
        num_heads=32,
        num_kv_heads=8,
        rope_theta=5e6,
        rope_sections=(24, 20, 20),
        rope_interleaved=True,
        max_position=262144,
        original_max_position=262144,
        qkv_bias=False,
        qk_norm=True,
    ),
    dataclasses.replace(
        QWEN25VL_3B.vision,
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=24,
        image_size=32,
        patch_size=16,
        activation=tanh_gelu,
        patch_bias=True,
    ),
    num_crops=16384,
    min_pixels=65536,
    max_pixels=16777216,
    deep_layers=(5, 11, 17),
)

Dimensions = (
    Phi35Config | InternVLChatConfig | MiniCPMV25Config | SmolVLMConfig | Qwen25VLConfig | Qwen3VLConfig
)
OFFICIAL: dict[str, Dimensions] = {
    "phi3_v": PHI35,
    "internvl_chat": INTERNVL2,
    "minicpmv": MINICPMV25,
    "smolvlm": SMOLVLM2_256M,
    **{f"internvl_chat:{name}": config for name, config in INTERNVL.items()},
    "qwen2_5_vl": QWEN25VL_3B,
    "qwen3_vl": QWEN3VL_4B,
}
