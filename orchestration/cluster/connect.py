"""Ray for a run: connect to the cluster of RAY_ADDRESS, or start a local one."""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import mapo_entry
from orchestration.cluster.exit_message import ExitMessage
from orchestration.cluster.head_watch import HeadWatch
from orchestration.cluster.signals import keeping_handlers
from orchestration.config import RunConfig
from pipelines.dataset.errors import ClusterError
from pipelines.dataset.ray_thread import any_in_ray
from pipelines.dataset.storage import PATIENCE

INHERITED = (PATIENCE,)
HOOK = "worker_process_setup_hook"  # of a runtime environment
PRELOADED = "RAY_preload_python_modules"  # read when a node starts: what its workers import first
OOM_RETRIES = ("RAY_task_oom_retries", "6")  # read when Ray is imported; the default is to retry forever
MAX_MESSAGE = 800  # characters of an error of Ray
SPARE_CPUS = 2  # for tasks of Ray Data and of the driver, beside the workers that hold one each


@contextlib.contextmanager
def connected(config: RunConfig, on_lost: Callable[[ClusterError], None]) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS (set in a Ray job), or start a local one and stop it at the end.

    Args:
        config: The run's configuration.
        on_lost: Called from another thread once the cluster's head no longer answers.

    Raises:
        ClusterError: Ray did not start, or the head does not answer.
    """
    os.environ.setdefault(*OOM_RETRIES)
    import ray

    if ray.is_initialized():
        yield
        return
    with ExitMessage() as exit_message, _connected(config, on_lost, exit_message):
        yield


@contextlib.contextmanager
def _connected(config: RunConfig, on_lost: Callable[[ClusterError], None], exit_message: ExitMessage) -> Iterator[None]:
    import ray

    given = HeadWatch(os.environ.get("RAY_ADDRESS", ""), on_lost, exit_message)
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
    watch = HeadWatch(ray.get_runtime_context().gcs_address, on_lost, exit_message)
    try:
        with watch:
            yield
    finally:
        # Without a head this would wait, and crash under a thread that is in Ray; the process is about to end anyway.
        # Under a thread in Ray it is not shut down: a local one ends with this process, a cluster notices by itself.
        if not watch.is_lost and not any_in_ray():
            ray.shutdown()


@contextlib.contextmanager
def translate_ray_errors(stage: str) -> Iterator[None]:
    """Translate Ray's errors about lost workers, nodes and objects into ClusterError.

    Args:
        stage: The stage that runs in the block, for the message.

    Raises:
        ClusterError: A worker, node or object of the stage is lost.
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
            f"{stage} lost a worker, a node or an object: {type(error).__name__}: {in_short(error)}",
            "finished work is on the storage; rerun the same command to resume; `ray status` shows the nodes",
        ) from error


def in_short(error: Exception) -> str:
    """Return an error of Ray in one line; for a long traceback, its beginning (where) and its end (what)."""
    text = " ".join(str(error).split())
    half = MAX_MESSAGE // 2
    return text if len(text) <= MAX_MESSAGE else f"{text[:half]} … {text[-half:]}"


@contextlib.contextmanager
def attached() -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS unless this process is already connected; never start one."""
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
                address="local",  # not a cluster that happens to run on this machine, or once did
                num_cpus=max(os.cpu_count() or 1, workers + SPARE_CPUS),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )


def _for_workers() -> dict[str, object]:
    """Return the runtime environment of a cluster's workers, without what the job has from its submitter.

    It contains the variables they need from this process's environment, and the hook that makes mapo's packages theirs.
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
    """Keep the output of Ray's C++ core off the terminal; it has its own log files, and errors are raised."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
