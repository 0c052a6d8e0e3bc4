"""`mapo status`: show the state of a run."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from orchestration.commands.logs import connect
from orchestration.commands.options import CONFIGURED, JSON, Command, Option, say, say_json

if TYPE_CHECKING:
    from orchestration.config import RunConfig
    from orchestration.driver.status import RunStatus


def _status(options: argparse.Namespace) -> None:
    from orchestration import api

    config = api.load(options.config, options.overrides, say=lambda line: None)
    status = api.status(config)
    described = status.to_json()
    if options.address is not None:
        described["job"] = job_of(config, options.address)
    if options.json:
        return say_json(described)
    say(status_text(status))
    if options.address is not None:
        say(job_text(described["job"]))
    return None


def status_text(status: "RunStatus") -> str:
    """Describe a run for a terminal."""
    from orchestration.driver.status import describe_progress

    lines = [f"{status.run} · {status.storage}"]
    if status.driver:
        lines.append(f"running: {status.driver}")
    for each in status.stages:
        lines.append(f"{each.stage:<9} {each.state:<11} {each.problem or each.summary or ''}".rstrip())
    if status.training:
        lines.append(f"training: {describe_progress(status.training)}")
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
