"""The human pairs that an evaluation reads: prompts to draw, and labels to audit scorers on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.pair import PAIR, TRAIN, VALIDATION, Status, of_kind
from pipelines.dataset.storage import Storage
from pipelines.suites.leaks import leaked_prompts
from pipelines.suites.suite import Suite

PREFERRED = 0.5
"""Label of a pair without a preference; above it the first image is the chosen one."""
COLUMNS = [
    "pair_key", "prompt", "prompt_id", "label_0", "shard", "image_0_sha256", "offset_0", "length_0", "image_1_sha256",
    "offset_1", "length_1",
]  # fmt: skip


@dataclass(frozen=True)
class HeldOutPairs:
    """The kept pairs of one split, in key order; single images are none: nobody compared them.

    Args:
        storage: The storage of the data set.
        version: Version of the table of pairs; None for a storage without one.
    """

    storage: Storage
    version: int | None

    @cached_property
    def split(self) -> str:
        """`validation`, or `train` if no pair is held out."""
        return VALIDATION if self._rows(VALIDATION).num_rows else TRAIN

    @cached_property
    def rows(self) -> pa.Table:
        """The pairs of the split, in key order; ties are left out, since they have no chosen image.

        Raises:
            SnapshotError: There is no such pair.
        """
        if self.version is not None:
            rows = self._rows(self.split)
            if rows.num_rows:
                return rows
        raise SnapshotError(
            f"{self.storage.url} has no kept pairs to evaluate with",
            "`mapo data show` says why; set `evaluate.prompts` to judge with prompts of your own",
        )

    @property
    def is_held_out(self) -> bool:
        """Whether there is a pair that training does not see."""
        return self.split == VALIDATION

    def _rows(self, split: str) -> pa.Table:
        if self.version is None:
            return pa.table({name: [] for name in COLUMNS})
        where = (pc.field("status") == str(Status.KEPT)) & (pc.field("split") == split) & of_kind(PAIR)
        where &= pc.field("label_0") != PREFERRED
        return pairs_table(self.storage, self.version).read(COLUMNS, where).sort_by("pair_key")

    def leaked(self, suites: Iterable[Suite]) -> dict[str, int]:
        """Count the prompts of each suite, by its name, that pairs for training have; empty without a table."""
        return {} if self.version is None else leaked_prompts(self.storage, self.version, suites)

    def sides(self, most: int) -> pa.Table:
        """Return both images of the first pairs: IMAGES_SCHEMA's columns, `pair_key`, `label_0` and `side` (0 or 1)."""
        rows = self.rows.slice(0, most)
        both = []
        for side in (0, 1):
            names = {
                "image_sha256": f"image_{side}_sha256", "prompt_id": "prompt_id", "prompt": "prompt", "shard": "shard",
                "offset": f"offset_{side}", "length": f"length_{side}", "pair_key": "pair_key", "label_0": "label_0",
            }  # fmt: skip
            table = pa.table({name: rows[column] for name, column in names.items()})
            both.append(table.append_column("side", pa.array([side] * rows.num_rows, pa.int8())))
        return pa.concat_tables(both)
