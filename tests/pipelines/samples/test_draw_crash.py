"""The kill matrix of drawing: whatever dies whenever, the tables and tars are those of an undisturbed run."""

from pathlib import Path
from typing import Any

import draw_work
import pytest
import torch
from crash import CPUS_A_NODE, ENCODE_VICTIMS, NUM_NODES, SURVIVED, Kill, run_killed, run_to_the_end
from draw_work import BATCH_SIZE, NUM_UNITS, NUM_WORKERS, drawings_of, job_of
from drawings import draw_here, tars_of

import pipelines.samples.plan
from pipelines.dataset.layout import samples_table
from pipelines.dataset.storage import Storage

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SEEDS = range(20)
SHORT = (3,)  # an actor; `make chaos` has the others


def contents(storage: Storage, model: Path, other: Path) -> tuple[list[Any], dict[str, str]]:
    """The rows of both tables, and the digest of every tar, whether a row points to it or not."""
    tables = [samples_table(storage, each.fingerprint) for each in drawings_of(model, other)]
    rows = [row for table in tables for row in table.read().to_pylist()]
    return sorted(rows, key=lambda row: row["sample_key"]), tars_of(storage)


@pytest.fixture(scope="module")
def undisturbed(tiny_pipeline: Path, other_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same in one process, without Ray; with as many threads as an actor has, for bits depend on them."""
    storage, before = Storage(str(tmp_path_factory.mktemp("undisturbed"))), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.samples.plan, "SAMPLES_A_UNIT", draw_work.SAMPLES_A_UNIT)
        for drawing in drawings_of(tiny_pipeline, other_pipeline):
            assert len(draw_here(storage, drawing, BATCH_SIZE, CPUS_A_NODE * NUM_NODES // NUM_WORKERS)) == NUM_UNITS
    torch.set_num_threads(before)
    return contents(storage, tiny_pipeline, other_pipeline)


def check(models: tuple[Path, Path], storage: Storage, seed: int, wanted: Any) -> None:
    kill, job = Kill.of(seed, NUM_UNITS, ENCODE_VICTIMS), job_of(*models)
    code = run_killed(job, storage, kill, {})
    assert (code == 0) == (kill.victim in SURVIVED), kill
    for row in contents(storage, *models)[0]:
        storage.read_range(row["shard"], row["offset"], row["length"], row["sha256"])  # whole, at any moment
    if code:
        run_to_the_end(job, storage, {})
    assert contents(storage, *models) == wanted, kill


@pytest.mark.parametrize("seed", SHORT)
def test_a_killed_drawing_ends_like_an_undisturbed_one(
    tiny_pipeline: Path, other_pipeline: Path, undisturbed: Any, storage: Storage, seed: int
) -> None:
    check((tiny_pipeline, other_pipeline), storage, seed, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_kill_matrix(tiny_pipeline: Path, other_pipeline: Path, undisturbed: Any, storage: Storage, seed: int) -> None:
    check((tiny_pipeline, other_pipeline), storage, seed, undisturbed)
