"""The configs: one base with every key, policies that override it, and methods that fit all of them."""

import ast
import importlib
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tokenize

import pytest

from configs import base, internvl3, phi35, tiny, variants
from mstar_jax import configure, ranges, sharding
from mstar_jax.evaluate import evaluation
from mstar_jax.evolve import unlabelled_join
from mstar_jax.plan import official

ROOT = pathlib.Path(__file__).resolve().parents[1]
POLICIES = (
    "tiny",
    "phi35",
    "internvl2",
    "internvl3",
    "minicpmv25",
    "smolvlm",
    "qwen_vl",
    "qwen3_vl",
    "smollm2",
)


def get(policy, variant="mstar"):
    """A config with what has to be given."""
    config = importlib.import_module(f"configs.{policy}").get_config(variant)
    if policy != "tiny":
        config.policy.path = "/checkpoint"
        config.data.labelled = "/data.json"
    return config


def flat(config):
    """The values by dotted key."""
    found = {}
    for key, value in config.items():
        inner = flat(value) if hasattr(value, "items") else None
        found |= {key: value} if inner is None else {f"{key}.{name}": x for name, x in inner.items()}
    return found


def test_base_sets_every_key_once_on_a_line_with_a_comment():
    """But for the groups, which may have one too."""
    path = ROOT / "configs" / "base.py"
    with tokenize.open(path) as file:
        commented = {
            token.start[0]
            for token in tokenize.generate_tokens(file.readline)
            if token.type == tokenize.COMMENT
        }
    lines = path.read_text().splitlines()
    names, groups = {}, {"c": ""}
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Assign):
            continue
        key = next((t for t in node.targets if isinstance(t, ast.Attribute)), None)
        if key is None:
            continue
        name = groups[key.value.id] + key.attr
        local = next((t.id for t in node.targets if isinstance(t, ast.Name)), None)
        if local:
            groups[local] = f"{name}."
        else:
            assert name not in names, f"{name} is set twice"
            names[name] = node.lineno
    assert names.keys() == flat(base.get_config()).keys()
    plain = {"policy.decoder.hidden_size", "policy.vision.hidden_size", "policy.vision.num_layers"}
    plain |= {"policy.vision.num_heads"}  # say it themselves
    missing = {name for name, line in names.items() if line not in commented} - plain
    assert not missing, missing
    assert len({*names.values()}) == len(names) and max(map(len, lines)) <= 110


def test_a_misspelled_key_is_an_error():
    config = base.get_config()
    with pytest.raises(AttributeError, match="iteration"):
        config.evolve.iteration = 3


@pytest.mark.parametrize("policy", POLICIES)
def test_all_configs_have_the_same_keys(policy):
    for variant in variants.VARIANTS:
        assert flat(get(policy, variant)).keys() == flat(base.get_config()).keys()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_every_method_fits_every_policy(policy, variant):
    config = get(policy, variant)
    configure.check(config, sharding.make_mesh())
    json.loads(config.to_json_best_effort())


@pytest.mark.parametrize("size", internvl3.SIZES)
def test_sizes_of_internvl(size):
    """What the config says of a token's cache is what the released dimensions say."""
    config = get("internvl3", f"{size},rest_em")
    configure.check(config, sharding.make_mesh())
    assert config.evolve.start == "warmup" and get("internvl3", size).evolve.start == "last"
    decoder = official.OFFICIAL[config.policy.family].decoder
    token = 2 * 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim
    assert round(token / 1e3) == internvl3.SIZES[size]
    assert config.sampling.batch * 12_288 * token < 46e9


def test_other_sizes_of_internvl_are_refused():
    for options in ("InternVL4-8B", "InternVL3-2B,InternVL3-8B", "rest_em,sft", "InternVL3-2B,nonsense", ""):
        with pytest.raises(
            ValueError, match=f"{options}: choose at most one size of InternVL2_5-1B, .* method"
        ):
            get("internvl3", options)


@pytest.mark.parametrize("variant", ["mstar", "continuous", "cpu", "smoke"])
def test_smollm2_on_its_own_data(variant):
    config = get("smollm2", variant)
    config.data.labelled = ""
    configure.check(config, sharding.make_mesh())
    assert config.data.embedded == "figures" and configure.trains_base(config)
    config.align.learning_rate, config.base.check_every = -1.0, 0
    with pytest.raises(ValueError, match=r"base\.check_every = 0.*align\.learning_rate = -1"):
        configure.check(config, sharding.make_mesh())


@pytest.mark.parametrize("policy", POLICIES)
def test_methods_are_the_papers(policy):
    """Iterative RFT and ReST^EM sample for all queries, keep all correct responses and reset the optimizer;
    all methods see as many queries and take as many steps in all."""
    continuous = get(policy, "continuous").evolve
    passes = continuous.iterations * continuous.fraction
    for variant in ("iterative_rft", "rest_em"):
        config = get(policy, variant)
        e = config.evolve
        assert (e.fraction, e.keep, e.select, e.data) == (1.0, 0, "random", "rollouts")
        assert e.reset_moments and e.reset_schedule and config.prm.queries == config.explore.every == 0
        assert e.start == ("warmup" if variant == "rest_em" else "last")
        assert e.iterations == passes and e.iterations * e.steps == continuous.iterations * continuous.steps
    e = get(policy, "mstar").evolve
    assert (e.select, e.keep, e.fraction, e.start) == ("prm", 2, 0.25, "last")
    assert not e.reset_moments and not e.reset_schedule


def test_unknown_variant():
    with pytest.raises(ValueError, match="unknown variant 'contnuous': choose one of mstar, continuous, .*"):
        phi35.get_config("contnuous")
    with pytest.raises(ValueError, match="unknown variant 'x': .*, ablation"):
        tiny.get_config("x")


def test_a_fraction_that_does_not_divide_the_passes():
    config = tiny.get_config()  # 6 iterations with a quarter of the queries
    with pytest.raises(ValueError, match="evolve.fraction = 1.0: .* = 6 x 0.25 = 1.5 passes"):
        variants.resolve(config, {"evolve.fraction": 1.0})
    assert variants.resolve(config, {"evolve.fraction": 0.5}) == {
        "evolve.fraction": 0.5,
        "evolve.iterations": 3,
        "evolve.steps": 128,
    }


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("evolve.data", "rollout", r"evolve.data = 'rollout': choose one of 'rollouts', 'answers', 'warmup'"),
        ("evolve.objective", "ppo", "evolve.objective = 'ppo': choose one of 'sft', 'reinforce', 'grpo'"),
        ("train.remat", "some", "train.remat = 'some': choose one of 'none', 'full', 'attention', 'dots'"),
        (
            "prm.queries",
            0,
            "evolve.select = 'prm': needs a reward model, so set prm.queries, prm.data or prm.path",
        ),
        ("evolve.keep_checkpoints", 1, "evolve.keep_checkpoints = 1: must be at least 2"),
        (
            "evolve.curriculum",
            "hardest",
            "evolve.curriculum = .hardest.: choose one of .uniform., .informative.",
        ),
        ("evolve.informative", (0.5, 0.2), r"evolve.informative = \(0.5, 0.2\): give two pass rates in 0..1"),
        ("evolve.remeasure", 0.6, "evolve.remeasure = 0.6: must be at least 0 and at most 0.5"),
        ("reward", "exact", "reward = .exact.: choose .format., leave it empty for the answer checker"),
        ("reward", "/none.py:grade", "reward = ./none.py:grade.: there is no file /none.py to load"),
        ("reward_seconds", 0.0, "reward_seconds = 0.0: must be above 0"),
        ("reward_seconds", 1e9, "reward_seconds = 1000000000.0: must be above 0 and at most 1000000"),
        ("prm.samples", 17, "prm.samples = 17: must be a multiple of prm.completions = 2"),
        ("train.profile", (5, 5), r"train.profile = \(5, 5\): give \(first step, end\)"),
        ("benchmarks.names", ("ai3d",), "benchmarks.names = 'ai3d': choose one of "),
        ("sampling.refill", 0.0, "sampling.refill = 0.0: must be a fraction of the batch"),
        ("policy.decoder.num_layers", 0, "policy.path is not set: give a checkpoint's folder"),
        ("data.figures.train", 0, "data.labelled is not set: give a file of questions"),
        ("prompts.cot", "{problem}", "unknown field {problem}"),
    ],
)
def test_impossible_values_are_refused(key, value, text):
    config = tiny.get_config("smoke")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=text):
        configure.check(config, sharding.make_mesh())
        ranges.refuse(evaluation.problems(config))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"path": ""}, r"prm.token = '\+': is said of a reward model in a folder, so set prm.path"),
        ({"head": "v.weight"}, r"prm.token = '\+': a token or prm.head scores, so one of them must be empty"),
        ({"token": ""}, "prm.against = '-': needs prm.token"),
        (
            {"token": "", "against": "", "mark": "", "between": "\n\n"},
            r"prm.between = '\\n\\n': needs prm.mark",
        ),
        ({"prompt": "{problem}"}, "unknown field {problem}"),
        ({"prompt": "{question} is {answer!s}"}, "prm.prompt = .*: must not show the answer"),
    ],
)
def test_how_a_reward_model_is_asked(values, text):
    config = tiny.get_config("smoke")
    config.prm.update({"path": "there", "token": "+", "against": "-", "mark": "<|end|>"})
    configure.check(config, sharding.make_mesh())
    config.prm.update(values)
    with pytest.raises(ValueError, match=text):
        configure.check(config, sharding.make_mesh())


IMPOSSIBLE = {
    "evolve.steps": (0, -1),
    "evolve.warmup_steps": (13,),  # of 2 iterations of 6 steps
    "warmup.warmup_steps": (6, -1),
    "prm.warmup_steps": (7,),
    "base.warmup_steps": (60,),
    "eval.every": (0,),
    "eval.k": (0,),
    "eval.show": (-1,),
    "eval.test_at": (("end",),),
    "evolve.k": (0,),
    "evolve.fraction": (0.0, 1.5, float("nan")),
    "evolve.keep": (-1,),
    "evolve.iterations": (-1,),
    "evolve.learning_rate": (-1e-3, float("inf")),
    "evolve.unlabelled.mixin": (1.5,),
    "evolve.clip_low": (1.5, -0.1),
    "evolve.truncate": (-1.0, float("inf")),
    "sampling.dtype": ("bf16",),
    "sampling.top_p": (0.0, 1.1),
    "sampling.top_k": (-1,),
    "sampling.max_new_tokens": (0, 641),
    "sampling.stop_strings": (("",),),
    "train.dtype": ("half",),
    "train.frozen": (("(",),),
    "train.log_every": (0,),
    "train.save_every": (0, -5),
    "train.accumulate": (0, -2),
    "train.b2": (1.0,),
    "train.clip": (-1.0,),
    "data.validation": (0,),
    "data.test": (0,),
    "data.max_prompt": (641, 0),
    "data.buckets": ((), (0, 640), (640, 448)),
    "data.workers": (-1,),
    "data.figures.test": (0,),
    "prm.completions": (0,),
    "prm.k": (0,),
    "prm.temperature": (0.0,),
    "prm.chunk": (0,),
    "explore.temperatures": ((), (0.0, 1.0)),
    "explore.samples": (0,),
    "base.check_every": (0,),
    "base.batch": (0,),
    "policy.decoder.num_heads": (0,),
    "seed": (-1, 2**31),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in IMPOSSIBLE for value in IMPOSSIBLE[key]])
def test_every_impossible_value_is_named(key, value):
    config = tiny.get_config("smoke")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=f"^{re.escape(key)}( = |: )"):
        configure.check(config, sharding.make_mesh())


def test_what_a_score_needs_is_asked_for_first(monkeypatch):
    """Not once everything is sampled."""
    config = tiny.get_config("smoke")
    config.benchmarks.names = ("ai2d", "mathvista")
    assert evaluation.problems(config) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    [text] = evaluation.problems(config)
    assert text.startswith("benchmarks.names: mathvista needs rapidfuzz, pip install 'mstar_jax[benchmarks]'")


@pytest.mark.parametrize(("mixin", "first"), [(0.0, 1), (0.5, 11), (0.55, 12), (0.75, 16)])
def test_unlabelled_queries_join_once_their_share_is_done(mixin, first):
    config = tiny.get_config()
    config.evolve.iterations = 20
    config.evolve.unlabelled.mixin = mixin
    assert [unlabelled_join(config.evolve, t) for t in range(1, 21)] == [t >= first for t in range(1, 21)]


def test_a_prompt_and_a_response_fit_into_a_row():
    """A longer one would end the run once it is sampled, and other buckets would need another workdir."""
    config = tiny.get_config("smoke")
    config.sampling.max_new_tokens = config.data.buckets[-1] - config.data.max_prompt
    configure.check(config, sharding.make_mesh())
    config.sampling.max_new_tokens += 1
    text = r"^data.max_prompt = 448 and sampling.max_new_tokens = 193: together at most .*buckets, 640"
    with pytest.raises(ValueError, match=text):
        configure.check(config, sharding.make_mesh())


def test_all_problems_are_said_at_once():
    config = tiny.get_config("smoke")
    config.update_from_flattened_dict({"eval.every": 0, "sampling.dtype": "bf16", "evolve.batch": 3})
    with pytest.raises(ValueError) as error:
        configure.check(config, sharding.make_mesh())
    for part in (
        "eval.every = 0: must be at least 1",
        "sampling.dtype = 'bf16': choose one of 'float32', 'bfloat16', 'float16'",
        "evolve.batch = 3 is impossible",
    ):
        assert part in str(error.value)


def test_every_number_has_a_range():
    """But for those that are checked by a rule of their own."""
    ruled = ranges.ALWAYS | ranges.SAMPLING | ranges.FROM_SCRATCH | ranges.BASE | ranges.FIGURES
    own = {"evolve.threshold", "sampling.refill", "policy.decoder.num_layers"}
    own |= {"data.figures.train"}
    numbers = {key for key, value in flat(base.get_config()).items() if type(value) in (int, float)}
    left = {key for key in numbers - set(ruled) - own if not key.endswith((".batch", ".rows"))}
    assert left == {"mesh.data", "mesh.fsdp", "mesh.tensor"}  # the mesh refuses them itself


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("evolve.start", "warmup", "evolve.start = 'warmup': must be 'last' with evolve.objective = 'grpo'"),
        ("evolve.data", "answers", "evolve.data = 'answers': must be 'rollouts' with evolve.objective = "),
        ("evolve.unlabelled.mixin", 0.5, "evolve.unlabelled.mixin = 0.5: must be None with evolve.objective"),
        ("sampling.stop_strings", ("x",), r"sampling.stop_strings = \('x',\): must be \(\) with evolve.obj"),
        ("evolve.distinct", True, "evolve.distinct = True: must be False with evolve.objective = 'grpo'"),
        ("evolve.k", 1, "evolve.k = 1: evolve.objective = 'grpo' compares 2 or more samples"),
        ("evolve.temperature", 0.0, "evolve.temperature = 0.0, .* drawn above 0"),
        ("evolve.process_weight", 0.5, "evolve.process_weight = 0.5: needs step scores, so set prm.queries"),
    ],
)
def test_what_a_policy_gradient_needs(key, value, text):
    config = tiny.get_config("grpo")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=text):
        configure.check(config, sharding.make_mesh())


@pytest.mark.parametrize("variant", ["rloo", "grpo", "grpo_process"])
def test_policy_gradients_take_smaller_steps_than_imitation(variant):
    rates = [tiny.get_config(name).evolve.learning_rate for name in ("mstar", variant)]
    assert rates[1] == pytest.approx(0.1 * rates[0])


def test_a_gradient_of_all_responses_has_no_threshold():
    """Not even where a reward model could draw the line."""
    config = tiny.get_config("grpo_process")
    config.evolve.threshold = 0.5
    with pytest.raises(ValueError, match="evolve.threshold = 0.5: must be None with evolve.objective"):
        configure.check(config, sharding.make_mesh())


def test_one_sample_has_no_pass_rate():
    config = tiny.get_config("continuous")
    config.evolve.update({"curriculum": "informative", "k": 1})
    with pytest.raises(ValueError, match="evolve.k = 1: evolve.curriculum = 'informative' goes by how many"):
        configure.check(config, sharding.make_mesh())


def test_a_threshold_needs_rewards():
    config = tiny.get_config("continuous")
    config.evolve.threshold = 0.5
    with pytest.raises(
        ValueError, match="evolve.threshold = 0.5: must be None, for evolve.select = 'random'"
    ):
        configure.check(config, sharding.make_mesh())


def test_the_command_finds_a_config_from_anywhere(tmp_path):
    """By its absolute path; the config's own imports are found where mstar_jax is."""
    command = [sys.executable, "-m", "mstar_jax.main", f"--config={ROOT / 'configs' / 'phi35.py'}:rest_em"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "error: policy.path is not set" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
