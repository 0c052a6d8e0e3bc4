"""Fetched prompt sets: brought from their public place or a folder, checked by digest, found again by later runs.

A set is one file of canonical JSON lines, under its digest in the storage's cache and in this machine's. Light: needs
neither ray nor torch.
"""

import contextlib
import functools
import hashlib
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.dataset.errors import ModelError, StorageError
from pipelines.dataset.layout import CACHE
from pipelines.dataset.model_fetch import CACHE_VARIABLE, default_cache
from pipelines.dataset.read_once import read_once
from pipelines.dataset.storage import Storage
from pipelines.suites.prompt_sets import (
    Layout,
    PromptSet,
    SetRow,
    canonical,
    digest_of,
    prompt_set,
    read_canonical,
)
from pipelines.suites.questions import Questions, parse_questions, read_questions

FOLDER = "prompts"
QUESTIONS = "questions.jsonl"
TIMEOUT_S = 60.0
"""Longest time for one file, from its first byte to its last."""
ATTEMPTS, MAX_REDIRECTS = 3, 5
WAIT_S = 0.2
"""Half of the wait before the second attempt; doubled each time."""
MAX_BYTES = 64 * 2**20
BUSY = (429, 500, 502, 503, 504)


class PromptFiles:
    """The fetched files of prompt sets, in a storage's cache and in this machine's; one of these looks each up once.

    Make a new one for each look: a file that has changed since is then read again, and others are not (`read_once`).

    Args:
        storage: The storage; None to look on this machine alone.
    """

    def __init__(self, storage: Storage | None) -> None:
        self._storage = storage
        self._found: dict[str, Any] = {}

    def rows(self, wanted: PromptSet, suite: str) -> tuple[SetRow, ...]:
        """Return the rows of a set.

        Args:
            wanted: The set.
            suite: The suite that needs it, for the hint.

        Raises:
            ModelError: It was not fetched, or its file is damaged.
        """

        def parse(data: bytes) -> tuple[SetRow, ...]:
            if wanted.sha256 is not None and hashlib.sha256(data).hexdigest() != wanted.sha256:
                raise ModelError(f"the fetched prompts {wanted.name} are damaged", f"mapo suites fetch {suite}")
            return read_canonical(data)

        place, storage = local_file(wanted), self._storage
        found: tuple[SetRow, ...] | None = self._first(stored_name(wanted), place, parse)
        if found is None:
            cache = "" if storage is None else f" or in {storage.uri(CACHE)}"
            raise ModelError(
                f"the prompts of {suite} are missing: {wanted.name} was not found in {place.parent}{cache}",
                f"mapo suites fetch {suite}" + ("" if storage is None else f" --to {storage.url}"),
            )
        return found

    def questions(self, wanted: PromptSet, suite: str) -> Questions:
        """Return the questions about a set's images.

        Args:
            wanted: The set.
            suite: The suite whose judges ask them, for the hint.

        Raises:
            ModelError: They were not fetched.
            SourceError: They are damaged, or about other prompts.
        """
        place = questions_file(wanted)
        found: Questions | None = self._first(
            f"{CACHE}/{FOLDER}/{place.name}", place, lambda data: parse_questions(data, place.name)
        )
        if found is None:
            raise ModelError(
                f"the judges of {suite} ask questions about each prompt, which were not fetched: there is no {place}",
                f"make {QUESTIONS} with benchmarks/compbench_questions.py, put it beside the prompts, and run "
                f"`mapo suites fetch {suite} --from FOLDER`",
            )
        return found

    def _first(self, stored: str, place: Path, parse: Callable[[bytes], Any]) -> Any:
        """Return what is made of the storage's file, or else of this machine's; None if there is neither."""
        if stored not in self._found:
            found = None if self._storage is None else read_once(self._storage, stored, parse, as_what=stored)
            if found is None:
                found = read_once(Storage(str(place.parent)), place.name, parse, as_what=stored)
            self._found[stored] = found
        return self._found[stored]


def find_set(wanted: PromptSet, storage: Storage | None, suite: str) -> tuple[SetRow, ...]:
    """Return the rows of one fetched set: see `PromptFiles.rows`."""
    return PromptFiles(storage).rows(wanted, suite)


def questions_file(wanted: PromptSet) -> Path:
    """Return the file of questions about a set on this machine."""
    return default_cache() / FOLDER / f"{wanted.name}.{QUESTIONS}"


def fetch_questions(wanted: PromptSet, folder: Path) -> Path | None:
    """Bring the file of questions in a folder to this machine, if there is one; return where it is.

    Args:
        wanted: The set, which must be fetched.
        folder: The folder.

    Raises:
        SourceError: It is damaged, or about a prompt that the set does not have.
    """
    given, target = folder / QUESTIONS, questions_file(wanted)
    if not given.is_file():
        return None
    known = {row.prompt for row in read_canonical(local_file(wanted).read_bytes())}
    read_questions(given, known & read_questions(given).asked.keys())
    _put(given.read_bytes(), target)
    return target


def is_fetched(wanted: PromptSet, storage: Storage | None = None) -> bool:
    """Return whether a set is on this machine, or in the storage's cache."""
    return local_file(wanted).is_file() or (storage is not None and storage.exists(stored_name(wanted)))


def local_file(wanted: PromptSet) -> Path:
    """Return the file of a set on this machine."""
    return default_cache() / FOLDER / f"{wanted.sha256 or wanted.name}.jsonl"


def stored_name(wanted: PromptSet) -> str:
    """Return the name of a set's file in the storage's cache: its digest, or its name if it has none."""
    return f"{CACHE}/{wanted.sha256 or f'{FOLDER}/{wanted.name}.jsonl'}"


def fetch_set(name: str, source: Path | None = None) -> Path:
    """Bring a set to this machine and check it; it appears in full or not at all.

    Args:
        name: The set's name.
        source: A folder with its files, under the names of any layout in which it is published, or one file of it; None
            for the network.

    Returns:
        The file on this machine.

    Raises:
        ModelError: The files are missing, cannot be brought or read, or hold other rows.
        ConfigError: There is no such set.
    """
    wanted = prompt_set(name)
    rows = _from_network(wanted) if source is None else _from_folder(wanted, source)
    target = local_file(wanted)
    _put(canonical(rows), target)
    return target


def _put(data: bytes, target: Path) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        StorageError: It cannot be written.
    """
    unfinished = target.with_name(f".fetch-{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(data)
        unfinished.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {target}: {error.strerror}", f"set {CACHE_VARIABLE} to a folder with space that is yours"
        ) from error


def publish_set(name: str, storage: Storage) -> None:
    """Copy a fetched set to the storage's cache, where every driver on this storage finds it."""
    wanted = prompt_set(name)
    storage.write(stored_name(wanted), local_file(wanted).read_bytes())
    if questions_file(wanted).is_file():
        storage.write(f"{CACHE}/{FOLDER}/{questions_file(wanted).name}", questions_file(wanted).read_bytes())


def _from_folder(wanted: PromptSet, source: Path) -> list[SetRow]:
    folder, names = (source, None) if source.is_dir() else (source.parent, source.name)
    if not source.exists():
        raise ModelError(f"there is no {source.absolute()}", "give a folder with the published files")
    for layout in wanted.layouts:
        is_meant = names is None or layout.files == (names,)
        if is_meant and all((folder / name).is_file() for name in layout.files):
            return _rows(wanted, layout, lambda name: (folder / name).read_bytes(), str(folder))
    listed = " or ".join(", ".join(layout.files) for layout in wanted.layouts)
    raise ModelError(f"{source} lacks the files of {wanted.name}: {listed}", "give them under their published names")


def _from_network(wanted: PromptSet) -> list[SetRow]:
    failures = []
    for layout in wanted.layouts:
        if layout.url is None:
            continue
        try:
            return _rows(wanted, layout, functools.partial(_download, layout.url), layout.url)
        except ModelError as error:
            failures.append(error.args[0].splitlines()[0])
    raise ModelError(
        f"cannot fetch the prompts {wanted.name}: {'; '.join(failures)}",
        "on a machine without a network: `--from FOLDER`, with the files in FOLDER",
    )


def _rows(wanted: PromptSet, layout: Layout, read: Callable[[str], bytes], place: str) -> list[SetRow]:
    """Read and check the rows of one layout."""
    try:
        files = {name: read(name) for name in layout.files}
    except OSError as error:
        raise ModelError(f"cannot read {error.filename}: {error.strerror}", "may you read it?") from error
    try:
        rows = list(layout.read(files))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, pa.ArrowException) as error:
        raise ModelError(
            f"{place} holds no prompts {wanted.name}: {type(error).__name__}: {error}",
            f"take them from {wanted.source}",
        ) from error
    found = digest_of(rows)
    if len(rows) != wanted.count or wanted.sha256 not in (None, found):
        told = f", expected {wanted.count:,}" + (f" with {wanted.sha256[:12]}" if wanted.sha256 else "")
        raise ModelError(
            f"{place} holds other prompts than {wanted.name} in {', '.join(layout.files)}: {len(rows):,} rows with the "
            f"digest {found[:12]}{told}",
            f"the files are damaged or another version; take them from {wanted.source}",
        )
    return rows


def _download(base: str, name: str) -> bytes:
    """Download a small file; a connection that is cut, and a server that is busy, are tried again.

    Raises:
        ModelError: It cannot be brought.
    """
    import urllib3

    url = base + name
    for attempt in range(1, ATTEMPTS + 1):
        try:
            status, data = _get(url)
        except (urllib3.exceptions.HTTPError, TimeoutError) as error:
            if attempt == ATTEMPTS:
                raise ModelError(f"{url}: {type(error).__name__}: {error}", "is there a network?") from error
        else:
            if status == 200:
                return data
            if status not in BUSY or attempt == ATTEMPTS:
                raise ModelError(f"{url}: HTTP {status}", "has its publisher moved it?")
        time.sleep(WAIT_S * 2**attempt)  # whatever the server asks for: it may be a day
    raise AssertionError("unreachable")


def _get(url: str) -> tuple[int, bytes]:
    """Return the status of one answer, and its body, which is small and comes soon.

    Raises:
        ModelError: The body is too large.
        TimeoutError: It takes too long.
    """
    import urllib3

    redirects = urllib3.Retry(
        total=MAX_REDIRECTS, connect=0, read=0, status=0, other=0, respect_retry_after_header=False
    )
    parts, size, end = [], 0, time.monotonic() + TIMEOUT_S
    with urllib3.PoolManager() as pool:
        answer = pool.request("GET", url, timeout=TIMEOUT_S, retries=redirects, preload_content=False)
        while answer.status == 200 and (part := answer.read1(65_536)):  # what there is; `stream` waits for all of it
            parts.append(part)
            size += len(part)
            if size > MAX_BYTES:
                raise ModelError(f"{url} has more than {MAX_BYTES:,} bytes", "no file of prompts is as large")
            if time.monotonic() > end:
                raise TimeoutError(f"{size:,} bytes in {TIMEOUT_S:g} s")
        return answer.status, b"".join(parts)
