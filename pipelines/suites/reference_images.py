"""Images of subjects that generated ones are compared with: brought from a folder, found again by later runs."""

import json
import shutil
from pathlib import Path
from typing import Any

from pipelines.dataset.errors import ModelError
from pipelines.dataset.layout import CACHE
from pipelines.dataset.model_fetch import default_cache
from pipelines.dataset.storage import Storage, file_sha256
from pipelines.suites.prompt_files import FOLDER
from pipelines.suites.prompt_sets import PromptSet
from pipelines.suites.subjects import SUBJECTS

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
RECORD = "images.json"
"""The file beside a subject's images in the storage's cache that lists them."""


def fetch_references(wanted: PromptSet, folder: Path) -> int:
    """Copy the images of subjects from `folder/<subject>/` to this machine's cache; return how many.

    Args:
        wanted: The prompt set of the subjects.
        folder: The folder `dataset` of a copy of google/dreambooth, or one with a folder for each subject of interest.
    """
    count = 0
    for subject in SUBJECTS:
        files = _images(folder / subject)
        if not files:
            continue
        target = local_folder(wanted, subject)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for file in files:
            shutil.copyfile(file, target / file.name)
        count += len(files)
    return count


def publish_references(wanted: PromptSet, storage: Storage) -> None:
    """Copy the images of subjects to the storage's cache, where all nodes of a cluster find them."""
    for subject in SUBJECTS:
        files = _images(local_folder(wanted, subject))
        for file in files:
            storage.upload(f"{_stored(wanted, subject)}/{file.name}", file)
        if files:
            storage.write(f"{_stored(wanted, subject)}/{RECORD}", json.dumps(_places(files)).encode())


def find_references(wanted: PromptSet, subject: str, storage: Storage | None, suite: str) -> str:
    """Return the images of a subject as a JSON list of places, from the storage's cache or this machine's.

    Args:
        wanted: The prompt set.
        subject: The subject.
        storage: The storage; None to look on this machine alone.
        suite: The suite that needs them, for the hint.

    Raises:
        ModelError: They were not fetched.
    """
    stored = _stored(wanted, subject)
    data = None if storage is None else storage.read_if_there(f"{stored}/{RECORD}")
    if data is not None and storage is not None:
        places = [{**each, "shard": storage.uri(f"{stored}/{each['shard']}")} for each in json.loads(data)]
    else:
        folder = local_folder(wanted, subject)
        places = [{**each, "shard": str(folder / each["shard"])} for each in _places(_images(folder))]
    if not places:
        raise ModelError(
            f"the images of {subject}, with which {suite} compares, were not fetched",
            f"mapo suites fetch {suite} --from FOLDER, with the images in FOLDER/{subject}, as in `dataset` of "
            "https://github.com/google/dreambooth",
        )
    return json.dumps(places)


def local_folder(wanted: PromptSet, subject: str) -> Path:
    """Return the folder of a subject's images on this machine."""
    return default_cache() / FOLDER / wanted.name / subject


def _stored(wanted: PromptSet, subject: str) -> str:
    return f"{CACHE}/{FOLDER}/{wanted.name}/{subject}"


def _images(folder: Path) -> list[Path]:
    return sorted(each for each in folder.glob("*") if each.suffix.lower() in SUFFIXES)


def _places(files: list[Path]) -> list[dict[str, Any]]:
    return [{"shard": each.name, "length": each.stat().st_size, "sha256": file_sha256(each)} for each in files]
