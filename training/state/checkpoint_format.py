"""The files of a checkpoint on the storage, and how they are read.

    <run>/checkpoints/<key>/step-00000500-0001-1f3a90c2/   step, number and name of the start of the workers
        rank-00000.safetensors   fragments of weights, moments and average that this rank owns
        rank-00000.json          where each fragment lies in that file, its digest, the pairs that the rank consumed
        state.json               step, history, what the checkpoint belongs to
        manifest.json            digests of all of these; written last: without it there is no checkpoint

Every byte read is checked against a digest that the manifest leads to. Any number of ranks can read what any number
wrote, with any ZeRO stage: each fragment names its part of the parameter. There is no pickle anywhere.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pipelines.dataset.errors import ShardCorrupt, StorageError
from pipelines.dataset.storage import Storage
from pipelines.dataset.values import JsonObject

MANIFEST, STATE = "manifest.json", "state.json"
VERSION = 1
NUM_READERS = 16
DAMAGED_HINT = "the checkpoint before it is used; remove this one"


@dataclass(frozen=True)
class FragmentEntry:
    """One fragment in a rank's file: elements `start` to `start + numel` of a parameter, little-endian float32."""

    kind: str
    name: str
    start: int
    numel: int
    shape: tuple[int, ...]
    offset: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A committed checkpoint.

    Args:
        folder: The checkpoint's folder, relative to the storage.
        step: Finished optimizer steps.
        world_size: Number of ranks that wrote it.
        zero_stage: Their ZeRO stage.
        validation_loss: The last validation loss before it; None if nothing is held out.
        sha256: Digest of each file except the tensors', whose digests are in the index files.
        sizes: Bytes of each file.
        average_validation_loss: The same for the average of the weights; None if there is no average.
    """

    folder: str
    step: int
    world_size: int
    zero_stage: int
    validation_loss: float | None
    sha256: dict[str, str]
    sizes: dict[str, int]
    average_validation_loss: float | None = None

    @property
    def name(self) -> str:
        """The last part of the folder."""
        return self.folder.rsplit("/", 1)[-1]

    def to_json(self) -> bytes:
        """Return the manifest as JSON with its own digest, so that damage is noticed."""
        body = {"version": VERSION, **{k: v for k, v in asdict(self).items() if k != "folder"}}
        if self.average_validation_loss is None:  # so that versions before it read what they could read
            del body["average_validation_loss"]
        return json.dumps(body | {"digest": _digest_of(body)}, indent=1, sort_keys=True).encode()

    @staticmethod
    def parse(folder: str, data: bytes) -> "Manifest":
        """Parse the output of `to_json`.

        Raises:
            ShardCorrupt: The manifest is damaged.
        """
        try:
            body = json.loads(data)
            if body.pop("digest") != _digest_of(body) or body.pop("version") != VERSION:
                raise ValueError("it does not match its digest")
            return Manifest(folder=folder, **body)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardCorrupt(f"{folder}/{MANIFEST} is damaged: {error}", DAMAGED_HINT) from error


def rank_names(rank: int) -> tuple[str, str]:
    """Return the names of a rank's tensor file and index file."""
    return f"rank-{rank:05d}.safetensors", f"rank-{rank:05d}.json"


def list_checkpoints(storage: Storage, folder: str) -> list[Manifest]:
    """List the checkpoints below a folder that have an intact manifest, oldest first; opens no other file."""
    found = []
    for name in storage.names(folder):
        if name.endswith(f"/{MANIFEST}"):
            try:
                found.append(Manifest.parse(name.rpartition("/")[0], storage.read(name)))
            except ShardCorrupt:
                continue
    return sorted(found, key=lambda manifest: (manifest.step, manifest.name))


def remove_checkpoints(storage: Storage, folder: str) -> int:
    """Delete every checkpoint of a training, manifests first so that none is left in part; return how many files."""
    names = [name for name in storage.names(folder) if name.removeprefix(f"{folder}/").startswith("step-")]
    for name in sorted(names, key=lambda name: not name.endswith(f"/{MANIFEST}")):
        storage.delete(name)
    return len(names)


def best_of(manifests: list[Manifest], *, of_average: bool = False) -> Manifest | None:
    """Return the checkpoint with the lowest validation loss, of the weights or their average; None if none has one."""
    name = "average_validation_loss" if of_average else "validation_loss"
    measured = [(getattr(each, name), each.step, each) for each in manifests if getattr(each, name) is not None]
    return min(measured, key=lambda each: each[:2])[2] if measured else None


class Reader:
    """Reader of the fragments of a committed checkpoint, whichever ranks wrote them.

    Raises:
        ShardCorrupt: A file is missing, truncated, or does not match its digest.
    """

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self._storage, self.manifest = storage, manifest
        self.state: JsonObject = json.loads(self._checked(STATE))
        self.ranks: list[JsonObject] = []
        self._entries: dict[tuple[str, str], list[tuple[str, FragmentEntry]]] = defaultdict(list)
        for rank in range(manifest.world_size):
            tensors, index = rank_names(rank)
            described = json.loads(self._checked(index))
            self._check_size(tensors)
            self.ranks.append(described)
            for entry in (
                FragmentEntry(**(each | {"shape": tuple(each["shape"])})) for each in described.pop("entries")
            ):
                self._entries[entry.kind, entry.name].append((tensors, entry))

    def kinds(self) -> set[str]:
        """Return the kinds of values that are stored for each parameter."""
        return {kind for kind, _ in self._entries}

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter of a kind."""
        return {name: found[0][1].shape for (each, name), found in self._entries.items() if each == kind}

    def read(self, wanted: Iterable[tuple[str, str, int, int]]) -> Iterator[np.ndarray[Any, np.dtype[np.float32]]]:
        """Yield parts of parameters, in order: each (kind, name, start, numel) as a float32 vector."""
        with ThreadPoolExecutor(NUM_READERS, thread_name_prefix="checkpoint-reader") as readers:
            yield from readers.map(lambda part: self._part(*part), wanted)

    def _part(self, kind: str, name: str, start: int, numel: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        part, filled = np.empty(numel, dtype="<f4"), 0
        for file, entry in self._entries[kind, name]:
            low, high = max(start, entry.start), min(start + numel, entry.start + entry.numel)
            if low < high:
                data = self._read(file, entry)
                part[low - start : high - start] = data[low - entry.start : high - entry.start]
                filled += high - low
        if filled != numel:
            raise self._damaged(f"contains only {filled} of {numel} elements of {kind} {name} from {start}")
        return part

    def _read(self, file: str, entry: FragmentEntry) -> np.ndarray[Any, np.dtype[np.float32]]:
        path = f"{self.manifest.folder}/{file}"
        try:
            return np.frombuffer(self._storage.read_range(path, entry.offset, 4 * entry.numel, entry.sha256), "<f4")
        except StorageError as error:
            raise self._damaged(f"lacks {file}") if self._is_gone(path) else error from error

    def _checked(self, name: str) -> bytes:
        path = f"{self.manifest.folder}/{name}"
        try:
            data = self._storage.read(path)
        except StorageError as error:
            raise self._damaged(f"lacks {name}") if self._is_gone(path) else error from error
        if hashlib.sha256(data).hexdigest() != self.manifest.sha256.get(name):
            raise self._damaged(f"contains a {name} that does not match its manifest")
        return data

    def _check_size(self, name: str) -> None:
        path, wanted = f"{self.manifest.folder}/{name}", self.manifest.sizes.get(name)
        if self._is_gone(path):
            raise self._damaged(f"lacks {name}")
        if (found := self._storage.size(path)) != wanted:
            raise self._damaged(f"has {found:,} of {wanted:,} bytes of {name}")

    def _is_gone(self, path: str) -> bool:
        return not self._storage.exists(path)  # raises if the storage does not answer: that is no damage

    def _damaged(self, what: str) -> ShardCorrupt:
        return ShardCorrupt(f"checkpoint {self.manifest.folder} {what}", DAMAGED_HINT)


def read_parameters(reader: Reader, kind: str) -> Iterator[tuple[str, np.ndarray[Any, np.dtype[np.float32]]]]:
    """Yield every parameter of a kind, whole and in its own shape, one after another."""
    shapes = reader.shapes(kind)
    parts = reader.read((kind, name, 0, math.prod(shape)) for name, shape in shapes.items())
    for (name, shape), part in zip(shapes.items(), parts, strict=True):
        yield name, part.reshape(shape)


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
