"""InternVL2.5 to 3.5: prompts, tokens and checkpoints of both formats, without a reference implementation."""

import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_internvl2
import tiny
import tokenizers
import transformers
from close import POLICY, close
from flax import nnx
from safetensors.numpy import load_file
from test_internvl2 import picture
from test_smolvlm import batch, loss

from mstar_jax import models, sharding
from mstar_jax.models import hf, internvl, internvl_chat, internvl_hf, tokenizer, vlm
from mstar_jax.models.processor import Opened
from mstar_jax.rewards import prm

SIZE, VOCAB, PIECES = 16, 310, 280
SPECIAL = ("<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|vision_pad|>", "<img>", "</img>")
SPECIAL += ("<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>", "<video>")
PLAIN = ("<think>", "</think>", "<tool_call>")  # added, but not special: a text may write them
ID = {token: PIECES + number for number, token in enumerate((*SPECIAL, *PLAIN))}
CHAT_TEMPLATE = (  # of the released folders
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = CHAT_TEMPLATE.replace("assistant\n' }}", "assistant\n<think>\n' }}")
SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
SYSTEM += "联合开发的多模态大语言模型。"

QWEN2 = dataclasses.replace(test_internvl2.CONFIG.decoder, vocab_size=VOCAB, qkv_bias=True, rms_norm_eps=1e-6)
QWEN3 = dataclasses.replace(QWEN2, hidden_size=24, qkv_bias=False, qk_norm=True)  # no 4 heads of 8
SMALL_TOWER = test_internvl2.CONFIG.vision
LARGE_TOWER = dataclasses.replace(SMALL_TOWER, qkv_bias=False, qk_norm=True, rms_norm=True)  # as InternViT-6B
CHAT = {
    "qwen2": internvl_chat.InternVLChatConfig(QWEN2, SMALL_TOWER, 6, template="internvl2_5"),
    "qwen3": internvl_chat.InternVLChatConfig(
        QWEN3, LARGE_TOWER, 6, template="internvl2_5", system="<think> first"
    ),
}
HF = {
    "qwen2": internvl_hf.InternVLHFConfig(QWEN2, SMALL_TOWER, 6, image_token_id=ID["<IMG_CONTEXT>"]),
    "qwen3": internvl_hf.InternVLHFConfig(QWEN3, LARGE_TOWER, 6, image_token_id=ID["<IMG_CONTEXT>"]),
}
FORMATS = {"chat": (internvl_chat.FAMILY, CHAT), "hf": (internvl_hf.FAMILY, HF)}


def make_words(folder, template=CHAT_TEMPLATE, files="tokenizer.json"):
    """Qwen's tokenizer with the released one's added tokens, as tokenizer.json or as the older files."""
    trained = tokenizers.ByteLevelBPETokenizer()
    texts = [*tiny.TEXTS, "user system assistant\n"] * 2
    trained.train_from_iterator(texts, vocab_size=PIECES, min_frequency=1, show_progress=False)
    folder.mkdir(exist_ok=True)
    trained.save_model(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    assert len(vocab) == PIECES
    if files == "tokenizer.json":
        (folder / "vocab.json").unlink()
        (folder / "merges.txt").unlink()
        made = transformers.Qwen2Tokenizer(vocab, merges, eos_token="<|im_end|>", chat_template=template)
        made.add_tokens([tokenizers.AddedToken(t, special=True) for t in SPECIAL], special_tokens=True)
        made.add_tokens(list(PLAIN))
        made.save_pretrained(folder)
    else:
        described = {str(i): {"content": t, "special": t in SPECIAL} for t, i in ID.items()}
        described = {i: {"normalized": False, **one} for i, one in described.items()}
        config = {"added_tokens_decoder": described, "chat_template": template, "eos_token": "<|im_end|>"}
        config |= {"tokenizer_class": "Qwen2Tokenizer", "auto_map": {"AutoTokenizer": ["never.Run", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "added_tokens.json").write_text(json.dumps(ID))
    return folder


def model(config, seed=0):
    """A policy whose every parameter is random."""
    return tiny.randomised(lambda: internvl.InternVL(config, nnx.Rngs(0)), seed)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return make_words(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def chat(words):
    return internvl_chat.InternVLChatProcessor(CHAT["qwen2"], internvl.load_tokenizer(words))


@pytest.fixture(scope="module")
def processor(words):
    return internvl_hf.InternVLHFProcessor(HF["qwen2"], internvl_hf.load_tokenizer(words))


@pytest.fixture(scope="module", params=[("chat", "qwen3"), ("hf", "qwen2")], ids="-".join)
def source(request, words, tmp_path_factory):
    """A tiny policy in one of the formats, in bfloat16 as the released weights are."""
    family, configs = FORMATS[request.param[0]]
    path, config = tmp_path_factory.mktemp("policy"), configs[request.param[1]]
    models.FromScratch(family, config, words).save(model(config), path, "bfloat16")
    found = models.Pretrained(path)
    assert found.family is family and found.config == config
    return found


# ---- prompts ------------------------------------------------------------------------------------------


def shown(processor, prompt):
    """The prompt as a text, with `<IMG_CONTEXT>` at the places of features."""
    tokens = np.where(prompt.image_index >= 0, ID["<IMG_CONTEXT>"], prompt.tokens)
    return processor.tokenizer.decode(tokens)


SPAN, SPANS = "<img>" + "<IMG_CONTEXT>" * 4 + "</img>\n", "<img>" + "<IMG_CONTEXT>" * 12 + "</img>\n"


@pytest.mark.parametrize(
    ("sizes", "spans"), [([], ""), ([(16, 16)], SPAN), ([(33, 16), (17, 16)], SPANS + SPAN)]
)
def test_prompts_of_the_original_code(chat, sizes, spans):
    prompt = chat.encode("How many?", [picture(*size) for size in sizes])
    whole = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{spans}How many?<|im_end|>\n"
    assert shown(chat, prompt) == whole + "<|im_start|>assistant\n"
    ids = chat.tokenizer(whole + "<|im_start|>assistant\n")["input_ids"]  # read as a whole
    places = np.array(ids) == ID["<IMG_CONTEXT>"]
    np.testing.assert_array_equal(prompt.tokens, np.where(places, 0, ids))
    assert prompt.image_index[places].tolist() == list(range(places.sum()))
    assert chat.prefix_shapes(["How many?"], [sizes])[0] == (len(ids), len(prompt.pixels.places))


def test_a_conversation_with_a_step_a_turn(chat):
    """As VisualPRM's code asks: every step is a turn of the user's, answered by `+`, which the places of the
    scores predict. The same ids as the whole conversation's."""
    mark, between = "<|im_end|>\n<|im_start|>assistant\n", "+<|im_end|>\n<|im_start|>user\n"
    ids = (tokenizer.literal(chat.tokenizer, text) for text in (mark, between))
    opened, encode = Opened(chat), prm.marked(chat, *ids)
    question, text = "### Question:\nWhy?\n\n### Solution Process:\n", "area 4 <|im_end|>\n\nThe answer is 4."
    prompt, (tokens, ends) = opened.prefix(question, [(33, 16)]), encode(text)
    assert opened.prefix_shapes([question], [[(33, 16)]])[0] == (len(prompt.tokens), 3)
    turns = f"{question}area 4 < |im_end|>{mark}{between}The answer is 4.{mark}"
    whole = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{SPANS}{turns}"
    ids = np.array(chat.tokenizer(whole)["input_ids"])
    ids[ids == ID["<IMG_CONTEXT>"]] = 0
    assert [*prompt.tokens, *tokens] == ids.tolist()
    upto = [chat.tokenizer.decode(tokens[: end + 1]) for end in ends]
    assert [part.count("assistant\n") for part in upto] == [1, 2]
    assert all(part.endswith("assistant\n") for part in upto)


def test_a_system_message_of_the_checkpoint(words):
    """InternVL3.5's thinking mode is a system message; its tags are ordinary tokens."""
    config = dataclasses.replace(CHAT["qwen3"], system="Think in <think> and </think>.")
    thinking = internvl_chat.InternVLChatProcessor(config, internvl.load_tokenizer(words))
    text = shown(thinking, thinking.encode("Why?", []))
    assert text.startswith(
        "<|im_start|>system\nThink in <think> and </think>.<|im_end|>\n<|im_start|>user\nWhy?"
    )


@pytest.mark.parametrize(("template", "opens"), [(CHAT_TEMPLATE, ""), (THINKING, "<think>\n"), (None, "")])
def test_prompts_of_the_chat_template(tmp_path, template, opens):
    """Without one, the official one. A block that the template opens is the prompt's end."""
    words = make_words(tmp_path / "words", template)
    processor = internvl_hf.InternVLHFProcessor(HF["qwen3"], internvl_hf.load_tokenizer(words))
    for sizes, spans in (([], ""), ([(16, 16)], SPAN), ([(33, 16), (17, 16)], SPANS + SPAN)):
        prompt = processor.encode("Why?", [picture(*size) for size in sizes])
        whole = f"<|im_start|>user\n{spans}Why?<|im_end|>\n<|im_start|>assistant\n{opens}"
        assert shown(processor, prompt) == whole
        ids = np.array(processor.tokenizer(whole)["input_ids"])
        np.testing.assert_array_equal(prompt.tokens, np.where(ids == ID["<IMG_CONTEXT>"], 0, ids))
        assert processor.prefix_shapes(["Why?"], [sizes])[0] == (len(ids), len(prompt.pixels.places))
    if opens:
        assert prompt.tokens[-2] == ID["<think>"]


def test_other_templates_are_refused(words, tmp_path):
    hf.copy_files(words, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    for template, made in (("{{ messages[0]['content'] }}", "'type': 'image'"), ("{{ x.y() }}", "Undefined")):
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
        with pytest.raises(ValueError, match=f"the chat template is not this policy's: .* it makes .*{made}"):
            internvl_hf.InternVLHFProcessor(HF["qwen2"], internvl_hf.load_tokenizer(tmp_path))
    config = dataclasses.replace(HF["qwen2"], image_token_id=7)
    with pytest.raises(
        ValueError, match=f"<IMG_CONTEXT> is {ID['<IMG_CONTEXT>']}, config.json's image_token_id 7"
    ):
        internvl_hf.InternVLHFProcessor(config, internvl_hf.load_tokenizer(words))


@pytest.mark.parametrize("name", ["chat", "processor"])
@pytest.mark.parametrize("token", [*SPECIAL, "<<img>", "[UNUSED_TOKEN_1]"])
def test_data_cannot_write_control_tokens(request, name, token):
    processor = request.getfixturevalue(name)
    control = {ID[special] for special in SPECIAL}
    plain, written = (processor.encode(text, []).tokens.tolist() for text in ("a b", f"a{token}b"))
    assert [t for t in written if t in control] == [t for t in plain if t in control]
    response = processor.encode_response(f"a{token}b")
    assert response[-1] == ID["<|im_end|>"] and not set(response[:-1]) & control


def test_responses_come_back(processor):
    for text in (
        "Step 1: x < 3\nThe answer is 12.",
        " <b>x</b>  y ",
        "",
        "<think>\n3 cm\n</think>\n\n12",
        "角度",
    ):
        ids = processor.encode_response(text)
        assert processor.decode(ids) == processor.decode(ids[:-1]) == text
        assert processor.decode([*ids, *processor.encode_response("more")]) == text
        assert not set(ids) & set(processor.forbidden_ids)
    assert ID["</think>"] in processor.encode_response("3</think>")
    assert processor.decode([ID["<box>"], *processor.encode_response("a")]) == "a"


def test_stop_and_forbidden_ids(processor, chat):
    for each in (processor, chat):
        assert each.stop_ids == tuple(ID[t] for t in ("<|im_end|>", "<|im_start|>", "<|endoftext|>"))
        images = {ID[t] for t in ("<img>", "</img>", "<IMG_CONTEXT>")}
        assert set(each.forbidden_ids) == images | set(range(PIECES + len(ID), VOCAB))
        assert each.vocab_size == VOCAB and each.length_limit(3) == 256
        again = pickle.loads(pickle.dumps(each))
        assert again.prefix_shapes(["?"], [[(30, 9)]]) == each.prefix_shapes(["?"], [[(30, 9)]])


def test_older_tokenizer_files_are_the_same(words, tmp_path):
    """vocab.json, merges.txt and added tokens: no tokenizer.json, and no remote class."""
    make_words(tmp_path, files="vocab.json")
    old, new = internvl_hf.load_tokenizer(tmp_path), internvl_hf.load_tokenizer(words)
    assert old.get_vocab() == new.get_vocab() and len(old) == len(new) == PIECES + len(ID)
    for text in ("<|im_start|>user\n<img> area? </think>", "é 角度  √2\n\n 1234", "a<box>b"):
        assert old(text)["input_ids"] == new(text)["input_ids"]
        assert old.decode(old(text)["input_ids"]) == text
    first, second = (internvl_hf.InternVLHFProcessor(HF["qwen2"], each) for each in (old, new))
    assert first.encode("a<img>", []).tokens.tolist() == second.encode("a<img>", []).tokens.tolist()


# ---- checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CHAT)
@pytest.mark.parametrize("form", FORMATS)
def test_config_is_read_back(form, kind, tmp_path):
    family, configs = FORMATS[form]
    for tied in (False, True):
        decoder = dataclasses.replace(configs[kind].decoder, tie_word_embeddings=tied)
        config = dataclasses.replace(configs[kind], decoder=decoder, min_crops=2)
        for name, values in family.config_files(config, "bfloat16").items():
            (tmp_path / name).write_text(json.dumps(values))
        assert models.Pretrained(tmp_path).config == config
        assert models.Pretrained(tmp_path, max_crops=3).config.num_crops == 3
        heads = [t.name for t in family.table(config) if "lm_head" in t.name]
        assert heads == ([] if tied else ["language_model.lm_head.weight"])


def test_what_released_files_hold_besides(tmp_path):
    """Keys of experts that are not there, of a longer context that is not read, of sliding windows."""
    [values] = internvl_chat.config_files(CHAT["qwen2"], "bfloat16").values()
    values["vision_config"] |= {
        "num_experts": 8,
        "num_shared_experts": 4,
        "use_moe": False,
        "drop_path_rate": 0.1,
    }
    values["llm_config"] |= {"max_window_layers": 70, "sliding_window": None, "use_sliding_window": False}
    values["llm_config"] |= {"layer_types": ["full_attention"] * 2, "moe_config": None, "use_bfloat16": True}
    values["llm_config"]["rope_scaling"]["rope_type"] = "dynamic"
    del values["system_message"], values["llm_config"]["head_dim"], values["llm_config"]["rms_norm_eps"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert models.Pretrained(tmp_path).config == CHAT["qwen2"]


def test_files_that_leave_out_defaults(tmp_path):
    """What transformers' classes assume where -hf folders say nothing; squares as lists; tiles of the image
    processor or of its part of the processor's file."""
    files = internvl_hf.config_files(HF["qwen2"], "bfloat16")
    c, images = files["config.json"], files["preprocessor_config.json"]
    del c["tie_word_embeddings"], c["text_config"]["rms_norm_eps"], c["text_config"]["tie_word_embeddings"]
    del c["vision_config"]["use_qk_norm"], c["vision_config"]["norm_type"], c["vision_feature_layer"]
    c["vision_config"] |= {"image_size": [SIZE, SIZE], "patch_size": [4, 4]}
    (tmp_path / "config.json").write_text(json.dumps(c))
    assert models.Pretrained(tmp_path).config == dataclasses.replace(HF["qwen2"], num_crops=12)
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": images | {"max_patches": 4}})
    )
    assert models.Pretrained(tmp_path).config.num_crops == 4
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images | {"max_patches": 1}))
    assert models.Pretrained(tmp_path).config.num_crops == 1


@pytest.mark.parametrize(
    ("file", "part", "key", "value"),
    [
        ("config.json", "text_config", "model_type", "gpt_oss"),
        ("config.json", "text_config", "mlp_bias", True),
        ("config.json", "vision_config", "use_mean_pooling", False),
        ("config.json", "vision_config", "use_absolute_position_embeddings", False),
        ("config.json", "vision_config", "norm_type", "batch_norm"),
        ("config.json", "vision_config", "layer_norm_eps", 1e-5),  # with norms of queries and keys
        ("config.json", "vision_config", "image_size", [16, 32]),
        ("config.json", "", "downsample_ratio", 0.25),
        ("config.json", "", "image_seq_length", 256),
        ("config.json", "", "vision_feature_layer", [-1, -2]),
        ("preprocessor_config.json", "", "image_mean", [0.5, 0.5, 0.5]),
        ("preprocessor_config.json", "", "size", {"height": 384, "width": 384}),
        ("preprocessor_config.json", "", "max_patches", 0),
    ],
)
def test_siblings_of_another_architecture_are_refused(tmp_path, file, part, key, value):
    files = internvl_hf.config_files(HF["qwen3"], "float32")
    (files[file][part] if part else files[file])[key] = value
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    key = {"vision_feature_layer": "select_layer"}.get(key, key)
    with pytest.raises(ValueError, match=f"{key} is "):
        models.Pretrained(tmp_path)


def original_name(name):
    """The tensor's name in the original format, for one of transformers' (by its conversion's mapping)."""
    for theirs, ours in (
        ("multi_modal_projector.layer_norm", "mlp1.0"),
        ("multi_modal_projector.linear_1", "mlp1.1"),
        ("multi_modal_projector.linear_2", "mlp1.3"),
        ("vision_tower.", "vision_model."),
        ("encoder.layer.", "encoder.layers."),
        ("embeddings.cls_token", "embeddings.class_embedding"),
        ("patch_embeddings.projection", "patch_embedding"),
        ("position_embeddings", "position_embedding"),
        ("lambda_", "ls"),
        ("attention.projection_layer", "attn.proj"),
        (".attention.", ".attn."),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
    ):
        if name.startswith(("vision_tower", "vision_model", "multi_modal")):
            name = name.replace(theirs, ours)
    return name


def original(tensors):
    """The original format's tensors, from those of transformers' format with a Qwen decoder."""
    out = {original_name(name): value for name, value in tensors.items()}
    for name in [name for name in out if ".attn.q_proj." in name]:
        parts = [out.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        out[name.replace("q_proj", "qkv")] = np.concatenate(parts)
    return out


@pytest.mark.parametrize("kind", CHAT)
def test_both_formats_hold_the_same_policy(words, kind, tmp_path):
    """The names of the one are those of the other by the official conversion's mapping, q, k and v apart."""
    policy = model(HF[kind])
    for form, (family, configs) in FORMATS.items():
        models.FromScratch(family, configs[kind], words).save(policy, tmp_path / form)
    there, here = (load_file(tmp_path / form / "model.safetensors") for form in ("hf", "chat"))
    want = original(there)
    assert here.keys() == want.keys() and len(here) < len(there)
    for name, value in here.items():
        assert value.tobytes() == want[name].tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_import_then_export_is_bit_for_bit(source, tmp_path, dtype):
    source.save(source.load(dtype), tmp_path)
    there, here = load_file(source.folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert there.keys() == here.keys()
    for name in there:
        assert there[name].dtype == here[name].dtype == jnp.bfloat16
        assert there[name].tobytes() == here[name].tobytes(), name
    for path in source.folder.iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_straight_into_a_sharding(source):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    parts = [sharding.named(source.load(jnp.float32, mesh=where)) for where in (None, mesh)]
    cut = 0
    for name, leaf in parts[0].items():
        np.testing.assert_array_equal(np.asarray(parts[1][name]), np.asarray(leaf), err_msg=name)
        cut += parts[1][name].addressable_shards[0].data.size < leaf.size
    assert cut > 15


def test_as_the_trunk_of_a_reward_model(source, tmp_path):
    reward = vlm.RewardModel(source.load(jnp.float32))
    width = source.config.decoder.hidden_size
    reward.weight[...] = jnp.asarray(np.random.default_rng(0).normal(size=width), jnp.float32)
    source.save(reward, tmp_path)
    there, processor = models.Pretrained(tmp_path).load_reward(jnp.float32), source.processor()
    prompt = processor.encode("Area?", [picture(30, 50)])
    one = batch([prompt], [[processor.encode_response("12"), processor.encode_response("3 cm")]])
    score = jax.jit(lambda m, b: m(b)[0])
    np.testing.assert_array_equal(score(reward, one), score(there, one))
    assert np.ptp(np.asarray(score(there, one))) > 0.1


# ---- rows ---------------------------------------------------------------------------------------------

KINDS = (pytest.param("qwen2", marks=pytest.mark.slow), "qwen3")


@pytest.mark.parametrize("kind", KINDS)
def test_branches_do_not_see_each_other(processor, kind):
    """A shared row's logits are those of its branches alone, with two images in the prefix; and a row has the
    same logits beside one with more tiles."""
    prompt = processor.encode("Area?", [picture(30, 50), picture(16, 16)])
    answers = [processor.encode_response(text) for text in ("12", "Step 1: 3 cm")]
    policy = model(HF[kind])
    both = np.asarray(tiny.logits(policy, batch([prompt], [answers])))[0]
    rows = batch([prompt, processor.encode("?", [picture(90, 20)] * 2)], [answers[1:], []])
    alone = np.asarray(tiny.logits(policy, rows))[0]
    n, end = len(prompt.tokens), len(answers[1])
    close(both[:n], alone[:n], POLICY)
    close(both[-end:], alone[n : n + end], POLICY)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters(processor, kind):
    """They add to the decoder's projections and merge into them, beside biases and norms."""
    decoder = dataclasses.replace(HF[kind].decoder, lora_rank=2)
    policy = model(dataclasses.replace(HF[kind], decoder=decoder))
    rows = batch([processor.encode("Area?", [])], [[processor.encode_response("12")]])
    adapted, merged = (np.asarray(tiny.logits(m, rows)) for m in (policy, policy.merged()))
    close(adapted, merged, POLICY)
    assert np.abs(adapted - np.asarray(tiny.logits(model(HF[kind]), rows))).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("kind", HF)
def test_recomputation_and_a_mesh_change_nothing(processor, kind):
    policy = model(HF[kind])
    prompts = [processor.encode("Area?", [picture(60, 50)])] * 4
    rows = batch(prompts, [[processor.encode_response("Step 1: 3 cm")]] * 4)
    grad = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    value, kept = grad(policy, rows, None)
    recomputed = sharding.named(grad(policy, rows, jax.checkpoint_policies.nothing_saveable)[1])
    kept = sharding.named(kept)
    scale = max(float(np.abs(each).max()) for each in kept.values())
    for name, each in kept.items():
        close(recomputed[name], each, POLICY, scale=scale, err_msg=name)
        assert np.abs(each).max() > 1e-3 or name.endswith("k_bias"), name  # the tower's changes no softmax
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        cut = jax.device_put(policy, sharding.shardings(policy, sharding.TRAIN, mesh))
        close(jax.jit(loss)(cut, rows), value, POLICY)
