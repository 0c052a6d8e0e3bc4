"""Clusters that have one GPU, or none where one is asked for: runs end, and say what they wait for."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from command import Command
from factories import photo_pairs, write_parquet
from small_cluster import small_cluster

from pipelines.dataset.layout import SAMPLES, fingerprints, samples_table
from pipelines.dataset.storage import Storage


@pytest.fixture(scope="module")
def one_gpu() -> Iterator[str]:
    """The address of a Ray that has a GPU by name: what runs on it computes on the CPU."""
    with small_cluster(num_cpus=4, num_gpus=1) as address:
        yield address


@pytest.fixture(scope="module")
def folder(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one-gpu")
    write_parquet(folder / "data" / "pairs.parquet", photo_pairs(16, num_prompts=4))
    train = {"num_workers": 1, "device": "cpu", "global_batch_size": 2, "micro_batch_size": 2, "max_steps": 1}
    settings = {
        "name": "small",
        "storage": str(folder / "storage"),
        "ingest": {"sources": [{"format": "pickapic", "path": str(folder / "data" / "*.parquet")}]},
        "encode": {"model": str(tiny_pipeline), "resolution": 64},
        "train": train | {"precision": "fp32", "learning_rate": 1e-4},
        "evaluate": {"num_samples": 3, "num_inference_steps": 1, "batch_size": 2},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="module")
def finished(one_gpu: str, folder: Path) -> Command:
    """A whole run of two models."""
    with Command("run", folder / "small.yaml", environment={"RAY_ADDRESS": one_gpu}) as run:
        assert run.wait() == 0, run.errors
    return run


def test_a_run_of_two_models_ends_on_one_gpu(finished: Command, folder: Path) -> None:
    run = finished
    assert sorted(num_samples(folder).values()) == [3, 3]
    assert "encode    starts alongside ingest" not in run.output
    assert not re.search("no node has|waiting for", run.errors)


def num_samples(folder: Path) -> dict[str, int]:
    """Rows of the table of samples of each model with each setting."""
    storage = Storage(str(folder / "storage"))
    return {each: samples_table(storage, each).count_rows() for each in fingerprints(storage, SAMPLES)}


@pytest.mark.slow
@pytest.mark.usefixtures("finished")
def test_a_gpu_that_something_else_holds_is_waited_for_and_that_is_said(one_gpu: str, folder: Path) -> None:
    code = """
import ray, sys
ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
class Holder:
    def hold(self): return True
holder = ray.remote(num_gpus=1)(Holder).remote()
print(ray.get(holder.hold.remote()), flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, one_gpu]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdin
    assert holder.stdout
    try:
        assert holder.stdout.readline() == "True\n"
        more = ["-o", "evaluate.num_samples=4", "-o", "evaluate.guidance_scale=1.5"]
        with Command("evaluate", folder / "small.yaml", *more, environment={"RAY_ADDRESS": one_gpu}) as run:
            assert run.process.stderr
            said = next(line for line in run.process.stderr if "waiting" in line)
            assert said == "evaluate: waiting for a free GPU (0:08)\n"
            holder.stdin.close()
            assert run.wait() == 0, run.errors
        assert sorted(num_samples(folder).values()) == [3, 3, 4, 4]
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()


@pytest.mark.usefixtures("finished")
def test_training_on_more_gpus_than_there_are_is_an_error_with_both_numbers(one_gpu: str, folder: Path) -> None:
    options = ["-o", "train.device=gpu", "-o", "train.num_workers=2", "-o", "train.global_batch_size=4"]
    options += ["-o", "train.start_timeout_s=2"]
    with Command("train", folder / "small.yaml", *options, environment={"RAY_ADDRESS": one_gpu}) as run:
        assert run.wait() == 1
    assert "train: the cluster has 1 GPU, but training needs 2; waiting for 1 more (0:00 of 0:02)" in run.errors
    assert "ClusterError: train: the cluster has 1 GPU, but training needs 2, and " in run.errors
    assert "hint: add GPU nodes, lower `train.num_workers`" in run.errors


def test_without_a_gpu_it_is_said_soon_and_is_an_error_after_its_time(tiny_pipeline: Path, folder: Path) -> None:
    options = ["-o", "encode.device=gpu", "-o", "encode.start_timeout_s=5", "-o", f"storage={folder / 'other'}"]
    with Command("run", folder / "small.yaml", *options) as run:
        started = time.monotonic()
        assert run.wait() == 1
    assert time.monotonic() - started < 120
    assert "encode    starts alongside ingest once a node has a GPU" in run.output
    lines = [line for line in run.errors.splitlines() if "waiting for" in line]
    assert lines == ["encode text: no node has a GPU yet; waiting for one (0:00 of 0:05)"]
    assert "ClusterError: encode text: no node has a GPU, and the cluster has no autoscaler that could" in run.errors
    journal = sorted((folder / "other" / "runs" / "small" / "journal").glob("*-failed.json"))
    assert json.loads(journal[-1].read_text())["error"] == "ClusterError"
