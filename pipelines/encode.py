"""Pair shards to latent and text shards: what is missing is encoded on Ray Data actors and committed.

Invariants: what has a row under the fingerprint is never encoded again; a shard exists only once a row points to it;
a distinct prompt is embedded once, a distinct image of a shard once; the bytes of a unit are the same every time.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.attempts import MAX_ATTEMPTS, new_attempts
from pipelines.config import EncodeConfig
from pipelines.dataset.errors import DropBudgetExceeded, SnapshotError, unwrap
from pipelines.dataset.layout import LATENTS, TEXT, latents_table, pairs_table, text_table
from pipelines.dataset.pair import Status
from pipelines.dataset.processes import TORCH_ENVIRONMENT
from pipelines.dataset.storage import Storage
from pipelines.dataset.table import Table
from pipelines.effort import PARTS, Effort
from pipelines.encode_plan import Pending, Unit, check_settings, located, pending
from pipelines.fingerprint import fingerprint_of, note_parts
from pipelines.progress import Progress, quiet_ray_data
from pipelines.room import total_of, uses_gpu
from pipelines.unit_shard import from_ipc, to_ipc

LOOK_AGAIN_S = 1.0
MIN_UNITS_AHEAD = 4  # or one for each encoder: a pass starts actors, which takes seconds
UNITS_AT_ONCE = 3  # of an actor: one is read, one is encoded, one is written


def encode(config: EncodeConfig, storage: Storage) -> dict[str, dict[str, Any] | None]:
    """Bring latents and text embeddings up to date with the kept pairs. Needs a running Ray.

    Returns:
        For `text` and `latents` what was done and how fast, as plain data; None where nothing was missing.

    Raises:
        ModelError: The model is missing, damaged or of no kind that we know.
        ConfigError: The model cannot be run with these settings.
        SnapshotError: There is no kept pair.
        DropBudgetExceeded: More than `max_drop_ratio` of the rows were quarantined.
        EncodingError: There is no memory for even one image, or actors die of a unit again and again.
    """
    config = located(config)
    todo = pending(config, storage)
    if not todo.num_kept:
        raise SnapshotError(
            f"there is no kept pair in {storage.uri('dataset/pairs')}, so there is nothing to encode",
            "run `mapo ingest` first; `mapo data show` lists what became of the rows",
        )
    check_settings(config)
    if not todo.is_empty:
        storage.check_writable()
    return {stage.kind: stage.run() for stage in _stages(config, storage, todo)}


def encode_ahead(
    config: EncodeConfig, storage: Storage, *, is_over: Callable[[], bool], is_stopped: Callable[[], bool]
) -> list[dict[str, Any]]:
    """Encode the latents of what is committed while an ingest goes on; `encode` afterwards does the rest.

    Prompts are left to `encode`: which of them share a pass would follow from the moment. Latents do not: a unit is a
    shard, whenever it is encoded. Needs a running Ray; may run beside an ingest, in another thread.

    Args:
        config: As for `encode`.
        storage: Where the ingest commits to.
        is_over: Whether the ingest has ended: no further pass begins then.
        is_stopped: Whether the run is to end; asked after every unit.

    Returns:
        For each pass what was done and how fast, as `encode` gives it.
    """
    config, passes, seen = located(config), [], None
    while not is_over():
        version = pairs_table(storage).version
        todo = pending(config, storage) if version not in (None, seen) else None
        if todo is None or len(todo.latents) < min(MIN_UNITS_AHEAD, config.worker_range[0]):
            seen = version
            time.sleep(LOOK_AGAIN_S)
            continue
        table = latents_table(storage, fingerprint_of(todo.latents_parts))
        stage = _Stage("latents", "pair", todo.latents, table, LATENTS, todo.latents_parts, config, storage, is_stopped)
        if (speed := stage.run()) is not None:
            passes.append(speed)
    return passes


def _stages(config: EncodeConfig, storage: Storage, todo: Pending) -> Iterator["_Stage"]:
    """Text first: it is short, and a wrong text encoder should show before hours of images. Torch is loaded late."""
    table = text_table(storage, fingerprint_of(todo.text_parts))
    yield _Stage("text", "prompt", todo.texts, table, TEXT, todo.text_parts, config, storage)
    table = latents_table(storage, fingerprint_of(todo.latents_parts))
    yield _Stage("latents", "pair", todo.latents, table, LATENTS, todo.latents_parts, config, storage)


@dataclass(frozen=True)
class _Stage:
    """One of the two executions: units in, committed rows out."""

    kind: str
    item: str
    units: list[Unit]
    table: Table
    folder: str
    parts: dict[str, Any]
    config: EncodeConfig
    storage: Storage
    is_stopped: Callable[[], bool] | None = None
    """Set for a pass ahead of the stage: it ends when this says so, and leaves the limit of drops to the stage."""

    def run(self) -> dict[str, Any] | None:
        """Encode and commit the units, then hold the result against the limit of quarantined rows."""
        speed = None
        if self.units:
            note_parts(self.storage, self.folder, self.parts)
            num_done, num_dropped, effort = 0, 0, Effort()
            num_planned = sum(unit.rows.num_rows for unit in self.units)
            max_dropped = self._max_dropped(num_planned)
            started = time.monotonic()
            with Progress(f"encode {self.kind}", num_planned, f"{self.item}s") as progress:
                for unit, rows, its_effort in self._encoded():
                    self.table.append(unit, rows)
                    if its_effort.batch_size < (effort.batch_size or self.config.batch_size):
                        progress.say(self._less_memory(its_effort))
                    effort.add(its_effort)
                    num_done += rows.num_rows
                    progress.advance(rows.num_rows)
                    num_dropped += _count_dropped(rows)
                    if self.is_stopped() if self.is_stopped is not None else num_dropped > max_dropped:
                        break  # without the rest: a later run does it, or nothing in it could lower the drops
            speed = self._speed(num_done, time.monotonic() - started, effort)
        if self.is_stopped is None:
            self._check_dropped()
        return speed

    def _max_dropped(self, num_planned: int) -> float:
        """How many of the planned rows may be quarantined, beside those of earlier runs."""
        rows = self.table.read(["status"])
        return self.config.max_drop_ratio * float(rows.num_rows + num_planned) - _count_dropped(rows)

    def _less_memory(self, effort: Effort) -> str:
        return (
            f"encode {self.kind}: {effort.device} had no memory for {self.config.batch_size} at once; "
            f"goes on with {effort.batch_size} a pass"
        )

    def _speed(self, num_items: int, seconds: float, effort: Effort) -> dict[str, Any]:
        """What was done and how fast, as plain data: for the journal and the report."""
        return {
            "seconds": round(seconds, 3),
            "items": num_items,
            "items_per_s": round(num_items / seconds, 3),
            "images": effort.num_images,
            "image_slots": effort.num_slots,
            "images_per_s": round(effort.num_images / seconds, 3),
            "busy_ratio": round(effort.busy_ratio, 4),
            "num_actors": _divide_cluster(self.config, len(self.units)).most,
            "device": effort.device,
            "batch_size": self.config.batch_size,
            "halved_to": effort.batch_size if effort.batch_size < self.config.batch_size else None,
            "seconds_by_part": {part: round(effort.seconds[part], 3) for part in PARTS if effort.seconds[part]},
        }

    def _encoded(self) -> Iterator[tuple[str, pa.Table, Effort]]:
        """The rows of every unit as it is done, and its cost, from a pool of actors."""
        import ray.data

        quiet_ray_data()
        pool = _divide_cluster(self.config, len(self.units))
        items = [{"unit_id": unit.id, "rows": to_ipc(unit.rows)} for unit in self.units]
        at_once = max(1, min(UNITS_AT_ONCE, len(self.units) // pool.first))
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            self._actor(),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=pool.least,
                max_size=pool.most,
                initial_size=pool.first,
                max_concurrent_calls_per_actor=at_once,
                max_tasks_in_flight_per_actor=at_once,  # more would wait for this actor while another is free
                enable_true_multi_threading=True,
            ),
            fn_constructor_args=(
                self.config,
                self.storage,
                fingerprint_of(self.parts),
                pool.num_threads,
                new_attempts(MAX_ATTEMPTS),
            ),
            **pool.resources,
        )
        try:
            # Nothing is fetched ahead: `iter_rows` would hand out a unit, to be committed, only once the next is done.
            blocks: Any = iter(dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"))
            with contextlib.closing(blocks):  # ends the execution also where this ends early
                for block in blocks:
                    for done in block.to_pylist():
                        yield done["unit_id"], from_ipc(done["rows"]), Effort.from_json(done["effort"])
        except Exception as error:
            if (ours := unwrap(error)) is None:
                raise
            raise ours from error

    def _actor(self) -> Callable[[pa.Table], pa.Table]:
        if self.kind == "text":
            from pipelines.texts import WriteTexts

            return WriteTexts  # type: ignore[return-value]
        from pipelines.latents import WriteLatents

        return WriteLatents  # type: ignore[return-value]

    def _check_dropped(self) -> None:
        rows = self.table.read(["status", "reason"])
        dropped = rows.filter(pc.equal(rows["status"], str(Status.QUARANTINED)))
        if dropped.num_rows <= self.config.max_drop_ratio * rows.num_rows:
            return
        (reason, times), *_ = Counter(dropped["reason"].to_pylist()).most_common(1)
        raise DropBudgetExceeded(
            f"encode ({self.kind}) dropped {dropped.num_rows:,} of {rows.num_rows:,} {self.item}s "
            f"({dropped.num_rows / rows.num_rows:.1%}, limit {self.config.max_drop_ratio:.1%}).\n"
            f"Most common reason: {reason} ({times:,}).",
            "numbers that are not finite come from damaged weights, or overflow the stored type: "
            "set `encode.dtype` to bfloat16 or float32, or `encode.vae` to another VAE; "
            "raise `encode.max_drop_ratio` to accept them",
        )


def _count_dropped(rows: pa.Table) -> int:
    return int(pc.sum(pc.equal(rows["status"], str(Status.QUARANTINED))).as_py() or 0)


@dataclass(frozen=True)
class _Pool:
    """The actors of a stage: least, most, and at first; what each asks Ray for, and its torch threads."""

    least: int
    most: int
    first: int
    resources: dict[str, Any]
    num_threads: int


def _divide_cluster(config: EncodeConfig, num_units: int) -> _Pool:
    """Actors that the cluster has room for now; up to the most of a range as it grows.

    The threads of an actor do not depend on how much there is to do: sums of floats depend on them.
    """
    num_cpus, num_gpus = (int(total_of(kind, config.resources)) for kind in ("CPU", "GPU"))
    on_gpu, (low, high) = uses_gpu(config.device), config.worker_range
    room = max(1, num_gpus or high) if on_gpu else max(1, num_cpus)
    least = min(low, num_units, room)
    most = least if low == high else max(least, min(high, num_units))
    resources: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": 1}
    if config.resources:
        resources["resources"] = dict(config.resources)
    resources["runtime_env"] = {"env_vars": TORCH_ENVIRONMENT}
    return _Pool(least, most, min(most, max(least, room)), resources, max(1, num_cpus // min(high, room)))
