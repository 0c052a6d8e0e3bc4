"""Sample grids during training: the same prompts and noise each time, so that grids differ by the weights alone.

Prompts are held-out ones with their stored embeddings; no text encoder is loaded. The weights are the moving average
if the training keeps one, because that is exported by default. The cost of a grid, with n samples on r ranks:
ceil(n / r) times NUM_STEPS forward passes of two images on every rank (each of which gathers all weights under ZeRO-3),
then a VAE in float32 is read from disk and decodes one image after another. At 1024 x 1024 that takes 3 GiB of device
memory, less than a backward pass, and frees it again.

Letters: B images, C channels, H and W of latents, S tokens, P embedding size.
"""

import contextlib
import functools
import heapq
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipelines.dataset.model_files import weight_files
from training.data.index import PairIndex, PairRecord
from training.data.loader import PairReader
from training.data.order import validation_seed
from training.engine import Engine
from training.model import Base
from training.spec import TrainSpec
from training.state.ema import ShardedEma

NUM_STEPS = 20  # of Euler's method, over the base's own noise schedule
GUIDANCE = 5.0
MAX_SIDE = 512  # of one sample in the grid, in pixels
GAP = 8
VAE_ATTENTION = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # `train.attention` may allow none that has float32
PAPER = (128, 128, 128)  # between samples: grey, so that neither dark nor light ones lose their edge
NOTHING_HELD_OUT = (
    "train.sample_every: no pairs are held out, so there are no prompts to sample; raise `ingest.validation_ratio`"
)


@dataclass(frozen=True)
class Subject:
    """The subject of one sample: the prompt of a held-out pair, in the shape of that pair's bucket (pixels)."""

    record: PairRecord
    height: int
    width: int


class SampleGrid:
    """Draws samples of the same few held-out prompts, any number of times.

    Args:
        held_out: Pairs of the validation split; if there are none, nothing is drawn and `note` says so.
        reader: Reads the pairs.
        spec: The run; its seed fixes the noise.
        engine: The engine that is sampled.
        base: Noise schedule and latents' scale.
        ema: The average of the weights, which is sampled instead; None if the training keeps none.

    Raises:
        ModelError: The VAE's weights are missing or damaged.
    """

    def __init__(
        self,
        held_out: PairIndex,
        reader: PairReader,
        spec: TrainSpec,
        engine: Engine,
        base: Base,
        ema: ShardedEma | None = None,
    ) -> None:
        self._subjects = subjects_of(held_out, spec.config.num_samples)
        self._reader, self._spec, self._engine, self._base, self._ema = reader, spec, engine, base, ema
        self.note = None if self._subjects else NOTHING_HELD_OUT
        if self._subjects:
            weight_files(self._vae_folder, "diffusion_pytorch_model", spec.base.vae_variant)  # now, not hours later

    @functools.cached_property
    def _vae_folder(self) -> Path:
        return self._spec.base.vae_folder()

    def draw(self, step: int) -> Image.Image | None:
        """Draw the grid after `step` steps and keep it on the storage as `sample_file`; collective.

        Training is not affected: the noise has its own generators, and the global ones are restored.

        Returns:
            The grid on rank 0; None on other ranks, and where nothing is held out.
        """
        if not self._subjects:
            return None
        device = self._engine.device
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            mine = self._decoded(self._latents())
        images = self._gathered(mine)
        if images is None:
            return None
        grid = grid_of(images)
        self._spec.storage.write(sample_file(self._spec, step), jpeg(grid))
        return grid

    def _latents(self) -> list[Tensor]:
        """Denoise this rank's share of the subjects.

        Every rank runs the same number of forward passes: the list is padded to a multiple of the ranks, and the
        padding is dropped.
        """
        engine, count = self._engine, len(self._subjects)
        turns = [*self._subjects, *self._subjects[-1:] * (-count % engine.world_size)]
        average = contextlib.nullcontext() if self._ema is None else self._ema.in_place_of_the_weights()
        # A graph for the shapes of a few samples is not worth its compilation.
        eager = torch.compiler.set_stance("force_eager") if self._spec.config.compile else contextlib.nullcontext()
        engine.unet.eval()
        with average, eager:
            drawn = [self._denoised(subject) for subject in turns[engine.rank :: engine.world_size]]
        engine.unet.train()
        return drawn[: len(range(engine.rank, count, engine.world_size))]

    def _denoised(self, subject: Subject) -> Tensor:
        """Denoise one subject; return latents (1, C, H, W), float32, in the UNet's scale."""
        engine = self._engine
        batch = self._reader.read([subject.record])
        conditioning = self._conditioning(subject, batch.prompt_embeds_BSD, batch.pooled_BP)
        scheduler: Any = EulerDiscreteScheduler.from_config(self._base.scheduler.config)
        scheduler.set_timesteps(NUM_STEPS, device=engine.device)
        scheduler.set_begin_index(0)
        generator = torch.Generator().manual_seed(validation_seed(self._spec.seed, subject.record.prompt_id))
        noise = torch.randn(tuple(batch.chosen_BCHW.shape), generator=generator)
        latents: Tensor = noise.to(engine.device) * scheduler.init_noise_sigma
        layout = torch.channels_last if self._spec.config.channels_last else torch.contiguous_format
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep).repeat(2, 1, 1, 1)
            sample = scaled.to(engine.dtype, memory_format=layout)
            predicted = engine.unet(sample=sample, timestep=timestep, **conditioning, return_dict=False)[0]
            without, with_prompt = predicted.float().chunk(2)
            guided = without + GUIDANCE * (with_prompt - without)
            latents = scheduler.step(guided, timestep, latents, return_dict=False)[0]
        return latents

    def _conditioning(self, subject: Subject, embeds_BSD: Tensor, pooled_BP: Tensor | None) -> dict[str, Any]:
        """Return the null conditioning, then the prompt's, both for an uncropped image of full size."""
        device, dtype = self._engine.device, self._engine.dtype
        null_SD, null_P = self._reader.null_conditioning
        inputs: dict[str, Any] = {"encoder_hidden_states": torch.cat([null_SD[None], embeds_BSD]).to(device, dtype)}
        if self._base.has_time_ids:
            assert null_P is not None
            assert pooled_BP is not None
            size = [subject.height, subject.width]
            inputs["added_cond_kwargs"] = {
                "text_embeds": torch.cat([null_P[None], pooled_BP]).to(device, dtype),
                "time_ids": torch.tensor([[*size, 0, 0, *size]] * 2, dtype=torch.float32, device=device),
            }
        return inputs

    def _decoded(self, latents: Sequence[Tensor]) -> list[Image.Image]:
        """Decode latents into images of MAX_SIDE at most, in float32: VAEs overflow in float16."""
        if not latents:
            return []
        device = self._engine.device
        vae: Any = AutoencoderKL.from_pretrained(
            self._vae_folder, dtype=torch.float32, use_safetensors=True, variant=self._spec.base.vae_variant
        )
        del vae.encoder
        vae.enable_tiling()  # of what is larger than the VAE's own size
        vae.eval().to(device)
        with sdpa_kernel(VAE_ATTENTION):
            images = [_image(vae.decode(self._base.unscaled(each), return_dict=False)[0]) for each in latents]
        del vae
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return images

    def _gathered(self, mine: list[Image.Image]) -> list[Image.Image] | None:
        """Gather all images in the order of the subjects, on rank 0."""
        engine = self._engine
        of_ranks: list[Any] | None = [None] * engine.world_size if engine.is_first else None
        torch.distributed.gather_object(mine, of_ranks)
        if of_ranks is None:
            return None
        return [of_ranks[i % engine.world_size][i // engine.world_size] for i in range(len(self._subjects))]


def subjects_of(held_out: PairIndex, num_samples: int) -> list[Subject]:
    """Return the first distinct prompts by the key of their first pair, over all buckets."""

    def of_bucket(bucket: int) -> Iterator[Subject]:
        for element in range(held_out.bucket_sizes[bucket]):
            yield Subject(held_out.pair(bucket, element), *held_out.buckets[bucket])

    found: dict[str, Subject] = {}
    buckets = map(of_bucket, range(len(held_out.buckets)))
    for subject in heapq.merge(*buckets, key=lambda each: each.record.pair_key):
        found.setdefault(subject.record.prompt_id, subject)
        if len(found) == num_samples:
            break
    return list(found.values())


def _image(pixels_BCHW: Tensor) -> Image.Image:
    """Return an image from pixels of -1..1, shrunk if it is larger than MAX_SIDE; NaN is black."""
    pixels = (pixels_BCHW[0].float() / 2 + 0.5).nan_to_num(0.0).clamp(0, 1).permute(1, 2, 0)
    image = Image.fromarray((255 * pixels).round().to(torch.uint8).cpu().numpy())
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return image


def grid_of(images: Sequence[Image.Image]) -> Image.Image:
    """Arrange images row by row, each centred in its cell; about as many columns as rows, wider if in doubt."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = (max(sides) for sides in zip(*(image.size for image in images), strict=True))
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP), PAPER)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        left, top = (width - image.width) // 2, (height - image.height) // 2
        grid.paste(image, (column * (width + GAP) + left, row * (height + GAP) + top))
    return grid


def jpeg(image: Image.Image) -> bytes:
    """Encode as a JPEG file."""
    image.save(out := io.BytesIO(), "JPEG", quality=90)
    return out.getvalue()


def sample_file(spec: TrainSpec, step: int) -> str:
    """Return the file of a step's grid, named by the training's key like its checkpoints."""
    return f"{spec.folder}/samples/{spec.key}/step-{step:08d}.jpg"
