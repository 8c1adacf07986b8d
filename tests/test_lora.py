"""LoRA: what is trained and what is not, against materialised weights; merged, sharded, saved, exported."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from configs import tiny as tiny_config
from mstar_jax import configure, models, sharding
from mstar_jax.inference import sampler
from mstar_jax.models import layers, phi35, vlm
from mstar_jax.plan import official
from mstar_jax.plan.programs import Programs
from mstar_jax.rewards import prm
from mstar_jax.structs import Stage, TrainState
from mstar_jax.training import optimizer
from mstar_jax.training.checkpoint import Checkpoints, EvolveState
from mstar_jax.training.step import abstract_state, make_train_step, token_loss

RANK, ALPHA, LENGTH = 4, 6.0, 40
SCALE = 1.5  # alpha / rank, as in peft
LORA = {"rank": RANK, "alpha": ALPHA, "base_dtype": "float32"}
PROJECTIONS = {"q": "d,hn", "k": "d,hn", "v": "d,hn", "o": "hn,d", "gate": "d,f", "up": "d,f", "down": "f,d"}
ADAPTERS = {f"decoder.blocks.{name}_{end}" for name in PROJECTIONS for end in "ab"}


def values(**lora):
    return ConfigDict({"frozen": (), "lora": LORA | lora})


FROZEN = configure.frozen(values())


def config(rank=RANK, **decoder):
    return tiny.config(lora_rank=rank, lora_alpha=ALPHA, **decoder)


def named(tree):
    return {name: np.asarray(x) for name, x in sharding.named(tree).items()}


def filled(abstract, *sources):
    """A model of these shapes with the values of the first source that has them."""
    found = {name: x for source in reversed(sources) for name, x in sharding.named(source).items()}
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.copy(found[sharding.parameter_name(path)]), abstract
    )


def fresh():
    """The tiny policy with adapters as they begin."""
    return filled(tiny.abstract(config()), tiny.model(), phi35.Phi35Vision(config(), nnx.Rngs(0)))


def materialised(policy):
    """The plain policy with W + a b alpha / r written out, differentiable; nothing of the library's merge."""
    found = sharding.named(policy)
    for name, axes in PROJECTIONS.items():
        w, a, b = (found[f"decoder.blocks.{name}{end}"] for end in ("", "_a", "_b"))
        inputs, outputs = axes.split(",")
        product = jnp.einsum(f"l{inputs}r,lr{outputs}->l{inputs}{outputs}", a, b)
        found[f"decoder.blocks.{name}"] = w + SCALE * product
    return jax.tree_util.tree_map_with_path(
        lambda path, _: found[sharding.parameter_name(path)], tiny.abstract(config(0))
    )


RATE = np.float32(1e-2)
EPS = np.finfo(np.float32).eps
WITHIN = 2 * 7 * 32 * EPS  # layers, projections, terms of each sum: what another order of sums may change


def adamw():
    return optimizer.make_optimizer(weight_decay=0.1)


def start(params, tx, frozen=FROZEN):
    params = jax.tree.map(jnp.copy, params)  # the step donates what it is given
    return optimizer.new_state(params, tx, frozen)


def moments(state):
    adam = state.opt_state[1]
    return named(adam.mu), named(adam.nu)


@pytest.fixture(scope="module")
def one():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def batch():
    """Eight rows of text."""
    rng = np.random.default_rng(0)
    return tiny.stack([tiny.row(rng, [(0, 9), (1, 5 + i), (2, 9)], LENGTH) for i in range(8)])


@pytest.fixture(scope="module")
def step(one):
    return make_train_step(adamw(), one, frozen=FROZEN)


@pytest.fixture(scope="module")
def trained(step, batch):
    """Four AdamW steps from fresh adapters, and their metrics."""
    state, found = start(fresh(), adamw()), []
    for _ in range(4):
        state, metrics = step(state, batch, RATE)
        found.append({name: float(x) for name, x in metrics.items()})
    return state, found


def test_the_tree():
    """Rank 0 adds nothing; with a rank there are two adapters a projection, laid out as it is."""
    plain, lora = (sharding.named(tiny.abstract(cfg)) for cfg in (config(0), config()))
    assert {n for n in plain if n.startswith("decoder.blocks.")} == {
        f"decoder.blocks.{name}" for name in (*PROJECTIONS, "input_norm", "post_norm")
    }
    assert jax.tree.structure(tiny.abstract()) == jax.tree.structure(tiny.abstract(tiny.config(lora_rank=0)))
    assert lora.keys() - plain.keys() == ADAPTERS and not plain.keys() - lora.keys()
    assert all(lora[name].shape == plain[name].shape for name in plain)
    shapes = {name.rpartition(".")[2]: lora[name].shape for name in ADAPTERS}
    assert (shapes["q_a"], shapes["q_b"]) == ((2, 32, RANK), (2, RANK, 4, 8))
    assert (shapes["o_a"], shapes["o_b"]) == ((2, 4, 8, RANK), (2, RANK, 32))
    assert (shapes["down_a"], shapes["down_b"]) == ((2, 48, RANK), (2, RANK, 32))
    layout = sharding.shardings(tiny.abstract(config()), sharding.TRAIN, sharding.make_mesh(1, 4, 2))
    specs = {name: tuple(x.spec) for name, x in sharding.named(layout).items()}
    assert specs["decoder.blocks.o_a"] == (None, "tensor", None, None)
    assert specs["decoder.blocks.o_b"] == (None, None, "fsdp")


def test_what_is_frozen():
    policy = tiny.abstract(config())
    reward = jax.eval_shape(vlm.RewardModel, policy)
    head = {"weight", "bias", "likelihood"}

    def left(stage, model):
        return sharding.named(model).keys() - optimizer.frozen_names(model, configure.frozen(values(), stage))

    assert left(Stage.warmup, policy) == left(Stage.iteration(3), policy) == ADAPTERS
    assert left(Stage.base, policy) == sharding.named(policy).keys() - ADAPTERS  # nothing to adapt yet
    decoder = {name for name in sharding.named(policy) if name.startswith("decoder.")}
    assert left(Stage.align, policy) == sharding.named(policy).keys() - decoder
    assert left(Stage.reward_model, reward) == {f"trunk.{name}" for name in ADAPTERS} | head
    none = ConfigDict({"frozen": ("^tower",), "lora": LORA | {"rank": 0}})
    assert {configure.frozen(none, stage) for stage in (Stage.base, Stage.reward_model)} == {("^tower",)}


def test_it_begins_as_the_base(batch):
    policy = fresh()
    for name, value in named(policy).items():
        assert (value == 0).all() == name.endswith("_b") or name not in ADAPTERS, name
    assert np.std(policy.decoder.blocks.down_a[...]) == pytest.approx(48**-0.5, rel=0.15)
    np.testing.assert_array_equal(tiny.logits(policy, batch), tiny.logits(tiny.model(), batch))


def test_only_adapters_move(trained):
    state, metrics = trained
    before, after = named(fresh()), named(state.params)
    for name, value in before.items():
        assert np.array_equal(after[name], value) == (name not in ADAPTERS), name
    assert all(found.keys() == ADAPTERS for found in moments(state))
    losses = [m["loss"] for m in metrics]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05


def test_merged(trained, batch):
    """The same forward pass, from a tree that is a plain model's."""
    policy = trained[0].params
    merged = policy.merged()
    assert jax.tree.structure(merged) == jax.tree.structure(tiny.abstract(config(0)))
    for name, want in named(materialised(policy)).items():
        within = 4 * RANK * EPS * np.abs(want).max()  # sums of RANK terms, and of the weight
        np.testing.assert_allclose(named(merged)[name], want, rtol=0, atol=within, err_msg=name)
    ours, theirs = tiny.logits(policy, batch), tiny.logits(merged, batch)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=WITHIN * np.abs(theirs).max())
    assert np.abs(theirs - tiny.logits(tiny.model(), batch)).max() > 0.1
    assert merged.merged() is merged


@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradients_are_those_of_materialised_weights(one, batch, accumulate):
    policy, tx = tiny.model(config()), optax.identity()  # b is not 0 here

    def mean(policy):
        loss, extra = token_loss(materialised(policy), batch)
        return loss / extra["tokens"]

    want = {name: x for name, x in named(jax.jit(jax.grad(mean))(policy)).items() if name in ADAPTERS}
    step = make_train_step(tx, one, frozen=FROZEN, accumulate=accumulate)
    state, metrics = step(start(policy, tx), batch, np.float32(0.1))
    before, after = named(policy), named(state.params)
    for name, grad in want.items():
        got = (before[name] - after[name]) / 0.1
        np.testing.assert_allclose(got, grad, rtol=0, atol=1e-5 * np.abs(grad).max() + 1e-6, err_msg=name)
    norm = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in want.values()))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)


def test_no_product_has_a_weights_shape(one, batch):
    """Neither a @ b nor the gradient of a weight is computed; training everything does compute the latter."""
    found = {}
    for rank in (0, RANK):
        tx, frozen = adamw(), FROZEN if rank else ()
        abstract = tiny.abstract(config(rank, intermediate_size=53))
        state = jax.eval_shape(functools.partial(start, tx=tx, frozen=frozen), abstract)
        step = make_train_step(tx, one, frozen=frozen)
        program = str(jax.make_jaxpr(step)(state, batch, RATE))
        products = re.findall(r":f32\[([\d,]+)\] = dot_general", program)
        found[rank] = {tuple(sorted(map(int, shape.split(",")))) for shape in products}
    assert (32, 53) in found[0] and (32, 53) not in found[RANK]
    assert {(RANK, 32), (RANK, 53)} <= found[RANK]


def test_sharded_steps_equal_unsharded_ones(trained, batch):
    one_device, metrics = trained
    mesh, tx = sharding.make_mesh(data=2, fsdp=2, tensor=2), adamw()
    state = optimizer.carry_on(
        TrainState(0, fresh(), ()), tx, mesh, frozen=FROZEN, moments=False, schedule=False
    )
    step = make_train_step(tx, mesh, frozen=FROZEN, remat="full")
    for want in metrics:
        state, found = step(state, sharding.put_batch(batch, mesh), RATE)
        assert float(found["loss"]) == pytest.approx(want["loss"], rel=1e-4)
        assert float(found["grad_norm"]) == pytest.approx(want["grad_norm"], rel=1e-3)
    ours, theirs = named(state.params), named(one_device.params)
    for name in ADAPTERS:  # Adam divides a gradient by its own size: where that is rounding, more may move
        assert np.mean(np.abs(ours[name] - theirs[name]) > 1e-4) < 0.01, name
    gate = state.params.decoder.blocks.gate_b[...]
    assert gate.addressable_shards[0].data.shape == (2, RANK, 24)
    merged = sampler.for_sampling(state.params, mesh, jnp.float32)
    plain = sampler.for_sampling(tiny.model(config(0)), mesh, jnp.float32)
    assert jax.tree.structure(merged) == jax.tree.structure(plain)  # the sampler's program is the same one
    for (name, a), b in zip(sharding.named(merged).items(), jax.tree.leaves(plain)):
        assert (a.dtype, a.sharding) == (b.dtype, b.sharding), name
    want = named(one_device.params.merged())
    for name, value in named(merged).items():
        np.testing.assert_allclose(value, want[name], rtol=0, atol=1e-3, err_msg=name)


def test_continuous_training_through_a_checkpoint(tmp_path, one, step, trained, batch):
    """Two steps, an iteration's end, a restart and two steps are four steps, bit for bit."""
    tx, want = adamw(), trained[0]
    state = start(fresh(), tx)
    for _ in range(2):
        state, _ = step(state, batch, RATE)
    where = EvolveState("iteration", 1, 2, True, 1.0, 0)
    Checkpoints(tmp_path).save(Stage.iteration(1), state, where, wait=True)
    abstract = abstract_state(lambda: phi35.Phi35Vision(config(), nnx.Rngs(0)), tx, one, frozen=FROZEN)
    state = Checkpoints(tmp_path).restore(Stage.iteration(1), abstract)
    state = optimizer.carry_on(state, tx, one, frozen=FROZEN, moments=True, schedule=True)
    for _ in range(2):
        state, _ = step(state, batch, RATE)
    for ours, theirs in zip((named(state.params), *moments(state)), (named(want.params), *moments(want))):
        for name, value in theirs.items():
            np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_base_in_bfloat16(tmp_path, one, batch):
    """What is frozen keeps its dtype and its bits, adapters and moments are float32; restored as either."""
    tx, policy = adamw(), optimizer.cast_frozen(fresh(), FROZEN, jnp.bfloat16)
    state, step = start(policy, tx), make_train_step(tx, one, frozen=FROZEN, dtype=jnp.bfloat16)
    for _ in range(2):
        state, metrics = step(state, batch, RATE)
    before, after = named(policy), named(state.params)
    for name, value in after.items():
        assert value.dtype == (np.float32 if name in ADAPTERS else jnp.bfloat16), name
        assert (value.tobytes() == before[name].tobytes()) == (name not in ADAPTERS), name
    assert all(x.dtype == np.float32 for found in moments(state) for x in found.values())
    assert np.isfinite(float(metrics["grad_norm"]))
    Checkpoints(tmp_path).save(Stage.warmup, state, EvolveState("warmup", 0, 2, True, 1.0, 0), wait=True)
    abstract = abstract_state(
        lambda: optimizer.cast_frozen(fresh(), FROZEN, jnp.bfloat16), tx, one, frozen=FROZEN
    )
    again = Checkpoints(tmp_path).restore(Stage.warmup, abstract).params
    layout = sharding.shardings(tiny.abstract(config()), sharding.TRAIN, one)
    wide = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tiny.abstract(config()), layout
    )
    exported = Checkpoints(tmp_path).params(Stage.warmup, wide)  # as `export` reads it
    for name, value in named(state.params).items():
        assert named(again)[name].tobytes() == value.tobytes(), name
        np.testing.assert_array_equal(named(exported)[name], value.astype(np.float32), err_msg=name)
    for name, value in named(exported.merged()).items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(named(again.merged(jnp.float32))[name], value, err_msg=name)


def test_a_reward_model(one):
    """Its trunk has adapters, its head trains whole, and it is scored with merged."""
    rng = np.random.default_rng(0)
    batch = tiny.stack([tiny.row(rng, [(0, 9), (1, 8), (2, 7)], LENGTH) for _ in range(4)])
    labels = np.full(batch.tokens.shape, -1.0, np.float32)
    labels[:, 16], labels[:, 23] = (0, 1, 0, 1), (1, 0, 1, 0)
    batch, frozen = batch._replace(labels=labels), configure.frozen(values(), Stage.reward_model)
    tx, model = adamw(), vlm.RewardModel(tiny.model(config()))
    state = start(model, tx, frozen)
    step = make_train_step(tx, one, loss=prm.make_loss(0.2), frozen=frozen)
    for _ in range(3):
        state, metrics = step(state, batch, RATE)
    before, after = named(model), named(state.params)
    moving = {f"trunk.{name}" for name in ADAPTERS} | {"weight", "bias", "likelihood"}
    for name, value in before.items():
        assert np.array_equal(after[name], value) == (name not in moving), name
    assert moments(state)[0].keys() == moving and float(metrics["grad_norm"]) > 0
    assert 8 * float(metrics["accuracy"]) in range(9)  # of the eight steps
    merged = state.params.merged()
    plain = jax.eval_shape(lambda: vlm.RewardModel(tiny.abstract(config(0))))
    assert jax.tree.structure(merged) == jax.tree.structure(plain)
    np.testing.assert_allclose(
        prm.token_scores(merged, batch), prm.token_scores(state.params, batch), rtol=0, atol=WITHIN
    )


def test_the_base_stage_of_a_policy_from_scratch(one, batch):
    """Everything is trained but the adapters, which stay without effect."""
    frozen = configure.frozen(values(), Stage.base)
    tx, policy = adamw(), fresh()
    state, _ = make_train_step(tx, one, frozen=frozen)(start(policy, tx, frozen), batch, RATE)
    before, after = named(policy), named(state.params)
    still = {name for name in before if np.array_equal(before[name], after[name])}
    unseen = {name for name in before if name.startswith(("tower", "project", "row_sep", "view_sep"))}
    assert still - unseen == ADAPTERS and moments(state)[0].keys() == before.keys() - ADAPTERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny policy in the official format, in float32."""
    path, words = tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("tokenizer")
    phi35.make_tokenizer(tiny.TEXTS, words, tiny.VOCAB)
    models.FromScratch(phi35.FAMILY, tiny.config(), words).save(tiny.model(), path)
    return path


def pretrained(folder):
    policy = models.Pretrained(folder)
    policy.config = configure.adapted(policy.config, values())
    return policy


@pytest.mark.parametrize("cut", [False, True])
def test_a_checkpoint_gets_adapters(folder, cut):
    """Its weights in their dtype, and new adapters from the run's seed, all in their layout."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2) if cut else None
    policy = pretrained(folder)
    model = policy.load(jnp.bfloat16, mesh=mesh, seed=3)
    assert jax.tree.structure(model) == jax.tree.structure(tiny.abstract(config()))
    want = named(models.Pretrained(folder).load(jnp.bfloat16)) | {
        name: value for name, value in named(policy.build(3)).items() if name in ADAPTERS
    }
    for name, value in named(model).items():
        np.testing.assert_allclose(
            value.astype(np.float32), want[name].astype(np.float32), rtol=0, atol=1e-7, err_msg=name
        )
        assert value.dtype == (np.float32 if name in ADAPTERS else jnp.bfloat16), name
    other = named(policy.load(jnp.bfloat16, seed=4))
    assert not np.array_equal(other["decoder.blocks.q_a"], want["decoder.blocks.q_a"])
    if mesh:
        layout = sharding.named(sharding.shardings(tiny.abstract(config()), sharding.TRAIN, mesh))
        assert all(x.sharding.is_equivalent_to(layout[n], x.ndim) for n, x in sharding.named(model).items())


def test_export_is_merged(folder, tmp_path):
    """W + B A alpha / r in peft's shapes, A [r, in] and B [out, r]; loaded again it is the merged policy."""
    policy, model = pretrained(folder), tiny.model(config())
    policy.save(model, tmp_path / "out")
    there, here = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name: x.shape for name, x in there.items()} == {name: x.shape for name, x in here.items()}
    found = named(model)
    base, a, b = (found[f"decoder.blocks.o{end}"][1] for end in ("", "_a", "_b"))
    want = base.reshape(32, 32).T + SCALE * b.reshape(RANK, 32).T @ a.reshape(32, RANK).T
    np.testing.assert_allclose(here["model.layers.1.self_attn.o_proj.weight"], want, rtol=0, atol=1e-6)
    again = named(models.Pretrained(tmp_path / "out").load(jnp.float32))
    merged = named(model.merged())
    assert again.keys() == merged.keys()
    for name, value in merged.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
    policy.save(vlm.RewardModel(model), tmp_path / "reward")
    reward = named(models.Pretrained(tmp_path / "reward").load_reward(jnp.float32))
    for name, value in merged.items():
        np.testing.assert_array_equal(reward[f"trunk.{name}"], value, err_msg=name)


@pytest.mark.parametrize(
    "family",
    [name for name in official.OFFICIAL if ":" not in name]
    + ["internvl_chat:InternVL3-8B", "internvl_chat:InternVL3_5-8B"],  # the decoders of its other sizes
)
def test_every_family(family):
    """Adapters, and the merged tree, in the released models' shapes."""
    plain, build = official.OFFICIAL[family], models.FAMILIES[family.partition(":")[0]].model
    lora = configure.adapted(plain, values())
    abstract = jax.eval_shape(lambda: build(lora, nnx.Rngs(0)))
    assert {n for n in sharding.named(abstract) if re.search(layers.ADAPTERS, n)} == ADAPTERS
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    sharding.shardings(abstract, sharding.TRAIN, mesh)
    merged = jax.eval_shape(lambda: build(lora, nnx.Rngs(0)).merged(jnp.bfloat16))
    alike = dataclasses.replace(plain, decoder=dataclasses.replace(plain.decoder, lora_alpha=ALPHA))
    want = jax.eval_shape(lambda: sharding.cast(build(alike, nnx.Rngs(0)), jnp.bfloat16))
    assert jax.tree.structure(merged) == jax.tree.structure(want)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(merged)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(want)
    ]


def test_memory_of_a_step(one):
    """Compiled: no moments, no gradients and no accumulators of the base; in bfloat16 half of it."""
    rng = np.random.default_rng(0)
    batch = tiny.stack([tiny.row(rng, [(0, 9), (1, 20)], LENGTH) for _ in range(2)])
    wide = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32, "short_factor": None}

    def needed(rank, dtype=jnp.float32):
        frozen = FROZEN if rank else ()
        tx = adamw()

        def init():
            params = phi35.Phi35Vision(config(rank, **wide), nnx.Rngs(0))
            return start(optimizer.cast_frozen(params, frozen, dtype), tx, frozen)

        state = jax.eval_shape(init)
        step = make_train_step(tx, one, frozen=frozen, accumulate=2, remat="full")
        found = step.lower(state, batch, RATE).compile().memory_analysis()
        size = 4 * sum(x.size for x in jax.tree.leaves(state.params))
        return found.argument_size_in_bytes / size, found.temp_size_in_bytes / size

    (full, more), (lora, less), (half, _) = needed(0), needed(RANK), needed(RANK, jnp.bfloat16)
    assert 2.9 < full < 3.1 and 0.9 < lora < 1.3 and 0.4 < half < 0.8  # weights and two moments; weights
    assert less < more - 1.5  # gradients and their sum over microbatches
    assert lora + less < 0.5 * (full + more)


def small(**lora):
    config = tiny_config.get_config("smoke")
    changes = {"policy.decoder.num_layers": 1, "policy.decoder.unroll": 1, "policy.vision.num_layers": 1}
    changes |= {"data.buckets": (128, 160), "data.max_prompt": 120, "evolve.batch": 8, "evolve.keep": 1}
    changes |= {"sampling.batch": 8, "sampling.max_new_tokens": 8, "prm.batch": 8}
    config.update_from_flattened_dict(changes | {f"train.lora.{key}": value for key, value in lora.items()})
    return config


def test_plans():
    """A step costs less, and what is sampled and scored with is the plain model's program."""
    mesh = sharding.make_mesh()
    programs = [Programs(small(**how), mesh) for how in ({}, {"rank": 4, "base_dtype": "bfloat16"})]
    with jax.set_mesh(mesh):
        plain, adapted = (p.make("train")[0] for p in programs)
        full, lora = plain.own(), adapted.own()
        assert 0.6 < lora["language"] / full["language"] < 0.8  # no gradients of the base: 2 of 3 products
        assert 0 < lora["vision"] <= 0.5 * full["vision"]  # and none of the tower at all
        assert "bf16" in adapted.call.lower(*adapted.args).as_text()
        for name in ("rollouts", "score"):
            texts = ([one.call.lower(*one.args).as_text() for one in p.make(name)] for p in programs)
            assert len({tuple(each) for each in texts}) == 1, name


def test_values_are_checked():
    mesh = sharding.make_mesh()
    for change, text in (
        ({"rank": -1}, r"train.lora.rank = -1: must be at least 0"),
        ({"rank": 8, "alpha": 0.0}, "train.lora.alpha = 0.0: must be above 0"),
        ({"base_dtype": "int8"}, "train.lora.base_dtype = 'int8': choose one of"),
    ):
        with pytest.raises(ValueError, match=text):
            configure.check(small(**change), mesh)
    configure.check(small(rank=8), mesh)
