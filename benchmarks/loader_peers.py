"""The others' hands of `benchmarks.loader`: a sample a pair with its prompt's embeddings, and two worker processes.

Each as its documentation says. None of them checks a sample's bytes unless told so; none is told so here.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.loader_samples import (
    BATCH_SIZE,
    NUM_WORKERS,
    SHARD_BYTES,
    Batches,
    epoch_and_rest,
    sample,
)

SHUFFLE_BUFFER = 100  # samples of webdataset in each worker, as much memory as the others take
SHARDS_SHUFFLED = 100


class _Stateful:
    """A peer whose loader has a state; from S3 it reads through a folder of whole shards."""

    def _loader(self, url: str, cache: Path | None) -> Any:
        raise NotImplementedError

    def batches(self, url: str, cache: Path, state: dict[str, Any]) -> Batches:
        """All batches after a state; from the beginning without one."""
        loader = self._loader(url, cache)
        if state:
            loader.load_state_dict(state)
        for batch in loader:
            yield batch["number"].tolist(), batch["chosen"]

    def _read_on(self, url: str, num_pairs: int) -> tuple[dict[str, Any], int, int]:
        """The state after the last epoch's part, the epochs before it, and the batches of that part."""
        loader, (epoch, rest) = self._loader(url, None), epoch_and_rest(num_pairs)
        for _ in zip(range(rest), loader, strict=False):
            pass
        return loader.state_dict(), epoch, rest


class WebDataset:
    """Tars read from end to end: shards in random order, and a shuffle buffer. Safetensors decode quickest."""

    modules = ("webdataset", "safetensors.torch")
    s3_modules = ("boto3",)

    def write(self, folder: Path, num_pairs: int) -> None:
        """One member a sample."""
        import safetensors.torch
        import webdataset

        with webdataset.ShardWriter(f"{folder}/%05d.tar", maxsize=SHARD_BYTES, verbose=0) as out:
            for number in range(num_pairs):
                tensors = {name: torch.from_numpy(np.array(value)) for name, value in sample(number).items()}
                out.write({"__key__": f"{number:08d}", "safetensors": safetensors.torch.save(tensors)})

    def batches(self, url: str, _: Path, __: dict[str, Any]) -> Batches:
        """There is no handler for S3: users name a command like `aws s3 cp`; here boto3 streams the object."""
        import webdataset

        webdataset.gopen_schemes["s3"] = _stream
        shards = _listed(url) if url.startswith("s3://") else sorted(map(str, Path(url).glob("*.tar")))
        pairs = webdataset.WebDataset(shards, shardshuffle=SHARDS_SHUFFLED, seed=0, empty_check=False)
        pairs = pairs.shuffle(SHUFFLE_BUFFER).map(_decoded).batched(BATCH_SIZE, collation_fn=_collated)
        for batch in webdataset.WebLoader(pairs, batch_size=None, num_workers=NUM_WORKERS):
            yield batch["number"].tolist(), batch["chosen"]

    def save(self, _: str, __: int) -> dict[str, Any]:
        """It has no state."""
        raise NotImplementedError


def _decoded(found: dict[str, Any]) -> dict[str, torch.Tensor]:
    import safetensors.torch

    tensors: dict[str, torch.Tensor] = safetensors.torch.load(found["safetensors"])
    return tensors


def _collated(found: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([each[name] for each in found]) for name in found[0] if not name.startswith("__")}


def _listed(url: str) -> list[str]:
    import boto3

    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    found = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/")["Contents"]
    return [f"s3://{bucket}/{entry['Key']}" for entry in found]


def _stream(url: str, *_: Any, **__: Any) -> Any:
    import boto3

    bucket, _, key = url.removeprefix("s3://").partition("/")
    return boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"]


class Streaming(_Stateful):
    """MosaicML streaming: fixed shapes, its quickest encoding; its own shuffle, py1e."""

    modules = ("benchmarks.torchvision_stub", "streaming")
    s3_modules = ("boto3",)

    def write(self, folder: Path, num_pairs: int) -> None:
        """MDS shards."""

        latents = "ndarray:float16:4,128,128"
        columns = {
            "number": "int", "chosen": latents, "rejected": latents, "time_ids": "ndarray:float32:2,6",
            "prompt_embeds": "ndarray:float16:77,2048", "pooled": "ndarray:float16:1280",
        }  # fmt: skip
        with _streaming().MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES) as out:
            for number in range(num_pairs):
                out.write(sample(number))

    def _loader(self, url: str, cache: Path | None) -> Any:
        place = {"remote": url, "local": str(cache)} if url.startswith("s3://") else {"local": url}
        pairs = _streaming().StreamingDataset(**place, shuffle=True, batch_size=BATCH_SIZE)
        return _streaming().StreamingDataLoader(pairs, batch_size=BATCH_SIZE, num_workers=NUM_WORKERS)

    def save(self, url: str, num_pairs: int) -> dict[str, Any]:
        """The state of the last epoch's part, with the epochs before it written in."""
        state, epoch, rest = self._read_on(url, num_pairs)
        return {**state, "epoch": epoch, "sample_in_epoch": rest * BATCH_SIZE}


def _streaming() -> Any:
    importlib.import_module("benchmarks.torchvision_stub")
    return importlib.import_module("streaming")


class LitData(_Stateful):
    """litdata: tensors in its chunks, its own shuffle."""

    modules = ("litdata",)
    s3_modules = ("boto3", "obstore")

    def write(self, folder: Path, num_pairs: int) -> None:
        """Its `optimize`, in one process."""
        import litdata

        size = f"{SHARD_BYTES >> 20}MB"
        litdata.optimize(_tensors, list(range(num_pairs)), str(folder), chunk_bytes=size, num_workers=1)

    def _loader(self, url: str, cache: Path | None) -> Any:
        import litdata
        from litdata.streaming import downloader

        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"  # the server here has no certificate
        place = {"cache_dir": str(cache)} if url.startswith("s3://") else {}
        pairs = litdata.StreamingDataset(url, shuffle=True, **place)
        return litdata.StreamingDataLoader(pairs, batch_size=BATCH_SIZE, num_workers=NUM_WORKERS)

    def save(self, url: str, num_pairs: int) -> dict[str, Any]:
        """The state of the last epoch's part, with the epochs before it written in."""
        state, epoch, _ = self._read_on(url, num_pairs)
        return {**state, "current_epoch": epoch, "dataset": {**state["dataset"], "current_epoch": epoch}}


def _tensors(number: int) -> dict[str, Any]:
    return {name: value if name == "number" else torch.from_numpy(value) for name, value in sample(number).items()}
