"""Waits for the resources of a stage: says for what and how long, and fails if they cannot arrive."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.dataset.errors import ClusterError
from pipelines.dataset.secrets import write_line
from pipelines.resources import Demand
from pipelines.units.autoscaler import has_autoscaler

LOOK_S = 1.0
FIRST_WORD_S = 8.0  # of a wait for what is in use: most are over by then
KNOWN_AFTER_S = 5.0  # a head that has just begun says within that whether it has an autoscaler
LONGEST_PAUSE_S = 300.0  # between two lines
TIMEOUT_S = {False: 60, True: 1800}
"""How long to wait for a node, without and with an autoscaler: a cloud may take half an hour to start a machine."""


@dataclass(frozen=True)
class Shortage:
    """A resource that no node of the cluster has.

    Args:
        line: The line to show while waiting.
        error: The error message once the wait is over.
    """

    line: str
    error: str


class Wait:
    """A wait that reports within seconds, then less and less often, and fails after a time limit.

    Args:
        stage: The stage, shown in front.
        find_shortage: Returns what no live node has; None if nodes have it, but it is in use.
        in_use: The line to show in the latter case, which has no time limit; None for no line.
        timeout_s: Time limit while no node has it; None for `TIMEOUT_S`.
        way_out: The hint of the error.
        say: Takes lines for the user.
        is_waiting: Whether there is a wait at all, if the caller cannot tell; asked before `in_use` is shown.
    """

    def __init__(
        self, stage: str, find_shortage: Callable[[], Shortage | None], in_use: str | None, *, timeout_s: float | None,
        way_out: str, say: Callable[[str], None] = write_line, is_waiting: Callable[[], bool] = lambda: True,
    ) -> None:  # fmt: skip
        self._stage, self._find_shortage, self._in_use, self._say = stage, find_shortage, in_use, say
        self._timeout_s, self._way_out, self._is_waiting = timeout_s, way_out, is_waiting
        self._shortage: Shortage | None = None
        self.restart()

    def restart(self) -> None:
        """Start another wait."""
        self._since, self._next_word_s = time.monotonic(), FIRST_WORD_S if self._shortage is None else 0.0

    def look(self) -> None:
        """Report if it is time to; called about once a second during the wait.

        Raises:
            ClusterError: No node has had the resource within the time limit.
        """
        before, self._shortage = self._shortage, self._find_shortage()
        if (self._shortage is None) != (before is None):
            self.restart()
        waited_s = time.monotonic() - self._since
        if self._shortage is not None:
            self._look_for_nodes(self._shortage, waited_s)
        elif self._in_use is not None and self._is_waiting():
            self._speak(self._in_use, waited_s, clock(waited_s))
        else:
            self.restart()

    def _look_for_nodes(self, shortage: Shortage, waited_s: float) -> None:
        grows = has_autoscaler()
        # An autoscaler is assumed where it is not known: a node that is coming must not be given up.
        limit_s = self._timeout_s if self._timeout_s is not None else TIMEOUT_S[grows is not False]
        if waited_s >= limit_s:
            why = "and none joined" if grows is not False else "and the cluster has no autoscaler that could add one"
            raise ClusterError(f"{self._stage}: {shortage.error}, {why} (waited {clock(limit_s)})", self._way_out)
        is_sure = self._timeout_s is not None or grows is not None or waited_s >= KNOWN_AFTER_S
        if is_sure:
            self._speak(shortage.line, waited_s, f"{clock(waited_s)} of {clock(limit_s)}")

    def _speak(self, line: str, waited_s: float, times: str) -> None:
        if waited_s >= self._next_word_s:
            self._next_word_s = waited_s + min(max(waited_s, 30.0), LONGEST_PAUSE_S)
            self._say(f"{self._stage}: {line} ({times})")


def wait_for(
    stage: str, demand: Demand, *, timeout_s: float | None, way_out: str, say: Callable[[str], None] = write_line
) -> Wait:
    """Return the wait for one worker that requests `demand`."""

    def find_shortage() -> Shortage | None:
        if demand.has_node():
            return None
        return Shortage(f"no node has {demand} yet; waiting for one", f"no node has {demand}")

    in_use = f"waiting for a free {demand.resource}"
    return Wait(stage, find_shortage, in_use, timeout_s=timeout_s, way_out=way_out, say=say)


def wait_until_placed(
    demand: Demand, wait: Wait | None, *, count: int = 1, is_stopped: Callable[[], bool] = lambda: False
) -> bool:
    """Wait until Ray can place a worker that requests `demand`; an autoscaler sees the pending request meanwhile.

    For executions of Ray Data, which would wait silently forever. It does not wait for a CPU that is in use: Ray Data
    queues for it like everyone else.

    Args:
        demand: The demand of one worker.
        wait: Called about once a second; None waits silently and without a limit.
        count: Number of workers that will be requested, so that an autoscaler adds nodes for all of them.
        is_stopped: Ends the wait early.

    Returns:
        Whether a worker can be placed; False if the wait was ended early.

    Raises:
        ClusterError: No node has the resources, and none joined in time.
    """
    import ray

    if demand.has_node() and (demand.resource == "CPU" or demand.is_free()):
        return True
    probe = ray.remote(**demand.options())(_nothing)
    probes = [probe.remote() for _ in range(count)]
    is_placed = False
    try:
        while not is_placed and not is_stopped():
            is_placed = bool(ray.wait(probes, num_returns=1, timeout=LOOK_S)[0])
            if not is_placed and wait is not None:
                wait.look()
        return is_placed
    finally:
        # Ray aborts the whole driver if a task is cancelled just as it ends ("Tried to complete task that was not
        # pending"), so only probes that found no place are cancelled; once one has, the others end by themselves.
        if not is_placed:
            with contextlib.suppress(Exception):  # the cluster may be gone
                for each in probes:
                    ray.cancel(each)


def _nothing() -> None:
    """Do nothing: running at all shows that a worker was placed."""


def clock(seconds: float) -> str:
    """Format seconds as minutes and seconds, as 0:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
