"""Plans: which programs are compiled, what is printed about them, what is tried if they do not fit."""

import importlib

import jax
import pytest

from configs import tiny as tiny_config
from mstar_jax import sharding
from mstar_jax.plan import __main__ as plan
from mstar_jax.plan import hlo
from mstar_jax.plan.programs import Programs, policy_of
from mstar_jax.profiling import flops


def small():
    config = tiny_config.get_config("smoke")
    changes = {"policy.decoder.num_layers": 1, "policy.decoder.unroll": 1, "policy.vision.num_layers": 1}
    changes |= {"data.buckets": (128, 160), "data.max_prompt": 120, "evolve.batch": 8, "evolve.keep": 1}
    changes |= {"sampling.batch": 8, "sampling.max_new_tokens": 8, "prm.batch": 8}
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("phi35", 4_146_621_440),
        ("internvl2", 2_205_754_368),
        ("minicpmv25", 8_537_092_336),
        ("smolvlm", 256_484_928 + 4_884_480),  # with its adapters
    ],
)
def test_released_models_need_no_checkpoint(name, parameters):
    config = importlib.import_module(f"configs.{name}").get_config()
    programs = Programs(config, sharding.make_mesh(fsdp=-1, data=1))
    abstract = jax.eval_shape(programs.build)
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == parameters
    assert programs.dimensions.num_crops == config.policy.max_crops


def test_no_family():
    config = importlib.import_module("configs.phi35").get_config()
    config.policy.family = "nonsense"
    with pytest.raises(ValueError, match="'nonsense': set policy.path, or one of phi3_v"):
        policy_of(config)


def test_programs_of_the_local_devices():
    config, devices = small(), jax.devices()
    lines = {name: list(plan.plan(config, name, devices, advise=False)) for name in ("train", "score")}
    [train], [score] = lines["train"], lines["score"]
    assert train.startswith("train step, 8 rows of 128\n  memory") and "all-gather" not in score
    assert score.startswith("score, 8 rows of 160") and "at peak" not in score  # nothing is known about a CPU
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        [(_, lowered, own)] = Programs(config, mesh).lower("score")
        cost = plan.compile_cost(lowered)
    assert 0.8 * cost.work.flops < sum(own.values()) / 8 < 1.2 * cost.work.flops
    d, heads, width, f, v = 96, 4, 24, 256, 512  # one row of 160 tokens on each of the eight devices
    block = 2 * 160 * (d * width * (2 * heads + 2 * 2) + 3 * d * f)
    block += 2 * 2 * heads * width * 54**2  # one block of attention; how many there are depends on the mask
    assert cost.work.flops > block + 2 * 160 * d * v  # and the tower
    assert cost.work.flops < 3 * (block + 2 * 160 * d * v) + 2e8
    assert cost.peak > 4 * 160 * v  # a row's logits


def test_rollouts_are_two_programs():
    config = small()
    config.sampling.batch, config.sampling.refill = 16, 0.5
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        found = {title: lowered for title, lowered, _ in Programs(config, mesh).lower("rollouts")}
    first, second = found
    assert (
        first == "prefill, 8 rows of 128 into 16"
        and second == "decoding step, 16 rows of 4 samples, 8 tokens"
    )
    prefill, step = (plan.compile_cost(lowered) for lowered in found.values())
    cache = 16 * 2 * 4 * 2 * 24 * (128 + 4 * 8)  # of all rows: 2 groups, keys and values in 4 bytes
    for cost in (prefill, step):  # a device has its own rows and updates them in place
        assert cache / 8 <= cost.memory["shared"] < 1.1 * cache / 8
        assert sum(cost.work.moved().values()) < 100, "rows enter the slots of their own device"


def test_what_is_tried():
    config, mesh = small(), sharding.make_mesh(fsdp=8, data=1)
    config.evolve.batch = 32
    assert list(plan.smaller_settings("train", config, mesh)) == [
        {"train.remat": "full"},
        {"train.accumulate": 2},
        {"train.accumulate": 4},
        {"mesh.tensor": 2},
        {"mesh.tensor": 4},
        {"mesh.tensor": 8},
    ]
    config.sampling.batch = 32
    assert list(plan.smaller_settings("rollouts", config, mesh))[:2] == [
        {"sampling.batch": 16},
        {"sampling.batch": 8},
    ]


def test_what_does_not_fit_is_tried_again(monkeypatch):
    tries = []

    def compile_cost(lowered):
        tries.append(lowered)
        if len(tries) < 3:
            raise plan.TooLarge("needs 2G of 1G")
        memory = {"arguments": 3e9, "outputs": 1e9, "temporary": 2e9, "code": 0.0, "shared": 1e9}
        gathered = hlo.Collective("all-gather", 16 * 10**8, 16, 2)
        return plan.Cost(memory, hlo.Work(197e12, 819e9, (gathered,)))

    monkeypatch.setattr(plan, "compile_cost", compile_cost)
    monkeypatch.setattr(plan, "chip_of", lambda kind: flops.CHIPS["TPU v5 lite"])
    monkeypatch.setattr(
        Programs,
        "lower",
        lambda self, name: iter([("a program", "lowered", {"language": 8 * 98.5e12})]),
    )
    config = small()
    config.evolve.batch = 32
    lines = list(plan.plan(config, "train", jax.devices(), advise=True))
    assert lines[0] == lines[2] == "a program\n  does not fit: needs 2G of 1G"
    assert lines[3] == "with --config.train.remat=full --config.train.accumulate=2"
    assert "memory    5.00 of 16 GB" in lines[4]  # the output aliases the arguments
    assert "network   3.000 GB received: all-gather 3.000" in lines[4]
    assert "compute 1000.0, memory 1000.0, network 15.0 ms" in lines[4] and "MFU at most 50 %" in lines[4]
    assert len(list(plan.plan(config, "train", jax.devices(), advise=False))) == 1


def test_a_program_that_is_not_shown():
    memory = {"arguments": 3e9, "outputs": 1e9, "temporary": 2e9, "code": 0.0, "shared": 1e9}
    text = plan.describe("a program", plan.Cost(memory, None, {"language": 8e12}), None, 8)
    assert "memory    5.00 GB" in text and "1.000 TFLOP of its own" in text
    assert text.endswith("work      not known: the compiler does not show this program")
