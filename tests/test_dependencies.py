"""Every distribution that the package imports is declared in pyproject.toml."""

import ast
import importlib.metadata
import pathlib
import re
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["benchmarks"]
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
