"""A canary for the cluster: while no actor can stay alive on it, Ray Data waits forever (decisions/0019)."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

from orchestration.cluster.connect import in_short
from pipelines.dataset.errors import ClusterError

LOOK_S = 2.0
MAX_DEATHS = 50  # about one a second, where every worker is killed

log = logging.getLogger(__name__)


class _Actor:
    def ping(self) -> None:
        """Answer."""


@contextlib.contextmanager
def canary(on_lost: Callable[[ClusterError], None]) -> Iterator[None]:
    """Keep an idle actor alive on a running Ray during the block; report to `on_lost` when that is impossible.

    Ray Data restarts its own actors without limit, and its scheduler waits for one of them: where workers are killed
    faster than they start, an execution never ends. The canary holds no CPU, and is restarted up to MAX_DEATHS times.

    Args:
        on_lost: Called once, from another thread.
    """
    import ray

    actor = ray.remote(num_cpus=0, max_restarts=MAX_DEATHS - 1)(_Actor).remote()
    is_over = threading.Event()
    watch = threading.Thread(target=_watch, args=(actor, is_over, on_lost), name="canary", daemon=True)
    watch.start()
    try:
        yield
    finally:
        is_over.set()
        watch.join(2 * LOOK_S)
        with contextlib.suppress(Exception):  # the cluster may be gone
            ray.kill(actor)


def _watch(actor: Any, is_over: threading.Event, on_lost: Callable[[ClusterError], None]) -> None:
    import ray
    from ray import exceptions

    while not is_over.wait(LOOK_S):
        try:
            ray.get(actor.ping.remote(), timeout=LOOK_S)
        except (exceptions.ActorDiedError, exceptions.OutOfMemoryError) as error:  # its last restart is used up
            if not is_over.is_set():
                on_lost(_lost(error))
            return
        except Exception as error:  # it is being restarted, or the head is away, which HeadWatch looks after
            log.debug("%s", error)


def _lost(error: Exception) -> ClusterError:
    return ClusterError(
        f"even an actor that does nothing died {MAX_DEATHS} times on this cluster: {in_short(error)}",
        "check whether its nodes are out of memory, or something kills their processes; "
        "finished work is on the storage; rerun the same command to resume",
    )
