"""The interface of scorers, and the base class of the built-in ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from pipelines.dataset.errors import ModelError
from pipelines.dataset.values import JsonObject
from pipelines.scores.scorers.batch import Batch
from pipelines.scores.scorers.result import Failure, Result, checked
from pipelines.scores.weights import files_digest, files_of, find, part_folder

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE, PROMPT, REFERENCES, SIBLINGS = "image", "prompt", "references", "siblings"
DEFAULT_NEEDS = (IMAGE, PROMPT)
"""What scorers need that do not say it."""
DTYPE = "float32"
"""The type that scorers compute in; bfloat16 moves scores by 4 % of their standard deviation."""


@runtime_checkable
class Scorer(Protocol):
    """Scorer of images. `fit(chosen, rejected, prompts)` and `description` are optional."""

    name: str
    scale: str
    """Unit and usual range, such as `100 cos, about 15 to 26`."""
    higher_is_better: bool
    licence: str
    needs: tuple[str, ...]
    """`image`, `prompt`, and names of lists that are passed in addition, such as `references`."""
    version: str
    """Version of the code; raise it when the same image would get another score."""

    def load(self, weights: Path | None, device: Any) -> None:
        """Load the weights from a folder, by default from this machine's cache, onto a device."""
        ...

    def score(self, images: "Sequence[Image]", prompts: Sequence[str], **extra: Any) -> list[Result]:
        """Return one result for each image."""
        ...


class BuiltIn:
    """Base of the built-in scorers, which share decoded images and embeddings through a `Batch`."""

    name: ClassVar[str]
    description: ClassVar[str]
    scale: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    licence: ClassVar[str] = "Apache-2.0"
    """The licence of the weights; of the code, for a scorer without weights."""
    needs: ClassVar[tuple[str, ...]] = DEFAULT_NEEDS
    version: ClassVar[str] = "1"
    parts: ClassVar[tuple[str, ...]] = ()
    """The parts of its weights, by their names in `weights.PARTS`."""
    preprocessing: ClassVar[str] = "none"
    """The name of the preprocessing of its images."""
    has_foreign_model: ClassVar[bool] = False
    """Whether it has a model that is not among its parts, such as that of a server."""

    _is_loaded = False

    def load(self, weights: Path | Mapping[str, Path] | None = None, device: Any = "cpu") -> None:
        """Load the weights.

        Args:
            weights: A folder with one folder for each part; for a scorer of one part also that part's folder itself.
                Or the folder of each part by its name. None: what `mapo scorers fetch` brought to this machine.
            device: A torch device.

        Raises:
            ModelError: Weights are missing, damaged, of another shape, or bfloat16.
        """
        self._load(self._folders(weights), device)
        self._is_loaded = True

    def _folders(self, weights: Path | Mapping[str, Path] | None) -> dict[str, Path]:
        if not self.parts:
            return {}
        if isinstance(weights, Mapping):
            return {part: weights[part] for part in self.parts}
        root = find(self.name) if weights is None else Path(weights)
        return {part: part_folder(root, part, is_only=part == self.parts[0]) for part in self.parts}

    def _load(self, folders: dict[str, Path], device: Any) -> None:
        """Load the parts from their folders."""

    def fingerprint(self, weights: Path | None = None) -> JsonObject:
        """Return everything that shapes a score, without loading the weights.

        Raises:
            ModelError: Weights are missing.
        """
        return self.shaping({part: files_digest(each, files_of(part)) for part, each in self._folders(weights).items()})

    def shaping(self, digests: Mapping[str, str]) -> JsonObject:
        """Return everything that shapes a score, for weights with these digests by part."""
        return {
            "scorer": self.name,
            "version": self.version,
            "weights": dict(digests),
            "preprocessing": self.preprocessing,
            "dtype": DTYPE,
        }

    def score(self, images: "Sequence[Image]", prompts: Sequence[str | None], **extra: Any) -> list[Result]:
        """Return one result for each image.

        Args:
            images: The images, of any mode.
            prompts: One prompt for each image.
            extra: One list for each further name in `needs`, with one item for each image.
        """
        return self.score_batch(Batch(images, prompts, extra))

    def score_batch(self, batch: Batch) -> list[Result]:
        """Return one result for each image of a batch, which keeps what other scorers can use.

        Raises:
            ModelError: The scorer was not loaded.
        """
        if self.parts and not self._is_loaded:
            raise ModelError(f"the scorer {self.name} has no weights yet", "call `load` before `score`")
        failures = batch.failures(self.needs)
        if len(failures) == len(batch):
            return [failures[row] for row in range(len(batch))]
        results = self._results(batch)
        return [failures.get(row) or checked(result) for row, result in enumerate(results)]

    def _results(self, batch: Batch) -> Sequence[Result]:
        """Return one result for each image; those of rows in `batch.failures` are replaced."""
        raise NotImplementedError


def needs_of(scorer: Any) -> tuple[str, ...]:
    """Return what a scorer needs; image and prompt if it does not say."""
    needs = getattr(scorer, "needs", DEFAULT_NEEDS)
    return (needs,) if isinstance(needs, str) else tuple(needs)


def load_scorer(scorer: Any, weights: Path | None, device: Any) -> None:
    """Load a scorer; nothing happens if it has no `load`."""
    if hasattr(scorer, "load"):
        scorer.load(weights, device)


__all__ = ["BuiltIn", "Failure", "Scorer", "load_scorer", "needs_of"]
