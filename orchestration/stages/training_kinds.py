"""The plan's notes on single images: which of them a training learns from, and which it leaves out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyarrow.compute as pc

from pipelines.dataset.layout import pairs_table
from pipelines.dataset.pair import JUDGED, PRIOR, TRAIN, Status, of_kind
from training.methods import METHODS

if TYPE_CHECKING:
    from training.spec import TrainSpec

GOOD, BAD, OF_CLASS = "good", "bad", "class"


def count_singles(spec: TrainSpec) -> dict[str, int]:
    """Count the single images to train on in the pinned snapshot: good, bad and those of a class."""
    kept = (pc.field("status") == str(Status.KEPT)) & (pc.field("split") == TRAIN) & of_kind(JUDGED, PRIOR)
    rows = pairs_table(spec.storage, spec.snapshot.pairs_version).read(["kind", "label_0"], kept)
    is_prior, is_good = pc.equal(rows["kind"], PRIOR), pc.greater_equal(rows["label_0"], 0.5)
    counts = {
        GOOD: pc.and_(pc.invert(is_prior), is_good), BAD: pc.and_(pc.invert(is_prior), pc.invert(is_good)),
        OF_CLASS: is_prior,
    }  # fmt: skip
    return {name: int(pc.sum(mask).as_py() or 0) for name, mask in counts.items()}


def kind_notes(spec: TrainSpec) -> list[str]:
    """Return how many single images the training leaves out, and which method would take them."""
    method = METHODS[spec.config.method]
    taken = {GOOD: JUDGED in method.kinds, BAD: JUDGED in method.kinds and not method.needs_good}
    taken[OF_CLASS] = PRIOR in method.kinds
    left = {name: count for name, count in count_singles(spec).items() if count and not taken[name]}
    if not left:
        return []
    listed = " and ".join(f"{count:,} {'of a class' if name == OF_CLASS else name}" for name, count in left.items())
    takers = "dreambooth takes images of a class" if set(left) == {OF_CLASS} else "kto takes good and bad images"
    what = f"{sum(left.values()):,} single images ({listed})"
    return [f"leaves out {what}, which {spec.config.method} does not learn from; {takers}"]
