"""Runs units through a pool of Ray Data actors that each load a model once; yields each unit when it is done.

The caller passes the class of the actors, a `UnitActor`, and their arguments.
"""

import contextlib
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from pipelines.dataset.config import Device
from pipelines.dataset.errors import unwrap
from pipelines.dataset.ipc import from_ipc, to_ipc
from pipelines.dataset.processes import TORCH_ENVIRONMENT
from pipelines.progress import quiet_ray_data
from pipelines.resources import Demand, RayOptions, nodes, total_of, uses_gpu
from pipelines.units.attempts import MAX_ATTEMPTS, new_attempts
from pipelines.units.stats import Effort
from pipelines.units.unit import Unit

UNITS_AT_ONCE = 3  # of an actor: one is read, one is computed, one is written


class WrittenUnit(NamedTuple):
    """A unit whose shard is written, for the caller to commit: its id, its table rows, and its cost."""

    id: str
    rows: pa.Table
    effort: Effort


class WorkerSettings(Protocol):
    """The settings of a stage's workers."""

    @property
    def device(self) -> Device:
        """The device they run on."""
        ...

    @property
    def resources(self) -> Mapping[str, float]:
        """Custom Ray resources that each requests as well."""
        ...

    @property
    def worker_range(self) -> tuple[int, int]:
        """The smallest and the largest number of workers."""
        ...


@dataclass(frozen=True)
class Pool:
    """The actors of an execution.

    Args:
        least: Minimum number of actors.
        most: Maximum number of actors.
        first: Number of actors at the start.
        options: Resources that each requests from Ray.
        num_threads: Number of torch threads in each.
        units_at_once: Number of units that each is called for at once.
    """

    least: int
    most: int
    first: int
    options: RayOptions
    num_threads: int
    units_at_once: int


def divide_cluster(settings: WorkerSettings, num_units: int | None = None) -> Pool:
    """Return the pool that fits on the cluster now; it grows with the cluster, up to the maximum of a range.

    The threads of an actor do not depend on the amount of work: sums of floats depend on them.

    Args:
        settings: Which devices, and how many.
        num_units: Number of units, which limits the number of actors; None if it is not known yet.
    """
    num_cpus, num_gpus = (int(total_of(kind, settings.resources)) for kind in ("CPU", "GPU"))
    on_gpu, (low, high) = uses_gpu(settings.device), settings.worker_range
    room = max(1, num_gpus or high) if on_gpu else max(1, num_cpus)
    wanted = high if num_units is None else num_units
    least = min(low, wanted, room)
    most = least if low == high else max(least, min(high, wanted))
    first = min(most, max(least, room))
    options: RayOptions = {"num_gpus": 1} if on_gpu else {"num_cpus": 1}
    if settings.resources:
        options["resources"] = dict(settings.resources)
    options["runtime_env"] = {"env_vars": TORCH_ENVIRONMENT}
    at_once = UNITS_AT_ONCE if num_units is None else max(1, min(UNITS_AT_ONCE, num_units // first))
    return Pool(least, most, first, options, max(1, num_cpus // min(high, room)), at_once)


MAX_SHARERS = 4  # actors on one GPU: each has its own context and models
MAX_CPUS_A_SHARER = 4  # as many threads decode PNGs of 1024 x 1024 for a GPU that scores 60 a second


def share_devices(settings: WorkerSettings, num_units: int) -> Pool:
    """Return a pool of light actors, several of which share a GPU if there are more of them than GPUs.

    Each also gets its share of the CPUs of GPU nodes, which decode images. On CPUs it is `divide_cluster`'s.

    Args:
        settings: Which devices, and how many.
        num_units: Number of units, which limits the number of actors.
    """
    if not uses_gpu(settings.device):
        return divide_cluster(settings, num_units)
    having = [node for node in nodes() if node.get("GPU") and all(name in node for name in settings.resources)]
    num_gpus, (low, high) = max(1, int(sum(node["GPU"] for node in having))), settings.worker_range
    sharers = max(1, min(MAX_SHARERS, math.ceil(high / num_gpus)))
    shares = (int((node.get("CPU", 0) - 1) // (node["GPU"] * sharers)) for node in having)  # one is left for others
    num_cpus = max(0, min((*shares, MAX_CPUS_A_SHARER)))
    room = max(1, num_gpus * sharers)
    least = min(low, num_units, room)
    most = least if low == high else max(least, min(high, num_units))
    first = min(most, max(least, room))
    options: RayOptions = {"num_gpus": 1 / sharers, "num_cpus": num_cpus}
    if settings.resources:
        options["resources"] = dict(settings.resources)
    options["runtime_env"] = {"env_vars": TORCH_ENVIRONMENT}
    at_once = max(1, min(UNITS_AT_ONCE, num_units // first))
    return Pool(least, most, first, options, max(1, num_cpus), at_once)


def demand_of_part(pool: Pool) -> Demand:
    """Return what one actor of a pool asks Ray for, a part of a GPU included."""
    options = pool.options
    also = dict(options.get("resources", {}))
    if "num_gpus" not in options:
        return Demand("CPU", also, options.get("num_cpus", 1))
    if options.get("num_cpus"):
        also["CPU"] = options["num_cpus"]
    return Demand("GPU", also, options["num_gpus"])


def demand_of(settings: WorkerSettings) -> Demand:
    """Return what one worker asks Ray for."""
    return Demand("GPU" if uses_gpu(settings.device) else "CPU", settings.resources)


def unit_row(unit: Unit) -> dict[str, str | bytes]:
    """Return a unit as the Ray Data row that actors take."""
    return {"unit_id": unit.id, "rows": to_ipc(unit.rows)}


def units_dataset(units: list[Unit]) -> Any:
    """Return a Ray dataset of these units, each a block."""
    import ray.data

    quiet_ray_data()
    return ray.data.from_items([unit_row(unit) for unit in units], override_num_blocks=len(units))


def run_units(
    actor: Callable[[pa.Table], pa.Table], arguments: tuple[Any, ...], pool: Pool, dataset: Any
) -> Generator[WrittenUnit]:
    """Yield each unit as soon as it is written, for the caller to commit. Closing the generator ends the execution.

    Args:
        actor: A subclass of `UnitActor`.
        arguments: Arguments of its constructor; a handle from `new_attempts` is appended.
        pool: The number of actors, and what each requests from Ray.
        dataset: The units, from `units_dataset` or `UnitFeed.dataset`.
    """
    import ray.data

    written = dataset.map_batches(
        actor,
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
        fn_constructor_args=(*arguments, new_attempts(MAX_ATTEMPTS)),
        **pool.options,
    )
    try:
        # Nothing is fetched ahead: `iter_rows` would hand out a unit, to be committed, only once the next is done.
        blocks: Any = iter(written.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"))
        with contextlib.closing(blocks):
            for block in blocks:
                for done in block.to_pylist():
                    yield WrittenUnit(done["unit_id"], from_ipc(done["rows"]), Effort.from_json(done["effort"]))
    except Exception as error:
        if (ours := unwrap(error)) is None:
            raise
        raise ours from error
