"""The images and prompts of one call, and everything that scorers have computed from them so far."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from pipelines.scores.scorers.images import Picture
from pipelines.scores.scorers.result import Failure

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.scores.scorers.trunks.trunk import ImageTrunk, TextTrunk

NO_PROMPT = "the image has no prompt"


class Batch:
    """A batch of images that several scorers score together.

    Args:
        images: The images, of any mode, or their pictures.
        prompts: One prompt for each image; None where there is none.
        extra: Further lists that scorers need, each with one item for each image.

    Raises:
        ValueError: The lists have different lengths.
    """

    def __init__(
        self,
        images: Sequence[Image.Image | Picture],
        prompts: Sequence[str | None],
        extra: Mapping[str, Sequence[Any]],
    ) -> None:
        lengths = {"images": len(images), "prompts": len(prompts), **{name: len(each) for name, each in extra.items()}}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{count} {name}" for name, count in lengths.items())
            raise ValueError(f"a batch has one of everything for each image, not {told}")
        self.prompts, self.extra = list(prompts), extra
        self._pictures: dict[int, Picture] = {}
        self._kept: list[Image.Image] = []  # an id names an image only while it lives
        self.pictures = [self.picture(image) for image in images]
        self._memo: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self.pictures)

    def picture(self, image: Image.Image | Picture) -> Picture:
        """Return the picture of an image; the same image has the same picture."""
        if isinstance(image, Picture):
            return image
        if id(image) not in self._pictures:
            self._kept.append(image)
            self._pictures[id(image)] = Picture(image)
        return self._pictures[id(image)]

    def failures(self, needs: Iterable[str]) -> dict[int, Failure]:
        """Return by row why a scorer with these needs cannot score it.

        Raises:
            ValueError: A needed list was not passed.
        """
        found: dict[int, Failure] = {}
        for need in needs:
            if need not in ("image", "prompt") and need not in self.extra:
                raise ValueError(f"a scorer needs {need}, which was not passed")
            for row in range(len(self)):
                if row not in found and (reason := self._lacks(row, need)) is not None:
                    found[row] = Failure(reason)
        return found

    def _lacks(self, row: int, need: str) -> str | None:
        """Return why a row lacks something needed; None if it does not."""
        if need == "image":
            return self.pictures[row].unreadable
        if need == "prompt":
            return NO_PROMPT if self.prompts[row] is None else None
        if need not in ("references", "siblings"):
            return None
        images = self.extra[need][row]
        if not images:
            return f"the image has no {need}"
        reasons = (self.picture(image).unreadable for image in images)
        return next((f"one of its {need}: {reason}" for reason in reasons if reason is not None), None)

    def embed_images(self, trunk: "ImageTrunk") -> "Tensor":
        """Return one embedding for each image, from one pass of the trunk; NaN for unreadable images."""
        key = ("images", *trunk.key)
        if key not in self._memo:
            self._memo[key] = self._embed(trunk, self.pictures)
        found: Tensor = self._memo[key]
        return found

    def embed_references(self, trunk: "ImageTrunk") -> "list[Tensor]":
        """Return for each image the embeddings of its references; each distinct reference is embedded once."""
        key = ("references", *trunk.key)
        if key not in self._memo:
            rows = [[self.picture(image) for image in images or ()] for images in self.extra["references"]]
            distinct = list(dict.fromkeys(picture for row in rows for picture in row))
            place = {picture: position for position, picture in enumerate(distinct)}
            embedded = self._embed(trunk, distinct)
            self._memo[key] = [embedded[[place[picture] for picture in row]] for row in rows]
        found: list[Tensor] = self._memo[key]
        return found

    def _embed(self, trunk: "ImageTrunk", pictures: Sequence[Picture]) -> "Tensor":
        import torch

        readable = [position for position, picture in enumerate(pictures) if picture.unreadable is None]
        embedded = trunk.embed([pictures[position] for position in readable])
        if len(readable) == len(pictures):
            return embedded
        whole = torch.full((len(pictures), *embedded.shape[1:]), math.nan, device=embedded.device)
        whole[readable] = embedded
        return whole

    def embed_prompts(self, trunk: "TextTrunk", name: str = "prompt") -> "tuple[Tensor, list[float]]":
        """Return one embedding for each prompt, and the share of its tokens that did not fit; NaN without a prompt.

        Each distinct prompt is embedded once.

        Args:
            trunk: The text model.
            name: What is embedded: `prompt`, or a further list of texts.
        """
        import torch

        key = (name, "texts", *trunk.key)
        if key not in self._memo:
            texts = self.prompts if name == "prompt" else self.extra[name]
            distinct = list(dict.fromkeys(text for text in texts if text is not None))
            place = {text: position for position, text in enumerate(distinct)}
            embedded, cut = trunk.embed(distinct)
            nothing = torch.full((1, *embedded.shape[1:]), math.nan, device=embedded.device)
            positions = [len(distinct) if text is None else place[text] for text in texts]
            cut = [*cut, math.nan]
            self._memo[key] = torch.cat([embedded, nothing])[positions], [cut[position] for position in positions]
        found: tuple[Tensor, list[float]] = self._memo[key]
        return found
