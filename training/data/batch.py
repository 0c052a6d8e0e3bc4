"""Micro-batches, finished and under construction.

Letters: B pairs or single images, C channels, H and W of latents, S tokens, D and P embedding sizes.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.dataset.errors import ShardCorrupt
from pipelines.dataset.pair import PAIR
from training.data.index import PairRecord
from training.data.tensors import TensorPlace


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one shape and one kind, labels applied, on the CPU, in stored types.

    Single images are the chosen ones; they have no rejected ones.
    """

    records: list[PairRecord]
    preference_B: Tensor  # float32, 0.5..1: the probability that the chosen image is preferred; 1 for singles
    chosen_BCHW: Tensor
    rejected_BCHW: Tensor | None
    chosen_time_ids_B6: Tensor  # float32: original h, w, crop top, left, target h, w
    rejected_time_ids_B6: Tensor | None
    prompt_embeds_BSD: Tensor
    pooled_BP: Tensor | None  # an SD 1.5 base has none
    kind: str = PAIR  # of `pipelines.dataset.pair.KINDS`
    good_B: Tensor = None  # type: ignore[assignment]  # bool, False for single images that were judged bad; or all True
    weight_B: Tensor = None  # type: ignore[assignment]  # float32, 1 on average over the data set; by default all 1

    def __post_init__(self) -> None:
        if self.good_B is None:
            object.__setattr__(self, "good_B", torch.ones_like(self.preference_B, dtype=torch.bool))
        if self.weight_B is None:
            object.__setattr__(self, "weight_B", torch.ones_like(self.preference_B))


class _Column:
    """One tensor of the batch, its memory as a row of bytes for each pair, and which rows are written."""

    def __init__(self, num_pairs: int, part: TensorPlace) -> None:
        self.kind = (part.dtype, part.shape)
        self.tensor = torch.empty((num_pairs, *part.shape), dtype=part.dtype)
        self.rows: NDArray[np.uint8] = self.tensor.reshape(num_pairs, -1).view(torch.uint8).numpy()
        self.is_written = bytearray(num_pairs)


class BatchRows:
    """A micro-batch under construction: threads write its rows in any order, and each byte is copied once.

    Memory is allocated when the first row arrives, so a batch that is only planned takes none.

    Raises:
        ValueError: The records are of several kinds.
    """

    def __init__(self, records: Sequence[PairRecord]) -> None:
        self.records = list(records)
        self._kind = self.records[0].kind if self.records else PAIR
        if other := next((each for each in self.records if each.kind != self._kind), None):
            raise ValueError(f"{other.pair_key} is {other.kind}, but {self._kind} in the rest of its micro-batch")
        self._columns: dict[str, _Column] = {}
        self._time_ids: list[tuple[list[float], ...]] = [([],) * len(record.sides) for record in self.records]
        self._lock = threading.Lock()

    def write(self, name: str, row: int, data: bytes, part: TensorPlace) -> None:
        """Copy one tensor out of a safetensors file.

        Raises:
            ValueError: Its type or shape differs from that of the other pairs in the micro-batch.
        """
        column = self._columns.get(name) or self._add(name, part)
        if column.kind != (part.dtype, part.shape):
            raise ValueError(
                f"{name} is {_kind(part.dtype, part.shape)}, but {_kind(*column.kind)} in the rest of its micro-batch"
            )
        column.rows[row] = np.frombuffer(data, np.uint8, part.num_bytes, part.start)
        column.is_written[row] = 1

    def _add(self, name: str, part: TensorPlace) -> _Column:
        with self._lock:
            if name not in self._columns:
                self._columns[name] = _Column(len(self.records), part)
            return self._columns[name]

    def write_time_ids(self, row: int, *sides: list[float]) -> None:
        """Set the time ids of one pair, of the chosen and the rejected image, or of a single image."""
        self._time_ids[row] = sides

    def _tensor(self, name: str) -> Tensor | None:
        column = self._columns.get(name)
        if column is not None and not all(column.is_written):
            record = self.records[column.is_written.index(0)]
            raise ShardCorrupt(
                f"{record.noun} {record.pair_key} from {record.origin} has no {name}, but other {record.noun}s in its "
                "micro-batch do",
                "all text embeddings of a fingerprint have the same parts; `mapo data verify` lists what is damaged",
            )
        return None if column is None else column.tensor

    def finish(self) -> Batch:
        """Return the micro-batch, once every row is written.

        Raises:
            ShardCorrupt: Some pairs have a part that others do not.
        """
        tensors = {name: self._tensor(name) for name in ("chosen_BCHW", "rejected_BCHW", "prompt_embeds_BSD")}
        sides = [torch.tensor(ids, dtype=torch.float32) for ids in zip(*self._time_ids, strict=True)]
        return Batch(
            records=self.records,
            preference_B=torch.tensor([record.preference for record in self.records], dtype=torch.float32),
            chosen_time_ids_B6=sides[0],
            rejected_time_ids_B6=sides[1] if len(sides) == 2 else None,
            pooled_BP=self._tensor("pooled_BP"),
            kind=self._kind,
            good_B=torch.tensor([record.is_good for record in self.records]),
            weight_B=torch.tensor([record.weight for record in self.records], dtype=torch.float32),
            **tensors,  # type: ignore[arg-type]
        )


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
