"""`mapo submit`: run as a Ray job."""

import argparse
import json

from orchestration.commands.logs import ADDRESS, same_run, show_log
from orchestration.commands.options import CONFIGURED, Command, Option, note, say
from pipelines.dataset.errors import ConfigError


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
        note(f"note: every node of {jobs.address} must see these paths: {shown}")
    job = submit(submission, jobs)
    say(f"submitted {job.id} to {jobs.address}: {job.entrypoint}")
    same = same_run(options, jobs.address)
    if options.follow:
        show_log(jobs, job.id, same)
    else:
        say(f"`mapo logs {same} --follow` shows its log, `mapo stop {same}` stops it")


def parse_settings(given: list[str]) -> dict[str, str]:
    """Parse every `--env NAME=VALUE` of the command line.

    Raises:
        ConfigError: One is not NAME=VALUE.
    """
    settings = {}
    for each in given:
        name, separator, value = each.partition("=")
        if not separator or not name.isidentifier():
            raise ConfigError(f"--env {name}: not NAME=VALUE", "for example `--env NCCL_SOCKET_IFNAME=eth0`")
        settings[name] = value
    return settings


def _resources(options: argparse.Namespace) -> dict[str, float | dict[str, float]]:
    """Return the resources of the job's own command, by the names of Ray's client."""
    found: dict[str, float | dict[str, float]] = {}
    for name in ("entrypoint_num_cpus", "entrypoint_num_gpus", "entrypoint_memory"):
        if (amount := getattr(options, name)) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} {amount}: must not be negative")
        if amount:
            found[name] = amount
    if options.entrypoint_resources is not None:
        try:
            custom = json.loads(options.entrypoint_resources)
            found["entrypoint_resources"] = {str(name): float(amount) for name, amount in custom.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"--entrypoint-resources {options.entrypoint_resources}: not a JSON object of names and numbers",
                """for example '{"driver": 1}'""",
            ) from error
    return found


COMMANDS = (
    Command(
        "submit",
        "submit `mapo run` as a Ray job",
        _submit,
        (
            *CONFIGURED,
            ADDRESS,
            Option("--follow", "show the job's log and exit when it ends; Ctrl-C detaches"),
            Option("--env", "environment variable of the job; not for secrets", metavar="NAME=VALUE", is_repeated=True),
            Option(
                "--include",
                "file or folder to send with the configuration, such as a scorer's module",
                metavar="PATH",
                is_repeated=True,
            ),
            Option(
                "--entrypoint-num-cpus",
                "CPUs reserved for the command itself; without any of these four options it runs on the head",
                metavar="N",
                type=float,
                default=0,
            ),
            Option("--entrypoint-num-gpus", "GPUs reserved for it", metavar="N", type=float, default=0),
            Option("--entrypoint-memory", "memory reserved for it", metavar="BYTES", type=int, default=0),
            Option("--entrypoint-resources", 'custom resources reserved for it, such as {"driver": 1}', metavar="JSON"),
        ),
    ),
)
