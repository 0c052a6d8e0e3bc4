"""Feeds units to an execution that is already running, until the feed is closed.

Ray Data needs its inputs when an execution starts. So its single read task asks an actor for unit after unit and waits
if there is none yet; meanwhile the actors of the pool stay, with their loaded model.
"""

import asyncio
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipelines.progress import quiet_ray_data
from pipelines.units.pool import unit_row
from pipelines.units.unit import Unit

ROW_A_BLOCK = 1  # bytes: a block ends with the row that reaches it, so that no unit waits for the next


class _Units:
    """A Ray actor with references to units, in order. A place always gives the same unit, so a read may be repeated."""

    def __init__(self) -> None:
        self._units: list[list[Any]] = []
        self._is_closed = False
        self._changed = asyncio.Condition()

    async def add(self, units: list[list[Any]]) -> None:
        async with self._changed:
            self._units += units
            self._changed.notify_all()

    async def close(self) -> None:
        async with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    async def get(self, place: int) -> list[Any] | None:
        """Return the reference at this place once it is there; None if the feed is closed before."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_closed or place < len(self._units))
            return self._units[place] if place < len(self._units) else None


class UnitFeed:
    """The driver's end of the feed. Needs a running Ray; its actor lives on the driver's node and ends with it."""

    def __init__(self) -> None:
        import ray

        here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        self._units = ray.remote(num_cpus=0, label_selector=here)(_Units).remote()

    def add(self, units: list[Unit]) -> None:
        """Add units to the execution."""
        import ray

        ray.get(self._units.add.remote([[ray.put(unit_row(unit))] for unit in units]))

    def close(self) -> None:
        """Add no more units: the execution ends once all its units are done."""
        import ray

        ray.get(self._units.close.remote())

    def dataset(self) -> Any:
        """Return a Ray dataset whose blocks are the units, as they come."""
        import ray
        import ray.data
        from ray.data import Datasource, ReadTask
        from ray.data.block import BlockMetadata

        def blocks(units: Any = self._units) -> Iterator[pa.Table]:
            place = 0
            while (found := ray.get(units.get.remote(place))) is not None:
                yield pa.Table.from_pylist([ray.get(found[0])])
                place += 1

        class Fed(Datasource):  # type: ignore[misc]
            def estimate_inmemory_data_size(self) -> None:
                """Return None: not known."""

            def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
                return [ReadTask(blocks, BlockMetadata(None, None, None, None))]

        quiet_ray_data()
        dataset = ray.data.read_datasource(Fed(), override_num_blocks=1, num_cpus=0)
        dataset.context.target_max_block_size = ROW_A_BLOCK
        return dataset
