"""Draws missing samples on Ray Data actors and commits them; several models share one execution, in turns.

Invariants: a sample with a row is never drawn again; a shard exists only once a row points to it; the bytes of a unit
are the same every time with the same batch and hardware.
"""

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import SAMPLES, samples_table
from pipelines.dataset.model_files import read_model_index
from pipelines.dataset.secrets import write_line
from pipelines.dataset.storage import Storage
from pipelines.encode.fingerprint import note_parts
from pipelines.resources import Demand, uses_gpu
from pipelines.samples.account import Account, Drawn
from pipelines.samples.committer import SampleCommitter
from pipelines.samples.drawing import Drawing, DrawnModel, DrawSettings
from pipelines.samples.fingerprint import samples_parts
from pipelines.samples.plan import distinct_samples, pending_samples
from pipelines.samples.room import room_for
from pipelines.units.lazy import actor_by_name
from pipelines.units.pool import Pool, WrittenUnit, run_units, units_dataset
from pipelines.units.unit import Unit
from pipelines.units.waiting import Wait, wait_for, wait_until_placed
from pipelines.units.workers import Workers


def draw(
    storage: Storage, drawings: Sequence[Drawing], workers: Workers, say: Callable[[str], None] = write_line
) -> list[Drawn]:
    """Draw the samples that are wanted and have no row, and commit them unit by unit. Needs a running Ray.

    One execution serves all models: its actors take them in turn, in the order of `drawings`, with one model in memory
    each. Nothing is started if nothing is missing. Drawings of one fingerprint are drawn together.

    Args:
        storage: The data set's storage.
        drawings: The wanted samples of each model.
        workers: The samplers.
        say: Takes lines for the user.

    Returns:
        For each drawing what was drawn, and how fast.

    Raises:
        ModelError: A model is missing, damaged, not supported, or another one on a node.
        EncodingError: There is not enough memory for a model or a single sample, or a unit repeatedly kills its actor.
        ClusterError: No node has the resources of a sampler, and none joined in time.
        StorageError: The storage cannot be read or written.
    """
    merged = _merge(drawings)
    plans = [_Plan.of(storage, each, workers.batch_size) for each in merged]
    todo = [plan for plan in plans if plan.units]
    found: dict[str, Drawn] = {}
    if todo:
        storage.check_writable()
        found = _Execution(storage, todo, workers, say).run()
    results = []
    for drawing in drawings:  # of one fingerprint, the first drawing has all that was drawn
        known = found.pop(drawing.fingerprint, Drawn("", drawing.fingerprint, 0, 0, None))
        results.append(replace(known, name=drawing.model.name))
    return results


def read_samples(storage: Storage, drawing: Drawing) -> pa.Table:
    """Return the rows of all wanted samples, in the order of `drawing.wanted`.

    Returns:
        Rows of `SAMPLES_SCHEMA`; quarantined samples have a reason and no image.

    Raises:
        SnapshotError: Some of them are not drawn.
    """
    table = samples_table(storage, drawing.fingerprint)
    rows = table.read().combine_chunks()
    places = pc.index_in(drawing.wanted["sample_key"].combine_chunks(), rows["sample_key"])
    if places.null_count:
        raise SnapshotError(
            f"{places.null_count:,} of {len(places):,} samples of {drawing.model.name} are not in {table.uri}",
            "draw them first: rerun the same command",
        )
    return rows.take(places)


def _merge(drawings: Sequence[Drawing]) -> list[Drawing]:
    """Return one drawing for each fingerprint, with the samples of all drawings that have it, and absolute paths."""
    merged: dict[str, Drawing] = {}
    for drawing in drawings:
        known = merged.get(drawing.fingerprint)
        if known is None:
            merged[drawing.fingerprint] = replace(drawing, model=with_absolute_paths(drawing.model))
        else:
            wanted = distinct_samples(known.wanted, drawing.wanted)
            merged[drawing.fingerprint] = replace(known, wanted=wanted)
    return list(merged.values())


def with_absolute_paths(model: DrawnModel) -> DrawnModel:
    """Return the model with local paths made absolute: workers have another working directory."""

    def absolute(path: str | None) -> str | None:
        if path is None or "://" in path or not Path(path).expanduser().exists():
            return path
        return str(Path(path).expanduser().resolve())

    base = model.source
    source = replace(base, model=absolute(base.model) or base.model, vae=absolute(base.vae))
    return replace(model, source=source, unet=absolute(model.unet), lora=absolute(model.lora))


@dataclass(frozen=True)
class _Plan:
    """The missing units of a drawing, and where they are committed."""

    drawing: Drawing
    units: list[Unit]
    committer: SampleCommitter

    @staticmethod
    def of(storage: Storage, drawing: Drawing, batch_size: int) -> "_Plan":
        """Plan a drawing."""
        table = samples_table(storage, drawing.fingerprint)
        committer = SampleCommitter(table, table.version)  # before the plan reads the rows
        return _Plan(drawing, pending_samples(storage, drawing, batch_size), committer)


class _Execution:
    """One execution: the units of every drawing in, committed rows out.

    Args:
        storage: The data set's storage.
        plans: Those with missing samples, with distinct fingerprints.
        workers: The samplers.
        say: Takes lines for the user.
    """

    def __init__(self, storage: Storage, plans: Sequence[_Plan], workers: Workers, say: Callable[[str], None]) -> None:
        self._storage, self._workers, self._say = storage, workers, say
        self._plans = {plan.drawing.fingerprint: plan for plan in plans}
        self._models = {name: (plan.drawing.model, plan.drawing.sampling) for name, plan in self._plans.items()}
        self._units = [unit for plan in plans for unit in plan.units]
        self._owners = {unit.id: name for name, plan in self._plans.items() for unit in plan.units}
        self._pool = room_for(list(self._models.values()), workers, len(self._units))
        self._accounts = {name: self._account(plan) for name, plan in self._plans.items()}

    def _account(self, plan: _Plan) -> Account:
        num_planned = sum(unit.rows.num_rows for unit in plan.units)
        names = self._workers.stage, plan.drawing.model.name, plan.drawing.fingerprint
        return Account(*names, num_planned, self._workers.batch_size, self._pool.most)

    def run(self) -> dict[str, Drawn]:
        """Draw and commit every unit; return what was drawn by fingerprint."""
        for model, sampling in self._models.values():
            note_parts(self._storage, SAMPLES, samples_parts(model, sampling))
        _say_what_is_off([model for model, _ in self._models.values()], self._workers.stage, self._say)
        done = self._start()
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(done))
            for account in self._accounts.values():
                stack.callback(account.close)
            wait_until_placed(_demand_of(self._pool, self._workers), self._wait(), count=self._pool.first)
            self._start_next()
            for unit, rows, effort in done:
                fingerprint = self._owners[unit]
                self._plans[fingerprint].committer.append(unit, rows)
                self._accounts[fingerprint].add(rows, effort)
                if self._accounts[fingerprint].is_done:
                    self._accounts[fingerprint].close()
                    self._plans[fingerprint].committer.finish()
                    self._start_next()
        return {fingerprint: account.result() for fingerprint, account in self._accounts.items()}

    def _start(self) -> Generator[WrittenUnit]:
        settings = DrawSettings(self._workers.stage, self._workers.batch_size, self._pool.num_threads)
        arguments = (self._models, self._storage, settings)
        return run_units(actor_class(), arguments, self._pool, units_dataset(self._units))

    def _start_next(self) -> None:
        """Start the clock of the first model that still has units."""
        account = next((each for each in self._accounts.values() if not each.is_done), None)
        if account is not None:
            account.start()

    def _wait(self) -> Wait:
        """Return the wait for a node that a sampler can run on."""
        way_out = "add such a node"
        if self._workers.device == "gpu":
            way_out += ", or set `device: cpu`"
        if self._workers.resources:
            way_out += ", or leave `resources` out"
        way_out += "; `start_timeout_s` allows a longer wait"
        demand, timeout_s = _demand_of(self._pool, self._workers), self._workers.start_timeout_s
        return wait_for(self._workers.stage, demand, timeout_s=timeout_s, way_out=way_out, say=self._say)


def actor_class() -> Callable[[pa.Table], pa.Table]:
    """Return the class of the actors; the driver does not load torch for it."""
    return actor_by_name("pipelines.samples.actor:DrawSamples")


def _demand_of(pool: Pool, workers: Workers) -> Demand:
    """Return what one sampler asks Ray for."""
    memory = {"memory": pool.options["memory"]} if "memory" in pool.options else {}
    return Demand("GPU" if uses_gpu(workers.device) else "CPU", {**workers.resources, **memory})


def _say_what_is_off(models: Sequence[DrawnModel], stage: str, say: Callable[[str], None]) -> None:
    """Say that safety checkers are left out, if pipelines have one."""
    with_checker = [model.name for model in models if model.source.is_fetched() and _has_checker(model)]
    if with_checker:
        say(
            f"{stage}: the safety checker of {', '.join(with_checker)} is off: it would paint samples black, and they "
            "would be judged for that"
        )


def _has_checker(model: DrawnModel) -> bool:
    library, *_ = read_model_index(model.source.folder()).get("safety_checker") or [None]
    return library is not None
