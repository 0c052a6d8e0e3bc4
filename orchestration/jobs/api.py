"""The jobs of a Ray cluster: list, submit, follow, stop; every failure is a ClusterError."""

import contextlib
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import aiohttp
import psutil
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails

from orchestration.jobs.client import ADDRESS_HINT, TOKEN_HINT, Refused, ray_client, reason_of
from pipelines.dataset.errors import ClusterError

LIVE = ("PENDING", "RUNNING")
NO_AGENT = "No available agent"  # what Ray answers while a head that was just started takes no jobs yet
AGENT_WAIT_S = 60.0


class IdTaken(Exception):
    """Another job of the cluster already has this submission id."""


@dataclass(frozen=True)
class Job:
    """A job as the cluster describes it.

    Args:
        id: Submission id.
        state: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        started_at: When it was submitted, ISO time, UTC.
        ended_at: When it ended, ISO time, UTC; None while it is live.
        entrypoint: Its command.
        message: Ray's message about its state.
        exit_code: The exit code of the command.
        metadata: What it was submitted with.
    """

    id: str
    state: str
    started_at: str | None
    ended_at: str | None
    entrypoint: str
    message: str
    exit_code: int | None
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def is_live(self) -> bool:
        """Whether it is pending or running."""
        return self.state in LIVE


class Jobs:
    """The jobs of one cluster.

    Args:
        address: As `resolve_address` gives it.

    Raises:
        ClusterError: From every method: the cluster does not answer, denies access or refuses. `is_transient` says
            whether the same request may succeed a moment later.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        with self._answers("return its version"):
            self._client = ray_client(address)
        self.address = self._client.get_address()

    @contextlib.contextmanager
    def _answers(self, what: str) -> Iterator[None]:
        try:
            yield
        except AuthenticationError as error:
            first = str(error).splitlines()[0]
            raise ClusterError(f"{self.address} denies access: {first}", TOKEN_HINT) from error
        except aiohttp.WSServerHandshakeError as error:
            hint = TOKEN_HINT if error.status in (401, 403) else ADDRESS_HINT
            found = ClusterError(f"{self.address} did not {what}: HTTP {error.status}", hint)
            found.is_transient = error.status >= 500
            raise found from error
        except Refused as error:
            found = ClusterError(f"{self.address} did not {what}: {error}", "the logs of its dashboard have details")
            found.is_transient = error.status >= 500
            raise found from error
        except (ValueError, KeyError, RuntimeError) as error:  # another kind of server, or not a URL
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ClusterError(f"{self.address} does not answer like a Ray dashboard: {first}", ADDRESS_HINT) from error
        except (OSError, TimeoutError, aiohttp.ClientError) as error:  # requests' errors are OSErrors
            found = ClusterError(f"{self.address} does not answer: {reason_of(error)}", ADDRESS_HINT)
            found.is_transient = True
            raise found from error

    def all(self) -> list[Job]:
        """List every job that was submitted, oldest first."""
        with self._answers("list its jobs"):
            found = [_job(each) for each in self._client.list_jobs() if each.submission_id]
        return sorted(found, key=lambda job: (job.started_at or "", job.id))

    def find(self, job_id: str) -> Job | None:
        """Find a job by its submission id; None if the cluster does not know it."""
        with self._answers(f"describe job {job_id}"):
            try:
                return _job(self._client.get_job_info(job_id))
            except Refused as error:
                if error.status == 404:
                    return None
                raise

    def log(self, job_id: str) -> str:
        """Return everything that a job has written so far."""
        with self._answers(f"return the log of {job_id}"):
            return str(self._client.get_job_logs(job_id))

    async def follow(self, job_id: str) -> AsyncGenerator[str]:
        """Yield a job's log from its beginning, in pieces, as it is written."""
        with self._answers(f"return the log of {job_id}"):
            async with contextlib.aclosing(self._client.follow(job_id)) as pieces:
                async for piece in pieces:
                    yield piece

    def stop(self, job_id: str) -> None:
        """Let Ray end a job: SIGTERM, then SIGKILL after the job's RAY_JOB_STOP_WAIT_TIME_S."""
        with self._answers(f"stop {job_id}"):
            self._client.stop_job(job_id)

    def submit(
        self,
        job_id: str,
        entrypoint: str,
        *,
        runtime_env: Mapping[str, Any],
        metadata: Mapping[str, str],
        resources: Mapping[str, Any],
    ) -> None:
        """Start a job under a submission id.

        Raises:
            IdTaken: Another job has this id.
        """
        deadline = time.monotonic() + AGENT_WAIT_S
        while True:
            try:
                with self._answers("accept the job"):
                    self._client.submit_job(
                        submission_id=job_id, entrypoint=entrypoint, runtime_env=dict(runtime_env),
                        metadata=dict(metadata), **resources,
                    )  # fmt: skip
                return
            except ClusterError as error:
                text = error.__cause__.text if isinstance(error.__cause__, Refused) else ""
                if f"{job_id} already exists" in text:
                    raise IdTaken(job_id) from error
                if NO_AGENT in text and time.monotonic() < deadline:
                    time.sleep(1)
                    continue
                if error.is_transient and self._was_taken(job_id, metadata):
                    return
                raise

    def _was_taken(self, job_id: str, metadata: Mapping[str, str]) -> bool:
        """Return whether the job was started although the answer was lost."""
        with contextlib.suppress(ClusterError):
            found = self.find(job_id)
            return found is not None and found.metadata == dict(metadata)
        return False

    def is_this_machine(self) -> bool:
        """Return whether all nodes of the cluster are this machine, judging by their addresses."""
        ours = {address.address for found in psutil.net_if_addrs().values() for address in found}
        try:
            with self._answers("list its nodes"):
                answer = self._client._do_request("GET", "/api/v0/nodes").json()
                nodes = [node for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"]
                return all(node["node_ip"] in ours for node in nodes)
        except (ClusterError, TypeError):
            return False


def _job(details: JobDetails) -> Job:
    return Job(
        id=details.submission_id,
        state=str(details.status.value),
        started_at=_time(details.start_time),
        ended_at=_time(details.end_time),
        entrypoint=details.entrypoint,
        message=details.message or "",
        exit_code=details.driver_exit_code,
        metadata=details.metadata or {},
    )


def _time(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
