"""Weights of scorers on a cluster: named by digests, published to the storage's cache, brought once to each node.

`<storage>/cache/<sha256>` holds one file, `<storage>/cache/scorers/<part>.json` the record of a part: its files by
name, with digest and size. A node keeps what it brought in its own cache, as `mapo scorers fetch` does; a part is there
in full or not at all.
"""

import json
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from pipelines.dataset.errors import ModelError, StorageError
from pipelines.dataset.layout import CACHE
from pipelines.dataset.model_fetch import default_cache, fetch_file
from pipelines.dataset.model_files import file_digests
from pipelines.dataset.safetensors_header import check_safetensors, tensor_types
from pipelines.dataset.storage import Storage, file_sha256
from pipelines.dataset.values import JsonObject
from pipelines.scores.conversions.convert import VERSION
from pipelines.scores.parts import PARTS
from pipelines.scores.weights import RECORD, combined_digest, files_of, is_fetched, part_folder

RECORDS = f"{CACHE}/scorers"
OWN_FOLDER = "folder"
"""The name of the part of a user's own scorer."""
SHORT = 16


@dataclass(frozen=True)
class LocatedFile:
    """A file of a part: its path below the part's folder, its digest and its size."""

    name: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True)
class LocatedPart:
    """A part of a scorer's weights, by what is in it.

    Args:
        name: The part's name in the table of parts, or OWN_FOLDER.
        files: Its files, sorted by name.
        folder: The folder on the driver's machine; None if only the storage's cache has it.
    """

    name: str
    files: tuple[LocatedFile, ...]
    folder: str | None = None

    @property
    def digest(self) -> str:
        """One digest of all files, as the fingerprints of scorers have it."""
        return combined_digest({file.name: file.sha256 for file in self.files})

    @property
    def num_bytes(self) -> int:
        """The size of all files."""
        return sum(file.num_bytes for file in self.files)


def locate_parts(
    scorer: str, parts: Sequence[str], storage: Storage | None, folder: Path | None = None
) -> tuple[LocatedPart, ...]:
    """Find the parts of a built-in scorer: in a given folder, or in the storage's cache, or in this machine's.

    Args:
        scorer: The scorer's name, for errors.
        parts: The names of its parts.
        storage: The storage; None to look on this machine alone.
        folder: The folder of weights of the configuration; no other place counts if it is given.

    Raises:
        ModelError: A part is in none of them, or is damaged or bfloat16.
    """
    if folder is not None:
        return tuple(_in_folder(part, part_folder(folder, part, is_only=part == parts[0])) for part in parts)
    root, found, missing = default_cache() / "scorers", [], []
    for part in parts:
        located = _on_storage(part, storage) or (_in_folder(part, root / part) if is_fetched(root / part) else None)
        if located is None:
            missing.append(part)
        else:
            found.append(located)
    if missing:
        raise ModelError(
            f"the weights of the scorer {scorer} are missing: {', '.join(missing)} not found in {root}"
            + ("" if storage is None else f" or in {storage.uri(RECORDS)}"),
            f"mapo scorers fetch {scorer}"
            + ("" if storage is None else f" --to {storage.url}, which serves all nodes of a cluster"),
        )
    return tuple(found)


def locate_folder(folder: Path) -> LocatedPart:
    """Describe the folder of weights of a user's own scorer: all files in it.

    Raises:
        ModelError: The folder is empty.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        raise ModelError(f"the folder of weights {folder} is empty", "give the folder that the scorer loads")
    located = (
        LocatedFile(file.relative_to(folder).as_posix(), file_digests([file])[file.name], file.stat().st_size)
        for file in files
    )
    return LocatedPart(OWN_FOLDER, tuple(located), str(folder))


def _in_folder(part: str, folder: Path) -> LocatedPart:
    names = sorted(files_of(part))
    recorded = json.loads((folder / RECORD).read_text())["files"] if (folder / RECORD).is_file() else {}
    files = []
    for name in names:
        size = (folder / name).stat().st_size
        known = recorded.get(name, {})
        is_known = known.get("num_bytes") == size
        sha256 = str(known["sha256"]) if is_known else file_digests([folder / name])[name]
        files.append(LocatedFile(name, sha256, size))
    for name in (name for name in names if name.endswith(".safetensors")):
        check_safetensors(folder / name)
        if not PARTS[part].is_bfloat16 and "BF16" in tensor_types([folder / name]):
            raise ModelError(
                f"{folder / name} is bfloat16: scores would move by 4 % of their standard deviation, "
                "which flips close pairs",
                "give the published weights in float32 or float16",
            )
    return LocatedPart(part, tuple(files), str(folder))


def _on_storage(part: str, storage: Storage | None) -> LocatedPart | None:
    """Read the record of a part in the storage's cache; None without one of this version's conversion, or its files."""
    if storage is None:
        return None
    data = storage.read_if_there(f"{RECORDS}/{part}.json")
    if data is None:
        return None
    record = json.loads(data)
    if record.get("conversion_version") != VERSION:
        return None
    files = {name: record["files"][name] for name in sorted(files_of(part))}
    located = tuple(LocatedFile(name, each["sha256"], each["num_bytes"]) for name, each in files.items())
    return LocatedPart(part, located) if all(_has_blob(storage, file) for file in located) else None


def publish(parts: Sequence[LocatedPart], storage: Storage, say: Callable[[str], None]) -> int:
    """Upload the files of parts that lie on this machine to the storage's cache, unless they are there.

    Args:
        parts: The parts.
        storage: The storage.
        say: Takes a line for the user if something is uploaded.

    Returns:
        The number of bytes uploaded.

    Raises:
        StorageError: The storage cannot be written.
    """
    missing = {
        file.sha256: (Path(part.folder) / file.name, file.num_bytes)
        for part in parts
        if part.folder is not None
        for file in part.files
        if not _has_blob(storage, file)
    }
    if num_bytes := sum(size for _, size in missing.values()):
        say(f"scorers: uploading {num_bytes / 1e6:,.1f} MB of weights to {storage.uri(CACHE)} for the cluster's nodes")
    for sha256, (path, _) in missing.items():
        storage.upload(f"{CACHE}/{sha256}", path)
    return num_bytes


def publish_records(parts: Sequence[LocatedPart], storage: Storage) -> None:
    """Write the records of published parts, so that every driver finds them on the storage."""
    for part in parts:
        if part.folder is None or part.name == OWN_FOLDER:
            continue
        own = Path(part.folder) / RECORD
        record: JsonObject = json.loads(own.read_text()) if own.is_file() else {"part": part.name, "sources": []}
        record["conversion_version"] = record.get("conversion_version", VERSION)
        record["files"] = {file.name: {"sha256": file.sha256, "num_bytes": file.num_bytes} for file in part.files}
        storage.write(f"{RECORDS}/{part.name}.json", (json.dumps(record, indent=1) + "\n").encode())


def _has_blob(storage: Storage, file: LocatedFile) -> bool:
    name = f"{CACHE}/{file.sha256}"
    return storage.exists(name) and storage.size(name) == file.num_bytes


def bring(part: LocatedPart, storage: Storage, scorer: str) -> Path:
    """Return a folder on this node that has exactly the files that the driver planned with, bringing them if needed.

    Args:
        part: The part.
        storage: The storage whose cache has it if this node does not.
        scorer: The scorer that needs it, for errors.

    Raises:
        ModelError: Neither this node nor the storage's cache has these files.
    """
    root = default_cache() / "scorers"
    kept = root / f"{part.name}@{part.digest[:SHORT]}"
    own = [Path(part.folder)] if part.folder is not None else []
    for folder in (*own, root / part.name, kept):
        if _is_same(folder, part):
            return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{kept.name}.lock"):
        if not _is_same(kept, part):
            _download(part, storage, root, kept, scorer)
    return kept


def _is_same(folder: Path, part: LocatedPart) -> bool:
    """Return whether a folder has the files of a part; digests that a record has are not computed again."""
    if not all((folder / file.name).is_file() for file in part.files):
        return False
    if any((folder / file.name).stat().st_size != file.num_bytes for file in part.files):
        return False
    recorded = json.loads((folder / RECORD).read_text())["files"] if (folder / RECORD).is_file() else {}
    return all(
        recorded.get(file.name, {}).get("sha256", "") == file.sha256
        or file_digests([folder / file.name])[(folder / file.name).name] == file.sha256
        for file in part.files
    )


def _download(part: LocatedPart, storage: Storage, root: Path, kept: Path, scorer: str) -> None:
    node = socket.gethostname()
    with tempfile.TemporaryDirectory(dir=root, prefix=f".bring-{part.name}-") as unfinished:
        target = Path(unfinished) / "part"
        for file in part.files:
            try:
                fetch_file(storage, f"{CACHE}/{file.sha256}", target / file.name)
            except (ModelError, StorageError) as error:
                raise ModelError(
                    f"the node {node} lacks {file.name} of {part.name} for the scorer {scorer} as the driver has it "
                    f"(sha256 {file.sha256[:12]}), and the storage's cache does not give it: {error.message}",
                    f"mapo scorers fetch {scorer} --to {storage.url}",
                ) from error
            if (found := file_sha256(target / file.name)) != file.sha256:
                raise ModelError(
                    f"{storage.uri(f'{CACHE}/{file.sha256}')}, brought to the node {node}, has sha256 {found}",
                    f"delete this object, then run: mapo scorers fetch {scorer} --to {storage.url}",
                )
        files = {file.name: {"sha256": file.sha256, "num_bytes": file.num_bytes} for file in part.files}
        record = {"part": part.name, "conversion_version": VERSION, "files": files, "sources": []}
        (target / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        shutil.rmtree(kept, ignore_errors=True)
        target.rename(kept)
