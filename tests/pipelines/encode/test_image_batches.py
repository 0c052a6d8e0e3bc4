"""A unit's images on their way to the encoder: planned once, read together, batched, halved when memory runs out."""

import io
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encode_steps import Counting, ingest_here, place_pair, write_latents
from factories import encoded, photo_pairs, picture, write_parquet
from PIL import Image

from pipelines.config import EncodeConfig
from pipelines.dataset.errors import EncodingError, ShardCorrupt
from pipelines.dataset.layout import pairs_table
from pipelines.dataset.pair import Reason
from pipelines.dataset.storage import Storage
from pipelines.encode.encoders import LatentEncoder, Launched
from pipelines.encode.geometry import bucket_list
from pipelines.encode.image_batches import Batches, ImageKey, load, plan_pairs
from pipelines.encode.latents import LatentWriter
from pipelines.encode.plan import pending
from pipelines.units.actor import BatchSize
from pipelines.units.prefetch import prefetch
from pipelines.units.stats import Effort

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_pipeline: Path) -> EncodeConfig:
    return EncodeConfig(model=str(tiny_pipeline), resolution=64, batch_size=8)


class Small:
    """A device with room for so many images; more raise what torch raises."""

    def __init__(self, encoder: LatentEncoder, room: int) -> None:
        self.encoder, self.room, self.batches = encoder, room, []

    def launch(self, images: Any) -> Launched:
        self.batches.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.encoder.launch(images)


def unit_of(storage: Storage, config: EncodeConfig, file: Path, rows: list[dict[str, Any]]) -> Any:
    ingest_here(storage, write_parquet(file, rows))
    (unit,) = pending(config, storage).latents
    return unit


def test_a_pass_without_memory_is_halved_until_it_fits_and_stays_so(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: LatentEncoder
) -> None:
    unit = unit_of(storage, config, tmp_path / "in.parquet", photo_pairs(10, sizes=((64, 64),)))
    whole = write_latents(unit.id, unit.rows, config, storage, "a" * 32, vae)
    small = Small(vae, room=3)
    writer = LatentWriter(config, storage, "b" * 32, small)
    rows, effort = writer.write(unit.id, unit.rows)
    assert small.batches == [8, 4, *[2] * 10]  # no image twice, none left out
    assert effort.batch_size == 2
    assert effort.num_images == 20
    assert rows["pair_key"].to_pylist() == whole["pair_key"].to_pylist()
    assert rows["status"].to_pylist() == ["kept"] * 10
    small.batches.clear()
    writer.write(unit.id, unit.rows)
    assert small.batches == [2] * 10, "the next unit does not try what did not fit"


def test_one_image_that_does_not_fit_is_an_error_with_a_way_out(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: LatentEncoder
) -> None:
    unit = unit_of(storage, config, tmp_path / "in.parquet", photo_pairs(2, sizes=((64, 64),)))
    with pytest.raises(EncodingError, match="not enough memory to encode even one image of 64 x 64 pixels") as caught:
        write_latents(unit.id, unit.rows, config, storage, "a" * 32, Small(vae, room=0))
    assert "encode.resolution" in str(caught.value.hint)


def test_a_bug_is_not_taken_for_a_lack_of_memory(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: LatentEncoder
) -> None:
    class Broken:
        def launch(self, images: Any) -> Launched:
            raise RuntimeError("expected scalar type Float but found Half")

    unit = unit_of(storage, config, tmp_path / "in.parquet", photo_pairs(1))
    with pytest.raises(RuntimeError, match="scalar type"):
        write_latents(unit.id, unit.rows, config, storage, "a" * 32, Broken())


def test_a_machine_that_runs_out_of_memory_goes_on_with_less(tiny_pipeline: Path) -> None:
    """Real: the process may take 128 MB more than it has, and a pass of all images needs several times that."""
    code = f"""
import resource
from pathlib import Path
import numpy as np
import torch
from pipelines.dataset.model_files import ModelSource
from pipelines.units.stats import Effort
from pipelines.encode.encoders import LatentEncoder
from pipelines.encode.geometry import Placed
from pipelines.encode.image_batches import Batches, ImageKey
from pipelines.units.actor import BatchSize

torch.set_num_threads(1)
vae = LatentEncoder(ModelSource({str(tiny_pipeline)!r}), device=torch.device("cpu"))
vae(np.zeros((1, 256, 256, 3), np.uint8))
size = BatchSize(32)
batches = Batches(vae, size, torch.float16, Effort())
images = [Placed(np.zeros((256, 256, 3), np.uint8), (0,) * 6) for _ in range(32)]
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
now = int(status["VmSize"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 27), -1))
for number, image in enumerate(images):
    batches.add(ImageKey(str(number), (256, 256)), image)
print(len(batches.finish()), size.size)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    count, size = map(int, done.stdout.split()[-2:])
    assert count == 32
    assert 1 <= size < 32


def test_both_images_of_a_pair_come_in_one_request_and_each_once(
    tmp_path: Path, storage: Storage, config: EncodeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    images = [encoded(picture(rng, 64, 64)) for _ in range(4)]
    row = photo_pairs(1)[0]
    rows = [{**row, "jpg_0": images[a], "jpg_1": images[b]} for a, b in ((0, 1), (1, 2), (2, 0), (2, 3))]
    unit = unit_of(storage, config, tmp_path / "in.parquet", rows)
    buckets = bucket_list(64, True)
    planned = plan_pairs(unit.rows.to_pylist(), buckets)
    assert [len(pair.new_sides) for pair in planned] == [2, 1, 0, 1]
    requests: list[int] = []
    read_range = Storage.read_range

    def counted(self: Storage, name: str, offset: int, length: int, sha256: str | None = None) -> bytes:
        requests.append(length)
        return read_range(self, name, offset, length, sha256)

    monkeypatch.setattr(Storage, "read_range", counted)
    loaded = [load(pair, storage, Effort()) for pair in planned]
    assert len(requests) == 3
    assert [len(images) for images in loaded] == [2, 1, 0, 1]
    for pair, found in zip(planned, loaded, strict=True):
        places = [(pair.row["shard"], pair.row[f"offset_{side}"], pair.row[f"length_{side}"]) for side in (0, 1)]
        files = [read_range(storage, *place) for place in places]
        bucket, *placed = place_pair(files[0], files[1], buckets)
        assert pair.bucket == bucket
        for key, image in found:
            side = pair.keys.index(key)
            assert image.time_ids == placed[side].time_ids
            assert np.array_equal(image.pixels, placed[side].pixels)


def test_a_damaged_image_is_an_error_that_names_its_shard(
    tmp_path: Path, storage: Storage, config: EncodeConfig
) -> None:
    unit = unit_of(storage, config, tmp_path / "in.parquet", photo_pairs(1))
    (pair,) = plan_pairs(unit.rows.to_pylist(), bucket_list(64, True))
    data = bytearray(storage.read(pair.row["shard"]))
    data[pair.row["offset_1"] + 50] ^= 1
    storage.write(pair.row["shard"], bytes(data))
    with pytest.raises(ShardCorrupt, match=pair.row["shard"]):
        load(pair, storage, Effort())


def test_an_image_on_its_side_gets_the_bucket_that_it_is_seen_in(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: LatentEncoder
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    rng, row = np.random.default_rng(0), photo_pairs(1)[0]
    for side in ("jpg_0", "jpg_1"):
        picture(rng, 48, 96).save(out := io.BytesIO(), "JPEG", exif=exif)
        row[side] = out.getvalue()
    unit = unit_of(storage, config, tmp_path / "in.parquet", [row])
    rows = write_latents(unit.id, unit.rows, config, storage, "a" * 32, Counting(vae))
    assert rows["bucket_height"][0].as_py() > rows["bucket_width"][0].as_py()
    assert pairs_table(storage).read()["width_0"].to_pylist() == [96]


def test_an_image_that_cannot_be_decoded_takes_its_pairs_and_no_others(
    vae: LatentEncoder,
) -> None:
    batches = Batches(vae, BatchSize(2), torch.float32, Effort())
    batches.add(ImageKey("bad", (64, 64)), Reason.TRUNCATED_IMAGE)
    assert batches.finish() == {ImageKey("bad", (64, 64)): Reason.TRUNCATED_IMAGE}


def test_units_overlap_in_an_actor_and_only_one_is_encoded_at_a_time(
    tmp_path: Path, storage: Storage, config: EncodeConfig, vae: LatentEncoder
) -> None:
    """While one unit is encoded, the next has been read: its images are there before the device is free."""
    rows = photo_pairs(6, sizes=((64, 64),))
    for number in range(3):
        ingest_here(storage, write_parquet(tmp_path / f"{number}.parquet", rows[2 * number : 2 * number + 2]))
    units = pending(config, storage).latents
    inside, most, order = 0, 0, []
    lock, first_may_go, read = threading.Lock(), threading.Event(), []

    class Watched:
        def launch(self, images: Any) -> Launched:
            nonlocal inside, most
            with lock:
                inside += 1
                most = max(most, inside)
            first_may_go.wait(30)
            order.append(len(images))
            launched = vae.launch(images)
            with lock:
                inside -= 1
            return launched

    writer = LatentWriter(config, storage, "a" * 32, Watched())
    read_range = storage.read_range
    storage.read_range = lambda *place: read.append(place[0]) or read_range(*place)  # type: ignore[method-assign]
    threads = [threading.Thread(target=writer.write, args=(unit.id, unit.rows)) for unit in units]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while len(set(read)) < 3 and time.monotonic() < deadline:
        threading.Event().wait(0.005)
    assert len(set(read)) == 3, "all three units are read while the first is still being encoded"
    assert not order
    first_may_go.set()
    for thread in threads:
        thread.join()
    assert most == 1
    assert order == [4, 4, 4]


def test_ahead_is_in_order_bounded_and_begins_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    begun, lock = [], threading.Lock()

    def note(item: int) -> int:
        with lock:
            begun.append(item)
        return item

    with ThreadPoolExecutor(4) as pool:
        ahead = prefetch(note, range(100), pool, 5)
        results = iter(ahead)
        assert next(results) == 0
        assert max(begun) <= 6
        assert list(results) == list(range(1, 100))
        broken = prefetch(lambda item: 1 // item, [1, 0, 1], pool, 2)
        with pytest.raises(ZeroDivisionError):
            list(broken)
        broken.close()


def test_effort_adds_up_and_travels() -> None:
    one, two = Effort(num_images=3, num_slots=4, batch_size=8, device="cpu", idle_s=1.0), Effort(batch_size=4)
    one.add_seconds("encode", 3.0)
    two.add_seconds("encode", 1.0)
    two.add_seconds("fetch", 0.5)
    two.idle_s, two.device = 1.0, "gpu"
    total = Effort()
    for each in (one, two):
        total.add(Effort.from_json(each.to_json()))
    assert (total.num_images, total.num_slots, total.batch_size, total.device) == (3, 4, 4, "gpu")
    assert dict(total.seconds) == {"encode": 4.0, "fetch": 0.5}
    assert total.busy_ratio == pytest.approx(4 / 6)
    assert Effort().busy_ratio == 0.0
