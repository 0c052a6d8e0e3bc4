"""The licence of a base model, from its own model card, for the card of models trained from it."""

import re
from typing import Any

import yaml

from pipelines.dataset.model_fetch import CARD
from pipelines.dataset.model_files import ModelSource

FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
KEYS = ("license", "license_name", "license_link")
STATED_ON_THE_HUB = {
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
}
"""Licences of the most common bases, for when the card was not fetched with the weights."""


def licence_of(source: ModelSource) -> dict[str, str]:
    """Return the licence of a base as the hub's metadata: some of KEYS; empty if nothing is known.

    It is read from the card in the base's folder. `license: other` counts only together with its name, without which
    the hub rejects the metadata.

    Args:
        source: The base pipeline, as the section `encode` names it.
    """
    stated = _front_matter(source)
    found = {key: str(stated[key]) for key in KEYS if isinstance(stated.get(key), str) and stated[key]}
    if not found.get("license") and source.model in STATED_ON_THE_HUB:
        found = {"license": STATED_ON_THE_HUB[source.model]}
    is_complete = found.get("license", "other") != "other" or "license_name" in found
    return found if found.get("license") and is_complete else {}


def _front_matter(source: ModelSource) -> dict[str, Any]:
    file = source.folder() / CARD
    match = FRONT_MATTER.match(file.read_text(errors="replace")) if file.is_file() else None
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
