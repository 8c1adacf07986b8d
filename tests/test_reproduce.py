"""docs/reproduce.md: every flag and key of its commands exists, and takes the value that it is given."""

import importlib
import pathlib
import re
import runpy
import shlex

import pytest
from absl import flags

from mstar_jax import ranges
from mstar_jax.evaluate import summary
from mstar_jax.models import FAMILIES

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "reproduce.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.replace("\\\n", "").splitlines()]
OURS = [line for line in COMMANDS if line.startswith(("python -m mstar_jax.", "launch/"))]


def test_the_page_has_commands():
    assert len(OURS) == 8 and {line.split()[2] for line in OURS if line.startswith("python")} == {
        f"mstar_jax.{name}" for name in ("evaluate", "plan", "export")
    }


@pytest.mark.parametrize("command", OURS)
def test_flags_exist(command):
    words = shlex.split(command)
    launcher = words[0].startswith("launch/")
    name = "mstar_jax.main" if launcher else words[2]
    if launcher:  # its own options come first
        own, words = words[1 : words.index("--")], words[words.index("--") :]
        script = (ROOT / command.split()[0]).read_text()
        assert all(f"{word.partition('=')[0]}" in script for word in own)
    name = {"mstar_jax.evaluate": "mstar_jax.evaluate.__main__"}.get(name, name)
    name = {"mstar_jax.plan": "mstar_jax.plan.__main__"}.get(name, name)
    module = importlib.import_module(name)
    known = {flag.name for flag in flags.FLAGS.get_flags_for_module(name)}
    known |= {flag.name for flag in flags.FLAGS.get_flags_for_module("mstar_jax.cli")}
    config = None
    for word in words[1 if launcher else 3 :]:
        key, _, value = word.removeprefix("--").partition("=")
        if key == "config":
            config = runpy.run_path(str(ROOT / value))["get_config"]()
            assert config.policy.family in FAMILIES and config.benchmarks.paper in summary.PAPER
        elif key.startswith("config."):
            kept = ranges.flat(config)[key.removeprefix("config.")]
            given = tuple(re.findall(r'"(\w+)"', value)) if isinstance(kept, tuple) else type(kept)(value)
            config.update_from_flattened_dict({key.removeprefix("config."): given})
        else:
            assert key in known, f"{module.__name__} has no --{key}"
            flags.FLAGS[key].parser.parse(value)


def test_the_published_row_is_the_papers():
    rows = summary.PAPER["MiniCPM-V-2.5"]
    for title, name in (("MiniCPM-V-2.5", "base"), ("with the warm-up", "warm-up"), ("M-STaR", "M-STaR")):
        cells = " | ".join(map(str, rows[name]))
        assert f"| {title} | {cells} | {sum(rows[name]) / 5:.1f} |" in PAGE
