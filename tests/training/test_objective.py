"""The options of a loss, against formulas evaluated elsewhere in float64, and against themselves switched off."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from pipelines.dataset.errors import ConfigError
from training.config import TrainConfig
from training.data.batch import Batch
from training.image_losses import ImageErrors, kto_loss
from training.losses import LOSSES, PairErrors, pair_loss
from training.methods import METHODS
from training.objective import Objective, StepFacts, guarded, snr_weights

SDXL = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
OFF = StepFacts(has_margin=False)


def base_of(**changes: Any) -> Any:
    """The part of a base that an objective looks at: a noise schedule."""
    scheduler = DDPMScheduler(**SDXL | changes)
    return SimpleNamespace(scheduler=scheduler, num_train_timesteps=scheduler.config.num_train_timesteps)


def objective_of(seed: int = 0, **settings: Any) -> Objective:
    return Objective(TrainConfig(**settings), base_of(), seed)


def batch_of(preference: list[float], *, kind: str = "pair", good: list[bool] | None = None, **more: Any) -> Batch:
    count = len(preference)
    nothing = torch.zeros(count, 4, 2, 2)
    return Batch(
        records=[], preference_B=torch.tensor(preference), chosen_BCHW=nothing,
        rejected_BCHW=nothing if kind == "pair" else None, chosen_time_ids_B6=torch.zeros(count, 6),
        rejected_time_ids_B6=None, prompt_embeds_BSD=torch.zeros(count, 1, 1), pooled_BP=None, kind=kind,
        good_B=torch.tensor(good or [True] * count), **more,
    )  # fmt: skip


def errors_of(count: int = 6, seed: int = 0) -> PairErrors:
    draw = torch.Generator().manual_seed(seed)
    chosen, rejected, *reference = (0.1 + 0.01 * torch.rand(count, generator=draw) for _ in range(4))
    return PairErrors(chosen.requires_grad_(), rejected.requires_grad_(), *reference)


TIMES = torch.tensor([0, 1, 250, 500, 998, 999])
CERTAIN = [1.0] * 6
SOFT = [1.0, 0.9, 0.75, 0.6, 0.5, 1.0]


def slopes(losses: Tensor, errors: PairErrors) -> list[list[float]]:
    found = torch.autograd.grad(losses.sum(), [errors.chosen, errors.rejected], allow_unused=True)
    return [losses.tolist(), *(torch.zeros(6).tolist() if each is None else each.tolist() for each in found)]


@pytest.mark.parametrize("method", LOSSES)
@pytest.mark.parametrize("preference", [CERTAIN, SOFT], ids=["certain", "soft"])
def test_without_options_the_loss_is_the_methods_own_bit_for_bit(method: str, preference: list[float]) -> None:
    errors = errors_of()
    mine = objective_of(method=method).of_pairs(errors, batch_of(preference), TIMES, StepFacts())
    plain = pair_loss(method, {}, num_train_timesteps=1000)(errors, torch.tensor(preference))
    assert slopes(mine, errors) == slopes(plain, errors)


@pytest.mark.parametrize("method", [name for name in LOSSES if name != "sft"])
def test_sft_weight_adds_the_chosen_error(method: str) -> None:
    errors = errors_of()
    mine = objective_of(method=method, sft_weight=0.25).of_pairs(errors, batch_of(SOFT), TIMES, StepFacts())
    plain = pair_loss(method, {}, num_train_timesteps=1000)(errors, torch.tensor(SOFT))
    share = torch.tensor(SOFT)
    wanted = plain + 0.25 * (share * errors.chosen + (1 - share) * errors.rejected)
    assert torch.allclose(mine, wanted, rtol=1e-6, atol=1e-9)
    for got, exact in zip(slopes(mine, errors)[1:], slopes(wanted, errors)[1:], strict=True):
        assert got == pytest.approx(exact, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("method", [name for name, known in METHODS.items() if known.has_margin])
def test_rejected_weight_scales_the_pull_of_the_rejected_image(method: str) -> None:
    errors, batch = errors_of(), batch_of(CERTAIN)
    values, by_chosen, by_rejected = slopes(
        objective_of(method=method).of_pairs(errors, batch, TIMES, StepFacts()), errors
    )
    half = slopes(objective_of(method=method, rejected_weight=0.5).of_pairs(errors, batch, TIMES, StepFacts()), errors)
    none = slopes(objective_of(method=method, rejected_weight=0).of_pairs(errors, batch, TIMES, StepFacts()), errors)
    assert none[2] == [0.0] * 6
    if not METHODS[method].needs_reference:  # the value stays, and with it the chosen image's pull
        assert half[:2] == [values, by_chosen]
        assert half[2] == pytest.approx([slope / 2 for slope in by_rejected])


def test_rejected_weight_of_dpo_is_the_published_gain() -> None:
    """(m_w - r_w) - alpha (m_l - r_l), evaluated with math."""
    errors = errors_of()
    found = objective_of(method="dpo", rejected_weight=0.3).of_pairs(errors, batch_of(CERTAIN), TIMES, StepFacts())
    assert errors.ref_chosen is not None
    assert errors.ref_rejected is not None
    columns = (errors.chosen, errors.rejected, errors.ref_chosen, errors.ref_rejected)
    for value, c, r, ref_c, ref_r in zip(found.tolist(), *(each.tolist() for each in columns), strict=True):
        assert value == pytest.approx(math.log1p(math.exp(2500 * ((c - ref_c) - 0.3 * (r - ref_r)))), rel=1e-4)


def residuals(seed: int, towards: float) -> tuple[Tensor, Tensor]:
    """Predictions minus targets of 5 pairs; `towards` mixes the chosen one's into the rejected one's."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randn(5, 4, 8, 8, generator=draw)
    return chosen, towards * chosen + torch.randn(5, 4, 8, 8, generator=draw)


@pytest.mark.parametrize("towards", [-1.0, 0.0, 0.3, 2.0])
@pytest.mark.parametrize("mu", [0.0, 0.6, 0.9])
def test_the_safeguard_is_the_papers_factor_for_each_pair(mu: float, towards: float) -> None:
    """Gradients by the predictions, taken one pair at a time as the released code takes them for a batch."""
    chosen, rejected = residuals(3, towards)
    mean = (1, 2, 3)
    errors = PairErrors(
        chosen.square().mean(mean), rejected.square().mean(mean).requires_grad_(),
        alignment=(chosen * rejected).mean(mean),
    )  # fmt: skip
    kept = guarded(errors, mu)
    assert torch.equal(kept, errors.rejected), "values stay"
    factors = torch.autograd.grad(kept.sum(), errors.rejected)[0].tolist()
    for of_chosen, of_rejected, factor in zip(chosen.double(), rejected.double(), factors, strict=True):
        g_w, g_l = 2 * of_chosen / of_chosen.numel(), 2 * of_rejected / of_rejected.numel()
        inner = float((g_w * g_l).sum())
        wanted = min(1.0, max(0.0, (1 - mu) * float(g_w.square().sum()) / inner)) if inner > 0 else 1.0
        assert factor == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("method", ["dpo", "simpo", "ipo"])
def test_with_the_safeguard_a_step_in_the_predictions_lowers_the_chosen_error(method: str) -> None:
    """Where plain losses raise it: residuals that point the same way, the rejected ones larger."""
    chosen, rejected = (each / 10 for each in residuals(5, 2.0))
    mean, ones = (1, 2, 3), [1.0] * 5
    for mu in (None, 0.6):
        at = [each.clone().requires_grad_() for each in (chosen, rejected)]
        errors = [each.square().mean(mean) for each in at]
        alignment = (chosen * rejected).mean(mean)
        measured = PairErrors(errors[0], errors[1], errors[0].detach(), errors[1].detach(), alignment)
        loss = objective_of(method=method, safeguard=mu).of_pairs(measured, batch_of(ones), TIMES[:5], StepFacts())
        of_chosen, of_rejected = torch.autograd.grad(loss.sum(), at)
        # Weights that both images share move both predictions by the sum of the two gradients.
        change = -((of_chosen + of_rejected) * chosen).sum(mean)
        assert bool((change < 0).all()) == (mu is not None)
        assert bool((change > 0).all()) == (mu is None)


def test_the_safeguard_needs_the_alignment() -> None:
    with pytest.raises(ValueError, match="with_alignment=True"):
        guarded(PairErrors(torch.ones(1), torch.ones(1)), 0.5)


@pytest.mark.parametrize("preference", [CERTAIN, SOFT], ids=["certain", "soft"])
def test_a_step_without_margin_is_fine_tuning(preference: list[float]) -> None:
    errors = errors_of()
    objective = objective_of(method="mapo_paper", margin_share=0.25, sft_weight=0.5)
    assert objective.reads_rejected(batch_of(preference), OFF) == (preference == SOFT)
    found = objective.of_pairs(errors, batch_of(preference), TIMES, OFF)
    share = torch.tensor(preference)
    assert torch.allclose(found, 1.5 * (share * errors.chosen + (1 - share) * errors.rejected))
    alone = objective.of_images(ImageErrors(errors.chosen), batch_of(preference), TIMES, OFF)
    if preference == CERTAIN:
        assert torch.equal(alone, found)


def test_the_steps_with_a_margin_follow_from_seed_and_step() -> None:
    shares = [objective_of(seed=seed, margin_share=0.25) for seed in (0, 1)]
    drawn = [[each.has_margin(step) for step in range(4000)] for each in shares]
    assert drawn[0] == [objective_of(margin_share=0.25).has_margin(step) for step in range(4000)]
    assert drawn[0] != drawn[1]
    for each in drawn:
        assert 0.22 < sum(each) / 4000 < 0.28
    assert all(objective_of().has_margin(step) for step in range(100))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("setting", ["min_snr", {"min_snr": 1}, "debiased"])
def test_weights_of_timesteps_are_the_published_ones(setting: Any, prediction: str) -> None:
    """The noise schedule written out: beta_t is linear in its root."""
    config = TrainConfig(snr_weighting=setting)
    found = snr_weights(config, base_of(prediction_type=prediction))
    assert found is not None
    kept, gamma = 1.0, 1.0 if isinstance(setting, dict) else 5.0
    for step in range(1000):
        root = math.sqrt(0.00085) + step / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))
        kept *= 1 - root**2
        ratio = kept / (1 - kept)
        if setting == "debiased":
            wanted = 1 / math.sqrt(ratio) if prediction == "epsilon" else 1 / (ratio + 1)
        else:
            wanted = min(ratio, gamma) / (ratio if prediction == "epsilon" else ratio + 1)
        assert float(found[step]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("method", ["mapo", "mapo_paper", "dpo", "kto"])
def test_weights_of_timesteps_come_before_the_loss(method: str) -> None:
    errors = errors_of()
    objective = objective_of(method=method, snr_weighting="min_snr")
    weights = objective.weights_of(TIMES, torch.device("cpu"))
    assert weights is not None
    by_hand = PairErrors(
        *(getattr(errors, name) * weights for name in ("chosen", "rejected", "ref_chosen", "ref_rejected"))
    )
    plain = objective_of(method=method)
    wanted = plain.of_pairs(by_hand, batch_of(SOFT), TIMES, StepFacts(kl=1e-4))
    assert torch.equal(objective.of_pairs(errors, batch_of(SOFT), TIMES, StepFacts(kl=1e-4)), wanted)


@pytest.mark.parametrize("setting", ["min_snr", "debiased"])
def test_a_schedule_that_ends_at_pure_noise_is_refused_for_epsilon_alone(setting: str) -> None:
    config = TrainConfig(snr_weighting=setting)
    with pytest.raises(ConfigError, match="signal-to-noise ratio, which is 0"):
        snr_weights(config, base_of(rescale_betas_zero_snr=True))
    found = snr_weights(config, base_of(rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    assert found is not None
    assert bool(found.isfinite().all())


def test_the_weights_of_records_multiply_their_losses() -> None:
    errors, weights = errors_of(), torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 1.0])
    objective = objective_of()
    plain = objective.of_pairs(errors, batch_of(SOFT), TIMES, StepFacts())
    assert torch.equal(
        objective.of_pairs(errors, batch_of(SOFT, weight_B=weights), TIMES, StepFacts()), plain * weights
    )


def test_kto_of_a_pair_is_the_mean_of_a_good_and_a_bad_image() -> None:
    errors = errors_of()
    assert errors.ref_chosen is not None
    assert errors.ref_rejected is not None
    found = objective_of(method="kto").of_pairs(errors, batch_of(CERTAIN), TIMES, StepFacts(kl=2e-4))
    good = torch.ones(6, dtype=torch.bool)
    beside = {"beta": 1000, "desirable": 1, "undesirable": 1}
    of_good = kto_loss(errors.chosen, errors.ref_chosen, good, 2e-4, **beside)
    of_bad = kto_loss(errors.rejected, errors.ref_rejected, ~good, 2e-4, **beside)
    assert torch.equal(found, (of_good + of_bad) / 2)
    tied = objective_of(method="kto").of_pairs(errors, batch_of([0.5] * 6), TIMES, StepFacts(kl=2e-4))
    swapped = objective_of(method="kto").of_pairs(errors.swapped(), batch_of([0.5] * 6), TIMES, StepFacts(kl=2e-4))
    assert torch.equal(tied, swapped)


def test_losses_of_images_take_singles_and_the_chosen_images_of_pairs() -> None:
    errors = ImageErrors(torch.tensor([0.1, 0.2], requires_grad=True), torch.tensor([0.1, 0.2]))
    judged = batch_of([1.0, 1.0], kind="judged", good=[True, False])
    prior = batch_of([1.0, 1.0], kind="prior")
    kto = objective_of(method="kto", loss={"undesirable": 3}).of_images(errors, judged, TIMES[:2], StepFacts())
    assert kto.tolist() == [0.5, 1.5]
    booth = objective_of(method="dreambooth", loss={"prior_weight": 0.5})
    assert booth.of_images(errors, prior, TIMES[:2], StepFacts()).tolist() == pytest.approx([0.05, 0.1])
    assert booth.of_images(errors, judged, TIMES[:2], StepFacts()).tolist() == pytest.approx([0.1, 0.2])
    assert not booth.reads_rejected(batch_of(CERTAIN), StepFacts())
    assert objective_of(method="kto").reads_rejected(batch_of(CERTAIN), StepFacts())


def test_sft_weight_of_kto_fine_tunes_on_good_images_alone() -> None:
    errors = ImageErrors(torch.tensor([0.1, 0.2]), torch.tensor([0.1, 0.2]))
    judged = batch_of([1.0, 1.0], kind="judged", good=[True, False])
    found = objective_of(method="kto", sft_weight=2.0).of_images(errors, judged, TIMES[:2], StepFacts())
    assert found.tolist() == pytest.approx([0.7, 0.5])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sft", "safeguard": 0.6}, "train.safeguard is of losses that set two images against each other"),
        ({"method": "kto", "rejected_weight": 0.5}, "loss: {undesirable: …}"),
        ({"method": "dreambooth", "sft_weight": 1}, "would only scale dreambooth"),
        ({"method": "dpo", "margin_share": 0.5}, "without its margin dpo has nothing to train on"),
        ({"margin_share": 0}, "greater than 0"),
        ({"safeguard": 1.0}, "less than 1"),
        ({"rejected_weight": 1.5}, "less than or equal to 1"),
        ({"noise_offset": math.nan}, "finite number"),
        ({"snr_weighting": "snr"}, "min_snr"),
        ({"snr_weighting": {"kind": "debiased", "gamma": 1}}, "gamma belongs to min_snr"),
        ({"timesteps": {"min": 10, "max": 10}}, "from 10 up to 10 are none"),
        ({"timesteps": {"mean": 1.0}}, "distribution: logit_normal"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    "settings", [{}, {"snr_weighting": "debiased"}, {"timesteps": {"distribution": "logit_normal"}}]
)
def test_a_configuration_that_was_written_out_is_read_again(settings: dict[str, Any]) -> None:
    config = TrainConfig(**settings)
    assert TrainConfig.model_validate(config.model_dump()) == config


def test_a_margin_share_is_accepted_where_something_is_left() -> None:
    assert TrainConfig(method="dpo", margin_share=0.5, sft_weight=1).margin_share == 0.5
    assert TrainConfig(method="mapo_paper", margin_share=0.5).sft_weight == 0
