"""Finds what replaces or changes a part of a pipeline: the folder of a UNet, the file of a LoRA; fetched if remote.

Light: needs neither ray, torch nor diffusers. Files that are not safetensors are refused: they may run code.
"""

from pathlib import Path

from pipelines.dataset.adapter_files import stored_adapter
from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import read_config, resolve_model
from pipelines.dataset.safetensors_header import check_safetensors
from pipelines.dataset.storage import file_sha256
from pipelines.samples.drawing import DrawnModel

UNET_CONFIG = "config.json"
FITTING = ("in_channels", "cross_attention_dim", "addition_embed_type", "projection_class_embeddings_input_dim")
"""Keys of a UNet's configuration that its pipeline relies on."""


def unet_folder(model: DrawnModel) -> Path | None:
    """Return the local folder of the UNet that replaces the pipeline's own; None if there is none.

    Authors publish a UNet alone, with its `config.json` at the top, or below `unet/` as in a pipeline.

    Raises:
        ModelError: There is no such folder, it has no UNet, or one that does not fit the pipeline.
    """
    if model.unet is None:
        return None
    options = {"revision": model.unet_revision, "variant": model.unet_variant}
    try:
        folder = resolve_model(model.unet, f"unet/{UNET_CONFIG}", **options) / "unet"
    except ModelError:
        folder = resolve_model(model.unet, UNET_CONFIG, **options)
    _check_fits(folder, model)
    return folder


def _check_fits(folder: Path, model: DrawnModel) -> None:
    """Check that a UNet has the inputs that the pipeline gives it."""
    own = read_config(model.source.folder() / "unet" / UNET_CONFIG)
    other = read_config(folder / UNET_CONFIG)
    for key in FITTING:
        if own.get(key) != other.get(key):
            raise ModelError(
                f"the UNet {folder} does not fit {model.source.model}: its `{key}` is {other.get(key)}, not "
                f"{own.get(key)}",
                "use a UNet that was trained from a base of the same family",
            )


def lora_file(model: DrawnModel) -> Path | None:
    """Return the local file of the LoRA; None if there is none.

    Raises:
        ModelError: There is no such file, it cannot be fetched, or it is not a safetensors file.
    """
    if model.lora is None:
        return None
    file = stored_adapter(model.lora, missing="there is no LoRA", hint="check the path of `lora`")
    check_safetensors(file)
    return file


def lora_digest(model: DrawnModel) -> str | None:
    """Return the sha256 of the LoRA's file; None if there is none."""
    file = lora_file(model)
    return None if file is None else file_sha256(file)
