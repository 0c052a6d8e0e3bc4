"""What the tests of samples share: tiny pipelines, a LoRA, an empty storage."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.dataset.storage import Storage


@pytest.fixture(scope="session")
def other_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another tiny SDXL pipeline."""
    from factories import new_pipeline

    folder = tmp_path_factory.mktemp("model") / "other-sdxl"
    new_pipeline(seed=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sd_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline of Stable Diffusion 1.5."""
    from factories import new_sd15_pipeline

    folder = tmp_path_factory.mktemp("model") / "tiny-sd"
    new_sd15_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA for the tiny SDXL pipeline: for its UNet and its first text encoder."""
    import torch
    from diffusers import StableDiffusionXLPipeline
    from factories import new_pipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline = new_pipeline()
    config = LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=["to_q", "to_v", "q_proj"])
    torch.manual_seed(0)
    states: dict[str, Any] = {}
    for name in ("unet", "text_encoder"):
        part = getattr(pipeline, name)
        part.add_adapter(config)
        for key, weight in part.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.3)
        states[name] = get_peft_model_state_dict(part)
    folder = tmp_path_factory.mktemp("lora")
    StableDiffusionXLPipeline.save_lora_weights(
        folder, unet_lora_layers=states["unet"], text_encoder_lora_layers=states["text_encoder"]
    )
    return folder


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty folder."""
    return Storage(str(tmp_path / "storage"))
