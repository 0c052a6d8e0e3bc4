"""A map from 128-bit keys to numbers for tables of 100 million rows: sorted arrays, 20 bytes per key."""

import binascii

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
"""Shape (n, 2): the high and the low half of each key."""

ABSENT = np.float32(np.nan)
GROWTH = 4  # a level is merged into the one before once it has a quarter of its keys: under 2 log n merges a key


def keys_of(column: pa.Array | pa.ChunkedArray) -> Keys:
    """Return keys of 32 hex digits each (no nulls) as pairs of integers."""
    digits = b"".join(_bytes_of(chunk) for chunk in getattr(column, "chunks", [column]) if len(chunk))
    return np.frombuffer(binascii.unhexlify(digits), dtype=">u8").reshape(-1, 2).astype(np.uint64)


def _bytes_of(strings: pa.Array) -> bytes:
    """Return the bytes of all strings of an array, one after the other."""
    strings = strings.cast(pa.string())
    ends = np.frombuffer(strings.buffers()[1], np.int32)[strings.offset : strings.offset + len(strings) + 1]
    return memoryview(strings.buffers()[2])[ends[0] : ends[-1]].tobytes()


def places_in_sorted(known: Keys, wanted: Keys) -> NDArray[np.int64]:
    """Return the first position of each wanted key; -1 where it is not there.

    Args:
        known: Keys in ascending order.
        wanted: Keys in any order.
    """
    found = np.full(len(wanted), -1, np.int64)
    if not len(known) or not len(wanted):
        return found
    start = np.searchsorted(known[:, 0], wanted[:, 0])
    inside = np.minimum(start, len(known) - 1)
    is_near = known[inside, 0] == wanted[:, 0]
    is_there = is_near & (known[inside, 1] == wanted[:, 1])
    found[is_there] = inside[is_there]
    for row in np.flatnonzero(is_near & ~is_there):  # another key of the same high half: once in 10^19 / n^2 maps
        end = np.searchsorted(known[:, 0], wanted[row, 0], "right")
        for step in np.flatnonzero(known[start[row] : end, 1] == wanted[row, 1])[:1]:
            found[row] = start[row] + step
    return found


class KeyMap:
    """A map from keys to float32 values; the first value of a key stays."""

    def __init__(self) -> None:
        self._levels: list[tuple[Keys, NDArray[np.float32]]] = []

    def __len__(self) -> int:
        return sum(len(values) for _, values in self._levels)

    def add(self, keys: Keys, values: NDArray[np.float32]) -> None:
        """Add the keys that are new; of equal keys the first counts."""
        known = ~np.isnan(self.get(keys))
        keys, values = _sorted(keys[~known], values[~known].astype(np.float32, copy=False))
        if not len(keys):
            return
        self._levels.append((keys, values))
        while len(self._levels) > 1 and GROWTH * len(self._levels[-1][1]) >= len(self._levels[-2][1]):
            last, before = self._levels.pop(), self._levels.pop()
            both = np.concatenate([before[0], last[0]]), np.concatenate([before[1], last[1]])
            self._levels.append(_sorted(*both))

    def get(self, keys: Keys) -> NDArray[np.float32]:
        """Return the value of each key, NaN for unknown keys."""
        found = np.full(len(keys), ABSENT)
        for known, values in self._levels:
            places = places_in_sorted(known, keys)
            is_there = places >= 0
            found[is_there] = values[places[is_there]]
        return found


def _sorted(keys: Keys, values: NDArray[np.float32]) -> tuple[Keys, NDArray[np.float32]]:
    """Return keys and values sorted by key; of equal keys the first stays."""
    order = np.argsort(keys[:, 0], kind="stable")
    same = keys[order[1:], 0] == keys[order[:-1], 0]
    if (same & (keys[order[1:], 1] != keys[order[:-1], 1])).any():  # once in 10^19 / n^2 maps: then the slow way
        order = np.lexsort((np.arange(len(keys)), keys[:, 1], keys[:, 0]))
        same = (keys[order[1:]] == keys[order[:-1]]).all(axis=1)
    order = order[np.append(True, ~same)[: len(order)]]
    return keys[order], values[order]
