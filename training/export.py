"""A checkpoint becomes a diffusers pipeline that `StableDiffusionXLPipeline.from_pretrained` loads."""

import contextlib
import io
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.dataset.errors import ModelError, TrainingError
from pipelines.dataset.model_files import ModelSource, weight_files
from pipelines.dataset.storage import Storage
from training.checkpoint import TAG

UNET, VAE = "unet", "vae"


def export_model(storage: Storage, *, checkpoint: str, source: ModelSource, target: str, card: str) -> None:
    """Write the base pipeline with the trained UNet to the folder `target` of the storage.

    Everything but the UNet is the base's own files, byte for byte; weights of a variant have plain names here, and a
    separate VAE takes the place of the pipeline's own. The folder is complete once `model_index.json` is there: it is
    written last, and removed first when an older export is replaced.

    Args:
        storage: Where checkpoint and target lie.
        checkpoint: A training checkpoint's folder.
        source: The base pipeline, as the section `encode` names it.
        target: Where to write.
        card: The model card, Markdown.
    """
    base = source.folder()
    with tempfile.TemporaryDirectory(prefix="mapo-export-") as work:
        local = Path(work) / "checkpoint"
        storage.download_folder(checkpoint, local)
        exported = Path(work) / "model"
        shutil.copytree(base, exported, ignore=shutil.ignore_patterns(UNET, "README.md", ".*", "*.bin", "*.ckpt"))
        parts = {VAE: "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}
        if source.variant is not None:
            for part, stem in parts.items():
                _give_plain_names(exported / part, stem, source.variant)
        if source.vae is not None:
            shutil.rmtree(exported / VAE, ignore_errors=True)
            shutil.copytree(source.vae_folder(), exported / VAE)
        _save_unet(base / UNET, source.variant, local, exported / UNET)
        (exported / "README.md").write_text(card)
        index = exported / "model_index.json"
        publish = Path(work) / "model_index.json"
        index.rename(publish)
        storage.delete(f"{target}/model_index.json")
        storage.upload_folder(target, exported)
        storage.upload(f"{target}/model_index.json", publish)


def _give_plain_names(part: Path, stem: str, variant: str) -> None:
    """Let the weights of a variant be the only ones of a part, under the names that are read without a variant."""
    kept = {file.name for file in weight_files(part, stem, variant)}
    for file in [*part.glob("*.safetensors"), *part.glob("*.safetensors.index*.json")]:
        if file.name not in kept:
            file.unlink()
    single, index = part / f"{stem}.{variant}.safetensors", part / f"{stem}.safetensors.index.{variant}.json"
    if index.is_file():  # its shards keep their names, which it says
        index.rename(part / f"{stem}.safetensors.index.json")
    else:
        single.rename(part / f"{stem}.safetensors")


def _save_unet(base: Path, variant: str | None, checkpoint: Path, target: Path) -> None:
    """The float32 weights of a ZeRO checkpoint (any stage, all ranks) in the base UNet's stored type."""
    import torch
    from diffusers import UNet2DConditionModel
    from safetensors import safe_open

    weights = read_weights(checkpoint)
    if broken := [name for name, weight in weights.items() if not torch.isfinite(weight).all()]:
        raise TrainingError(
            f"{len(broken)} of {len(weights)} weights are not finite, {broken[0]} first", "lower `train.learning_rate`"
        )
    files = weight_files(base, "diffusion_pytorch_model", variant)
    first = next(file for file in files if file.suffix == ".safetensors")
    with safe_open(first, "pt") as stored:
        dtype = stored.get_tensor(next(iter(stored.keys()))).dtype
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base))
    unet.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, assign=True)
    unet.save_pretrained(target, safe_serialization=True)


def read_weights(checkpoint: Path) -> dict[str, Any]:
    """The consolidated float32 state dict of a checkpoint folder.

    Raises:
        ModelError: DeepSpeed cannot read it.
    """
    try:
        with quiet():
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            state: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=TAG)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the checkpoint {checkpoint}: {error}", "was it deleted in part?") from error
    return {name.removeprefix("module."): weight for name, weight in state.items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """DeepSpeed's converter prints as it goes; what goes wrong it raises."""
    out = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        warnings.simplefilter("ignore")
        yield
