"""Scoring: each image once by each judge, incrementally; a failure is a row with a reason, a machine's fault not."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from scored_images import formula_files, pairs_to_fit, png, rows_of, score_here, write_images
from scorer_twins import formula_image

from pipelines.config import ScorerEntry
from pipelines.dataset.errors import ConfigError, EncodingError, ModelError, ShardCorrupt
from pipelines.dataset.storage import Storage
from pipelines.scores.execution import score
from pipelines.scores.judges import Judge, prepare_judges, table_name
from pipelines.scores.loaded import load_judge
from pipelines.scores.plan import pending_scores, read_scores, table_of
from pipelines.scores.scorers import new_scorer
from pipelines.units.workers import Workers

WORKERS = Workers("evaluate", num_workers=2, device="cpu")
PROMPTS = ["a red cat", "a dog in a house", "a photo"]


def entries(twins: Path, *names: str, batch_size: int = 32) -> list[ScorerEntry]:
    return [ScorerEntry(name=name, weights=str(twins), batch_size=batch_size) for name in names]


def images_of(storage: Storage, count: int, **options: Any) -> pa.Table:
    return write_images(storage, "a", formula_files(count), [PROMPTS[n % 3] for n in range(count)], **options)


def values(storage: Storage, judge: Judge, images: pa.Table) -> list[Any]:
    found: list[Any] = read_scores(storage, judge, images)["value"].to_pylist()
    return found


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
    assert set(score(storage, judges, more, WORKERS).num_scored.values()) == {1}
    assert score(storage, judges, more, WORKERS).speed is None
    for judge in judges:
        rows = rows_of(storage, judge)
        assert len(rows) == 11
        assert {row["status"] for row in rows} == {"scored"}
        assert len(values(storage, judge, more)) == 21
        noted = json.loads(storage.read(f"dataset/scores/{judge.name}@{judge.fingerprint}/judge.json"))
        assert noted == judge.to_json()
        assert noted["shaping"]["scorer"] == judge.name


@pytest.mark.usefixtures("ray_cluster")
def test_a_users_scorers_run_in_actors_and_only_the_row_that_raises_fails(storage: Storage) -> None:
    prompts = ["fine", "please raise", "nan", "fine too"]
    files = [*formula_files(3), b"no image at all"]
    images = write_images(storage, "a", files, prompts)
    fit = pairs_to_fit(write_images(storage, "fit", formula_files(4), PROMPTS[:1] * 4))
    named = [ScorerEntry(name="scored_images:Lightness", batch_size=2), ScorerEntry(name="scored_images:Picky")]
    judges = prepare_judges(named, storage, fit_on=fit)
    assert [judge.name for judge in judges] == ["how light? /é", "picky"]
    assert (judges[0].scale, judges[0].licence, judges[0].higher_is_better) == ("", "not stated", True)
    figures = score(storage, judges, images, WORKERS)
    assert figures.num_failed == {"how light? /é": 1, "picky": 3}
    light, picky = (read_scores(storage, judge, images).to_pylist() for judge in judges)
    assert light[0]["value"] is not None
    assert [row["value"] for row in picky] == [4.0, None, None, None]
    assert [row["status"] for row in picky] == ["scored", "failed", "failed", "failed"]
    assert picky[1]["reason"] == "ValueError: no such prompt"
    assert picky[2]["reason"] == "the score is not a finite number"
    assert picky[3]["reason"].startswith("the image cannot be decoded: ")
    assert pending_scores(storage, judges, images).total == 0, "a failure is not tried again"


@pytest.mark.usefixtures("ray_cluster")
def test_a_fault_of_the_machine_is_raised_and_leaves_no_row(storage: Storage) -> None:
    judges = prepare_judges([ScorerEntry(name="scored_images:Broken")], storage)
    with pytest.raises(
        ModelError, match=r"the scorer broken failed on this machine: OSError: .*No space left"
    ) as caught:
        score(storage, judges, images_of(storage, 2), WORKERS)
    assert caught.value.hint
    assert table_of(storage, judges[0]).version is None


def test_a_prompt_that_hps_cannot_clean_without_ftfy_is_refused_before_work(storage: Storage, twins: Path) -> None:
    if importlib.util.find_spec("ftfy") is not None:
        pytest.skip("ftfy is installed")
    images = write_images(storage, "a", formula_files(2), ["a cat", "a \u201cdog\u201d"])
    judges = prepare_judges(entries(twins, "hpsv2"), storage)
    with pytest.raises(ModelError, match="HPS cleans prompts with ftfy, which is not installed") as caught:
        score(storage, judges, images, WORKERS)
    assert caught.value.hint == "pip install 'mapo[eval]'"


def test_the_batch_size_changes_no_score(storage: Storage, twins: Path, tmp_path: Path) -> None:
    names = ("pickscore", "clipscore", "imagereward", "saturation")
    other = Storage(str(tmp_path / "other"))
    images = [images_of(each, 40) for each in (storage, other)]
    judges = [prepare_judges(entries(twins, *names, batch_size=size), storage) for size in (1, 32)]
    assert [each.fingerprint for each in judges[0]] == [each.fingerprint for each in judges[1]]
    score_here(storage, judges[0], images[0])
    score_here(other, judges[1], images[1])
    for one, many in zip(*judges, strict=True):
        found = values(storage, one, images[0]), values(other, many, images[1])
        assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-5)
        assert len(set(found[0])) > 10 or one.name == "clipscore", "whose tiny twin finds no image like its prompt"


def test_judges_of_one_trunk_run_it_once_and_equal_each_alone(storage: Storage, twins: Path, tmp_path: Path) -> None:
    images = images_of(storage, 40)
    judges = prepare_judges(entries(twins, "aesthetic", "clipscore", "clipscore-l14"), storage)
    before = load_judge(judges[0], storage, "cpu").scorer._images.num_forwards  # by other tests of this process
    writer = score_here(storage, judges, images)
    trunks = [loaded.scorer._images for loaded in writer._judges]
    assert trunks[0] is trunks[1] is trunks[2]
    assert trunks[0].num_forwards - before == 2, "40 images in batches of 32"
    for judge in judges:
        alone = Storage(str(tmp_path / judge.name))
        alike = images_of(alone, 40)
        score_here(alone, [judge], alike)
        assert rows_of(alone, judge) == rows_of(storage, judge), "and the same commits"


def test_an_image_is_read_and_decoded_once_for_all_judges_and_siblings(
    storage: Storage, twins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, decoded = images_of(storage, 12, siblings=True), []
    monkeypatch.setattr(
        "pipelines.scores.scorers.images.to_rgb", lambda image: decoded.append(image) or image.convert("RGB")
    )
    judges = prepare_judges(entries(twins, "clipscore", "hpsv2", "saturation", "near_duplicates"), storage)
    score_here(storage, judges, images)
    assert len(decoded) == 12
    rows = read_scores(storage, judges[3], images).to_pylist()
    assert all(json.loads(row["components"])["nearest_bits"] > 0 for row in rows)
    known = new_scorer("near_duplicates").score(
        [formula_image(64, 64, 0)], ["a"], siblings=[[formula_image(64 + seed % 7, 64, seed) for seed in (3, 6, 9)]]
    )
    assert rows[0]["value"] == known[0].value


def test_another_sibling_makes_another_score_of_those_that_look_at_siblings_alone(
    storage: Storage, twins: Path
) -> None:
    images = images_of(storage, 9, siblings=True)
    judges = prepare_judges(entries(twins, "saturation", "near_duplicates"), storage)
    score_here(storage, judges, images)
    more = images_of(storage, 10, siblings=True)
    assert pending_scores(storage, judges, more).num_missing == (1, 4), "of the new image's prompt, and it"
    without = images_of(storage, 10)
    with pytest.raises(ConfigError, match="near_duplicates needs siblings, which these images do not have"):
        pending_scores(storage, judges, without)


def test_references_may_be_files_of_their_own(storage: Storage, twins: Path, tmp_path: Path) -> None:
    import hashlib

    file = tmp_path / "reference.png"
    file.write_bytes(png(formula_image(80, 64, 5)))
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    place = {"shard": str(file), "offset": None, "length": None, "sha256": sha256}
    images = images_of(storage, 3)
    from pipelines.scores.images import IMAGES_SCHEMA

    kind = IMAGES_SCHEMA.field("references").type
    images = images.append_column("references", pa.array([[place]] * 3, kind))
    (judge,) = prepare_judges(entries(twins, "dino"), storage)
    score_here(storage, [judge], images)
    scorer = new_scorer("dino")
    scorer.load(twins, "cpu")
    (known,) = scorer.score([formula_image(64, 64, 0)], ["a"], references=[[Image.open(file)]])
    assert values(storage, judge, images)[0] == pytest.approx(known, abs=1e-6)
    file.write_bytes(png(formula_image(80, 64, 6)))
    (other,) = prepare_judges(entries(twins, "clip-i"), storage)
    with pytest.raises(ShardCorrupt, match="differs from what was planned"):
        score_here(storage, [other], images)


def test_memory_that_runs_out_halves_the_batch(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "factor.txt").write_text("2.5")
    images = images_of(storage, 7)
    questions = [json.dumps({"asked": ["?"] * (n + 1)}) for n in range(7)]
    images = images.append_column("questions", pa.array(questions))
    entry = ScorerEntry(name="scored_images:Reading", weights=str(tmp_path / "weights"), batch_size=7)
    (judge,) = prepare_judges([entry], storage)
    assert judge.higher_is_better is False
    writer = score_here(storage, [judge], images)
    assert writer._sizes[0].size == 1
    assert values(storage, judge, images) == [2.5 * (n + 1) for n in range(7)]


def test_damaged_bytes_are_an_error_and_no_score(storage: Storage, twins: Path) -> None:
    images = images_of(storage, 3)
    data = bytearray(storage.read("dataset/samples/a.tar"))
    data[images["offset"][1].as_py() + 40] ^= 1
    storage.write("dataset/samples/a.tar", bytes(data))
    (judge,) = prepare_judges(entries(twins, "saturation"), storage)
    with pytest.raises(ShardCorrupt):
        score_here(storage, [judge], images)
    assert table_of(storage, judge).version is None


def test_an_image_of_unknown_colours_fails_with_every_judge(storage: Storage, twins: Path) -> None:
    import io

    Image.new("F", (64, 64)).save(out := io.BytesIO(), "TIFF")
    images = write_images(storage, "a", [*formula_files(1), out.getvalue()], ["a cat", "a cat"])
    judges = prepare_judges(entries(twins, "clipscore", "saturation"), storage)
    score_here(storage, judges, images)
    for judge in judges:
        first, second = read_scores(storage, judge, images).to_pylist()
        assert math.isfinite(first["value"])
        assert second == {"value": None, "components": "{}", "status": "failed", "reason": second["reason"]}
        assert "mode F" in second["reason"]


def test_not_enough_memory_for_one_image_is_an_error(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    import scored_images

    def score_none(self: Any, images: Any, prompts: Any) -> list[float]:
        raise MemoryError("never enough")

    monkeypatch.setattr(scored_images.Picky, "score", score_none)
    judges = prepare_judges([ScorerEntry(name="scored_images:Picky")], storage)
    with pytest.raises(EncodingError, match="not enough memory to score even one image"):
        score_here(storage, judges, images_of(storage, 2))


def test_names_of_tables_are_safe_and_unambiguous() -> None:
    names = ["clip-i", "hpsv2.1", "how light? /é", "a~20", "a ", "..", ".", "-x", "Style", "a@b", "a/b", "a%2Fb"]
    tables = [table_name(name) for name in names]
    assert len(set(tables)) == len(names)
    assert tables[:3] == ["clip-i", "hpsv2.1", "how~20light~3f~20~2f~c3~a9"]
    assert all(
        set(table) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-~") for table in tables
    )
    assert not any(table.startswith((".", "-")) for table in tables)
    for name in ("", "x" * 200):
        with pytest.raises(ConfigError, match="the name of a scorer"):
            table_name(name)
