"""The account of consumed pairs: how many, and a digest that does not depend on the number of workers."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

MODULUS = 1 << 64


@dataclass
class ConsumedPairs:
    """The pairs that a rank has trained on.

    `total` adds up a hash of each micro-batch (step, slot and keys), modulo 2^64: the sum over the ranks is the same
    however many there are, and differs if a pair came twice, never, or at another step.
    """

    num_pairs: int = 0
    total: int = 0

    def add(self, step: int, slot: int, pair_keys: Iterable[str]) -> None:
        """Count a micro-batch."""
        keys = list(pair_keys)
        hashed = hashlib.blake2b(repr((step, slot, keys)).encode(), digest_size=8).digest()
        self.total = (self.total + int.from_bytes(hashed, "big")) % MODULUS
        self.num_pairs += len(keys)

    @property
    def digest(self) -> str:
        """16 hex digits of `total`."""
        return f"{self.total:016x}"

    def to_dict(self) -> dict[str, int | str]:
        """Return it as plain data."""
        return asdict(self) | {"digest": self.digest}

    @staticmethod
    def sum(accounts: Iterable[Mapping[str, Any]]) -> "ConsumedPairs":
        """Add up the accounts of several ranks, as returned by `to_dict`."""
        listed = list(accounts)
        return ConsumedPairs(sum(a["num_pairs"] for a in listed), sum(a["total"] for a in listed) % MODULUS)
