"""M-STaR from Qwen2.5-VL; every key is explained in configs/base.py.

    python -m mstar_jax.main --config=configs/qwen_vl.py \
        --config.policy.path=/checkpoints/Qwen2.5-VL-3B-Instruct \
        --config.data.labelled=/data/mathv360k.json --config.data.root=/data/images

The size is that of the checkpoint; the values here are for 3B. For 7B, whose cache takes 57 KB a token, halve
the batches: --config.sampling.batch=32 --config.explore.batch=8. Images have their own resolution:
policy.max_crops limits their pixels, and data.max_prompt and data.buckets what that takes of a row.

Other methods are variants: --config=configs/qwen_vl.py:rest_em (see configs/variants.py).
"""

from ml_collections import ConfigDict

from configs import base, variants


def get_config(variant: str = "mstar") -> ConfigDict:
    c = base.get_config()
    c.policy.family = "qwen2_5_vl"
    # Pixels of an image at most, in windows of 112 x 112: 16 tokens each, so 1024 of an image (official: 1024
    # windows, 16384 tokens). Images below 56 x 56 pixels are enlarged.
    c.policy.max_crops = 64
    c.data.max_prompt = 1536
    c.sampling.batch = 64  # a token takes 37 KB of cache: 0.4 GB of a query, with 16 responses
    return variants.apply(c, variant)
