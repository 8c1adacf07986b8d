"""The decoder's biases and norms of queries and keys: against transformers' Qwen2 and Qwen3, random weights,
fp32."""

import types

import jax
import numpy as np
import pytest
from close import POLICY, REFERENCE, close, likeliest
from flax import nnx
from safetensors.numpy import load_file
from tiny import generate

from mstar_jax import sharding
from mstar_jax.inference.draw import SamplingConfig
from mstar_jax.models import hf, layers, names
from mstar_jax.models.vlm import VisionLanguageModel
from mstar_jax.structs import Batch

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

SIZES = {"vocab_size": 120, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
SIZES |= {"rms_norm_eps": 1e-6}
KINDS = {  # heads that divide the width, and heads that do not, as Qwen3's
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**SIZES), {"qkv_bias": True}),
    "qwen3": (
        transformers.Qwen3ForCausalLM,
        transformers.Qwen3Config(**SIZES, head_dim=8),
        {"qk_norm": True},
    ),
}


class Text(VisionLanguageModel):
    """The decoder alone: its rows hold no images."""

    def __init__(self, config, rngs):
        self.decoder = layers.Decoder(config, rngs)


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """transformers' model, its folder, and ours read from it."""
    made, config, options = KINDS[request.param]
    theirs = made(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + ("norm" in name))
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    values = hf.read_json(folder / "config.json")
    ours = names.decoder_config(values, "config.json:", **options)
    assert (ours.qkv_bias, ours.qk_norm) == (request.param == "qwen2", request.param == "qwen3")
    assert ours.head_dim == getattr(config, "head_dim", 6) and ours.rope_theta == 10000
    return theirs, folder, load(folder, ours)


def load(folder, config):
    abstract = jax.eval_shape(lambda: Text(config, nnx.Rngs(0)))
    table = names.llama(config, "model.")
    return hf.load_params(folder, table, abstract, layout=None, own={}, dtype=np.dtype("float32"))


def batch(runs, length):
    """One row for each list of token runs: a prompt and its branches."""
    tokens, branch = (np.full((len(runs), length), fill, np.int32) for fill in (0, -1))
    for row, own in enumerate(runs):
        size = sum(map(len, own))
        tokens[row, :size] = np.concatenate(own)
        branch[row, :size] = np.repeat(np.arange(len(own)), list(map(len, own)))
    none = np.zeros((len(runs), 0, 4, 4, 3), np.float32)
    return Batch(tokens, branch, (branch > 0).astype(np.float32), np.full_like(tokens, -1), none)


@jax.jit
def outputs(policy, rows):
    """Hidden states, and the logits there."""
    hidden = policy.hidden(rows)
    return hidden, policy.logits(hidden)


def prompts(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, SIZES["vocab_size"], length) for length in lengths]


def test_hidden_states_and_logits(pair):
    theirs, _, policy = pair
    asked = prompts(9, 24, 1)
    hidden, logits = outputs(policy, batch([[one] for one in asked], 24))
    for row, one in enumerate(asked):
        with torch.no_grad():
            found = theirs(torch.tensor(one)[None], output_hidden_states=True)
        close(hidden[row, : len(one)], found.hidden_states[-1][0], REFERENCE)
        close(logits[row, : len(one)], found.logits[0], REFERENCE)


def test_a_shared_prompt_equals_separate_rows(pair):
    _, _, policy = pair
    prompt, one, two = prompts(7, 5, 12)
    shared = np.asarray(outputs(policy, batch([[prompt, one, two]], 24))[1])[0]
    alone = np.asarray(outputs(policy, batch([[prompt, one], [prompt, two]], 24))[1])
    close(shared[:12], alone[0, :12], POLICY)
    close(shared[12:], alone[1, 7:19], POLICY)


def test_greedy_generation_token_for_token(pair):
    theirs, _, policy = pair
    asked = prompts(9, 3)
    free = types.SimpleNamespace(vocab_size=SIZES["vocab_size"], forbidden_ids=(), stop_ids=())
    rows = batch([[one] for one in asked], 9)
    out = generate(free, SamplingConfig(branches=2, max_new_tokens=64), policy, rows)
    for (ours, other), one in zip(np.asarray(out.tokens), asked, strict=True):
        assert ours.tolist() == other.tolist() and len(set(ours.tolist())) > 3
        with torch.no_grad():
            logits = theirs(torch.tensor(np.concatenate([one, ours]))[None]).logits[0]
        likeliest(ours, logits[len(one) - 1 : -1])


def test_import_then_export_is_bit_for_bit(pair, tmp_path):
    _, folder, policy = pair
    table = names.llama(policy.decoder.config, "model.")
    hf.save_params(policy, table, tmp_path, like=folder, dtype="float32")
    there, here = (load_file(at / "model.safetensors") for at in (folder, tmp_path))
    assert there.keys() == here.keys()
    assert all(there[name].tobytes() == here[name].tobytes() for name in there)
    kinds = {name.split(".")[-2] + "." + name.split(".")[-1] for name in there}
    bias = {"q_proj.bias", "k_proj.bias", "v_proj.bias"}
    assert (kinds & bias, kinds & {"q_norm.weight", "k_norm.weight"}) in (
        (bias, set()),
        (set(), {"q_norm.weight", "k_norm.weight"}),
    )


@pytest.mark.slow
def test_every_parameter_matters_and_is_sharded(pair):
    """By its gradient; and on a mesh the loss is the same."""
    _, _, policy = pair
    rows = batch([prompts(9, 9), prompts(4, 12)], 24)

    def loss(policy, rows):
        logprob, _ = policy.token_logprobs(policy(rows), rows.tokens, rows.loss_mask > 0)
        return -(logprob * rows.loss_mask).sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(policy, rows)
    for name, grad in sharding.named(grads).items():  # a key's bias changes no softmax, but for RoPE
        assert np.abs(grad).max() > 1e-3, name
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        layout = sharding.shardings(policy, sharding.TRAIN, mesh)
        cut = jax.device_put(policy, layout)
        close(jax.jit(loss)(cut, rows), value, POLICY)
    if policy.decoder.config.qkv_bias:
        assert cut.decoder.blocks.k_bias[...].addressable_shards[0].data.shape == (2, 1, 6)
