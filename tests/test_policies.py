"""Every policy's config, shrunk: from a small checkpoint in the official format through the whole loop."""

import dataclasses
import json
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_internvl2
import test_internvl3
import test_qwen3vl
import test_qwen25vl
import test_smolvlm
import tiny
import tiny_minicpm
from safetensors.numpy import load_file
from transformers import GenerationConfig, PreTrainedTokenizerFast

from mstar_jax import evolve, export, finished, main, models, records, sharding
from mstar_jax.data import figures, toy
from mstar_jax.inference.generate import Stopped
from mstar_jax.models import (
    hf,
    internvl_chat,
    internvl_hf,
    minicpmv25,
    phi35,
    qwen3vl,
    qwen25vl,
    smolvlm,
    vlm,
)
from mstar_jax.report import page
from mstar_jax.rewards import selection
from mstar_jax.structs import Stage

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
SMALL = {
    "data.validation": 4,
    "data.test": 4,
    "data.workers": 0,
    "data.max_prompt": 400,
    "data.buckets": (160, 256, 448),
    "warmup.queries": 6,
    "warmup.k": 2,
    "warmup.steps": 2,
    "warmup.warmup_steps": 0,
    "warmup.learning_rate": 1e-3,  # the same schedule as the one iteration has, so one program
    "warmup.batch": 8,
    "evolve.iterations": 1,
    "evolve.steps": 2,
    "evolve.k": 2,
    "evolve.batch": 8,
    "evolve.learning_rate": 1e-3,
    "prm.queries": 3,
    "prm.held_out": 1,
    "prm.k": 2,
    "prm.completions": 1,
    "prm.samples": 2,
    "prm.rows": 8,
    "prm.batch": 8,
    "prm.longest": 448,
    "prm.steps": 2,
    "prm.warmup_steps": 0,
    "explore.temperatures": (1.0,),
    "explore.samples": 1,
    "explore.batch": 8,
    "sampling.batch": 8,
    "sampling.max_new_tokens": 6,
    "eval.samples": 1,  # with the greedy one two branches, as in sampling: one program less
    "eval.k": 1,
    "train.save_every": 1,
    "train.accumulate": 1,
    "train.lora.rank": 0,
}


def roomy(config):
    """With a context that holds these prompts."""
    decoder = dataclasses.replace(config.decoder, max_position=1024, original_max_position=1024)
    return dataclasses.replace(config, decoder=decoder)


def phi35_policy(words):
    phi35.make_tokenizer(tiny.TEXTS, words, tiny.VOCAB)
    return models.FromScratch(phi35.FAMILY, roomy(tiny.config()), words)


def internvl2_policy(words):
    test_internvl2.make_words(words)
    return models.FromScratch(internvl_chat.FAMILY, roomy(test_internvl2.CONFIG), words)


def minicpmv25_policy(words):
    tiny_minicpm.processor(words)
    return models.FromScratch(minicpmv25.FAMILY, roomy(tiny_minicpm.config()), words)


def smolvlm_policy(words):
    test_smolvlm.make_words(words)
    return models.FromScratch(smolvlm.FAMILY, roomy(test_smolvlm.CONFIG), words)


def internvl3_policy(words):
    test_internvl3.make_words(words)
    return models.FromScratch(internvl_chat.FAMILY, roomy(test_internvl3.CHAT["qwen2"]), words)


def internvl3_hf_policy(words):
    """InternVL3.5 with a chat template that opens a `<think>` block."""
    test_internvl3.make_words(words, test_internvl3.THINKING)
    return models.FromScratch(internvl_hf.FAMILY, roomy(test_internvl3.HF["qwen3"]), words)


def qwen25vl_policy(words):
    test_qwen25vl.make_words(words)
    return models.FromScratch(qwen25vl.FAMILY, roomy(test_qwen25vl.CONFIG), words)


def qwen3vl_policy(words):
    test_qwen25vl.make_words(words)
    return models.FromScratch(qwen3vl.FAMILY, roomy(test_qwen3vl.CONFIG), words)


TEMPLATED = ("smolvlm", "internvl3:hf", "qwen_vl", "qwen3_vl")  # the others' prompts are their code's
FAMILIES = {
    "phi35": phi35_policy,
    "internvl2": internvl2_policy,
    "minicpmv25": minicpmv25_policy,
    "smolvlm": smolvlm_policy,
    "internvl3": internvl3_policy,
    "internvl3:hf": internvl3_hf_policy,
    "qwen_vl": qwen25vl_policy,
    "qwen3_vl": qwen3vl_policy,
}


def ends(folder):
    """The tokens that end a response for whatever reads the folder with transformers, as servers do."""
    return GenerationConfig.from_pretrained(folder).eos_token_id


@pytest.mark.parametrize("name", FAMILIES)
def test_servers_end_responses_and_write_prompts_as_here(name, tmp_path):
    """With what transformers reads of an exported folder: it names every stop token, before others that the
    folder had, and where prompts are a chat template's, it is there and writes the same prompt."""
    made = FAMILIES[name](tmp_path / "words")
    folder = tmp_path / "official"
    folder.mkdir()
    hf.copy_files(made.folder, folder)
    for file, values in made.family.config_files(made.config, "float32").items():
        (folder / file).write_text(json.dumps(values))
    policy = models.Pretrained(folder)
    stops = policy.processor().stop_ids
    assert len(set(stops)) == len(stops) >= 1
    for number, there in enumerate(
        (None, {}, {"eos_token_id": 5, "top_k": 7}, {"eos_token_id": [stops[-1]]})
    ):
        output = tmp_path / str(number)
        output.mkdir()
        hf.copy_files(folder, output)
        if there is not None:
            (output / "generation_config.json").write_text(json.dumps(there))
        export.complete(policy, output)
        had = {2: [5], 3: [stops[-1]]}.get(number, [])
        assert ends(output) == [*had, *(token for token in stops if token not in had)]
        assert json.loads((output / "generation_config.json").read_text()).get("top_k") == (there or {}).get(
            "top_k"
        )
        again = (output / "generation_config.json").read_bytes()
        export.complete(policy, output)
        assert (output / "generation_config.json").read_bytes() == again
    used = getattr(policy.family.load_tokenizer(folder), "chat_template", None)
    assert PreTrainedTokenizerFast.from_pretrained(output).chat_template == used
    assert used or name not in TEMPLATED


@pytest.mark.timeout(1200)  # some images have several numbers of crops, each with programs of its own
@pytest.mark.parametrize(
    ("name", "reward_model"),
    [
        ("minicpmv25", False),  # its pixels are a tuple of arrays
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in FAMILIES),
    ],
)
def test_checkpoint_in_loop_checkpoint_out(name, reward_model, tmp_path, monkeypatch):
    folder, work = tmp_path / "official", tmp_path / "work"
    policy = FAMILIES[name](tmp_path / "words")
    policy.save(policy.build(), folder, "bfloat16")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    sizes = {"train": 24, "unlabelled": 2, "validation": 4, "test": 4}
    data = toy.make(tmp_path / "figures", seed=0, **sizes, captions=4, arithmetic=4, instruct=4)
    config = runpy.run_path(str(CONFIGS / f"{name.partition(':')[0]}.py"))["get_config"]()
    config.update_from_flattened_dict(
        SMALL | {"policy.path": str(folder), "data.labelled": str(data / "train.json")}
    )
    if not reward_model:
        config.prm.queries, config.evolve.select, config.explore.every = 0, "random", 0
    config.lock()
    monkeypatch.setattr(selection, "correct", list)  # so small a policy is never right
    work.mkdir()
    (work / "config.json").write_text(config.to_json_best_effort())
    with jax.set_mesh(sharding.make_mesh(**config.mesh)):
        stages = evolve.evolve(config, work, {}, lambda: False)
    assert [(s["stage"], s["split"]) for s in stages][:2] == [("base", "validation"), ("base", "test")]
    assert all(s["n"] and s.get("length", 1) > 0 for s in stages)
    assert [s["iteration"] for s in stages if s["stage"] == "iteration"] == [1, 1]

    assert export.export(work, tmp_path / "out") == Stage.iteration(1)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[k].dtype == after[k].dtype and before[k].shape == after[k].shape for k in before)
    changed = [k for k in before if before[k].tobytes() != after[k].tobytes()]
    assert len(changed) > len(before) // 2
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and path.name != "generation_config.json":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert set(models.Pretrained(folder).processor().stop_ids) <= set(ends(tmp_path / "out"))
    if reward_model:
        assert export.export(work, tmp_path / "reward", Stage.reward_model) == Stage.reward_model
        there = models.Pretrained(tmp_path / "reward").load_reward(jnp.float32)
        assert np.isfinite(np.asarray(there.weight[...])).all() and float(there.likelihood[...]) != 0.3
    trained, _ = models.load(tmp_path / "out", jnp.float32)
    for leaf in jax.tree.leaves(trained):
        assert np.isfinite(np.asarray(leaf)).all()


@pytest.mark.slow
@pytest.mark.parametrize("reward_model", [False, True])
def test_a_policy_that_is_never_right_ends_with_a_table_and_a_report(tmp_path, reward_model):
    folder, work = tmp_path / "official", tmp_path / "work"
    policy = FAMILIES["phi35"](tmp_path / "words")
    policy.save(policy.build(), folder, "bfloat16")
    sizes = {"train": 24, "unlabelled": 2, "validation": 4, "test": 4}
    data = toy.make(tmp_path / "figures", seed=0, **sizes, captions=4, arithmetic=4, instruct=4)
    config = runpy.run_path(str(CONFIGS / "phi35.py"))["get_config"]()
    given = {"policy.path": str(folder), "data.labelled": str(data / "train.json")}
    config.update_from_flattened_dict(SMALL | given)
    if not reward_model:
        config.prm.queries, config.evolve.select, config.explore.every = 0, "random", 0
    work.mkdir()
    (work / "config.json").write_text(config.to_json_best_effort())
    with jax.set_mesh(sharding.make_mesh(**config.mesh)):
        found = evolve.evolve(config, work, main.head(config), lambda: False)
    first = "Nothing was trained in warmup, iteration 1, for no response was kept. What became of them: "
    assert records.table(found).startswith(first)
    assert "rollouts: decode" in records.speeds(found)
    assert page.write([work]).exists()


@pytest.mark.slow
def test_a_checkpoint_learns_to_see_first(tmp_path):
    """The tower and the connector are aligned, with the decoder as it came, and then all is trained, on the
    larger embedded data; stopped while it aligns, the run goes on there."""
    folder = tmp_path / "official"
    policy = FAMILIES["phi35"](tmp_path / "words")
    policy.save(policy.build(), folder, "float32")
    config = runpy.run_path(str(CONFIGS / "phi35.py"))["get_config"]()
    config.update_from_flattened_dict(SMALL | {
        "policy.path": str(folder), "data.embedded": "figures", "data.figures.train": 8,
        "data.figures.unlabelled": 2, "data.figures.validation": 4, "data.figures.test": 6,
        "data.figures.captions": 8, "data.figures.arithmetic": 8, "data.figures.instruct": 8,
        "align.steps": 3, "align.batch": 8, "align.learning_rate": 1e-2, "base.tune": True, "base.steps": 3,
        "base.batch": 8, "base.learning_rate": 1e-2, "base.check_from": 9, "base.check_queries": 2,
        "base.mix": {"caption": 0.5, "arithmetic": 0.2, "cot": 0.1, "hint": 0.1, "direct": 0.1},
        "prm.queries": 0, "evolve.select": "random", "explore.every": 0, "warmup.steps": 0,
        "warmup.queries": 2, "data.test": 6, "eval.test_at": ("base",), "train.log_every": 1,
    })  # fmt: skip
    work = tmp_path / "work"
    work.mkdir()
    (work / "config.json").write_text(config.to_json_best_effort())
    polls = iter((False, True))
    with jax.set_mesh(sharding.make_mesh(**config.mesh)):
        with pytest.raises(Stopped, match="align: stopped and saved after step 2 of 3"):
            evolve.evolve(config, work, {}, lambda: next(polls))
        found = evolve.evolve(config, work, {}, lambda: False)
    given = sharding.named(models.load(folder, jnp.float32)[0])
    stages = (Stage.align, Stage.base)
    aligned, base = (sharding.named(finished.restore(work, stage).params) for stage in stages)
    moved = {name for name in given if not np.array_equal(aligned[name], given[name])}
    assert moved and not any(name.startswith("decoder.") for name in moved)
    assert any(name.startswith("decoder.") and not np.array_equal(base[name], given[name]) for name in given)
    (record,) = [r for r in found if (r["stage"], r["split"]) == ("base", "test")]
    assert {part: values["n"] for part, values in record["parts"].items()} == dict.fromkeys(figures.PARTS, 2)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [{}, {"prm.token": "+", "prm.against": "-", "prm.mark": "<|im_end|>"}])
def test_a_reward_model_of_another_family(tmp_path, monkeypatch, asked):
    """InternVL2's architecture scores what Phi-3.5-vision's writes, by a head or a token."""
    folder, work = tmp_path / "official", tmp_path / "work"
    policy = FAMILIES["phi35"](tmp_path / "words")
    policy.save(policy.build(), folder, "bfloat16")
    judge = FAMILIES["internvl2"](tmp_path / "other")
    built = judge.build(1)
    judge.save(built if asked else vlm.RewardModel(built), tmp_path / "judge", "bfloat16")
    sizes = {"train": 24, "unlabelled": 2, "validation": 4, "test": 4}
    data = toy.make(tmp_path / "figures", seed=0, **sizes, captions=4, arithmetic=4, instruct=4)
    config = runpy.run_path(str(CONFIGS / "phi35.py"))["get_config"]()
    given = {"policy.path": str(folder), "data.labelled": str(data / "train.json")}
    config.update_from_flattened_dict(SMALL | given | asked | {"prm.path": str(tmp_path / "judge")})
    monkeypatch.setattr(selection, "correct", list)
    work.mkdir()
    with jax.set_mesh(sharding.make_mesh(**config.mesh)):
        records = evolve.evolve(config, work, {}, lambda: False)
    assert not any(record["stage"] == "prm" for record in records)  # it was trained elsewhere
    assert all("reward_pass_at_2" in record for record in records if record["stage"] != "base")
    lines = (work / "scores" / "iteration_01" / "00000.jsonl").read_text().splitlines()
    scores = [s for line in lines for r in json.loads(line)["responses"] for s in r["step_scores"]]
    assert scores and all(0 <= s <= 1 for s in scores) and len(set(scores)) > 2


def test_what_has_to_be_given_is_asked_for(tmp_path):
    config = runpy.run_path(str(CONFIGS / "phi35.py"))["get_config"]()
    with pytest.raises(ValueError, match=r"policy.path is not set: .*--config.policy.path"):
        evolve.evolve(config, tmp_path, {}, lambda: False)
    config.policy.path = str(tmp_path)
    with pytest.raises(ValueError, match=r"data.labelled is not set: .*--config.data.labelled"):
        evolve.evolve(config, tmp_path, {}, lambda: False)
    assert not list(tmp_path.iterdir())


def test_the_last_of_many_iterations_is_exported(tmp_path):
    """By number: as text, 99 comes after 100."""
    for name in ("base", "warmup", "prm", "iteration_09", "iteration_10", "iteration_99", "iteration_100"):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "done.json").write_text("{}")
    (tmp_path / "checkpoints" / "iteration_101").mkdir()  # not finished
    assert finished.finished(tmp_path) == Stage.iteration(100)
    assert finished.finished(tmp_path, Stage.iteration(99)).name == "iteration_99"


def test_export_refuses(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="is no run: it holds no config.json"):
        export.export(tmp_path, tmp_path / "out")
    config = runpy.run_path(str(CONFIGS / "tiny.py"))["get_config"]()
    (tmp_path / "config.json").write_text(json.dumps(json.loads(config.to_json_best_effort())))
    with pytest.raises(ValueError, match="no finished training of any stage; there is none"):
        export.export(tmp_path, tmp_path / "out")
    broken = tiny.model()
    broken.decoder.norm[...] = broken.decoder.norm[...].at[3].set(np.nan)
    found = finished.Restored(None, Stage.iteration(2), broken)
    monkeypatch.setattr(finished, "restore", lambda *_: found)
    with pytest.raises(
        ValueError,
        match=r"iteration_02 has values that are not finite in 1 of \d+ parameters, such as decoder",
    ):
        export.export(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("")
    with pytest.raises(ValueError, match="out exists and is not empty: nothing is overwritten"):
        export.export(tmp_path, tmp_path / "out")
