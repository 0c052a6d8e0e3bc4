"""Installed beside anything: a folder with the names of mapo's packages changes nothing, and nothing is missing."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from factories import photo_pairs, write_parquet
from installed import NAMES, ROOT, copy_source, pip, write_namesakes
from ray_head import BIN, RayHead, ray_head

from orchestration import __version__

STAGES = ("ingest", "encode", "train", "export", "evaluate", "report")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the package is built from, without metadata."""
    return copy_source(tmp_path_factory.mktemp("source") / "mapo")


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the package was installed, not editable; it stands for site-packages."""
    folder = tmp_path_factory.mktemp("installed") / "packages"
    pip("install", "--target", folder, copy_source(source.parent / "to-install"))
    return folder


@pytest.fixture(scope="module")
def workplace(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a small run, a scorer, and three packages that have mapo's names."""
    folder = tmp_path_factory.mktemp("workplace")
    write_parquet(folder / "data" / "pairs.parquet", photo_pairs(12, num_prompts=4), row_group_size=12)
    settings = {
        "name": "small",
        "storage": "storage",
        "ingest": {"sources": [{"format": "pickapic", "path": "data/*.parquet"}], "validation_ratio": 0.3},
        "encode": {"model": str(tiny_pipeline), "resolution": 64, "batch_size": 8},
        "train": {"num_workers": 1, "global_batch_size": 2, "micro_batch_size": 2, "max_steps": 1, "precision": "fp32",
                  "checkpoint_every": 1, "validate_every": 1, "learning_rate": 1e-4},
        "evaluate": {"num_samples": 1, "num_inference_steps": 1, "batch_size": 1},
    }  # fmt: skip
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    write_namesakes(folder)
    return folder


def run(*command: str | Path, cwd: Path, path: list[Path]) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with a PYTHONPATH, on no cluster that is there."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment = kept | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=environment, timeout=900, check=False
    )


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head() as started:
        yield started


def ended_well(done: subprocess.CompletedProcess[str], stages: tuple[str, ...]) -> bool:
    """Tell whether a command did these stages; the assertion shows what it said."""
    assert done.returncode == 0, done.stdout + done.stderr
    return all(re.search(rf"^{stage} +\d+\.\d s ", done.stdout, re.MULTILINE) for stage in stages)


def submit(head: RayHead, installed: Path, workplace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Submit the installed command from the user's folder with Ray's own command line, and wait for its end."""
    environment = {"PYTHONPATH": str(installed), "RAY_raylet_start_wait_time_s": "60"}
    command = [BIN / "ray", "job", "submit", "--address", head.url, "--working-dir", "."]
    command += ["--runtime-env-json", json.dumps({"env_vars": environment, "excludes": ["storage", "again"]})]
    return subprocess.run(
        [*command, "--", installed / "bin" / "mapo", *arguments, "-o", f"storage={workplace}/of-jobs",
         "-o", f"ingest.sources.0.path={workplace}/data/*.parquet"],
        cwd=workplace, env=head.environment(), capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip


def test_a_job_from_a_folder_with_the_same_names_ends_well(head: RayHead, installed: Path, workplace: Path) -> None:
    done = submit(head, installed, workplace, "ingest", "small.yaml")
    assert ended_well(done, ("ingest",))


@pytest.mark.slow
def test_a_whole_run_as_such_a_job_ends_well(head: RayHead, installed: Path, workplace: Path) -> None:
    done = submit(head, installed, workplace, "run", "small.yaml", "-o", "name=whole")
    assert ended_well(done, STAGES[1:])


def test_an_installed_package_holds_every_file_of_the_source(installed: Path) -> None:
    for name in NAMES:
        held = {file.relative_to(installed) for file in (installed / name).rglob("*") if file.suffix != ".pyc"}
        assert held >= {file.relative_to(ROOT) for file in (ROOT / name).rglob("*") if is_needed(file)}
        assert (installed / name / "py.typed").exists()
    (metadata,) = installed.glob("mapo-*.dist-info/METADATA")
    assert f"\nVersion: {__version__}\n" in metadata.read_text()


def is_needed(file: Path) -> bool:
    return "__pycache__" not in file.parts


def test_an_import_beside_a_package_of_that_name_says_where_both_are(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").touch()
    done = run(sys.executable, "-c", "import training, orchestration", cwd=tmp_path, path=[tmp_path, installed])
    assert done.returncode == 1
    assert f"ImportError: `training` is imported already, from {tmp_path}/training" in done.stderr
    done = run(sys.executable, "-c", "import orchestration, training.losses", cwd=tmp_path, path=[tmp_path, installed])
    assert done.returncode == 0, done.stderr


def test_an_import_beside_a_module_of_that_name_says_where_both_are(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "training.py").touch()
    done = run(sys.executable, "-c", "import training, orchestration", cwd=tmp_path, path=[tmp_path, installed])
    assert done.returncode == 1
    assert f"ImportError: `training` is imported already, from {tmp_path}/training.py" in done.stderr


def test_only_processes_of_mapo_are_affected(installed: Path, workplace: Path) -> None:
    done = run(sys.executable, "-c", "import training", cwd=workplace, path=[workplace, installed])
    assert "imported the training of a user" in done.stderr
