"""Weights of scorers on this machine: brought once from a file, a folder, the hub or a URL, checked and converted.

`<cache>/scorers/<part>/` holds one part: `model.safetensors`, `config.json` or tokenizer files, and `fetched.json` with
the digests of what was brought and of what it became. A part is there in full or not at all.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_fetch import default_cache
from pipelines.dataset.model_files import file_digests
from pipelines.dataset.safetensors_header import check_safetensors, tensor_types
from pipelines.dataset.storage import file_sha256
from pipelines.dataset.values import JsonObject
from pipelines.scores.conversions.convert import GIVES_CONFIG, VERSION, convert, read_weights
from pipelines.scores.downloads import bring, find_given
from pipelines.scores.parts import MODEL, PARTS, WEIGHTS, File, Part

RECORD = "fetched.json"


def parts_of(name: str) -> tuple[str, ...]:
    """Return the parts of a scorer by its name.

    Raises:
        ConfigError: There is no such scorer.
    """
    from pipelines.scores.scorers import new_scorer

    return tuple(getattr(new_scorer(name), "parts", ()))


def find(name: str, cache: Path | None = None) -> Path:
    """Return the folder that holds all parts of a scorer.

    Args:
        name: The scorer's name.
        cache: The folder for fetched files; by default the node's.

    Raises:
        ModelError: A part was not fetched to this machine.
        ConfigError: There is no such scorer.
    """
    root = (cache or default_cache()) / "scorers"
    missing = [part for part in parts_of(name) if not is_fetched(root / part)]
    if missing:
        raise ModelError(
            f"the weights of the scorer {name} are not on this machine: {', '.join(missing)} not found in {root}",
            f"mapo scorers fetch {name}",
        )
    return root


def is_fetched(folder: Path) -> bool:
    """Return whether a part is there as this version converts it."""
    record = folder / RECORD
    return record.is_file() and json.loads(record.read_text()).get("conversion_version") == VERSION


def part_folder(root: Path, part: str, *, is_only: bool) -> Path:
    """Return the folder of one part below a folder of weights.

    Args:
        root: The folder with one folder for each part, or the folder of a part itself.
        part: The part's name.
        is_only: Whether `root` itself may be the part's folder.

    Raises:
        ModelError: There is no such folder, or it lacks the part's files.
    """
    wanted = files_of(part)
    for folder in (root / part, root):
        if all((folder / name).is_file() for name in wanted) and (folder != root or is_only or MODEL not in wanted):
            return folder
    raise ModelError(
        f"{root} has no folder {part} with {' and '.join(wanted)}",
        "give the folder `scorers` of a cache that `mapo scorers fetch` filled",
    )


def files_of(name: str) -> list[str]:
    """Return the names of the files that a part has on this machine, all of which shape a score."""
    part = PARTS[name]
    if not part.has_model:
        return [file.name for file in part.files]
    if part.is_sharded:
        return [file.name for file in part.files]
    is_published = any(file.name == "config.json" for file in part.files)
    return [MODEL, "config.json"] if is_published or part.convert in GIVES_CONFIG else [MODEL]


def files_digest(folder: Path, names: Sequence[str]) -> str:
    """Return one digest of files of a part; recorded ones are taken if the sizes still fit.

    Args:
        folder: The part's folder.
        names: The files that shape a score; the folder may hold others.
    """
    files = [folder / name for name in sorted(names)]
    recorded = json.loads((folder / RECORD).read_text())["files"] if (folder / RECORD).is_file() else {}
    digests = {}
    for file in files:
        known = recorded.get(file.name, {})
        is_known = known.get("num_bytes") == file.stat().st_size
        digests[file.name] = known["sha256"] if is_known else file_digests([file])[file.name]
    return combined_digest(digests)


def combined_digest(digests: Mapping[str, str]) -> str:
    """Return one digest of files by their names and digests."""
    return hashlib.sha256(json.dumps(dict(digests), sort_keys=True).encode()).hexdigest()


def fetch(name: str, source: Path | None = None, cache: Path | None = None) -> Path:
    """Bring the weights of a scorer to this machine, check and convert them; parts that are there stay.

    Args:
        name: The scorer's name.
        source: A file, or a folder with the published files. Its files replace parts that are there; files that it
            lacks come from the hub. None: everything comes from the hub.
        cache: The folder for fetched files; by default the node's.

    Returns:
        The folder that holds all parts.

    Raises:
        ModelError: A file cannot be brought, is not the pinned one, needs code to be read, or is of another model.
        ConfigError: There is no such scorer.
    """
    given = find_given(source, parts_of(name)) if source is not None else {}
    root = (cache or default_cache()) / "scorers"
    root.mkdir(parents=True, exist_ok=True)
    for part in parts_of(name):
        if part in given or not is_fetched(root / part):
            _fetch_part(part, root, given.get(part, {}), name)
    return find(name, cache)


def _fetch_part(name: str, root: Path, given: Mapping[str, Path], scorer: str) -> None:
    """Bring one part; it appears under its name by one rename, when it is whole."""
    with (
        FileLock(root / f".{name}.lock"),
        tempfile.TemporaryDirectory(dir=root, prefix=f".fetch-{name}-") as unfinished,
    ):
        downloads, finished = Path(unfinished) / "downloads", Path(unfinished) / name
        downloads.mkdir()
        finished.mkdir()
        part = PARTS[name]
        sources = []
        for file in part.files:
            path, origin = (given[file.name], "") if file.name in given else bring(name, file, downloads, scorer)
            sha256 = file_sha256(path)
            _check_digest(file, path, sha256)
            sources.append({"name": path.name, "from": origin or str(path.absolute()), "sha256": sha256})
            if file.name.endswith(WEIGHTS):
                _convert(part, path, finished / (file.name if part.is_sharded else MODEL))
            else:
                shutil.copyfile(path, finished / file.name)
        record: JsonObject = {
            "part": name,
            "licence": part.licence,
            "conversion": part.convert,
            "conversion_version": VERSION,
            "sources": sources,
        }
        record["files"] = {
            path.name: {"sha256": file_sha256(path), "num_bytes": path.stat().st_size}
            for path in sorted(finished.iterdir())
        }
        (finished / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        _put(finished, root / name, Path(unfinished) / "old")


def _put(finished: Path, place: Path, aside: Path) -> None:
    """Give a finished folder its name; a folder that had it before goes away with the temporary ones."""
    if place.is_dir():
        place.rename(aside)
    finished.rename(place)


def _check_digest(file: File, path: Path, found: str) -> None:
    """Check a file against its pinned digests.

    Raises:
        ModelError: It is another file.
    """
    if file.sha256 and found not in file.sha256:
        raise ModelError(
            f"{path} has sha256 {found}, expected {' or '.join(file.sha256)}",
            f"the file is damaged or another version; fetch {file.name} again from its publisher",
        )


def _convert(part: Part, path: Path, target: Path) -> None:
    """Write weights of a part as safetensors, with its configuration; those that are so already are copied."""
    if path.suffix == ".safetensors":
        check_safetensors(path)
        if part.convert == "copy" and (part.is_bfloat16 or "BF16" not in tensor_types([path])):
            shutil.copyfile(path, target)
            return
    from safetensors.torch import save_file

    tensors, config = convert(part.convert, read_weights(path), path)
    save_file(tensors, target, metadata={"format": "pt"})
    if config is not None:
        (target.parent / "config.json").write_text(json.dumps(config, indent=1) + "\n")
