"""Latents beside an ingest: units as they come, to the last one or to a stop, and what they would have been after."""

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from encode_steps import encode_here, ingest_here
from factories import photo_pairs, write_parquet

from pipelines.config import EncodeConfig
from pipelines.dataset.errors import DropBudgetExceeded, ShardCorrupt
from pipelines.dataset.layout import latents_table
from pipelines.dataset.storage import Storage
from pipelines.encode.ahead import LatentsAhead
from pipelines.encode.fingerprint import latents_fingerprint
from pipelines.encode.plan import pending_latents
from pipelines.units.feed import UnitFeed, _Units
from pipelines.units.unit import Unit

NUM_CPUS = 6  # of the cluster: an actor's threads, which sums of floats depend on
ROWS = photo_pairs(8, num_prompts=4)


def unit(name: str) -> Unit:
    return Unit(name, pa.table({"pair_key": [name]}))


def wait_for(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.1)


def contents(config: EncodeConfig, storage: Storage) -> tuple[list[Any], list[str]]:
    rows = latents_table(storage, latents_fingerprint(config)).read().sort_by("pair_key").to_pylist()
    return rows, [hashlib.sha256(storage.read(shard)).hexdigest() for shard in sorted({row["shard"] for row in rows})]


def test_units_are_taken_as_they_come_and_the_execution_ends_with_the_feed(ray_cluster: None) -> None:
    feed = UnitFeed()
    given = feed.dataset().iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow")
    blocks: Iterator[pa.Table] = iter(given)
    feed.add([unit("a"), unit("b")])
    assert [next(blocks)["unit_id"].to_pylist() for _ in range(2)] == [["a"], ["b"]]
    feed.add([])
    feed.add([unit("c")])
    assert next(blocks)["unit_id"].to_pylist() == ["c"], "it did not wait for a fuller block"
    feed.close()
    assert list(blocks) == []


def test_a_place_is_the_same_unit_however_often_it_is_asked_for() -> None:
    async def ask() -> list[Any]:
        units = _Units()
        early = asyncio.create_task(units.get(2))
        await units.add([["a"], ["b"]])
        assert not early.done()
        found = [await units.get(1), await units.get(0), await units.get(1)]
        await units.add([["c"]])
        found.append(await early)
        late = asyncio.create_task(units.get(3))
        await units.close()
        return [*found, await late, await units.get(2)]

    assert asyncio.run(ask()) == [["b"], ["a"], ["b"], ["c"], None, ["c"]]


def test_what_is_committed_is_encoded_meanwhile_and_the_rest_after_the_end_of_ingest(
    ray_cluster: None, tmp_path: Path, storage: Storage, config: EncodeConfig, vae: Any, text: Any
) -> None:
    files = [write_parquet(tmp_path / f"{name}.parquet", ROWS[start : start + 2]) for start, name in enumerate("aceg")]
    ingest_here(storage, files[0])
    ahead = LatentsAhead(config, storage)
    thread = threading.Thread(target=ahead.run)
    thread.start()
    table = latents_table(storage, latents_fingerprint(config))
    wait_for(lambda: table.version is not None)
    ingest_here(storage, *files[:2])
    wait_for(lambda: not pending_latents(storage, latents_fingerprint(config)))
    first = ahead.take_speed()
    ingest_here(storage, *files)
    ahead.finish()
    thread.join(300)
    second = ahead.take_speed()
    assert not thread.is_alive()
    assert pending_latents(storage, latents_fingerprint(config)) == []
    assert first
    assert second
    assert first.items + second.items == table.read().num_rows == 5
    assert ahead.take_speed() is None

    after = Storage(str(tmp_path / "after"))
    ingest_here(after, *files)
    encode_here(config, after, vae, text, NUM_CPUS)
    assert contents(config, storage) == contents(config, after)


def test_it_ends_at_a_stop_also_without_a_unit(ray_cluster: None, storage: Storage, config: EncodeConfig) -> None:
    ahead = LatentsAhead(config, storage)
    thread = threading.Thread(target=ahead.run)
    thread.start()
    ahead.stop()
    thread.join(300)
    assert not thread.is_alive()
    assert ahead.take_speed() is None


def test_an_error_ends_it_and_is_that_of_the_stage(
    ray_cluster: None, tmp_path: Path, storage: Storage, config: EncodeConfig
) -> None:
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", ROWS[:2]))
    (shard,) = storage.names("dataset/shards")
    data = bytearray(storage.read(shard))
    data[600] ^= 1
    storage.write(shard, bytes(data))
    with pytest.raises(ShardCorrupt):
        LatentsAhead(config, storage).run()
    assert not [thread for thread in threading.enumerate() if thread.name == "encode-feed"]


def test_more_drops_than_the_limit_end_it_before_ingest_does(
    ray_cluster: None, tmp_path: Path, storage: Storage, config: EncodeConfig
) -> None:
    for number in range(4):
        rows = [row | {"jpg_0": row["jpg_0"][:-200]} for row in photo_pairs(2, seed=number + 1, num_prompts=1)]
        ingest_here(storage, write_parquet(tmp_path / f"{number}.parquet", rows), image_check="header")
    with pytest.raises(DropBudgetExceeded, match=r"dropped (2|4|6|8) of (2|4|6|8) pairs \(100.0%"):
        LatentsAhead(config, storage).run()
