"""Units through a pool of Ray Data actors that each load the model once: a unit in, its rows out, as it is done."""

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.config import EncodeConfig
from pipelines.dataset.errors import unwrap
from pipelines.dataset.processes import TORCH_ENVIRONMENT
from pipelines.dataset.storage import Storage
from pipelines.encode.plan import Unit
from pipelines.progress import quiet_ray_data
from pipelines.resources import Demand, total_of, uses_gpu
from pipelines.units.attempts import MAX_ATTEMPTS, new_attempts
from pipelines.units.effort import Effort
from pipelines.units.shard import from_ipc, to_ipc
from pipelines.units.waiting import Wait, wait_for

UNITS_AT_ONCE = 3  # of an actor: one is read, one is encoded, one is written

Encoded = tuple[str, pa.Table, Effort]
"""A unit's id, its table rows, and what it cost."""


@dataclass(frozen=True)
class Pool:
    """The actors of an execution: least, most, and at first; what each asks Ray for, its torch threads, its units."""

    least: int
    most: int
    first: int
    resources: dict[str, Any]
    num_threads: int
    units_at_once: int


def divide_cluster(config: EncodeConfig, num_units: int | None = None) -> Pool:
    """Actors that the cluster has room for now; up to the most of a range as it grows.

    The threads of an actor do not depend on how much there is to do: sums of floats depend on them.

    Args:
        config: Which devices, and how many.
        num_units: There is work for so many actors; None where it is not known yet.
    """
    num_cpus, num_gpus = (int(total_of(kind, config.resources)) for kind in ("CPU", "GPU"))
    on_gpu, (low, high) = uses_gpu(config.device), config.worker_range
    room = max(1, num_gpus or high) if on_gpu else max(1, num_cpus)
    wanted = high if num_units is None else num_units
    least = min(low, wanted, room)
    most = least if low == high else max(least, min(high, wanted))
    first = min(most, max(least, room))
    resources: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": 1}
    if config.resources:
        resources["resources"] = dict(config.resources)
    resources["runtime_env"] = {"env_vars": TORCH_ENVIRONMENT}
    at_once = UNITS_AT_ONCE if num_units is None else max(1, min(UNITS_AT_ONCE, num_units // first))
    return Pool(least, most, first, resources, max(1, num_cpus // min(high, room)), at_once)


def demand_of(config: EncodeConfig) -> Demand:
    """What an encoder asks for."""
    return Demand("GPU" if uses_gpu(config.device) else "CPU", config.resources)


def wait_for_encoder(kind: str, config: EncodeConfig, say: Callable[[str], None]) -> Wait:
    """The wait for a node that an encoder can run on."""
    way_out = "add such a node"
    if config.device == "gpu":
        way_out += ", or set `encode.device: cpu`"
    if config.resources:
        way_out += ", or leave `encode.resources` out"
    way_out += "; `encode.start_timeout_s` allows a longer wait"
    return wait_for(f"encode {kind}", demand_of(config), timeout_s=config.start_timeout_s, way_out=way_out, say=say)


def as_items(units: list[Unit]) -> list[dict[str, Any]]:
    """Units as the rows that the actors take."""
    return [{"unit_id": unit.id, "rows": to_ipc(unit.rows)} for unit in units]


def given(units: list[Unit]) -> Any:
    """A Ray dataset of these units, each a block."""
    import ray.data

    quiet_ray_data()
    return ray.data.from_items(as_items(units), override_num_blocks=len(units))


def encoded(
    kind: str, config: EncodeConfig, storage: Storage, fingerprint: str, pool: Pool, dataset: Any
) -> Generator[Encoded]:
    """Each unit as it is done, for the caller to commit. Ends the execution also where the caller ends early.

    Args:
        kind: `text` or `latents`.
        config: What to write.
        storage: Where pairs are and shards go.
        fingerprint: Of the model and the settings, as the driver has it.
        pool: The actors.
        dataset: Of units, from `given` or `UnitFeed.dataset`.
    """
    import ray.data

    encoding = dataset.map_batches(
        actor_of(kind),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=pool.least,
            max_size=pool.most,
            initial_size=pool.first,
            max_concurrent_calls_per_actor=pool.units_at_once,
            max_tasks_in_flight_per_actor=pool.units_at_once,  # more would wait for this actor while another is free
            enable_true_multi_threading=True,
        ),
        fn_constructor_args=(config, storage, fingerprint, pool.num_threads, new_attempts(MAX_ATTEMPTS)),
        **pool.resources,
    )
    try:
        # Nothing is fetched ahead: `iter_rows` would hand out a unit, to be committed, only once the next is done.
        blocks: Any = iter(encoding.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"))
        with contextlib.closing(blocks):
            for block in blocks:
                for done in block.to_pylist():
                    yield done["unit_id"], from_ipc(done["rows"]), Effort.from_json(done["effort"])
    except Exception as error:
        if (ours := unwrap(error)) is None:
            raise
        raise ours from error


def actor_of(kind: str) -> Callable[[pa.Table], pa.Table]:
    """The class of the actors; torch is loaded late."""
    if kind == "text":
        from pipelines.encode.texts import WriteTexts

        return WriteTexts  # type: ignore[return-value]
    from pipelines.encode.latents import WriteLatents

    return WriteLatents  # type: ignore[return-value]
