"""What importing costs: configuration and `--help` are light, the contract between the floors is free of frameworks."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestration import __version__

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
DATASET = sorted(f"pipelines.dataset.{file.stem}" for file in (ROOT / "pipelines" / "dataset").glob("[a-z]*.py"))
HEAVY = ("ray", "torch", "diffusers", "transformers", "deepspeed", "accelerate")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(command), capture_output=True, text=True, cwd=ROOT, timeout=400, check=True)


def loaded_by(*modules: str) -> set[str]:
    """The top-level packages that a fresh interpreter holds after importing `modules`."""
    code = f"import {', '.join(modules)}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(run(sys.executable, "-c", code).stdout.split())


@pytest.mark.parametrize("module", ["orchestration.config", "training.config", "pipelines.config"])
def test_configuration_is_light(module: str) -> None:
    assert not loaded_by(module) & {*HEAVY, "deltalake", "pyarrow"}


def test_the_contract_between_the_floors_is_free_of_frameworks() -> None:
    assert "pipelines.dataset.table" in DATASET
    assert not loaded_by(*DATASET) & set(HEAVY)


def test_the_command_line_is_light() -> None:
    assert not loaded_by("orchestration.cli") & {*HEAVY, "deltalake", "pyarrow", "pydantic", "yaml"}


def test_help_answers_within_a_second() -> None:
    times = []
    for _ in range(3):
        started = time.monotonic()
        run(BIN / "mapo", "--help")
        times.append(time.monotonic() - started)
    assert min(times) < 1.0


def test_the_version_is_that_of_the_package() -> None:
    assert run(BIN / "mapo", "--version").stdout == f"mapo {__version__}\n"
    assert loaded_by("orchestration") == loaded_by("mapo_entry") | {"orchestration"}


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["data", "show", "--help"]], ids=" ".join)
def test_the_module_is_the_console_script(arguments: list[str]) -> None:
    script = run(BIN / "mapo", *arguments).stdout
    assert script
    assert run(sys.executable, "-m", "orchestration", *arguments).stdout == script


def test_the_floors_import_downwards_only() -> None:
    assert "0 broken" in run(BIN / "lint-imports", "--no-cache").stdout
