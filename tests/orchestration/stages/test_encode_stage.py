"""The encode stage of a run: its summary, its numbers for the report, and a contact sheet that a person can judge."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from encode_steps import encode_here, ingest_here
from factories import Row, photo_pairs, write_parquet
from PIL import Image

import orchestration.demo
from orchestration.config import RunConfig
from orchestration.driver.runner import run_stages
from orchestration.report.data import Gathered, _encoding, page_images, report_data
from orchestration.report.page import render_report
from orchestration.report.records import Fingerprints
from orchestration.run.journal import Journal
from orchestration.stages.contact_sheet import choose_pairs, psnr, write_contact_sheet
from pipelines.config import EncodeConfig
from pipelines.dataset.layout import LATENTS, latents_table
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.storage import Storage
from pipelines.encode.encoders import LatentEncoder, Launched, TextEncoder
from pipelines.encode.execution import encode
from pipelines.encode.fingerprint import latents_fingerprint, text_fingerprint

BASE = Path(orchestration.demo.__file__).parent / "base_model"  # its VAE has learned from photos


def photo_rows() -> list[Row]:
    """Six pairs of crops of real photos, one with a prompt that is too long."""
    from skimage import data

    photo, rows = data.astronaut(), photo_pairs(6, num_prompts=3)
    for number, row in enumerate(rows):
        for side in (0, 1):
            top, left = 40 * number, 60 + 150 * side
            Image.fromarray(photo[top : top + 128, left : left + 128]).save(out := io.BytesIO(), "PNG")
            row[f"jpg_{side}"] = out.getvalue()
    rows[0]["caption"] = "a cat on a hill " * 20
    return rows


def test_the_stage_says_what_it_cut_and_the_report_shows_what_it_did(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = Storage(str(tmp_path / "storage"))
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_rows()))
    config = RunConfig(
        name="photos", storage=storage.url, encode=EncodeConfig(model=str(BASE), resolution=64, batch_size=4)
    )
    said: list[str] = []
    run_stages(config, ("encode",), said.append)
    cut = "1 of them truncated to 77 tokens (the longest has 182; raise `encode.prompt_chunks` to encode more)"
    assert any(f"6 pairs, 4 prompts, {cut}" in line for line in said), said
    data = report_data(config, storage, Journal(storage, "photos"), command="mapo encode photos.yaml")
    encoding = data.encoding
    assert encoding is not None
    speed, of_text = encoding.speeds
    assert (speed.num_items, speed.num_images, speed.halved_to) == (6, 12, None)
    assert {part.name for part in speed.parts} == {"fetch", "decode", "encode", "pack", "upload"}
    assert 0 < speed.busy_ratio <= 1
    assert speed.images_per_s == pytest.approx(12 / speed.seconds, rel=0.01)
    record = Journal(storage, "photos").record("encode")
    assert record is not None
    assert record.details["speed"]["latents"]["image_slots"] == 12
    assert of_text.num_items == 5  # with the null conditioning
    assert encoding.truncated_prompts == 1
    assert encoding.text_ratio == pytest.approx(6 / 4)
    rows = latents_table(storage, latents_fingerprint(config.encode)).read(["length"])  # type: ignore[arg-type]
    assert encoding.bytes_per_pair.latents == pytest.approx(sum(rows["length"].to_pylist()) / 6)
    assert len(encoding.contact) == 8
    for image in encoding.contact:
        pixels = [
            np.asarray(Image.open(io.BytesIO(storage.read(f"runs/photos/{name}"))))
            for name in (image.source, image.decoded)
        ]
        assert [each.shape for each in pixels] == [(64, 64, 3)] * 2
        assert image.psnr == pytest.approx(psnr(*pixels))
        assert image.psnr > 18, "a photo comes back from its latents"
    page = render_report(data, page_images(storage, "runs/photos", data))
    assert page.count("data:image/png") == 16
    assert f"{encoding.contact[0].psnr:.1f}" in page


def test_latents_that_are_wrong_show_in_the_contact_sheet(ray_cluster: None, tmp_path: Path) -> None:
    """Scaled, as training wants them and as they must not be stored: every number finite, every picture grey."""
    storage = Storage(str(tmp_path / "storage"))
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_rows()))
    config, cpu = EncodeConfig(model=str(BASE), resolution=64, buckets=False), torch.device("cpu")
    right = LatentEncoder(ModelSource(str(BASE)), device=cpu)

    class Scaled:
        def launch(self, images: np.ndarray) -> Launched:
            latents, seconds = right.launch(images).wait()
            return Launched(0.13025 * latents, lambda: seconds)

    encode_here(config, storage, Scaled(), TextEncoder(ModelSource(str(BASE)), cpu))
    sheet = write_contact_sheet(config, storage, "runs/wrong")
    assert max(image["psnr"] for image in sheet) < 18


def test_the_sheet_has_a_pair_of_every_frequent_bucket(tmp_path: Path, tiny_pipeline: Path) -> None:
    storage, source = Storage(str(tmp_path / "storage")), ModelSource(str(tiny_pipeline))
    sizes = ((64, 64), (48, 96), (96, 48), (64, 64))
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(12, sizes=sizes)))
    config, cpu = EncodeConfig(model=source.model, resolution=64), torch.device("cpu")
    encode_here(config, storage, LatentEncoder(source, device=cpu), TextEncoder(source, cpu))
    chosen = choose_pairs(storage, latents_fingerprint(config))
    buckets = [(each["latents"]["bucket_height"], each["latents"]["bucket_width"]) for each in chosen]
    assert len(chosen) == 4
    assert len(set(buckets)) == 3
    assert chosen == choose_pairs(storage, latents_fingerprint(config))


@pytest.mark.slow
def test_a_range_of_workers_takes_what_there_is_room_for(
    ray_cluster: None, tmp_path: Path, tiny_pipeline: Path
) -> None:
    storage = Storage(str(tmp_path / "storage"))
    for number in range(3):
        ingest_here(storage, write_parquet(tmp_path / f"{number}.parquet", photo_pairs(2, seed=number)))
    config = EncodeConfig(model=str(tiny_pipeline), resolution=64, num_workers="1..2")
    speed = encode(config, storage)["latents"]
    assert speed is not None
    assert speed.num_actors == 2
    assert latents_table(storage, latents_fingerprint(config)).read().num_rows == 6
    assert len([name for name in storage.names(LATENTS) if name.endswith(".tar")]) == 3


def test_equal_images_have_no_finite_ratio() -> None:
    image = np.full((4, 4, 3), 7, np.uint8)
    assert psnr(image, image) == math.inf
    assert psnr(np.zeros_like(image), np.full_like(image, 255)) == 0.0


def test_a_run_on_what_another_one_encoded_shows_what_is_there(tmp_path: Path, tiny_pipeline: Path) -> None:
    storage, source = Storage(str(tmp_path / "storage")), ModelSource(str(tiny_pipeline))
    ingest_here(storage, write_parquet(tmp_path / "in.parquet", photo_pairs(3, num_prompts=1)))
    encode, cpu = EncodeConfig(model=source.model, resolution=64), torch.device("cpu")
    encode_here(encode, storage, LatentEncoder(source, device=cpu), TextEncoder(source, cpu))
    config = RunConfig(name="second", storage=storage.url, encode=encode)
    assert report_data(config, storage, Journal(storage, "second"), command="mapo run").encoding is None
    journal = Journal(storage, "second")
    trained_on = Fingerprints(latents_fingerprint(encode), text_fingerprint(encode))
    old = {"latents": "old", "text": "old", "speed": {"latents": {"seconds": 1.0}}}
    journal.finish("encode", key="k", summary="s", seconds=1.0, details=old)
    found = _encoding(storage, trained_on, journal.record("encode"), Gathered())
    assert found is not None
    assert (found.pairs, found.prompts, found.speeds, found.contact) == (3, 1, (), ())
