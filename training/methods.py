"""The registry of losses that a run can name, with their parameters, learning rates and sources; imports no torch.

`training.losses` computes them; `training.config`, the model card and the docs take their lists from here.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from pipelines.dataset.errors import ConfigError
from pipelines.dataset.status import JUDGED, PAIR, PRIOR


@dataclass(frozen=True)
class Rate:
    """A learning rate, with its source."""

    value: float
    source: str


@dataclass(frozen=True)
class Parameter:
    """A key of `train.loss`.

    Args:
        default: The value if the key is left out.
        is_positive: Whether 0 is rejected, because the loss divides by it or has no gradient without it.
        note: What the default is meant for, shown in the docs.
    """

    default: float
    is_positive: bool = False
    note: str = ""


@dataclass(frozen=True)
class Method:
    """A loss that `train.method` can name. `docs/guides/recipes.md` has the other settings of papers and scripts.

    Args:
        summary: One line for the docs.
        formula: The loss of a pair, in the letters of docs/concepts/losses.md.
        rate: The default learning rate of all weights.
        adapter_rate: The default learning rate of LoRA adapters.
        parameters: Keys of `train.loss`, in the order in which the docs list them.
        paper: The paper's number on arXiv; None if the method has no paper of its own.
        needs_reference: Whether it compares with a frozen reference, which costs one more forward pass per step and
            memory for the weights.
        learns_preference: Whether it looks at the rejected image at all.
        has_margin: Whether it sets the chosen image against the rejected one, so that the options of the margin apply.
        fine_tunes: Whether it has a term that lowers the chosen error by itself.
        kinds: The kinds of records that it learns from; others are left out of its training.
        needs_good: Whether images that are judged bad are left out too.
        needs_mean_gain: Whether the loss of an image depends on the mean gain of the whole global batch, which is then
            measured first.
        recipe: The method whose recipe reproduces the paper (orchestration/recipes/methods, docs/guides/recipes); None
            if there is no recipe.
    """

    summary: str
    formula: str
    rate: Rate
    adapter_rate: Rate
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    paper: str | None = None
    needs_reference: bool = False
    learns_preference: bool = True
    has_margin: bool = True
    fine_tunes: bool = False
    kinds: tuple[str, ...] = (PAIR,)
    needs_good: bool = False
    needs_mean_gain: bool = False
    recipe: str | None = None

    @property
    def is_of_images(self) -> bool:
        """Whether the loss is of one image rather than of a pair, so that single images are learned from as well."""
        return JUDGED in self.kinds

    @property
    def is_balanced(self) -> bool:
        """Whether images of a class and all others are visited about equally often."""
        return PRIOR in self.kinds

    @property
    def defaults(self) -> dict[str, float]:
        """The parameters with their defaults."""
        return {name: parameter.default for name, parameter in self.parameters.items()}


_MAPO = "2406.06424"
_PAPER = "arXiv 2406.06424v2, Training Details"
_MAPO_RATE = Rate(1e-7, f"{_PAPER}, general alignment at batch 2048")
_MAPO_ADAPTER_RATE = Rate(5e-5, f"{_PAPER}, the UNet of personalization")
_DPO_SCRIPT = "SalesforceAIResearch/DiffusionDPO 5233e75, launchers/sdxl.sh:18"
_DPO_RATE = 1e-8 * 16 * 128  # --scale_lr: by 16 GPUs, 128 steps of accumulation and 1 pair of each, so at batch 2048
_DIFFUSERS = "huggingface/diffusers 58eb52c, examples"
_KTO = "jacklishufan/diffusion-kto 226bbd0"
_ORPO_README = "huggingface/diffusers 1d9a6a8, examples/research_projects/diffusion_orpo/README.md:49"

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "mapo": Method(
            summary="MaPO as in the released code",
            formula="m_c − β·log σ(T·[φ(s·m_c) − φ(s·m_r)])",
            parameters={
                "beta": Parameter(0.1),
                "snr": Parameter(0.5, note="s in the formula, where T is the length of the noise schedule"),
            },
            rate=Rate(1e-5, "mapo-t2i/mapo 374b3d3, README.md:54, at batch 16"),
            adapter_rate=Rate(1e-5, "mapo-t2i/mapo 374b3d3, README.md:83, at batch 16"),
            paper=_MAPO,
            fine_tunes=True,
            recipe="mapo",
        ),
        "mapo_paper": Method(
            summary="MaPO as in the paper, β as an exponent",
            formula="m_c − (1/β)·log σ(φ(m_c)^β − φ(m_r)^β)",
            parameters={"beta": Parameter(8.0, is_positive=True, note="the paper's for general alignment")},
            rate=_MAPO_RATE,
            adapter_rate=_MAPO_ADAPTER_RATE,
            paper=_MAPO,
            fine_tunes=True,
            recipe="mapo_paper",
        ),
        "mapo_paper_linear": Method(
            summary="MaPO as in the paper, β as a coefficient",
            formula="m_c − (1/β)·log σ(β·[φ(m_c) − φ(m_r)])",
            parameters={"beta": Parameter(8.0, is_positive=True, note="as `mapo_paper`: one text, two readings")},
            rate=_MAPO_RATE,
            adapter_rate=_MAPO_ADAPTER_RATE,
            paper=_MAPO,
            fine_tunes=True,
            recipe="mapo_paper",
        ),
        "sft": Method(
            summary="the denoising error of the chosen image",
            formula="m_c",
            rate=Rate(1e-9 * 2048, "arXiv 2311.12908, section 5: 1e-9, scaled to batch 2048 as its script does"),
            adapter_rate=Rate(1e-4, f"{_DIFFUSERS}/text_to_image/README_sdxl.md:172, fine-tuning on captions"),
            fine_tunes=True,
            has_margin=False,
            learns_preference=False,
            recipe="sft",
        ),
        "dpo": Method(
            summary="Diffusion-DPO",
            formula="−log σ(½β·z)",
            parameters={"beta": Parameter(5000.0, is_positive=True, note="SDXL's; 2000 for SD 1.5")},
            rate=Rate(_DPO_RATE, f"{_DPO_SCRIPT}, 1e-8 scaled to batch 2048"),
            adapter_rate=Rate(1e-5, f"{_DIFFUSERS}/research_projects/diffusion_dpo/README.md:52, at batch 16"),
            paper="2311.12908",
            needs_reference=True,
            recipe="dpo",
        ),
        "ipo": Method(
            summary="IPO: a target for the gain over the reference",
            formula="(z − 1/(2β))²",
            parameters={"beta": Parameter(2500.0, is_positive=True, note="half of `dpo`'s: the same pull")},
            rate=Rate(_DPO_RATE, "none published; that of dpo"),
            adapter_rate=Rate(1e-5, "none published; that of dpo"),
            paper="2310.12036",
            needs_reference=True,
            recipe="ipo",
        ),
        "simpo": Method(
            summary="SimPO: the margin alone",
            formula="−log σ(β·(m_r − m_c) − γ)",
            parameters={
                "beta": Parameter(100.0, is_positive=True, note="none is published"),
                "gamma": Parameter(1.0, note="γ"),
            },
            rate=Rate(1e-7, "none published; that of mapo_paper, a small one since nothing holds this loss back"),
            adapter_rate=Rate(1e-5, "none published; that of dpo"),
            paper="2405.14734",
            recipe="simpo",
        ),
        "orpo": Method(
            summary="ORPO: fine-tuning plus a margin",
            formula="m_c − β·log σ(m_r − m_c)",
            parameters={"beta": Parameter(0.1)},
            rate=Rate(1e-7, "none published; that of mapo_paper"),
            adapter_rate=Rate(3e-5, f"{_ORPO_README}, at batch 64"),
            paper="2403.07691",
            fine_tunes=True,
            recipe="orpo",
        ),
        "kto": Method(
            summary="Diffusion-KTO: good and bad images, without pairs",
            formula="w·[1 − σ(±β·(ref − m − kl))]",
            parameters={
                "beta": Parameter(1000.0, is_positive=True),
                "desirable": Parameter(1.0, note="w of good images"),
                "undesirable": Parameter(1.0, note="w of bad images"),
            },
            rate=Rate(1e-7, f"{_KTO}, exps/example.sh:19"),
            adapter_rate=Rate(1e-5, "none published; that of dpo"),
            paper="2404.04465",
            needs_reference=True,
            has_margin=False,
            needs_mean_gain=True,
            kinds=(PAIR, JUDGED),
        ),
        "dreambooth": Method(
            summary="DreamBooth: fine-tuning on images of a subject, with prior preservation",
            formula="m_c, and λ·m of class images",
            parameters={"prior_weight": Parameter(1.0, note="λ")},
            rate=Rate(5e-6, f"{_DIFFUSERS}/dreambooth/README.md:113, at batch 1"),
            adapter_rate=Rate(1e-4, f"{_DIFFUSERS}/dreambooth/README_sdxl.md:89, at batch 1"),
            paper="2208.12242",
            learns_preference=False,
            has_margin=False,
            fine_tunes=True,
            kinds=(PAIR, JUDGED, PRIOR),
            needs_good=True,
        ),
        "dco": Method(
            summary="DCO: fine-tuning on good images, as far as they lead the reference",
            formula="−log σ(−β·(m_c − ref_c))",
            parameters={"beta": Parameter(1000.0, is_positive=True)},
            rate=Rate(1e-7, "none published; that of mapo_paper"),
            adapter_rate=Rate(5e-5, "kyungmnlee/dco 164ae17, README.md:87"),
            paper="2402.12004",
            needs_reference=True,
            learns_preference=False,
            has_margin=False,
            kinds=(PAIR, JUDGED),
            needs_good=True,
        ),
    }
)
"""`train.method` -> the facts about it; the only list of methods."""

NEEDS_REFERENCE: frozenset[str] = frozenset(name for name, method in METHODS.items() if method.needs_reference)
"""Methods that compare with a frozen reference model."""


def default_rate(method: str, *, with_adapters: bool) -> Rate:
    """Return the learning rate used when `train.learning_rate` is left out, with its source.

    An unknown method gets some rate here; `check_parameters` reports it.
    """
    found = METHODS.get(method, METHODS["mapo_paper"])
    return found.adapter_rate if with_adapters else found.rate


def check_parameters(method: str, parameters: Mapping[str, float]) -> dict[str, float]:
    """Return all parameters of a method: the given ones over its defaults.

    Args:
        method: `train.method`, a key of METHODS.
        parameters: `train.loss`, any subset of the method's parameters.

    Raises:
        ConfigError: The method or a parameter is unknown, or a value is not a finite number >= 0 (> 0 where the
            registry says `is_positive`).
    """
    if method not in METHODS:
        raise ConfigError(
            f"train.method is {method!r}, which is not one of: {', '.join(METHODS)}.",
            hint=f"did you mean {_nearest(method, METHODS)}?",
        )
    known = METHODS[method].parameters
    for name, value in parameters.items():
        if name not in known:
            raise _unknown_parameter(method, name)
        _check_value(method, name, value)
    return {name: float(parameters.get(name, parameter.default)) for name, parameter in known.items()}


def _check_value(method: str, name: str, value: object) -> None:
    parameter = METHODS[method].parameters[name]
    lowest = math.ulp(0.0) if parameter.is_positive else 0.0
    if isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value < math.inf:
        return
    allowed = "> 0" if parameter.is_positive else ">= 0"
    raise ConfigError(
        f"train.loss.{name} of {method} is {value!r}; it must be a finite number {allowed}.",
        hint=f"leave it out for the default, {parameter.default:g}.",
    )


def _unknown_parameter(method: str, name: str) -> ConfigError:
    defaults = METHODS[method].defaults
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
