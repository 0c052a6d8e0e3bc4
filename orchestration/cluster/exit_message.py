"""What is said of a process that ends without a word.

Ray's core ends a driver at once when its node is gone, which is when its raylet or one of the raylet's agents has died;
the system kills what takes too much memory. Neither leaves Python a moment, so another process waits for the end.
"""

from __future__ import annotations

import contextlib
import subprocess
from types import TracebackType

UNEXPECTED = (
    "ClusterError: this process was ended without a word: its Ray node died (the raylet or one of its agents), or the "
    "system killed it\n"
    "hint: is the machine out of memory? finished work is on the storage; rerun the same command to resume"
)
WAITER = r"""while IFS= read -r line; do last=$line; done; [ -z "$last" ] || printf '%b\n' "$last" >&2"""


class LastWords:
    """While it is entered, a shell waits for the end of this process; a few hundred kilobytes.

    It writes to what is standard error at the beginning.
    """

    def say(self, text: str) -> None:
        """Let this be said at the end; nothing, if it is empty."""
        assert self._waiter.stdin
        with contextlib.suppress(BrokenPipeError):
            self._waiter.stdin.write(text.replace("\\", r"\\").replace("\n", r"\n").encode() + b"\n")
            self._waiter.stdin.flush()

    def __enter__(self) -> LastWords:
        # In a session of its own: Ctrl-C is for the driver.
        command = ["/bin/sh", "-c", WAITER]
        self._waiter = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603
        self.say(UNEXPECTED)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.say("")
        assert self._waiter.stdin
        with contextlib.suppress(BrokenPipeError):
            self._waiter.stdin.close()
        self._waiter.wait()
