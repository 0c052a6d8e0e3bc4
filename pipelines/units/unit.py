"""A unit of work: table rows that one actor turns into one shard, committed as a whole."""

import hashlib
import json
from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True)
class Unit:
    """Rows that one actor turns into one shard, such as the pairs of a shard or some distinct prompts.

    Args:
        id: 32 hex digits from `unit_id`; the name of the commit.
        rows: What the actor needs, in the order of the table rows that it returns.
    """

    id: str
    rows: pa.Table


def unit_id(*identity: str) -> str:
    """Return 32 hex digits for everything that shapes the bytes of a unit's shard."""
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
