"""Threads of the driver that wait inside Ray: Ray must not be shut down while one of them runs."""

import threading
from collections.abc import Callable


class RayThread(threading.Thread):
    """A daemon thread that calls Ray, and may still wait there when everything else has ended."""

    def __init__(self, target: Callable[[], None], name: str) -> None:
        super().__init__(target=target, name=name, daemon=True)


def any_in_ray() -> bool:
    """Return whether such a thread of this process is still running."""
    return any(isinstance(thread, RayThread) for thread in threading.enumerate())
