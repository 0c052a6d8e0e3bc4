"""A whole training on top of adapters: real workers, a kill, and no file but the run's own copy."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from encoded import write_base, write_encoded
from killer import check_killed_run
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.storage import Storage
from training.adapter_file import keep_adapter, pinned_digest
from training.config import TrainConfig
from training.export import read_weights
from training.launch import train
from training.model import add_lora
from training.spec import TrainSpec, base_digest

CONFIG = TrainConfig(
    method="dpo", lora={"rank": 4, "weights": "mine.safetensors"}, num_workers=2, global_batch_size=8,
    micro_batch_size=2, max_steps=8, learning_rate=1e-3, precision="fp32", gradient_checkpointing=False,
    checkpoint_every=2, validate_every=4, ema={"decay": 0.9},
)  # fmt: skip


@pytest.mark.slow  # three starts of the workers
@pytest.mark.usefixtures("ray_cluster")
def test_dpo_on_adapters_starts_at_chance_and_a_kill_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage(str(tmp_path / "storage"))
    snapshot = write_encoded(storage, tmp_path, sides=(8,))
    source = ModelSource(str(write_base(tmp_path / "base")))
    start = save_start(tmp_path / "base", tmp_path / "mine.safetensors")
    specs = []
    for run in ("undisturbed", "killed"):
        digest = pinned_digest(storage, f"runs/{run}", CONFIG.lora)
        spec = TrainSpec(
            storage.url, run, source, base_digest(source), 0, CONFIG, snapshot, adapter_digest=digest
        )  # fmt: skip
        keep_adapter(spec)
        specs.append(spec)
    (tmp_path / "mine.safetensors").unlink()
    trained = train(specs[0], lambda progress: None)
    first, last = trained.history["steps"][0], trained.history["steps"][-1]
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4), "the reference is where training starts"
    assert last["loss"] != pytest.approx(0.6931, abs=1e-3)
    weights = read_weights(storage, trained.checkpoint, "raw")
    assert weights.keys() == start.keys()
    moved = max(float((torch.from_numpy(weights[name]) - start[name]).abs().max()) for name in start)
    assert 0 < moved <= 2 * CONFIG.max_steps * CONFIG.learning_rate, "adapters stay near the file's"
    check_killed_run(specs[1], (specs[0], trained), 0, 1)


def save_start(base: Path, file: Path) -> dict[str, torch.Tensor]:
    """Write adapters that change what the base predicts; returns them by the names of trained parameters."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    add_lora(unet, CONFIG.lora, seed=0)
    generator = torch.Generator().manual_seed(1)
    named = {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for weight in named.values():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    state = get_peft_model_state_dict(unet)
    save_file({f"unet.{name}": weight.contiguous() for name, weight in state.items()}, file)
    return {name: weight.detach().clone() for name, weight in named.items()}
