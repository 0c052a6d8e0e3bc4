"""The registry of suites that ship or can be fetched, by name.

A suite is one entry here: its name with the version, and a function without arguments that builds it. `held-out` and
`prompts` are no entries, because their prompts come from a run.
"""

from collections.abc import Callable

from pipelines.dataset.errors import ConfigError
from pipelines.suites.starter import starter
from pipelines.suites.suite import Suite

SUITES: dict[str, Callable[[], Suite]] = {"starter@1": starter}
"""Builders of the suites by `name@version`; the last one of a name is what the name alone stands for."""
HELD_OUT, PROMPTS = "held-out", "prompts"
"""Suites of a run's own prompts: its held-out pairs, and its file of prompts."""


def suite_names() -> list[str]:
    """Return the names of the suites with their versions, in the order of the registry."""
    return list(SUITES)


def load_suite(name: str) -> Suite:
    """Build a suite.

    Args:
        name: `name@version`, or the name alone for its newest version.

    Raises:
        ConfigError: There is no such suite, or no such version of it.
    """
    newest = {full.partition("@")[0]: full for full in SUITES}
    build = SUITES.get(newest.get(name, name))
    if build is None:
        known = ", ".join((HELD_OUT, PROMPTS, *SUITES))
        raise ConfigError(f"there is no suite {name}", f"choose from {known}")
    return build()
