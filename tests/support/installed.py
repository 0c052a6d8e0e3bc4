"""The package as somebody has it who installed it, and a folder of theirs that has the same names."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = ("pyproject.toml", "README.md", "LICENSE", "mapo_entry.py")
NAMES = ("pipelines", "training", "orchestration")


def copy_source(folder: Path) -> Path:
    """Copy what a package is built from into a new folder, without metadata of an earlier build."""
    folder.mkdir()
    for name in FILES:
        shutil.copyfile(ROOT / name, folder / name)
    for name in NAMES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def pip(*arguments: str | Path) -> None:
    """Run pip without a network, with the build tools of this environment."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments), "--no-deps", "--no-build-isolation", "--no-index"],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def write_namesakes(folder: Path) -> None:
    """Give a folder packages with the names of mapo's, that no process of mapo may import."""
    for name in NAMES:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise AssertionError('imported the {name} of a user')\n")
