"""The policy against transformers' SmolVLMForConditionalGeneration and its processor, random weights, fp32.

The reference writes the checkpoint that our side reads, as transformers 5 writes one.
"""

import copy
import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_smolvlm
from close import REFERENCE, close, likeliest
from safetensors.numpy import load_file
from test_smolvlm import CONFIG, SIDE, VOCAB, batch, picture
from tiny import generate

from mstar_jax import models, sharding
from mstar_jax.inference.draw import SamplingConfig
from mstar_jax.models import hf, names, smolvlm
from mstar_jax.plan import official

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
images_of = pytest.importorskip("transformers.models.smolvlm.image_processing_pil_smolvlm")
prompts_of = pytest.importorskip("transformers.models.smolvlm.processing_smolvlm")
pytestmark = pytest.mark.parity

# The released config.json files, without what names no tensor. That of 500M is as published. Those of the
# others have its form, with the sizes of their SmolLM2 and SigLIP; 2.2B's leaves out num_attention_heads.
SMALLEST = official.SMOLVLM2_256M
SMALL = {"head_dim": 64, "max_position_embeddings": 8192, "model_type": "llama", "rms_norm_eps": 1e-5}
SMALL |= {"rope_theta": 100000, "vocab_size": 49280, "qk_layer_norms": False, "use_resampler": False}
BASE = {"hidden_size": 768, "image_size": 512, "num_attention_heads": 12, "patch_size": 16}
BASE |= {"max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 2048}}
RELEASED = {
    "256M": (
        SMALLEST,
        4,
        SMALL
        | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        | {"num_attention_heads": 9, "num_key_value_heads": 3},
        BASE,
    ),
    "500M": (
        dataclasses.replace(
            SMALLEST,
            decoder=dataclasses.replace(
                SMALLEST.decoder,
                hidden_size=960,
                intermediate_size=2560,
                num_layers=32,
                num_heads=15,
                num_kv_heads=5,
            ),
        ),
        4,
        SMALL
        | {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32}
        | {"num_attention_heads": 15, "num_key_value_heads": 5},
        BASE,
    ),
    "2.2B": (
        smolvlm.SmolVLMConfig(
            dataclasses.replace(
                SMALLEST.decoder,
                hidden_size=2048,
                intermediate_size=8192,
                num_layers=24,
                num_heads=32,
                num_kv_heads=32,
                rope_theta=130000.0,
            ),
            dataclasses.replace(official.MINICPMV25.vision, image_size=384),  # SigLIP-400M
            num_crops=16,
            scale_factor=3,
            longest_edge=1536,
        ),
        3,
        SMALL
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
        | {"num_key_value_heads": 32, "rope_theta": 130000},
        {"hidden_size": 1152, "image_size": 384, "intermediate_size": 4304, "num_hidden_layers": 27}
        | {"patch_size": 14, "max_image_size": {"longest_edge": 384}, "size": {"longest_edge": 1536}},
    ),
}
SIZES = [(104, 104), (40, 30), (20, 60), (33, 33), (100, 3), (3, 100), (27, 26), (500, 120), (13, 200)]
SIZES += [tuple(size) for size in np.random.default_rng(0).integers(1, 300, (20, 2)).tolist()]
ASKED = [  # prompts with text only, one image and several, wide and high, of one row of tiles and of many
    ("Why?", []),
    ("How many cm is the triangle?", [(104, 50)]),
    ("What is the area?", [(20, 60), (33, 33)]),
    ("A", [(300, 10)]),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads only cost at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Reference:
    """transformers' model and processor of one config.

    The processor as a whole needs torchvision (for videos); its parts do not.
    """

    def __init__(self, folder, tied, split):
        decoder = names.decoder_values(CONFIG.decoder) | {"model_type": "llama", "head_dim": 8}
        self.config = transformers.SmolVLMConfig(
            text_config=decoder,
            vision_config=names.vision_values(CONFIG.vision),
            scale_factor=CONFIG.scale_factor,
            image_token_id=CONFIG.image_token_id,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
        self.model = transformers.SmolVLMForConditionalGeneration(self.config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
                if "norm" in name and name.endswith("weight"):
                    parameter.add_(1.0)
        edges = {"size": {"longest_edge": 4 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
        self.images = images_of.SmolVLMImageProcessorPil(
            **edges, do_image_splitting=split, return_row_col_info=True
        )
        self.folder = folder
        test_smolvlm.make_words(folder)
        self.model.save_pretrained(folder)
        self.images.save_pretrained(folder)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def prompt(self, text, images):
        """The prompt's text, written by the chat template and its image marks filled in."""
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": text}]
        template = prompts_of.DEFAULT_CHAT_TEMPLATE
        marked = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
        )
        if not images:
            return marked
        found = self.images(images)
        parts = marked.split("<image>")
        out = parts[0]
        for rows, columns, part in zip(found["rows"][0], found["cols"][0], parts[1:], strict=True):
            marks = ("<fake_token_around_image>", "<image>", "<global-img>")
            count = (CONFIG.vision.side // CONFIG.scale_factor) ** 2
            out += prompts_of.get_image_prompt_string(rows, columns, count, *marks) + part
        return out

    def inputs(self, asked, pad=False):
        """Model inputs of prompts, as [(text, images)]; padded on the left."""
        texts = [self.prompt(text, images) for text, images in asked]
        self.tokenizer.padding_side = "left"
        out = dict(self.tokenizer(texts, padding=pad, return_tensors="pt", add_special_tokens=False))
        out.pop("token_type_ids", None)
        if any(images for _, images in asked):
            found = self.images([images for _, images in asked], return_tensors="pt")
            out |= {key: found[key] for key in ("pixel_values", "pixel_attention_mask")}
        return out


REFERENCES = {  # tied, split
    "split": (False, True),
    "tied": (True, True),
    "whole": (True, False),  # no tiles
}


@pytest.fixture(scope="module", params=REFERENCES)
def reference(request, tmp_path_factory):
    return Reference(tmp_path_factory.mktemp(request.param), *REFERENCES[request.param])


@pytest.fixture(scope="module")
def policy(reference):
    return models.Pretrained(reference.folder).load(jnp.float32)


@pytest.fixture(scope="module")
def processor(reference):
    return models.Pretrained(reference.folder).processor()


def pictures(sizes):
    return [picture(*size, seed=number) for number, size in enumerate(sizes)]


def test_config(reference):
    found = models.Pretrained(reference.folder).config
    assert found.decoder.tie_word_embeddings == reference.config.tie_word_embeddings
    assert found.split == reference.images.do_image_splitting
    assert found.decoder.rope_theta == 100000 and found.features == 4


def seen(policy, prompt):
    """The pixels of a prompt as the tower reads them."""
    return jax.jit(lambda m, p: m.normalised(p))(policy, prompt.pixels)


def test_tiles_and_tokens(reference, policy, processor):
    for number, size in enumerate(SIZES):
        image = picture(*size, seed=number)
        theirs = reference.images([image], return_tensors="np")
        ours = processor.encode("How many?", [image])
        pixels = np.moveaxis(theirs["pixel_values"][0], 1, -1)
        assert pixels.shape == ours.pixels.pixels.shape, size
        np.testing.assert_allclose(seen(policy, ours), pixels, rtol=0, atol=1e-6, err_msg=str(size))
        cut = processor.cut.layout(size)
        assert [cut.rows, cut.columns] == [theirs["rows"][0][0], theirs["cols"][0][0]], size
        ids = reference.inputs([("How many?", [image])])["input_ids"][0].numpy()
        places = ids == CONFIG.image_token_id
        np.testing.assert_array_equal(np.where(places, 0, ids), ours.tokens)
        np.testing.assert_array_equal(places, ours.image_index >= 0)
        assert processor.prefix_shapes(["How many?"], [[size]])[0] == (len(ids), len(pixels))


@pytest.mark.parametrize("most", [1, 4, 9])
def test_fewer_tiles_are_a_shorter_longest_edge(reference, policy, most):
    if not reference.images.do_image_splitting:
        pytest.skip("there are no tiles")
    processor = models.Pretrained(reference.folder, max_crops=most).processor()
    edges = {"size": {"longest_edge": int(most**0.5) * SIDE}}
    for size in ((104, 104), (104, 90), (90, 104)):
        theirs = reference.images([picture(*size)], return_tensors="np", **edges)["pixel_values"][0]
        ours = seen(policy, processor.encode("?", [picture(*size)]))
        np.testing.assert_allclose(ours, np.moveaxis(theirs, 1, -1), rtol=0, atol=1e-6)


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
    found = theirs.image_outputs.pooler_output
    for ours, own, prompt in zip(features, found, prompts, strict=True):
        close(ours[: 4 * len(prompt.pixels.places)], own, REFERENCE)
    hidden = np.asarray(jax.jit(lambda m, b: m.hidden(b))(policy, rows))
    ours = np.asarray(jax.jit(lambda m, h: m.logits(h))(policy, hidden))
    for row, prompt in enumerate(prompts):
        n = len(prompt.tokens)
        assert int(inputs["attention_mask"][row].sum()) == n
        close(hidden[row, :n], theirs.last_hidden_state[row, -n:], REFERENCE)
        close(ours[row, :n], scores[row, -n:], REFERENCE)


def test_greedy_generation_token_for_token(reference, policy, processor):
    """64 tokens with the shared-prefix cache. Each must be the likeliest for transformers' model after all
    those before it, which is its greedy continuation."""
    steps = 64
    asked = [(text, pictures(sizes)) for text, sizes in ASKED]
    rows = batch([processor.encode(*one) for one in asked])
    # no stop and nothing forbidden, on both sides
    free = types.SimpleNamespace(vocab_size=VOCAB, forbidden_ids=(), stop_ids=())
    out = generate(free, SamplingConfig(branches=2, max_new_tokens=steps), policy, rows)
    for ours, one in zip(np.asarray(out.tokens), asked, strict=True):
        assert ours[0].tolist() == ours[1].tolist()
        assert len(set(ours[0].tolist())) > 3, "a constant sequence would prove little"
        inputs = reference.inputs([one])
        start = inputs["input_ids"].shape[1]
        with torch.no_grad():
            images = None
            if one[1]:
                pixels = {key: inputs[key] for key in ("pixel_values", "pixel_attention_mask")}
                images = {"image": reference.model.get_image_features(**pixels, return_dict=True)}
            # a sampled image mark is a token as any other, so that the features are put in beforehand
            embedded = reference.model.get_input_embeddings()(
                torch.cat([inputs["input_ids"], torch.tensor(ours[:1], dtype=torch.long)], dim=1)
            )
            if images:
                there = inputs["input_ids"][0] == CONFIG.image_token_id
                embedded[0, :start][there] = torch.cat(images["image"].pooler_output)
            scores = reference.model(inputs_embeds=embedded).logits[0]
        likeliest(ours[0], scores[start - 1 : -1])


def test_export_loads_there_with_the_same_weights(reference, policy, tmp_path):
    models.Pretrained(reference.folder).save(policy, tmp_path)
    there, here = load_file(reference.folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert there.keys() == here.keys()
    assert all(there[name].tobytes() == here[name].tobytes() for name in there)
    again = transformers.SmolVLMForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    inputs = reference.inputs([("Why?", pictures([(104, 50)]))])
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, reference.model(**inputs).logits)


@pytest.mark.parametrize("config", [CONFIG, test_smolvlm.WHOLE, test_smolvlm.TIED])
def test_a_policy_from_scratch_loads_there(config, tmp_path):
    words = test_smolvlm.make_words(tmp_path / "words")
    policy = test_smolvlm.model(config)
    models.FromScratch(smolvlm.FAMILY, config, words).save(policy, tmp_path / "out")
    theirs = transformers.SmolVLMForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    images = images_of.SmolVLMImageProcessorPil.from_pretrained(tmp_path / "out")
    found = images([[picture(60, 40)]], return_tensors="pt")
    prompt = models.Pretrained(tmp_path / "out").processor().encode("Why?", [picture(60, 40)])
    ids = np.where(prompt.image_index < 0, prompt.tokens, config.image_token_id)[None]
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor(ids, dtype=torch.long), **found).logits[0]
    ours = np.asarray(jax.jit(lambda m, b: m.logits(m.hidden(b)))(policy, batch([prompt])))[0]
    close(ours, want, REFERENCE)


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name, tmp_path):
    """Tensor by tensor against transformers' model of the released config, which makes no weight."""
    want, factor, text, vision = RELEASED[name]
    values = {"model_type": "smolvlm", "image_token_id": 49190, "scale_factor": factor}
    values |= {"tie_word_embeddings": False, "text_config": text}
    values |= {"vision_config": vision | {"model_type": "smolvlm_vision"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert smolvlm.read_config(tmp_path) == want
    with torch.device("meta"):
        theirs = transformers.SmolVLMForConditionalGeneration(
            transformers.SmolVLMConfig.from_pretrained(tmp_path)
        )
    abstract = jax.eval_shape(models.Pretrained(tmp_path).build)
    table = names.tensors(smolvlm.table(want), abstract)
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert {key: entry.shape for key, entry in table.items()} == shapes
    parameters = sum(value.numel() for value in theirs.parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract)) == parameters


def test_the_whole_processor(reference, processor):
    """As its parts above; it needs packages for videos."""
    pytest.importorskip("torchvision")
    pytest.importorskip("num2words")
    videos = transformers.SmolVLMVideoProcessor()
    whole = transformers.SmolVLMProcessor(
        reference.images, reference.tokenizer, videos, 4, prompts_of.DEFAULT_CHAT_TEMPLATE
    )
    for text, sizes in ASKED:
        content = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": text}]
        prompt = whole.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        ids = whole(text=prompt, images=pictures(sizes) or None, add_special_tokens=False)["input_ids"]
        ours = processor.encode(text, pictures(sizes))
        tokens = np.where(ours.image_index < 0, ours.tokens, CONFIG.image_token_id)
        assert np.asarray(ids).reshape(-1).tolist() == tokens.tolist()


def test_idefics3_is_the_same_model(reference, tmp_path):
    """Under its own model_type, with its own class's tensors."""
    values = {**reference.config.to_dict(), "model_type": "idefics3"}
    theirs = transformers.Idefics3ForConditionalGeneration(transformers.Idefics3Config(**values)).eval()
    theirs.load_state_dict(reference.model.state_dict())
    hf.copy_files(reference.folder, tmp_path)
    theirs.save_pretrained(tmp_path)
    assert hf.read_json(tmp_path / "config.json")["model_type"] == "idefics3"
    policy, processor = models.load(tmp_path, jnp.float32)
    inputs = reference.inputs([("Why?", pictures([(104, 50)]))])
    with torch.no_grad():
        want = theirs(**inputs).logits[0]
    rows = batch([processor.encode("Why?", pictures([(104, 50)]))])
    close(jax.jit(lambda m, b: m.logits(m.hidden(b)))(policy, rows)[0], want, REFERENCE)


def test_bfloat16_drifts_no_further_than_theirs(reference, policy, processor):
    """Against fp32. The roundings of the two differ, so the bound is loose."""
    asked = [("Why?", pictures([(104, 50)]))]
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
