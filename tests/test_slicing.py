"""MiniCPM-V's slices: sizes, grids, patches and the encoder's position ids."""

import itertools
import math
import os
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_minicpm as tiny
from PIL import Image

from mstar_jax.crops import slicing
from mstar_jax.models.vision import patchify

GOLDEN = pathlib.Path(os.environ.get("MSTAR_GOLDENS", "/nonexistent")) / "minicpmv25"  # official outputs
golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"no official outputs in {GOLDEN}")


@pytest.mark.parametrize(
    ("size", "source", "grid", "cell"),
    [  # checked against the official code
        ((1000, 700), (532, 378), (2, 2), (532, 378)),
        ((1920, 1080), (602, 336), (4, 2), (420, 476)),
        ((896, 448), (630, 322), (2, 1), (448, 448)),
        ((3000, 300), (1414, 140), (6, 1), (574, 350)),
        ((13, 700), (56, 3290), (0, 0), (0, 0)),
        ((100, 100), (448, 448), (0, 0), (0, 0)),
    ],
)
def test_sizes_of_the_official_code(size, source, grid, cell):
    assert slicing.layout(*size, 9, 448, 14) == (source, *grid, cell)


@golden
def test_sizes_equal_the_official_ones():
    cases = np.load(GOLDEN / "golden_slices.npy").tolist()
    for width, height, *want in cases:
        cut = slicing.layout(width, height, 9, 448, 14)
        assert [*cut.source, cut.columns, cut.rows, *cut.slice] == want, (width, height)
    assert len(cases) >= 20


@pytest.mark.parametrize("most", [1, 2, 4, 9])
def test_grid_is_the_nearest_of_its_size(most):
    for width, height in np.random.default_rng(most).integers(1, 3000, (200, 2)).tolist():
        cut = slicing.layout(width, height, most, 448, 14)
        wanted = min(math.ceil(width * height / 448**2), most)
        assert (cut.columns * cut.rows == 0) == (wanted <= 1)
        assert cut.crops == 1 + cut.columns * cut.rows <= 1 + most
        assert all(side % 14 == 0 and side > 0 for side in cut.source)
        if wanted <= 1:
            continue
        assert cut.columns * cut.rows in {wanted - 1, wanted, wanted + 1} - {1, most + 1}
        assert all(side % 14 == 0 and side > 0 for side in cut.slice)
        ours = abs(math.log(width * cut.rows / height / cut.columns))
        for columns, rows in itertools.product(range(1, most + 1), repeat=2):
            if columns * rows in {wanted - 1, wanted, wanted + 1} - {1} and columns * rows <= most:
                assert ours <= abs(math.log(width * rows / height / columns)) + 1e-9


def test_patches_are_those_of_the_convolution():
    image = tiny.picture(20, 20)
    patches, grid = slicing.to_patches(image, 4)
    assert grid == (5, 5) and patches.dtype == np.uint8
    np.testing.assert_array_equal(patches, patchify(jnp.asarray(image)[None], 4)[0])
    wide, grid = slicing.to_patches(np.asarray(image)[:8], 4)
    assert grid == (2, 5)
    np.testing.assert_array_equal(wide, patches[:10])


def test_the_source_then_slices_row_by_row():
    """Six flat cells of 16 px: their colours say where each crop comes from."""
    cells = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    image = Image.fromarray(np.repeat(np.kron(cells, np.ones((16, 16), np.uint8))[..., None], 3, axis=2))
    assert slicing.layout(48, 32, 9, 16, 4) == ((20, 12), 3, 2, (16, 16))
    (source, grid), *crops = slicing.slice_image(image, 9, 16, 4)
    want = np.asarray(image.resize((20, 12), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(source, slicing.to_patches(want, 4)[0])
    assert grid == (3, 5) and [grid for _, grid in crops] == [(4, 4)] * 6
    for colour, (patches, _) in zip(cells.reshape(-1), crops):
        assert (patches == colour).all()


def test_position_ids_are_floors_up_to_rounding():
    for length in range(1, 1400):
        ids, exact = slicing.position_ids(length, 70), 70 * np.arange(length) / length
        near = np.abs(exact - np.round(exact)) < 1e-4
        assert ids.dtype == np.int32 and ids[0] == 0
        np.testing.assert_array_equal(ids[~near], np.floor(exact[~near]))
        assert set((ids - np.floor(exact))[near]) <= {-1, 0}


@pytest.mark.parametrize(
    ("length", "differ"),
    [(980, 7), (986, 1), (994, 5), (1001, 3), (1010, 1), (1022, 1), (1025, 1), (1036, 6), (1050, 14)],
)
def test_position_ids_are_those_of_the_training(length, differ):
    """How many patches another formula, float32 index * step, puts one row off; counted officially."""
    coordinate = np.arange(length, dtype=np.float32) * np.float32(1 / length)
    boundaries = (1 / 70 + np.arange(69) / 70).astype(np.float32)
    later = np.searchsorted(boundaries, np.minimum(coordinate, np.float32(1 - 1e-6)), side="right")
    assert (slicing.position_ids(length, 70) != later).sum() == differ


@golden
def test_position_ids_equal_the_official_ones():
    cases = np.load(GOLDEN / "legacy_pos_ids_1xL.npz")
    for length in cases.files:
        np.testing.assert_array_equal(slicing.position_ids(int(length), 70), cases[length], err_msg=length)
    assert len(cases.files) > 1390
