"""The `mapo` command: which stages a run has, which are done, and what came out."""

import mapo_entry  # noqa: F401 - from here on, `training` and `pipelines` are mapo's

__version__ = "0.1.0"
