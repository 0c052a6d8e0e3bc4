"""`mapo stop`: ask whoever drives a run to end it cleanly; a Ray job that does not is ended by Ray."""

import time

from orchestration.config import RunConfig
from orchestration.driver.session import request_stop
from orchestration.jobs.api import Job, Jobs
from orchestration.jobs.submit import STOP_WAIT_S, find_job, submitter
from orchestration.run.context import Run, Say
from orchestration.run.journal import now
from orchestration.run.lease import current_holder
from pipelines.dataset.errors import ClusterError, JobError

POLL_S = 1.0
KILL_S = 30.0  # that Ray may take beyond the time it gives a job between SIGTERM and SIGKILL


def stop_run(config: RunConfig, jobs: Jobs | None, *, timeout_s: float, say: Say) -> None:
    """Stop a run, and wait until it has ended.

    Args:
        config: The run's.
        jobs: Of the cluster where its job is; without, whoever drives it is asked and nothing else is done.
        timeout_s: What the driver has to end by itself: a checkpoint is written first.
        say: Where lines go.

    Raises:
        JobError: It has not ended, and there is no job that could be ended.
        ClusterError: Ray did not end the job.
    """
    run = Run.open(config, say)
    job = _live_job(config, jobs)
    holder = current_holder(run.storage, run.folder)
    if job is None and holder is None:
        return say(f"nothing drives run {config.name}: nothing to stop")
    say(f"stopping  {job.id if job else holder}")
    if job is not None and jobs is not None and job.state == "PENDING" and holder is None:
        job = _end(jobs, job)  # it waits for its turn, and nobody reads a request
    else:
        job = _ask_and_wait(run, job, jobs, timeout_s)
        if job is not None and jobs is not None and job.is_live:
            say(f"{job.id} has not ended within {timeout_s:.0f} s: Ray ends it")
            job = _end(jobs, job)
    return say(f"stopped   {_ending(job)}; the same run goes on from what is done")


def _ask_and_wait(run: Run, job: Job | None, jobs: Jobs | None, timeout_s: float) -> Job | None:
    """Ask the driver, and wait for its end and the job's; returns the job as it then is.

    A job that begins forgets a request that was made before, so every driver that shows up while it lives is asked.
    """
    deadline, asked = time.monotonic() + timeout_s, ""
    while True:
        holder = current_holder(run.storage, run.folder)
        if job is None and (holder is None or (asked and holder.id != asked)):
            return None
        if job is not None and not job.is_live:
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
            f"run {run.config.name} has not ended within {timeout_s:.0f} s; it is driven by {holder}",
            "it stays asked to stop; if its machine is gone, the next `mapo run` takes the run over",
        )
    return job


def _look(jobs: Jobs, job: Job) -> Job:
    """The job now; as it was, if the cluster does not answer at this moment."""
    try:
        return jobs.find(job.id) or job
    except ClusterError as error:
        if not error.is_transient:
            raise
        return job


def _end(jobs: Jobs, job: Job) -> Job:
    """Let Ray end a job, and wait for it."""
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
        return "its driver has ended"
    code = f" with exit code {job.exit_code}" if job.exit_code is not None else ""
    return f"{job.id} is {job.state}{code}"
