"""M-STaR from InternVL2.5, InternVL3 or InternVL3.5; every key is explained in configs/base.py.

    python -m mstar_jax.main --config=configs/internvl3.py --config.policy.path=/checkpoints/InternVL3-2B \
        --config.data.labelled=/data/mathv360k.json --config.data.root=/data/images

Both formats are read, OpenGVLab's own and transformers' (`-hf`). A size is an option, for the batch sizes and
for `plan` without a checkpoint: --config=configs/internvl3.py:InternVL3_5-8B. Other methods are variants,
with a size or without one: configs/internvl3.py:rest_em, configs/internvl3.py:InternVL3_5-8B,rest_em.

InternVL3.5 thinks before it answers if its system message, `system_message` in config.json, or its chat
template says so. Responses then need more of sampling.max_new_tokens and data.buckets.
"""

from ml_collections import ConfigDict

from configs import base, variants

SIZES = {  # kilobytes of cache of a token, in bfloat16
    "InternVL2_5-1B": 12,
    "InternVL2_5-2B": 98,
    "InternVL2_5-4B": 37,
    "InternVL2_5-8B": 131,
    "InternVL3-1B": 12,
    "InternVL3-2B": 29,
    "InternVL3-8B": 57,
    "InternVL3_5-1B": 115,
    "InternVL3_5-2B": 115,
    "InternVL3_5-4B": 147,
    "InternVL3_5-8B": 147,
}


def get_config(options: str = "mstar") -> ConfigDict:
    """The config.

    Args:
      options: a size, a method, or both with a comma between them.

    Raises:
      ValueError: an option is neither, or there are two of a kind.
    """
    chosen = options.split(",")
    sizes = [name for name in chosen if name in SIZES]
    methods = [name for name in chosen if name not in SIZES]
    if len(sizes) > 1 or len(methods) > 1 or not set(methods) <= set(variants.VARIANTS):
        known = f"one size of {', '.join(SIZES)}, and one method of {', '.join(variants.VARIANTS)}"
        raise ValueError(f"configs/internvl3.py:{options}: choose at most {known}")
    [size], [method] = sizes or ["InternVL3-2B"], methods or ["mstar"]
    c = base.get_config()
    c.policy.family = f"internvl_chat:{size}"
    c.policy.max_crops = 12  # tiles, besides the thumbnail (official: 12)
    c.data.max_prompt = 4096  # 256 tokens per tile, so 3328 of an image, at most
    c.data.buckets = (768, 1280, 2048, 3072, 4096, 5120)
    # A query with 16 responses has up to 12,288 tokens in the cache: 0.4 GB for InternVL3-2B, 1.8 GB for
    # InternVL3_5-8B. So all that are sampled together take at most 46 GB, on all devices of the mesh.
    c.sampling.batch = 64 if SIZES[size] < 50 else 32 if SIZES[size] < 120 else 16
    c.explore.batch = 8
    c.prm.score_batch = 16
    c.train.accumulate = 8
    return variants.apply(c, method)
