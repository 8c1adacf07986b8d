"""Checkpoints in Hugging Face format: in, out, and what is said when one does not fit."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from close import POLICY, close
from safetensors.numpy import load_file, save_file

from mstar_jax import models, sharding
from mstar_jax.models import head, hf, phi35, vlm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny policy in the official format, in bfloat16."""
    path = tmp_path_factory.mktemp("policy")
    words = tmp_path_factory.mktemp("tokenizer")
    phi35.make_tokenizer(tiny.TEXTS, words, tiny.VOCAB)
    models.FromScratch(phi35.FAMILY, tiny.config(), words).save(tiny.model(), path, "bfloat16")
    (path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return path


def copy(source, target, change):
    """The checkpoint with its tensors changed in place by `change`."""
    target.mkdir()
    hf.copy_files(source, target)
    values = load_file(source / "model.safetensors")
    change(values)
    save_file(values, target / "model.safetensors")
    return target


def leaves(model):
    return {name: np.asarray(leaf) for name, leaf in sharding.named(model).items()}


def test_what_is_written_is_what_was_there(folder):
    model, processor = models.load(folder, jnp.float32)
    want = {k: v.astype(jnp.bfloat16).astype(np.float32) for k, v in leaves(tiny.model()).items()}
    got = leaves(model)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    assert model.config == tiny.config() and processor.config == model.config
    assert processor.decode(processor.encode_response("Step 1: 12.")) == "Step 1: 12."


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_then_export_is_bit_for_bit(folder, tmp_path, dtype):
    source = models.Pretrained(folder)
    source.save(source.load(dtype), tmp_path / "out")
    there, here = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert there.keys() == here.keys()
    for name in there:
        assert there[name].dtype == here[name].dtype
        assert there[name].tobytes() == here[name].tobytes(), name
    same = [p.name for p in folder.iterdir() if p.suffix != ".safetensors"]
    assert "generation_config.json" in same and "tokenizer.json" in same
    for name in same:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()


def test_shards_read_and_written_as_they_were(folder, tmp_path):
    """Three files with their index: read in any order, written with the same tensors in each."""
    values = load_file(folder / "model.safetensors")
    split = tmp_path / "split"
    split.mkdir()
    hf.copy_files(folder, split)
    names = list(values)
    for i in range(3):
        save_file({n: values[n] for n in names[i::3]}, split / f"model-{i + 1:05d}-of-00003.safetensors")
    (split / "model.safetensors.index.json").write_text("{}")
    source = models.Pretrained(split)
    source.save(source.load(jnp.float32), tmp_path / "out")
    for path in split.glob("*.safetensors"):
        there, here = load_file(path), load_file(tmp_path / "out" / path.name)
        assert there.keys() == here.keys()
        assert all(there[n].tobytes() == here[n].tobytes() for n in there)


def test_new_checkpoints_are_split_by_size(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "SHARD", 20_000)
    phi35.make_tokenizer(tiny.TEXTS, tmp_path / "words", tiny.VOCAB)
    models.FromScratch(phi35.FAMILY, tiny.config(), tmp_path / "words").save(tiny.model(), tmp_path)
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    got = leaves(models.load(tmp_path, jnp.float32)[0])
    for name, value in leaves(tiny.model()).items():
        np.testing.assert_array_equal(got[name], value)


def test_every_fault_is_reported_at_once(folder, tmp_path):
    def change(values):
        del values["model.norm.weight"]
        values["model.layers.0.mlp.down_proj.weight"] = np.zeros((3, 4), np.float32)
        values["model.layers.0.extra"] = np.zeros(3, np.float32)
        values["lm_head.weight"] = values["lm_head.weight"].astype(np.int32)

    broken = copy(folder, tmp_path / "broken", change)
    with pytest.raises(ValueError) as error:
        models.load(broken)
    text = str(error.value)
    for part in (
        "4 tensors do not fit the model",
        "missing: model.norm.weight",
        "unexpected: model.layers.0.extra",
        r"misshapen: model.layers.0.mlp.down_proj.weight is (3, 4), the config says (32, 48)",
        "unreadable: lm_head.weight holds I32",
    ):
        assert part in text


def test_a_copy_of_an_embedding_is_no_further_tensor(folder, tmp_path):
    """Read under any second name, and written again with it; another tensor, or other values, are refused."""
    extra = "model.vision_embed_tokens.wte.weight"

    def copied(values):
        values[extra] = values["model.embed_tokens.weight"].copy()

    there = copy(folder, tmp_path / "copied", copied)
    source = models.Pretrained(there)
    model = source.load(jnp.float32)
    model.decoder.embedding[...] += 1.0
    source.save(model, tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")
    assert written[extra].tobytes() == written["model.embed_tokens.weight"].tobytes()
    assert written[extra].tobytes() != load_file(there / "model.safetensors")[extra].tobytes()

    def other(values):
        copied(values)
        values[extra][3, 4] += 1
        values["model.extra_norm.weight"] = values["model.norm.weight"].copy()  # equal, but an operation more

    with pytest.raises(ValueError, match="2 tensors do not fit") as error:
        models.load(copy(folder, tmp_path / "other", other))
    assert f"unexpected: {extra}" in str(error.value) and "unexpected: model.extra_norm" in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.self_attn.qkv_proj.weight", "lm_head.weight"]
)
def test_weights_that_are_not_finite_are_refused(folder, tmp_path, name, value):
    def change(values):
        values[name].reshape(-1)[-2:] = value

    broken = copy(folder, tmp_path / "broken", change)
    with pytest.raises(ValueError, match=f"2 of .* values of {name} are NaN or infinite"):
        models.load(broken)


def test_folders_that_are_no_checkpoint(folder, tmp_path):
    with pytest.raises(ValueError, match="no such folder, and a hub id would be owner/name"):
        models.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"config.json"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(
        ValueError, match="model_type 'llava' is none of phi3_v, internvl_chat, internvl, minicpmv"
    ):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "phi3_v"}')
    with pytest.raises(ValueError, match="config.json: 'max_position_embeddings' is missing"):
        models.load(tmp_path)
    half = copy(folder, tmp_path / "half", lambda values: None)
    data = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"half/model.safetensors: .*is the file complete\?"):
        models.load(half)
    (half / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \*.safetensors file"):
        models.load(half)


def test_straight_into_a_sharding(folder):
    """Every device gets its own shards, and together they are the whole."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    whole, _ = models.load(folder, jnp.float32)
    model = models.Pretrained(folder).load(jnp.float32, mesh=mesh)
    layout = sharding.shardings(jax.eval_shape(lambda: whole), sharding.TRAIN, mesh)
    cut, parts = 0, [sharding.named(whole), sharding.named(model), sharding.named(layout)]
    for name, a, b, s in [(name, *(part[name] for part in parts)) for name in parts[0]]:
        assert b.sharding == s, name
        np.testing.assert_array_equal(np.asarray(b), np.asarray(a), err_msg=name)
        cut += b.addressable_shards[0].data.size < b.size
    assert cut > 15


def test_no_layer_is_taken_for_another(folder, tmp_path):
    """A change in one tensor changes its own parameters' layer and nothing else."""

    def change(values):
        values["model.layers.1.self_attn.qkv_proj.weight"][...] += 1.0

    before, after = (
        leaves(models.load(path, jnp.float32)[0])
        for path in (folder, copy(folder, tmp_path / "changed", change))
    )
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"decoder.blocks.q", "decoder.blocks.k", "decoder.blocks.v"}
    for name in changed:
        np.testing.assert_array_equal(before[name][0], after[name][0])
        assert (before[name][1] != after[name][1]).all()


def with_tensors(folder, output, **further):
    """The checkpoint with further tensors among its own."""
    shutil.copytree(folder, output)
    path = sorted(output.glob("*.safetensors"))[-1]
    save_file(load_file(path) | further, path)
    return models.Pretrained(output)


@pytest.mark.parametrize(("shape", "bias"), [((32,), None), ((1, 32), ()), ((32, 1), (1,))])
def test_a_reward_model_of_others_has_its_head_under_any_name(folder, tmp_path, shape, bias):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype(np.float32)
    further = {"v_head.summary.weight": weight}
    if bias is not None:
        further["v_head.summary.bias"] = np.full(bias, 0.25, np.float32)
    theirs = with_tensors(folder, tmp_path / "theirs", **further)
    batch = tiny.stack([tiny.row(rng, [(0, 20), (1, 5), (2, 4)], 32)])
    reward = theirs.load_reward(jnp.float32)
    hidden = np.asarray(reward.trunk.hidden(batch), np.float64)
    expected = hidden @ weight.reshape(-1) + (0 if bias is None else 0.25)
    close(reward(batch)[0], expected, POLICY)


def test_a_head_that_is_not_certain_is_asked_for(folder, tmp_path):
    two = {f"{name}.weight": np.full((1, 32), value, np.float32) for name, value in (("a", 1), ("b", 2))}
    theirs = with_tensors(folder, tmp_path / "two", **two)
    with pytest.raises(ValueError, match="several tensors may be the head: a.weight, b.weight; .* prm.head"):
        theirs.load_reward(jnp.float32)
    with pytest.raises(ValueError, match="prm.head=c.weight is no further tensor of 32 values"):
        theirs.load_reward(jnp.float32, chosen="c.weight")
    chosen = theirs.load_reward(jnp.float32, chosen="b.weight")
    np.testing.assert_allclose(chosen.weight[...], np.full(32, 2 * 32**0.5), rtol=1e-6)
    biases = {"b.bias": np.zeros(1, np.float32), "b.offset": np.zeros(1, np.float32)}
    theirs = with_tensors(folder, tmp_path / "biases", **{"b.weight": two["b.weight"]}, **biases)
    with pytest.raises(ValueError, match="the bias of b.weight: b.bias, b.offset"):
        theirs.load_reward(jnp.float32)


def test_what_a_token_scores_with_has_no_head(folder, tmp_path):
    models.Pretrained(folder).check_headless()
    theirs = with_tensors(folder, tmp_path / "theirs", **{"v_head.weight": np.zeros((1, 32), np.float32)})
    with pytest.raises(ValueError, match="unexpected: v_head.weight"):
        theirs.check_headless()
    shutil.copytree(folder, tmp_path / "own")
    (tmp_path / "own" / hf.HEAD).write_bytes(b"")
    with pytest.raises(ValueError, match=f"own has a head, {hf.HEAD}, .*: leave prm.token empty"):
        models.Pretrained(tmp_path / "own").check_headless()


@pytest.mark.parametrize("mesh", [None, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_reward_model_is_a_policy_and_a_head(folder, tmp_path, mesh):
    mesh = mesh and sharding.make_mesh(**mesh)
    source = models.Pretrained(folder)
    reward = vlm.RewardModel(source.load(jnp.float32))
    rng = np.random.default_rng(0)
    batch = tiny.stack([tiny.row(rng, [(0, 20), (1, 5), (2, 4)], 32)])
    reward.weight[...] = jnp.asarray(rng.normal(size=32), jnp.float32)
    reward.bias[...], reward.likelihood[...] = jnp.float32(0.5), jnp.float32(0.2)
    source.save(reward, tmp_path / "reward")
    assert load_file(tmp_path / "reward" / hf.HEAD)["score.weight"].shape == (1, 32)
    again = models.Pretrained(tmp_path / "reward").load_reward(jnp.float32, mesh=mesh)
    for name in head.NAMES:
        np.testing.assert_array_equal(getattr(again, name)[...], getattr(reward, name)[...])
    (scores, logprobs), hidden = reward(batch), reward.trunk.hidden(batch)
    for ours, theirs in zip(again(batch), (scores, logprobs)):
        close(ours, theirs, POLICY)
    policy, _ = models.load(tmp_path / "reward", jnp.float32)
    close(policy.hidden(batch), hidden, POLICY)
    with pytest.raises(ValueError, match="a policy's folder has no head"):
        source.load_reward()
    reward.bias[...] = jnp.float32(jnp.nan)
    source.save(reward, tmp_path / "diverged")
    with pytest.raises(ValueError, match="1 of 1 values of score.bias are NaN"):
        models.Pretrained(tmp_path / "diverged").load_reward(jnp.float32, mesh=mesh)


def test_crops_of_a_policy_are_for_checkpoints_of_the_same_model(folder):
    own = models.Pretrained(folder).config.num_crops
    found = [
        models.pretrained(folder, models.FAMILIES.get(name), own + 1) for name in ("phi3_v", "minicpmv", "")
    ]
    assert [each.config.num_crops for each in found] == [own + 1, own, own]
    assert models.FAMILIES["internvl"].model is models.FAMILIES["internvl_chat"].model  # its two formats
