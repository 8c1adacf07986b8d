"""Every distribution that the package imports is declared in pyproject.toml; Pillow resizes as it should."""

import ast
import hashlib
import importlib.metadata
import pathlib
import re
import sys
import tomllib

import numpy as np
import PIL
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    wanted += [
        each for name in ("benchmarks", "wandb", "mlflow") for each in project["optional-dependencies"][name]
    ]
    names = {normalized(re.match(r"[\w.-]+", each)[0]) for each in wanted}
    return names


def imported():
    found = {}
    for path in (ROOT / "mstar_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [each.name for each in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            else:
                continue
            found |= {name.partition(".")[0]: path.name for name in names}
    ours = {"mstar_jax", "configs"}
    return {name: where for name, where in found.items() if name not in sys.stdlib_module_names | ours}


def test_every_import_is_declared():
    providers = importlib.metadata.packages_distributions()
    known = declared()
    for name, where in imported().items():
        distributions = {normalized(each) for each in providers.get(name, [name])}
        assert distributions & known, f"{where} imports {name}, of {distributions}, which is not declared"


def test_files_of_the_package_are_installed():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setup["package-data"]["mstar_jax"]
    data = {path for path in (ROOT / "mstar_jax").rglob("*.*") if path.suffix not in (".py", ".pyc")}
    assert data == {path for pattern in patterns for path in (ROOT / "mstar_jax").glob(pattern)}


def test_pillow_resizes_as_the_released_models_saw_it():
    """Pillow 13 resizes in another order where the height shrinks a little: up to 26 of 255 off on noise."""
    y, x = np.mgrid[:463, :451]
    picture = np.stack([x * x + 3 * y, x * y, (x ^ y) * 37], axis=-1).astype(np.uint8)
    digest = hashlib.sha256()
    for filter in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR):
        for size in ((448, 448), (896, 448), (336, 336), (902, 459), (100, 80), (1344, 896)):
            digest.update(np.asarray(Image.fromarray(picture).resize(size, filter)).tobytes())
    assert digest.hexdigest()[:16] == "ae261f51210adc20", (
        f"Pillow {PIL.__version__} resizes differently from 11 and 12: images are not those the released "
        "models saw; pip install 'pillow>=11,<13'"
    )
