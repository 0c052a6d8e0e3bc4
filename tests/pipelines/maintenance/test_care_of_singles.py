"""Care of data sets with single images: verified, removed, compacted, exported and counted as pairs are."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from encode_steps import encode_here
from encoded import write_encoded
from factories import Row, photo_pairs, write_parquet
from singles import ingest, judged_rows, write_judged

from orchestration.cli import main
from pipelines.config import EncodeConfig, SourceConfig
from pipelines.dataset.errors import ConfigError
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.pair import JUDGED, PAIR, PRIOR
from pipelines.dataset.storage import Storage
from pipelines.maintenance import export as parquet_export
from pipelines.maintenance.accounting import as_text, summary_line
from pipelines.maintenance.compact import compact
from pipelines.maintenance.describe import describe_dataset, describe_encoding
from pipelines.maintenance.export import export_parquet
from pipelines.maintenance.gc import delete_garbage, find_garbage
from pipelines.maintenance.history import history
from pipelines.maintenance.occupancy import pair_shards
from pipelines.maintenance.remove import Condition, remove
from pipelines.maintenance.verify import committed_shards, verify

NUM = {PAIR: 5, JUDGED: 7, PRIOR: 2}


def pairs_file(folder: Path) -> SourceConfig:
    file = write_parquet(folder / "pairs.parquet", photo_pairs(7, num_ties=2), row_group_size=8)
    return SourceConfig(format="pickapic", path=str(file))


@pytest.fixture
def mixed(storage: Storage, tmp_path: Path) -> Storage:
    """5 pairs and 2 ties, 4 good, 3 bad and 2 images of a class, with weights."""
    rows = [row | {"weight": 1.0 + i} for i, row in enumerate(judged_rows(4, 3, 2))]
    rows[0]["split"] = "validation"
    ingest(storage, pairs_file(tmp_path), write_judged(tmp_path / "x.parquet", rows))
    return storage


@pytest.fixture
def singles(storage: Storage, tmp_path: Path) -> Storage:
    ingest(storage, write_judged(tmp_path / "x.parquet", judged_rows(4, 3, 2)))
    return storage


def rows_in(storage: Storage) -> dict[str, Row]:
    return {row["pair_key"]: row for row in pairs_table(storage).read().to_pylist()}


def images_in(storage: Storage) -> dict[str, tuple[bytes, ...]]:
    """The image bytes of every row with a place, each held to its digest."""
    return {
        key: tuple(
            storage.read_range(row["shard"], row[f"offset_{side}"], row[f"length_{side}"], row[f"image_{side}_sha256"])
            for side in (0, 1)
            if row[f"offset_{side}"] is not None
        )
        for key, row in rows_in(storage).items()
        if row["shard"]
    }


def test_every_image_is_verified_and_named(mixed: Storage) -> None:
    assert verify(mixed) == []
    assert sum(shard.members.num_rows for shard in committed_shards(mixed)) == 2 * 7 + 9
    row = next(row for row in rows_in(mixed).values() if row["kind"] == PRIOR)
    data = bytearray(mixed.read(row["shard"]))
    data[row["offset_0"] + 7] ^= 1
    mixed.write(row["shard"], bytes(data))
    whole, image = verify(mixed)
    assert whole.startswith(f"{mixed.uri(row['shard'])}: sha256 is ")
    assert f": single image {row['pair_key']} at {row['offset_0']:,}: sha256 is " in image


def test_what_ingest_writes_has_no_dead_members(mixed: Storage) -> None:
    assert not any(shard.has_dead_members(mixed) for shard in pair_shards(pairs_table(mixed)))


@pytest.mark.parametrize("position", [0, 4, 8], ids=["first", "middle", "last"])
def test_the_bytes_of_a_removed_image_leave_its_shard(singles: Storage, position: int) -> None:
    rows = sorted(rows_in(singles).values(), key=lambda row: (row["shard"], row["offset_0"]))
    gone, before = rows[position], images_in(singles)
    (data,) = before.pop(gone["pair_key"])
    assert remove(singles, [Condition("key", gone["pair_key"])]).num_singles == 1
    assert any(shard.has_dead_members(singles) for shard in pair_shards(pairs_table(singles)))
    done = next(compact(singles))
    assert (done.what, done.num_rewritten) == ("pairs", 1)
    assert images_in(singles) == before
    left = rows_in(singles)[gone["pair_key"]]
    assert (left["kind"], left["reason"], left["prompt"], left["shard"]) == (gone["kind"], "removed", None, None)
    assert {row["offset_1"] for row in rows_in(singles).values()} == {None}
    assert verify(singles) == []
    list(delete_garbage(singles, find_garbage(singles, timedelta(0))))
    assert images_in(singles) == before, "what is needed stays"
    stored = [singles.read(name) for name in singles.names("dataset/shards")]
    assert not any(data in shard for shard in stored)


def test_removal_counts_pairs_and_single_images(mixed: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "remove", mixed.url, "--where", "prompt~.", "--dry-run"]) == 0
    assert capsys.readouterr().out == "16 rows of 7 pairs, 9 single images would be removed: 14 kept, 2 tie\n"
    assert main(["data", "remove", mixed.url, "--where", "source=judged"]) == 0
    assert capsys.readouterr().out.startswith("9 rows of 0 pairs, 9 single images removed: 9 kept\n")
    assert describe_dataset(mixed).kinds == {PAIR: 5, JUDGED: 0, PRIOR: 0}


def test_an_export_with_images_is_a_source_of_each_format(
    mixed: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parquet_export, "GROUP_BYTES", 20_000)
    monkeypatch.setattr(parquet_export, "PART_BYTES", 30_000)
    out = tmp_path / "out"
    assert main(["data", "export", mixed.url, "--parquet", str(out), "--images"]) == 0
    assert capsys.readouterr().out.startswith("5 pairs, 9 single images in ")
    again = Storage(str(tmp_path / "again"))
    ingest(
        again,
        SourceConfig(format="pickapic", path=f"{out}/part-*.parquet"),
        SourceConfig(format="judged", path=f"{out}/singles-*.parquet"),
    )
    kept = {key: row for key, row in rows_in(mixed).items() if row["status"] == "kept"}
    images = images_in(mixed)
    assert images_in(again) == {key: images[key] for key in kept}
    same = ("prompt", "kind", "label_0", "weight", "status", "split", "width_0", "width_1")
    assert {key: [row[name] for name in same] for key, row in rows_in(again).items()} == {
        key: [row[name] for name in same] for key, row in kept.items()
    }


def test_without_images_all_kinds_are_one_table(mixed: Storage, tmp_path: Path) -> None:
    done = export_parquet(mixed, str(tmp_path / "rows.parquet"))
    assert (done.num_pairs, done.num_singles, done.num_files) == (5, 9, 1)
    exported = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    assert {row["pair_key"]: row for row in exported} == {
        key: row for key, row in rows_in(mixed).items() if row["status"] == "kept"
    }


def test_one_file_with_images_is_for_one_kind_of_source(mixed: Storage, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has pairs and single images, .* the one file all\.parquet"):
        export_parquet(mixed, str(tmp_path / "all.parquet"), images=True)
    remove(mixed, [Condition("source", "pickapic")])
    done = export_parquet(mixed, str(tmp_path / "all.parquet"), images=True)
    assert (done.num_pairs, done.num_files) == (0, 1)
    names = pq.read_schema(tmp_path / "all.parquet").names
    assert {"image", "good", "prior"} < set(names)
    assert "jpg_0" not in names


def test_the_accounting_says_the_kinds(mixed: Storage) -> None:
    facts = describe_dataset(mixed)
    assert (facts.kinds, facts.verdicts) == (NUM, {"good": 4, "bad": 3})
    assert sum(facts.kinds.values()) == facts.rows["kept"] == sum(facts.splits.values())
    assert (sum(shard.pairs for shard in facts.shards), sum(shard.singles for shard in facts.shards)) == (7, 9)
    assert summary_line(facts) == (
        "16 rows: 14 kept, 2 tie, 0 duplicate, 0 quarantined; kept 5 pairs, 7 judged (4 good, 3 bad), 2 prior"
    )
    told = facts.to_json()
    assert (told["kinds"], told["verdicts"]) == (NUM, {"good": 4, "bad": 3})
    assert {("singles" in shard, shard["pairs"] == 0) for shard in told["shards"]} == {(True, True), (False, False)}
    assert [sum(entry.rows.values()) for entry in history(mixed)] == [9, 7]


def test_a_data_set_of_pairs_is_described_in_the_words_of_before(storage: Storage, tmp_path: Path) -> None:
    ingest(storage, pairs_file(tmp_path))
    facts = describe_dataset(storage)
    assert "judged" not in as_text(facts)
    assert "single" not in as_text(facts)
    assert {tuple(shard) for shard in facts.to_json()["shards"]} == {("path", "bytes", "sha256", "pairs")}


def test_encodings_count_them_beside_the_pairs(mixed: Storage, config: EncodeConfig, vae: Any, text: Any) -> None:
    encode_here(config, mixed, vae, text)
    (latents,), (texts,) = describe_dataset(mixed).latents, describe_dataset(mixed).text
    assert (latents.kept, latents.singles, texts.kept) == (5, 9, 5 + 9 + 1)
    assert f"latents {latents.fingerprint}: 5 pairs, 9 single images, " in as_text(describe_dataset(mixed))
    assert (latents.to_json()["pairs"], latents.to_json()["singles"]) == (5, 9)
    facts = describe_encoding(mixed, latents.fingerprint, texts.fingerprint)
    assert (facts.pairs, facts.singles, facts.image_slots, facts.images) == (5, 9, 19, 19)
    assert facts.text_ratio == 1.0


def test_latents_of_pairs_alone_are_counted_as_before(storage: Storage, tmp_path: Path) -> None:
    write_encoded(storage, tmp_path, num_train=6, num_validation=2)
    (latents,) = describe_dataset(storage).latents
    assert (latents.kept, latents.singles) == (8, 0)
    assert "singles" not in latents.to_json()
