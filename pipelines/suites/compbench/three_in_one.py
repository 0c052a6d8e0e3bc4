"""Complex prompts of T2I-CompBench++: attributes, spatial relations and actions in one score."""

from collections.abc import Collection, Mapping
from typing import Literal

Kind = Literal["spatial", "action", "spatialaction"]
"""What a complex prompt has beside attributes: the tags of its suite."""
PARTS: Mapping[str, tuple[str, ...]] = {
    "spatial": ("attribute", "spatial"),
    "action": ("attribute", "action"),
    "spatialaction": ("attribute", "spatial", "action"),
}
"""The parts that the score of a prompt of each kind is the mean of; it does not read the others."""


def kind_of(prompt: str, spatial: Collection[str], action: Collection[str]) -> Kind:
    """Return the kind of a complex prompt, as the official lists of prompts say it.

    Args:
        prompt: The prompt.
        spatial: The prompts of `complex_val_spatial.txt`.
        action: Those of `complex_val_action.txt`; a prompt in neither list has both.
    """
    if _key(prompt) in {_key(each) for each in spatial}:
        return "spatial"
    return "action" if _key(prompt) in {_key(each) for each in action} else "spatialaction"


def _key(prompt: str) -> str:
    """Return a prompt up to its first full stop, in lower case."""
    return prompt.strip("\n").split(".")[0].lower()


def three_in_one(kind: Kind, *, attribute: float, spatial: float, action: float) -> float:
    """Return the mean of the parts that a complex prompt has.

    Args:
        kind: From `kind_of`.
        attribute: BLIP-VQA.
        spatial: `score_2d`, with `objects_of_complex`.
        action: Cosine of CLIP ViT-B/32 with the prompt; the readme has it without adjectives.
    """
    if kind == "spatial":
        return (spatial + attribute) * 0.5
    if kind == "action":
        return (action + attribute) * 0.5
    return (attribute + spatial + action) / 3
