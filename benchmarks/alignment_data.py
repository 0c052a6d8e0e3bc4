"""Pairs of `benchmarks.alignment`: the demo's photos against themselves in the demo's style, at three strengths.

The demo's own data set has one strength and two splits, and comes as Parquet for Ray to encode. Its scenes, style and
encoders are used here without that: three strengths, three splits, in memory.
Letters: B pairs, C channels, H and W of latents.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from orchestration.demo.base import BASE_MODEL
from orchestration.demo.scenes import RESOLUTION, SUBJECTS, Scene, crop, cyanotype, draw_shift, scenes
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.pair import TEST, TRAIN, VALIDATION
from pipelines.encode.encoders import Embedded, LatentEncoder, TextEncoder
from training.data.batch import Batch

SOURCE = ModelSource(str(BASE_MODEL))
LEVELS = {"near": 0.25, "middle": 0.5, "far": 1.0}
"""Mismatch between the preferred images and the base model: how much of the style is blended into the photo."""

HELD_OUT = {VALIDATION: 2, TEST: 2}
"""Scenes of each photo that are held out; the other six of its ten are trained on."""

SEED = 20240610
ENCODE_BATCH = 40


@dataclass(frozen=True)
class Pairs:
    """Pairs of one split at one level, as images and as training reads them."""

    prompts: list[str]
    chosen: list[Image.Image]
    rejected: list[Image.Image]
    chosen_BCHW: Tensor
    rejected_BCHW: Tensor
    embeddings: dict[str, Embedded]

    def batch(self, positions: list[int]) -> Batch:
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
    """All pairs by level and split, and what a dropped prompt becomes."""

    pairs: dict[tuple[str, str], Pairs]
    null: Embedded

    @property
    def null_conditioning(self) -> tuple[Tensor, Tensor | None]:
        """What `training.loop.draw_with` asks of its reader."""
        return self.null.prompt_embeds, self.null.pooled_prompt_embeds


def split_scenes() -> dict[str, list[Scene]]:
    """Every scene in one split; each photo has scenes in all three, and no prompt is in two."""
    rng = np.random.default_rng(SEED)
    found: dict[str, list[Scene]] = {split: [] for split in (TRAIN, *HELD_OUT)}
    for photo in SUBJECTS:
        views = [scene for scene in scenes() if scene.photo == photo]
        views = [views[position] for position in rng.permutation(len(views))]
        for split, count in HELD_OUT.items():
            found[split] += views[:count]
            views = views[count:]
        found[TRAIN] += views
    return found


def styled(photo: Image.Image, strength: float) -> Image.Image:
    """A photo on its way to the demo's style: 0 is the photo, 1 its cyanotype."""
    return Image.blend(photo, cyanotype(photo), strength)


def make_data(levels: Iterable[str], crops_per_scene: int) -> Data:
    """Draw, style and encode; the same crops at every level."""
    rng = np.random.default_rng(SEED)
    vae, text = LatentEncoder(SOURCE), TextEncoder(SOURCE)
    levels, pairs = list(levels), {}
    for split, views in split_scenes().items():
        prompts = [scene.caption for scene in views for _ in range(crops_per_scene)]
        photos = [crop(scene, draw_shift(rng)) for scene in views for _ in range(crops_per_scene)]
        captions = sorted(set(prompts))
        embeddings = dict(zip(captions, text(captions), strict=True))
        photos_BCHW = _encode(vae, photos)
        for level in levels:
            chosen = [styled(photo, LEVELS[level]) for photo in photos]
            pairs[level, split] = Pairs(prompts, chosen, photos, _encode(vae, chosen), photos_BCHW, embeddings)
    return Data(pairs, text.null())


def _encode(vae: LatentEncoder, images: list[Image.Image]) -> Tensor:
    stacked = np.stack([np.asarray(image) for image in images])
    return torch.cat([vae(stacked[start : start + ENCODE_BATCH]) for start in range(0, len(stacked), ENCODE_BATCH)])
