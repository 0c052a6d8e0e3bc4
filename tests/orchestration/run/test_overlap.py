"""Encode beside ingest: it begins before ingest ends, makes what it would have made afterwards, and fails alone."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from benchmarks.overlap import UNITS, SlowImages, contents, settings, write_sources
from orchestration.config import RunConfig
from orchestration.driver.runner import run_stages
from orchestration.run.context import Run
from pipelines.dataset.errors import ClusterError, ModelError
from pipelines.dataset.layout import latents_table, pairs_table
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.encode.fingerprint import latents_fingerprint
from pipelines.resources import total_of

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_PAIRS, DELAY_S = 32, 1.0  # ingest takes longer than an encoder takes to start


@pytest.fixture
def config_of(tmp_path: Path, tiny_pipeline: Path) -> Any:
    """Gives the run on a storage, with sources that take their time."""
    with SlowImages(DELAY_S) as server:
        write_sources(tmp_path, f"http://127.0.0.1:{server.server_port}", NUM_PAIRS)
        given = settings(tmp_path, str(tiny_pipeline))
        yield lambda name, **encode: RunConfig.model_validate(
            given
            | {"ingest": given["ingest"] | {"resources": {"ingest_node": 0.5}}}
            | {"storage": str(tmp_path / name), "encode": given["encode"] | {"resolution": 64} | encode}
        )
        server.shutdown()


def commits(table: Table) -> list[int]:
    """When rows were added, in milliseconds, first to last."""
    return sorted(c["timestamp"] for c in DeltaTable(table.uri).history() if c["operation"] == "WRITE")


@pytest.mark.slow
def test_shards_are_encoded_while_ingest_goes_on_as_they_are_afterwards(config_of: Callable[..., RunConfig]) -> None:
    apart, beside = config_of("apart"), config_of("beside")
    for names in (["ingest"], ["encode"]):
        run_stages(apart, names, lambda line: None)
    run_stages(beside, ["ingest", "encode"], lambda line: None)
    storage = Storage(beside.storage)
    assert beside.encode
    encoded = commits(latents_table(storage, latents_fingerprint(beside.encode)))
    ingested = commits(pairs_table(storage))
    assert len(ingested) == UNITS
    assert encoded[0] < ingested[-1]
    assert contents(beside) == contents(apart)
    ahead = Run.open(beside, print).journal.record("ingest").details["encoded_ahead"]  # type: ignore[union-attr]
    assert 0 < sum(each["items"] for each in ahead) <= NUM_PAIRS
    assert "encoded_ahead" not in Run.open(apart, print).journal.record("ingest").details  # type: ignore[union-attr]


@pytest.mark.slow
def test_an_encode_that_fails_beside_ingest_does_not_end_it(
    config_of: Callable[..., RunConfig], tmp_path: Path, tiny_pipeline: Path
) -> None:
    vae = shutil.copytree(tiny_pipeline / "vae", tmp_path / "vae")
    weights = next(vae.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    said: list[str] = []
    config = config_of("storage", vae=str(vae))
    with pytest.raises(ModelError):
        run_stages(config, ["ingest", "encode"], said.append)
    assert pairs_table(Storage(config.storage)).count_rows() == NUM_PAIRS
    assert any("beside ingest ended" in line for line in said)


@pytest.mark.slow
def test_where_encoders_have_no_node_the_end_of_an_ingest_does_not_wait_for_one(
    config_of: Callable[..., RunConfig],
) -> None:
    """The stage `encode` waits in its place, and says so once."""
    said: list[str] = []
    config = config_of("storage", resources={"of no node": 1}, start_timeout_s=2)
    with pytest.raises(ClusterError, match="encode text: no node has a CPU and of no node, and the cluster has no"):
        run_stages(config, ["ingest", "encode"], said.append)
    assert "encode    starts alongside ingest once a node has a CPU and of no node" in said
    assert not any("beside ingest ended" in line for line in said)
    assert pairs_table(Storage(config.storage)).count_rows() == NUM_PAIRS


def test_the_cpus_of_nodes_that_have_what_is_asked_for_are_counted() -> None:
    assert total_of("CPU", {}) == total_of("CPU", {"encode_node": 0.5, "ingest_node": 0.5}) == 6
    assert total_of("CPU", {"encode_node": 1, "of no node": 1}) == total_of("GPU", {}) == 0
