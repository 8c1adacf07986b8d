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
    # A token takes 393 KB of cache: 3.8 GB of a query whose responses are decoded 16 at a time, 4.2 of a row
    # of labels; decoding on a TPU copies most of it. On v5e:4x4 (16.9 GB a chip) pairs of chips share the
    # 8.3 GB of weights and the heads, a microbatch has 2 rows a pair, and moments give way to what samples.
    c.mesh.tensor = 2
    c.train.accumulate = 4
    c.train.offload_optimizer = True
    c.sampling.batch = 16
    c.sampling.places = 16
    c.explore.batch = 16
    c.prm.rows = 16
    c.benchmarks.paper = "Phi-3.5-vision"
    return variants.apply(c, variant)
