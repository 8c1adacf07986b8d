"""M-STaR from MiniCPM-Llama3-V-2.5; every value that is not set here is explained in configs/phi35.py.

    python -m mstar_jax.main --config=configs/minicpmv25.py \
        --config.policy.path=/checkpoints/MiniCPM-Llama3-V-2_5 \
        --config.data.labelled=/data/mathv360k.json --config.data.root=/data/images
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = runpy.run_path(str(pathlib.Path(__file__).with_name("phi35.py")))["get_config"]()
    c.policy.family = "minicpmv"
    c.policy.max_crops = 9  # most slices of an image, beside the whole of it (official: 9)
    c.data.max_prompt = 1536  # 98 tokens a slice, so about 1000 for an image
    c.sampling.batch = 32  # 131 KB of cache a token
    c.benchmarks.paper = "MiniCPM-V-2.5"
    return c
