"""What the tests of encode share."""

from pathlib import Path

import pytest

from pipelines.config import EncodeConfig
from pipelines.dataset.storage import Storage


@pytest.fixture(scope="module")
def vae(tiny_pipeline: Path) -> "LatentEncoder":  # noqa: F821
    """The tiny pipeline's VAE."""
    import torch

    from pipelines.dataset.model_files import ModelSource
    from pipelines.encode.encoders import LatentEncoder

    return LatentEncoder(ModelSource(str(tiny_pipeline)), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def text(tiny_pipeline: Path) -> "TextEncoder":  # noqa: F821
    """Its text encoders."""
    import torch

    from pipelines.dataset.model_files import ModelSource
    from pipelines.encode.encoders import TextEncoder

    return TextEncoder(ModelSource(str(tiny_pipeline)), torch.device("cpu"))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    """An empty folder."""
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def config(tiny_pipeline: Path) -> EncodeConfig:
    """The tiny pipeline at 64 pixels."""
    return EncodeConfig(model=str(tiny_pipeline), resolution=64, batch_size=4)
