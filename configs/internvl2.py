"""M-STaR from InternVL2-2B; every key is explained in configs/base.py.

    python -m mstar_jax.main --config=configs/internvl2.py --config.policy.path=/checkpoints/InternVL2-2B \
        --config.data.labelled=/data/mathv360k.json --config.data.root=/data/images

Other methods are variants: --config=configs/internvl2.py:rest_em (see configs/variants.py).
"""

from ml_collections import ConfigDict

from configs import base, variants


def get_config(variant: str = "mstar") -> ConfigDict:
    c = base.get_config()
    c.policy.family = "internvl_chat"
    c.policy.max_crops = 12  # tiles, besides the thumbnail (official: 12)
    c.data.max_prompt = 4096  # 256 tokens per tile, so 3328 of an image, at most
    c.data.buckets = (768, 1280, 2048, 3072, 4096, 5120)
    # A token takes 98 KB of cache: 1.2 GB of a query whose responses are decoded 16 at a time, 1.3 of a row
    # of labels. On v5e:2x4 (16.9 GB a chip) pairs of chips share the 4.4 GB of weights and the heads; a
    # row of 5120 tokens and 13 tiles takes about a GB in a training step or a score.
    c.mesh.tensor = 2
    c.train.accumulate = 8
    c.train.offload_optimizer = True
    c.sampling.batch = 32
    c.sampling.places = 16
    c.explore.batch = 32
    c.prm.rows = 32
    c.prm.score_batch = 16
    c.benchmarks.paper = "InternVL2-2B"
    return variants.apply(c, variant)
