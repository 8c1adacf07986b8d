"""M-STaR from MiniCPM-Llama3-V-2.5; every key is explained in configs/base.py.

    python -m mstar_jax.main --config=configs/minicpmv25.py \
        --config.policy.path=/checkpoints/MiniCPM-Llama3-V-2_5 \
        --config.data.labelled=/data/mathv360k.json --config.data.root=/data/images

Other methods are variants: --config=configs/minicpmv25.py:rest_em (see configs/variants.py).
"""

from ml_collections import ConfigDict

from configs import base, variants


def get_config(variant: str = "mstar") -> ConfigDict:
    c = base.get_config()
    c.policy.family = "minicpmv"
    c.policy.max_crops = 9  # slices, besides the whole image (official: 9)
    c.data.max_prompt = 1536  # 98 tokens per slice, so about 1000 of an image
    c.sampling.batch = 64  # a token takes 131 KB of cache: 1.3 GB of a query, 16 responses at a time
    c.sampling.places = 16
    c.explore.batch = 64
    c.prm.rows = 32
    c.benchmarks.paper = "MiniCPM-V-2.5"
    return variants.apply(c, variant)
