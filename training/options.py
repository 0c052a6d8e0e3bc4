"""Options of every loss, as `train` states them, and which methods they suit. Imports neither ray nor torch."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from pipelines.dataset.config import Config
from pipelines.dataset.errors import ConfigError
from training.methods import METHODS

DEFAULT_GAMMA = 5.0


class TimestepsConfig(Config):
    """Which timesteps training draws; validation keeps its own fixed ones."""

    min: int = Field(0, ge=0)
    """The smallest timestep; 0 has the least noise."""
    max: int | None = Field(None, ge=1)
    """One past the largest timestep; by default the length of the noise schedule, 1000 for SDXL."""
    distribution: Literal["uniform", "logit_normal"] = "uniform"
    """uniform: all alike. logit_normal: the share of the range is sigmoid(mean + std·n), n standard normal."""
    mean: float = Field(0.0, allow_inf_nan=False)
    """Mean of the logit-normal draw; below 0 prefers little noise."""
    std: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Standard deviation of the logit-normal draw."""

    @model_validator(mode="after")
    def range_is_not_empty(self) -> Self:
        """Check that the range has a timestep, and that mean and std have a use."""
        if self.max is not None and self.max <= self.min:
            raise ValueError(
                f"timesteps from {self.min} up to {self.max} are none\nhint: `max` is one past the largest, so it must "
                f"be {self.min + 1} or more"
            )
        if self.distribution == "uniform" and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError("mean and std shape `distribution: logit_normal` alone\nhint: set it, or leave them out")
        return self


class SnrWeighting(Config):
    """A weight of the errors by the signal-to-noise ratio (SNR) of their timestep."""

    kind: Literal["min_snr", "debiased"]
    """min_snr: min(SNR, gamma)/SNR, or over SNR + 1 for v-prediction. debiased: 1/√SNR, or 1/(SNR + 1)."""
    gamma: float = Field(DEFAULT_GAMMA, gt=0, allow_inf_nan=False)
    """The ratio above which min_snr weighs timesteps down."""

    @model_validator(mode="before")
    @classmethod
    def short_forms(cls, given: Any) -> Any:
        """Accept a kind alone, and `{min_snr: gamma}`."""
        if isinstance(given, str):
            return {"kind": given}
        if isinstance(given, dict) and set(given) == {"min_snr"}:
            return {"kind": "min_snr", "gamma": given["min_snr"]}
        return given

    @model_validator(mode="after")
    def gamma_is_of_min_snr(self) -> Self:
        """Check that a gamma has a use."""
        if self.kind != "min_snr" and self.gamma != DEFAULT_GAMMA:
            raise ValueError(f"gamma belongs to min_snr, not to {self.kind}\nhint: leave it out")
        return self


def check_timesteps(config: TimestepsConfig, length: int) -> None:
    """Check that the timesteps to draw are in the base's noise schedule.

    Args:
        config: `train.timesteps`.
        length: Length of the noise schedule.

    Raises:
        ConfigError: The range begins or ends beyond the schedule.
    """
    last = length if config.max is None else config.max
    if config.min >= length or last > length:
        raise ConfigError(
            f"train.timesteps goes from {config.min} up to {last}, but the base's noise schedule has {length} "
            "timesteps",
            f"choose a range inside 0 to {length}",
        )


def check_options(
    method: str, *, sft_weight: float, rejected_weight: float, margin_share: float, safeguard: float | None
) -> None:
    """Check that a method has what its options change.

    Args:
        method: `train.method`, a key of METHODS.
        sft_weight: `train.sft_weight`.
        rejected_weight: `train.rejected_weight`.
        margin_share: `train.margin_share`.
        safeguard: `train.safeguard`.

    Raises:
        ConfigError: An option would change nothing, or nothing would be left to train on in some steps.
    """
    known = METHODS[method]
    of_margin = {
        "rejected_weight": rejected_weight != 1, "margin_share": margin_share != 1, "safeguard": safeguard is not None
    }  # fmt: skip
    if not known.has_margin and (on := [name for name, is_on in of_margin.items() if is_on]):
        raise _no_margin(method, on[0])
    if sft_weight and known.fine_tunes and not known.has_margin:
        raise ConfigError(f"train.sft_weight would only scale {method}, which is that term itself", "leave it out")
    if margin_share != 1 and not known.fine_tunes and not sft_weight:
        raise ConfigError(
            f"train.margin_share is {margin_share:g}, but without its margin {method} has nothing to train on",
            "add `train.sft_weight`, such as 1.0, or use a method that fine-tunes as well, such as mapo_paper",
        )


def _no_margin(method: str, option: str) -> ConfigError:
    others = ", ".join(name for name, known in METHODS.items() if known.has_margin)
    return ConfigError(
        f"train.{option} is of losses that set two images against each other, and {method} does not",
        f"leave it out, or use one of {others}"
        + ("; the weight of bad images is `loss: {undesirable: …}`" if method == "kto" else ""),
    )
