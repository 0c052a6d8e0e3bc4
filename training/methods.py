"""Which losses a run can name, and the defaults of their parameters; imports no torch.

`training.losses` computes them, `training.config` and the command line check them.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from pipelines.dataset.errors import ConfigError

METHODS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "mapo": MappingProxyType({"beta": 0.1, "snr": 0.5}),  # as the released code
        "mapo_paper": MappingProxyType({"beta": 8.0}),  # as the paper's general alignment
        "sft": MappingProxyType({}),
    }
)
"""Method name -> its parameters with their defaults: the only place where these are written."""

_DIVISORS = frozenset({("mapo_paper", "beta")})  # parameters a loss divides by: 0 is refused


def check_parameters(method: str, parameters: Mapping[str, float]) -> dict[str, float]:
    """All parameters of a method: the given ones over its defaults.

    Args:
        method: `train.method`, a key of METHODS.
        parameters: `train.loss`, any subset of the method's parameters.

    Raises:
        ConfigError: The method or a parameter is unknown, or a value is not a finite number >= 0
            (> 0 for the beta of mapo_paper, which is divided by).
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
    is_divisor = (method, name) in _DIVISORS
    lowest = math.ulp(0.0) if is_divisor else 0.0
    if isinstance(value, int | float) and not isinstance(value, bool) and lowest <= value < math.inf:
        return
    allowed = "> 0" if is_divisor else ">= 0"
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
