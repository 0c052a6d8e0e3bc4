"""Lengths of time as the command line has them."""

import re
from datetime import timedelta

from pipelines.dataset.errors import ConfigError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str, option: str) -> timedelta:
    """A number and a unit: 90m, 6h, 7d.

    Args:
        text: As it was given.
        option: The option that it was given to, for the error.

    Raises:
        ConfigError: It is something else.
    """
    match = re.fullmatch(r"(\d{1,6})([smhd])", text.strip())
    if match is None:
        raise ConfigError(f"{option} {text}: not a time", "a number and one of s, m, h, d: 90m, 12h, 7d")
    return timedelta(seconds=int(match[1]) * UNITS[match[2]])
