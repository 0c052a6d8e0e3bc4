"""The driver's memory does not follow the number of samples."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from scored_images import png, write_images
from scorer_twins import formula_image

from pipelines.dataset.storage import Storage

DRIVER = """
import json, logging, os, threading, time
import psutil, ray
import pyarrow.parquet as pq
from pipelines.config import ScorerEntry
from pipelines.dataset.storage import Storage
from pipelines.scores.execution import score
from pipelines.scores.judges import prepare_judges
from pipelines.units.workers import Workers

storage, images = Storage({storage!r}), pq.read_table({images!r})
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
         object_store_memory=200 << 20)
names = ("saturation", "dark_share", "colour_entropy", "grid_energy")
judges = prepare_judges([ScorerEntry(name=name) for name in names], storage)
me, peaks, is_over = psutil.Process(), [], threading.Event()

def watch():
    while not is_over.wait(0.05):
        info = me.memory_info()
        peaks.append(info.rss - info.shared)

threading.Thread(target=watch, daemon=True).start()

def peak_of(count):
    peaks.clear()
    figures = score(storage, judges, images.slice(0, count), Workers("score", num_workers=2, device="cpu"))
    assert all(each >= count - 100 for each in figures.num_scored.values()), figures
    return max(peaks)

print(json.dumps([peak_of({few}), peak_of({many})]))
"""


@pytest.mark.parametrize("many", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_the_drivers_memory_is_flat(tmp_path: Path, many: int, run_python: Callable[[str], str]) -> None:
    storage = Storage(str(tmp_path / "storage"))
    files = [png(formula_image(16 + seed % 50, 16 + seed // 50, seed)) for seed in range(many)]
    images = write_images(storage, "a", files, [f"a cat {n // 4}" for n in range(many)])
    pq.write_table(images, tmp_path / "images.parquet")
    code = DRIVER.format(storage=storage.url, images=str(tmp_path / "images.parquet"), few=100, many=many)
    few_bytes, many_bytes = json.loads(run_python(code).splitlines()[-1])
    assert many_bytes - few_bytes < 60e6, "the rows of 10,000 samples are 3 MB, their pixels would be 30 MB and more"
