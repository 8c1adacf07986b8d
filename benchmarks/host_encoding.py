"""Images a second and core: this project's crops beside the official image processors, on the same images.

    python benchmarks/host_encoding.py --images=FOLDER [--count=60]

Reads PNG and JPEG files below a folder and decodes them (the first row); then each family's crops are made,
at the released models' sizes, and then the same by transformers' image processors, the Pillow ones and, where
torchvision is installed, the faster ones. transformers has no processor for Phi-3.5-vision and
MiniCPM-Llama3-V-2.5, whose own are remote code that is never run here: their steps are written out below, in
the libraries that they use. Times are the process's processor time, so `images/s` is of one core. The
official processors return normalised float32; here pixels stay in 8 bits, and the device normalises them.
"""

import argparse
import pathlib
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers
from machine import Values, machine, show, timed, versions
from PIL import Image
from transformers.models.got_ocr2 import image_processing_pil_got_ocr2
from transformers.models.smolvlm import image_processing_pil_smolvlm
from transformers.utils import is_torchvision_available

from mstar_jax.crops import hd, slicing, splitting, tiles
from mstar_jax.data.images import load_image
from mstar_jax.models import internvl, phi35

Cut = Callable[[Image.Image], object]
REPEATS = 3


def normalised(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """torchvision's ToTensor and Normalize: uint8[H, W, 3] -> float32[3, H, W]."""
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous().float().div(255)
    return x.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])


def phi35_steps(image: Image.Image, crops: int = 4, size: int = 336) -> torch.Tensor:
    """What Phi-3.5-vision's own processor does with an image, step by step."""
    portrait = image.width < image.height
    if portrait:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    width, height, target = hd.hd_size(*image.size, crops, size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    canvas = Image.new("RGB", (width, target), (255, 255, 255))
    canvas.paste(image, (0, (target - height) // 2))
    if portrait:
        canvas = canvas.transpose(Image.Transpose.TRANSPOSE)
    x = normalised(np.asarray(canvas), phi35.MEAN, phi35.STD)
    view = torch.nn.functional.interpolate(x[None], size=(size, size), mode="bicubic")
    x = x.reshape(3, x.shape[1] // size, size, x.shape[2] // size, size).permute(1, 3, 0, 2, 4)
    x = torch.cat([view, x.reshape(-1, 3, size, size)])
    return torch.cat([x, x.new_zeros(crops + 1 - len(x), *x.shape[1:])])


def minicpm_steps(image: Image.Image, most: int = 9, side: int = 448, patch: int = 14) -> list[torch.Tensor]:
    """What MiniCPM-Llama3-V-2.5's own processor does with an image, step by step."""
    cut = slicing.layout(*image.size, most, side, patch)
    parts = [image.resize(cut.source, Image.Resampling.BICUBIC)]
    if cut.crops > 1:
        width, height = cut.slice
        whole = image.resize((width * cut.columns, height * cut.rows), Image.Resampling.BICUBIC)
        parts += [
            whole.crop((x * width, y * height, (x + 1) * width, (y + 1) * height))
            for y in range(cut.rows)
            for x in range(cut.columns)
        ]
    out = []
    for part in parts:
        x = normalised(np.asarray(part), (0.5,) * 3, (0.5,) * 3)
        x = torch.nn.functional.unfold(x[None], (patch, patch), stride=(patch, patch))
        out.append(x.reshape(3, patch, patch, -1).permute(0, 1, 3, 2).reshape(3, patch, -1))
    return out


def processors(module: object, name: str, settings: dict[str, object]) -> dict[str, Cut]:
    """transformers' image processors of a family, as functions of an image."""
    slow = getattr(module, name + "Pil")(**settings)
    found: dict[str, Cut] = {"transformers, Pillow": lambda image: slow([image], return_tensors="np")}
    if is_torchvision_available():
        fast = getattr(transformers, name)(**settings)
        found["transformers, torchvision"] = lambda image: fast([image], return_tensors="pt")
    return found


def families() -> dict[str, tuple[Cut, dict[str, Cut]]]:
    """{family: (our crops of an image, {by whom: the official ones})}, of the released models."""
    hd_crops, nine = hd.HD(4, 336), slicing.Slicing(9, 448, 14, 70, corrected_mask=False)
    twelve, sixteen = tiles.Tiles(1, 12, 448, thumbnail=True), splitting.Splitting(16, 512, 2048, split=True)
    ocr = {"size": {"height": 448, "width": 448}, "crop_to_patches": True, "min_patches": 1}
    ocr |= {"max_patches": 12, "image_mean": internvl.IMAGE_MEAN, "image_std": internvl.IMAGE_STD}
    smol = {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}}
    return {
        "Phi-3.5-vision": (lambda image: hd_crops([image]), {"its steps, torch": phi35_steps}),
        "InternVL2": (
            lambda image: twelve([image]),
            processors(image_processing_pil_got_ocr2, "GotOcr2ImageProcessor", ocr),
        ),
        "MiniCPM-V 2.5": (lambda image: nine([image]), {"its steps, torch": minicpm_steps}),
        "SmolVLM2": (
            lambda image: sixteen([image]),
            processors(image_processing_pil_smolvlm, "SmolVLMImageProcessor", smol),
        ),
    }


def encoding(paths: Sequence[str]) -> list[Values]:
    """Rows of a table: images a second and core, ours and theirs, each the median of `REPEATS`."""
    torch.set_num_threads(1)
    images = [load_image(path) for path in paths]

    def rate(cut: Cut, inputs: Sequence[str | Image.Image]) -> float:
        cut(inputs[0])
        spent = timed({"": lambda: [cut(one) for one in inputs]}, REPEATS)[""]
        return len(inputs) / statistics.median(processor for _, processor in spent)

    rows: list[Values] = [
        {"what": "decoding", "images/s": rate(load_image, paths), "official": None, "by": ""}
    ]
    for name, (ours, official) in families().items():
        own = rate(ours, images)
        for who, theirs in official.items():
            rows.append({"what": name, "images/s": own, "official": rate(theirs, images), "by": who})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, help="a folder with PNG and JPEG files, at any depth")
    parser.add_argument("--count", type=int, default=60, help="images; spread over the folder's, by name")
    parser.add_argument("--out", default="", help="a file for the results, as JSON")
    args = parser.parse_args()
    found = sorted(
        str(p) for p in pathlib.Path(args.images).rglob("*") if p.suffix in (".png", ".jpg", ".jpeg")
    )
    if not found:
        raise SystemExit(f"--images={args.images}: no .png, .jpg or .jpeg file below it")
    paths = found[:: max(1, len(found) // args.count)][: args.count]
    sizes = np.array([Image.open(path).size for path in paths])
    described = {"images": len(paths), "median": " x ".join(map(str, np.median(sizes, axis=0).astype(int)))}
    record = {
        "machine": machine(),
        "versions": versions("pillow", "transformers", "torch"),
        "data": described,
    }
    show(record | {"results": encoding(paths)}, args.out)


if __name__ == "__main__":
    main()
