"""The kill matrix of encode: whatever dies whenever, the tables and tars are those of an undisturbed run."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from crash import CPUS_A_NODE, ENCODE, ENCODE_VICTIMS, NUM_NODES, SURVIVED, Job, Kill, run_killed, run_to_the_end
from encode_steps import encode_here, ingest_here
from factories import photo_pairs, write_parquet

from pipelines.config import EncodeConfig
from pipelines.dataset.layout import LATENTS, TEXT, latents_table, text_table
from pipelines.dataset.storage import Storage
from pipelines.encode.encoders import LatentEncoder, TextEncoder
from pipelines.encode.fingerprint import latents_fingerprint, text_fingerprint
from pipelines.maintenance.verify import verify

SEEDS = range(20)
SHORT = (4,)  # a node; `make chaos` has the others
NUM_UNITS = 12


@pytest.fixture(scope="module")
def config(tiny_pipeline: Path) -> EncodeConfig:
    return EncodeConfig(model=str(tiny_pipeline), resolution=96, batch_size=4, num_workers=2)


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pair shards."""
    folder = tmp_path_factory.mktemp("ingested")
    for number in range(NUM_UNITS):
        rows = photo_pairs(10, seed=number, sizes=((96, 96), (120, 80)), num_prompts=3)
        file = write_parquet(folder / "in" / f"{number:02d}.parquet", rows)
        ingest_here(Storage(str(folder / "storage")), file)
    return folder / "storage"


@pytest.fixture
def storage(ingested: Path, tmp_path: Path) -> Storage:
    return Storage(str(shutil.copytree(ingested, tmp_path / "storage")))


def contents(config: EncodeConfig, storage: Storage) -> tuple[list[Any], dict[str, str]]:
    """The rows of both tables, and the digest of every tar below their folders, whether a row points to it or not."""
    rows = latents_table(storage, latents_fingerprint(config)).read().to_pylist()
    rows += text_table(storage, text_fingerprint(config)).read().to_pylist()
    tars = [name for folder in (LATENTS, TEXT) for name in storage.names(folder) if name.endswith(".tar")]
    digests = {name: hashlib.sha256(storage.read(name)).hexdigest() for name in tars}
    return sorted(rows, key=lambda row: row.get("pair_key") or row["prompt_id"]), digests


@pytest.fixture(scope="module")
def undisturbed(config: EncodeConfig, ingested: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same in one process, without Ray; with as many threads as an actor has, for bits depend on them."""
    storage = Storage(str(shutil.copytree(ingested, tmp_path_factory.mktemp("undisturbed") / "storage")))
    before = torch.get_num_threads()
    num_threads = CPUS_A_NODE * NUM_NODES // config.worker_range[1]
    encode_here(config, storage, LatentEncoder(config.source), TextEncoder(config.source), num_threads)
    torch.set_num_threads(before)
    return contents(config, storage)


def job_of(config: EncodeConfig) -> Job:
    name = latents_fingerprint(config)
    return Job(ENCODE, config.model_dump_json(), f"{LATENTS}/{name}", f"{LATENTS}/{name}/table")


def check(config: EncodeConfig, storage: Storage, seed: int, wanted: Any) -> None:
    kill = Kill.of(seed, NUM_UNITS, ENCODE_VICTIMS)
    code = run_killed(job_of(config), storage, kill, {})
    assert (code == 0) == (kill.victim in SURVIVED), kill
    assert verify(storage) == [], "what is committed is whole, at any moment"
    if code:
        run_to_the_end(job_of(config), storage, {})
    assert contents(config, storage) == wanted, kill


@pytest.mark.parametrize("seed", SHORT)
def test_a_killed_encode_ends_like_an_undisturbed_one(
    config: EncodeConfig, undisturbed: Any, storage: Storage, seed: int
) -> None:
    check(config, storage, seed, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_kill_matrix(config: EncodeConfig, undisturbed: Any, storage: Storage, seed: int) -> None:
    check(config, storage, seed, undisturbed)


def test_every_victim_is_in_the_matrix() -> None:
    assert {Kill.of(seed, NUM_UNITS, ENCODE_VICTIMS).victim for seed in SEEDS[:5]} == set(ENCODE_VICTIMS)
