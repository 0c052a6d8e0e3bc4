"""Fail if a function of the three floors is more complex than MOST by `radon cc`: `python .ci/complexity.py`."""

import sys
from pathlib import Path

from radon.complexity import cc_visit

MOST = 12
FLOORS = ("orchestration", "training", "pipelines")


def main() -> int:
    """Print every function above the limit; return the exit code."""
    found = []
    for file in sorted(file for floor in FLOORS for file in Path(floor).rglob("*.py")):
        for block in cc_visit(file.read_text()):
            for each in (*getattr(block, "methods", ()), block):
                if each.complexity > MOST and each.letter in "FM":
                    where = f"{file}:{each.lineno}"
                    found.append(f"{where}: {each.name} has complexity {each.complexity}, the limit is {MOST}")
    sys.stdout.writelines(f"{line}\n" for line in dict.fromkeys(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
