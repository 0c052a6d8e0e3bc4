"""A submitted run on two nodes that share nothing but S3: own prompts and an own scorer travel with the job."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from factories import photo_pairs, write_parquet
from ray_head import BIN, other_node, ray_head

from pipelines.dataset.layout import SAMPLES, SCORES, fingerprints, samples_table
from pipelines.dataset.storage import Storage

SCORER = """
import numpy as np


class Brightness:
    name, description, needs = "brightness", "Mean of all pixels", ("image",)

    def score(self, images, prompts):
        return [float(np.asarray(image, dtype=float).mean()) for image in images]
"""


@pytest.mark.slow
def test_own_prompts_and_an_own_scorer_on_two_nodes_that_share_only_s3(
    s3_storage: Storage, s3_server: dict[str, str], tiny_pipeline: Path, tmp_path: Path
) -> None:
    write_parquet(tmp_path / "pairs.parquet", photo_pairs(16, num_prompts=4))
    s3_storage.upload_folder("base", tiny_pipeline)
    s3_storage.upload("source/pairs.parquet", tmp_path / "pairs.parquet")
    here = tmp_path / "work"
    here.mkdir()
    (here / "bright.py").write_text(SCORER)
    (here / "prompts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a red house", "a sea")))
    settings = {
        "name": "small",
        "storage": s3_storage.url,
        "ingest": {"sources": [{"format": "pickapic", "path": s3_storage.uri("source/*.parquet")}]},
        "encode": {"model": s3_storage.uri("base"), "resolution": 64, "device": "cpu"},
        "train": {"num_workers": 1, "global_batch_size": 4, "micro_batch_size": 2, "max_steps": 1, "precision": "fp32",
                  "learning_rate": 1e-4},
        "evaluate": {"prompts": {"path": "prompts.jsonl", "column": "text"}, "num_inference_steps": 1,
                     "num_workers": 2, "batch_size": 1, "scorers": ["bright:Brightness"]},
    }  # fmt: skip
    (here / "small.yaml").write_text(yaml.safe_dump(settings))
    caches = [{"MAPO_CACHE": str(tmp_path / name)} for name in ("cache-of-head", "cache-of-node")]
    with ray_head(3, **s3_server, **caches[0]) as head, other_node(head, num_cpus=3, **s3_server, **caches[1]):
        done = subprocess.run(
            [BIN / "mapo", "submit", "small.yaml", "--address", head.url, "--follow"], cwd=here, text=True,
            capture_output=True, env=head.environment(**s3_server), timeout=1200, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^evaluate +[\d.]+ s +2 samples each, brightness ", done.stdout, re.MULTILINE)
    results = json.loads(s3_storage.read("runs/small/evaluation/results.json"))
    assert results["suites"]["prompts"]["models"]["aligned"]["brightness"]["n"] == 2
    tables = [samples_table(s3_storage, each) for each in fingerprints(s3_storage, SAMPLES)]
    assert sorted(table.count_rows() for table in tables) == [2, 2]
    assert [name.partition("@")[0] for name in fingerprints(s3_storage, SCORES)] == ["brightness"]
    assert s3_storage.exists("runs/small/report/index.html")
