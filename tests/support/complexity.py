"""Check that no function of the three floors is too complex by radon's count; part of `make lint`."""

import sys
from collections.abc import Iterator
from pathlib import Path

from radon.complexity import cc_visit
from radon.visitors import Function

ROOT = Path(__file__).parents[2]
FLOORS = ("pipelines", "training", "orchestration")
MAX_COMPLEXITY = 12


def too_complex(folders: list[Path]) -> Iterator[str]:
    """Yield one line for each function or method above the limit, with its place."""
    for file in sorted(file for folder in folders for file in folder.rglob("*.py")):
        for block in cc_visit(file.read_text()):
            if isinstance(block, Function) and block.complexity > MAX_COMPLEXITY:
                place = f"{file.relative_to(folder_of(file, folders))}:{block.lineno}"
                yield f"{place} {block.fullname}: complexity {block.complexity}, limit {MAX_COMPLEXITY}"


def folder_of(file: Path, folders: list[Path]) -> Path:
    """Return the folder above the one of `folders` that holds a file."""
    return next(folder.parent for folder in folders if file.is_relative_to(folder))


if __name__ == "__main__":
    found = list(too_complex([ROOT / floor for floor in FLOORS]))
    sys.exit("\n".join(found) or 0)
