"""What reads the table of pairs beside training: held-out pairs, leaks, imported scores, contact sheet and report."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest
from encode_steps import encode_here
from factories import photo_pairs, write_parquet
from report_sample import Page, sample_data, sample_images
from singles import ingest, judged_rows, write_judged

from orchestration.report.page import render_report
from orchestration.stages import contact_sheet
from orchestration.stages.contact_sheet import NUM_PAIRS, choose_pairs
from orchestration.stages.held_out import HeldOutPairs
from pipelines.config import EncodeConfig, SourceConfig
from pipelines.dataset.errors import SnapshotError
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.pair import JUDGED, PRIOR, of_kind, prompt_id
from pipelines.dataset.storage import Storage
from pipelines.encode.encoders import LatentEncoder, TextEncoder
from pipelines.encode.fingerprint import latents_fingerprint
from pipelines.scores.imports import prompts_of_images
from pipelines.suites.leaks import leaked_prompts
from pipelines.suites.suite import Suite, SuitePrompt, numbered


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def judged(tmp_path: Path) -> SourceConfig:
    rows = judged_rows(6, 5, 4)
    for row in rows[::2]:
        row["split"] = "validation"
    return SourceConfig(format="judged", path=str(write_judged(tmp_path / "x.parquet", rows)))


def pairs(folder: Path, num_rows: int) -> SourceConfig:
    file = write_parquet(folder / "pairs.parquet", photo_pairs(num_rows))
    return SourceConfig(format="pickapic", path=str(file), split="validation")


def test_held_out_prompts_and_audits_are_of_pairs_alone(storage: Storage, judged: SourceConfig, tmp_path: Path) -> None:
    ingest(storage, pairs(tmp_path, 4), judged)
    held_out = HeldOutPairs(storage, pairs_table(storage).version)
    assert held_out.is_held_out
    assert held_out.rows.num_rows == 4
    sides = held_out.sides(10)
    assert sides.num_rows == 8
    assert sides["image_sha256"].null_count == 0


def test_a_data_set_of_single_images_has_no_pairs_to_evaluate_with(storage: Storage, judged: SourceConfig) -> None:
    ingest(storage, judged)
    held_out = HeldOutPairs(storage, pairs_table(storage).version)
    assert not held_out.is_held_out
    with pytest.raises(SnapshotError, match="no kept pairs to evaluate with"):
        _ = held_out.rows


def test_prompts_of_single_images_leak_as_those_of_pairs_do(storage: Storage, judged: SourceConfig) -> None:
    ingest(storage, judged)
    rows = pairs_table(storage).read(["prompt", "split"]).to_pylist()
    suite = Suite("own", 1, numbered(SuitePrompt.of(row["prompt"]) for row in rows))
    version = pairs_table(storage).version
    assert version is not None
    trained = sum(row["split"] == "train" for row in rows)
    assert leaked_prompts(storage, version, [suite]) == {"own": trained}
    assert 0 < trained < len(rows)


def test_scores_may_be_of_single_images(storage: Storage, judged: SourceConfig, tmp_path: Path) -> None:
    ingest(storage, pairs(tmp_path, 2), judged)
    rows = pairs_table(storage).read(["image_0_sha256", "prompt"], of_kind(JUDGED, PRIOR)).to_pylist()
    wanted = {row["image_0_sha256"]: {prompt_id(row["prompt"])} for row in rows}
    assert prompts_of_images(storage, {*wanted, "0" * 64}) == wanted


def test_the_contact_sheet_shows_single_images_once(
    storage: Storage, judged: SourceConfig, tmp_path: Path, tiny_pipeline: Path
) -> None:
    import torch

    source, cpu = ModelSource(str(tiny_pipeline)), torch.device("cpu")
    config = EncodeConfig(model=str(tiny_pipeline), resolution=64, batch_size=4)
    ingest(storage, pairs(tmp_path, 2), judged)
    encode_here(config, storage, LatentEncoder(source, device=cpu), TextEncoder(source, cpu))
    chosen: list[dict[str, Any]] = choose_pairs(storage, latents_fingerprint(config))
    assert len(chosen) == NUM_PAIRS
    kinds = pairs_table(storage).read(["pair_key", "kind"])
    singles = set(kinds.filter(pc.not_equal(kinds["kind"], "pair"))["pair_key"].to_pylist())
    shown = contact_sheet._decode(config, storage, chosen)
    wanted = [
        (key, side)
        for key in (each["pair"]["pair_key"] for each in chosen)
        for side in ((0,) if key in singles else (0, 1))
    ]
    assert [(image.pair_key, image.side) for image in shown] == wanted
    assert singles & {key for key, _ in wanted}, "there is one among them"


def test_the_page_counts_kept_rows_by_kind() -> None:
    data = sample_data(12)
    assert data.dataset
    assert data.encoding
    dataset = replace(data.dataset, num_singles=100, kinds="512 pairs, 60 judged (40 good, 20 bad), 40 prior")
    mixed = replace(data, dataset=dataset, encoding=replace(data.encoding, singles=100))
    before, after = (re.sub(r"\s+", " ", Page(render_report(each, sample_images())).text) for each in (data, mixed))
    assert "pairs kept 612" in before
    assert "single image" not in before
    for part in (
        "pairs kept 512single images kept 100", "kept 512 pairs, 60 judged (40 good, 20 bad), 40 prior",
        "train 560 rows", "Single images 100 Distinct", "images of all pairs and single images",
        "Latents per pair or single image",
    ):  # fmt: skip
        assert part in after, part
