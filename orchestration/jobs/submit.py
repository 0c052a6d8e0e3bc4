"""A run as a Ray job: what is sent, under which id, and when it is refused.

What is sent is the configuration file as it is written and what `--include` names; overrides go on the job's command
line. The cluster needs the installed package and nothing else of this machine.
"""

import getpass
import hashlib
import json
import os
import re
import shlex
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestration import __version__
from orchestration.config import RunConfig, resolved_json
from orchestration.driver.runner import STAGES
from orchestration.jobs.api import IdTaken, Job, Jobs
from orchestration.jobs.bundle import bundled, check_size
from orchestration.jobs.paths import absolute_path, load_located
from orchestration.run.context import Run
from orchestration.run.lease import current_holder
from pipelines.dataset.errors import ClusterError, ConfigError, JobError, StorageError
from pipelines.dataset.secrets import has_credentials, is_secret_name, redact

STOP_WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_WAIT_S = 300  # Ray kills a job 3 s after SIGTERM, which is too soon for a checkpoint
MAX_ID_ATTEMPTS = 20


@dataclass(frozen=True)
class Submission:
    """A run, checked and ready to be sent.

    Args:
        file: The configuration.
        overrides: As they were given; then those that make local paths absolute.
        config: What they come to.
        included: More files and folders.
        environment: Plain settings of the job's processes.
        resources: What the job's command itself takes, by the names of Ray's client.
        command: What the submitter typed.
    """

    file: Path
    overrides: tuple[str, ...]
    config: RunConfig
    command: str
    included: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, Any] = field(default_factory=dict)

    @property
    def entrypoint(self) -> str:
        """The job's command."""
        name = f"./{self.file.name}" if self.file.name.startswith("-") else self.file.name
        return shlex.join(["mapo", "run", name, *(part for each in self.overrides for part in ("-o", each))])

    def metadata(self) -> dict[str, str]:
        """What `ray job list` and the dashboard show; the last one tells this submission from every other."""
        return {
            "mapo_run": self.config.name,
            "mapo_storage": storage_name(self.config),
            "mapo_config": hashlib.sha256(resolved_json(self.config).encode()).hexdigest()[:16],
            "mapo_version": __version__,
            "mapo_command": self.command,
            "mapo_by": submitter(),
            "mapo_submission": uuid.uuid4().hex,
        }


def prepare(
    file: str | Path,
    overrides: Sequence[str],
    *,
    command: str,
    included: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    resources: Mapping[str, Any] | None = None,
) -> Submission:
    """Check everything that can be checked without the cluster.

    Raises:
        ConfigError: The configuration is wrong or not whole, a setting is secret, or there is nothing to include.
    """
    config, every = load_located(file, overrides)
    missing = sorted({s.section for s in STAGES.values() if s.section and getattr(config, s.section) is None})
    if missing:
        raise ConfigError(
            f"{file} has no `{'`, `'.join(missing)}`, which `mapo run` needs",
            "docs/reference/configuration.md has every section with its keys",
        )
    for name, value in (environment or {}).items():
        _check_plain(name, value)
    submission = Submission(
        Path(file), every, config, command, tuple(Path(path) for path in included),
        {STOP_WAIT_VARIABLE: str(STOP_WAIT_S), **(environment or {})}, dict(resources or {}),
    )  # fmt: skip
    check_size(submission.file, submission.included)
    return submission


def submit(submission: Submission, jobs: Jobs) -> Job:
    """Start the job, unless a job of the same run lives; of several submits at the same moment exactly one does.

    Raises:
        JobError: A job of this run lives.
        ClusterError: The cluster does not take it.
    """
    metadata, config = submission.metadata(), submission.config
    with bundled(submission.file, submission.included) as folder:
        runtime_env = {"working_dir": str(folder), "env_vars": dict(submission.environment)}
        for _ in range(MAX_ID_ATTEMPTS):
            known = jobs.all()
            live = [job for job in jobs_of(config, known) if job.is_live]
            if live:
                raise _refusal(live[-1], jobs, config)
            job_id = next_id(config.name, [job.id for job in known])
            try:
                jobs.submit(
                    job_id, submission.entrypoint, runtime_env=runtime_env, metadata=metadata,
                    resources=submission.resources,
                )  # fmt: skip
            except IdTaken:
                continue  # somebody was faster; a look shows with which run
            found = jobs.find(job_id)
            if found is not None:
                return found
    raise ClusterError(
        f"{jobs.address} gave none of {MAX_ID_ATTEMPTS} submission ids of run {config.name}",
        "many submit runs of this name at this moment; try again",
    )


def next_id(name: str, taken: Sequence[str]) -> str:
    """The submission id after those that jobs of this run name have."""
    numbers = (re.fullmatch(rf"mapo-{re.escape(name)}-(\d+)", job_id) for job_id in taken)
    return f"mapo-{name}-{max((int(match[1]) for match in numbers if match), default=0) + 1}"


def jobs_of(config: RunConfig, known: Sequence[Job]) -> list[Job]:
    """The jobs that `mapo submit` began for a run: same name, same storage; the newest last."""
    run = (config.name, storage_name(config))
    return [job for job in known if (job.metadata.get("mapo_run"), job.metadata.get("mapo_storage")) == run]


def find_job(config: RunConfig, jobs: Jobs) -> Job | None:
    """The newest job of a run that `mapo submit` began; else the job that drives it, whatever began that."""
    if found := jobs_of(config, jobs.all()):
        return found[-1]
    run = Run.open(config, lambda line: None)
    try:
        holder = current_holder(run.storage, run.folder)
    except StorageError:  # a cluster's storage need not be reached from here
        return None
    return jobs.find(holder.job) if holder and holder.job else None


def storage_name(config: RunConfig) -> str:
    """The storage as jobs are told apart by it: the same for every way to write one place, links aside."""
    path = config.storage.removeprefix("file://")
    return path.rstrip("/") if "://" in path else absolute_path(path)


def submitter() -> str:
    """Who submits: user and machine."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _refusal(job: Job, jobs: Jobs, config: RunConfig) -> JobError:
    by = f", submitted by {job.metadata['mapo_by']}" if "mapo_by" in job.metadata else ""
    return JobError(
        f"run {config.name} on {config.storage} has a live job: {job.id}, {job.state} since {job.started_at}{by}, "
        f"on {jobs.address}",
        "`mapo logs CONFIG --follow` shows what it does, `mapo stop CONFIG` ends it; another `name` is another run",
    )


def _check_plain(name: str, value: str) -> None:
    """A setting that anyone may read: neither a secret by its name, nor one of this process's, nor options with one.

    Raises:
        ConfigError: It is none; the message does not repeat the value.
    """
    if is_secret_name(name) or has_credentials(value) or redact(value) != value or _has_secret_key(value):
        raise ConfigError(
            f"--env {name} looks like a secret, and what a job is sent with is shown by `ray job list` and dashboards",
            "set it in the environment of the cluster's nodes: on Kubernetes by a Secret, on machines by their role",
        )


def _has_secret_key(value: str) -> bool:
    """Whether a value is JSON with the name of a secret among its keys, such as FSSPEC_S3 may have."""
    try:
        waiting = [json.loads(value)]
    except ValueError:
        return False
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            if any(is_secret_name(key) for key in found):
                return True
            waiting += found.values()
        elif isinstance(found, list):
            waiting += found
    return False
