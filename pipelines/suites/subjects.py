"""The subjects and prompts of DreamBench, out of the text file that their authors publish."""

import re
from collections.abc import Iterator
from typing import Any

TOKEN = "sks"  # noqa: S105
"""The word that stands for a subject in its prompts, as in DreamBooth's examples."""
LIVE_CLASSES = ("cat", "dog")
"""Classes of living subjects, which have prompts of their own."""
SUBJECTS = (
    "backpack",
    "backpack_dog",
    "bear_plushie",
    "berry_bowl",
    "can",
    "candle",
    "cat",
    "cat2",
    "clock",
    "colorful_sneaker",
    "dog",
    "dog2",
    "dog3",
    "dog5",
    "dog6",
    "dog7",
    "dog8",
    "duck_toy",
    "fancy_boot",
    "grey_sloth_plushie",
    "monster_toy",
    "pink_sunglasses",
    "poop_emoji",
    "rc_car",
    "red_cartoon",
    "robot_toy",
    "shiny_sneaker",
    "teapot",
    "vase",
    "wolf_plushie",
)
"""The names of the 30 subjects, in the order of the file."""
HEADER = "subject_name"
_PROMPT = re.compile(r"^'(?P<prompt>.+)'\.format\(unique_token, class_token\),?$")
_SUBJECT = re.compile(r"^(?P<subject>\w+),(?P<kind>[\w ]+)$")


def read_subjects(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the prompts of every subject with its metadata, in the order of the file.

    Args:
        text: `prompts_and_classes.txt`: a table of subjects and classes, a list of prompts for objects, then one for
            living subjects.

    Yields:
        The prompt with TOKEN and the class, and `subject`, `class` and `plain`, the prompt without the token.

    Raises:
        ValueError: A part of the file is missing.
    """
    subjects = [found.groups() for line in text.splitlines() if (found := _SUBJECT.match(line.strip()))]
    lists = _lists(text)
    if len(lists) != 2 or not all(lists) or not subjects:
        raise ValueError(f"{len(subjects)} subjects and {len(lists)} lists of prompts; there must be some, and 2")
    for subject, kind in subjects:
        for template in lists[kind in LIVE_CLASSES] if subject != HEADER else ():
            plain = " ".join(template.format("", kind).split())
            yield template.format(TOKEN, kind), {"subject": subject, "class": kind, "plain": plain}


def _lists(text: str) -> list[list[str]]:
    """Return the prompts of each list, with places for the word and the class."""
    found: list[list[str]] = []
    for line in map(str.strip, text.splitlines()):
        if line.startswith("prompt_list"):
            found.append([])
        elif found and (prompt := _PROMPT.match(line)):
            found[-1].append(prompt["prompt"])
    return found
