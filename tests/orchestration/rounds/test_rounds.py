"""Rounds: what is next follows from storage alone, and new rows cost what they are; once with all of the pipeline."""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from checkpoints import write_checkpoint
from factories import photo_pairs, write_parquet
from kept import keep_rows, rows_in
from torch import zeros

from orchestration.cli import main
from orchestration.config import parse_config
from orchestration.driver.runner import run_stages
from orchestration.rounds.series import (
    check_next_round,
    check_parent,
    finish_round,
    forget_old_rounds,
    made_from,
    next_round,
    reads_the_same,
    rounds_of,
)  # fmt: skip
from orchestration.run.context import Run
from orchestration.stages.base_check import check_training
from pipelines.dataset.errors import ConfigError, ModelError
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.model_files import ModelSource
from pipelines.dataset.storage import Storage
from pipelines.maintenance.compact import compact
from pipelines.maintenance.remove import Condition, remove
from training.export import read_weights
from training.launch import TrainingResult
from training.spec import Snapshot, TrainSpec
from training.state.checkpoint_format import list_checkpoints

LATENTS, TEXT = "a" * 32, "b" * 32


def snapshot_at(version: int, latents: int = 0) -> Snapshot:
    return Snapshot(version, LATENTS, latents, TEXT, 0)


def open_run(storage: Storage, **train: Any) -> Run:
    settings = {"name": "small", "storage": storage.url, "train": {"rounds": "continue", **train}}
    return Run.open(parse_config(yaml.safe_dump(settings)), lambda line: None)


def finish(run: Run, snapshot: Snapshot, base_digest: str = "base") -> TrainSpec:
    """The next round, as a training would leave it: two checkpoints, its record, and that of the stage."""
    assert run.config.train is not None
    following = next_round(run, snapshot)
    spec = TrainSpec(
        run.storage.url, "small", ModelSource("base"), base_digest, 0, run.config.train, following.snapshot,
        following.number, following.parent,
    )  # fmt: skip
    folders = [write_checkpoint(run.storage, spec.checkpoints, step, {"w": zeros(4)}) for step in (4, 8)]
    history: dict[str, Any] = {"steps": [{"step_s": 0.5}], "validations": []}
    trained = TrainingResult(folders[1], folders[0], folders[0], 8, history, [], "c0ffee", 1)
    of_round = finish_round(run, spec, trained, num_pairs=9, num_seen=8)
    details = asdict(trained) | made_from(spec) | of_round
    run.journal.finish("train", key=spec.key, summary="8 steps", seconds=1, details=details)
    return spec


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage(str(tmp_path / "storage"))
    keep_rows(storage, tmp_path / "photos.parquet", photo_pairs(16))
    return storage


def newest(storage: Storage) -> Snapshot:
    version = pairs_table(storage).version
    assert version is not None
    return snapshot_at(version)


def add_rows(storage: Storage, seed: int, **changes: Any) -> None:
    keep_rows(storage, Path(storage.path()).parent / f"{seed}.parquet", photo_pairs(4, seed=seed, **changes))


def test_a_new_snapshot_is_the_next_round_from_the_last_one_and_the_same_is_the_same(storage: Storage) -> None:
    run = open_run(storage)
    first = finish(run, newest(storage))
    assert (first.round, first.parent) == (1, None)
    assert next_round(run, newest(storage)).parent is None, "a finished round is up to date"
    add_rows(storage, 1)
    following = next_round(run, newest(storage))
    assert following == next_round(run, newest(storage)), "an interrupted round is the same round"
    assert (following.number, following.snapshot) == (2, newest(storage))
    assert following.parent is not None
    assert (following.parent.round, following.parent.key) == (1, first.key)
    assert following.parent.checkpoint == list_checkpoints(storage, first.checkpoints)[-1].folder
    second = finish(run, newest(storage))
    assert second.parent == following.parent
    again = next_round(open_run(storage, learning_rate=1e-3), newest(storage))
    assert (again.number, again.parent) == (2, following.parent), "other settings: the same round from the same parent"


def test_restart_knows_no_parent_and_keeps_the_keys_that_it_had(storage: Storage) -> None:
    run, restarts = open_run(storage), open_run(storage, rounds="restart")
    spec = finish(restarts, newest(storage))
    assert spec.key == replace(spec, config=run.config.train).key, "a first round is the same training either way"
    add_rows(storage, 1)
    following = next_round(restarts, newest(storage))
    assert (following.number, following.parent) == (2, None)
    parent = next_round(run, newest(storage)).parent
    assert parent is not None, "what was trained so can be gone on from later"
    assert parent.key == spec.key


@pytest.mark.parametrize("change", ["compaction", "only duplicates", "only ties"])
def test_what_brings_training_nothing_starts_no_round(storage: Storage, change: str) -> None:
    run = open_run(storage)
    add_rows(storage, 5)
    victim = next(row for row in rows_in(storage) if row["source_uri"].endswith("5.parquet"))
    remove(storage, [Condition("key", victim["pair_key"])])
    done = newest(storage)
    finish(run, done)
    if change == "compaction":
        assert any(each.num_rewritten for each in compact(storage))
    elif change == "only duplicates":
        keep_rows(storage, Path(storage.path()).parent / "again.parquet", photo_pairs(16))
    else:
        keep_rows(storage, Path(storage.path()).parent / "ties.parquet", photo_pairs(4, seed=9, num_ties=4))
    assert newest(storage) != done
    following = next_round(run, newest(storage))
    assert (following.number, following.snapshot, following.parent) == (1, done, None)


def test_what_may_change_what_training_reads_starts_a_round(storage: Storage) -> None:
    done = newest(storage)
    remove(storage, [Condition("key", rows_in(storage)[0]["pair_key"])])
    assert not reads_the_same(storage, done, newest(storage)), "a removal"
    after = newest(storage)
    add_rows(storage, 1)
    assert not reads_the_same(storage, after, newest(storage)), "new pairs"
    assert not reads_the_same(storage, newest(storage), after), "another data set in the place of this one"
    assert not reads_the_same(storage, after, replace(after, latents_fingerprint="c" * 32)), "other tensors"
    assert reads_the_same(storage, after, replace(after, latents_version=7)), "latents of other pairs"


def test_a_round_that_has_begun_is_not_begun_anew_by_a_compaction(storage: Storage) -> None:
    run = open_run(storage)
    remove(storage, [Condition("key", rows_in(storage)[0]["pair_key"])])
    finish(run, newest(storage))
    add_rows(storage, 1)
    begun = newest(storage)
    storage.write(f"{run.folder}/snapshot.json", json.dumps(asdict(begun)).encode())
    list(compact(storage))
    assert next_round(run, newest(storage)).snapshot == begun
    add_rows(storage, 2)
    assert next_round(run, newest(storage)).snapshot == newest(storage)


def test_the_parent_is_what_was_exported(storage: Storage) -> None:
    run = open_run(storage, ema={"decay": 0.9})
    first = finish(run, newest(storage))
    best, last = (each.folder for each in list_checkpoints(storage, first.checkpoints))
    add_rows(storage, 1)

    def chosen(run: Run) -> tuple[str, str]:
        parent = next_round(run, newest(storage)).parent
        assert parent is not None
        return parent.checkpoint, parent.weights

    assert chosen(run) == (last, "ema"), "what an export would take"
    settings = yaml.safe_dump(run.config.model_dump(mode="json") | {"export": {"checkpoint": "best", "weights": "raw"}})
    other = Run.open(parse_config(settings), lambda line: None)
    assert chosen(other) == (best, "raw")
    made = {"training": first.key, "checkpoint": best, "kind": "ema"}
    run.journal.finish("export", key="k", summary="", seconds=1, details=made)
    assert chosen(run) == chosen(other) == (best, "ema"), "what was exported, whatever the configuration says now"
    run.journal.finish("export", key="k", summary="", seconds=1, details=made | {"training": "of an older round"})
    assert chosen(run) == (last, "ema")


def test_the_adapters_that_the_first_round_started_from_may_be_gone_in_the_next(storage: Storage) -> None:
    """Also if a version without `lora.weights` made that round."""
    run = open_run(storage)
    finish(run, newest(storage), base_digest="1" * 16)
    add_rows(storage, 1)
    following = next_round(run, newest(storage))
    assert following.parent is not None
    old = {"rank": 4, "alpha": None, "targets": ["to_q", "to_k", "to_v", "to_out.0"]}
    for before in (old, old | {"weights": "mine.safetensors"}):
        for now in ({"rank": 4}, {"rank": 4, "weights": "elsewhere/mine.safetensors"}):
            spec = TrainSpec(
                storage.url, "small", ModelSource("base"), "1" * 16, 0, open_run(storage, lora=now).config.train,
                following.snapshot, following.number, replace(following.parent, lora=before),
            )  # fmt: skip
            check_parent(spec)
    with pytest.raises(ConfigError, match="it was trained with"):
        check_parent(replace(spec, parent=replace(following.parent, lora=old | {"rank": 8})))


def test_another_base_or_other_adapters_are_one_error_that_says_what_differs(
    storage: Storage, tiny_pipeline: Path
) -> None:
    run = open_run(storage)
    finish(run, newest(storage), base_digest="0" * 16)
    add_rows(storage, 1)
    following = next_round(run, newest(storage))
    spec = TrainSpec(
        storage.url, "small", ModelSource("base"), "1" * 16, 0, open_run(storage, lora={"rank": 4}).config.train,
        following.snapshot, following.number, following.parent,
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        check_parent(spec)
    assert "round 2 cannot start from round 1 (" in caught.value.message
    assert f"has the digest {'1' * 16}, but it was trained from {'0' * 16}" in caught.value.message
    assert "train.lora is {'rank': 4" in caught.value.message
    assert "train.rounds: restart" in str(caught.value.hint)
    assert "`name`" in str(caught.value.hint)
    settings = run.config.model_dump(mode="json") | {"encode": {"model": str(tiny_pipeline)}}
    early = Run.open(parse_config(yaml.safe_dump(settings)), lambda line: None)
    with pytest.raises(ConfigError, match="round 2 cannot start from round 1"):
        check_training(early)
    check_next_round(Run.open(parse_config(yaml.safe_dump(settings), ["train.rounds=restart"]), lambda line: None))


def test_a_lost_parent_is_named(storage: Storage) -> None:
    run = open_run(storage)
    first = finish(run, newest(storage))
    record = json.loads(storage.read(f"{run.folder}/stages/train.json"))
    del record["details"]["manifests"]  # as an older version wrote it
    storage.write(f"{run.folder}/stages/train.json", json.dumps(record).encode())
    shutil.rmtree(storage.path(first.checkpoints))
    add_rows(storage, 1)
    with pytest.raises(ModelError, match=f"no complete checkpoint .*{first.key}/step-00000008"):
        next_round(run, newest(storage))


def test_a_record_of_a_round_is_written_once_and_tells_all(storage: Storage) -> None:
    run = open_run(storage)
    spec = finish(run, newest(storage))
    name = f"{run.folder}/rounds/0001.json"
    before = storage.read(name)
    record = json.loads(before)
    assert (record["round"], record["key"], record["parent"], record["steps"]) == (1, spec.key, None, 8)
    assert (record["num_pairs"], record["num_seen"], record["seconds"]) == (9, 8, 0.5)
    assert Snapshot(**record["snapshot"]) == spec.snapshot
    finish(run, newest(storage))
    assert storage.read(name) == before
    redone = finish(open_run(storage, learning_rate=1e-3), newest(storage))
    assert json.loads(storage.read(name))["key"] == redone.key != spec.key


@pytest.mark.parametrize("keep", [1, 2])
def test_checkpoints_of_old_rounds_go_and_their_records_stay(storage: Storage, keep: int) -> None:
    run = open_run(storage, keep_rounds=keep)
    specs = []
    for number in range(4):
        add_rows(storage, 20 + number)
        forget_old_rounds(run)
        specs.append(finish(run, newest(storage)))
        assert next_round(run, newest(storage)).number == number + 1
    forget_old_rounds(run)
    left = [bool(list_checkpoints(storage, spec.checkpoints)) for spec in specs]
    assert left == [False] * (4 - keep) + [True] * keep
    assert [each["round"] for each in rounds_of(storage, run.folder)] == [1, 2, 3, 4]
    for spec, is_left in zip(specs, left, strict=True):
        names = storage.names(spec.checkpoints)
        assert any(name.endswith(".safetensors") for name in names) == is_left
    add_rows(storage, 30)
    parent = next_round(run, newest(storage)).parent
    assert parent is not None
    assert storage.exists(f"{parent.checkpoint}/manifest.json")


# all of the pipeline

OLD, NEW = 40, 4  # rows: 10 % more


def settings_of(folder: Path, base: Path) -> dict[str, Any]:
    train = {"rounds": "continue", "num_workers": 2, "global_batch_size": 8, "micro_batch_size": 2, "max_steps": 6}
    train |= {"learning_rate": 2e-3, "precision": "fp32", "checkpoint_every": 6, "validate_every": 6}
    return {
        "name": "small",
        "storage": str(folder / "storage"),
        "ingest": {
            "sources": [{"format": "pickapic", "path": str(folder / "data" / "*.parquet")}],
            "validation_ratio": 0.3,
        },
        "encode": {"model": str(base), "resolution": 64, "batch_size": 8},
        "train": train | {"gradient_checkpointing": False, "trackers": []},
        "export": {"parts": "unet"},
    }


STAGES = ("ingest", "encode", "train", "export")


def blank_pages(file: Path) -> None:
    """Let what lies before a parquet file's footer be zeros; size and time of change stay."""
    state, data = file.stat(), bytearray(file.read_bytes())
    footer = int.from_bytes(data[-8:-4], "little") + 8
    data[4:-footer] = bytes(len(data) - 4 - footer)
    file.write_bytes(data)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.fixture(scope="module")
def rounds(ray_cluster: None, tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two rounds; between them the rows of the old source file become unreadable, so that nothing can read them.

    The second round's rate is so low that no float32 weight moves: it ends where it starts.
    """
    folder = tmp_path_factory.mktemp("rounds")
    rows = photo_pairs(OLD, num_prompts=8)
    write_parquet(folder / "data" / "old.parquet", rows, row_group_size=20)
    settings = settings_of(folder, tiny_pipeline)
    said: list[str] = []
    config = parse_config(yaml.safe_dump(settings))
    run_stages(config, STAGES, said.append)
    run = Run.open(config, said.append)
    storage = run.storage
    records = [{stage: run.journal.record(stage) for stage in STAGES}]
    model = folder / "first-model"
    shutil.copytree(storage.path(run.model), model)
    blank_pages(folder / "data" / "old.parquet")
    prompts = {row["caption"] for row in rows}
    new = [row | {"caption": sorted(prompts)[i % len(prompts)]} for i, row in enumerate(photo_pairs(NEW, seed=1))]
    write_parquet(folder / "data" / "new.parquet", new)
    frozen = parse_config(yaml.safe_dump(settings), ["train.learning_rate=1.0e-30", "train.weight_decay=0.0"])
    run_stages(frozen, STAGES, said.append)
    records.append({stage: run.journal.record(stage) for stage in STAGES})
    return {"run": run, "config": frozen, "records": records, "first_model": model, "said": said, "folder": folder}


@pytest.mark.slow
def test_of_ten_per_cent_new_rows_only_they_are_read_and_encoded(rounds: dict[str, Any]) -> None:
    """The old file was zeros by then but for its footer: not a byte of its rows was read again."""
    first, second = (each["encode"].details["speed"]["latents"] for each in rounds["records"])
    assert (first["images"], second["images"]) == (2 * OLD, 2 * NEW)
    rows = rows_in(rounds["run"].storage)
    assert len(rows) == OLD + NEW
    assert {row["status"] for row in rows} == {"kept"}
    text = rounds["records"][1]["encode"].details["speed"]["text"]
    assert text is None, "the prompts are the same"


@pytest.mark.slow
def test_the_second_round_starts_from_the_exported_weights_bit_for_bit(rounds: dict[str, Any]) -> None:
    from diffusers import UNet2DConditionModel

    storage, trained = rounds["run"].storage, rounds["records"][1]["train"]
    exported = UNet2DConditionModel.from_pretrained(rounds["first_model"], subfolder="unet").state_dict()
    at_its_end = read_weights(storage, trained.details["checkpoint"])
    assert exported.keys() == at_its_end.keys()
    assert all(exported[name].numpy().tobytes() == weight.tobytes() for name, weight in at_its_end.items())


@pytest.mark.slow
def test_the_second_round_goes_on_where_the_first_one_ended_and_not_at_the_base(rounds: dict[str, Any]) -> None:
    first, second = (each["train"].details["history"] for each in rounds["records"])
    base, end, start = first["validations"][0], first["validations"][-1], second["validations"][0]
    assert (base["step"], end["step"], start["step"]) == (0, 6, 0)
    assert start["loss"] <= end["loss"] + 0.2 * (base["loss"] - end["loss"])
    assert end["loss"] < base["loss"] - 0.01, "the first round learnt something"
    losses = [
        np.mean([step["loss"] for step in part])
        for part in (first["steps"][:1], first["steps"][-2:], second["steps"][:2])
    ]
    assert abs(losses[2] - losses[1]) < abs(losses[2] - losses[0])
    assert [step["step"] for step in second["steps"]] == list(range(1, 7)), "steps of a round start anew"


@pytest.mark.slow
def test_the_second_round_knows_its_parent_and_again_does_nothing(rounds: dict[str, Any]) -> None:
    run, (first, second) = rounds["run"], rounds["records"]
    assert any(line.startswith("train     round 2 starts from round 1 (") for line in rounds["said"])
    assert second["train"].details["round"] == 2
    assert second["train"].details["parent"]["key"] == first["train"].key
    assert second["train"].details["parent"]["checkpoint"] == first["export"].details["checkpoint"]
    said: list[str] = []
    run_stages(rounds["config"], STAGES, said.append)
    assert [line.split()[1:4] for line in said] == [["up", "to", "date"]] * 4
    assert [each["round"] for each in rounds_of(run.storage, run.folder)] == [1, 2]


@pytest.mark.slow
def test_lineage_answers_for_both_rounds(rounds: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = rounds["run"]
    moved = rounds["folder"] / "moved"
    shutil.copytree(run.storage.path(run.model), moved, dirs_exist_ok=True)
    assert main(["lineage", str(moved), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["round"] for each in told["lineage"]["rounds"]] == [1, 2]
    rows = rows_in(run.storage)
    trainable = [row for row in rows if row["split"] == "train"]
    of_rounds = told["trained_on"]["rounds"]
    assert of_rounds["2"]["pairs"] == len(trainable)
    for number in (1, 2):
        record = json.loads(run.storage.read(f"{run.folder}/rounds/{number:04d}.json"))
        counted = of_rounds[str(number)]
        assert (record["num_pairs"], record["num_seen"]) == (counted["pairs"], counted["trained_on"])
    num_rows = {
        Path(each["uri"]).name: sum(count for part in each["rows"].values() for count in part.values())
        for each in told["sources"]
    }
    assert num_rows == {"new.parquet": NEW, "old.parquet": OLD}
    assert sum(each["trained_on"] for each in told["sources"]) == told["trained_on"]["pairs"]
    new = next(row for row in trainable if row["source_uri"].endswith("new.parquet"))
    assert main(["lineage", str(moved), "--pair", f"{new['source_uri']}#{new['source_row']}", "--json"]) == 0
    (pair,) = json.loads(capsys.readouterr().out)["pairs"]
    assert pair["pair_key"] == new["pair_key"]
    assert [each["in_snapshot"] for each in pair["rounds"]] == [False, True]
    card = Path(run.storage.path(run.model), "README.md").read_text()
    assert "| 2 | round 1, `raw` |" in card
