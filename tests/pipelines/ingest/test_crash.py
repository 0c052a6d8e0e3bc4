"""The crash matrix: whatever is killed whenever, a rerun gives exactly the rows and bytes of an undisturbed run."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from crash import INGEST, INGEST_VICTIMS, SURVIVED, Job, Kill, run_killed, run_to_the_end
from factories import photo_pairs, write_parquet

from pipelines.config import IngestConfig, SourceConfig
from pipelines.dataset.layout import PAIRS, SHARDS, pairs_table
from pipelines.dataset.storage import Storage
from pipelines.ingest.committer import Committer
from pipelines.ingest.execution import plan_units, write_unit
from pipelines.ingest.policy import Policy
from pipelines.maintenance.verify import verify

SEEDS = range(40)
SHORT = (4,)  # a raylet; test_ingest.py kills drivers, and `make chaos` everything


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> IngestConfig:
    file = tmp_path_factory.mktemp("photos") / "photos.parquet"
    rows = photo_pairs(96, num_ties=4, num_damaged=8, sizes=((160, 120), (120, 160)))
    write_parquet(file, rows + rows[:5], row_group_size=6)
    sources = (SourceConfig(format="pickapic", path=str(file)),)
    return IngestConfig(sources=sources, max_shard_bytes=65_536, max_drop_ratio=1.0)


def contents(storage: Storage) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows, and the digest of every shard that one of them points to."""
    rows = sorted(pairs_table(storage).read().to_pylist(), key=lambda row: row["source_row"])
    names = sorted({row["shard"] for row in rows if row["shard"]})
    return rows, {name: hashlib.sha256(storage.read(name)).hexdigest() for name in names}


@pytest.fixture(scope="module")
def undisturbed(config: IngestConfig, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same in one process, without Ray."""
    storage = Storage(str(tmp_path_factory.mktemp("undisturbed")))
    committer = Committer(pairs_table(storage), Policy.of(config))
    for unit in plan_units(config):
        committer.append(unit.id, write_unit(unit, storage))
    return contents(storage)


def check(config: IngestConfig, storage: Storage, seed: int, wanted: Any, environment: dict[str, str]) -> None:
    kill = Kill.of(seed, len(plan_units(config)), INGEST_VICTIMS)
    job = Job(INGEST, config.model_dump_json(), SHARDS, PAIRS)
    code = run_killed(job, storage, kill, environment)
    assert code != 0 or kill.victim in SURVIVED, f"{kill} did not end it"
    if pairs_table(storage).version is not None:
        assert verify(storage) == [], "what is committed is whole, at any moment"
    run_to_the_end(job, storage, environment)
    assert contents(storage) == wanted, kill


@pytest.mark.slow
@pytest.mark.parametrize("seed", SHORT)
def test_a_killed_ingest_ends_like_an_undisturbed_one(
    config: IngestConfig, undisturbed: Any, tmp_path: Path, seed: int
) -> None:
    check(config, Storage(str(tmp_path / "storage")), seed, undisturbed, {})


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_crash_matrix_in_a_local_folder(config: IngestConfig, undisturbed: Any, tmp_path: Path, seed: int) -> None:
    check(config, Storage(str(tmp_path / "storage")), seed, undisturbed, {})


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS[:20])
def test_crash_matrix_on_s3(
    config: IngestConfig, undisturbed: Any, s3_storage: Storage, s3_server: dict[str, str], seed: int
) -> None:
    check(config, s3_storage, seed, undisturbed, s3_server)


def test_every_victim_is_in_the_matrix() -> None:
    assert {Kill.of(seed, 10, INGEST_VICTIMS).victim for seed in SEEDS[:5]} == set(INGEST_VICTIMS)
