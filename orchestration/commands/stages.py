"""`mapo ingest`, `encode`, `train`, `export`, `evaluate`: bring one stage of a run up to date."""

import argparse
from collections.abc import Callable

from orchestration.commands.options import CONFIGURED, Command, load, say

HELP = {
    "ingest": "bring the table of pairs up to date with the sources",
    "encode": "write the latents and text embeddings that are missing",
    "train": "train with DeepSpeed ZeRO on Ray Train; resume from the last checkpoint if there is one",
    "export": "write the trained model as a diffusers pipeline",
    "evaluate": "sample and score the base and the aligned model",
}


def _stage(name: str) -> Callable[[argparse.Namespace], None]:
    def run(options: argparse.Namespace) -> None:
        from orchestration.driver.runner import run_stages

        run_stages(load(options), [name], say)

    return run


COMMANDS = tuple(Command(name, text, _stage(name), CONFIGURED) for name, text in HELP.items())
