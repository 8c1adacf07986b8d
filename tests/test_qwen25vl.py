"""Qwen2.5-VL: crops, prompts, positions, checkpoints; what needs no reference implementation."""

import dataclasses
import itertools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_minicpm
from close import POLICY, close
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file

from mstar_jax import models, sharding
from mstar_jax.crops.native import Layout, rounded
from mstar_jax.data import loader, positions
from mstar_jax.data.pixels import Found
from mstar_jax.models import hf, layers, native, qwen, qwen25vl, tokenizer
from mstar_jax.models.layers import DecoderConfig
from mstar_jax.models.processor import Opened
from mstar_jax.models.vision import VitConfig, silu
from mstar_jax.rewards import prm
from mstar_jax.structs import Prefix, Prompt, Query, Row

VOCAB, SIDE, UNIT = 310, 16, 8  # pixels of a crop and of a feature
WORDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|vision_start|>")
WORDS += ("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>")
CONFIG = qwen25vl.Qwen25VLConfig(
    DecoderConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=40,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=12,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        rope_sections=(1, 2, 3),
        max_position=512,
        original_max_position=512,
        qkv_bias=True,
    ),
    VitConfig(
        hidden_size=16,
        intermediate_size=20,
        num_layers=3,
        num_heads=2,
        image_size=SIDE,
        patch_size=4,
        layer_norm_eps=1e-6,
        activation=silu,
        select_layer=-1,
        class_token=False,
        pre_norm=False,
        post_norm=False,
    ),
    num_crops=12,
    min_pixels=2 * UNIT**2,
    max_pixels=12 * SIDE**2,
    mean=(0.4, 0.5, 0.45),
    std=(0.25, 0.3, 0.2),
    image_token_id=WORDS.index(qwen.IMAGE),
    full_layers=(1,),
)
TIED = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, tie_word_embeddings=True))


def make_words(folder):
    """A tokenizer with special tokens of the released one's."""
    texts = [*tiny.TEXTS, "system user assistant\n\n"]
    tokenizer.make(texts, folder, VOCAB - 10, special=WORDS, bos="<|im_start|>", eos=qwen.EOS)
    return folder


def picture(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def pictures(sizes):
    return [picture(*size, seed=number) for number, size in enumerate(sizes)]


def model(config=CONFIG, seed=0):
    """A policy whose every parameter is random."""
    return tiny.randomised(lambda: qwen25vl.Qwen25VL(config, nnx.Rngs(0)), seed)


class Encoded:
    """A processor that has read the images of prompts, whose texts are their numbers; what the loader asks
    for."""

    cut = None

    def __init__(self, prompts):
        self.prompts = prompts

    def prefix(self, text, sizes):
        found = self.prompts[int(text)]
        return Prefix(found.tokens, found.image_index, found.positions)

    def find(self, job):
        return Found([[] for _ in job.images], list(job.planned), tiny_minicpm.stacked(self.prompts))


def batch(prompts, responses=None):
    """Rows of encoded prompts, each followed by its responses as branches, as the loader lays them out."""
    responses = responses or [()] * len(prompts)
    length = max(len(p.tokens) + sum(map(len, own)) for p, own in zip(prompts, responses))
    crops = max(len(p.pixels.places) for p in prompts)
    rows, read = [], Encoded(prompts)
    for number, (prompt, own) in enumerate(zip(prompts, responses)):
        planned = Prompt(Query("q", (), ""), str(number), len(prompt.tokens), len(prompt.pixels.places))
        rows.append(Row(planned, tuple(own)))
    return loader.encode_rows(rows, read, length, crops, find=read.find)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return make_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def processor(words):
    return qwen.QwenProcessor(CONFIG, qwen.load_tokenizer(words))


@pytest.fixture(scope="module")
def folder(words, tmp_path_factory):
    """A tiny policy in the official format, in bfloat16 as the released weights are."""
    path = tmp_path_factory.mktemp("policy")
    models.FromScratch(qwen25vl.FAMILY, CONFIG, words).save(model(), path, "bfloat16")
    return path


# ---- crops --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "resized", "crops"),
    [  # by hand: sides are multiples of 8; between 128 and 3072 pixels, in crops of 16 x 16
        ((16, 16), (16, 16), 1),
        ((20, 28), (16, 32), 2),  # 2.5 and 3.5 features are rounded to even numbers
        ((33, 40), (32, 40), 6),
        ((3, 3), (16, 16), 1),  # 128 / 9: 1.4 features a side, rounded up
        ((400, 400), (48, 48), 9),  # sqrt(3072) = 55.4, 6.9 features, rounded down
        ((9000, 10), (776, 8), 49),  # as 2000 x 10; 3072 pixels would be 783.8 x 3.9
    ],
)
def test_layouts(size, resized, crops):
    cut = CONFIG.cut.layout(size)
    assert (cut.size, cut.crops, cut.features) == (resized, crops, resized[0] * resized[1] // UNIT**2)
    other = CONFIG.cut.layout(size[::-1])
    assert (other.size, other.crops) == (resized[::-1], crops)


def test_few_numbers_of_crops():
    found = [rounded(count) for count in range(26)]
    assert found == [0, 1, 2, 3, 4, 6, 6, 8, 8, *[12] * 4, *[16] * 4, *[24] * 8, 32]


def test_crops_are_the_image():
    image = picture(40, 24)
    crops, values = CONFIG.cut.crop(image, 2), np.asarray(image)
    assert crops.pixels.dtype == np.uint8 and crops.pixels.shape == (6, SIDE, SIDE, 3)
    for number, (row, column) in enumerate(itertools.product(range(2), range(3))):
        there = values[row * SIDE :, column * SIDE :][:SIDE, :SIDE]
        own = crops.pixels[number]
        np.testing.assert_array_equal(own[: len(there), : there.shape[1]], there)
        assert not own[len(there) :].any() and not own[:, there.shape[1] :].any()
        assert crops.places[number].tolist() == [2, 4 * row, 4 * column, 6, 10]


def test_patches_know_their_places():
    image = picture(40, 24)
    crops = CONFIG.cut.crop(image, 1)
    crops = jax.tree.map(lambda x: np.concatenate([x, 0 * x[:1]])[None], crops)
    patches = native.patches_of(CONFIG, crops, jnp.float32)
    own = np.flatnonzero(patches.segment[0])
    places = sorted(zip(patches.row[0][own].tolist(), patches.column[0][own].tolist()))
    assert places == list(itertools.product(range(6), range(10))) and patches.segment.shape == (1, 7 * 16)
    values = (np.asarray(image) / 255 - CONFIG.mean) / CONFIG.std
    for at in own[:: len(own) // 9]:
        row, column = 4 * int(patches.row[0][at]), 4 * int(patches.column[0][at])
        there = np.moveaxis(values[row : row + 4, column : column + 4], -1, 0)  # twice, as two frames
        twice = np.stack([there, there], axis=1).reshape(-1)
        np.testing.assert_allclose(patches.values[0, at], twice, rtol=0, atol=1e-6)


# ---- prompts ------------------------------------------------------------------------------------------


def test_prompt_with_images(processor):
    images = pictures([(40, 24), (9, 9)])
    prompt = processor.encode("How many?", images)
    tokens = np.where(prompt.image_index >= 0, CONFIG.image_token_id, prompt.tokens)
    spans = "".join(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in (15, 4))
    text = f"<|im_start|>user\n{spans}How many?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.tokenizer.decode(tokens) == text
    places = prompt.image_index >= 0
    # 3 x 5 features in 2 x 3 crops of 2 x 2, line by line; the second image is crop 6
    lines = [[0, 1, 4, 5, 8], [2, 3, 6, 7, 10], [12, 13, 16, 17, 20], [24, 25], [26, 27]]
    assert prompt.image_index[places].tolist() == [index for line in lines for index in line]
    assert (prompt.tokens[places] == 0).all()
    assert len(prompt.pixels.pixels) == 8 and prompt.pixels.places[:, 0].tolist() == [1] * 6 + [2, 0]
    assert processor.prefix_shapes(["How many?"], [[(40, 24), (9, 9)]])[0] == (len(tokens), 8)
    text = processor.encode("Why?", [])
    assert len(text.pixels.pixels) == 0 and (text.image_index == -1).all()
    assert (text.positions == np.arange(len(text.tokens))).all()


def test_positions_by_hand():
    """Of two images, 2 x 3 and 3 x 1 features, with a word before, between and after."""
    cuts = [Layout((24, 16), 2, 3, 1, 2), Layout((8, 24), 3, 1, 2, 1)]
    images = np.array([0] + [1] * 6 + [0] + [1] * 3 + [0, 0], bool)
    assert native.token_positions(images, cuts).tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5, 5, 5, 8, 9],
        [0, 1, 1, 1, 2, 2, 2, 4, 5, 6, 7, 8, 9],
        [0, 1, 2, 3, 1, 2, 3, 4, 5, 5, 5, 8, 9],
    ]


def test_branches_go_on_from_the_greatest_position(processor):
    prompt = processor.encode("?", [picture(40, 40)])
    rows = batch([prompt], [[(5, 6, 7), (8, 9)]])
    n, last = len(prompt.tokens), prompt.positions.max()
    assert last < n - 1 and (rows.positions[0, :, :n] == prompt.positions).all()
    assert rows.positions[0, :, n:].tolist() == 3 * [[last + 1, last + 2, last + 3, last + 1, last + 2]]


def test_a_judged_conversation_has_the_positions_of_the_whole(processor):
    """Each branch continues the opened prompt of two images as if the conversation were one sequence."""
    opened, sizes = Opened(processor), [(40, 24), (9, 9)]
    mark, between = "<|im_end|>\n<|im_start|>assistant\n", "+<|im_end|>\n<|im_start|>user\n"
    parts = [tokenizer.literal(processor.tokenizer, text) for text in (mark, between)]
    encode = prm.marked(processor, *parts)
    prompt, branches = opened.prefix("Why?\n", sizes), [encode(text).tokens for text in ("area\nbase", "6")]
    assert opened.prefix_shapes(["Why?\n"], [sizes]) == [(len(prompt.tokens), 8)]
    branch = np.repeat(range(3), [len(prompt.tokens), *map(len, branches)])
    found = positions.of_row(prompt.positions, branch)
    cuts = [processor.cut.layout(size) for size in sizes]
    texts = (f"Why?\narea{mark}{between}base{mark}", f"Why?\n6{mark}")
    for number, (text, own) in enumerate(zip(texts, branches, strict=True), start=1):
        spans = "".join(f"<|vision_start|>{'<|image_pad|>' * cut.features}<|vision_end|>" for cut in cuts)
        ids = np.array(tokenizer.literal(processor.tokenizer, f"<|im_start|>user\n{spans}{text}"))
        places = ids == CONFIG.image_token_id
        assert [*prompt.tokens, *own] == np.where(places, 0, ids).tolist()
        row = found[:, (branch == 0) | (branch == number)]
        np.testing.assert_array_equal(row, native.token_positions(places, cuts))


def test_frequencies_take_turns():
    plain = dataclasses.replace(CONFIG.decoder, head_dim=20, rope_sections=(4, 3, 3))
    assert layers.turning(plain).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    turns = dataclasses.replace(plain, rope_interleaved=True)
    assert layers.turning(turns).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


def test_responses_come_back(processor):
    for text in ("Step 1: the answer is 12.", "\n12", " <b>x</b>  y ", "", "<tool_call>"):
        ids = processor.encode_response(text)
        assert ids[-1] == processor.stop_ids[0] and not set(ids[:-1]) & {*processor.stop_ids}


@pytest.mark.parametrize("token", [word for word in WORDS if word.startswith("<|")])
def test_data_cannot_write_control_tokens(processor, token):
    plain = processor.encode("a b", []).tokens.tolist()
    written = processor.encode(f"a{token}b", []).tokens.tolist()
    control = set(range(len(WORDS)))
    assert [t for t in written if t in control] == [t for t in plain if t in control]
    assert not set(processor.encode_response(f"a{token}b")[:-1]) & control


def test_stop_and_forbidden_ids(processor):
    known = processor.tokenizer.get_vocab()
    assert processor.stop_ids == (known["<|im_end|>"], known["<|endoftext|>"])
    others = {known[word] for word in WORDS} - set(processor.stop_ids)
    assert set(processor.forbidden_ids) == others | set(range(len(processor.tokenizer), VOCAB))


def test_a_processor_can_be_sent_to_a_worker(processor):
    there = pickle.loads(pickle.dumps(processor)).encode("How many?", [picture(30, 50)])
    here = processor.encode("How many?", [picture(30, 50)])
    for ours, theirs in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_template_that_opens_a_block_of_thoughts(words, tmp_path):
    hf.copy_files(words, tmp_path)
    template = qwen.TEMPLATE.replace("assistant\n", "assistant\n<think>\n")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    processor = qwen.QwenProcessor(CONFIG, qwen.load_tokenizer(tmp_path))
    assert processor.decode(processor.encode("Why?", []).tokens).endswith("assistant\n<think>\n")


def test_a_tokenizer_of_another_policy(words, processor, tmp_path):
    with pytest.raises(ValueError, match=r"<\|image_pad\|> is 7, config.json's image_token_id 9"):
        qwen.QwenProcessor(dataclasses.replace(CONFIG, image_token_id=9), processor.tokenizer)
    hf.copy_files(words, tmp_path)
    template = "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}"  # Qwen2.5's
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(ValueError, match="the chat template is not this policy's: .* it makes TypeError"):
        qwen.QwenProcessor(CONFIG, qwen.load_tokenizer(tmp_path))


# ---- checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, pytest.param(TIED, marks=pytest.mark.slow)])
def test_config_is_read_back(words, tmp_path, config):
    source = models.FromScratch(qwen25vl.FAMILY, config, words)
    source.save(source.build(), tmp_path)
    assert models.Pretrained(tmp_path).config == config
    fewer = models.Pretrained(tmp_path, max_crops=3).config
    assert fewer.num_crops == 3 and fewer.most_pixels == 3 * SIDE**2
    head = "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    assert head == (not config.decoder.tie_word_embeddings)


@pytest.mark.parametrize(
    ("file", "part", "key", "value"),
    [
        ("config.json", "vision_config", "hidden_act", "gelu"),
        ("config.json", "vision_config", "temporal_patch_size", 1),
        ("config.json", "vision_config", "out_hidden_size", 32),
        ("config.json", "vision_config", "fullatt_block_indexes", [3]),
        ("config.json", "vision_config", "depth", 0),
        ("config.json", "vision_config", "num_heads", "2"),
        ("config.json", "vision_config", "in_chans", 1),
        ("config.json", "vision_config", "attention_window", 7),
        ("config.json", "vision_config", "rope_parameters", {"rope_type": "axial", "rope_theta": 77.0}),
        ("config.json", "rope_scaling", "mrope_section", [1, 1, 1]),
        ("config.json", "", "use_sliding_window", 3),
        ("preprocessor_config.json", "", "resample", 1),
        ("preprocessor_config.json", "", "merge_size", 1),
        ("preprocessor_config.json", "", "min_pixels", 10**7),
        ("preprocessor_config.json", "", "max_pixels", "7"),
    ],
)
def test_siblings_of_another_architecture_are_refused(folder, tmp_path, file, part, key, value):
    hf.copy_files(folder, tmp_path)
    values = hf.read_json(folder / file)
    (values[part] if part else values)[key] = value
    values |= {"sliding_window": 16} if key == "use_sliding_window" else {}
    (tmp_path / file).write_text(json.dumps(values))
    key = {"rope_parameters": "rope_theta", "use_sliding_window": "sliding_window"}.get(key, key)
    with pytest.raises(ValueError, match=f"{key} (is|=) "):
        models.Pretrained(tmp_path)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="min_pixels = 128 is not between a feature's 64 and the most, 0"):
        dataclasses.replace(CONFIG, num_crops=0)
    for change, message in (
        ({"image_size": 20}, "a crop of 20 pixels a side holds no whole number of 8"),
        ({"num_heads": 8}, "the tower's heads are 2 wide"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, **change))


def test_import_then_export_is_bit_for_bit(folder, tmp_path):
    source = models.Pretrained(folder)
    source.save(source.load("float32"), tmp_path / "out")
    there, here = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert there.keys() == here.keys() and len(there) == 2 * 12 + 3 + 3 * 12 + 1 + 5
    for name in there:
        assert there[name].dtype == here[name].dtype == jnp.bfloat16
        assert there[name].tobytes() == here[name].tobytes(), name


# ---- rows ---------------------------------------------------------------------------------------------


def test_branches_do_not_see_each_other(processor):
    """A shared row's logits are those of its branches alone, with images in the prefix."""
    prompt = processor.encode("Area?", pictures([(30, 50), (16, 16)]))
    answers = [processor.encode_response(text) for text in ("12", "Step 1: 3 cm")]
    policy = model()
    both = np.asarray(tiny.logits(policy, batch([prompt], [answers])))[0]
    alone = np.asarray(tiny.logits(policy, batch([prompt, prompt], [answers[:1], answers[1:]])))
    n, m = len(prompt.tokens), len(answers[0])
    close(both[: n + m], alone[0, : n + m], POLICY)
    close(both[n + m :], alone[1, n:], POLICY)


def test_padding_crops_do_not_matter(processor):
    """A row has the same logits beside one with more crops."""
    long = processor.encode("Area of the triangle?", [picture(60, 30)])
    short = processor.encode("?", [picture(20, 10)])
    policy = model()
    together = np.asarray(tiny.logits(policy, batch([long, short])))[1]
    close(together[: len(short.tokens)], np.asarray(tiny.logits(policy, batch([short])))[0], POLICY)


def test_pieces_of_the_queries(monkeypatch):
    """Full attention in pieces is that of all queries at once."""
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 11, 2, 4)).astype(np.float32)
    segment = rng.integers(0, 3, (2, 11))
    whole = qwen25vl.segmented(q, k, v, segment)
    monkeypatch.setattr("mstar_jax.models.vision.QUERIES", 4)
    close(qwen25vl.segmented(q, k, v, segment), whole, 11)


def loss(policy, rows, remat=None):
    hidden = policy(rows, remat)
    logprob, _ = policy.token_logprobs(hidden, rows.tokens, rows.loss_mask > 0)
    return -(logprob * rows.loss_mask).sum()


@pytest.mark.slow
def test_recomputation_and_sharding_change_no_gradient(processor):
    prompt = processor.encode("Area?", [picture(60, 50)])
    rows = batch([prompt] * 4, [[processor.encode_response("Step 1: 3 cm")]] * 4)
    remat = jax.checkpoint_policies.nothing_saveable
    kept = sharding.named(jax.jit(jax.grad(loss))(model(), rows))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        layout = sharding.shardings(model(), sharding.TRAIN, mesh)
        cut = jax.device_put((model(), rows), (layout, sharding.batch_sharding(mesh)))
        recomputed = sharding.named(jax.jit(jax.grad(loss), static_argnums=2)(*cut, remat))
    scale = max(float(np.abs(value).max()) for value in kept.values())
    for name, value in kept.items():
        close(recomputed[name], value, POLICY, scale=scale, err_msg=name)
        assert np.abs(value).max() > 1e-4, name


@pytest.mark.slow  # they are the shared decoder's
def test_adapters(processor):
    """They add to the decoder's projections, and merge into them; nothing else is trained."""
    decoder = dataclasses.replace(CONFIG.decoder, lora_rank=2, lora_alpha=2.0)
    policy = model(dataclasses.replace(CONFIG, decoder=decoder))
    prompt = processor.encode("Area?", [picture(30, 50)])
    rows = batch([prompt], [[processor.encode_response("12")]])
    adapted, merged = (np.asarray(tiny.logits(m, rows)) for m in (policy, policy.merged()))
    close(adapted, merged, POLICY)
    assert np.abs(adapted - np.asarray(tiny.logits(model(), rows))).max() > 0.1
