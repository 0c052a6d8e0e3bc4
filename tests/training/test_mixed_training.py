"""Real training on pairs and single images, and with every option of a loss: on other ranks, and after a kill."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from encoded import write_base, write_encoded
from killer import check_killed_run

from orchestration.stages.training_kinds import count_singles, kind_notes
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.storage import Storage
from training.config import TrainConfig
from training.data.index import load_index, load_texts
from training.data.loader import PairLoader, PairReader
from training.data.order import Plan, noise_seed
from training.image_losses import kto_loss
from training.launch import TrainingResult, train
from training.loop import draw_with
from training.model import Denoiser, load_base
from training.options import TimestepsConfig, check_timesteps
from training.spec import TrainSpec, base_digest

SHARED: dict[str, Any] = {
    "num_workers": 2, "global_batch_size": 8, "micro_batch_size": 2, "max_steps": 4, "learning_rate": 4e-3,
    "precision": "fp32", "gradient_checkpointing": False, "checkpoint_every": 1, "validate_every": 4,
    "ema": {"decay": 0.9},
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "kto": {"method": "kto", "loss": {"beta": 1.0}, "sft_weight": 0.1},
    "options": {
        "method": "mapo_paper", "sft_weight": 0.5, "rejected_weight": 0.5, "margin_share": 0.5, "safeguard": 0.6,
        "snr_weighting": "min_snr", "noise_offset": 0.05, "timesteps": {"min": 100, "distribution": "logit_normal"},
    },
    "dreambooth": {"method": "dreambooth", "loss": {"prior_weight": 0.5}, "max_steps": 2},
}  # fmt: skip
SINGLES = {"num_judged": 6, "num_judged_validation": 4, "num_prior": 3}


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainSpec]:
    folder = tmp_path_factory.mktemp("mixed")
    storage = Storage(str(folder / "storage"))
    snapshot = write_encoded(
        storage, folder, num_train=12, num_validation=4, labels=(0.0, 1.0, 0.8), weights=(1.0, 3.0), **SINGLES
    )
    source = ModelSource(str(write_base(folder / "base")))
    digest = base_digest(source)
    return {
        name: TrainSpec(storage.url, name, source, digest, 0, TrainConfig(**SHARED | way), snapshot)
        for name, way in WAYS.items()
    }


@pytest.fixture(scope="module")
def trained(ray_cluster: None, specs: dict[str, TrainSpec]) -> dict[str, TrainingResult]:
    return {name: train(spec, lambda progress: None) for name, spec in specs.items()}


def on_one_rank(spec: TrainSpec) -> TrainingResult:
    config = spec.config.model_copy(update={"num_workers": 1})
    return train(replace(spec, run=f"{spec.run}-alone", config=config), lambda progress: None)


CURVES = ("loss", "kl", "mse_chosen", "mse_rejected", "mse_good", "mse_bad", "mse_prior", "mse_weighted", "grad_norm")


@pytest.mark.parametrize("name", ["kto", "options"])
def test_one_rank_and_two_have_the_same_curve(
    trained: dict[str, TrainingResult], specs: dict[str, TrainSpec], name: str
) -> None:
    alone = on_one_rank(specs[name])
    assert alone.digest == trained[name].digest, "the same records in the same steps"
    for mine, other in zip(alone.history["steps"], trained[name].history["steps"], strict=True):
        assert mine.keys() == other.keys()
        for curve in CURVES:
            if curve in mine:
                assert mine[curve] == pytest.approx(other[curve], rel=2e-4), f"{curve} of step {mine['step']}"


@pytest.mark.parametrize("name", ["kto", pytest.param("options", marks=pytest.mark.slow)])
def test_a_kill_costs_time_and_nothing_else(
    trained: dict[str, TrainingResult], specs: dict[str, TrainSpec], name: str
) -> None:
    undisturbed = specs[name], trained[name]
    check_killed_run(replace(specs[name], run=f"{name}-killed"), undisturbed, seed=1, num_kills=1)


def test_kto_takes_both_kinds_and_its_reference_point_is_of_all_ranks(
    trained: dict[str, TrainingResult], specs: dict[str, TrainSpec]
) -> None:
    steps = trained["kto"].history["steps"]
    assert steps[0]["kl"] == 0, "the model is its reference"
    assert sum(step["num_pairs"] + step.get("num_images", 0.0) for step in steps) == 4 * 8
    assert any(step.get("num_images") for step in steps)
    assert any(step["kl"] > 0 for step in steps[1:])
    validation = trained["kto"].history["validations"][-1]
    assert (validation["num_pairs"], validation["num_images"]) == (4, 4)


def test_the_first_step_of_kto_is_known(trained: dict[str, TrainingResult], specs: dict[str, TrainSpec]) -> None:
    """Half the weight of each image, and the errors of good ones, computed without Ray, accelerate or DeepSpeed."""
    spec = specs["kto"]
    base = load_base(spec.base)
    denoiser = Denoiser(base.unet.eval(), None, base, spec.config, device=torch.device("cpu"), dtype=torch.float32)
    index = load_index(spec.storage, spec.snapshot, "train", kinds=("pair", "judged"))
    plan, reader = Plan(index.bucket_sizes, 2, 8, 0), PairReader(spec.storage, load_texts(spec.storage, spec.snapshot))
    groups = [(slot, plan.group(0, slot)) for slot in range(plan.num_slots)]
    losses = []
    with torch.no_grad():
        for slot, batch in PairLoader(
            reader, [(s, [index.pair(g.bucket, int(e)) for e in g.elements]) for s, g in groups]
        ):
            generator = torch.Generator().manual_seed(noise_seed(0, 0, slot))
            noise, timesteps, batch = draw_with(generator, batch, reader, 1000, 0.0)
            if batch.rejected_BCHW is None:
                errors = denoiser.image_errors(batch, noise, timesteps).error
                fine = torch.where(batch.good_B, errors, 0.0)
            else:
                both, share = denoiser.errors(batch, noise, timesteps), batch.preference_B
                errors, fine = both.chosen, (share * both.chosen + (1 - share) * both.rejected) / 2
            half = kto_loss(errors, errors, batch.good_B, 0.0, beta=1, desirable=1, undesirable=1)
            losses.append((half + 0.1 * fine) * batch.weight_B)
    wanted = float(torch.cat(losses).mean())
    assert trained["kto"].history["steps"][0]["loss"] == pytest.approx(wanted, rel=1e-4)


def test_steps_without_a_margin_have_no_rejected_errors_where_labels_are_certain(
    trained: dict[str, TrainingResult], specs: dict[str, TrainSpec]
) -> None:
    steps = trained["options"].history["steps"]
    assert all(math.isfinite(step["mse_weighted"]) for step in steps)
    compared = [step.get("num_compared", step["num_pairs"] if "margin" in step else 0.0) for step in steps]
    assert min(compared) < 8, "some steps skip the forward pass of rejected images"
    assert max(compared) == 8


def test_dreambooth_balances_the_class_and_preserves_the_prior(trained: dict[str, TrainingResult]) -> None:
    steps = trained["dreambooth"].history["steps"]
    assert any("mse_prior" in step for step in steps)
    assert all("mse_bad" not in step and "kl" not in step for step in steps)


def test_methods_of_pairs_say_what_they_leave_out(specs: dict[str, TrainSpec]) -> None:
    assert count_singles(specs["options"]) == {"good": 3, "bad": 3, "class": 3}
    (note,) = kind_notes(specs["options"])
    assert "leaves out 9 single images (3 good and 3 bad and 3 of a class), which mapo_paper does not learn" in note
    assert kind_notes(specs["kto"]) == [
        "leaves out 3 single images (3 of a class), which kto does not learn from; dreambooth takes images of a class"
    ]
    assert "3 bad" in kind_notes(specs["dreambooth"])[0]


def test_the_key_knows_every_option_and_no_default(specs: dict[str, TrainSpec]) -> None:
    spec, plain = specs["options"], TrainConfig(**SHARED)
    of_plain = replace(spec, config=plain).key
    for name, value in WAYS["options"].items():
        if name != "method":
            changed = TrainConfig(**SHARED | {name: value, "sft_weight": 0.5 if name == "sft_weight" else 0.0})
            assert replace(spec, config=changed).key != of_plain, name
    assert replace(spec, config=TrainConfig(**SHARED | {"timesteps": {"min": 0}, "rejected_weight": 1})).key == of_plain


@pytest.mark.parametrize("timesteps", [{"max": 1001}, {"min": 1000}])
def test_timesteps_beyond_the_schedule_are_refused(timesteps: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"but the base's noise schedule has 1000 timesteps"):
        check_timesteps(TimestepsConfig(**timesteps), 1000)
    check_timesteps(TimestepsConfig(min=999, max=1000), 1000)
