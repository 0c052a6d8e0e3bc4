"""Shared by the checks of a base model's parts: hints, class names, and numbers from a configuration file."""

from pipelines.dataset.errors import ModelError
from pipelines.dataset.values import JsonObject

UNET_CLASS, VAE_CLASS, STEM = "UNet2DConditionModel", "AutoencoderKL", "diffusion_pytorch_model"
WAY_OUT = "the model folder is damaged or made of parts of several models; fetch it again"
OTHER_CONFIG = "put back the config.json that belongs to the weights; or fetch the model again"


def whole_numbers(config: JsonObject, key: str, default: list[int], part: str, model: str) -> list[int]:
    """Return a list of whole numbers from a configuration, or the default."""
    found = config.get(key) or default
    if not isinstance(found, list) or not all(type(each) is int for each in found):
        raise ModelError(f"{part}.{key} of {model} is {found}, not a list of whole numbers", WAY_OUT)
    return found


def whole_number(config: JsonObject, key: str, default: int, part: str, model: str) -> int:
    """Return a whole number from a configuration, or diffusers' default where old files leave it out."""
    found = config.get(key, default)
    if type(found) is not int or found < 1:
        raise ModelError(f"{part}.{key} of {model} is {found}, not a whole number", WAY_OUT)
    return found
