"""`mapo status`: show where a run is."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from orchestration.commands.logs import connect
from orchestration.commands.options import CONFIGURED, JSON, Command, Option, say, say_json

if TYPE_CHECKING:
    from orchestration.config import RunConfig


def _status(options: argparse.Namespace) -> None:
    from orchestration.driver.status import describe_run
    from orchestration.jobs.paths import load_located

    config, _ = load_located(options.config, options.overrides)
    described = describe_run(config)
    if options.address is not None:
        described["job"] = job_of(config, options.address)
    if options.json:
        return say_json(described)
    say(status_text(described))
    if options.address is not None:
        say(job_text(described["job"]))
    return None


def status_text(described: dict[str, Any]) -> str:
    """Describe a run for a terminal."""
    from orchestration.run.lease import Holder
    from orchestration.stages.actions import describe_progress

    lines = [f"{described['run']} · {described['storage']}"]
    if described["driver"]:
        lines.append(f"driven by {Holder(**described['driver'])}")
    for stage in described["stages"]:
        lines.append(f"{stage['stage']:<9} {stage['state']:<11} {stage['problem'] or stage['summary'] or ''}".rstrip())
    if described["training"]:
        lines.append(f"training: {describe_progress(described['training'])}")
    return "\n".join(lines)


def job_of(config: "RunConfig", address: str) -> dict[str, Any] | None:
    """Describe the newest job of a run as plain data; None if there is none."""
    from orchestration.jobs.submit import find_job

    jobs = connect(address)
    found = find_job(config, jobs)
    return {"address": jobs.address, **asdict(found)} if found else None


def job_text(job: dict[str, Any] | None) -> str:
    """Describe a job for a terminal."""
    if job is None:
        return "job       none that `mapo submit` started"
    when = f"{job['started_at']}" + (f" to {job['ended_at']}" if job["ended_at"] else "")
    message = job["message"].splitlines()[0] if job["message"] else ""
    return f"job       {job['state']:<11} {job['id']}, since {when}, `{job['entrypoint']}`: {message}"


COMMANDS = (
    Command(
        "status",
        "show the state of each stage, progress, and the last metrics",
        _status,
        (
            *CONFIGURED,
            JSON,
            Option("--address", "also show the run's Ray job there, such as http://head:8265", metavar="URL"),
        ),
    ),
)
