"""Follow a job's log over connections that may break: no line comes twice, none is lost."""

import asyncio
import contextlib
from collections.abc import Callable

from orchestration.jobs.api import Job, Jobs
from pipelines.dataset.errors import ClusterError, JobError

FIRST_WAIT_S, MAX_WAIT_S = 0.5, 10.0  # between attempts to reconnect; doubled after each
MAX_AWAY_S = 600.0  # a head that is replaced is back sooner
SILENCE_S = 15.0  # without a line, before the job's state is checked
STOPPED, COMMAND_NOT_FOUND = 130, 127  # exit codes of `mapo` after a stop, and of a shell

Write = Callable[[str], None]
"""Takes a piece of text verbatim, line ends included."""


def follow(jobs: Jobs, job_id: str, write: Write, note: Write) -> Job:
    """Write a job's log until the job has ended; return its final state.

    Args:
        jobs: The cluster's jobs.
        job_id: Submission id of the job.
        write: Takes the log.
        note: Takes lines about the job and the connection.

    Raises:
        ClusterError: The cluster was away for MAX_AWAY_S, denies access, or no longer knows the job.
    """
    return asyncio.run(_Follower(jobs, job_id, write, note).run())


class _Follower:
    """Writes each part of a log once, although Ray sends it from the beginning at each connection."""

    def __init__(self, jobs: Jobs, job_id: str, write: Write, note: Write) -> None:
        self._jobs, self._id, self._write, self._note = jobs, job_id, write, note
        self._num_written = 0  # characters
        self._reason = ""  # why the job waits
        self._lost: ClusterError | None = None
        self._away_since = 0.0

    async def run(self) -> Job:
        wait_s = FIRST_WAIT_S
        while True:
            before = self._num_written
            try:
                await self._read()
                job = await self._ask()
                if not job.is_live:
                    await self._write_rest()
                    return job
            except ClusterError as error:
                self._note_loss(error)
            wait_s = FIRST_WAIT_S if self._num_written > before else min(2 * wait_s, MAX_WAIT_S)
            await asyncio.sleep(wait_s)

    async def _read(self) -> None:
        """Write what one connection sends, until the server ends it or the job is over."""
        position = 0
        await self._ask()
        async with contextlib.aclosing(self._jobs.follow(self._id)) as pieces:
            waiting: asyncio.Task[str] | None = None
            try:
                while True:
                    waiting = waiting or asyncio.ensure_future(anext(pieces))
                    done, _ = await asyncio.wait({waiting}, timeout=SILENCE_S)
                    if not done:
                        job = await self._ask()
                        if not job.is_live:
                            return
                        self._note_waiting(job)
                        continue
                    piece, waiting = waiting.result(), None
                    self._note_return()
                    self._put(piece, position)
                    position += len(piece)
            except StopAsyncIteration:
                return
            finally:
                if waiting is not None:
                    waiting.cancel()
                    await asyncio.wait({waiting})

    def _put(self, text: str, position: int) -> None:
        """Write the unwritten part of a text that begins at `position` of the log."""
        new = text[max(0, self._num_written - position) :]
        if new:
            self._write(new)
            self._num_written += len(new)

    async def _ask(self) -> Job:
        job = await asyncio.to_thread(self._jobs.find, self._id)
        if job is None:
            raise unknown(self._jobs, self._id)
        self._note_return()
        return job

    def _note_waiting(self, job: Job) -> None:
        if job.state == "PENDING" and job.message != self._reason:
            self._reason = job.message
            self._note(f"{job.id} PENDING: {job.message}")

    async def _write_rest(self) -> None:
        """Write the end of a finished job's log, which the last connection may not have sent."""
        try:
            self._put(await asyncio.to_thread(self._jobs.log, self._id), 0)
        except ClusterError as error:
            self._note(f"cannot read the end of the log: {error.message}")

    def _note_loss(self, error: ClusterError) -> None:
        loop_time = asyncio.get_running_loop().time()
        if not error.is_transient:
            raise error
        if self._lost is None:
            self._lost, self._away_since = error, loop_time
            self._note(f"{error.message}; reconnecting, {self._id} keeps running meanwhile")
        elif loop_time - self._away_since > MAX_AWAY_S:
            raise ClusterError(f"{error.message}, for {MAX_AWAY_S:.0f} s now", f"{self._id} may still be running")

    def _note_return(self) -> None:
        if self._lost is not None:
            self._lost = None
            self._note(f"{self._jobs.address} answers again")


def unknown(jobs: Jobs, job_id: str) -> ClusterError:
    """Return the error for a job that the cluster does not know."""
    return ClusterError(
        f"{jobs.address} has no job {job_id}",
        "a head that was replaced does not know earlier jobs, and they ended with the old one; submit again to resume",
    )


def check_success(job: Job) -> None:
    """Check that a job succeeded.

    Raises:
        JobError: It failed or was stopped; with Ray's message where its command did not run.
    """
    if job.state == "SUCCEEDED":
        return
    if job.state == "FAILED" and job.exit_code is not None:
        hint = "its log says why; submit again to resume"
        if job.exit_code == STOPPED:
            raise JobError(f"job {job.id} was stopped cleanly", "submit again to resume")
        if job.exit_code == COMMAND_NOT_FOUND:
            hint = "install `mapo` on the cluster's nodes, on the PATH of their Ray"
        raise JobError(f"job {job.id} failed: its command ended with exit code {job.exit_code}", hint)
    message = job.message.splitlines()[0] if job.message else ""
    raise JobError(f"job {job.id} {job.state}: {message}"[:2000], "submit again to resume")
