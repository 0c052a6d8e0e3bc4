"""Scoring on actors: each image once by each judge, incrementally; a failure is a row with a reason."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from scored_images import formula_files, write_images

from pipelines.config import ScorerEntry
from pipelines.dataset.storage import Storage
from pipelines.scores.execution import score
from pipelines.scores.judges import Judge, prepare_judges
from pipelines.scores.plan import read_scores, table_of
from pipelines.units.workers import Workers

WORKERS = Workers("evaluate", num_workers=2, device="cpu")
PROMPTS = ["a red cat", "a dog in a house", "a photo"]


def entries(twins: Path, *names: str, batch_size: int = 32) -> list[ScorerEntry]:
    return [ScorerEntry(name=name, weights=str(twins), batch_size=batch_size) for name in names]


def values(storage: Storage, judge: Judge, images: pa.Table) -> list[Any]:
    return read_scores(storage, judge, images)["value"].to_pylist()


def images_of(storage: Storage, count: int, **options: Any) -> pa.Table:
    return write_images(storage, "a", formula_files(count), [PROMPTS[n % 3] for n in range(count)], **options)


@pytest.mark.usefixtures("ray_cluster")
def test_a_new_scorer_scores_only_itself_and_a_new_image_only_it(storage: Storage, twins: Path) -> None:
    images = images_of(storage, 10)
    judges = prepare_judges(entries(twins, "clipscore", "saturation"), storage)
    figures = score(storage, judges, images, WORKERS)
    assert figures.num_scored == {"clipscore": 10, "saturation": 10}
    assert figures.num_failed == {"clipscore": 0, "saturation": 0}
    version = table_of(storage, judges[0]).version
    judges = prepare_judges(entries(twins, "clipscore", "saturation", "aesthetic"), storage)
    assert score(storage, judges, images, WORKERS).num_scored == {"clipscore": 0, "saturation": 0, "aesthetic": 10}
    assert table_of(storage, judges[0]).version == version
    more = pa.concat_tables([images, write_images(storage, "b", formula_files(1, first=90), ["a photo"]), images])
    assert score(storage, judges, more, WORKERS).num_scored == dict.fromkeys(
        ("clipscore", "saturation", "aesthetic"), 1
    )
    assert score(storage, judges, more, WORKERS).speed is None
    for judge in judges:
        rows = table_of(storage, judge).read()
        assert rows.num_rows == 11
        assert set(rows["status"].to_pylist()) == {"scored"}
        assert len(values(storage, judge, more)) == 21
