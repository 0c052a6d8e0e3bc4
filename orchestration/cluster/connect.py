"""Ray for a run: the cluster that is there, or one of this machine's own."""

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mapo_entry
from orchestration.cluster.exit_message import LastWords
from orchestration.cluster.head_watch import HeadWatch
from orchestration.cluster.signals import keeping_handlers
from orchestration.config import RunConfig
from orchestration.run import encode_ahead as overlap
from pipelines.dataset.errors import ClusterError
from pipelines.dataset.storage import PATIENCE

INHERITED = (PATIENCE,)
HOOK = "worker_process_setup_hook"  # of a runtime environment
PRELOADED = "RAY_preload_python_modules"  # read when a node starts: what its workers import first
OOM_RETRIES = ("RAY_task_oom_retries", "6")  # read when Ray is imported; its default is for ever
MAX_MESSAGE = 800  # characters of what Ray says
SPARE_CPUS = 2  # for Ray Data's tasks and the driver's own, beside the workers that hold one each


@contextlib.contextmanager
def connected(config: RunConfig, on_lost: Callable[[ClusterError], None]) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS (a Ray job has it set), or start a local one and stop it at the end.

    Args:
        config: The run's.
        on_lost: Told, from another thread, that the cluster's head does not answer any more.

    Raises:
        ClusterError: Instead of whatever Ray says without its head.
    """
    os.environ.setdefault(*OOM_RETRIES)
    import ray

    if ray.is_initialized():
        yield
        return
    with LastWords() as last_words, _connected(config, on_lost, last_words):
        yield


@contextlib.contextmanager
def _connected(config: RunConfig, on_lost: Callable[[ClusterError], None], last_words: LastWords) -> Iterator[None]:
    import ray

    given = HeadWatch(os.environ.get("RAY_ADDRESS", ""), on_lost, last_words)
    if given.has_address and not given.answers():
        raise given.error
    watched = given if given.has_address else contextlib.nullcontext()  # it may go while Ray connects
    with watched, keeping_handlers(), _quiet_start():
        try:
            _init(config)
        except Exception as error:
            raise ClusterError(
                f"Ray did not start: {in_short(error)}", "Ray's logs are in /tmp/ray/session_latest/logs"
            ) from error
    watch = HeadWatch(ray.get_runtime_context().gcs_address, on_lost, last_words)
    try:
        with watch:
            yield
    finally:
        # Without a head it would wait, and under a thread that is in Ray it would crash; the process is about to end.
        if not watch.is_lost and not _is_in_use():
            ray.shutdown()


def _is_in_use() -> bool:
    """Whether a training or an encode beside ingest that was stopped before it began still waits in Ray.

    The system kills a Ray that this process started; a cluster notices that its driver is gone.
    """
    from training.stop_request import WAITS_IN_RAY

    return any(thread.name in (WAITS_IN_RAY, overlap.WAITS_IN_RAY) for thread in threading.enumerate())


@contextlib.contextmanager
def ours(stage: str) -> Iterator[None]:
    """Raise what Ray says of workers, nodes and objects that are gone as an error of ours.

    Raises:
        ClusterError: They are.
    """
    try:
        yield
    except Exception as error:
        from ray import exceptions

        gone: tuple[type[Exception], ...] = (
            exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.NodeDiedError,
            exceptions.ObjectLostError, exceptions.OutOfMemoryError, exceptions.RaySystemError,
        )  # fmt: skip
        if not isinstance(error, gone):
            raise
        raise ClusterError(
            f"{stage} lost what it worked with: {type(error).__name__}: {in_short(error)}",
            "finished work is on the storage; rerun the same command to resume; `ray status` shows the nodes",
        ) from error


def in_short(error: Exception) -> str:
    """What Ray says, in one line: of a traceback the beginning says where, and the end says what."""
    said = " ".join(str(error).split())
    half = MAX_MESSAGE // 2
    return said if len(said) <= MAX_MESSAGE else f"{said[:half]} … {said[-half:]}"


@contextlib.contextmanager
def attached() -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, unless this process is connected already; never start one."""
    import ray

    if ray.is_initialized():
        yield
        return
    with _quiet_start():
        logging.getLogger("ray").setLevel(logging.ERROR)
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def _init(config: RunConfig) -> None:
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR, log_to_driver=False, runtime_env=_for_workers())
    else:
        workers = max(
            config.train.worker_range[0] if config.train else 1, config.encode.worker_range[0] if config.encode else 1
        )
        with _names_preloaded():
            ray.init(
                address="local",  # not a cluster that happens to have been started on this machine, or once was
                num_cpus=max(os.cpu_count() or 1, workers + SPARE_CPUS),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )


def _for_workers() -> dict[str, Any]:
    """Return the runtime environment of a cluster's workers, less what the job has from its submitter.

    It holds what they must know of this process's environment, and the hook by which mapo's packages are theirs too.
    """
    of_job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env", {})
    names = set(INHERITED) - set(of_job.get("env_vars", {}))
    hook = {} if HOOK in of_job else {HOOK: mapo_entry.worker_hook()}
    return {"env_vars": {name: os.environ[name] for name in names if name in os.environ}, **hook}


@contextlib.contextmanager
def _names_preloaded() -> Iterator[None]:
    """Let the workers of a Ray that starts in the block claim mapo's names.

    Unlike the hook, it also reaches the workers that Ray starts before there is work.
    """
    given = os.environ.get(PRELOADED)
    os.environ[PRELOADED] = ",".join([*([given] if given else []), mapo_entry.__name__])
    try:
        yield
    finally:
        if given is None:
            del os.environ[PRELOADED]
        else:
            os.environ[PRELOADED] = given


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    """Keep the chatter of Ray's C++ core off the terminal; it has its own log files, and errors are raised."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
