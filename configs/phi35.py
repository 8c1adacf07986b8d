"""M-STaR from Phi-3.5-vision; every key is explained in configs/base.py.

    python -m mstar_jax.main --config=configs/phi35.py \
        --config.policy.path=/checkpoints/Phi-3.5-vision-instruct \
        --config.data.labelled=/data/mathv360k.json --config.data.root=/data/images
    python -m mstar_jax.export --workdir=runs/phi35 --output=/checkpoints/phi35-mstar

Other methods are variants: --config=configs/phi35.py:rest_em (see configs/variants.py).
"""

from ml_collections import ConfigDict

from configs import base, variants


def get_config(variant: str = "mstar") -> ConfigDict:
    c = base.get_config()
    c.policy.family = "phi3_v"
    c.policy.max_crops = 4  # besides the global view (official: 4); 781 tokens of an image, at most
    # A token takes 393 KB of cache, so a query up to 3.6 GB (16 x 512 tokens in its branches, 1024 in its
    # prefix): one query per device to begin with.
    c.sampling.batch = 16
    c.benchmarks.paper = "Phi-3.5-vision"
    return variants.apply(c, variant)
