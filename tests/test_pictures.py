"""What is known of image files agrees with what is decoded, and is found again when a file changes."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mstar_jax import workdir
from mstar_jax.data import images, pictures


@pytest.fixture(autouse=True)
def nothing_known():
    pictures._known.clear()


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def behind_the_pixels(data: bytes, *kinds: bytes) -> bytes:
    """A PNG whose chunks of these kinds stand before its end."""
    chunks, at = [], 8
    while at < len(data):
        length = struct.unpack(">I", data[at : at + 4])[0] + 12
        chunks.append(data[at : at + length])
        at += length
    late = [chunk for chunk in chunks[:-1] if chunk[4:8] in kinds]
    assert late
    early = [chunk for chunk in chunks[:-1] if chunk[4:8] not in kinds]
    return data[:8] + b"".join([*early, *late, chunks[-1]])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_sizes_are_those_of_the_decoded_image(tmp_path, kind):
    for orientation in (1, 3, 6, 8):
        path = str(tmp_path / f"{orientation}.image")
        noise(20, 10).save(path, kind, exif=turned(orientation))
        size = images.load_image(path).size
        assert size == ((10, 20) if orientation in (6, 8) else (20, 10))
        assert images.header_size(path) == size
        with open(path, "rb") as file:
            assert images.check_image(path, file.read()) == size


def png(**options) -> bytes:
    file = io.BytesIO()
    noise(200, 100).save(file, "PNG", **options)
    return file.getvalue()


def test_orientation_behind_the_pixels(tmp_path):
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    other = PngImagePlugin.PngInfo()
    other.add_text("date:create", "2024")
    for data, size in (
        (behind_the_pixels(png(exif=turned(8)), b"eXIf"), (100, 200)),
        (behind_the_pixels(png(pnginfo=xmp), b"iTXt"), (100, 200)),
        (png(pnginfo=xmp), (100, 200)),
        (behind_the_pixels(png(pnginfo=other), b"tEXt"), (200, 100)),
    ):
        path = tmp_path / "x.png"
        path.write_bytes(data)
        assert images.header_size(str(path)) == images.load_image(str(path)).size == size


def test_no_pixel_is_decoded_for_a_size(tmp_path):
    """The pixels of this file are damaged, in front of its orientation."""
    data = behind_the_pixels(png(exif=turned(6)), b"eXIf")
    at = data.index(b"IDAT")
    length = struct.unpack(">I", data[at - 4 : at])[0]
    chunk = b"IDAT" + b"\0" * length
    broken = data[: at - 4] + struct.pack(">I", length) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path = tmp_path / "x.png"
    path.write_bytes(broken + data[at + length + 8 :])
    assert pictures.size(str(path)) == (100, 200)
    with pytest.raises(images.ImageError, match="cannot be decoded"):
        pictures.check(str(path))


def test_damage_is_found_as_by_decoding(tmp_path):
    path = tmp_path / "x"
    for kind in ("JPEG", "PNG"):
        file = io.BytesIO()
        noise(160, 90).save(file, kind)
        for data, cause in (
            (file.getvalue(), ""),
            (file.getvalue()[:-3000], "undecodable image"),
            (b"", "empty image"),
            (b"no image", "undecodable image"),
        ):
            path.write_bytes(data)
            assert pictures.faults([str(path)]) == ({str(path): cause} if cause else {})
    path.write_bytes(file.getvalue())
    assert pictures.faults([str(path), str(tmp_path / "none")], max_pixels=100) == {
        str(path): "image too large",
        str(tmp_path / "none"): "missing image",
    }
    deep = np.array([[0, 70000]], np.int32)  # its values cannot be scaled to 8 bits
    Image.fromarray(deep).save(path, "TIFF")
    assert pictures.faults([str(path)]) == {str(path): "undecodable image"}


def test_known_images_are_looked_at_again_only_if_they_change(tmp_path, monkeypatch, caplog):
    paths = [str(tmp_path / f"{n}.png") for n in range(3)]
    for n, path in enumerate(paths):
        noise(20 + n, 10).save(path)
    assert not pictures.faults(paths) and len(set(pictures.contents(paths).values())) == 3
    workdir.keep_images(tmp_path)
    kept = json.loads((tmp_path / "images.json").read_text())
    assert [kept[path][2:4] for path in paths] == [[20, 10], [21, 10], [22, 10]]
    pictures._known.clear()
    workdir.recall_images(tmp_path)
    looked: list[str] = []

    def look(path, data, *, max_pixels):
        looked.append(path)
        return images.check_image(path, data, max_pixels=max_pixels)

    monkeypatch.setattr(pictures, "check_image", look)
    noise(50, 40).save(paths[1])
    assert not pictures.faults(paths) and looked == [paths[1]]
    assert [pictures.size(path) for path in paths] == [(20, 10), (50, 40), (22, 10)]
    before = os.stat(paths[0])
    os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert not pictures.faults(paths) and looked == [paths[1], paths[0]]
    assert pictures.faults(paths, max_pixels=1000) == {paths[1]: "image too large"}

    for damaged in (
        '{"a": ',
        json.dumps({paths[2]: [1, 2, 3]}),
        json.dumps({paths[2]: [1, 1, 1, 1, 1, True]}),
    ):
        pictures._known.clear()
        (tmp_path / "images.json").write_text(damaged)
        workdir.recall_images(tmp_path)
        assert not pictures.table() and "images.json" in caplog.text
        caplog.clear()


def test_what_is_no_image_is_not_read_whole(tmp_path):
    """A name that no file can have, a pipe, and a large file that is something else."""
    pipe, archive = tmp_path / "pipe.png", tmp_path / "archive.png"
    os.mkfifo(pipe)
    with open(archive, "wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(1 << 36)  # 64 GB of zeros, which takes no room
    causes = pictures.faults([f"{tmp_path}/\ud83d.png", str(pipe), str(archive)])
    assert sorted(causes.values()) == ["empty image", "undecodable image", "undecodable image"]
