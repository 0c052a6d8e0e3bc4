"""Encodes latents while the ingest is still running, in one execution that lasts until all committed pairs are done.

Prompts are left to `encode`, because timing would decide which of them share a shard. Latents have no such problem: a
unit is a pair shard, whenever it is encoded.
"""

import contextlib
import threading
import time
from collections.abc import Iterator

from pipelines.config import EncodeConfig
from pipelines.dataset.layout import LATENTS, latents_table, pairs_table
from pipelines.dataset.storage import Storage
from pipelines.encode.fingerprint import fingerprint_of, latents_parts, note_parts
from pipelines.encode.plan import pending_latents, with_absolute_paths
from pipelines.encode.workers import check_dropped, encode_units
from pipelines.progress import ProgressBar
from pipelines.units.feed import UnitFeed
from pipelines.units.pool import demand_of, divide_cluster
from pipelines.units.stats import Speed, Tally, count_dropped
from pipelines.units.unit import Unit
from pipelines.units.waiting import wait_until_placed

LOOK_AGAIN_S = 1.0
MAX_LOOK_RATIO = 0.1  # of the time: a look at 10 million pairs takes seconds
MIN_UNITS = 4  # or one for each encoder: no device is taken for less


class LatentsAhead:
    """Encoding alongside ingest: `run` needs its own thread; the other methods are for the thread that ingests.

    Args:
        config: The section `encode`.
        storage: The storage that the ingest commits to.
    """

    def __init__(self, config: EncodeConfig, storage: Storage) -> None:
        self._config, self._storage = with_absolute_paths(config), storage
        self._is_over, self._is_stopped = threading.Event(), threading.Event()
        self._given: set[str] = set()
        self._num_given = 0
        self._tally: Tally | None = None
        self._failed: Exception | None = None

    def finish(self) -> None:
        """Let `run` end once everything committed is encoded; called when the ingest is over."""
        self._is_over.set()

    def stop(self) -> None:
        """Let `run` end after the next unit."""
        self._is_stopped.set()
        self._is_over.set()

    def take_speed(self) -> Speed | None:
        """Return what was encoded since the last call, and how fast; None if nothing."""
        return None if self._tally is None else self._tally.take()

    def run(self) -> None:
        """Encode committed pairs until `finish` and the last of them, or until `stop`. Needs a running Ray.

        Raises:
            MapoError: As for `encode`; finished units are kept. Drops above the limit among the pairs so far also end
                it, so that a wrong VAE is reported before the last source file is read.
        """
        parts = latents_parts(self._config)
        fingerprint = fingerprint_of(parts)
        if not self._is_worth_it(fingerprint):
            return
        note_parts(self._storage, LATENTS, parts)
        feed = UnitFeed()
        with ProgressBar("encode latents", 0, "pairs") as progress:
            feeding = (feed, fingerprint, progress)
            feeder = threading.Thread(target=self._feed, args=feeding, name="encode-feed", daemon=True)
            feeder.start()
            try:
                self._encode(feed, fingerprint, progress)
            finally:
                self._is_over.set()
                feeder.join()
        if self._failed is not None:
            raise self._failed

    def _encode(self, feed: UnitFeed, fingerprint: str, progress: ProgressBar) -> None:
        """Commit finished units until the feed is closed; do nothing if ingest ends before there is a node."""
        pool, table = divide_cluster(self._config), latents_table(self._storage, fingerprint)
        if not wait_until_placed(demand_of(self._config), None, count=pool.first, is_stopped=self._is_over.is_set):
            return  # the stage `encode` waits in its place, and says so
        self._tally = Tally("encode latents", self._config.batch_size, pool.most)
        done = encode_units("latents", self._config, self._storage, fingerprint, pool, feed.dataset())
        num_dropped = 0
        with contextlib.closing(done):
            for unit, rows, effort in done:
                table.append(unit, rows)
                progress.say(self._tally.add(rows, effort))
                progress.advance(rows.num_rows)
                num_dropped += count_dropped(rows)
                if num_dropped > self._config.max_drop_ratio * self._num_given:
                    check_dropped("latents", "pair", table, self._config)
                if self._is_stopped.is_set():
                    break

    def _is_worth_it(self, fingerprint: str) -> bool:
        """Wait for enough work; return False if the ingest ends first."""
        enough = min(MIN_UNITS, self._config.worker_range[0])
        return any(len(units) >= enough for units in self._looks(fingerprint)) and not self._is_over.is_set()

    def _looks(self, fingerprint: str) -> Iterator[list[Unit]]:
        """Yield, after each change of the table, the units of shards not yet given out, until the ingest is over."""
        table, version, pause_s, is_over = pairs_table(self._storage), None, 0.0, False
        while not is_over:
            is_over = self._is_over.wait(pause_s)
            if self._is_stopped.is_set():
                return
            started = time.monotonic()
            now = table.version
            found = pending_latents(self._storage, fingerprint) if now != version else []
            pause_s = max(LOOK_AGAIN_S, (time.monotonic() - started) / MAX_LOOK_RATIO)
            if now != version:
                version = now
                yield [unit for unit in found if unit.rows["shard"][0].as_py() not in self._given]

    def _feed(self, feed: UnitFeed, fingerprint: str, progress: ProgressBar) -> None:
        """Feed committed units until the ingest is over; runs in a thread."""
        try:
            for units in self._looks(fingerprint):
                num_rows = sum(unit.rows.num_rows for unit in units)
                self._num_given += num_rows
                self._given.update(unit.rows["shard"][0].as_py() for unit in units)
                feed.add(units)
                progress.expect(num_rows)
        except Exception as error:
            self._failed = error
        finally:
            with contextlib.suppress(Exception):  # of Ray, which may be going down
                feed.close()
