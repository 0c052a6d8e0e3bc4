"""Encode beside ingest on a cluster of two kinds of nodes: `PYTHONPATH=tests/support python -m benchmarks.overlap`.

A Ray cluster on this machine: a head without CPUs, a node for ingest, a node for encode, one CPU each. Sources name
images behind http addresses, and a server on loopback takes its time for each, as real ones do. The same pairs go

- through `mapo ingest`, then `mapo encode`, one after the other;
- through both stages of one run, encode beside ingest,

alternately, `--rounds` times. Seconds are those of the journal: both stages as a user waits for them, without the
driver's start. Tables and shards of both ways are compared. The default takes six minutes; there, ingest waits for its
server about as long as an encoder works. Writes results/overlap.json.
"""

import argparse
import hashlib
import io
import json
import logging
import os
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch

from PIL import Image

from benchmarks.encode import write_model
from benchmarks.ingest import base_images, unique
from orchestration.config import RunConfig
from orchestration.driver.runner import run_stages
from orchestration.run.context import Run
from pipelines.dataset.layout import latents_table, pairs_table
from pipelines.dataset.storage import Storage
from pipelines.encode.fingerprint import latents_fingerprint

RESULTS = Path(__file__).parent / "results" / "overlap.json"
SIDE, UNITS = 256, 16
GOAL = 0.75


class SlowImages(ThreadingHTTPServer):
    """Serves /<number>.jpg, each a file of its own, after `delay_s`."""

    daemon_threads = True

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s
        self.images = [_smaller(image) for image in base_images()]
        super().__init__(("127.0.0.1", 0), _Handler)

    def __enter__(self) -> "SlowImages":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self


class _Handler(BaseHTTPRequestHandler):
    server: SlowImages

    def do_GET(self) -> None:
        number = int(self.path.strip("/").partition(".")[0])
        image = unique(self.server.images[number % len(self.server.images)], number)
        time.sleep(self.server.delay_s)
        self.send_response(200)
        self.send_header("Content-Length", str(len(image)))
        self.end_headers()
        self.wfile.write(image)

    def log_message(self, *arguments: Any) -> None:
        """Quiet."""


def _smaller(jpeg: bytes) -> bytes:
    image = Image.open(io.BytesIO(jpeg)).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    image.save(buffer := io.BytesIO(), "JPEG", quality=90)
    return buffer.getvalue()


def write_sources(folder: Path, url: str, num_pairs: int) -> None:
    """UNITS files of JSON lines."""
    for unit in range(UNITS):
        numbers = range(unit * num_pairs // UNITS, (unit + 1) * num_pairs // UNITS)
        lines = [
            json.dumps({"prompt": f"prompt {n // 8}", "label_0": n % 2}
                       | {f"image_{side}": f"{url}/{2 * n + side}.jpg" for side in (0, 1)})
            for n in numbers
        ]  # fmt: skip
        (folder / f"{unit:03d}.jsonl").write_text("\n".join(lines))


def settings(work: Path, model: str) -> dict[str, Any]:
    """The run, without its storage."""
    source = {"format": "jsonl", "path": str(work / "*.jsonl"), "allow_urls": True, "allow_private_urls": True}
    return {
        "name": "overlap",
        "ingest": {"sources": [source], "resources": {"ingest_node": 0.01}},
        "encode": {"model": model, "resolution": SIDE, "buckets": False, "batch_size": 4}
        | {"resources": {"encode_node": 0.01}},
    }


def seconds_of(config: RunConfig, *, together: bool) -> float:
    """Ingest and encode a new storage; the seconds of both stages."""
    for names in [["ingest", "encode"]] if together else [["ingest"], ["encode"]]:
        run_stages(config, names, lambda line: None)
    run = Run.open(config, lambda line: None)
    return sum(record.seconds for name in ("ingest", "encode") if (record := run.journal.record(name)))


def contents(config: RunConfig) -> dict[str, Any]:
    """What was made, without what follows from the moment: rows by key, and the digest of each shard."""
    storage, found = Storage(config.storage), {}
    assert config.encode
    for name, table in (
        ("pairs", pairs_table(storage)),
        ("latents", latents_table(storage, latents_fingerprint(config.encode))),
    ):
        rows = sorted(table.read().to_pylist(), key=lambda row: str(row["pair_key"]))
        shards = sorted({row["shard"] for row in rows if row["shard"]})
        found[name] = rows, {shard: hashlib.sha256(storage.read(shard)).hexdigest() for shard in shards}
    return found


def measure(work: Path, *, num_pairs: int, rounds: int, delay_s: float) -> dict[str, Any]:
    """Both ways, alternately; needs a cluster with both kinds of nodes that this process is connected to."""
    with SlowImages(delay_s) as server:
        write_sources(work, f"http://127.0.0.1:{server.server_port}", num_pairs)
        given = settings(work, write_model(work / "model").model)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for number in range(rounds):
            for together in (False, True):
                config = RunConfig.model_validate(given | {"storage": str(work / f"storage-{number}-{together}")})
                seconds[together].append(seconds_of(config, together=together))
                made = contents(config)
                if number == 0 and not together:
                    wanted = made
                assert made == wanted, "the same rows and bytes, whenever they were encoded"
        server.shutdown()
    apart, beside = min(seconds[False]), min(seconds[True])
    return {
        "pairs": num_pairs, "delay_s": delay_s, "apart_s": seconds[False], "beside_s": seconds[True],
        "ratio": round(beside / apart, 3),
    }  # fmt: skip


def main() -> None:
    """Start the cluster, measure, print, write the results."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pairs", type=int, default=1200)
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--delay", type=float, default=0.04, help="seconds that the server takes for an image")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="mapo-overlap-") as work, two_kinds_of_nodes():
        result = measure(Path(work), num_pairs=options.pairs, rounds=options.rounds, delay_s=options.delay)
    print(json.dumps(result, indent=1))
    conditions = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "goal": GOAL}
    RESULTS.write_text(json.dumps({"conditions": conditions, "result": result}, indent=1) + "\n")


class two_kinds_of_nodes:  # noqa: N801
    """A cluster on this machine, with this process connected to it."""

    def __enter__(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 << 20}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        for kind in ("ingest_node", "encode_node"):
            self._cluster.add_node(num_cpus=1, resources={kind: 1}, object_store_memory=100 << 20)
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level=logging.ERROR)

    def __exit__(self, *_: object) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()


if __name__ == "__main__":
    main()
