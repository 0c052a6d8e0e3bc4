"""What the report says of encoding, beyond what was recorded: shares, and the storage that one text a prompt saves."""

from collections.abc import Mapping
from typing import Any

KINDS = {"latents": "pair", "text": "prompt"}  # what is encoded -> the item that its speed counts


def encoding_view(encoding: Mapping[str, Any]) -> dict[str, Any]:
    """The record of encoding with `saved_ratio`, `cut_ratio`, and in `kinds` what this run encoded, latents first."""
    stored, speed = encoding["bytes_per_pair"], encoding["speed"] or {}
    return {
        **encoding,
        "saved_ratio": saved(stored["text"], stored["text_per_pair_storage"]),
        "cut_ratio": encoding["truncated_prompts"] / encoding["prompts"] if encoding["prompts"] else 0.0,
        "kinds": [
            {**speed[kind], "name": kind, "item": item, "parts": shares(speed[kind]["seconds_by_part"])}
            for kind, item in KINDS.items()
            if speed.get(kind)
        ],
    }


def saved(stored: float | None, otherwise: float | None) -> float | None:
    """The share of `otherwise` bytes that storing only `stored` saves; None if one is unknown or nothing is saved."""
    return 1 - stored / otherwise if stored is not None and otherwise and stored < otherwise else None


def shares(seconds_by_part: Mapping[str, float]) -> list[dict[str, Any]]:
    """Each part with its seconds and its share of their sum; parts run side by side, so the sum is work, not time."""
    total = sum(seconds_by_part.values())
    return [
        {"name": name, "seconds": seconds, "share": seconds / total if total else 0.0}
        for name, seconds in seconds_by_part.items()
    ]
