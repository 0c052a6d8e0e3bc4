"""Our steps beside the released formulas of MaPO and Diffusion-DPO, evaluated on their own in float64.

Nothing of the product computes here: the noise schedule, the targets, the losses and the mean over the global batch are
written out from the papers' scripts (mapo-t2i/mapo 374b3d3, utils.py, compute_loss; SalesforceAIResearch/DiffusionDPO
5233e75, train.py), the UNet's layers are diffusers'.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encoded import write_base, write_encoded
from engine_work import CONFIG, global_batch, train_and_save
from ranks import on_ranks
from torch import Tensor

from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.storage import Storage
from training.config import TrainConfig
from training.data.batch import Batch
from training.export import read_weights
from training.spec import TrainSpec, base_digest
from training.state.checkpoint_format import list_checkpoints

STEPS = 10
RATE = 1e-4
DPO_BETA = 50.0  # with 5000 the loss of a model this small saturates in the first step
SCALING_FACTOR = 0.5  # of the tests' base
METHODS: dict[str, dict[str, Any]] = {
    "mapo": {"method": "mapo"},
    "dpo": {"method": "dpo", "loss": {"beta": DPO_BETA}},
}


def released_mapo(chosen: Tensor, rejected: Tensor, *_: Tensor) -> Tensor:
    """beta_mapo 0.1 and snr_value 0.5 are the script's defaults, T is 1000."""
    snr = 0.5
    log_odds = (snr * chosen) / (torch.exp(snr * chosen) - 1) - (snr * rejected) / (torch.exp(snr * rejected) - 1)
    return chosen.mean() - (0.1 * torch.nn.functional.logsigmoid(1000 * log_odds)).mean()


def released_dpo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    inside = -0.5 * DPO_BETA * ((chosen - rejected) - (ref_chosen - ref_rejected))
    return -torch.nn.functional.logsigmoid(inside).mean()


RELEASED: dict[str, Callable[..., Tensor]] = {"mapo": released_mapo, "dpo": released_dpo}

Draws = Iterator[list[tuple[Batch, Tensor, Tensor]]]
"""For each step the parts of its global batch: pairs, noise, timesteps."""


class Released:
    """AdamW in float64 on one process, the whole global batch at once."""

    def __init__(self, method: str, base: Path, config: TrainConfig) -> None:
        from diffusers import UNet2DConditionModel

        self.unet: Any = UNet2DConditionModel.from_pretrained(base / "unet", dtype=torch.float64).train()
        self._reference = copy.deepcopy(self.unet).requires_grad_(False)
        self._loss_of, self._config = RELEASED[method], config
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2  # "scaled_linear"
        self._alphas = torch.from_numpy(np.cumprod(1 - betas))
        self._optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay
        )

    def errors(self, unet: Any, batch: Batch, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, ...]:
        """Mean over C, H, W of (prediction - noise)^2: of the chosen images, then of the rejected ones."""
        latents = torch.cat([batch.chosen_BCHW, batch.rejected_BCHW]).double() * SCALING_FACTOR
        noise, timesteps = noise.double().repeat(2, 1, 1, 1), timesteps.repeat(2)
        alphas = self._alphas[timesteps][:, None, None, None]
        noisy = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
        assert batch.pooled_BP is not None
        conditions = {
            "text_embeds": batch.pooled_BP.double().repeat(2, 1),
            "time_ids": torch.cat([batch.chosen_time_ids_B6, batch.rejected_time_ids_B6]).double(),
        }
        prompts = batch.prompt_embeds_BSD.double().repeat(2, 1, 1)
        predicted = unet(noisy, timesteps, prompts, added_cond_kwargs=conditions, return_dict=False)[0]
        found: tuple[Tensor, ...] = (predicted - noise).square().mean(dim=(1, 2, 3)).chunk(2)
        return found

    def step(self, parts: list[tuple[Batch, Tensor, Tensor]]) -> float:
        """One optimizer step on the mean over all parts; its loss."""
        total = 0.0
        for part in parts:
            with torch.no_grad():
                reference = self.errors(self._reference, *part)
            loss = self._loss_of(*self.errors(self.unet, *part), *reference) / len(parts)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), self._config.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total


def compare(method: str, config: TrainConfig, base: Path, curve: list[float], checkpoint: Any, draws: Draws) -> None:
    """Loss within 1e-5, weights within a thousandth of the distance trained."""
    released = Released(method, base, config)
    start = {name: weight.detach().clone() for name, weight in released.unet.named_parameters()}
    expected = [released.step(parts) for parts, _ in zip(draws, range(STEPS), strict=False)]
    assert max(abs(a - b) for a, b in zip(curve, expected, strict=True)) <= 1e-5
    assert abs(expected[-1] - expected[0]) > 1e-4, "nothing is learnt"
    off = moved = 0.0
    for name, weight in released.unet.named_parameters():
        off += float((torch.from_numpy(checkpoint[name]).double() - weight.detach()).square().sum())
        moved += float((weight.detach() - start[name]).square().sum())
    assert (off / moved) ** 0.5 <= 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_are_those_of_the_released_formula_in_float64(method: str, tmp_path: Path) -> None:
    """Two ranks of ZeRO-2 with two micro-batches each, in float32."""
    base = write_base(tmp_path / "base")
    config = TrainConfig.model_validate(CONFIG.model_dump() | METHODS[method] | {"learning_rate": RATE})
    storage = Storage(str(tmp_path / "storage"))
    curve = on_ranks(2, train_and_save, config, str(base), storage.url, STEPS)[0]["curve"]
    weights = read_weights(storage, list_checkpoints(storage, "checkpoints")[-1].folder, "raw")
    compare(method, config, base, curve, weights, ([global_batch(step)] for step in range(STEPS)))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_whole_training_on_two_ray_workers_is_the_released_one(method: str, ray_cluster, tmp_path: Path) -> None:
    """As `mapo train` does it, from the storage; only the order of the pairs and their noise are taken from the run."""
    from training.data.index import load_index, load_texts
    from training.data.loader import PairLoader, PairReader
    from training.data.order import noise_seed
    from training.launch import train
    from training.loop import draw_with
    from training.worker import make_plan

    storage = Storage(str(tmp_path / "storage"))
    snapshot = write_encoded(storage, tmp_path, dtype=torch.float32)
    base = write_base(tmp_path / "base")
    settings = {"max_steps": STEPS, "lr_schedule": "constant", "learning_rate": RATE, "checkpoint_every": STEPS}
    config = TrainConfig.model_validate(CONFIG.model_dump() | METHODS[method] | settings)
    source = ModelSource(str(base))
    spec = TrainSpec(storage.url, "run", source, base_digest(source), 0, config, snapshot)
    trained = train(spec, lambda progress: None)

    def draws() -> Draws:
        index = load_index(storage, snapshot, "train")
        plan, reader = make_plan(index, spec), PairReader(storage, load_texts(storage, snapshot))
        for step in range(STEPS):
            groups = [(slot, plan.group(step, slot)) for slot in range(plan.num_slots)]
            named = [(slot, [index.pair(g.bucket, int(e)) for e in g.elements]) for slot, g in groups]
            parts = []
            for slot, batch in PairLoader(reader, named):
                generator = torch.Generator().manual_seed(noise_seed(spec.seed, step, slot))
                noise, timesteps, batch = draw_with(generator, batch, reader, 1000, 0.0)
                parts.append((batch, noise, timesteps))
            yield parts

    curve = [each["loss"] for each in trained.history["steps"]]
    compare(method, config, base, curve, read_weights(storage, trained.checkpoint, "raw"), draws())
