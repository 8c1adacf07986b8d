"""All of self-evolving training on a CPU, in minutes, on the embedded data set.

    python -m mstar_jax.main --config=configs/tiny.py                      # M-STaR
    python -m mstar_jax.main --config=configs/tiny.py:continuous           # Random-2, no reward model
    python -m mstar_jax.main --config=configs/tiny.py:iterative_rft        # or :rest_em, :sft
    python -m mstar_jax.main --config=configs/tiny.py:control              # as many steps, no new rollouts
    python -m mstar_jax.main --config=configs/tiny.py:grpo                 # or :rloo, :grpo_process
    python -m mstar_jax.main --config=configs/tiny.py:smoke                # to see that everything runs
    python -m mstar_jax.ablate --config=configs/tiny.py:ablation --seeds=3 # the paper's tables, in hours
    python -m mstar_jax.main --config=configs/tiny.py --config.data.labelled=/data/train.json \
        --config.data.root=/data                                           # any data, see docs/data.md

Every key is explained in configs/base.py.
"""

from ml_collections import ConfigDict

from configs import base, variants

SINGLE_TEMPERATURE = {"evolve.iterations": 8, "evolve.temperature": 0.7}  # without a reward model
OWN: dict[str, variants.Values] = {
    "continuous": SINGLE_TEMPERATURE | {"evolve.keep": 2},  # Random-2
    "random_2": SINGLE_TEMPERATURE,
    "iterative_rft": SINGLE_TEMPERATURE,
    "rest_em": SINGLE_TEMPERATURE,
    "sft": SINGLE_TEMPERATURE,
    "control": SINGLE_TEMPERATURE,
    "rloo": SINGLE_TEMPERATURE,
    "grpo": SINGLE_TEMPERATURE,
    "grpo_process": SINGLE_TEMPERATURE,
    "ablation": {  # what `ablate` runs dozens of times: fewer queries, and T = 1 for all methods
        "data.figures.train": 1280,
        "data.figures.test": 2000,
        "data.validation": 128,
        "evolve.iterations": 8,
        "evolve.steps": 40,
        "prm.held_out": 64,
        "prm.labelled": 96,
        "explore.queries": 64,
        "eval.samples": 4,
        "eval.k": 4,
    },
}


def get_config(variant: str = "mstar") -> ConfigDict:
    c = base.get_config()
    c.mesh.data = -1
    c.mesh.fsdp = 1

    policy = c.policy  # Phi-3.5-vision's architecture with 0.5M parameters
    policy.vocab_size = 512
    policy.num_crops = 1
    policy.decoder.num_layers = 3
    policy.decoder.hidden_size = 96
    policy.decoder.intermediate_size = 256
    policy.decoder.num_heads = 4
    policy.decoder.num_kv_heads = 2
    policy.decoder.rope_theta = 100.0
    policy.decoder.tie_word_embeddings = True
    policy.decoder.unroll = 3
    policy.vision.num_layers = 3
    policy.vision.hidden_size = 64
    policy.vision.intermediate_size = 128
    policy.vision.num_heads = 4
    policy.vision.image_size = 64
    policy.vision.patch_size = 8

    data = c.data
    data.validation = 256
    data.test = 512
    data.max_prompt = 448
    data.buckets = (24, 80, 120, 192, 320, 640)  # few: each is a program more, of every kind
    data.grouped = False
    data.workers = 0  # images are 64 pixels wide
    data.figures.train = 3072
    data.figures.unlabelled = 256
    data.figures.validation = 512
    data.figures.test = 512
    data.figures.captions = 4096
    data.figures.arithmetic = 2000
    data.figures.instruct = 1000

    c.prompts.cot = "{question}{choices}\nThink."
    c.prompts.direct = "{question}{choices}\nAnswer."
    c.prompts.hint = "{question}{choices}\nThe answer is {answer}. Why?"

    # The base model only has to leave something to evolve.
    c.base.steps = 900
    c.base.batch = 32
    c.base.learning_rate = 2e-3
    c.base.warmup_steps = 50
    c.base.mix.caption = 0.3
    c.base.mix.arithmetic = 0.3
    c.base.mix.cot = 0.28
    c.base.mix.hint = 0.08
    c.base.mix.direct = 0.04
    c.base.target = 0.43
    c.base.check_from = 500
    c.base.check_every = 50
    c.base.check_queries = 512

    c.warmup.queries = 512
    c.warmup.keep = 2
    c.warmup.temperature = 0.7
    c.warmup.steps = 30
    c.warmup.batch = 16
    c.warmup.learning_rate = 1e-3
    c.warmup.warmup_steps = 10
    c.warmup.final_fraction = 0.1

    c.evolve.iterations = 6
    c.evolve.steps = 64
    c.evolve.batch = 16
    c.evolve.learning_rate = 1e-3
    c.evolve.warmup_steps = 10
    c.evolve.final_fraction = 0.1

    c.prm.queries = 512
    c.prm.held_out = 48
    c.prm.labelled = 64
    c.prm.completions = 4
    c.prm.samples = 64
    c.prm.steps = 200
    c.prm.batch = 8
    c.prm.longest = 256
    c.prm.chunk = 64
    c.prm.learning_rate = 1e-3

    c.explore.queries = 80

    c.train.b2 = 0.98
    c.train.weight_decay = 0.01
    c.train.dtype = "float32"
    c.train.remat = "none"
    c.train.lora.base_dtype = "float32"
    c.train.save_every = 50

    c.sampling.batch = 64
    c.sampling.max_new_tokens = 44
    c.sampling.dtype = "float32"

    c.eval.samples = 8
    c.eval.show = 12
    return variants.apply(c, variant, OWN)
