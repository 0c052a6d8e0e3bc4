"""The recipes of CONTRIBUTING.md, applied to a source tree as a contributor would type them.

A block of Python whose first line is a path is a new file; a diff whose first line is `+++ path` changes one, hunk by
hunk: the lines of a hunk that are there already must occur in the file exactly once.
"""

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

SECTION = re.compile(r"^## (Add .+)$", re.MULTILINE)
BLOCK = re.compile(r"^( *)```(python|diff)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Step:
    """One code block: the file that it makes or changes, and its lines."""

    path: str
    is_new: bool
    body: str


def recipes(text: str) -> dict[str, list[Step]]:
    """Return the steps of every recipe of the page, by its heading."""
    parts = SECTION.split(text)
    return {
        heading: [_step(*block.groups()[1:]) for block in BLOCK.finditer(body.partition("\n## ")[0])]
        for heading, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def apply(steps: list[Step], tree: Path) -> set[str]:
    """Do what the steps say in a source tree; return the files that were touched."""
    for step in steps:
        file = tree / step.path
        if step.is_new:
            assert not file.exists(), f"{step.path} exists"
            file.write_text(step.body)
            continue
        text = file.read_text()
        for hunk in re.split(r"^@@\n", step.body, flags=re.MULTILINE):
            old, new = _side(hunk, "-"), _side(hunk, "+")
            assert text.count(old) == 1, f"{step.path} has {text.count(old)} times:\n{old}"
            text = text.replace(old, new)
        file.write_text(text)
    return {step.path for step in steps}


def _step(language: str, body: str) -> Step:
    head, _, rest = textwrap.dedent(body).partition("\n")
    marker = "# " if language == "python" else "+++ "
    assert head.startswith(marker), f"a block of a recipe names its file first: {head}"
    return Step(head.removeprefix(marker), language == "python", rest)


def _side(hunk: str, sign: str) -> str:
    """Return the lines of a hunk that are there before (-) or after (+) it."""
    return "".join(line[1:] for line in hunk.splitlines(keepends=True) if line[0] in (" ", sign))
