"""The actor that scores units of images with all judges that lack them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from pipelines.dataset.layout import SCORES_SCHEMA
from pipelines.dataset.storage import Storage
from pipelines.dataset.values import Row
from pipelines.scores.images import contexts
from pipelines.scores.judges import Judge
from pipelines.scores.loaded import LoadedJudge, load_judge, make_importable
from pipelines.scores.passes import Passes, row_of
from pipelines.scores.pictures import ImageReader
from pipelines.scores.plan import WANTED, needs_beside
from pipelines.scores.scorers import SCORERS, new_scorer
from pipelines.units.actor import BatchSize, Device, UnitActor
from pipelines.units.stats import Effort

READERS = 8
JUDGED_SCHEMA = pa.schema([("judge", pa.int32()), *(field for field in SCORES_SCHEMA if field.name != "unit")])
"""What an actor returns: the judge by its position, and a row of its table, which the driver names the unit of."""


class ScoreImages(UnitActor):
    """Score the images of one unit; the only place that computes scores.

    In:       A unit's images, and which judges lack them.      Out: one row for each missing score, and the cost.
    Runs as:  Ray Data actor with a part of a GPU, or one CPU; called for several units at once: one is read and decoded
              while another is scored. The decoded images of two batches, and those that others are compared with.
    Retry:    safe: a score follows from the image, the prompt and the judge.
    Drops:    nothing: an image that cannot be scored is a failed row with its reason.
    Raises:   ModelError (with the first unit: see `unwrap`), StorageError, ShardCorrupt, EncodingError.

    Args:
        storage: The storage of images, scores and weights.
        judges: The judges, in the order of the units' columns.
        num_threads: Number of torch threads.
        attempts: From `new_attempts`.
    """

    way_out = (
        "did they run out of memory? lower the scorers' `batch_size` or use nodes with more memory; "
        "finished work is kept"
    )

    def __init__(self, storage: Storage, judges: Sequence[Judge], num_threads: int, attempts: Any) -> None:
        super().__init__(attempts)
        self._storage, self._judges, self._num_threads = storage, tuple(judges), num_threads

    def describe(self, rows: pa.Table) -> str:
        """Describe the work on a unit, for an error."""
        return f"scoring {rows.num_rows:,} images, such as {rows['image_sha256'][0]} of {rows['shard'][0]}"

    def new_writer(self) -> "ScoreWriter":
        """Load the scorers."""
        device = _device() if any(_loads(judge) for judge in self._judges) else "cpu"
        loaded = [load_judge(judge, self._storage, device) for judge in self._judges]
        return ScoreWriter(self._storage, loaded, self._num_threads)


def _loads(judge: Judge) -> bool:
    """Return whether a judge loads something onto a device; statistics of pixels do not."""
    name = judge.entry.name
    make_importable(judge)
    return bool(judge.parts) or (name not in SCORERS and hasattr(new_scorer(name), "load"))


def _device() -> str:
    """Return the GPU that Ray assigned to this process, else the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class ScoreWriter:
    """Scores units; `write` may be called from several threads at once.

    Args:
        storage: The storage of the images.
        judges: The judges, loaded, in the order of the units' columns.
        num_threads: Number of torch threads.
    """

    def __init__(self, storage: Storage, judges: Sequence[LoadedJudge], num_threads: int = 1) -> None:
        self._storage, self._judges = storage, judges
        by_size = {loaded.judge.entry.batch_size: BatchSize(loaded.judge.entry.batch_size) for loaded in judges}
        self._sizes = [by_size[loaded.judge.entry.batch_size] for loaded in judges]
        self._preprocessings = list(dict.fromkeys(each.preprocessing for each in judges if each.preprocessing))
        self._readers = ThreadPoolExecutor(READERS, "reader")
        self._device = Device(num_threads)

    def write(self, unit: str, rows: pa.Table) -> tuple[pa.Table, Effort]:
        """Score a unit; return one row for each missing score, judge by judge in the unit's order, and the cost."""
        wanted = [rows[f"{WANTED}{position}"].to_pylist() for position in range(len(self._judges))]
        judges = [position for position, each in enumerate(wanted) if any(each)]
        needs = {need for position in judges for need in self._judges[position].judge.needs}
        effort = Effort(num_slots=sum(sum(each) for each in wanted))
        reader = ImageReader(self._storage, self._preprocessings, sorted(needs), effort)
        num_ahead = READERS + max(self._sizes[position].size for position in judges)
        items = reader.items(rows, self._readers, num_ahead)
        passes = Passes(self._judges, self._sizes, effort)

        def run() -> None:
            for item in items:
                passes.add(item, [position for position in judges if wanted[position][item.position]])
            passes.finish()

        try:
            self._device.run(run, effort)
        finally:
            items.close()
        effort.batch_size = min(self._sizes[position].size for position in judges)
        return self._rows(rows, passes), effort

    def _rows(self, rows: pa.Table, passes: Passes) -> pa.Table:
        found: list[Row] = []
        images, prompts = rows["image_sha256"].to_pylist(), rows["prompt_id"].to_pylist()
        for position, results in enumerate(passes.results):
            if not results:
                continue
            of_images = contexts(rows, needs_beside(self._judges[position].judge)).to_pylist()
            for row in sorted(results):
                named = {"judge": position, "image_sha256": images[row], "prompt_id": prompts[row]}
                found.append({**named, "context": of_images[row], **row_of(results[row])})
        return pa.Table.from_pylist(found, schema=JUDGED_SCHEMA)
