"""M-STaR from SmolVLM2-256M or 500M on a GPU of 8 GB, or a CPU; every key is explained in configs/base.py.

    python -m mstar_jax.main --config=configs/smolvlm.py \
        --config.policy.path=/checkpoints/SmolVLM2-256M-Video-Instruct \
        --config.data.labelled=/data/mathv360k_8000.json --config.data.root=/data/images

The numbers of queries and steps are for some 8,000 rows of MathV360K, sampled by yourself: an iteration then
asks about 900 of them. On a GPU set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, or JAX takes only three quarters of
its memory. To train all parameters but the tower's: --config.train.lora.rank=0 --config.train.accumulate=4
--config.train.frozen="('^tower',)", with learning rates of about 1e-5.

Other methods are variants: --config=configs/smolvlm.py:rest_em (see configs/variants.py).
"""

from ml_collections import ConfigDict

from configs import base, variants


def get_config(variant: str = "mstar") -> ConfigDict:
    c = base.get_config()
    c.policy.family = "smolvlm"
    # Besides the whole image; 64 tokens each, so about 350 of an image. Officially 16, for any image.
    c.policy.max_crops = 4
    c.data.max_prompt = 640
    c.data.buckets = (128, 256, 448, 640, 896, 1152)
    c.data.workers = 2

    c.warmup.queries = 2000
    c.warmup.steps = 80
    c.warmup.batch = 16
    c.warmup.learning_rate = 1e-4
    c.warmup.warmup_steps = 5

    c.evolve.iterations = 8
    c.evolve.steps = 48
    c.evolve.batch = 16
    c.evolve.learning_rate = 1e-4

    c.prm.queries = 1000
    c.prm.held_out = 100
    c.prm.labelled = 400
    c.prm.completions = 8
    c.prm.rows = 8
    c.prm.steps = 120
    c.prm.batch = 16
    c.prm.longest = 1152
    c.prm.learning_rate = 1e-4
    c.prm.warmup_steps = 10

    c.explore.queries = 100
    c.explore.batch = 8

    c.train.lora.rank = 16
    c.train.accumulate = 2  # microbatches of 8 rows: their logits take the most memory
    c.train.save_every = 48

    c.sampling.batch = 16  # a token takes 23 KB of cache (500M: 41 KB), so 16 queries 1.7 GB (3.1 GB)
    c.sampling.max_new_tokens = 256
    return variants.apply(c, variant)
