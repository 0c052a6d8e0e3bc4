"""Weights on a cluster: by digest on the storage, brought once to a node, whole or not at all."""

import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from scored_images import formula_files, write_images

from pipelines.config import ScorerEntry
from pipelines.dataset.errors import ModelError
from pipelines.dataset.storage import Storage
from pipelines.scores import cluster_weights
from pipelines.scores.cluster_weights import bring, locate_parts, publish, publish_records
from pipelines.scores.judges import prepare_judges
from pipelines.scores.verified import publish_verification, record_verification, verification_of

PARTS = ("clip-l14-openai", "clip-tokenizer")


def fill_cache(cache: Path, twins: Path, *parts: str) -> None:
    """Put parts into a node's cache as `mapo scorers fetch` leaves them."""
    for part in parts:
        folder = Path(shutil.copytree(twins / part, cache / "scorers" / part))
        files = {
            file.name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "num_bytes": file.stat().st_size}
            for file in sorted(folder.iterdir())
        }
        record = {"part": part, "licence": "MIT", "conversion": "copy", "conversion_version": 1, "sources": []}
        (folder / "fetched.json").write_text(json.dumps({**record, "files": files}))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this node."""
    monkeypatch.setenv("MAPO_CACHE", str(tmp_path / "node"))
    return tmp_path / "node"


@pytest.fixture
def published(storage: Storage, twins: Path, cache: Path) -> Storage:
    """A storage to which another machine has published what CLIPScore needs."""
    fill_cache(cache, twins, *PARTS)
    parts = locate_parts("clipscore", PARTS, storage)
    said: list[str] = []
    assert publish(parts, storage, said.append) == sum(part.num_bytes for part in parts)
    assert publish(parts, storage, said.append) == 0, "nothing twice"
    assert len(said) == 1
    assert "MB of weights" in said[0]
    publish_records(parts, storage)
    shutil.rmtree(cache)
    return storage


def test_what_a_machine_lacks_is_found_on_the_storage(published: Storage, cache: Path, twins: Path) -> None:
    parts = locate_parts("clipscore", PARTS, published)
    assert [part.folder for part in parts] == [None, None]
    folder = bring(parts[0], published, "clipscore")
    assert folder == cache / "scorers" / f"{PARTS[0]}@{parts[0].digest[:16]}"
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "fetched.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == (twins / PARTS[0] / "model.safetensors").read_bytes()
    (judge,) = prepare_judges([ScorerEntry(name="clipscore")], published)
    (here,) = prepare_judges([ScorerEntry(name="clipscore", weights=str(twins))], published)
    assert judge.fingerprint == here.fingerprint


def test_many_actors_of_a_node_bring_a_part_once(
    published: Storage, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (part,) = locate_parts("clipscore", PARTS[:1], published)
    fetch, fetched = cluster_weights.fetch_file, []
    monkeypatch.setattr(
        cluster_weights,
        "fetch_file",
        lambda storage, name, target: fetched.append(name) or fetch(storage, name, target),
    )
    with ThreadPoolExecutor(8) as threads:
        folders = set(threads.map(lambda _: bring(part, published, "clipscore"), range(8)))
    assert len(folders) == 1
    assert sorted(fetched) == sorted(f"cache/{file.sha256}" for file in part.files)


def test_a_node_with_other_weights_of_that_name_does_not_use_them(published: Storage, cache: Path, twins: Path) -> None:
    fill_cache(cache, twins, "clip-b32-openai")
    (cache / "scorers" / "clip-b32-openai").rename(cache / "scorers" / PARTS[0])
    config = cache / "scorers" / PARTS[0] / "config.json"
    config.write_text(config.read_text() + " ")
    (part,) = locate_parts("clipscore", PARTS[:1], published)
    assert bring(part, published, "clipscore").name == f"{PARTS[0]}@{part.digest[:16]}"


def test_damaged_and_missing_blobs_leave_nothing_behind(published: Storage, cache: Path) -> None:
    (part,) = locate_parts("clipscore", PARTS[:1], published)
    weights = next(file for file in part.files if file.name == "model.safetensors")
    data = bytearray(published.read(f"cache/{weights.sha256}"))
    data[-1] ^= 1
    published.write(f"cache/{weights.sha256}", bytes(data))
    with pytest.raises(ModelError, match=r"brought to the node .*, has sha256") as caught:
        bring(part, published, "clipscore")
    assert caught.value.hint
    published.delete(f"cache/{weights.sha256}")
    with pytest.raises(ModelError, match=r"the node .* lacks model.safetensors of clip-l14-openai") as caught:
        bring(part, published, "clipscore")
    assert caught.value.hint == f"mapo scorers fetch clipscore --to {published.url}"
    assert [file.name for file in (cache / "scorers").iterdir() if not file.name.endswith(".lock")] == []
    with pytest.raises(ModelError, match="the weights of the scorer clipscore are missing: clip-l14-openai not found"):
        prepare_judges([ScorerEntry(name="clipscore")], published)


def test_a_verification_holds_for_its_weights_alone(storage: Storage, twins: Path, cache: Path) -> None:
    fill_cache(cache, twins, *PARTS)
    parts = locate_parts("clipscore", PARTS, storage)
    assert verification_of("clipscore", parts, storage) is None
    record_verification("clipscore", parts, "a page", {})
    assert verification_of("clipscore", parts, storage) == "a page"
    (judge,) = prepare_judges([ScorerEntry(name="clipscore")], storage)
    assert judge.verified == "a page"
    other = replace(parts[0], files=(replace(parts[0].files[0], sha256="0" * 64), *parts[0].files[1:]))
    assert verification_of("clipscore", (other, parts[1]), storage) is None
    publish(parts, storage, print)
    publish_records(parts, storage)
    publish_verification("clipscore", storage)
    shutil.rmtree(cache)
    (judge,) = prepare_judges([ScorerEntry(name="clipscore")], storage)
    assert judge.verified == "a page"


TWO_NODES = """
import json, os, sys
import ray
from ray.cluster_utils import Cluster
import pyarrow.parquet as pq
from pipelines.config import ScorerEntry
from pipelines.dataset.storage import Storage
from pipelines.scores import plan
from pipelines.scores.execution import score
from pipelines.scores.judges import prepare_judges
from pipelines.scores.plan import read_scores
from pipelines.units.workers import Workers

plan.IMAGES_A_UNIT = 8
storage, images, caches = Storage(sys.argv[1]), pq.read_table(sys.argv[2]), sys.argv[3:]
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20})
for cache in caches:
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20, env_vars={"MAPO_CACHE": cache})
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
said = []
judges = prepare_judges([ScorerEntry(name="clipscore"), ScorerEntry(name="aesthetic")], storage)
figures = score(storage, judges, images, Workers("evaluate", num_workers=2, device="cpu"), said.append)
values = [read_scores(storage, judge, images)["value"].to_pylist() for judge in judges]
print(json.dumps([figures.num_scored, said, values]), flush=True)
os._exit(0)
"""


def test_nodes_without_a_shared_folder_get_the_drivers_weights_from_s3(
    s3_storage: Storage, twins: Path, cache: Path, tmp_path: Path
) -> None:
    fill_cache(cache, twins, *PARTS, "aesthetic-sac-logos-ava1")
    images = write_images(s3_storage, "a", formula_files(32, side=32), [f"a cat {n}" for n in range(32)])
    parts = locate_parts("clipscore", (*PARTS, "aesthetic-sac-logos-ava1"), s3_storage)
    publish(parts, s3_storage, print)
    publish_records(parts, s3_storage)
    shutil.rmtree(cache)
    nodes = [tmp_path / "first", tmp_path / "second"]
    pq.write_table(images, tmp_path / "images.parquet")
    done = subprocess.run(
        [sys.executable, "-c", TWO_NODES, s3_storage.url, tmp_path / "images.parquet", *nodes],
        capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    num_scored, said, values = json.loads(done.stdout.splitlines()[-1])
    assert num_scored == {"clipscore": 32, "aesthetic": 32}
    assert said == [], "all of it was there"
    assert len(set(values[1])) > 20
    brought = [sorted(file.name for file in (node / "scorers").iterdir() if file.is_dir()) for node in nodes]
    assert brought[0] == brought[1] == sorted(f"{part.name}@{part.digest[:16]}" for part in parts)
    assert not cache.exists()
