"""The `mapo` command: the stages of a run, their state, and their results."""

import mapo_entry  # noqa: F401 - from here on, `training` and `pipelines` are mapo's

__version__ = "0.1.0"
