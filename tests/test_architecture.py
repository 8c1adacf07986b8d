"""The house rules: who may import whom, what is never used, how long a file may be.

Nothing of the package is imported: its files are parsed. A rule about a file that does not exist yet waits
for it.
"""

import ast
import fnmatch
import io
import pathlib
import tokenize

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "mstar_jax"
FILE_LINES, LIBRARY_LINES = 400, 6000
# Rooms that are counted apart, each with its own limit: a kernel; what measures, draws, judges answers.
ROOMS = {
    220: ("models.decode_kernel",),  # does what models.attention does, faster on one kind of device
    800: ("plan", "hlo", "flops", "speed"),
    1300: ("report", "reporting"),
    2300: (
        *("values", "formulas", "algebra", "symbolic", "equality", "choices", "answers"),
        *("scoring", "evaluation", "evaluate", "data.benchmarks", "data.tables"),
    ),
}

COMMANDS = ("main", "evaluate", "report", "plan", "ablate", "export")
ORDER = ("setup", "inference", "evaluation", "stages", "reward", "dynamics", "evolve")
ABOVE = (*ORDER, *COMMANDS)  # know the order of things and read a ConfigDict

# What a module may import of the project; the first pattern that fits it counts. A name stands for the
# module and for all below it.
ALLOWED = {
    "__init__": (),
    "structs": (),
    "sharding": ("structs",),
    "models.*": ("models", "structs", "sharding"),
    "values": (),
    "formulas": (),
    "algebra": (),  # runs in a process of its own
    "symbolic": ("formulas",),
    "equality": ("symbolic", "values"),
    "choices": ("values",),
    "answers": ("choices", "equality", "values", "structs"),
    "steps": (),
    "selection": ("answers", "structs", "values", "steps"),
    "measures": ("selection", "answers", "values", "structs", "steps"),
    "explore": ("measures", "selection", "answers", "structs", "values"),
    "scoring": ("data", "answers", "values", "structs"),
    "data.*": ("data", "answers", "values", "steps", "structs", "sharding"),
}
# The rest of the library is given models, processors and tokenizers as arguments. prm is built on models.
FORBIDDEN = {
    "prm": ABOVE,
    **{name: (*ORDER[at + 1 :], *COMMANDS) for at, name in enumerate(ORDER)},
    **dict.fromkeys(COMMANDS, ()),
    "*": ("models", *ABOVE),
}

TEXT = (
    "values",
    "formulas",
    "algebra",
    "symbolic",
    "equality",
    "choices",
    "answers",
    "scoring",
    "steps",
    "selection",
    "measures",
    "explore",
)  # pure Python and numpy
DATA = ("figures", "mathv360k", "images", "splits", "prompts", "benchmarks", "tables")
TEXT += tuple(f"data.{name}" for name in DATA)

# Packages that only some modules, or none, may import.
NEVER = ("tensorflow", "torch", "clu.metric_writers", "clu.periodic_actions")  # the clu ones need TensorFlow
NEVER += ("pickle", "cloudpickle", "dill", "configs")
NOT_IN_MODELS = ("optax", "ml_collections", "grain")
ONLY_ABOVE = ("ml_collections", "importlib")
JAX = ("jax", "jaxlib", "flax", "optax")


def within(name: str, names: tuple[str, ...]) -> bool:
    """Is `name` one of the dotted names, or below one of them?"""
    return any(name == each or name.startswith(each + ".") for each in names)


def imports(tree: ast.Module) -> list[tuple[int, str, bool]]:
    """(line, dotted name, runs when the module is imported) of every import, also inside functions.

    `from a import b` counts as `a.b`, whatever b is; a relative import's name begins with a dot.
    """
    late = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module + "." if node.module else "")
            names = [start + alias.name for alias in node.names]
        else:
            continue
        found += [(node.lineno, name, node not in late) for name in names]
    return found


def import_violations(module: str, tree: ast.Module) -> list[str]:
    found = []
    allowed = next((ALLOWED[p] for p in ALLOWED if fnmatch.fnmatch(module, p)), None)
    forbidden = next(FORBIDDEN[p] for p in FORBIDDEN if fnmatch.fnmatch(module, p))
    for line, name, early in imports(tree):
        top, _, inner = name.partition(".")
        if top == "":
            found.append(f"line {line}: relative import {name}")
        elif top == "mstar_jax":
            if inner in ("", "*"):
                found.append(f"line {line}: imports the whole package, not a module of it")
            elif inner.startswith("__"):  # __version__
                continue
            elif not within(inner, allowed) if allowed is not None else within(inner, forbidden):
                found.append(f"line {line}: {module} imports {inner}")
        elif within(name, NEVER):
            found.append(f"line {line}: imports {name}")
        elif module.startswith("models.") and within(name, NOT_IN_MODELS):
            found.append(f"line {line}: a model imports {name}")
        elif module not in ABOVE and within(name, ONLY_ABOVE):
            found.append(f"line {line}: {module} imports {name}")
        elif module in TEXT and early and within(name, JAX):
            found.append(f"line {line}: {module} imports {name} at module level")
    return found


def config_violations(module: str, tree: ast.Module) -> list[str]:
    """Below evolve a `config` is a small dataclass of that module (...Config), never the run's ConfigDict.

    A private function may leave its arguments without annotations.
    """
    if module in ABOVE:
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_")):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            for arg in (arg for arg in arguments if arg.arg == "config"):
                kind = ast.unparse(arg.annotation) if arg.annotation else "nothing"
                if not kind.strip("'").endswith("Config"):
                    found.append(f"line {arg.lineno}: config is annotated with {kind}, not with a ...Config")
        name = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "name", None)
        if name == "ConfigDict":
            found.append(f"line {node.lineno}: {module} names ConfigDict")
    return found


def call_violations(tree: ast.Module) -> list[str]:
    """Nothing that is read from a file or the network is run."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("eval", "exec", "compile", "__import__"):
                found.append(f"line {node.lineno}: calls {node.func.id}")
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append(f"line {node.value.lineno}: {node.arg} is not False")
        elif isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "allow_pickle"):
            found.append(f"line {node.lineno}: {node.value} in a string")
    return found


def violations(module: str, source: str) -> list[str]:
    """What module `data.loader`, say, does against the rules; a sentence each, with its line."""
    tree = ast.parse(source)
    found = import_violations(module, tree) + config_violations(module, tree) + call_violations(tree)
    if module.split(".")[-1].strip("_").endswith("utils"):
        found.append(f"{module}: a module is named after its subject, not utils")
    if (lines := len(source.splitlines())) >= FILE_LINES:
        found.append(f"{module}: {lines} lines; a file stays under {FILE_LINES}")
    return found


def code_lines(source: str) -> int:
    """Lines of code: without docstrings, comments and empty lines, which the library is not to save on."""
    documented = set[int]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING):
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documented)


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of imports, its first module again at the end; empty where there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for below in sorted(graph.get(module, ())):
                if found := visit(below, [*path, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


def read_package() -> dict[str, str]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p.read_text("utf-8") for p in paths}


SOURCES = read_package()


def imported_modules(source: str) -> set[str]:
    """The project's modules among the imports: `mstar_jax.structs.Batch` is module `structs`."""
    names = [
        name.partition(".")[2] for _, name, _ in imports(ast.parse(source)) if name.startswith("mstar_jax.")
    ]
    return {module for name in names for module in SOURCES if within(name, (module,))}


# ---- the package --------------------------------------------------------------------------------------


def test_the_package_is_found():
    assert {"__init__", "structs", "sampling", "data.mathv360k", "models.layers"} <= set(SOURCES)


@pytest.mark.parametrize("module", SOURCES)
def test_module(module):
    assert violations(module, SOURCES[module]) == []


def test_imports_form_no_circle():
    assert cycle({module: imported_modules(source) for module, source in SOURCES.items()}) == []


def test_library_stays_small():
    library = set(SOURCES)
    for limit, names in ROOMS.items():
        room = {module for module in SOURCES if within(module, names)}
        assert sum(code_lines(SOURCES[module]) for module in room) < limit, names
        library -= room
    assert sum(code_lines(SOURCES[module]) for module in library) < LIBRARY_LINES


def test_only_code_is_counted():
    text = '"""Says\nthree\nlines."""\n\nx = [\n    1,  # one\n]\n# a comment\n'
    source = text + 'def f():\n    """Doc."""\n    return x\n'
    assert code_lines(source) == 5


# ---- the rules can fail -------------------------------------------------------------------------------

AGAINST = [
    # module, source, part of the complaint
    ("structs", "from mstar_jax import sharding", "structs imports sharding"),
    ("sharding", "from mstar_jax.train import cast", "sharding imports train"),
    ("__init__", "from mstar_jax.structs import Batch", "imports structs"),
    ("models.phi35", "from mstar_jax.sampling import rollouts", "models.phi35 imports sampling"),
    ("models.phi35", "from mstar_jax.data import images", "imports data.images"),
    ("models.phi35", "def f():\n    import optax", "line 2: a model imports optax"),
    ("models.hf", "import ml_collections", "a model imports ml_collections"),
    ("models.hf", "from grain import python", "a model imports grain.python"),
    ("sampling", "from mstar_jax.models import layers", "sampling imports models.layers"),
    ("sampling", "from mstar_jax import models", "sampling imports models"),
    ("train", "import mstar_jax.models.phi35", "train imports models.phi35"),
    ("train", "def f():\n    from mstar_jax import evolve", "line 2: train imports evolve"),
    ("checkpoint", "from mstar_jax.evolve import run", "checkpoint imports evolve.run"),
    ("store", "import mstar_jax.main", "store imports main"),
    ("metrics", "from mstar_jax import report", "metrics imports report"),
    ("metrics", "from configs import tiny", "imports configs.tiny"),
    ("prm", "from mstar_jax import evolve", "prm imports evolve"),
    ("something_new", "from mstar_jax.models.vlm import Prefix", "imports models.vlm.Prefix"),
    ("data.loader", "from mstar_jax.models import vlm", "data.loader imports models.vlm"),
    ("data.loader", "from mstar_jax import sampling", "data.loader imports sampling"),
    ("data.loader", "from mstar_jax import evolve", "data.loader imports evolve"),
    ("answers", "from mstar_jax import selection", "answers imports selection"),
    ("selection", "from mstar_jax import sharding", "selection imports sharding"),
    ("selection", "from mstar_jax import measures", "selection imports measures"),
    ("steps", "from mstar_jax.structs import Response", "steps imports structs"),
    ("measures", "from mstar_jax import explore", "measures imports explore"),
    ("measures", "import jax.numpy as jnp", "measures imports jax.numpy at module level"),
    ("explore", "from mstar_jax import train", "explore imports train"),
    ("values", "from mstar_jax import answers", "values imports answers"),
    ("setup", "from mstar_jax import evolve", "setup imports evolve"),
    ("train", "from mstar_jax import setup", "train imports setup"),
    ("evolve", "from mstar_jax.main import app", "evolve imports main"),
    ("values", "import jax", "values imports jax at module level"),
    ("answers", "import jax.numpy as jnp", "answers imports jax.numpy at module level"),
    ("selection", "from jax import lax", "selection imports jax.lax at module level"),
    ("explore", "try:\n    import jax\nexcept ImportError:\n    pass", "line 2: explore imports jax"),
    ("data.figures", "class A:\n    import flax", "data.figures imports flax at module level"),
    ("data.prompts", "import jaxlib", "data.prompts imports jaxlib at module level"),
    ("train", "from ml_collections import ConfigDict", "train imports ml_collections.ConfigDict"),
    ("train", "def f(config):\n    pass", "config is annotated with nothing"),
    ("train", "def f(*, config: Any):\n    pass", "config is annotated with Any"),
    ("train", "def f(c: 'x.ConfigDict'):\n    return x.ConfigDict()", "train names ConfigDict"),
    ("models.vlm", "class A:\n    def __init__(self, config): pass", "config is annotated with nothing"),
    ("train", "import importlib", "train imports importlib"),
    ("train", "from . import structs", "relative import .structs"),
    ("train", "from ..x import y", "relative import ..x.y"),
    ("train", "import mstar_jax", "imports the whole package"),
    ("train", "from mstar_jax import *", "imports the whole package"),
    ("evolve", "import tensorflow as tf", "imports tensorflow"),
    ("main", "def f():\n    import torch.nn", "line 2: imports torch.nn"),
    ("metrics", "from clu import metric_writers", "imports clu.metric_writers"),
    ("main", "import clu.periodic_actions", "imports clu.periodic_actions"),
    ("store", "import pickle", "imports pickle"),
    ("store", "from pickle import loads", "imports pickle.loads"),
    ("answers", "x = eval('1 + 1')", "calls eval"),
    ("main", "exec(open('config').read())", "calls exec"),
    ("models.hf", "load(name, trust_remote_code=True)", "trust_remote_code is not False"),
    ("models.hf", "load(name, trust_remote_code=yes)", "trust_remote_code is not False"),
    ("models.hf", "load(name, **{'trust_remote_code': True})", "trust_remote_code in a string"),
    ("store", "np.load(path, allow_pickle=True)", "allow_pickle is not False"),
    ("utils", "", "not utils"),
    ("data.utils", "", "not utils"),
    ("train_utils", "", "not utils"),
    ("train", "x = 1\n" * FILE_LINES, f"{FILE_LINES} lines"),
]

WITHIN = [
    ("structs", "import jax\nfrom typing import Any"),
    ("sharding", "import jax\nfrom mstar_jax.structs import Batch"),
    ("models.phi35", "from mstar_jax import sharding\nfrom mstar_jax.models.layers import Decoder"),
    ("models.phi35", "def f(config: Phi35Config):\n    return config.decoder"),
    (
        "sampling",
        "def f(config: 'x.SamplingConfig'): pass\ndef _g(config): pass",
    ),
    ("sampling", "from mstar_jax import sharding\nfrom mstar_jax.structs import Batch"),
    ("prm", "from mstar_jax.models import layers"),
    (
        "data.loader",
        "import jax\nimport grain\nfrom mstar_jax.answers import grade\nfrom mstar_jax.data import images",
    ),
    ("data.prompts", "def f():\n    import jax"),
    ("metrics", "from clu import metrics, parameter_overview"),
    ("train", "import optax\nfrom mstar_jax import __version__\njax.eval_shape(f)"),
    ("evolve", "import importlib\nfrom mstar_jax import models, prm, sampling\ndef run(config): config.seed"),
    ("evolve", "from mstar_jax import setup"),
    ("setup", "from ml_collections import ConfigDict\nfrom mstar_jax.models import phi35"),
    ("main", "from ml_collections import config_flags\nfrom mstar_jax import evolve"),
    ("evaluate", "from mstar_jax import evolve, selection"),
    ("measures", "import numpy as np\nfrom mstar_jax import selection, steps"),
    ("data.figures", "from mstar_jax import steps"),
    ("models.hf", "load(name, trust_remote_code=False)"),
    ("train", "x = 1\n" * (FILE_LINES - 1)),
]


@pytest.mark.parametrize(("module", "source", "complaint"), AGAINST)
def test_rule_can_fail(module, source, complaint):
    found = violations(module, source)
    assert any(complaint in each for each in found), found


@pytest.mark.parametrize(("module", "source"), WITHIN)
def test_rule_lets_through(module, source):
    assert violations(module, source) == []


def test_circle_is_found():
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
