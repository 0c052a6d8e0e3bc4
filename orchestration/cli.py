"""The `mapo` command. Exit codes: 0 done, 1 the job failed, 2 the command or the configuration is wrong."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial

from orchestration.data_commands import add_data_commands

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
    from pipelines.dataset.errors import MapoError

    try:
        options.action(options)
    except MapoError as error:
        if options.debug:
            traceback.print_exc()
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to go on\n")
        return EXIT_INTERRUPTED
    except Exception as error:  # a bug of ours: say so in one message, keep the traceback for --debug
        if options.debug:
            raise
        cause = getattr(error, "cause", None) or error  # what a Ray worker raised
        what = f"{type(cause).__name__}: {str(cause).strip() or 'no message'}"
        sys.stderr.write(f"{what}\nhint: this looks like a bug in mapo; `--debug` shows where\n")
        return EXIT_FAILED
    return 0


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
    _configured(_command(commands, "run", "all stages; what is up to date is skipped", _run))
    for stage, text in STAGE_HELP.items():
        command = _configured(_command(commands, stage, text, _stage))
        command.set_defaults(stage=stage)
    status = _configured(_command(commands, "status", "stages, progress, last metrics", _status))
    status.add_argument("--json", action="store_true", help="as JSON")
    data = commands.add_parser("data", help="look after a data set", description="Look after a data set.")
    views = data.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_data_commands(partial(_command, views))
    return top


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    text: str,
    action: Callable[[argparse.Namespace], None],
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
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _run(options: argparse.Namespace) -> None:
    from orchestration.config import load_config
    from orchestration.stages import run_all

    run_all(load_config(options.config, options.overrides), _say)


def _stage(options: argparse.Namespace) -> None:
    from orchestration.config import load_config
    from orchestration.stages import run_stages

    run_stages(load_config(options.config, options.overrides), [options.stage], _say)


def _status(options: argparse.Namespace) -> None:
    from orchestration.config import load_config
    from orchestration.status import describe_run, status_text

    described = describe_run(load_config(options.config, options.overrides))
    _say(_json(described) if options.json else status_text(described))


def _json(data: object) -> str:
    import json

    return json.dumps(data, indent=2)


def _demo(options: argparse.Namespace) -> None:
    from orchestration.demo.run import run_demo

    run_demo(options.folder, options.overrides, _say)
