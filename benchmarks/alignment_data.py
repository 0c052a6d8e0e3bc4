"""Pairs of `benchmarks.alignment`: the demo's photos against themselves in the demo's style, at three strengths.

The demo's own data set has one strength and two splits, and comes as Parquet for Ray to encode. Here its scenes, style
and encoders are used without that: three strengths, three splits, in memory. Letters: B pairs, C channels, H, W.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from orchestration.demo.base import BASE_MODEL
from orchestration.demo.scenes import RESOLUTION, Scene, crop, cyanotype, draw_shift, scenes
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.pair import TEST, TRAIN, VALIDATION
from pipelines.encoders import Embedded, LatentEncoder, TextEncoder
from training.batch import Batch

SOURCE = ModelSource(str(BASE_MODEL))
LEVELS = {"near": 0.25, "middle": 0.5, "far": 1.0}
"""Mismatch of the preferred images with the base model: the share of the style in the blend of photo and style."""

HELD_OUT = {VALIDATION: 2, TEST: 2}
"""Scenes of each photo that are held out; the other six of its ten are trained on."""

SEED = 0


@dataclass(frozen=True)
class Pairs:
    """Pairs of one split at one level, with what training reads of them."""

    prompts: list[str]
    chosen: list[Image.Image]
    rejected: list[Image.Image]
    chosen_BCHW: Tensor
    rejected_BCHW: Tensor
    embeddings: dict[str, Embedded]

    def batch(self, positions: Sequence[int]) -> Batch:
        """A micro-batch of the pairs at these positions."""
        texts = [self.embeddings[self.prompts[position]] for position in positions]
        time_ids = torch.tensor([[RESOLUTION, RESOLUTION, 0, 0, RESOLUTION, RESOLUTION]] * len(texts)).float()
        pooled = [text.pooled_prompt_embeds for text in texts if text.pooled_prompt_embeds is not None]
        return Batch(
            records=[],
            preference_B=torch.ones(len(texts)),
            chosen_BCHW=self.chosen_BCHW[positions],
            rejected_BCHW=self.rejected_BCHW[positions],
            chosen_time_ids_B6=time_ids,
            rejected_time_ids_B6=time_ids,
            prompt_embeds_BSD=torch.stack([text.prompt_embeds for text in texts]),
            pooled_BP=torch.stack(pooled),
        )


@dataclass(frozen=True)
class Data:
    """All pairs, by level and split, and what a dropped prompt becomes."""

    pairs: dict[tuple[str, str], Pairs]
    null: Embedded

    @property
    def null_conditioning(self) -> tuple[Tensor, Tensor | None]:
        """As `training.loop.draw_with` asks its reader for it."""
        return self.null.prompt_embeds, self.null.pooled_prompt_embeds


def split_scenes() -> dict[str, list[Scene]]:
    """Every scene in one split; each photo has scenes in all three, and no prompt is in two."""
    rng = np.random.default_rng(SEED)
    found: dict[str, list[Scene]] = {TRAIN: [], VALIDATION: [], TEST: []}
    for photo in sorted({scene.photo for scene in scenes()}):
        views = [scene for scene in scenes() if scene.photo == photo]
        views = [views[position] for position in rng.permutation(len(views))]
        for split, count in HELD_OUT.items():
            found[split] += views[:count]
            views = views[count:]
        found[TRAIN] += views
    return found


def styled(image: Image.Image, strength: float) -> Image.Image:
    """A photo on its way to the demo's style: 0 is the photo, 1 its cyanotype."""
    return Image.blend(image, cyanotype(image), strength)


def make_data(crops_per_scene: int, levels: Sequence[str]) -> Data:
    """Draw, style and encode; the same crops at every level."""
    rng = np.random.default_rng(SEED)
    vae, text = LatentEncoder(SOURCE), TextEncoder(SOURCE)
    pairs: dict[tuple[str, str], Pairs] = {}
    for split, views in split_scenes().items():
        prompts = [scene.caption for scene in views for _ in range(crops_per_scene)]
        plain = [crop(scene, draw_shift(rng)) for scene in views for _ in range(crops_per_scene)]
        captions = sorted(set(prompts))
        embeddings = dict(zip(captions, text(captions), strict=True))
        plain_BCHW = _encode(vae, plain)
        for level in levels:
            chosen = [styled(image, LEVELS[level]) for image in plain]
            pairs[level, split] = Pairs(prompts, chosen, plain, _encode(vae, chosen), plain_BCHW, embeddings)
    return Data(pairs, text.null())


def _encode(vae: LatentEncoder, images: list[Image.Image]) -> Tensor:
    stacked = np.stack([np.asarray(image) for image in images])
    return torch.cat([vae(stacked[start : start + 40]) for start in range(0, len(stacked), 40)])
