"""M-STaR from Qwen3-VL (dense); every key is explained in configs/base.py.

    python -m mstar_jax.main --config=configs/qwen3_vl.py \
        --config.policy.path=/checkpoints/Qwen3-VL-4B-Instruct \
        --config.data.labelled=/data/mathv360k.json --config.data.root=/data/images

As configs/qwen_vl.py but for what its cache and its images take; the values are for 4B.
"""

from ml_collections import ConfigDict

from configs import qwen_vl


def get_config(variant: str = "mstar") -> ConfigDict:
    c = qwen_vl.get_config(variant)
    c.policy.family = "qwen3_vl"
    # Pixels of an image at most, in squares of 32 x 32, a token each (official: 16384). At least 64 of them:
    # smaller images are enlarged.
    c.policy.max_crops = 1024
    c.explore.batch = 8
    c.sampling.batch = 32  # a token takes 147 KB of cache: 1.4 GB of a query, with 16 responses
    return c
