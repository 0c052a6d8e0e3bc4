"""The driver's side of training: Ray Train workers, restarts, and the result."""

import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pa_fs
import ray
import ray.train
from ray.experimental.internal_kv import _internal_kv_get
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines.dataset.errors import ClusterError, MapoError, TrainingError, unwrap
from pipelines.dataset.processes import TORCH_ENVIRONMENT
from pipelines.dataset.ray_thread import RayThread
from pipelines.dataset.storage import Storage
from pipelines.dataset.values import JsonObject
from training.early_exit import new_flag
from training.run_progress import RunProgress
from training.spec import TrainSpec
from training.state.checkpoint_format import Manifest, Reader, best_of, list_checkpoints
from training.tracking.account import ConsumedPairs

POLL_S = 1.0


@dataclass(frozen=True)
class TrainingResult:
    """The result of training.

    Args:
        checkpoint: Folder of the last checkpoint, relative to the storage.
        best_checkpoint: The one with the lowest validation loss; the last one if nothing is held out.
        best_average_checkpoint: The one with the lowest validation loss of the average of the weights.
        steps: Finished optimizer steps.
        history: Metrics by step and by validation.
        workers: Identity of each rank and the pairs it consumed.
        digest: Digest of all pairs in the order of steps and slots; the same on any number of workers.
        starts: How often workers were started; more than 1 after a failure.
    """

    checkpoint: str
    best_checkpoint: str
    best_average_checkpoint: str
    steps: int
    history: JsonObject
    workers: list[JsonObject]
    digest: str
    starts: int


def train(
    spec: TrainSpec,
    watch: Callable[[RunProgress], None],
    *,
    wait_for_gpus: Callable[[bool], None] = lambda has_begun: None,
) -> TrainingResult:
    """Train on `num_workers` Ray Train workers until `max_steps`; needs a running Ray.

    An interrupted run resumes from its last checkpoint; so do workers after a crash, up to `max_failures` times.

    Args:
        spec: The run.
        watch: Called about once a second with the run's progress.
        wait_for_gpus: Called about once a second before and while GPU workers train, with whether they have started.
            Raises ClusterError if the GPUs for `device: gpu` never arrive; by default the wait has no limit.

    Raises:
        TrainingError: The cluster is too small, or the workers failed too often.
        ClusterError: Raised by `wait_for_gpus`.
        KeyboardInterrupt: Raised in this thread; raised again after the workers wrote a checkpoint and ended.
    """
    quiet_ray_train(spec)
    flag = new_flag()
    use_gpu = check_cluster(spec)
    trainer = _trainer(spec, flag, use_gpu=use_gpu)
    spec.storage.delete(spec.stop_file)
    progress, fit = _ProgressFile(spec, watch), _Fit(trainer)
    try:
        while not fit.is_over(POLL_S):
            progress.look()
            if use_gpu:
                wait_for_gpus(progress.has_begun)
        progress.look()
    except ClusterError as error:  # Ray Train still asks for workers: nobody may begin this training beside it
        error.ends_process = True
        raise
    except KeyboardInterrupt:
        # Otherwise there is nothing to keep, and perhaps no worker that would hear; the thread ends with the process.
        if progress.has_begun:
            ray.get(flag.set.remote())
            fit.wait()
        raise
    if fit.error is not None:
        raise _own_error(fit.error, spec) from fit.error
    if spec.storage.exists(spec.stop_file):
        raise TrainingError(*json.loads(spec.storage.read(spec.stop_file)))
    manifests = list_checkpoints(spec.storage, spec.checkpoints)
    if not manifests or manifests[-1].step < spec.config.max_steps:
        raise TrainingError(
            f"{spec.storage.uri(spec.checkpoints)} has no checkpoint of the last step", "run `mapo train` again"
        )
    return read_checkpoint(spec.storage, manifests)


def _trainer(spec: TrainSpec, flag: Any, *, use_gpu: bool) -> TorchTrainer:
    """Build the Ray Train trainer with the configured number of workers, or as many of a range as fit."""
    least, most = spec.config.worker_range
    storage_path, filesystem = _ray_storage(spec)
    return _Trainer(
        _work,
        train_loop_config={"spec": spec, "stop_flag": flag},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=spec.config.collective_timeout_s),
        scaling_config=ray.train.ScalingConfig(num_workers=least if least == most else (least, most), use_gpu=use_gpu),
        run_config=ray.train.RunConfig(
            name=spec.key,
            storage_path=storage_path,
            storage_filesystem=filesystem,
            failure_config=ray.train.FailureConfig(max_failures=spec.config.max_failures),
            worker_runtime_env={"env_vars": {**TORCH_ENVIRONMENT, **spec.config.environment}},
        ),
    )


def _work(work: dict[str, Any]) -> None:
    """Train on a worker; imports here, because driver and controller need neither diffusers nor DeepSpeed."""
    from training.worker import train_worker

    train_worker(work)


def read_checkpoint(storage: Storage, manifests: list[Manifest]) -> TrainingResult:
    """Read the result of a training from its newest checkpoint."""
    reader, best = Reader(storage, manifests[-1]), best_of(manifests)
    best_average = best_of(manifests, of_average=True) or best
    return TrainingResult(
        checkpoint=manifests[-1].folder,
        best_checkpoint=best.folder if best else manifests[-1].folder,
        best_average_checkpoint=best_average.folder if best_average else manifests[-1].folder,
        steps=manifests[-1].step,
        history=reader.state["history"],
        workers=reader.ranks,
        digest=ConsumedPairs.sum(reader.ranks).digest,
        starts=reader.state["starts"],
    )


def check_cluster(spec: TrainSpec) -> bool:
    """Return whether to use GPUs; raise now if the cluster can never hold the workers, instead of waiting forever.

    With `device: gpu`, nodes may still join; see `train`.
    """
    resources, (wanted, _) = ray.cluster_resources(), spec.config.worker_range
    if spec.config.device == "gpu":
        return True
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if spec.config.device == "auto" and gpus >= wanted:
        return True
    if spec.config.device == "auto" and gpus:
        raise TrainingError(
            f"train.num_workers is {spec.config.num_workers}, but the cluster has {gpus} GPUs",
            f"set `-o train.num_workers={gpus}`, or add GPU nodes; `train.device: gpu` waits for them",
        )
    if cpus < wanted + 1:
        raise TrainingError(
            f"train.num_workers is {spec.config.num_workers}, but the cluster has {cpus} CPUs"
            + ("" if gpus else " and no GPU"),
            "start Ray with more CPUs (`ray start --head --num-cpus N`) or lower `train.num_workers`",
        )
    return False


def quiet_ray_train(spec: TrainSpec) -> None:
    """Send Ray Train's own output to its log files; mapo prints what matters."""
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(spec.config.start_timeout_s)
    logging.getLogger("ray.train").setLevel(logging.ERROR)


def _ray_storage(spec: TrainSpec) -> tuple[str, Any]:
    """Return where Ray Train keeps its own state: through mapo's file system unless the storage is a plain folder."""
    storage = spec.storage
    parent = f"{spec.folder}/ray_train"
    if storage.is_local:
        return storage.path(parent), None
    return storage.path(parent), pa_fs.PyFileSystem(pa_fs.FSSpecHandler(storage.fs))


def _own_error(error: Exception, spec: TrainSpec) -> MapoError:
    """Return the MapoError that a worker raised, if any; otherwise a TrainingError with the failure in one line."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        if (ours := unwrap(failure)) is not None:
            return ours
    if (ours := unwrap(error)) is not None:
        return ours
    rank, cause = next(iter(failures.items()), (None, error))
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    where = "" if rank is None else f" on rank {rank}, after {spec.config.max_failures} restarts"
    return TrainingError(
        f"training failed{where}: {lines[-1]}",
        "rerun the same command to resume from the last checkpoint; `--debug` shows the workers' traceback",
    )


class _Trainer(TorchTrainer):  # type: ignore[misc]  # Ray ships no types
    """Ray Train's trainer, without its placement group cleaner if Ray has no dashboard.

    The cleaner asks the dashboard whether the driver's controller is still alive. Without a dashboard it gets no
    answer, and every training shorter than 40 s waits another 12 s for it at the end.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        if _internal_kv_get(b"webui:url", namespace=b"dashboard"):
            return callbacks
        return [each for each in callbacks if type(each).__name__ != "PlacementGroupCleanerCallback"]


class _Fit:
    """Ray Train's run in a separate thread, so that this one gets the signals: in the main thread it takes SIGINT."""

    def __init__(self, trainer: TorchTrainer) -> None:
        self._trainer = trainer
        self.error: Exception | None = None
        # An event and no join: Python 3.11 takes a thread for ended once a signal has interrupted its join.
        self._over = threading.Event()
        RayThread(self._run, "ray-train").start()

    def _run(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # raised again in the thread that waits
            self.error = error
        finally:
            self._over.set()

    def is_over(self, wait_s: float) -> bool:
        """Return whether the run has ended, after waiting at most `wait_s` seconds."""
        return self._over.wait(wait_s)

    def wait(self) -> None:
        """Wait until the run has ended."""
        self._over.wait()


class _ProgressFile:
    """The progress file of the workers, ignored until this run of them has written it."""

    def __init__(self, spec: TrainSpec, watch: Callable[[RunProgress], None]) -> None:
        self._spec, self._watch = spec, watch
        before = self._read()  # what an interrupted run left
        self._old = before and before.started_at
        self.has_begun = False

    def _read(self) -> RunProgress | None:
        name = f"{self._spec.folder}/progress.json"
        try:
            if not self._spec.storage.exists(name):
                return None
            progress = RunProgress.parse(self._spec.storage.read(name))
        except (MapoError, ValueError):
            return None  # a missed look at the progress is no failure of the training
        return progress if progress.key == self._spec.key else None

    def look(self) -> None:
        """Pass on the newest progress, if this run has written any."""
        progress = self._read()
        if progress is not None and progress.started_at != self._old:
            self.has_begun = True
            self._watch(progress)
