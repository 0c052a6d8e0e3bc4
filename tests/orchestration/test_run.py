"""`mapo run` from parquet to a report, as a user runs it: the installed command, in a folder with the same names."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from factories import photo_pairs, write_parquet
from installed import copy_source, pip, write_namesakes

from orchestration import __version__
from orchestration.config import load_config
from orchestration.run.context import Run
from orchestration.stages import ingest
from pipelines.dataset.errors import DropBudgetExceeded
from pipelines.dataset.table import Table

CANARIES = {name: f"canary-of-{name.lower()}-7f3a" for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY")}
NUM_ROWS, NUM_TIES, NUM_DAMAGED = 96, 4, 8
SCORER = """
class Brightness:
    name = 'brightness'
    description = 'of all pixels'
    def fit(self, chosen, rejected, prompts): pass
    def score(self, images, prompts): return [1.0 for _ in images]
"""
WITHOUT_METADATA = """
import importlib.metadata as metadata
of_package = metadata.version
def version(name):
    if name == 'mapo':
        raise metadata.PackageNotFoundError(name)
    return of_package(name)
metadata.version = version
"""


class Mapo:
    """The installed command, called in a folder that has three packages with the names of mapo's."""

    def __init__(self, packages: Path, cwd: Path) -> None:
        self._command, self._cwd = packages / "bin" / "mapo", cwd
        self._path = os.pathsep.join(map(str, (cwd, packages)))

    def __call__(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **CANARIES, "PYTHONWARNINGS": "ignore", "PYTHONPATH": self._path}
        environment.pop("RAY_ADDRESS", None)
        return subprocess.run(
            [self._command, *map(str, arguments)], capture_output=True, text=True, cwd=self._cwd, env=environment,
            timeout=900, check=False,
        )  # fmt: skip


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Every object below a folder with its time of change and its size."""
    files = (found for found in sorted(folder.rglob("*")) if found.is_file())
    return {str(f.relative_to(folder)): (f.stat().st_mtime_ns, f.stat().st_size) for f in files}


@pytest.fixture(scope="module")
def configuration(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    rows = photo_pairs(NUM_ROWS, num_ties=NUM_TIES, num_damaged=NUM_DAMAGED, num_prompts=8)
    write_parquet(folder / "data" / "pairs.parquet", rows, row_group_size=32)
    train = {"num_workers": 2, "global_batch_size": 8, "micro_batch_size": 2, "max_steps": 4, "learning_rate": 1e-4}
    train |= {"precision": "fp32", "checkpoint_every": 2, "validate_every": 2}
    settings = {
        "name": "small",
        "storage": str(folder / "storage"),
        "ingest": {
            "sources": [{"format": "pickapic", "path": str(folder / "data" / "*.parquet")}],
            "validation_ratio": 0.3,
            "max_drop_ratio": 0.1,
        },
        "encode": {"model": str(tiny_pipeline), "resolution": 64, "batch_size": 8},
        "train": train,
        "evaluate": {"num_samples": 3, "num_inference_steps": 2, "batch_size": 2, "scorers": ["bright:Brightness"]},
    }
    (folder / "bright.py").write_text(SCORER)
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(scope="module")
def mapo(configuration: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapo:
    source = copy_source(tmp_path_factory.mktemp("source") / "mapo")
    packages = tmp_path_factory.mktemp("installed") / "packages"
    pip("install", "--target", packages, source)
    write_namesakes(configuration.parent)
    return Mapo(packages, configuration.parent)


@pytest.fixture(scope="module")
def finished(mapo: Mapo, configuration: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    result = mapo("run", configuration)
    assert result.returncode == 0, result.stderr
    return configuration.parent / "storage", result


def test_a_run_says_who_trained_and_where_report_and_model_are(finished) -> None:
    storage, result = finished
    for rank in (0, 1):
        assert re.search(rf"rank {rank} of world size 2: DeepSpeed ZeRO stage 2, pid \d+", result.stdout)
    assert result.stdout.rstrip().splitlines()[-2:] == [
        f"report  {storage}/runs/small/report/index.html",
        f"model   {storage}/runs/small/model",
    ]


def test_a_scorer_of_the_folder_is_found_and_packages_of_its_names_are_not(finished) -> None:
    _, result = finished
    assert "brightness 1.00" in result.stdout


def test_a_source_tree_without_metadata_exports(finished, configuration: Path, tmp_path: Path) -> None:
    """As a job's working folder, on nodes that have the packages and no `mapo`."""
    storage, _ = finished
    source = copy_source(tmp_path / "source")
    (source / "sitecustomize.py").write_text(WITHOUT_METADATA)
    shutil.copytree(storage, tmp_path / "again")
    (tmp_path / "again/runs/small/stages/export.json").unlink()
    environment = {**os.environ, "PYTHONPATH": str(source), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "mapo_entry", "export", configuration, "-o", f"storage={tmp_path}/again"],
        cwd=configuration.parent, env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"^export +\d+\.\d s ", done.stdout, re.MULTILINE)
    lineage = json.loads((tmp_path / "again/runs/small/model/lineage.json").read_text())
    assert lineage["mapo"] == __version__


def test_no_secret_of_the_environment_is_in_what_is_written_or_said(finished) -> None:
    storage, result = finished
    written = [file.read_bytes() for file in storage.rglob("*") if file.is_file()]
    assert len(written) > 50
    for canary in CANARIES.values():
        assert canary not in result.stdout + result.stderr
        assert not any(canary.encode() in data for data in written)


def test_libraries_are_quiet(finished) -> None:
    _, result = finished
    assert "Traceback" not in result.stderr
    noise = [line for line in result.stderr.splitlines() if not re.match(r"(ingest|encode|train|evaluate)[ :]", line)]
    assert noise == []


def test_the_same_command_again_changes_no_object(finished, configuration, mapo: Mapo) -> None:
    storage, _ = finished
    before = state(storage)
    again = mapo("run", configuration)
    assert again.returncode == 0, again.stderr
    for stage in ("ingest", "encode", "train", "export", "evaluate", "report"):
        assert re.search(rf"^{stage} +up to date", again.stdout, re.MULTILINE)
    assert state(storage) == before


def test_a_table_that_has_not_changed_is_not_read_again_and_a_changed_limit_is_held_against_it(
    finished, configuration, monkeypatch
) -> None:
    def is_done(*overrides: str) -> bool:
        run = Run.open(load_config(configuration, overrides), print)
        return ingest.look(run).is_done

    with pytest.raises(DropBudgetExceeded, match=f"dropped {NUM_DAMAGED} of {NUM_ROWS} rows"):
        is_done("ingest.max_drop_ratio=0.01")
    assert not is_done("ingest.validation_ratio=0.9")
    monkeypatch.setattr(Table, "batches", None)
    monkeypatch.setattr(Table, "read", None)
    assert is_done()


def test_data_show_accounts_for_every_row(finished, mapo: Mapo) -> None:
    storage, _ = finished
    shown = json.loads(mapo("data", "show", storage, "--json").stdout)
    assert shown["rows"] == {"kept": 84, "tie": NUM_TIES, "duplicate": 0, "quarantined": NUM_DAMAGED}
    assert sum(shown["rows"].values()) == NUM_ROWS
    assert shown["reasons"]["truncated_image"] == 2
    assert [set(shard) for shard in shown["shards"]] == [{"path", "bytes", "sha256", "pairs"}] * len(shown["shards"])
    assert sum(shard["pairs"] for shard in shown["shards"]) == 84 + NUM_TIES
    assert [latents["pairs"] for latents in shown["latents"]] == [84]


def test_status_tells_stages_and_last_numbers(finished, configuration, mapo: Mapo) -> None:
    told = json.loads(mapo("status", configuration, "--json").stdout)
    assert [stage["state"] for stage in told["stages"]] == ["up to date"] * 6
    assert told["training"]["step"] == told["training"]["max_steps"] == 4
    assert "validation_implicit_accuracy" in told["training"]["last"]


def test_a_changed_setting_makes_stale_what_follows_from_it_and_nothing_else(
    finished, configuration, mapo: Mapo
) -> None:
    told = json.loads(mapo("status", configuration, "--json", "-o", "train.learning_rate=2.0e-4").stdout)
    states = {stage["stage"]: stage["state"] for stage in told["stages"]}
    assert states["ingest"] == states["encode"] == "up to date"
    assert states["train"] == "stale"


def test_the_export_is_a_pipeline_with_the_trained_weights(finished, tiny_pipeline) -> None:
    from diffusers import StableDiffusionXLPipeline

    storage, _ = finished
    model = storage / "runs" / "small" / "model"
    aligned = StableDiffusionXLPipeline.from_pretrained(model, dtype=torch.float32)
    base = StableDiffusionXLPipeline.from_pretrained(tiny_pipeline, dtype=torch.float32)
    changed = [not torch.equal(a, b) for a, b in zip(aligned.unet.parameters(), base.unet.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)
    for a, b in zip(aligned.vae.parameters(), base.vae.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (model / "README.md").read_text().startswith("---\n")


def test_the_report_shows_both_ranks_and_the_accounting(finished) -> None:
    storage, _ = finished
    page = (storage / "runs" / "small" / "report" / "index.html").read_text()
    record = json.loads((storage / "runs" / "small" / "stages" / "train.json").read_text())
    digests = [worker["digest"] for worker in record["details"]["workers"]]
    assert len(set(digests)) == 2
    assert all(digest in page for digest in digests)
    assert "truncated_image" in page


def test_the_resolved_configuration_lies_beside_the_run(finished) -> None:
    storage, _ = finished
    saved = json.loads((storage / "runs" / "small" / "config.json").read_text())
    assert saved["train"]["max_grad_norm"] == 1.0
    assert saved["encode"]["buckets"] is True


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("train.num_worker=2", 2, "did you mean `train.num_workers`?"),
        ("ingest.sources.0.path=/nowhere/*.parquet", 1, "no file matches /nowhere/*.parquet"),
        ("encode.model={folder}/data", 1, "has no model_index.json"),
        ("encode.model={folder}/none", 1, "there is no model folder"),
        ("storage={folder}/small.yaml/below", 1, "cannot write"),
        ("storage=s3://id:hunter22@bucket/x", 2, "the configuration contains a secret, at `storage`"),
        (
            "train.environment.HF_TOKEN=hunter22",
            2,
            "the configuration contains a secret, at `train.environment.HF_TOKEN`",
        ),
    ],
)
def test_bad_input_is_one_message_with_a_way_out_and_leaves_nothing(
    mapo: Mapo, configuration: Path, override: str, code: int, message: str, tmp_path: Path
) -> None:
    folder = configuration.parent
    before = state(folder)
    overrides = [f"storage={tmp_path / 'storage'}", override.format(folder=folder)]
    result = mapo("run", configuration, *(part for o in overrides for part in ("-o", o)))
    assert result.returncode == code
    assert message in result.stderr
    assert result.stderr.count("hint: ") == 1
    assert "Traceback" not in result.stderr
    assert "hunter22" not in result.stderr
    assert state(folder) == before
    assert state(tmp_path) == {}
