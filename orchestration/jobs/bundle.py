"""The files that are sent with a job: the configuration file, and what `--include` names."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipelines.dataset.errors import ConfigError

MAX_SENT_BYTES = 64 << 20  # the head keeps it in memory, and every node fetches it
NOT_SENT = ("__pycache__", ".git", ".venv", ".gitignore", ".rayignore", "*.pyc")
"""Left out of folders: files that nobody imports, and lists by which Ray would silently leave out others."""


def check_size(configuration: Path, included: Sequence[Path]) -> None:
    """Check the files before any is copied or sent.

    Raises:
        ConfigError: A path does not exist, two have the same name, or all together are too large.
    """
    seen: dict[str, Path] = {configuration.name: configuration}
    sizes: dict[Path, int] = {configuration: configuration.stat().st_size}
    for path in included:
        name = path.resolve().name
        if not path.exists():
            raise ConfigError(f"--include {path}: no such file or folder")
        if name in seen:
            raise ConfigError(f"--include {path}: {seen[name]} is already sent as {name}", "rename one of them")
        seen[name] = path
        sizes |= {file: file.stat().st_size for file in _files(path)}
    if (total := sum(sizes.values())) > MAX_SENT_BYTES:
        largest = max(sizes, key=lambda file: sizes[file])
        raise ConfigError(
            f"{len(sizes):,} files of {total:,} bytes are too large to send with a job (limit {MAX_SENT_BYTES:,}); "
            f"the largest is {largest} with {sizes[largest]:,}",
            "put data and models on the storage, or on a path that every node sees, and packages into the image",
        )


def _files(path: Path) -> Iterator[Path]:
    """Yield the files of a path that are sent."""
    if path.is_file():
        yield path
        return
    ignore = shutil.ignore_patterns(*NOT_SENT)
    for folder, folders, names in os.walk(path, followlinks=True):
        left_out = ignore(folder, [*folders, *names])
        folders[:] = [name for name in folders if name not in left_out]
        files = (Path(folder) / name for name in names if name not in left_out)
        yield from (file for file in files if file.exists())  # a link may be dangling


@contextmanager
def bundled(configuration: Path, included: Sequence[Path]) -> Iterator[Path]:
    """Gather everything that is sent in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="mapo-submit-") as name:
        folder = Path(name)
        shutil.copyfile(configuration, folder / configuration.name)
        for path in included:
            source = path.resolve()
            if source.is_dir():
                ignore = shutil.ignore_patterns(*NOT_SENT)
                shutil.copytree(source, folder / source.name, ignore=ignore, ignore_dangling_symlinks=True)
            else:
                shutil.copyfile(source, folder / source.name)
        yield folder
