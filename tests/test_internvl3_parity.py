"""The policy against transformers' InternVLForConditionalGeneration and its processor's parts.

Random weights, fp32. The reference writes the checkpoint that our side reads, as transformers 5 writes one.
The same weights under the names of the original format are the same policy (`test_internvl3.original`).
"""

import copy
import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_internvl3
import tiny
from close import REFERENCE, close, likeliest
from safetensors.numpy import load_file, save_file
from test_internvl2 import picture
from test_internvl3 import SIZE
from test_smolvlm import batch

from mstar_jax import models, sharding
from mstar_jax.inference.draw import SamplingConfig
from mstar_jax.models import internvl, internvl_chat, internvl_hf, names, tokenizer
from mstar_jax.plan import official

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
images_of = pytest.importorskip("transformers.models.got_ocr2.image_processing_pil_got_ocr2")
prompts_of = pytest.importorskip("transformers.models.internvl.processing_internvl")
pytestmark = pytest.mark.parity

ASKED = [  # prompts with text only, one image and several, wide and high, of one tile and of many
    ("Why?", []),
    ("How many cm is the triangle?", [(50, 16)]),
    ("What is the area?", [(16, 44), (17, 17)]),
    ("A", [(90, 60)]),
]
SIZES = [(16, 16), (40, 30), (20, 60), (33, 33), (100, 3), (3, 100), (17, 16), (500, 120), (13, 200)]
SIZES += [tuple(size) for size in np.random.default_rng(0).integers(1, 300, (20, 2)).tolist()]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only cost at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def internlm_words(folder):
    """InternLM2's special tokens in a fast tokenizer, whose texts begin with `<s>`."""
    size, special = test_internvl3.VOCAB - 10, internvl.INTERNLM2
    tokenizer.make(tiny.TEXTS, folder, size, special=special, bos="<s>", eos="</s>", unk="<unk>")
    return folder


LLAMA = dataclasses.replace(test_internvl3.QWEN2, qkv_bias=False, tie_word_embeddings=True)
REFERENCES = {
    "qwen2": test_internvl3.HF["qwen2"],
    "qwen3": test_internvl3.HF["qwen3"],
    "llama": dataclasses.replace(
        test_internvl3.HF["qwen2"],
        decoder=LLAMA,
        image_token_id=internvl.INTERNLM2.index(internvl.PLACEHOLDER),
    ),
}


class Reference:
    """transformers' model and processor of one config.

    The processor as a whole needs torchvision (for videos); its parts do not.
    """

    def __init__(self, folder, kind):
        ours = REFERENCES[kind]
        v = ours.vision
        self.config = transformers.InternVLConfig(
            text_config=names.language_values(ours.decoder),
            vision_config=names.vision_values(v)
            | {
                "attention_bias": v.qkv_bias,
                "use_qk_norm": v.qk_norm,
                "norm_type": internvl.NORMS[v.rms_norm],
            },
            image_token_id=ours.image_token_id,
            image_seq_length=4,
            tie_word_embeddings=ours.decoder.tie_word_embeddings,
            attn_implementation="eager",
        )
        self.model = transformers.InternVLForConditionalGeneration(self.config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
                if "norm" in name and name.endswith("weight"):
                    parameter.add_(1.0)
        self.images = images_of.GotOcr2ImageProcessorPil(
            size={"height": SIZE, "width": SIZE},
            crop_to_patches=True,
            max_patches=6,
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        )
        self.folder = folder
        (internlm_words if kind == "llama" else test_internvl3.make_words)(folder)
        self.model.save_pretrained(folder)
        self.images.save_pretrained(folder)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.marks = types.SimpleNamespace(
            start_image_token="<img>",
            end_image_token="</img>",
            image_token="<IMG_CONTEXT>",
            image_seq_length=4,
        )

    def prompt(self, text, images):
        """The prompt's text, written by the chat template and its image marks filled in."""
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
        marked = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=test_internvl3.CHAT_TEMPLATE,
            tokenize=False,
            add_generation_prompt=True,
        )
        first, *others = marked.split("<IMG_CONTEXT>")
        found = self.images(images) if images else {}
        fill = prompts_of.InternVLProcessor.replace_image_token
        return first + "".join(fill(self.marks, found, at) + part for at, part in enumerate(others))

    def inputs(self, asked, pad=False):
        """Model inputs of prompts, as [(text, images)]; padded on the left."""
        texts = [self.prompt(text, images) for text, images in asked]
        self.tokenizer.padding_side = "left"
        out = dict(self.tokenizer(texts, padding=pad, return_tensors="pt"))
        out.pop("token_type_ids", None)
        if images := [image for _, own in asked for image in own]:
            out["pixel_values"] = self.images(images, return_tensors="pt")["pixel_values"]
        return out


@pytest.fixture(
    scope="module",
    params=["qwen3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen2", "llama"))],
)
def reference(request, tmp_path_factory):
    return Reference(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def policy(reference):
    return models.Pretrained(reference.folder).load(jnp.float32)


@pytest.fixture(scope="module")
def processor(reference):
    return models.Pretrained(reference.folder).processor()


def pictures(sizes):
    return [picture(*size, seed=number) for number, size in enumerate(sizes)]


def test_config(reference):
    assert models.Pretrained(reference.folder).config in REFERENCES.values()


def test_tiles_and_tokens(reference, policy, processor):
    for number, size in enumerate(SIZES):
        image = picture(*size, seed=number)
        theirs = reference.images([image], return_tensors="np")
        ours = processor.encode("How many?", [image])
        pixels = np.moveaxis(theirs["pixel_values"], 1, -1)
        seen = jax.jit(lambda m, p: m.normalised(p))(policy, ours.pixels)
        assert pixels.shape == seen.shape, size
        np.testing.assert_allclose(seen, pixels, rtol=0, atol=1e-6, err_msg=str(size))
        ids = reference.inputs([("How many?", [image])])["input_ids"][0].numpy()
        places = ids == reference.config.image_token_id
        np.testing.assert_array_equal(np.where(places, 0, ids), ours.tokens)
        np.testing.assert_array_equal(places, ours.image_index >= 0)
        assert processor.prefix_shapes(["How many?"], [[size]])[0] == (len(ids), len(pixels))


def test_features_hidden_states_and_logits(reference, policy, processor):
    """One batch; its rows are padded on the left there and on the right here."""
    asked = [(text, pictures(sizes)) for text, sizes in ASKED]
    inputs = reference.inputs(asked, pad=True)
    with torch.no_grad():
        theirs = reference.model.model(**inputs)
        scores = reference.model.lm_head(theirs.last_hidden_state)
    prompts = [processor.encode(*one) for one in asked]
    rows = batch(prompts)
    features = np.asarray(jax.jit(lambda m, p: m.image_features(p))(policy, rows.pixels))
    own = [features[row, : 4 * len(prompt.pixels.places)] for row, prompt in enumerate(prompts)]
    found = theirs.image_outputs.pooler_output
    close(np.concatenate(own), found.reshape(-1, found.shape[-1]), REFERENCE)
    hidden = np.asarray(jax.jit(lambda m, b: m.hidden(b))(policy, rows))
    ours = np.asarray(jax.jit(lambda m, h: m.logits(h))(policy, hidden))
    for row, prompt in enumerate(prompts):
        n = len(prompt.tokens)
        assert int(inputs["attention_mask"][row].sum()) == n
        close(hidden[row, :n], theirs.last_hidden_state[row, -n:], REFERENCE)
        close(ours[row, :n], scores[row, -n:], REFERENCE)
        ends = [
            np.abs(x - y.numpy()).max() / np.abs(y.numpy()).max()
            for x, y in (
                (hidden[row, :n], theirs.last_hidden_state[row, -n:]),
                (ours[row, :n], scores[row, -n:]),
            )
        ]
        print(f"\nhidden states differ by {ends[0]:.1e}, logits by {ends[1]:.1e} of the greatest value")
        assert max(ends) < 5e-5


def test_greedy_generation_token_for_token(reference, policy, processor):
    """64 tokens with the shared-prefix cache. Each must be the likeliest for transformers' model after all
    those before it, which is its greedy continuation."""
    steps = 64
    asked = [(text, pictures(sizes)) for text, sizes in ASKED]
    rows = batch([processor.encode(*one) for one in asked])
    # no stop and nothing forbidden, on both sides
    free = types.SimpleNamespace(vocab_size=processor.vocab_size, forbidden_ids=(), stop_ids=())
    out = tiny.generate(free, SamplingConfig(branches=2, max_new_tokens=steps), policy, rows)
    for ours, one in zip(np.asarray(out.tokens), asked, strict=True):
        assert ours[0].tolist() == ours[1].tolist()
        assert len(set(ours[0].tolist())) > 3, "a constant sequence would prove little"
        inputs = reference.inputs([one])
        start = inputs["input_ids"].shape[1]
        with torch.no_grad():
            # a sampled image mark is a token as any other, so that the features are put in beforehand
            embedded = reference.model.get_input_embeddings()(
                torch.cat([inputs["input_ids"], torch.tensor(ours[:1], dtype=torch.long)], dim=1)
            )
            if one[1]:
                there = inputs["input_ids"][0] == reference.config.image_token_id
                found = reference.model.get_image_features(inputs["pixel_values"], return_dict=True)
                embedded[0, :start][there] = found.pooler_output.reshape(-1, embedded.shape[-1])
            scores = reference.model(inputs_embeds=embedded).logits[0]
        likeliest(ours[0], scores[start - 1 : -1])


def test_export_loads_there_with_the_same_weights(reference, policy, tmp_path):
    models.Pretrained(reference.folder).save(policy, tmp_path)
    there, here = load_file(reference.folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert there.keys() == here.keys()
    assert all(there[name].tobytes() == here[name].tobytes() for name in there)
    again = transformers.InternVLForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    inputs = reference.inputs([("Why?", pictures([(50, 20)]))])
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, reference.model(**inputs).logits)


def test_the_original_format_is_the_same_policy(reference, policy, tmp_path):
    """The reference's weights under the original names (of a Qwen decoder; test_internvl2_parity has
    InternLM2's), and back."""
    ours = REFERENCES["qwen3" if policy.decoder.config.qk_norm else "qwen2"]
    if policy.decoder.config.tie_word_embeddings:
        pytest.skip("InternLM2")
    there = test_internvl3.original(load_file(reference.folder / "model.safetensors"))
    save_file(there, tmp_path / "model.safetensors")
    fields = {field.name: getattr(ours, field.name) for field in dataclasses.fields(internvl.InternVLConfig)}
    config = internvl_chat.InternVLChatConfig(**fields, template="internvl2_5")
    [values] = internvl_chat.config_files(config, "float32").values()
    (tmp_path / "config.json").write_text(json.dumps(values))
    source = models.Pretrained(tmp_path)
    found = source.load(jnp.float32)
    for name, value in sharding.named(policy).items():
        np.testing.assert_array_equal(sharding.named(found)[name], value, err_msg=name)
    source.save(found, tmp_path / "out")
    here = load_file(tmp_path / "out/model.safetensors")
    assert here.keys() == there.keys()
    assert all(there[name].tobytes() == here[name].tobytes() for name in there)


@pytest.mark.slow
@pytest.mark.parametrize("kind", test_internvl3.HF)
def test_a_policy_from_scratch_loads_there(kind, tmp_path):
    words, config = test_internvl3.make_words(tmp_path / "words"), test_internvl3.HF[kind]
    policy = test_internvl3.model(config)
    models.FromScratch(internvl_hf.FAMILY, config, words).save(policy, tmp_path / "out")
    theirs = transformers.InternVLForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    images = images_of.GotOcr2ImageProcessorPil.from_pretrained(tmp_path / "out")
    prompt = models.Pretrained(tmp_path / "out").processor().encode("Why?", [picture(60, 40)])
    ids = np.where(prompt.image_index < 0, prompt.tokens, config.image_token_id)[None]
    found = images([picture(60, 40)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor(ids, dtype=torch.long), pixel_values=found).logits[0]
    ours = np.asarray(jax.jit(lambda m, b: m.logits(m.hidden(b)))(policy, batch([prompt])))[0]
    close(ours, want, REFERENCE)


# ---- the released sizes -------------------------------------------------------------------------------

# The released config.json files, without what names no tensor. InternVL3-1B's is as published, and so are the
# towers. The others have its form, with the sizes of Qwen2.5, Qwen3 and InternLM2.5. InternVL3.5-1B has
# 1.061e9 parameters as published, so its output layer is not tied to its embedding.
VIT_300M = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}
VIT_300M |= {"attention_bias": True, "use_qk_norm": False, "norm_type": "layer_norm", "layer_norm_eps": 1e-6}
VIT_6B = {"hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 45, "num_attention_heads": 25}
VIT_6B |= {"attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm", "layer_norm_eps": 1e-6}
IMAGE = {"image_size": [448, 448], "patch_size": [14, 14], "model_type": "internvl_vision"}
RELEASED = {  # model_type, vocabulary, layers, width, MLP, heads, key/value heads, of a head
    "InternVL2_5-1B": ("qwen2", 151674, 24, 896, 4864, 14, 2, 64),
    "InternVL2_5-2B": ("llama", 92553, 24, 2048, 8192, 16, 8, 128),
    "InternVL2_5-4B": ("qwen2", 151674, 36, 2048, 11008, 16, 2, 128),
    "InternVL2_5-8B": ("llama", 92553, 32, 4096, 14336, 32, 8, 128),
    "InternVL3-1B": ("qwen2", 151674, 24, 896, 4864, 14, 2, 64),
    "InternVL3-2B": ("qwen2", 151674, 28, 1536, 8960, 12, 2, 128),
    "InternVL3-8B": ("qwen2", 151674, 28, 3584, 18944, 28, 4, 128),
    "InternVL3_5-1B": ("qwen3", 151936, 28, 1024, 3072, 16, 8, 128),
    "InternVL3_5-2B": ("qwen3", 151936, 28, 2048, 6144, 16, 8, 128),
    "InternVL3_5-4B": ("qwen3", 151936, 36, 2560, 9728, 32, 8, 128),
    "InternVL3_5-8B": ("qwen3", 151936, 36, 4096, 12288, 32, 8, 128),
    "InternVL3-38B": ("qwen2", 151674, 64, 5120, 27648, 40, 8, 128),  # InternViT-6B
}
COUNTS = {"InternVL3_5-1B": 1_060_897_792}
FAST = ("InternVL3-2B", "InternVL3_5-1B", "InternVL3-38B")  # of each kind one
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RELEASED]


def stored_name(name):
    """What transformers writes to a file, for a name of its model."""
    name = name.replace("model.language_model.", "language_model.model.")
    return f"language_model.{name}" if name.startswith("lm_head") else name.removeprefix("model.")


@pytest.mark.parametrize("name", NAMES)
def test_released_sizes(name, tmp_path):
    """Tensor by tensor against transformers' model of the released config, which makes no weight; and under
    the original names, against those by the official conversion's mapping."""
    kind, vocab, depth, width, mlp, heads, kv_heads, head = RELEASED[name]
    text = {"model_type": kind, "vocab_size": vocab, "num_hidden_layers": depth, "hidden_size": width}
    text |= {"intermediate_size": mlp, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    text |= {"head_dim": head, "rope_theta": 1e6, "rms_norm_eps": 1e-5 if kind == "llama" else 1e-6}
    text |= {"max_position_embeddings": 40960 if kind == "qwen3" else 32768, "tie_word_embeddings": False}
    vision = (VIT_6B if name == "InternVL3-38B" else VIT_300M) | IMAGE
    values = {
        "model_type": "internvl",
        "image_token_id": 151667,
        "text_config": text,
        "vision_config": vision,
    }
    (tmp_path / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": False}))
    source = models.Pretrained(tmp_path)
    if name in official.INTERNVL:
        want = official.INTERNVL[name]
        assert (source.config.decoder, source.config.vision) == (want.decoder, want.vision)
    with torch.device("meta"):
        theirs = transformers.InternVLForConditionalGeneration(
            transformers.InternVLConfig.from_pretrained(tmp_path)
        )
    abstract = jax.eval_shape(source.build)
    table = names.tensors(internvl_hf.table(source.config), abstract)
    shapes = {stored_name(key): tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert {key: entry.shape for key, entry in table.items()} == shapes
    parameters = sum(value.numel() for value in theirs.parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == parameters == COUNTS.get(name, parameters)
    if kind != "llama":
        fused = {test_internvl3.original_name(key): shape for key, shape in shapes.items()}
        for key in [key for key in fused if ".attn.q_proj." in key]:
            rows = [fused.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
            fused[key.replace("q_proj", "qkv")] = (3 * rows[0][0], *rows[0][1:])
        table = names.tensors(internvl_chat.table(source.config), abstract)
        assert {key: entry.shape for key, entry in table.items()} == fused


@pytest.mark.slow
def test_bfloat16_drifts_no_further_than_theirs(reference, policy, processor):
    """Against fp32. The roundings of the two differ, so the bound is loose."""
    asked = [("Why?", pictures([(50, 20)]))]
    inputs = reference.inputs(asked)
    rough = copy.deepcopy(reference.model).to(torch.bfloat16)
    with torch.no_grad():
        exact = reference.model(**inputs).logits[0].numpy()
        theirs = rough(**inputs).logits[0].float().numpy()
    rows = batch([processor.encode(*asked[0])])
    half = sharding.cast(policy, jnp.bfloat16)
    ours = np.asarray(jax.jit(lambda m, b: m.logits(m.hidden(b)))(half, rows))[0]
    drift, other = (np.abs(x - exact).max() / np.abs(exact).max() for x in (ours, theirs))
    print(f"\nbfloat16 logits, share of the greatest: ours {drift:.2e}, theirs {other:.2e}")
    assert 1e-3 < drift < 2 * other
