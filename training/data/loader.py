"""Micro-batches read ahead of the step, in order: threads read pairs by range; no rank waits for another's data."""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from training.data.batch import Batch, BatchRows
from training.data.index import PairRecord
from training.data.reader import PairReader
from training.data.threads import Threads

__all__ = ["Batch", "PairLoader", "PairReader"]

NUM_READERS = 16  # requests in flight; a pair is 256 KiB at 1024 x 1024
READ_AHEAD = 8

Tag = TypeVar("Tag")


class PairLoader(Generic[Tag]):
    """Load the batches of given groups of pairs, in order, ahead of their use.

    Memory: `read_ahead` batches, the batch in use, and what each thread is reading.

    Args:
        reader: Reads one pair.
        groups: The groups to load: the caller's tag, and pairs of one shape.
        read_ahead: Groups to read ahead of the one in use.
    """

    waited_s: float
    """Seconds that the consumer has waited in `next`."""

    def __init__(
        self,
        reader: PairReader,
        groups: Iterable[tuple[Tag, Sequence[PairRecord]]],
        *,
        read_ahead: int = READ_AHEAD,
    ) -> None:
        self.waited_s = 0.0
        self._reader = reader
        self._groups = groups
        self._read_ahead = read_ahead

    def __iter__(self) -> Iterator[tuple[Tag, Batch]]:
        ahead: deque[_Group[Tag]] = deque()
        readers: Threads[tuple[_Group[Tag], int]] = Threads(NUM_READERS, "pair-reader", self._read)
        entered = time.monotonic()
        try:
            for tag, records in self._groups:
                group = _Group(tag, records)
                ahead.append(group)
                for row in range(len(records)):
                    readers.put((group, row))
                del group  # the consumer's alone, once it is given out
                if len(ahead) > self._read_ahead:
                    yield self._result(ahead, entered)
                    entered = time.monotonic()
            while ahead:
                yield self._result(ahead, entered)
                entered = time.monotonic()
        finally:
            readers.stop()

    def _read(self, wanted: "tuple[_Group[Tag], int]") -> None:
        group, row = wanted
        group.read(self._reader, row)

    def _result(self, ahead: "deque[_Group[Tag]]", entered: float) -> tuple[Tag, Batch]:
        """Return the oldest group; nothing of it is held here while the consumer has it."""
        group = ahead.popleft()
        try:
            return group.tag, group.wait()
        finally:
            self.waited_s += time.monotonic() - entered


class _Group(Generic[Tag]):
    """A micro-batch under construction, and how many of its pairs are still missing."""

    def __init__(self, tag: Tag, records: Sequence[PairRecord]) -> None:
        self.tag = tag
        self.rows = BatchRows(records)
        self._left = len(self.rows.records)
        assert self._left, "a group has a pair"
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._errors: dict[int, Exception] = {}

    def read(self, reader: PairReader, row: int) -> None:
        """Read one pair; an error waits for the consumer."""
        try:
            reader.fill(self.rows, row)
        except Exception as error:
            self._errors[row] = error
        with self._lock:
            self._left -= 1
            if not self._left:
                self._done.set()

    def wait(self) -> Batch:
        """Return the batch, once it is whole; of several errors, raise the first pair's."""
        self._done.wait()
        if self._errors:
            raise self._errors[min(self._errors)]
        return self.rows.finish()
