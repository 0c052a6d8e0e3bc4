"""Where a published file comes from: a file or folder that the user gave, a URL, or the hub."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from pipelines.dataset.errors import ModelError
from pipelines.scores.parts import PARTS, WEIGHTS, File, Part

TIMEOUT_S = 60.0
"""Longest silence of a server, before its answer and within it."""


def find_given(source: Path, parts: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Return the files that a user gave, by part and by the file's name in the table.

    Args:
        source: One file, or a folder with files of the published names, perhaps in one folder for each part. A single
            file may have any name if only one part has weights.
        parts: The parts of the scorer.

    Raises:
        ModelError: There is no such file, or none in it belongs to the parts.
    """
    if not source.exists():
        raise ModelError(f"there is no {source.absolute()}", "give a file or a folder with the published files")
    with_model = [name for name in parts if PARTS[name].has_model]
    given: dict[str, dict[str, Path]] = {}
    for name in parts:
        for file in PARTS[name].files:
            found = _given(source, name, file, is_only=with_model == [name])
            if found is not None:
                given.setdefault(name, {})[file.name] = found
    if not given:
        names = dict.fromkeys(name for part in parts for file in PARTS[part].files for name in file.names)
        raise ModelError(f"{source} has none of the files {', '.join(names)}", "give them under their published names")
    return given


def _given(source: Path, part: str, file: File, *, is_only: bool) -> Path | None:
    if source.is_file():
        is_weights = is_only and source.suffix in WEIGHTS and file.name.endswith(WEIGHTS)
        return source if source.name in file.names or is_weights else None
    places = (folder / name for name in file.names for folder in (source / part, source))
    return next((place for place in places if place.is_file()), None)


def bring(name: str, file: File, downloads: Path, scorer: str) -> tuple[Path, str]:
    """Download one file of a part.

    Args:
        name: The part.
        file: The file.
        downloads: An existing folder for it.
        scorer: The scorer that needs it, for the hint.

    Returns:
        The local file, and where it came from.

    Raises:
        ModelError: There is no network, or no such file.
    """
    part = PARTS[name]
    try:
        return _from_url(file.url, downloads / file.name) if file.url else _from_hub(part, file.names, downloads)
    except Exception as error:  # offline, unknown, gated, out of space: the hub's tree, urllib3's and OSError
        cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
        place = file.url or f"{part.repo} at revision {part.revision} on the hub"
        raise ModelError(
            f"cannot fetch {' or '.join(file.names)} of {name} from {place}: {cause}",
            f"on a machine without a network: mapo scorers fetch {scorer} --from FOLDER, with that file in FOLDER",
        ) from error


def _from_hub(part: Part, names: Sequence[str], downloads: Path) -> tuple[Path, str]:
    """Download the first of several names that the repository has, past the hub's own cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    missing: Exception = FileNotFoundError(names[0])
    for name in names:
        try:
            found = Path(hf_hub_download(str(part.repo), name, revision=part.revision, local_dir=downloads))
        except EntryNotFoundError as error:
            missing = error
            continue
        return found, f"{part.repo}@{_commit(downloads, name) or part.revision}"
    raise missing


def _commit(downloads: Path, name: str) -> str | None:
    """Return the commit that the hub's client wrote down for a downloaded file."""
    notes = downloads / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    return next(iter(notes.read_text().splitlines()), None) if notes.is_file() else None


def _from_url(url: str, target: Path) -> tuple[Path, str]:
    """Download a file from a URL.

    Raises:
        OSError: The server answers with an error.
    """
    import urllib3

    timeout = urllib3.Timeout(connect=TIMEOUT_S, read=TIMEOUT_S)
    response = urllib3.request("GET", url, preload_content=False, timeout=timeout)
    try:
        if response.status != 200:
            raise OSError(f"HTTP {response.status}")
        with target.open("wb") as opened:
            shutil.copyfileobj(response, opened)
    finally:
        response.release_conn()
    return target, url
