"""Qwen2.5-VL and Qwen3-VL against transformers' models and image processor, random weights, fp32.

The reference writes the checkpoint that our side reads, as transformers 5 writes one.
"""

import copy
import json
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_qwen3vl
import test_qwen25vl
from close import REFERENCE, close, likeliest
from flax import nnx
from safetensors.numpy import load_file
from test_qwen25vl import CONFIG, SIDE, VOCAB, WORDS, batch, picture, pictures
from tiny import generate

from mstar_jax import models
from mstar_jax.inference.draw import SamplingConfig
from mstar_jax.models import names, native, qwen, qwen3vl, qwen25vl
from mstar_jax.plan import official

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
images_of = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
pytestmark = pytest.mark.parity

SIZES = [(40, 24), (24, 40), (16, 16), (3, 5), (20, 28), (300, 200), (200, 300), (190, 2), (9, 500)]
SIZES += [tuple(size) for size in np.random.default_rng(0).integers(5, 300, (5, 2)).tolist()]
ASKED = [  # prompts with text only, one image and several, wide and high, small and large, filled windows
    ("Why?", []),
    ("How many cm is the triangle?", [(40, 24)]),
    ("What is the area?", [(9, 60), (33, 33), (3, 5)]),
    ("A", [(300, 200)]),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only cost at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Kind(NamedTuple):
    """A family: ours, its tiny configs, and theirs."""

    family: Any
    module: Any
    tied: Any
    made: Any
    config: Any
    text: dict
    vision: dict


KINDS = {
    "2.5": Kind(
        qwen25vl,
        test_qwen25vl,
        test_qwen25vl.TIED,
        transformers.Qwen2_5_VLForConditionalGeneration,
        transformers.Qwen2_5_VLConfig,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 2, 3]}},
        {"window_size": SIDE, "fullatt_block_indexes": [1]},
    ),
    "3": Kind(
        qwen3vl,
        test_qwen3vl,
        test_qwen3vl.TIED,
        transformers.Qwen3VLForConditionalGeneration,
        transformers.Qwen3VLConfig,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}}
        | {"head_dim": 12},
        {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2]},
    ),
}


class Reference:
    """transformers' model, image processor and tokenizer of one config."""

    def __init__(self, folder, kind, tied):
        self.kind = kind
        ours = kind.module.CONFIG
        ids = {name: WORDS.index(f"<|{name}|>") for name in ("vision_start", "vision_end")}
        ids |= {name: WORDS.index(f"<|{name}_pad|>") for name in ("image", "video")}
        text = names.decoder_values(ours.decoder) | kind.text | {"bos_token_id": 1, "eos_token_id": 2}
        del text["tie_word_embeddings"]
        self.config = kind.config(
            text_config=text,
            vision_config=qwen.tower_values(ours) | kind.vision,
            **{f"{name}_token_id": value for name, value in ids.items()},
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
        self.model = kind.made(self.config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
                if "norm" in name or "ln_q" in name:
                    parameter.add_(1.0)
        self.images = images_of.Qwen2VLImageProcessorPil(
            size={"shortest_edge": CONFIG.min_pixels, "longest_edge": CONFIG.max_pixels},
            patch_size=CONFIG.vision.patch_size,
            image_mean=list(CONFIG.mean),
            image_std=list(CONFIG.std),
        )
        self.folder = folder
        test_qwen25vl.make_words(folder)
        self.model.save_pretrained(folder)
        self.images.save_pretrained(folder)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.tokenizer.chat_template = qwen.TEMPLATE

    def prompt(self, text, images):
        """The prompt's text, written by the chat template, with a mark for each feature."""
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
        marked = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        parts = marked.split(qwen.IMAGE)
        grids = self.images(images)["image_grid_thw"] if images else []
        marks = [qwen.IMAGE * (int(np.prod(grid)) // 4) for grid in grids]
        return "".join(a + b for a, b in zip(parts, [*marks, ""], strict=True))

    def inputs(self, asked, pad=False):
        """Model inputs of prompts, as [(text, images)]; padded on the left."""
        texts = [self.prompt(text, images) for text, images in asked]
        self.tokenizer.padding_side = "left"
        out = dict(self.tokenizer(texts, padding=pad, return_tensors="pt", add_special_tokens=False))
        out.pop("token_type_ids", None)
        if images := [image for _, own in asked for image in own]:
            out |= dict(self.images(images, return_tensors="pt"))
        out["mm_token_type_ids"] = (out["input_ids"] == CONFIG.image_token_id).int()
        return out

    def scores(self, inputs):
        """Hidden states and logits; text alone has positions of its own, not of an earlier call."""
        self.model.model.rope_deltas = None
        with torch.no_grad():
            hidden = self.model.model(**inputs).last_hidden_state
            return hidden, self.model.lm_head(hidden)


TESTED = [(name, False) for name in KINDS]
TESTED += [pytest.param((name, True), marks=pytest.mark.slow) for name in KINDS]


@pytest.fixture(scope="module", params=TESTED, ids=str)
def reference(request, tmp_path_factory):
    name, tied = request.param
    return Reference(tmp_path_factory.mktemp("reference"), KINDS[name], tied)


@pytest.fixture(scope="module")
def policy(reference):
    return models.Pretrained(reference.folder).load(jnp.float32)


@pytest.fixture(scope="module")
def processor(reference):
    return models.Pretrained(reference.folder).processor()


def test_config(reference):
    found = models.Pretrained(reference.folder).config
    tied = reference.config.tie_word_embeddings
    assert found == (reference.kind.tied if tied else reference.kind.module.CONFIG)


def test_pixels_grids_tokens_and_positions(reference, processor):
    for number, size in enumerate(SIZES):
        image = picture(*size, seed=number)
        inputs = reference.inputs([("How many?", [image])])
        ours = processor.encode("How many?", [image])
        config = reference.kind.module.CONFIG
        cut = config.cut.layout(size)
        down, across = 2 * cut.rows, 2 * cut.columns
        assert inputs["image_grid_thw"].tolist() == [[1, down, across]], size
        patches = native.patches_of(config, jax.tree.map(lambda x: x[None], ours.pixels), jnp.float32)
        own = np.asarray(patches.segment[0]) == 1
        row, column = (np.asarray(x)[0, own] for x in (patches.row, patches.column))
        # theirs are in squares of 2 x 2, line by line
        place = row // 2 * across * 2 + column // 2 * 4 + row % 2 * 2 + column % 2
        assert sorted(place) == list(range(down * across))
        values = np.asarray(patches.values)[0, own]
        np.testing.assert_allclose(
            values, inputs["pixel_values"].numpy()[place], rtol=0, atol=1e-5, err_msg=str(size)
        )
        ids = inputs["input_ids"][0].numpy()
        places = ids == CONFIG.image_token_id
        np.testing.assert_array_equal(np.where(places, 0, ids), ours.tokens)
        np.testing.assert_array_equal(places, ours.image_index >= 0)
        shape = len(ids), len(ours.pixels.places)
        assert processor.prefix_shapes(["How many?"], [[size]])[0] == shape
    asked = [(text, pictures(sizes)) for text, sizes in ASKED[1:]]
    inputs = reference.inputs(asked, pad=True)
    found, _ = reference.model.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    for row, one in enumerate(asked):
        positions = processor.encode(*one).positions
        np.testing.assert_array_equal(positions, found[:, row, -positions.shape[1] :])


def test_features_hidden_states_and_logits(reference, policy, processor):
    """One batch; its rows are padded on the left there and on the right here."""
    asked = [(text, pictures(sizes)) for text, sizes in ASKED]
    inputs = reference.inputs(asked, pad=True)
    hidden_there, logits_there = reference.scores(inputs)
    prompts = [processor.encode(*one) for one in asked]
    rows = batch(prompts)

    @jax.jit
    def run(model, rows):
        hidden = model.hidden(rows)
        return model.image_features(rows.pixels), hidden, model.logits(hidden)

    features, hidden, logits = map(np.asarray, run(policy, rows))
    with torch.no_grad():
        found = reference.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
        )
    levels = [found.pooler_output, *getattr(found, "deepstack_features", ())]  # of each, image by image
    wide = torch.cat([torch.cat(list(level)) for level in levels], dim=-1)
    at = iter(wide.split([len(one) for one in found.pooler_output]))
    for row, (prompt, (_, images)) in enumerate(zip(prompts, asked, strict=True)):
        index = prompt.image_index[prompt.image_index >= 0]
        if images:
            close(features[row, index], torch.cat([next(at) for _ in images]), REFERENCE)
        n = len(prompt.tokens)
        assert int(inputs["attention_mask"][row].sum()) == n
        close(hidden[row, :n], hidden_there[row, -n:], REFERENCE)
        close(logits[row, :n], logits_there[row, -n:], REFERENCE)


def test_greedy_generation_token_for_token(reference, policy, processor):
    """64 tokens with the shared-prefix cache. Each must be the likeliest for transformers' model after all
    those before it, which is its greedy continuation."""
    steps = 64
    asked = [(text, pictures(sizes)) for text, sizes in ASKED]
    rows = batch([processor.encode(*one) for one in asked])
    # no stop; an image's mark would be read as one by the reference
    forbidden = tuple(range(len(WORDS)))
    free = types.SimpleNamespace(vocab_size=VOCAB, forbidden_ids=forbidden, stop_ids=())
    out = generate(free, SamplingConfig(branches=2, max_new_tokens=steps), policy, rows)
    for ours, one in zip(np.asarray(out.tokens), asked, strict=True):
        assert ours[0].tolist() == ours[1].tolist()
        assert len(set(ours[0].tolist())) > 3, "a constant sequence would prove little"
        inputs = reference.inputs([one])
        start = inputs["input_ids"].shape[1]
        more = torch.tensor(ours[:1], dtype=torch.long)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == CONFIG.image_token_id).int()
        scores = reference.scores(inputs)[1][0, start - 1 : -1, len(WORDS) :]
        likeliest(ours[0] - len(WORDS), scores)


def test_export_loads_there_with_the_same_weights(reference, policy, tmp_path):
    models.Pretrained(reference.folder).save(policy, tmp_path)
    there, here = load_file(reference.folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert there.keys() == here.keys()
    assert all(there[name].tobytes() == here[name].tobytes() for name in there)
    again = copy.copy(reference)
    again.model = reference.kind.made.from_pretrained(tmp_path, attn_implementation="eager").eval()
    inputs = reference.inputs([("Why?", pictures([(104, 50)]))])
    assert torch.equal(again.scores(inputs)[1], reference.scores(inputs)[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_policy_from_scratch_loads_there(name, tmp_path):
    kind = KINDS[name]
    config = kind.tied
    words = test_qwen25vl.make_words(tmp_path / "words")
    policy = kind.module.model(config)
    models.FromScratch(kind.family.FAMILY, config, words).save(policy, tmp_path / "out")
    theirs = kind.made.from_pretrained(tmp_path / "out").eval()
    images = images_of.Qwen2VLImageProcessorPil.from_pretrained(tmp_path / "out")
    found = images([picture(60, 40)], return_tensors="pt")
    prompt = models.Pretrained(tmp_path / "out").processor().encode("Why?", [picture(60, 40)])
    ids = torch.tensor(np.where(prompt.image_index < 0, prompt.tokens, config.image_token_id)[None])
    ids = ids.long()
    with torch.no_grad():
        want = theirs(input_ids=ids, mm_token_type_ids=(ids == config.image_token_id).int(), **found).logits
    ours = jax.jit(lambda m, b: m.logits(m.hidden(b)))(policy, batch([prompt]))
    close(ours[0], want[0], REFERENCE)


# The released config.json, as it is written for all sizes: the decoder's keys at its top.
RELEASED = {"model_type": "qwen2_5_vl", "hidden_act": "silu", "rms_norm_eps": 1e-06, "rope_theta": 1000000.0}
RELEASED |= {"max_position_embeddings": 128000, "sliding_window": 32768, "use_sliding_window": False}
RELEASED |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "attention_dropout": 0.0}
RELEASED |= {"bos_token_id": 151643, "eos_token_id": 151645, "vision_token_id": 151654}
RELEASED |= {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "image_token_id": 151655}
VISION = {"depth": 32, "hidden_act": "silu", "hidden_size": 1280, "num_heads": 16}
VISION |= {"in_chans": 3, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14}
VISION |= {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2}
VISION |= {"temporal_patch_size": 2}
SIZE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
RELEASES = {  # their sizes, vocabulary, whether the head is the embedding; width of the tower's MLP
    "3B": ((2048, 11008, 36, 16, 2), 151936, True, 3420),
    "7B": ((3584, 18944, 28, 28, 4), 152064, False, 3420),
    "32B": ((5120, 27648, 64, 40, 8), 152064, False, 3456),
    "72B": ((8192, 29568, 80, 64, 8), 152064, False, 3456),
}


@pytest.mark.parametrize(
    "name", ["3B", *(pytest.param(name, marks=pytest.mark.slow) for name in ("7B", "32B", "72B"))]
)
def test_released_sizes_of_25(name, tmp_path):
    """Tensor by tensor against transformers' model of the released config, which makes no weight."""
    sizes, words, tied, width = RELEASES[name]
    vision = VISION | {"out_hidden_size": sizes[0], "intermediate_size": width}
    values = RELEASED | dict(zip(SIZE, sizes)) | {"max_window_layers": sizes[2], "vision_config": vision}
    values |= {"vocab_size": words, "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(values))
    mean, std = qwen.CLIP["image_mean"], qwen.CLIP["image_std"]
    images = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2}
    images |= {"merge_size": 2, "image_mean": mean, "image_std": std}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    config = qwen25vl.read_config(tmp_path)
    if name == "3B":
        assert config == official.QWEN25VL_3B
    with torch.device("meta"):
        theirs = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig.from_pretrained(tmp_path)
        )
    official_names = {"model.language_model.": "model.", "model.visual.": "visual."}
    want = {}
    for key, value in theirs.state_dict().items():
        for new, old in official_names.items():
            key = old + key.removeprefix(new) if key.startswith(new) else key
        want[key] = tuple(value.shape)
    if tied:
        del want["lm_head.weight"]
    abstract = jax.eval_shape(lambda: qwen25vl.Qwen25VL(config, nnx.Rngs(0)))
    table = names.tensors(qwen25vl.table(config), abstract)
    assert {key: entry.shape for key, entry in table.items()} == want


# Qwen3-VL's released config.json: 2B's as published copies have it; the other sizes are Qwen3's.
TEXT = {"attention_bias": False, "head_dim": 128, "hidden_act": "silu", "max_position_embeddings": 262144}
TEXT |= {"model_type": "qwen3_vl_text", "num_key_value_heads": 8, "rms_norm_eps": 1e-06}
TEXT |= {"rope_theta": 5000000, "vocab_size": 151936}
TEXT |= {"rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}}
TOWERS = {  # hidden_size, intermediate_size, depth, deepstack_visual_indexes
    "small": (1024, 4096, 24, [5, 11, 17]),
    "large": (1152, 4304, 27, [8, 16, 24]),
}
RELEASES3 = {  # of the decoder: hidden_size, intermediate_size, layers, heads; tied; the tower
    "2B": ((2048, 6144, 28, 16), True, "small"),
    "4B": ((2560, 9728, 36, 32), True, "small"),
    "8B": ((4096, 12288, 36, 32), False, "large"),
    "32B": ((5120, 25600, 64, 64), False, "large"),
}


@pytest.mark.parametrize(
    "name", ["4B", *(pytest.param(name, marks=pytest.mark.slow) for name in ("2B", "8B", "32B"))]
)
def test_released_sizes_of_3(name, tmp_path):
    """As for 2.5."""
    sizes, tied, tower = RELEASES3[name]
    text = TEXT | dict(zip(SIZE, sizes)) | {"tie_word_embeddings": tied}
    vision = dict(
        zip(("hidden_size", "intermediate_size", "depth", "deepstack_visual_indexes"), TOWERS[tower])
    )
    vision |= {"hidden_act": "gelu_pytorch_tanh", "in_channels": 3, "model_type": "qwen3_vl", "num_heads": 16}
    vision |= {"num_position_embeddings": 2304, "out_hidden_size": sizes[0], "patch_size": 16}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
    values = {"model_type": "qwen3_vl", "image_token_id": 151655, "tie_word_embeddings": tied}
    values |= {"text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(values))
    images = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16, "merge_size": 2}
    images |= {"temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    config = qwen3vl.read_config(tmp_path)
    if name == "4B":
        assert config == official.QWEN3VL_4B
    with torch.device("meta"):
        theirs = transformers.Qwen3VLForConditionalGeneration(
            transformers.Qwen3VLConfig.from_pretrained(tmp_path)
        )
    want = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    if tied:
        del want["lm_head.weight"]
    abstract = jax.eval_shape(lambda: qwen3vl.Qwen3VL(config, nnx.Rngs(0)))
    table = names.tensors(qwen3vl.table(config), abstract)
    assert {key: entry.shape for key, entry in table.items()} == want
