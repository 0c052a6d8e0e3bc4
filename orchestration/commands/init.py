"""`mapo init`: write a commented configuration to start from."""

import argparse
from pathlib import Path

from orchestration.commands.options import Command, Option, place, say
from pipelines.dataset.errors import ConfigError

RECIPES = Path(__file__).parents[1] / "recipes"
OWN_NAME = "RECIPE.yaml"


def recipe_names() -> list[str]:
    """Return the names of the recipes, sorted; those of training methods are in a folder of their own."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def write_recipe(recipe: str, file: Path) -> None:
    """Write a recipe to a new file.

    Args:
        recipe: Its name.
        file: Where to write it.

    Raises:
        ConfigError: There is no such recipe, or the file exists or cannot be written.
    """
    names = recipe_names()
    if recipe not in names:
        raise ConfigError(f"there is no recipe {recipe}", f"choose from {', '.join(names)}")
    text = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")
    try:
        with file.open("x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise ConfigError(f"{file} exists, and is left as it is", "name another file after the recipe") from None
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}", "name a file in a folder that exists") from error


def _init(options: argparse.Namespace) -> None:
    file = Path(f"{options.recipe}.yaml" if options.file == OWN_NAME else options.file).expanduser()
    write_recipe(options.recipe, file)
    say(f"{file}: read its comments and change what is marked as yours")


COMMANDS = (
    Command(
        "init",
        f"write a commented configuration to start from: {', '.join(recipe_names())}",
        _init,
        (
            Option("RECIPE", "name of the configuration"),
            Option(
                "FILE", "new file to write it to; an existing file is never overwritten", default=OWN_NAME, type=place
            ),
        ),
    ),
)
