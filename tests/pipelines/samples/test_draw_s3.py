"""The same on S3: storage, table and models behind URLs, with workers that share no folder with the driver."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from drawings import TEXTS, draw_here, drawing_of, pixels_of

from pipelines.dataset.storage import Storage
from pipelines.samples.execution import read_samples

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

DRIVER = """
import json, os, sys
import ray
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.pair import prompt_id
from pipelines.dataset.storage import Storage
from pipelines.samples.drawing import Drawing, DrawnModel, Sampling
from pipelines.samples.execution import draw
from pipelines.samples.fingerprint import samples_fingerprint
from pipelines.samples.plan import wanted_samples
from pipelines.samples.prompts import Prompt
from pipelines.units.workers import Workers

address, url, models, texts, environment = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
ray.init(address, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": environment})
drawings = []
for model in models:
    model = DrawnModel(source=ModelSource(model.pop("source")), **model)
    sampling = Sampling(2, 5.0, 64, 64)
    name = samples_fingerprint(model, sampling)
    prompts = [Prompt(prompt_id(text), text) for text in texts]
    drawings.append(Drawing(model, sampling, name, wanted_samples(prompts, name, seed=0, images_per_prompt=1)))
drawn = draw(Storage(url), drawings, Workers("evaluate", batch_size=4))
print(json.dumps([[each.name, each.num_drawn] for each in drawn]), flush=True)
os._exit(0)
"""


def test_models_and_samples_on_s3_are_those_of_a_local_run(
    ray_cluster: None, s3_storage: Storage, s3_server: dict[str, str], storage: Storage, tiny_pipeline: Path,
    other_pipeline: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import ray

    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "driver"))
    s3_storage.upload_folder("models/base", tiny_pipeline)
    s3_storage.upload_folder("models/unet", other_pipeline / "unet")
    s3_storage.upload_folder("models/lora", lora)
    base = s3_storage.uri("models/base")
    models = [
        {"name": "base", "source": base},
        {"name": "aligned", "source": base, "unet": s3_storage.uri("models/unet"), "identity": "of an export"},
        {"name": "style", "source": base, "lora": s3_storage.uri("models/lora")},
    ]
    address = ray.get_runtime_context().gcs_address
    environment = {**s3_server, "MAPO_CACHE": str(tmp_path / "node")}
    plain = [json.dumps(each) for each in (models, TEXTS, environment)]
    for expected in (4, 0):
        command = [sys.executable, "-c", DRIVER, address, s3_storage.url, *plain]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert found == [["base", expected], ["aligned", expected], ["style", expected]]
    for overlay in ({}, {"unet": str(other_pipeline), "identity": "of an export"}, {"lora": str(lora)}):
        drawing = drawing_of(tiny_pipeline, **overlay)
        draw_here(storage, drawing)
        rows = [read_samples(each, drawing).to_pylist() for each in (s3_storage, storage)]
        for one, other in zip(*rows, strict=True):
            assert one["sample_key"] == other["sample_key"]
            assert np.abs(pixels_of(s3_storage, one) - pixels_of(storage, other)).max() <= 1
