"""Submit a run as a Ray job: what is sent, under which id, and when it is refused.

The configuration file is sent, with the prompts and scorers' modules that it names, and what `--include` names;
overrides go on the job's command line. The cluster needs the installed package, and nothing else from this machine.
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
from orchestration.jobs.api import IdTaken, Job, Jobs
from orchestration.jobs.bundle import bundled, check_size
from orchestration.jobs.named_files import job_overrides, named_files
from orchestration.jobs.paths import absolute_path, load_located
from orchestration.run.context import Run
from orchestration.run.lease import current_holder
from orchestration.stages.registry import check_sections, stages_of
from pipelines.dataset.errors import ClusterError, ConfigError, JobError, StorageError
from pipelines.dataset.secrets import has_credentials, is_secret_name, redact

STOP_WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
STOP_WAIT_S = 300  # Ray kills a job 3 s after SIGTERM, which is too soon for a checkpoint
MAX_ID_ATTEMPTS = 20


@dataclass(frozen=True)
class Submission:
    """A run, checked and ready to be sent.

    Args:
        file: The configuration file.
        overrides: The given overrides, then those that make local paths absolute.
        config: The resolved configuration.
        included: More files and folders to send.
        environment: Environment variables of the job's processes; no secrets.
        resources: What the job's own command needs, by the names of Ray's client.
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
        """Return what `ray job list` and the dashboard show; `mapo_submission` is unique to each submission."""
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
        ConfigError: The configuration is wrong or incomplete, a variable looks secret, or an included file is missing.
    """
    config, every = load_located(file, overrides)
    check_sections(config, stages_of(config), str(file))
    for name, value in (environment or {}).items():
        _check_plain(name, value)
    sent = _sent(config, [Path(path) for path in included])
    submission = Submission(
        Path(file), (*every, *job_overrides(config)), config, command, sent,
        {STOP_WAIT_VARIABLE: str(STOP_WAIT_S), **(environment or {})}, dict(resources or {}),
    )  # fmt: skip
    check_size(submission.file, submission.included)
    return submission


def _sent(config: RunConfig, included: Sequence[Path]) -> tuple[Path, ...]:
    """Return the files that were asked for, and those that the configuration names."""
    known = {path.resolve() for path in included}
    return (*included, *(path for path in named_files(config) if path not in known))


def submit(submission: Submission, jobs: Jobs) -> Job:
    """Start the job unless the same run has a live job; of several concurrent submits exactly one succeeds.

    Raises:
        JobError: The run has a live job.
        ClusterError: The cluster does not accept the job.
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
                continue  # another submit was faster; look which run it was for
            found = jobs.find(job_id)
            if found is not None:
                return found
    raise ClusterError(
        f"{jobs.address}: {MAX_ID_ATTEMPTS} submission ids of run {config.name} were taken by other submits",
        "many are submitting runs of this name at the moment; try again",
    )


def next_id(name: str, taken: Sequence[str]) -> str:
    """Return the next submission id for jobs of this run name."""
    numbers = (re.fullmatch(rf"mapo-{re.escape(name)}-(\d+)", job_id) for job_id in taken)
    return f"mapo-{name}-{max((int(match[1]) for match in numbers if match), default=0) + 1}"


def jobs_of(config: RunConfig, known: Sequence[Job]) -> list[Job]:
    """List the jobs that `mapo submit` started for a run (same name, same storage), newest last."""
    run = (config.name, storage_name(config))
    return [job for job in known if (job.metadata.get("mapo_run"), job.metadata.get("mapo_storage")) == run]


def find_job(config: RunConfig, jobs: Jobs) -> Job | None:
    """Find the newest job of a run that `mapo submit` started, or else the job of its current driver."""
    if found := jobs_of(config, jobs.all()):
        return found[-1]
    run = Run.open(config, lambda line: None)
    try:
        holder = current_holder(run.storage, run.folder)
    except StorageError:  # a cluster's storage may be out of reach from here
        return None
    return jobs.find(holder.job) if holder and holder.job else None


def storage_name(config: RunConfig) -> str:
    """Return the storage in one normal form, by which jobs of runs with the same name are told apart."""
    path = config.storage.removeprefix("file://")
    return path.rstrip("/") if "://" in path else absolute_path(path)


def submitter() -> str:
    """Return the submitting user and machine."""
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
        "`mapo logs CONFIG --follow` shows its log, `mapo stop CONFIG` stops it; another `name` makes another run",
    )


def _check_plain(name: str, value: str) -> None:
    """Check that a variable is not secret: by its name, by a value in this process's environment, or inside JSON.

    Raises:
        ConfigError: It looks secret; the message does not repeat the value.
    """
    if is_secret_name(name) or has_credentials(value) or redact(value) != value or _has_secret_key(value):
        raise ConfigError(
            f"--env {name} looks like a secret, and `ray job list` and dashboards show what a job was sent with",
            "set it in the environment of the cluster's nodes: on Kubernetes by a Secret, on machines by their role",
        )


def _has_secret_key(value: str) -> bool:
    """Return whether a value is JSON with the name of a secret among its keys, as in FSSPEC_S3."""
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
