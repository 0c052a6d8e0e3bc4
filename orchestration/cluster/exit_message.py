"""A message for a driver that is killed before it can print one (decisions/0019).

Ray's core ends a driver at once when its raylet, or one of the raylet's agents, has died; the system kills a process
that takes too much memory. Neither leaves Python time to write, so another process waits for the end.
"""

from __future__ import annotations

import contextlib
import subprocess
from types import TracebackType

UNEXPECTED = (
    "ClusterError: this process was killed, by the system or because its Ray node died (the raylet or an agent of it)\n"
    "hint: is the machine out of memory? finished work is on the storage; rerun the same command to resume"
)
WAITER = r"""while IFS= read -r line; do last=$line; done; [ -z "$last" ] || printf '%b\n' "$last" >&2"""


class ExitMessage:
    """A context manager: a shell of a few hundred kilobytes waits for the end of this process.

    It then writes the message to the original standard error; nothing after a normal exit.
    """

    def set(self, text: str) -> None:
        """Set the message; an empty one is not written."""
        assert self._waiter.stdin
        with contextlib.suppress(BrokenPipeError):
            self._waiter.stdin.write(text.replace("\\", r"\\").replace("\n", r"\n").encode() + b"\n")
            self._waiter.stdin.flush()

    def __enter__(self) -> ExitMessage:
        # In a session of its own, which Ctrl-C does not reach.
        command = ["/bin/sh", "-c", WAITER]
        self._waiter = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603
        self.set(UNEXPECTED)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.set("")
        assert self._waiter.stdin
        with contextlib.suppress(BrokenPipeError):
            self._waiter.stdin.close()
        self._waiter.wait()
