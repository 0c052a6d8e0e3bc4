"""The Ray job that this process is the driver of, if it is one."""

import json
import os

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets the variable of this very name for the driver of a job: its runtime environment and metadata."""


def submission_id() -> str | None:
    """Return the submission id of the Ray job that this process drives; None outside of a job."""
    try:
        described = json.loads(os.environ.get(JOB_VARIABLE, "{}"))
    except ValueError:
        return None
    found = described.get("metadata", {}).get("job_submission_id")
    return str(found) if found else None
