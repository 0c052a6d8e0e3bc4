"""The place of a scorer that runs in an environment of its own: `imported:NAME`, or `imported:NAME@FINGERPRINT`."""

from collections.abc import Sequence
from typing import Any

from pipelines.scores.scorers.result import Failure, Result

IMPORTED = "imported:"
"""Beginning of such a name in a configuration; the scorer's own name follows."""
NOT_IMPORTED = "no score was imported for this image"


class ImportedScorer:
    """Scorer whose scores come by `mapo scores import`; it can score nothing itself.

    Args:
        given: The name in the configuration.
    """

    needs = ("image", "prompt")
    description = "Scored in an environment of its own, and imported."
    scale = ""
    higher_is_better = True
    licence = "not stated"
    version = "1"

    def __init__(self, given: str) -> None:
        self.name, _, self.fingerprint = given.removeprefix(IMPORTED).partition("@")

    def score(self, images: Sequence[Any], prompts: Sequence[str]) -> list[Result]:
        """Return a failure for each image."""
        return [Failure(NOT_IMPORTED, transient=True) for _ in images]
