"""Which losses a run can name, and the defaults of their parameters; imports no torch.

`training.losses` computes them, `training.config` and the command line check them.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pipelines.dataset.errors import ConfigError

METHODS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "mapo": MappingProxyType({"beta": 0.1, "snr": 0.5}),  # as the released code
        "mapo_paper": MappingProxyType({"beta": 8.0}),  # as the paper's general alignment
        "mapo_paper_linear": MappingProxyType({"beta": 8.0}),  # the paper's other reading, with the same beta
        "sft": MappingProxyType({}),
        "dpo": MappingProxyType({"beta": 5000.0}),  # as Diffusion-DPO trained SDXL; 2000 for SD 1.5
        "ipo": MappingProxyType({"beta": 2500.0}),  # half of dpo's: the same pull to the reference
        "simpo": MappingProxyType({"beta": 100.0, "gamma": 1.0}),  # none is published: see docs/concepts/losses.md
        "orpo": MappingProxyType({"beta": 0.1}),  # as diffusers' example and the paper
    }
)
"""Method name -> its parameters with their defaults: the only place where these are written."""


@dataclass(frozen=True)
class Rate:
    """A learning rate, and who published it for what."""

    value: float
    source: str


_PAPER = "arXiv 2406.06424v2, Training Details"
_DPO_SCRIPT = "SalesforceAIResearch/DiffusionDPO 5233e75, launchers/sdxl.sh:18"
_DIFFUSERS = "huggingface/diffusers 58eb52c, examples"
_ORPO_README = "huggingface/diffusers 1d9a6a8, examples/research_projects/diffusion_orpo/README.md:49"
_MAPO_PAPER = (
    Rate(1e-7, f"{_PAPER}, general alignment at batch 2048"),
    Rate(5e-5, f"{_PAPER}, the UNet of personalization"),
)
_OF_DPO = 1e-8 * 16 * 128  # --scale_lr: by 16 GPUs, 128 steps of accumulation and 1 pair of each, so at batch 2048

RATES: Mapping[str, tuple[Rate, Rate]] = MappingProxyType(
    {
        "mapo": (
            Rate(1e-5, "mapo-t2i/mapo 374b3d3, README.md:54, at batch 16"),
            Rate(1e-5, "mapo-t2i/mapo 374b3d3, README.md:83, at batch 16"),
        ),
        "mapo_paper": _MAPO_PAPER,
        "mapo_paper_linear": _MAPO_PAPER,  # one text with two readings
        "sft": (
            Rate(1e-9 * 2048, "arXiv 2311.12908, section 5: 1e-9, scaled to batch 2048 as its script does"),
            Rate(1e-4, f"{_DIFFUSERS}/text_to_image/README_sdxl.md:172, fine-tuning on captions"),
        ),
        "dpo": (
            Rate(_OF_DPO, f"{_DPO_SCRIPT}, 1e-8 scaled to batch 2048"),
            Rate(1e-5, f"{_DIFFUSERS}/research_projects/diffusion_dpo/README.md:52, at batch 16"),
        ),
        "ipo": (Rate(_OF_DPO, "none published; that of dpo"), Rate(1e-5, "none published; that of dpo")),
        "simpo": (
            Rate(1e-7, "none published; that of mapo_paper, a small one since nothing holds this loss back"),
            Rate(1e-5, "none published; that of dpo"),
        ),
        "orpo": (
            Rate(1e-7, "none published; that of mapo_paper"),
            Rate(3e-5, f"{_ORPO_README}, at batch 64"),
        ),
    }
)
"""Method name -> the default learning rate of all weights, and of adapters. `docs/guides/recipes.md` tells the rest."""


def default_rate(method: str, *, with_adapters: bool) -> Rate:
    """Return the learning rate that a training has where `train.learning_rate` is left out, with its source.

    A method that does not exist is `check_parameters`'s to report; it gets some rate here.
    """
    return RATES.get(method, RATES["mapo_paper"])[with_adapters]


NEEDS_REFERENCE: frozenset[str] = frozenset({"dpo", "ipo"})
"""Methods that compare with a frozen reference model: one more forward pass a step, and its weights in memory."""

_POSITIVE = frozenset(
    (method, "beta") for method in ("mapo_paper", "mapo_paper_linear", "ipo", "dpo", "simpo")
)  # for which 0 is refused: the first three losses divide by it, the last two would have no gradient


def check_parameters(method: str, parameters: Mapping[str, float]) -> dict[str, float]:
    """All parameters of a method: the given ones over its defaults.

    Args:
        method: `train.method`, a key of METHODS.
        parameters: `train.loss`, any subset of the method's parameters.

    Raises:
        ConfigError: The method or a parameter is unknown, or a value is not a finite number >= 0
            (> 0 for the beta of both paper's forms and of ipo, which is divided by, and of dpo and simpo,
            which learn nothing without it).
    """
    if method not in METHODS:
        raise ConfigError(
            f"train.method is {method!r}, which is not one of: {', '.join(METHODS)}.",
            hint=f"did you mean {_nearest(method, METHODS)}?",
        )
    defaults = METHODS[method]
    for name, value in parameters.items():
        if name not in defaults:
            raise _unknown_parameter(method, name)
        _check_value(method, name, value)
    return {name: float(parameters.get(name, default)) for name, default in defaults.items()}


def _check_value(method: str, name: str, value: object) -> None:
    is_positive = (method, name) in _POSITIVE
    lowest = math.ulp(0.0) if is_positive else 0.0
    if isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value < math.inf:
        return
    allowed = "> 0" if is_positive else ">= 0"
    raise ConfigError(
        f"train.loss.{name} of {method} is {value!r}; it must be a finite number {allowed}.",
        hint=f"leave it out for the default, {METHODS[method][name]:g}.",
    )


def _unknown_parameter(method: str, name: str) -> ConfigError:
    defaults = METHODS[method]
    if not defaults:
        return ConfigError(
            f"train.loss.{name} is set, but method {method} has no parameters.",
            hint=f"remove `loss:`, or choose a method that has {name}.",
        )
    known = ", ".join(f"{known} (default {value:g})" for known, value in defaults.items())
    return ConfigError(
        f"train.loss.{name} is not a parameter of method {method}, which has: {known}.",
        hint=f"did you mean {_nearest(name, defaults)}?",
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"`{close[0]}`" if close else " or ".join(f"`{each}`" for each in names)
