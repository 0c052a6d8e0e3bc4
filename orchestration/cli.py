"""The `mapo` command. Exit codes: 0 done, 1 the job failed, 2 the command or the configuration is wrong."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from orchestration.commands.data import add_data_commands
from orchestration.commands.infra import add_infra_commands
from orchestration.commands.jobs import add_job_commands, job_of, job_text
from orchestration.commands.lineage import add_lineage_command
from pipelines.dataset.errors import ConfigError, MapoError
from pipelines.dataset.secrets import redact

if TYPE_CHECKING:
    from orchestration.config import RunConfig

EXIT_FAILED, EXIT_WRONG, EXIT_INTERRUPTED = 1, 2, 130

STAGE_HELP = {
    "ingest": "bring the table of pairs up to date with the sources",
    "encode": "make the latents and text embeddings that are missing",
    "train": "train with DeepSpeed ZeRO on Ray Train, from the last checkpoint if there is one",
    "export": "write the trained model as diffusers loads it",
    "evaluate": "sample and score the base and the aligned model",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    options = parser().parse_args(arguments)

    try:
        return options.action(options) or 0
    except MapoError as error:
        if options.debug:
            traceback.print_exc()
        sys.stderr.write(redact(f"{type(error).__name__}: {error}\n"))
        return error.exit_code
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"{str(stop) or 'interrupted'}; run the same command again to go on\n")
        return EXIT_INTERRUPTED
    except Exception as error:  # a bug of ours: say so in one message, keep the traceback for --debug
        if options.debug:
            raise
        cause = getattr(error, "cause", None) or error  # what a Ray worker raised
        what = f"{type(cause).__name__}: {str(cause).strip() or 'no message'}"
        sys.stderr.write(f"{redact(what)}\nhint: this looks like a bug in mapo; `--debug` shows where\n")
        return EXIT_FAILED


def entry() -> None:
    """The console script.

    Leaves without Python's teardown: Arrow's read-ahead threads may be inside a Python file system at that moment,
    and the interpreter then ends the process with SIGABRT instead of our exit code.
    """
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def parser() -> argparse.ArgumentParser:
    """The command line; every command has help."""
    top = argparse.ArgumentParser(prog="mapo", description="Preference alignment of SDXL at cluster scale.")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = _command(commands, "demo", "photos in, an aligned model and a report out; no GPU, no network", _demo)
    demo.add_argument(
        "folder", nargs="?", default="runs/demo", metavar="DIR", help="where to work (default: %(default)s)"
    )
    demo.add_argument(
        "-o", dest="overrides", action="append", default=[], metavar="key.path=value", help="override a setting"
    )
    add_run_command(commands)
    for stage, text in STAGE_HELP.items():
        command = _configured(_command(commands, stage, text, _stage))
        command.set_defaults(stage=stage)
    status = _configured(_command(commands, "status", "stages, progress, last metrics", _status))
    status.add_argument("--json", action="store_true", help="as JSON")
    status.add_argument("--address", metavar="URL", help="also the run's Ray job there, such as http://head:8265")
    _configured(_command(commands, "report", "write the run's page and the index of runs, as they are now", _report))
    add_job_commands(partial(_command, commands), _configured)
    add_lineage_command(partial(_command, commands))
    data = commands.add_parser("data", help="look after a data set", description="Look after a data set.")
    views = data.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_data_commands(partial(_command, views))
    infra = commands.add_parser("infra", help="bring a cluster up", description="Bring a cluster up.")
    manifests = infra.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_infra_commands(partial(_command, manifests), _configured)
    return top


def add_run_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`mapo run`."""
    run = _configured(_command(commands, "run", "all stages; what is up to date is skipped", _run))
    run.add_argument("--dry-run", action="store_true", help="only print the plan: stages, and the work that waits")
    run.add_argument("--json", action="store_true", help="the plan of --dry-run as JSON")
    run.add_argument(
        "--every", metavar="TIME", help="run again and again, so much time after the start before: 90m, 6h, 7d"
    )


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    text: str,
    action: Callable[[argparse.Namespace], int | None],
) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.add_argument("--debug", action="store_true", help="show tracebacks")
    command.set_defaults(action=action)
    return command


def _configured(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument("config", metavar="CONFIG", help="YAML file")
    command.add_argument(
        "-o", dest="overrides", action="append", default=[], metavar="key.path=value", help="override a setting"
    )
    return command


def _say(line: str) -> None:
    sys.stdout.write(redact(line) + "\n")
    sys.stdout.flush()


def _load(options: argparse.Namespace) -> "RunConfig":
    from orchestration.config import load_config
    from orchestration.jobs.paths import check_inside_job, load_located

    check_inside_job(load_config(options.config, options.overrides), _say)
    return load_located(options.config, options.overrides)[0]


def _run(options: argparse.Namespace) -> int:
    from orchestration.commands.every import run_every
    from orchestration.driver.plan import BLOCKED
    from orchestration.driver.runner import plan_run, run_all

    def load() -> "RunConfig":
        return _load(options)

    if options.json and not options.dry_run:
        raise ConfigError("--json is for --dry-run", "`mapo status --json` tells of a run as JSON")
    if options.dry_run:
        described, lines = plan_run(load())
        _say(_json(described) if options.json else "\n".join(lines))
        return EXIT_FAILED if any(stage["state"] == BLOCKED for stage in described["stages"]) else 0
    if options.every is None:
        run_all(load(), _say)
    else:
        run_every(options.every, load, _say)
    return 0


def _stage(options: argparse.Namespace) -> None:
    from orchestration.driver.runner import run_stages

    run_stages(_load(options), [options.stage], _say)


def _status(options: argparse.Namespace) -> None:
    from orchestration.commands.status import describe_run, status_text
    from orchestration.jobs.paths import load_located

    config, _ = load_located(options.config, options.overrides)
    described = describe_run(config)
    if options.address is not None:
        described["job"] = job_of(config, options.address)
    _say(_json(described) if options.json else status_text(described))
    if options.address is not None and not options.json:
        _say(job_text(described["job"]))


def _report(options: argparse.Namespace) -> None:
    from orchestration.report.writer import report_now

    report_now(_load(options), config_file=options.config, say=_say)


def _json(data: object) -> str:
    import json

    return json.dumps(data, indent=2)


def _demo(options: argparse.Namespace) -> None:
    from orchestration.demo.run import run_demo

    run_demo(options.folder, options.overrides, _say)
