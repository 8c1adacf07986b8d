"""Plans: which programs are compiled, what is printed about them, what is tried if they do not fit."""

import importlib
import importlib.util
import re

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from configs import tiny as tiny_config
from mstar_jax import sharding
from mstar_jax.plan import __main__ as plan
from mstar_jax.plan import advice, cost, hlo, residency, topology
from mstar_jax.plan.programs import KINDS, Program, Programs, policy_of, trained
from mstar_jax.profiling import flops


def small():
    config = tiny_config.get_config("smoke")
    changes = {"policy.decoder.num_layers": 1, "policy.decoder.unroll": 1, "policy.vision.num_layers": 1}
    changes |= {"data.buckets": (128, 160), "data.max_prompt": 120, "evolve.batch": 8, "evolve.keep": 1}
    changes |= {"warmup.keep": 1, "sampling.batch": 8, "sampling.max_new_tokens": 8, "prm.batch": 8}
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("phi35", 4_146_621_440),
        ("internvl2", 2_205_754_368),
        ("internvl3", 2_088_957_440),
        ("minicpmv25", 8_537_092_336),
        ("smolvlm", 256_484_928 + 4_884_480),  # with its adapters
        ("qwen_vl", 3_754_622_976),
        ("qwen3_vl", 4_437_815_808),
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


def compiled(config, kind):
    """The programs of a kind on the local devices, and their costs."""
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        programs = Programs(config, mesh)
        return programs, list(plan.costs_of(programs, kind, None))


def test_programs_of_the_local_devices():
    config, devices = small(), jax.devices()
    lines = {name: list(plan.plan(config, name, devices, False, {})) for name in ("train", "score")}
    [train], [score] = lines["train"], lines["score"]
    assert train.startswith("train step, 8 rows of 128\n  memory") and "all-gather" not in score
    assert score.startswith("score, 8 rows of 160") and "at peak" not in score  # nothing is known about a CPU
    _, [(program, found)] = compiled(config, "score")
    assert 0.8 * found.work.flops < sum(program.own().values()) / 8 < 1.2 * found.work.flops
    d, heads, width, f, v = 96, 4, 24, 256, 512  # one row of 160 tokens on each of the eight devices
    block = 2 * 160 * (d * width * (2 * heads + 2 * 2) + 3 * d * f)
    block += 2 * 2 * heads * width * 54**2  # one block of attention; how many there are depends on the mask
    assert found.work.flops > block + 2 * 160 * d * v  # and the tower
    assert found.work.flops < 3 * (block + 2 * 160 * d * v) + 2e8
    assert found.peak > 4 * 160 * v  # a row's logits


def test_rollouts_are_two_programs():
    config = small()
    config.sampling.batch, config.sampling.refill = 16, 0.5
    programs, found = compiled(config, "rollouts")
    (first, prefill), (second, step) = found
    assert first.title == "rollouts: prefill, 8 rows of 128 into 16"
    assert second.title == "rollouts: decoding step, 16 rows of 4 samples, 8 tokens"
    cache = 16 * 2 * 4 * 2 * 24 * (128 + 4 * 8)  # of all rows: 2 groups, keys and values in 4 bytes
    for each in (prefill, step):  # a device has its own rows and updates them in place
        assert cache / 8 <= each.memory["shared"] < 1.1 * cache / 8
        assert sum(each.work.moved().values()) < 100, "rows enter the slots of their own device"
    assert second.least()["prompts"] + second.least()["responses"] == cache / 8
    block = 96 * 24 * (4 + 2 + 2 + 4) + 3 * 96 * 256 + 2 * 96  # of the decoder; its embedding is its head too
    assert second.least()["weights"] == 4 * (block + 512 * 96 + 96)
    assert step.work.bytes >= sum(second.least().values())
    assert prefill.work.bytes > 0.5 * first.least()["products"] > 0


@pytest.mark.parametrize(
    ("kind", "most", "titles"),
    [
        (
            "exploration",
            0,
            ["prefill, 8 rows of 128 into 16", "decoding step, 16 rows of 5 samples, 8 tokens"],
        ),
        (
            "labels",
            4,
            [
                "prefill, 8 rows of 160 into 16",
                "decoding step, 16 rows of 16 samples, 4 at a time, 8 tokens",
            ],
        ),
    ],
)
def test_passes_with_many_samples_are_planned(kind, most, titles):
    """Temperatures, each with its samples and a greedy one; completions that continue responses in a row."""
    config = small()
    config.sampling.places = most
    mesh = sharding.make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        made = Programs(config, mesh).make(kind)
    assert made[1].least()["responses"] == 16 / 8 * (most or 5) * 8 * 2 * 4 * 2 * 24  # as above, of a device
    assert [each.title for each in made] == [f"{kind}: {title}" for title in titles]
    assert (made[0].args[3].starts is not None) == (kind == "labels")


def test_the_reward_models_step_is_planned():
    mesh = sharding.make_mesh(**small().mesh)
    with jax.set_mesh(mesh):
        [made] = Programs(small(), mesh).make("train prm")
    assert made.title == "train step of the reward model, 8 rows of 160"
    assert made.args[0].params.weight.value.shape == (96,)  # the head


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({}, set()),
        ({"prm.queries": 0}, {"train prm", "labels", "score", "exploration"}),
        ({"prm.path": "elsewhere"}, {"train prm", "labels"}),
        ({"evolve.select": "likelihood"}, {"train prm", "labels"}),
        ({"explore.every": 0}, {"exploration"}),
        ({"warmup.data": "a file", "evolve.data": "warmup"}, set()),  # the reward model's responses
        (
            {"warmup.data": "a file", "evolve.data": "warmup", "prm.data": "a file"},
            {"rollouts", "labels"},
        ),
    ],
)
def test_only_what_a_run_has_is_planned(changes, absent):
    config = small()
    config.update_from_flattened_dict(changes)
    programs = Programs(config, sharding.make_mesh(**config.mesh))
    assert programs.kinds() == [kind for kind in KINDS if kind not in absent]


@pytest.mark.parametrize("offload", [False, True])
def test_what_lies_beside_a_program(offload):
    """The policy's TrainState: parameters in float32, and twice as much for Adam's moments."""
    config = small()
    config.train.offload_optimizer = offload
    config.mesh.data, config.mesh.fsdp = 1, 8
    programs = Programs(config, sharding.make_mesh(**config.mesh))
    parameters, moments = residency.beside(programs, "score")
    size = sum(x.size for x in jax.tree.leaves(jax.eval_shape(programs.build)))
    assert 4 * size / 8 <= parameters < 4 * size / 4  # some are too small to be sharded
    assert moments == (0 if offload else 2 * parameters + 4)  # and a count
    assert residency.beside(programs, "train") == (0, 0)


def test_what_is_tried():
    config, mesh = small(), sharding.make_mesh(fsdp=8, data=1)
    config.mesh.data, config.mesh.fsdp, config.evolve.batch = 1, -1, 32
    assert list(advice.smaller_settings("train", config, mesh)) == [
        {"train.remat": "full"},
        {"train.accumulate": 2},
        {"train.accumulate": 4},
        {"mesh.tensor": 2},
        {"mesh.tensor": 4},
        {"mesh.tensor": 8},
    ]
    config.sampling.batch = 32
    assert list(advice.smaller_settings("rollouts", config, mesh))[:3] == [
        {"train.offload_optimizer": True},
        {"sampling.batch": 16},
        {"sampling.batch": 8},
    ]
    config.mesh.fsdp, config.mesh.tensor = 4, 2  # neither what is there already nor a mesh that fits nothing
    mesh = sharding.make_mesh(**config.mesh)
    assert list(advice.smaller_settings("score", config, mesh))[-2:] == [
        {"mesh.fsdp": -1, "mesh.tensor": 4},
        {"mesh.fsdp": -1, "mesh.tensor": 8},
    ]


def test_what_a_run_would_refuse_is_not_tried(monkeypatch):
    """Microbatches divide the batches of all stages; a mesh has all devices."""

    def compile_cost(*args, loop):
        raise cost.TooLarge("needs 2G of 1G")

    monkeypatch.setattr(plan, "compile_cost", compile_cost)
    monkeypatch.setattr(Programs, "make", lambda self, kind: [made_up()])
    config = small()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 4, 2, 1
    config.evolve.batch, config.warmup.batch, config.prm.batch = 32, 16, 32
    lines = [line for line in plan.plan(config, "train", jax.devices(), True, {}) if "--config" in line]
    remat, twice = "--config.train.remat=full", "--config.train.accumulate=2"
    assert lines == [f"with {remat}", f"with {remat} {twice}"] + [
        f"with {remat} {twice} --config.mesh.fsdp=-1 --config.mesh.tensor=2"
    ]
    config.evolve.batch = 12
    with pytest.raises(ValueError, match="policy.decoder.num_heads = 0: must be at least 1"):
        phi35 = importlib.import_module("configs.phi35").get_config()
        phi35.policy.decoder.num_layers = 2  # that of a policy from scratch, whose other sizes are not given
        advice.with_settings(phi35, {}, jax.devices())
    with pytest.raises(ValueError, match="evolve.batch = 12 is impossible"):
        next(plan.plan(config, "train", jax.devices(), True, {}))


def test_what_an_iteration_trains_on():
    """Gold answers are one a query, the warm-up's rationales as many as it keeps."""
    config = small()
    config.evolve.k, config.evolve.keep, config.warmup.k, config.warmup.keep = 16, 0, 4, 0
    found = {}
    for data in ("rollouts", "answers", "warmup"):
        config.evolve.data = data
        found[data] = trained(config)
    assert found == {"rollouts": 16, "answers": 1, "warmup": 4}


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("reach", 0.0, "--reach = 0.0: must be above 0 and at most 1"),
        ("price", -1.0, "--price = -1.0: must be at least 0"),
        ("response", float("nan"), "--response = nan: must be above 0"),
        ("response", 9.0, "--response = 9.0: the most is sampling.max_new_tokens = 8"),
        ("spread", float("inf"), "--spread = inf: must be at least 0"),
        ("queries", 0, "--queries = 0: must be at least 1"),
        ("prompt", 121, "--prompt = 121: the most is data.max_prompt = 120"),
        ("distinct", 0.25, "--right = 0.5: copies count as wrong, so at most distinct = 0.25"),
        ("distinct_warm_up", 1.5, "--distinct_warm_up = 1.5: must be above 0 and at most 1"),
    ],
)
def test_flags_that_mean_nothing(flag, value, message):
    flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(response=5.0):
        assert plan.assumptions(small()).prompt == 120
    with (
        flagsaver.flagsaver(**{"response": 5.0, flag: value}),
        pytest.raises(ValueError, match=re.escape(message)),
    ):
        plan.assumptions(small())


def test_how_many_queries_there_are():
    """The embedded set's own number, but not of another data set."""
    flags.FLAGS.mark_as_parsed()
    config = small()
    with flagsaver.flagsaver(queries=500):
        assert plan.assumptions(config).queries == config.data.figures.train
        config.data.labelled = "elsewhere.json"
        assert plan.assumptions(config).queries == 500


def test_where_nothing_can_be_written(tmp_path):
    with pytest.raises(ValueError, match="is a folder; name a file in it, .*plan.json"):
        plan.check_output(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="--out=.*plan.json: the folder .*file cannot be made"):
        plan.check_output(tmp_path / "file" / "plan.json")


def made_up(title="a program", flops=8 * 98.5e12):
    return Program(title, None, (), lambda: {"language": flops}, lambda: {"weights": 10**9}, 8, 128)


MEMORY = {"arguments": 3e9, "outputs": 1e9, "temporary": 2e9, "code": 0.0, "shared": 1e9}


@pytest.mark.parametrize(
    ("asked", "found", "message"),
    [
        (
            ["train"],
            ["train"],
            "--programs leaves out rollouts, evaluation; the rates of 'cpu' are not known",
        ),
        (["rollouts", "train", "evaluation"], ["train"], "rollouts, evaluation did not fit; the rates"),
    ],
)
def test_why_there_is_no_estimate(asked, found, message):
    flags.FLAGS.mark_as_parsed()
    config = small()
    config.prm.queries = 0
    programs = Programs(config, sharding.make_mesh(**config.mesh))
    made = dict.fromkeys(found, plan.Fitting(programs, [], {}))
    with flagsaver.flagsaver(programs=asked, out="plan.json"):
        text = plan.run_of(programs, made, None, "Phi35")
    assert text.startswith(f"without an estimate of the whole run: {message}")
    assert text.endswith(" are not known (try --measure); plan.json is not written")


def test_what_does_not_fit_is_tried_again(monkeypatch):
    tries = []

    def compile_cost(*args, loop):
        tries.append(args)
        if len(tries) < 3:
            raise cost.TooLarge("needs 2G of 1G")
        gathered = hlo.Collective("all-gather", 16 * 10**8, 16, 2)
        return cost.Cost(MEMORY, hlo.Work(197e12, 819e9, (gathered,)))

    monkeypatch.setattr(plan, "compile_cost", compile_cost)
    monkeypatch.setattr(plan, "chip_of", lambda kind: flops.CHIPS["TPU v5 lite"])
    monkeypatch.setattr(Programs, "make", lambda self, kind: [made_up()])
    config = small()
    config.evolve.batch = config.warmup.batch = config.prm.batch = 32
    found = {}
    lines = list(plan.plan(config, "train", jax.devices(), True, found))
    assert lines[0] == lines[2] == "a program\n  does not fit: needs 2G of 1G"
    assert lines[3] == "with --config.train.remat=full --config.train.accumulate=2"
    assert "memory    5.00 of 17 GB" in lines[4]  # the output aliases the arguments
    assert "network   3.000 GB received: all-gather 3.000" in lines[4]
    assert "compute 1000.0, memory 1000.0, network 15.0 ms" in lines[4] and "MFU at most 50 %" in lines[4]
    assert "819.00 GB read and written, 819.00 times the 1.00 that have to be: weights 1.00" in lines[4]
    assert found["train"].programs.config.train.accumulate == 2  # what is printed later is of these settings
    tries.clear()
    assert len(list(plan.plan(config, "train", jax.devices(), False, {}))) == 1


def test_a_program_may_fit_alone_and_not_in_its_stage(monkeypatch):
    """The policy's state lies beside what samples; without its moments there is room."""
    chip = flops.Chip(12e9, 1e12, 1e12, 1e12)
    monkeypatch.setattr(plan, "chip_of", lambda kind: chip)
    monkeypatch.setattr(plan, "compile_cost", lambda *_, loop: cost.Cost(MEMORY, hlo.Work(1e9, 1e9, ())))
    monkeypatch.setattr(Programs, "make", lambda self, kind: [made_up()])
    moments = {False: 6 * 10**9, True: 0}
    beside = lambda programs, kind: (3 * 10**9, moments[programs.config.train.offload_optimizer])  # noqa: E731
    monkeypatch.setattr(residency, "beside", beside)
    found = {}
    lines = list(plan.plan(small(), "score", jax.devices(), True, found))
    assert lines[0] == "a program\n  does not fit: needs 5.00 GB, and 9.00 beside them, of 12"
    assert lines[1] == "with --config.train.offload_optimizer=True" and len(lines) == 3
    line = "| score | a program | 3.0 + 0.0 + 5.0 = 8.0 | 1.0 GB | 1.0 GB | 1.00 |"
    assert f"{line} 1.0 ms, compute | 100 % |" in plan.stages_table(found, chip)
    assert f"{line}  |  |" in plan.stages_table(found, None)


def test_a_program_that_is_not_shown():
    text = plan.describe(made_up(), cost.Cost(MEMORY, None), None, 8, 8e12)
    assert "memory    5.00 GB" in text and "1.000 TFLOP of its own" in text
    assert text.endswith("not known, the compiler does not show it; 1.00 GB have to be moved")


# ---- chips that are not here --------------------------------------------------------------------------


def test_topologies_that_are_not_known():
    with pytest.raises(ValueError, match="h100:9: expected the GPUs of one host, at most 8, e.g. h100:8"):
        topology.devices_of("h100:9")
    with pytest.raises(ValueError, match="--topology=H100: expected the GPUs of one host"):
        topology.devices_of("H100")
    with pytest.raises(ValueError, match="b200:8: .*or one of h100:8, h200:8, a100:8"):
        topology.devices_of("b200:8")


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is not None, reason="it is installed")
def test_without_the_plugin():
    with pytest.raises(ValueError, match="plan-gpu"):
        topology.devices_of("h100:8")


@pytest.mark.parametrize("name", topology.GPUS)
def test_programs_of_absent_gpus(name):
    """Attention through cuDNN, decoding through the kernels, every layer of the stack read once a step."""
    pytest.importorskip("jax_plugins.xla_cuda12")
    devices = topology.devices_of(f"{name}:8")
    assert len(devices) == 8 and flops.chip_of(devices[0].device_kind) is not None
    config = small()
    config.sampling.dtype = config.train.dtype = "bfloat16"
    mesh = sharding.make_mesh(data=1, fsdp=8, devices=devices)
    with topology.without_driver(devices[0]), jax.set_mesh(mesh):
        programs = Programs(config, mesh)
        [(score, scored)] = plan.costs_of(programs, "score", flops.chip_of(devices[0].device_kind))
        _, (step, stepped) = plan.costs_of(programs, "rollouts", None)
    assert 0.7 * scored.work.flops < sum(score.own().values()) / 8 < 1.4 * scored.work.flops
    least = sum(step.least().values())
    assert least <= stepped.work.bytes < 3 * least  # at this size, activations weigh as much as weights
    assert not scored.work.unknown and not stepped.work.unknown
