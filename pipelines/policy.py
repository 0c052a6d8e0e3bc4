"""What the configuration decides about a row: is it a tie, is it held out. Rows change with it, tars never."""

from dataclasses import dataclass
from typing import Literal

import pyarrow.compute as pc

from pipelines.config import IngestConfig
from pipelines.dataset.pair import TRAIN, VALIDATION, Reason, Status, split_border, split_of
from pipelines.dataset.table import Table

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
        """The policy of a configuration."""
        return Policy(config.validation_ratio, config.ties, config.min_vote_share)

    @property
    def tie_width(self) -> float:
        """A label less than this away from 0.5 is a tie."""
        return max(EQUAL, self.min_vote_share - 0.5 - EQUAL)

    def status_of(self, label_0: float) -> tuple[Status, Reason | None]:
        """Kept, or a tie and why."""
        if self.ties == "keep" or abs(label_0 - 0.5) >= self.tie_width:
            return Status.KEPT, None
        return Status.TIE, Reason.EQUAL_PREFERENCE if abs(label_0 - 0.5) < EQUAL else Reason.WEAK_PREFERENCE

    def split_of(self, prompt_id: str) -> str:
        """The split of a prompt that no source has in a split of its own."""
        return split_of(prompt_id, self.validation_ratio)


def apply_policy(policy: Policy, table: Table) -> int:
    """Bring the rows of earlier runs in line with the policy; how many rows changed.

    Raises:
        StorageError: The commit failed.
    """
    if table.version is None:
        return 0
    changed = 0
    if _num_wrong_ties(policy, table):
        changed += table.update(*_ties_update(policy))
    if wrong := _wrong_splits(policy, table):
        claimed = ", ".join(f"'{prompt}'" for prompt in sorted(wrong.claimed))
        held_out = f"prompt_id < '{split_border(policy.validation_ratio)}'"
        free = "source_split IS NULL AND prompt_id IS NOT NULL"
        free += f" AND prompt_id NOT IN ({claimed})" if claimed else ""
        split = f"CASE WHEN {held_out} THEN '{VALIDATION}' ELSE '{TRAIN}' END"
        changed += table.update({"split": split}, f"{free} AND split <> ({split})")
    return changed


def is_applied(policy: Policy, table: Table) -> bool:
    """Whether every row is as the policy has it; reads four columns."""
    return not _num_wrong_ties(policy, table) and _wrong_splits(policy, table) is None


def _num_wrong_ties(policy: Policy, table: Table) -> int:
    is_tie = pc.field("status") == str(Status.TIE)
    if policy.ties == "keep":
        return table.count_rows(is_tie)
    close = pc.abs(pc.field("label_0") - 0.5) < policy.tie_width
    return table.count_rows(PREFERRED_OR_NOT & ((close & ~is_tie) | (~close & is_tie)))


def _ties_update(policy: Policy) -> tuple[dict[str, str], str]:
    rows = f"status IN ('{Status.KEPT}', '{Status.TIE}')"
    if policy.ties == "keep":
        return {"status": f"'{Status.KEPT}'", "reason": "NULL"}, f"status = '{Status.TIE}'"
    distance = "abs(label_0 - 0.5)"
    is_tie = f"{distance} < {policy.tie_width!r}"
    reason = f"CASE WHEN {distance} < {EQUAL!r} THEN '{Reason.EQUAL_PREFERENCE}' ELSE '{Reason.WEAK_PREFERENCE}' END"
    return {
        "status": f"CASE WHEN {is_tie} THEN '{Status.TIE}' ELSE '{Status.KEPT}' END",
        "reason": f"CASE WHEN {is_tie} THEN {reason} ELSE NULL END",
    }, f"{rows} AND ((status = '{Status.TIE}') <> ({is_tie}))"


@dataclass(frozen=True)
class _WrongSplits:
    claimed: set[str]
    """Prompts among the wrong ones that a source has in a split of its own: they stay."""


def _wrong_splits(policy: Policy, table: Table) -> _WrongSplits | None:
    """Whether some prompt's split is not what its hash says, and which of them are right all the same."""
    held_out = pc.field("prompt_id") < split_border(policy.validation_ratio)
    is_held_out = pc.field("split") == VALIDATION
    free = PREFERRED_OR_NOT & ~pc.field("source_split").is_valid()
    rows = table.read(["prompt_id"], free & ((held_out & ~is_held_out) | (~held_out & is_held_out)))
    if not rows.num_rows:
        return None
    wrong = pc.unique(rows["prompt_id"])
    claims = table.read(["prompt_id"], pc.field("source_split").is_valid() & pc.field("prompt_id").isin(wrong))
    claimed = set(pc.unique(claims["prompt_id"]).to_pylist())
    return None if len(claimed) == len(wrong) else _WrongSplits(claimed)
