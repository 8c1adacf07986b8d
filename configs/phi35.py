"""M-STaR from Phi-3.5-vision, with the paper's values (arXiv 2412.17451) where it gives them.

    python -m mstar_jax.main --config=configs/phi35.py \
        --config.policy.path=/checkpoints/Phi-3.5-vision-instruct \
        --config.data.labelled=/data/mathv360k.json --config.data.root=/data/images
    python -m mstar_jax.export --workdir=runs/phi35 --output=/checkpoints/phi35-mstar

The other two policies differ in a few values only: configs/internvl2.py, configs/minicpmv25.py.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})  # devices per axis; -1 takes what is left

    c.policy = policy = ConfigDict()
    policy.path = ""  # the official checkpoint's folder, or its hub id; has to be given
    policy.family = "phi3_v"  # what `plan` takes without a path; else the checkpoint's own
    policy.max_crops = 4  # most high-resolution crops of an image, beside its global view (official: 4)

    c.data = data = ConfigDict()
    data.labelled = ""  # a file in MathV360K's format; has to be given
    data.root = ""  # what its image paths are relative to; empty for the file's folder
    data.seed = 0  # of the split by image: half of the queries is labelled (180K), as in the paper
    data.validation = 250  # queries, measured after every iteration
    data.test = 750  # queries, measured at the ends of the run
    data.max_prompt = 1536  # tokens, image included (at most 781); longer prompts are left out and counted
    data.buckets = (1024, 1280, 1536, 2048, 2560, 3072)  # row lengths, tokens; few, since each is compiled
    data.grouped = True  # batches to train on hold rows of one bucket: less padding, one program a bucket
    data.workers = 8  # processes that decode images

    # What the policy is asked. Answers are read behind "The answer is".
    c.prompts = ConfigDict()
    c.prompts.cot = (
        "{question}{choices}\nReason step by step, one step a line. Close with a last line: The answer is ..."
    )
    c.prompts.direct = "{question}{choices}\nClose with a last line: The answer is ..."  # SFT asks this
    c.prompts.hint = (  # the warm-up asks this: the answer is shown, the reasoning is not
        "{question}{choices}\nThe right answer is {answer}. Show step by step, one step a line, how it "
        "follows from the image and the question. Close with a last line: The answer is {answer}"
    )

    # Warm-up: the paper says what it does, not how long; these values are ours
    c.warmup = warmup = ConfigDict()
    warmup.queries, warmup.k, warmup.keep = 50_000, 4, 1  # rationales sampled, correct ones kept, per query
    warmup.temperature = 1.0
    warmup.steps = 700  # about one pass over what is kept
    warmup.batch = 64  # rows: queries, each with its `keep` rationales
    warmup.learning_rate = 1e-6
    warmup.warmup_steps = 20
    warmup.final_fraction = 1.0  # of the peak rate at the end; 1 keeps it constant

    c.evolve = evolve = ConfigDict()
    evolve.iterations = 16  # with 625 steps each: 10K steps in all
    evolve.fraction = 0.25  # of the labelled queries, an iteration: Continuous Self-Evolving's best interval
    evolve.k = 16  # responses per query
    evolve.select = "prm"  # of the correct responses, by the reward model; or random, likelihood, frequency
    evolve.keep = 2  # Top-2; 0 keeps all
    evolve.threshold = placeholder(float)  # alpha: only rewards above it
    evolve.distinct = False  # train only on responses with different text
    evolve.temperature = 1.0  # until `explore` chooses another one
    evolve.steps = 625  # an iteration
    evolve.batch = 64  # rows: queries, each with up to 2 responses, so 128 responses
    evolve.learning_rate = 1e-6
    evolve.warmup_steps = 0
    evolve.final_fraction = 1.0  # the paper's rate is constant
    evolve.data = "rollouts"  # or "answers" (SFT), "warmup" (control)
    evolve.start = "last"  # every iteration trains from pi_t; "initial" (ReST^EM): from the warm-up
    evolve.reset_moments = False  # True (Iterative RFT, ReST^EM): Adam's moments begin again
    evolve.reset_schedule = False  # True (as above): the learning rate's schedule begins again
    evolve.keep_checkpoints = 2  # iterations
    evolve.unlabelled = unlabelled = ConfigDict()  # the other half of the data; M-STaR leaves it out
    unlabelled.mixin = placeholder(float)  # share of the training after which it joins: 0, 0.25, 0.5, 0.75
    unlabelled.threshold = 0.3  # least share of a query's weight that its voted answer needs
    unlabelled.oracle = False  # its true answers instead of votes: a bound
    unlabelled.weight = 1.0  # of its rows, beside the labelled ones' 1

    # The process reward model, trained from the warm-up policy on Monte-Carlo labels of its steps
    c.prm = prm = ConfigDict()
    prm.path = ""  # a trained one of any family instead: a folder that `export --stage=prm` wrote
    prm.queries, prm.held_out = 50_000, 500  # labelled queries to train on, and to report on
    prm.k, prm.temperature = 16, 1.0  # responses per query
    prm.labelled = 50_000  # of the queries to train on: those whose steps get labels
    prm.completions = 16  # of every step
    prm.hard = False  # a step's label is 1 where any completion was right, instead of their share
    prm.samples, prm.rows = 32, 16  # completions that one row holds (6.4 GB of cache); rows sampled together
    prm.mc_weight = 0.2  # of the step labels, beside 1 for the likelihood of the correct responses
    prm.steps, prm.batch, prm.longest = 3000, 64, 3072  # about one pass; rows of a step, tokens of a row
    prm.chunk = 256  # queries of a shard of scores
    prm.learning_rate, prm.warmup_steps, prm.final_fraction = 1e-6, 20, 0.1
    prm.aggregate = "min"  # R_p of a response from its steps' scores; or last, product, mean

    # Adaptive exploration: the temperature with the best Reward-Pass@2 on validation
    c.explore = explore = ConfigDict()
    explore.every = 2  # iterations
    explore.adapt = True  # False: measure, and keep evolve.temperature
    explore.criterion = "reward_pass_at_2"  # or balance_score
    explore.alpha = 0.25  # the balance score's: rewards above it count as selected
    explore.temperatures = tuple(t / 10 for t in range(3, 17))
    # per query and temperature; at a time: a query's 57 responses take up to 12 GB of cache
    explore.samples, explore.queries, explore.batch = 4, 250, 16

    c.train = train = ConfigDict()
    train.b1, train.b2, train.weight_decay, train.clip = 0.9, 0.95, 0.0, 1.0  # AdamW; global norm
    train.accumulate = 1  # microbatches of a step
    train.dtype = "bfloat16"  # of the computation; parameters and optimizer state are float32
    train.remat = "full"  # recompute every block in the backward pass; "dots" keeps the matrix products
    train.frozen = ()  # regular expressions of parameter names; ("^tower",) freezes the vision tower
    # LoRA, for the reward model too: adapters of this rank beside the decoder's projections, scaled by
    # alpha / rank, and nothing else is trained; 0 trains everything. base_dtype: of what is frozen (the
    # released weights are bfloat16). The learning rates here are full training's: LoRA wants 1e-5 to 1e-4
    train.lora = ConfigDict({"rank": 0, "alpha": 32.0, "base_dtype": "bfloat16"})
    train.log_every, train.save_every = 10, 125  # steps
    train.profile = ()  # (10, 13) traces these steps of every stage into <workdir>/profile/<stage>

    c.sampling = sampling = ConfigDict()
    # queries decoded together, each with its k branches: a multiple of data x fsdp. A query's cache takes up
    # to 3.6 GB (393 KB a token: 16 x 512 in the branches, 1024 in the prefix): begin with one a device
    sampling.batch = 16
    sampling.refill = 0.25  # share of them: when so many have ended, others that wait take their place
    sampling.shard = 4  # batches in a file of rollouts: what is sampled again when the run is killed
    sampling.cache = ""  # dtype of keys and values: that of the weights, or "int8" for twice the batch
    sampling.max_new_tokens = 512
    sampling.top_k, sampling.top_p, sampling.min_p = 0, 1.0, 0.0  # off: the policy itself is sampled
    sampling.stop_strings = ()
    sampling.dtype = "bfloat16"

    c.eval = ConfigDict()
    c.eval.samples, c.eval.k, c.eval.temperature = 16, 8, 1.0  # for Pass@k; greedy comes beside them
    c.eval.every = 1  # iterations
    c.eval.test_at = ("base", "warmup")  # stages that are measured on the test split, beside the last
    c.eval.show = 50  # queries in the tables of samples

    # What base, warm-up and final policy are measured on at the end of the run, and `evaluate` asks
    c.benchmarks = benchmarks = ConfigDict()
    benchmarks.names = ()  # ("mathvista", "m3cot", "mmstar_r", "mmbench_r", "ai2d") are the paper's
    benchmarks.root = ""  # folder of their official files
    benchmarks.prompt = "cot"  # which of `prompts` is asked; "official": each benchmark's own
    benchmarks.limit = 0  # questions of each, with their rotations; 0 asks all
    benchmarks.samples, benchmarks.temperature = 0, 1.0  # per question, beside the greedy response: votes
    benchmarks.paper = "Phi-3.5-vision"  # whose numbers of the paper's table stand beside
    return c
