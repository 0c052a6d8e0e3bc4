"""`mapo init`: every recipe is a valid configuration that explains each of its keys, and no file is overwritten."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestration.cli import main
from orchestration.commands.init import RECIPES, recipe_names
from orchestration.config import parse_config
from pipelines.config import NamedModel


def keys_of(data: Any) -> Iterator[str]:
    """Every key of nested mappings and lists."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield key
            yield from keys_of(value)
    elif isinstance(data, list):
        for each in data:
            yield from keys_of(each)


def test_there_is_the_recipe_that_judges_models() -> None:
    assert "evaluate" in recipe_names()


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_is_a_valid_configuration(recipe: str) -> None:
    config = parse_config((RECIPES / f"{recipe}.yaml").read_text(), source=recipe)
    assert config.name == recipe


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_recipe_explains_every_key_that_it_sets(recipe: str) -> None:
    """Each key has a comment on its own line, or is named in backticks by one."""
    text = (RECIPES / f"{recipe}.yaml").read_text()
    explained = set(re.findall(r"^[ -]*(\w+):[^#\n]* #.*\w", text, re.MULTILINE))
    comments = "\n".join(re.findall(r"#.*", text))
    explained |= {name for span in re.findall(r"`([^`]+)`", comments) for name in re.findall(r"^\w+", span)}
    assert [key for key in keys_of(yaml.safe_load(text)) if key not in explained] == []


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_setting_that_is_commented_out_is_valid_too(recipe: str) -> None:
    text = (RECIPES / f"{recipe}.yaml").read_text()
    assert parse_config(re.sub(r"^( +)# (\w+: )", r"\1\2", text, flags=re.MULTILINE)).name == recipe


def test_the_recipe_judges_the_published_models_beside_ones_own() -> None:
    evaluate = parse_config((RECIPES / "evaluate.yaml").read_text()).evaluate
    assert evaluate.model_names == ("base", "dpo", "mapo", "mine")
    named = {each.name: each for each in evaluate.models if isinstance(each, NamedModel)}
    assert (named["dpo"].model, named["mapo"].model) == ("mhdang/dpo-sdxl-text2image-v1", "mapo-t2i/mapo-beta")
    assert all(each.unet for each in named.values())
    assert evaluate.suite_names == ("seed@1",)


def test_a_recipe_is_written_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "evaluate"]) == 0
    assert main(["init", "evaluate", "other.yaml"]) == 0
    said = capsys.readouterr().out
    for name in ("evaluate.yaml", "other.yaml"):
        assert (tmp_path / name).read_bytes() == (RECIPES / "evaluate.yaml").read_bytes()
        assert name in said


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["nothing"], "there is no recipe nothing", "choose from"),
        (["../evaluate"], "there is no recipe ../evaluate", "evaluate"),
        (["methods"], "there is no recipe methods", "choose from"),
        (["evaluate", "mine.yaml"], "mine.yaml exists, and is left as it is", "another file"),
        (["evaluate", "none/x.yaml"], "cannot write none/x.yaml: No such file or directory", "a folder that exists"),
        (["evaluate", "."], "exists, and is left as it is", "another file"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    arguments: list[str], message: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    assert main(["init", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert hint in said.partition("hint: ")[2]
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("mine.yaml", "name: mine\n")]
