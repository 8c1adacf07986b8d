"""The recipes of CONTRIBUTING.md, followed to the letter: its blocks fit the code and do what they say."""

import dataclasses
import importlib
import inspect
import pathlib
import re
import types

import pytest
import test_architecture
import test_reward

from configs import phi35, tiny, variants
from mstar_jax import configure, evolve, sharding
from mstar_jax.data import splits
from mstar_jax.rewards import selection
from mstar_jax.stages import improve, policy
from mstar_jax.structs import Query, Stage
from mstar_jax.training.step import token_loss

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
RECIPES = {  # by title: the (language, text) of its blocks
    part.splitlines()[0]: re.findall(r"^```(python|diff)\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
    for part in re.split(r"^### ", PAGE.split("\n## Recipes\n")[1].split("\n## ")[0], flags=re.MULTILINE)[1:]
}
WITH_CODE = [title for title, blocks in RECIPES.items() if any(kind == "python" for kind, _ in blocks)]


def hunks(text):
    """The file that a diff changes, and its (old text, new text) pairs."""
    name, _, rest = text.partition("\n")
    assert name.startswith("--- ")
    found = []
    for hunk in rest.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        assert all(line[0] in " +-" for line in lines), hunk
        found.append(tuple("".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +")))
    return name[4:], found


def changed(title):
    """The library's files after the recipe, as text by path."""
    files, blocks = {}, RECIPES[title]
    for kind, text in blocks:
        if kind == "diff":
            path, edits = hunks(text)
            source = files.get(path, (ROOT / path).read_text())
            for old, new in edits:
                assert source.count(old) == 1, f"{path} has {source.count(old)} times:\n{old}"
                files[path] = source = source.replace(old, new)
    for kind, text in blocks:
        head, _, code = text.partition("\n")
        path, _, table = head.removeprefix("# ").partition(", above ")
        if kind == "python" and not path.startswith("tests/"):
            source = files.get(path, (ROOT / path).read_text())
            before, at, after = source.partition(f"\n{table}:") if table else (source, "", "")
            assert not table or at, f"{path} has no {table}"
            files[path] = f"{before}\n{code}\n{at}{after}" if table else f"{source}\n\n{code}"
    return files


def module_of(path):
    return importlib.import_module(path.removesuffix(".py").replace("/", "."))


def apply(title, monkeypatch):
    """Puts what the changed files define into the modules; returns the changed modules by path."""
    found = {}
    for path, source in sorted(changed(title).items(), key=lambda item: item[0].endswith("evolve.py")):
        module = module_of(path)
        assert not path.startswith("mstar_jax") or not test_architecture.violations(
            module.__name__.partition(".")[2], source
        )
        found[path] = new = types.ModuleType(module.__name__)
        exec(compile(source, path, "exec"), vars(new))
        for name, value in vars(new).items():
            if not name.startswith("__"):
                monkeypatch.setattr(module, name, value, raising=False)
    return found


class Page:
    """The verbs of evolve.py, each noting what it is given; nothing is sampled or trained."""

    def __init__(self):
        self.asked, self.losses = [], []

    def generate(self, run, stage, policy, queries, *rest, **more):
        if stage > Stage.reward_model:
            self.asked.append([query.id for query in queries])
        return {}

    def improve(self, run, stage, policy, sources, *, loss=token_loss, **more):
        if stage > Stage.reward_model:
            self.losses.append(loss)
        return policy

    def run(self, page, monkeypatch):
        """Walks down the page with four queries, half of them an iteration."""
        config = tiny.get_config("continuous")
        config.evolve.iterations, config.evolve.fraction = 2, 0.5
        labelled = [Query(str(n), (), "x" * n, answer="1") for n in (3, 1, 4, 2)]
        checkpoints = types.SimpleNamespace(wait=lambda: None)
        results = types.SimpleNamespace(records=[])
        run = types.SimpleNamespace(
            labelled=labelled,
            checkpoints=checkpoints,
            results=results,
            config=config,
            seed=config.seed,
            processor=types.SimpleNamespace(forbidden_ids=()),
        )
        nothing = ("base", "measure", "select_rationales", "train_reward_model", "select", "drop_checkpoints")
        verbs = {name: lambda *given, **more: None for name in nothing}
        verbs |= {"start": lambda *given: run, "superseded": lambda run, stage: False}
        verbs |= {"explore": lambda run, policy, reward, temperature: temperature}
        verbs |= {"generate": self.generate, "improve": self.improve}
        for name, verb in verbs.items():
            assert hasattr(page, name)
            monkeypatch.setattr(page, name, verb)
        page.evolve(config, None, {}, lambda: False)


def walk(page, monkeypatch):
    walked = Page()
    walked.run(page, monkeypatch)
    return walked


@pytest.mark.parametrize("title", RECIPES)
def test_blocks_fit_the_code(title):
    for path, source in changed(title).items():
        compile(source, path, "exec")
        assert max(map(len, source.splitlines())) <= 110


@pytest.mark.parametrize("title", WITH_CODE)
def test_the_recipes_own_test_passes(title, monkeypatch):
    apply(title, monkeypatch)
    [(head, code)] = [
        text.split("\n", 1) for kind, text in RECIPES[title] if kind == "python" and "# tests/" in text
    ]
    namespace = dict(vars(importlib.import_module(pathlib.Path(head).stem)))
    before = set(namespace)
    exec(compile(code, head, "exec"), namespace)
    [test] = [name for name in namespace if name not in before and name.startswith("test_")]
    assert not inspect.signature(namespace[test]).parameters
    namespace[test]()


def test_another_reward_and_a_variant_with_it(monkeypatch):
    """The new rule is a value of the config, and selects."""
    with pytest.raises(ValueError, match="evolve.select = 'shortest': choose one of 'prm', .*, 'frequency'"):
        config = tiny.get_config("random_2")
        config.evolve.select = "shortest"
        configure.check(config, sharding.make_mesh())
    apply("Another reward", monkeypatch)
    apply("A further variant", monkeypatch)
    assert "shortest_2" in variants.VARIANTS
    for family in (tiny, phi35):
        config = family.get_config("shortest_2")
        config.policy.path, config.data.labelled = "/checkpoint", "/data.json"
        configure.check(config, sharding.make_mesh())
        assert (config.evolve.select, config.evolve.keep) == ("shortest", 2)
    lengths = [5, 4, 1, 2, 6, 3]
    pool = [
        dataclasses.replace(r, tokens=(1,) * n) for r, n in zip(test_reward.RESPONSES, lengths, strict=True)
    ]
    assert {r.sample for r in selection.correct(pool)} == {0, 1, 3, 4, 5}
    assert test_reward.kept(responses=pool, select="shortest", keep=2) == [3, 5]


def test_another_objective(monkeypatch):
    """The iterations train with it, and their training step is compiled with it."""
    assert walk(evolve, monkeypatch).losses == [token_loss] * 2
    files = apply("Another training objective", monkeypatch)
    page, step = files["mstar_jax/evolve.py"], module_of("mstar_jax/training/step.py")
    assert walk(page, monkeypatch).losses == [step.focal_loss] * 2

    given = []
    monkeypatch.setattr(policy, "make_train_step", lambda *rest, loss, **more: given.append(loss))
    checkpoints = types.SimpleNamespace(run=lambda stage: None)
    run = types.SimpleNamespace(
        config=tiny.get_config(), programs={}, tx=None, mesh=None, checkpoints=checkpoints
    )
    for loss in (token_loss, step.focal_loss, step.focal_loss):
        policy.program(run, Stage.iteration(1), loss)
    assert given == [token_loss, step.focal_loss] and len(run.programs) == 2

    class Reached(Exception):
        """Holds the loss that a stage's training asks its program for."""

    def program(run, stage, loss):
        raise Reached(loss)

    monkeypatch.setattr(improve, "program", program)
    with pytest.raises(Reached) as reached:
        improve.improve(run, Stage.iteration(1), None, [], sampled_at=1.0, loss=step.focal_loss)
    assert reached.value.args == (step.focal_loss,)


def test_another_curriculum(monkeypatch):
    """The iterations ask other queries."""
    labelled = [Query(str(n), (), "x" * n, answer="1") for n in (3, 1, 4, 2)]
    plain = [[q.id for q in splits.share(labelled, 0.5, t, 0)] for t in (1, 2)]
    assert walk(evolve, monkeypatch).asked == plain != [["1", "2"], ["3", "4"]]
    files = apply("Another curriculum", monkeypatch)
    assert walk(files["mstar_jax/evolve.py"], monkeypatch).asked == [["1", "2"], ["3", "4"]]


def test_every_file_that_the_page_names_is_there():
    named = set(re.findall(r"`([\w./]+\.py)`", PAGE))
    rooms = ("mstar_jax", "configs", "tests")
    files = {path.relative_to(ROOT).as_posix() for room in rooms for path in (ROOT / room).rglob("*.py")}
    lost = [name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in files)]
    assert len(named) > 30 and lost == ["utils.py"]  # which must not be there
