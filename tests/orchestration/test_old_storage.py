"""A storage of the version before the rooms is up to date, and its training goes on to the bits it would have had.

`tests/data/old_storage.tar.xz` holds what that version wrote, and two configurations: run `finished`, all six stages,
and run `unfinished`, a training that was stopped after a part of its steps. `old_storage.json` says what the same
training gave there without a stop. Both were made by `make_old_storage.py`; a later version's are no old storage.

The storage lies in a bucket, because a unit of a source is named by its file's URI, size and change mark: the bucket
has one name on every machine, and the mark of an object is the MD5 of its bytes, while a folder has a path and times of
its own. The base model lies in the same bucket, because the configuration names it. What was made with it is up to date
by the bytes of its files; no library's version counts.

Nothing of the product is imported here, so that no move of a module changes this file.
"""

import hashlib
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from command import Command
from s3fs import S3FileSystem

DATA = Path(__file__).parents[1] / "data"
ARCHIVE, EXPECTED = DATA / "old_storage.tar.xz", DATA / "old_storage.json"
BUCKET = "mapo-old-storage"  # in the archive's URIs and keys
STAGES = ("ingest", "encode", "train", "export", "evaluate", "report")


class Bucket:
    """The bucket with photos, base model and storage, on the S3 server that the environment names."""

    def __init__(self) -> None:
        self.fs = S3FileSystem(use_listings_cache=False)

    def fill(self, folder: Path) -> None:
        """Hold the files below a folder, and nothing else."""
        if self.fs.exists(BUCKET):
            self.fs.rm(BUCKET, recursive=True)
        self.fs.mkdir(BUCKET)
        files = (file for file in sorted(folder.rglob("*")) if file.is_file())
        self.fs.pipe({f"{BUCKET}/{file.relative_to(folder).as_posix()}": file.read_bytes() for file in files})

    def objects(self) -> dict[str, tuple[str, str]]:
        """Every object, with the digest of its bytes and when they were put there."""
        found = self.fs.find(BUCKET, detail=True)
        return {name: (info["ETag"], str(info["LastModified"])) for name, info in found.items()}

    def read(self, name: str) -> Any:
        """A JSON object of the storage."""
        return json.loads(self.fs.cat_file(f"{BUCKET}/storage/{name}"))

    def checkpoints(self, run: str) -> list[str]:
        """The committed checkpoints of all trainings of a run, relative to the storage."""
        found = self.fs.glob(f"{BUCKET}/storage/runs/{run}/checkpoints/*/step-*/manifest.json")
        return sorted(name.removeprefix(f"{BUCKET}/storage/").removesuffix("/manifest.json") for name in found)

    def digests(self, checkpoint: str) -> dict[str, str]:
        """The sha256 of all weights of a checkpoint, of their average and of each moment, whichever rank has what."""
        parts: dict[str, list[tuple[str, int, bytes]]] = {}
        for index in self.fs.glob(f"{BUCKET}/storage/{checkpoint}/rank-*.json"):
            arrays = safetensors.numpy.load(self.fs.cat_file(index.replace(".json", ".safetensors")))
            for entry in json.loads(self.fs.cat_file(index))["entries"]:
                array = arrays.pop(f"{entry['kind']}/{entry['name']}")
                parts.setdefault(entry["kind"], []).append((entry["name"], entry["start"], array.tobytes()))
            assert not arrays
        return {
            kind: hashlib.sha256(b"".join(part for _, _, part in sorted(found))).hexdigest()
            for kind, found in sorted(parts.items())
        }


def losses(history: dict[str, Any]) -> list[float]:
    """The loss of every step in the history of a training."""
    return [step["loss"] for step in history["steps"]]


def arithmetic(model: Path) -> str:
    """A digest of gradients of the base's UNet: another processor or torch may round otherwise, and then trains to
    other bits."""
    import torch
    from diffusers import UNet2DConditionModel

    generator, num_threads = torch.Generator().manual_seed(0), torch.get_num_threads()
    noise, text = (torch.randn(shape, generator=generator) for shape in ((2, 4, 16, 16), (2, 77, 40)))
    pooled, time_ids = torch.randn((2, 24), generator=generator), torch.full((2, 6), 64.0)
    torch.set_num_threads(1)  # as in Ray's workers
    try:
        unet = UNet2DConditionModel.from_pretrained(model / "unet")
        added = {"text_embeds": pooled, "time_ids": time_ids}
        out = unet(noise, torch.tensor([10, 900]), text, added_cond_kwargs=added).sample
        (out - noise).square().mean().backward()
    finally:
        torch.set_num_threads(num_threads)
    gradients = (weight.grad for _, weight in sorted(unet.named_parameters()))
    return hashlib.sha256(b"".join(each.numpy().tobytes() for each in gradients)).hexdigest()


@pytest.fixture
def kept(s3_storage: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Bucket, Path]:
    """The bucket as the version before left it, on the server of `s3_storage`; and a folder with the configurations."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    bucket = Bucket()
    bucket.fill(tmp_path / "bucket")
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "cache"))
    return bucket, tmp_path


def test_a_finished_run_of_the_version_before_is_up_to_date_and_no_object_changes(kept: tuple[Bucket, Path]) -> None:
    bucket, folder = kept
    before = bucket.objects()
    with Command("run", folder / "finished.yaml") as run:
        assert run.wait() == 0, run.errors
    for stage in STAGES:
        assert re.search(rf"^{stage} +up to date", run.output, re.MULTILINE), run.output
    assert bucket.objects() == before


def test_the_tables_of_the_version_before_hold_all_and_its_training_waits_at_its_checkpoint(
    kept: tuple[Bucket, Path],
) -> None:
    """Run `unfinished` has no record of what was checked once: units, rows, latents and texts are looked up anew."""
    bucket, folder = kept
    before, (newest,) = bucket.objects(), bucket.checkpoints("unfinished")
    with Command("run", folder / "unfinished.yaml", "--dry-run", "--json") as run:
        assert run.wait() == 0, run.errors
    plans = {plan["stage"]: plan for plan in json.loads(run.output)["stages"]}
    assert [plans[stage]["state"] for stage in STAGES[:3]] == ["up to date", "up to date", "to do"]
    work, done = plans["train"]["work"], len(losses(bucket.read(f"{newest}/state.json")["history"]))
    assert done > 0
    assert work["steps"] == work["of_steps"] - done
    assert bucket.objects() == before


def test_a_training_of_the_version_before_goes_on_to_the_bits_that_it_would_have_had(
    kept: tuple[Bucket, Path],
) -> None:
    """On a processor or a torch with another arithmetic: with the same pairs to nearly the same losses."""
    bucket, folder = kept
    expected = json.loads(EXPECTED.read_text())
    (newest,) = bucket.checkpoints("unfinished")
    losses_before = losses(bucket.read(f"{newest}/state.json")["history"])
    assert 0 < len(losses_before) < len(expected["losses"])
    with Command("train", folder / "unfinished.yaml") as train:
        assert train.wait() == 0, train.errors
    trained = bucket.read("runs/unfinished/stages/train.json")["details"]
    (last,) = bucket.checkpoints("unfinished")
    assert trained["checkpoint"] == last
    assert last.rpartition("/")[0] == newest.rpartition("/")[0], "it is the same training by its key"
    assert trained["starts"] > expected["starts"], "it went on"
    assert trained["digest"] == expected["pairs"], "every step had its pairs"
    found = losses(trained["history"])
    assert found[: len(losses_before)] == losses_before == expected["losses"][: len(losses_before)]
    if arithmetic(folder / "bucket" / "base") == expected["arithmetic"]:
        assert found == expected["losses"]
        assert bucket.digests(last) == expected["digests"]
    else:
        assert found == pytest.approx(expected["losses"], abs=1e-4)
