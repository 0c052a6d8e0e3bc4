"""Checkpoints: whole or not there, whoever writes and whoever reads."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.dataset.errors import ShardCorrupt, TrainingError
from pipelines.dataset.storage import Storage
from training.state.checkpoint import Checkpointer, remove_old, write_rank
from training.state.checkpoint_format import Manifest, Reader, best_of, list_checkpoints, read_parameters
from training.state.zero import Fragment

FOLDER = "checkpoints"
SHAPES = {"first": (3, 5), "second": (7,), "third": (2, 2, 4)}
WHOLE = {name: torch.arange(float(np.prod(shape))) + 100 * i for i, (name, shape) in enumerate(SHAPES.items())}


def parts_of(rank: int, world_size: int, kind: str = "weight") -> dict:
    """What a rank owns: an even share of all elements in a row, as ZeRO-1 and 2 cut them."""
    total = sum(len(values) for values in WHOLE.values())
    low, high = total * rank // world_size, total * (rank + 1) // world_size
    parts, position = {}, 0
    for name, values in WHOLE.items():
        start, end = max(low - position, 0), min(high - position, len(values))
        if start < end:
            parts[kind, Fragment(name, start, end - start, SHAPES[name])] = values[start:end]
        position += len(values)
    return parts


def write(storage: Storage, step: int, *, world_size: int = 2, attempt: str = "0123abcd", **more) -> None:
    """A checkpoint, as all ranks write it side by side."""
    options = {"keep": 2, "keep_best": True, "timeout_s": 10} | more.pop("options", {})
    ranks = [
        Checkpointer(storage, FOLDER, rank=r, world_size=world_size, zero_stage=2, attempt=attempt, **options)
        for r in range(world_size)
    ]
    for rank, checkpointer in enumerate(ranks):
        state = {"step": step, "validation_loss": None, **more}
        checkpointer.save(step, parts_of(rank, world_size), account={"rank": rank}, state=state)
    for checkpointer in ranks:
        checkpointer.wait()


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@settings(max_examples=40, deadline=None)
@given(world_size=st.integers(1, 6), wanted=st.data())
def test_any_part_can_be_read_whoever_wrote_it(world_size: int, wanted, tmp_path_factory) -> None:
    storage = Storage(str(tmp_path_factory.mktemp("any")))
    write(storage, 5, world_size=world_size)
    reader = Reader(storage, list_checkpoints(storage, FOLDER)[-1])
    for name, values in WHOLE.items():
        start = wanted.draw(st.integers(0, len(values) - 1))
        numel = wanted.draw(st.integers(1, len(values) - start))
        (part,) = reader.read([("weight", name, start, numel)])
        assert part.tolist() == values[start : start + numel].tolist()
    for name, whole in read_parameters(reader, "weight"):
        assert whole.shape == SHAPES[name]
        assert whole.ravel().tolist() == WHOLE[name].tolist()


def test_the_tensors_are_plain_safetensors(storage) -> None:
    from safetensors.numpy import load_file

    write(storage, 5, world_size=1)
    tensors = load_file(storage.path(f"{list_checkpoints(storage, FOLDER)[0].folder}/rank-00000.safetensors"))
    assert {name: values.tolist() for name, values in tensors.items()} == {
        f"weight/{name}": values.tolist() for name, values in WHOLE.items()
    }


def test_without_the_last_file_there_is_no_checkpoint(storage) -> None:
    write(storage, 5)
    write(storage, 6)
    newest = list_checkpoints(storage, FOLDER)[-1]
    storage.delete(f"{newest.folder}/manifest.json")
    assert [each.step for each in list_checkpoints(storage, FOLDER)] == [5]


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "rank-00001.safetensors", "rank-00001.json", "state.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_every_kind_of_damage_to_every_file_is_found(file: str, damage: str, storage) -> None:
    write(storage, 5)
    (manifest,) = list_checkpoints(storage, FOLDER)
    path = Path(storage.path(f"{manifest.folder}/{file}"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flipped" else data[:-1])
    with pytest.raises(ShardCorrupt, match=r"checkpoint|differ"):
        dict(read_parameters(Reader(storage, manifest), "weight"))


def test_a_damaged_manifest_is_no_manifest(storage) -> None:
    write(storage, 5)
    (manifest,) = list_checkpoints(storage, FOLDER)
    path = Path(storage.path(f"{manifest.folder}/manifest.json"))
    path.write_text(path.read_text().replace('"step": 5', '"step": 7'))
    assert list_checkpoints(storage, FOLDER) == []
    with pytest.raises(ShardCorrupt, match="does not match its digest"):
        Manifest.parse(manifest.folder, path.read_bytes())


def test_the_newest_and_the_best_are_kept_and_torn_ones_of_other_starts_removed(storage) -> None:
    write_rank(storage, f"{FOLDER}/step-00000002-deadbeef", 0, parts_of(0, 2), account={})
    write_rank(storage, f"{FOLDER}/step-00000099-0123abcd", 0, parts_of(0, 2), account={})  # being written now
    for step, loss in ((1, 0.5), (2, 0.1), (3, 0.3), (4, 0.4), (5, 0.2)):
        write(storage, step, validation_loss=loss)
    found = list_checkpoints(storage, FOLDER)
    assert [each.step for each in found] == [2, 4, 5]
    assert best_of(found) == found[0]
    left = {name.split("/")[1] for name in storage.names(FOLDER)}
    assert left == {each.name for each in found} | {"step-00000099-0123abcd"}
    remove_old(storage, FOLDER, keep=1, keep_best=False, attempt="0123abcd")
    assert [each.step for each in list_checkpoints(storage, FOLDER)] == [5]


def test_two_starts_of_one_step_never_mix_their_files(storage) -> None:
    """A killed start wrote rank 1's part; the next start's rank 0 must not take it for its own."""
    write_rank(storage, f"{FOLDER}/step-00000005-deadbeef", 1, parts_of(1, 2), account={})
    alone = Checkpointer(
        storage, FOLDER, rank=0, world_size=2, zero_stage=2, attempt="0123abcd", keep=1, keep_best=False, timeout_s=0.3
    )
    alone.save(5, parts_of(0, 2), account={}, state={"step": 5})
    with pytest.raises(TrainingError, match="1 of 2 ranks did not write their part") as caught:
        alone.wait()
    assert "hint:" in str(caught.value)
    assert list_checkpoints(storage, FOLDER) == []


def test_a_save_copies_what_it_is_given(storage) -> None:
    """Training goes on while it is written."""
    values = torch.zeros(1000)
    saver = Checkpointer(
        storage, FOLDER, rank=0, world_size=1, zero_stage=2, attempt="0123abcd", keep=1, keep_best=False, timeout_s=5
    )
    saver.save(1, {("weight", Fragment("a", 0, 1000, (1000,))): values}, account={}, state={"step": 1})
    values.fill_(7)
    saver.wait()
    ((_, written),) = read_parameters(Reader(storage, list_checkpoints(storage, FOLDER)[0]), "weight")
    assert not written.any()


@pytest.mark.parametrize("seed", range(12))
def test_killed_after_any_write_the_newest_whole_one_is_left(seed: int, storage, monkeypatch) -> None:
    """Stop the commit of a second checkpoint after a seeded number of writes and deletions."""
    write(storage, 5)
    left = [random.Random(seed).randrange(8)]

    def counted(method):
        def stop_after(self, *arguments):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            return method(self, *arguments)

        return stop_after

    for name in ("upload", "write", "delete"):
        monkeypatch.setattr(Storage, name, counted(getattr(Storage, name)))
    with pytest.raises(TrainingError):
        write(storage, 6, options={"keep": 1, "keep_best": False, "timeout_s": 0.3})
    monkeypatch.undo()
    newest = list_checkpoints(storage, FOLDER)[-1]
    assert newest.step in (5, 6)
    values = dict(read_parameters(Reader(storage, newest), "weight"))
    assert values["second"].tolist() == WHOLE["second"].tolist()


def test_over_s3_it_is_the_same(s3_storage) -> None:
    write(s3_storage, 5)
    write(s3_storage, 6, world_size=3)
    found = list_checkpoints(s3_storage, FOLDER)
    assert [(each.step, each.world_size) for each in found] == [(5, 2), (6, 3)]
    reader = Reader(s3_storage, found[-1])
    assert {name: w.ravel().tolist() for name, w in read_parameters(reader, "weight")} == {
        name: values.tolist() for name, values in WHOLE.items()
    }
    assert json.loads(s3_storage.read(f"{found[-1].folder}/state.json"))["step"] == 6
