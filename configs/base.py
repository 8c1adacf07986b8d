"""Every key of a config, once, with its meaning and unit; the values are the paper's (arXiv 2412.17451).

Where the paper gives no value, it is ours. One file for each policy overrides what differs (`phi35.py`,
`internvl2.py`, `internvl3.py`, `minicpmv25.py`, `smolvlm.py`, `smollm2.py`, `qwen_vl.py`, `qwen3_vl.py`,
`tiny.py`), `variants.py` holds the training methods, and the command line overrides both:
`--config.evolve.k=8`. A config of your own:

    from configs import base

    def get_config():
        c = base.get_config()
        c.evolve.fraction = 0.125
        return c
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """A config without a policy and data; locked, so that a misspelled key in an override is an error."""
    c = ConfigDict()
    c.seed = 0  # of sampling, of the order of queries and rows, and of new parameters

    c.reward = ""  # what judges responses: empty for the answer checker, format, or path/to/file.py:function
    c.reward_seconds = 10.0  # of wall time for a function of your own to judge one response

    c.tracker = ""  # wandb or mlflow, beside TensorBoard and CSV; empty: nothing is sent

    c.mesh = mesh = ConfigDict()  # devices along each axis; one of them may be -1 and takes what is left
    mesh.data = 1  # copies of the parameters, each with its share of a batch
    mesh.fsdp = -1  # parts that parameters, optimizer state and batches are sharded into
    mesh.tensor = 1  # parts that attention heads, MLPs and the vocabulary are sharded into

    # ---- policy: a checkpoint, or (configs/tiny.py) a small Phi-3.5-vision with random parameters ----
    c.policy = policy = ConfigDict()
    policy.path = ""  # folder or hub id of a checkpoint; empty for a policy from scratch
    policy.family = ""  # a key of `plan.official.OFFICIAL`, such as phi3_v: for `plan` and `evaluate`
    policy.max_crops = placeholder(int)  # crops, tiles or slices of an image, at most; None: the checkpoint's
    policy.vocab_size = 0  # tokens; from scratch only, like all that follows
    policy.num_crops = 0  # high-resolution crops of an image, at most
    policy.decoder = decoder = ConfigDict()
    decoder.num_layers = 0  # 0: there is no policy from scratch, and policy.path has to be given
    decoder.hidden_size = 0
    decoder.intermediate_size = 0  # of the MLPs
    decoder.num_heads = 0  # of the queries
    decoder.num_kv_heads = 0  # of keys and values
    decoder.rope_theta = 10_000.0  # base of the rotary embedding's wavelengths
    decoder.tie_word_embeddings = False  # the output layer is the embedding
    decoder.unroll = 1  # layers that are compiled as one iteration of the scan over layers
    policy.vision = vision = ConfigDict()
    vision.num_layers = 0
    vision.hidden_size = 0
    vision.intermediate_size = 0  # of the MLPs
    vision.num_heads = 0
    vision.image_size = 0  # pixels, the side of a crop
    vision.patch_size = 0  # pixels

    # ---- data ----------------------------------------------------------------------------------------
    c.data = data = ConfigDict()
    data.labelled = ""  # a file, folder or pattern (docs/data.md); empty: an embedded set, if it has a size
    data.root = ""  # folder that its image paths are relative to; empty for the folder of the file
    data.columns = ""  # its columns with unusual names, such as "question=ask,answer=label" (docs/data.md)
    data.labelled_share = 0.5  # of its queries (180K); of the rest some are measured on, others unlabelled
    data.validation_file = ""  # your own to measure on, of the same form; empty: some rows of data.labelled
    data.test_file = ""  # likewise; no query of data.labelled that shows one of their images is trained on
    data.seed = 0  # of the split by image, or of the embedded data
    data.validation = 250  # queries, measured after every iteration
    data.test = 750  # queries, measured after base, warm-up and the last iteration; embedded: figures.test
    data.max_prompt = 1536  # tokens, image included; queries with longer prompts are left out and counted
    data.buckets = (1024, 1280, 1536, 2048, 2560, 3072)  # tokens, the lengths that rows are padded to
    data.grouped = True  # a training batch has rows of one bucket: less padding, one program for each bucket
    data.workers = 8  # processes that decode images; 0 uses threads
    data.embedded = "toy"  # the embedded data set: toy, images of 64 px; or figures, 128 px and more steps
    data.figures = figures = ConfigDict()  # its sizes
    figures.train = 0  # labelled queries; 0: there is no embedded data set
    figures.unlabelled = 0  # queries
    figures.validation = 0  # queries
    figures.test = 0  # queries
    figures.captions = 0  # examples of the base stage, like the next two
    figures.arithmetic = 0  # examples
    figures.instruct = 0  # examples

    c.prompts = prompts = ConfigDict()  # templates; answers are read after "The answer is"
    prompts.cot = (  # asks for reasoning: all rollouts, and the prompt of all rows but SFT's
        "{question}{choices}\nReason step by step, one step a line. Close with a last line: The answer is ..."
    )
    prompts.direct = "{question}{choices}\nClose with a last line: The answer is ..."  # asked by SFT
    prompts.hint = (  # asked by the warm-up: shows the answer, not the reasoning
        "{question}{choices}\nThe right answer is {answer}. Show step by step, one step a line, how it "
        "follows from the image and the question. Close with a last line: The answer is {answer}"
    )

    # ---- align, base: training of a policy from scratch, or of a checkpoint that cannot see yet -------
    c.align = align = ConfigDict()  # before `base`: a checkpoint's decoder is frozen, captions teach the rest
    align.steps = 0  # optimizer steps; 0: the base stage begins with the checkpoint
    align.batch = 0  # rows of a step
    align.learning_rate = 0.0  # at its peak
    align.warmup_steps = 0  # optimizer steps of linear warm-up
    align.final_fraction = 1.0  # learning rate at the end, as a fraction of the peak
    c.base = base = ConfigDict()
    base.tune = False  # whether a checkpoint is trained here too; otherwise it is the base as it is
    base.steps = 0  # optimizer steps, at most
    base.batch = 0  # rows of a step
    base.learning_rate = 0.0  # at its peak
    base.warmup_steps = 0  # optimizer steps of linear warm-up
    base.final_fraction = 0.1  # learning rate at the end, as a fraction of the peak
    base.mix = mix = ConfigDict()  # share of the rows with each kind of example
    mix.caption = 0.0  # descriptions of images
    mix.arithmetic = 0.0  # text only
    mix.cot = 0.0  # questions with reasoning
    mix.hint = 0.0  # questions with the answer shown, and reasoning
    mix.direct = 0.0  # questions with the answer alone
    base.target = 0.0  # greedy accuracy on validation that ends the stage, in 0..1
    base.check_from = 0  # optimizer steps before that accuracy is first measured
    base.check_every = 1  # optimizer steps between two measurements
    base.check_queries = 0  # validation queries of a measurement

    # ---- warm-up: the paper says what it does, not how long; these values are ours ---------------------
    c.warmup = warmup = ConfigDict()
    warmup.data = ""  # a file of rationales (docs/data.md) to train on; empty: the base policy writes them
    warmup.root = ""  # folder that its image paths are relative to; empty for the folder of the file
    warmup.columns = ""  # as data.columns
    warmup.queries = 50_000  # labelled queries that rationales are sampled for
    warmup.k = 4  # rationales sampled per query
    warmup.keep = 1  # correct ones trained on per query, at most
    warmup.temperature = 1.0  # of sampling
    warmup.steps = 700  # optimizer steps, about one pass over what is kept
    warmup.batch = 64  # rows (queries with up to `keep` rationales) of a step
    warmup.learning_rate = 1e-6  # at its peak
    warmup.warmup_steps = 20  # optimizer steps of linear learning rate warm-up
    warmup.final_fraction = 1.0  # learning rate at the end, as a fraction of the peak; 1 keeps it constant

    # ---- evolve: the iterations of self-evolving training --------------------------------------------
    c.evolve = evolve = ConfigDict()
    evolve.iterations = 16  # with 625 optimizer steps each, 10K in all
    evolve.fraction = 0.25  # of the labelled queries, in each iteration; the best interval of Table 1
    evolve.k = 16  # responses sampled per query
    evolve.curriculum = "uniform"  # which queries: uniform, or informative (by their last pass rates)
    evolve.informative = (0.0, 1.0)  # pass rates of informative queries, bounds included, but never 0 or 1
    evolve.remeasure = 0.1  # informative: share of an iteration for new queries, and as much for settled ones
    evolve.select = "prm"  # which correct responses are kept: prm, random, likelihood, frequency or oracle
    evolve.keep = 2  # responses kept per query, at most; 0 keeps all
    evolve.threshold = placeholder(float)  # reward (or likelihood) that kept responses exceed; None: no limit
    evolve.distinct = False  # keep only one of several responses with the same text
    evolve.temperature = 1.0  # of sampling, until exploration chooses another one
    evolve.steps = 625  # optimizer steps of an iteration
    evolve.batch = 64  # rows (queries with up to `keep` responses) of a step: 128 responses
    evolve.learning_rate = 1e-6  # at its peak
    evolve.warmup_steps = 0  # optimizer steps of linear learning rate warm-up
    evolve.final_fraction = 1.0  # learning rate at the end, over the peak's; the paper's is constant
    evolve.objective = "sft"  # imitates what is selected; reinforce, grpo: all responses, by their advantage
    evolve.process_weight = 0.0  # of the steps' rewards beside the outcome's (reinforce, grpo); 0: no R_p
    evolve.truncate = 2.0  # importance weights of tokens, at most (reinforce, grpo); 0: no such weights
    evolve.clip_low = 0.2  # grpo: below 1 - clip_low a token's ratio p / p_old has no effect
    evolve.clip_high = 0.28  # grpo: nor above 1 + clip_high (DAPO's bounds; GRPO's are 0.2 and 0.2)
    evolve.token_mean = True  # reinforce, grpo: tokens of a batch weigh the same; False: its responses do
    evolve.kl = 0.0  # reinforce, grpo: weight of the KL divergence from the warm-up; 0: none
    evolve.kl_queries = 250  # of an iteration, that this divergence is measured on where it has no weight
    evolve.data = "rollouts"  # what is trained on: rollouts, answers (SFT) or warmup (its rationales again)
    evolve.start = "last"  # whose parameters are trained: the last policy's or the "warmup"'s (ReST^EM)
    evolve.reset_moments = False  # new Adam moments in every iteration (Iterative RFT, ReST^EM)
    evolve.reset_schedule = False  # the learning rate schedule starts again in every iteration (as above)
    evolve.keep_checkpoints = 2  # iterations whose checkpoints are kept, at least 2
    evolve.unlabelled = unlabelled = ConfigDict()  # the other half of the data, which M-STaR leaves out
    unlabelled.mixin = placeholder(float)  # fraction of the iterations before it is used; None: never
    unlabelled.threshold = 0.3  # share of a query's votes that its voted answer needs
    unlabelled.oracle = False  # use the true answers instead of votes: an upper bound
    unlabelled.weight = 1.0  # how often each of these rows is drawn, relative to a labelled one

    # ---- prm: the process reward model, trained from the warm-up policy on Monte-Carlo step labels ---
    c.prm = prm = ConfigDict()
    prm.path = ""  # a trained one of any family, as `export --stage=prm` writes it; empty: train one
    prm.head = ""  # the tensor of `prm.path` that is its head, where several might be
    prm.token = ""  # `prm.path` has no head: a step's score is the probability of this token after it
    prm.against = ""  # among these two tokens; empty: in the whole vocabulary
    prm.mark = ""  # text after each step, at whose end `prm.path` scores it; control tokens count
    prm.between = "\n"  # text after a mark and before the next step
    prm.open = False  # steps continue the user's turn, as in a conversation of a step a turn
    prm.prompt = ""  # template that `prm.path` is asked with; empty: the prompt that the policy answered
    prm.data = ""  # a file of responses with labelled steps (docs/data.md); empty: the run labels its own
    prm.root = ""  # folder that its image paths are relative to; empty for the folder of the file
    prm.columns = ""  # as data.columns
    prm.queries = 50_000  # labelled queries to train on; 0: no reward model (unless prm.path, prm.data)
    prm.held_out = 500  # labelled queries that its quality is measured on
    prm.k = 16  # responses sampled per query
    prm.temperature = 1.0  # of sampling responses and completions
    prm.labelled = 50_000  # of `queries`, those whose steps are labelled
    prm.completions = 16  # sampled from every step for its label
    prm.hard = False  # label 1 if any completion is correct, instead of the fraction that is
    prm.samples = 32  # completions in a row, a multiple of `completions` (Phi-3.5, all at once: 6.4 GB)
    prm.rows = 16  # rows of completions sampled together
    prm.mc_weight = 0.2  # of the loss on step labels; that of the correct responses' likelihood is 1
    prm.steps = 3000  # optimizer steps, about one pass
    prm.batch = 64  # rows of a step
    prm.score_batch = 0  # rows that are scored together; 0: those of a step
    prm.longest = 3072  # tokens of a training row, at most; longer ones are split by responses
    prm.chunk = 2048  # queries in a file of scores: what is scored again after a kill; less is more padding
    prm.learning_rate = 1e-6  # at its peak
    prm.warmup_steps = 20  # optimizer steps of linear learning rate warm-up
    prm.final_fraction = 0.1  # learning rate at the end, as a fraction of the peak
    prm.aggregate = "min"  # reward of a response from the scores of its steps: min, last, product or mean

    # ---- explore: adaptive exploration, the temperature by Reward-Pass@2 on validation ---------------
    c.explore = explore = ConfigDict()
    explore.every = 2  # iterations between two explorations; 0: none
    explore.adapt = True  # sample at the best temperature from then on; False only measures
    explore.criterion = "reward_pass_at_2"  # to be maximised; or balance_score
    explore.alpha = 0.25  # reward above which the balance score counts a response as selected
    explore.temperatures = tuple(t / 10 for t in range(3, 17))  # 0.3, 0.4, ..., 1.6
    explore.samples = 4  # responses per query and temperature
    explore.queries = 250  # validation queries
    explore.batch = 16  # queries sampled together, at all temperatures (Phi-3.5, all at once: 12 GB each)

    # ---- train: what all stages share ----------------------------------------------------------------
    c.train = train = ConfigDict()
    train.b1 = 0.9  # decay rate of Adam's first moment
    train.b2 = 0.95  # decay rate of Adam's second moment
    train.weight_decay = 0.0  # decoupled, relative to the learning rate
    train.clip = 1.0  # global norm of the gradients, at most; 0: no limit
    train.accumulate = 1  # microbatches of a step
    train.dtype = "bfloat16"  # of the computation; trained parameters and optimizer state are float32
    train.remat = "full"  # recomputed: full (all), attention (all but it), dots (nor matrix products), none
    train.offload_optimizer = False  # Adam's moments are in the host's memory except while a policy trains
    train.frozen = ()  # regular expressions of parameter names, e.g. ("^tower",) for the vision tower
    train.lora = lora = ConfigDict()  # adapters of the decoder's projections; nothing else is trained then
    lora.rank = 0  # 0 trains all parameters; LoRA needs learning rates of 1e-5 to 1e-4
    lora.alpha = 32.0  # adapters are scaled by alpha / rank
    lora.base_dtype = "bfloat16"  # of frozen parameters, with LoRA; or float32
    train.log_every = 10  # optimizer steps between two rows of the curves
    train.save_every = 125  # optimizer steps between two checkpoints, at most
    train.profile = ()  # (10, 13) traces steps 10 to 12 of every stage into <workdir>/profile/<stage>

    # ---- sampling ------------------------------------------------------------------------------------
    c.sampling = sampling = ConfigDict()
    sampling.batch = 16  # queries decoded together, each with k branches; a multiple of data x fsdp
    sampling.places = 0  # branches of a query decoded at a time; another starts where one ends; 0: all
    sampling.refill = 0.25  # fraction of the batch that has to be finished before new queries replace it
    sampling.shard = 4  # batches in a file of rollouts: what is sampled again after a kill
    sampling.cache = ""  # dtype of keys and values; empty: that of the weights; int8 for twice the batch
    sampling.max_new_tokens = 512  # of a response
    sampling.top_k = 0  # tokens sampled from; 0: all
    sampling.top_p = 1.0  # probability mass sampled from; 1: all
    sampling.min_p = 0.0  # least probability relative to the likeliest token's; 0: any
    sampling.stop_strings = ()  # texts that end a response, besides the stop tokens
    sampling.dtype = "bfloat16"  # of weights and computation

    # ---- measurements --------------------------------------------------------------------------------
    c.eval = eval_ = ConfigDict()
    eval_.samples = 16  # responses per query, besides the greedy one
    eval_.k = 8  # of Pass@k, at most `samples`
    eval_.temperature = 1.0  # of these responses
    eval_.every = 1  # iterations between two measurements
    eval_.test_at = ("base", "warmup")  # stages measured on the test split, besides the last iteration
    eval_.show = 50  # queries in the tables of samples

    c.benchmarks = benchmarks = ConfigDict()  # of base, warm-up and final policy, and of `evaluate`
    benchmarks.names = ()  # the paper's: ("mathvista", "m3cot", "mmstar_r", "mmbench_r", "ai2d")
    benchmarks.root = ""  # folder of their official files
    benchmarks.prompt = "cot"  # a key of `prompts`, or official: each benchmark's own
    benchmarks.limit = 0  # questions of each, with all their rotations; 0: all
    benchmarks.samples = 0  # responses per question that vote, besides the greedy one
    benchmarks.temperature = 1.0  # of the responses that vote
    benchmarks.paper = ""  # policy whose results in the paper are printed next to ours
    return c.lock()
