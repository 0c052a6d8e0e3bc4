"""`mapo logs`: show the log of a run's Ray job."""

import argparse
import shlex
from typing import TYPE_CHECKING

from orchestration.commands.options import CONFIGURED, EXIT_INTERRUPTED, Command, Option, note, write

if TYPE_CHECKING:
    from orchestration.config import RunConfig
    from orchestration.jobs.api import Job, Jobs

ADDRESS = Option(
    "--address",
    "Ray's dashboard, such as http://head:8265 (default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS)",
    metavar="URL",
)


def _logs(options: argparse.Namespace) -> None:
    from orchestration.config import load_config
    from orchestration.jobs.logs import unknown

    config = load_config(options.config, options.overrides)
    jobs = connect(options.address)
    job = jobs.find(options.job) if options.job else _newest(config, jobs)
    if job is None:
        raise unknown(jobs, options.job)
    if options.follow:
        return show_log(jobs, job.id, same_run(options, jobs.address))
    write(jobs.log(job.id))
    ended = f", until {job.ended_at}" if job.ended_at else ""
    return note(f"job {job.id}: {job.state} since {job.started_at}{ended}")


def connect(address: str | None) -> "Jobs":
    """Connect to the dashboard at this address, or at the environment's."""
    from orchestration.jobs.api import Jobs
    from orchestration.jobs.client import resolve_address

    return Jobs(resolve_address(address))


def same_run(options: argparse.Namespace, address: str) -> str:
    """Return the arguments with which other commands find the same run on the cluster."""
    overrides = [part for value in options.overrides for part in ("-o", value)]
    return shlex.join([options.config, *overrides, "--address", address])


def show_log(jobs: "Jobs", job_id: str, same: str) -> None:
    """Show a job's log until the job ends; Ctrl-C leaves the job alone.

    Args:
        jobs: The cluster's jobs.
        job_id: The submission id of the job.
        same: From `same_run`.
    """
    from orchestration.jobs.logs import check_success, follow

    try:
        job = follow(jobs, job_id, write, note)
    except KeyboardInterrupt:
        note(
            f"\ndetached; {job_id} is still running: `mapo logs {same} --follow` shows its log again, "
            f"`mapo stop {same}` stops it"
        )
        raise SystemExit(EXIT_INTERRUPTED) from None
    check_success(job)
    note(f"job {job.id} succeeded")


def _newest(config: "RunConfig", jobs: "Jobs") -> "Job":
    from orchestration.jobs.submit import find_job
    from pipelines.dataset.errors import ClusterError

    found = find_job(config, jobs)
    if found is None:
        raise ClusterError(
            f"{jobs.address} has no job of run {config.name} on {config.storage} that `mapo submit` started",
            "`ray job list` lists all jobs; `--job ID` selects any of them",
        )
    return found


COMMANDS = (
    Command(
        "logs",
        "show the log of a run's newest job",
        _logs,
        (
            *CONFIGURED,
            ADDRESS,
            Option("--follow", "keep printing until the job ends; Ctrl-C detaches"),
            Option("--job", "the job with this submission id instead", metavar="ID"),
        ),
    ),
)
