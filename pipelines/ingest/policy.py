"""The configured policy for ties and splits. Rows change with it, shards never do."""

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import IngestConfig
from pipelines.dataset.pair import TRAIN, VALIDATION, Reason, Status, split_border, split_of
from pipelines.dataset.table import Table

UNITS_AT_ONCE = 200  # about 150,000 pairs
EQUAL = 1e-9  # 1 - 0.4 is not 0.6
PREFERRED_OR_NOT = pc.field("status").isin([str(Status.KEPT), str(Status.TIE)])


@dataclass(frozen=True)
class Policy:
    """Ties and splits. See `IngestConfig` for the meaning of each field."""

    validation_ratio: float = 0.01
    ties: Literal["drop", "keep"] = "drop"
    min_vote_share: float = 0.5

    @staticmethod
    def of(config: IngestConfig) -> "Policy":
        """Return the policy of a configuration."""
        return Policy(config.validation_ratio, config.ties, config.min_vote_share)

    @property
    def tie_width(self) -> float:
        """A label closer to 0.5 than this is a tie."""
        return max(EQUAL, self.min_vote_share - 0.5 - EQUAL)

    def status_of(self, label_0: float) -> tuple[Status, Reason | None]:
        """Return kept, or a tie and its reason."""
        if self.ties == "keep" or abs(label_0 - 0.5) >= self.tie_width:
            return Status.KEPT, None
        return Status.TIE, Reason.EQUAL_PREFERENCE if abs(label_0 - 0.5) < EQUAL else Reason.WEAK_PREFERENCE

    def split_of(self, prompt_id: str) -> str:
        """Return the split of a prompt that no source assigns to a split."""
        return split_of(prompt_id, self.validation_ratio)


def apply_policy(policy: Policy, table: Table) -> int:
    """Bring the rows of earlier runs in line with the policy; return how many changed.

    Raises:
        StorageError: The commit failed.
    """
    changed = 0
    while wrong := _wrong_rows(policy, table):
        # Some units at a time, so that a table of any size fits into memory; a crash between them is made good later.
        units = pc.field("unit").isin(wrong.units[:UNITS_AT_ONCE])
        where = units & wrong.where
        table.rewrite(lambda rows, wrong=wrong: _as_wanted(policy, rows, wrong), where, name="policy")  # type: ignore[misc]
        changed += wrong.num_rows if not changed else 0
    return changed


def is_applied(policy: Policy, table: Table) -> bool:
    """Return whether every row follows the policy; reads five columns."""
    return _wrong_rows(policy, table) is None


@dataclass(frozen=True)
class _Wrong:
    """Rows that do not follow the policy."""

    num_rows: int
    units: list[str]
    where: pc.Expression
    claimed: pa.Array
    """Prompts whose split a source decides, against their hash: these stay."""


def _wrong_rows(policy: Policy, table: Table) -> _Wrong | None:
    if table.version is None:
        return None
    claimed = pa.array([], pa.string())
    where = _is_wrong_tie(policy)
    # Where every row has a split of its source's own, the table's statistics say so, and nothing is read.
    candidates = table.read(["prompt_id"], _is_wrong_split(policy)) if table.may_have_null("source_split") else None
    if candidates is not None and candidates.num_rows:
        own = pc.field("source_split").is_valid() & pc.field("prompt_id").isin(pc.unique(candidates["prompt_id"]))
        claimed = pc.unique(table.read(["prompt_id"], own)["prompt_id"].combine_chunks())
        where |= _is_wrong_split(policy) & ~pc.field("prompt_id").isin(claimed)
    wrong = table.read(["unit"], where)
    if not wrong.num_rows:
        return None
    return _Wrong(wrong.num_rows, sorted(pc.unique(wrong["unit"]).to_pylist()), where, claimed)


def _is_wrong_tie(policy: Policy) -> pc.Expression:
    is_tie = pc.field("status") == str(Status.TIE)
    if policy.ties == "keep":
        return is_tie
    close = pc.abs(pc.field("label_0") - 0.5) < policy.tie_width
    return PREFERRED_OR_NOT & ((close & ~is_tie) | (~close & is_tie))


def _is_wrong_split(policy: Policy) -> pc.Expression:
    """Match rows in the wrong split whose source has no split of its own."""
    held_out = pc.field("prompt_id") < split_border(policy.validation_ratio)
    is_held_out = pc.field("split") == VALIDATION
    free = pc.field("prompt_id").is_valid() & ~pc.field("source_split").is_valid()
    return free & ((held_out & ~is_held_out) | (~held_out & is_held_out))


def _as_wanted(policy: Policy, rows: pa.Table, wrong: _Wrong) -> pa.Table:
    """Return the rows with the status, reason and split that the policy gives them."""
    distance = pc.abs(pc.subtract(rows["label_0"], 0.5))
    judged = pc.is_in(rows["status"], pa.array([str(Status.KEPT), str(Status.TIE)]))
    close = pc.fill_null(pc.less(distance, policy.tie_width), False)
    is_tie = pc.and_(close, policy.ties != "keep")
    reason = pc.if_else(pc.less(distance, EQUAL), str(Reason.EQUAL_PREFERENCE), str(Reason.WEAK_PREFERENCE))
    status = pc.if_else(is_tie, str(Status.TIE), str(Status.KEPT))
    reason = pc.if_else(is_tie, reason, pa.scalar(None, pa.string()))
    held_out = pc.less(rows["prompt_id"], split_border(policy.validation_ratio))
    free = pc.and_(pc.is_valid(rows["prompt_id"]), pc.invert(pc.is_valid(rows["source_split"])))
    free = pc.and_(free, pc.invert(pc.is_in(rows["prompt_id"], wrong.claimed)))
    columns = {
        "status": pc.if_else(judged, status, rows["status"]),
        "reason": pc.if_else(judged, reason, rows["reason"]),
        "split": pc.if_else(free, pc.if_else(held_out, VALIDATION, TRAIN), rows["split"]),
    }
    for name, values in columns.items():
        rows = rows.set_column(rows.schema.get_field_index(name), name, values)
    return rows
