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
# Much of it refuses or counts what would be misread; 70 lines read responses when they are asked for and
# share work between processes; 180 know images without decoding and measure prompts together and once, as
# 180,000 rows ask for; 140 are processes that decode images without jax; 650 are Qwen2.5-VL and Qwen3-VL; 55
# find the head in others' reward models, 140 ask those that have none for a token; 120 choose queries by
# their pass rates, 110 count where rewards failed and keep the best iteration; 810 read what people have,
# parquet, Arrow, messages, columns, several turns and images, rationales and step labels; 6 ask
# the reward model its own benchmark; 385 are policy gradients: advantages, losses, log probabilities that are
# kept and read again, and numbers that tell how a policy narrows; 50 start a sample where another one has
# ended; 20 complete an export for servers; 25 refuse files and rows that would be misread; 115
# refuse a few KB of parquet or Arrow that would unfold into many GB; 20 name odd files of a saved data set;
# 25 read steps that are turns; 55 read what other writers make of a table (views of strings, decimals, UUIDs,
# structs of lists, times) and leave no way around those checks; 30 keep whole checkpoints, make a lost reward
# model again, and refuse or leave out rows that fit into no bucket; 30 tell cells without an image, options
# that were not read, and columns that no row has; 20 read validation and test files of one's own; 20
# keep a data set that a run has used, and give an ablation's rows every flag.
FILE_LINES, LIBRARY_LINES = 400, 11_330
# Rooms that are counted apart, each with its own limit: a kernel; what measures, draws, judges answers.
ROOMS = {
    220: ("models.decode_kernel",),  # does what models.attention does, faster on one kind of device
    840: ("data.embedded", "data.toy", "data.questions", "data.figures", "data.truth"),  # made, not read
    300: ("profiling",),
    1770: ("plan",),  # three compilers' programs, a whole run played through, released sizes; 80 refuse flags
    # and configs that mean nothing before anything is compiled, and try only settings that a run would take
    280: ("rewards.custom", "rewards.custom_worker"),  # a user's code, where it can do no harm
    360: ("crops",),  # what decodes images without jax; the models' files held it before
    1780: ("report",),  # 55 of it: Pass@K and entropy on two axes, numbers that are no shares; 240 send a run
    # to W&B and MLflow, 160 show it while it goes, beside its plan
    3720: (
        "answers",
        "evaluate",
    ),  # 500 of it: answers missed, doubled, denied or taken back, numbers in words; 20 kill what hangs; 650:
    # five benchmarks beside the paper's, with their published scorers, and one for reward models; 10 score
    # own rows, and ask for a package before anything is sampled
}

COMMANDS = ("main", "ablate", "export", "data.__main__", "evaluate.__main__", "plan.__main__")
COMMANDS += tuple(f"plan.{name}" for name in ("programs", "advice", "residency", "measure", "whole"))
REPORT = ("report.__main__", "report.page")
ORDER = (
    "configure",
    "sources",
    "inference.generate",
    "inference.score",
    "inference.logprobs",
    "evaluate.evaluation",
)
VERBS = (
    "generate",
    "given",
    "curriculum",
    "improve",
    "select",
    "weigh",
    "base",
    "reward_model",
    "explore",
    "measure",
    "benchmark",
)
ORDER += tuple(f"stages.{name}" for name in ("run", "policy", *VERBS))
ORDER += ("finished", "evolve", "cli")
ABOVE = (*ORDER, *COMMANDS, *REPORT)  # know the order of things and read a ConfigDict

# What a module may import of the project; the first pattern that fits it counts. A name stands for the
# module and for all below it.
ANSWERS = ("answers.check", "answers.values")
READ = tuple(f"evaluate.{name}" for name in ("benchmarks", "exams", "items", "tables"))
PUBLISHED = ("evaluate.official", "evaluate.examiners", "evaluate.fourfold")
READS = ("extraction", "formulas", "text")  # what the published scorers ask of `answers` besides the checker
FILES = ("data", *READ, *ANSWERS, "rewards.steps", "structs", "sharding")
ALLOWED = {
    "__init__": (),
    "structs": (),
    "sharding": ("structs",),
    "crops.*": ("crops",),
    "models.*": ("models", "crops", "structs", "sharding"),
    "*.__init__": (),  # a room's own name stands for nothing
    "plan.official": ("models", "structs", "sharding"),
    "answers.units": (),
    "answers.words": (),
    "answers.text": (),
    "answers.context": (),
    "answers.values": ("answers.formulas", "answers.text", "answers.units", "answers.words"),
    "answers.formulas": (),
    "answers.worker": (),  # runs in a process of its own
    "answers.child": (),
    "answers.symbolic": ("answers.child", "answers.formulas"),
    "answers.equality": (
        *("answers.symbolic", "answers.formulas", "answers.text", "answers.units", "answers.values"),
    ),
    "answers.choices": (
        *("answers.context", "answers.equality", "answers.text", "answers.units", "answers.values"),
    ),
    "answers.unmarked": ("answers.choices", "answers.values"),
    "answers.extraction": ("answers.context", "answers.text"),
    "answers.check": (
        *("answers.choices", "answers.equality", "answers.extraction", "answers.text", "answers.unmarked"),
        *("answers.values", "answers.words", "structs"),
    ),
    "rewards.steps": (),
    "rewards.selection": (*ANSWERS, "structs", "rewards.steps"),
    "rewards.metrics": (*ANSWERS, "structs", "rewards.steps", "rewards.selection"),
    "rewards.custom": ("answers.child", "structs", "rewards.selection"),
    "rewards.custom_worker": (),  # runs in a process of its own
    "rewards.diversity": ("structs", "rewards.selection"),
    "rewards.temperature": (),
    "evaluate.scoring": (*FILES, *PUBLISHED, "rewards.metrics", "rewards.selection"),
    "evaluate.process": (*FILES, "rewards.metrics", "rewards.selection"),
    "evaluate.examiners": (*FILES, "evaluate.official", *(f"answers.{name}" for name in READS)),
    **dict.fromkeys((*READ, "evaluate.official", "evaluate.fourfold"), FILES),
    "data.*": ("data", *ANSWERS, "rewards.steps", "structs", "sharding"),
}
# The rest of the library is given models, processors and tokenizers as arguments. prm is built on models.
FORBIDDEN = {
    "rewards.prm": ABOVE,
    **{name: (*ORDER[at + 1 :], *COMMANDS, *REPORT) for at, name in enumerate(ORDER)},
    **dict.fromkeys(COMMANDS, ()),
    "report.__main__": ("models", *ORDER[:-1], *COMMANDS),  # a command: knows cli
    "report.page": ("models", *ORDER, *COMMANDS),
    "*": ("models", *ABOVE),
}

TEXT = tuple(
    f"{room}.{name}"  # pure Python and numpy
    for room, names in {
        "answers": (
            "units",
            "values",
            "formulas",
            "worker",
            "child",
            "symbolic",
            "equality",
            "choices",
            "text",
            "context",
            "unmarked",
            "extraction",
            "check",
        ),
        "rewards": ("steps", "selection", "custom", "custom_worker", "metrics", "diversity", "temperature"),
        "evaluate": ("scoring", "process", *(n.partition(".")[2] for n in (*PUBLISHED, *READ))),
        "data": (
            "embedded",
            "toy",
            "questions",
            "figures",
            "mathv360k",
            "files",
            "arrow",
            "rows",
            "given",
            "turns",
            "images",
            "pictures",
            "splits",
            "prompts",
            "pixels",
            "workers",
        ),
        "crops": ("arrays", "hd", "native", "tiles", "slicing", "splitting"),
    }.items()
    for name in names
)

# Packages that only some modules, or none, may import.
NEVER = ("tensorflow", "torch", "clu.metric_writers", "clu.periodic_actions")  # the clu ones need TensorFlow
NEVER += ("pickle", "cloudpickle", "dill", "configs")
EXCEPT = {
    "ablate": ("configs.variants", "configs.ablations"),  # the rows of its tables, and what users name
    "rewards.custom_worker": ("importlib",),  # loads the file that a user names, in a process of its own
}
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
    patterns = () if module.endswith("__main__") else ALLOWED  # a command stands above its room
    allowed = next((ALLOWED[p] for p in patterns if fnmatch.fnmatch(module, p)), None)
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
        elif within(name, NEVER) and not within(name, EXCEPT.get(module, ())):
            found.append(f"line {line}: imports {name}")
        elif within(module, ("models", "plan.official")) and within(name, NOT_IN_MODELS):
            found.append(f"line {line}: a model imports {name}")
        elif module not in ABOVE and within(name, ONLY_ABOVE) and not within(name, EXCEPT.get(module, ())):
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
    assert {"__init__", "structs", "inference.sampler", "data.mathv360k", "models.layers"} <= set(SOURCES)


@pytest.mark.parametrize("module", SOURCES)
def test_module(module):
    assert violations(module, SOURCES[module]) == []


def test_imports_form_no_circle():
    assert cycle({module: imported_modules(source) for module, source in SOURCES.items()}) == []


def test_rooms_form_no_circle_and_are_few():
    """Every room, or file or command beside the rooms, stands above all that it imports."""
    rooms: dict[str, set[str]] = {}
    for module, source in SOURCES.items():
        room = module if module.endswith("__main__") else module.partition(".")[0]
        below = {other.partition(".")[0] for other in imported_modules(source)} - {room}
        rooms.setdefault(room, set()).update(below)
    assert cycle(rooms) == []
    assert sum("." not in room for room in rooms) < 30


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
    ("cli", "from mstar_jax import evolve, main", "cli imports main"),
    ("stages.run", "from mstar_jax import cli", "stages.run imports cli"),
    ("answers.__init__", "from mstar_jax.answers import check", "imports answers.check"),
    ("data.loader", "from mstar_jax.evaluate import benchmarks", "imports evaluate.benchmarks"),
    ("sharding", "from mstar_jax.training.step import cast", "sharding imports training.step"),
    ("__init__", "from mstar_jax.structs import Batch", "imports structs"),
    (
        "models.phi35",
        "from mstar_jax.inference.sampler import rollouts",
        "models.phi35 imports inference.sampler",
    ),
    ("models.phi35", "from mstar_jax.data import images", "imports data.images"),
    ("models.phi35", "def f():\n    import optax", "line 2: a model imports optax"),
    ("models.hf", "import ml_collections", "a model imports ml_collections"),
    ("models.hf", "from grain import python", "a model imports grain.python"),
    ("inference.sampler", "from mstar_jax.models import layers", "inference.sampler imports models.layers"),
    ("inference.sampler", "from mstar_jax import models", "inference.sampler imports models"),
    ("training.step", "import mstar_jax.models.phi35", "training.step imports models.phi35"),
    ("training.step", "def f():\n    from mstar_jax import evolve", "line 2: training.step imports evolve"),
    ("training.checkpoint", "from mstar_jax.evolve import run", "training.checkpoint imports evolve.run"),
    ("store", "import mstar_jax.main", "store imports main"),
    ("records", "from mstar_jax.report import page", "records imports report.page"),
    ("records", "from configs import tiny", "imports configs.tiny"),
    ("ablate", "from configs import tiny", "imports configs.tiny"),
    ("records", "from configs.variants import VARIANTS", "imports configs.variants.VARIANTS"),
    ("rewards.prm", "from mstar_jax import evolve", "rewards.prm imports evolve"),
    ("something_new", "from mstar_jax.models.vlm import Prefix", "imports models.vlm.Prefix"),
    ("data.loader", "from mstar_jax.models import vlm", "data.loader imports models.vlm"),
    ("data.loader", "from mstar_jax.inference import sampler", "data.loader imports inference.sampler"),
    ("data.loader", "from mstar_jax import evolve", "data.loader imports evolve"),
    ("answers.check", "from mstar_jax.rewards import selection", "answers.check imports rewards.selection"),
    ("rewards.selection", "from mstar_jax import sharding", "rewards.selection imports sharding"),
    (
        "rewards.selection",
        "from mstar_jax.rewards import metrics",
        "rewards.selection imports rewards.metrics",
    ),
    ("rewards.steps", "from mstar_jax.structs import Response", "rewards.steps imports structs"),
    ("rewards.metrics", "from mstar_jax.stages import explore", "rewards.metrics imports stages.explore"),
    ("rewards.metrics", "import jax.numpy as jnp", "rewards.metrics imports jax.numpy at module level"),
    ("stages.explore", "from mstar_jax.stages import measure", "stages.explore imports stages.measure"),
    ("rewards.temperature", "from mstar_jax.training import step", "temperature imports training.step"),
    ("answers.values", "from mstar_jax.answers import check", "answers.values imports answers.check"),
    ("configure", "from mstar_jax import evolve", "configure imports evolve"),
    ("training.step", "from mstar_jax import configure", "training.step imports configure"),
    ("evolve", "from mstar_jax.main import app", "evolve imports main"),
    ("answers.values", "import jax", "answers.values imports jax at module level"),
    ("answers.check", "import jax.numpy as jnp", "answers.check imports jax.numpy at module level"),
    ("rewards.selection", "from jax import lax", "rewards.selection imports jax.lax at module level"),
    (
        "rewards.temperature",
        "try:\n    import jax\nexcept ImportError:\n    pass",
        "line 2: rewards.temperature imports jax",
    ),
    ("data.toy", "class A:\n    import flax", "data.toy imports flax at module level"),
    ("data.prompts", "import jaxlib", "data.prompts imports jaxlib at module level"),
    (
        "training.step",
        "from ml_collections import ConfigDict",
        "training.step imports ml_collections.ConfigDict",
    ),
    ("training.step", "def f(config):\n    pass", "config is annotated with nothing"),
    ("training.step", "def f(*, config: Any):\n    pass", "config is annotated with Any"),
    (
        "training.step",
        "def f(c: 'x.ConfigDict'):\n    return x.ConfigDict()",
        "training.step names ConfigDict",
    ),
    ("models.vlm", "class A:\n    def __init__(self, config): pass", "config is annotated with nothing"),
    ("training.step", "import importlib", "training.step imports importlib"),
    ("training.step", "from . import structs", "relative import .structs"),
    ("training.step", "from ..x import y", "relative import ..x.y"),
    ("training.step", "import mstar_jax", "imports the whole package"),
    ("training.step", "from mstar_jax import *", "imports the whole package"),
    ("evolve", "import tensorflow as tf", "imports tensorflow"),
    ("main", "def f():\n    import torch.nn", "line 2: imports torch.nn"),
    ("records", "from clu import metric_writers", "imports clu.metric_writers"),
    ("main", "import clu.periodic_actions", "imports clu.periodic_actions"),
    ("store", "import pickle", "imports pickle"),
    ("store", "from pickle import loads", "imports pickle.loads"),
    ("answers.check", "x = eval('1 + 1')", "calls eval"),
    ("main", "exec(open('config').read())", "calls exec"),
    ("models.hf", "load(name, trust_remote_code=True)", "trust_remote_code is not False"),
    ("models.hf", "load(name, trust_remote_code=yes)", "trust_remote_code is not False"),
    ("models.hf", "load(name, **{'trust_remote_code': True})", "trust_remote_code in a string"),
    ("store", "np.load(path, allow_pickle=True)", "allow_pickle is not False"),
    ("utils", "", "not utils"),
    ("data.utils", "", "not utils"),
    ("train_utils", "", "not utils"),
    ("training.step", "x = 1\n" * FILE_LINES, f"{FILE_LINES} lines"),
]

WITHIN = [
    ("structs", "import jax\nfrom typing import Any"),
    ("sharding", "import jax\nfrom mstar_jax.structs import Batch"),
    ("models.phi35", "from mstar_jax import sharding\nfrom mstar_jax.models.layers import Decoder"),
    ("models.phi35", "def f(config: Phi35Config):\n    return config.decoder"),
    (
        "inference.sampler",
        "def f(config: 'x.SamplingConfig'): pass\ndef _g(config): pass",
    ),
    ("inference.sampler", "from mstar_jax import sharding\nfrom mstar_jax.structs import Batch"),
    ("rewards.prm", "from mstar_jax.models import layers"),
    (
        "data.loader",
        "import jax\nimport grain\nfrom mstar_jax.answers.check import grade\n"
        "from mstar_jax.data import images",
    ),
    ("data.prompts", "def f():\n    import jax"),
    ("records", "from clu import metrics, parameter_overview"),
    ("training.step", "import optax\nfrom mstar_jax import __version__\njax.eval_shape(f)"),
    (
        "evolve",
        "import importlib\nfrom mstar_jax import models\nfrom mstar_jax.inference import sampler\n"
        "def run(config): config.seed",
    ),
    ("evolve", "from mstar_jax import configure"),
    ("configure", "from ml_collections import ConfigDict\nfrom mstar_jax.models import phi35"),
    ("main", "from ml_collections import config_flags\nfrom mstar_jax import evolve"),
    ("evaluate.__main__", "from mstar_jax import evolve\nfrom mstar_jax.rewards import selection"),
    ("rewards.metrics", "import numpy as np\nfrom mstar_jax.rewards import selection, steps"),
    ("data.toy", "from mstar_jax.rewards import steps"),
    ("models.hf", "load(name, trust_remote_code=False)"),
    ("training.step", "x = 1\n" * (FILE_LINES - 1)),
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
