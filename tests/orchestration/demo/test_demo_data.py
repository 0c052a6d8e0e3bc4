"""The demo's data set, base model and scores: what they promise to the run that is built on them."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from orchestration.config import parse_config
from orchestration.demo import photos
from orchestration.demo.base import BASE_MODEL, MAX_FOLDER_BYTES
from orchestration.demo.photos import DAMAGE, subject_of, write_dataset
from orchestration.demo.scenes import SUBJECTS, Scene, crop, cyanotype, draw_shift, lightness, scenes
from orchestration.demo.scores import ContentScore, StyleScore

Row = dict[str, Any]
DEMO_YAML = BASE_MODEL.parent / "demo.yaml"
VALIDATION_RATIO = yaml.safe_load(DEMO_YAML.read_text())["ingest"]["validation_ratio"]

PICK_A_PIC = """
are_different: bool, best_image_uid: string, caption: string, created_at: timestamp[ns], has_label: bool,
image_0_uid: string, image_0_url: string, image_1_uid: string, image_1_url: string, jpg_0: binary, jpg_1: binary,
label_0: double, label_1: double, model_0: string, model_1: string, ranking_id: int64, user_id: int64,
num_example_per_prompt: int64, __index_level_0__: int64
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    write_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Row]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def opens(data: bytes | None) -> bool:
    try:
        Image.open(io.BytesIO(data or b"")).load()
    except OSError:
        return False
    return True


SIGNS: dict[str, Callable[[Row], bool]] = {
    "truncated_jpeg": lambda row: (row["jpg_0"] or b"")[:2] == b"\xff\xd8" and not opens(row["jpg_0"]),
    "not_an_image": lambda row: (row["jpg_1"] or b"")[:1] == b"<",
    "empty_bytes": lambda row: row["jpg_0"] == b"",
    "null_image": lambda row: row["jpg_1"] is None,
    "null_caption": lambda row: row["caption"] is None,
    "empty_caption": lambda row: row["caption"] == "",
    "labels_do_not_sum_to_1": lambda row: row["label_0"] + row["label_1"] != 1,
    "no_label": lambda row: not row["has_label"],
    "identical_images": lambda row: row["jpg_0"] == row["jpg_1"],
}


def is_damaged(row: Row) -> bool:
    return any(sign(row) for sign in SIGNS.values())


def held_out(caption: str) -> bool:
    return int(hashlib.sha256(caption.encode()).hexdigest()[:16], 16) / 2**64 < VALIDATION_RATIO


def test_every_file_has_the_columns_and_types_of_pick_a_pic(folder: Path) -> None:
    expected = [tuple(column.strip().split(": ")) for column in PICK_A_PIC.split(",")]
    files = [pq.ParquetFile(path) for path in sorted(folder.glob("*.parquet"))]
    assert len(files) > 1
    for file in files:
        assert [(field.name, str(field.type)) for field in file.schema_arrow] == expected
        assert file.num_row_groups > 1


def test_rows_add_up_to_pairs_ties_duplicates_and_damage(rows: list[Row]) -> None:
    sound = [row for row in rows if not is_damaged(row)]
    ties = [row for row in sound if row["label_0"] == row["label_1"] == 0.5]
    pairs = Counter((row["caption"], row["jpg_0"], row["jpg_1"]) for row in sound if row["label_0"] != 0.5)
    assert (len(ties), len(pairs), pairs.total() - len(pairs), len(rows) - len(sound)) == (30, 800, 8, 27)
    assert (len(rows) - len(sound)) / len(rows) < 0.04


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_kind_of_damage_comes_three_times_and_alone(rows: list[Row], kind: str) -> None:
    damaged = [row for row in rows if SIGNS[kind](row)]
    assert len(damaged) == 3
    assert all(sum(sign(row) for sign in SIGNS.values()) == 1 for row in damaged)


def test_the_preferred_image_is_the_blue_one_and_on_either_side(rows: list[Row]) -> None:
    sides: Counter[float] = Counter()
    for row in (row for row in rows if not is_damaged(row) and row["label_0"] != 0.5):
        images = [np.asarray(Image.open(io.BytesIO(row[f"jpg_{side}"])), dtype=float) for side in (0, 1)]
        blueness = [image[..., 2].mean() - image[..., 0].mean() for image in images]
        assert (row["label_0"], row["label_1"]) == (float(blueness[0] > blueness[1]), float(blueness[1] > blueness[0]))
        assert row["best_image_uid"] == row["image_0_uid" if row["label_0"] else "image_1_uid"]
        sides[row["label_0"]] += 1
    assert min(sides.values()) > 0.4 * sides.total()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    again, other = write_dataset(tmp_path / "again"), write_dataset(tmp_path / "other", seed=1)
    for path, another in zip(again, other, strict=True):
        assert path.read_bytes() == (folder / path.name).read_bytes() != another.read_bytes()


def test_a_second_call_touches_nothing_and_a_lost_file_is_replaced(folder: Path) -> None:
    def state() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}

    before = state()
    paths = write_dataset(folder)
    assert state() == before
    assert sorted(path.name for path in paths) == sorted(name for name in before if name.endswith(".parquet"))
    digest = hashlib.sha256(paths[1].read_bytes()).hexdigest()
    paths[1].write_bytes(b"half")
    write_dataset(folder)
    assert hashlib.sha256(paths[1].read_bytes()).hexdigest() == digest


def test_a_crash_leaves_no_file_under_its_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> Path:
        raise OSError(f"no space left for {target}")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_dataset(tmp_path)
    assert not list(tmp_path.glob("*.parquet"))


def test_every_caption_is_one_scene_and_names_its_subject() -> None:
    captions = {scene.caption: scene for scene in scenes()}
    assert len(captions) == len(scenes()) == 80
    assert all(subject_of(caption) == SUBJECTS[scene.photo] for caption, scene in captions.items())
    with pytest.raises(ValueError, match="not a caption"):
        subject_of("a castle in the sky")


def test_held_out_prompts_cover_every_photo(rows: list[Row]) -> None:
    captions = [scene.caption for scene in scenes() if held_out(scene.caption)]
    assert {subject_of(caption) for caption in captions} == set(SUBJECTS.values())
    assert sum(row["caption"] in captions for row in rows) >= 40


def test_the_configuration_has_exactly_three_places_to_fill_in() -> None:
    text = Template(DEMO_YAML.read_text()).substitute(DATA="/d", STORAGE="/s", MODEL="/m")
    config = parse_config(text)
    assert config.ingest is not None
    assert config.encode is not None
    assert (config.ingest.sources[0].path, config.storage, config.encode.model) == ("/d/*.parquet", "/s", "/m")


def test_the_style_keeps_what_is_lighter_lighter() -> None:
    grey = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2))
    printed = lightness(cyanotype(grey))[0]
    assert np.all(np.diff(printed) >= 0)
    assert np.all(np.diff(printed[::4]) > 0)


def test_the_shipped_model_is_small_and_the_one_its_recipe_made() -> None:
    files = {str(path.relative_to(BASE_MODEL)): path for path in BASE_MODEL.rglob("*") if path.is_file()}
    assert sum(path.stat().st_size for path in files.values()) <= MAX_FOLDER_BYTES
    recipe = json.loads(files.pop("recipe.json").read_text())
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()} == recipe["sha256"]
    assert {Path(name).suffix for name in files} == {".json", ".safetensors"}


def test_the_shipped_model_restores_both_sides_and_tells_prompts_apart() -> None:
    import torch
    from diffusers import StableDiffusionXLPipeline

    from orchestration.demo.base_training import encode, plain_and_styled, round_trip_psnr

    pipeline = StableDiffusionXLPipeline.from_pretrained(BASE_MODEL)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    plain, styled = plain_and_styled(7, per_scene=1)
    assert round_trip_psnr(pipeline.vae, plain) >= 24
    assert round_trip_psnr(pipeline.vae, styled) >= 24
    latents = encode(pipeline.vae, torch.cat([plain, styled])) * pipeline.vae.config.scaling_factor
    assert float(latents.std()) == pytest.approx(1, abs=0.05)
    captions = [scene.caption for scene in scenes()]
    with torch.no_grad():
        _, _, pooled, _ = pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
    assert float(torch.pdist(pooled).min()) > 0.01 * float(torch.pdist(pooled).mean())


@pytest.fixture(scope="module")
def references() -> tuple[list[Image.Image], list[Image.Image], list[str]]:
    return views([scene for scene in scenes() if held_out(scene.caption)], seed=1, per_scene=6)


def views(of: list[Scene], *, seed: int, per_scene: int) -> tuple[list[Image.Image], list[Image.Image], list[str]]:
    """Chosen images, rejected images, prompts."""
    rng = np.random.default_rng(seed)
    each = [scene for scene in of for _ in range(per_scene)]
    rejected = [crop(scene, draw_shift(rng)) for scene in each]
    return [cyanotype(image) for image in rejected], rejected, [scene.caption for scene in each]


def test_scores_tell_chosen_from_rejected_and_hold_on_to_content(
    references: tuple[list[Image.Image], list[Image.Image], list[str]],
) -> None:
    style, content = StyleScore(), ContentScore()
    style.fit(*references)
    content.fit(*references)
    chosen, rejected, prompts = views([scene for scene in scenes() if held_out(scene.caption)], seed=2, per_scene=3)
    assert np.mean(style.score(chosen, prompts)) > 0.9
    assert np.mean(style.score(rejected, prompts)) < 0.1
    assert min(np.mean(content.score(chosen, prompts)), np.mean(content.score(rejected, prompts))) >= 0.85
    others = prompts[len(prompts) // 2 :] + prompts[: len(prompts) // 2]
    assert np.mean(content.score(rejected, others)) < 0.3


def test_scores_refuse_a_set_without_held_out_pairs() -> None:
    for scorer in (StyleScore(), ContentScore()):
        with pytest.raises(ValueError, match="validation_ratio"):
            scorer.fit([], [], [])


def test_photos_offers_the_schema_that_it_writes(folder: Path) -> None:
    table: pa.Table = pq.read_table(next(folder.glob("*.parquet")))
    assert table.schema.equals(photos.SCHEMA)
