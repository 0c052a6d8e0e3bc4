"""Checkpoints during training: every rank writes its part in the background, and rank 0 commits when all have.

A save copies the rank's fragments to memory, which is all that a step waits for. Folders that a killed run left without
a manifest are never read, and removed later; each start of the workers writes to new folders, so that two starts can
never mix their files. See training/state/checkpoint_format.py for the files.
"""

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import safetensors.numpy
import torch
from torch import Tensor

from pipelines.dataset.errors import MapoError, ShardCorrupt, TrainingError
from pipelines.dataset.storage import Storage
from training.optimizers.partition import Fragment
from training.state.checkpoint_format import (
    MANIFEST,
    STATE,
    FragmentEntry,
    Manifest,
    Reader,
    best_of,
    list_checkpoints,
    rank_names,
)
from training.state.ema import EMA, ShardedEma
from training.state.zero import ZeroState

POLL_S = 0.1
LOSSES = ("validation_loss", "average_validation_loss")
"""Keys of the state that decide the best checkpoint: for the weights, and for their average."""
Parts = Mapping[tuple[str, Fragment], Tensor]


class Checkpointer:
    """One rank's side of a run's checkpoints.

    Args:
        storage: The storage to write to.
        folder: The folder of all checkpoints of this training.
        rank: This rank.
        world_size: The number of ranks.
        zero_stage: The ZeRO stage, noted in the manifest.
        attempt: Name of this start of the workers; the same on all ranks, and never used before.
        keep: How many of the newest to keep.
        keep_best: Also keep the one with the lowest validation loss, and the best one of the average.
        timeout_s: How long rank 0 waits for the others' parts.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        *,
        rank: int,
        world_size: int,
        zero_stage: int,
        attempt: str,
        keep: int,
        keep_best: bool,
        timeout_s: float,
    ) -> None:
        self._storage, self._folder, self._attempt = storage, folder, attempt
        self._rank, self._world_size, self._zero_stage = rank, world_size, zero_stage
        self._keep, self._keep_best, self._timeout_s = keep, keep_best, timeout_s
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self.last_step: int | None = None

    def save(self, step: int, parts: Parts, *, account: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Start writing a checkpoint after `step` finished steps; waits for the one before.

        Args:
            step: Finished steps; a second save of the same step does nothing.
            parts: This rank's fragments by kind; copied before this returns.
            account: This rank's identity and consumed pairs.
            state: State that all ranks share; rank 0 writes it. Its LOSSES go into the manifest.

        Raises:
            TrainingError: The previous checkpoint could not be written.
        """
        if step == self.last_step:
            return
        self.wait()
        self.last_step = step
        copied = {key: tensor.detach().to("cpu", torch.float32, copy=True) for key, tensor in parts.items()}
        folder = f"{self._folder}/step-{step:08d}-{self._attempt}"
        losses = {name: state.get(name) for name in LOSSES}
        work = (folder, step, copied, dict(account), json.dumps(state), losses)
        self._thread = threading.Thread(target=self._write, args=work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until no checkpoint is being written.

        Raises:
            TrainingError: The checkpoint could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise TrainingError(
                f"rank {self._rank} could not write the checkpoint of step {self.last_step}: {error}",
                "the run will resume from the previous checkpoint; check the storage",
            ) from error

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Wait at the end of a run; after an error, only make sure that nothing waits for other ranks."""
        try:
            yield
            self.wait()
        finally:
            self._stopped.set()

    def _write(
        self,
        folder: str,
        step: int,
        parts: Parts,
        account: Mapping[str, Any],
        state: str,
        losses: Mapping[str, float | None],
    ) -> None:
        try:
            write_rank(self._storage, folder, self._rank, parts, account=account)
            if self._rank == 0:
                self._commit(folder, step, state.encode(), losses)
        except BaseException as error:  # raised again in the training thread
            self._error = error

    def _commit(self, folder: str, step: int, state: bytes, losses: Mapping[str, float | None]) -> None:
        indices = self._wait_for_all(folder)
        self._storage.write(f"{folder}/{STATE}", state)
        contents = {**indices, STATE: state}
        sizes = {name: len(data) for name, data in contents.items()}
        for index, data in indices.items():
            sizes[index.replace(".json", ".safetensors")] = json.loads(data)["num_bytes"]
        manifest = Manifest(
            folder=folder,
            step=step,
            world_size=self._world_size,
            zero_stage=self._zero_stage,
            **losses,
            sha256={name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
            sizes=sizes,
        )
        self._storage.write(f"{folder}/{MANIFEST}", manifest.to_json())
        remove_old(self._storage, self._folder, keep=self._keep, keep_best=self._keep_best, attempt=self._attempt)

    def _wait_for_all(self, folder: str) -> dict[str, bytes]:
        """Read the index file of every rank; each is written after the rank's tensors."""
        deadline = time.monotonic() + self._timeout_s
        names = {f"{folder}/{rank_names(rank)[1]}" for rank in range(self._world_size)}
        while missing := names - set(self._storage.names(folder)):
            if self._stopped.wait(POLL_S) or time.monotonic() > deadline:
                raise TrainingError(f"{len(missing)} of {self._world_size} ranks did not write their part of {folder}")
        return {name.rsplit("/", 1)[-1]: self._storage.read(name) for name in sorted(names)}


def write_rank(storage: Storage, folder: str, rank: int, parts: Parts, *, account: Mapping[str, Any]) -> None:
    """Write one rank's tensors, then the index that says where they lie."""
    file, index = rank_names(rank)
    arrays = {f"{kind}/{fragment.name}": tensor.numpy() for (kind, fragment), tensor in parts.items()}
    with storage.unfinished(f"{folder}/{file}") as local:
        safetensors.numpy.save_file(arrays, local)
        num_bytes = local.stat().st_size
        with local.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        storage.upload(f"{folder}/{file}", local)
    entries = []
    for kind, fragment in parts:
        name = f"{kind}/{fragment.name}"
        offset = 8 + length + header[name]["data_offsets"][0]
        digest = hashlib.sha256(arrays[name].data).hexdigest()
        entries.append(asdict(FragmentEntry(kind=kind, **asdict(fragment), offset=offset, sha256=digest)))
    described = {**account, "num_bytes": num_bytes, "entries": entries}
    storage.write(f"{folder}/{index}", json.dumps(described).encode())


def remove_old(storage: Storage, folder: str, *, keep: int, keep_best: bool, attempt: str) -> None:
    """Remove all checkpoints except the newest and the best, and unfinished ones of other starts; manifests first."""
    kept = _kept(list_checkpoints(storage, folder), keep=keep, keep_best=keep_best)
    names = storage.names(folder)
    folders = {
        name.removeprefix(f"{folder}/").partition("/")[0] for name in names if name.count("/") > folder.count("/") + 1
    }
    for each in sorted(folders):
        path = f"{folder}/{each}"
        is_unfinished_now = each.endswith(attempt) and f"{path}/{MANIFEST}" not in names
        if path not in kept and not is_unfinished_now:
            storage.delete(f"{path}/{MANIFEST}")
            for name in names:
                if name.startswith(f"{path}/"):
                    storage.delete(name)


def _kept(found: list[Manifest], *, keep: int, keep_best: bool) -> set[str]:
    """Return the folders of the newest checkpoints, and of the best ones if they are to be kept."""
    best = [best_of(found), best_of(found, of_average=True)] if keep_best else []
    return {each.folder for each in [*found[-keep:], *best] if each is not None}


def set_aside(storage: Storage, manifest: Manifest) -> None:
    """Invalidate a damaged checkpoint: nothing resumes from it or exports it, and the next save removes it."""
    name = f"{manifest.folder}/{MANIFEST}"
    storage.write(f"{name}.damaged", storage.read(name))
    storage.delete(name)


def gather_parts(state: ZeroState, ema: ShardedEma | None) -> dict[tuple[str, Fragment], Tensor]:
    """Return this rank's current fragments of all kinds."""
    parts = {(kind, fragment): view for kind in state.kinds for fragment, view in state.views(kind)}
    parts |= {(kind, fragment): values for kind, fragment, values in state.extras()}
    if ema is not None:
        parts |= {(EMA, fragment): average for fragment, average in ema.fragments().items()}
    return parts


def restore(
    storage: Storage, folder: str, state: ZeroState, ema: ShardedEma | None, *, note: Callable[[str], None]
) -> Reader | None:
    """Load the newest complete checkpoint; collective.

    Args:
        storage: The storage of the checkpoints.
        folder: The folder of all checkpoints of this training.
        state: The state of this rank's engine.
        ema: The average of the weights, if the run keeps one.
        note: Called for each damaged checkpoint, which is skipped and set aside.

    Returns:
        The reader of the checkpoint; None if there is none to resume from.

    Raises:
        MapoError: The storage does not answer.
    """
    listed: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        listed[0] = list_checkpoints(storage, folder)
    torch.distributed.broadcast_object_list(listed, src=0)
    for manifest in reversed(listed[0]):
        reader, problem = _load(storage, manifest, state, ema)
        problems: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(problems, problem)
        if (error := next((each for each in problems if each is not None), None)) is None:
            assert reader is not None
            tensors, saved = reader
            state.load(
                tensors,
                num_steps=saved.state["num_adam_steps"],
                loss_scale=saved.state["loss_scale"],
                scalars=saved.state.get("optimizer", {}),
            )
            if ema is not None:
                ema.load(tensors[EMA])
            return saved
        if not isinstance(error, ShardCorrupt):
            raise error
        note(f"skipped checkpoint {manifest.name}: {error.message}")
        if torch.distributed.get_rank() == 0:
            set_aside(storage, manifest)
    return None


def _load(
    storage: Storage, manifest: Manifest, state: ZeroState, ema: ShardedEma | None
) -> tuple[tuple[dict[str, dict[str, Tensor]], Reader] | None, MapoError | None]:
    """Read this rank's fragments; return them, or the error."""
    kinds = [*state.kinds, *([EMA] if ema is not None else [])]
    wanted = [(kind, fragment) for kind in kinds for fragment in state.fragments]
    is_alike = manifest.world_size == torch.distributed.get_world_size() and manifest.zero_stage == state.stage
    wanted += state.wanted_extras(of_same_ranks=is_alike)
    try:
        reader = Reader(storage, manifest)
        arrays = reader.read((kind, part.name, part.start, part.numel) for kind, part in wanted)
        tensors: dict[str, dict[str, Tensor]] = {}
        for (kind, fragment), array in zip(wanted, arrays, strict=True):
            tensors.setdefault(kind, {})[fragment.name] = torch.from_numpy(array)
        return (tensors, reader), None
    except MapoError as error:
        return None, error
