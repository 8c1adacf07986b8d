"""The whole of self-evolving training on a CPU, in minutes, on the embedded data set.

    python -m mstar_jax.main --config=configs/tiny.py                      # M-STaR
    python -m mstar_jax.main --config=configs/tiny.py:continuous           # Random-2, no reward model
    python -m mstar_jax.main --config=configs/tiny.py:iterative_rft        # or :rest_em, :sft
    python -m mstar_jax.main --config=configs/tiny.py:control              # as many steps, no new rollouts
    python -m mstar_jax.main --config=configs/tiny.py:smoke                # minutes, to see that it runs
    python -m mstar_jax.ablate --config=configs/tiny.py:ablation --seeds=3 # the paper's tables, for hours
    python -m mstar_jax.main --config=configs/tiny.py --config.data.labelled=/data/train.json \
        --config.data.root=/data                                           # any file in MathV360K's format
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(variant: str = "mstar") -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # devices per axis; -1 takes what is left

    c.data = data = ConfigDict()
    data.labelled = ""  # a MathV360K file; empty for the embedded data set
    data.root = ""  # what its image paths are relative to; empty for the file's folder
    data.seed = 0  # of the embedded data set, or of the split by image
    data.validation = 256  # queries, measured after every stage
    data.test = 512  # queries, measured at the ends of the run
    data.max_prompt = 448  # tokens, image included; longer prompts are left out and counted
    data.buckets = (24, 64, 80, 96, 120, 192, 256, 320, 512, 640)  # row lengths, tokens
    data.grouped = False  # batches to train on hold rows of one bucket: more to compile, less padding
    data.workers = 0  # processes that decode images; 0 for threads: these images are 64 pixels wide
    data.figures = ConfigDict(
        {"train": 3072, "unlabelled": 256, "validation": 512, "test": 512}  # queries
        | {"captions": 4096, "arithmetic": 2000, "instruct": 1000}  # the narrow set for the base model
    )

    c.policy = policy = ConfigDict()
    policy.path = ""  # a checkpoint's folder or hub id; empty for a policy from scratch:
    # Phi-3.5-vision's architecture, shrunk to 0.5 M parameters
    policy.vocab_size = 512
    policy.num_crops = 1
    policy.decoder = ConfigDict(
        {"hidden_size": 96, "intermediate_size": 256, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
        | {"rope_theta": 100.0, "tie_word_embeddings": True, "unroll": 3}
    )
    policy.vision = ConfigDict(
        {"hidden_size": 64, "intermediate_size": 128, "num_layers": 3, "num_heads": 4}
        | {"image_size": 64, "patch_size": 8}
    )

    c.prompts = ConfigDict(
        {
            "cot": "{question}{choices}\nThink.",
            "direct": "{question}{choices}\nAnswer.",
            "hint": "{question}{choices}\nThe answer is {answer}. Why?",
        }
    )

    # The base model only has to leave something to evolve: trained until it reaches `target`
    c.base = base = ConfigDict()
    base.steps = 900  # at most
    base.batch = 32  # rows
    base.learning_rate = 2e-3
    base.warmup_steps = 50
    base.final_fraction = 0.1
    base.mix = ConfigDict({"caption": 0.3, "arithmetic": 0.3, "cot": 0.28, "hint": 0.08, "direct": 0.04})
    base.target = 0.43  # greedy accuracy on validation that ends it
    base.check_from, base.check_every, base.check_queries = 500, 50, 512

    c.warmup = warmup = ConfigDict()
    warmup.queries, warmup.k, warmup.keep = 512, 4, 2
    warmup.temperature = 0.7
    warmup.steps = 30
    warmup.batch = 16  # rows of up to `keep` responses
    warmup.learning_rate = 1e-3
    warmup.warmup_steps = 10
    warmup.final_fraction = 0.1

    c.evolve = evolve = ConfigDict()
    evolve.iterations = 6
    evolve.fraction = 0.25  # of the labelled queries, an iteration
    evolve.k = 16  # responses per query
    evolve.select = "prm"  # of the correct responses; or random, likelihood, frequency, oracle
    evolve.keep = 2  # Top-k; 0 for all
    evolve.threshold = placeholder(float)  # only rewards above it
    evolve.distinct = False  # train only on responses with different text
    evolve.temperature = 1.0  # of sampling, until `explore` chooses another one
    evolve.steps = 64  # an iteration
    evolve.batch = 16  # rows of up to `keep` responses
    evolve.learning_rate = 1e-3
    evolve.warmup_steps = 10
    evolve.final_fraction = 0.1
    evolve.data = "rollouts"  # or "answers" (SFT), "warmup" (control)
    evolve.start = "last"  # every iteration trains from pi_t; "initial": from the warm-up
    evolve.reset_moments = False  # Adam's moments begin again at every iteration
    evolve.reset_schedule = False  # so does the learning rate's schedule
    evolve.keep_checkpoints = 2  # iterations
    evolve.unlabelled = unlabelled = ConfigDict()
    unlabelled.mixin = placeholder(float)  # share of the training after which they join: 0, 0.25, ...
    unlabelled.threshold = 0.3  # least share of a query's weight that its voted answer needs
    unlabelled.oracle = False  # their true answers instead of votes: a bound
    unlabelled.weight = 1.0  # of their rows, beside the labelled ones' 1

    c.prm = prm = ConfigDict()  # the process reward model, trained from the warm-up policy
    prm.path = ""  # one that is there already, of any family, instead
    prm.queries, prm.held_out = 512, 48  # labelled queries to train on, and to report on; 0 for no model
    prm.k, prm.temperature = 16, 1.0  # responses per query
    prm.labelled = 64  # of the queries to train on: those whose steps get labels, which cost the most
    prm.completions = 4  # of every step
    prm.hard = False  # a step's label is 1 where any completion was right, instead of their share
    prm.samples, prm.rows = 64, 16  # completions of a row, rows sampled together
    prm.mc_weight = 0.2  # of the step labels, beside 1 for the likelihood of the correct responses
    prm.steps, prm.batch, prm.longest = 200, 8, 256  # rows of a step, tokens of a row
    prm.chunk = 64  # queries in a shard of scores
    prm.learning_rate, prm.warmup_steps, prm.final_fraction = 1e-3, 20, 0.1
    prm.aggregate = "min"  # a response's reward from its steps' scores; or last, product, mean

    c.explore = explore = ConfigDict()
    explore.every = 2  # iterations; 0 measures no other temperatures
    explore.adapt = True  # sample at the best of them
    explore.criterion = "reward_pass_at_2"  # or balance_score
    explore.alpha = 0.25  # the balance score's: rewards above it count as selected
    explore.temperatures = tuple(t / 10 for t in range(3, 17))
    explore.samples, explore.queries, explore.batch = 4, 80, 16  # per query and temperature; at a time

    c.train = ConfigDict(
        {"b1": 0.9, "b2": 0.98, "weight_decay": 0.01, "clip": 1.0, "accumulate": 1}
        | {"dtype": "float32", "remat": "none", "frozen": ()}  # frozen: regular expressions of names
        | {"log_every": 10, "save_every": 50}  # steps
        | {"profile": ()}  # (10, 13) traces these steps of every stage into <workdir>/profile/<stage>
    )
    # LoRA from the warm-up on, the reward model too: adapters of this rank beside the decoder's projections,
    # scaled by alpha / rank, and nothing else is trained; 0 trains everything. base_dtype: of what is frozen
    c.train.lora = ConfigDict({"rank": 0, "alpha": 32.0, "base_dtype": "float32"})
    c.sampling = ConfigDict(
        {"batch": 64, "refill": 0.25, "shard": 4, "max_new_tokens": 44, "stop_strings": ()}
        | {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "dtype": "float32", "cache": ""}
    )
    c.eval = ConfigDict(
        {"samples": 8, "k": 8, "temperature": 1.0, "every": 1, "test_at": ("base", "warmup"), "show": 12}
    )

    # What base, warm-up and final policy are measured on at the end of the run, and `evaluate` asks
    c.benchmarks = ConfigDict({"names": (), "root": "", "prompt": "cot"})  # a key of prompts, or "official"
    c.benchmarks.limit = 0  # questions of each, with their rotations; 0 asks all
    c.benchmarks.update({"samples": 0, "temperature": 1.0})  # per question, beside the greedy response: votes
    c.benchmarks.paper = ""  # whose numbers of the paper's table stand beside

    if variant not in ("mstar", "ablation", "smoke"):  # no reward model: by lot, at one temperature
        evolve.select, evolve.temperature, prm.queries, explore.every = "random", 0.7, 0, 0
        evolve.iterations = 8
    if variant in ("iterative_rft", "rest_em"):  # all queries an iteration, everything reset
        evolve.reset_moments = evolve.reset_schedule = True
        evolve.fraction = 1.0
        evolve.iterations, evolve.steps = 2, 256
        evolve.start = "initial" if variant == "rest_em" else "last"
    elif variant == "sft":  # the labelled answers themselves
        evolve.data = "answers"
    elif variant == "control":
        evolve.data = "warmup"
    elif variant == "ablation":  # what `ablate` runs dozens of times: fewer queries, all at T = 1
        data.figures.update({"train": 1280, "test": 2000})
        evolve.iterations, evolve.steps, data.validation, c.eval.samples, c.eval.k = 8, 40, 128, 4, 4
        prm.labelled, prm.held_out, explore.queries = 96, 64, 64
    elif variant == "smoke":
        data.figures.update({"train": 128, "unlabelled": 8, "validation": 64, "test": 64})
        data.figures.update({"captions": 128, "arithmetic": 100, "instruct": 64})
        data.validation, base.check_queries, base.steps, base.check_from = 32, 32, 60, 50
        base.target, base.learning_rate = 0.0, 3e-3
        warmup.queries, warmup.steps, warmup.warmup_steps = 64, 6, 2
        evolve.iterations, evolve.steps, evolve.warmup_steps, evolve.k = 2, 6, 2, 4
        prm.queries, prm.held_out, prm.k, prm.completions, prm.steps, prm.warmup_steps = 24, 8, 4, 2, 6, 2
        prm.labelled = 12
        prm.samples, explore.samples, explore.queries, explore.temperatures = 16, 2, 16, (0.5, 1.0)
        c.eval.samples, c.eval.k, c.train.save_every = 4, 4, 5
    elif variant not in ("mstar", "continuous"):
        known = "mstar, continuous, iterative_rft, rest_em, sft, control, ablation, smoke"
        raise ValueError(f"unknown variant {variant!r}: {known}")
    return c
