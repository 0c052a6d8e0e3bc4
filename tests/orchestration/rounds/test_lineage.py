"""Lineage: what a model was trained on, to the pair, from its folder; held against the digests of what was consumed."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from encoded import LATENTS, TEXT, write_encoded

from orchestration.cli import main
from orchestration.config import parse_config
from orchestration.rounds.record import LINEAGE, describe_lineage, lineage_of
from orchestration.rounds.rows import ROWS_SCHEMA
from orchestration.rounds.seen_pairs import TrainedRound, count_pairs, seen_pairs
from orchestration.rounds.series import finish_round, made_from
from orchestration.run.context import Run
from orchestration.run.journal import StageRecord
from orchestration.stages.model_card import model_card
from pipelines.dataset.layout import LATENTS_SCHEMA, latents_table, pairs_table, text_table
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.pair import PAIRS_SCHEMA, Status, pair_key, prompt_id
from pipelines.dataset.storage import Storage
from pipelines.maintenance.gc import delete_garbage, find_garbage, stored_objects
from pipelines.maintenance.history import as_text, history
from pipelines.maintenance.remove import Condition, remove
from training.config import TrainConfig
from training.data.index import PairIndex, load_index
from training.data.order import Plan
from training.launch import TrainingResult as Result
from training.spec import Parent, Snapshot, TrainSpec
from training.tracking.account import ConsumedPairs

CONFIG = TrainConfig(global_batch_size=8, micro_batch_size=2, max_steps=2, rounds="continue")


def add_pairs(storage: Storage, unit: str, number: int, side: int = 8) -> None:
    """More pairs with rows of their latents, whose bytes nobody reads here."""
    pairs, latents = [], []
    for i in range(number):
        digests = [f"{unit}{i}{image}".encode().hex().rjust(64, "0") for image in (0, 1)]
        key = pair_key("prompt 1", *digests)
        row = dict.fromkeys(PAIRS_SCHEMA.names) | {
            "pair_key": key,
            "prompt": "prompt 1",
            "prompt_id": prompt_id("prompt 1"),
        }
        row |= {"label_0": 1.0, "status": "kept", "split": "train", "source": "test", "source_uri": f"{unit}.parquet"}
        pairs.append(row | {"source_row": i, "unit": unit})
        placed = dict.fromkeys(LATENTS_SCHEMA.names) | {"pair_key": key, "status": "kept", "unit": unit}
        placed |= {"shard": "no.tar", "shard_bytes": 1, "shard_sha256": "0" * 64, "offset": 0, "length": 1}
        latents.append(placed | {"sha256": "0" * 64, "bucket_height": 8 * side, "bucket_width": 64})
    pairs_table(storage).append(unit, pa.Table.from_pylist(pairs, PAIRS_SCHEMA))
    latents_table(storage, LATENTS).append(unit, pa.Table.from_pylist(latents, LATENTS_SCHEMA))


def newest(storage: Storage) -> Snapshot:
    versions = [
        table.version for table in (pairs_table(storage), latents_table(storage, LATENTS), text_table(storage, TEXT))
    ]
    return Snapshot(versions[0], LATENTS, versions[1], TEXT, versions[2])  # type: ignore[arg-type]


def consumed(index: PairIndex, spec: TrainSpec, steps: int) -> tuple[ConsumedPairs, set[str]]:
    """What the ranks of a training count, and the pairs of its groups."""
    config = spec.config
    plan = Plan(index.bucket_sizes, config.micro_batch_size, config.global_batch_size, spec.seed)
    account, keys = ConsumedPairs(), set()
    for step in range(steps):
        for slot in range(plan.num_slots):
            group = plan.group(step, slot)
            batch = [index.pair(group.bucket, int(element)).pair_key for element in group.elements]
            account.add(step, slot, batch)
            keys.update(batch)
    return account, keys


class Photos:
    """A run whose rounds are made of records, and what each of them really trained on."""

    def __init__(self, folder: Path) -> None:
        self.storage = Storage(str(folder / "storage"))
        write_encoded(self.storage, folder, sides=(8, 12), labels=(0.0, 0.5, 1.0), num_train=40)
        settings = {"name": "photos", "storage": self.storage.url, "encode": {"model": "some/model"}}
        settings |= {"ingest": {"sources": [{"format": "pickapic", "path": "in.parquet"}]}}
        self.run = Run.open(parse_config(yaml.safe_dump(settings | {"train": CONFIG.model_dump(mode="json")})), print)
        self.seen: list[set[str]] = []
        self.record: StageRecord | None = None

    def train(self, steps: int = 2, exported_step: int | None = None) -> None:
        """A round of so many steps; the next one starts from the checkpoint of `exported_step`."""
        number, used = len(self.seen) + 1, exported_step or steps
        parent = None
        if self.record is not None:
            checkpoint = self.record.details["best_checkpoint"]
            parent = Parent(number - 1, self.record.key, checkpoint, "0" * 64, "raw", "base", None)
        spec = TrainSpec(
            self.storage.url, "photos", ModelSource("m"), "base", number, CONFIG, newest(self.storage), number, parent
        )
        account, keys = consumed(load_index(self.storage, spec.snapshot, "train"), spec, used)
        self.seen.append(keys)
        folders = [f"{spec.checkpoints}/step-{step:08d}-0001-0123abcd" for step in (steps, used)]
        for each in folders:
            self.storage.write(f"{each}/manifest.json", b"{}")
        result = Result(
            folders[0], folders[1], folders[1], steps, {"steps": [], "validations": []}, [], account.digest, 1
        )
        num_pairs, num_seen = count_pairs(spec, steps)
        of_round = finish_round(self.run, spec, result, num_pairs=num_pairs, num_seen=num_seen)
        details = asdict(result) | made_from(spec) | of_round
        self.record = self.run.journal.finish("train", key=spec.key, summary="", seconds=1, details=details)
        self.run.storage.write(f"{self.run.folder}/snapshot.json", json.dumps(asdict(spec.snapshot)).encode())

    def export(self) -> str:
        """Write the file of the model that the last round gave; its folder."""
        assert self.record is not None
        lineage = lineage_of(self.run, self.record, self.record.details["best_checkpoint"], "raw")
        self.storage.write(f"{self.run.model}/{LINEAGE}", json.dumps(lineage).encode())
        return self.storage.path(self.run.model)


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    return Photos(tmp_path)


@pytest.mark.parametrize("labels", ["soft", "hard"])
@pytest.mark.parametrize("steps", [0, 1, 3, 5, 6, 11])
def test_the_pairs_that_are_told_are_those_that_the_digest_is_of(photos: Photos, labels: str, steps: int) -> None:
    """A row of the latents and one of the texts are quarantined, and three buckets are of other sizes."""
    storage = photos.storage
    add_pairs(storage, "tall", 7, side=4)
    taken = latents_table(storage, LATENTS).read(["pair_key"])["pair_key"][3].as_py()

    def quarantine(rows: pa.Table) -> pa.Table:
        status = pc.if_else(pc.equal(rows["pair_key"], taken), "quarantined", rows["status"])
        return rows.set_column(rows.column_names.index("status"), "status", status)

    here = (pc.field("pair_key") == taken) & (pc.field("status") == str(Status.KEPT))
    latents_table(storage, LATENTS).rewrite(quarantine, here, name="test")
    config = CONFIG.model_copy(update={"labels": labels})
    spec = TrainSpec(storage.url, "photos", ModelSource("m"), "base", 3, config, newest(storage))
    index = load_index(storage, spec.snapshot, "train", labels=labels)  # type: ignore[arg-type]
    account, keys = consumed(index, spec, steps)
    seen = seen_pairs(storage, TrainedRound(1, spec.snapshot, 3, 2, 8, labels, steps))
    told = {f"{high:016x}{low:016x}" for high, low in seen.keys[seen.is_seen].tolist()}
    assert told == keys
    assert len(seen.keys) == len(index)
    assert count_pairs(spec, steps) == (len(index), len(keys))
    assert seen.has(taken) is None
    expected = [index.pair(bucket, i).pair_key for bucket, size in enumerate(index.bucket_sizes) for i in range(size)]
    assert [f"{high:016x}{low:016x}" for high, low in seen.keys.tolist()] == expected, "in the order of the index"
    assert account.num_pairs == 8 * steps


def test_rows_are_the_pairs_of_all_rounds_each_with_the_first_that_saw_it(photos: Photos, tmp_path: Path) -> None:
    photos.train()
    add_pairs(photos.storage, "new", 4)
    photos.train()
    model = photos.export()
    told = describe_lineage(model, rows=str(tmp_path / "rows.parquet"))
    rows = pq.read_table(tmp_path / "rows.parquet")
    assert rows.schema.equals(ROWS_SCHEMA)
    first = {row["pair_key"]: row["first_round"] for row in rows.to_pylist()}
    assert len(first) == rows.num_rows
    assert {key for key, number in first.items() if number == 1} == photos.seen[0]
    assert first.keys() == photos.seen[0] | photos.seen[1]
    assert told["trained_on"]["pairs"] == len(first)
    assert told["trained_on"]["rounds"]["1"] == {"pairs": 40, "trained_on": 16, "first_time": 16}
    table = {row["pair_key"]: row for row in pairs_table(photos.storage).read().to_pylist()}
    for row in rows.to_pylist():
        for name in ("prompt_id", "source_uri", "source_row", "label_0", "split", "unit"):
            assert row[name] == table[row["pair_key"]][name]
        assert row["removed"] is False
    by_uri = {each["uri"]: each for each in told["sources"]}
    assert by_uri["memory"]["rows"] == {"train": {"kept": 40}, "validation": {"kept": 6}}
    assert sum(each["trained_on"] for each in told["sources"]) == len(first)


def test_a_model_of_an_earlier_step_saw_no_more_than_that(photos: Photos) -> None:
    photos.train(steps=4, exported_step=1)
    told = describe_lineage(photos.export())
    assert told["trained_on"]["pairs"] == len(photos.seen[0]) == 8
    assert [each["step"] for each in told["lineage"]["rounds"]] == [1]


def test_a_takedown_request_is_answered_by_pair_and_by_row(photos: Photos, capsys: pytest.CaptureFixture[str]) -> None:
    photos.train()
    add_pairs(photos.storage, "new", 4)
    photos.train(steps=20)
    model = photos.export()
    seen, unseen = min(photos.seen[0]), None
    table = {row["pair_key"]: row for row in pairs_table(photos.storage).read().to_pylist()}
    unseen = min(
        key
        for key, row in table.items()
        if row["source_uri"] == "memory" and row["split"] == "train" and key not in photos.seen[0]
    )
    held_out = min(key for key, row in table.items() if row["split"] == "validation")
    remove(photos.storage, [Condition("key", seen)])

    def asked(what: str) -> list[dict[str, Any]]:
        assert main(["lineage", model, "--pair", what, "--json"]) == 0
        pairs: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["pairs"]
        return pairs

    row = table[seen]
    for what in (seen, f"{row['source_uri']}#{row['source_row']}"):
        (pair,) = asked(what)
        assert (pair["pair_key"], pair["removed"]) == (seen, True)
        assert [each["trained_on"] for each in pair["rounds"]] == [True, True]
        assert pair["rounds"][0]["status"] == "kept"
    (pair,) = asked(unseen)
    assert [(each["in_snapshot"], each["trained_on"]) for each in pair["rounds"]] == [(True, False), (True, True)]
    (pair,) = asked(held_out)
    assert [(each["in_snapshot"], each["trained_on"], each["split"]) for each in pair["rounds"]] == [
        (False, False, "validation")
    ] * 2
    assert asked("f" * 32) == asked("memory#99999") == []
    told = describe_lineage(model)
    assert told["trained_on"]["removed"] == 1
    assert [each["removed"] for each in told["sources"] if each["uri"] == "memory"] == [1]
    assert main(["lineage", model, "--pair", seen]) == 0
    shown = capsys.readouterr().out
    assert f"{seen}  trained on in round 1, 2; removed since" in shown
    assert main(["lineage", model]) == 0
    assert "1 of them removed since" in capsys.readouterr().out
    assert main(["lineage", model, "--pair", "what?"]) == 2
    assert "URI#ROW" in capsys.readouterr().err


def test_a_copy_elsewhere_tells_what_its_file_says_and_all_of_it_where_the_storage_is(
    photos: Photos, tmp_path: Path
) -> None:
    photos.train()
    copy = shutil.copytree(photos.export(), tmp_path / "copy")
    assert describe_lineage(str(copy))["trained_on"]["pairs"] == 16
    moved = shutil.move(photos.storage.path(), tmp_path / "moved")
    told = describe_lineage(str(copy))
    assert told["trained_on"] is None
    assert "from the model's own file only: there is no data set at" in told["notes"][0]
    assert told["lineage"]["rounds"][0]["snapshot"]["pairs_version"] == 0
    assert describe_lineage(str(copy), storage=str(moved))["trained_on"]["pairs"] == 16
    assert main(["lineage", str(copy), "--rows", str(tmp_path / "rows.parquet")]) == 1
    assert not (tmp_path / "rows.parquet").exists()


def test_no_lineage_and_no_target_are_one_message(
    photos: Photos, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lineage", str(tmp_path)]) == 1
    assert "there is no" in (error := capsys.readouterr().err)
    assert error.count("hint: ") == 1
    photos.train()
    model = photos.export()
    (tmp_path / "there.parquet").write_bytes(b"")
    for target in (tmp_path / "there.parquet", tmp_path / "rows.csv"):
        assert main(["lineage", model, "--rows", str(target)]) == 2
        assert capsys.readouterr().err.count("hint: ") == 1
    Path(model, LINEAGE).write_text('{"version": 7}')
    assert main(["lineage", model]) == 1
    assert "cannot read" in capsys.readouterr().err


def test_the_file_is_the_same_whenever_it_is_written_and_holds_no_secret(
    photos: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos.train()
    photos.train()
    first = Path(photos.export(), LINEAGE).read_bytes()
    assert Path(photos.export(), LINEAGE).read_bytes() == first
    lineage = json.loads(first)
    assert [each["round"] for each in lineage["rounds"]] == [1, 2]
    assert lineage["rounds"][1]["parent"]["key"] == lineage["rounds"][0]["key"]
    assert lineage["base"] == {"model": "some/model", "vae": None, "revision": None, "variant": None, "digest": "base"}
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-0123456789")
    config = photos.run.config.model_copy(
        update={
            "encode": photos.run.config.encode.model_copy(update={"model": "s3://me:canary-0123456789@bucket/model"})
        }  # type: ignore[union-attr]
    )
    assert photos.record is not None
    told = json.dumps(
        lineage_of(replace(photos.run, config=config), photos.record, photos.record.details["checkpoint"], "raw")
    )
    assert "canary" not in told
    assert "bucket/model" in told


def test_a_round_whose_record_is_gone_is_said_to_be_unknown(photos: Photos) -> None:
    photos.train()
    add_pairs(photos.storage, "new", 4)
    photos.train()
    photos.storage.delete(f"{photos.run.folder}/rounds/0001.json")
    told = describe_lineage(photos.export())
    assert told["notes"] == ["the record of round 1 is missing, so its pairs are not counted"]
    assert told["trained_on"]["rounds"].keys() == {"2"}


def age(storage: Storage) -> None:
    for each in stored_objects(storage):
        os.utime(storage.path(each.name), (each.modified - 9e6,) * 2)


def names(objects: Sequence[Any]) -> set[str]:
    return {each.name for each in objects}


def test_gc_keeps_the_rows_of_rounds_and_not_the_bytes_of_their_images(photos: Photos) -> None:
    storage = photos.storage
    photos.train()
    old_files = {f"dataset/pairs/{file}" for file in pairs_table(storage).files()}
    storage.write("dataset/shards/unit-0.tar", b"images")  # of the first version, which no row of the newest points to

    def place(rows: pa.Table) -> pa.Table:
        return rows.set_column(
            rows.column_names.index("shard"),
            PAIRS_SCHEMA.field("shard"),
            pa.array(["dataset/shards/unit-0.tar"] * rows.num_rows),
        )

    pairs_table(storage).rewrite(place, pc.field("shard").is_null(), name="test")
    add_pairs(storage, "new", 4)
    photos.train()
    with_shard = {f"dataset/pairs/{file}" for file in pairs_table(storage).files()}
    for i in range(4):
        remove(storage, [Condition("prompt", f"prompt {i}")])
    model = photos.export()
    before = describe_lineage(model)["trained_on"]
    storage.delete(f"{photos.run.folder}/snapshot.json")
    age(storage)
    garbage = list(delete_garbage(storage, find_garbage(storage, timedelta(0))))
    assert not names(garbage) & (old_files | with_shard), "round 1 and round 2 need these"
    assert describe_lineage(model)["trained_on"] == before
    lines = as_text(history(storage))
    assert "lineage of photos round 1" in lines
    assert "lineage of photos round 2" in lines
    storage.delete(f"{photos.run.folder}/stages/train.json")
    assert storage.exists("dataset/shards/unit-0.tar")
    age(storage)
    found = names(list(delete_garbage(storage, find_garbage(storage, timedelta(0)))))
    assert "dataset/shards/unit-0.tar" in found, "no row that is needed for more than to be told points to it"
    assert describe_lineage(model)["trained_on"] == before
    shutil.rmtree(storage.path(photos.run.folder))
    assert old_files <= names(list(delete_garbage(storage, find_garbage(storage, timedelta(0)))))


def test_the_card_shows_the_chain(photos: Photos, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    photos.train()
    add_pairs(photos.storage, "new", 4)
    photos.train()
    assert photos.record is not None
    config = photos.run.config
    of_model = config.model_copy(update={"encode": config.encode.model_copy(update={"model": str(tmp_path / "base")})})  # type: ignore[union-attr]
    checkpoint = photos.record.details["checkpoint"]
    rounds = lineage_of(photos.run, photos.record, checkpoint, "raw")["rounds"]
    card = model_card(of_model, photos.record, checkpoint, rounds)
    assert "| 1 | the base | version 0 | 2 of 2 |" in card
    assert "| 2 | round 1, `raw` | version 1 | 2 of 2 |" in card
    assert "| round | starts from |" not in model_card(of_model, photos.record, checkpoint, rounds[1:])
