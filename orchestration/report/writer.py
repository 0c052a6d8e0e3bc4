"""Write a run's report and the index of runs: once on request, or again and again while a stage runs."""

import contextlib
import logging
import shlex
import threading
import time
from collections.abc import Iterator
from types import TracebackType

from orchestration.config import RunConfig
from orchestration.report.course import RunState
from orchestration.report.data import Gathered, page_images, report_data
from orchestration.report.live_curves import SEEN, SeenSteps
from orchestration.run.context import Run, Say
from pipelines.dataset.errors import MapoError

EVERY_S = 60.0
LOOK_S = 5.0  # as often as workers write their progress
MAX_LOAD = 0.05  # share of the time: a page that takes long to write is written less often
CLOSE_S = 60.0  # to wait for the last page

log = logging.getLogger(__name__)


def write_report(
    run: Run,
    *,
    command: str,
    is_driven: bool | None = None,
    gathered: Gathered | None = None,
    is_stopped: threading.Event | None = None,
) -> str:
    """Write the run's report, its leaderboard if models were judged, its summary and the index of runs, as of now.

    Can be called at any time: before any stage has run, while one runs (from another machine, too), after a failure.

    Args:
        run: The run.
        command: The command to continue the run, if its journal does not know it.
        is_driven: Whether a driver is working on the run; False for its own last page; by default read from the lease.
        gathered: Data that an earlier call has read.
        is_stopped: Once it is set, nothing more is written.

    Returns:
        The page's name on the storage.
    """
    from orchestration.report.index import write_index
    from orchestration.report.leaderboard import leaderboard_of
    from orchestration.report.page import render_leaderboard, render_report  # Pillow, NumPy and Jinja: once needed
    from orchestration.report.summary import summary_of

    data = report_data(run.config, run.storage, run.journal, command=command, is_driven=is_driven, gathered=gathered)
    page = render_report(data, page_images(run.storage, run.folder, data)).encode()
    board = leaderboard_of(data.evaluation)
    may_write = (lambda: True) if is_stopped is None else (lambda: not is_stopped.is_set())
    if may_write():
        if board is not None:
            run.storage.write(run.leaderboard, render_leaderboard(data, board).encode())
        run.storage.write(run.report, page)
        write_index(run.storage, summary_of(data), may_write=may_write)
    if data.state == RunState.FINISHED:
        run.storage.delete(f"{run.folder}/{SEEN}")
    return run.report


def report_now(config: RunConfig, *, config_file: str, say: Say) -> None:
    """Write the report of a run and the index of runs, and say where they are.

    Args:
        config: The run's configuration.
        config_file: The file it was read from.
        say: Takes lines for the terminal.
    """
    from orchestration.report.index import INDEX

    run = Run.open(config, say)
    page = write_report(run, command=shlex.join(["mapo", "run", config_file]))
    say(f"report  {run.storage.uri(page)}\nruns    {run.storage.uri(INDEX)}")


class ReportWriter:
    """Context manager that writes the report every minute or so while a stage runs.

    Its failures never fail the run: they are logged, and the next page is attempted in due time. Nothing is written
    after `close`.

    Args:
        run: The run.
        command: See `write_report`.
        every_s: Seconds between two pages; longer if writing a page takes more than MAX_LOAD of that.
    """

    def __init__(self, run: Run, *, command: str, every_s: float = EVERY_S) -> None:
        self._run, self._command, self._every_s = run, command, every_s
        self._closed = threading.Event()
        self._gathered = Gathered()
        self._thread = threading.Thread(target=self._work, name="report", daemon=True)

    def __enter__(self) -> "ReportWriter":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop; wait for a page that is being written, and drop it if it takes longer than CLOSE_S."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_S)

    def write(self, *, is_driven: bool | None = True) -> None:
        """Write the page now, in this thread: between stages, or with `is_driven=False` at the driver's end.

        Args:
            is_driven: See `write_report`.
        """
        with self._errors_logged("report"):
            write_report(self._run, command=self._command, is_driven=is_driven, gathered=self._gathered)

    def _work(self) -> None:
        train = self._run.config.train
        seen = None
        with self._errors_logged("curves"):
            if train is not None:
                seen = SeenSteps(self._run.storage, self._run.folder, validate_every=train.validate_every)
        next_page = time.monotonic()
        while not self._closed.is_set():
            if seen is not None:
                with self._errors_logged("curves"):
                    seen.look()
            if time.monotonic() >= next_page:
                next_page = self._page(seen)
            self._closed.wait(min(LOOK_S, self._every_s))

    def _page(self, seen: SeenSteps | None) -> float:
        """Write a page; return the time of the next one."""
        started = time.monotonic()
        with self._errors_logged("report"):
            if seen is not None:
                seen.save()
            write_report(
                self._run,
                command=self._command,
                is_driven=True,
                gathered=self._gathered,
                is_stopped=self._closed,
            )
        ended = time.monotonic()
        return ended + max(self._every_s, (ended - started) / MAX_LOAD)

    @contextlib.contextmanager
    def _errors_logged(self, what: str) -> Iterator[None]:
        try:
            yield
        except MapoError as error:
            log.warning("%s not written: %s", what, error.message)
        except Exception:  # a page must never fail the run
            log.warning("%s not written", what, exc_info=True)
