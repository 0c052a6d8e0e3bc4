"""The recipes of CONTRIBUTING.md, followed to the letter on a copy of the source tree."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recipes import Step, apply, recipes

from pipelines.scores.scorers import new_scorer

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "CONTRIBUTING.md"
MOST_FILES = {
    "Add a loss": 4, "Add a source kind": 3, "Add a scorer": 1, "Add a tracker": 3, "Add a stage": 3,
}  # fmt: skip
OF_THE_HOUSE = (
    "tests/training/test_losses.py::test_every_method_has_a_loss_and_its_defaults_are_the_documented_ones",
    "tests/training/test_losses.py::test_every_method_is_compared_with_the_others_in_the_docs",
    "tests/training/test_losses.py::test_the_registry_says_of_a_method_what_its_loss_does",
)
"""Tests that an addition to a registry has to pass beside its own."""
IN_A_RUN = """
from orchestration.cli import parser
from orchestration.config import parse_config
from orchestration.stages.registry import ALL_STAGES
config = parse_config('''
name: scratch
storage: runs/scratch
ingest: {sources: [{format: duels, path: duels.json, columns: {left: one, right: two}}]}
encode: {model: model}
train: {method: logistic, loss: {beta: 50}, trackers: [csv]}
''')
assert config.train.loss == {"beta": 50.0}
assert ALL_STAGES.index("digests") == ALL_STAGES.index("export") + 1
assert parser().parse_args(["digests", "scratch.yaml"])
"""
"""What the commands make of all of them together."""


@pytest.fixture(scope="module")
def steps() -> dict[str, list[Step]]:
    return recipes(PAGE.read_text())


@pytest.fixture(scope="module")
def tree(steps: dict[str, list[Step]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources in which every recipe was followed."""
    tree = tmp_path_factory.mktemp("scratch")
    ignore = shutil.ignore_patterns("__pycache__", "base_model", "*.jpg")
    for folder in ("pipelines", "training", "orchestration", "docs", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=ignore)
    for file in (ROOT / "pyproject.toml", *ROOT.glob("*.py")):
        shutil.copy(file, tree)
    for recipe in steps.values():
        apply(recipe, tree)
    return tree


def in_tree(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this Python with the copy's packages before the installed ones."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True)


def test_a_recipe_touches_few_files(steps: dict[str, list[Step]]) -> None:
    files = {heading: {step.path for step in recipe} for heading, recipe in steps.items()}
    assert files.keys() == MOST_FILES.keys()
    assert {heading: len(paths) for heading, paths in files.items() if not 1 <= len(paths) <= MOST_FILES[heading]} == {}
    for heading in MOST_FILES.keys() - {"Add a scorer"}:
        assert any(path.startswith("tests/") for path in files[heading]), f"{heading} has no test"


def test_what_the_recipes_add_passes_its_tests(steps: dict[str, list[Step]], tree: Path) -> None:
    own = {step.path for recipe in steps.values() for step in recipe if step.is_new and step.path.startswith("tests/")}
    of_loss = "tests/training/test_losses.py::test_the_logistic_loss_of_equal_errors_adds_ln_2"
    done = in_tree(tree, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", of_loss, *OF_THE_HOUSE, *sorted(own))
    assert done.returncode == 0, done.stdout + done.stderr
    num_passed = int(done.stdout.rsplit(" passed", 1)[0].rsplit(None, 1)[-1])
    assert num_passed >= len(own) + 1 + len(OF_THE_HOUSE)


def test_configuration_and_commands_know_what_the_recipes_add(tree: Path) -> None:
    done = in_tree(tree, "-c", IN_A_RUN)
    assert done.returncode == 0, done.stderr


def test_what_the_recipes_add_is_clean(steps: dict[str, list[Step]], tree: Path) -> None:
    files = sorted({step.path for recipe in steps.values() for step in recipe if step.path.endswith(".py")})
    files.remove("lightness.py")  # a user's own file, as docs/guides/evaluate.md shows one
    for arguments in (("check", *files), ("format", "--check", *files)):
        done = in_tree(tree, "-m", "ruff", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_scorer_of_the_recipe_scores(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tree)
    scorer = new_scorer("lightness:LightnessScore")
    light, dark = (Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (200, 50))
    scorer.fit([light], [dark], ["a wall"])
    assert scorer.score([light, dark], ["a wall"] * 2) == pytest.approx([1, 0.25])
