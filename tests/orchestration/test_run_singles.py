"""A run on single images: judged files through ingest, encode and training to an exported model of the demo's base."""

import json
from pathlib import Path

import pyarrow.compute as pc
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from singles import judged_rows, write_judged
from skimage import data as photos

from orchestration import api
from orchestration.demo.base import BASE_MODEL
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.storage import Storage

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' Euler


def write_pairs(folder: Path, count: int) -> Path:
    """Pairs of real photos: each against itself turned."""
    folder.mkdir()
    cat = Image.fromarray(photos.chelsea()).resize((96, 96))
    rows = []
    for number in range(count):
        cat.rotate(5 * number).save(folder / f"{number}-a.png")
        cat.rotate(5 * number + 90).save(folder / f"{number}-b.png")
        rows.append(
            {"prompt": f"a cat {number}", "image_0": f"{number}-a.png", "image_1": f"{number}-b.png", "label_0": 1.0}
        )
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_singles_and_pairs_become_a_model_and_methods_of_pairs_say_what_they_leave_out(
    ray_cluster: None, tmp_path: Path
) -> None:
    judged = write_judged(tmp_path / "judged.parquet", judged_rows(6, 5, 3))
    pairs = write_pairs(tmp_path / "pairs", 6)
    said: list[str] = []
    train = {
        "method": "kto", "global_batch_size": 4, "micro_batch_size": 2, "max_steps": 2, "num_workers": 2,
        "precision": "fp32", "validate_every": 2, "checkpoint_every": 2, "trackers": [], "learning_rate": 1e-4,
    }  # fmt: skip
    config = {
        "name": "kto",
        "storage": str(tmp_path / "storage"),
        "ingest": {
            "sources": [
                {"format": "judged", "path": str(judged), "split": "train"},
                {"format": "jsonl", "path": str(pairs), "split": "train"},
            ],
            "max_drop_ratio": 0.0,
        },
        "encode": {"model": str(BASE_MODEL), "resolution": 64, "device": "cpu", "batch_size": 4},
        "train": train,
        "export": {"parts": "unet"},
    }
    for stage in (api.ingest, api.encode, api.train, api.export):
        stage(config, say=said.append)
    storage = Storage(str(tmp_path / "storage"))
    kinds = pc.value_counts(pc.fill_null(pairs_table(storage).read(["kind"])["kind"], "pair")).to_pylist()
    assert {each["values"]: each["counts"] for each in kinds} == {"judged": 11, "prior": 3, "pair": 6}
    exported = UNet2DConditionModel.from_pretrained(storage.path("runs/kto/model"), subfolder="unet").state_dict()
    base = UNet2DConditionModel.from_pretrained(BASE_MODEL, subfolder="unet").state_dict()
    assert any(not torch.equal(exported[name], base[name]) for name in base), "it has learned something"
    assert all(bool(weight.isfinite().all()) for weight in exported.values())

    of_pairs = config | {"name": "pairs", "train": train | {"method": "mapo_paper", "max_steps": 1}}
    (planned,) = (each for each in api.plan(of_pairs).stages if each.stage == "train")
    assert "leaves out 14 single images (6 good and 5 bad and 3 of a class)" in "\n".join(planned.remarks)
