"""Stop a run: ask its driver to stop cleanly, and let Ray end a job that does not."""

import time

from orchestration.config import RunConfig
from orchestration.driver.session import request_stop
from orchestration.jobs.api import Job, Jobs
from orchestration.jobs.submit import STOP_WAIT_S, find_job, submitter
from orchestration.run.context import Run, Say
from orchestration.run.journal import now
from orchestration.run.lease import Holder, current_holder
from pipelines.dataset.errors import ClusterError, JobError

POLL_S = 1.0
KILL_S = 30.0  # what Ray may take beyond the time between SIGTERM and SIGKILL


def stop_run(config: RunConfig, jobs: Jobs | None, *, timeout_s: float, say: Say) -> None:
    """Stop a run, and wait until it has ended.

    Args:
        config: The run's configuration.
        jobs: Jobs of the cluster where the run's job is; without them, its driver is asked and nothing else is done.
        timeout_s: How long the driver may take to stop; it writes a checkpoint first.
        say: Shows a line to the user.

    Raises:
        JobError: It has not stopped, and there is no job for Ray to end.
        ClusterError: Ray did not end the job.
    """
    run = Run.open(config, say)
    job = _live_job(config, jobs)
    holder = current_holder(run.storage, run.folder)
    if job is None and holder is None:
        return say(f"run {config.name} is not running")
    say(f"stopping  {job.id if job else holder}")
    if job is not None and jobs is not None and job.state == "PENDING" and holder is None:
        job = _end(jobs, job)  # it is still queued, and nobody reads a request
    else:
        job = _ask_and_wait(run, job, jobs, timeout_s)
        if job is not None and jobs is not None and job.is_live:
            say(f"{job.id} did not stop within {timeout_s:.0f} s; Ray is ending it")
            job = _end(jobs, job)
    return say(f"stopped   {_ending(job)}; rerun the same command to resume")


def _ask_and_wait(run: Run, job: Job | None, jobs: Jobs | None, timeout_s: float) -> Job | None:
    """Ask the driver to stop, and wait until it and the job have ended; return the job's new state.

    A driver that starts discards earlier requests, so every driver that shows up while the job is live is asked.
    """
    deadline, asked = time.monotonic() + timeout_s, ""
    while True:
        holder = current_holder(run.storage, run.folder)
        if _has_ended(job, holder, asked):
            return job
        if holder is not None and holder.id != asked:
            request_stop(run, by=submitter(), at=now())
            asked = holder.id
        if time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
        if job is not None and jobs is not None:
            job = _look(jobs, job)
    if job is None:
        raise JobError(
            f"run {run.config.name} did not stop within {timeout_s:.0f} s: {holder}",
            "the request to stop stands; if its machine is gone, the next `mapo run` takes over",
        )
    return job


def _has_ended(job: Job | None, holder: Holder | None, asked: str) -> bool:
    """Return whether the job has ended; without a job, whether the driver that was asked has."""
    if job is not None:
        return not job.is_live
    return holder is None or (asked != "" and holder.id != asked)


def _look(jobs: Jobs, job: Job) -> Job:
    """Return the job's state now; the last known one if the cluster does not answer at the moment."""
    try:
        return jobs.find(job.id) or job
    except ClusterError as error:
        if not error.is_transient:
            raise
        return job


def _end(jobs: Jobs, job: Job) -> Job:
    """Let Ray end a job, and wait until it has."""
    jobs.stop(job.id)
    wait_s = STOP_WAIT_S + KILL_S
    deadline = time.monotonic() + wait_s
    while (job := _look(jobs, job)).is_live:
        if time.monotonic() > deadline:
            raise ClusterError(f"{job.id} is still {job.state} {wait_s:.0f} s after Ray was told to end it")
        time.sleep(POLL_S)
    return job


def _live_job(config: RunConfig, jobs: Jobs | None) -> Job | None:
    found = find_job(config, jobs) if jobs else None
    return found if found and found.is_live else None


def _ending(job: Job | None) -> str:
    if job is None:
        return "its driver has exited"
    code = f" with exit code {job.exit_code}" if job.exit_code is not None else ""
    return f"{job.id} is {job.state}{code}"
