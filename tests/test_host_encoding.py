"""benchmarks/host_encoding.py compares like with like: its official sides make the crops that ours are."""

import pathlib

import numpy as np
import pytest
from close import close
from PIL import Image

pytest.importorskip("torch")
pytestmark = [pytest.mark.parity, pytest.mark.slow]
BENCHMARKS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def families():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import host_encoding

        return host_encoding.families()


def both(families, name, size):
    """(our crops, theirs) of a noise image of this (width, height)."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    ours, official = families[name]
    return ours(Image.fromarray(noise)), next(iter(official.values()))(Image.fromarray(noise))


def same(ours, theirs, mean, std):
    """uint8[C, S, S, 3] and what is officially made of it, float32[C, 3, S, S]."""
    close((ours / 255.0 - mean) / std, np.moveaxis(np.asarray(theirs), 1, -1))


@pytest.mark.parametrize("size", [(60, 90), (400, 120)])
def test_phi35(families, size):
    ours, theirs = both(families, "Phi-3.5-vision", size)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    same(ours.pixels[1:], theirs[1 : len(ours.pixels)], mean, std)
    assert not theirs[len(ours.pixels) :].any()


def test_internvl2(families):
    ours, theirs = both(families, "InternVL2", (300, 100))
    assert len(ours.pixels) == 4
    same(ours.pixels, theirs["pixel_values"], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_smolvlm(families):
    ours, theirs = both(families, "SmolVLM2", (512, 70))
    same(ours.pixels, theirs["pixel_values"][0], 0.5, 0.5)


def test_minicpm(families):
    ours, theirs = both(families, "MiniCPM-V 2.5", (600, 400))
    assert len(theirs) == len(ours.patches) > 1
    for patches, grid, part in zip(ours.patches, ours.grid, theirs, strict=True):
        want = part.numpy().reshape(3, 14, -1, 14).transpose(2, 0, 1, 3).reshape(grid.prod(), -1)
        close(patches[: len(want)] / 127.5 - 1.0, want)
