"""Checks of a base's noise schedule: that its betas are stated, and what the model predicts.

Training adds noise with `DDPMScheduler`, which uses its own betas where a scheduler file has none: a flow-matching or
EDM model would train to the end on noise that it has never seen. Needs neither ray nor torch.
"""

import re
from collections.abc import Sequence
from typing import Any

from pipelines.dataset.errors import ModelError
from pipelines.dataset.model_files import CHOOSE_A_BASE
from pipelines.dataset.values import JsonObject

PREDICTION_TYPES = ("epsilon", "v_prediction")
BETA_SCHEDULERS = frozenset((
    "DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler",
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler", "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "SASolverScheduler",
))  # fmt: skip
"""Schedulers whose configuration states the betas that the model was trained with."""
DISTILLED_SCHEDULERS = {"LCMScheduler": "a latent consistency model", "TCDScheduler": "a consistency model"}
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
WITHOUT_BOUNDS = ("squaredcos_cap_v2",)  # its betas follow from their number alone
DIFFUSERS_DEFAULTS = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}

DISTILLED_ANYWHERE = ("turbo", "lightning", "schnell", "hypersd", "flashsd")  # hyphens and underscores left out
DISTILLED_WORDS = frozenset(("lcm", "dmd", "tcd", "pcm", "sprint", "nitro"))
"""Words in a model's name that mean it was distilled to a few steps; only whole words count."""
PARTS_OF_NAMES = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
ANOTHER_BASE = f"training supports only noise schedules with betas; {CHOOSE_A_BASE}"


def check_schedule(
    config: JsonObject,
    *,
    model: str,
    pipeline_scheduler: str | None,
    names: Sequence[str],
    prediction_type: str | None,
) -> str:
    """Check a base's scheduler file.

    Args:
        config: `scheduler/scheduler_config.json`.
        model: The base, for messages.
        pipeline_scheduler: The scheduler's class in `model_index.json`, if it names one.
        names: The base's names, here and in its files.
        prediction_type: `train.prediction_type`, which overrides the file.

    Returns:
        What the UNet predicts: epsilon or v_prediction.

    Raises:
        ModelError: Training would add noise unlike the model's own, or ruin a distilled model.
    """
    classes = [str(found) for found in (config.get("_class_name"), pipeline_scheduler) if found]
    _check_kind(config, classes, model)
    _check_betas(config, model)
    if prediction_type is not None:
        return prediction_type
    found = config.get("prediction_type") or "epsilon"  # files of 2022 do not say
    if found not in PREDICTION_TYPES:
        raise ModelError(
            f"scheduler.prediction_type of {model} is {found}; training supports {' and '.join(PREDICTION_TYPES)}",
            f"{CHOOSE_A_BASE}; or, if the file is wrong, set `train.prediction_type` to what the model predicts",
        )
    _check_distilled(config, classes, model, names, found)
    if found == "epsilon" and config.get("rescale_betas_zero_snr"):
        raise ModelError(
            f"scheduler.rescale_betas_zero_snr of {model} is true, but prediction_type is epsilon: with zero terminal "
            "SNR the last step is pure noise, from which a model cannot learn epsilon, so such bases predict velocity",
            "set `train.prediction_type: v_prediction`; or `epsilon`, if that is what the model predicts",
        )
    return str(found)


def schedule_note(config: JsonObject) -> str | None:
    """Return a remark on betas that are most likely not the model's own, or None."""
    if any(config.get(key) != value for key, value in DIFFUSERS_DEFAULTS.items()):
        return None
    return (
        "the scheduler file of the base has diffusers' default betas (linear, 0.0001..0.02); published models of the "
        "family were trained with others (scaled_linear, 0.00085..0.012)"
    )


def _check_kind(config: JsonObject, classes: Sequence[str], model: str) -> None:
    """Reject schedulers of flow matching, EDM and consistency models, which were not trained with betas."""
    if not classes:
        raise ModelError(f"scheduler._class_name of {model} is missing", "the model folder is damaged; fetch it again")
    for name in classes:
        if "Flow" in name:
            raise ModelError(f"the scheduler of {model} is {name}: a flow-matching model", ANOTHER_BASE)
        if name.startswith("CMStochastic"):
            raise ModelError(f"the scheduler of {model} is {name}: a consistency model", ANOTHER_BASE)
        if name.startswith("EDM"):
            raise ModelError(f"the scheduler of {model} is {name}: an EDM model", ANOTHER_BASE)
    signs = (
        ("use_flow_sigmas", bool(config.get("use_flow_sigmas")), "a flow-matching model"),
        ("prediction_type", "flow" in str(config.get("prediction_type")), "a flow-matching model"),
        ("timestep_type", config.get("timestep_type") == "continuous", "an EDM model"),
        ("sigma_data", config.get("sigma_data") is not None, "an EDM model"),
    )
    for key, is_so, what in signs:
        if is_so:
            raise ModelError(f"scheduler.{key} of {model} is {config[key]}: {what}", ANOTHER_BASE)
    for name in classes:
        if name not in BETA_SCHEDULERS and name not in DISTILLED_SCHEDULERS:
            raise ModelError(
                f"the scheduler of {model} is {name}, which does not state the betas that the model was trained with",
                f"{CHOOSE_A_BASE}; or put a scheduler_config.json with those betas into its scheduler folder (and its "
                "class into model_index.json), such as that of EulerDiscreteScheduler",
            )


def _check_betas(config: JsonObject, model: str) -> None:
    """Check that the file states its betas: no published base uses diffusers' defaults."""
    trained, name = config.get("trained_betas"), config.get("beta_schedule")
    wanted = ["num_train_timesteps", *(["beta_schedule"] if trained is None else [])]
    if trained is None and name not in WITHOUT_BOUNDS:
        wanted += ["beta_start", "beta_end"]
    if lacking := [key for key in wanted if config.get(key) is None]:
        raise ModelError(
            f"the scheduler file of {model} does not state {', '.join(lacking)}, and the model may not have been "
            "trained with the default",
            "if it was trained with betas, add them to scheduler/scheduler_config.json (SDXL and Stable Diffusion have "
            "beta_schedule scaled_linear, beta_start 0.00085, beta_end 0.012, num_train_timesteps 1000); if not, "
            f"{CHOOSE_A_BASE}",
        )
    if (wrong := _wrong_schedule(config, model)) is not None:
        raise ModelError(
            f"scheduler.{wrong}",
            f"set it in scheduler/scheduler_config.json to what the model was trained with; or {CHOOSE_A_BASE}",
        )


def _wrong_schedule(config: JsonObject, model: str) -> str | None:
    """Return what is wrong with the stated keys; None if nothing is."""
    steps, trained = config.get("num_train_timesteps"), config.get("trained_betas")
    if type(steps) is not int or steps < 2:
        return f"num_train_timesteps of {model} is {steps}, not a number of steps"
    wrong = _wrong_trained_betas(trained, steps, model) if trained is not None else _wrong_bounds(config, model)
    if wrong is None and type(rescaled := config.get("rescale_betas_zero_snr", False)) not in (bool, type(None)):
        wrong = f"rescale_betas_zero_snr of {model} is {rescaled!r}, not true or false"
    return wrong


def _wrong_trained_betas(trained: Any, steps: int, model: str) -> str | None:
    if not isinstance(trained, list) or len(trained) != steps or not all(_is_beta(each) for each in trained):
        size = len(trained) if isinstance(trained, list) else 0
        return f"trained_betas of {model} are {size} values, not num_train_timesteps = {steps} values in 0..1"
    return None if trained == sorted(trained) else f"trained_betas of {model} decrease somewhere; they must increase"


def _wrong_bounds(config: JsonObject, model: str) -> str | None:
    name = config.get("beta_schedule")
    if name not in BETA_SCHEDULES:
        return f"beta_schedule of {model} is {name}; training supports {', '.join(BETA_SCHEDULES)}"
    if name in WITHOUT_BOUNDS:
        return None
    start, end = config["beta_start"], config["beta_end"]
    if _is_beta(start) and _is_beta(end) and start <= end:
        return None
    return f"beta_start and beta_end of {model} are {start} and {end}, not increasing numbers in 0..1"


def _is_beta(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1


def _check_distilled(
    config: JsonObject, classes: Sequence[str], model: str, names: Sequence[str], predicted: str
) -> None:
    """Reject a model that was distilled to a few steps: training on all timesteps would undo that."""
    reasons = [
        f"its scheduler is {name}, for {DISTILLED_SCHEDULERS[name]}" for name in classes if name in DISTILLED_SCHEDULERS
    ]
    reasons += [f"it is called {name}" for name in names if is_distilled_name(name)]
    spacing = config.get("timestep_spacing")
    if predicted == "epsilon" and spacing == "trailing" and not config.get("rescale_betas_zero_snr"):
        reasons.append("scheduler.timestep_spacing is trailing with prediction_type epsilon, as in Turbo and Lightning")
    if reasons:
        raise ModelError(
            f"{model} looks like a base that was distilled to a few steps: {reasons[0]}; training would silently undo "
            "the distillation",
            "train the base that it was distilled from; if it is not distilled, or you want its many-step behaviour, "
            f"set `train.prediction_type: {predicted}`",
        )


def is_distilled_name(name: str) -> bool:
    """Return whether a model's name says that it was distilled to a few steps, as `sdxl-turbo` does."""
    words = {word.lower() for word in PARTS_OF_NAMES.findall(name)}
    joined = re.sub(r"[-_ ]", "", name.lower())
    return any(word in joined for word in DISTILLED_ANYWHERE) or bool(words & DISTILLED_WORDS)


def short_name(name: str) -> str:
    """Return the part of a path, URL or hub id that names the model itself.

    In a hub cache that is the folder above the snapshot; the folder of a part says nothing.
    """
    parts = [part for part in re.split(r"[/\\]", name) if part and part != "unet"]
    cached = [part for part in parts if part.startswith("models--")]
    return (cached or parts or [name])[-1].split("--")[-1]
