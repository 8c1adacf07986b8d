"""SmolVLM: tiles, prompts, tokens, checkpoints; what needs no reference implementation."""

import dataclasses
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
from mstar_jax.crops import splitting
from mstar_jax.models import hf, smolvlm, tokenizer, vlm
from mstar_jax.models.layers import DecoderConfig
from mstar_jax.models.vision import VitConfig, tanh_gelu
from mstar_jax.plan import official
from mstar_jax.structs import Batch

# As in the 2.2B model, a tile is no multiple of a patch; as in the others, heads are in threes.
VOCAB, SIDE = 310, 26
WORDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", smolvlm.GLOBAL)
WORDS += tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
WORDS += (smolvlm.AROUND, smolvlm.IMAGE, smolvlm.END)
CONFIG = smolvlm.SmolVLMConfig(
    DecoderConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_layers=2,
        num_heads=3,
        num_kv_heads=1,
        head_dim=8,
        rope_theta=100000.0,
        max_position=512,
        original_max_position=512,
    ),
    VitConfig(
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        image_size=SIDE,
        patch_size=4,
        layer_norm_eps=1e-6,
        activation=tanh_gelu,
        select_layer=-1,
        patch_bias=True,
        class_token=False,
        pre_norm=False,
    ),
    num_crops=16,
    scale_factor=3,
    longest_edge=4 * SIDE,
    image_token_id=WORDS.index(smolvlm.IMAGE),
)
WHOLE = dataclasses.replace(CONFIG, split=False, num_crops=0)
TIED = dataclasses.replace(CONFIG, decoder=dataclasses.replace(CONFIG.decoder, tie_word_embeddings=True))


def make_words(folder):
    """A tokenizer with the released one's special tokens."""
    texts = [*tiny.TEXTS, "User: Assistant:\n\n"]
    tokenizer.make(texts, folder, VOCAB - 10, special=WORDS, bos="<|im_start|>", eos=smolvlm.END)
    return folder


def picture(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def model(config=CONFIG, seed=0):
    """A policy whose every parameter is random."""
    return tiny.randomised(lambda: smolvlm.SmolVLM(config, nnx.Rngs(0)), seed)


def splitting_of(config):
    return splitting.Splitting(config.num_crops, config.vision.image_size, config.longest_edge, config.split)


def batch(prompts, responses=None):
    """Rows of encoded prompts, each followed by its responses as branches."""
    responses = responses or [()] * len(prompts)
    rows = len(prompts)
    length = max(len(p.tokens) + sum(map(len, own)) for p, own in zip(prompts, responses))
    tokens, branch, index = (np.full((rows, length), fill, np.int32) for fill in (0, -1, -1))
    for i, (prompt, own) in enumerate(zip(prompts, responses)):
        parts = [prompt.tokens, *(np.array(one, np.int32) for one in own)]
        n, size = len(prompt.tokens), sum(map(len, parts))
        tokens[i, :size] = np.concatenate(parts)
        branch[i, :size] = np.repeat(np.arange(len(parts)), list(map(len, parts)))
        index[i, :n] = prompt.image_index
    stack = tiny_minicpm.stacked(prompts)
    return Batch(tokens, branch, (branch > 0).astype(np.float32), index, stack)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return make_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def processor(words):
    return smolvlm.SmolVLMProcessor(CONFIG, smolvlm.load_tokenizer(words))


@pytest.fixture(scope="module")
def folder(words, tmp_path_factory):
    """A tiny policy in the official format, in bfloat16 as the released weights are."""
    path = tmp_path_factory.mktemp("policy")
    models.FromScratch(smolvlm.FAMILY, CONFIG, words).save(model(), path, "bfloat16")
    return path


# ---- tiles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "resized", "grid"),
    [  # by hand, for tiles of 512 pixels and a longest edge of 2048
        ((500, 500), (2048, 2048), (4, 4)),
        ((2048, 1536), (2048, 1536), (3, 4)),
        ((1000, 300), (2048, 614), (2, 4)),  # 614.4; two rows, for one would squeeze it
        ((300, 1000), (614, 2048), (4, 2)),
        ((4000, 1000), (2048, 512), (1, 4)),
        ((4000, 999), (2048, 512), (1, 4)),  # 511.5, made even
        ((5000, 1), (2048, 1), (1, 4)),
        ((1, 5000), (1, 2048), (4, 1)),
    ],
)
def test_layouts(size, resized, grid):
    cut = splitting_of(official.SMOLVLM2_256M).layout(size)
    assert (cut.size, (cut.rows, cut.columns)) == (resized, grid)


def test_fewer_tiles():
    """The longer side has as many tiles as are allowed; one tile is the whole image alone."""

    def cut(most, size):
        return splitting_of(dataclasses.replace(official.SMOLVLM2_256M, num_crops=most)).layout(size)

    assert [cut(most, (500, 500)).crops for most in (16, 15, 9, 8, 4, 3, 1)] == [17, 10, 10, 5, 5, 1, 1]
    assert cut(4, (4000, 1000)) == smolvlm.Layout((2048, 512), 1, 4)
    assert cut(3, (4000, 1000)) == smolvlm.Layout((1536, 384), 1, 3)
    assert cut(1, (4000, 1000)) == smolvlm.Layout((512, 128))
    whole = dataclasses.replace(official.SMOLVLM2_256M, split=False)
    assert splitting_of(whole).layout((500, 250)) == splitting.Layout((2048, 1024))


def test_tiles_are_the_image():
    """Pieces of the resized image row by row, then the image as one tile."""
    image = picture(4 * SIDE, 2 * SIDE)
    crops, places = splitting_of(CONFIG)([image])
    values = np.asarray(image)
    assert crops.shape == (9, SIDE, SIDE, 3) and crops.dtype == np.uint8
    assert places.tolist() == [*([2, 4, r, c] for r in range(2) for c in range(4)), [2, 4, -1, -1]]
    for number, (row, column) in enumerate((r, c) for r in range(2) for c in range(4)):
        there = values[row * SIDE :, column * SIDE :][:SIDE, :SIDE]
        np.testing.assert_array_equal(crops[number], there)
    assert abs(crops[-1].mean() - values.mean()) < 6


# ---- prompts ------------------------------------------------------------------------------------------


def test_prompt_of_a_cut_image(processor):
    prompt = processor.encode("How many?", [picture(4 * SIDE, 2 * SIDE)])
    tokens = np.where(prompt.image_index >= 0, CONFIG.image_token_id, prompt.tokens)
    span = "<image>" * 4
    rows = "".join(
        "".join(f"<fake_token_around_image><row_{r}_col_{c}>{span}" for c in range(1, 5)) + "\n"
        for r in range(1, 3)
    )
    assert processor.tokenizer.decode(tokens) == (
        f"<|im_start|>User:{rows}\n<fake_token_around_image><global-img>{span}<fake_token_around_image>"
        "How many?<end_of_utterance>\nAssistant:"
    )
    places = prompt.image_index >= 0
    assert prompt.image_index[places].tolist() == list(range(36)) and (prompt.tokens[places] == 0).all()
    assert processor.prefix_shapes(["How many?"], [[(4 * SIDE, 2 * SIDE)]])[0] == (len(tokens), 9)


def test_prompts_of_whole_images_and_of_text(words):
    processor = smolvlm.SmolVLMProcessor(WHOLE, smolvlm.load_tokenizer(words))
    images = [picture(40, 20), picture(7, 9)]
    span = "<fake_token_around_image><global-img><image><image><image><image><fake_token_around_image>"
    for count, start in ((2, f"User:{span}{span}"), (1, f"User:{span}"), (0, "User: ")):
        prompt = processor.encode("Why?", images[:count])
        tokens = np.where(prompt.image_index >= 0, CONFIG.image_token_id, prompt.tokens)
        text = processor.tokenizer.decode(tokens)
        assert text == f"<|im_start|>{start}Why?<end_of_utterance>\nAssistant:"
        assert prompt.pixels.pixels.shape == (count, SIDE, SIDE, 3)
        assert prompt.pixels.places.tolist() == [[1, 1, -1, -1]] * count
        assert processor.prefix_shapes(["Why?"], [[image.size for image in images[:count]]])[0] == (
            len(tokens),
            count,
        )


def test_responses_come_back(processor):
    for text in (" Step 1: the answer is 12.", "\n12", " <b>x</b>  y ", ""):
        ids = processor.encode_response(text)
        assert processor.decode(ids) == text and ids[-1] == processor.stop_ids[0]
        assert not set(ids[:-1]) & {*processor.stop_ids, *processor.forbidden_ids}
    assert processor.decode(processor.encode_response("12")) == " 12"  # as the chat template writes it


@pytest.mark.parametrize("token", WORDS)
def test_data_cannot_write_control_tokens(processor, token):
    plain = processor.encode("a b", []).tokens.tolist()
    written = processor.encode(f"a{token}b", []).tokens.tolist()
    control = set(range(len(WORDS)))
    assert [t for t in written if t in control] == [t for t in plain if t in control]
    assert not set(processor.encode_response(f"a{token}b")[:-1]) & control
    assert processor.decode(processor.encode_response(f" a{token}b")) == f" a{token[0]} {token[1:]}b"


def test_marks_that_are_not_tokens_are_data_too(tmp_path):
    """Idefics3's tokenizer spells the places of tiles in pieces."""
    special = [word for word in WORDS if not word.startswith(("<row", "<global"))]
    tokenizer.make(tiny.TEXTS, tmp_path, VOCAB, special=special, bos="<|im_start|>", eos=smolvlm.END)
    config = dataclasses.replace(CONFIG, image_token_id=special.index(smolvlm.IMAGE))
    processor = smolvlm.SmolVLMProcessor(config, smolvlm.load_tokenizer(tmp_path))
    shown = processor.decode(processor.encode("<row_1_col_1>?", [picture(30, 30)]).tokens)
    assert shown.count("<row_1_col_1>") == 1 and shown.count("< row_1_col_1>") == 1


def test_stop_and_forbidden_ids(processor):
    known = processor.tokenizer.get_vocab()
    stops = ("<end_of_utterance>", "<|im_end|>", "<|endoftext|>")
    assert processor.stop_ids == tuple(known[token] for token in stops)
    others = {known[word] for word in WORDS} - set(processor.stop_ids)
    assert set(processor.forbidden_ids) == others | set(range(len(processor.tokenizer), VOCAB))
    assert len(processor.tokenizer) < VOCAB and processor.vocab_size == VOCAB


def test_a_processor_can_be_sent_to_a_worker(processor):
    there = pickle.loads(pickle.dumps(processor)).encode("How many?", [picture(30, 50)])
    here = processor.encode("How many?", [picture(30, 50)])
    jax.tree.map(np.testing.assert_array_equal, here, there)


def test_a_tokenizer_of_another_policy(words, processor, tmp_path):
    with pytest.raises(ValueError, match="<image> is 21, config.json's image_token_id 7"):
        smolvlm.SmolVLMProcessor(dataclasses.replace(CONFIG, image_token_id=7), processor.tokenizer)
    hf.copy_files(words, tmp_path)
    for template, made in (
        ("{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}", "TypeError"),  # SmolLM2's
        ("{{ messages[0]['content'] }}", "'type': 'image'"),
        ("{{ messages.upper() }}", "has no attribute 'upper'"),
    ):
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
        with pytest.raises(ValueError, match=f"the chat template is not this policy's: .* it makes .*{made}"):
            smolvlm.SmolVLMProcessor(CONFIG, smolvlm.load_tokenizer(tmp_path))


# ---- checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, WHOLE, TIED])
def test_config_is_read_back(words, tmp_path, config):
    source = models.FromScratch(smolvlm.FAMILY, config, words)
    source.save(source.build(), tmp_path)
    assert models.Pretrained(tmp_path).config == config
    assert models.Pretrained(tmp_path, max_crops=3).config.num_crops == 3
    head = "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    assert head == (not config.decoder.tie_word_embeddings)
    values = hf.read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": "idefics3"}))
    assert models.Pretrained(tmp_path).config == config


def test_where_the_tiles_are_described(folder, tmp_path):
    """In the image processor's file, in the processor's as transformers 5 writes it, or in config.json."""
    values = hf.read_json(folder / "config.json")
    values["vision_config"]["size"] = {"longest_edge": 2 * SIDE}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert smolvlm.read_config(tmp_path).num_crops == 4
    own = hf.read_json(folder / "preprocessor_config.json") | {"do_image_splitting": False}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": own}))
    assert smolvlm.read_config(tmp_path) == WHOLE
    own |= {"do_image_splitting": True, "size": {"longest_edge": 70}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    assert smolvlm.read_config(tmp_path) == dataclasses.replace(CONFIG, longest_edge=70, num_crops=9)


@pytest.mark.parametrize(
    ("file", "part", "key", "value"),
    [
        ("config.json", "text_config", "model_type", "qwen2"),
        ("config.json", "text_config", "mlp_bias", True),
        ("config.json", "text_config", "qk_layer_norms", True),
        ("config.json", "vision_config", "hidden_act", "gelu"),
        ("preprocessor_config.json", "", "resample", 3),
        ("preprocessor_config.json", "", "max_image_size", {"longest_edge": 52}),
        ("preprocessor_config.json", "", "image_mean", [0.4, 0.5, 0.5]),
    ],
)
def test_siblings_of_another_architecture_are_refused(folder, tmp_path, file, part, key, value):
    hf.copy_files(folder, tmp_path)
    values = hf.read_json(folder / file)
    (values[part] if part else values)[key] = value
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"{file}: .*{key} is "):
        models.Pretrained(tmp_path)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="scale_factor = 4 does not divide the 6 patches"):
        dataclasses.replace(CONFIG, scale_factor=4)
    with pytest.raises(ValueError, match="longest_edge = 5000: at most 4096"):
        dataclasses.replace(CONFIG, longest_edge=5000)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_then_export_is_bit_for_bit(folder, tmp_path, dtype):
    source = models.Pretrained(folder)
    source.save(source.load(dtype), tmp_path / "out")
    there, here = load_file(folder / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert there.keys() == here.keys() and len(there) == 2 * 9 + 3 + 2 * 16 + 5 + 1
    for name in there:
        assert there[name].dtype == here[name].dtype == jnp.bfloat16
        assert there[name].tobytes() == here[name].tobytes(), name
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_what_is_written_is_what_was_there(folder):
    policy, processor = models.load(folder, jnp.float32)
    want = sharding.named(model())
    for name, value in sharding.named(policy).items():
        rounded = np.asarray(want[name]).astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(value, rounded, err_msg=name)
    assert policy.config == CONFIG and processor.config == CONFIG


def test_straight_into_a_sharding(folder):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    whole, _ = models.load(folder, jnp.float32)
    policy = models.Pretrained(folder).load(jnp.float32, mesh=mesh)
    cut, parts = 0, [sharding.named(whole), sharding.named(policy)]
    for name, leaf in parts[0].items():
        np.testing.assert_array_equal(np.asarray(parts[1][name]), np.asarray(leaf), err_msg=name)
        cut += parts[1][name].addressable_shards[0].data.size < leaf.size
    assert cut > 15


def test_as_the_trunk_of_a_reward_model(words, processor, tmp_path):
    reward = vlm.RewardModel(model())
    reward.weight[...] = jnp.asarray(np.random.default_rng(0).normal(size=24), jnp.float32)
    models.FromScratch(smolvlm.FAMILY, CONFIG, words).save(reward, tmp_path)
    there = models.Pretrained(tmp_path).load_reward(jnp.float32)
    prompt = processor.encode("Area?", [picture(30, 50)])
    one = batch([prompt], [[processor.encode_response("12"), processor.encode_response("3 cm")]])
    score = jax.jit(lambda m, b: m(b)[0])
    np.testing.assert_array_equal(score(reward, one), score(there, one))
    assert np.ptp(np.asarray(score(there, one))) > 0.1


# ---- rows ---------------------------------------------------------------------------------------------


def test_branches_do_not_see_each_other(processor):
    """A shared row's logits are those of its branches alone, with a cut image in the prefix."""
    prompt = processor.encode("Area?", [picture(30, 50), picture(16, 16)])
    answers = [processor.encode_response(text) for text in ("12", "Step 1: 3 cm")]
    policy = model()
    both = np.asarray(tiny.logits(policy, batch([prompt], [answers])))[0]
    first = np.asarray(tiny.logits(policy, batch([prompt], [answers[:1]])))[0]
    second = np.asarray(tiny.logits(policy, batch([prompt], [answers[1:]])))[0]
    n = len(prompt.tokens)
    close(both[: n + len(answers[0])], first, POLICY)
    close(both[-len(answers[1]) :], second[-len(answers[1]) :], POLICY)


def test_padding_crops_do_not_matter(processor):
    """A row has the same logits beside one with more crops."""
    long = processor.encode("Area of the triangle?", [picture(30, 30)])
    short = processor.encode("?", [picture(90, 20)])
    policy = model()
    together = np.asarray(tiny.logits(policy, batch([long, short])))[1]
    alone = np.asarray(tiny.logits(policy, batch([short])))[0]
    close(together[: len(alone)], alone, POLICY)


def loss(policy, rows, remat=None):
    hidden = policy(rows, remat)
    logprob, _ = policy.token_logprobs(hidden, rows.tokens, rows.loss_mask > 0)
    return -(logprob * rows.loss_mask).sum()


@pytest.mark.parametrize("config", [pytest.param(CONFIG, marks=pytest.mark.slow), TIED])
def test_recomputation_changes_no_gradient(processor, config):
    prompt = processor.encode("Area?", [picture(60, 50)])
    rows = batch([prompt], [[processor.encode_response("Step 1: 3 cm")]])
    kept, recomputed = (
        sharding.named(jax.jit(jax.grad(loss), static_argnums=2)(model(config), rows, remat))
        for remat in (None, jax.checkpoint_policies.nothing_saveable)
    )
    scale = max(float(np.abs(value).max()) for value in kept.values())
    for name, value in kept.items():
        close(recomputed[name], value, POLICY, scale=scale, err_msg=name)
        assert np.abs(value).max() > 1e-3 or name.endswith("k_bias"), name  # which changes no softmax


def test_adapters(processor):
    """They add to the decoder's projections, and merge into them; nothing else is trained."""
    decoder = dataclasses.replace(CONFIG.decoder, lora_rank=2)
    policy = model(dataclasses.replace(CONFIG, decoder=decoder))
    prompt = processor.encode("Area?", [picture(30, 50)])
    rows = batch([prompt], [[processor.encode_response("12")]])
    adapted, merged = (np.asarray(tiny.logits(m, rows)) for m in (policy, policy.merged()))
    close(adapted, merged, POLICY)
    plain = np.asarray(tiny.logits(model(), rows))
    assert np.abs(adapted - plain).max() > 0.1
