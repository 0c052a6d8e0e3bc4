"""The samples of one model on the storage: drawn samples are kept, and reused only for the same inputs."""

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from pipelines.dataset.storage import Storage


def digest_of(plain: Any) -> str:
    """Return 32 hex digits of plain data."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:32]


class DrawnSamples:
    """The images `<model>-NNN.png` of a folder, and their record `<model>.json`, which is written after them.

    An image without an entry in the record, with bytes that differ from the entry's, or drawn from other inputs than
    requested now, is not a sample of this model: `remove_others` deletes it.

    Args:
        storage: The run's storage.
        folder: The folder of the samples.
        model: `base` or `aligned`.
        made_from: For each sample a digest of everything that shapes it.
    """

    def __init__(self, storage: Storage, folder: str, model: str, made_from: Sequence[str]) -> None:
        self._storage, self._folder, self._model, self._made_from = storage, folder, model, made_from
        self._images: dict[int, bytes] = {}
        self._entries = self._read_record()
        there = set(storage.names(folder))
        for place, digest in enumerate(made_from):
            entry = self._entries.get(self.name(place), {})
            if entry.get("made_from") == digest and self._path(place) in there:
                image = storage.read(self._path(place))
                if hashlib.sha256(image).hexdigest() == entry.get("sha256"):
                    self._images[place] = image

    def name(self, place: int) -> str:
        """Return the name of a sample's image in the folder."""
        return f"{self._model}-{place:03d}.png"

    @property
    def missing(self) -> list[int]:
        """Return the places of the samples that are still to be drawn."""
        return [place for place in range(len(self._made_from)) if place not in self._images]

    @property
    def images(self) -> list[bytes]:
        """Return all samples as PNG, in order."""
        return [self._images[place] for place in range(len(self._made_from))]

    def remove_others(self, dtype: str | None = None) -> None:
        """Delete every image of this model that is not one of these samples.

        Args:
            dtype: The type that the pipeline computes in on this machine; samples of other types are deleted too.
        """
        if dtype is not None:
            self._images = {
                place: image for place, image in self._images.items()
                if self._entries[self.name(place)]["dtype"] == dtype
            }  # fmt: skip
        names = {self.name(place) for place in self._images}
        kept = {name: entry for name, entry in self._entries.items() if name in names}
        if len(kept) < len(self._entries):
            self._entries = kept
            self._write_record()
        self._delete_images_but(names)

    def _delete_images_but(self, names: Collection[str]) -> None:
        """Delete the images of this model that have other names."""
        for path in self._storage.names(self._folder):
            name = path.rpartition("/")[2]
            if re.fullmatch(rf"{self._model}-\d+\.png", name) and name not in names:
                self._storage.delete(path)

    def add(self, places: Sequence[int], images: Sequence[bytes], dtype: str) -> None:
        """Store samples: first the images, then the record that makes them count.

        Args:
            places: The places of the samples.
            images: The samples as PNG.
            dtype: The type that they were computed in.
        """
        for place, image in zip(places, images, strict=True):
            self._storage.write(self._path(place), image)
            entry = {"made_from": self._made_from[place], "dtype": dtype, "sha256": hashlib.sha256(image).hexdigest()}
            self._entries[self.name(place)] = entry
            self._images[place] = image
        self._write_record()

    def _path(self, place: int) -> str:
        return f"{self._folder}/{self.name(place)}"

    @property
    def _record(self) -> str:
        return f"{self._folder}/{self._model}.json"

    def _read_record(self) -> dict[str, dict[str, str]]:
        if not self._storage.exists(self._record):
            return {}
        try:
            return {str(name): dict(entry) for name, entry in json.loads(self._storage.read(self._record)).items()}
        except (ValueError, TypeError, AttributeError):  # of somebody else: nothing counts
            return {}

    def _write_record(self) -> None:
        self._storage.write(self._record, json.dumps(self._entries, indent=1, sort_keys=True).encode())
