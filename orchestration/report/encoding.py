"""Encoding section of a report: what is encoded, how fast that was, and how it looks when decoded."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from orchestration.report.records import (
    BytesPerPair,
    ContactImage,
    EncodingSection,
    EncodingSpeed,
    Fingerprints,
    WorkPart,
)
from orchestration.run.journal import StageRecord
from pipelines.dataset.storage import Storage
from pipelines.maintenance.describe import describe_encoding

ITEMS = {"latents": "pair", "text": "prompt"}
"""Kind of encoding -> the item counted by its speed; in the order of the page."""


def recorded_fingerprints(record: StageRecord | None) -> Fingerprints | None:
    """Return the fingerprints that a run has encoded, from its record of encode."""
    details = record.details if record else {}
    latents, text = details.get("latents"), details.get("text")
    return None if latents is None or text is None else Fingerprints(latents, text)


def described(storage: Storage, fingerprints: Fingerprints) -> EncodingSection:
    """Describe the encodings under two fingerprints, from the tables alone.

    Args:
        storage: The run's storage.
        fingerprints: The ones that were trained on, or else those that the run has encoded.
    """
    found = describe_encoding(storage, fingerprints.latents, fingerprints.text)
    return EncodingSection(
        pairs=found.pairs,
        singles=found.singles,
        images=found.images,
        image_slots=found.image_slots,
        image_ratio=found.image_ratio,
        prompts=found.prompts,
        truncated_prompts=found.truncated_prompts,
        max_tokens=found.max_tokens,
        text_ratio=found.text_ratio,
        bytes_per_pair=BytesPerPair(**asdict(found.bytes_per_pair)),
        quarantined=found.quarantined,
    )


def with_own_work(section: EncodingSection, fingerprints: Fingerprints, record: StageRecord | None) -> EncodingSection:
    """Add speed and contact sheet if the run itself has encoded under these fingerprints.

    Args:
        section: The section to extend.
        fingerprints: The section's fingerprints.
        record: The run's record of encode.
    """
    if record is None or recorded_fingerprints(record) != fingerprints:
        return section
    contact = record.details.get("contact", ())
    return replace(section, speeds=speeds(record.details), contact=[ContactImage.from_json(image) for image in contact])


def speeds(details: Mapping[str, Any]) -> list[EncodingSpeed]:
    """Return the speed of each kind that a run encoded; empty if it found everything encoded.

    Args:
        details: Details of its record of encode.
    """
    recorded = details.get("speed") or {}
    return [_speed(kind, item, recorded[kind]) for kind, item in ITEMS.items() if recorded.get(kind)]


def _speed(kind: str, item: str, data: Mapping[str, Any]) -> EncodingSpeed:
    return EncodingSpeed(
        name=kind,
        item=item,
        seconds=data["seconds"],
        num_items=data["items"],
        num_images=data["images"],
        images_per_s=data["images_per_s"],
        items_per_s=data["items_per_s"],
        busy_ratio=data["busy_ratio"],
        num_actors=int(data["num_actors"]),
        device=data["device"],
        batch_size=data["batch_size"],
        halved_to=data["halved_to"],
        parts=work_parts(data["seconds_by_part"]),
    )


def work_parts(seconds_by_part: Mapping[str, float]) -> list[WorkPart]:
    """Return each part with its share of the work: parts run side by side, so their sum is work, not time."""
    total = sum(seconds_by_part.values())
    return [WorkPart(name, seconds, seconds / total if total else 0.0) for name, seconds in seconds_by_part.items()]
