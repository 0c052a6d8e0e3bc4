"""What samples are drawn with: a model, the settings of the sampler, and the rows that are wanted.

Light: needs neither ray, torch nor diffusers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from pipelines.dataset.model_files import ModelSource

WANTED_SCHEMA = pa.schema(
    [
        ("sample_key", pa.string()),
        ("text", pa.string()),
        ("prompt", pa.string()),
        ("prompt_id", pa.string()),
        ("variant", pa.string()),
        ("index", pa.int32()),
        ("seed", pa.int64()),
    ]
)
"""The columns of a wanted sample; they are also columns of the table of samples."""


@dataclass(frozen=True)
class DrawnModel:
    """A model to draw with: a pipeline, perhaps with another UNet or a LoRA.

    Args:
        name: Its name in progress lines and results.
        source: The pipeline, with its VAE and variant.
        unet: Folder, fsspec URL or hub id of a UNet that replaces the pipeline's own, or of a pipeline that has one.
        lora: Path or fsspec URL of a LoRA, as `load_lora_weights` of diffusers reads it.
        prediction_type: What the UNet predicts, if the pipeline's scheduler file is wrong.
        identity: Digest of its weights where the driver knows it without reading them, such as that of an export:
            of `unet` and `lora` if there are any, else of the whole pipeline. By default the files are digested.
        unet_revision: Branch, tag or commit of `unet`, if it is a hub id.
        unet_variant: Variant of the weights of `unet`, such as fp16; the plain ones by default.
    """

    name: str
    source: ModelSource
    unet: str | None = None
    lora: str | None = None
    prediction_type: str | None = None
    identity: str | None = None
    unet_revision: str | None = None
    unet_variant: str | None = None


@dataclass(frozen=True)
class Sampling:
    """The settings of the sampler that shape a sample.

    Args:
        num_inference_steps: Denoising steps, with the pipeline's own scheduler.
        guidance_scale: Classifier-free guidance; 1 or less turns it off.
        height: Pixels.
        width: Pixels.
        negative_prompt: The prompt to steer away from; None for the pipeline's own way without one.
        dtype: Type that the pipeline computes in: float32, bfloat16 or float16.
    """

    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    negative_prompt: str | None = None
    dtype: str = "float32"


@dataclass(frozen=True)
class Drawing:
    """The wanted samples of one model under one fingerprint.

    Args:
        model: The model.
        sampling: The settings of the sampler.
        fingerprint: From `samples_fingerprint(model, sampling)`.
        wanted: Rows of `WANTED_SCHEMA`, each sample once.
    """

    model: DrawnModel
    sampling: Sampling
    fingerprint: str
    wanted: pa.Table


Models = Mapping[str, tuple[DrawnModel, Sampling]]
"""Models and settings by fingerprint."""


@dataclass(frozen=True)
class DrawSettings:
    """The settings of an execution for its actors.

    Args:
        stage: The stage's name, whose section of the configuration hints name.
        batch_size: Samples in one pipeline call.
        num_threads: Number of torch threads.
    """

    stage: str
    batch_size: int
    num_threads: int
