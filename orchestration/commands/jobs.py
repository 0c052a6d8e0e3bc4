"""`mapo submit`, `logs` and `stop`: a run as a Ray job."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestration.config import RunConfig
    from orchestration.jobs.api import Job, Jobs

NewCommand = Callable[[str, str, Callable[[argparse.Namespace], None]], argparse.ArgumentParser]
Configured = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]

EXIT_INTERRUPTED = 130
ADDRESS_HELP = "Ray's dashboard, such as http://head:8265 (default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS)"


def add_job_commands(new: NewCommand, configured: Configured) -> None:
    """Add the commands; each takes the configuration that names the run."""
    submit = configured(new("submit", "`mapo run` as a Ray job; what is up to date is skipped", _submit))
    submit.add_argument("--address", metavar="URL", help=ADDRESS_HELP)
    submit.add_argument("--follow", action="store_true", help="show the log and end as the job ends; Ctrl-C detaches")
    submit.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="a plain setting of the job's environment"
    )
    submit.add_argument(
        "--include", action="append", default=[], metavar="PATH",
        help="a file or folder that lies beside the configuration in the job, such as a scorer's module",
    )  # fmt: skip
    submit.add_argument(
        "--entrypoint-num-cpus", type=float, default=0, metavar="N",
        help="CPUs that the command itself takes; with none of these four it runs on the head (default: %(default)s)",
    )  # fmt: skip
    submit.add_argument(
        "--entrypoint-num-gpus", type=float, default=0, metavar="N", help="GPUs of the same (default: %(default)s)"
    )
    submit.add_argument(
        "--entrypoint-memory", type=int, default=0, metavar="BYTES", help="memory of the same (default: %(default)s)"
    )
    submit.add_argument("--entrypoint-resources", metavar="JSON", help='custom resources, such as {"driver": 1}')
    logs = configured(new("logs", "the log of a run's newest job", _logs))
    logs.add_argument("--address", metavar="URL", help=ADDRESS_HELP)
    logs.add_argument("--follow", action="store_true", help="go on until the job ends; Ctrl-C detaches")
    logs.add_argument("--job", metavar="ID", help="another job, by its submission id")
    stop = configured(new("stop", "end a run cleanly, so that the same command goes on later", _stop))
    stop.add_argument("--address", metavar="URL", help="end its Ray job too, if the run does not end by itself")
    stop.add_argument(
        "--timeout", default="5m", metavar="TIME",
        help="how long the run may take to end, with a last checkpoint: 90s, 5m, 1h (default: %(default)s)",
    )  # fmt: skip


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _note(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _submit(options: argparse.Namespace) -> None:
    from orchestration.jobs.api import Jobs
    from orchestration.jobs.client import resolve_address
    from orchestration.jobs.paths import shared_paths
    from orchestration.jobs.submit import prepare, submit
    from orchestration.run.context import command_line
    from pipelines.dataset.secrets import redact

    address = resolve_address(options.address)
    submission = prepare(
        options.config,
        options.overrides,
        command=redact(command_line()),
        included=options.include,
        environment=parse_settings(options.env),
        resources=_resources(options),
    )
    jobs = Jobs(address)
    paths = shared_paths(submission.config)
    if paths and not jobs.is_this_machine():
        shown = ", ".join(f"{key} {path}" for key, path in paths.items())
        _note(f"note: every node of {jobs.address} must see these paths: {shown}")
    job = submit(submission, jobs)
    _say(f"submitted {job.id} to {jobs.address}: {job.entrypoint}")
    same = shlex.join([options.config, *_repeated("-o", options.overrides), "--address", jobs.address])
    if options.follow:
        _follow(jobs, job.id, same)
    else:
        _say(f"`mapo logs {same} --follow` shows what it does, `mapo stop {same}` ends it")


def parse_settings(given: list[str]) -> dict[str, str]:
    """`--env NAME=VALUE` of the command line.

    Raises:
        ConfigError: One is of another form.
    """
    from pipelines.dataset.errors import ConfigError

    settings = {}
    for each in given:
        name, separator, value = each.partition("=")
        if not separator or not name.isidentifier():
            raise ConfigError(f"--env {name}: not NAME=VALUE", "for example `--env NCCL_SOCKET_IFNAME=eth0`")
        settings[name] = value
    return settings


def _resources(options: argparse.Namespace) -> dict[str, Any]:
    """What the job's command itself takes, by the names of Ray's client."""
    from pipelines.dataset.errors import ConfigError

    found: dict[str, Any] = {}
    for name in ("entrypoint_num_cpus", "entrypoint_num_gpus", "entrypoint_memory"):
        if (amount := getattr(options, name)) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} {amount}: less than nothing")
        if amount:
            found[name] = amount
    if options.entrypoint_resources is not None:
        try:
            custom = json.loads(options.entrypoint_resources)
            found["entrypoint_resources"] = {str(name): float(amount) for name, amount in custom.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"--entrypoint-resources {options.entrypoint_resources}: not JSON of names and numbers",
                """for example '{"driver": 1}'""",
            ) from error
    return found


def _repeated(option: str, values: list[str]) -> list[str]:
    return [part for value in values for part in (option, value)]


def _follow(jobs: "Jobs", job_id: str, same: str) -> None:
    """Show a job's log to its end; Ctrl-C leaves the job alone."""
    from orchestration.jobs.logs import check_success, follow

    try:
        job = follow(jobs, job_id, _write, _note)
    except KeyboardInterrupt:
        _note(f"\ndetached; {job_id} goes on: `mapo logs {same} --follow` shows it again, `mapo stop {same}` ends it")
        raise SystemExit(EXIT_INTERRUPTED) from None
    check_success(job)
    _note(f"job {job.id} succeeded")


def _logs(options: argparse.Namespace) -> None:
    from orchestration.config import load_config
    from orchestration.jobs.logs import unknown

    config = load_config(options.config, options.overrides)
    jobs = _connect(options.address)
    job = jobs.find(options.job) if options.job else _newest(config, jobs)
    if job is None:
        raise unknown(jobs, options.job)
    if options.follow:
        same = shlex.join([options.config, *_repeated("-o", options.overrides), "--address", jobs.address])
        return _follow(jobs, job.id, same)
    _write(jobs.log(job.id))
    ended = f", until {job.ended_at}" if job.ended_at else ""
    return _note(f"job {job.id}: {job.state} since {job.started_at}{ended}")


def _newest(config: "RunConfig", jobs: "Jobs") -> "Job":
    from orchestration.jobs.submit import find_job
    from pipelines.dataset.errors import ClusterError

    found = find_job(config, jobs)
    if found is None:
        raise ClusterError(
            f"{jobs.address} knows no job of run {config.name} on {config.storage} that `mapo submit` began",
            "`ray job list` shows all, `--job ID` takes any",
        )
    return found


def _stop(options: argparse.Namespace) -> None:
    from orchestration.commands.options import parse_duration
    from orchestration.config import load_config
    from orchestration.jobs.stop import stop_run

    timeout = parse_duration(options.timeout, "--timeout")
    config = load_config(options.config, options.overrides)
    jobs = _connect(options.address) if options.address else None
    stop_run(config, jobs, timeout_s=timeout.total_seconds(), say=_say)


def job_of(config: "RunConfig", address: str) -> dict[str, Any] | None:
    """The newest job of a run as plain data, for `mapo status`; None if there is none."""
    from orchestration.jobs.submit import find_job

    jobs = _connect(address)
    found = find_job(config, jobs)
    return {"address": jobs.address, **asdict(found)} if found else None


def job_text(job: dict[str, Any] | None) -> str:
    """The same for a terminal."""
    if job is None:
        return "job       none that `mapo submit` began"
    when = f"{job['started_at']}" + (f" to {job['ended_at']}" if job["ended_at"] else "")
    message = job["message"].splitlines()[0] if job["message"] else ""
    return f"job       {job['state']:<11} {job['id']}, since {when}, `{job['entrypoint']}`: {message}"


def _connect(address: str | None) -> "Jobs":
    from orchestration.jobs.api import Jobs
    from orchestration.jobs.client import resolve_address

    return Jobs(resolve_address(address))
