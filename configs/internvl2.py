"""M-STaR from InternVL2-2B; every value that is not set here is explained in configs/phi35.py.

    python -m mstar_jax.main --config=configs/internvl2.py --config.policy.path=/checkpoints/InternVL2-2B \
        --config.data.labelled=/data/mathv360k.json --config.data.root=/data/images
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = runpy.run_path(str(pathlib.Path(__file__).with_name("phi35.py")))["get_config"]()
    c.policy.family = "internvl_chat"
    c.policy.max_crops = 12  # most tiles of an image, beside its thumbnail (official: 12)
    c.data.max_prompt = 4096  # 256 tokens a tile, so at most 3328 for an image
    c.data.buckets = (768, 1280, 2048, 3072, 4096, 5120)
    c.sampling.batch = 64  # 98 KB of cache a token
    c.benchmarks.paper = "InternVL2-2B"
    return c
