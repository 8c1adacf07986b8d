"""The policy against transformers' own Phi3ForCausalLM and CLIPVisionModel, random weights, fp32."""

import copy
import dataclasses
import types

import jax
import numpy as np
import pytest
import tiny
from close import REFERENCE, likeliest
from close import close as near
from safetensors.numpy import load_file

from mstar_jax import models, sharding
from mstar_jax.crops import hd
from mstar_jax.inference.draw import SamplingConfig
from mstar_jax.models import phi35
from mstar_jax.models.vision import patchify

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

ORIGINAL = 96  # the LongRoPE switch
CONFIG = tiny.config(original_max_position=ORIGINAL, max_position=3072)


def randomise(model, seed):
    """Every parameter random, biases and norm weights too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name or "layrnorm" in name
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            if norm and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


def arrays(model):
    """{name: array}; transformers 5 writes CLIP's names with or without `vision_model.`."""
    return {k.removeprefix("vision_model."): v.detach().numpy() for k, v in model.state_dict().items()}


@pytest.fixture(scope="module")
def phi3():
    c = CONFIG.decoder
    config = transformers.Phi3Config(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_position,
        original_max_position_embeddings=c.original_max_position,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": c.rope_theta,
            "short_factor": list(c.short_factor),
            "long_factor": list(c.long_factor),
            "original_max_position_embeddings": c.original_max_position,
        },
        eos_token_id=None,  # generation runs to its cap
        pad_token_id=None,
        attn_implementation="eager",
    )
    return randomise(transformers.Phi3ForCausalLM(config), 0)


@pytest.fixture(scope="module")
def clip():
    v = CONFIG.vision
    config = transformers.CLIPVisionConfig(
        hidden_size=v.hidden_size,
        intermediate_size=v.intermediate_size,
        num_hidden_layers=v.num_layers,
        num_attention_heads=v.num_heads,
        image_size=v.image_size,
        patch_size=v.patch_size,
        hidden_act="quick_gelu",
        projection_dim=8,
        attn_implementation="eager",
    )
    return randomise(transformers.CLIPVisionModel(config), 1)


@pytest.fixture(scope="module")
def glue():
    """Separators and projector, as the official remote code names them."""
    generator = torch.Generator().manual_seed(2)
    merged, width = 4 * CONFIG.vision.hidden_size, CONFIG.decoder.hidden_size
    shapes = {
        "sub_GN": (1, 1, 1, merged),
        "glb_GN": (1, 1, merged),
        "img_projection.0.weight": (width, merged),
        "img_projection.0.bias": (width,),
        "img_projection.2.weight": (width, width),
        "img_projection.2.bias": (width,),
    }
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def policy(phi3, clip, glue):
    values = tiny.phi3_values(CONFIG, arrays(phi3)) | tiny.clip_values(CONFIG, arrays(clip), "")
    values |= tiny.glue_values({k: v.numpy() for k, v in glue.items()}, "")
    return tiny.assemble(tiny.abstract(CONFIG), values)


def close(ours, theirs):
    theirs = theirs.detach().numpy()
    near(ours, theirs, REFERENCE)


@pytest.mark.parametrize("length", [40, ORIGINAL, ORIGINAL + 1, 140])
def test_text_logits(phi3, policy, length):
    row = tiny.row(np.random.default_rng(length), [(0, length)], length)
    ours = tiny.raw_logits(policy, row["tokens"])
    with torch.no_grad():
        close(ours, phi3(torch.tensor(row["tokens"][None], dtype=torch.long)).logits)


def test_row_logits_of_a_branch(phi3, policy):
    """The last branch of a shared row, short and long, as HF sees it alone."""
    rng = np.random.default_rng(7)
    rows = [tiny.row(rng, [(0, n), (1, 30), (2, 40)], 160) for n in (30, 60)]  # 70 and 100 tokens
    ours = np.asarray(tiny.logits(policy, tiny.stack(rows)))
    for r, row in enumerate(rows):
        tokens = row["tokens"][(row["branch"] == 0) | (row["branch"] == 2)]
        with torch.no_grad():
            theirs = phi3(torch.tensor(tokens[None], dtype=torch.long)).logits
        close(ours[r][row["branch"] == 2], theirs[0, -41:-1])


def test_greedy_generation_token_for_token(phi3, policy):
    """64 tokens after a short prompt (staying short) and after one that is long from the start.

    Each must be the likeliest for Phi-3 after all those before it, which is its greedy continuation.
    """
    steps, lengths = 64, (12, 32, 97, 130)
    rng = np.random.default_rng(9)
    rows = [tiny.row(rng, [(0, n)], 130) for n in lengths]
    # no stop and nothing forbidden, on both sides
    processor = types.SimpleNamespace(vocab_size=tiny.VOCAB, forbidden_ids=(), stop_ids=())
    config = SamplingConfig(branches=2, max_new_tokens=steps)
    out = tiny.generate(processor, config, policy, tiny.stack(rows))
    for r, (row, length) in enumerate(zip(rows, lengths)):
        ours = np.asarray(out.tokens)[r]
        assert ours[0].tolist() == ours[1].tolist()
        assert len(set(ours[0].tolist())) > 3, "a constant sequence would prove little"
        whole = np.concatenate([row["tokens"][:length], ours[0]])
        with torch.no_grad():
            logits = phi3(torch.tensor(whole[None], dtype=torch.long)).logits[0]
        likeliest(ours[0], logits[length - 1 : -1])


def official_span(clip, glue, pixels, rows, columns):
    """The projected features of one image as the official remote code lays them out, in torch."""
    side = CONFIG.vision.side
    with torch.no_grad():
        crops = torch.tensor(pixels).permute(0, 3, 1, 2)
        patches = clip(crops, output_hidden_states=True).hidden_states[-2][:, 1:]

        def view(features, h, w):  # [h*w, side*side, C] -> the mosaic's lines, each closed by sub_GN
            channels = features.shape[-1]
            x = features.reshape(h * w, side, side, channels)
            x = x.reshape(h * w, side // 2, 2, side // 2, 2, channels).permute(0, 1, 3, 2, 4, 5)
            x = x.reshape(h, w, side // 2, side // 2, 4 * channels).permute(0, 2, 1, 3, 4)
            x = x.reshape(1, h * side // 2, w * side // 2, 4 * channels)
            x = torch.cat([x, glue["sub_GN"].repeat(1, h * side // 2, 1, 1)], dim=2)
            return x.reshape(1, -1, 4 * channels)

        both = [view(patches[1:], rows, columns), glue["glb_GN"], view(patches[:1], 1, 1)]
        x = torch.cat(both, dim=1)
        x = torch.nn.functional.linear(x, glue["img_projection.0.weight"], glue["img_projection.0.bias"])
        x = torch.nn.functional.gelu(x)
        return torch.nn.functional.linear(x, glue["img_projection.2.weight"], glue["img_projection.2.bias"])[
            0
        ]


@pytest.mark.parametrize("grids", [[(1, 1)], [(2, 2)], [(1, 3)], [(2, 1), (1, 2)]])
def test_image_features_and_logits(phi3, clip, glue, policy, grids):
    """Features in their places, then the decoder's logits over an image prompt."""
    length = 80
    row = tiny.row(np.random.default_rng(len(grids)), [(0, length)], length, grids)
    spans, first = [], 0
    for rows, columns in grids:
        crops = row["pixels"][first : first + 1 + rows * columns]
        spans.append(official_span(clip, glue, crops, rows, columns))
        first += len(crops)
    theirs, places = torch.cat(spans), row["image_index"] >= 0
    assert places.sum() == len(theirs)
    args = (row["tokens"][None], row["image_index"][None], row["pixels"][None])
    ours = jax.jit(lambda m, *a: m.embed(*a))(policy, *args)[0]
    close(ours[places], theirs)
    with torch.no_grad():
        embedded = phi3.model.embed_tokens(torch.tensor(row["tokens"][None], dtype=torch.long))
        embedded[0, torch.tensor(places)] = theirs
        want = phi3(inputs_embeds=embedded).logits
    close(tiny.raw_logits(policy, row["tokens"], row["image_index"], row["pixels"]), want)


def test_an_exported_folder_loads_in_transformers(phi3, clip, tmp_path):
    """The official names are Phi3ForCausalLM's and CLIPVisionModel's own, so they load without a mapping."""
    ours = tiny.model(CONFIG, seed=5)
    phi35.make_tokenizer(tiny.TEXTS, tmp_path / "words", tiny.VOCAB)
    models.FromScratch(phi35.FAMILY, CONFIG, tmp_path / "words").save(ours, tmp_path / "out")
    stored = {k: torch.tensor(v) for k, v in load_file(tmp_path / "out/model.safetensors").items()}
    tower = phi35.IMAGE + "img_processor."
    language = {k: v for k, v in stored.items() if not k.startswith(phi35.IMAGE)}
    vision = {k.removeprefix(tower): v for k, v in stored.items() if k.startswith(tower)}
    own = any(k.startswith("vision_model.") for k in clip.state_dict())
    vision = vision if own else {k.removeprefix("vision_model."): v for k, v in vision.items()}
    theirs, seeing = copy.deepcopy(phi3), copy.deepcopy(clip)
    theirs.load_state_dict(language, strict=True)
    seeing.load_state_dict(vision, strict=True)
    row = tiny.row(np.random.default_rng(4), [(0, 50)], 50)
    pixels = tiny.pixels(np.random.default_rng(4), 3)
    with torch.no_grad():
        close(
            tiny.raw_logits(ours, row["tokens"]),
            theirs(torch.tensor(row["tokens"][None], dtype=torch.long)).logits,
        )
        want = seeing(torch.tensor(pixels).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states[-2]
    close(jax.jit(lambda m, p: m.tower(patchify(p, 4)))(ours, pixels), want[:, 1:])


def test_bfloat16_drifts_no_further_than_theirs(phi3, policy):
    """Against fp32. The roundings of the two differ, so the bound is loose."""
    row = tiny.row(np.random.default_rng(3), [(0, 90)], 90)
    tokens = torch.tensor(row["tokens"][None], dtype=torch.long)
    with torch.no_grad():
        exact = phi3(tokens).logits
        rounded = copy.deepcopy(phi3).to(torch.bfloat16)(tokens).logits.float()
    greatest = exact.abs().max()
    half = tiny.raw_logits(sharding.cast(policy, jax.numpy.bfloat16), row["tokens"])
    ours, theirs = (
        float((torch.tensor(np.asarray(x)) - exact).abs().max() / greatest) for x in (half, rounded)
    )
    print(f"\nbfloat16 logits, share of the greatest: ours {ours:.2e}, theirs {theirs:.2e}")
    assert 1e-3 < ours < 2 * theirs


@pytest.mark.parametrize("size", [(40, 23), (16, 16), (13, 40), (32, 16)])
def test_global_view_is_torch_bicubic(size):
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    crops = jax.tree.map(lambda x: x[None], hd.HD(6, 16)([Image.fromarray(noise)]))
    rows, columns = hd.hd_grid(*size, 6, 16)
    policy = tiny.model(dataclasses.replace(CONFIG, num_crops=6))
    seen = np.asarray(jax.jit(lambda m, c: m.normalised(c))(policy, crops))[0]
    padded = (
        seen[1:]
        .reshape(rows, columns, 16, 16, 3)
        .transpose(0, 2, 1, 3, 4)
        .reshape(rows * 16, columns * 16, 3)
    )
    want = torch.nn.functional.interpolate(
        torch.tensor(padded).permute(2, 0, 1)[None], size=(16, 16), mode="bicubic", align_corners=False
    )
    near(seen[0], want[0].permute(1, 2, 0).numpy(), 128)
