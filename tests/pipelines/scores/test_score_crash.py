"""The kill matrix of scores: whatever dies whenever, the tables are those of an undisturbed run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from crash import CPUS_A_NODE, ENCODE_VICTIMS, NUM_NODES, SCORE, SURVIVED, Job, Kill, run_killed, run_to_the_end
from scored_images import formula_files, rows_of, score_here, write_images

from pipelines.config import ScorerEntry
from pipelines.dataset.layout import SCORES
from pipelines.dataset.storage import Storage
from pipelines.scores import plan
from pipelines.scores.judges import Judge, prepare_judges

SEEDS = range(20)
SHORT = (3,)  # an actor; `make chaos` has the others
NUM_UNITS, IMAGES_A_UNIT = 12, 8


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of twelve units."""
    storage = Storage(str(tmp_path_factory.mktemp("drawn") / "storage"))
    count = NUM_UNITS * IMAGES_A_UNIT
    images = write_images(storage, "a", formula_files(count, side=32), [f"a cat {n // 4}" for n in range(count)])
    pq.write_table(images, Path(storage.path()) / "images.parquet")
    return Path(storage.path())


@pytest.fixture
def storage(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "cache"))
    return Storage(str(shutil.copytree(drawn, tmp_path / "storage")))


def judges_of(storage: Storage, twins: Path) -> list[Judge]:
    return prepare_judges(entries(twins), storage)


def entries(twins: Path) -> list[ScorerEntry]:
    return [ScorerEntry(name=name, weights=str(twins), batch_size=4) for name in ("aesthetic", "clipscore")]


@pytest.fixture(scope="module")
def undisturbed(drawn: Path, twins: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same in one process, without Ray; with as many threads as an actor has, for bits depend on them."""
    storage = Storage(str(shutil.copytree(drawn, tmp_path_factory.mktemp("undisturbed") / "storage")))
    judges, before, unit = judges_of(storage, twins), torch.get_num_threads(), plan.IMAGES_A_UNIT
    plan.IMAGES_A_UNIT = IMAGES_A_UNIT
    try:
        score_here(storage, judges, pq.read_table(drawn / "images.parquet"), CPUS_A_NODE * NUM_NODES // 2)
    finally:
        plan.IMAGES_A_UNIT = unit
        torch.set_num_threads(before)
    return [rows_of(storage, judge) for judge in judges]


def check(storage: Storage, twins: Path, seed: int, wanted: Any) -> None:
    kill, judges = Kill.of(seed, NUM_UNITS, ENCODE_VICTIMS), judges_of(storage, twins)
    given = {
        "images": storage.path("images.parquet"), "images_a_unit": IMAGES_A_UNIT,
        "scorers": [entry.model_dump() for entry in entries(twins)],
    }  # fmt: skip
    table = f"{SCORES}/{judges[0].table_name}@{judges[0].fingerprint}/table"
    job = Job(SCORE, json.dumps(given), f"{table}/_delta_log", table, "*.json")
    code = run_killed(job, storage, kill, {})
    assert (code == 0) == (kill.victim in SURVIVED), kill
    if code:
        run_to_the_end(job, storage, {})
    assert [rows_of(storage, judge) for judge in judges] == wanted, kill
    parts = {part.name: part for judge in judges for part in judge.parts}
    assert all(storage.exists(f"cache/{file.sha256}") for part in parts.values() for file in part.files)


@pytest.mark.parametrize("seed", SHORT)
def test_killed_scoring_ends_like_an_undisturbed_one(
    storage: Storage, twins: Path, undisturbed: Any, seed: int
) -> None:
    check(storage, twins, seed, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_kill_matrix(storage: Storage, twins: Path, undisturbed: Any, seed: int) -> None:
    check(storage, twins, seed, undisturbed)


def test_every_victim_is_in_the_matrix() -> None:
    assert {Kill.of(seed, NUM_UNITS, ENCODE_VICTIMS).victim for seed in SEEDS[:5]} == set(ENCODE_VICTIMS)
